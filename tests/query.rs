//! `blockhost-vm-status`, `-list`, `blockhost-provisioner-detect`; and what holds for every command: its help, and that it reads no
//! stdin.
#![allow(clippy::unwrap_used, missing_docs)]

mod common;

use std::ffi::OsStr;
use std::fs;
use std::io::Write as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use common::{Guest, Lab, Outcome, WALLET, binary, finish, patience, virsh};
use serde_json::{Value, json};

const NOWHERE: &str = "qemu+unix:///system?socket=/nonexistent";

impl Lab {
    fn list(&self, arguments: &[&str]) -> Outcome {
        self.run("blockhost-vm-list", arguments).success()
    }

    /// The rows of `list --format json`.
    fn rows(&self) -> Value {
        serde_json::from_str(&self.list(&["--format", "json"]).stdout).unwrap()
    }
}

#[track_caller]
fn is_the_word(outcome: Outcome, word: &str) {
    let outcome = outcome.success();
    assert_eq!(outcome.stdout, format!("{word}\n"), "{outcome:?}");
}

#[test]
fn status_is_one_word_whatever_happens() {
    let lab = Lab::new(Guest::Blank);
    let status = |arguments: &[&str]| lab.run("blockhost-vm-status", arguments);
    let vm = lab.name("vm");
    is_the_word(status(&[&vm]), "unknown");
    lab.define(&vm, "");
    is_the_word(status(&[&vm]), "suspended");
    virsh(&["start", &vm]);
    is_the_word(status(&[&vm]), "active");
    virsh(&["suspend", &vm]);
    is_the_word(status(&[&vm]), "suspended");
    virsh(&["destroy", &vm]);
    virsh(&["undefine", &vm]);
    is_the_word(status(&[&vm]), "unknown");
    lab.add_record(&vm, &lab.address(0));
    is_the_word(status(&[&vm]), "destroyed");
    // A damaged record is a record.
    lab.edit_database(|vms| vms["vms"][&vm] = json!(7));
    is_the_word(status(&[&vm]), "destroyed");

    for name in ["", "-x", "--", "a b", "a\n", "../vms", "ü", "$(id)"] {
        is_the_word(status(&[name]), "unknown");
        is_the_word(status(&["--", name]), "unknown");
    }
    is_the_word(status(&[]), "unknown");
    is_the_word(status(&["a", "b"]), "unknown");
    is_the_word(status(&["--what", "a"]), "unknown");
    let bytes = finish(lab.command("blockhost-vm-status").arg(OsStr::from_bytes(b"\xff\xfe")).spawn().unwrap());
    is_the_word(bytes, "unknown");

    // Unknown is not destroyed: libvirt cannot be asked, or nobody can tell whether there is a record.
    let cut = lab.command("blockhost-vm-status").arg(&vm).env("BLOCKHOST_LIBVIRT_URI", NOWHERE).spawn().unwrap();
    let cut = finish(cut);
    assert!(cut.reason().contains("cannot connect to libvirt"), "{cut:?}");
    is_the_word(cut, "unknown");
    fs::write(lab.database(), "{\"vms\": {").unwrap();
    is_the_word(status(&[&vm]), "unknown");
    fs::remove_file(lab.database()).unwrap();
    is_the_word(status(&[&vm]), "unknown");
    fs::write(lab.dir.join("config/db.yaml"), "db_file: [1]\n").unwrap();
    is_the_word(status(&[&vm]), "unknown");
}

#[test]
fn list_has_its_two_forms() {
    let lab = Lab::new(Guest::Blank);
    assert_eq!(lab.list(&[]).stdout, "NAME\tSTATUS\tIP\tCREATED\n");
    assert_eq!(lab.list(&["--format", "json"]).stdout, "[]\n");

    let vm = lab.name("vm");
    lab.define(&vm, "");
    virsh(&["start", &vm]);
    lab.add_record(&vm, &lab.address(0));
    for (index, name) in (1..).zip(["1e3", "true", "123", "null"]) {
        lab.add_record(name, &lab.address(index));
    }
    lab.edit_database(|vms| {
        vms["vms"]["123"]["status"] = "destroyed".into();
        vms["vms"]["123"]["ip_address"] = "".into();
        vms["vms"]["null"]["created_at"] = json!(null);
    });
    let [a, b, c, d] = [0, 1, 2, 4].map(|index| lab.address(index));
    let text = format!(
        "NAME\tSTATUS\tIP\tCREATED\n{vm}\tactive\t{a}\t2026-01-02\n1e3\tdestroyed\t{b}\t2026-01-02\n\
         true\tdestroyed\t{c}\t2026-01-02\n123\tdestroyed\t\t2026-01-02\nnull\tdestroyed\t{d}\t\n"
    );
    assert_eq!(lab.list(&[]).stdout, text);
    let json = format!(
        "[{{\"name\":\"{vm}\",\"status\":\"active\",\"ip\":\"{a}\",\"created\":\"2026-01-02\"}},\
         {{\"name\":\"1e3\",\"status\":\"destroyed\",\"ip\":\"{b}\",\"created\":\"2026-01-02\"}},\
         {{\"name\":\"true\",\"status\":\"destroyed\",\"ip\":\"{c}\",\"created\":\"2026-01-02\"}},\
         {{\"name\":\"123\",\"status\":\"destroyed\",\"ip\":\"\",\"created\":\"2026-01-02\"}},\
         {{\"name\":\"null\",\"status\":\"destroyed\",\"ip\":\"{d}\",\"created\":\"\"}}]\n"
    );
    let listed = lab.list(&["--format", "json"]);
    assert_eq!((listed.stdout, listed.stderr.as_str()), (json, ""));

    virsh(&["suspend", &vm]);
    assert_eq!(lab.rows()[0]["status"], "suspended");

    // Without libvirt nobody knows what they do, and what they are is still listed.
    let cut = lab.command("blockhost-vm-list").args(["--format", "json"]).env("BLOCKHOST_LIBVIRT_URI", NOWHERE).spawn();
    let cut = finish(cut.unwrap()).success();
    assert!(cut.reason().contains("cannot connect to libvirt"), "{cut:?}");
    let rows: Value = serde_json::from_str(&cut.stdout).unwrap();
    assert_eq!(rows.as_array().unwrap().len(), 5);
    assert!(rows.as_array().unwrap().iter().all(|row| row["status"] == "unknown"), "{rows}");

    // Wrong usage is complained about and costs nobody the list.
    let wrong = lab.list(&["--format", "yaml"]);
    assert!(wrong.reason().contains("yaml"), "{wrong:?}");
    assert_eq!(wrong.stdout.lines().count(), 6);
}

#[test]
fn a_damaged_record_costs_one_row_and_no_more() {
    let lab = Lab::new(Guest::Blank);
    lab.add_record("before", &lab.address(0));
    lab.add_record("damaged", &lab.address(1));
    lab.add_record("after", &lab.address(2));
    let whole = lab.record("damaged");
    let mut variants: Vec<Value> = vec![json!(null), json!(7), json!([]), json!("text"), json!({})];
    for (key, value) in [
        ("status", json!("gone")),
        ("status", json!(null)),
        ("ip_address", json!(7)),
        ("created_at", json!(["x"])),
        ("created_at", json!("not a time")),
        ("vmid", json!({})),
    ] {
        let mut record = whole.clone();
        record[key] = value;
        variants.push(record);
    }
    for record in variants {
        lab.edit_database(|vms| vms["vms"]["damaged"] = record.clone());
        let listed = lab.list(&["--format", "json"]);
        let rows: Value = serde_json::from_str(&listed.stdout).unwrap();
        let names: Vec<_> = rows.as_array().unwrap().iter().map(|row| row["name"].as_str().unwrap()).collect();
        assert_eq!(names, ["before", "after"], "{record}");
        assert!(listed.reason().contains("\"damaged\""), "{record}: {listed:?}");
    }
    // Names are put into HTML as they are.
    lab.edit_database(|vms| {
        vms["vms"].as_object_mut().unwrap().remove("damaged");
        let mut record = whole.clone();
        record["ip_address"] = "<b>1.2.3.4</b>".into();
        vms["vms"]["<script>alert(1)</script>\n"] = record.clone();
        vms["vms"]["marked-up"] = record;
    });
    for form in ["text", "json"] {
        let listed = lab.list(&["--format", form]);
        assert!(!listed.stdout.contains('<') && listed.stdout.contains("marked-up"), "{listed:?}");
        assert!(listed.stdout.is_ascii());
    }
}

#[test]
fn a_database_that_cannot_be_read_is_said_to_be() {
    let lab = Lab::new(Guest::Blank);
    // There is none before the first VM.
    let none = lab.list(&[]);
    assert_eq!((none.stdout.as_str(), none.stderr.as_str()), ("NAME\tSTATUS\tIP\tCREATED\n", ""));
    for text in ["", "{\"vms\": {\"a\": {", "[]", "\u{0}\u{0}", "{\"vms\": []}"] {
        fs::write(lab.database(), text).unwrap();
        let listed = lab.list(&["--format", "json"]);
        assert_eq!(listed.stdout, "[]\n");
        assert!(listed.reason().contains("vms.json"), "{text:?}: {listed:?}");
        assert_eq!(fs::read_to_string(lab.database()).unwrap(), text);
    }
}

/// One of the engines rewrites the file in place, without a lock: many reads find it torn.
#[test]
fn a_rewrite_in_place_never_looks_like_an_empty_database() {
    let lab = Lab::new(Guest::Blank);
    for index in 0..10 {
        lab.add_record(&format!("vm{index}"), &lab.address(index));
    }
    let writer = "import json, sys, time\n\
        path = sys.argv[1]\n\
        data = json.load(open(path))\n\
        while True:\n\
        \x20   begun = time.monotonic()\n\
        \x20   with open(path, 'w') as file:\n\
        \x20       for part in json.JSONEncoder(indent=2).iterencode(data):\n\
        \x20           file.write(part)\n\
        \x20           file.flush()\n\
        \x20   time.sleep(max(0.005, 2 * (time.monotonic() - begun)))\n";
    let mut writer = Command::new("python3").args(["-c", writer]).arg(lab.database()).spawn().unwrap();
    let end = Instant::now() + Duration::from_secs(4);
    let (mut rounds, mut torn) = (0, 0);
    let mut failed = Vec::new();
    while Instant::now() < end {
        let listed = lab.list(&["--format", "json"]);
        let rows: Value = serde_json::from_str(&listed.stdout).unwrap();
        if rows.as_array().unwrap().len() != 10 {
            failed.push(listed);
        }
        torn += u32::from(serde_json::from_slice::<Value>(&fs::read(lab.database()).unwrap()).is_err());
        rounds += 1;
    }
    writer.kill().unwrap();
    writer.wait().unwrap();
    assert!(failed.is_empty(), "{} of {rounds}: {failed:#?}", failed.len());
    assert!(torn > 0, "the file was never torn in {rounds} looks: this test shows nothing");
}

#[test]
fn nobody_reading_the_answer_is_no_crash() {
    let lab = Lab::new(Guest::Blank);
    lab.add_record("vm", &lab.address(0));
    for (program, arguments) in [("blockhost-vm-list", vec![]), ("blockhost-vm-status", vec!["vm"])] {
        let full = fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
        let to = |stdout: Stdio| {
            let child = lab.command(program).args(&arguments).stdout(stdout).spawn().unwrap();
            let output = child.wait_with_output().unwrap();
            assert_eq!(output.status.code(), Some(0), "{program}: {output:?}");
            assert!(!String::from_utf8_lossy(&output.stderr).contains("panicked"), "{program}: {output:?}");
        };
        to(full.into());
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        to(writer.into());
        let closed = Command::new("sh")
            .args(["-c", "exec \"$0\" \"$@\" >&- 2>&-"])
            .arg(binary(program))
            .args(&arguments)
            .envs(lab.command(program).get_envs().filter_map(|(key, value)| Some((key, value?))))
            .stdin(Stdio::null())
            .status();
        assert_eq!(closed.unwrap().code(), Some(0), "{program}");
    }
    // A result that nobody got is not a success.
    let full = fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    let arguments = ["vm2", "--owner-wallet", WALLET, "--mock"];
    let plan = lab.command("blockhost-vm-create").args(arguments).stdout(full).spawn().unwrap();
    assert_eq!(plan.wait_with_output().unwrap().status.code(), Some(1));
}

#[test]
fn detect_says_it_with_its_exit_code_alone() {
    let lab = Lab::new(Guest::Blank);
    let here = lab.run("blockhost-provisioner-detect", &[]).success();
    assert_eq!((here.stdout.as_str(), here.stderr.as_str()), ("", ""));
    let mut command = lab.command("blockhost-provisioner-detect");
    let nowhere = finish(command.env("BLOCKHOST_LIBVIRT_URI", NOWHERE).spawn().unwrap()).fails_with(1);
    assert_eq!(nowhere.stderr, "");
    // It needs no configuration: it is asked before there is any.
    fs::remove_dir_all(lab.dir.join("config")).unwrap();
    lab.run("blockhost-provisioner-detect", &[]).success();
}

const COMMANDS: [&str; 17] = [
    "blockhost-build-template",
    "blockhost-provisioner-detect",
    "blockhost-provisioner-doctor",
    "blockhost-provisioner-repair",
    "blockhost-vm-create",
    "blockhost-vm-destroy",
    "blockhost-vm-gc",
    "blockhost-vm-guest-exec",
    "blockhost-vm-kill",
    "blockhost-vm-list",
    "blockhost-vm-metrics",
    "blockhost-vm-resume",
    "blockhost-vm-start",
    "blockhost-vm-status",
    "blockhost-vm-stop",
    "blockhost-vm-throttle",
    "blockhost-vm-update-gecos",
];

/// The help of all commands, as reviewers and operators see it.
#[test]
fn every_command_explains_itself_with_an_example() {
    let mut all = String::new();
    for program in COMMANDS {
        let help =
            Command::new(binary(program)).arg("--help").env_remove("COLUMNS").stdin(Stdio::null()).output().unwrap();
        assert!(help.status.success() && help.stderr.is_empty(), "{program}: {help:?}");
        let help = String::from_utf8(help.stdout).unwrap();
        assert!(
            help.contains("Example") && help.contains(&format!("\n  {program}")),
            "{program} has no example: {help}"
        );
        all += &format!("$ {program} --help\n{help}\n");
        let version = Command::new(binary(program)).arg("--version").stdin(Stdio::null()).output().unwrap();
        assert_eq!(String::from_utf8(version.stdout).unwrap(), format!("{program} {}\n", env!("CARGO_PKG_VERSION")));
        // Wrong usage is one line.
        let wrong = Command::new(binary(program)).arg("--no-such").stdin(Stdio::null()).output().unwrap();
        let wrong = String::from_utf8(wrong.stderr).unwrap();
        let line = format!("{program}: error: unexpected argument '--no-such' found (hint: see {program} --help)\n");
        assert!(wrong.starts_with(&line), "{wrong}");
    }
    let trimmed: Vec<_> = all.lines().map(str::trim_end).collect();
    insta::assert_snapshot!("help", trimmed.join("\n"));
}

/// Callers leave stdin a pipe nobody writes to; or there is none.
#[test]
fn no_command_reads_stdin() {
    let lab = Lab::new(Guest::Blank);
    let plan = ["vm", "--owner-wallet", WALLET, "--mock"];
    let runs: [(&str, &[&str], i32); 12] = [
        ("blockhost-vm-create", &plan, 0),
        ("blockhost-vm-destroy", &["vm"], 0),
        ("blockhost-vm-start", &["vm"], 1),
        ("blockhost-vm-stop", &["vm"], 1),
        ("blockhost-vm-kill", &["vm"], 1),
        ("blockhost-vm-status", &["vm"], 0),
        ("blockhost-vm-list", &[], 0),
        ("blockhost-vm-guest-exec", &["vm", "cat"], 1),
        ("blockhost-vm-update-gecos", &["vm", WALLET, "--nft-id", "7"], 1),
        ("blockhost-provisioner-detect", &[], 0),
        ("blockhost-vm-gc", &[], 0),
        ("blockhost-vm-resume", &["vm"], 1),
    ];
    for (program, arguments, code) in runs {
        let run = |stdin: Stdio| {
            let begin = Instant::now();
            let child = lab.command(program).args(arguments).stdin(stdin).spawn().unwrap();
            let outcome = finish(child);
            assert_eq!(outcome.code, Some(code), "{program}: {outcome:?}");
            assert!(begin.elapsed() < patience(Duration::from_secs(20)), "{program} waited");
            outcome.stdout
        };
        // Both ends stay open until the command has ended.
        let (reader, mut writer) = std::io::pipe().unwrap();
        writer.write_all(b"never read\n").unwrap();
        let open = run(reader.try_clone().unwrap().into());
        let mut left = [0; 11];
        let nonblocking = fs::OpenOptions::new()
            .read(true)
            .custom_flags(nix::fcntl::OFlag::O_NONBLOCK.bits())
            .open(format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&reader)));
        std::io::Read::read_exact(&mut nonblocking.unwrap(), &mut left)
            .unwrap_or_else(|_| panic!("{program} has read stdin"));
        assert_eq!(run(Stdio::null()), open, "{program}");
        // No stdin at all.
        let without = Command::new("sh")
            .args(["-c", "exec \"$0\" \"$@\" <&-"])
            .arg(binary(program))
            .args(arguments)
            .current_dir(lab.state())
            .envs(lab.command(program).get_envs().filter_map(|(key, value)| Some((key, value?))))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status();
        assert_eq!(without.unwrap().code(), Some(code), "{program} without stdin");
    }
}
