//! The shared sample: one small file per host with the raw counters of all VMs at two moments. Whoever finds it
//! younger than a second answers from it; nobody needs libvirt for that, and nothing here is linked with it.

pub mod clock;
pub mod openmetrics;
pub mod sample;
pub mod store;

/// The executable that takes the sample.
pub const SAMPLER: &str = "blockhost-metrics-sampler";
