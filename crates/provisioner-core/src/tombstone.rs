//! Tombstones: the journals of VMs that are gone, kept for as long as a part of them may still come back.
//!
//! What a client has asked libvirt for cannot be taken back. A call whose client was killed, or stopped waiting, may be carried
//! out much later: when a hung storage or a frozen libvirtd goes on. By then the VM may have been removed, and a late
//! definition or a late volume would stand there with nobody who knows of it, or would be taken for a VM whose record was lost.
//! A domain's UUID is new for each creation, so a UUID that has a tombstone is not taken for a VM's again.
//!
//! But a VM may be restored from a backup, under its UUID. That looks different. A late call is one of a create that was undone,
//! and makes one thing: a domain whose disk was deleted, or a volume without a domain. A VM that was handed over has a disk, and
//! whoever brings it back brings that first, or a record. So of a destroyed VM only a domain without its disk is removed.

use std::fs;
use std::path::PathBuf;

use provisioner_contract::{Timestamp, VmName};
use uuid::Uuid;

use crate::journal::{self, Journal, Operation, PoolVolume};
use crate::paths::Directories;
use crate::{Error, ErrorKind, Result, durable};

/// How long a tombstone is kept. A late call comes from the memory of a libvirtd that has not been restarted since.
const DAYS: u32 = 60;

/// Says durably that the VM behind `journal` is gone. A journal without a domain is no VM's and needs none.
///
/// # Errors
/// [`ErrorKind::Io`] naming the file.
pub fn set(dirs: &Directories, journal: &Journal) -> Result<()> {
    let Some(uuid) = uuid_of(journal) else { return Ok(()) };
    durable::create_dir_owned(&dirs.tombstones(), 0o770)?;
    let path = dirs.tombstones().join(format!("{}.{uuid}.json", journal.vm_name));
    // Without what may be large and is of no use any more.
    let stone = Journal { replaced_record: None, ..journal.clone() };
    let mut bytes = serde_json::to_vec(&stone)
        .map_err(|e| Error::new(ErrorKind::Invalid, format!("cannot write {}", path.display())).because(e))?;
    bytes.push(b'\n');
    durable::write_atomic(&path, &bytes, 0o660)
}

/// Something of a VM that is gone has come back.
#[derive(Debug)]
pub struct Returned {
    /// The VM.
    pub stone: Journal,
    /// Whether its domain is there again.
    pub domain: bool,
    /// Those of its volumes that are there again.
    pub volumes: Vec<PoolVolume>,
    /// Whether it looks as if somebody has restored it from a backup: then nothing of it is to be removed.
    pub restored: bool,
}

impl Returned {
    /// In words what has come back.
    #[must_use]
    pub fn what(&self) -> String {
        let domain = self.domain.then(|| format!("domain {}", self.stone.vm_name));
        let volumes = self.volumes.iter().map(|volume| format!("volume {}", volume.name));
        domain.into_iter().chain(volumes).collect::<Vec<_>>().join(", ")
    }
}

/// Whether something of the VM has come back. `domain` is the UUID of the domain that has its name now, `live` whether a record says
/// that there is such a VM, `exists` whether there is a volume.
///
/// # Errors
/// Those of `exists`.
pub fn returned(
    stone: Journal,
    domain: Option<&str>,
    live: bool,
    mut exists: impl FnMut(&PoolVolume) -> Result<bool>,
) -> Result<Option<Returned>> {
    let uuid = uuid_of(&stone);
    let own = domain.is_some() && domain.map(str::to_ascii_lowercase) == uuid;
    // Name and volumes are those of another VM by now, or of this one again.
    if live || domain.is_some() && !own {
        return Ok(None);
    }
    let mut volumes = Vec::new();
    for volume in &stone.volumes {
        if exists(volume)? {
            volumes.push(volume.clone());
        }
    }
    // Only a VM that was handed over is in anybody's backup.
    let handed_over = stone.operation != Operation::Create;
    let restored = handed_over && !volumes.is_empty();
    Ok((own || !volumes.is_empty() && !handed_over).then_some(Returned { stone, domain: own, volumes, restored }))
}

/// The domain's UUID in the form libvirt gives it in.
#[must_use]
pub fn uuid_of(journal: &Journal) -> Option<String> {
    Uuid::parse_str(journal.domain_uuid.as_deref()?).ok().map(|uuid| uuid.to_string())
}

/// The tombstones of VMs called `name`.
///
/// # Errors
/// [`ErrorKind::Io`] when the directory is there and cannot be read.
pub fn of(dirs: &Directories, name: &VmName) -> Result<Vec<Journal>> {
    read(dirs, |of| of == name.as_str())
}

/// All of them. One that cannot be read is left out: it costs that a late part of one VM is not recognised.
///
/// # Errors
/// [`ErrorKind::Io`] when the directory is there and cannot be read.
pub fn all(dirs: &Directories) -> Result<Vec<Journal>> {
    read(dirs, |_| true)
}

fn files(dirs: &Directories) -> Result<Vec<(String, PathBuf)>> {
    let mut found = Vec::new();
    for entry in durable::entries(&dirs.tombstones())? {
        let file = entry.file_name();
        // A name may contain dots, a UUID does not.
        let parts = file.to_str().and_then(|file| file.strip_suffix(".json")).and_then(|stem| stem.rsplit_once('.'));
        if let Some((name, uuid)) = parts
            && Uuid::parse_str(uuid).is_ok()
        {
            found.push((name.to_owned(), entry.path()));
        }
    }
    found.sort();
    Ok(found)
}

fn read(dirs: &Directories, wanted: impl Fn(&str) -> bool) -> Result<Vec<Journal>> {
    let mut found = Vec::new();
    for (name, path) in files(dirs)?.into_iter().filter(|(name, _)| wanted(name)) {
        match fs::read_to_string(&path).ok().and_then(|text| journal::parse(&text).ok()) {
            Some(stone) if stone.vm_name.as_str() == name => found.push(stone),
            _ => tracing::debug!("cannot read the tombstone {}", path.display()),
        }
    }
    Ok(found)
}

/// Removes those that are older than a late call can be, and those that cannot be read.
///
/// # Errors
/// [`ErrorKind::Io`] when one is there and cannot be removed.
pub fn prune(dirs: &Directories, now: Timestamp) -> Result<()> {
    for (_, path) in files(dirs)? {
        let stone = fs::read_to_string(&path).ok().and_then(|text| journal::parse(&text).ok());
        if stone.is_none_or(|stone| stone.started_at.plus_days(DAYS) < now) {
            durable::remove_durable(&path)?;
        }
    }
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn journal(name: &str, uuid: &str) -> Journal {
        let name = VmName::new(name).unwrap();
        let mut journal = Journal::begin(Operation::Destroy, &name, "blockhost-vm-destroy", uuid, "br0").unwrap();
        journal.domain_uuid = Some(uuid.to_owned());
        journal
    }

    #[test]
    fn what_came_late_is_told_from_what_was_restored_and_from_another_vm() {
        let uuid = "0b1f8d0e-6f0e-4c38-9a53-000000000001";
        let volume = PoolVolume { pool: "blockhost".into(), name: "web.qcow2".into() };
        let look = |operation, domain: Option<&str>, live, there| {
            let stone = Journal { operation, volumes: vec![volume.clone()], ..journal("web", uuid) };
            let found = returned(stone, domain, live, |_| Ok(there)).unwrap();
            found.map(|found| (found.what(), found.restored))
        };
        let (create, destroy) = (Operation::Create, Operation::Destroy);
        let (domain, both) = ("domain web".to_owned(), "domain web, volume web.qcow2".to_owned());
        let upper = uuid.to_uppercase();
        for operation in [create, destroy] {
            assert_eq!(look(operation, Some(&upper), false, false), Some((domain.clone(), false)));
            // Of a VM that there is, or of another one with its name.
            assert_eq!(look(operation, Some(uuid), true, true), None);
            assert_eq!(look(operation, Some("0b1f8d0e-6f0e-4c38-9a53-000000000002"), false, true), None);
            assert_eq!(look(operation, None, false, false), None);
        }
        assert_eq!(look(create, None, false, true), Some(("volume web.qcow2".to_owned(), false)));
        assert_eq!(look(create, Some(uuid), false, true), Some((both.clone(), false)));
        assert_eq!(look(destroy, None, false, true), None);
        assert_eq!(look(destroy, Some(uuid), false, true), Some((both, true)));
    }

    #[test]
    fn a_tombstone_is_found_by_the_name_and_goes_when_it_is_old() {
        let root = tempfile::tempdir().unwrap();
        let dirs = Directories { state: root.path().to_owned(), ..Directories::default() };
        let (first, second) = ("0b1f8d0e-6f0e-4c38-9a53-000000000001", "0B1F8D0E-6F0E-4C38-9A53-000000000002");
        let now = Timestamp::now();
        assert!(all(&dirs).unwrap().is_empty());
        for (name, uuid) in [("web", first), ("web", second), ("web.2", first)] {
            set(&dirs, &journal(name, uuid)).unwrap();
            // Again: a destroy that is finished twice.
            set(&dirs, &journal(name, uuid)).unwrap();
        }
        set(&dirs, &Journal { domain_uuid: None, ..journal("nobody", first) }).unwrap();
        fs::write(dirs.tombstones().join(format!("bad.{first}.json")), "{").unwrap();
        fs::write(dirs.tombstones().join("README"), "").unwrap();
        let uuids = |name: &str| -> Vec<_> {
            of(&dirs, &VmName::new(name).unwrap()).unwrap().iter().filter_map(uuid_of).collect()
        };
        assert_eq!(uuids("web"), [first.to_owned(), second.to_lowercase()]);
        assert_eq!(uuids("web.2"), [first]);
        assert!(uuids("nobody").is_empty() && uuids("bad").is_empty());
        prune(&dirs, now.plus_days(DAYS - 1)).unwrap();
        assert_eq!(all(&dirs).unwrap().len(), 3);
        prune(&dirs, now.plus_days(DAYS + 1)).unwrap();
        assert!(all(&dirs).unwrap().is_empty());
        assert!(dirs.tombstones().join("README").exists());
    }
}
