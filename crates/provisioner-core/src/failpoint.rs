//! Named points at which a test build can be made to die, fail, stop or wait. Without the feature `failpoints`
//! every point is nothing.

/// Passes the point `name`, or does what a test has armed there.
///
/// # Errors
/// Only when a test asked for it.
#[cfg(not(feature = "failpoints"))]
#[inline]
pub fn hit(_name: &str) -> crate::Result<()> {
    Ok(())
}

/// A limit of time, or the one a test has set in its place.
#[cfg(not(feature = "failpoints"))]
#[inline]
pub fn limit(_name: &str, usual: std::time::Duration) -> std::time::Duration {
    usual
}

#[cfg(feature = "failpoints")]
pub use armed::{arm, hit, limit};

#[cfg(feature = "failpoints")]
mod armed {
    use std::sync::OnceLock;
    use std::thread;
    use std::time::Duration;

    use nix::sys::signal::{Signal, raise};

    use crate::{Error, ErrorKind, Result};

    static ARMED: OnceLock<Vec<(String, String)>> = OnceLock::new();

    /// Arms points, separated by `;`: `NAME=ACTION`, the action one of `kill` (SIGKILL), `term`, `int`, `hup` (the signal, twice), `error`, or
    /// `wait:FILE` (touch `FILE.reached`, go on when FILE exists). For a limit of time the action is its seconds.
    pub fn arm(spec: &str) {
        let points = spec.split(';').filter_map(|point| point.split_once('='));
        let _ = ARMED.set(points.map(|(name, action)| (name.to_owned(), action.to_owned())).collect());
    }

    /// Passes the point `name`, or does what is armed there.
    ///
    /// # Errors
    /// With the action `error`.
    pub fn hit(name: &str) -> Result<()> {
        let Some((_, action)) = ARMED.get().and_then(|all| all.iter().find(|(armed, _)| armed == name)) else {
            return Ok(());
        };
        match action.as_str() {
            "kill" => deliver(Signal::SIGKILL),
            "term" => deliver(Signal::SIGTERM),
            "int" => deliver(Signal::SIGINT),
            "hup" => deliver(Signal::SIGHUP),
            "error" => return Err(Error::new(ErrorKind::Io, format!("failure injected at {name}"))),
            other => {
                if let Some(file) = other.strip_prefix("wait:") {
                    let _ = std::fs::write(format!("{file}.reached"), name);
                    while !std::path::Path::new(file).exists() {
                        thread::sleep(Duration::from_millis(20));
                    }
                }
            }
        }
        Ok(())
    }

    /// A limit of time, or the one that is armed in its place.
    pub fn limit(name: &str, usual: Duration) -> Duration {
        let armed = ARMED.get().and_then(|all| all.iter().find(|(armed, _)| armed == name));
        armed.and_then(|(_, seconds)| seconds.parse().ok()).map_or(usual, Duration::from_secs)
    }

    /// The signal comes to a thread of its own; the point is passed only when it has had time to be seen.
    fn deliver(signal: Signal) {
        if signal == Signal::SIGKILL {
            let _ = raise(signal);
        } else {
            // Twice, as a service manager and a caller, or a closing terminal, send it.
            for _ in 0..2 {
                let _ = nix::sys::signal::kill(nix::unistd::Pid::this(), signal);
                thread::sleep(Duration::from_millis(100));
            }
        }
        thread::sleep(Duration::from_millis(100));
    }
}
