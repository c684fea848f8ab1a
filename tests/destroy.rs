//! `blockhost-vm-destroy`: in whatever state a VM is, all that is its own goes, and nothing else does.
#![allow(clippy::unwrap_used, missing_docs)]

mod common;

use std::fs;
use std::path::Path;
use std::time::Duration;

use common::{Guest, Lab, finish, output, qemu_pid, sha256, try_virsh, virsh, wait_until};
use serde_json::json;

fn path(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn what_does_not_exist_is_a_success_and_said_so() {
    let lab = Lab::new(Guest::Blank);
    let vm = lab.name("none");
    for _ in 0..2 {
        let outcome = lab.destroy(&vm).success();
        assert!(outcome.stdout.contains(&vm) && outcome.stdout.contains("nothing"), "{outcome:?}");
    }
    lab.assert_no_traces("by destroying nothing");
    assert!(!lab.database().exists());

    for name in ["", "../vms", "-x", "a b", "a\n"] {
        lab.run("blockhost-vm-destroy", &["--", name]).fails_with(2).says("VM name");
    }
    lab.run("blockhost-vm-destroy", &[]).fails_with(2);
}

/// Between two destroys of one VM its address may be given to another.
#[test]
fn an_address_that_has_a_new_owner_is_not_freed() {
    let lab = Lab::new(Guest::Blank);
    let (old, new) = (lab.name("old"), lab.name("new"));
    lab.add_legacy_vm(&old, &lab.address(0));
    lab.add_record(&new, &lab.address(1));
    lab.destroy(&old).success();
    assert_eq!(lab.vms()["allocated_ips"], json!([lab.address(1)]));

    lab.edit_database(|vms| {
        vms["vms"][&new]["ip_address"] = lab.address(0).into();
        vms["allocated_ips"] = json!([lab.address(0)]);
    });
    let before = fs::read(lab.database()).unwrap();
    lab.destroy(&old).success();
    assert_eq!(fs::read(lab.database()).unwrap(), before, "a second destroy changes nothing");

    // Another program's rewrite has put the destroyed record back to active, as it stood before.
    lab.edit_database(|vms| vms["vms"][&old]["status"] = "active".into());
    lab.destroy(&old).success();
    assert_eq!(lab.record(&old)["status"], "destroyed");
    assert_eq!(lab.vms()["allocated_ips"], json!([lab.address(0)]), "the address is {new}'s now");
}

/// One VM per state, made together; what is checked for each is that nothing of it is left.
#[test]
fn a_vm_goes_in_any_state() {
    let lab = Lab::new(Guest::Small);
    let before = sha256(&lab.base());
    let all = ["dead", "saved", "snapshot", "media", "paused", "nvram", "transient"].map(|state| lab.name(state));
    let [dead, saved, snapshot, media, paused, nvram, transient] = &all;
    let created = [dead, saved, snapshot, media];
    let children: Vec<_> = created
        .iter()
        .map(|vm| lab.command("blockhost-vm-create").args(lab.create_arguments(vm)).spawn().unwrap())
        .collect();
    for child in children {
        finish(child).success();
    }
    // The rest needs no guest, and covers the VMs of the earlier provisioner.
    for (index, vm) in (8..).zip([paused, nvram, transient]) {
        lab.add_legacy_vm(vm, &lab.address(index));
    }
    let gone = |vm: &str| {
        let outcome = lab.destroy(vm).success();
        assert!(outcome.stdout.contains("is destroyed"), "{outcome:?}");
        assert_eq!(try_virsh(&["dominfo", vm]), None, "{vm}");
        let left: Vec<_> = lab.traces().into_iter().filter(|trace| trace.contains(vm)).collect();
        assert_eq!(left, Vec::<String>::new());
        assert_eq!(lab.record(vm)["status"], "destroyed");
    };

    virsh(&["start", paused]);
    virsh(&["suspend", paused]);
    gone(paused);

    let pid = qemu_pid(dead);
    output("kill", &["-KILL", &pid]);
    // With the metrics' cache of it, which other programs wrote.
    let sample = lab.state().join(format!("metrics/{dead}.json"));
    fs::write(&sample, "{}").unwrap();
    gone(dead);
    assert!(!sample.exists());

    virsh(&["managedsave", saved]);
    let image = format!("/var/lib/libvirt/qemu/save/{saved}.save");
    assert!(Path::new(&image).exists());
    gone(saved);
    assert!(!Path::new(&image).exists());

    // An internal snapshot, then an external one: its file is the disk the VM writes to from then on.
    virsh(&["snapshot-create-as", snapshot, "first"]);
    virsh(&["snapshot-create-as", snapshot, "second", "--disk-only"]);
    let file = lab.volume(&format!("{snapshot}.second"));
    assert!(file.exists());
    gone(snapshot);
    assert!(!file.exists(), "the snapshot's file stays");

    // Variables of a firmware; the firmware itself is the host's.
    let (firmware, variables) = (lab.dir.join("firmware.fd"), lab.dir.join("variables.fd"));
    for file in [&firmware, &variables] {
        fs::write(file, "firmware").unwrap();
    }
    let xml = virsh(&["dumpxml", "--inactive", nvram]).replace(
        "</os>",
        &format!(
            "<loader readonly='yes' type='pflash'>{}</loader><nvram>{}</nvram></os>",
            path(&firmware),
            path(&variables)
        ),
    );
    fs::write(lab.dir.join("nvram.xml"), xml).unwrap();
    virsh(&["define", path(&lab.dir.join("nvram.xml"))]);
    gone(nvram);
    assert!(firmware.exists() && !variables.exists());

    // Media and disks that somebody attached: outside the pool, inside it, and another VM's.
    let foreign = lab.dir.join("foreign.iso");
    fs::write(&foreign, vec![1; 1 << 20]).unwrap();
    let [inside, data] = ["foreign.iso", "data.qcow2"].map(|name| lab.volume(name));
    fs::copy(&foreign, &inside).unwrap();
    output("qemu-img", &["create", "-q", "-f", "qcow2", path(&data), "1M"]);
    let other = lab.name("other");
    lab.add_legacy_vm(&other, &lab.address(13));
    let others_disk = lab.volume(&format!("{other}.qcow2"));
    let attached = [&foreign, &inside, &data, &others_disk].map(|file| (file.clone(), sha256(file)));
    virsh(&["destroy", media]);
    for (file, target, kind) in
        [(&foreign, "sda", "cdrom"), (&inside, "sdb", "cdrom"), (&data, "vdc", "disk"), (&others_disk, "vdd", "disk")]
    {
        let format = if kind == "cdrom" { "raw" } else { "qcow2" };
        let bus = if kind == "cdrom" { "sata" } else { "virtio" };
        let options = ["--type", kind, "--targetbus", bus, "--subdriver", format, "--config"];
        virsh(&[&["attach-disk", media, path(file), target], &options[..]].concat());
    }
    virsh(&["start", media]);
    gone(media);
    for (file, sum) in &attached {
        assert_eq!(sha256(file), *sum, "{}", file.display());
        assert!(file.exists());
    }
    fs::remove_file(&inside).unwrap();
    fs::remove_file(&data).unwrap();
    lab.destroy(&other).success();

    // Somebody has undefined it while it ran.
    virsh(&["start", transient]);
    virsh(&["undefine", transient]);
    gone(transient);

    assert_eq!(sha256(&lab.base()), before);
    lab.assert_no_traces("after all were destroyed");
}

/// What another domain uses is kept, even under our own name, and nothing that depends on it is given away.
#[test]
fn a_disk_that_another_domain_uses_is_kept() {
    let lab = Lab::new(Guest::Blank);
    let (vm, thief) = (lab.name("vm"), lab.name("thief"));
    lab.add_legacy_vm(&vm, &lab.address(0));
    let disk = lab.volume(&format!("{vm}.qcow2"));
    // By its path, and by pool and volume: a description may name it either way.
    for (kind, source) in
        [("file", format!("file='{}'", disk.display())), ("volume", format!("pool='{}' volume='{vm}.qcow2'", lab.pool))]
    {
        let device = format!(
            "<disk type='{kind}' device='disk'><driver name='qemu' type='qcow2'/><source {source}/>\
             <target dev='vda' bus='virtio'/></disk>"
        );
        lab.define(&thief, &device);
        let outcome = lab.destroy(&vm);
        assert_eq!(outcome.code, Some(1), "{kind}: {outcome:?}");
        assert!(outcome.reason().contains("in use by another domain"), "{kind}: {outcome:?}");
        assert!(disk.exists());
        assert_eq!(lab.vms()["allocated_ips"], json!([lab.address(0)]));
        virsh(&["undefine", &thief]);
    }

    lab.destroy(&vm).success();
    lab.assert_no_traces("after the second destroy");
}

#[test]
fn a_vm_of_the_earlier_provisioner_goes_completely() {
    let lab = Lab::new(Guest::Blank);
    let [off, running, lost] = ["off", "running", "lost"].map(|vm| lab.name(vm));
    for (index, vm) in (0..).zip([&off, &running, &lost]) {
        lab.add_legacy_vm(vm, &lab.address(index));
    }
    let base = lab.legacy_base();
    let before = sha256(&base);
    virsh(&["start", &running]);
    // Its domain is gone already, its files are not.
    virsh(&["undefine", &lost]);
    for vm in [&off, &running, &lost] {
        lab.destroy(vm).success();
        assert!(!lab.state().join("cloud-init").join(vm).exists(), "the seed's directory of {vm} stays");
        assert_eq!(lab.record(vm)["status"], "destroyed");
    }
    lab.assert_no_traces("after three destroys");
    assert_eq!(sha256(&base), before);
    assert!(lab.state().join("templates").is_symlink());
    assert!(lab.state().join("cloud-init").is_dir());
}

#[test]
fn a_domain_that_is_not_blockhosts_is_refused() {
    let lab = Lab::new(Guest::Blank);
    let vm = lab.name("foreign");
    let elsewhere = lab.dir.join("elsewhere.qcow2");
    output("qemu-img", &["create", "-q", "-f", "qcow2", path(&elsewhere), "1M"]);
    let disk = |file: &Path| {
        format!(
            "<disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='{}'/>\
             <target dev='vda' bus='virtio'/></disk>",
            file.display()
        )
    };
    lab.define(&vm, &disk(&elsewhere));
    virsh(&["start", &vm]);
    lab.destroy(&vm).fails_with(1).says("not BlockHost's");

    // A record of that name makes it no more ours, as long as its disk is elsewhere.
    lab.add_record(&vm, &lab.address(0));
    let database = fs::read(lab.database()).unwrap();
    lab.destroy(&vm).fails_with(1).says("not BlockHost's");
    assert_eq!(virsh(&["domstate", &vm]).trim(), "running");
    assert!(elsewhere.exists());
    assert_eq!(fs::read(lab.database()).unwrap(), database);

    // Nor does a disk in our pool, without a record.
    virsh(&["destroy", &vm]);
    virsh(&["undefine", &vm]);
    lab.edit_database(|vms| *vms = json!({"vms": {}, "next_vmid": 0, "allocated_ips": []}));
    let inside = lab.volume(&format!("{vm}.qcow2"));
    fs::copy(&elsewhere, &inside).unwrap();
    lab.define(&vm, &disk(&inside));
    lab.destroy(&vm).fails_with(1).says("not BlockHost's");
    assert!(inside.exists());
}

/// A record that another program has damaged: destroy says which and what is wrong, and begins nothing it could not end.
#[test]
fn a_damaged_record_is_named_and_nothing_is_half_done() {
    let lab = Lab::new(Guest::Blank);
    let (vm, other) = (lab.name("vm"), lab.name("other"));
    lab.add_legacy_vm(&vm, &lab.address(0));
    lab.add_legacy_vm(&other, &lab.address(1));
    virsh(&["start", &vm]);
    for (key, value) in [("ip_address", json!(7)), ("status", json!(null)), ("created_at", json!("yesterday"))] {
        lab.edit_database(|vms| vms["vms"][&vm][key] = value);
        let before = (lab.traces(), fs::read(lab.database()).unwrap());
        let outcome = lab.destroy(&vm).fails_with(1);
        assert!(outcome.reason().contains(&vm) && outcome.reason().contains(key), "{outcome:?}");
        assert_eq!((lab.traces(), fs::read(lab.database()).unwrap()), before);
        assert_eq!(lab.status(&vm), "active");
        lab.edit_database(|vms| {
            vms["vms"][&vm][key] = match key {
                "ip_address" => lab.address(0).into(),
                "status" => "active".into(),
                _ => "2026-01-02T03:04:05Z".into(),
            }
        });
    }

    // The damage of one record is no reason not to destroy another VM, and it is not repaired by the way.
    let damaged = json!({"status": "active", "ip_address": [1, 2], "mine": 1.50});
    lab.edit_database(|vms| vms["vms"][&vm] = damaged.clone());
    lab.destroy(&other).success();
    assert_eq!(lab.record(&vm), damaged);
    assert_eq!(lab.record(&other)["status"], "destroyed");
}

/// A guest that is still booting and one that hangs go the same way; a frozen QEMU takes libvirt about 11 s.
#[test]
fn a_frozen_qemu_is_destroyed_too() {
    let lab = Lab::new(Guest::Blank);
    let vm = lab.name("frozen");
    lab.add_legacy_vm(&vm, &lab.address(0));
    virsh(&["start", &vm]);
    let pid = qemu_pid(&vm);
    output("kill", &["-STOP", &pid]);
    lab.destroy(&vm).success();
    lab.assert_no_traces("after destroying a frozen one");
    wait_until("its QEMU to end", Duration::from_secs(60), || !Path::new(&format!("/proc/{pid}")).exists());
}
