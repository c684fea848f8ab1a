//! `blockhost-vm-create`, with the small guest: what it prints, registers and makes, and what it refuses.
#![allow(clippy::unwrap_used, missing_docs)]

mod common;

use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use common::{Guest, Lab, WALLET, finish, greeting, in_guest, output, patience, try_virsh, virsh, wait_until};
use serde_json::{Value, json};

/// A consumer that takes the last line that begins with a brace.
fn last_object(stdout: &str) -> Value {
    serde_json::from_str(stdout.lines().rfind(|line| line.starts_with('{')).unwrap()).unwrap()
}

/// A consumer that looks for the tagged line.
fn tagged_object(stdout: &str) -> Value {
    serde_json::from_str(stdout.lines().find_map(|line| line.strip_prefix("BLOCKHOST_RESULT: ")).unwrap()).unwrap()
}

fn sha256(file: &Path) -> String {
    output("sha256sum", &[file.to_str().unwrap()]).split(' ').next().unwrap().to_owned()
}

#[test]
fn a_vm_comes_goes_and_its_name_can_be_used_again() {
    let lab = Lab::new(Guest::Small);
    let vm = lab.name("web");
    let base = fs::canonicalize(lab.state().join("templates/blockhost-base.qcow2")).unwrap();
    let before = sha256(&base);
    assert_eq!(lab.status(&vm), "unknown");

    let created = lab.create(&vm).success();
    let result = last_object(&created.stdout);
    assert_eq!(tagged_object(&created.stdout), result);
    assert_eq!(created.stdout.lines().count(), 2);
    let ip = result["ip"].as_str().unwrap();
    let ipv6 = result["ipv6"].as_str().unwrap();
    let expected = json!({"status": "ok", "vm_name": vm, "ip": ip, "ipv6": ipv6, "vmid": vm, "nft_token_id": null,
        "username": "admin"});
    assert_eq!(created.stdout.lines().next().unwrap(), expected.to_string());
    assert_eq!(ipv6.is_empty(), !lab.ipv6());

    // It runs, with its address, its user and its host name.
    assert_eq!(lab.status(&vm), "active");
    greeting(ip, 22, Duration::from_secs(20));
    assert!(in_guest(&vm, "cat /etc/passwd").lines().any(|line| line.starts_with("admin:")));
    assert_eq!(in_guest(&vm, "hostname").trim(), vm);

    // It is registered.
    let record = lab.record(&vm);
    let keys: Vec<_> = record.as_object().unwrap().keys().map(String::as_str).collect();
    let order = [
        "vm_name",
        "vmid",
        "ip_address",
        "ipv6_address",
        "expires_at",
        "owner",
        "status",
        "created_at",
        "purpose",
        "wallet_address",
        "username",
        "network_mode",
    ];
    assert_eq!(keys, order);
    assert_eq!((&record["vmid"], &record["status"]), (&json!(0), &json!("active")));
    assert_eq!((&record["wallet_address"], &record["network_mode"]), (&json!(WALLET), &json!("broker")));
    assert_eq!(record["created_at"].as_str().unwrap().len(), "2026-11-21T02:00:00.000000+00:00".len());
    assert_eq!(lab.vms()["allocated_ips"], json!([ip]));

    // Nobody else reads its disk and seed, and the base stays root's.
    for volume in ["qcow2", "iso", "console.log"] {
        let file = lab.state().join(format!("vms/{vm}.{volume}"));
        assert_eq!(fs::metadata(&file).unwrap().permissions().mode() & 0o077, 0, "{}", file.display());
    }
    assert_eq!(fs::metadata(&base).unwrap().uid(), 0);

    // Neighbours cannot reach it at layer 2, and its filter is in force.
    let tap = virsh(&["domiflist", &vm]).split_whitespace().next().unwrap().to_owned();
    assert!(output("bridge", &["-d", "link", "show", "dev", &tap]).contains("isolated on"));
    assert!(output("ebtables", &["-t", "nat", "-L"]).contains(&tap));
    assert!(virsh(&["dominfo", &vm]).lines().any(|line| line.starts_with("Autostart") && line.ends_with("enable")));
    if lab.ipv6() {
        assert!(output("ip", &["-6", "route", "show", ipv6]).contains(&lab.bridge));
    }

    let destroyed = lab.destroy(&vm).success();
    assert!(destroyed.stdout.contains(&vm), "{destroyed:?}");
    lab.assert_no_traces("after destroy");
    assert_eq!(lab.record(&vm)["status"], "destroyed");
    assert_eq!(lab.status(&vm), "destroyed");
    assert_eq!(sha256(&base), before);

    // The name of a destroyed VM is free again, and its record is replaced.
    lab.create(&vm).success();
    assert_eq!(lab.record(&vm)["status"], "active");
    assert_eq!(lab.record(&vm).get("destroyed_at"), None);
    lab.create(&vm).fails_with(1).says("exists already");
    assert_eq!(lab.status(&vm), "active");
    lab.destroy(&vm).success();
    lab.assert_no_traces("after the second destroy");
}

#[test]
fn a_plan_writes_and_allocates_nothing() {
    let lab = Lab::new(Guest::Small);
    let vm = lab.name("plan");
    let snapshot = |lab: &Lab| output("find", &[lab.dir.to_str().unwrap(), "-printf", "%P %s %T@\n"]);
    let before = snapshot(&lab);
    let arguments = [vm.as_str(), "--owner-wallet", WALLET, "--nft-token-id", "42", "--disk", "4"];
    let plan = lab.run("blockhost-vm-create", &arguments).success();
    let result = tagged_object(&plan.stdout);
    assert_eq!(result["nft_token_id"], 42);
    assert!(result["ip"].as_str().unwrap().ends_with(&format!(".{}", lab.first)), "{result}");
    assert!(plan.stderr.contains("nothing was created"), "{plan:?}");
    assert_eq!(snapshot(&lab), before);
    lab.assert_no_traces("by a plan");

    // The host's own address is not given away, whatever the pool says.
    let gateway = lab.gateway.to_string();
    let (network, (net, host)) = (&lab.network, gateway.rsplit_once('.').unwrap());
    lab.configure(&format!("ip_pool: {{network: {network:?}, start: {host}, end: {host}, gateway: {net}.254}}\n"));
    lab.run("blockhost-vm-create", &arguments).fails_with(1).says("exhausted");
}

#[test]
fn the_mock_database_takes_the_place_of_everything() {
    let lab = Lab::new(Guest::Small);
    let mut arguments = lab.create_arguments("1e3");
    arguments.push("--mock");
    let result = tagged_object(&lab.run("blockhost-vm-create", &arguments).success().stdout);
    assert!(result["ipv6"].as_str().unwrap().starts_with("fd00::"), "{result}");
    let mock: Value = serde_json::from_slice(&fs::read(lab.state().join("mock-db.json")).unwrap()).unwrap();
    assert_eq!(mock["vms"]["1e3"]["status"], "active");
    lab.run("blockhost-vm-create", &arguments).fails_with(1).says("exists already");
    assert!(!lab.database().exists());
    lab.assert_no_traces("by a mock create");
}

#[test]
fn ten_at_once_get_ten_addresses_and_an_eleventh_is_told_which_pool_is_empty() {
    let lab = Lab::new(Guest::Small);
    let network = std::env::var("BLOCKHOST_TEST_NETWORK").unwrap();
    lab.configure(&format!("ip_pool: {{network: {network:?}, start: {}, end: {}}}\n", lab.first, lab.first + 9));
    let names: Vec<_> = (0..10).map(|i| lab.name(&format!("n{i}"))).collect();
    let children: Vec<_> = names
        .iter()
        .map(|vm| lab.command("blockhost-vm-create").args(lab.create_arguments(vm)).spawn().unwrap())
        .collect();
    wait_until("provisioning.lock, which engines look for", Duration::from_secs(60), || {
        lab.provisioning_lock().exists()
    });
    let mut addresses: Vec<_> = children
        .into_iter()
        .map(|child| tagged_object(&finish(child).success().stdout)["ip"].as_str().unwrap().to_owned())
        .collect();
    addresses.sort();
    addresses.dedup();
    assert_eq!(addresses.len(), 10);
    assert!(!lab.provisioning_lock().exists());

    let eleventh = lab.name("n10");
    let before = lab.traces();
    let refused = lab.create(&eleventh).fails_with(1);
    assert!(refused.reason().contains(network.split('/').next().unwrap()), "{refused:?}");
    assert_eq!(lab.traces(), before);

    let children: Vec<_> =
        names.iter().map(|vm| lab.command("blockhost-vm-destroy").arg(vm).spawn().unwrap()).collect();
    for child in children {
        finish(child).success();
    }
    lab.assert_no_traces("after ten destroys at once");
}

#[test]
fn a_guest_that_is_not_ready_in_time_is_undone_and_how_far_it_came_is_told() {
    let lab = Lab::new(Guest::Blank);
    lab.configure("libvirt: {domain_type: qemu, guest_ready_timeout_seconds: 3}\n");
    let vm = lab.name("slow");
    let failed = lab.create(&vm).fails_with(1).says("was not ready within 3 s");
    for part in ["has not opened the channel", "on its console", "guest_ready_timeout_seconds"] {
        assert!(failed.reason().contains(part), "{part}: {failed:#?}");
    }
    lab.assert_no_traces("after a guest that never was ready");
}

#[test]
fn of_two_creates_of_one_name_one_wins() {
    let lab = Lab::new(Guest::Small);
    let vm = lab.name("twin");
    let children: Vec<_> =
        (0..2).map(|_| lab.command("blockhost-vm-create").args(lab.create_arguments(&vm)).spawn().unwrap()).collect();
    let outcomes: Vec<_> = children.into_iter().map(finish).collect();
    let winners = outcomes.iter().filter(|outcome| outcome.code == Some(0)).count();
    assert_eq!(winners, 1, "{outcomes:#?}");
    let loser = outcomes.into_iter().find(|outcome| outcome.code != Some(0)).unwrap();
    assert!(loser.fails_with(1).reason().contains(&vm));
    assert_eq!(lab.status(&vm), "active");
    assert_eq!(lab.vms()["allocated_ips"].as_array().unwrap().len(), 1);
    lab.destroy(&vm).success();
    lab.assert_no_traces("by two creates");
}

#[test]
fn engines_find_the_lock_and_the_process_while_a_create_is_in_flight() {
    let lab = Lab::new(Guest::Small);
    let vm = lab.name("lock");
    let gate = lab.dir.join("gate");
    let child = lab
        .command("blockhost-vm-create")
        .args(lab.create_arguments(&vm))
        .env("BLOCKHOST_FAILPOINT", format!("create.address=wait:{}", gate.display()))
        .spawn()
        .unwrap();
    let pid = child.id();
    wait_for(&lab.dir.join("gate.reached"));
    assert_eq!(fs::read_to_string(lab.provisioning_lock()).unwrap().trim(), pid.to_string());
    let found = output("pgrep", &["-f", "blockhost-vm-create"]);
    assert!(found.lines().any(|line| line == pid.to_string()));

    // Another command for the same VM waits, and says for whom.
    let busy = lab.destroy(&vm).fails_with(1);
    assert!(busy.reason().contains(&pid.to_string()) && busy.reason().contains("blockhost-vm-create"), "{busy:?}");

    fs::write(&gate, "").unwrap();
    finish(child).success();
    assert!(!lab.provisioning_lock().exists());
    lab.destroy(&vm).success();
}

#[test]
fn what_is_there_already_is_not_taken_over() {
    let lab = Lab::new(Guest::Small);
    let vm = lab.name("taken");
    // A domain of somebody else's.
    lab.define(&vm, "");
    lab.create(&vm).fails_with(1).says("exists already");
    lab.destroy(&vm).fails_with(1).says("not BlockHost's");
    assert!(try_virsh(&["dominfo", &vm]).is_some());
    virsh(&["undefine", &vm]);

    // A disk of nobody we know, whether libvirt has noticed it or not.
    let disk = lab.state().join(format!("vms/{vm}.qcow2"));
    fs::write(&disk, "somebody's data").unwrap();
    for _ in 0..2 {
        lab.create(&vm).fails_with(1).says("vol-delete");
        lab.run("blockhost-vm-create", &[&vm, "--owner-wallet", WALLET]).fails_with(1).says("vol-delete");
        lab.destroy(&vm).success();
        assert_eq!(fs::read_to_string(&disk).unwrap(), "somebody's data");
        virsh(&["pool-refresh", &lab.pool]);
    }
    fs::remove_file(&disk).unwrap();
    virsh(&["pool-refresh", &lab.pool]);

    // One that comes while the create is at it: the create is undone, and that file stays.
    let seed = lab.state().join(format!("vms/{vm}.iso"));
    let parked = lab.park("create.overlay", "blockhost-vm-create", &lab.create_arguments(&vm));
    fs::write(&seed, "somebody's data").unwrap();
    finish(parked.go()).fails_with(1).says("meanwhile");
    assert_eq!(fs::read_to_string(&seed).unwrap(), "somebody's data");
    fs::remove_file(&seed).unwrap();
    virsh(&["pool-refresh", &lab.pool]);
    lab.assert_no_traces("after a create that was refused in the middle");

    // The disk of a VM of that name whose destroy could not delete it.
    lab.create(&vm).success();
    lab.destroy(&vm).success();
    fs::write(&disk, "left behind").unwrap();
    lab.create(&vm).success();

    // An address a defined domain uses is not handed out, though the database has lost it.
    let ip = lab.record(&vm)["ip_address"].clone();
    fs::write(lab.database(), r#"{"vms": {}, "next_vmid": 0, "allocated_ips": []}"#).unwrap();
    let second = lab.name("second");
    lab.create(&second).success();
    assert_ne!(lab.record(&second)["ip_address"], ip);
    // And the VM nobody knows any more can still be destroyed.
    lab.destroy(&vm).success();
    lab.destroy(&second).success();
    lab.assert_no_traces("after all destroys");
}

fn wait_for(file: &Path) {
    let end = Instant::now() + patience(Duration::from_secs(60));
    while !file.exists() {
        assert!(Instant::now() < end, "{} does not appear", file.display());
        thread::sleep(Duration::from_millis(20));
    }
}
