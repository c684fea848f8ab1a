//! The time of samples: since boot, sleep included. No clock step moves it, and the boot's id tells it from that of
//! another boot.

use std::fs;
use std::io;

use nix::time::{ClockId, clock_gettime};

/// Nanoseconds since the host was booted, from the clock in which the kernel counts a process's start.
#[must_use]
pub fn now() -> u64 {
    clock_gettime(ClockId::CLOCK_BOOTTIME).map_or(0, |time| {
        let seconds = u64::try_from(time.tv_sec()).unwrap_or(0);
        seconds * 1_000_000_000 + u64::try_from(time.tv_nsec()).unwrap_or(0)
    })
}

/// The id of this boot.
///
/// # Errors
/// When `/proc` cannot be read.
pub fn boot_id() -> io::Result<String> {
    let mut text = fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
    text.truncate(text.trim_end().len());
    Ok(text)
}
