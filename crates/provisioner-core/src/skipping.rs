//! What a test lacks on this machine. It says so, and never passes without a word.

use std::io::{self, Write as _};

use crate::child;

/// Whether `program` is missing, so that the test that needs it is skipped, and says so past the test harness, which keeps what
/// passing tests print. Where `make test` has installed everything it is no reason to skip.
#[allow(clippy::panic)]
pub(crate) fn lacks(program: &str) -> bool {
    if child::find(program).is_some() {
        return false;
    }
    if std::env::var_os("BLOCKHOST_TEST_DIR").is_some() {
        panic!("{program} is missing: tests/host/setup installs what tests need");
    }
    let test = std::thread::current().name().unwrap_or("a test").to_owned();
    let _ = writeln!(io::stderr(), "skipped: {test}: {program} is missing");
    true
}
