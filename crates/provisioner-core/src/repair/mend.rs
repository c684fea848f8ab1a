//! The acts. Each looks again at what it is about, under the lock that keeps it from changing, and may be repeated.

use std::net::{IpAddr, Ipv6Addr};
use std::time::Duration;

use provisioner_contract::{NewRecord, RecordStatus, Timestamp, VmName};
use serde_json::Value;

use super::look::{self, Look};
use super::{Finding, compare};
use crate::database::mending::mended;
use crate::host::Host;
use crate::host_route::Entry;
use crate::libvirt::Connection;
use crate::libvirt::metadata::Metadata;
use crate::libvirt::survey::Surveyed;
use crate::lock::{ProvisioningLock, VmLock};
use crate::{Error, ErrorKind, Result, recovery};

/// A command that has just begun with the VM ends within this time, or the VM is left for the next repair.
const LOCK_WAIT: Duration = Duration::from_secs(5);

/// What is done about a finding.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Mend {
    /// Other findings' acts do it.
    Nothing,
    /// Finishes what a dead command began.
    Recover,
    /// Puts a lost record back.
    Restore,
    /// Replaces what has the wrong type in a record.
    Types,
    /// Puts a missing key into a record.
    Fill(&'static str, Value),
    /// Marks a running VM as active.
    MarkActive,
    /// Sets autostart.
    Autostart(bool),
    /// Puts an address into its list.
    Allocate(IpAddr),
    /// Takes it out.
    Free(IpAddr),
    /// Leaves one of its entries.
    ListOnce(IpAddr),
    /// Sets what the host lacks for the address of a VM.
    AddEntries(Ipv6Addr, Vec<Entry>),
    /// Removes what it has for nobody's.
    RemoveEntries(Ipv6Addr),
    /// Sets `next_vmid`.
    NextVmid,
    /// Removes a stale `provisioning.lock`.
    SweepLock,
}

/// What became of several acts.
#[derive(Default)]
pub(super) struct Outcome {
    pub done: Vec<Finding>,
    pub failed: Vec<(Finding, Error)>,
}

/// A record made from metadata.
pub(super) struct Restored {
    pub record: NewRecord,
    /// Whether the subscription, as the metadata knows it, is over.
    pub expired: bool,
}

/// Until when a VM is paid for, by its metadata, and whether that was over already. Then the days of grace are what its
/// operator has to find out: the metadata says what was paid at creation, and nobody's paid VM may be shut down.
pub(super) fn expiry(host: &Host, metadata: &Metadata, now: Timestamp) -> Result<(Timestamp, bool)> {
    let at: Timestamp = time(&metadata.expires_at)?;
    if at > now { Ok((at, false)) } else { Ok((now.plus_days(host.settings.gc_grace_days.max(1)), true)) }
}

fn time(text: &str) -> Result<Timestamp> {
    text.parse().map_err(|e| Error::new(ErrorKind::Invalid, "a time in the domain's metadata is none").because(e))
}

/// The record a domain's metadata makes. What is off and would stay off was suspended: by then its grace counts anew.
pub(super) fn restored(host: &Host, metadata: &Metadata, domain: &Surveyed, now: Timestamp) -> Result<Restored> {
    let suspended = !domain.is_up() && !domain.autostart;
    let (expires_at, expired) = expiry(host, metadata, now)?;
    let record = NewRecord {
        vm_name: metadata.name.clone(),
        vmid: 0,
        ip_address: metadata.ipv4,
        ipv6_address: metadata.ipv6,
        expires_at: if suspended { time(&metadata.expires_at)? } else { expires_at },
        owner: metadata.wallet_address.to_string(),
        status: if suspended { RecordStatus::Suspended } else { RecordStatus::Active },
        created_at: time(&metadata.created_at)?,
        purpose: String::new(),
        wallet_address: metadata.wallet_address.clone(),
        username: metadata.username.clone(),
        network_mode: metadata.network_mode.clone(),
    };
    Ok(Restored { record, expired })
}

/// Mends what was found about one VM, or about none, together: under one lock and after one more look.
pub(super) fn together(host: &Host, connection: &Connection, vm: Option<&str>, found: Vec<Finding>) -> Outcome {
    let mut outcome = Outcome::default();
    let name = vm.and_then(|vm| VmName::new(vm).ok());
    let begun = (|| -> Result<_> {
        let lock = match &name {
            Some(name) => Some(VmLock::acquire(&host.dirs, name, LOCK_WAIT, &host.cancel, &host.command)?),
            None => None,
        };
        if let (Some(name), Some(lock)) = (&name, &lock) {
            recovery::recover(host, name, lock)?;
        }
        let look = look::take(host, connection, name.as_ref())?;
        let again = compare::findings(host, &look);
        Ok((lock, look, again))
    })();
    let (_lock, look, again) = match begun {
        Ok(begun) => begun,
        Err(error) => {
            outcome.failed.extend(found.into_iter().map(|finding| {
                let again = Error::new(error.kind, error.in_full());
                (finding, again)
            }));
            return outcome;
        }
    };
    for finding in found {
        // What is no longer so needs no act; what a recovery was to remove is gone when it is.
        let current = again.iter().find(|current| current.is(&finding));
        let mend = match (current, &finding.mend) {
            (Some(current), _) => current.mend.clone(),
            (None, Some(Mend::Recover)) => Some(Mend::Nothing),
            (None, _) => continue,
        };
        let Some(mend) = mend else { continue };
        if mend != Mend::Nothing {
            host.progress.phase(&format!("mending {}: {}", finding.object, finding.explanation));
        }
        match act(host, connection, &look, name.as_ref(), &mend) {
            Ok(()) => outcome.done.push(finding),
            Err(error) => outcome.failed.push((finding, error)),
        }
    }
    outcome
}

fn act(host: &Host, connection: &Connection, look: &Look, vm: Option<&VmName>, mend: &Mend) -> Result<()> {
    let own = || {
        let domain = vm.and_then(|vm| look.survey.domain(vm.as_str()));
        domain.filter(|domain| look.is_own(host, domain)).ok_or_else(|| gone(vm))
    };
    let named = || vm.ok_or_else(|| gone(vm));
    match mend {
        Mend::Nothing => Ok(()),
        // Getting here with the VM's lock has done it, unless its journal is still there.
        Mend::Recover => Err(Error::new(ErrorKind::Io, "what was left is still there")),
        Mend::Restore => restore(host, own()?, look.now),
        Mend::Types => mend_record(host, own()?, named()?),
        Mend::Fill(key, value) => fill(host, named()?, key, value),
        Mend::MarkActive => mark_active(host, own()?, named()?, look.now),
        Mend::Autostart(on) => own()?.domain.set_autostart(*on),
        Mend::AddEntries(address, entries) => {
            entries.iter().try_for_each(|entry| host.ensure_entry(*entry, &host.settings.bridge, *address))
        }
        Mend::Allocate(address) => host.database().update(|document| {
            // Its VM may have been destroyed without our locks.
            if document.holder_of("", *address).is_some() { document.ensure_allocated(*address) } else { Ok(()) }
        }),
        Mend::Free(address) => host
            .database()
            .update(|document| if is_nobodys(host, connection, *address)? { document.free(*address) } else { Ok(()) }),
        Mend::ListOnce(address) => host.database().update(|document| document.list_once(*address)),
        // Under the database's lock nobody is given the address meanwhile.
        Mend::RemoveEntries(address) => host.database().update(|document| {
            let owned = document.holder_of("", (*address).into()).is_some();
            if owned || !is_nobodys(host, connection, (*address).into())? {
                return Ok(());
            }
            host.forget_address(&host.settings.bridge, *address)
        }),
        Mend::NextVmid => host.database().update(|document| {
            document.advance_next_vmid();
            Ok(())
        }),
        Mend::SweepLock => ProvisioningLock::sweep(&host.dirs).map(drop),
    }
}

fn gone(vm: Option<&VmName>) -> Error {
    let name = vm.map(ToString::to_string).unwrap_or_default();
    Error::new(ErrorKind::NotFound, format!("VM {name} has changed meanwhile"))
}

/// Whether no domain and no command under way has `address`, asked anew under the database's lock: a create writes its
/// journal under that lock, before it takes an address.
fn is_nobodys(host: &Host, connection: &Connection, address: IpAddr) -> Result<bool> {
    let look = look::take(host, connection, None)?;
    if let Some(why) = look.unknown_holder(host) {
        return Err(Error::new(ErrorKind::Busy, format!("whose {address} is cannot be told: {why}")));
    }
    Ok(!look.claims.contains(&address) && !look.survey.in_use.addresses.contains(&address))
}

fn restore(host: &Host, domain: &Surveyed, now: Timestamp) -> Result<()> {
    let metadata = domain.facts.metadata.as_ref().ok_or_else(|| gone(None))?;
    let name = &metadata.name;
    let restored = restored(host, metadata, domain, now)?;
    host.database().update(|document| {
        match document.raw_record(name) {
            Some(record) if !compare::is_of_an_earlier_vm(record, metadata) => return Ok(()),
            _ => {}
        }
        document.register(&restored.record)?;
        if restored.record.status == RecordStatus::Suspended {
            document.set(name, "suspended_at", now.to_string().into())?;
        }
        match &metadata.nft_token_id {
            Some(id) => document.set(name, "nft_token_id", id.to_json()),
            None => Ok(()),
        }
    })
}

fn mend_record(host: &Host, domain: &Surveyed, name: &VmName) -> Result<()> {
    let metadata = domain.facts.metadata.as_ref().ok_or_else(|| gone(Some(name)))?;
    let truth = compare::truth(metadata);
    host.database().update(|document| {
        let Some(record) = document.raw_record(name) else { return Ok(()) };
        let mended = mended(name.as_str(), record, &truth)
            .map_err(|e| Error::new(ErrorKind::Invalid, format!("the record of VM {name} is damaged: {e}")))?;
        for (key, value) in mended.as_object().into_iter().flatten() {
            document.set(name, key, value.clone())?;
        }
        Ok(())
    })
}

fn fill(host: &Host, name: &VmName, key: &str, value: &Value) -> Result<()> {
    host.database().update(|document| {
        let empty = |record: &Value| match record.get(key) {
            None | Some(Value::Null) => true,
            Some(Value::String(text)) => text.is_empty(),
            Some(_) => false,
        };
        let address = value.as_str().and_then(|text| text.parse::<IpAddr>().ok()).filter(|_| key.starts_with("ip"));
        if !document.raw_record(name).is_some_and(empty)
            || address.is_some_and(|address| document.holder_of(name.as_str(), address).is_some())
        {
            return Ok(());
        }
        document.set(name, key, value.clone())?;
        address.map_or(Ok(()), |address| document.ensure_allocated(address))
    })
}

/// Only what is paid for: it looks at the record again, which an engine may have changed.
fn mark_active(host: &Host, domain: &Surveyed, name: &VmName, now: Timestamp) -> Result<()> {
    let paid = host.database().update(|document| match document.record(name)? {
        Some(record) if record.status == RecordStatus::Suspended && record.expires_at.is_none_or(|at| at > now) => {
            document.mark_active(name, None)?;
            Ok(true)
        }
        _ => Ok(false),
    })?;
    if paid && domain.persistent { domain.domain.set_autostart(true) } else { Ok(()) }
}
