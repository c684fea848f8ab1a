//! The template directory: immutable images, what points to the current one, locks, staging, removal of old ones.
//!
//! - `blockhost-base-<UTC>-<hash>.qcow2` is a template, with a manifest `.json` beside it. It is never written again.
//! - `current.qcow2`, a symlink, names the newest and is what this software goes by.
//! - `blockhost-base.qcow2` is the name other programs know. It follows, unless it is the image of an earlier
//!   provisioner or a symlink that some overlay names: then it stays what it is for as long as an overlay needs it.
//! - `.build.lock` is held by a build from its beginning to its end, so a staging directory found under it is dead.
//! - `.lock` is shared by creates from choosing the current template until the overlay that names it exists.

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::ErrorKind as IoKind;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use super::qcow2;
use crate::cancel::Cancel;
use crate::child::CommandExt;
use crate::paths::Directories;
use crate::progress::Progress;
use crate::{Error, ErrorKind, Result};

const PREFIX: &str = "blockhost-base-";
const SUFFIX: &str = ".qcow2";
const POINTER: &str = "current.qcow2";
const KNOWN_NAME: &str = "blockhost-base.qcow2";
const STAGING: &str = ".staging-";
const BUILD_LOCK: &str = ".build.lock";
const PIN_LOCK: &str = ".lock";
/// How long removal waits for creates to finish their overlays; each takes a fraction of a second.
const PINS_LIMIT: Duration = Duration::from_secs(20);

/// The image new VMs are made from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Template {
    /// Absolute path without symlinks: what an overlay must name as its backing file.
    pub path: PathBuf,
    /// Size of the disk in bytes; an overlay cannot be smaller.
    pub virtual_size: u64,
}

/// The current template, and the promise that it is not removed while this value lives.
#[derive(Debug)]
pub struct Pinned {
    /// The template.
    pub template: Template,
    _lock: Option<File>,
}

/// The current template.
///
/// # Errors
/// [`ErrorKind::NotFound`] if none was built yet; [`ErrorKind::Invalid`] if the file is not a qcow2 image that stands
/// alone; [`ErrorKind::Io`] if it cannot be read.
pub fn current(directories: &Directories) -> Result<Template> {
    let templates = directories.templates();
    for name in [POINTER, KNOWN_NAME] {
        let pointer = templates.join(name);
        match fs::canonicalize(&pointer) {
            Ok(path) => {
                let virtual_size = qcow2::standalone_size(&path)
                    .map_err(|error| error.hint("build a new one: blockhost-build-template --force"))?;
                return Ok(Template { path, virtual_size });
            }
            Err(error) if error.kind() == IoKind::NotFound => {}
            Err(error) => return Err(Error::io("find", &pointer, error)),
        }
    }
    let message = format!("there is no template {}", templates.join(KNOWN_NAME).display());
    Err(Error::new(ErrorKind::NotFound, message).hint("build it, as root: blockhost-build-template"))
}

/// The current template, kept from removal until the result is dropped: hold it until the overlay exists. Waits for
/// nobody longer than a build needs to switch. Works for a user who may only read.
///
/// # Errors
/// As [`current`].
pub fn pin(directories: &Directories) -> Result<Pinned> {
    let path = directories.templates().join(PIN_LOCK);
    let lock = match File::open(&path) {
        Ok(file) => {
            file.lock_shared().map_err(|error| Error::io("lock", &path, error))?;
            Some(file)
        }
        // Every build makes the lock before its template: without it there is nothing that could be removed.
        Err(error) if error.kind() == IoKind::NotFound => None,
        Err(error) => return Err(Error::io("open", &path, error)),
    };
    Ok(Pinned { template: current(directories)?, _lock: lock })
}

/// The template directory while one build has it for itself.
#[derive(Debug)]
pub(super) struct Store {
    path: PathBuf,
    pins: File,
    _build: File,
}

impl Store {
    /// Makes the directory if need be, waits until no other build runs, and removes what a killed one left.
    ///
    /// # Errors
    /// [`ErrorKind::Io`], [`ErrorKind::Interrupted`].
    pub fn open(path: &Path, progress: &dyn Progress, cancel: &Cancel) -> Result<Self> {
        if !path.exists() {
            // Whatever the umask is: creates look here as another user.
            fs::create_dir_all(path)
                .and_then(|()| fs::set_permissions(path, fs::Permissions::from_mode(0o755)))
                .map_err(|error| Error::io("create", path, error))?;
        }
        let path = &fs::canonicalize(path).map_err(|error| Error::io("find", path, error))?;
        let build = lock_file(&path.join(BUILD_LOCK), 0o600)?;
        let mut told = false;
        while let Err(error) = build.try_lock() {
            if let TryLockError::Error(error) = error {
                return Err(Error::io("lock", &path.join(BUILD_LOCK), error));
            }
            if !told {
                progress.phase("waiting for another build of the template");
                told = true;
            }
            cancel.sleep(Duration::from_millis(200))?;
        }
        let pins = lock_file(&path.join(PIN_LOCK), 0o644)?;
        let store = Self { path: path.clone(), pins, _build: build };
        for name in store.names()?.iter().filter(|name| name.starts_with(STAGING)) {
            progress.note(&format!("removing {name}, left by a build that was killed"));
            remove_tree(&store.path.join(name))?;
        }
        Ok(store)
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A new directory of this build, on the same filesystem; it goes when the result is dropped.
    ///
    /// # Errors
    /// [`ErrorKind::Io`].
    pub fn stage(&self) -> Result<Staging> {
        let random = super::disk::random_uuid()?;
        let path = self.path.join(format!("{STAGING}{}-{}", std::process::id(), &random[..8]));
        // 0700: what is set up inside may hold set-uid programs that are not for this host's users.
        fs::DirBuilder::new().mode(0o700).create(&path).map_err(|error| Error::io("create", &path, error))?;
        Ok(Staging { path })
    }

    /// Gives a finished image and its manifest their names, durably, and points `current.qcow2` to it.
    ///
    /// # Errors
    /// [`ErrorKind::Io`]; the previous template is then still the current one.
    pub fn publish(&self, image: &Path, manifest: &Path, stem: &str) -> Result<PathBuf> {
        let target = self.path.join(format!("{stem}{SUFFIX}"));
        for (file, name) in [(manifest, target.with_extension("json")), (image, target.clone())] {
            fs::set_permissions(file, fs::Permissions::from_mode(0o444))
                .and_then(|()| File::open(file)?.sync_all())
                .map_err(|error| Error::io("sync", file, error))?;
            fs::rename(file, &name).map_err(|error| Error::io("create", &name, error))?;
        }
        self.sync()?;
        self.point(POINTER, &target)?;
        Ok(target)
    }

    /// Removes templates nobody needs and lets `blockhost-base.qcow2` follow, where that is safe. `in_use` answers
    /// with the backing files of all overlays; without its answer everything stays. Returns what was removed.
    ///
    /// # Errors
    /// [`ErrorKind::Io`], [`ErrorKind::Interrupted`].
    pub fn settle(
        &self,
        newest: &Path,
        in_use: &dyn Fn() -> Result<BTreeSet<PathBuf>>,
        progress: &dyn Progress,
        cancel: &Cancel,
    ) -> Result<Vec<PathBuf>> {
        let known = self.path.join(KNOWN_NAME);
        let known_kind = fs::symlink_metadata(&known).map(|meta| meta.file_type()).ok();
        if known_kind.is_none() {
            self.point(KNOWN_NAME, newest)?;
        }
        // Creates that chose a template before the switch have finished once this lock was ours; those that come
        // later choose the new one. So what is in use is known from here on, and no create has to wait meanwhile.
        let used = self.wait_for_pins(cancel).and_then(|()| in_use());
        let used = match used {
            Ok(used) => used,
            Err(error) if error.kind == ErrorKind::Interrupted => return Err(error),
            Err(error) => {
                progress.warn(&format!("old templates stay, it is not known which are in use: {}", error.message));
                return Ok(Vec::new());
            }
        };
        let canonical: BTreeSet<PathBuf> = used.iter().filter_map(|path| fs::canonicalize(path).ok()).collect();
        // An overlay may name the file by another way to this directory: compare where the directory itself is.
        let names_known = used.iter().any(|path| {
            path.file_name() == known.file_name()
                && path.parent().and_then(|dir| fs::canonicalize(dir).ok()).is_none_or(|dir| dir == self.path)
        });
        let is_current = fs::canonicalize(&known).is_ok_and(|path| path == newest);
        if !is_current && known_kind.is_some() {
            let legacy_in_use = known_kind.is_some_and(|kind| !kind.is_symlink()) && canonical.contains(&known);
            if names_known || legacy_in_use {
                progress.note(&format!("{} stays as it is: a VM is an overlay of that very name", known.display()));
            } else {
                self.point(KNOWN_NAME, newest)?;
            }
        }
        let mut keep = canonical;
        keep.extend([POINTER, KNOWN_NAME].iter().filter_map(|name| fs::canonicalize(self.path.join(name)).ok()));
        keep.insert(newest.to_owned());
        let mut removed = Vec::new();
        for name in self.names()? {
            let path = self.path.join(&name);
            if let Some(stem) = stem_of(&name, SUFFIX)
                && !keep.contains(&path)
                && path.is_file()
            {
                fs::remove_file(&path).map_err(|error| Error::io("remove", &path, error))?;
                progress.note(&format!("removed {stem}{SUFFIX}, which no VM uses"));
                removed.push(path);
            }
        }
        for name in self.names()? {
            let path = self.path.join(&name);
            if stem_of(&name, ".json").is_some() && !path.with_extension("qcow2").exists() {
                fs::remove_file(&path).map_err(|error| Error::io("remove", &path, error))?;
            }
        }
        self.sync()?;
        Ok(removed)
    }

    fn wait_for_pins(&self, cancel: &Cancel) -> Result<()> {
        let end = Instant::now() + PINS_LIMIT;
        loop {
            match self.pins.try_lock() {
                Ok(()) => break,
                Err(TryLockError::WouldBlock) if Instant::now() < end => cancel.sleep(Duration::from_millis(20))?,
                Err(TryLockError::WouldBlock) => {
                    return Err(Error::new(ErrorKind::Busy, "a create does not finish its overlay"));
                }
                Err(TryLockError::Error(error)) => return Err(Error::io("lock", &self.path.join(PIN_LOCK), error)),
            }
        }
        self.pins.unlock().map_err(|error| Error::io("unlock", &self.path.join(PIN_LOCK), error))
    }

    /// Replaces `name` by a symlink to `target`, at once and durably.
    fn point(&self, name: &str, target: &Path) -> Result<()> {
        let pointer = self.path.join(name);
        let staged = self.path.join(format!("{STAGING}{name}"));
        let file = target.file_name().unwrap_or_default();
        let _ = fs::remove_file(&staged);
        // Relative: the directory can be moved, or seen at another place, as a whole.
        symlink(file, &staged)
            .and_then(|()| fs::rename(&staged, &pointer))
            .map_err(|error| Error::io("switch", &pointer, error))?;
        self.sync()
    }

    fn sync(&self) -> Result<()> {
        File::open(&self.path).and_then(|dir| dir.sync_all()).map_err(|error| Error::io("sync", &self.path, error))
    }

    fn names(&self) -> Result<Vec<String>> {
        let list = || -> std::io::Result<Vec<String>> {
            let mut names = Vec::new();
            for entry in fs::read_dir(&self.path)? {
                names.extend(entry?.file_name().into_string());
            }
            names.sort();
            Ok(names)
        };
        list().map_err(|error| Error::io("list", &self.path, error))
    }
}

/// A name for a new template: when it was made, and a hash of what it was made from.
pub(super) fn new_stem(hash: &str) -> String {
    format!("{PREFIX}{}-{hash}", jiff::Timestamp::now().strftime("%Y%m%dT%H%M%SZ"))
}

/// The stem of a file name this module gave: nothing else is ever removed.
fn stem_of<'a>(name: &'a str, suffix: &str) -> Option<&'a str> {
    let stem = name.strip_suffix(suffix)?;
    let (time, hash) = stem.strip_prefix(PREFIX)?.split_once('-')?;
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    let (date, clock) = time.strip_suffix('Z')?.split_once('T')?;
    let ours = date.len() == 8 && clock.len() == 6 && digits(date) && digits(clock);
    (ours && hash.len() == 8 && hash.bytes().all(|b| b.is_ascii_hexdigit())).then_some(stem)
}

fn lock_file(path: &Path, mode: u32) -> Result<File> {
    let file = OpenOptions::new()
        .read(true)
        .append(true)
        .create(true)
        .mode(mode)
        .custom_flags(nix::libc::O_NOFOLLOW)
        .open(path)
        .map_err(|error| Error::io("open", path, error))?;
    // Whatever the umask is: creates run as another user.
    file.set_permissions(fs::Permissions::from_mode(mode))
        .map_err(|error| Error::io("set the mode of", path, error))?;
    Ok(file)
}

/// A directory of one build.
#[derive(Debug)]
pub(super) struct Staging {
    pub path: PathBuf,
}

impl Drop for Staging {
    fn drop(&mut self) {
        if let Err(error) = remove_tree(&self.path) {
            // The next build finds it and tries again.
            tracing::warn!(error = %error.message, "staging directory stays");
        }
    }
}

/// Removes a directory with everything in it, but never through a mount: `/dev` of the host may be bound inside.
///
/// # Errors
/// [`ErrorKind::Conflict`] if something is mounted there and cannot be unmounted, [`ErrorKind::Io`].
fn remove_tree(path: &Path) -> Result<()> {
    let own = Path::new("/proc/self/mountinfo");
    let table = fs::read_to_string(own).map_err(|error| Error::io("read", own, error))?;
    let mut inside = mounts_below(&table, path);
    inside.sort();
    for mount in inside.iter().rev() {
        Command::new("umount").arg(mount).run(&format!("cannot unmount {}", mount.display()), &Cancel::default())?;
    }
    // A process that was just killed may still add a file.
    let mut attempts = 0;
    loop {
        let result = if path.is_symlink() || path.is_file() { fs::remove_file(path) } else { fs::remove_dir_all(path) };
        match result {
            Ok(()) => return Ok(()),
            Err(error) if error.kind() == IoKind::NotFound && !path.is_symlink() && !path.exists() => return Ok(()),
            Err(_) if attempts < 20 => attempts += 1,
            Err(error) => return Err(Error::io("remove", path, error)),
        }
        thread::sleep(Duration::from_millis(100));
    }
}

/// The mount points of a `mountinfo` table at or below `path`.
fn mounts_below(table: &str, path: &Path) -> Vec<PathBuf> {
    let point = |line: &str| {
        let raw = line.split(' ').nth(4)?;
        Some(PathBuf::from(raw.replace("\\040", " ").replace("\\011", "\t").replace("\\134", "\\")))
    };
    table.lines().filter_map(point).filter(|mount| mount.starts_with(path)).collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::super::qcow2::tests::image;
    use super::*;
    use crate::progress::Silent;

    fn directories() -> (tempfile::TempDir, Directories) {
        let dir = tempfile::tempdir().unwrap();
        let directories = Directories { state: dir.path().to_owned(), ..Directories::default() };
        (dir, directories)
    }

    fn store(directories: &Directories) -> Store {
        Store::open(&directories.templates(), &Silent, &Cancel::default()).unwrap()
    }

    fn publish(store: &Store, stem: &str) -> PathBuf {
        let staging = store.stage().unwrap();
        let (disk, manifest) = (staging.path.join("a"), staging.path.join("b"));
        fs::write(&disk, image(3 << 30, None, 0)).unwrap();
        fs::write(&manifest, b"{}").unwrap();
        store.publish(&disk, &manifest, stem).unwrap()
    }

    fn settle(store: &Store, newest: &Path, used: &[PathBuf]) -> Vec<PathBuf> {
        let used: BTreeSet<PathBuf> = used.iter().cloned().collect();
        store.settle(newest, &|| Ok(used.clone()), &Silent, &Cancel::default()).unwrap()
    }

    const ONE: &str = "blockhost-base-20260101T000000Z-00000001";
    const TWO: &str = "blockhost-base-20260102T000000Z-00000002";
    const THREE: &str = "blockhost-base-20260103T000000Z-00000003";

    #[test]
    fn without_a_template_the_error_says_how_to_make_one() {
        let (_dir, directories) = directories();
        let error = pin(&directories).unwrap_err();
        assert_eq!(error.kind, ErrorKind::NotFound);
        assert!(error.hint.unwrap().contains("blockhost-build-template"));
    }

    #[test]
    fn the_newest_is_current_and_old_ones_go_when_no_overlay_names_them() {
        let (_dir, directories) = directories();
        let store = store(&directories);
        let one = publish(&store, ONE);
        settle(&store, &one, &[]);
        assert_eq!(current(&directories).unwrap(), Template { path: one.clone(), virtual_size: 3 << 30 });
        assert_eq!(fs::metadata(&one).unwrap().permissions().mode() & 0o7777, 0o444);
        let known = store.path().join(KNOWN_NAME);
        assert_eq!(fs::canonicalize(&known).unwrap(), one);

        let two = publish(&store, TWO);
        assert_eq!(settle(&store, &two, std::slice::from_ref(&one)), Vec::<PathBuf>::new());
        assert!(one.exists() && one.with_extension("json").exists());
        assert_eq!(fs::canonicalize(&known).unwrap(), two);

        let three = publish(&store, THREE);
        fs::write(store.path().join("somebody-elses.qcow2"), b"x").unwrap();
        fs::write(store.path().join("blockhost-base-mine.qcow2"), b"x").unwrap();
        assert_eq!(settle(&store, &three, std::slice::from_ref(&two)), std::slice::from_ref(&one));
        assert!(!one.with_extension("json").exists());
        assert_eq!(current(&directories).unwrap().path, three);
        assert!(store.path().join("somebody-elses.qcow2").exists());
        assert!(store.path().join("blockhost-base-mine.qcow2").exists());
    }

    #[test]
    fn nothing_is_removed_when_nobody_knows_what_is_in_use() {
        let (_dir, directories) = directories();
        let store = store(&directories);
        let one = publish(&store, ONE);
        settle(&store, &one, &[]);
        let two = publish(&store, TWO);
        let unknown = || Err(Error::new(ErrorKind::Unavailable, "libvirt is down"));
        assert!(store.settle(&two, &unknown, &Silent, &Cancel::default()).unwrap().is_empty());
        assert!(one.exists());
        // New VMs use the new one all the same; the name others know moves once it is safe.
        assert_eq!(current(&directories).unwrap().path, two);
        assert_eq!(fs::canonicalize(store.path().join(KNOWN_NAME)).unwrap(), one);
        settle(&store, &two, &[]);
        assert_eq!(fs::canonicalize(store.path().join(KNOWN_NAME)).unwrap(), two);
        assert!(!one.exists());
    }

    #[test]
    fn the_image_of_an_earlier_provisioner_stays_as_long_as_an_overlay_names_it() {
        let (_dir, directories) = directories();
        let store = store(&directories);
        let legacy = store.path().join(KNOWN_NAME);
        let bytes = image(2 << 30, None, 0);
        fs::write(&legacy, &bytes).unwrap();
        assert_eq!(current(&directories).unwrap().path, legacy);

        let one = publish(&store, ONE);
        let unknown = || Err(Error::new(ErrorKind::Unavailable, "libvirt is down"));
        store.settle(&one, &unknown, &Silent, &Cancel::default()).unwrap();
        assert_eq!(fs::read(&legacy).unwrap(), bytes);
        settle(&store, &one, std::slice::from_ref(&legacy));
        assert!(!legacy.is_symlink());
        assert_eq!(fs::read(&legacy).unwrap(), bytes);
        assert_eq!(current(&directories).unwrap().path, one);
        // The last VM of the earlier provisioner is gone: the name follows again.
        settle(&store, &one, &[]);
        assert_eq!(fs::canonicalize(&legacy).unwrap(), one);
    }

    #[test]
    fn a_symlink_that_an_overlay_names_is_not_moved_away_from_under_it() {
        let (dir, directories) = directories();
        let store = store(&directories);
        let one = publish(&store, ONE);
        settle(&store, &one, &[]);
        let two = publish(&store, TWO);
        let by_another_way = dir.path().join("link");
        symlink(directories.templates(), &by_another_way).unwrap();
        settle(&store, &two, &[by_another_way.join(KNOWN_NAME)]);
        assert_eq!(fs::canonicalize(store.path().join(KNOWN_NAME)).unwrap(), one);
        assert!(one.exists());
        assert_eq!(current(&directories).unwrap().path, two);
    }

    #[test]
    fn removal_waits_for_a_create_that_has_chosen_its_template() {
        let (_dir, directories) = directories();
        let store = store(&directories);
        let one = publish(&store, ONE);
        settle(&store, &one, &[]);
        let pinned = pin(&directories).unwrap();
        let two = publish(&store, TWO);
        let overlays = std::sync::Mutex::new(BTreeSet::new());
        thread::scope(|scope| {
            scope.spawn(|| {
                thread::sleep(Duration::from_millis(150));
                assert!(pinned.template.path.exists());
                overlays.lock().unwrap().insert(pinned.template.path.clone());
                drop(pinned);
            });
            store.settle(&two, &|| Ok(overlays.lock().unwrap().clone()), &Silent, &Cancel::default()).unwrap();
        });
        assert!(one.exists());
        // Creates go on while removal runs.
        assert_eq!(pin(&directories).unwrap().template.path, two);
    }

    #[test]
    fn dead_staging_directories_go_and_a_second_build_waits() {
        let (_dir, directories) = directories();
        let first = store(&directories);
        let staging = first.stage().unwrap();
        fs::write(staging.path.join("half"), b"x").unwrap();
        std::mem::forget(staging);
        let cancel = Cancel::default();
        thread::scope(|scope| {
            let waiting =
                scope.spawn(|| Store::open(&directories.templates(), &Silent, &cancel).map(|store| store.names()));
            thread::sleep(Duration::from_millis(300));
            assert!(!waiting.is_finished());
            drop(first);
            let names = waiting.join().unwrap().unwrap().unwrap();
            assert_eq!(names, [BUILD_LOCK, PIN_LOCK]);
        });
    }

    #[test]
    fn names_and_mounts_are_recognised_exactly() {
        assert_eq!(stem_of(&format!("{ONE}.qcow2"), SUFFIX), Some(ONE));
        assert!(stem_of(&format!("{}.qcow2", new_stem("0123abcd")), SUFFIX).is_some());
        for other in [KNOWN_NAME, "blockhost-base-x.qcow2", "blockhost-base-20260101T000000Z-1.qcow2", POINTER] {
            assert_eq!(stem_of(other, SUFFIX), None);
        }
        let table = "1 2 0:3 / /a/b rw - t t rw\n1 2 0:3 / /a/bc rw - t t rw\n1 2 0:3 / /a/b/x\\040y rw - t t rw\n";
        assert_eq!(mounts_below(table, Path::new("/a/b")), [PathBuf::from("/a/b"), PathBuf::from("/a/b/x y")]);
    }
}
