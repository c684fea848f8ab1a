//! Calls that may never come back, such as any that enters the monitor of a frozen QEMU.

use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use crate::cancel::Cancel;
use crate::{Error, ErrorKind, Result};

/// Between two looks whether a stop was asked for.
const SLICE: Duration = Duration::from_millis(50);

/// Runs `call` in a thread of its own and waits at most `limit` for it.
///
/// When the time is over the thread is abandoned: it ends with the process. What it was asked may or may not
/// happen still.
///
/// # Errors
/// [`ErrorKind::Unavailable`] `{what}: no answer within … s` when the time is over.
pub fn bounded<T: Send + 'static>(limit: Duration, what: &str, call: impl FnOnce() -> T + Send + 'static) -> Result<T> {
    interruptible(limit, &Cancel::default(), call)?.ok_or_else(|| {
        Error::new(ErrorKind::Unavailable, format!("{what}: no answer within {} s", limit.as_secs_f64()))
            .hint("libvirtd or the VM's QEMU process hangs")
    })
}

/// The same, given up as soon as a stop is asked for too. `None` when the time is over.
///
/// # Errors
/// [`ErrorKind::Interrupted`]; [`ErrorKind::Io`] when there is no thread to be had.
pub fn interruptible<T: Send + 'static>(
    limit: Duration,
    cancel: &Cancel,
    call: impl FnOnce() -> T + Send + 'static,
) -> Result<Option<T>> {
    let (send, receive) = mpsc::sync_channel(1);
    let thread = thread::Builder::new()
        .name("libvirt".into())
        .spawn(move || {
            // The receiver is gone when the caller has given up: then nobody wants the answer.
            let _ = send.send(call());
        })
        .map_err(|e| Error::new(ErrorKind::Io, "cannot start a thread").because(e))?;
    let end = Instant::now() + limit;
    let answer = loop {
        let left = end.saturating_duration_since(Instant::now());
        match receive.recv_timeout(left.min(SLICE)) {
            Ok(answer) => break answer,
            Err(RecvTimeoutError::Timeout) if !left.is_zero() => cancel.check()?,
            Err(_) => return Ok(None),
        }
    };
    // It has nothing left to do but free what the C libraries keep per thread. That must not happen while the process
    // already ends and these libraries free what they share.
    let _ = thread.join();
    Ok(Some(answer))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_in_time_is_returned_and_a_late_one_is_an_error() {
        assert_eq!(bounded(Duration::from_secs(5), "asking", || 7).ok(), Some(7));
        let error = bounded(Duration::from_millis(20), "asking", || thread::sleep(Duration::from_secs(60)));
        assert_eq!(error.map_err(|e| e.kind), Err(ErrorKind::Unavailable));
    }

    #[test]
    fn a_stop_ends_the_waiting_at_once() {
        let (cancel, begin) = (Cancel::default(), Instant::now());
        let stop = cancel.clone();
        thread::spawn(move || {
            thread::sleep(Duration::from_millis(100));
            stop.cancel();
        });
        let error = interruptible(Duration::from_secs(60), &cancel, || thread::sleep(Duration::from_secs(60)));
        assert_eq!(error.map_err(|e| e.kind), Err(ErrorKind::Interrupted));
        assert!(begin.elapsed() < Duration::from_secs(20));
    }
}
