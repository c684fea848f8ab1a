//! Calls that may never come back, such as any that enters the monitor of a frozen QEMU.

use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use crate::{Error, ErrorKind, Result};

/// Runs `call` in a thread of its own and waits at most `limit` for it.
///
/// When the time is over the thread is abandoned: it ends with the process. What it was asked may or may not
/// happen still.
///
/// # Errors
/// [`ErrorKind::Unavailable`] `{what}: no answer within … s` when the time is over.
pub fn bounded<T: Send + 'static>(limit: Duration, what: &str, call: impl FnOnce() -> T + Send + 'static) -> Result<T> {
    let (send, receive) = mpsc::sync_channel(1);
    let thread = thread::Builder::new()
        .name("libvirt".into())
        .spawn(move || {
            // The receiver is gone when the caller has given up: then nobody wants the answer.
            let _ = send.send(call());
        })
        .map_err(|e| Error::new(ErrorKind::Io, "cannot start a thread").because(e))?;
    let answer = receive.recv_timeout(limit).map_err(|_| {
        Error::new(ErrorKind::Unavailable, format!("{what}: no answer within {} s", limit.as_secs_f64()))
            .hint("libvirtd or the VM's QEMU process hangs")
    })?;
    // It has nothing left to do but free what the C libraries keep per thread. That must not happen while the process
    // already ends and these libraries free what they share.
    let _ = thread.join();
    Ok(answer)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_in_time_is_returned_and_a_late_one_is_an_error() {
        assert_eq!(bounded(Duration::from_secs(5), "asking", || 7).ok(), Some(7));
        let error = bounded(Duration::from_millis(20), "asking", || thread::sleep(Duration::from_secs(2)));
        assert_eq!(error.map_err(|e| e.kind), Err(ErrorKind::Unavailable));
    }
}
