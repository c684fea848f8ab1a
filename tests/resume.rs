//! `blockhost-vm-resume`: who has paid gets the VM back, and no time that was paid for is lost.
#![allow(clippy::unwrap_used, missing_docs)]

mod common;

use std::fs;

use common::proxy::Proxy;
use common::{Guest, Lab, Outcome, finish, qemu_pid, try_virsh, virsh};
use provisioner_contract::Timestamp;
use serde_json::{Value, json};

const PAST: &str = "2026-01-02T00:00:00.000000+00:00";
/// As other programs may spell a time; what is kept stays so.
const FUTURE: &str = "2099-01-01T00:00:00Z";

impl Lab {
    fn resume(&self, vm: &str, arguments: &[&str]) -> Outcome {
        self.run("blockhost-vm-resume", &[&[vm], arguments].concat())
    }

    fn set(&self, vm: &str, keys: Value) {
        self.edit_database(|vms| {
            for (key, value) in keys.as_object().unwrap() {
                vms["vms"][vm][key] = value.clone();
            }
        });
    }

    /// Makes it what gc leaves of an expired VM.
    fn suspend(&self, vm: &str, end: &str) {
        if try_virsh(&["domstate", vm]).unwrap().trim() != "shut off" {
            virsh(&["destroy", vm]);
        }
        virsh(&["autostart", "--disable", vm]);
        self.set(vm, json!({"status": "suspended", "suspended_at": PAST, "expires_at": end}));
    }

    #[track_caller]
    fn assert_resumed(&self, vm: &str) {
        assert_eq!(state(vm), "running");
        assert!(virsh(&["dominfo", vm]).lines().any(|line| line.starts_with("Autostart:") && line.ends_with("enable")));
        let record = self.record(vm);
        assert_eq!(record["status"], "active");
        assert!(record.get("suspended_at").is_none(), "{record}");
        assert!(!self.state().join(format!("locks/{vm}.lock")).exists());
    }

    fn end(&self, vm: &str) -> Timestamp {
        self.record(vm)["expires_at"].as_str().unwrap().parse().unwrap()
    }
}

fn state(vm: &str) -> String {
    virsh(&["domstate", vm]).trim().to_owned()
}

#[track_caller]
fn assert_days_from_now(end: Timestamp, days: u32) {
    let (earliest, latest) = (Timestamp::now().plus_days(days - 1), Timestamp::now().plus_days(days));
    assert!(earliest < end && end <= latest, "{end} is not {days} days from now");
}

#[test]
fn a_vm_runs_again_for_as_long_as_was_paid_for() {
    let lab = Lab::new(Guest::Blank);
    lab.configure("default_expiry_days: 12\n");
    let vm = lab.name("vm");
    lab.add_legacy_vm(&vm, &lab.address(0));
    lab.set(&vm, json!({"owner_wallet": "0x1", "nft_token_id": 7, "gecos_synced": false}));

    // The engine has extended it: that end is kept as it stands. First only looked at.
    lab.suspend(&vm, FUTURE);
    let before = fs::read(lab.database()).unwrap();
    let planned = lab.resume(&vm, &["--dry-run"]).success();
    assert!(planned.stdout.contains(&vm) && planned.stdout.contains("until 2099-01-01"), "{planned:?}");
    assert_eq!((state(&vm).as_str(), fs::read(lab.database()).unwrap()), ("shut off", before));
    let resumed = lab.resume(&vm, &[]).success();
    assert_eq!(resumed.stdout, "");
    lab.assert_resumed(&vm);
    let record = lab.record(&vm);
    let kept = ["expires_at", "owner_wallet", "nft_token_id", "gecos_synced"].map(|key| record[key].clone());
    assert_eq!(kept, [json!(FUTURE), json!("0x1"), json!(7), json!(false)]);

    // Active and running already: nothing changes.
    let (database, pid) = (fs::read(lab.database()).unwrap(), qemu_pid(&vm));
    lab.resume(&vm, &[]).success();
    assert_eq!((fs::read(lab.database()).unwrap(), qemu_pid(&vm)), (database, pid.clone()));

    // Recorded as suspended, and running: only the record was wrong. Paused: the same QEMU goes on.
    for act in [&["autostart", "--disable"][..], &["suspend"]] {
        virsh(&[act, &[&vm]].concat());
        lab.set(&vm, json!({"status": "suspended", "suspended_at": PAST}));
        lab.resume(&vm, &[]).success();
        lab.assert_resumed(&vm);
        assert_eq!(qemu_pid(&vm), pid);
    }

    // Nobody has extended it.
    lab.suspend(&vm, PAST);
    lab.resume(&vm, &[]).success();
    lab.assert_resumed(&vm);
    assert_days_from_now(lab.end(&vm), 12);
    // Days are added to what is left, and to now when nothing is.
    lab.resume(&vm, &["--extend-days", "7"]).success();
    assert_days_from_now(lab.end(&vm), 19);
    lab.suspend(&vm, PAST);
    lab.resume(&vm, &["--extend-days", "3"]).success();
    lab.assert_resumed(&vm);
    assert_days_from_now(lab.end(&vm), 3);

    // The engine extends it while it is being resumed.
    for (arguments, end) in [(&[][..], FUTURE), (&["--extend-days", "10"], "2099-01-11T00:00:00.000000+00:00")] {
        lab.suspend(&vm, PAST);
        let all = [&[vm.as_str()], arguments].concat();
        let parked = lab.park("resume.started", "blockhost-vm-resume", &all);
        lab.set(&vm, json!({"expires_at": FUTURE, "gecos_synced": true}));
        finish(parked.go()).success();
        lab.assert_resumed(&vm);
        assert_eq!((&lab.record(&vm)["expires_at"], &lab.record(&vm)["gecos_synced"]), (&json!(end), &json!(true)));
    }

    // Killed at any step it can be repeated, and is not collected in between.
    for point in provisioner_core::resume::FAILPOINTS {
        lab.suspend(&vm, FUTURE);
        let killed = lab.run_at(&format!("{point}=kill"), "blockhost-vm-resume", &[&vm]);
        assert_eq!(killed.code, None);
        let marked = *point == "resume.marked";
        assert_eq!(lab.record(&vm)["status"], if marked { "active" } else { "suspended" }, "{point}");
        let before = state(&vm);
        lab.run("blockhost-vm-gc", &["--execute"]).success();
        assert_eq!(state(&vm), before, "{point}");
        lab.resume(&vm, &[]).success();
        lab.assert_resumed(&vm);
    }
}

#[test]
fn what_cannot_run_is_not_recorded_as_active() {
    let lab = Lab::new(Guest::Blank);
    let [vm, gone, destroyed, foreign, missing] =
        ["vm", "gone", "destroyed", "foreign", "missing"].map(|vm| lab.name(vm));
    for (index, name) in (0..).zip([&vm, &gone]) {
        lab.add_legacy_vm(name, &lab.address(index));
        lab.suspend(name, FUTURE);
    }
    virsh(&["undefine", &gone]);
    lab.define(&foreign, "");
    for (index, name) in (2..).zip([&destroyed, &foreign]) {
        lab.add_record(name, &lab.address(index));
    }
    lab.set(&destroyed, json!({"status": "destroyed", "destroyed_at": PAST}));
    let before = fs::read(lab.database()).unwrap();
    for arguments in [&[][..], &["--dry-run"]] {
        lab.resume(&gone, arguments).fails_with(1).says("its domain is gone");
        lab.resume(&destroyed, arguments).fails_with(1).says("it is destroyed");
        lab.resume(&missing, arguments).fails_with(1).says("is not in the database");
        lab.resume(&foreign, arguments).fails_with(1).says("not BlockHost's");
    }
    for wrong in ["0", "-1", "x", "36501"] {
        lab.resume(&vm, &["--extend-days", wrong]).fails_with(2);
    }
    lab.run("blockhost-vm-resume", &[]).fails_with(2);
    lab.run("blockhost-vm-resume", &["../a"]).fails_with(2).says("VM name");
    assert_eq!((state(&foreign).as_str(), fs::read(lab.database()).unwrap()), ("shut off", before.clone()));

    // Its disk is away, so it does not start; then it is back.
    let (disk, away) = (lab.volume(&format!("{vm}.qcow2")), lab.dir.join("away.qcow2"));
    fs::rename(&disk, &away).unwrap();
    lab.resume(&vm, &[]).fails_with(1).says("cannot start domain");
    assert_eq!((state(&vm).as_str(), fs::read(lab.database()).unwrap()), ("shut off", before.clone()));
    fs::rename(&away, &disk).unwrap();

    // Neither is it started when nobody could write that it is active.
    let proxy = Proxy::new(&lab);
    proxy.cut();
    let command = lab.command("blockhost-vm-resume").arg(&vm).env("BLOCKHOST_LIBVIRT_URI", proxy.uri()).spawn();
    finish(command.unwrap()).fails_with(1).says("cannot connect to libvirt");
    for torn in ["", "{\"vms\": {"] {
        fs::write(lab.database(), torn).unwrap();
        lab.resume(&vm, &[]).fails_with(1).says("cannot use VM database");
        assert_eq!((fs::read(lab.database()).unwrap(), state(&vm).as_str()), (torn.into(), "shut off"));
    }
    fs::remove_file(lab.database()).unwrap();
    lab.resume(&vm, &[]).fails_with(1).says("is not in the database");
    assert!(!lab.database().exists());
    fs::write(lab.database(), &before).unwrap();
    lab.resume(&vm, &[]).success();
    lab.assert_resumed(&vm);

    // Without a hypervisor, on a file of its own.
    let mock = lab.state().join("mock-db.json");
    fs::write(
        &mock,
        json!({"vms": {"a": {"status": "suspended", "expires_at": PAST, "suspended_at": PAST}}}).to_string(),
    )
    .unwrap();
    let text = fs::read(&mock).unwrap();
    lab.resume("a", &["--mock", "--dry-run"]).success();
    assert_eq!(fs::read(&mock).unwrap(), text);
    lab.resume("a", &["--mock", "--extend-days", "9"]).success();
    let mocked: Value = serde_json::from_slice(&fs::read(&mock).unwrap()).unwrap();
    assert_eq!(mocked["vms"]["a"]["status"], "active");
    assert_days_from_now(mocked["vms"]["a"]["expires_at"].as_str().unwrap().parse().unwrap(), 9);
    lab.resume("b", &["--mock"]).fails_with(1).says("is not in the database");
}
