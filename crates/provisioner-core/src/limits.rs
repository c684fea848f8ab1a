//! Limits of a VM: their ranges, what a caller changes, what is in force, and the conversions between the contract's
//! units and libvirt's. No input or output.

use serde::Serialize;

use crate::{Error, ErrorKind, Result};

/// The scale of `--cpu-shares`: its default.
pub const DEFAULT_SHARES: u64 = 1024;
/// The default weight of a cgroup v2.
const DEFAULT_WEIGHT: u64 = 100;
/// Weights of cgroup v2 (kernel, `cgroup-v2.rst`), but for 1: libvirt refuses what is below the least share of version 1.
const WEIGHTS: std::ops::RangeInclusive<u64> = LEAST_SHARES..=10_000;
/// The least share of cgroup v1 (kernel, `MIN_SHARES`).
const LEAST_SHARES: u64 = 2;

/// The period a CPU quota counts in, in microseconds. One percent of one vCPU is then the least quota that kernel and
/// libvirt take, 1000.
pub const QUOTA_PERIOD: u64 = 100_000;
/// How cgroup v2 and libvirt spell "no quota".
const NO_QUOTA: i64 = 17_592_186_044_415;

/// 400 Gbit/s and a hundred million operations are beyond what a VM can do, and far inside libvirt's number types.
const MAX_KBPS: u64 = 400_000_000;
const MAX_IOPS: u64 = 100_000_000;

/// How much a policer lets through at once, as a time at the full rate: TCP does not reach a rate whose bursts are
/// all cut off.
const POLICER_BURST_MS: u64 = 100;
/// A guest with segmentation offload sends frames of up to 64 KiB; a policer with a smaller bucket drops each of them.
const LEAST_POLICER_BURST_KIB: u64 = 64;

/// Which limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Limit {
    /// Share of the CPU when it is contended; default 1024.
    CpuShares,
    /// Hard cap in percent of all the VM's vCPUs.
    CpuQuota,
    /// Reads of the disk per second.
    IopsRead,
    /// Writes to the disk per second.
    IopsWrite,
    /// To the guest, in kbit/s.
    BandwidthIn,
    /// From the guest, in kbit/s.
    BandwidthOut,
}

impl Limit {
    /// All, in the order they are shown in. Bandwidth, which depends on modules of the host's kernel, is applied last.
    pub const ALL: [Self; 6] =
        [Self::CpuShares, Self::CpuQuota, Self::IopsRead, Self::IopsWrite, Self::BandwidthIn, Self::BandwidthOut];

    /// The option's name without its dashes, which is also the attribute's in a domain's metadata.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::CpuShares => "cpu-shares",
            Self::CpuQuota => "cpu-quota",
            Self::BandwidthIn => "bandwidth-in",
            Self::BandwidthOut => "bandwidth-out",
            Self::IopsRead => "iops-read",
            Self::IopsWrite => "iops-write",
        }
    }

    /// The values it takes. 0, where allowed, is "unlimited".
    #[must_use]
    pub fn range(self) -> std::ops::RangeInclusive<u64> {
        match self {
            Self::CpuShares => 1..=10_000,
            Self::CpuQuota => 1..=100,
            Self::BandwidthIn | Self::BandwidthOut => 0..=MAX_KBPS,
            Self::IopsRead | Self::IopsWrite => 0..=MAX_IOPS,
        }
    }
}

/// Some or all limits: what a caller wants changed, or what a VM was created with. `None` is "not named", which is the
/// value in force for a change and the host's default for a creation.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    values: [Option<u64>; Limit::ALL.len()],
}

impl Limits {
    /// Reads each limit from `value`.
    pub fn new(mut value: impl FnMut(Limit) -> Option<u64>) -> Self {
        let mut limits = Self::default();
        for limit in Limit::ALL {
            limits.values[limit as usize] = value(limit);
        }
        limits
    }

    /// The value of one, if it is named.
    #[must_use]
    pub fn get(&self, limit: Limit) -> Option<u64> {
        self.values[limit as usize]
    }

    /// Those that are named.
    pub fn named(&self) -> impl Iterator<Item = (Limit, u64)> + '_ {
        Limit::ALL.into_iter().filter_map(|limit| Some((limit, self.get(limit)?)))
    }

    /// Whether none is named.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.named().next().is_none()
    }

    /// These, and where these name none, those of `other`.
    #[must_use]
    pub fn or(&self, other: &Self) -> Self {
        Self::new(|limit| self.get(limit).or_else(|| other.get(limit)))
    }

    /// Checks every value against its range.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] with the first that is out of its range.
    pub fn check(&self) -> Result<()> {
        for (limit, value) in self.named() {
            let range = limit.range();
            if !range.contains(&value) {
                let what = format!("{} of {value} is not between {} and {}", limit.name(), range.start(), range.end());
                return Err(Error::new(ErrorKind::Invalid, what));
            }
        }
        Ok(())
    }

    /// Whether bandwidth is limited, which needs traffic control in the host's kernel.
    #[must_use]
    pub fn limits_bandwidth(&self) -> bool {
        [Limit::BandwidthIn, Limit::BandwidthOut].into_iter().any(|limit| self.get(limit).is_some_and(|kbps| kbps > 0))
    }
}

/// What holds for a VM, as read back. In JSON: whole numbers; 0 is "unlimited" for bandwidth and operations, `null` for
/// the quota.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct InForce {
    /// Share of the CPU when it is contended, on the scale whose default is 1024.
    pub cpu_shares: u64,
    /// Hard cap in percent of all the VM's vCPUs.
    pub cpu_quota_percent: Option<u64>,
    /// To the guest, in kbit/s.
    pub bandwidth_in_kbps: u64,
    /// From the guest, in kbit/s.
    pub bandwidth_out_kbps: u64,
    /// Reads of the disk per second.
    pub iops_read: u64,
    /// Writes to the disk per second.
    pub iops_write: u64,
}

impl InForce {
    /// One limit as `name: value unit`, such as `cpu-quota: 50 %` or `iops-read: unlimited`.
    #[must_use]
    pub fn line(&self, limit: Limit) -> String {
        let or_unlimited = |value: u64, unit: &str| match value {
            0 => "unlimited".to_owned(),
            n => format!("{n}{unit}"),
        };
        let value = match limit {
            Limit::CpuShares => self.cpu_shares.to_string(),
            Limit::CpuQuota => self.cpu_quota_percent.map_or_else(|| "unlimited".into(), |n| format!("{n} %")),
            Limit::BandwidthIn => or_unlimited(self.bandwidth_in_kbps, " kbps"),
            Limit::BandwidthOut => or_unlimited(self.bandwidth_out_kbps, " kbps"),
            Limit::IopsRead => or_unlimited(self.iops_read, ""),
            Limit::IopsWrite => or_unlimited(self.iops_write, ""),
        };
        format!("{}: {value}", limit.name())
    }
}

/// Which control group version the host's CPU controller has. libvirt hands its number on as it is, and the scales
/// differ: the default is 1024 on the one and 100 on the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CpuController {
    /// `cpu.shares`.
    V1,
    /// `cpu.weight`.
    V2,
}

impl CpuController {
    /// What libvirt calls `cpu_shares`, for `shares` on the scale whose default is 1024.
    #[must_use]
    pub fn to_libvirt(self, shares: u64) -> u64 {
        match self {
            Self::V1 => shares.max(LEAST_SHARES),
            Self::V2 => ((shares * DEFAULT_WEIGHT + DEFAULT_SHARES / 2) / DEFAULT_SHARES)
                .clamp(*WEIGHTS.start(), *WEIGHTS.end()),
        }
    }

    /// The opposite.
    #[must_use]
    pub fn from_libvirt(self, number: u64) -> u64 {
        match self {
            Self::V1 => number,
            Self::V2 => number.saturating_mul(DEFAULT_SHARES).saturating_add(DEFAULT_WEIGHT / 2) / DEFAULT_WEIGHT,
        }
    }
}

/// The quota per [`QUOTA_PERIOD`] of the whole VM, in microseconds, that is `percent` of `vcpus`.
#[must_use]
pub fn quota(percent: u64, vcpus: u32) -> i64 {
    i64::try_from(QUOTA_PERIOD * percent * u64::from(vcpus) / 100).unwrap_or(NO_QUOTA)
}

/// The percentage of all `vcpus` that `quota` microseconds per `period` are, rounded to the nearest and at least 1.
/// `None`: no cap.
#[must_use]
pub fn quota_percent(quota: i64, period: u64, vcpus: u32) -> Option<u64> {
    let whole = period.saturating_mul(u64::from(vcpus));
    match u64::try_from(quota) {
        Ok(n @ 1..) if quota < NO_QUOTA && whole > 0 => {
            Some((n.saturating_mul(100).saturating_add(whole / 2) / whole).max(1))
        }
        _ => None,
    }
}

/// Kilobits per second as libvirt's kilobytes (1000 bytes) per second, rounded up: rounding down would make 7 kbps
/// 0, which is unlimited.
#[must_use]
pub fn kilobytes(kbps: u64) -> u32 {
    u32::try_from(kbps.div_ceil(8)).unwrap_or(u32::MAX)
}

/// The opposite.
#[must_use]
pub fn kbps(kilobytes: u64) -> u64 {
    kilobytes.saturating_mul(8)
}

/// The bucket of the policer for traffic from the guest, in libvirt's KiB, for a rate in kilobytes per second.
#[must_use]
pub fn policer_burst(kilobytes: u32) -> u32 {
    let bytes = u64::from(kilobytes) * POLICER_BURST_MS;
    u32::try_from(bytes.div_ceil(1024).max(LEAST_POLICER_BURST_KIB)).unwrap_or(u32::MAX)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_default_share_is_the_default_of_either_version() {
        assert_eq!(CpuController::V1.to_libvirt(1024), 1024);
        assert_eq!(CpuController::V2.to_libvirt(1024), 100);
        assert_eq!(CpuController::V2.from_libvirt(100), 1024);
        assert_eq!(CpuController::V2.to_libvirt(512), 50);
        assert_eq!(CpuController::V2.to_libvirt(256), 25);
        assert_eq!(CpuController::V2.to_libvirt(1), 2);
        assert_eq!(CpuController::V2.to_libvirt(10_000), 977);
        assert_eq!(CpuController::V1.to_libvirt(1), 2);
    }

    #[test]
    fn a_quota_is_of_all_vcpus() {
        assert_eq!(quota(50, 1), 50_000);
        assert_eq!(quota(50, 2), 100_000);
        assert_eq!(quota(1, 1), 1000);
        assert_eq!(quota_percent(100_000, 100_000, 2), Some(50));
        // Another period than ours.
        assert_eq!(quota_percent(500_000, 1_000_000, 1), Some(50));
        for none in [-1, 0, NO_QUOTA] {
            assert_eq!(quota_percent(none, 100_000, 2), None, "{none}");
        }
        assert_eq!(quota_percent(1000, 1_000_000, 4), Some(1));
    }

    #[test]
    fn no_small_bandwidth_is_unlimited() {
        assert_eq!((kilobytes(0), kilobytes(1), kilobytes(7), kilobytes(8), kilobytes(9)), (0, 1, 1, 1, 2));
        assert_eq!(kbps(125), 1000);
    }

    #[test]
    fn a_policer_has_room_for_a_whole_frame_and_a_tenth_of_a_second() {
        assert_eq!(policer_burst(1), 64);
        // 100 Mbit/s are 12 500 kB/s, of which a tenth of a second is 1250 kB.
        assert_eq!(policer_burst(12_500), 1221);
    }

    #[test]
    fn what_is_named_wins_over_what_was_there() {
        let old = Limits::new(|limit| (limit != Limit::IopsRead).then_some(5));
        let new = Limits::new(|limit| (limit == Limit::CpuQuota).then_some(9));
        let merged = new.or(&old);
        assert_eq!(merged.get(Limit::CpuQuota), Some(9));
        assert_eq!(merged.get(Limit::CpuShares), Some(5));
        assert_eq!(merged.get(Limit::IopsRead), None);
    }

    #[test]
    fn values_outside_their_range_are_refused_by_name() {
        for (limit, value) in [
            (Limit::CpuShares, 0),
            (Limit::CpuShares, 10_001),
            (Limit::CpuQuota, 0),
            (Limit::CpuQuota, 101),
            (Limit::BandwidthIn, MAX_KBPS + 1),
            (Limit::IopsWrite, MAX_IOPS + 1),
        ] {
            let error = Limits::new(|l| (l == limit).then_some(value)).check().unwrap_err();
            assert_eq!(error.kind, ErrorKind::Invalid);
            assert!(error.message.contains(limit.name()) && error.message.contains(&value.to_string()));
        }
        for limit in Limit::ALL {
            for value in [*limit.range().start(), *limit.range().end()] {
                Limits::new(|l| (l == limit).then_some(value)).check().unwrap();
            }
        }
    }

    proptest! {
        #[test]
        fn a_weight_survives_being_read_back(weight in 2_u64..=977) {
            let shares = CpuController::V2.from_libvirt(weight);
            prop_assert_eq!(CpuController::V2.to_libvirt(shares), weight);
        }

        #[test]
        fn a_greater_share_is_never_a_lesser_weight(a in 1_u64..=10_000, b in 1_u64..=10_000) {
            let (low, high) = (a.min(b), a.max(b));
            prop_assert!(CpuController::V2.to_libvirt(low) <= CpuController::V2.to_libvirt(high));
            prop_assert!(WEIGHTS.contains(&CpuController::V2.to_libvirt(low)));
        }

        #[test]
        fn a_quota_survives_being_read_back(percent in 1_u64..=100, vcpus in 1_u32..=255) {
            let quota = quota(percent, vcpus);
            prop_assert!(quota >= 1000);
            prop_assert_eq!(quota_percent(quota, QUOTA_PERIOD, vcpus), Some(percent));
        }

        #[test]
        fn a_bandwidth_is_never_less_and_at_most_seven_more(wanted in 1_u64..=MAX_KBPS) {
            let in_force = kbps(kilobytes(wanted).into());
            prop_assert!(in_force >= wanted && in_force < wanted + 8);
        }

        #[test]
        fn no_number_of_libvirts_panics(quota: i64, period: u64, vcpus: u32, number: u64) {
            let _ = quota_percent(quota, period, vcpus);
            let _ = CpuController::V2.from_libvirt(number);
            let _ = kbps(number);
        }
    }
}
