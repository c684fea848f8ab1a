//! `blockhost-vm-status`
fn main() {}
