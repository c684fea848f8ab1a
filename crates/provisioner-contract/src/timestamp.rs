//! Points in time as the suite writes them: ISO 8601 in UTC with microseconds and `+00:00`.

use std::fmt;
use std::str::FromStr;

use jiff::civil::DateTime;
use jiff::{SignedDuration, tz::TimeZone};

/// A point in time, to the microsecond.
///
/// Written as `2026-11-21T01:31:49.000000+00:00`. Read from any ISO 8601 text with an offset or `Z`, and from one
/// without an offset, which Python's `utcnow().isoformat()` produces and which means UTC.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Timestamp(jiff::Timestamp);

/// A text that is no point in time.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not an ISO 8601 time")]
pub struct InvalidTimestamp(pub String);

impl Timestamp {
    /// The current time.
    #[must_use]
    pub fn now() -> Self {
        Self::from_jiff(jiff::Timestamp::now())
    }

    /// `time` without what is finer than a microsecond, so that writing and reading give the same value.
    #[must_use]
    pub fn from_jiff(time: jiff::Timestamp) -> Self {
        // Every jiff timestamp is inside the range of its own microseconds.
        Self(jiff::Timestamp::from_microsecond(time.as_microsecond()).unwrap_or(time))
    }

    /// The same point in time as jiff has it.
    #[must_use]
    pub fn as_jiff(self) -> jiff::Timestamp {
        self.0
    }

    /// This time and `days` times 24 hours; the end of the representable range when that lies beyond it.
    #[must_use]
    pub fn plus_days(self, days: u32) -> Self {
        let later = self.0.checked_add(SignedDuration::from_hours(i64::from(days) * 24));
        // The writers are Python programs whose years end at 9999, and so do jiff's.
        Self::from_jiff(later.unwrap_or(jiff::Timestamp::MAX))
    }

    /// The date in UTC, `YYYY-MM-DD`.
    #[must_use]
    pub fn date(self) -> String {
        self.0.strftime("%Y-%m-%d").to_string()
    }
}

impl fmt::Display for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0.strftime("%Y-%m-%dT%H:%M:%S%.6f+00:00"))
    }
}

impl FromStr for Timestamp {
    type Err = InvalidTimestamp;

    fn from_str(text: &str) -> Result<Self, InvalidTimestamp> {
        let refused = || InvalidTimestamp(text.chars().take(80).collect());
        let time = match text.parse::<jiff::Timestamp>() {
            Ok(time) => time.to_zoned(TimeZone::UTC),
            // Only a time without any offset is one here; a date alone would mean midnight by accident.
            Err(_) if text.contains(['T', 't', ' ']) => {
                let local: DateTime = text.parse().map_err(|_| refused())?;
                local.to_zoned(TimeZone::UTC).map_err(|_| refused())?
            }
            Err(_) => return Err(refused()),
        };
        // Before that Python has no years, and no four digits say which.
        if time.year() < 1 {
            return Err(refused());
        }
        Ok(Self::from_jiff(time.timestamp()))
    }
}

impl serde::Serialize for Timestamp {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> serde::Deserialize<'de> for Timestamp {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

impl schemars::JsonSchema for Timestamp {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Timestamp".into()
    }

    fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        schemars::json_schema!({"type": "string", "format": "date-time"})
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn always_six_digits_and_a_numeric_offset() {
        let time: Timestamp = "2026-11-21T01:31:49Z".parse().unwrap();
        assert_eq!(time.to_string(), "2026-11-21T01:31:49.000000+00:00");
        assert_eq!(time.date(), "2026-11-21");
    }

    #[test]
    fn every_spelling_of_one_moment_is_that_moment() {
        let expected: Timestamp = "2026-01-02T03:04:05.250000+00:00".parse().unwrap();
        for text in [
            "2026-01-02T03:04:05.25Z",
            "2026-01-02T04:04:05.250+01:00",
            "2026-01-02T03:04:05.250000",
            "2026-01-02 03:04:05.25",
        ] {
            assert_eq!(text.parse::<Timestamp>().unwrap(), expected, "{text}");
        }
    }

    #[test]
    fn texts_that_are_no_time_are_refused() {
        for text in [
            "",
            "never",
            "2026-01-02",
            "2026-13-01T00:00:00Z",
            "1763688709",
            "-001722-02-23T16:15:00Z",
            "0000-12-31T23:59:59",
        ] {
            assert!(text.parse::<Timestamp>().is_err(), "{text}");
        }
    }

    #[test]
    fn the_first_and_the_last_year_read_back() {
        for text in ["0001-01-01T00:00:00.000000+00:00", "9999-12-30T00:00:00.000000+00:00"] {
            assert_eq!(text.parse::<Timestamp>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn adding_days_stops_at_the_end_of_the_range() {
        let time: Timestamp = "2026-02-27T12:00:00Z".parse().unwrap();
        assert_eq!(time.plus_days(2).to_string(), "2026-03-01T12:00:00.000000+00:00");
        assert!(time.plus_days(u32::MAX).to_string().starts_with("9999-"));
    }

    proptest! {
        #[test]
        fn what_is_written_reads_back_as_itself(micros in 0i64..253_370_000_000_000_000) {
            let time = Timestamp::from_jiff(jiff::Timestamp::from_microsecond(micros).unwrap());
            let text = time.to_string();
            prop_assert_eq!(text.len(), "2026-11-21T01:31:49.000000+00:00".len());
            prop_assert_eq!(text.parse::<Timestamp>().unwrap(), time);
        }

        #[test]
        fn no_text_makes_reading_panic(text in ".{0,60}") {
            let _ = text.parse::<Timestamp>();
        }
    }
}
