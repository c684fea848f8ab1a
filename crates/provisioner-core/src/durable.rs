//! The one place that writes files so that they survive a crash, and that opens files to lock.
//!
//! A file is written under a name of its own in the same directory, synced, renamed over the old one, and the
//! directory is synced. What root writes belongs to whom the old file, unless that was root's, or else the directory
//! belongs to: the service user must still be able to read it. Symbolic links are never followed, because that user can make them.

use std::fs::{self, DirBuilder, File, Metadata, OpenOptions, Permissions};
use std::io::{self, ErrorKind as Io, Write};
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt, fchown};
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use nix::fcntl::OFlag;
use tempfile::NamedTempFile;

use crate::{Error, ErrorKind, Result, owner};

/// The end of every temporary name, so that what a killed process left can be told from a file.
const TEMPORARY: &str = ".tmp";

/// The directory a file is in; that of a bare name is the current one.
fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(dir) if !dir.as_os_str().is_empty() => dir,
        _ => Path::new("."),
    }
}

fn sync_dir(dir: &Path) -> Result<()> {
    File::open(dir).and_then(|dir| dir.sync_all()).map_err(|e| Error::io("sync", dir, e))
}

/// Gives what we made to `model`'s owner. Only root can; for anybody else the group is tried, and matters less.
fn hand_over(file: &File, model: &Metadata) -> io::Result<()> {
    if nix::unistd::geteuid().is_root() {
        return fchown(file, Some(model.uid()), Some(model.gid()));
    }
    if file.metadata()?.gid() != model.gid() {
        let _ = fchown(file, None, Some(model.gid()));
    }
    Ok(())
}

/// A file that is written but not yet in its place. Dropped, it is gone.
#[derive(Debug)]
pub struct Staged {
    file: NamedTempFile,
    path: PathBuf,
}

/// Writes `bytes` next to `path`, ready to replace it. An existing file's mode and owner are kept; a new one gets
/// `mode` and the directory's owner.
///
/// # Errors
/// [`ErrorKind::Io`] naming `path`; nothing is left behind.
pub fn stage(path: &Path, bytes: &[u8], mode: u32) -> Result<Staged> {
    let failed = |e| {
        let error = Error::io("write", path, e);
        match fs::symlink_metadata(parent(path)) {
            Err(_) => error.hint(format!("create the directory {} first", parent(path).display())),
            Ok(_) => error,
        }
    };
    let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let pid = std::process::id();
    let prefix = format!(".{name}.{pid}-{}-", owner::own_start_time());
    let mut file =
        tempfile::Builder::new().prefix(&prefix).suffix(TEMPORARY).tempfile_in(parent(path)).map_err(failed)?;
    let dir = fs::metadata(parent(path)).map_err(failed)?;
    let (model, mode) = match fs::symlink_metadata(path).ok().filter(Metadata::is_file) {
        Some(old) => {
            let mode = old.permissions().mode() & 0o7777;
            // Somebody has once written it as root in the service user's directory; that user needs it back.
            (if old.uid() == 0 { dir } else { old }, mode)
        }
        None => (dir, mode),
    };
    file.write_all(bytes).map_err(failed)?;
    hand_over(file.as_file(), &model).map_err(failed)?;
    // After the change of owner, which clears bits, and whatever the umask is.
    file.as_file().set_permissions(Permissions::from_mode(mode)).map_err(failed)?;
    file.as_file().sync_all().map_err(failed)?;
    Ok(Staged { file, path: path.to_owned() })
}

impl Staged {
    /// Puts the file in its place, in one step for whoever looks.
    ///
    /// # Errors
    /// [`ErrorKind::Io`] naming the file; the old one is still there.
    pub fn commit(self) -> Result<()> {
        let Self { file, path } = self;
        file.persist(&path).map_err(|e| Error::io("replace", &path, e.error))?;
        sync_dir(parent(&path))
    }
}

/// Writes the whole of a file so that after a crash it is the old one or the new one. `mode` is for a new file.
///
/// # Errors
/// [`ErrorKind::Io`] naming `path`; the old file is still there.
pub fn write_atomic(path: &Path, bytes: &[u8], mode: u32) -> Result<()> {
    stage(path, bytes, mode)?.commit()
}

/// Makes a directory, and those above it, with `mode` and the owner of the one it is made in. Existing ones stay as
/// they are.
///
/// # Errors
/// [`ErrorKind::Io`] naming the directory that could not be made.
pub fn create_dir_owned(path: &Path, mode: u32) -> Result<()> {
    if path.is_dir() {
        return Ok(());
    }
    let above = parent(path);
    if above != path {
        create_dir_owned(above, mode)?;
    }
    let failed = |e| Error::io("create directory", path, e);
    match DirBuilder::new().mode(mode).create(path) {
        Ok(()) => {}
        Err(e) if e.kind() == Io::AlreadyExists && path.is_dir() => return Ok(()),
        Err(e) => return Err(failed(e)),
    }
    // Through a descriptor that is no link's: root works in directories that belong to the service user, who could put
    // a link there in between.
    let made = open_dir(path).map_err(failed)?;
    if nix::unistd::geteuid().is_root() {
        let model = fs::metadata(above).map_err(failed)?;
        fchown(&made, Some(model.uid()), Some(model.gid())).map_err(failed)?;
    }
    made.set_permissions(Permissions::from_mode(mode)).map_err(failed)?;
    sync_dir(above)
}

fn open_dir(path: &Path) -> io::Result<File> {
    let flags = OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW;
    OpenOptions::new().read(true).custom_flags(flags.bits()).open(path)
}

/// Removes the entry `name` of `dir`, a file or a directory with all in it; that there is none is a success. Neither
/// `dir` itself nor `name` is followed when it is a link.
///
/// # Errors
/// [`ErrorKind::Io`] naming what cannot be removed.
pub fn remove_entry(dir: &Path, name: &str) -> Result<()> {
    let failed = |e| Error::io("remove", &dir.join(name), e);
    let held = match open_dir(dir) {
        Ok(held) => held,
        Err(e) if e.kind() == Io::NotFound => return Ok(()),
        Err(e) => return Err(failed(e)),
    };
    // The directory that was opened, whatever its name stands for by now.
    let path = Path::new("/proc/self/fd").join(held.as_raw_fd().to_string()).join(name);
    let removed = match fs::symlink_metadata(&path) {
        Ok(entry) if entry.is_dir() => fs::remove_dir_all(&path),
        Ok(_) => fs::remove_file(&path),
        Err(e) => Err(e),
    };
    match removed {
        Err(e) if e.kind() != Io::NotFound => Err(failed(e)),
        _ => Ok(()),
    }
}

/// Removes a file for good. Says whether there was one.
///
/// # Errors
/// [`ErrorKind::Io`] naming `path`.
pub fn remove_durable(path: &Path) -> Result<bool> {
    match fs::remove_file(path) {
        Ok(()) => sync_dir(parent(path)).map(|()| true),
        Err(e) if e.kind() == Io::NotFound => Ok(false),
        Err(e) => Err(Error::io("remove", path, e)),
    }
}

/// What is in `dir`; a missing one is empty.
///
/// # Errors
/// [`ErrorKind::Io`] when it is there and cannot be read.
pub fn entries(dir: &Path) -> Result<Vec<fs::DirEntry>> {
    match fs::read_dir(dir) {
        Ok(entries) => entries.collect::<io::Result<_>>().map_err(|e| Error::io("read directory", dir, e)),
        Err(e) if e.kind() == Io::NotFound => Ok(Vec::new()),
        Err(e) => Err(Error::io("read directory", dir, e)),
    }
}

/// Removes the temporary files that killed processes left in `dir`, and returns how many. Those of a running process
/// stay.
///
/// # Errors
/// [`ErrorKind::Io`] when `dir` cannot be read; a missing one is empty.
pub fn sweep_temporaries(dir: &Path) -> Result<usize> {
    let entries = entries(dir)?;
    let mut removed = 0;
    for entry in entries {
        let name = entry.file_name();
        let Some((pid, start)) = name.to_str().and_then(writer_of_temporary) else { continue };
        if !owner::runs(pid, start) && fs::remove_file(entry.path()).is_ok() {
            removed += 1;
        }
    }
    Ok(removed)
}

/// The PID and start time in a temporary name `.<file>.<pid>-<start>-<random>.tmp`.
fn writer_of_temporary(name: &str) -> Option<(u32, u64)> {
    let stem = name.strip_prefix('.')?.strip_suffix(TEMPORARY)?;
    let (_, tag) = stem.rsplit_once('.')?;
    let mut parts = tag.split('-');
    let writer = (parts.next()?.parse().ok()?, parts.next()?.parse().ok()?);
    (parts.next().is_some_and(|random| random.len() >= 6) && parts.next().is_none()).then_some(writer)
}

/// Opens `path` to lock it, making it with mode 0660 and the directory's owner if need be. Where we may not write it,
/// as when another user made it, it is opened to read: that is enough for `flock`.
///
/// # Errors
/// [`ErrorKind::Io`] naming `path`.
pub fn open_lock_file(path: &Path) -> Result<File> {
    let flags = OFlag::O_NOFOLLOW.bits();
    // Somebody may remove the file between two of these attempts, or make it.
    for _ in 0..100 {
        match OpenOptions::new().read(true).append(true).custom_flags(flags).open(path) {
            Ok(file) => return Ok(file),
            Err(e) if e.kind() == Io::NotFound => {}
            Err(e) if matches!(e.kind(), Io::PermissionDenied | Io::ReadOnlyFilesystem) => {
                match OpenOptions::new().read(true).custom_flags(flags).open(path) {
                    Ok(file) => return Ok(file),
                    Err(e) if e.kind() == Io::NotFound => {}
                    Err(_) => return Err(Error::io("open lock file", path, e)),
                }
            }
            Err(e) => return Err(Error::io("open lock file", path, e)),
        }
        match OpenOptions::new().read(true).append(true).create_new(true).mode(0o660).custom_flags(flags).open(path) {
            Ok(file) => {
                let owned = fs::metadata(parent(path))
                    .and_then(|dir| hand_over(&file, &dir))
                    .and_then(|()| file.set_permissions(Permissions::from_mode(0o660)));
                return owned.map(|()| file).map_err(|e| Error::io("create lock file", path, e));
            }
            Err(e) if e.kind() == Io::AlreadyExists => {}
            Err(e) => return Err(Error::io("create lock file", path, e)),
        }
    }
    Err(Error::new(ErrorKind::Busy, format!("lock file {} comes and goes", path.display())))
}

/// Takes the exclusive `flock` on `path`, in the order of asking, and lets go when the file is dropped.
///
/// # Errors
/// [`ErrorKind::Busy`] naming the file after `wait`; [`ErrorKind::Io`] when it cannot be opened or locked.
pub fn lock_file(path: &Path, wait: Duration) -> Result<File> {
    let started = Instant::now();
    let file = open_lock_file(path)?;
    match file.try_lock() {
        Ok(()) => return Ok(file),
        Err(fs::TryLockError::WouldBlock) => {}
        Err(fs::TryLockError::Error(e)) => return Err(Error::io("lock", path, e)),
    }
    // The kernel queues those that wait inside flock; whoever polls instead never gets a turn among many of them. A
    // waiter that is given up on gets its turn too, finds nobody to hand the file to, and closes it.
    let (sender, receiver) = mpsc::sync_channel(0);
    thread::Builder::new()
        .name("lock".into())
        .spawn(move || {
            let locked = file.lock().map(|()| file);
            let _ = sender.send(locked);
        })
        .map_err(|e| Error::io("lock", path, e))?;
    match receiver.recv_timeout(wait) {
        Ok(Ok(file)) => Ok(file),
        Ok(Err(e)) => Err(Error::io("lock", path, e)),
        Err(_) => Err(Error::new(
            ErrorKind::Busy,
            format!(
                "cannot lock {}: another program has held it for {:.0} s",
                path.display(),
                started.elapsed().as_secs_f64()
            ),
        )
        .hint(format!("see who holds it with: fuser -v {}", path.display()))),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    fn names(dir: &Path) -> Vec<String> {
        let mut names: Vec<_> =
            fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn a_new_file_has_the_mode_asked_for_and_an_old_one_keeps_its_own() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        write_atomic(&path, b"one", 0o640).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o7777, 0o640);
        fs::set_permissions(&path, Permissions::from_mode(0o664)).unwrap();
        write_atomic(&path, b"two", 0o600).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o7777, 0o664);
        assert_eq!(fs::read(&path).unwrap(), b"two");
        assert_eq!(names(dir.path()), ["f"]);
    }

    #[test]
    fn a_staged_file_that_is_not_committed_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        fs::write(&path, "old").unwrap();
        drop(stage(&path, b"new", 0o600).unwrap());
        assert_eq!(fs::read(&path).unwrap(), b"old");
        assert_eq!(names(dir.path()), ["f"]);
    }

    #[test]
    fn a_symbolic_link_is_replaced_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        let (precious, path) = (dir.path().join("precious"), dir.path().join("f"));
        fs::write(&precious, "mine").unwrap();
        symlink(&precious, &path).unwrap();
        write_atomic(&path, b"new", 0o600).unwrap();
        assert_eq!(fs::read(&precious).unwrap(), b"mine");
        let lock = dir.path().join("l");
        symlink(&precious, &lock).unwrap();
        assert_eq!(open_lock_file(&lock).unwrap_err().kind, ErrorKind::Io);
    }

    #[test]
    fn a_missing_directory_is_named_in_the_hint() {
        let error = write_atomic(Path::new("/nonexistent-dir/f"), b"", 0o600).unwrap_err();
        assert_eq!(error.to_string(), "cannot write /nonexistent-dir/f");
        assert_eq!(error.hint.unwrap(), "create the directory /nonexistent-dir first");
    }

    #[test]
    fn removing_twice_is_no_failure() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        fs::write(&path, "").unwrap();
        assert!(remove_durable(&path).unwrap());
        assert!(!remove_durable(&path).unwrap());
    }

    #[test]
    fn only_the_temporaries_of_the_dead_are_swept() {
        let dir = tempfile::tempdir().unwrap();
        let alive = stage(&dir.path().join("vms.json"), b"", 0o600).unwrap();
        for name in [".vms.json.999999999-5-abcdef.tmp", "vms.json.tmp", ".vms.json.tmp", ".note.1-x-abcdef.tmp"] {
            fs::write(dir.path().join(name), "").unwrap();
        }
        assert_eq!(sweep_temporaries(dir.path()).unwrap(), 1);
        assert_eq!(names(dir.path()).len(), 4);
        alive.commit().unwrap();
        assert_eq!(sweep_temporaries(&dir.path().join("absent")).unwrap(), 0);
    }

    #[test]
    fn a_lock_that_stays_taken_is_given_up_on_by_name_and_can_be_had_later() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("db.lock");
        let held = lock_file(&path, Duration::ZERO).unwrap();
        let error = lock_file(&path, Duration::from_millis(50)).unwrap_err();
        assert_eq!(error.kind, ErrorKind::Busy);
        assert!(error.to_string().contains("db.lock"), "{error}");
        drop(held);
        lock_file(&path, Duration::from_secs(10)).unwrap();
    }
}
