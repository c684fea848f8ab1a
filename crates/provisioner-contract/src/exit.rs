//! The exit codes of the commands. `status` and `list` always exit with [`SUCCESS`]; `guest-exec` passes the guest's.

/// Done, or nothing to do.
pub const SUCCESS: u8 = 0;
/// It failed; the reason is the last line on stderr.
pub const FAILURE: u8 = 1;
/// The arguments make no sense; nothing was tried.
pub const USAGE: u8 = 2;
