//! `blockhost-vm-gc`: who has not paid does not run for free, and who pays in time loses nothing.
#![allow(clippy::unwrap_used, missing_docs)]

mod common;

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::Command;

use common::proxy::Proxy;
use common::{Guest, Lab, Outcome, finish, output, qemu_pid, try_virsh, virsh};
use serde_json::{Value, json};

const PAST: &str = "2026-01-02T00:00:00.000000+00:00";
const FUTURE: &str = "2099-01-01T00:00:00.000000+00:00";
/// Guests without an operating system ignore the power button.
const EXECUTE: [&str; 3] = ["--execute", "--shutdown-timeout", "1"];

impl Lab {
    fn gc(&self, arguments: &[&str]) -> Outcome {
        self.run("blockhost-vm-gc", arguments)
    }

    fn report(&self, arguments: &[&str]) -> Value {
        let outcome = self.gc(&[arguments, &["--format", "json"]].concat());
        serde_json::from_str(&outcome.stdout).unwrap_or_else(|e| panic!("{e}: {outcome:#?}"))
    }

    /// A VM without a guest, with these keys in its record.
    fn add_vm(&self, vm: &str, index: u8, record: Value) -> String {
        let name = self.name(vm);
        self.add_legacy_vm(&name, &self.address(index));
        self.set(&name, record);
        name
    }

    fn set(&self, vm: &str, keys: Value) {
        self.edit_database(|vms| {
            for (key, value) in keys.as_object().unwrap() {
                vms["vms"][vm][key] = value.clone();
            }
        });
    }

    fn journal(&self, vm: &str) -> bool {
        self.state().join(format!("journal/{vm}.json")).exists()
    }
}

fn state(vm: &str) -> String {
    try_virsh(&["domstate", vm]).map_or("gone".into(), |state| state.trim().to_owned())
}

fn autostart(vm: &str) -> bool {
    virsh(&["dominfo", vm]).lines().any(|line| line.starts_with("Autostart:") && line.ends_with("enable"))
}

fn outcome_of<'a>(report: &'a Value, phase: &str, vm: &str) -> &'a str {
    let mut entries = report[phase]["candidates"].as_array().unwrap().iter();
    entries.find(|entry| entry["name"] == vm).map_or("none", |entry| entry["outcome"].as_str().unwrap())
}

/// Every combination on real domains: what must and what must not happen.
#[test]
fn the_expired_are_suspended_the_overdue_destroyed_and_nobody_else_is_touched() {
    let lab = Lab::new(Guest::Blank);
    let active = |end: &str| json!({"status": "active", "expires_at": end});
    let suspended = |end: &str| json!({"status": "suspended", "expires_at": end, "suspended_at": PAST});
    let paid = lab.add_vm("paid", 0, active(FUTURE));
    let running = lab.add_vm("running", 1, active(PAST));
    let off = lab.add_vm("off", 2, active(PAST));
    let paused = lab.add_vm("paused", 3, active(PAST));
    let gone = lab.add_vm("gone", 4, active(PAST));
    let recent = "2099-01-01T00:00:00.000000+00:00";
    let free = lab.add_vm("free", 5, json!({"status": "suspended", "expires_at": PAST, "suspended_at": recent}));
    let overdue = lab.add_vm("overdue", 6, suspended(PAST));
    let overdue_on = lab.add_vm("overdue-on", 7, suspended(PAST));
    let overdue_gone = lab.add_vm("overdue-gone", 8, suspended(PAST));
    let renewed = lab.add_vm("renewed", 9, suspended(FUTURE));
    let since = lab.add_vm("since", 10, json!({"status": "suspended", "expires_at": PAST}));
    let destroyed = lab.add_vm("destroyed", 11, json!({"status": "destroyed", "expires_at": PAST}));
    // One that is no VM of ours, and one whose record is damaged, among the good ones.
    let foreign = lab.name("foreign");
    lab.define(&foreign, "");
    lab.add_record(&foreign, &lab.address(12));
    lab.set(&foreign, active(PAST));
    let damaged = lab.name("damaged");
    lab.edit_database(|vms| vms["vms"][&damaged] = json!({"status": "active", "expires_at": 7}));
    lab.set(&running, json!({"owner_wallet": "0x1", "nft_token_id": 7}));

    for vm in [&paid, &running, &paused, &free, &overdue_on, &foreign] {
        virsh(&["start", vm]);
        virsh(&["autostart", vm]);
    }
    virsh(&["suspend", &paused]);
    for vm in [&gone, &overdue_gone] {
        virsh(&["undefine", vm]);
    }
    // A caller's own program, which fails; that is no obstacle.
    let hook = lab.dir.join("bin/blockhost-network-hook");
    fs::create_dir_all(hook.parent().unwrap()).unwrap();
    fs::write(&hook, format!("#!/bin/sh\necho \"$@\" $(virsh -c qemu:///system domstate \"$2\") >> {}/hooked\necho no such rule >&2\nexit 3\n", lab.dir.display())).unwrap();
    fs::set_permissions(&hook, fs::Permissions::from_mode(0o755)).unwrap();
    // Samples of an earlier provisioner: of a VM that is no more, and of one that is.
    for vm in [&destroyed, &paid, "memo"] {
        fs::write(lab.state().join(format!("metrics/{vm}.json")), "{}").unwrap();
    }
    virsh(&["undefine", &destroyed]);

    let all = [&paid, &running, &off, &paused, &gone, &free, &overdue, &overdue_on, &overdue_gone, &renewed, &since];
    let picture = || {
        let states: Vec<_> = all.iter().map(|vm| state(vm)).collect();
        (fs::read(lab.database()).unwrap(), lab.traces(), states)
    };
    let before = picture();
    let dry = lab.gc(&["--verbose"]);
    assert_eq!(picture(), before, "a dry run changes nothing");
    assert!(
        dry.stdout.contains("Suspend: 7 candidates\n") && dry.stdout.contains("Destroy: 3 candidates\n"),
        "{dry:#?}"
    );
    for vm in [&paid, &renewed] {
        assert!(dry.stdout.contains(&format!("Kept: {vm}: ")), "{dry:#?}");
    }
    assert_eq!(dry.code, Some(1), "a damaged record is a failure: {dry:#?}");
    assert!(dry.stderr.contains(&format!("blockhost-vm-resume {renewed}")), "{dry:#?}");

    let path = format!("{}:{}", hook.parent().unwrap().display(), std::env::var("PATH").unwrap());
    let child = lab.command("blockhost-vm-gc").args(EXECUTE).env("PATH", path).spawn().unwrap();
    let executed = finish(child);
    assert_eq!(executed.code, Some(1), "{executed:#?}");
    for part in [&damaged, &foreign, "not BlockHost's"] {
        assert!(executed.reason().contains(part), "{part}: {executed:#?}");
    }
    assert!(executed.stdout.contains("Suspend: 7 candidates\n"), "{executed:#?}");
    assert!(
        executed.stdout.ends_with("Done: 0 recovered, 6 suspended, 3 destroyed, 0 skipped, 2 failed\n"),
        "{executed:#?}"
    );
    assert!(executed.stderr.contains("no such rule"), "{executed:#?}");

    let records = |vm: &str| lab.record(vm);
    assert_eq!(
        (state(&paid).as_str(), autostart(&paid), &records(&paid)["status"]),
        ("running", true, &json!("active"))
    );
    assert_eq!(state(&foreign), "running", "what is not ours runs on");
    for vm in [&running, &off, &paused, &gone, &free, &since] {
        assert!(["shut off", "gone"].contains(&state(vm).as_str()), "{vm} is {}", state(vm));
        assert_eq!(records(vm)["status"], "suspended", "{vm}");
        assert!(vm == &gone || !autostart(vm), "{vm} starts with the host");
        assert!(vm == &gone || lab.volume(&format!("{vm}.qcow2")).exists());
        assert!(records(vm)["suspended_at"].as_str().unwrap().ends_with("+00:00"), "{vm}");
    }
    assert_eq!(records(&free)["suspended_at"], recent, "who starts it again does not get more grace");
    assert_eq!((&records(&running)["owner_wallet"], &records(&running)["nft_token_id"]), (&json!("0x1"), &json!(7)));
    assert_eq!(records(&renewed), serde_json::from_slice::<Value>(&before.0).unwrap()["vms"][&renewed]);
    for vm in [&overdue, &overdue_on, &overdue_gone] {
        assert_eq!((state(vm).as_str(), &records(vm)["status"]), ("gone", &json!("destroyed")), "{vm}");
        assert!(!lab.volume(&format!("{vm}.qcow2")).exists(), "{vm}");
    }
    let mut hooked: Vec<_> = fs::read_to_string(lab.dir.join("hooked")).unwrap().lines().map(str::to_owned).collect();
    hooked.sort();
    let before_the_domain_went = [
        format!("cleanup {overdue} shut off"),
        format!("cleanup {overdue_gone}"),
        format!("cleanup {overdue_on} running"),
    ];
    assert_eq!(hooked, before_the_domain_went);
    let samples = |vm: &str| lab.state().join(format!("metrics/{vm}.json")).exists();
    assert!(!samples(&destroyed) && samples(&paid) && samples("memo"));

    // Nothing is left to do the next day, and nothing is reported again.
    lab.edit_database(|vms| {
        for vm in [&foreign, &damaged] {
            vms["vms"].as_object_mut().unwrap().remove(vm.as_str());
        }
    });
    let again = lab.gc(&EXECUTE).success();
    for phase in ["Recover", "Suspend", "Destroy"] {
        assert!(again.stdout.contains(&format!("{phase}: 0 candidates\n")), "{again:#?}");
    }
}

#[test]
fn the_phases_and_the_grace_can_be_chosen() {
    let lab = Lab::new(Guest::Blank);
    let expired = lab.add_vm("expired", 0, json!({"status": "active", "expires_at": PAST}));
    let overdue = lab.add_vm("overdue", 1, json!({"status": "suspended", "expires_at": PAST, "suspended_at": PAST}));
    lab.configure("gc_grace_days: 20000\n");
    assert_eq!(lab.report(&[])["grace_days"], 20000);
    assert_eq!(outcome_of(&lab.report(&["--destroy-only"]), "destroy", &overdue), "none");
    let report = lab.report(&["--destroy-only", "--grace-days", "7", "--execute"]);
    assert_eq!(outcome_of(&report, "destroy", &overdue), "done");
    assert_eq!((outcome_of(&report, "suspend", &expired), &lab.record(&expired)["status"]), ("none", &json!("active")));
    // Suspended and destroyed in one run would be no grace at all.
    let report = lab.report(&["--suspend-only", "--grace-days", "0", "--execute"]);
    assert_eq!(outcome_of(&report, "suspend", &expired), "done");
    assert_eq!(outcome_of(&lab.report(&["--grace-days", "0", "--suspend-only"]), "destroy", &expired), "none");
    assert_eq!(outcome_of(&lab.report(&["--grace-days", "0"]), "destroy", &expired), "planned");
    lab.gc(&["--suspend-only", "--destroy-only"]).fails_with(2);
    lab.gc(&["--grace-days", "-1"]).fails_with(2);
    lab.gc(&["vm"]).fails_with(2);

    // Without a hypervisor, on a file of its own.
    let real = fs::read(lab.database()).unwrap();
    let records = json!({"a": {"status": "active", "expires_at": PAST}, "b": {"status": "suspended", "expires_at": PAST,
        "suspended_at": PAST, "ip_address": "10.0.0.7"}, "c": {"status": "active", "expires_at": FUTURE}});
    let mock = lab.state().join("mock-db.json");
    fs::write(&mock, json!({"vms": records, "allocated_ips": ["10.0.0.7"]}).to_string()).unwrap();
    let before = fs::read(&mock).unwrap();
    let nowhere = "qemu+unix:///system?socket=/nonexistent";
    let run = |arguments: &[&str]| {
        let mut command = lab.command("blockhost-vm-gc");
        let command = command.arg("--mock").args(arguments).env("BLOCKHOST_LIBVIRT_URI", nowhere);
        finish(command.spawn().unwrap()).success()
    };
    assert!(run(&["--grace-days", "7"]).stdout.contains("Destroy: 1 candidates\n"));
    assert_eq!(fs::read(&mock).unwrap(), before);
    run(&["--execute", "--grace-days", "7"]);
    let mocked: Value = serde_json::from_slice(&fs::read(&mock).unwrap()).unwrap();
    let statuses = ["a", "b", "c"].map(|vm| mocked["vms"][vm]["status"].clone());
    assert_eq!(statuses, ["suspended", "destroyed", "active"]);
    assert_eq!(mocked["allocated_ips"], json!([]));
    assert_eq!(fs::read(lab.database()).unwrap(), real);
}

/// A payment wins as long as it is in the database before the VM is marked, or its destroy begun.
#[test]
fn an_extension_that_arrives_meanwhile_wins() {
    let lab = Lab::new(Guest::Blank);
    let vm = lab.add_vm("vm", 0, json!({"expires_at": PAST}));
    virsh(&["start", &vm]);
    virsh(&["autostart", &vm]);
    let extend = || lab.set(&vm, json!({"expires_at": FUTURE}));

    // Between listing and looking again: it is not even asked to shut down.
    let pid = qemu_pid(&vm);
    let parked = lab.park("gc.listed", "blockhost-vm-gc", &EXECUTE);
    extend();
    let outcome = finish(parked.go()).success();
    assert!(outcome.stdout.contains("skipped: it is paid for until"), "{outcome:#?}");
    assert_eq!((qemu_pid(&vm), &lab.record(&vm)["status"]), (pid.clone(), &json!("active")));

    // After it was stopped: it runs again.
    lab.set(&vm, json!({"expires_at": PAST}));
    let parked = lab.park("gc.autostart", "blockhost-vm-gc", &EXECUTE);
    assert_eq!(state(&vm), "shut off");
    extend();
    let outcome = finish(parked.go()).success();
    assert!(outcome.stdout.contains("started again"), "{outcome:#?}");
    assert_eq!((state(&vm).as_str(), autostart(&vm), &lab.record(&vm)["status"]), ("running", true, &json!("active")));
    assert!(qemu_pid(&vm) != pid && !lab.journal(&vm));

    // Before a destroy, up to its point of no return.
    for point in ["gc.listed", "gc.hook", "destroy.begin"] {
        lab.set(&vm, json!({"status": "suspended", "expires_at": PAST, "suspended_at": PAST}));
        let parked = lab.park(point, "blockhost-vm-gc", &EXECUTE);
        extend();
        let before = lab.record(&vm);
        let outcome = finish(parked.go()).success();
        assert!(outcome.stdout.contains(&format!("{vm}: skipped")), "{point}: {outcome:#?}");
        assert_eq!((state(&vm).as_str(), lab.record(&vm)), ("running", before), "{point}");
        assert!(lab.volume(&format!("{vm}.qcow2")).exists() && !lab.journal(&vm), "{point}");
    }
}

/// Whoever comes next finishes, whatever the dead one had done; and a payment that came in between still wins.
#[test]
fn killed_at_any_step_the_next_one_finishes() {
    let lab = Lab::new(Guest::Blank);
    let vm = lab.add_vm("vm", 0, json!({"expires_at": PAST}));
    let expire = || {
        lab.edit_database(|vms| {
            vms["vms"][&vm]["status"] = "active".into();
            vms["vms"][&vm]["expires_at"] = PAST.into();
            vms["vms"][&vm].as_object_mut().unwrap().remove("suspended_at");
        });
        if state(&vm) != "running" {
            virsh(&["start", &vm]);
        }
        virsh(&["autostart", &vm]);
    };
    let killed = |point: &str| {
        expire();
        let killed = lab.run_at(&format!("{point}=kill"), "blockhost-vm-gc", &EXECUTE);
        assert_eq!((killed.code, killed.stdout.as_str()), (None, ""), "{point}");
    };
    // At gc.journal too, but a guest without an operating system would then be waited for: see below.
    for point in ["gc.listed", "gc.locked", "gc.stopped", "gc.autostart", "gc.marked"] {
        killed(point);
        lab.gc(&EXECUTE).success();
        assert_eq!((state(&vm).as_str(), autostart(&vm)), ("shut off", false), "{point}");
        assert_eq!(lab.record(&vm)["status"], "suspended", "{point}");
        assert!(!lab.journal(&vm), "{point}");
        assert!(
            fs::read_dir(lab.state().join("locks"))
                .unwrap()
                .all(|entry| !entry.unwrap().path().ends_with(format!("{vm}.lock")))
        );
    }

    // It was told to shut down, died on the way, and the VM has been paid for since: it runs. A dry run says what is to come.
    killed("gc.stopped");
    lab.set(&vm, json!({"expires_at": FUTURE}));
    assert_eq!(outcome_of(&lab.report(&[]), "recover", &vm), "planned");
    assert!(lab.journal(&vm) && state(&vm) == "shut off");
    let report = lab.report(&EXECUTE);
    assert_eq!(outcome_of(&report, "recover", &vm), "done", "{report:#}");
    assert_eq!((state(&vm).as_str(), autostart(&vm), &lab.record(&vm)["status"]), ("running", true, &json!("active")));
    assert!(!lab.journal(&vm));

    // So do the other commands for the VM.
    killed("gc.stopped");
    lab.run("blockhost-vm-resume", &[&vm]).success();
    assert_eq!((state(&vm).as_str(), autostart(&vm), &lab.record(&vm)["status"]), ("running", true, &json!("active")));
    assert!(!lab.journal(&vm));

    // And a destroy is finished.
    lab.set(&vm, json!({"status": "suspended", "expires_at": PAST, "suspended_at": PAST}));
    let killed = lab.run_at("destroy.domain=kill", "blockhost-vm-gc", &EXECUTE);
    assert_eq!(killed.code, None);
    assert_eq!(outcome_of(&lab.report(&EXECUTE), "recover", &vm), "done");
    lab.assert_no_traces("after a killed destroy and another collection");
}

/// A VM that another command works on is that command's; a create that lives is left alone, a dead one undone.
#[test]
fn what_others_are_at_is_theirs_and_what_the_dead_left_is_cleared() {
    let lab = Lab::new(Guest::Blank);
    let vm = lab.add_vm("vm", 0, json!({"expires_at": PAST}));
    virsh(&["start", &vm]);
    let new = lab.name("new");
    let create = lab.park("create.console", "blockhost-vm-create", &lab.create_arguments(&new));
    let of_create = || lab.traces().into_iter().filter(|trace| trace.contains(&new)).collect::<Vec<_>>();
    let before = of_create();
    assert!(before.len() >= 5, "{before:?}");

    let first = lab.park("gc.stopped", "blockhost-vm-gc", &EXECUTE);
    let second = lab.report(&EXECUTE);
    assert_eq!(outcome_of(&second, "suspend", &vm), "skipped", "{second:#}");
    let entry = &second["suspend"]["candidates"][0]["detail"];
    assert!(entry.as_str().unwrap().contains("blockhost-vm-gc (PID"), "{entry}");
    assert!(second["recover"]["candidates"].as_array().unwrap().is_empty(), "{second:#}");
    finish(first.go()).success();
    assert_eq!((state(&vm).as_str(), &lab.record(&vm)["status"]), ("shut off", &json!("suspended")));
    assert_eq!(of_create(), before);
    assert!(lab.provisioning_lock().exists());

    let mut create = create.abandon();
    create.kill().unwrap();
    create.wait().unwrap();
    let planned = lab.gc(&[]).success();
    assert!(planned.stdout.contains("Recover: 1 candidates") && planned.stdout.contains("create"), "{planned:#?}");
    assert!(lab.provisioning_lock().exists() && !of_create().is_empty());
    let cleared = lab.gc(&EXECUTE).success();
    assert!(
        cleared.stdout.contains("Recover: 1 candidates") && cleared.stdout.contains("provisioning.lock"),
        "{cleared:#?}"
    );
    assert_eq!(of_create(), Vec::<String>::new());
    assert!(!lab.provisioning_lock().exists());

    // A journal that cannot be read is a failure each time until somebody looks, and in nobody else's way.
    let journal = lab.state().join(format!("journal/{new}.json"));
    fs::create_dir_all(journal.parent().unwrap()).unwrap();
    fs::write(&journal, "{").unwrap();
    lab.set(&vm, json!({"suspended_at": PAST}));
    let failed = lab.gc(&EXECUTE);
    assert_eq!(failed.code, Some(1));
    assert!(failed.reason().contains("cannot use journal"), "{failed:#?}");
    assert_eq!(lab.record(&vm)["status"], "destroyed");
    assert!(journal.exists());
}

#[test]
fn told_to_stop_it_ends_after_the_vm_it_is_at() {
    let lab = Lab::new(Guest::Blank);
    let vms = ["a", "b"].map(|vm| lab.add_vm(vm, vm.as_bytes()[0] - b'a', json!({"expires_at": PAST})));
    for vm in &vms {
        virsh(&["start", vm]);
    }
    let stopped = lab.run_at("gc.journal=term", "blockhost-vm-gc", &EXECUTE);
    assert_eq!(stopped.code, Some(1), "{stopped:#?}");
    assert!(stopped.reason().contains("stopped by a signal"), "{stopped:#?}");
    assert!(stopped.stdout.contains("Done: 0 recovered, 1 suspended, 0 destroyed, 1 skipped"), "{stopped:#?}");
    assert_eq!((state(&vms[0]).as_str(), &lab.record(&vms[0])["status"]), ("shut off", &json!("suspended")));
    assert_eq!((state(&vms[1]).as_str(), &lab.record(&vms[1])["status"]), ("running", &json!("active")));
    assert!(!lab.journal(&vms[0]) && !lab.journal(&vms[1]));
}

/// On a host where something is missing or damaged: a clear error, and nothing lost.
#[test]
fn without_libvirt_or_database_nothing_is_lost() {
    let lab = Lab::new(Guest::Blank);
    let expired = lab.add_vm("expired", 0, json!({"expires_at": PAST}));
    let overdue = lab.add_vm("overdue", 1, json!({"status": "suspended", "expires_at": PAST, "suspended_at": PAST}));
    virsh(&["start", &expired]);
    virsh(&["undefine", &overdue]);
    let picture = || (fs::read(lab.database()).ok(), lab.traces(), state(&expired));
    let before = picture();
    let proxy = Proxy::new(&lab);
    let by = |command: &mut Command| finish(command.env("BLOCKHOST_LIBVIRT_URI", proxy.uri()).spawn().unwrap());
    proxy.cut();
    for arguments in [&[][..], &EXECUTE] {
        let failed = by(lab.command("blockhost-vm-gc").args(arguments)).fails_with(1).says("cannot connect to libvirt");
        assert!(failed.reason().contains("hint"), "{failed:?}");
    }
    assert_eq!(picture(), before);

    // In the middle: the VM it is at fails, and the rest is not tried.
    proxy.restore();
    let mut command = lab.command("blockhost-vm-gc");
    let parked = lab.park_with("gc.locked", command.args(EXECUTE).env("BLOCKHOST_LIBVIRT_URI", proxy.uri()));
    proxy.cut();
    let failed = finish(parked.go());
    assert_eq!(failed.code, Some(1));
    assert!(failed.stdout.contains("Stopped: cannot connect") && failed.stdout.contains("1 skipped"), "{failed:#?}");
    assert_eq!(picture(), before);

    let database = fs::read(lab.database()).unwrap();
    for torn in ["", "{\"vms\": {", "[]"] {
        fs::write(lab.database(), torn).unwrap();
        let failed = lab.gc(&EXECUTE).fails_with(1).says("cannot use VM database");
        assert!(failed.reason().contains("nothing was changed"), "{failed:?}");
        assert_eq!((fs::read(lab.database()).unwrap(), state(&expired).as_str()), (torn.into(), "running"));
        assert!(lab.volume(&format!("{overdue}.qcow2")).exists());
    }
    // No database is one without records, and none is made.
    fs::remove_file(lab.database()).unwrap();
    assert!(lab.gc(&EXECUTE).success().stdout.contains("Suspend: 0 candidates\n"));
    assert!(!lab.database().exists());
    fs::write(lab.database(), database).unwrap();
    lab.gc(&EXECUTE).success();
    assert_eq!((state(&expired).as_str(), &lab.record(&overdue)["status"]), ("shut off", &json!("destroyed")));
}

/// A guest with an operating system, from its end to its renewal; and a QEMU that hangs.
#[test]
fn a_guest_is_shut_down_in_order_and_comes_back_as_it_was() {
    let lab = Lab::new(Guest::Small);
    let vm = lab.name("vm");
    lab.create(&vm).success();

    // The process dies when the guest is about to be told, and the payment comes before anybody looks. Nobody knows whether
    // the guest goes down, so it is seen off and started again.
    lab.set(&vm, json!({"expires_at": PAST}));
    let pid = qemu_pid(&vm);
    let killed = lab.run_at("gc.journal=kill", "blockhost-vm-gc", &["--execute"]);
    assert_eq!((killed.code, lab.journal(&vm)), (None, true));
    lab.set(&vm, json!({"expires_at": FUTURE}));
    assert_eq!(outcome_of(&lab.report(&EXECUTE), "recover", &vm), "done");
    assert_eq!((state(&vm).as_str(), autostart(&vm), &lab.record(&vm)["status"]), ("running", true, &json!("active")));
    assert!(qemu_pid(&vm) != pid && !lab.journal(&vm));
    lab.run("blockhost-vm-throttle", &[&vm, "--cpu-shares", "512"]).success();
    let limits = lab.run("blockhost-vm-throttle", &[&vm]).success().stdout;
    lab.set(&vm, json!({"expires_at": PAST}));
    let done = lab.gc(&["--execute"]).success();
    assert!(done.stdout.contains(&format!("{vm}: suspended: shut down (expired")), "{done:#?}");
    let frozen = lab.add_vm("frozen", 13, json!({"expires_at": PAST}));
    virsh(&["start", &frozen]);
    output("kill", &["-STOP", &qemu_pid(&frozen)]);
    let done = lab.gc(&EXECUTE).success();
    assert!(done.stdout.contains(&format!("{frozen}: suspended: powered off")), "{done:#?}");
    assert_eq!(virsh(&["domstate", &vm, "--reason"]).trim(), "shut off (shutdown)");
    assert_eq!((state(&frozen).as_str(), autostart(&vm)), ("shut off", false));
    lab.destroy(&frozen).success();

    // Its network is as it was, also after a reboot of the host, which takes routes away.
    let address = lab.record(&vm)["ipv6_address"].as_str().unwrap().to_owned();
    if lab.ipv6() {
        output("ip", &["-6", "route", "del", &format!("{address}/128"), "dev", &lab.bridge]);
    }
    lab.run("blockhost-vm-resume", &[&vm, "--extend-days", "5"]).success();
    assert_eq!((state(&vm).as_str(), autostart(&vm)), ("running", true));
    if lab.ipv6() {
        assert!(output("ip", &["-6", "route", "show", &address]).contains(&lab.bridge));
    }
    assert_eq!(lab.run("blockhost-vm-throttle", &[&vm]).success().stdout, limits, "a limit is not shed by not paying");
    assert!(Path::new(&lab.volume(&format!("{vm}.qcow2"))).exists());
    assert!(lab.gc(&EXECUTE).success().stdout.contains("Suspend: 0 candidates\n"));
    lab.destroy(&vm).success();
    lab.assert_no_traces("after all");
}
