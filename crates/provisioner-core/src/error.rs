//! The one error type of the library: a kind to decide by, one line for people, a hint, a cause.

use std::error::Error as StdError;

/// What a caller can decide by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorKind {
    /// An argument or a file from outside breaks its rule.
    Invalid,
    /// A setting is missing or of the wrong type.
    Config,
    /// The thing asked for does not exist.
    NotFound,
    /// The thing exists already, or is not what it must be for this act.
    Conflict,
    /// A pool has nothing left to give.
    Exhausted,
    /// Somebody else holds a lock and did not let go in time.
    Busy,
    /// The hypervisor, or another service, cannot be asked. It says nothing about what exists.
    Unavailable,
    /// Waited for something that did not happen in time.
    TimedOut,
    /// Asked to stop by a signal.
    Interrupted,
    /// A file or device refused.
    Io,
    /// libvirt or a guest answered with a failure.
    Hypervisor,
}

/// A failure: `message` says what failed on what, lower case and without a full stop; the cause is in `source`.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct Error {
    /// What to decide by.
    pub kind: ErrorKind,
    /// What failed, on what.
    pub message: String,
    /// What to do about it, where that is known.
    pub hint: Option<String>,
    /// The cause.
    #[source]
    pub source: Option<Box<dyn StdError + Send + Sync>>,
}

/// The library's result.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// An error of `kind` without cause or hint.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), hint: None, source: None }
    }

    /// The same with what to do about it.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// The same with its cause.
    #[must_use]
    pub fn because(mut self, source: impl Into<Box<dyn StdError + Send + Sync>>) -> Self {
        self.source = Some(source.into());
        self
    }

    /// The message with all its causes and the first hint, in one text: for a warning, or to be kept.
    #[must_use]
    pub fn in_full(&self) -> String {
        match self.parts() {
            (text, Some(hint)) => format!("{text} (hint: {hint})"),
            (text, None) => text,
        }
    }

    /// The message with all its causes, and the first hint.
    #[must_use]
    pub fn parts(&self) -> (String, Option<&str>) {
        let mut text = self.message.clone();
        let mut hint = self.hint.as_deref();
        let mut next = self.source();
        while let Some(cause) = next {
            text = format!("{text}: {cause}");
            hint = hint.or_else(|| cause.downcast_ref::<Self>()?.hint.as_deref());
            next = cause.source();
        }
        (text, hint)
    }

    /// Whether the cause is a file system without room, or a quota.
    #[must_use]
    pub fn is_disk_full(&self) -> bool {
        let io = self.source.as_ref().and_then(|cause| cause.downcast_ref::<std::io::Error>());
        io.is_some_and(|e| matches!(e.kind(), std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded))
    }

    /// A file operation that failed: `cannot <verb> <path>`.
    pub fn io(verb: &str, path: &std::path::Path, source: std::io::Error) -> Self {
        Self::new(ErrorKind::Io, format!("cannot {verb} {}", path.display())).because(source)
    }
}

impl From<provisioner_contract::InvalidName> for Error {
    fn from(invalid: provisioner_contract::InvalidName) -> Self {
        Self::new(ErrorKind::Invalid, invalid.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn in_full_there_are_all_causes_and_one_hint() {
        let inner = Error::new(ErrorKind::Io, "refused").hint("look there");
        let outer = Error::new(ErrorKind::Io, "cannot go").because(inner);
        assert_eq!(outer.in_full(), "cannot go: refused (hint: look there)");
        assert_eq!(
            Error::new(ErrorKind::Io, "no").because(outer).hint("x").in_full(),
            "no: cannot go: refused (hint: x)"
        );
    }
}
