//! `blockhost-provisioner-repair`: every kind of damage made on purpose, named, mended where that destroys nothing, and a
//! healthy host reported clean.
#![allow(clippy::unwrap_used, missing_docs)]

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use common::proxy::{Mode, Proxy};
use common::{Guest, Lab, Outcome, WALLET, output, try_virsh, virsh};
use serde_json::{Value, json};

const REPAIR: &str = "blockhost-provisioner-repair";
const CREATED: &str = "2026-02-03T04:05:06.000007+00:00";
const EXPIRES: &str = "2098-03-04T05:06:07.000008+00:00";

/// A VM as create leaves it, without what it takes to boot a guest: disk, metadata, filter, record, addresses.
struct Vm {
    name: String,
    id: String,
    ipv4: String,
    ipv6: String,
}

impl Lab {
    fn vm(&self, name: &str, index: u8) -> Vm {
        let ipv6 = if self.ipv6() { self.address6(index) } else { String::new() };
        let id = fs::read_to_string("/proc/sys/kernel/random/uuid").unwrap().trim().to_owned();
        let vm = Vm { name: self.name(name), id, ipv4: self.address(index), ipv6 };
        let disk = self.volume(&format!("{}.qcow2", vm.name));
        let base = self.base();
        let options = format!("backing_file={},backing_fmt=qcow2", base.display());
        output("qemu-img", &["create", "-q", "-f", "qcow2", "-o", &options, disk.to_str().unwrap()]);
        self.define_vm(&vm, CREATED, EXPIRES);
        self.add_record(&vm.name, &vm.ipv4);
        self.edit_database(|vms| {
            let record = &mut vms["vms"][&vm.name];
            record["ipv6_address"] = vm.ipv6.clone().into();
            record["created_at"] = CREATED.into();
            record["expires_at"] = EXPIRES.into();
            if !vm.ipv6.is_empty() {
                let list = vms.as_object_mut().unwrap().entry("allocated_ipv6").or_insert(json!([]));
                list.as_array_mut().unwrap().push(vm.ipv6.clone().into());
            }
        });
        vm
    }

    fn address6(&self, index: u8) -> String {
        let prefix = std::env::var("BLOCKHOST_TEST_IPV6_PREFIX").unwrap();
        let base: std::net::Ipv6Addr = prefix.split('/').next().unwrap().parse().unwrap();
        std::net::Ipv6Addr::from(u128::from(base) + u128::from(self.first + index)).to_string()
    }

    fn define_vm(&self, vm: &Vm, created: &str, expires: &str) {
        let ipv6 = if vm.ipv6.is_empty() { String::new() } else { format!("<b:ipv6>{}</b:ipv6>", vm.ipv6) };
        let host: u8 = vm.ipv4.rsplit('.').next().unwrap().parse().unwrap();
        let mac = format!("52:54:00:00:00:{host:02x}");
        let xml = format!(
            "<domain type='qemu'><name>{name}</name><uuid>{id}</uuid>\
             <metadata><b:vm xmlns:b='urn:blockhost:vm:1'><b:name>{name}</b:name><b:creation-id>{id}</b:creation-id>\
             <b:created-at>{created}</b:created-at><b:expires-at>{expires}</b:expires-at>\
             <b:wallet-address>{WALLET}</b:wallet-address><b:nft-token-id>7</b:nft-token-id><b:username>admin</b:username>\
             <b:network-mode>broker</b:network-mode><b:ipv4>{ipv4}</b:ipv4>{ipv6}<b:mac>{mac}</b:mac>\
             </b:vm></metadata><memory unit='MiB'>64</memory>\
             <os><type arch='x86_64' machine='q35'>hvm</type></os><features><acpi/></features><devices>\
             <disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='{disk}'/>\
             <target dev='vda' bus='virtio'/></disk><interface type='bridge'><mac address='{mac}'/>\
             <source bridge='{bridge}'/><model type='virtio'/></interface></devices></domain>",
            name = vm.name,
            bridge = self.bridge,
            id = vm.id,
            ipv4 = vm.ipv4,
            disk = self.volume(&format!("{}.qcow2", vm.name)).display(),
        );
        let file = self.dir.join(format!("{}.xml", vm.name));
        fs::write(&file, xml).unwrap();
        virsh(&["define", file.to_str().unwrap()]);
        virsh(&["autostart", &vm.name]);
    }

    fn repair(&self, arguments: &[&str]) -> (Value, Outcome) {
        let outcome = self.run(REPAIR, &[arguments, &["--format", "json"]].concat());
        assert!(outcome.stdout.is_ascii());
        (serde_json::from_str(&outcome.stdout).unwrap_or(Value::Null), outcome)
    }

    /// What a check names: kind, VM, object.
    fn named(&self) -> Vec<(String, String, String)> {
        let (report, outcome) = self.repair(&[]);
        let found = named(&report["findings"]);
        assert_eq!(outcome.code, Some(i32::from(!found.is_empty())), "{outcome:?}");
        assert_eq!(report["healthy"], found.is_empty());
        found
    }

    /// That the damage done is named as this, that naming it changes nothing, and that mending removes it, once.
    #[track_caller]
    fn mends(&self, expected: &[(&str, &str, &str)]) {
        let before = self.everything();
        assert_eq!(self.named(), owned(expected));
        assert_eq!(self.everything(), before, "a check has changed something");
        let (report, outcome) = self.repair(&["--apply"]);
        assert_eq!(outcome.code, Some(0), "{outcome:#?}");
        for finding in owned(expected) {
            assert!(named(&report["repaired"]).contains(&finding), "{finding:?} is not in {report:#}");
        }
        let after = self.everything();
        let (again, outcome) = self.repair(&["--apply"]);
        assert_eq!((outcome.code, &again["repaired"], &again["findings"]), (Some(0), &json!([]), &json!([])));
        assert_eq!(self.everything(), after, "a second repair has changed something");
    }

    /// That the damage is named, mending leaves it and everything else alone, and the operator is told `what`.
    #[track_caller]
    fn leaves(&self, expected: &[(&str, &str, &str)], what: &str) {
        let before = self.everything();
        assert_eq!(self.named(), owned(expected));
        let (report, outcome) = self.repair(&["--apply"]);
        assert_eq!(outcome.code, Some(1), "{outcome:#?}");
        assert_eq!((named(&report["findings"]), &report["repaired"]), (owned(expected), &json!([])));
        for finding in report["findings"].as_array().unwrap() {
            assert!(finding["apply"].is_null(), "{finding}");
        }
        let told = report["findings"].to_string();
        assert!(told.contains(what), "{what:?} is not in {told}");
        assert_eq!(self.everything(), before, "something was changed");
    }

    /// Database, domains and files, to the byte.
    fn everything(&self) -> BTreeMap<String, String> {
        let mut all = BTreeMap::new();
        let database = fs::read(self.database()).unwrap_or_else(|_| b"none".to_vec());
        all.insert("database".to_owned(), String::from_utf8_lossy(&database).into_owned());
        let prefix = self.name("");
        for domain in virsh(&["list", "--all", "--name"]).lines().filter(|name| name.starts_with(&prefix)) {
            all.insert(format!("xml {domain}"), virsh(&["dumpxml", domain]));
            let info = virsh(&["dominfo", domain]);
            let lines = info.lines().filter(|line| line.starts_with("State") || line.starts_with("Autostart"));
            all.insert(format!("info {domain}"), lines.collect::<Vec<_>>().join("\n"));
        }
        for part in ["state", "run", "state/vms", "state/journal", "state/locks"] {
            for entry in fs::read_dir(self.dir.join(part)).into_iter().flatten() {
                let path = entry.unwrap().path();
                let size = fs::symlink_metadata(&path).map(|m| m.len()).unwrap_or_default();
                all.insert(
                    format!("file {}", path.display()),
                    if path.is_dir() { "dir".into() } else { size.to_string() },
                );
            }
        }
        // Made by any command that takes a lock, and no state of any VM.
        all.retain(|key, _| !key.ends_with("/locks") && !key.ends_with(".lock"));
        all
    }

    fn healthy(&self) {
        assert_eq!(self.named(), []);
    }
}

fn named(findings: &Value) -> Vec<(String, String, String)> {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    findings.as_array().unwrap().iter().map(|f| (text(&f["kind"]), text(&f["vm"]), text(&f["object"]))).collect()
}

fn owned(expected: &[(&str, &str, &str)]) -> Vec<(String, String, String)> {
    expected.iter().map(|(kind, vm, object)| ((*kind).into(), (*vm).into(), (*object).into())).collect()
}

fn route(act: &str, address: &str, lab: &Lab) {
    output("ip", &["-6", "route", act, &format!("{address}/128"), "dev", &lab.bridge]);
}

#[test]
fn a_host_without_vms_and_one_with_vms_of_either_provisioner_are_clean() {
    let lab = Lab::new(Guest::Blank);
    let empty = lab.run(REPAIR, &[]).success();
    assert!(empty.stdout.contains("no VM database") && empty.stdout.contains("0 VMs, nothing is wrong"), "{empty:?}");
    let applied = lab.run(REPAIR, &["--apply"]).success();
    assert!(applied.stdout.contains("nothing is wrong"), "{applied:?}");
    assert!(!lab.database().exists(), "nothing was made");

    let (legacy, gone) = (lab.name("legacy"), lab.name("gone"));
    lab.add_legacy_vm(&legacy, &lab.address(0));
    lab.add_legacy_vm(&gone, &lab.address(1));
    lab.destroy(&gone).success();
    lab.vm("web", 2);
    // Somebody's install medium in the pool, a foreign domain, keys of others.
    fs::write(lab.volume("debian.iso"), "iso").unwrap();
    lab.define(&lab.name("foreign"), "");
    lab.edit_database(|vms| {
        vms["mine"] = json!({"a": 1.50});
        vms["vms"][&legacy]["nft_token_id"] = json!("00ff");
    });
    let before = lab.everything();
    lab.healthy();
    let text = lab.run(REPAIR, &["--check"]).success();
    assert!(text.stdout.contains("2 VMs, nothing is wrong"), "{text:?}");
    lab.run(REPAIR, &["--apply"]).success();
    assert_eq!(lab.everything(), before);

    lab.run(REPAIR, &["--check", "--apply"]).fails_with(2);
    lab.run(REPAIR, &["vm"]).fails_with(2);
}

/// Another program read the database, took its time, and wrote all of it back.
#[test]
fn what_a_stale_rewrite_has_lost_comes_back() {
    let lab = Lab::new(Guest::Blank);
    let kept = lab.vm("kept", 0);
    let stale = fs::read(lab.database()).unwrap();
    let (web, off, expired) = (lab.vm("web", 1), lab.vm("off", 2), lab.vm("expired", 3));
    lab.run("blockhost-vm-start", &[&web.name]).success();
    // Suspended by the collection: off, and not to start with the host.
    virsh(&["autostart", "--disable", &off.name]);
    lab.define_vm(&expired, CREATED, "2026-03-05T00:00:00.000000+00:00");
    lab.edit_database(|vms| {
        vms["vms"][&off.name]["status"] = "suspended".into();
        vms["vms"][&off.name]["suspended_at"] = CREATED.into();
    });
    lab.healthy();
    let full = lab.vms();
    fs::write(lab.database(), stale).unwrap();

    lab.mends(&[
        ("domain-without-record", &expired.name, &expired.name),
        ("domain-without-record", &off.name, &off.name),
        ("domain-without-record", &web.name, &web.name),
    ]);
    let mut expected = full["vms"][&web.name].clone();
    expected["nft_token_id"] = 7.into();
    assert_eq!(lab.record(&web.name), expected);
    assert_eq!(lab.record(&kept.name), full["vms"][&kept.name]);
    assert_eq!(lab.record(&off.name)["status"], "suspended");
    // What was paid at creation is over, and may have been extended since: it is neither shut down at once nor free for long.
    let record = lab.record(&expired.name);
    assert_eq!(record["status"], "active");
    let now = output("date", &["-u", "+%Y-%m-%dT%H:%M:%S"]);
    assert!(record["expires_at"].as_str().unwrap() > now.trim(), "{record}");
    assert!(record["expires_at"].as_str().unwrap() < "2090", "{record}");
    let mut allocated: Vec<_> = lab.vms()["allocated_ips"].as_array().unwrap().clone();
    allocated.sort_by_key(ToString::to_string);
    let mut all: Vec<Value> = full["allocated_ips"].as_array().unwrap().clone();
    all.sort_by_key(ToString::to_string);
    assert_eq!(allocated, all);

    // The file as a whole is gone: it is made again. With another's rewrite in place that is not valid, it is not.
    fs::remove_file(lab.database()).unwrap();
    let database = lab.database().display().to_string();
    let lost = |vm: &Vm| ("domain-without-record".to_owned(), vm.name.clone(), vm.name.clone());
    let named = lab.named();
    assert_eq!(named[0], ("database-missing".to_owned(), String::new(), database.clone()));
    assert_eq!(named[1..], [lost(&expired), lost(&kept), lost(&off), lost(&web)]);
    assert!(!lab.database().exists());
    lab.repair(&["--apply"]).1.success();
    lab.healthy();
    assert_eq!(lab.record(&web.name), expected);

    let whole = fs::read(lab.database()).unwrap();
    for damaged in [&whole[..whole.len() / 2], &b""[..], &b"{\"vms\": 7}"[..]] {
        fs::write(lab.database(), damaged).unwrap();
        lab.leaves(&[("database-unreadable", "", &database)], "move it away");
        assert_eq!(fs::read(lab.database()).unwrap(), damaged);
    }
    fs::remove_file(lab.database()).unwrap();
    std::os::unix::fs::symlink("/nowhere/vms.json", lab.database()).unwrap();
    assert_eq!(lab.named(), owned(&[("database-unreadable", "", &database)]));

    // A name that was used before: the destroyed record is of an earlier VM, or of this one.
    fs::remove_file(lab.database()).unwrap();
    fs::write(lab.database(), &whole).unwrap();
    lab.edit_database(|vms| {
        vms["vms"][&web.name]["status"] = "destroyed".into();
        vms["vms"][&web.name]["destroyed_at"] = "2026-01-03T00:00:00Z".into();
        vms["vms"][&web.name]["created_at"] = "2026-01-02T00:00:00Z".into();
    });
    lab.mends(&[("domain-without-record", &web.name, &web.name)]);
    assert_eq!(lab.record(&web.name), expected);
    lab.edit_database(|vms| vms["vms"][&web.name]["status"] = "destroyed".into());
    lab.leaves(&[("destroyed-vm-exists", &web.name, &web.name)], "blockhost-vm-destroy");
    if lab.ipv6() {
        route("del", &web.ipv6, &lab);
    }
}

#[test]
fn records_domains_and_power_are_brought_in_line() {
    let lab = Lab::new(Guest::Blank);
    let (web, other) = (lab.vm("web", 0), lab.vm("other", 1));
    let (name, base) = (web.name.as_str(), lab.base());
    let good = fs::read(lab.database()).unwrap();
    let restore = || fs::write(lab.database(), &good).unwrap();
    let set = |key: &str, value: Value| lab.edit_database(|vms| vms["vms"][name][key] = value);

    virsh(&["autostart", "--disable", name]);
    lab.mends(&[("autostart-off", name, name)]);
    assert!(virsh(&["dominfo", name]).contains("Autostart:      enable"));
    set("status", "suspended".into());
    lab.mends(&[("autostart-on", name, name)]);
    assert!(virsh(&["dominfo", name]).contains("Autostart:      disable"));

    // Resumed by somebody whose note of it was lost; paid for, it is active, and if not, no repair takes its power.
    virsh(&["start", name]);
    if lab.ipv6() {
        lab.mends(&[("suspended-vm-runs", name, name), ("missing-route", name, &web.ipv6)]);
    } else {
        lab.mends(&[("suspended-vm-runs", name, name)]);
    }
    assert_eq!(lab.record(name)["status"], "active");
    assert!(virsh(&["dominfo", name]).contains("Autostart:      enable"));
    virsh(&["autostart", "--disable", name]);
    set("status", "suspended".into());
    set("expires_at", "2026-03-05T00:00:00Z".into());
    lab.leaves(&[("suspended-vm-runs", name, name)], "blockhost-vm-stop");
    virsh(&["autostart", name]);
    restore();

    for (key, value) in
        [("wallet_address", json!("0xbb")), ("nft_token_id", json!(8)), ("ip_address", json!(lab.address(9)))]
    {
        set(key, value);
        if key == "ip_address" {
            let address = lab.address(9);
            assert_eq!(
                lab.named(),
                owned(&[("record-disagrees", name, key), ("address-not-allocated", name, &address)])
            );
        } else {
            lab.leaves(&[("record-disagrees", name, key)], "correct the record");
        }
        restore();
    }
    set("nft_token_id", json!("7"));
    lab.healthy();

    lab.edit_database(|vms| {
        let record = vms["vms"][name].as_object_mut().unwrap();
        record.remove("expires_at");
        record["username"] = "".into();
        record["wallet_address"] = Value::Null;
    });
    let incomplete = ["expires_at", "username", "wallet_address"].map(|key| ("incomplete-record", name, key));
    lab.mends(&incomplete);
    let record = lab.record(name);
    assert_eq!((&record["expires_at"], &record["username"]), (&json!(EXPIRES), &json!("admin")));

    // Wrong types make the engines drop the whole file. What only an engine knows is not guessed.
    restore();
    lab.edit_database(|vms| {
        vms["vms"][name]["ip_address"] = 7.into();
        vms["vms"][name]["username"] = json!([]);
        vms["vms"][name]["mine"] = json!({"x": "\u{1b}"});
    });
    lab.mends(&[("damaged-record", name, name)]);
    assert_eq!(lab.record(name)["ip_address"], web.ipv4.as_str());
    assert_eq!(lab.record(name)["mine"], json!({"x": "\u{1b}"}));
    restore();
    for (key, value) in [("status", json!("paid")), ("expires_at", json!(1_893_456_000))] {
        set(key, value);
        lab.leaves(&[("damaged-record", name, name)], key);
        restore();
    }
    lab.edit_database(|vms| vms["vms"]["\u{1b}[31m ü"] = json!([]));
    let shown = "\\u{1b}[31m \\u{fc}";
    assert_eq!(lab.named(), owned(&[("damaged-record", "", shown)]));
    restore();

    // Next to it, a VM without a domain, and one whose name a foreign domain has.
    let lost = lab.name("lost");
    lab.add_record(&lost, &lab.address(4));
    lab.leaves(&[("record-without-domain", &lost, &lost)], "is gone, too");
    lab.define(&lost, "");
    lab.leaves(&[("foreign-domain", &lost, &lost)], "not BlockHost's");
    virsh(&["undefine", &lost]);
    restore();

    // A disk of the earlier provisioner whose record is lost: nothing says which address it has.
    let legacy = lab.name("legacy");
    lab.add_legacy_vm(&legacy, &lab.address(5));
    lab.edit_database(|vms| {
        vms["vms"].as_object_mut().unwrap().remove(&legacy);
    });
    lab.leaves(
        &[("address-without-owner", "", &lab.address(5)), ("domain-without-record", &legacy, &legacy)],
        "it is not freed while",
    );
    virsh(&["undefine", &legacy]);
    fs::remove_file(lab.volume(&format!("{legacy}.qcow2"))).unwrap();
    restore();

    // Undefined while it runs; metadata that somebody has edited; a base that is gone.
    virsh(&["undefine", name]);
    lab.leaves(&[("domain-not-persistent", name, name)], "virsh define");
    lab.define_vm(&web, CREATED, EXPIRES);
    virsh(&["destroy", name]);
    let good_domain = virsh(&["dumpxml", "--inactive", name]);
    let xml = lab.dir.join("edited.xml");
    fs::write(&xml, good_domain.replace("7</b:nft", "a b</b:nft")).unwrap();
    virsh(&["define", xml.to_str().unwrap()]);
    lab.leaves(&[("damaged-metadata", name, name)], "virsh edit");
    lab.define_vm(&web, CREATED, EXPIRES);
    lab.healthy();
    let aside = base.with_extension("aside");
    fs::rename(&base, &aside).unwrap();
    let path = base.display().to_string();
    lab.leaves(&[("base-missing", &other.name, &path), ("base-missing", name, &path)], "from a backup");
    fs::rename(&aside, &base).unwrap();
    lab.healthy();
    if lab.ipv6() {
        output("ip", &["-6", "route", "del", &format!("{}/128", web.ipv6), "dev", &lab.bridge]);
    }
}

#[test]
fn addresses_volumes_and_routes_have_one_owner_each() {
    let lab = Lab::new(Guest::Blank);
    let (web, other) = (lab.vm("web", 0), lab.vm("other", 1));
    let name = web.name.as_str();
    let good = fs::read(lab.database()).unwrap();
    let restore = || fs::write(lab.database(), &good).unwrap();
    let [ours, free] = [web.ipv4.clone(), lab.address(7)];

    lab.edit_database(|vms| {
        let list = vms["allocated_ips"].as_array_mut().unwrap();
        list.retain(|address| *address != ours.as_str());
        list.extend([json!(free), json!(other.ipv4)]);
        vms["next_vmid"] = 0.into();
    });
    lab.mends(&[
        ("address-without-owner", "", &free),
        ("address-listed-twice", "", &other.ipv4),
        ("next-vmid-behind", "", "next_vmid"),
        ("address-not-allocated", name, &ours),
    ]);
    assert_eq!(lab.vms()["allocated_ips"], json!([other.ipv4, ours]));
    assert_eq!(lab.vms()["next_vmid"], 1);

    restore();
    lab.edit_database(|vms| vms["allocated_ips"].as_array_mut().unwrap().push(json!({"a": 1})));
    lab.leaves(&[("damaged-address-entry", "", "{\"a\":1}")], "remove it");
    restore();
    lab.edit_database(|vms| vms["vms"][&other.name]["ip_address"] = ours.clone().into());
    let found = lab.named();
    assert!(found.contains(&("address-twice".into(), String::new(), ours.clone())), "{found:?}");
    let before = lab.everything();
    lab.repair(&["--apply"]).1.fails_finishing("left for the operator");
    assert_eq!(lab.everything(), before);
    // The lost record of a VM whose address another has by now is not forced in.
    lab.edit_database(|vms| {
        vms["vms"].as_object_mut().unwrap().remove(name);
        vms["allocated_ips"] = json!([ours, other.ipv4]);
    });
    let (report, _) = lab.repair(&["--apply"]);
    assert!(named(&report["findings"]).contains(&("domain-without-record".into(), name.into(), name.into())));
    assert_eq!(lab.record(name), Value::Null);
    restore();

    // A create that has its address and no record yet: everything of it is its own, also for a repair that mends.
    let vm = lab.name("parked");
    let parked = lab.park("create.start", "blockhost-vm-create", &lab.create_arguments(&vm));
    lab.edit_database(|vms| vms["allocated_ips"].as_array_mut().unwrap().push(free.clone().into()));
    let before = lab.vms();
    let (report, outcome) = lab.repair(&["--apply"]);
    assert_eq!(outcome.code, Some(0), "{outcome:?}");
    assert_eq!(report["busy"][0]["vm"], vm.as_str());
    assert_eq!(report["busy"][0]["command"], "blockhost-vm-create");
    assert_eq!(lab.vms(), before, "nothing is freed while a create is in flight");
    let mut child = parked.go();
    // Killed, it is what a dead command leaves.
    child.kill().unwrap();
    child.wait().unwrap();
    let journal = lab.state().join(format!("journal/{vm}.json")).display().to_string();
    let provisioning = lab.provisioning_lock().display().to_string();
    let found = lab.named();
    assert!(found.contains(&("dead-journal".into(), vm.clone(), journal)), "{found:?}");
    assert!(found.contains(&("stale-provisioning-lock".into(), String::new(), provisioning)), "{found:?}");
    let (report, outcome) = lab.repair(&["--apply"]);
    assert_eq!(outcome.code, Some(0), "{outcome:?}");
    assert!(report["repaired"].as_array().unwrap().iter().any(|done| done["kind"] == "dead-journal"), "{report:#}");
    assert_eq!(try_virsh(&["dominfo", &vm]), None);
    assert!(!lab.provisioning_lock().exists());
    assert_eq!(lab.vms()["allocated_ips"], json!([ours, other.ipv4]));
    let damaged = lab.state().join(format!("journal/{vm}.json"));
    fs::write(&damaged, "{").unwrap();
    let path = damaged.display().to_string();
    lab.leaves(&[("damaged-journal", &vm, &path)], "remove it, then");
    fs::remove_file(&damaged).unwrap();

    // Volumes named as ours without a VM; one of a destroyed VM; and none that a domain uses.
    let gone = lab.name("gone");
    let files = ["stray.qcow2", "stray.iso", "stray.console.log.0"].map(|file| lab.volume(file));
    let of_gone: PathBuf = lab.volume(&format!("{gone}.qcow2"));
    for file in files.iter().chain([&of_gone]) {
        fs::write(file, "data").unwrap();
    }
    lab.edit_database(|vms| vms["vms"][&gone] = json!({"status": "destroyed", "ip_address": lab.address(3)}));
    let of_gone = format!("{gone}.qcow2");
    let mut expected = vec![
        ("orphaned-volume", "stray", "stray.console.log.0"),
        ("orphaned-volume", "stray", "stray.iso"),
        ("orphaned-volume", "stray", "stray.qcow2"),
        ("orphaned-volume", gone.as_str(), of_gone.as_str()),
    ];
    expected.sort_unstable_by_key(|(_, vm, object)| (*vm, *object));
    lab.leaves(&expected, "virsh vol-delete");
    lab.destroy(&gone).success();
    for file in files {
        fs::remove_file(file).unwrap();
    }
    lab.healthy();

    if lab.ipv6() {
        let nobody = lab.address6(8);
        route("replace", &nobody, &lab);
        lab.mends(&[("stale-route", "", &nobody)]);
        virsh(&["start", name]);
        lab.mends(&[("missing-route", name, &web.ipv6)]);
        output("ip", &["-6", "neigh", "del", &web.ipv6, "dev", &lab.bridge]);
        lab.mends(&[("missing-neighbour", name, &web.ipv6)]);
        let mac = ["lladdr", "52:54:00:00:00:ff", "nud", "permanent"];
        output("ip", &[&["-6", "neigh", "replace", &web.ipv6, "dev", &lab.bridge], &mac[..]].concat());
        lab.mends(&[("missing-neighbour", name, &web.ipv6)]);
        output("ip", &[&["-6", "neigh", "replace", &nobody, "dev", &lab.bridge], &mac[..]].concat());
        lab.mends(&[("stale-neighbour", "", &nobody)]);
        route("del", &web.ipv6, &lab);
        // Without root and without its agent the route stays missing, and the reason is said.
        let proxy = Proxy::new(&lab);
        for (path, mode) in [(lab.dir.join("libvirt-sock"), "0666"), (lab.dir.join("config"), "0755")] {
            output("chmod", &[mode, path.to_str().unwrap()]);
        }
        output("chown", &["-hR", "65534:65534", lab.state().to_str().unwrap(), lab.dir.join("run").to_str().unwrap()]);
        let mut user = Command::new("setpriv");
        user.args(["--reuid", "65534", "--regid", "65534", "--clear-groups", "--bounding-set=-all"]);
        let command = lab.command(REPAIR);
        user.arg(command.get_program()).args(["--apply", "--format", "json"]).current_dir(lab.state());
        user.envs(command.get_envs().filter_map(|(key, value)| Some((key, value?))));
        user.env("BLOCKHOST_LIBVIRT_URI", proxy.uri())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let outcome = common::finish(user.spawn().unwrap());
        assert_eq!(outcome.code, Some(1), "{outcome:?}");
        let report: Value = serde_json::from_str(&outcome.stdout).unwrap();
        assert_eq!(named(&report["findings"]), owned(&[("missing-route", name, &web.ipv6)]));
        assert!(report["findings"][0]["failure"].as_str().unwrap().contains("root agent"), "{report:#}");
        virsh(&["destroy", name]);
    }
    virsh(&["pool-destroy", &lab.pool]);
    lab.leaves(&[("pool-unusable", "", &lab.pool)], "virsh pool-start");
    virsh(&["pool-start", &lab.pool]);
}

#[test]
fn without_an_answer_of_libvirts_nothing_is_said_or_done() {
    let lab = Lab::new(Guest::Blank);
    let web = lab.vm("web", 0);
    lab.edit_database(|vms| {
        vms["vms"].as_object_mut().unwrap().remove(&web.name);
    });
    let proxy = Proxy::new(&lab);
    for (mode, all) in [(Mode::Down, &[&[][..], &["--apply"]][..]), (Mode::Hung, &[&["--apply"][..]])] {
        proxy.set(mode);
        let before = lab.everything();
        for arguments in all {
            let mut command = lab.command(REPAIR);
            command.args(*arguments).env("BLOCKHOST_LIBVIRT_URI", proxy.uri());
            common::finish(command.spawn().unwrap()).fails_with(1).says("cannot connect to libvirt");
        }
        assert_eq!(lab.everything(), before);
    }
    lab.mends(&[("domain-without-record", &web.name, &web.name)]);
}
