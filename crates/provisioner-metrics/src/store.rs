//! Where the sample is, and how it is replaced: under a name nobody else uses, then renamed. It is a cache, so nothing is
//! synced.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{
    DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _, chown, fchown,
};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use nix::fcntl::OFlag;
use provisioner_contract::VmName;

use crate::clock;
use crate::sample::{self, Sample, Standing};

/// A sample file that is larger than this is not ours: it would be that of some ten thousand VMs.
const LARGEST: u64 = 8 << 20;

/// The directory of the samples: `/var/lib/blockhost/metrics`.
#[derive(Debug, Clone)]
pub struct Store {
    dir: PathBuf,
}

impl Store {
    /// The store of the state directory `state`.
    #[must_use]
    pub fn new(state: &Path) -> Self {
        Self { dir: state.join("metrics") }
    }

    /// The directory.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Reads a file of the store, if it is a plain file of a reasonable size.
    ///
    /// # Errors
    /// When it is not there or cannot be read.
    pub fn read(&self, name: &str) -> io::Result<Vec<u8>> {
        // A named pipe somebody put there would make the opening wait for ever.
        let flags = OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK;
        let file = OpenOptions::new().read(true).custom_flags(flags.bits()).open(self.dir.join(name))?;
        let mut bytes = Vec::with_capacity(16 * 1024);
        file.take(LARGEST + 1).read_to_end(&mut bytes)?;
        if bytes.len() as u64 > LARGEST { Err(io::ErrorKind::FileTooLarge.into()) } else { Ok(bytes) }
    }

    /// The text of the sample, to be parsed.
    ///
    /// # Errors
    /// When it is not there or cannot be read.
    pub fn read_sample(&self) -> io::Result<Vec<u8>> {
        self.read("samples")
    }

    /// Replaces the sample.
    ///
    /// # Errors
    /// When the directory cannot be written.
    pub fn write_sample(&self, text: &str) -> io::Result<()> {
        self.replace("samples", text.as_bytes())
    }

    /// Replaces a file of the store in one step. What root writes belongs to the owner of the directory: the service
    /// user must be able to read and replace it.
    ///
    /// # Errors
    /// When the directory cannot be written.
    pub fn replace(&self, name: &str, bytes: &[u8]) -> io::Result<()> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        self.ensure_dir()?;
        let unique = format!(
            ".{name}.{}-{}-{:06}.tmp",
            std::process::id(),
            clock::now(),
            NUMBER.fetch_add(1, Ordering::Relaxed)
        );
        let temporary = self.dir.join(unique);
        let written = self.write_new(&temporary, bytes).and_then(|()| fs::rename(&temporary, self.dir.join(name)));
        if written.is_err() {
            let _ = fs::remove_file(&temporary);
        }
        written
    }

    fn write_new(&self, path: &Path, bytes: &[u8]) -> io::Result<()> {
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o640).open(path)?;
        file.write_all(bytes)?;
        if nix::unistd::geteuid().is_root() {
            let owner = fs::metadata(&self.dir)?;
            fchown(&file, Some(owner.uid()), Some(owner.gid()))?;
        }
        Ok(())
    }

    fn ensure_dir(&self) -> io::Result<()> {
        match fs::DirBuilder::new().mode(0o750).create(&self.dir) {
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            Err(e) => Err(e),
            Ok(()) => {
                fs::set_permissions(&self.dir, Permissions::from_mode(0o750))?;
                if nix::unistd::geteuid().is_root()
                    && let Some(state) = self.dir.parent()
                {
                    let owner = fs::metadata(state)?;
                    chown(&self.dir, Some(owner.uid()), Some(owner.gid()))?;
                }
                Ok(())
            }
        }
    }

    /// The open lock, not yet taken, of those that want to do `what`.
    ///
    /// # Errors
    /// When the directory cannot be written and the lock is not there yet.
    pub fn open_lock(&self, what: &str) -> io::Result<File> {
        self.ensure_dir()?;
        let path = self.dir.join(format!("{what}.lock"));
        let flags = OFlag::O_NOFOLLOW.bits();
        match OpenOptions::new().append(true).create(true).mode(0o660).custom_flags(flags).open(&path) {
            Ok(file) => {
                // The first one to open it may be root.
                if nix::unistd::geteuid().is_root()
                    && let Ok(owner) = fs::metadata(&self.dir)
                {
                    let _ = fchown(&file, Some(owner.uid()), Some(owner.gid()));
                }
                Ok(file)
            }
            // Reading is enough to lock.
            Err(_) => OpenOptions::new().read(true).custom_flags(flags).open(&path),
        }
    }

    /// Says that something about a VM has changed that the sample does not know: the next question is answered from a new
    /// one. With `gone` the VM is taken out of it as well. The counters of the others stay, as their history.
    ///
    /// # Errors
    /// When there is a sample and it can be neither replaced nor removed.
    pub fn invalidate(&self, name: &VmName, gone: bool) -> io::Result<()> {
        let text = match self.read_sample() {
            Ok(text) => text,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(_) => return fs::remove_file(self.dir.join("samples")),
        };
        let boot_id = clock::boot_id()?;
        let Some(sample) = Sample::parse(&text, &boot_id, clock::now()) else {
            return fs::remove_file(self.dir.join("samples"));
        };
        let vms: Vec<_> = sample.vms().filter(|vm| !gone || vm.name != *name).collect();
        self.write_sample(&sample::write(&boot_id, sample.begun, sample.taken, Standing::Stale, &vms))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::sample::VmSample;
    use provisioner_contract::MetricsState;

    #[test]
    fn a_vm_that_is_gone_leaves_the_sample_and_the_others_stay_as_history() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::new(dir.path());
        let name = |name| VmName::new(name).unwrap();
        store.invalidate(&name("web1"), true).unwrap();
        let vms = ["web1", "web2"].map(|vm| VmSample::new(name(vm), MetricsState::Running));
        let (boot_id, now) = (clock::boot_id().unwrap(), clock::now());
        store.write_sample(&sample::write(&boot_id, now, now, Standing::Complete, &vms)).unwrap();
        store.invalidate(&name("web1"), true).unwrap();
        let text = store.read_sample().unwrap();
        let left = Sample::parse(&text, &boot_id, clock::now()).unwrap();
        assert!(left.standing == Standing::Stale && left.taken == now);
        assert_eq!(left.vms().map(|vm| vm.name).collect::<Vec<_>>(), [name("web2")]);
        // Nothing temporary is left.
        assert_eq!(fs::read_dir(store.dir()).unwrap().count(), 1);
        store.write_sample("something else").unwrap();
        store.invalidate(&name("web1"), true).unwrap();
        assert!(store.read_sample().is_err());
    }

    #[test]
    fn a_pipe_or_a_link_in_the_place_of_the_sample_is_not_read() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::new(dir.path());
        store.ensure_dir().unwrap();
        std::os::unix::fs::symlink("/etc/passwd", store.dir().join("samples")).unwrap();
        assert!(store.read_sample().is_err());
        fs::remove_file(store.dir().join("samples")).unwrap();
        nix::unistd::mkfifo(&store.dir().join("samples"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        assert!(store.read_sample().map_or(true, |bytes| bytes.is_empty()));
    }
}
