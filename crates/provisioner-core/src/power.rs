//! Starting, stopping and killing a VM. Each is idempotent.

use std::time::{Duration, Instant};

use provisioner_contract::{Record, RecordStatus, VmName};
use provisioner_metrics::store::Store;

use crate::host::Host;
use crate::host_route::parse_mac;
use crate::libvirt::{Domain, DomainState};
use crate::lock::VmLock;
use crate::ownership::{self, OwnDomain};
use crate::{Error, ErrorKind, Result, recovery};

/// Callers give up after 60 s; of a stop the contract asks less than 50.
const LOCK_WAIT: Duration = Duration::from_secs(10);
/// A whole stop, waiting for the VM's lock included.
const STOP_LIMIT: Duration = Duration::from_secs(45);
/// A guest that is still booting loses the first press of the button, so it is pressed again.
const PRESS_AGAIN: Duration = Duration::from_secs(5);
/// One press: QEMU answers at once, and an agent that is alive within seconds.
const PRESS_LIMIT: Duration = Duration::from_secs(5);
/// Letting vCPUs run again takes milliseconds, unless QEMU hangs.
const UNPAUSE_LIMIT: Duration = Duration::from_secs(15);

/// The lock of a VM that is about to be changed.
pub(crate) struct Held {
    name: VmName,
    samples: Store,
    lock: VmLock,
}

impl Held {
    /// Waits up to `wait` for the lock of `name`.
    ///
    /// # Errors
    /// Those of [`VmLock::acquire`].
    pub(crate) fn acquire(host: &Host, name: &VmName, wait: Duration) -> Result<Self> {
        let lock = VmLock::acquire(&host.dirs, name, wait, &host.cancel, &host.command)?;
        Ok(Self { name: name.clone(), samples: Store::new(&host.dirs.state), lock })
    }

    pub(crate) fn lock(&self) -> &VmLock {
        &self.lock
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        // Whatever was done to the VM, the shared sample of its metrics does not know it yet. It is only a cache.
        if let Err(error) = self.samples.invalidate(&self.name, false) {
            tracing::debug!("cannot invalidate the sample: {error}");
        }
    }
}

/// One VM under its lock, after what a dead command left of it was cleared.
pub(crate) struct Locked {
    pub(crate) own: OwnDomain,
    record: Option<Record>,
    _held: Held,
}

/// Takes the VM's lock, clears what a dead command left of it, and looks it up. With `regardless` a journal that cannot be
/// read is no obstacle: the power of a VM must always be to be had.
///
/// # Errors
/// `Busy` when another command keeps the lock, and those of [`look_up`].
pub(crate) fn open(host: &Host, name: &VmName, regardless: bool) -> Result<Locked> {
    let held = Held::acquire(host, name, LOCK_WAIT)?;
    match recovery::recover(host, name, held.lock()) {
        Err(error) if regardless && error.kind == ErrorKind::Invalid => {
            host.progress.warn(&format!("what a dead command left of {name} is not cleared: {}", error.in_full()));
        }
        outcome => outcome?,
    }
    let (own, record) = look_up(host, name)?;
    Ok(Locked { own, record, _held: held })
}

/// The VM with its record, without a lock: enough for what changes nothing.
///
/// # Errors
/// `NotFound` when there is no such VM, `Conflict` when the domain is not ours, `Unavailable` when libvirt cannot be
/// asked.
pub(crate) fn look_up(host: &Host, name: &VmName) -> Result<(OwnDomain, Option<Record>)> {
    // A damaged database must not keep a VM from being started or stopped: ownership then rests on the metadata.
    let record = match host.database().read().and_then(|document| document.record(name)) {
        Ok(record) => record,
        Err(error) => {
            host.progress.warn(&format!("the record of {name} cannot be read: {}", error.in_full()));
            None
        }
    };
    let domain = host
        .connect()?
        .domain(name)?
        .ok_or_else(|| Error::new(ErrorKind::NotFound, format!("there is no VM called {name}")))?;
    let own = ownership::require_own(host, name, domain, record.as_ref())?;
    Ok((own, record))
}

/// Makes the VM run: starts it, unpauses it, wakes it, and restores the host's route to it.
///
/// # Errors
/// When there is no such VM or libvirt refuses.
pub fn start(host: &Host, name: &VmName) -> Result<()> {
    let vm = open(host, name, false)?;
    if vm.record.as_ref().is_some_and(|record| record.status == RecordStatus::Suspended) {
        host.progress
            .warn(&format!("{name} has expired: the next blockhost-vm-gc suspends it again unless it is renewed"));
    }
    bring_up(host, &vm.own.domain)?;
    restore_route(host, &vm.own, vm.record.as_ref());
    Ok(())
}

/// Makes the domain run, whatever it is doing.
///
/// # Errors
/// When libvirt refuses.
pub(crate) fn bring_up(host: &Host, domain: &Domain) -> Result<()> {
    let name = domain.name();
    match domain.state()? {
        Some(DomainState::Running | DomainState::ShuttingDown) => return Ok(()),
        Some(DomainState::Paused) => {
            host.progress.phase(&format!("unpausing {name}"));
            return domain.unpause(UNPAUSE_LIMIT);
        }
        Some(DomainState::PmSuspended) => {
            host.progress.phase(&format!("waking {name}"));
            return domain.wake(UNPAUSE_LIMIT);
        }
        // A crashed one may still have its process.
        Some(DomainState::Crashed) => domain.power_off()?,
        Some(DomainState::ShutOff) | None => {}
    }
    host.progress.phase(&format!("starting {name}"));
    match domain.start() {
        // Somebody else, such as virsh, was faster.
        Err(_) if matches!(domain.state(), Ok(Some(DomainState::Running))) => Ok(()),
        outcome => outcome,
    }
}

/// Restores what the host knows of the VM's IPv6 address. Without it the VM still works over IPv4, so a failure is a warning.
pub(crate) fn restore_route(host: &Host, own: &OwnDomain, record: Option<&Record>) {
    let metadata = own.facts.metadata.as_ref().and_then(|m| m.ipv6);
    let Some(address) = record.and_then(Record::ipv6).or(metadata) else { return };
    let mac = own.facts.macs.first().and_then(|mac| parse_mac(mac));
    host.ensure_reachable(&host.settings.bridge, address, mac);
}

/// Shuts the VM down and waits until it is off.
///
/// # Errors
/// `TimedOut` when it still runs at the end; when there is no such VM or libvirt refuses.
pub fn stop(host: &Host, name: &VmName) -> Result<()> {
    let deadline = Instant::now() + STOP_LIMIT;
    let vm = open(host, name, true)?;
    shut_down(host, &vm.own.domain, STOP_LIMIT, deadline)
}

/// Shuts the domain down and waits until it is off, or the `deadline`, before which the caller has spent a part of `limit`.
///
/// # Errors
/// `TimedOut` when it still runs at the end, or when libvirt refuses.
pub(crate) fn shut_down(host: &Host, domain: &Domain, limit: Duration, deadline: Instant) -> Result<()> {
    let name = domain.name();
    let left = |most: Duration| most.min(deadline.saturating_duration_since(Instant::now()));
    if !domain.is_active()? {
        return Ok(());
    }
    match domain.state()? {
        // Stopped vCPUs see no button.
        Some(DomainState::Paused) => domain.unpause(left(UNPAUSE_LIMIT))?,
        Some(DomainState::PmSuspended) => domain.wake(left(UNPAUSE_LIMIT))?,
        Some(DomainState::Crashed) => return domain.power_off(),
        _ => {}
    }
    host.progress.phase(&format!("shutting {name} down"));
    let mut press = Instant::now();
    let mut refused = None;
    let mut presses = 0_u32;
    while domain.is_active()? {
        if left(PRESS_LIMIT).is_zero() {
            let what = format!("{name} still runs {} s after it was to be stopped", limit.as_secs());
            let error =
                Error::new(ErrorKind::TimedOut, what).hint(format!("blockhost-vm-kill {name} takes its power away"));
            return Err(match refused {
                Some(cause) => error.because(cause),
                None => error,
            });
        }
        if Instant::now() >= press {
            // Every other time through the agent, which reaches guests that ignore the button; one that hangs does not
            // keep the button from being pressed.
            let through_agent = presses % 2 == 1 && domain.agent_connected().unwrap_or(false);
            refused = domain.request_shutdown(through_agent, left(PRESS_LIMIT)).err();
            presses += 1;
            press = Instant::now() + PRESS_AGAIN;
        }
        host.cancel.sleep(Duration::from_millis(200))?;
    }
    Ok(())
}

/// Takes the VM's power away.
///
/// # Errors
/// When there is no such VM or it cannot be stopped.
pub fn kill(host: &Host, name: &VmName) -> Result<()> {
    let vm = open(host, name, true)?;
    host.progress.phase(&format!("powering {name} off"));
    vm.own.domain.power_off()
}
