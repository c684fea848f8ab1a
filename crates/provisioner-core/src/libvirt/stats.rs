//! Counters of many domains in one round trip.

use virt_sys::{VIR_CONNECT_GET_ALL_DOMAINS_STATS_NOWAIT, VIR_DOMAIN_STATS_BALLOON, VIR_DOMAIN_STATS_BLOCK};

use super::ffi::{self, Record, Statistic};
use super::{Domain, failure};
use crate::Result;

/// What QEMU counts for one domain.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct DomainStats {
    /// The domain's name.
    pub name: String,
    /// Reads, writes, bytes read, bytes written, of all its disks; absent when QEMU could not be asked.
    pub block: Option<[u64; 4]>,
    /// Size of each disk in bytes, by its target's name.
    pub capacity: Vec<(String, u64)>,
    /// What the guest uses of its memory, in bytes, as its balloon driver reports; absent when not asked for, or when the
    /// guest has not reported.
    pub memory_used: Option<u64>,
}

/// Asks for the counters of `domains`, which must be of one connection. Enters the monitors of those that run, so it can
/// hang. With `wait` a domain that is busy with another call is waited for, else it comes without counters. `balloon` asks for
/// memory as well.
///
/// # Errors
/// When libvirt cannot be asked.
pub fn stats(domains: &[Domain], balloon: bool, wait: bool) -> Result<Vec<DomainStats>> {
    let raw: Vec<_> = domains.iter().map(Domain::raw).collect();
    let groups = VIR_DOMAIN_STATS_BLOCK | if balloon { VIR_DOMAIN_STATS_BALLOON } else { 0 };
    let flags = if wait { 0 } else { VIR_CONNECT_GET_ALL_DOMAINS_STATS_NOWAIT };
    let records =
        ffi::stats(&raw, groups, flags).map_err(|e| failure("cannot ask for the counters of the domains", &e))?;
    Ok(records.into_iter().map(read).collect())
}

fn read((name, fields): Record) -> DomainStats {
    let find = |field: &str| fields.iter().find(|(name, _)| name == field).map(|(_, value)| value);
    let number = |field: &str| match find(field) {
        Some(Statistic::Number(number)) => Some(*number),
        _ => None,
    };
    let mut stats = DomainStats { name, ..DomainStats::default() };
    for index in 0..number("block.count").unwrap_or(0).min(256) {
        let of_disk = |field: &str| number(&format!("block.{index}.{field}"));
        let counters = ["rd.reqs", "wr.reqs", "rd.bytes", "wr.bytes"].map(of_disk);
        if let [Some(reads), Some(writes), Some(read), Some(written)] = counters {
            let sum = stats.block.get_or_insert([0; 4]);
            for (total, value) in sum.iter_mut().zip([reads, writes, read, written]) {
                *total = total.saturating_add(value);
            }
        }
        if let (Some(Statistic::Text(target)), Some(capacity)) =
            (find(&format!("block.{index}.name")), of_disk("capacity"))
        {
            stats.capacity.push((target.clone(), capacity));
        }
    }
    // Page cache that the guest would give away is not used; guests without that figure say only what is free.
    let free = number("balloon.usable").or_else(|| number("balloon.unused"));
    if let (Some(available), Some(free)) = (number("balloon.available"), free)
        && available > 0
    {
        stats.memory_used = Some(available.saturating_sub(free).saturating_mul(1024));
    }
    stats
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(fields: &[(&str, u64)], names: &[(&str, &str)]) -> Record {
        let numbers = fields.iter().map(|(field, value)| ((*field).to_owned(), Statistic::Number(*value)));
        let texts = names.iter().map(|(field, value)| ((*field).to_owned(), Statistic::Text((*value).to_owned())));
        ("web1".to_owned(), numbers.chain(texts).collect())
    }

    #[test]
    fn disks_are_summed_and_a_busy_domain_has_no_counters() {
        let read = read(record(
            &[
                ("block.count", 2),
                ("block.0.rd.reqs", 1),
                ("block.0.wr.reqs", 2),
                ("block.0.rd.bytes", 3),
                ("block.0.wr.bytes", 4),
                ("block.0.capacity", 1000),
                ("block.1.rd.reqs", 10),
                ("block.1.wr.reqs", 0),
                ("block.1.rd.bytes", 30),
                ("block.1.wr.bytes", 0),
            ],
            &[("block.0.name", "vda"), ("block.1.name", "vdb")],
        ));
        assert_eq!(read.block, Some([11, 2, 33, 4]));
        assert_eq!(read.capacity, [("vda".to_owned(), 1000)]);
        assert_eq!(super::read(record(&[("block.count", 1)], &[("block.0.name", "vda")])).block, None);
    }

    #[test]
    fn memory_in_use_is_what_could_not_be_given_away() {
        let used = |fields: &[(&str, u64)]| read(record(fields, &[])).memory_used;
        assert_eq!(
            used(&[("balloon.available", 100), ("balloon.unused", 10), ("balloon.usable", 60)]),
            Some(40 * 1024)
        );
        assert_eq!(used(&[("balloon.available", 100), ("balloon.unused", 10)]), Some(90 * 1024));
        assert_eq!(used(&[("balloon.available", 100), ("balloon.usable", 160)]), Some(0));
        assert_eq!(used(&[("balloon.maximum", 100)]), None);
    }
}
