//! Locks between processes: one per VM, and the file that tells engines a create is in flight.
//!
//! Every lock is a `flock`, so a killed process holds nothing. A VM's lock file is removed by whoever lets go of it,
//! while still holding it; whoever gets the lock therefore looks whether its file is still the one in the directory.

use std::fs::{self, File, TryLockError};
use std::io::{ErrorKind as Io, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use provisioner_contract::{Timestamp, VmName};

use crate::cancel::Cancel;
use crate::durable;
use crate::owner::{self, ProcessId};
use crate::paths::Directories;
use crate::progress::Progress;
use crate::{Error, ErrorKind, Result};

/// How often a held lock is looked at again. Also how late a signal may be noticed.
const POLL: Duration = Duration::from_millis(25);

/// The directory of locks is shared by root and the service user's group.
const LOCK_DIR_MODE: u32 = 0o770;

/// What a VM lock's file says about its holder. For people: whether it is held, only the kernel knows.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Holder {
    /// Its PID.
    pub pid: u32,
    /// The command it runs, such as `blockhost-vm-create`.
    pub command: String,
    /// Since when it holds the lock.
    pub since: Timestamp,
}

/// Exclusive work on one VM. Dropped, the VM is free and the file gone.
#[derive(Debug)]
pub struct VmLock {
    path: PathBuf,
    file: File,
}

impl VmLock {
    /// Waits up to `wait` for the lock of `name`. `command` is what others are told holds it.
    ///
    /// # Errors
    /// [`ErrorKind::Busy`] naming the holder's PID and command after `wait`; [`ErrorKind::Interrupted`] as soon as a
    /// stop is asked for; [`ErrorKind::Io`] when the file cannot be made or opened.
    pub fn acquire(dirs: &Directories, name: &VmName, wait: Duration, cancel: &Cancel, command: &str) -> Result<Self> {
        let end = Instant::now() + wait;
        loop {
            cancel.check()?;
            if let Some(lock) = Self::try_acquire(dirs, name, command)? {
                return Ok(lock);
            }
            if Instant::now() >= end {
                let who = match Self::holder(dirs, name) {
                    Some(holder) => format!("{} (PID {})", holder.command, holder.pid),
                    None => "another command".to_owned(),
                };
                return Err(Error::new(
                    ErrorKind::Busy,
                    format!("cannot lock VM {name}: {who} is working on it, waited {:.0} s", wait.as_secs_f64()),
                )
                .hint("try again when that command has ended"));
            }
            cancel.sleep(POLL.min(end.saturating_duration_since(Instant::now())))?;
        }
    }

    /// The lock of `name` if nobody holds it.
    ///
    /// # Errors
    /// [`ErrorKind::Io`] when the file cannot be made or opened.
    pub fn try_acquire(dirs: &Directories, name: &VmName, command: &str) -> Result<Option<Self>> {
        let path = Self::path(dirs, name);
        durable::create_dir_owned(&dirs.locks(), LOCK_DIR_MODE)?;
        let mut replaced = false;
        loop {
            let file = durable::open_lock_file(&path)?;
            match file.try_lock() {
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => return Ok(None),
                Err(TryLockError::Error(e)) => return Err(Error::io("lock", &path, e)),
            }
            if !is_at(&file, &path) {
                // Its last holder removed it between our opening and locking it.
                continue;
            }
            let holder = Holder { pid: std::process::id(), command: command.to_owned(), since: Timestamp::now() };
            // Not described, as on a full disk, it is locked all the same. But a leftover of another user, which we
            // may lock and not write, would name a wrong holder: a new one is ours.
            if describe(&file, &holder).is_err() && !replaced && fs::remove_file(&path).is_ok() {
                replaced = true;
                continue;
            }
            return Ok(Some(Self { path, file }));
        }
    }

    /// Removes the files of locks that nobody holds, which killed commands leave. They are in nobody's way.
    ///
    /// # Errors
    /// [`ErrorKind::Io`] when the directory is there and cannot be read.
    pub fn sweep(dirs: &Directories, command: &str) -> Result<()> {
        for entry in durable::entries(&dirs.locks())? {
            let file = entry.file_name();
            let stem = file.to_str().and_then(|file| file.strip_suffix(".lock"));
            if let Some(Ok(name)) = stem.map(VmName::new) {
                // Taken and let go, it is removed.
                let _ = Self::try_acquire(dirs, &name, command);
            }
        }
        Ok(())
    }

    /// Who the lock's file says holds it. Stale when nobody does.
    #[must_use]
    pub fn holder(dirs: &Directories, name: &VmName) -> Option<Holder> {
        serde_json::from_slice(&fs::read(Self::path(dirs, name)).ok()?).ok()
    }

    /// The VMs that are being worked on now, with what their locks' files say about who does. Takes and makes nothing.
    ///
    /// # Errors
    /// [`ErrorKind::Io`] when the directory is there and cannot be read.
    pub fn held(dirs: &Directories) -> Result<Vec<(VmName, Option<Holder>)>> {
        let mut held = Vec::new();
        for entry in durable::entries(&dirs.locks())? {
            let file = entry.file_name();
            let Some(name) = file.to_str().and_then(|f| f.strip_suffix(".lock")).and_then(|n| VmName::new(n).ok())
            else {
                continue;
            };
            let free = match File::open(Self::path(dirs, &name)) {
                Ok(file) => file.try_lock_shared().is_ok(),
                Err(e) if e.kind() == Io::NotFound => true,
                // Another user's, which is gone when it is not held.
                Err(_) => false,
            };
            if !free {
                let holder = Self::holder(dirs, &name);
                held.push((name, holder));
            }
        }
        held.sort_by(|a, b| a.0.cmp(&b.0));
        Ok(held)
    }

    fn path(dirs: &Directories, name: &VmName) -> PathBuf {
        dirs.locks().join(format!("{name}.lock"))
    }
}

impl Drop for VmLock {
    fn drop(&mut self) {
        // Before the lock goes: afterwards the file may be somebody else's.
        if is_at(&self.file, &self.path) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Whether `path` still leads to the open `file`.
fn is_at(file: &File, path: &Path) -> bool {
    match (file.metadata(), fs::symlink_metadata(path)) {
        (Ok(open), Ok(named)) => (open.dev(), open.ino()) == (named.dev(), named.ino()),
        _ => false,
    }
}

fn describe(mut file: &File, holder: &Holder) -> std::io::Result<()> {
    file.set_len(0)?;
    file.write_all(&serde_json::to_vec(holder)?)
}

/// One create in flight, as the registry has it.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
struct InFlight {
    process: ProcessId,
    /// Tells the creates of one process apart.
    serial: u64,
}

/// The name every process that creates VMs shows in its command line; two engines look for it too.
const CREATE_COMMAND: &str = "blockhost-vm-create";

/// How long the registry may be held by others. They hold it for a few file operations.
const REGISTRY_WAIT: Duration = Duration::from_secs(10);

/// As long as this lives, `provisioning.lock` exists, whichever create ends first. Dropped, it is removed if this was
/// the last.
#[derive(Debug)]
pub struct ProvisioningLock {
    dirs: Directories,
    /// `None` when the registry could not be written.
    entry: Option<InFlight>,
}

impl ProvisioningLock {
    /// Enters the creates in flight. What cannot be written is warned about and does not stop a create: the run
    /// directory may be absent, read-only or root's.
    #[must_use]
    pub fn enter(dirs: &Directories, progress: &dyn Progress) -> Self {
        static SERIAL: AtomicU64 = AtomicU64::new(0);
        let mut warnings = Vec::new();
        let entry = ProcessId::current()
            .map(|process| InFlight { process, serial: SERIAL.fetch_add(1, Ordering::Relaxed) })
            .and_then(|entry| {
                change(dirs, &mut warnings, |list| list.push(entry.clone()))?;
                Ok(entry)
            });
        let entry = match entry {
            Ok(entry) => Some(entry),
            Err(e) => {
                warnings.push(with_cause(&e));
                None
            }
        };
        for warning in warnings {
            progress.warn(&format!("engines may not see this create: {warning}"));
        }
        Self { dirs: dirs.clone(), entry }
    }

    /// Whether a create is in flight, of this implementation or another; `None` when nothing says so. Changes nothing.
    #[must_use]
    pub fn look(dirs: &Directories) -> Option<bool> {
        let text = fs::read_to_string(file(dirs));
        if text.as_ref().is_err_and(|e| e.kind() == Io::NotFound) {
            return None;
        }
        let bytes = fs::read(registry(dirs)).unwrap_or_default();
        let list: Vec<InFlight> = serde_json::from_slice(&bytes).unwrap_or_default();
        let named = text.ok().and_then(|text| text.trim().parse().ok());
        let foreign = named.is_some_and(|pid| owner::runs_program(pid, CREATE_COMMAND));
        Some(foreign || list.iter().any(|entry| entry.process.is_alive()))
    }

    /// Removes what creates that were killed left in the run directory and the registry. Says whether a file went.
    ///
    /// # Errors
    /// [`ErrorKind::Io`] or [`ErrorKind::Busy`] when the registry or the file cannot be changed.
    pub fn sweep(dirs: &Directories) -> Result<bool> {
        let (file, registry) = (file(dirs), registry(dirs));
        if fs::symlink_metadata(&file).is_err() && fs::symlink_metadata(&registry).is_err() {
            return Ok(false);
        }
        let before = fs::symlink_metadata(&file).is_ok();
        let mut warnings = Vec::new();
        change(dirs, &mut warnings, |_| {})?;
        let after = fs::symlink_metadata(&file).is_ok();
        // No file where one cannot be written is nothing to remove: the create in flight has warned about it.
        match warnings.pop() {
            Some(warning) if after => Err(Error::new(ErrorKind::Io, warning)),
            _ => Ok(before && !after),
        }
    }
}

impl Drop for ProvisioningLock {
    fn drop(&mut self) {
        let Some(entry) = self.entry.take() else { return };
        let mut warnings = Vec::new();
        let left = change(&self.dirs, &mut warnings, |list| list.retain(|other| *other != entry));
        if let Err(e) = left {
            warnings.push(with_cause(&e));
        }
        for warning in warnings {
            tracing::warn!("{warning}");
        }
    }
}

fn file(dirs: &Directories) -> PathBuf {
    dirs.run.join("provisioning.lock")
}

/// A VM's name starts with a letter or digit, so no VM's lock has this name.
fn registry(dirs: &Directories) -> PathBuf {
    dirs.locks().join(".creates.json")
}

fn with_cause(error: &Error) -> String {
    match std::error::Error::source(error) {
        Some(cause) => format!("{error}: {cause}"),
        None => error.to_string(),
    }
}

/// Changes the list of creates in flight, drops the dead ones from it, and makes the file agree with it: all of that
/// while no other process does.
fn change(dirs: &Directories, warnings: &mut Vec<String>, change: impl FnOnce(&mut Vec<InFlight>)) -> Result<()> {
    durable::create_dir_owned(&dirs.locks(), LOCK_DIR_MODE)?;
    let _mutex = durable::lock_file(&dirs.locks().join(".creates.lock"), REGISTRY_WAIT)?;
    let path = registry(dirs);
    let before: Vec<InFlight> = match fs::read(&path) {
        // It is only ever replaced as a whole. If it is damaged all the same, the PIDs in it are lost and with them
        // nothing but the order in which the file disappears.
        Ok(bytes) => serde_json::from_slice(&bytes).unwrap_or_default(),
        Err(e) if e.kind() == Io::NotFound => Vec::new(),
        Err(e) => return Err(Error::io("read", &path, e)),
    };
    let mut list = before.clone();
    list.retain(|other| other.process.is_alive());
    change(&mut list);
    if list.is_empty() {
        durable::remove_durable(&path)?;
    } else if list != before {
        let bytes = serde_json::to_vec(&list).unwrap_or_default();
        durable::write_atomic(&path, &bytes, 0o660)?;
    }
    if let Err(e) = agree(&file(dirs), &list) {
        warnings.push(with_cause(&e));
    }
    Ok(())
}

/// Makes `file` hold the PID of a live create, or not exist.
fn agree(file: &Path, list: &[InFlight]) -> Result<()> {
    let named: Option<u32> = fs::read_to_string(file).ok().and_then(|text| text.trim().parse().ok());
    if let Some(pid) = named {
        // Also a create of another implementation counts, which knows nothing of the registry.
        let foreign = pid != std::process::id() && owner::runs_program(pid, CREATE_COMMAND);
        if list.iter().any(|entry| entry.process.pid == pid) || foreign {
            return Ok(());
        }
    }
    match list.first() {
        Some(entry) => durable::write_atomic(file, entry.process.pid.to_string().as_bytes(), 0o644),
        // On a read-only filesystem removing what is not there fails too.
        None if fs::symlink_metadata(file).is_err() => Ok(()),
        None => durable::remove_durable(file).map(|_| ()),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::progress::Silent;
    use std::sync::Mutex;
    use std::sync::atomic::AtomicU32;
    use std::thread;

    struct Host {
        _root: tempfile::TempDir,
        dirs: Directories,
    }

    fn host() -> Host {
        let root = tempfile::tempdir().unwrap();
        let dirs = Directories {
            config: vec![root.path().join("etc")],
            state: root.path().join("state"),
            run: root.path().join("run"),
            share: root.path().join("share"),
        };
        fs::create_dir(&dirs.state).unwrap();
        fs::create_dir(&dirs.run).unwrap();
        Host { _root: root, dirs }
    }

    fn name(text: &str) -> VmName {
        VmName::new(text).unwrap()
    }

    #[derive(Default)]
    struct Warnings(Mutex<Vec<String>>);
    impl Progress for Warnings {
        fn phase(&self, _: &str) {}
        fn bytes(&self, _: u64, _: Option<u64>) {}
        fn note(&self, _: &str) {}
        fn warn(&self, text: &str) {
            self.0.lock().unwrap().push(text.to_owned());
        }
    }

    /// A PID that no process has any more.
    fn dead_pid() -> u32 {
        let mut child = std::process::Command::new("true").spawn().unwrap();
        child.wait().unwrap();
        child.id()
    }

    #[test]
    fn the_second_caller_is_told_who_holds_the_lock() {
        let host = host();
        let held = VmLock::try_acquire(&host.dirs, &name("web1"), "blockhost-vm-create").unwrap().unwrap();
        assert!(VmLock::try_acquire(&host.dirs, &name("web1"), "x").unwrap().is_none());
        let error =
            VmLock::acquire(&host.dirs, &name("web1"), Duration::from_millis(60), &Cancel::default(), "x").unwrap_err();
        assert_eq!(error.kind, ErrorKind::Busy);
        let text = error.to_string();
        assert!(text.contains(&format!("blockhost-vm-create (PID {})", std::process::id())), "{text}");
        assert!(VmLock::try_acquire(&host.dirs, &name("web2"), "x").unwrap().is_some(), "another VM is free");
        drop(held);
        assert!(VmLock::try_acquire(&host.dirs, &name("web1"), "x").unwrap().is_some());
        assert_eq!(fs::read_dir(host.dirs.locks()).unwrap().count(), 0, "no lock file stays behind");
    }

    #[test]
    fn who_is_at_work_can_be_seen_without_a_trace() {
        let host = host();
        assert_eq!(VmLock::held(&host.dirs).unwrap(), []);
        assert!(!host.dirs.locks().exists());
        let held = VmLock::try_acquire(&host.dirs, &name("web1"), "blockhost-vm-stop").unwrap();
        // Left by a killed process: nobody's.
        fs::write(host.dirs.locks().join("web2.lock"), "{}").unwrap();
        let seen = VmLock::held(&host.dirs).unwrap();
        let [(vm, Some(holder))] = &seen[..] else { panic!("{seen:?}") };
        assert_eq!((vm.as_str(), holder.command.as_str()), ("web1", "blockhost-vm-stop"));
        drop(held);
        assert_eq!(VmLock::held(&host.dirs).unwrap(), []);

        assert_eq!(ProvisioningLock::look(&host.dirs), None);
        let creating = ProvisioningLock::enter(&host.dirs, &Silent);
        assert_eq!(ProvisioningLock::look(&host.dirs), Some(true));
        drop(creating);
        assert_eq!(ProvisioningLock::look(&host.dirs), None);
        fs::write(file(&host.dirs), dead_pid().to_string()).unwrap();
        assert_eq!(ProvisioningLock::look(&host.dirs), Some(false));
        assert!(file(&host.dirs).exists());
    }

    #[test]
    fn a_stop_ends_the_wait() {
        let host = host();
        let _held = VmLock::try_acquire(&host.dirs, &name("a"), "x").unwrap();
        let cancel = Cancel::default();
        let waiter = cancel.clone();
        let dirs = host.dirs.clone();
        let thread = thread::spawn(move || {
            VmLock::acquire(&dirs, &name("a"), Duration::from_secs(600), &waiter, "x").map(|_| ())
        });
        cancel.cancel();
        assert_eq!(thread.join().unwrap().unwrap_err().kind, ErrorKind::Interrupted);
    }

    #[test]
    fn a_file_left_by_a_killed_process_does_not_lock() {
        let host = host();
        fs::create_dir(host.dirs.locks()).unwrap();
        fs::write(host.dirs.locks().join("a.lock"), r#"{"pid":1,"command":"init","since":"2026-01-01T00:00:00Z"}"#)
            .unwrap();
        let _lock = VmLock::try_acquire(&host.dirs, &name("a"), "mine").unwrap().unwrap();
        assert_eq!(VmLock::holder(&host.dirs, &name("a")).unwrap().command, "mine");
    }

    #[test]
    fn holders_never_overlap_though_each_removes_the_file() {
        let host = host();
        let inside = AtomicU32::new(0);
        let done = AtomicU32::new(0);
        thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    for _ in 0..40 {
                        loop {
                            let Some(lock) = VmLock::try_acquire(&host.dirs, &name("a"), "x").unwrap() else {
                                thread::yield_now();
                                continue;
                            };
                            assert_eq!(inside.fetch_add(1, Ordering::SeqCst), 0);
                            // Long enough for others to open the file that is about to go.
                            thread::sleep(Duration::from_micros(300));
                            inside.fetch_sub(1, Ordering::SeqCst);
                            drop(lock);
                            break;
                        }
                        done.fetch_add(1, Ordering::SeqCst);
                    }
                });
            }
        });
        assert_eq!(done.load(Ordering::SeqCst), 320);
    }

    #[test]
    fn the_last_create_out_removes_the_file() {
        let host = host();
        let path = file(&host.dirs);
        let first = ProvisioningLock::enter(&host.dirs, &Silent);
        let second = ProvisioningLock::enter(&host.dirs, &Silent);
        assert_eq!(fs::read_to_string(&path).unwrap(), std::process::id().to_string());
        drop(first);
        assert!(path.exists());
        assert!(!ProvisioningLock::sweep(&host.dirs).unwrap());
        assert!(path.exists(), "a sweep leaves the file of a live create");
        drop(second);
        assert!(!path.exists());
        assert!(!registry(&host.dirs).exists());
    }

    #[test]
    fn a_dead_creates_file_is_taken_over_and_swept() {
        let host = host();
        let path = file(&host.dirs);
        for content in [dead_pid().to_string(), String::new(), "rubbish".into(), "1".into()] {
            fs::write(&path, &content).unwrap();
            let lock = ProvisioningLock::enter(&host.dirs, &Silent);
            assert_eq!(fs::read_to_string(&path).unwrap(), std::process::id().to_string());
            drop(lock);
            assert!(!path.exists());
            fs::write(&path, &content).unwrap();
            assert!(ProvisioningLock::sweep(&host.dirs).unwrap(), "{content:?}");
            assert!(!path.exists());
        }
        assert!(!ProvisioningLock::sweep(&host.dirs).unwrap());
    }

    #[test]
    fn a_reused_pid_in_the_registry_does_not_count() {
        let host = host();
        let me = ProcessId::current().unwrap();
        let reused = InFlight { process: ProcessId { start_time: me.start_time + 1, ..me }, serial: 7 };
        fs::create_dir(host.dirs.locks()).unwrap();
        fs::write(registry(&host.dirs), serde_json::to_vec(&[reused]).unwrap()).unwrap();
        fs::write(file(&host.dirs), std::process::id().to_string()).unwrap();
        assert!(ProvisioningLock::sweep(&host.dirs).unwrap());
        assert!(!registry(&host.dirs).exists());
    }

    #[test]
    fn a_create_of_another_implementation_keeps_its_file() {
        let host = host();
        let mut other = std::process::Command::new("sh")
            .args(["-c", "read line", CREATE_COMMAND])
            .stdin(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        // The name is there once the shell has been executed.
        while !owner::runs_program(other.id(), CREATE_COMMAND) {
            thread::sleep(Duration::from_millis(5));
        }
        fs::write(file(&host.dirs), other.id().to_string()).unwrap();
        drop(ProvisioningLock::enter(&host.dirs, &Silent));
        assert_eq!(fs::read_to_string(file(&host.dirs)).unwrap(), other.id().to_string());
        drop(other.stdin.take());
        other.wait().unwrap();
        assert!(ProvisioningLock::sweep(&host.dirs).unwrap());
    }

    #[test]
    fn without_a_run_directory_a_create_goes_on_with_a_warning() {
        let host = host();
        fs::remove_dir(&host.dirs.run).unwrap();
        let warnings = Warnings::default();
        drop(ProvisioningLock::enter(&host.dirs, &warnings));
        let texts = warnings.0.lock().unwrap();
        assert_eq!(texts.len(), 1);
        assert!(texts[0].contains("provisioning.lock"), "{texts:?}");
    }

    #[test]
    fn where_the_file_cannot_be_written_there_is_nothing_to_sweep() {
        let host = host();
        fs::remove_dir(&host.dirs.run).unwrap();
        let _create = ProvisioningLock::enter(&host.dirs, &Silent);
        assert!(!ProvisioningLock::sweep(&host.dirs).unwrap());
    }
}
