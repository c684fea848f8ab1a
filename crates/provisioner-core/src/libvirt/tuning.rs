//! The tuning of one domain: its share and quota of the CPU, its disk's operations, its interface's bandwidth.
//! Everything here speaks libvirt's units; the contract's are in [`crate::limits`].

use std::ffi::{CStr, CString};
use std::fs;
use std::path::Path;
use std::time::Duration;

use super::domain::Domain;
use super::ffi::{self, Parameter, Value};
use crate::limits::quota_percent;
use crate::{Error, ErrorKind, Result};

/// Block I/O calls enter QEMU's monitor, bandwidth runs `tc` several times: a healthy host takes milliseconds.
const CALL_LIMIT: Duration = Duration::from_secs(15);

/// What libvirt's bandwidth needs of the kernel.
const TRAFFIC_CONTROL_MODULES: [&str; 6] = ["sch_htb", "sch_sfq", "sch_ingress", "cls_u32", "cls_fw", "act_police"];

const NO_QUOTA: i64 = -1;

/// What a change is made to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reach {
    /// The running domain alone.
    Live,
    /// What libvirt keeps and the next start takes.
    Config,
    /// Both.
    LiveAndConfig,
}

impl Reach {
    fn flags(self) -> u32 {
        match self {
            Self::Live => virt_sys::VIR_DOMAIN_AFFECT_LIVE,
            Self::Config => virt_sys::VIR_DOMAIN_AFFECT_CONFIG,
            Self::LiveAndConfig => virt_sys::VIR_DOMAIN_AFFECT_LIVE | virt_sys::VIR_DOMAIN_AFFECT_CONFIG,
        }
    }

    /// Where a value is read: getters take one place only.
    fn read_flags(self) -> u32 {
        match self {
            Self::Config => virt_sys::VIR_DOMAIN_AFFECT_CONFIG,
            Self::Live | Self::LiveAndConfig => virt_sys::VIR_DOMAIN_AFFECT_LIVE,
        }
    }
}

/// The CPU's part, as libvirt tells it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Scheduler {
    /// Raw: `cpu.shares` or `cpu.weight`, by the host. `None`: the definition names none.
    pub shares: Option<u64>,
    /// Microseconds per period of the whole VM, and that period.
    pub global: (i64, u64),
    /// The same for each vCPU alone.
    pub per_vcpu: (i64, u64),
    /// The same for all threads that are no vCPU.
    pub emulator: (i64, u64),
}

/// A direction from the guest's view.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// To the guest.
    In,
    /// From the guest.
    Out,
}

impl Domain {
    fn tune<T: Send + 'static>(
        &self,
        verb: &str,
        call: impl FnOnce(&virt::domain::Domain) -> Result<T, virt::error::Error> + Send + 'static,
    ) -> Result<T> {
        self.call(CALL_LIMIT, verb, call)?.ok_or_else(|| self.gone())
    }

    /// The number of its vCPUs.
    ///
    /// # Errors
    /// When libvirt cannot be asked, or the domain has gone.
    pub fn vcpus(&self) -> Result<u32> {
        self.tune("count the vCPUs of", |raw| raw.vcpus_flags(virt_sys::VIR_DOMAIN_AFFECT_CURRENT))
    }

    /// Its CPU tuning in `reach`.
    ///
    /// # Errors
    /// When libvirt cannot be asked, or the host has no CPU controller.
    pub fn scheduler(&self, reach: Reach) -> Result<Scheduler> {
        let flags = reach.read_flags();
        let all = self.tune("read the CPU tuning of", move |raw| ffi::scheduler_parameters(raw, flags))?;
        let number = |name: &CStr| find(&all, name);
        let positive = |name: &CStr| u64::try_from(number(name)).unwrap_or(0);
        Ok(Scheduler {
            shares: Some(positive(virt_sys::VIR_DOMAIN_SCHEDULER_CPU_SHARES)).filter(|shares| *shares > 0),
            global: (
                number(virt_sys::VIR_DOMAIN_SCHEDULER_GLOBAL_QUOTA),
                positive(virt_sys::VIR_DOMAIN_SCHEDULER_GLOBAL_PERIOD),
            ),
            per_vcpu: (
                number(virt_sys::VIR_DOMAIN_SCHEDULER_VCPU_QUOTA),
                positive(virt_sys::VIR_DOMAIN_SCHEDULER_VCPU_PERIOD),
            ),
            emulator: (
                number(virt_sys::VIR_DOMAIN_SCHEDULER_EMULATOR_QUOTA),
                positive(virt_sys::VIR_DOMAIN_SCHEDULER_EMULATOR_PERIOD),
            ),
        })
    }

    /// Sets `cpu_shares`, in the host's scale.
    ///
    /// # Errors
    /// When libvirt refuses.
    pub fn set_cpu_shares(&self, number: u64, reach: Reach) -> Result<()> {
        let flags = reach.flags();
        let all = [(virt_sys::VIR_DOMAIN_SCHEDULER_CPU_SHARES, Value::ULLong(number))];
        self.tune("set the CPU shares of", move |raw| ffi::set_scheduler_parameters(raw, &all, flags))
    }

    /// Caps the whole VM, emulator threads included, to `quota` microseconds per `period`; `None` takes the cap away.
    /// Quotas of single threads, which an earlier tool may have set, are taken away: the kernel would refuse a cap
    /// below them, or they would go on to hold.
    ///
    /// # Errors
    /// When libvirt refuses.
    pub fn set_cpu_quota(&self, quota: Option<i64>, period: u64, reach: Reach) -> Result<()> {
        let before = self.scheduler(reach)?;
        let mut all: Vec<Parameter> = Vec::new();
        if quota_percent(before.per_vcpu.0, before.per_vcpu.1, 1).is_some() {
            all.push((virt_sys::VIR_DOMAIN_SCHEDULER_VCPU_QUOTA, Value::LLong(NO_QUOTA)));
        }
        if quota_percent(before.emulator.0, before.emulator.1, 1).is_some() {
            all.push((virt_sys::VIR_DOMAIN_SCHEDULER_EMULATOR_QUOTA, Value::LLong(NO_QUOTA)));
        }
        // Quota and period are one value: a quota for a period that is not the one in force is another cap.
        all.push((virt_sys::VIR_DOMAIN_SCHEDULER_GLOBAL_PERIOD, Value::ULLong(period)));
        all.push((virt_sys::VIR_DOMAIN_SCHEDULER_GLOBAL_QUOTA, Value::LLong(quota.unwrap_or(NO_QUOTA))));
        let flags = reach.flags();
        self.tune("set the CPU quota of", move |raw| ffi::set_scheduler_parameters(raw, &all, flags))
    }

    /// Takes every quota and period out of what libvirt keeps of it, of which `before` was read: there, 0 stands for none.
    ///
    /// # Errors
    /// When libvirt refuses.
    pub fn forget_cpu_quotas(&self, before: &Scheduler) -> Result<()> {
        if [before.global, before.per_vcpu, before.emulator].iter().all(|cap| *cap == (0, 0)) {
            return Ok(());
        }
        let all = [
            (virt_sys::VIR_DOMAIN_SCHEDULER_GLOBAL_QUOTA, Value::LLong(0)),
            (virt_sys::VIR_DOMAIN_SCHEDULER_GLOBAL_PERIOD, Value::ULLong(0)),
            (virt_sys::VIR_DOMAIN_SCHEDULER_VCPU_QUOTA, Value::LLong(0)),
            (virt_sys::VIR_DOMAIN_SCHEDULER_VCPU_PERIOD, Value::ULLong(0)),
            (virt_sys::VIR_DOMAIN_SCHEDULER_EMULATOR_QUOTA, Value::LLong(0)),
            (virt_sys::VIR_DOMAIN_SCHEDULER_EMULATOR_PERIOD, Value::ULLong(0)),
        ];
        let flags = Reach::Config.flags();
        self.tune("forget the CPU quota of", move |raw| ffi::set_scheduler_parameters(raw, &all, flags))
    }

    /// Reads and writes per second that `disk` (target or path) is limited to; 0 is unlimited.
    ///
    /// # Errors
    /// When libvirt cannot be asked.
    pub fn iops(&self, disk: &str, reach: Reach) -> Result<(u64, u64)> {
        let all = self.block_io_tune(disk, reach)?;
        let positive = |name: &CStr| u64::try_from(find(&all, name)).unwrap_or(0);
        // A limit of the sum holds for either.
        let total = positive(virt_sys::VIR_DOMAIN_BLOCK_IOTUNE_TOTAL_IOPS_SEC);
        let one = |name: &CStr| if total > 0 { total } else { positive(name) };
        Ok((
            one(virt_sys::VIR_DOMAIN_BLOCK_IOTUNE_READ_IOPS_SEC),
            one(virt_sys::VIR_DOMAIN_BLOCK_IOTUNE_WRITE_IOPS_SEC),
        ))
    }

    fn block_io_tune(&self, disk: &str, reach: Reach) -> Result<Vec<(String, i64)>> {
        let (disk, flags) = (c_string(disk)?, reach.read_flags());
        self.tune("read the disk tuning of", move |raw| ffi::block_io_tune(raw, &disk, flags))
    }

    /// Sets both: a call that names one of them would zero the other. Bursts above them go.
    ///
    /// # Errors
    /// When libvirt refuses.
    pub fn set_iops(&self, disk: &str, read: u64, write: u64, reach: Reach) -> Result<()> {
        let all = [
            (virt_sys::VIR_DOMAIN_BLOCK_IOTUNE_READ_IOPS_SEC, Value::ULLong(read)),
            (virt_sys::VIR_DOMAIN_BLOCK_IOTUNE_WRITE_IOPS_SEC, Value::ULLong(write)),
            (virt_sys::VIR_DOMAIN_BLOCK_IOTUNE_READ_IOPS_SEC_MAX, Value::ULLong(0)),
            (virt_sys::VIR_DOMAIN_BLOCK_IOTUNE_WRITE_IOPS_SEC_MAX, Value::ULLong(0)),
        ];
        let (disk, flags) = (c_string(disk)?, reach.flags());
        self.tune("limit the disk of", move |raw| ffi::set_block_io_tune(raw, &disk, &all, flags))
    }

    /// Takes every limit of the disk away, also those that this suite does not set. Nothing is done when it has none.
    ///
    /// # Errors
    /// When libvirt refuses.
    pub fn clear_block_io_tune(&self, disk: &str, reach: Reach) -> Result<()> {
        if self.block_io_tune(disk, reach)?.iter().all(|(_, value)| *value == 0) {
            return Ok(());
        }
        let all = [
            virt_sys::VIR_DOMAIN_BLOCK_IOTUNE_TOTAL_BYTES_SEC,
            virt_sys::VIR_DOMAIN_BLOCK_IOTUNE_READ_BYTES_SEC,
            virt_sys::VIR_DOMAIN_BLOCK_IOTUNE_WRITE_BYTES_SEC,
            virt_sys::VIR_DOMAIN_BLOCK_IOTUNE_TOTAL_IOPS_SEC,
            virt_sys::VIR_DOMAIN_BLOCK_IOTUNE_READ_IOPS_SEC,
            virt_sys::VIR_DOMAIN_BLOCK_IOTUNE_WRITE_IOPS_SEC,
            virt_sys::VIR_DOMAIN_BLOCK_IOTUNE_TOTAL_BYTES_SEC_MAX,
            virt_sys::VIR_DOMAIN_BLOCK_IOTUNE_READ_BYTES_SEC_MAX,
            virt_sys::VIR_DOMAIN_BLOCK_IOTUNE_WRITE_BYTES_SEC_MAX,
            virt_sys::VIR_DOMAIN_BLOCK_IOTUNE_TOTAL_IOPS_SEC_MAX,
            virt_sys::VIR_DOMAIN_BLOCK_IOTUNE_READ_IOPS_SEC_MAX,
            virt_sys::VIR_DOMAIN_BLOCK_IOTUNE_WRITE_IOPS_SEC_MAX,
            virt_sys::VIR_DOMAIN_BLOCK_IOTUNE_SIZE_IOPS_SEC,
        ]
        .map(|name| (name, Value::ULLong(0)));
        let (disk, flags) = (c_string(disk)?, reach.flags());
        self.tune("unlimit the disk of", move |raw| ffi::set_block_io_tune(raw, &disk, &all, flags))
    }

    /// Kilobytes per second that `interface` (its MAC address) is limited to, to the guest and from it; 0 is unlimited.
    ///
    /// # Errors
    /// When libvirt cannot be asked.
    pub fn bandwidth(&self, interface: &str, reach: Reach) -> Result<(u64, u64)> {
        let (interface, flags) = (c_string(interface)?, reach.read_flags());
        let all = self.tune("read the bandwidth of", move |raw| ffi::interface_parameters(raw, &interface, flags))?;
        let positive = |name: &CStr| u64::try_from(find(&all, name)).unwrap_or(0);
        Ok((positive(virt_sys::VIR_DOMAIN_BANDWIDTH_IN_AVERAGE), positive(virt_sys::VIR_DOMAIN_BANDWIDTH_OUT_AVERAGE)))
    }

    /// Limits one direction to `average` kilobytes per second, with a bucket of `burst` KiB where one is given; 0 takes
    /// the limit away. The other direction stays.
    ///
    /// # Errors
    /// When libvirt refuses; with a hint when the kernel lacks what it needs.
    pub fn set_bandwidth(
        &self,
        interface: &str,
        direction: Direction,
        average: u32,
        burst: Option<u32>,
        reach: Reach,
    ) -> Result<()> {
        let (average_name, burst_name) = match direction {
            Direction::In => (virt_sys::VIR_DOMAIN_BANDWIDTH_IN_AVERAGE, virt_sys::VIR_DOMAIN_BANDWIDTH_IN_BURST),
            Direction::Out => (virt_sys::VIR_DOMAIN_BANDWIDTH_OUT_AVERAGE, virt_sys::VIR_DOMAIN_BANDWIDTH_OUT_BURST),
        };
        let mut all = vec![(average_name, Value::UInt(average))];
        all.extend(burst.filter(|_| average > 0).map(|burst| (burst_name, Value::UInt(burst))));
        let (interface, flags) = (c_string(interface)?, reach.flags());
        self.tune("limit the bandwidth of", move |raw| ffi::set_interface_parameters(raw, &interface, &all, flags))
            .map_err(explain_traffic_control)
    }
}

fn find(all: &[(String, i64)], name: &CStr) -> i64 {
    all.iter().find(|(found, _)| found.as_bytes() == name.to_bytes()).map_or(0, |(_, value)| *value)
}

fn c_string(text: &str) -> Result<CString> {
    CString::new(text).map_err(|e| Error::new(ErrorKind::Invalid, "a device has a NUL in its name").because(e))
}

/// Says what to do when an error comes from `tc`, which libvirt runs for bandwidth: its own words name no module.
pub(super) fn explain_traffic_control(error: Error) -> Error {
    let from_tc = error.source.as_ref().is_some_and(|cause| {
        let text = cause.to_string();
        text.contains("tc qdisc") || text.contains("tc filter") || text.contains("tc class")
    });
    if from_tc { error.hint(traffic_control_hint()) } else { error }
}

/// Whether this host's kernel may lack something that bandwidth limits need.
#[must_use]
pub fn traffic_control_is_missing() -> bool {
    host_modules().is_none_or(|missing| !missing.is_empty())
}

fn host_modules() -> Option<Vec<&'static str>> {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").ok()?;
    missing_modules(&Path::new("/lib/modules").join(release.trim()), Path::new("/sys/module"))
}

/// Which kernel modules bandwidth limits need, and which of them this host has not.
#[must_use]
pub fn traffic_control_hint() -> String {
    let all = TRAFFIC_CONTROL_MODULES.join(", ");
    match host_modules() {
        Some(missing) if !missing.is_empty() => format!(
            "bandwidth limits need the kernel modules {all}; this host's kernel has no {}; a stock Debian kernel has all",
            missing.join(", ")
        ),
        Some(_) => format!("bandwidth limits need the kernel modules {all}; try: modprobe -a {}", all.replace(',', "")),
        None => format!("bandwidth limits need the kernel modules {all}; this host has none of its kernel's modules"),
    }
}

/// Those that are neither loaded nor to be had. `None`: there is no list of what the kernel has.
fn missing_modules(modules: &Path, loaded: &Path) -> Option<Vec<&'static str>> {
    let mut known = fs::read_to_string(modules.join("modules.dep")).ok()?;
    known += &fs::read_to_string(modules.join("modules.builtin")).unwrap_or_default();
    let has = |module: &str| loaded.join(module).exists() || known.contains(&format!("/{module}.ko"));
    Some(TRAFFIC_CONTROL_MODULES.into_iter().filter(|module| !has(module)).collect())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::libvirt::Cause;

    #[test]
    fn only_what_is_neither_loaded_built_in_nor_installed_is_missing() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(missing_modules(dir.path(), dir.path()), None);
        fs::write(dir.path().join("modules.dep"), "kernel/net/sched/sch_htb.ko.xz:\nkernel/net/sched/cls_u32.ko:\n")
            .unwrap();
        fs::write(dir.path().join("modules.builtin"), "kernel/net/sched/sch_ingress.ko\n").unwrap();
        fs::create_dir(dir.path().join("act_police")).unwrap();
        assert_eq!(missing_modules(dir.path(), dir.path()).unwrap(), ["sch_sfq", "cls_fw"]);
    }

    #[test]
    fn only_errors_of_tc_are_explained() {
        let error = |text: &str| {
            let cause = Cause { message: text.into(), code: 1 };
            explain_traffic_control(Error::new(ErrorKind::Hypervisor, "cannot").because(cause)).hint
        };
        let tc = "internal error: Child process (tc filter add dev vnet1 parent 1:0) unexpected exit status 2";
        assert!(error(tc).unwrap().contains("act_police"));
        assert_eq!(error("no interface found"), None);
    }
}
