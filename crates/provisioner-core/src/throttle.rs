//! Limiting what a VM takes of its host: live, and kept for its next start, so that a tenant does not shed a limit by
//! shutting down. Everything is checked before the first change, and what is reported is read back.

use std::collections::BTreeSet;

use cgroups_rs::hierarchies::mountinfo_self;
use provisioner_contract::VmName;

use crate::host::Host;
use crate::libvirt::Domain;
use crate::libvirt::domain_xml::Facts;
use crate::libvirt::tuning::{self, Direction, Reach, Scheduler};
use crate::limits::{self, CpuController, InForce, Limit, Limits};
use crate::ownership::OwnDomain;
use crate::{Error, ErrorKind, Result, power};

/// What a change did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Throttled {
    /// The limits that were set, or set back.
    pub changed: BTreeSet<Limit>,
    /// What holds now, read back.
    pub in_force: InForce,
}

/// What holds for the VM: for a running one now, for another from its next start.
///
/// # Errors
/// `NotFound` when there is no such VM, `Conflict` when it is not ours; when libvirt cannot be asked.
pub fn show(host: &Host, name: &VmName) -> Result<InForce> {
    let (own, _) = power::look_up(host, name)?;
    Tuned::new(&own.domain, &own.facts)?.in_force()
}

/// Sets the limits that `changes` names and keeps the others. With `reset` every limit is first what it was when
/// the VM was created.
///
/// # Errors
/// `Invalid` before any effect when a value is out of its range. When one of several cannot be set the message says
/// what is in force then and what was not applied.
pub fn throttle(host: &Host, name: &VmName, changes: &Limits, reset: bool) -> Result<Throttled> {
    changes.check()?;
    let vm = power::open(host, name, false)?;
    let OwnDomain { domain, facts } = &vm.own;
    let tuned = Tuned::new(domain, facts)?;
    let (wanted, changed) = if reset {
        if facts.metadata_damaged {
            host.progress.warn(&format!("the metadata of {name} is damaged: its creation-time limits are not known"));
        }
        let creation = facts.metadata.as_ref().map(|metadata| metadata.limits).unwrap_or_default();
        (changes.or(&creation), Limit::ALL.into_iter().collect())
    } else {
        (*changes, changes.named().map(|(limit, _)| limit).collect::<BTreeSet<_>>())
    };
    if !tuned.active && wanted.limits_bandwidth() && tuning::traffic_control_is_missing() {
        host.progress.warn(&format!("{name} may fail to start on this host: {}", tuning::traffic_control_hint()));
    }
    let mut done = BTreeSet::new();
    let outcome = if reset { tuned.reset(&wanted, &mut done) } else { tuned.apply(&wanted, &mut done) };
    match outcome.and_then(|()| tuned.in_force()) {
        Ok(in_force) => Ok(Throttled { changed, in_force }),
        Err(error) => Err(partly(name, &tuned, &changed, &done, error)),
    }
}

/// Sets a new VM's limits, before its first start.
///
/// # Errors
/// When libvirt refuses.
pub(crate) fn apply_at_creation(domain: &Domain, limits: &Limits) -> Result<()> {
    if limits.is_empty() {
        return Ok(());
    }
    let facts = Facts::parse(&domain.description()?)?;
    Tuned::new(domain, &facts)?.apply(limits, &mut BTreeSet::new())
}

/// The failure of one of several changes: which hold, and which do not.
fn partly(name: &VmName, tuned: &Tuned<'_>, all: &BTreeSet<Limit>, done: &BTreeSet<Limit>, error: Error) -> Error {
    let list = |limits: &mut dyn Iterator<Item = &Limit>, text: &dyn Fn(Limit) -> String| {
        let parts: Vec<_> = limits.map(|limit| text(*limit)).collect();
        if parts.is_empty() { "nothing".to_owned() } else { parts.join(", ") }
    };
    // A QEMU that has just not answered in time would be waited for again.
    let now = if error.kind == ErrorKind::Unavailable { None } else { tuned.in_force().ok() };
    let in_force = match now {
        Some(now) => list(&mut done.iter(), &|limit| now.line(limit)),
        None => list(&mut done.iter(), &|limit| limit.name().to_owned()),
    };
    let left = list(&mut all.difference(done), &|limit| limit.name().to_owned());
    let what = format!("cannot set all limits of {name} (set and in force: {in_force}; not set: {left})");
    Error::new(error.kind, what).because(error)
}

/// The host's version of control groups for the CPU, by what is mounted: on a host with both, each controller is in
/// one of them, and only version 1 mounts name their controllers.
fn cpu_controller() -> CpuController {
    let v1 = mountinfo_self().iter().any(|mount| mount.super_opts.iter().any(|option| option == "cpu"));
    if v1 { CpuController::V1 } else { CpuController::V2 }
}

/// A domain with what is needed to tune it.
struct Tuned<'a> {
    domain: &'a Domain,
    disks: Vec<String>,
    interfaces: &'a [String],
    vcpus: u32,
    active: bool,
    cpu: CpuController,
}

impl<'a> Tuned<'a> {
    fn new(domain: &'a Domain, facts: &'a Facts) -> Result<Self> {
        Ok(Self {
            domain,
            disks: facts.disks.iter().map(|path| path.to_string_lossy().into_owned()).collect(),
            interfaces: &facts.macs,
            vcpus: domain.vcpus()?,
            active: domain.is_active()?,
            cpu: cpu_controller(),
        })
    }

    /// Where values in force are read.
    fn place(&self) -> Reach {
        if self.active { Reach::Live } else { Reach::Config }
    }

    /// Where a change goes: a domain that is off has only its definition.
    fn everywhere(&self) -> Reach {
        if self.active { Reach::LiveAndConfig } else { Reach::Config }
    }

    fn in_force(&self) -> Result<InForce> {
        let place = self.place();
        let scheduler = self.domain.scheduler(place)?;
        let caps = [
            limits::quota_percent(scheduler.global.0, scheduler.global.1, self.vcpus),
            limits::quota_percent(scheduler.per_vcpu.0, scheduler.per_vcpu.1, 1),
        ];
        let iops = match self.disks.first() {
            Some(disk) => self.domain.iops(disk, place)?,
            None => (0, 0),
        };
        let bandwidth = match self.interfaces.first() {
            Some(interface) => self.domain.bandwidth(interface, place)?,
            None => (0, 0),
        };
        Ok(InForce {
            cpu_shares: scheduler.shares.map_or(limits::DEFAULT_SHARES, |raw| self.cpu.from_libvirt(raw)),
            cpu_quota_percent: caps.into_iter().flatten().min(),
            bandwidth_in_kbps: limits::kbps(bandwidth.0),
            bandwidth_out_kbps: limits::kbps(bandwidth.1),
            iops_read: iops.0,
            iops_write: iops.1,
        })
    }

    fn require<'d>(&self, devices: &'d [String], what: &str) -> Result<&'d [String]> {
        if devices.is_empty() {
            let what = format!("domain {} has no {what} to limit", self.domain.name());
            return Err(Error::new(ErrorKind::Conflict, what));
        }
        Ok(devices)
    }

    /// Sets what is named, and notes in `done` what has been set.
    fn apply(&self, wanted: &Limits, done: &mut BTreeSet<Limit>) -> Result<()> {
        let reach = self.everywhere();
        if let Some(shares) = wanted.get(Limit::CpuShares) {
            self.domain.set_cpu_shares(self.cpu.to_libvirt(shares), reach)?;
            done.insert(Limit::CpuShares);
        }
        if let Some(percent) = wanted.get(Limit::CpuQuota) {
            let quota = limits::quota(percent, self.vcpus);
            self.domain.set_cpu_quota(Some(quota), limits::QUOTA_PERIOD, reach)?;
            done.insert(Limit::CpuQuota);
        }
        let named = |limit| wanted.get(limit).map(|_| limit);
        let (read, write) = (wanted.get(Limit::IopsRead), wanted.get(Limit::IopsWrite));
        if read.is_some() || write.is_some() {
            for disk in self.require(&self.disks, "disk")? {
                let before = self.domain.iops(disk, self.place())?;
                self.domain.set_iops(disk, read.unwrap_or(before.0), write.unwrap_or(before.1), reach)?;
            }
            done.extend([Limit::IopsRead, Limit::IopsWrite].into_iter().filter_map(named));
        }
        for (limit, direction) in [(Limit::BandwidthIn, Direction::In), (Limit::BandwidthOut, Direction::Out)] {
            let Some(kbps) = wanted.get(limit) else { continue };
            for interface in self.require(self.interfaces, "network interface")? {
                self.set_bandwidth(interface, direction, kbps, reach)?;
            }
            done.insert(limit);
        }
        Ok(())
    }

    fn set_bandwidth(&self, interface: &str, direction: Direction, kbps: u64, reach: Reach) -> Result<()> {
        let average = limits::kilobytes(kbps);
        // Traffic to the guest is queued and needs no bucket; traffic from it is policed.
        let burst = (direction == Direction::Out).then(|| limits::policer_burst(average));
        let outcome = self.domain.set_bandwidth(interface, direction, average, burst, reach);
        if outcome.is_err() && self.active {
            self.restore_bandwidth(interface);
        }
        outcome
    }

    /// Where a step of traffic control fails, libvirt leaves the steps before it in the kernel, and they throttle. Setting
    /// what libvirt itself still holds to be in force makes it clear the interface first. What failed before may fail
    /// again, and then the first error is the one to report.
    fn restore_bandwidth(&self, interface: &str) {
        let Ok((to_guest, from_guest)) = self.domain.bandwidth(interface, Reach::Live) else { return };
        for (direction, average) in [(Direction::In, to_guest), (Direction::Out, from_guest)] {
            let average = u32::try_from(average).unwrap_or(u32::MAX);
            let burst = (direction == Direction::Out).then(|| limits::policer_burst(average));
            if let Err(error) = self.domain.set_bandwidth(interface, direction, average, burst, Reach::Live) {
                tracing::debug!("cannot restore the bandwidth of {interface}: {error}");
            }
        }
    }

    /// Takes every limit away and sets what is named.
    ///
    /// Everything is set, nothing is defined anew: libvirt may carry out a definition that was given up much later, and it would
    /// bring a VM back that is destroyed by then. A change of values finds no domain in that case.
    fn reset(&self, wanted: &Limits, done: &mut BTreeSet<Limit>) -> Result<()> {
        // The definition first: a VM that is stopped meanwhile must not start with a limit that was said to be gone.
        let mut places = Vec::new();
        if self.domain.is_persistent()? {
            places.push((Reach::Config, self.domain.scheduler(Reach::Config)?));
        }
        if self.active {
            places.push((Reach::Live, self.domain.scheduler(Reach::Live)?));
        }
        let unnamed = |limit| wanted.get(limit).is_none();
        if unnamed(Limit::CpuShares) {
            let default = self.cpu.to_libvirt(limits::DEFAULT_SHARES);
            for (place, now) in &places {
                // libvirt cannot forget a share that was written down. The default of this host in its place means the same.
                if now.shares.is_some_and(|shares| shares != default) {
                    self.domain.set_cpu_shares(default, *place)?;
                }
            }
            done.insert(Limit::CpuShares);
        }
        if unnamed(Limit::CpuQuota) {
            for (place, now) in &places {
                self.clear_cpu_quota(*place, now)?;
            }
            done.insert(Limit::CpuQuota);
        }
        // Those that are wanted are set afterwards, whatever else these disks were limited to.
        for (disk, (place, _)) in self.disks.iter().flat_map(|disk| places.iter().map(move |place| (disk, place))) {
            self.domain.clear_block_io_tune(disk, *place)?;
        }
        done.extend([Limit::IopsRead, Limit::IopsWrite].into_iter().filter(|limit| unnamed(*limit)));
        for (interface, (place, _)) in
            self.interfaces.iter().flat_map(|mac| places.iter().map(move |place| (mac, place)))
        {
            let (to_guest, from_guest) = self.domain.bandwidth(interface, *place)?;
            for (limit, direction, in_force) in
                [(Limit::BandwidthIn, Direction::In, to_guest), (Limit::BandwidthOut, Direction::Out, from_guest)]
            {
                // Without this look a host without traffic control could not reset what it cannot have set.
                if unnamed(limit) && in_force > 0 {
                    self.domain.set_bandwidth(interface, direction, 0, None, *place)?;
                }
            }
        }
        done.extend([Limit::BandwidthIn, Limit::BandwidthOut].into_iter().filter(|limit| unnamed(*limit)));
        self.apply(wanted, done)
    }

    /// Takes away the quota of which `now` was read in `place`.
    fn clear_cpu_quota(&self, place: Reach, now: &Scheduler) -> Result<()> {
        if place == Reach::Config {
            return self.domain.forget_cpu_quotas(now);
        }
        let capped = limits::quota_percent(now.global.0, now.global.1, self.vcpus).is_some()
            || limits::quota_percent(now.per_vcpu.0, now.per_vcpu.1, 1).is_some()
            || limits::quota_percent(now.emulator.0, now.emulator.1, 1).is_some();
        if capped || now.global.1 != limits::QUOTA_PERIOD {
            self.domain.set_cpu_quota(None, limits::QUOTA_PERIOD, place)?;
        }
        Ok(())
    }
}
