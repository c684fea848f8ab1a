//! Finishing what a dead process began. Whoever holds a VM's lock and finds its journal knows that the writer is
//! dead: a living one would hold the lock.

use provisioner_contract::VmName;

use crate::host::Host;
use crate::journal::{Journal, Operation};
use crate::lock::{ProvisioningLock, VmLock};
use crate::{Error, Result, create, destroy, durable, gc, removal, tombstone};

/// Undoes a create, or finishes a destroy or suspension, that died on `name`. The caller holds the VM's lock.
///
/// # Errors
/// When that cannot be done now; the journal stays for the next try.
pub fn recover(host: &Host, name: &VmName, lock: &VmLock) -> Result<()> {
    sweep(host);
    let Some(journal) = Journal::load(&host.dirs, name)? else {
        // The command itself says what stands in its way.
        if let Err(error) = clear_late(host, name, lock) {
            host.progress.warn(&format!("what came late of an earlier {name} is not cleared: {}", error.in_full()));
        }
        return Ok(());
    };
    host.progress
        .note(&format!("finishing what {} (PID {}) left of {name} when it died", journal.command, journal.owner.pid));
    finish(host, &journal).map_err(|error| {
        Error::new(error.kind, format!("cannot clear what a dead command left of {name}")).because(error)
    })
}

/// Removes what has come back of VMs called `name` that were destroyed, or whose create was undone, and returns what that was.
/// There is no journal of that name.
///
/// # Errors
/// When libvirt cannot be asked or refuses.
pub(crate) fn clear_late(host: &Host, name: &VmName, _lock: &VmLock) -> Result<Vec<String>> {
    let stones = tombstone::of(&host.dirs, name)?;
    let mut cleared = Vec::new();
    if stones.is_empty() {
        return Ok(cleared);
    }
    let connection = host.connect()?;
    for stone in stones {
        let begun = stone.started_at;
        let removed = removal::late(host, &connection, stone)?;
        if let Some(what) = &removed {
            host.progress.note(&format!("removed {what}, which came back after {name} was removed ({begun})"));
        }
        cleared.extend(removed);
    }
    Ok(cleared)
}

/// Removes what dead processes left that is no VM's: the sign that a create is in flight, of which it says whether it was
/// there, and half-written files. They are in nobody's way, so a failure is not one of the command.
pub(crate) fn sweep(host: &Host) -> bool {
    // The run directory may be read-only, which must not keep a VM from being worked on.
    let swept = ProvisioningLock::sweep(&host.dirs).unwrap_or_else(|error| {
        host.progress.warn(&format!("the sign that a create is in flight cannot be cleared: {}", error.in_full()));
        false
    });
    let database = host.settings.db_file.parent().map(std::path::Path::to_path_buf);
    let ours = [
        host.dirs.journal(),
        host.dirs.tombstones(),
        host.dirs.locks(),
        host.dirs.run.clone(),
        host.dirs.state.clone(),
    ];
    for dir in ours.into_iter().chain(database) {
        if let Err(error) = durable::sweep_temporaries(&dir) {
            tracing::debug!("cannot look for half-written files: {error}");
        }
    }
    swept
}

fn finish(host: &Host, journal: &Journal) -> Result<()> {
    match journal.operation {
        Operation::Create => create::undo(host, journal),
        Operation::Destroy => destroy::finish(host, journal),
        Operation::Suspend => gc::finish_suspension(host, journal),
    }
}
