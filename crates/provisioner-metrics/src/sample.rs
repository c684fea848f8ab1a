//! The sample file and what follows from it.
//!
//! Text, a line per VM, so that a reader finds its VM without reading the others:
//!
//! ```text
//! blockhost-samples 1 <boot id> <begun> <taken> <stale, partial or complete> <number of VMs>
//! <name> <state> <pid> <start> <vcpus> <memory total> <memory used> <disk total> <disk used> <connections> <agent> …
//! end <FNV-1a of all before, in hex>
//! ```
//!
//! `…` are four readings: the host's counters (CPU time, received, sent) now and before, the block counters (reads, writes,
//! bytes read, bytes written) now and before; each a time and its values, or only `-`. Times are nanoseconds since boot,
//! sizes bytes, and `-` is what is not known. Whatever breaks these rules is no sample at all: a damaged, truncated or
//! foreign file only costs a new sample.

use std::fmt::Write as _;

use provisioner_contract::metrics::UNKNOWN;
use provisioner_contract::{Metrics, MetricsState, VmName};

/// The format's name and version.
const MAGIC: &str = "blockhost-samples 1";

/// A sample this old, in nanoseconds, still answers. The monitor comes every 2 s at the earliest and its whole round
/// should be over in half a second.
pub const FRESH: u64 = 1_000_000_000;

/// Two readings closer than this make no rate worth printing: the older of them is kept instead.
const SHORTEST_INTERVAL: u64 = 500_000_000;

const NANOSECONDS: f64 = 1e9;
const MB: u64 = 1 << 20;

/// Counters at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reading<const N: usize> {
    /// When, in nanoseconds since boot.
    pub at: u64,
    /// The counters, as far as they could be read.
    pub values: [Option<u64>; N],
}

/// The latest reading and one before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Series<const N: usize> {
    /// Of this sample, if it could be read.
    pub now: Option<Reading<N>>,
    /// Of an earlier sample of the same run of the VM.
    pub before: Option<Reading<N>>,
}

impl<const N: usize> Default for Series<N> {
    fn default() -> Self {
        Self { now: None, before: None }
    }
}

impl<const N: usize> Series<N> {
    /// The series after another reading, or after one that could not be made.
    #[must_use]
    pub fn then(self, next: Option<Reading<N>>) -> Self {
        let before = match (next, self.now) {
            (Some(next), Some(now)) if next.at < now.at.saturating_add(SHORTEST_INTERVAL) => {
                self.before.or(Some(now)).filter(|before| before.at < next.at)
            }
            _ => self.now.or(self.before),
        };
        Self { now: next, before }
    }

    /// The increase per second of counter `index`. Without an earlier reading, or when the counter was reset, it is the
    /// average since `start`, which is true as well, and never negative or absurd.
    fn rate(&self, index: usize, start: Option<u64>) -> Option<f64> {
        let now = self.now?;
        let value = now.values[index]?;
        if let Some(before) = self.before
            && let Some(old) = before.values[index]
            && let (Some(grown), Some(time)) = (value.checked_sub(old), now.at.checked_sub(before.at))
            && time > 0
        {
            return Some(grown as f64 / time as f64 * NANOSECONDS);
        }
        // A second at least: what QEMU does in its first moments is no rate.
        let time = now.at.saturating_sub(start?).max(1_000_000_000);
        Some(value as f64 / time as f64 * NANOSECONDS)
    }
}

/// The run of a VM: its QEMU process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// Its PID.
    pub pid: u32,
    /// When it started, in nanoseconds since boot.
    pub start: u64,
}

/// One VM in a sample.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VmSample {
    /// Its name.
    pub name: VmName,
    /// What it is doing.
    pub state: MetricsState,
    /// Its process, if it has one and it was found.
    pub run: Option<Run>,
    /// vCPUs.
    pub vcpus: Option<u64>,
    /// Memory allocated, in bytes.
    pub memory_total: Option<u64>,
    /// Memory used, in bytes.
    pub memory_used: Option<u64>,
    /// Size of its disks, in bytes.
    pub disk_total: Option<u64>,
    /// Used in the guest's file systems, in bytes.
    pub disk_used: Option<u64>,
    /// Established connections in the guest.
    pub connections: Option<u64>,
    /// Whether the agent answered when it was last asked.
    pub agent: bool,
    /// CPU time in nanoseconds, bytes received by the guest, bytes sent by it.
    pub host: Series<3>,
    /// Reads, writes, bytes read, bytes written.
    pub block: Series<4>,
}

impl VmSample {
    /// A VM of which only its state is known.
    #[must_use]
    pub fn new(name: VmName, state: MetricsState) -> Self {
        Self {
            name,
            state,
            run: None,
            vcpus: None,
            memory_total: None,
            memory_used: None,
            disk_total: None,
            disk_used: None,
            connections: None,
            agent: false,
            host: Series::default(),
            block: Series::default(),
        }
    }

    /// What the command prints of it. `now` is the time, in nanoseconds since boot.
    #[must_use]
    pub fn metrics(&self, now: u64) -> Metrics {
        let int = |value: u64| i64::try_from(value).unwrap_or(i64::MAX);
        let known = |value: Option<u64>| value.map_or(UNKNOWN, int);
        let mb = |value: Option<u64>| known(value.map(|bytes| bytes / MB));
        let totals = Metrics {
            cpu_count: known(self.vcpus),
            memory_total_mb: mb(self.memory_total),
            disk_total_mb: mb(self.disk_total),
            ..Metrics::unknown(self.state)
        };
        match self.state {
            MetricsState::Unknown => return totals,
            MetricsState::Stopped => {
                // Off means that nothing is used and nothing moves; what its file systems hold is not known.
                return Metrics {
                    cpu_percent: if self.vcpus.is_some() { 0.0 } else { -1.0 },
                    memory_used_mb: 0,
                    disk_read_iops: 0,
                    disk_write_iops: 0,
                    disk_read_bytes_sec: 0,
                    disk_write_bytes_sec: 0,
                    net_rx_bytes_sec: 0,
                    net_tx_bytes_sec: 0,
                    net_connections: 0,
                    uptime_seconds: 0,
                    ..totals
                };
            }
            MetricsState::Running | MetricsState::Paused => {}
        }
        let start = self.run.map(|run| run.start);
        // Truncation saturates, and the rate is neither negative nor NaN.
        let rate = |rate: Option<f64>| rate.map_or(UNKNOWN, |rate| rate.round() as i64);
        let cpu = self.host.rate(0, start).zip(self.vcpus).map(|(rate, vcpus)| {
            let most = vcpus as f64 * 100.0;
            // The process also works for the guest outside its vCPUs, and the two readings are not quite of one moment.
            (rate / NANOSECONDS * 100.0).clamp(0.0, most)
        });
        Metrics {
            cpu_percent: cpu.unwrap_or(-1.0),
            memory_used_mb: mb(self.memory_used.map(|used| self.memory_total.map_or(used, |total| used.min(total)))),
            disk_used_mb: mb(self.disk_used),
            disk_read_iops: rate(self.block.rate(0, start)),
            disk_write_iops: rate(self.block.rate(1, start)),
            disk_read_bytes_sec: rate(self.block.rate(2, start)),
            disk_write_bytes_sec: rate(self.block.rate(3, start)),
            net_rx_bytes_sec: rate(self.host.rate(1, start)),
            net_tx_bytes_sec: rate(self.host.rate(2, start)),
            net_connections: known(self.connections),
            guest_agent_responsive: self.agent,
            uptime_seconds: known(start.map(|start| now.saturating_sub(start) / 1_000_000_000)),
            ..totals
        }
    }

    fn write(&self, out: &mut String) {
        let number = |out: &mut String, value: Option<u64>| {
            let _ = match value {
                Some(value) => write!(out, " {value}"),
                None => write!(out, " -"),
            };
        };
        let _ = write!(out, "{} {}", self.name, self.state.as_str());
        number(out, self.run.map(|run| run.pid.into()));
        number(out, self.run.map(|run| run.start));
        for value in [
            self.vcpus,
            self.memory_total,
            self.memory_used,
            self.disk_total,
            self.disk_used,
            self.connections,
            Some(self.agent.into()),
        ] {
            number(out, value);
        }
        fn reading<const N: usize>(out: &mut String, reading: Option<Reading<N>>) {
            let Some(reading) = reading else {
                out.push_str(" -");
                return;
            };
            let _ = write!(out, " {}", reading.at);
            for value in reading.values {
                let _ = match value {
                    Some(value) => write!(out, " {value}"),
                    None => write!(out, " -"),
                };
            }
        }
        reading(out, self.host.now);
        reading(out, self.host.before);
        reading(out, self.block.now);
        reading(out, self.block.before);
        out.push('\n');
    }

    fn parse(line: &str) -> Option<Self> {
        let mut words = line.split(' ');
        let name = VmName::new(words.next()?).ok()?;
        let state = MetricsState::from_word(words.next()?)?;
        let mut sample = Self::new(name, state);
        let pid = number(words.next()?)?;
        let start = number(words.next()?)?;
        sample.run = match (pid, start) {
            (Some(pid), Some(start)) => Some(Run { pid: u32::try_from(pid).ok()?, start }),
            (None, None) => None,
            _ => return None,
        };
        for field in [
            &mut sample.vcpus,
            &mut sample.memory_total,
            &mut sample.memory_used,
            &mut sample.disk_total,
            &mut sample.disk_used,
            &mut sample.connections,
        ] {
            *field = number(words.next()?)?;
        }
        sample.agent = match words.next()? {
            "0" => false,
            "1" => true,
            _ => return None,
        };
        fn reading<'a, const N: usize>(words: &mut impl Iterator<Item = &'a str>) -> Option<Option<Reading<N>>> {
            let Some(at) = number(words.next()?)? else { return Some(None) };
            let mut values = [None; N];
            for value in &mut values {
                *value = number(words.next()?)?;
            }
            Some(Some(Reading { at, values }))
        }
        sample.host = Series { now: reading(&mut words)?, before: reading(&mut words)? };
        sample.block = Series { now: reading(&mut words)?, before: reading(&mut words)? };
        words.next().is_none().then_some(sample)
    }
}

/// A number as we write it, or `-`. Nothing else: no sign, no blank, no leading zero.
fn number(word: &str) -> Option<Option<u64>> {
    if word == "-" {
        return Some(None);
    }
    let plain = word.bytes().all(|b| b.is_ascii_digit()) && (word == "0" || !word.starts_with('0'));
    if plain { word.parse().ok().map(Some) } else { None }
}

/// What a sample is good for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    /// Something has changed that it does not know yet. Its counters remain good as history.
    Stale,
    /// libvirt could not list the VMs in time: a VM that is missing may exist all the same.
    Partial,
    /// All VMs are in it.
    Complete,
}

impl Standing {
    const ALL: [Self; 3] = [Self::Stale, Self::Partial, Self::Complete];

    fn as_str(self) -> &'static str {
        match self {
            Self::Stale => "stale",
            Self::Partial => "partial",
            Self::Complete => "complete",
        }
    }
}

/// A checked sample file whose VMs are still text.
#[derive(Debug, Clone, Copy)]
pub struct Sample<'a> {
    /// When the taking of it began, in nanoseconds since boot: a VM that existed then is in it.
    pub begun: u64,
    /// When it was complete.
    pub taken: u64,
    /// What it is good for.
    pub standing: Standing,
    lines: &'a str,
}

impl<'a> Sample<'a> {
    /// Reads a sample of the boot `boot_id`. `now` is the time; a sample from the future is none.
    #[must_use]
    pub fn parse(text: &'a [u8], boot_id: &str, now: u64) -> Option<Self> {
        let text = std::str::from_utf8(text).ok()?;
        let body = &text[..text.strip_suffix('\n')?.rfind('\n')? + 1];
        let sum = text[body.len()..].strip_prefix("end ")?.strip_suffix('\n')?;
        let (head, lines) = body.split_once('\n')?;
        let mut words = head.strip_prefix(MAGIC)?.strip_prefix(' ')?.split(' ');
        if words.next()? != boot_id {
            return None;
        }
        let (begun, taken) = (number(words.next()?)??, number(words.next()?)??);
        let word = words.next()?;
        let standing = Standing::ALL.into_iter().find(|standing| standing.as_str() == word)?;
        let count = number(words.next()?)??;
        if words.next().is_some() || begun > taken || taken > now || format!("{:016x}", checksum(body)) != sum {
            return None;
        }
        (lines.bytes().filter(|b| *b == b'\n').count() as u64 == count).then_some(Self {
            begun,
            taken,
            standing,
            lines,
        })
    }

    /// Whether it may answer at `now`.
    #[must_use]
    pub fn is_fresh(&self, now: u64) -> bool {
        self.standing != Standing::Stale && now.saturating_sub(self.taken) <= FRESH
    }

    /// The VM called `name`. A line that cannot be read counts as none.
    #[must_use]
    pub fn vm(&self, name: &VmName) -> Option<VmSample> {
        let line =
            self.lines.lines().find(|line| line.strip_prefix(name.as_str()).is_some_and(|l| l.starts_with(' ')))?;
        VmSample::parse(line)
    }

    /// All VMs.
    pub fn vms(&self) -> impl Iterator<Item = VmSample> + use<'a> {
        self.lines.lines().filter_map(VmSample::parse)
    }
}

/// The text of a sample, ready to be stored or sent.
#[must_use]
pub fn write(boot_id: &str, begun: u64, taken: u64, standing: Standing, vms: &[VmSample]) -> String {
    let mut out = String::with_capacity(200 * (vms.len() + 1));
    let _ = writeln!(out, "{MAGIC} {boot_id} {begun} {taken} {} {}", standing.as_str(), vms.len());
    for vm in vms {
        vm.write(&mut out);
    }
    let sum = checksum(&out);
    let _ = writeln!(out, "end {sum:016x}");
    out
}

/// FNV-1a. Against accidents, not against attackers, who could write the sum as well.
fn checksum(text: &str) -> u64 {
    text.bytes().fold(0xcbf2_9ce4_8422_2325, |sum, byte| (sum ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SECOND: u64 = 1_000_000_000;

    fn name(text: &str) -> VmName {
        VmName::new(text).unwrap()
    }

    fn vm() -> VmSample {
        VmSample {
            run: Some(Run { pid: 42, start: 90 * SECOND }),
            vcpus: Some(2),
            memory_total: Some(2048 * MB),
            memory_used: Some(300 * MB),
            disk_total: Some(20 * 1024 * MB),
            disk_used: Some(1024 * MB),
            connections: Some(3),
            agent: true,
            host: Series {
                now: Some(Reading { at: 102 * SECOND, values: [Some(5 * SECOND), Some(3000), None] }),
                before: Some(Reading { at: 100 * SECOND, values: [Some(3 * SECOND), Some(1000), None] }),
            },
            block: Series {
                now: Some(Reading { at: 102 * SECOND, values: [Some(20), Some(40), Some(8192), Some(4096)] }),
                before: None,
            },
            ..VmSample::new(name("web1"), MetricsState::Running)
        }
    }

    #[test]
    fn two_readings_make_a_rate_and_one_makes_an_average_since_the_start() {
        let metrics = vm().metrics(103 * SECOND + 1);
        assert_eq!(metrics.cpu_percent, 100.0);
        assert_eq!((metrics.net_rx_bytes_sec, metrics.net_tx_bytes_sec), (1000, UNKNOWN));
        assert_eq!((metrics.disk_read_iops, metrics.disk_write_iops), (2, 3));
        assert_eq!((metrics.memory_used_mb, metrics.memory_total_mb), (300, 2048));
        assert_eq!((metrics.disk_used_mb, metrics.disk_total_mb), (1024, 20 * 1024));
        assert_eq!((metrics.uptime_seconds, metrics.net_connections), (13, 3));
    }

    #[test]
    fn a_counter_that_was_reset_makes_no_negative_rate() {
        let mut vm = vm();
        vm.host.before.as_mut().unwrap().values = [Some(u64::MAX), Some(u64::MAX), Some(5)];
        let metrics = vm.metrics(103 * SECOND);
        assert!((0.0..=200.0).contains(&metrics.cpu_percent));
        assert_eq!(metrics.net_rx_bytes_sec, 250);
    }

    #[test]
    fn a_stopped_vm_has_its_totals_and_an_unknown_one_too() {
        let stopped = VmSample { state: MetricsState::Stopped, ..vm() }.metrics(0);
        assert_eq!((stopped.cpu_percent, stopped.uptime_seconds, stopped.disk_write_iops), (0.0, 0, 0));
        assert_eq!((stopped.cpu_count, stopped.memory_total_mb, stopped.disk_total_mb), (2, 2048, 20 * 1024));
        let unknown = VmSample { state: MetricsState::Unknown, ..vm() }.metrics(0);
        assert_eq!((unknown.cpu_percent, unknown.cpu_count, unknown.disk_write_iops), (-1.0, 2, UNKNOWN));
    }

    #[test]
    fn readings_too_close_together_keep_the_older_one() {
        let at = |at| Some(Reading { at, values: [Some(at)] });
        let first = Series::default().then(at(SECOND));
        assert_eq!(first, Series { now: at(SECOND), before: None });
        let close = first.then(at(SECOND + 1000));
        assert_eq!(close, Series { now: at(SECOND + 1000), before: at(SECOND) });
        let closer = close.then(at(SECOND + 2000));
        assert_eq!(closer.before, at(SECOND));
        assert_eq!(closer.then(at(3 * SECOND)).before, at(SECOND + 2000));
        // A reading that failed loses neither the one before nor the next rate.
        let failed = closer.then(None);
        assert_eq!(failed, Series { now: None, before: at(SECOND + 2000) });
        assert_eq!(failed.then(at(3 * SECOND)).before, at(SECOND + 2000));
    }

    #[test]
    fn a_vm_is_found_by_its_whole_name() {
        let others = [VmSample::new(name("web10"), MetricsState::Stopped), vm()];
        let text = write("boot", 1, 2, Standing::Complete, &others);
        let sample = Sample::parse(text.as_bytes(), "boot", 2).unwrap();
        assert_eq!(sample.vm(&name("web1")), Some(vm()));
        assert_eq!(sample.vm(&name("web")), None);
        assert_eq!(sample.vms().collect::<Vec<_>>(), others);
    }

    #[test]
    fn another_boot_the_future_and_an_invalidated_sample_do_not_answer() {
        let text = write("boot", 5, 10, Standing::Complete, &[]);
        assert!(Sample::parse(text.as_bytes(), "other", 10).is_none());
        assert!(Sample::parse(text.as_bytes(), "boot", 9).is_none());
        assert!(Sample::parse(text.as_bytes(), "boot", 10).unwrap().is_fresh(10 + FRESH));
        assert!(!Sample::parse(text.as_bytes(), "boot", 20).unwrap().is_fresh(11 + FRESH));
        let text = write("boot", 5, 10, Standing::Stale, &[]);
        assert!(!Sample::parse(text.as_bytes(), "boot", 10).unwrap().is_fresh(10));
    }

    fn value() -> impl Strategy<Value = Option<u64>> {
        proptest::option::of(prop_oneof![0..10_000_u64, any::<u64>()])
    }

    fn series<const N: usize>() -> impl Strategy<Value = Series<N>> {
        let reading = || {
            proptest::option::of((any::<u64>(), proptest::array::uniform::<_, N>(value())))
                .prop_map(|reading| reading.map(|(at, values)| Reading { at, values }))
        };
        (reading(), reading()).prop_map(|(now, before)| Series { now, before })
    }

    prop_compose! {
        fn any_vm()(
            name in "[A-Za-z0-9][A-Za-z0-9._-]{0,63}",
            state in 0..4_usize,
            run in proptest::option::of((any::<u32>(), any::<u64>())),
            values in proptest::array::uniform6(value()),
            agent: bool,
            host in series::<3>(),
            block in series::<4>(),
        ) -> VmSample {
            let state = [MetricsState::Running, MetricsState::Paused, MetricsState::Stopped, MetricsState::Unknown][state];
            let [vcpus, memory_total, memory_used, disk_total, disk_used, connections] = values;
            VmSample { run: run.map(|(pid, start)| Run { pid, start }), vcpus, memory_total, memory_used, disk_total,
                disk_used, connections, agent, host, block, ..VmSample::new(self::name(&name), state) }
        }
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_back(vms in proptest::collection::vec(any_vm(), 0..5)) {
            let text = write("boot", 1, 2, Standing::Complete, &vms);
            let sample = Sample::parse(text.as_bytes(), "boot", 2).unwrap();
            prop_assert_eq!(sample.vms().collect::<Vec<_>>(), vms);
        }

        #[test]
        fn whatever_the_counters_say_the_printed_values_are_sane(vm in any_vm(), now: u64) {
            let metrics = vm.metrics(now);
            if let Some(vcpus) = vm.vcpus {
                prop_assert!(metrics.cpu_percent <= vcpus as f64 * 100.0);
            }
            prop_assert!(metrics.cpu_percent >= 0.0 || metrics.cpu_percent == -1.0);
            let json: serde_json::Value = serde_json::from_str(&metrics.json()).unwrap();
            let object = json.as_object().unwrap();
            prop_assert_eq!(object.len(), 16);
            for (key, value) in object {
                if let serde_json::Value::Number(number) = value && key != "cpu_percent" {
                    prop_assert!(number.as_i64().is_some_and(|n| n >= -1), "{}: {}", key, number);
                }
            }
        }

        #[test]
        fn a_damaged_sample_is_no_sample(vms in proptest::collection::vec(any_vm(), 0..4), at: prop::sample::Index, flip in 1..=255_u8) {
            let text = write("boot", 1, 2, Standing::Complete, &vms).into_bytes();
            let at = at.index(text.len());
            prop_assert!(Sample::parse(&text[..at], "boot", 2).is_none());
            let mut damaged = text.clone();
            damaged[at] ^= flip;
            prop_assert!(Sample::parse(&damaged, "boot", 2).is_none());
        }

        #[test]
        fn no_bytes_make_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300), line in ".{0,200}") {
            let _ = Sample::parse(&bytes, "boot", 2);
            let _ = VmSample::parse(&line);
        }
    }
}
