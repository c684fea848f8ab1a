//! `blockhost-vm-start`, `-stop` and `-kill`.
#![allow(clippy::unwrap_used, missing_docs)]

mod common;

use std::fs;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use common::{Guest, Lab, Outcome, output, patience, qemu_pid, try_virsh, virsh, wait_until};

const ALL: [&str; 3] = ["blockhost-vm-start", "blockhost-vm-stop", "blockhost-vm-kill"];

impl Lab {
    fn power(&self, verb: &str, vm: &str) -> Outcome {
        self.run(&format!("blockhost-vm-{verb}"), &[vm])
    }

    /// A power command that must succeed, and says nothing on stdout.
    #[track_caller]
    fn succeeds(&self, verb: &str, vm: &str) -> Outcome {
        let outcome = self.power(verb, vm).success();
        assert_eq!(outcome.stdout, "", "{verb}: {outcome:?}");
        outcome
    }
}

fn state(vm: &str) -> String {
    virsh(&["domstate", vm]).trim().to_owned()
}

/// How the domain was shut off, in libvirt's words: `shut off (shutdown)` or `shut off (destroyed)`.
fn reason(vm: &str) -> String {
    virsh(&["domstate", vm, "--reason"]).trim().to_owned()
}

#[test]
fn each_command_does_its_work_once_and_then_nothing() {
    let lab = Lab::new(Guest::Small);
    let vm = lab.name("vm");
    lab.create(&vm).success();
    let pid = qemu_pid(&vm);
    lab.succeeds("start", &vm);
    assert_eq!(qemu_pid(&vm), pid, "starting a running VM restarted it");

    // Paused, it is let go on; the same QEMU, not a new one.
    virsh(&["suspend", &vm]);
    lab.succeeds("start", &vm);
    assert_eq!((state(&vm).as_str(), qemu_pid(&vm)), ("running", pid));

    // The guest shuts itself down, and stop returns when it is off, not before.
    lab.succeeds("stop", &vm);
    assert_eq!(reason(&vm), "shut off (shutdown)");
    let console = fs::read_to_string(lab.volume(&format!("{vm}.console.log"))).unwrap();
    assert!(console.contains("Power down"), "the guest was not asked: {console}");
    lab.succeeds("stop", &vm);
    lab.succeeds("kill", &vm);
    assert_eq!(reason(&vm), "shut off (shutdown)");

    // A start restores what a reboot of the host takes away.
    lab.succeeds("start", &vm);
    assert_eq!(state(&vm), "running");
    if lab.ipv6() {
        let address = lab.record(&vm)["ipv6_address"].as_str().unwrap().to_owned();
        let route = || output("ip", &["-6", "route", "show", &address]);
        output("ip", &["-6", "route", "del", &format!("{address}/128"), "dev", &lab.bridge]);
        assert_eq!(route(), "");
        lab.succeeds("start", &vm);
        assert!(route().contains(&lab.bridge), "the route to {address} is missing");
    }

    // A paused guest sees no button: stop has to wake it first. It has just been started, so it may still boot.
    virsh(&["suspend", &vm]);
    lab.succeeds("stop", &vm);
    assert_eq!(reason(&vm), "shut off (shutdown)");

    // Kill asks nobody.
    lab.succeeds("start", &vm);
    lab.succeeds("kill", &vm);
    assert_eq!(reason(&vm), "shut off (destroyed)");

    // An expired VM is started, with a warning that this will not last.
    lab.edit_database(|vms| vms["vms"][&vm]["status"] = "suspended".into());
    let before = fs::read(lab.database()).unwrap();
    let warned = lab.succeeds("start", &vm);
    assert!(warned.stderr.contains("warning") && warned.stderr.contains("suspends it again"), "{warned:?}");
    assert_eq!(state(&vm), "running");
    assert_eq!(fs::read(lab.database()).unwrap(), before, "starting does not pay for anything");

    // Power needs no database.
    fs::write(lab.database(), "{").unwrap();
    assert!(lab.succeeds("kill", &vm).stderr.contains("warning"));
    assert_eq!(state(&vm), "shut off");
    fs::write(lab.database(), before).unwrap();
    lab.destroy(&vm).success();
    lab.assert_no_traces("after all");
}

#[test]
fn what_is_not_there_or_not_ours_is_refused() {
    let lab = Lab::new(Guest::Blank);
    let (missing, foreign) = (lab.name("missing"), lab.name("foreign"));
    lab.define(&foreign, "");
    for program in ALL {
        lab.run(program, &[&missing]).fails_with(1).says(&format!("there is no VM called {missing}"));
        lab.run(program, &[&foreign]).fails_with(1).says("not BlockHost's");
        lab.run(program, &[]).fails_with(2);
        lab.run(program, &["a", "b"]).fails_with(2);
        lab.run(program, &["--force", "a"]).fails_with(2);
        lab.run(program, &["../a"]).fails_with(2).says("VM name");
    }
    assert_eq!(state(&foreign), "shut off");
    virsh(&["start", &foreign]);
    for program in ["blockhost-vm-stop", "blockhost-vm-kill"] {
        lab.run(program, &[&foreign]).fails_with(1).says("not BlockHost's");
    }
    assert_eq!(state(&foreign), "running");
}

#[test]
fn a_vm_of_the_earlier_provisioner_obeys() {
    let lab = Lab::new(Guest::Blank);
    let vm = lab.name("legacy");
    lab.add_legacy_vm(&vm, &lab.address(0));
    lab.succeeds("start", &vm);
    assert_eq!(state(&vm), "running");
    lab.succeeds("kill", &vm);
    assert_eq!(state(&vm), "shut off");
    // Whether QEMU died by itself makes no difference to a start.
    lab.succeeds("start", &vm);
    output("kill", &["-KILL", &qemu_pid(&vm)]);
    wait_until("libvirt to notice", Duration::from_secs(60), || state(&vm) == "shut off");
    lab.succeeds("start", &vm);
    assert_eq!(lab.status(&vm), "active");
}

/// A stopped QEMU process, as stuck storage makes one. It goes on when this is dropped.
struct Frozen(String);

impl Frozen {
    fn new(vm: &str) -> Self {
        let pid = qemu_pid(vm);
        output("kill", &["-STOP", &pid]);
        Self(pid)
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        let _ = Command::new("kill").args(["-CONT", &self.0]).stderr(Stdio::null()).status();
    }
}

#[test]
fn a_frozen_qemu_is_not_waited_for_for_ever() {
    let lab = Lab::new(Guest::Blank);
    let (deaf, frozen) = (lab.name("deaf"), lab.name("frozen"));
    for (index, vm) in (0..).zip([&deaf, &frozen]) {
        lab.add_legacy_vm(vm, &lab.address(index));
        lab.succeeds("start", vm);
    }
    let _thaw = Frozen::new(&frozen);

    // Both stops at once, as each takes its whole time: a guest that ignores the button, and a QEMU that hangs.
    let begin = Instant::now();
    let stops = [&deaf, &frozen].map(|vm| lab.command("blockhost-vm-stop").arg(vm).spawn().unwrap());
    for (vm, stop) in [&deaf, &frozen].into_iter().zip(stops) {
        let failed = common::finish(stop).fails_with(1);
        assert!(failed.reason().contains(vm) && failed.reason().contains("still runs"), "{failed:?}");
        assert!(failed.reason().contains("blockhost-vm-kill"), "{failed:?}");
    }
    assert!(begin.elapsed() < patience(Duration::from_secs(58)), "stop took {:?}", begin.elapsed());
    assert_eq!(state(&deaf), "running");

    let begin = Instant::now();
    lab.succeeds("kill", &frozen);
    // libvirt waits 10 s for a SIGTERM to help; callers give up after 60 s.
    assert!(begin.elapsed() < patience(Duration::from_secs(40)), "kill took {:?}", begin.elapsed());
    assert_eq!(try_virsh(&["domstate", &frozen]).unwrap().trim(), "shut off");
    lab.succeeds("kill", &deaf);
}
