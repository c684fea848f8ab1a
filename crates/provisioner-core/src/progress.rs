//! How a use case tells its caller what it is doing. The library never writes to a terminal itself.

/// Where progress goes. All methods may be called from any thread.
pub trait Progress: Send + Sync {
    /// A new phase begins, and with it the one before has ended. `what` reads like `waiting for the guest agent`.
    fn phase(&self, what: &str);
    /// How far the running phase is, in bytes. `total` is `None` while it is unknown.
    fn bytes(&self, done: u64, total: Option<u64>);
    /// Something worth knowing, in one line.
    fn note(&self, text: &str);
    /// Something that should not be as it is, in one line.
    fn warn(&self, text: &str);
    /// Nothing more comes; the last phase has ended.
    fn end(&self) {}
}

/// Progress that goes nowhere.
#[derive(Debug, Clone, Copy, Default)]
pub struct Silent;

impl Progress for Silent {
    fn phase(&self, _what: &str) {}
    fn bytes(&self, _done: u64, _total: Option<u64>) {}
    fn note(&self, _text: &str) {}
    fn warn(&self, _text: &str) {}
}
