//! A command that dies, is told to stop, or fails at any of its steps leaves nothing behind.
#![allow(clippy::unwrap_used, missing_docs)]

mod common;

use std::fs;
use std::path::PathBuf;

use common::{Guest, Lab, output, virsh};
use provisioner_core::{create, destroy};

/// A VM as its create has left it. To put it back takes a fraction of the time in which another is ready.
struct Saved {
    name: String,
    definition: PathBuf,
    volumes: Vec<(PathBuf, PathBuf)>,
    database: Vec<u8>,
}

impl Lab {
    fn save(&self, vm: &str) -> Saved {
        // What QEMU has open is not to be copied.
        self.run("blockhost-vm-kill", &[vm]).success();
        let definition = self.dir.join(format!("{vm}.saved.xml"));
        fs::write(&definition, virsh(&["dumpxml", "--inactive", "--security-info", vm])).unwrap();
        let mut volumes = Vec::new();
        for suffix in ["qcow2", "iso", "console.log"] {
            let volume = self.volume(&format!("{vm}.{suffix}"));
            let copy = self.dir.join(format!("{vm}.saved.{suffix}"));
            output("cp", &["-a", volume.to_str().unwrap(), copy.to_str().unwrap()]);
            volumes.push((volume, copy));
        }
        Saved { name: vm.to_owned(), definition, volumes, database: fs::read(self.database()).unwrap() }
    }

    /// Its definition, volumes, record and addresses, and with a start the rest: process, route, neighbour entry.
    fn restore(&self, saved: &Saved) {
        for (volume, copy) in &saved.volumes {
            output("cp", &["-a", copy.to_str().unwrap(), volume.to_str().unwrap()]);
        }
        virsh(&["pool-refresh", &self.pool]);
        fs::write(self.database(), &saved.database).unwrap();
        virsh(&["define", saved.definition.to_str().unwrap()]);
        virsh(&["autostart", &saved.name]);
        self.run("blockhost-vm-start", &[&saved.name]).success();
    }
}

/// After SIGKILL nobody can clean up; the next command for the VM does, whichever it is.
#[test]
fn killed_at_any_step_of_create_the_next_command_clears_up() {
    let lab = Lab::new(Guest::Small);
    for point in create::FAILPOINTS {
        let vm = lab.name(&point.replace('.', "-"));
        let arguments = lab.create_arguments(&vm);
        let killed = lab.run_at(&format!("{point}=kill"), "blockhost-vm-create", &arguments);
        assert_eq!(killed.code, None, "{point}: {killed:?}");
        assert_eq!(killed.stdout, "", "{point}");
        lab.destroy(&vm).success();
        lab.assert_no_traces(&format!("after a kill at {point} and a destroy"));
    }
}

#[test]
fn killed_at_any_step_of_create_the_next_create_works() {
    let lab = Lab::new(Guest::Small);
    let vm = lab.name("again");
    for point in create::FAILPOINTS {
        let arguments = lab.create_arguments(&vm);
        let killed = lab.run_at(&format!("{point}=kill"), "blockhost-vm-create", &arguments);
        assert_eq!(killed.code, None, "{point}: {killed:?}");
        lab.create(&vm).success();
        assert_eq!(lab.vms()["allocated_ips"].as_array().unwrap().len(), 1, "{point}");
        assert!(!lab.provisioning_lock().exists(), "{point}");
        lab.destroy(&vm).success();
        lab.assert_no_traces(&format!("after a kill at {point}, a create and a destroy"));
        // What undoing put back is the record of the VM destroyed before, so that its history is not lost.
        assert_eq!(lab.record(&vm)["status"], "destroyed", "{point}");
    }
}

#[test]
fn told_to_stop_at_any_step_create_undoes_itself() {
    let lab = Lab::new(Guest::Small);
    for (index, point) in create::FAILPOINTS.iter().enumerate() {
        let signal = ["term", "int", "hup"][index % 3];
        let vm = lab.name(&point.replace('.', "-"));
        let stopped = lab.run_at(&format!("{point}={signal}"), "blockhost-vm-create", &lab.create_arguments(&vm));
        stopped.fails_with(1).says("stopped by a signal");
        lab.assert_no_traces(&format!("after SIG{signal} at {point}"));
        assert!(lab.record(&vm).is_null(), "{point}");
    }
}

#[test]
fn failing_at_any_step_create_undoes_itself() {
    let lab = Lab::new(Guest::Small);
    for point in create::FAILPOINTS {
        let vm = lab.name(&point.replace('.', "-"));
        let failed = lab.run_at(&format!("{point}=error"), "blockhost-vm-create", &lab.create_arguments(&vm));
        failed.fails_with(1).says(point);
        lab.assert_no_traces(&format!("after a failure at {point}"));
    }
}

/// Undoing is interrupted too, fails too, and is then done a second time over what is left.
#[test]
fn undoing_can_be_repeated_from_any_step() {
    let lab = Lab::new(Guest::Small);
    for point in create::UNDO_FAILPOINTS {
        for action in ["kill", "error"] {
            let vm = lab.name(&format!("{}-{action}", point.replace('.', "-")));
            let failpoints = format!("create.autostart=error;{point}={action}");
            let failed = lab.run_at(&failpoints, "blockhost-vm-create", &lab.create_arguments(&vm));
            assert_ne!(failed.code, Some(0), "{failed:?}");
            assert!(!lab.traces().is_empty(), "{point}: the undo was to be incomplete");
            lab.destroy(&vm).success();
            lab.assert_no_traces(&format!("after {action} at {point} and a destroy"));
        }
    }
}

#[test]
fn stopped_at_any_step_of_destroy_the_next_command_finishes_it() {
    let lab = Lab::new(Guest::Small);
    let vm = lab.name("gone");
    lab.create(&vm).success();
    let saved = lab.save(&vm);
    for (index, point) in destroy::FAILPOINTS.iter().enumerate() {
        for action in ["kill", "error"] {
            lab.restore(&saved);
            let stopped = lab.run_at(&format!("{point}={action}"), "blockhost-vm-destroy", &[&vm]);
            assert_ne!(stopped.code, Some(0), "{point}={action}: {stopped:?}");
            // Any command for the VM finishes what was begun; before the journal was written nothing was.
            match index {
                0 => {
                    assert_eq!(lab.status(&vm), "active");
                    lab.destroy(&vm).success();
                }
                _ if index % 2 == 0 => drop(lab.destroy(&vm).success()),
                _ => drop(lab.run("blockhost-vm-start", &[&vm]).fails_with(1).says("no VM called")),
            }
            lab.assert_no_traces(&format!("after {action} at {point} of a destroy"));
            assert_eq!(lab.record(&vm)["status"], "destroyed");
        }
    }
}

/// Told to stop before it has begun, a destroy leaves the VM alone; once begun it goes through.
#[test]
fn told_to_stop_destroy_does_all_or_nothing() {
    let lab = Lab::new(Guest::Small);
    let vm = lab.name("whole");
    lab.create(&vm).success();
    let saved = lab.save(&vm);
    for (point, signal) in destroy::FAILPOINTS.iter().zip(["term", "int"].iter().cycle()) {
        lab.restore(&saved);
        let stopped = lab.run_at(&format!("{point}={signal}"), "blockhost-vm-destroy", &[&vm]);
        if *point == "destroy.begin" {
            assert_eq!(stopped.code, Some(1), "{stopped:?}");
            assert_eq!(lab.status(&vm), "active");
            lab.destroy(&vm).success();
        } else {
            stopped.success();
        }
        lab.assert_no_traces(&format!("after SIG{signal} at {point} of a destroy"));
    }
}
