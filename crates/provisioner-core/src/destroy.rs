//! Destroying a VM: forward only. Once its journal is on disk the destroy is finished by whoever comes next.

use std::time::Duration;

use provisioner_contract::{Record, Timestamp, VmName};

use crate::failpoint;
use crate::host::Host;
use crate::journal::{Journal, Operation, PoolVolume};
use crate::libvirt::volume::{Pool, VolumeNames};
use crate::libvirt::{Connection, domain_xml::Facts};
use crate::lock::VmLock;
use crate::ownership::{self, OwnDomain};
use crate::removal::{self, Claims};
use crate::{Result, recovery};

/// The admin panel kills its caller after 60 s, and powering off may take 35.
const LOCK_WAIT: Duration = Duration::from_secs(20);

/// The points at which a test can stop a destroy, in their order.
pub const FAILPOINTS: &[&str] = &[
    "destroy.begin",
    "destroy.journal",
    "destroy.domain",
    "destroy.volumes",
    "destroy.route",
    "destroy.record",
    "destroy.files",
];

/// What a destroy found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Destroyed {
    /// Something of the VM was there and is gone now.
    Removed,
    /// There was nothing to remove.
    Nothing,
}

/// Removes the VM: domain, volumes, route, caches, addresses; its record is marked `destroyed`. A VM that does not exist
/// is a success.
///
/// # Errors
/// When libvirt cannot be asked (nothing is deleted then), the domain is not BlockHost's or cannot be stopped (its disk
/// and addresses stay then), or something cannot be removed (the next command for the VM goes on).
pub fn destroy(host: &Host, name: &VmName) -> Result<Destroyed> {
    let lock = VmLock::acquire(&host.dirs, name, LOCK_WAIT, &host.cancel, &host.command)?;
    recovery::recover(host, name, &lock)?;
    let destroyed = under_lock(host, name, &lock, None)?;
    Ok(destroyed.unwrap_or(Destroyed::Nothing))
}

/// The same for a caller that holds the VM's lock and has recovered it. `wanted` is asked about the record under the
/// database's lock, with which the journal is written, the point of no return: so whoever changes the record in time
/// calls the destroy off, which is `None`.
pub(crate) fn under_lock(
    host: &Host,
    name: &VmName,
    _lock: &VmLock,
    wanted: Option<&dyn Fn(&Record) -> bool>,
) -> Result<Option<Destroyed>> {
    let connection = host.connect()?;
    let record = host.database().read()?.record(name)?;
    let own = ownership::find(host, &connection, name, record.as_ref())?;
    failpoint::hit("destroy.begin")?;
    if own.is_none() && record.is_none() {
        // Whatever carries the name of a VM that never was is somebody else's.
        removal::files(host, name)?;
        return Ok(Some(Destroyed::Nothing));
    }
    let pool = connection.pool(&host.settings.storage_pool)?;
    let volumes = volumes(host, &connection, &pool, name, own.as_ref().map(|own| &own.facts))?;
    let live = record.filter(Record::is_live);
    if own.is_none() && live.is_none() && volumes.is_empty() {
        removal::files(host, name)?;
        return Ok(Some(Destroyed::Nothing));
    }
    let journal = intent(host, name, own.as_ref(), live.as_ref(), volumes)?;
    host.cancel.check()?;
    let Some(wanted) = wanted else {
        begin(host, &journal)?;
        return conclude(host, &connection, &journal);
    };
    let begun = host.database().update(|document| {
        let wanted = document.record(name)?.is_some_and(|record| wanted(&record));
        if wanted {
            begin(host, &journal)?;
        }
        Ok(wanted)
    })?;
    if begun { conclude(host, &connection, &journal) } else { Ok(None) }
}

fn conclude(host: &Host, connection: &Connection, journal: &Journal) -> Result<Option<Destroyed>> {
    failpoint::hit("destroy.journal")?;
    finish_with(host, connection, journal)?;
    Ok(Some(Destroyed::Removed))
}

/// Writes the journal: from here on the destroy is finished by whoever comes next.
fn begin(host: &Host, journal: &Journal) -> Result<()> {
    let name = &journal.vm_name;
    match journal.store(&host.dirs) {
        // A full disk is a reason to destroy a VM, and no reason to refuse it. Should this die before its end, the record
        // still holds the addresses, and destroying again finds what is left.
        Err(error) if error.is_disk_full() => {
            host.progress.warn(&format!("the destroy of {name} goes on without a journal: {error}, the disk is full"));
        }
        Err(error) => {
            // What fails at its last step may have left it, and then the next command would destroy the VM after all.
            let _ = Journal::remove(&host.dirs, name);
            return Err(error);
        }
        Ok(()) => {}
    }
    Ok(())
}

fn intent(
    host: &Host,
    name: &VmName,
    own: Option<&OwnDomain>,
    record: Option<&Record>,
    volumes: Vec<PoolVolume>,
) -> Result<Journal> {
    let metadata = own.and_then(|own| own.facts.metadata.as_ref());
    let creation_id = metadata.map_or("", |m| &m.creation_id);
    let mut journal = Journal::begin(Operation::Destroy, name, &host.command, creation_id, &host.settings.bridge)?;
    journal.volumes = volumes;
    journal.ipv4 = record.and_then(Record::ipv4).or_else(|| metadata.map(|m| m.ipv4));
    journal.ipv6 = record.and_then(Record::ipv6).or_else(|| metadata.and_then(|m| m.ipv6));
    journal.domain_uuid = own.map(|own| own.domain.uuid()).transpose()?;
    Ok(journal)
}

/// The volumes that are the VM's own and exist: those named after it in our pool, and those its domain names as writable
/// disks in any pool under a name that starts with its own, which snapshots have. Never a backing file of others, never
/// somebody's ISO.
fn volumes(
    host: &Host,
    connection: &Connection,
    pool: &Pool,
    name: &VmName,
    facts: Option<&Facts>,
) -> Result<Vec<PoolVolume>> {
    // Files that an earlier provisioner or a snapshot made are volumes only after another look at the directory. While
    // somebody fills a volume libvirt refuses to take it; deleting looks again.
    let _ = pool.refresh();
    let own = VolumeNames::of(name);
    let listed = pool.volumes()?.into_iter().filter(|volume| own.include(volume));
    let mut found: Vec<_> = listed.map(|volume| PoolVolume { pool: pool.name().to_owned(), name: volume }).collect();
    let in_use = crate::libvirt::InUse::of(connection)?;
    let prefix = format!("{name}.");
    for file in facts.iter().flat_map(|facts| facts.disks.iter().chain(&facts.bases)) {
        let volume = file.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
        if !volume.starts_with(&prefix)
            || in_use.used_by_other(file, name.as_str())
            || belongs_to_another(&volume, name)
        {
            continue;
        }
        let Some(directory) = file.parent() else { continue };
        let home =
            if directory == pool.target() { Some(pool.name().to_owned()) } else { connection.pool_at(directory)? };
        match home {
            Some(home) => {
                let volume = PoolVolume { pool: home, name: volume };
                if !found.contains(&volume) {
                    found.push(volume);
                }
            }
            None => host.progress.warn(&format!("{} is in no storage pool and stays", file.display())),
        }
    }
    Ok(found)
}

/// A name may contain dots: `web.qcow2` is the disk of `web`, `web.2.qcow2` that of a VM called `web.2`.
fn belongs_to_another(volume: &str, name: &VmName) -> bool {
    let other = [".qcow2", ".iso", ".console.log"].iter().find_map(|suffix| volume.strip_suffix(suffix));
    other.is_some_and(|other| other != name.as_str())
}

/// Finishes the destroy behind `journal`, which another process may have begun.
///
/// # Errors
/// At the first thing that cannot be removed; the journal stays.
pub(crate) fn finish(host: &Host, journal: &Journal) -> Result<()> {
    finish_with(host, &host.reconnect()?, journal)
}

fn finish_with(host: &Host, connection: &Connection, journal: &Journal) -> Result<()> {
    let name = &journal.vm_name;
    host.progress.phase(&format!("removing domain {name}"));
    removal::domain(connection, name, journal.domain_uuid.as_deref())?;
    failpoint::hit("destroy.domain")?;
    host.progress.phase(&format!("deleting the volumes of {name}"));
    let in_use = removal::volumes(connection, journal)?;
    failpoint::hit("destroy.volumes")?;
    removal::route(host, journal)?;
    failpoint::hit("destroy.route")?;
    host.database().update(|document| {
        let claims = Claims::new(host, name, &in_use)?;
        let claimed = |address| claims.contain(address);
        match document.record(name)? {
            // Done already, addresses and all, by the process whose journal this is: they may have a new owner by now.
            Some(record) if record.destroyed_at.is_some_and(|at| !record.is_live() && at >= journal.started_at) => {
                Ok(())
            }
            Some(record) if record.is_live() => {
                document.mark_destroyed(name, Timestamp::now(), &claimed)?;
                document.release_addresses(name, journal.ipv4, journal.ipv6, &claimed)
            }
            _ => document.release_addresses(name, journal.ipv4, journal.ipv6, &claimed),
        }
    })?;
    failpoint::hit("destroy.record")?;
    // After the record: these belong to other programs, and what cannot be removed must not keep an address taken.
    if let Err(error) = removal::files(host, name) {
        host.progress.warn(&format!("something of {name} stays: {}", error.in_full()));
    }
    failpoint::hit("destroy.files")?;
    removal::conclude(host, journal)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_named_after_another_vm_is_not_ours() {
        let web = VmName::new("web").unwrap();
        assert!(belongs_to_another("web.2.qcow2", &web));
        assert!(belongs_to_another("web.2.iso", &web));
        assert!(!belongs_to_another("web.qcow2", &web));
        assert!(!belongs_to_another("web.snapshot1", &web));
    }
}
