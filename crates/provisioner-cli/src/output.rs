//! Writing to stdout and stderr without dying of a closed pipe.

use std::io::{self, Write as _};

use clap::ValueEnum;

/// How a command prints its answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// Lines, for people.
    Text,
    /// One JSON value, for programs.
    Json,
}

/// Writes lines to stdout and flushes it.
///
/// # Errors
/// When stdout cannot be written: then the caller has not got its result, and the command must not say success.
pub fn stdout_lines<S: AsRef<str>>(lines: impl IntoIterator<Item = S>) -> io::Result<()> {
    let mut out = io::stdout().lock();
    for line in lines {
        writeln!(out, "{}", line.as_ref())?;
    }
    out.flush()
}

/// Writes one line to stderr. Line breaks and control characters in it, which may come from a guest or another
/// program, become blanks. A closed stderr is nobody's loss.
pub fn stderr_line(text: &str) {
    let clean: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    let _ = writeln!(io::stderr().lock(), "{clean}");
}
