//! A libvirtd that is down, goes away in the middle, or hangs: nothing is deleted on a guess, the command fails clearly, and the
//! next one finishes. The commands reach libvirtd through a proxy that the test can cut.
#![allow(clippy::unwrap_used, missing_docs)]

mod common;

use std::fs;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use common::proxy::{Mode, Proxy};
use common::{Guest, Lab, Outcome, Parked, WALLET, finish, patience, virsh};
use provisioner_core::{create, destroy};
use serde_json::Value;

impl Lab {
    fn command_by(&self, proxy: &Proxy, program: &str, arguments: &[&str]) -> Command {
        let mut command = self.command(program);
        command.args(arguments).env("BLOCKHOST_LIBVIRT_URI", proxy.uri());
        command
    }

    fn run_by(&self, proxy: &Proxy, program: &str, arguments: &[&str]) -> Outcome {
        finish(self.command_by(proxy, program, arguments).spawn().unwrap())
    }

    /// What is there of this VM. Locks go with their process and are no trace.
    fn traces_of(&self, vm: &str) -> Vec<String> {
        self.traces().into_iter().filter(|trace| trace.contains(vm)).collect()
    }

    /// Creates parked at all `points`, one VM each.
    fn park_creates(&self, proxy: &Proxy, points: &[&'static str]) -> Vec<(&'static str, String, Parked)> {
        // The one that holds the database's lock comes last: the others need it to get where they park.
        let (last, first): (Vec<&'static str>, Vec<&'static str>) =
            points.iter().copied().partition(|point| *point == "create.journal");
        let mut all = Vec::new();
        for batch in [first, last] {
            let mut batch: Vec<_> = batch
                .into_iter()
                .map(|point| {
                    let vm = self.name(&point.replace('.', "-"));
                    let arguments = self.create_arguments(&vm);
                    let mut command = self.command_by(proxy, "blockhost-vm-create", &arguments);
                    (point, vm.clone(), self.set_off(point, &mut command))
                })
                .collect();
            batch.iter_mut().for_each(|(_, _, parked)| parked.arrive());
            all.extend(batch);
        }
        all
    }
}

/// The steps of create after which libvirt is needed at once. After the others it waits for the guest, and so for libvirt.
fn points_without_guest() -> Vec<&'static str> {
    const WAITING: [&str; 4] = ["create.autostart", "create.route", "create.ready", "create.register"];
    let points: Vec<_> = create::FAILPOINTS.iter().copied().filter(|point| !WAITING.contains(point)).collect();
    assert_eq!(points.len() + WAITING.len(), create::FAILPOINTS.len());
    points
}

#[test]
fn while_libvirt_is_down_nothing_is_deleted() {
    let lab = Lab::new(Guest::Blank);
    let (running, lost) = (lab.name("running"), lab.name("lost"));
    lab.add_legacy_vm(&running, &lab.address(0));
    virsh(&["start", &running]);
    // One whose domain is gone, so that only libvirt could say so.
    lab.add_legacy_vm(&lost, &lab.address(1));
    virsh(&["undefine", &lost]);
    let before = (lab.traces(), fs::read(lab.database()).unwrap());
    let new = lab.name("new");

    let proxy = Proxy::new(&lab);
    proxy.cut();
    for vm in [running.as_str(), &lost, &new] {
        for program in ["blockhost-vm-destroy", "blockhost-vm-start", "blockhost-vm-stop", "blockhost-vm-kill"] {
            let failed = lab.run_by(&proxy, program, &[vm]).fails_with(1).says("cannot connect to libvirt");
            assert!(failed.reason().contains("hint"), "{failed:?}");
        }
        lab.run_by(&proxy, "blockhost-vm-guest-exec", &[vm, "true"]).fails_with(1).says("cannot connect to libvirt");
        let gecos = lab.run_by(&proxy, "blockhost-vm-update-gecos", &[vm, WALLET, "--nft-id", "7"]);
        gecos.fails_with(1).says("cannot connect to libvirt");
        let status = lab.run_by(&proxy, "blockhost-vm-status", &[vm]).success();
        assert_eq!(status.stdout, "unknown\n");
    }
    lab.run_by(&proxy, "blockhost-vm-create", &lab.create_arguments(&new))
        .fails_with(1)
        .says("cannot connect to libvirt");
    let list = lab.run_by(&proxy, "blockhost-vm-list", &["--format", "json"]).success();
    let rows: Value = serde_json::from_str(&list.stdout).unwrap();
    assert_eq!(rows.as_array().unwrap().len(), 2);
    assert!(rows.as_array().unwrap().iter().all(|row| row["status"] == "unknown"), "{rows}");
    lab.run_by(&proxy, "blockhost-provisioner-detect", &[]).fails_with(1);
    assert_eq!((lab.traces(), fs::read(lab.database()).unwrap()), before);
    assert!(lab.state().join(format!("cloud-init/{lost}/cidata.iso")).exists());

    proxy.restore();
    assert_eq!(lab.run_by(&proxy, "blockhost-vm-status", &[&running]).stdout, "active\n");
    for vm in [&running, &lost] {
        lab.run_by(&proxy, "blockhost-vm-destroy", &[vm]).success();
    }
    lab.assert_no_traces("after libvirt has come back");
}

#[test]
fn a_libvirt_that_comes_back_soon_is_waited_for_to_undo_a_create() {
    let lab = Lab::new(Guest::Blank);
    let proxy = Proxy::new(&lab);
    let parked = lab.park_creates(&proxy, &points_without_guest());
    proxy.cut();
    let children: Vec<_> = parked.into_iter().map(|(point, vm, parked)| (point, vm, parked.go())).collect();
    thread::sleep(Duration::from_secs(2));
    proxy.restore();
    for (point, vm, child) in children {
        let failed = finish(child).fails_with(1);
        assert!(failed.reason().contains("libvirt"), "{point}: {failed:?}");
        assert_eq!(lab.traces_of(&vm), Vec::<String>::new(), "cut after {point}: {failed:#?}");
    }
    lab.assert_no_traces("after cuts at every step of create");
}

#[test]
fn what_a_create_could_not_undo_the_next_command_does() {
    let lab = Lab::new(Guest::Blank);
    let proxy = Proxy::new(&lab);
    let parked = lab.park_creates(&proxy, &points_without_guest());
    proxy.cut();
    let children: Vec<_> = parked.into_iter().map(|(point, vm, parked)| (point, vm, parked.go())).collect();
    for (point, vm, child) in children {
        let failed = finish(child).fails_with(1);
        if point == "create.begin" {
            // The address is chosen by what libvirt knows: without it nothing has begun.
            assert_eq!(lab.traces_of(&vm), Vec::<String>::new(), "{failed:?}");
            continue;
        }
        assert!(failed.reason().contains(&format!("blockhost-vm-destroy {vm}")), "{point}: {failed:?}");
        assert!(lab.state().join("journal").read_dir().unwrap().count() > 0);
        let traces = lab.traces_of(&vm);
        assert!(traces.iter().any(|trace| trace.starts_with("journal")), "{point}: {traces:?}");
        assert!(!traces.iter().any(|trace| trace.starts_with("record")), "{point}: {traces:?}");

        // As long as it cannot be undone the address stays taken, and a destroy does not pretend.
        if point == "create.overlay" {
            let allocated = lab.vms()["allocated_ips"].clone();
            let again = lab.run_by(&proxy, "blockhost-vm-destroy", &[&vm]);
            assert_eq!(again.code, Some(1), "{again:?}");
            assert!(again.reason().contains("cannot clear what a dead command left"), "{again:?}");
            assert_eq!((lab.traces_of(&vm), lab.vms()["allocated_ips"].clone()), (traces, allocated));
        }
    }
    proxy.restore();
    for point in points_without_guest() {
        let vm = lab.name(&point.replace('.', "-"));
        lab.run_by(&proxy, "blockhost-vm-destroy", &[&vm]).success();
        assert_eq!(lab.traces_of(&vm), Vec::<String>::new(), "{point}");
    }
    lab.assert_no_traces("after the destroys");
}

/// Once the VM is ready only the database is left to be written: losing libvirt costs nobody his VM.
#[test]
fn a_vm_that_is_ready_survives_the_loss_of_libvirt() {
    let lab = Lab::new(Guest::Small);
    let proxy = Proxy::new(&lab);
    let vm = lab.name("vm");
    let mut command = lab.command_by(&proxy, "blockhost-vm-create", &lab.create_arguments(&vm));
    let parked = lab.park_with("create.ready", &mut command);
    proxy.cut();
    finish(parked.go()).success();
    assert_eq!(lab.record(&vm)["status"], "active");
    proxy.restore();
    assert_eq!(lab.run_by(&proxy, "blockhost-vm-status", &[&vm]).stdout, "active\n");

    // It boots on without libvirt, which is away from when the wait for it begins, as is said, and is ready when libvirt is back. A
    // connection that is lost in the middle of the wait is tests/hostvm's to show.
    let second = lab.name("second");
    let mut command = lab.command_by(&proxy, "blockhost-vm-create", &lab.create_arguments(&second));
    let parked = lab.park_with("create.route", &mut command);
    proxy.cut();
    let child = parked.go();
    thread::sleep(Duration::from_secs(3));
    proxy.restore();
    let made = finish(child).success();
    assert!(made.stderr.contains("libvirt went away"), "{made:?}");
    assert_eq!(lab.status(&second), "active");
    lab.destroy(&second).success();
    lab.destroy(&vm).success();
    lab.assert_no_traces("after the destroy");
}

#[test]
fn a_destroy_that_loses_libvirt_deletes_nothing_on_a_guess() {
    let lab = Lab::new(Guest::Blank);
    let proxy = Proxy::new(&lab);
    let needs_libvirt =
        |point: &str| !["destroy.volumes", "destroy.route", "destroy.files", "destroy.record"].contains(&point);
    let parked: Vec<_> = (0..)
        .zip(destroy::FAILPOINTS)
        // The record is written under the database's lock only after its point: all can park at once.
        .map(|(index, point)| {
            let vm = lab.name(&point.replace('.', "-"));
            lab.add_legacy_vm(&vm, &lab.address(index));
            virsh(&["start", &vm]);
            let mut command = lab.command_by(&proxy, "blockhost-vm-destroy", &[&vm]);
            (*point, vm, lab.park_with(point, &mut command))
        })
        .collect();
    proxy.cut();
    for (point, vm, parked) in parked {
        let outcome = finish(parked.go());
        if !needs_libvirt(point) {
            outcome.success();
            assert_eq!(lab.traces_of(&vm), Vec::<String>::new(), "{point}");
            continue;
        }
        assert_eq!(outcome.code, Some(1), "{point}: {outcome:?}");
        assert!(outcome.reason().contains("libvirt"), "{point}: {outcome:?}");
        let traces = lab.traces_of(&vm);
        assert!(traces.contains(&format!("record {vm}")), "{point}: {traces:?}");
        assert!(traces.contains(&format!("volume {vm}.qcow2")), "{point}: {traces:?}");
        let ip = lab.record(&vm)["ip_address"].clone();
        assert!(lab.vms()["allocated_ips"].as_array().unwrap().contains(&ip), "{point}");
        // The journal was written when anything had begun.
        assert_eq!(traces.contains(&format!("journal {vm}.json")), point != "destroy.begin", "{point}: {traces:?}");
    }
    proxy.restore();
    for point in destroy::FAILPOINTS {
        lab.run_by(&proxy, "blockhost-vm-destroy", &[&lab.name(&point.replace('.', "-"))]).success();
    }
    lab.assert_no_traces("after libvirt has come back");
}

#[test]
fn a_libvirt_that_hangs_is_not_waited_for_for_ever() {
    let lab = Lab::new(Guest::Blank);
    let vm = lab.name("vm");
    lab.add_legacy_vm(&vm, &lab.address(0));
    let before = (lab.traces(), fs::read(lab.database()).unwrap());
    let proxy = Proxy::new(&lab);
    proxy.set(Mode::Hung);
    let begin = Instant::now();
    // All at once: each waits out its own limit.
    let run = |program: &str, arguments: &[&str]| lab.command_by(&proxy, program, arguments).spawn().unwrap();
    let status = run("blockhost-vm-status", &[&vm]);
    let list = run("blockhost-vm-list", &["--format", "json"]);
    let detect = run("blockhost-provisioner-detect", &[]);
    let create = run("blockhost-vm-create", &lab.create_arguments(&lab.name("new")));
    let destroy = run("blockhost-vm-destroy", &[&vm]);
    assert_eq!(finish(status).success().stdout, "unknown\n");
    let rows: Value = serde_json::from_str(&finish(list).success().stdout).unwrap();
    assert_eq!(rows[0]["status"], "unknown");
    finish(detect).fails_with(1);
    finish(destroy).fails_with(1).says("no answer");
    // The admin panel's limit for a list is 15 s. A create tries a little longer.
    assert!(begin.elapsed() < patience(Duration::from_secs(15)), "took {:?}", begin.elapsed());
    finish(create).fails_with(1).says("no answer");
    assert_eq!((lab.traces(), fs::read(lab.database()).unwrap()), before);
}

/// A daemon that is stopped in the middle answers no more and closes nothing. Its silence is noticed.
#[test]
fn a_libvirt_that_freezes_in_the_middle_ends_the_command() {
    let lab = Lab::new(Guest::Blank);
    let proxy = Proxy::new(&lab);
    let vm = lab.name("vm");
    let mut command = lab.command_by(&proxy, "blockhost-vm-create", &lab.create_arguments(&vm));
    let parked = lab.park_with("create.seed", &mut command);
    proxy.set(Mode::Frozen);
    let begin = Instant::now();
    let failed = finish(parked.go()).fails_with(1).says("libvirt");
    assert!(failed.reason().contains(&format!("blockhost-vm-destroy {vm}")), "{failed:?}");
    // The bound is generous: what is tested is that there is one.
    assert!(begin.elapsed() < patience(Duration::from_secs(120)), "took {:?}", begin.elapsed());
    proxy.restore();
    lab.destroy(&vm).success();
    lab.assert_no_traces("after libvirt answers again");
}
