//! The questions that change no VM and take no lock: status, list, detect.

use std::collections::HashMap;
use std::time::Duration;

use provisioner_contract::{ListRow, VmName, VmStatus};

use crate::host::Host;
use crate::libvirt::{Connection, DomainState, bounded};
use crate::lock::ProvisioningLock;
use crate::{Error, ErrorKind, Result};

/// The admin panel gives `list` 15 s. While libvirt ends a frozen QEMU, which takes it 11, it does not say what that one does.
const LIMIT: Duration = Duration::from_secs(13);

fn word(state: DomainState) -> VmStatus {
    if state.is_running() { VmStatus::Active } else { VmStatus::Suspended }
}

/// Engines wait for `provisioning.lock` to go and never remove it. After a create was killed these questions, which panels
/// and monitors ask all the time, are the first commands to come by.
fn sweep(host: &Host) {
    if let Err(error) = ProvisioningLock::sweep(&host.dirs) {
        tracing::debug!("the sign that a create is in flight cannot be looked at: {error}");
    }
}

/// What the VM does, as one of the contract's words.
///
/// # Errors
/// When libvirt cannot be asked, or there is no domain and the database cannot be read: callers print `unknown` then.
pub fn status(host: &Host, name: &VmName) -> Result<VmStatus> {
    sweep(host);
    let (uri, domain) = (host.uri.clone(), name.clone());
    let state = bounded(LIMIT, &format!("cannot ask libvirt about {name}"), move || {
        match Connection::open(&uri)?.domain(&domain)? {
            Some(domain) => domain.state(),
            None => Ok(None),
        }
    })??;
    match state {
        Some(state) => Ok(word(state)),
        None if host.database().read()?.raw_record(name).is_some() => Ok(VmStatus::Destroyed),
        None => Ok(VmStatus::Unknown),
    }
}

/// One row per record, in the database's order, with the states from one question to libvirt for all; and what was
/// wrong on the way. When libvirt cannot be asked every status is `unknown`.
///
/// # Errors
/// When the database cannot be read.
pub fn list(host: &Host) -> Result<(Vec<ListRow>, Vec<Error>)> {
    sweep(host);
    let document = host.database().read()?;
    let mut warnings = Vec::new();
    let states = {
        let uri = host.uri.clone();
        bounded(LIMIT, "cannot ask libvirt about the VMs", move || Connection::open(&uri)?.domain_states())
            .and_then(|answer| answer)
    };
    let states: Option<HashMap<String, DomainState>> = match states {
        Ok(states) => Some(states.into_iter().collect()),
        Err(error) => {
            warnings.push(error);
            None
        }
    };
    let mut rows = Vec::new();
    for (name, record) in document.records() {
        let row = VmName::new(&name).map_err(Error::from).and_then(|name| {
            let record = record?;
            let status = match &states {
                None => VmStatus::Unknown,
                Some(states) => states.get(name.as_str()).map_or(VmStatus::Destroyed, |state| word(*state)),
            };
            Ok(ListRow { name, status, ip: record.ipv4(), created: record.created_at })
        });
        match row {
            Ok(row) => rows.push(row),
            Err(error) => {
                let what = format!("the record of {:?} is left out", name.chars().take(80).collect::<String>());
                warnings.push(Error::new(error.kind, what).because(error));
            }
        }
    }
    Ok((rows, warnings))
}

/// Whether this host can run VMs through libvirt.
///
/// # Errors
/// When it cannot, with the reason.
pub fn detect(uri: &str) -> Result<()> {
    let uri = uri.to_owned();
    let able = bounded(LIMIT, "cannot ask libvirt what it can run", move || {
        let connection = Connection::open(&uri)?;
        Ok::<_, Error>(connection.offers("kvm")? || connection.offers("qemu")?)
    })??;
    if able {
        return Ok(());
    }
    Err(Error::new(ErrorKind::Unavailable, "libvirt cannot run x86-64 VMs here").hint("install qemu-system-x86"))
}
