//! Taking away what a VM consists of. Shared by destroy and by the undoing of a create, so every act is "ensure
//! absent" and can be repeated.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::thread;
use std::time::Duration;

use provisioner_contract::VmName;
use provisioner_metrics::store::Store;

use crate::database::Document;
use crate::host::Host;
use crate::journal::{Journal, PoolVolume};
use crate::libvirt::volume::VolumeNames;
use crate::libvirt::{Connection, InUse};
use crate::{Error, ErrorKind, Result, bridge, durable, tombstone};

/// Stops and undefines the domain called `name`, which must have this `uuid`.
///
/// # Errors
/// When it cannot be stopped or undefined, or libvirt cannot be asked: then its disk must stay. [`ErrorKind::Conflict`]
/// when the domain of that name is another one: it came later, belongs to somebody else, and may use the same disk.
pub fn domain(connection: &Connection, name: &VmName, uuid: Option<&str>) -> Result<()> {
    // A start that somebody gave up may be carried out between the two, and undefining then leaves a domain that runs without
    // a definition.
    for _ in 0..3 {
        let Some(domain) = connection.domain(name)? else { return Ok(()) };
        let found = domain.uuid()?;
        if !uuid.is_some_and(|uuid| found.eq_ignore_ascii_case(uuid)) {
            return Err(Error::new(
                ErrorKind::Conflict,
                format!("a domain called {name} was defined by somebody else while the VM was being made or removed"),
            )
            .hint(format!("disk and addresses were kept; undefine that domain, then: blockhost-vm-destroy {name}")));
        }
        domain.power_off()?;
        domain.undefine()?;
    }
    match connection.domain(name)? {
        None => Ok(()),
        Some(_) => Err(Error::new(ErrorKind::Hypervisor, format!("domain {name} comes back when it is removed"))
            .hint("somebody else starts or defines it")),
    }
}

/// Removes what of a VM that is gone, as `stone` says, has come back since: calls to libvirt that were given up are carried out
/// late. Returns what that was, in words. The caller holds the VM's lock, and there is no journal of that name.
///
/// # Errors
/// When libvirt cannot be asked or refuses.
pub fn late(host: &Host, connection: &Connection, stone: Journal) -> Result<Option<String>> {
    let live = host.database().read()?.raw_record(&stone.vm_name).is_some_and(Document::stands_for_a_vm);
    let there = connection.domain(&stone.vm_name)?.map(|domain| domain.uuid()).transpose()?;
    // A pool that is gone brings nothing back.
    let exists = |volume: &PoolVolume| match connection.pool(&volume.pool) {
        Ok(pool) => pool.is_taken(&volume.name),
        Err(error) if matches!(error.kind, ErrorKind::NotFound | ErrorKind::Conflict) => Ok(false),
        Err(error) => Err(error),
    };
    let Some(returned) = tombstone::returned(stone, there.as_deref(), live, exists)?.filter(|found| !found.restored)
    else {
        return Ok(None);
    };
    let what = returned.what();
    let stone = Journal { volumes: returned.volumes, ..returned.stone };
    domain(connection, &stone.vm_name, stone.domain_uuid.as_deref())?;
    if !stone.volumes.is_empty() {
        volumes(connection, &stone)?;
    }
    Ok(Some(what))
}

/// Deletes the journal's volumes, and with the console log its rotated parts. Returns what the domains that are left use.
///
/// A volume that another domain's description names is kept, and is an error.
///
/// # Errors
/// When libvirt cannot be asked or refuses.
pub fn volumes(connection: &Connection, journal: &Journal) -> Result<InUse> {
    let name = &journal.vm_name;
    let own = VolumeNames::of(name);
    let in_use = InUse::of(connection)?;
    let mut by_pool: BTreeMap<&str, BTreeSet<String>> = BTreeMap::new();
    for PoolVolume { pool, name } in &journal.volumes {
        by_pool.entry(pool).or_default().insert(name.clone());
    }
    for (pool, mut volumes) in by_pool {
        let pool = connection.pool(pool)?;
        // Console logs are rotated behind libvirt's back, and an earlier provisioner made its disks without it. A pool
        // in which somebody just fills a volume refuses to be looked at; then what is known is deleted all the same.
        for _ in 0..10 {
            if pool.refresh().is_ok() {
                break;
            }
            thread::sleep(Duration::from_millis(50));
        }
        if volumes.contains(&own.console) {
            volumes.extend(pool.volumes()?.into_iter().filter(|volume| own.is_rotated(volume)));
        }
        for volume in volumes {
            if in_use.used_by_other(&pool.path(&volume), name.as_str()) {
                let what = format!("volume {volume:?} of {name} is in use by another domain and was kept");
                return Err(Error::new(ErrorKind::Conflict, what).hint("detach it there, then destroy again"));
            }
            pool.ensure_absent(&volume)?;
        }
    }
    Ok(in_use)
}

/// The end of a removal: from here on the VM is known to be gone, and nothing is left to do.
///
/// # Errors
/// [`ErrorKind::Io`] when a file cannot be written or removed.
pub fn conclude(host: &Host, journal: &Journal) -> Result<()> {
    match tombstone::set(&host.dirs, journal) {
        // A full disk is a reason to destroy a VM. Without the tombstone only what comes late is not recognised.
        Err(error) if error.is_disk_full() => host.progress.warn(&error.in_full()),
        outcome => outcome?,
    }
    Journal::remove(&host.dirs, &journal.vm_name)
}

/// Removes the host's route and neighbour entry of the VM.
///
/// # Errors
/// When one is there and cannot be removed.
pub fn route(host: &Host, journal: &Journal) -> Result<()> {
    let Some(address) = journal.ipv6 else { return Ok(()) };
    host.forget_address(&journal.bridge, address)
}

/// Addresses that are somebody's although no record says so: of creates under way, of defined domains whose record
/// another program's rewrite has lost, and of the host itself. An address among them is neither handed out nor given back.
#[derive(Debug, Default)]
pub struct Claims(BTreeSet<IpAddr>);

impl Claims {
    /// The claims of others than `name`, of which nothing may be defined any more, or yet.
    ///
    /// # Errors
    /// When the journals cannot be read.
    pub fn new(host: &Host, name: &VmName, in_use: &InUse) -> Result<Self> {
        let mut claims = Journal::claims(&host.dirs, name)?;
        claims.extend(&in_use.addresses);
        // A pool that was configured by hand may well have the host in it.
        claims.extend(bridge::own_addresses()?);
        Ok(Self(claims))
    }

    /// Whether somebody claims `address`.
    #[must_use]
    pub fn contain(&self, address: IpAddr) -> bool {
        self.0.contains(&address)
    }
}

/// Removes the files that other programs and earlier provisioners keep per VM: metrics samples and the seed's
/// directory.
///
/// # Errors
/// When one is there and cannot be removed.
pub fn files(host: &Host, name: &VmName) -> Result<()> {
    durable::remove_entry(&host.dirs.metrics(), &format!("{name}.json"))?;
    // The shared sample of all VMs: this one must not be answered from it any more. It is only a cache, and it corrects itself.
    if let Err(error) = Store::new(&host.dirs.state).invalidate(name, true) {
        tracing::debug!("cannot take {name} out of the sample: {error}");
    }
    durable::remove_entry(&host.dirs.legacy_seeds(), name.as_str())
}
