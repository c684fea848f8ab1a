//! `blockhost-vm-guest-exec`, and what `blockhost-vm-update-gecos` does where it can do nothing: commands in real guests, guests
//! that cannot answer, and an agent that lies. What needs a real Debian is in debian.rs.
#![allow(clippy::unwrap_used, missing_docs)]

mod common;

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt as _;
use std::process::Child;
use std::thread;
use std::time::{Duration, Instant};

use common::proxy::Proxy;
use common::{Guest, Lab, Outcome, WALLET, agent, finish, in_guest, output, patience, qemu_pid, virsh, wait_until};
use serde_json::json;

const EXEC: &str = "blockhost-vm-guest-exec";
const GECOS: &str = "blockhost-vm-update-gecos";

/// What `quick` allows: libvirt alone would wait for longer than 30 s where nothing answers.
const QUICK: Duration = Duration::from_secs(24);

fn exec(lab: &Lab, vm: &str, words: &[&str]) -> Outcome {
    let mut all = vec![vm];
    all.extend(words);
    lab.run(EXEC, &all)
}

fn set_off(lab: &Lab, vm: &str, script: &str) -> Child {
    lab.command(EXEC).args([vm, script]).spawn().unwrap()
}

/// Both commands fail for `why`, soon.
#[track_caller]
fn both_fail_soon(lab: &Lab, vm: &str, why: &str) {
    for (program, words) in [(EXEC, &[vm, "true"][..]), (GECOS, &[vm, WALLET, "--nft-id", "7"])] {
        let begin = Instant::now();
        lab.run(program, words).fails_with(1).says(why);
        assert!(begin.elapsed() < patience(QUICK), "{program} took {:?}", begin.elapsed());
    }
}

/// Waits until `marker` is in the guest, asked past our commands.
fn wait_for_file(vm: &str, marker: &str) {
    wait_until(marker, Duration::from_secs(60), || in_guest(vm, &format!("ls {marker} 2>&1")).trim() == marker);
}

fn signal(signal: &str, pid: &str) {
    output("kill", &[signal, pid]);
}

#[test]
fn a_command_runs_as_if_typed_in_the_guest() {
    let lab = Lab::new(Guest::Small);
    let vm = lab.name("exec");
    lab.create(&vm).success();
    // Runs all the while: whoever waits for it keeps nobody from the agent.
    let long = set_off(&lab, &vm, "sleep 60; echo slept; exit 7");

    // As it was given, through no other shell.
    let text = "echo 'a  \"b\"' \"c  'd'\" \\$x `echo e` $((1 + 1)) && printf '%s|' ü € | cat\n\necho $0 $#  # ünïcode";
    let shell = output("/bin/sh", &["-c", text]);
    assert!(shell.contains("a  \"b\" c  'd' $x e 2\nü|€|"), "{shell}");
    assert_eq!(exec(&lab, &vm, &[text]).success().stdout, shell);
    // Several words are one text, with single blanks.
    assert_eq!(exec(&lab, &vm, &["echo", "a  b", "'c  d'"]).success().stdout, "a b c  d\n");
    assert_eq!(exec(&lab, &vm, &["--", "echo", "--", "-n"]).success().stdout, "-- -n\n");
    assert_eq!(exec(&lab, &vm, &["echo", "--help", "-h", "--version"]).success().stdout, "--help -h --version\n");
    assert_eq!(exec(&lab, &vm, &[""]).success().stdout, "");
    let mut words = vec!["echo"];
    words.resize(2001, "x");
    assert_eq!(exec(&lab, &vm, &words).success().stdout.len(), 4000);
    // A command that is called like an option of ours, and one that is called like an option of the shell's.
    for word in ["--help", "--version", "-h", "-x"] {
        let outcome = exec(&lab, &vm, &[word]).fails_with(127);
        assert!(outcome.stderr.contains("not found"), "{outcome:?}");
    }
    for code in [0, 1, 7, 255] {
        let outcome = exec(&lab, &vm, &[&format!("echo out; echo err >&2; exit {code}")]);
        assert_eq!((outcome.code, &*outcome.stdout, &*outcome.stderr), (Some(code), "out\n", "err\n"));
    }
    for (word, code) in [("KILL", 137), ("TERM", 143), ("SEGV", 139)] {
        let outcome = exec(&lab, &vm, &[&format!("kill -{word} $$")]);
        assert_eq!((outcome.code, &*outcome.stdout, &*outcome.stderr), (Some(code), "", ""), "killed by {word}");
    }
    assert_eq!(exec(&lab, &vm, &["id -u; wc -c; readlink /proc/self/fd/0"]).success().stdout, "0\n0\n/dev/null\n");

    // Bytes are bytes, in both directions.
    let bytes = b"printf '%s\\0\\377\\n' \xfe; printf '\\200' >&2";
    let raw = lab.command(EXEC).arg(&vm).arg(OsStr::from_bytes(bytes)).output().unwrap();
    assert_eq!((&*raw.stdout, &*raw.stderr), (&b"\xfe\0\xff\n"[..], &b"\x80"[..]));

    // Ten megabytes of either: cut off, and the last line says so. The command gets to its end.
    let much = "head -c 10485760 /dev/zero";
    for (script, what, lengths) in [
        (format!("{much}; printf end >&2; exit 3"), "stdout was", (1 << 20, 3)),
        (format!("{much} >&2; exit 3"), "stderr was", (0, 1 << 20)),
        (format!("{much}; {much} >&2; exit 3"), "stdout and stderr were", (1 << 20, 1 << 20)),
    ] {
        let outcome = exec(&lab, &vm, &[&script]);
        assert_eq!(outcome.code, Some(3));
        let (said, last) = outcome.stderr.trim_end().rsplit_once('\n').unwrap();
        assert_eq!((outcome.stdout.len(), said.len()), lengths);
        assert!(last.contains(&format!("{what} cut off after 1048576 bytes")), "{last}");
    }
    let whole = exec(&lab, &vm, &["head -c 1048576 /dev/zero"]).success();
    assert_eq!((whole.stdout.len(), &*whole.stderr), (1 << 20, ""));

    // Nobody learns the command from us.
    let mut logged = lab.command(EXEC);
    let logged = finish(logged.env("RUST_LOG", "trace").args([&vm, ": s3cret; exit 1"]).spawn().unwrap());
    assert_eq!(logged.code, Some(1));
    assert!(!logged.stderr.contains("s3cret") && !logged.stderr.contains("czNjcmV0"), "{}", logged.stderr);

    // Signals end us, not the command, and libvirtd may go away and come back.
    let child = set_off(&lab, &vm, "touch /tmp/started; sleep 300");
    wait_for_file(&vm, "/tmp/started");
    let begin = Instant::now();
    signal("-TERM", &child.id().to_string());
    let stopped = finish(child).fails_with(1).says("may still be running");
    assert!(begin.elapsed() < patience(QUICK) && stopped.reason().contains("signal"), "{stopped:?}");
    assert!(in_guest(&vm, "ps").contains("sleep 300"));
    let proxy = Proxy::new(&lab);
    let mut command = lab.command(EXEC);
    command.args([&vm, "touch /tmp/cut; sleep 4; echo here"]).env("BLOCKHOST_LIBVIRT_URI", proxy.uri());
    let child = command.spawn().unwrap();
    wait_for_file(&vm, "/tmp/cut");
    proxy.cut();
    thread::sleep(Duration::from_secs(1));
    proxy.restore();
    assert_eq!(finish(child).success().stdout, "here\n");

    // This guest has no usermod. The field as it should be needs none.
    lab.run(GECOS, &[&vm, WALLET, "--nft-id", "7"]).fails_with(1).says("the image needs usermod");
    in_guest(&vm, &format!("sed -i 's/^admin:x:1000:1000:[^:]*/admin:x:1000:1000:wallet={WALLET},nft=7/' /etc/passwd"));
    let before = in_guest(&vm, "stat -c %i%Z /etc/passwd");
    lab.run(GECOS, &[&vm, WALLET, "--nft-id", "7"]).success();
    lab.run(GECOS, &[&vm, WALLET, "--nft-id", "7", "--username", "admin"]).success();
    assert_eq!(in_guest(&vm, "stat -c %i%Z /etc/passwd"), before);
    lab.run(GECOS, &[&vm, WALLET, "--nft-id", "7", "--username", "alice"]).fails_with(1).says("has no user alice");

    let long = finish(long);
    assert_eq!((long.code, &*long.stdout), (Some(7), "slept\n"), "{long:?}");
    lab.destroy(&vm).success();
}

#[test]
fn a_guest_that_cannot_answer_is_given_up_soon() {
    let lab = Lab::new(Guest::Small);
    let vm = lab.name("mute");
    lab.create(&vm).success();

    // The agent restarts in the middle: it knows nothing of what it had started. On a busy machine it may be away for so long
    // that nothing more is expected of it.
    let told = (0..3).any(|_| {
        let child = set_off(&lab, &vm, "touch /tmp/one; sleep 300");
        wait_for_file(&vm, "/tmp/one");
        let begin = Instant::now();
        exec(&lab, &vm, &["killall qemu-ga; sleep 300"]).fails_with(1).says("may still be running");
        let lost = finish(child).fails_with(1).says("may still be running");
        assert!(begin.elapsed() < patience(QUICK), "{lost:?}");
        wait_until("the agent to be back", Duration::from_secs(60), || {
            exec(&lab, &vm, &["rm /tmp/one"]).code == Some(0)
        });
        lost.reason().contains("no longer knows the command")
    });
    assert!(told, "nothing tells that the agent has restarted");

    // The agent hangs.
    let hang = json!({"execute": "guest-exec", "arguments": {"path": "/bin/sh", "arg":
        ["-c", "sleep 1; killall -STOP qemu-ga; sleep 28; killall -CONT qemu-ga"]}});
    agent(&vm, &hang);
    thread::sleep(Duration::from_secs(5));
    both_fail_soon(&lab, &vm, "does not answer");
    wait_until("the agent to go on", Duration::from_secs(60), || exec(&lab, &vm, &["true"]).code == Some(0));
    // No agent at all.
    let stop = json!({"execute": "guest-exec", "arguments": {"path": "/bin/sh", "arg":
        ["-c", "mv /bin/qemu-ga /bin/away; killall qemu-ga; sleep 28; mv /bin/away /bin/qemu-ga"]}});
    agent(&vm, &stop);
    wait_until("the channel to be closed", Duration::from_secs(15), || {
        virsh(&["dumpxml", &vm]).contains("state='disconnected'")
    });
    both_fail_soon(&lab, &vm, "no guest agent runs");
    wait_until("the agent to be back", Duration::from_secs(60), || exec(&lab, &vm, &["true"]).code == Some(0));

    // QEMU hangs.
    let qemu = qemu_pid(&vm);
    signal("-STOP", &qemu);
    both_fail_soon(&lab, &vm, "does not answer");
    signal("-CONT", &qemu);
    wait_until("the guest to go on", Duration::from_secs(60), || exec(&lab, &vm, &["true"]).code == Some(0));

    // Paused in the middle, and before.
    let child = set_off(&lab, &vm, "touch /tmp/two; sleep 300");
    wait_for_file(&vm, "/tmp/two");
    virsh(&["suspend", &vm]);
    let begin = Instant::now();
    both_fail_soon(&lab, &vm, "is paused");
    finish(child).fails_with(1).says("paused during the command");
    assert!(begin.elapsed() < patience(QUICK), "{:?}", begin.elapsed());
    virsh(&["resume", &vm]);
    wait_until("the guest to go on", Duration::from_secs(60), || exec(&lab, &vm, &["true"]).code == Some(0));

    // Its power goes in the middle.
    let child = set_off(&lab, &vm, "touch /tmp/three; sleep 300");
    wait_for_file(&vm, "/tmp/three");
    lab.run("blockhost-vm-kill", &[&vm]).success();
    finish(child).fails_with(1).says("went off while the command ran");
    both_fail_soon(&lab, &vm, "does not run");
    assert_eq!(lab.status(&vm), "suspended", "nothing has started it");
    lab.destroy(&vm).success();
}

/// What an agent of the tenant's own answers to one question after the other.
const LIES: &str = r#"
cd /tmp
n=0
for reply in '{"return":{"pid":"7"}}' '{"return":[7]}' '{"error":{"class":"Error","desc":"no\u001b[2J\nno"}}'; do
    n=$((n + 1)); echo "$reply" > exec$n
done
while [ $n -lt 20 ]; do n=$((n + 1)); echo '{"return":{"pid":7}}' > exec$n; done
n=0
for reply in '{"return":{}}' '{"return":{"exited":"yes"}}' '{"return":{"exited":true}}' \
    '{"return":{"exited":true,"exitcode":256}}' '{"return":{"exited":true,"exitcode":0,"signal":9}}' \
    '{"return":{"exited":true,"exitcode":0,"out-data":"%%%%"}}' '{"return":{"exited":true,"exitcode":0,"err-data":7}}' \
    '{"error":{"class":"Error","desc":"no"}}'; do n=$((n + 1)); echo "$reply" > status$n; done
long() { printf '{"return":{"exited":true,"exitcode":0,"out-data":"'; head -c $1 /dev/zero | tr '\0' A; echo '"}}'; }
long 1500000 > status9
long 5000000 > status10
cp status8 status11
long 11000000 > status12
"#;

/// That agent.
const LIAR: &str = r#"
cd /tmp
mv /bin/qemu-ga /bin/away; killall qemu-ga; sleep 1
exec 3<>/dev/virtio-ports/org.qemu.guest_agent.0
e=0
s=0
while :; do
    # Nothing to read: libvirt has not come to the other end yet.
    read -r line <&3 || { sleep 0.1; continue; }
    case $line in
    *guest-sync*) echo "$line" | sed 's/.*"id": *\([0-9]*\).*/{"return":\1}/' >&3 ;;
    *guest-exec-status*) s=$((s + 1)); cat status$s >&3 ;;
    *guest-exec*) e=$((e + 1)); cat exec$e >&3 ;;
    *) echo '{"return":{}}' >&3 ;;
    esac
done
"#;

#[test]
fn an_agent_that_lies_is_not_believed() {
    let lab = Lab::new(Guest::Small);
    let vm = lab.name("liar");
    lab.create(&vm).success();
    in_guest(&vm, LIES);
    agent(&vm, &json!({"execute": "guest-exec", "arguments": {"path": "/bin/sh", "arg": ["-c", LIAR]}}));
    thread::sleep(Duration::from_secs(6));
    let refused = |why: &str| {
        let begin = Instant::now();
        let outcome = exec(&lab, &vm, &["true"]).fails_with(1).says(why);
        assert!(!outcome.stderr.contains('\u{1b}') && outcome.stderr.lines().count() == 1, "{outcome:?}");
        assert!(begin.elapsed() < patience(QUICK), "{:?}", begin.elapsed());
    };
    refused("no process id");
    refused("no process id");
    refused("refuses guest-exec");
    for key in ["exited", "exited", "exitcode", "exitcode", "exitcode", "out-data", "err-data"] {
        refused(&format!("no valid {key}"));
    }
    refused("no longer knows the command");
    refused("no valid out-data");
    // What does not fit into libvirt's protocol is lost, and what is longer makes libvirt give the agent up.
    refused("no longer knows the command");
    refused("no longer knows the command");
    both_fail_soon(&lab, &vm, "does not answer");
    lab.destroy(&vm).success();
}

#[test]
fn only_whole_vms_of_ours_are_talked_to() {
    let lab = Lab::new(Guest::Blank);
    let (foreign, legacy, new) = (lab.name("foreign"), lab.name("legacy"), lab.name("new"));
    both_fail_soon(&lab, &new, "there is no VM called");
    lab.define(&foreign, "");
    both_fail_soon(&lab, &foreign, "is not BlockHost's");
    lab.add_legacy_vm(&legacy, &lab.address(0));
    both_fail_soon(&lab, &legacy, "does not run");
    assert!(virsh(&["domstate", &legacy]).contains("shut off"));
    virsh(&["start", &legacy]);
    both_fail_soon(&lab, &legacy, "no guest agent runs");

    // Half made: not while it is, and what a dead create left is cleared.
    let parked = lab.park("create.define", "blockhost-vm-create", &lab.create_arguments(&new));
    both_fail_soon(&lab, &new, "is working on it");
    let mut child = parked.go();
    let _ = child.kill();
    child.wait().unwrap();
    both_fail_soon(&lab, &new, "there is no VM called");
    let left: Vec<_> = lab.traces().into_iter().filter(|trace| trace.contains(&new)).collect();
    assert_eq!(left, Vec::<String>::new());

    // Wrong usage is told before anything is asked.
    for words in
        [&[][..], &[legacy.as_str()], &[&legacy, "--"], &["--what", &legacy, "ls"], &["a b", "ls"], &["--", "-a", "ls"]]
    {
        lab.run(EXEC, words).fails_with(2);
    }
    let gecos = |wallet: &str, id: &str, more: &[&str]| {
        let mut words = vec![legacy.as_str(), wallet, "--nft-id", id];
        words.extend(more);
        lab.run(GECOS, &words)
    };
    for bad in ["a:b", "a,b", "a=b", "a b", "a\n", "", "ü", "$(id)"] {
        gecos(bad, "7", &[]).fails_with(2).says("wallet address");
        gecos(WALLET, bad, &[]).fails_with(2).says("NFT id");
        gecos(WALLET, "7", &["--username", bad]).fails_with(2).says("user name");
    }
    gecos(WALLET, "7", &["--username", "root"]).fails_with(2).says("user name");
    lab.run(GECOS, &[&legacy, WALLET]).fails_with(2).says("--nft-id");
    fs::write(lab.database(), "{").unwrap();
    let begin = Instant::now();
    lab.run(EXEC, &[&legacy, "true"]).fails_with(1);
    assert!(begin.elapsed() < patience(QUICK));
}
