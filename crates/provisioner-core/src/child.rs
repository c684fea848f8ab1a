//! The one place that runs other programs. A child gets no stdin, a fixed search path and locale, and a process
//! group of its own; it dies when the caller is cancelled, returns or is itself killed. What it wrote to
//! stderr last becomes part of the error.

use std::fmt;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

use crate::cancel::Cancel;
use crate::{Error, ErrorKind, Result};

/// Where programs are looked for: root's usual path, whatever the caller's environment says.
const SEARCH_PATH: &str = "/usr/local/sbin:/usr/sbin:/sbin:/usr/local/bin:/usr/bin:/bin";
/// How much of stderr an error keeps, in bytes: the installer shows 500 characters in all.
const STDERR_TAIL: usize = 360;
/// The longest stderr line that is looked at; the rest of a longer one is dropped.
const LINE_LIMIT: u64 = 4096;
/// How much stdout is kept. A program that writes more is at fault, and fails.
const STDOUT_LIMIT: u64 = 32 << 20;
/// How long a dead child's pipes may be held open by what it left behind.
const PIPE_GRACE: Duration = Duration::from_secs(5);

/// What a child said before it failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StderrTail(String);

impl fmt::Display for StderrTail {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for StderrTail {}

/// Finds `program` in the directories programs of root are in.
#[must_use]
pub fn find(program: &str) -> Option<PathBuf> {
    SEARCH_PATH.split(':').map(|dir| Path::new(dir).join(program)).find(|path| path.is_file())
}

/// Fails with [`ErrorKind::Unavailable`] when a program is not installed; `programs` pairs each with Debian's package.
///
/// # Errors
/// Names every missing program at once; the hint is the `apt-get` line that installs them.
pub fn require(programs: &[(&str, &str)]) -> Result<()> {
    let missing: Vec<_> = programs.iter().filter(|(program, _)| find(program).is_none()).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let names: Vec<_> = missing.iter().map(|(program, _)| *program).collect();
    let mut packages: Vec<_> = missing.iter().map(|(_, package)| *package).collect();
    packages.dedup();
    Err(Error::new(ErrorKind::Unavailable, format!("not installed: {}", names.join(", ")))
        .hint(format!("apt-get install {}", packages.join(" "))))
}

/// A command that is killed with this process, even by `kill -9`: `setpriv` sets the parent-death signal.
#[must_use]
pub fn tied(program: &str) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "--", program]);
    command
}

/// A [`tied`] command in process and mount namespaces of its own: all its descendants die with it, and what they
/// mount was never mounted for anybody else. Needs root.
#[must_use]
pub fn contained(program: &str) -> Command {
    let mut command = tied("unshare");
    command.args(["--mount", "--pid", "--fork", "--kill-child=KILL", "--mount-proc", "--", program]);
    command
}

/// How [`Command`]s are run.
pub trait CommandExt {
    /// Runs the command to its end and returns its stdout.
    ///
    /// # Errors
    /// `what`, such as `cannot convert /x/y`, is the message: with [`ErrorKind::Unavailable`] if the program cannot
    /// be started, [`ErrorKind::Io`] if it ended with a failure or wrote more than 32 MiB (its last stderr lines are
    /// the cause), [`ErrorKind::Interrupted`] if `cancel` was set; it has then been killed.
    fn run(&mut self, what: &str, cancel: &Cancel) -> Result<Vec<u8>> {
        self.run_watched(what, cancel, &mut |_| {})
    }

    /// The same, handing each stderr line to `line` as it comes.
    ///
    /// # Errors
    /// As [`CommandExt::run`].
    fn run_watched(&mut self, what: &str, cancel: &Cancel, line: &mut dyn FnMut(&str)) -> Result<Vec<u8>>;

    /// The same as [`CommandExt::run`], for at most `limit`.
    ///
    /// # Errors
    /// As [`CommandExt::run`], and [`ErrorKind::TimedOut`] after `limit`; it has then been killed.
    fn run_within(&mut self, what: &str, limit: Duration, cancel: &Cancel) -> Result<Vec<u8>>;
}

impl CommandExt for Command {
    fn run_watched(&mut self, what: &str, cancel: &Cancel, line: &mut dyn FnMut(&str)) -> Result<Vec<u8>> {
        self.run_checked(what, &|| cancel.check(), line)
    }

    fn run_within(&mut self, what: &str, limit: Duration, cancel: &Cancel) -> Result<Vec<u8>> {
        let deadline = Instant::now() + limit;
        let late = || Error::new(ErrorKind::TimedOut, format!("{what}: it did not end within {} s", limit.as_secs()));
        let check = || cancel.check().and_then(|()| if Instant::now() < deadline { Ok(()) } else { Err(late()) });
        self.run_checked(what, &check, &mut |_| {})
    }
}

trait RunChecked {
    /// Runs the command for as long as `check` has nothing against it.
    fn run_checked(
        &mut self,
        what: &str,
        check: &dyn Fn() -> Result<()>,
        line: &mut dyn FnMut(&str),
    ) -> Result<Vec<u8>>;
}

impl RunChecked for Command {
    fn run_checked(
        &mut self,
        what: &str,
        check: &dyn Fn() -> Result<()>,
        line: &mut dyn FnMut(&str),
    ) -> Result<Vec<u8>> {
        check()?;
        self.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).process_group(0);
        self.env("PATH", SEARCH_PATH).env("LC_ALL", "C.UTF-8").env_remove("LANGUAGE");
        tracing::debug!(command = ?self, "run");
        let child = self.spawn().map_err(|error| {
            Error::new(ErrorKind::Unavailable, format!("{what}: cannot run {}", self.get_program().display()))
                .because(error)
        })?;
        let mut group = Group { child, ended: None };
        let (send_line, lines) = mpsc::sync_channel(64);
        let (send_output, output) = mpsc::sync_channel(1);
        if let Some(stderr) = group.child.stderr.take() {
            thread::spawn(move || read_lines(stderr, |text| send_line.send(text).is_ok()));
        }
        if let Some(mut stdout) = group.child.stdout.take() {
            thread::spawn(move || {
                let mut bytes = Vec::new();
                let read = stdout.by_ref().take(STDOUT_LIMIT + 1).read_to_end(&mut bytes);
                let _ = send_output.send(read.map(|_| bytes));
            });
        }
        let mut tail = Vec::new();
        let mut take = |text: String| {
            tracing::debug!(target: "child", "{text}");
            line(&text);
            tail.push(text);
            if tail.len() > 12 {
                tail.remove(0);
            }
        };
        let mut pause = Duration::from_millis(1);
        let mut deadline = None;
        loop {
            check()?;
            match lines.recv_timeout(pause) {
                Ok(text) => take(text),
                Err(RecvTimeoutError::Timeout) => pause = (pause * 2).min(Duration::from_millis(50)),
                Err(RecvTimeoutError::Disconnected) => thread::sleep(pause),
            }
            if group.has_ended(what)? {
                // Lines that were still in the pipe; a descendant may hold it open, but not for long.
                let end = *deadline.get_or_insert_with(|| Instant::now() + PIPE_GRACE);
                while let Ok(text) = lines.recv_timeout(end.saturating_duration_since(Instant::now())) {
                    take(text);
                }
                break;
            }
        }
        let status = group.wait(what)?;
        let fail = || {
            let error = Error::new(ErrorKind::Io, format!("{what}: {} {}", called(self), describe(status)));
            let tail = condense(&tail);
            if tail.is_empty() { error } else { error.because(StderrTail(tail)) }
        };
        if !status.success() {
            return Err(fail());
        }
        match output.recv_timeout(PIPE_GRACE) {
            Ok(Ok(bytes)) if bytes.len() as u64 <= STDOUT_LIMIT => Ok(bytes),
            _ => {
                Err(Error::new(ErrorKind::Io, format!("{what}: {} wrote an output that cannot be read", called(self))))
            }
        }
    }
}

/// A child and everything in its process group. Dropping it kills what still runs.
struct Group {
    child: Child,
    ended: Option<ExitStatus>,
}

impl Group {
    fn has_ended(&mut self, what: &str) -> Result<bool> {
        if self.ended.is_none() {
            self.ended = self.child.try_wait().map_err(|error| wait_failed(what, error))?;
        }
        Ok(self.ended.is_some())
    }

    fn wait(&mut self, what: &str) -> Result<ExitStatus> {
        match self.ended {
            Some(status) => Ok(status),
            None => self.child.wait().map_err(|error| wait_failed(what, error)),
        }
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // The group is killed only while its leader is not reaped: afterwards the number may belong to others.
        if self.ended.is_none()
            && let Ok(pid) = i32::try_from(self.child.id())
        {
            let _ = killpg(Pid::from_raw(pid), Signal::SIGKILL);
            let _ = self.child.wait();
        }
    }
}

fn wait_failed(what: &str, error: std::io::Error) -> Error {
    Error::new(ErrorKind::Io, format!("{what}: cannot wait for a child process")).because(error)
}

/// The program a person would name: not the wrappers that tie it to this process.
fn called(command: &Command) -> String {
    let mut words = vec![command.get_program().to_string_lossy().into_owned()];
    words.extend(command.get_args().map(|arg| arg.to_string_lossy().into_owned()));
    while matches!(words[0].as_str(), "setpriv" | "unshare") {
        let Some(end) = words.iter().position(|word| word == "--") else { break };
        if end + 1 >= words.len() {
            break;
        }
        words.drain(..=end);
    }
    words.swap_remove(0)
}

fn describe(status: ExitStatus) -> String {
    use std::os::unix::process::ExitStatusExt;
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("failed with exit code {code}"),
        (None, Some(signal)) => format!("was killed by signal {signal}"),
        (None, None) => "failed".to_owned(),
    }
}

/// The last lines in one, at most [`STDERR_TAIL`] bytes, without control characters.
fn condense(lines: &[String]) -> String {
    let mut text = String::new();
    for line in lines.iter().rev() {
        let line: String = line.trim().chars().filter(|c| !c.is_control()).take(STDERR_TAIL / 2).collect();
        if line.is_empty() {
            continue;
        }
        if text.len() + line.len() + 3 > STDERR_TAIL {
            break;
        }
        text = if text.is_empty() { line } else { format!("{line} | {text}") };
    }
    text
}

/// Hands on lines, split at `\n` and at the `\r` of progress displays, until the end or until `take` refuses.
fn read_lines(from: impl Read, mut take: impl FnMut(String) -> bool) {
    let mut reader = BufReader::new(from);
    loop {
        let mut bytes = Vec::new();
        match reader.by_ref().take(LINE_LIMIT).read_until(b'\n', &mut bytes) {
            Ok(0) | Err(_) => return,
            Ok(_) => {}
        }
        let text = String::from_utf8_lossy(&bytes);
        for part in text.split(['\n', '\r']).filter(|part| !part.trim().is_empty()) {
            if !take(part.to_owned()) {
                // Nobody listens any more; keep reading, or the child would get SIGPIPE in the middle of its work.
                let _ = std::io::copy(&mut reader, &mut std::io::sink());
                return;
            }
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn sh(script: &str) -> Command {
        let mut command = tied("sh");
        command.args(["-c", script]);
        command
    }

    #[test]
    fn stdout_is_returned_and_stdin_is_empty() {
        let output = sh("cat; echo out").run("cannot try", &Cancel::default()).unwrap();
        assert_eq!(output, b"out\n");
    }

    #[test]
    fn the_error_names_the_program_and_carries_the_last_lines_only() {
        let error =
            sh("i=0; while [ $i -lt 5000 ]; do echo noise $i >&2; i=$((i+1)); done; echo the reason >&2; exit 3")
                .run("cannot try", &Cancel::default())
                .unwrap_err();
        assert_eq!(error.message, "cannot try: sh failed with exit code 3");
        let cause = error.source.unwrap().to_string();
        assert!(cause.ends_with("| the reason"), "{cause}");
        assert!(cause.len() <= STDERR_TAIL);
    }

    #[test]
    fn a_missing_program_is_a_failure() {
        let error = tied("no-such-program-here").run("cannot try", &Cancel::default()).unwrap_err();
        assert!(error.message.starts_with("cannot try: no-such-program-here failed"), "{}", error.message);
        let error = require(&[("sh", "dash"), ("no-such-program-here", "nothing")]).unwrap_err();
        assert_eq!(error.message, "not installed: no-such-program-here");
        assert_eq!(error.hint.as_deref(), Some("apt-get install nothing"));
    }

    #[test]
    fn cancelling_kills_the_whole_group_at_once() {
        let cancel = Cancel::default();
        let dir = tempfile::tempdir().unwrap();
        let pid_file = dir.path().join("pid");
        let other = cancel.clone();
        let seen = pid_file.clone();
        let canceller = thread::spawn(move || {
            while std::fs::read_to_string(&seen).map_or(true, |text| !text.ends_with('\n')) {
                thread::sleep(Duration::from_millis(5));
            }
            other.cancel();
        });
        let started = Instant::now();
        let error =
            sh(&format!("sleep 60 & echo $! > {}; wait", pid_file.display())).run("cannot try", &cancel).unwrap_err();
        canceller.join().unwrap();
        assert_eq!(error.kind, ErrorKind::Interrupted);
        assert!(started.elapsed() < Duration::from_secs(30));
        let pid = std::fs::read_to_string(&pid_file).unwrap();
        let stat = format!("/proc/{}/stat", pid.trim());
        // Killed, though its new parent may need a moment to reap it.
        let gone = (0..200).any(|_| {
            thread::sleep(Duration::from_millis(10));
            std::fs::read_to_string(&stat).map_or(true, |text| text.contains(") Z"))
        });
        assert!(gone);
    }

    #[test]
    fn what_takes_too_long_is_killed() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("late");
        let started = Instant::now();
        let error = sh(&format!("sleep 8; touch {}", file.display()))
            .run_within("cannot try", Duration::from_millis(200), &Cancel::default())
            .unwrap_err();
        assert_eq!((error.kind, started.elapsed() < Duration::from_secs(8)), (ErrorKind::TimedOut, true));
        thread::sleep(Duration::from_millis(8300).saturating_sub(started.elapsed()));
        assert!(!file.exists());
        let output = sh("echo out").run_within("cannot try", Duration::from_secs(60), &Cancel::default()).unwrap();
        assert_eq!(output, b"out\n");
    }

    #[test]
    fn lines_arrive_while_it_runs_and_carriage_returns_split_them() {
        let mut seen = Vec::new();
        sh("printf '1%%\\r2%%\\n' >&2")
            .run_watched("cannot try", &Cancel::default(), &mut |line| seen.push(line.to_owned()))
            .unwrap();
        assert_eq!(seen, ["1%", "2%"]);
    }
}
