//! One consistent look at everything that is compared.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::ErrorKind as Io;
use std::net::IpAddr;
use std::path::PathBuf;
use std::thread;
use std::time::Duration;

use provisioner_contract::{Timestamp, VmName};

use crate::database::Document;
use crate::host::Host;
use crate::journal::{Journal, PoolVolume};
use crate::libvirt::survey::{Survey, Surveyed};
use crate::libvirt::{Connection, bounded};
use crate::lock::{Holder, ProvisioningLock, VmLock};
use crate::tombstone::{self, Returned};
use crate::{Error, ErrorKind, Result, host_route, ownership};

/// A host with hundreds of domains is described within a second; a QEMU that hangs may hold one of them up.
const SURVEY_LIMIT: Duration = Duration::from_secs(60);

/// How often the look is taken again because a command changed the database meanwhile.
const TRIES: u32 = 5;

/// The database, as far as it can be told.
pub(super) enum Records {
    Read(Document),
    /// There is no file, and its directory is there.
    Missing,
    Unreadable(Error),
}

impl Records {
    fn read(host: &Host) -> Self {
        let database = host.database();
        match fs::symlink_metadata(database.path()) {
            Err(e) if e.kind() == Io::NotFound => {
                let directory = database.path().parent().filter(|dir| !dir.as_os_str().is_empty());
                match directory {
                    // A file system that is not mounted looks like that.
                    Some(dir) if !dir.is_dir() => {
                        let what = format!("directory {} of the VM database does not exist", dir.display());
                        Self::Unreadable(Error::new(ErrorKind::Io, what))
                    }
                    _ => Self::Missing,
                }
            }
            _ if !database.path().is_file() => {
                let what = format!("VM database {} is no file that can be read", database.path().display());
                Self::Unreadable(Error::new(ErrorKind::Io, what))
            }
            _ => database.read().map_or_else(Self::Unreadable, Self::Read),
        }
    }

    fn text(&self) -> Option<String> {
        match self {
            Self::Read(document) => Some(document.render()),
            Self::Missing | Self::Unreadable(_) => None,
        }
    }
}

/// Volumes of the pool with the backing files their headers name.
pub(super) type Volumes = Vec<(String, Option<PathBuf>)>;

/// Everything, at one time.
pub(super) struct Look {
    pub records: Records,
    pub survey: Survey,
    pub volumes: Result<Volumes>,
    pub pool_path: PathBuf,
    /// Backing files of the pool's volumes that do not exist.
    pub gone: BTreeSet<PathBuf>,
    pub journals: Vec<(VmName, Result<Journal>)>,
    /// What has come back late of VMs that are gone.
    pub returned: Vec<Returned>,
    /// The addresses of journals.
    pub claims: BTreeSet<IpAddr>,
    /// What the host has for addresses on the bridge; `None` when it cannot be asked.
    pub links: Option<host_route::Entries>,
    /// VMs that commands are working on.
    pub busy: BTreeMap<VmName, Option<Holder>>,
    /// Whether `provisioning.lock` is there, and if so whether a create is.
    pub creating: Option<bool>,
    pub notes: Vec<String>,
    pub now: Timestamp,
}

impl Look {
    pub fn document(&self) -> Option<&Document> {
        match &self.records {
            Records::Read(document) => Some(document),
            Records::Missing | Records::Unreadable(_) => None,
        }
    }

    /// Whether something of a VM of that name has come back.
    pub fn has_returned(&self, name: &str) -> bool {
        self.returned.iter().any(|returned| returned.stone.vm_name.as_str() == name)
    }

    pub fn is_busy(&self, name: &str) -> bool {
        self.busy.keys().any(|busy| busy.as_str() == name)
    }

    /// Whether a domain is one of BlockHost's, and of this database: one without a record must have its disk in our pool.
    /// libvirt may have VMs of another installation, with a database and a pool of its own.
    pub fn is_own(&self, host: &Host, domain: &Surveyed) -> bool {
        let Ok(name) = VmName::new(domain.name()) else { return false };
        ownership::is_own(&domain.facts, &name, self.has_record(domain), &host.settings.storage_path)
            && self.is_of_this_host(host, domain)
    }

    fn has_record(&self, domain: &Surveyed) -> bool {
        let name = VmName::new(domain.name()).ok();
        name.zip(self.document()).is_some_and(|(name, document)| document.raw_record(&name).is_some())
    }

    /// Whether a domain belongs to this database and pool, and not to another installation at the same libvirt.
    pub fn is_of_this_host(&self, host: &Host, domain: &Surveyed) -> bool {
        self.has_record(domain) || self.is_here(host, domain)
    }

    fn is_here(&self, host: &Host, domain: &Surveyed) -> bool {
        let disk = format!("{}.qcow2", domain.name());
        let facts = &domain.facts;
        let by_path =
            [&host.settings.storage_path, &self.pool_path].iter().any(|dir| facts.disks.contains(&dir.join(&disk)));
        by_path || facts.volumes.contains(&(host.settings.storage_pool.clone(), disk))
    }

    pub fn vms(&self, host: &Host) -> usize {
        match self.document() {
            Some(document) => document.raw_records().filter(|(_, record)| Document::stands_for_a_vm(record)).count(),
            None => self.survey.domains.iter().filter(|domain| self.is_own(host, domain)).count(),
        }
    }

    /// Why no address can be told to be nobody's now, if so.
    pub fn unknown_holder(&self, host: &Host) -> Option<String> {
        let Some(document) = self.document() else { return Some("the database cannot be read".into()) };
        if let Some((name, _)) = self.journals.iter().find(|(_, journal)| journal.is_err()) {
            return Some(format!("the journal of {name} cannot be read"));
        }
        if self.creating == Some(true) {
            return Some("a create is in flight".into());
        }
        for (name, record) in document.raw_records().filter(|(_, record)| Document::stands_for_a_vm(record)) {
            let told = self.survey.domain(name).is_some_and(|domain| domain.facts.metadata.is_some());
            if !told && Document::addresses_of(record).is_none() {
                return Some(format!("the record of {name} does not show its addresses"));
            }
        }
        let nameless = self.survey.domains.iter().find(|domain| self.is_unmarked(host, domain));
        nameless.map(|domain| format!("domain {} has neither a record nor readable metadata", domain.name()))
    }

    /// Whether a domain looks like one of ours whose record is lost and whose metadata is damaged or was never there.
    pub fn is_unmarked(&self, host: &Host, domain: &Surveyed) -> bool {
        !self.is_own(host, domain) && domain.facts.metadata.is_none() && self.is_here(host, domain)
    }
}

/// Takes it. `holding` is a VM whose lock this process has.
///
/// A command that ends in between has changed the database, and then the look is taken again; one that goes on holds its
/// VM's lock, and that VM is busy.
pub(super) fn take(host: &Host, connection: &Connection, holding: Option<&VmName>) -> Result<Look> {
    let mut tries = 0;
    loop {
        tries += 1;
        let mut busy = BTreeMap::new();
        busy.extend(VmLock::held(&host.dirs)?);
        let before = Records::read(host);
        // A file that cannot be read was looked at for a second: enough for this look.
        let unreadable = matches!(before, Records::Unreadable(_));
        let text = before.text();
        let mut look = once(host, connection, unreadable.then_some(before))?;
        busy.extend(VmLock::held(&host.dirs)?);
        if let Some(name) = holding {
            busy.remove(name);
        }
        look.busy = busy;
        if text == look.records.text() || tries == TRIES {
            return Ok(look);
        }
        thread::sleep(Duration::from_millis(50));
    }
}

fn once(host: &Host, connection: &Connection, records: Option<Records>) -> Result<Look> {
    let mut notes = Vec::new();
    let asked = connection.clone();
    let survey = bounded(SURVEY_LIMIT, "cannot look at the domains", move || asked.survey())??;
    let (volumes, pool_path) = match connection.pool(&host.settings.storage_pool) {
        Ok(pool) => {
            // What others put there; while somebody fills a volume libvirt refuses.
            let _ = pool.refresh();
            (pool.backing_files(), pool.target().to_owned())
        }
        Err(error) => (Err(error), host.settings.storage_path.clone()),
    };
    let volumes = match volumes {
        Err(error) if error.kind == ErrorKind::Unavailable => return Err(error),
        volumes => volumes,
    };
    let named = volumes.iter().flatten().filter_map(|(_, backing)| backing.as_ref());
    let bases = survey.domains.iter().flat_map(|domain| &domain.facts.bases);
    // A file in a directory that is not for our eyes is not known to be gone.
    let gone = named.chain(bases).filter(|path| matches!(path.try_exists(), Ok(false))).cloned().collect();
    let links = host_route::Entries::of(&host.settings.bridge)
        .inspect_err(|error| notes.push(format!("host routes were not looked at: {}", error.in_full())))
        .ok();
    let journals = Journal::list(&host.dirs)?;
    // Last: whatever is registered by now was there when libvirt was asked, or the look is taken again.
    let records = records.unwrap_or_else(|| Records::read(host));
    if matches!(records, Records::Missing) {
        notes.push(format!("there is no VM database {}", host.settings.db_file.display()));
    }
    let claims = Journal::claims_of(&host.dirs, |_| true)?;
    let returned = returned(host, &survey, volumes.as_deref().unwrap_or_default(), &records)?;
    Ok(Look {
        returned,
        survey,
        volumes,
        pool_path,
        gone,
        journals,
        claims,
        links,
        busy: BTreeMap::new(),
        creating: ProvisioningLock::look(&host.dirs),
        notes,
        now: Timestamp::now(),
        records,
    })
}

fn returned(
    host: &Host,
    survey: &Survey,
    volumes: &[(String, Option<PathBuf>)],
    records: &Records,
) -> Result<Vec<Returned>> {
    let here: BTreeSet<&str> = volumes.iter().map(|(name, _)| name.as_str()).collect();
    let mut found = Vec::new();
    for stone in tombstone::all(&host.dirs)? {
        let name = &stone.vm_name;
        let domain = survey.domain(name.as_str()).map(|domain| domain.domain.uuid()).transpose()?;
        // Without the database it cannot be told which VMs are there again.
        let live = match records {
            Records::Read(document) => document.raw_record(name).is_some_and(Document::stands_for_a_vm),
            Records::Missing | Records::Unreadable(_) => true,
        };
        let exists =
            |volume: &PoolVolume| Ok(volume.pool == host.settings.storage_pool && here.contains(&*volume.name));
        found.extend(tombstone::returned(stone, domain.as_deref(), live, exists)?.filter(|found| !found.restored));
    }
    Ok(found)
}
