//! TERM, INT and HUP ask the command to stop and undo, however often they come: a service manager and a caller may both send
//! one, a closing terminal sends two. Undoing has limits of its own; who cannot wait has SIGKILL, after which the next command
//! for the VM undoes.

use std::thread;

use nix::sys::signal::{SigSet, Signal};
use provisioner_core::cancel::Cancel;

/// Blocks the signals in this thread, and so in all later ones, and waits for them in a thread of its own.
pub fn watch(cancel: Cancel) -> nix::Result<()> {
    let mut set = SigSet::empty();
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP] {
        set.add(signal);
    }
    set.thread_block()?;
    thread::Builder::new()
        .name("signals".into())
        .spawn(move || {
            while set.wait().is_ok() {
                cancel.cancel();
            }
        })
        .map(drop)
        .map_err(|_| nix::errno::Errno::EAGAIN)
}
