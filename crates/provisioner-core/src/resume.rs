//! Resuming a VM that was paid for again: it runs, starts with the host, and is recorded as active.
//!
//! The record comes last. A resume that dies before leaves a VM that runs and is recorded as suspended, and can be repeated;
//! the other order would leave one that is off and that nobody looks at any more.

use std::time::Duration;

use provisioner_contract::{Record, RecordStatus, Timestamp, VmName};

use crate::create::MAX_EXPIRY_DAYS;
use crate::database::{Database, Document};
use crate::host::Host;
use crate::libvirt::DomainState;
use crate::ownership::{self, OwnDomain};
use crate::power::{self, Held};
use crate::{Error, ErrorKind, Result, failpoint, gc, recovery};

/// A collection holds a VM for as long as its guest takes to shut down and be powered off. The engine does not try again,
/// and the VM is paid for: so that is waited for.
const LOCK_WAIT: Duration = Duration::from_secs(120);

/// The points at which a test can stop a resume, in their order.
pub const FAILPOINTS: &[&str] = &["resume.begin", "resume.started", "resume.autostart", "resume.marked"];

/// What was resumed, or would be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Resumed {
    /// What the record said before.
    pub was: RecordStatus,
    /// What the domain did before; `None` in a mock.
    pub state: Option<DomainState>,
    /// Until when it is paid for now; `None` when it does not expire.
    pub expires_at: Option<Timestamp>,
}

/// How long the subscription lasts from now on.
#[derive(Debug, Clone, Copy)]
struct Extension {
    /// Days asked for, on top of what is left.
    days: Option<u32>,
    /// Days from now for a VM that has expired, when none are asked for.
    default_days: u32,
}

impl Extension {
    fn new(days: Option<u32>, default_days: u32) -> Result<Self> {
        match days {
            Some(days) if !(1..=MAX_EXPIRY_DAYS).contains(&days) => Err(Error::new(
                ErrorKind::Invalid,
                format!("an extension of {days} days is not between 1 and {MAX_EXPIRY_DAYS}"),
            )),
            _ => Ok(Self { days, default_days }),
        }
    }

    /// The new end of a subscription that ends at `expires_at`. One without an end keeps none.
    fn apply(self, expires_at: Option<Timestamp>, now: Timestamp) -> Option<Timestamp> {
        let end = expires_at?;
        Some(match self.days {
            Some(days) => end.max(now).plus_days(days),
            None if end > now => end,
            None => now.plus_days(self.default_days),
        })
    }
}

/// Makes the VM run and records it as active. One that is both already is a success.
///
/// # Errors
/// `NotFound` without record or domain, `Conflict` when it is destroyed or the domain is not ours; when libvirt cannot be
/// asked or refuses to start it, and then the record stays as it was.
pub fn resume(host: &Host, name: &VmName, extend_days: Option<u32>) -> Result<Resumed> {
    let extension = Extension::new(extend_days, host.settings.default_expiry_days)?;
    let held = Held::acquire(host, name, LOCK_WAIT)?;
    recovery::recover(host, name, held.lock())?;
    let (own, record, state) = look_up(host, name)?;
    host.cancel.check()?;
    failpoint::hit("resume.begin")?;
    power::bring_up(host, &own.domain)?;
    failpoint::hit("resume.started")?;
    gc::set_autostart(&own.domain, true)?;
    power::restore_route(host, &own, Some(&record));
    failpoint::hit("resume.autostart")?;
    let expires_at = host.database().update(|document| mark(document, name, extension)).map_err(|error| {
        let what = format!("{name} runs, but cannot be recorded as active");
        Error::new(error.kind, what).because(error).hint(format!("run again: blockhost-vm-resume {name}"))
    })?;
    failpoint::hit("resume.marked")?;
    Ok(Resumed { was: record.status, state: Some(state), expires_at })
}

/// What [`resume`] would do. Nothing is changed or locked.
///
/// # Errors
/// Whatever would make it fail before its first effect.
pub fn plan(host: &Host, name: &VmName, extend_days: Option<u32>) -> Result<Resumed> {
    let extension = Extension::new(extend_days, host.settings.default_expiry_days)?;
    let (_, record, state) = look_up(host, name)?;
    let expires_at = extension.apply(record.expires_at, Timestamp::now());
    Ok(Resumed { was: record.status, state: Some(state), expires_at })
}

/// The same against a database file alone.
///
/// # Errors
/// When there is no such record, it is destroyed, or the file cannot be used.
pub fn mock(
    database: &Database,
    default_expiry_days: u32,
    name: &VmName,
    extend_days: Option<u32>,
    execute: bool,
) -> Result<Resumed> {
    let extension = Extension::new(extend_days, default_expiry_days)?;
    if !execute {
        let record = require_live(&database.read()?, name)?;
        let expires_at = extension.apply(record.expires_at, Timestamp::now());
        return Ok(Resumed { was: record.status, state: None, expires_at });
    }
    database.update(|document| {
        let was = require_live(document, name)?.status;
        Ok(Resumed { was, state: None, expires_at: mark(document, name, extension)? })
    })
}

/// The end is computed from what the record says in this very update: an engine extends it at the same time.
fn mark(document: &mut Document, name: &VmName, extension: Extension) -> Result<Option<Timestamp>> {
    let record = require_live(document, name)?;
    let expires_at = extension.apply(record.expires_at, Timestamp::now());
    // One that is kept stays as its writer has spelled it.
    document.mark_active(name, expires_at.filter(|_| expires_at != record.expires_at))?;
    Ok(expires_at)
}

fn require_live(document: &Document, name: &VmName) -> Result<Record> {
    let record = document
        .record(name)?
        .ok_or_else(|| Error::new(ErrorKind::NotFound, format!("VM {name} is not in the database")))?;
    if record.is_live() {
        return Ok(record);
    }
    Err(Error::new(ErrorKind::Conflict, format!("cannot resume VM {name}: it is destroyed"))
        .hint("nothing of it is left; a new VM may have its name"))
}

fn look_up(host: &Host, name: &VmName) -> Result<(OwnDomain, Record, DomainState)> {
    let record = require_live(&host.database().read()?, name)?;
    let gone = || {
        Error::new(ErrorKind::NotFound, format!("cannot resume VM {name}: its domain is gone"))
            .hint("the record was left as it is; if the VM cannot be restored: blockhost-vm-destroy")
    };
    let own = ownership::find(host, &host.connect()?, name, Some(&record))?.ok_or_else(gone)?;
    let state = own.domain.state()?.ok_or_else(gone)?;
    Ok((own, record, state))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn time(text: &str) -> Timestamp {
        text.parse().unwrap()
    }

    #[test]
    fn the_end_follows_from_what_is_asked_and_what_is_left() {
        let now = time("2026-11-21T00:00:00Z");
        let (past, future) = (time("2026-11-01T00:00:00Z"), time("2026-12-01T00:00:00Z"));
        let apply = |days, end| Extension::new(days, 30).unwrap().apply(end, now);
        assert_eq!(apply(None, Some(future)), Some(future));
        assert_eq!(apply(None, Some(past)), Some(time("2026-12-21T00:00:00Z")));
        assert_eq!(apply(None, Some(now)), Some(time("2026-12-21T00:00:00Z")));
        assert_eq!(apply(Some(7), Some(future)), Some(time("2026-12-08T00:00:00Z")));
        assert_eq!(apply(Some(7), Some(past)), Some(time("2026-11-28T00:00:00Z")));
        assert_eq!((apply(None, None), apply(Some(7), None)), (None, None));
        assert!(Extension::new(Some(0), 30).is_err() && Extension::new(Some(MAX_EXPIRY_DAYS + 1), 30).is_err());
    }

    proptest! {
        #[test]
        fn nobody_loses_time(end in -1_000_000i64..1_000_000, days in prop::option::of(1u32..=MAX_EXPIRY_DAYS)) {
            let now = time("2026-11-21T00:00:00Z");
            let end = Timestamp::from_jiff(jiff::Timestamp::from_second(now.as_jiff().as_second() + end).unwrap());
            let new = Extension::new(days, 30).unwrap().apply(Some(end), now).unwrap();
            prop_assert!(new >= end && new > now);
        }
    }
}
