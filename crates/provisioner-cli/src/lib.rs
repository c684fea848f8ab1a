//! The shared bootstrap of the commands: where files are, signals, logging, progress on stderr, the one place
//! that prints an error, exit codes. The binaries in `src/bin` are arguments, one call into the core, output.

pub mod limits;
pub mod output;
mod progress;
mod signals;

use std::ffi::OsString;
use std::fmt::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use clap::error::{ContextKind, ContextValue};
use provisioner_contract::{InvalidName, exit};
use provisioner_core::cancel::Cancel;
use provisioner_core::host::Host;
use provisioner_core::paths::Directories;
use provisioner_core::progress::Progress;
use provisioner_core::settings::Settings;
use tracing_subscriber::EnvFilter;

pub use output::Format;
pub use progress::{Plain, StderrProgress};

/// libvirt's URI must be named: a client that is not root otherwise lands in `qemu:///session`.
const DEFAULT_URI: &str = "qemu:///system";

/// `main` of a command whose `work` needs its arguments and nothing else.
#[must_use]
pub fn main<A: clap::Parser>(name: &'static str, work: impl FnOnce(&Command, A) -> anyhow::Result<()>) -> ExitCode {
    let command = Command::new(name);
    match command.arguments() {
        Ok(arguments) => command.run(|command| work(command, arguments)),
        Err(code) => code,
    }
}

/// What every command has before it does anything.
pub struct Command {
    name: &'static str,
    dirs: Directories,
    uri: String,
    progress: Arc<dyn Progress>,
    cancel: Cancel,
}

impl Command {
    /// Sets up logging to stderr (`RUST_LOG`) and signals. Called first in `main`, while there is one thread.
    #[must_use]
    pub fn new(name: &'static str) -> Self {
        Self::with_progress(name, |progress| progress)
    }

    /// The same, for a command that wraps or replaces the progress on stderr.
    #[must_use]
    pub fn with_progress(name: &'static str, wrap: impl FnOnce(Arc<dyn Progress>) -> Arc<dyn Progress>) -> Self {
        let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("warn"));
        let subscriber =
            tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(false).finish();
        // Fails only when there is one already.
        let _ = tracing::subscriber::set_global_default(subscriber);
        let cancel = Cancel::default();
        if let Err(error) = signals::watch(cancel.clone()) {
            tracing::warn!("signals end this command at once: {error}");
        }
        #[cfg(feature = "failpoints")]
        if let Some(spec) = std::env::var_os("BLOCKHOST_FAILPOINT") {
            provisioner_core::failpoint::arm(&spec.to_string_lossy());
        }
        Self { name, dirs: directories(), uri: uri(), progress: wrap(Arc::new(StderrProgress::new(name))), cancel }
    }

    /// Where progress goes.
    #[must_use]
    pub fn progress(&self) -> &Arc<dyn Progress> {
        &self.progress
    }

    /// libvirt's URI.
    #[must_use]
    pub fn uri(&self) -> &str {
        &self.uri
    }

    /// The host with its settings.
    ///
    /// # Errors
    /// When a configuration file cannot be read or is wrong.
    pub fn host(&self) -> anyhow::Result<Host> {
        let settings = Settings::load(&self.dirs)?;
        for warning in &settings.warnings {
            self.progress.warn(warning);
        }
        Ok(Host {
            settings,
            dirs: self.dirs.clone(),
            uri: self.uri.clone(),
            progress: Arc::clone(&self.progress),
            cancel: self.cancel.clone(),
            command: self.name.to_owned(),
        })
    }

    /// The command's arguments, or the exit code to end with: 2 after wrong usage, whose reason is then the last line of
    /// stderr; 0 after `--help` and `--version`.
    ///
    /// # Errors
    /// The exit code.
    pub fn arguments<A: clap::Parser>(&self) -> Result<A, ExitCode> {
        self.arguments_from(std::env::args_os())
    }

    /// The same from these words, the first of which is the program.
    ///
    /// # Errors
    /// The exit code.
    pub fn arguments_from<A: clap::Parser>(&self, words: impl IntoIterator<Item = OsString>) -> Result<A, ExitCode> {
        A::try_parse_from(words).map_err(|error| {
            self.complain_usage(&error);
            if error.use_stderr() { ExitCode::from(exit::USAGE) } else { ExitCode::from(exit::SUCCESS) }
        })
    }

    /// Prints what is wrong with the arguments as one line on stderr, or the help that was asked for on stdout.
    pub fn complain_usage(&self, error: &clap::Error) {
        if error.use_stderr() {
            output::stderr_line(&format!("{}: error: {} (hint: see {} --help)", self.name, usage(error), self.name));
        } else {
            // With nobody to read the help there is nothing left to say.
            let _ = error.print();
        }
    }

    /// Runs the command's work and turns its outcome into an exit code, printing an error as the last line of
    /// stderr.
    #[must_use]
    pub fn run(self, work: impl FnOnce(&Self) -> anyhow::Result<()>) -> ExitCode {
        let outcome = work(&self);
        self.finish(outcome)
    }

    /// Ends the progress display and prints the error, if there is one.
    #[must_use]
    pub fn finish(&self, outcome: anyhow::Result<()>) -> ExitCode {
        match outcome {
            Ok(()) => {
                self.progress.end();
                ExitCode::from(exit::SUCCESS)
            }
            Err(error) => {
                self.progress.end();
                self.complain(&error);
                ExitCode::from(exit::FAILURE)
            }
        }
    }

    /// Prints an error as one line on stderr, without ending the command.
    pub fn complain(&self, error: &anyhow::Error) {
        output::stderr_line(&format!("{}: error: {}", self.name, describe(error)));
    }

    /// Prints what is wrong without being in the way.
    pub fn warn(&self, error: &anyhow::Error) {
        self.progress.warn(&describe(error));
    }
}

/// The whole chain and every hint in one line: consumers log the last line of stderr.
#[must_use]
pub fn describe(error: &anyhow::Error) -> String {
    let mut text = String::new();
    let mut hints = Vec::new();
    for cause in error.chain() {
        let message = cause.to_string();
        if !text.ends_with(&message) {
            let separator = if text.is_empty() { "" } else { ": " };
            let _ = write!(text, "{separator}{}", message.trim());
        }
        if let Some(hint) = cause.downcast_ref::<provisioner_core::Error>().and_then(|e| e.hint.as_deref()) {
            hints.push(hint.to_owned());
        }
    }
    for hint in hints {
        let _ = write!(text, " (hint: {hint})");
    }
    text
}

/// What is wrong with the arguments. clap ends with a line that says where the help is, and puts values as they came;
/// ours name the rule that was broken and quote the value.
fn usage(error: &clap::Error) -> String {
    let context = |kind| match error.get(kind) {
        Some(ContextValue::String(text)) => Some(text.as_str()),
        _ => None,
    };
    let argument = context(ContextKind::InvalidArg).unwrap_or_default();
    let value = context(ContextKind::InvalidValue).unwrap_or_default();
    match (std::error::Error::source(error), error.kind()) {
        // A checked name says by itself what and which it is.
        (Some(source), _) if source.is::<InvalidName>() => format!("{argument}: {source}"),
        (Some(source), clap::error::ErrorKind::ValueValidation) => {
            let value: String = value.chars().take(80).collect();
            format!("{argument}: {value:?} is not valid: {source}")
        }
        _ => {
            let text = error.render().to_string();
            let reason = text.split("\n\n").next().unwrap_or_default().trim_start_matches("error: ");
            reason.split_whitespace().collect::<Vec<_>>().join(" ")
        }
    }
}

/// libvirt's URI, or the one the environment names.
#[must_use]
pub fn uri() -> String {
    variable("BLOCKHOST_LIBVIRT_URI").unwrap_or_else(|| DEFAULT_URI.to_owned())
}

/// The program called `name` in the caller's `$PATH`, as this suite's own commands are found.
#[must_use]
pub fn find_in_path(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    // A relative entry would depend on where one stands.
    let mut files = std::env::split_paths(&path).filter(|dir| dir.is_absolute()).map(|dir| dir.join(name));
    files.find(|file| nix::unistd::access(file, nix::unistd::AccessFlags::X_OK).is_ok() && file.is_file())
}

fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

/// The directories of this host, or those the environment names.
#[must_use]
pub fn directories() -> Directories {
    let defaults = Directories::default();
    let path = |name: &str| variable(name).map(PathBuf::from);
    Directories {
        config: path("BLOCKHOST_CONFIG_DIR").map_or(defaults.config, |dir| vec![dir]),
        state: path("BLOCKHOST_STATE_DIR").unwrap_or(defaults.state),
        run: path("BLOCKHOST_RUN_DIR").unwrap_or(defaults.run),
        share: path("BLOCKHOST_SHARE_DIR").unwrap_or(defaults.share),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use provisioner_core::{Error, ErrorKind};

    #[test]
    fn wrong_usage_is_one_line_that_names_argument_and_rule() {
        #[derive(clap::Parser, Debug)]
        struct Arguments {
            name: provisioner_contract::VmName,
            #[arg(long)]
            cpu: Option<u32>,
        }
        let wrong = |words: &[&str]| {
            let words = std::iter::once("x").chain(words.iter().copied());
            usage(&<Arguments as clap::Parser>::try_parse_from(words).unwrap_err())
        };
        assert!(wrong(&["a\n\nb"]).starts_with(r#"<NAME>: VM name "a\n\nb" is not valid: 1 to 64"#));
        assert!(wrong(&["a", "--cpu", "x y"]).starts_with(r#"--cpu <CPU>: "x y" is not valid: invalid digit"#));
        assert_eq!(wrong(&[]), "the following required arguments were not provided: <NAME>");
        assert_eq!(wrong(&["a", "--what"]), "unexpected argument '--what' found");
    }

    #[test]
    fn an_error_is_one_line_with_its_causes_and_hints() {
        let inner = Error::new(ErrorKind::Io, "disk full").hint("make room");
        let outer = Error::new(ErrorKind::Hypervisor, "cannot start domain web1").because(inner).hint("look again");
        let text = describe(&outer.into());
        assert_eq!(text, "cannot start domain web1: disk full (hint: look again) (hint: make room)");
    }
}
