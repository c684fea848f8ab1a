//! Calls to libvirt that are carried out late: after their command was killed, or has given up, and after the VM was destroyed.
//! Whatever such a call does then, nothing of the VM stays. The commands reach libvirtd through a proxy that holds a request back.
#![allow(clippy::unwrap_used, missing_docs)]

mod common;

use std::process::{Child, Command};

use common::proxy::{Proxy, Request};
use common::{Guest, Lab, Outcome, finish, output, virsh};
use serde_json::Value;

/// How a command comes to have given up a call.
#[derive(Clone, Copy, Debug, PartialEq)]
enum End {
    Killed,
    Expired,
}

const ENDS: [End; 2] = [End::Killed, End::Expired];

impl Lab {
    fn by(&self, proxy: &Proxy, program: &str, arguments: &[&str]) -> Command {
        let mut command = self.command(program);
        command.args(arguments).env("BLOCKHOST_LIBVIRT_URI", proxy.uri());
        command
    }

    /// Runs a command until libvirt has been asked for `request`, and ends it. What was asked is still to come.
    fn give_up(&self, proxy: &Proxy, request: Request, end: End, program: &str, arguments: &[&str]) {
        proxy.hold(&[request]);
        let mut command = self.by(proxy, program, arguments);
        if end == End::Expired {
            command.env("BLOCKHOST_FAILPOINT", "libvirt.change=2");
        }
        let mut child: Child = command.spawn().unwrap();
        proxy.wait_for_held();
        if end == End::Killed {
            child.kill().unwrap();
        }
        let outcome = finish(child);
        match end {
            End::Killed => assert_eq!(outcome.code, None, "{outcome:#?}"),
            End::Expired => {
                assert_eq!(outcome.code, Some(1), "{outcome:#?}");
                assert!(outcome.reason().contains("no answer within 2 s"), "{outcome:#?}");
            }
        }
    }

    fn gc(&self) -> Outcome {
        self.run("blockhost-vm-gc", &["--execute"]).success()
    }

    fn repair(&self, arguments: &[&str]) -> (Outcome, Value) {
        let outcome = self.run("blockhost-provisioner-repair", &[&["--format", "json"], arguments].concat());
        let report = serde_json::from_str(&outcome.stdout).unwrap();
        (outcome, report)
    }

    /// What stands for a VM, without the locks of commands that were killed, which go with the next one.
    fn left(&self) -> Vec<String> {
        self.traces().into_iter().filter(|trace| !trace.starts_with("lock ")).collect()
    }

    #[track_caller]
    fn has_domain(&self, vm: &str) -> bool {
        virsh(&["list", "--all", "--name"]).lines().any(|line| line == vm)
    }
}

#[test]
fn a_definition_that_comes_after_the_destroy_is_removed_and_no_vm() {
    for end in ENDS {
        let lab = Lab::new(Guest::Blank);
        let proxy = Proxy::new(&lab);
        let vm = lab.name("late");
        lab.give_up(&proxy, Request::DefineDomain, end, "blockhost-vm-create", &lab.create_arguments(&vm));
        lab.destroy(&vm).success();
        assert_eq!(lab.left(), Vec::<String>::new(), "{end:?}");
        proxy.release();
        assert!(lab.has_domain(&vm), "{end:?}: the late definition did not come");

        // It is known for what it is, and is not registered as a VM whose record was lost.
        let (_, report) = lab.repair(&[]);
        let kinds: Vec<_> = report["findings"].as_array().unwrap().iter().map(|f| f["kind"].clone()).collect();
        assert_eq!(kinds, ["removed-vm-returned"], "{report:#}");
        if end == End::Killed {
            let (outcome, report) = lab.repair(&["--apply"]);
            outcome.success();
            assert_eq!(report["healthy"], true, "{report:#}");
        } else {
            let collected = lab.gc();
            assert!(collected.stdout.contains(&vm) && collected.stdout.contains("came back"), "{collected:#?}");
        }
        lab.assert_no_traces("after a late definition");
        lab.gc();
        assert_eq!(lab.repair(&[]).1["healthy"], true);
    }
}

#[test]
fn a_late_definition_does_not_block_its_name() {
    let lab = Lab::new(Guest::Blank);
    let proxy = Proxy::new(&lab);
    let vm = lab.name("again");
    lab.give_up(&proxy, Request::DefineDomain, End::Killed, "blockhost-vm-create", &lab.create_arguments(&vm));
    lab.destroy(&vm).success();
    proxy.release();
    assert!(lab.has_domain(&vm));
    // No command takes it for a VM.
    lab.run("blockhost-vm-start", &[&vm]).fails_with(1).says("there is no VM called");
    assert!(!lab.has_domain(&vm));

    lab.give_up(&proxy, Request::DefineDomain, End::Killed, "blockhost-vm-create", &lab.create_arguments(&vm));
    lab.gc();
    proxy.release();
    assert!(lab.has_domain(&vm));
    let parked = lab.park("create.define", "blockhost-vm-create", &lab.create_arguments(&vm));
    assert!(lab.has_domain(&vm), "the new VM is defined under the name");
    // A VM that is under way is nobody's leftover.
    lab.gc();
    assert!(lab.has_domain(&vm) && lab.volume(&format!("{vm}.qcow2")).exists());
    drop(parked.abandon().kill());
    lab.destroy(&vm).success();
    lab.assert_no_traces("after a name was used again");
}

#[test]
fn a_volume_that_comes_after_the_undo_is_removed() {
    for end in ENDS {
        let lab = Lab::new(Guest::Blank);
        let proxy = Proxy::new(&lab);
        let vm = lab.name("late");
        lab.give_up(&proxy, Request::CreateVolume, end, "blockhost-vm-create", &lab.create_arguments(&vm));
        lab.destroy(&vm).success();
        assert_eq!(lab.left(), Vec::<String>::new(), "{end:?}");
        proxy.release();
        assert!(lab.volume(&format!("{vm}.qcow2")).exists(), "{end:?}: the late volume did not come");
        let (_, report) = lab.repair(&[]);
        assert_eq!(report["findings"][0]["kind"], "removed-vm-returned", "{report:#}");
        lab.gc();
        lab.assert_no_traces("after a late volume");
    }
}

#[test]
fn a_start_that_comes_after_the_destroy_starts_nothing() {
    for end in ENDS {
        let lab = Lab::new(Guest::Blank);
        let proxy = Proxy::new(&lab);
        let vm = lab.name("late");
        lab.give_up(&proxy, Request::StartDomain, end, "blockhost-vm-create", &lab.create_arguments(&vm));
        lab.destroy(&vm).success();
        proxy.release();
        lab.assert_no_traces("after a late start");
    }
}

/// Undefining a domain that runs leaves it running, without a definition: it must not keep a disk that is deleted.
#[test]
fn a_start_that_falls_between_power_off_and_undefine_leaves_nothing() {
    let lab = Lab::new(Guest::Blank);
    let proxy = Proxy::new(&lab);
    let vm = vm_that_is_off(&lab, "between");
    proxy.hold(&[Request::UndefineDomain]);
    let child = lab.by(&proxy, "blockhost-vm-destroy", &[&vm]).spawn().unwrap();
    proxy.wait_for_held();
    virsh(&["start", &vm]);
    proxy.release();
    finish(child).success();
    lab.assert_no_traces("after a start in the middle of a destroy");
}

/// A VM that is off, with a record and a disk, as the earlier provisioner made them.
fn vm_that_is_off(lab: &Lab, name: &str) -> String {
    let vm = lab.name(name);
    lab.add_legacy_vm(&vm, &lab.address(0));
    vm
}

#[test]
fn an_undefine_or_a_deletion_that_comes_late_takes_nothing_of_others() {
    for request in [Request::UndefineDomain, Request::DeleteVolume] {
        for end in ENDS {
            let lab = Lab::new(Guest::Blank);
            let proxy = Proxy::new(&lab);
            let vm = vm_that_is_off(&lab, "late");
            lab.give_up(&proxy, request, end, "blockhost-vm-destroy", &[&vm]);
            lab.destroy(&vm).success();
            assert_eq!(lab.left(), Vec::<String>::new(), "{request:?} {end:?}");
            if request == Request::UndefineDomain {
                // Somebody else has the name by now; a domain is told by its UUID.
                lab.define(&vm, "");
            }
            proxy.release();
            assert_eq!(lab.has_domain(&vm), request == Request::UndefineDomain);
            if lab.has_domain(&vm) {
                virsh(&["undefine", &vm]);
            }
            lab.gc();
            lab.assert_no_traces("after a late removal");
        }
    }
}

#[test]
fn a_reset_of_the_limits_that_comes_late_brings_no_vm_back() {
    let lab = Lab::new(Guest::Blank);
    let proxy = Proxy::new(&lab);
    let vm = vm_that_is_off(&lab, "late");
    lab.run("blockhost-vm-throttle", &[&vm, "--cpu-shares", "100", "--cpu-quota", "50"]).success();
    // It is made of changes to a domain, which find none: a definition would make one.
    proxy.hold(&[Request::DefineDomain, Request::SetSchedulerParameters]);
    let mut child = lab.by(&proxy, "blockhost-vm-throttle", &[&vm, "--reset"]).spawn().unwrap();
    proxy.wait_for_held();
    child.kill().unwrap();
    finish(child);
    lab.destroy(&vm).success();
    proxy.release();
    lab.assert_no_traces("after a late reset");
}

/// A VM restored from a backup keeps its UUID. It is not taken for one that came late.
#[test]
fn a_vm_that_was_restored_is_left_alone() {
    let lab = Lab::new(Guest::Blank);
    let vm = vm_that_is_off(&lab, "again");
    let disk = lab.volume(&format!("{vm}.qcow2"));
    let (xml, copy) = (lab.dir.join("backup.xml"), lab.dir.join("backup.qcow2"));
    std::fs::write(&xml, virsh(&["dumpxml", "--inactive", &vm])).unwrap();
    std::fs::copy(&disk, &copy).unwrap();
    let record = lab.record(&vm);
    lab.destroy(&vm).success();
    assert_eq!(output("ls", &[lab.state().join("destroyed").to_str().unwrap()]).lines().count(), 1);

    // Step by step, with a collection after each.
    std::fs::copy(&copy, &disk).unwrap();
    lab.gc();
    assert!(disk.exists(), "the restored disk was deleted");
    virsh(&["define", xml.to_str().unwrap()]);
    lab.gc();
    assert!(disk.exists() && lab.has_domain(&vm), "the restored domain was removed");
    lab.edit_database(|vms| vms["vms"][&vm] = record);
    lab.gc();
    assert_eq!(lab.status(&vm), "suspended");
    // With the record first: it is a VM's, whatever is there of it.
    virsh(&["undefine", &vm]);
    std::fs::remove_file(&disk).unwrap();
    virsh(&["define", xml.to_str().unwrap()]);
    lab.gc();
    assert!(lab.has_domain(&vm), "the domain of a live record was removed");

    lab.destroy(&vm).success();
    // Without disk and record it is nobody's.
    virsh(&["define", xml.to_str().unwrap()]);
    lab.gc();
    lab.assert_no_traces("after the second destroy");
}
