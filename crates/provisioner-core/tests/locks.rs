//! Locks between processes: what is left when one is killed, and what another user can do with it.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::io::{self, BufRead, BufReader, Read, Write as _};
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::time::{Duration, Instant};

use provisioner_contract::VmName;
use provisioner_core::cancel::Cancel;
use provisioner_core::durable;
use provisioner_core::lock::{ProvisioningLock, VmLock};
use provisioner_core::paths::Directories;
use provisioner_core::progress::Silent;

/// Tells a copy of this test program on which directory to hold a create and the lock of `web1`, or of no VM.
const HOLDER: &str = "LOCK_TEST_HOLDER";

fn dirs(root: &Path) -> Directories {
    Directories {
        config: vec![root.join("etc")],
        state: root.join("state"),
        run: root.join("run"),
        share: root.join("share"),
    }
}

fn host() -> (tempfile::TempDir, Directories) {
    let root = tempfile::tempdir().unwrap();
    let dirs = dirs(root.path());
    fs::create_dir(&dirs.state).unwrap();
    fs::create_dir(&dirs.run).unwrap();
    (root, dirs)
}

fn web1() -> VmName {
    VmName::new("web1").unwrap()
}

/// Not a test of its own: what a holder does. It says so, and lets go when its stdin ends.
#[test]
fn holder_process() {
    let Ok(job) = std::env::var(HOLDER) else { return };
    let (what, root) = job.split_once(':').unwrap();
    let dirs = dirs(Path::new(root));
    let lock = (what == "vm").then(|| VmLock::try_acquire(&dirs, &web1(), "blockhost-vm-create").unwrap().unwrap());
    let create = ProvisioningLock::enter(&dirs, &Silent);
    println!("\nheld");
    std::io::stdin().read_to_end(&mut Vec::new()).unwrap();
    drop((create, lock));
}

struct Holder {
    child: Child,
    stdin: Option<ChildStdin>,
}

impl Holder {
    fn start(what: &str, root: &Path) -> Self {
        Self::spawn(&mut Command::new(std::env::current_exe().unwrap()), what, root)
    }

    fn spawn(program: &mut Command, what: &str, root: &Path) -> Self {
        let mut child = program
            .args(["--exact", "holder_process", "--nocapture"])
            .env(HOLDER, format!("{what}:{}", root.display()))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let held = BufReader::new(child.stdout.as_mut().unwrap()).lines().any(|line| line.unwrap() == "held");
        assert!(held);
        let stdin = child.stdin.take();
        Self { child, stdin }
    }

    fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    fn end(mut self) {
        drop(self.stdin.take());
        // Whatever else it prints must not fill the pipe.
        std::io::copy(self.child.stdout.as_mut().unwrap(), &mut std::io::sink()).unwrap();
        assert!(self.child.wait().unwrap().success());
    }
}

fn named(dirs: &Directories) -> Option<u32> {
    fs::read_to_string(dirs.run.join("provisioning.lock")).ok().map(|text| text.parse().unwrap())
}

#[test]
fn a_killed_holder_leaves_nothing_that_locks() {
    let (root, dirs) = host();
    let holder = Holder::start("vm", root.path());
    let pid = holder.child.id();
    assert_eq!(named(&dirs), Some(pid));
    let error = VmLock::acquire(&dirs, &web1(), Duration::from_millis(50), &Cancel::default(), "x").unwrap_err();
    assert!(error.to_string().contains(&format!("blockhost-vm-create (PID {pid}) is working on it")), "{error}");
    holder.kill();
    assert_eq!(named(&dirs), Some(pid), "a kill leaves the file");
    assert!(ProvisioningLock::sweep(&dirs).unwrap());
    assert_eq!(named(&dirs), None);
    drop(VmLock::try_acquire(&dirs, &web1(), "x").unwrap().unwrap());
    let left: Vec<_> = fs::read_dir(dirs.locks()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(left, [".creates.lock"], "only the mutex of the registry stays");
}

#[test]
fn a_waiter_gets_the_lock_when_its_holder_lets_go() {
    let (root, dirs) = host();
    let holder = Holder::start("vm", root.path());
    let waiter = std::thread::spawn({
        let dirs = dirs.clone();
        move || VmLock::acquire(&dirs, &web1(), Duration::from_secs(60), &Cancel::default(), "x").map(drop)
    });
    std::thread::sleep(Duration::from_millis(100));
    assert!(!waiter.is_finished());
    holder.end();
    waiter.join().unwrap().unwrap();
}

#[test]
fn while_any_create_lives_the_file_names_a_live_one() {
    let (root, dirs) = host();
    let (a, b, c) = (Holder::start("", root.path()), Holder::start("", root.path()), Holder::start("", root.path()));
    let (pid_b, pid_c) = (b.child.id(), c.child.id());
    assert_eq!(named(&dirs), Some(a.child.id()));
    a.end();
    assert!([Some(pid_b), Some(pid_c)].contains(&named(&dirs)));
    b.kill();
    assert!(!ProvisioningLock::sweep(&dirs).unwrap());
    assert_eq!(named(&dirs), Some(pid_c), "the dead one's place is taken by the living");
    c.end();
    assert_eq!(named(&dirs), None);
}

#[test]
fn ten_creates_come_and_go_and_the_file_with_them() {
    let (root, dirs) = host();
    let holders: Vec<_> = (0..10).map(|_| Holder::start("", root.path())).collect();
    for holder in holders {
        assert!(named(&dirs).is_some());
        holder.end();
    }
    assert_eq!(named(&dirs), None);
}

#[test]
fn what_root_leaves_does_not_lock_out_the_service_user() {
    const SERVICE: u32 = 64999;
    if !nix::unistd::geteuid().is_root() {
        // Past the test harness, which keeps what passing tests print.
        let _ = writeln!(io::stderr(), "skipped: not root: there is no other user to leave anything to");
        return;
    }
    let (root, dirs) = host();
    fs::set_permissions(root.path(), fs::Permissions::from_mode(0o755)).unwrap();
    for dir in [&dirs.state, &dirs.run] {
        chown(dir, Some(SERVICE), Some(SERVICE)).unwrap();
    }
    Holder::start("vm", root.path()).kill();
    // The worst of leftovers, which the service user can neither write nor learn from.
    let lock = dirs.locks().join("web1.lock");
    chown(&lock, Some(0), Some(0)).unwrap();
    fs::set_permissions(&lock, fs::Permissions::from_mode(0o644)).unwrap();
    // That user cannot reach the directory the tests are built in.
    let program = root.path().join("holder");
    fs::copy(std::env::current_exe().unwrap(), &program).unwrap();
    let holder = Holder::spawn(Command::new(&program).current_dir("/").uid(SERVICE).gid(SERVICE), "vm", root.path());
    let pid = holder.child.id();
    assert_eq!(VmLock::holder(&dirs, &web1()).unwrap().pid, pid);
    assert!(VmLock::try_acquire(&dirs, &web1(), "x").unwrap().is_none(), "root respects its lock");
    assert_eq!(named(&dirs), Some(pid));
    holder.end();
    assert!(!lock.exists());
    assert_eq!(named(&dirs), None);
}

#[test]
fn among_many_waiters_in_the_kernels_queue_ours_gets_its_turn() {
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join("db.lock");
    // Each takes the lock again at once: a poller would never find it free.
    let script = "import fcntl,sys,time\nend=time.time()+8\nwhile time.time()<end:\n with open(sys.argv[1],'a') as f:\n  fcntl.flock(f,fcntl.LOCK_EX)\n  time.sleep(0.02)";
    let mut greedy: Vec<_> =
        (0..8).map(|_| Command::new("python3").args(["-c", script]).arg(&path).spawn().unwrap()).collect();
    std::thread::sleep(Duration::from_millis(800));
    let started = Instant::now();
    for _ in 0..3 {
        drop(durable::lock_file(&path, Duration::from_secs(30)).unwrap());
    }
    let queued = greedy.iter_mut().any(|p| p.try_wait().unwrap().is_none());
    assert!(queued, "had to wait until the others were gone: {:?}", started.elapsed());
    for mut process in greedy {
        process.wait().unwrap();
    }
}
