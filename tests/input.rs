//! What create refuses, and that refusing changes nothing: hostile and absurd arguments, a host that is not as it should be, disks
//! that are full or read-only.
#![allow(clippy::unwrap_used, missing_docs)]

mod common;

use std::ffi::{OsStr, OsString};
use std::fs;
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;
use std::time::{Duration, Instant};

use common::{Guest, Lab, Mount, Outcome, WALLET, finish, output, patience, virsh};

/// What a refusal must leave as it was.
fn contents(lab: &Lab) -> (Vec<String>, Option<Vec<u8>>) {
    (lab.traces(), fs::read(lab.database()).ok())
}

/// A create that must be refused with `code`, `why` in the last line of stderr, and nothing changed.
#[track_caller]
fn refused<S: AsRef<OsStr>>(lab: &Lab, arguments: &[S], code: i32, why: &str) -> Outcome {
    let before = contents(lab);
    let outcome = finish(lab.command("blockhost-vm-create").args(arguments).spawn().unwrap());
    let outcome = outcome.fails_with(code).says(why);
    assert!(outcome.stderr.ends_with('\n') && !outcome.stderr.contains("panicked"), "{outcome:?}");
    assert_eq!(contents(lab), before, "left by {outcome:#?}");
    outcome
}

/// The create every refusal is one step away from.
#[track_caller]
fn refused_on_this_host(lab: &Lab, why: &str) -> Outcome {
    let vm = lab.name("vm");
    refused(lab, &lab.create_arguments(&vm), 1, why)
}

const HOSTILE: [&str; 16] = [
    "",
    " ",
    "a b",
    "a\n",
    "a\n\nb",
    "../a",
    "a/b",
    "'",
    "\"",
    "$(touch pwned)",
    "`id`",
    "a;b",
    "ümlaut",
    "a\u{202e}b",
    "{{x}}",
    "<b>",
];

#[test]
fn hostile_arguments_are_wrong_usage() {
    let lab = Lab::new(Guest::Blank);
    let long = |n: usize| "a".repeat(n);
    let names = HOSTILE.iter().map(|s| (*s).to_owned()).chain([long(65), "-a".into(), ".a".into(), "_a".into()]);
    for name in names {
        refused(&lab, &["--owner-wallet", WALLET, "--apply", "--", &name], 2, "VM name");
    }
    let vm = lab.name("vm");
    let option = |option: &str, value: &str, what: &str| {
        let option = format!("{option}={value}");
        let mut arguments = vec![vm.as_str(), option.as_str(), "--apply"];
        if what != "wallet address" {
            arguments.extend(["--owner-wallet", WALLET]);
        }
        refused(&lab, &arguments, 2, what);
    };
    for value in HOSTILE {
        option("--owner-wallet", value, "wallet address");
        option("--nft-token-id", value, "NFT id");
        option("--username", value, "user name");
    }
    for value in ["0xaa:0xbb", "0xaa,0xbb", "0xaa=", &long(257)] {
        option("--owner-wallet", value, "wallet address");
    }
    for value in ["-1", "1.5", "4_2", &long(129)] {
        option("--nft-token-id", value, "NFT id");
    }
    for value in ["root", "-admin", "0admin", "Admin", "a:b", "a.b", &long(33)] {
        option("--username", value, "user name");
    }
    for wrong in ["--cpu", "--memory", "--disk", "--expiry-days"] {
        for value in ["-1", "1.5", "1e3", "", "two", "0x10", "99999999999999999999999", "1 "] {
            option(wrong, value, wrong);
        }
    }
    option("--cpu", &(u64::from(u32::MAX) + 1).to_string(), "--cpu");

    // Bytes that are no text.
    let bytes = |prefix: &str| OsString::from(OsStr::from_bytes(&[prefix.as_bytes(), b"\xff\xfe"].concat()));
    let plain = |text: &str| OsString::from(text);
    refused(&lab, &[bytes("a"), plain("--owner-wallet"), plain(WALLET), plain("--apply")], 2, "UTF-8");
    refused(&lab, &[plain(&vm), bytes("--owner-wallet="), plain("--apply")], 2, "UTF-8");

    refused::<&str>(&lab, &[], 2, "--owner-wallet");
    refused(&lab, &[vm.as_str(), "--apply"], 2, "--owner-wallet");
    refused(&lab, &["a", "b", "--owner-wallet", WALLET], 2, "unexpected argument 'b'");
    refused(&lab, &[vm.as_str(), "--owner-wallet", WALLET, "--aply"], 2, "--aply");
    assert!(!lab.state().join("pwned").exists());
}

#[test]
fn sizes_nobody_means_are_refused() {
    let lab = Lab::new(Guest::Blank);
    let vm = lab.name("vm");
    let huge = u64::MAX.to_string();
    let cases = [
        ("--cpu", "0", "vCPU"),
        ("--cpu", "4294967295", "vCPU"),
        ("--memory", "0", "memory"),
        ("--memory", "1", "memory"),
        ("--memory", "99999999", "memory"),
        ("--memory", &huge, "memory"),
        ("--disk", "0", "disk"),
        ("--disk", "65537", "disk"),
        ("--disk", "17179869184", "disk"), // 2^34 GB are 0 bytes in 64 bits
        ("--disk", &huge, "disk"),
        ("--expiry-days", "0", "expiry"),
        ("--expiry-days", "36501", "expiry"),
        ("--expiry-days", "4294967295", "expiry"),
    ];
    for (option, value, what) in cases {
        for apply in [true, false] {
            let mut arguments = vec![vm.as_str(), "--owner-wallet", WALLET, option, value];
            if apply {
                arguments.push("--apply");
            }
            refused(&lab, &arguments, 1, what);
        }
    }

    // A template that needs more than the disk has.
    fs::remove_file(lab.state().join("templates/blockhost-base.qcow2")).unwrap();
    let image = lab.dir.join("templates/blockhost-base.qcow2");
    output("qemu-img", &["create", "-q", "-f", "qcow2", image.to_str().unwrap(), "5G"]);
    refused_on_this_host(&lab, "a disk of 4 GB is smaller than the template, which needs 5 GB");
}

#[test]
fn a_host_that_is_not_set_up_is_told_what_is_missing() {
    let lab = Lab::new(Guest::Blank);
    let config = lab.dir.join("config");
    // Moves a file away for one refusal.
    let without = |path: &Path, why: &str| {
        let away = lab.dir.join("away");
        fs::rename(path, &away).unwrap();
        refused_on_this_host(&lab, why);
        fs::rename(&away, path).unwrap();
    };
    without(&lab.dir.join("templates/blockhost-base.qcow2"), "blockhost-build-template");
    without(&lab.dir.join("share/cloud-init/templates/nft-auth.yaml"), "nft-auth.yaml");
    without(&config.join("network-mode"), "network mode");
    let modes = config.join("network-modes.enabled");
    fs::create_dir(&modes).unwrap();
    for mode in ["broker", "tor"] {
        fs::write(modes.join(format!("{mode}.json")), "{}").unwrap();
    }
    without(&config.join("network-mode"), "network mode");
    fs::remove_dir_all(&modes).unwrap();

    let broken = lab.dir.join("templates/blockhost-base.qcow2");
    let good = fs::read(&broken).unwrap();
    fs::remove_file(&broken).unwrap();
    for text in ["", "no image at all, though long enough to be taken for one by a careless program"] {
        fs::write(&broken, text).unwrap();
        refused_on_this_host(&lab, "blockhost-base.qcow2");
    }
    fs::write(&broken, &good).unwrap();

    virsh(&["pool-destroy", &lab.pool]);
    let inactive = refused_on_this_host(&lab, "is not active");
    assert!(inactive.reason().contains(&format!("virsh pool-start {}", lab.pool)), "{inactive:?}");
    virsh(&["pool-start", &lab.pool]);

    for (line, why) in [
        ("storage_pool: no-such-pool", "no-such-pool"),
        ("bridge: nobr0", "nobr0"),
        ("bridge: lo", "not a bridge"),
        // Wrong types: the file, the key, and what it should be.
        ("bridge: [br0]", "db.yaml: bridge must be"),
        ("db_file: {a: b}", "db.yaml: db_file must be a text"),
        ("default_expiry_days: soon", "db.yaml: default_expiry_days must be"),
        ("gc_grace_days: -1", "db.yaml: gc_grace_days must be"),
        ("storage_path: vms", "db.yaml: storage_path must be an absolute path"),
        ("ip_pool: 192.168.0.0/24", "db.yaml: ip_pool must be a mapping"),
        ("ip_pool: {network: 10.0.0.0/33}", "db.yaml: ip_pool.network must be"),
        ("ip_pool: {network: 10.0.0.0/24, start: 9, end: 8}", "ip_pool.start must not be beyond ip_pool.end"),
        ("ip_pool: {network: 10.0.0.0/24, start: 300}", "db.yaml: ip_pool.start must be"),
        ("ip_pool: {start: 1}", "ip_pool"),
        ("libvirt: {domain_type: xen}", "db.yaml: libvirt.domain_type must be auto, kvm or qemu"),
        ("other: [", "db.yaml is not valid YAML"),
    ] {
        lab.configure(&format!("{line}\n"));
        refused_on_this_host(&lab, why);
    }
    lab.configure("");
    // Not a file, which root too cannot read.
    let db = config.join("db.yaml");
    fs::remove_file(&db).unwrap();
    fs::create_dir(&db).unwrap();
    refused_on_this_host(&lab, "db.yaml");
    fs::remove_dir(&db).unwrap();
    lab.configure("");

    for text in ["", "{", "[]", "{\"vms\": 1}"] {
        fs::write(lab.database(), text).unwrap();
        let vm = lab.name("vm");
        let outcome = lab.create(&vm).fails_with(1).says("vms.json");
        assert_eq!(fs::read_to_string(lab.database()).unwrap(), text, "{outcome:?}");
        fs::remove_file(lab.database()).unwrap();
    }
    lab.assert_no_traces("by refusals");
}

#[test]
fn user_data_must_be_a_file_of_a_sane_size() {
    let lab = Lab::new(Guest::Blank);
    let vm = lab.name("vm");
    let file = lab.dir.join("user-data");
    let with = |why: &str| {
        let mut arguments = lab.create_arguments(&vm);
        arguments.extend(["--cloud-init-content", file.to_str().unwrap()]);
        let begin = Instant::now();
        refused(&lab, &arguments, 1, why);
        assert!(begin.elapsed() < patience(Duration::from_secs(20)), "took {:?}", begin.elapsed());
    };
    with("user-data");
    fs::create_dir(&file).unwrap();
    with("not a regular file");
    fs::remove_dir(&file).unwrap();
    output("mkfifo", &[file.to_str().unwrap()]);
    with("not a regular file");
    fs::remove_file(&file).unwrap();
    fs::File::create(&file).unwrap().set_len(1 << 40).unwrap();
    with("bytes");
}

#[test]
fn a_state_directory_that_cannot_be_written_is_named() {
    let lab = Lab::new(Guest::Blank);
    let vm = lab.name("vm");
    lab.add_legacy_vm(&vm, &lab.address(0));
    let before = contents(&lab);
    let read_only = Mount::read_only(&lab.state());
    let new = lab.name("new");
    for outcome in [lab.create(&new), lab.destroy(&vm), lab.run("blockhost-vm-start", &[&vm])] {
        let outcome = outcome.fails_with(1);
        let reason = outcome.reason();
        assert!(reason.contains("Read-only file system") && reason.contains("state/"), "{outcome:?}");
    }
    // What changes nothing works.
    assert_eq!(lab.status(&vm), "suspended");
    assert_eq!(lab.run("blockhost-vm-list", &[]).success().stdout.lines().count(), 2);
    lab.run("blockhost-vm-create", &[&new, "--owner-wallet", WALLET]).success();
    drop(read_only);
    assert_eq!(contents(&lab), before);
    lab.destroy(&vm).success();
    lab.assert_no_traces("after the destroy");
}

/// A pool without room, at each of the volumes; then one that is as good as full before anything is made.
#[test]
fn a_full_pool_is_undone() {
    let lab = Lab::new(Guest::Blank);
    let pool = lab.state().join("vms");
    // As it is after an address was taken and given back.
    let empty = "{\n  \"vms\": {},\n  \"next_vmid\": 0,\n  \"allocated_ips\": [],\n  \"allocated_ipv6\": []\n}";
    fs::write(lab.database(), empty).unwrap();
    // The directory itself takes one inode.
    for (inodes, volume) in [(1, "qcow2"), (2, "iso"), (3, "console.log")] {
        let full = Mount::tmpfs(&pool, &format!("nr_inodes={inodes},mode=711"));
        virsh(&["pool-refresh", &lab.pool]);
        let vm = lab.name("vm");
        let outcome = refused_on_this_host(&lab, "No space left on device");
        assert!(outcome.reason().contains(&format!("{vm}.{volume}")), "{inodes}: {outcome:?}");
        drop(full);
    }
    let full = Mount::tmpfs(&pool, "size=64k,mode=711");
    let outcome = refused_on_this_host(&lab, "is full");
    assert!(outcome.reason().contains(&lab.pool), "{outcome:?}");
    drop(full);
    virsh(&["pool-refresh", &lab.pool]);
}

/// A small filesystem for a part of a lab's files, as full as a test wants it.
struct Tight {
    _mount: Mount,
    ballast: std::path::PathBuf,
}

impl Tight {
    fn new(dir: &Path) -> Self {
        let mount = Mount::tmpfs(dir, "size=64k,mode=755");
        Self { _mount: mount, ballast: dir.join("ballast") }
    }

    /// One with the lab's database in it.
    fn with_database(lab: &Lab) -> Self {
        let dir = lab.dir.join("tight");
        lab.configure(&format!("db_file: {:?}\n", dir.join("vms.json")));
        Self::new(&dir)
    }

    fn fill(&self) {
        // Writes until there is no space, which is no failure here.
        let _ = fs::write(&self.ballast, vec![0; 1 << 20]);
    }

    fn relieve(&self) {
        fs::remove_file(&self.ballast).unwrap();
    }
}

/// Without room for its journal a create does not begin. Destroying is what makes room, so that goes on, and says so.
#[test]
fn a_full_state_directory_stops_creates_and_nothing_else() {
    let lab = Lab::new(Guest::Blank);
    let vm = lab.name("legacy");
    lab.add_legacy_vm(&vm, &lab.address(0));
    let journal = Tight::new(&lab.state().join("journal"));
    journal.fill();
    refused_on_this_host(&lab, "No space left on device");
    let locks = Tight::new(&lab.state().join("locks"));
    locks.fill();
    lab.run("blockhost-vm-start", &[&vm]).success();
    lab.run("blockhost-vm-kill", &[&vm]).success();
    let destroyed = lab.destroy(&vm).success();
    assert!(destroyed.stderr.contains("without a journal"), "{destroyed:?}");
    drop((journal, locks));
    lab.assert_no_traces("after the destroy");
}

#[test]
fn a_database_that_cannot_be_written_loses_nothing() {
    let lab = Lab::new(Guest::Blank);
    let tight = Tight::with_database(&lab);
    let database = lab.dir.join("tight/vms.json");
    let text = format!("{{\"vms\": {{}}, \"next_vmid\": 0, \"allocated_ips\": [], \"mine\": {:?}}}", "x".repeat(6000));
    fs::write(&database, &text).unwrap();
    tight.fill();
    refused_on_this_host(&lab, "No space left on device");
    assert_eq!(fs::read_to_string(&database).unwrap(), text);
    let names: Vec<_> = fs::read_dir(lab.dir.join("tight")).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert!(!names.iter().any(|name| name.to_string_lossy().contains("tmp")), "a temporary file stays: {names:?}");
}

/// Until the last step all is well; then the disk with the database is full. The VM is undone as far as that is possible,
/// the rest when there is room again.
#[test]
fn a_disk_that_fills_up_during_a_create_is_survived() {
    let lab = Lab::new(Guest::Small);
    let tight = Tight::with_database(&lab);
    let database = lab.dir.join("tight/vms.json");
    fs::write(
        &database,
        format!("{{\"vms\": {{}}, \"next_vmid\": 0, \"allocated_ips\": [], \"mine\": {:?}}}", "x".repeat(6000)),
    )
    .unwrap();
    let vm = lab.name("vm");
    // The engines' directory may be read-only, too: that is worth a warning and no more.
    let run = Mount::read_only(&lab.dir.join("run"));
    let parked = lab.park("create.ready", "blockhost-vm-create", &lab.create_arguments(&vm));
    tight.fill();
    let failed = finish(parked.go()).fails_with(1).says("No space left on device");
    assert!(failed.stderr.contains("engines may not see this create"), "{failed:?}");
    assert!(failed.reason().contains(&format!("blockhost-vm-destroy {vm}")), "{failed:?}");
    let traces = lab.traces();
    assert!(!traces.iter().any(|trace| trace.starts_with("domain") || trace.starts_with("volume")), "{traces:?}");
    let allocated = |text: &[u8]| serde_json::from_slice::<serde_json::Value>(text).unwrap()["allocated_ips"].clone();
    assert_eq!(allocated(&fs::read(&database).unwrap()).as_array().unwrap().len(), 1);

    tight.relieve();
    lab.create(&vm).success();
    assert_eq!(lab.status(&vm), "active");
    assert_eq!(allocated(&fs::read(&database).unwrap()).as_array().unwrap().len(), 1);
    lab.destroy(&vm).success();
    assert_eq!(allocated(&fs::read(&database).unwrap()).as_array().unwrap().len(), 0);
    drop(run);
    lab.assert_no_traces("after all");
}
