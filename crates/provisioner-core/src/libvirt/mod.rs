//! libvirt: the one place that connects, and what the suite asks of domains, volumes, filters and the
//! guest agent. Everything else in the crate speaks in the types of this module.

pub mod agent;
mod deadline;
pub mod domain;
pub mod domain_xml;
mod ffi;
pub mod filter;
pub mod inventory;
pub mod kvm;
pub mod metadata;
pub mod stats;
pub mod survey;
pub mod tuning;
pub mod volume;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Once;
use std::thread;
use std::time::Duration;

use virt::connect::Connect;
use virt::error::{ErrorDomain, ErrorNumber};

use crate::{Error, ErrorKind, Result, failpoint};
pub use deadline::{bounded, interruptible};
pub use domain::{Domain, DomainState};

/// A daemon that does not accept a connection within this time is treated as unreachable: a healthy one takes
/// milliseconds, and callers such as the admin panel give up after 15 s.
const CONNECT_LIMIT: Duration = Duration::from_secs(8);

/// A daemon that answers none of this many questions, asked at this interval, counts as gone. It answers them beside its
/// work, so a slow start of a domain is not mistaken for that.
const KEEP_ALIVE_SECONDS: i32 = 5;
const KEEP_ALIVE_COUNT: u32 = 3;

/// A change that libvirt carries out: the start of a large guest is the slowest, or a volume on a busy disk. Whoever gives one
/// up must expect that it is carried out later.
const CHANGE_LIMIT: Duration = Duration::from_secs(90);

fn change_limit() -> Duration {
    failpoint::limit("libvirt.change", CHANGE_LIMIT)
}

/// libvirt sends and awaits keep-alive messages only in a process with an event loop.
fn start_event_loop() {
    static STARTED: Once = Once::new();
    STARTED.call_once(|| {
        let registered = virt::event::event_register_default_impl();
        let started = registered.is_ok()
            && thread::Builder::new()
                .name("libvirt-events".into())
                .spawn(|| while virt::event::event_run_default_impl().is_ok() {})
                .is_ok();
        if !started {
            tracing::warn!("a libvirtd that hangs will not be noticed: libvirt's event loop does not start");
        }
    });
}

/// One connection to a hypervisor.
#[derive(Clone)]
pub struct Connection {
    conn: Connect,
    uri: String,
}

impl std::fmt::Debug for Connection {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Connection").field("uri", &self.uri).finish_non_exhaustive()
    }
}

impl Connection {
    /// Connects to `uri`, such as `qemu:///system`.
    ///
    /// # Errors
    /// [`ErrorKind::Unavailable`], also when the daemon does not answer in time.
    pub fn open(uri: &str) -> Result<Self> {
        // The library prints every error to stderr unless told not to; ours are printed once, by the caller.
        virt::error::clear_error_callback();
        let target = uri.to_owned();
        let what = format!("cannot connect to libvirt at {uri}");
        let conn = bounded(CONNECT_LIMIT, &what, move || Connect::open(Some(&target)))?.map_err(|e| {
            let denied = matches!(known(&e), ErrorNumber::AuthFailed | ErrorNumber::AuthUnavailable)
                || e.message().contains("Permission denied");
            Error::new(ErrorKind::Unavailable, what).because(Cause::from(&e)).hint(if denied {
                "the user must be in the group libvirt"
            } else {
                "is libvirtd running? try: systemctl status libvirtd, or virsh -c qemu:///system version"
            })
        })?;
        Ok(Self { conn, uri: uri.to_owned() })
    }

    /// The same, for a command that does more than ask one question: should the daemon hang later on, whatever it is asked,
    /// that is noticed and the connection closed.
    ///
    /// # Errors
    /// Those of [`Connection::open`].
    pub fn open_watched(uri: &str) -> Result<Self> {
        start_event_loop();
        let connection = Self::open(uri)?;
        // Drivers without a remote end refuse, and need it not.
        let _ = connection.conn.set_keep_alive(KEEP_ALIVE_SECONDS, KEEP_ALIVE_COUNT);
        Ok(connection)
    }

    /// The URI this connection was opened with.
    #[must_use]
    pub fn uri(&self) -> &str {
        &self.uri
    }

    pub(crate) fn raw(&self) -> &Connect {
        &self.conn
    }

    /// The number of vCPUs the hypervisor allows a domain of `domain_type` (`kvm` or `qemu`) to have.
    ///
    /// # Errors
    /// When libvirt cannot be asked.
    pub fn max_vcpus(&self, domain_type: &str) -> Result<u32> {
        self.conn.max_vcpus(Some(domain_type)).map_err(|e| failure("cannot ask for the vCPU limit", &e))
    }

    /// The host's memory in MiB.
    ///
    /// # Errors
    /// When libvirt cannot be asked.
    pub fn host_memory_mib(&self) -> Result<u64> {
        let info = self.conn.node_info().map_err(|e| failure("cannot ask for the host's memory", &e))?;
        Ok(info.memory / 1024)
    }

    /// Whether this libvirt offers x86-64 guests of `domain_type` (`kvm` or `qemu`).
    ///
    /// `Ok(false)` is libvirt's answer; that kvm is offered does not prove that it works (see [`kvm`]).
    ///
    /// # Errors
    /// When libvirt cannot be asked.
    pub fn offers(&self, domain_type: &str) -> Result<bool> {
        match self.conn.domain_capabilities(None, Some("x86_64"), Some("q35"), Some(domain_type), 0) {
            Ok(_) => Ok(true),
            Err(e) if is_unavailable(&e) => Err(failure("cannot ask for the hypervisor's capabilities", &e)),
            Err(_) => Ok(false),
        }
    }
}

/// libvirt's own words, kept as the cause of one of our errors.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct Cause {
    message: String,
    /// libvirt's error number, such as 42 for "no such domain".
    pub code: u32,
}

impl From<&virt::error::Error> for Cause {
    fn from(e: &virt::error::Error) -> Self {
        Self { message: e.message().trim().to_owned(), code: e.code().to_raw() }
    }
}

fn known(e: &virt::error::Error) -> ErrorNumber {
    e.code().unwrap_or(ErrorNumber::InternalError)
}

/// Whether the failure says that libvirt could not be asked, and so nothing about the thing asked for.
fn is_unavailable(e: &virt::error::Error) -> bool {
    let transport = e.domain().is_known_and(|d| matches!(d, ErrorDomain::Rpc | ErrorDomain::Remote));
    transport
        || matches!(
            known(e),
            ErrorNumber::NoConnect | ErrorNumber::InvalidConn | ErrorNumber::AuthFailed | ErrorNumber::AuthUnavailable
        )
}

/// Turns libvirt's failure of `what` into ours.
pub(crate) fn failure(what: impl Into<String>, e: &virt::error::Error) -> Error {
    let kind = if is_unavailable(e) {
        ErrorKind::Unavailable
    } else {
        match known(e) {
            ErrorNumber::NoDomain
            | ErrorNumber::NoStorageVolume
            | ErrorNumber::NoStoragePool
            | ErrorNumber::NoNwfilter => ErrorKind::NotFound,
            ErrorNumber::OperationTimeout => ErrorKind::TimedOut,
            _ => ErrorKind::Hypervisor,
        }
    };
    let error = Error::new(kind, what).because(Cause::from(e));
    match kind {
        ErrorKind::Unavailable => error.hint("libvirt could not be asked; run the command again when libvirtd is up"),
        _ => error,
    }
}

/// The directories of pools asked so far, `None` for one that cannot be asked.
type Pools = HashMap<String, Option<PathBuf>>;

/// What the other defined domains use, as far as a new VM must keep away from it.
#[derive(Debug, Default, Clone)]
pub struct InUse {
    /// Addresses from our metadata, and from filter parameters of any domain.
    pub addresses: BTreeSet<IpAddr>,
    /// MAC addresses of all interfaces, lower case.
    pub macs: BTreeSet<String>,
    /// Every file a disk or its backing chain names, with the domains that name it.
    pub files: BTreeMap<PathBuf, BTreeSet<String>>,
    /// Volumes named by a pool that cannot be asked where it is, with the domains that name them.
    unresolved: BTreeMap<String, BTreeSet<String>>,
}

impl InUse {
    /// Asks for every defined domain's description.
    ///
    /// A domain that vanishes between the listing and the asking is skipped.
    ///
    /// # Errors
    /// When libvirt cannot be asked.
    pub fn of(connection: &Connection) -> Result<Self> {
        let mut all = Self::default();
        let mut pools = HashMap::new();
        for domain in connection.domains()? {
            let Some(name) = domain.name_if_there()? else { continue };
            for xml in domain.descriptions()? {
                all.add(connection, &mut pools, &name, &domain_xml::Facts::parse(&xml)?);
            }
        }
        Ok(all)
    }

    /// Adds what one description of the domain `name` says. `pools` remembers where pools are.
    fn add(&mut self, connection: &Connection, pools: &mut Pools, name: &str, facts: &domain_xml::Facts) {
        self.addresses.extend(facts.addresses());
        self.macs.extend(facts.macs.iter().cloned());
        for file in &facts.files {
            self.files.entry(file.clone()).or_default().insert(name.to_owned());
        }
        for (pool, volume) in &facts.volumes {
            let target = pools
                .entry(pool.clone())
                .or_insert_with_key(|pool| connection.pool(pool).ok().map(|pool| pool.target().to_owned()));
            match target {
                Some(target) => self.files.entry(target.join(volume)).or_default().insert(name.to_owned()),
                None => self.unresolved.entry(volume.clone()).or_default().insert(name.to_owned()),
            };
        }
    }

    /// Whether a domain other than `domain` names `file`, or may name it.
    #[must_use]
    pub fn used_by_other(&self, file: &Path, domain: &str) -> bool {
        let volume = file.file_name().map(|name| name.to_string_lossy());
        let users = [self.files.get(file), volume.and_then(|volume| self.unresolved.get(&*volume))];
        users.into_iter().flatten().flatten().any(|user| user != domain)
    }
}
