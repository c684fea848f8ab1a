//! One use case per command of the suite, for any front: nothing here prints, reads the environment
//! or ends the process. Settings and directories come in as values, progress goes out through
//! [`progress::Progress`], and every error carries what was being done and, where known, a hint.

mod access;
mod ascii;
pub mod bridge;
pub mod cancel;
pub mod child;
pub mod create;
pub mod database;
pub mod destroy;
pub mod doctor;
pub mod durable;
pub mod error;
pub mod failpoint;
pub mod gc;
pub mod gecos;
pub mod guest_exec;
pub mod host;
pub mod host_route;
pub mod journal;
pub mod libvirt;
pub mod limits;
pub mod lock;
pub mod metrics;
pub mod owner;
mod ownership;
pub mod paths;
pub mod power;
pub mod progress;
pub mod query;
mod ready;
mod recovery;
mod removal;
pub mod repair;
pub mod resume;
pub mod root_agent;
pub mod seed;
pub mod settings;
#[cfg(test)]
mod skipping;
pub mod template;
pub mod throttle;
pub mod tombstone;

pub use error::{Error, ErrorKind, Result};
