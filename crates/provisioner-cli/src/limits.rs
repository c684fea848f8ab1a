//! The options that limit a VM, shared by create and throttle.

use clap::Args;
use clap::builder::RangedU64ValueParser;
use provisioner_core::limits::{Limit, Limits};

fn values(limit: Limit) -> RangedU64ValueParser {
    RangedU64ValueParser::new().range(limit.range())
}

/// One option per limit.
#[derive(Args, Debug, Clone, Copy)]
#[command(next_help_heading = "Limits")]
pub struct LimitOptions {
    /// Share of the CPU when it is contended, 1 to 10000; 1024 is what every VM has.
    #[arg(long, value_name = "N", value_parser = values(Limit::CpuShares))]
    cpu_shares: Option<u64>,
    /// Hard cap in percent of all the VM's vCPUs, 1 to 100: at 50, 2 vCPUs use one CPU of the host.
    #[arg(long, value_name = "PERCENT", value_parser = values(Limit::CpuQuota))]
    cpu_quota: Option<u64>,
    /// Bandwidth to the VM in kbit/s (of 1000 bits); 0 is unlimited.
    #[arg(long, value_name = "KBPS", value_parser = values(Limit::BandwidthIn))]
    bandwidth_in: Option<u64>,
    /// Bandwidth from the VM in kbit/s; 0 is unlimited.
    #[arg(long, value_name = "KBPS", value_parser = values(Limit::BandwidthOut))]
    bandwidth_out: Option<u64>,
    /// Reads of the disk per second; 0 is unlimited.
    #[arg(long, value_name = "N", value_parser = values(Limit::IopsRead))]
    iops_read: Option<u64>,
    /// Writes to the disk per second; 0 is unlimited.
    #[arg(long, value_name = "N", value_parser = values(Limit::IopsWrite))]
    iops_write: Option<u64>,
}

impl LimitOptions {
    /// What is named.
    #[must_use]
    pub fn limits(self) -> Limits {
        Limits::new(|limit| match limit {
            Limit::CpuShares => self.cpu_shares,
            Limit::CpuQuota => self.cpu_quota,
            Limit::BandwidthIn => self.bandwidth_in,
            Limit::BandwidthOut => self.bandwidth_out,
            Limit::IopsRead => self.iops_read,
            Limit::IopsWrite => self.iops_write,
        })
    }
}
