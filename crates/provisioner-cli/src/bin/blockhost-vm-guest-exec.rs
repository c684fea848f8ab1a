//! `blockhost-vm-guest-exec`: see `--help`.

use std::ffi::{OsStr, OsString};
use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt as _;
use std::process::ExitCode;

use anyhow::Context as _;
use clap::Parser;
use provisioner_cli::{Command, output};
use provisioner_contract::VmName;
use provisioner_core::guest_exec::{self, Finished, GuestCommand, OUTPUT_LIMIT};

/// Run a shell command in a VM, as root, through its guest agent.
///
/// One argument is given to /bin/sh -c as it is, several are joined with single blanks. Nothing after the name is read as an
/// option of this command. The command has no stdin. It may run as long as it likes; its output comes when it has ended,
/// which includes processes it leaves behind with its stdout or stderr.
#[derive(Parser)]
#[command(
    name = "blockhost-vm-guest-exec",
    version,
    override_usage = "blockhost-vm-guest-exec <NAME> [--] <COMMAND>...",
    after_help = "\
The command's stdout and stderr become those of this one, the first 1 MiB of each; the last line of stderr says so when
there was more. Its exit code becomes this one's: 128+N when it was killed by signal N, 1 also when the VM or its agent
does not answer, 2 for wrong usage, each with the reason as the last line of stderr.

Examples:
  blockhost-vm-guest-exec web1 uptime
  blockhost-vm-guest-exec web1 'systemctl is-active nginx && df -h / | tail -n 1'
  blockhost-vm-guest-exec web1 -- ls -l /var/log"
)]
pub struct Arguments {
    /// Name of the VM.
    name: VmName,
    /// What to run; a leading -- is left out.
    #[arg(required = true, allow_hyphen_values = true)]
    command: Vec<OsString>,
}

/// The words as clap is to see them: once there is a name, nothing is an option.
fn words(all: impl IntoIterator<Item = OsString>) -> Vec<OsString> {
    let mut all = all.into_iter().peekable();
    let mut words: Vec<_> = all.next().into_iter().collect();
    let separated = all.next_if(|word| word == "--").is_some();
    match all.peek() {
        // Help, version, or a mistake.
        Some(word) if !separated && word.as_bytes().starts_with(b"-") => words.extend(all),
        _ => {
            words.push("--".into());
            words.extend(all.next());
            let _ = all.next_if(|word| word == "--");
            words.extend(all);
        }
    }
    words
}

fn main() -> ExitCode {
    let command = Command::new("blockhost-vm-guest-exec");
    let arguments: Arguments = match command.arguments_from(words(std::env::args_os())) {
        Ok(arguments) => arguments,
        Err(code) => return code,
    };
    let text = arguments.command.join(OsStr::new(" ")).as_bytes().to_vec();
    let finished = command.host().and_then(|host| {
        let finished = guest_exec::run(&host, &arguments.name, &GuestCommand::Shell(text), None)?;
        pass_on(&finished).context("cannot deliver the command's output")?;
        Ok(finished)
    });
    match finished {
        Ok(finished) => {
            complain_of_the_rest(&arguments.name, &finished);
            ExitCode::from(finished.end.code())
        }
        Err(error) => command.finish(Err(error)),
    }
}

/// The output as it came. A closed stderr is nobody's loss, a closed stdout is the caller's.
fn pass_on(finished: &Finished) -> io::Result<()> {
    let mut stdout = io::stdout().lock();
    stdout.write_all(&finished.stdout.bytes)?;
    stdout.flush()?;
    let _ = io::stderr().lock().write_all(&finished.stderr.bytes);
    Ok(())
}

/// Says what was cut off, on a line of its own.
fn complain_of_the_rest(name: &VmName, finished: &Finished) {
    let streams = match (finished.stdout.truncated, finished.stderr.truncated) {
        (false, false) => return,
        (true, false) => "stdout was",
        (false, true) => "stderr was",
        (true, true) => "stdout and stderr were",
    };
    if finished.stderr.bytes.last().is_some_and(|last| *last != b'\n') {
        let _ = io::stderr().write_all(b"\n");
    }
    output::stderr_line(&format!(
        "blockhost-vm-guest-exec: warning: the command's {streams} cut off after {OUTPUT_LIMIT} bytes (hint: write it to a \
         file in {name} and read that in parts)"
    ));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_after_the_name_is_an_option() {
        let parse = |line: &[&str]| {
            let line = std::iter::once("x").chain(line.iter().copied()).map(OsString::from);
            let parsed = Arguments::try_parse_from(words(line)).map_err(|error| error.kind());
            parsed.map(|parsed| (parsed.name.to_string(), parsed.command.join(OsStr::new(" ")).into_string().ok()))
        };
        let runs = |line: &[&str], command: &str| {
            assert_eq!(parse(line), Ok(("web1".into(), Some(command.into()))), "{line:?}");
        };
        runs(&["web1", "ls"], "ls");
        runs(&["web1", "a  b\n"], "a  b\n");
        runs(&["web1", "ls", "-l", "--", "a b"], "ls -l -- a b");
        runs(&["web1", "--", "ls"], "ls");
        runs(&["web1", "--", "--", "ls"], "-- ls");
        runs(&["--", "web1", "--", "ls"], "ls");
        runs(&["web1", "--help"], "--help");
        runs(&["web1", "-h", "--version"], "-h --version");
        runs(&["web1", "--name=x", "-V"], "--name=x -V");
        runs(&["web1", ""], "");
        runs(&["web1", "", ""], " ");
        use clap::error::ErrorKind as Kind;
        assert_eq!(parse(&["--help", "web1"]), Err(Kind::DisplayHelp));
        assert_eq!(parse(&["-h"]), Err(Kind::DisplayHelp));
        assert_eq!(parse(&["--version"]), Err(Kind::DisplayVersion));
        assert_eq!(parse(&["--verbose", "web1", "ls"]), Err(Kind::UnknownArgument));
        for missing in [&[][..], &["web1"], &["web1", "--"], &["--"], &["--", "web1"]] {
            assert_eq!(parse(missing), Err(Kind::MissingRequiredArgument), "{missing:?}");
        }
        assert_eq!(parse(&["--", "--help", "ls"]), Err(Kind::ValueValidation));
    }
}
