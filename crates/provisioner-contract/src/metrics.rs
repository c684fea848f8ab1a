//! What `metrics` prints. The host monitor is a Go program with `int` fields: a `1.0` or a text where it has an
//! integer loses it the whole sample, so every key but one is an integer here.

use serde::{Serialize, Serializer};

/// The value of a key that is not available.
pub const UNKNOWN: i64 = -1;

/// What a VM is doing, in the monitor's words.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, schemars::JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum MetricsState {
    /// Its vCPUs run.
    Running,
    /// It has a QEMU process, but its vCPUs stand still.
    Paused,
    /// It is off.
    Stopped,
    /// Nobody could be asked in time.
    Unknown,
}

impl MetricsState {
    /// The word.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Stopped => "stopped",
            Self::Unknown => "unknown",
        }
    }

    /// The state of that word.
    #[must_use]
    pub fn from_word(word: &str) -> Option<Self> {
        [Self::Running, Self::Paused, Self::Stopped, Self::Unknown].into_iter().find(|state| state.as_str() == word)
    }
}

/// The metrics of one VM. Integers are [`UNKNOWN`] when not available; a rate is never negative otherwise. MB are
/// 2^20 bytes, as in the options of `create`.
#[derive(Debug, Clone, PartialEq, Serialize, schemars::JsonSchema)]
pub struct Metrics {
    /// 0 to 100 × `cpu_count`, since the previous sample.
    #[serde(serialize_with = "one_decimal")]
    pub cpu_percent: f64,
    /// vCPUs.
    pub cpu_count: i64,
    /// What the guest uses now and could not give away, in MB.
    pub memory_used_mb: i64,
    /// What is allocated to it, in MB.
    pub memory_total_mb: i64,
    /// Used in the guest's file systems, in MB.
    pub disk_used_mb: i64,
    /// Size of its disk, in MB.
    pub disk_total_mb: i64,
    /// Reads per second.
    pub disk_read_iops: i64,
    /// Writes per second.
    pub disk_write_iops: i64,
    /// Bytes read per second.
    pub disk_read_bytes_sec: i64,
    /// Bytes written per second.
    pub disk_write_bytes_sec: i64,
    /// Bytes the guest receives per second.
    pub net_rx_bytes_sec: i64,
    /// Bytes the guest sends per second.
    pub net_tx_bytes_sec: i64,
    /// Established TCP connections in the guest.
    pub net_connections: i64,
    /// Whether the guest agent answered when it was last asked, half a minute ago at most.
    pub guest_agent_responsive: bool,
    /// Seconds since the VM was started.
    pub uptime_seconds: i64,
    /// What it is doing.
    pub state: MetricsState,
}

fn one_decimal<S: Serializer>(value: &f64, serializer: S) -> Result<S::Ok, S::Error> {
    // JSON has no NaN and no infinity; what is not available is -1 here too.
    let rounded = (value * 10.0).round() / 10.0;
    serializer.serialize_f64(if rounded.is_finite() { rounded } else { -1.0 })
}

impl Metrics {
    /// Nothing but what it is doing is known.
    #[must_use]
    pub fn unknown(state: MetricsState) -> Self {
        Self {
            cpu_percent: -1.0,
            cpu_count: UNKNOWN,
            memory_used_mb: UNKNOWN,
            memory_total_mb: UNKNOWN,
            disk_used_mb: UNKNOWN,
            disk_total_mb: UNKNOWN,
            disk_read_iops: UNKNOWN,
            disk_write_iops: UNKNOWN,
            disk_read_bytes_sec: UNKNOWN,
            disk_write_bytes_sec: UNKNOWN,
            net_rx_bytes_sec: UNKNOWN,
            net_tx_bytes_sec: UNKNOWN,
            net_connections: UNKNOWN,
            guest_agent_responsive: false,
            uptime_seconds: UNKNOWN,
            state,
        }
    }

    /// The object on stdout, without the line end.
    #[must_use]
    pub fn json(&self) -> String {
        // Serialising numbers and words into memory cannot fail.
        serde_json::to_string(self).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_keys_their_order_and_their_types_are_those_of_the_contract() {
        let some = Metrics { cpu_percent: 12.345, cpu_count: 2, ..Metrics::unknown(MetricsState::Running) };
        assert_eq!(
            some.json(),
            concat!(
                r#"{"cpu_percent":12.3,"cpu_count":2,"memory_used_mb":-1,"memory_total_mb":-1,"disk_used_mb":-1,"#,
                r#""disk_total_mb":-1,"disk_read_iops":-1,"disk_write_iops":-1,"disk_read_bytes_sec":-1,"#,
                r#""disk_write_bytes_sec":-1,"net_rx_bytes_sec":-1,"net_tx_bytes_sec":-1,"net_connections":-1,"#,
                r#""guest_agent_responsive":false,"uptime_seconds":-1,"state":"running"}"#
            )
        );
    }

    #[test]
    fn what_is_no_number_is_not_printed() {
        for value in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
            let metrics = Metrics { cpu_percent: value, ..Metrics::unknown(MetricsState::Unknown) };
            assert!(metrics.json().starts_with(r#"{"cpu_percent":-1.0,"#), "{}", metrics.json());
        }
    }
}
