//! What crosses a process border: names with their validation, the result and record formats, exit
//! codes. No input or output happens here.

pub mod exit;
pub mod gc;
pub mod manifest;
pub mod metrics;
pub mod names;
pub mod record;
pub mod result;
pub mod timestamp;

pub use gc::{GcEntry, GcKept, GcOutcome, GcPhase, GcReport};
pub use manifest::Manifest;
pub use metrics::{Metrics, MetricsState};
pub use names::{InvalidName, LoginName, NftId, VmName, WalletAddress};
pub use record::{InvalidRecord, NewRecord, Record, RecordStatus};
pub use result::{CreateResult, CreateStatus, ListRow, VmStatus};
pub use timestamp::{InvalidTimestamp, Timestamp};

/// The JSON Schemas of what the commands print and store, by the name of the type.
#[must_use]
pub fn schemas() -> Vec<(&'static str, serde_json::Value)> {
    vec![
        ("CreateResult", schemars::schema_for!(CreateResult).to_value()),
        ("GcReport", schemars::schema_for!(GcReport).to_value()),
        ("ListRow", schemars::schema_for!(ListRow).to_value()),
        ("Manifest", schemars::schema_for!(Manifest).to_value()),
        ("Metrics", schemars::schema_for!(Metrics).to_value()),
        ("Record", schemars::schema_for!(Record).to_value()),
    ]
}
