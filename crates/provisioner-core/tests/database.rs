//! The VM database together with its other writers: Python programs, some of which follow the lock protocol and one of
//! which does not, and with the service user who must be able to use what root has written.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::io::{self, Write as _};
use std::net::{Ipv4Addr, Ipv6Addr};
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use provisioner_contract::{NewRecord, RecordStatus, Timestamp};
use provisioner_core::database::Database;
use provisioner_core::settings::{Ipv4Pool, Ipv6Pool};
use provisioner_core::{Error, ErrorKind};
use serde_json::{Value, json};

/// Tells a copy of this test program which database to write, and under which number.
const WRITER: &str = "DATABASE_TEST_WRITER";
const ROUNDS: usize = 3;

fn pool6() -> Ipv6Pool {
    Ipv6Pool { prefix: "fd00::".parse().unwrap(), prefix_len: 64, start: 2, end: 5000, gateway: None }
}

/// Has more than 255 addresses only because each writer takes a third octet of its own.
fn pool4(number: &str) -> Ipv4Pool {
    let third = number.parse().unwrap();
    Ipv4Pool { network: Ipv4Addr::new(10, 0, third, 0), prefix_len: 24, start: 2, end: 9, gateway: None }
}

fn record(name: &str, ip_address: Ipv4Addr, ipv6_address: Ipv6Addr) -> NewRecord {
    NewRecord {
        vm_name: name.parse().unwrap(),
        vmid: 0,
        ip_address,
        ipv6_address: Some(ipv6_address),
        expires_at: Timestamp::now(),
        owner: "0xabc".into(),
        status: RecordStatus::Active,
        created_at: Timestamp::now(),
        purpose: String::new(),
        wallet_address: "0xabc".parse().unwrap(),
        username: "admin".parse().unwrap(),
        network_mode: "broker".into(),
    }
}

/// Not a test of its own: what each of our processes does in the stress test.
#[test]
fn writer_process() {
    let Ok(job) = std::env::var(WRITER) else { return };
    let (path, number) = job.rsplit_once('#').unwrap();
    let db = Database::new(path).lock_wait(Duration::from_secs(300));
    for round in 0..ROUNDS {
        db.update(|doc| {
            let ipv6 = doc.allocate_ipv6(&pool6(), &|_| false)?;
            let ipv4 = doc.allocate_ipv4(&pool4(number), &|_| false)?;
            doc.register(&record(&format!("rs-{number}-{round}"), ipv4, ipv6)).map(|_| ())
        })
        .unwrap();
    }
}

/// What each Python process does: the same allocation, by the lock protocol as the other programs implement it.
const PYTHON_WRITER: &str = r#"
import fcntl, ipaddress, json, os, sys, tempfile
path, number, rounds = sys.argv[1], sys.argv[2], int(sys.argv[3])
for round in range(rounds):
    with open(path + ".lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with open(path) as f:
            db = json.load(f)
        taken = set(db["allocated_ipv6"])
        address = next(a for a in (str(ipaddress.IPv6Address("fd00::") + i) for i in range(2, 5000)) if a not in taken)
        db["allocated_ipv6"].append(address)
        db["vms"]["py-%s-%d" % (number, round)] = {"status": "active", "ipv6_address": address, "note": "ü"}
        fd, temporary = tempfile.mkstemp(dir=os.path.dirname(path))
        with os.fdopen(fd, "w") as f:
            json.dump(db, f, indent=2)
        os.replace(temporary, path)
"#;

fn our_writer(path: &Path, number: usize) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "writer_process", "--quiet"])
        .env(WRITER, format!("{}#{number}", path.display()))
        .stdout(Stdio::null())
        .spawn()
        .unwrap()
}

fn python(script: &str) -> Command {
    let mut python = Command::new("python3");
    python.args(["-c", script]);
    python
}

#[test]
fn two_hundred_writers_of_two_kinds_lose_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("vms.json");
    fs::write(
        &path,
        r#"{"vms": {}, "next_vmid": 0, "allocated_ips": [], "allocated_ipv6": [], "engine": {"x": 1.50}}"#,
    )
    .unwrap();
    let mut writers = Vec::new();
    for number in 0..100 {
        writers.push(our_writer(&path, number));
        let (number, rounds) = (number.to_string(), ROUNDS.to_string());
        writers.push(python(PYTHON_WRITER).arg(&path).args([number, rounds]).spawn().unwrap());
    }
    for mut writer in writers {
        assert!(writer.wait().unwrap().success());
    }
    let db: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    let mut addresses: Vec<_> = db["allocated_ipv6"].as_array().unwrap().iter().map(|a| a.as_str().unwrap()).collect();
    addresses.sort_unstable();
    addresses.dedup();
    assert_eq!(addresses.len(), 200 * ROUNDS, "every allocation is there, and no address twice");
    assert_eq!(db["vms"].as_object().unwrap().len(), 200 * ROUNDS);
    assert_eq!(db["allocated_ips"].as_array().unwrap().len(), 100 * ROUNDS);
    assert_eq!(db["engine"].to_string(), r#"{"x":1.5}"#, "as Python left it");
    let left: Vec<_> = fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(left.len(), 2, "the file and its lock: {left:?}");
}

#[test]
fn a_rewrite_in_place_is_never_seen_as_an_empty_or_a_broken_database() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("vms.json");
    let vms: serde_json::Map<_, _> =
        (0..40).map(|i| (format!("vm{i}"), json!({"status": "active", "ip_address": format!("10.0.0.{i}")}))).collect();
    fs::write(&path, json!({"vms": vms, "allocated_ips": []}).to_string()).unwrap();
    let script = r#"
import json, sys, time
path = sys.argv[1]
db = json.load(open(path))
text = json.dumps(db, indent=2)
for _ in range(40):
    with open(path, "w") as f:
        time.sleep(0.01)
        for i in range(0, len(text), 700):
            f.write(text[i:i + 700])
            f.flush()
            time.sleep(0.0005)
    time.sleep(0.02)
"#;
    let mut rewriter = python(script).arg(&path).spawn().unwrap();
    let db = Database::new(&path);
    let running = AtomicBool::new(true);
    let torn = std::thread::scope(|scope| {
        // A reader that does not read again, to show that there was something to see.
        let naive = scope.spawn(|| {
            let mut torn = 0;
            let started = Instant::now();
            while running.load(Ordering::SeqCst) && started.elapsed() < Duration::from_secs(60) {
                torn += usize::from(serde_json::from_slice::<Value>(&fs::read(&path).unwrap()).is_err());
                std::thread::sleep(Duration::from_millis(1));
            }
            torn
        });
        while rewriter.try_wait().unwrap().is_none() {
            assert_eq!(db.read().unwrap().records().filter(|(_, r)| r.is_ok()).count(), 40);
        }
        running.store(false, Ordering::SeqCst);
        naive.join().unwrap()
    });
    assert!(rewriter.wait().unwrap().success());
    assert!(torn > 0, "the test has seen no torn file, so it has shown nothing");
}

#[test]
fn a_file_that_stays_broken_is_an_error_and_is_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("vms.json");
    for (text, why) in [
        ("", "it is empty"),
        ("{\"vms\": {\"a\": ", "it is not valid JSON"),
        ("{\"vms\": []}", "\"vms\" must be an object"),
    ] {
        fs::write(&path, text).unwrap();
        let error = Database::new(&path).read().unwrap_err();
        assert_eq!(error.to_string(), format!("cannot use VM database {}: {why}", path.display()));
        let called = std::cell::Cell::new(false);
        let error = Database::new(&path)
            .update(|_| {
                called.set(true);
                Ok(())
            })
            .unwrap_err();
        assert_eq!((error.kind, called.get()), (ErrorKind::Invalid, false));
        assert_eq!(fs::read_to_string(&path).unwrap(), text);
    }
}

#[test]
fn an_update_that_fails_or_changes_nothing_does_not_write() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("vms.json");
    let db = Database::new(&path);
    db.update(|_| Ok(())).unwrap();
    assert!(!path.exists(), "not even a missing file is made");
    fs::write(&path, "{\"vms\":{},\"x\":1}").unwrap();
    let before = fs::metadata(&path).unwrap();
    let failed = db.update(|doc| {
        doc.allocate_ipv6(&pool6(), &|_| false)?;
        Err::<(), _>(Error::new(ErrorKind::Conflict, "no"))
    });
    assert_eq!(failed.unwrap_err().kind, ErrorKind::Conflict);
    db.update(|doc| doc.release_addresses(&"a".parse()?, "10.0.0.1".parse().ok(), "fd00::9".parse().ok(), &|_| false))
        .unwrap();
    let after = fs::metadata(&path).unwrap();
    assert_eq!((before.ino(), before.mtime_nsec()), (after.ino(), after.mtime_nsec()));
    assert_eq!(fs::read_to_string(&path).unwrap(), "{\"vms\":{},\"x\":1}");
}

#[test]
fn a_lock_that_python_holds_is_waited_for_and_named_when_it_stays() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("vms.json");
    let script = "import fcntl,sys\nf=open(sys.argv[1],'a')\nfcntl.flock(f,fcntl.LOCK_EX)\nprint('held',flush=True)\nsys.stdin.read()";
    let mut holder = python(script)
        .arg(dir.path().join("vms.json.lock"))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    std::io::BufRead::read_line(&mut std::io::BufReader::new(holder.stdout.as_mut().unwrap()), &mut line).unwrap();
    let allocate = |db: &Database| db.update(|doc| doc.allocate_ipv6(&pool6(), &|_| false));
    let error = allocate(&Database::new(&path).lock_wait(Duration::from_millis(100))).unwrap_err();
    assert_eq!(error.kind, ErrorKind::Busy);
    assert!(error.to_string().contains("vms.json.lock"), "{error}");
    assert!(!path.exists());
    let waiting = std::thread::spawn(move || allocate(&Database::new(&path)));
    std::thread::sleep(Duration::from_millis(100));
    assert!(!waiting.is_finished());
    drop(holder.stdin.take());
    holder.wait().unwrap();
    assert_eq!(waiting.join().unwrap().unwrap().to_string(), "fd00::2");
}

#[test]
fn a_writer_without_a_lock_that_was_faster_keeps_what_it_wrote() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("vms.json");
    fs::write(&path, r#"{"vms": {}}"#).unwrap();
    let mut calls = 0;
    let address = Database::new(&path)
        .update(|doc| {
            calls += 1;
            if calls == 1 {
                // As an engine does it: the whole file, in place, while we hold the lock.
                fs::write(&path, r#"{"vms": {"paid": {"status": "active", "ipv6_address": "fd00::2"}}}"#).unwrap();
            }
            doc.allocate_ipv6(&pool6(), &|_| false)
        })
        .unwrap();
    assert_eq!((calls, address.to_string().as_str()), (2, "fd00::3"));
    assert!(fs::read_to_string(&path).unwrap().contains("paid"));
}

#[test]
fn our_text_is_pythons_byte_for_byte() {
    let dir = tempfile::tempdir().unwrap();
    let (path, theirs) = (dir.path().join("vms.json"), dir.path().join("theirs.json"));
    let odd = "\u{0}\u{1f}\u{7f}\u{80}ä€😀\u{2028}\u{ffff}\"\\/\u{8}\u{c}\n\r\t<>&'";
    let mut vms = serde_json::Map::new();
    for i in 0..30 {
        let value =
            json!({"z": [], "a": {}, odd: [odd, [1, -5, 1.5, true, false, null], {"n": i}], "b": format!("{odd}{i}")});
        vms.insert(format!("vm{}", 29 - i), value);
    }
    let token: Value =
        "115792089237316195423570985008687907853269984665640564039457584007913129639935".parse().unwrap();
    let content = json!({"engine": {"k": token}, "vms": vms, "next_vmid": 7, "allocated_ips": ["x"]});
    fs::write(&path, content.to_string()).unwrap();
    // Any change makes us write the whole file.
    let pool = Ipv4Pool { network: "10.0.0.0".parse().unwrap(), prefix_len: 24, start: 5, end: 9, gateway: None };
    Database::new(&path).update(|doc| doc.allocate_ipv4(&pool, &|_| false)).unwrap();
    let script = "import json,sys\nwith open(sys.argv[1]) as f: db=json.load(f)\nwith open(sys.argv[2],'w') as f: json.dump(db,f,indent=2)";
    assert!(python(script).arg(&path).arg(&theirs).status().unwrap().success());
    assert_eq!(fs::read_to_string(&path).unwrap(), fs::read_to_string(&theirs).unwrap());
}

const SERVICE: u32 = 64999;

#[test]
fn the_service_user_can_use_what_root_has_written() {
    if !nix::unistd::geteuid().is_root() {
        // Past the test harness, which keeps what passing tests print.
        let _ = writeln!(io::stderr(), "skipped: not root: there is no other user to write for");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    chown(dir.path(), Some(SERVICE), Some(SERVICE)).unwrap();
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o750)).unwrap();
    let path = dir.path().join("vms.json");
    let pool = pool6();
    let allocate = || Database::new(&path).update(|doc| doc.allocate_ipv6(&pool, &|_| false)).unwrap();
    let owner = |path: &Path| {
        let meta = fs::metadata(path).unwrap();
        (meta.uid(), meta.gid(), meta.permissions().mode() & 0o777)
    };
    allocate();
    assert_eq!(owner(&path), (SERVICE, SERVICE, 0o660));
    assert_eq!(owner(&dir.path().join("vms.json.lock")), (SERVICE, SERVICE, 0o660));
    let as_service = |path: &Path| {
        python(PYTHON_WRITER).arg(path).args(["7", "1"]).current_dir("/").uid(SERVICE).gid(SERVICE).status().unwrap()
    };
    assert!(as_service(&path).success());
    // Python's temporary file is 0600, and so is then the database: root keeps that, and the owner.
    allocate();
    assert_eq!(owner(&path), (SERVICE, SERVICE, 0o600));
    assert!(as_service(&path).success());
    chown(&path, Some(SERVICE + 1), Some(SERVICE + 1)).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
    allocate();
    assert_eq!(owner(&path), (SERVICE + 1, SERVICE + 1, 0o644), "an existing file's owner goes before the directory's");
    chown(&path, Some(0), Some(0)).unwrap();
    allocate();
    assert_eq!(owner(&path), (SERVICE, SERVICE, 0o644), "but not if that is root");
}
