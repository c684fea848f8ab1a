//! Running a command in a guest through its agent: started with one call, asked for with short ones until it has ended. The
//! agent's one command slot is held for milliseconds at a time, however long the command runs, and no lock of ours at all.
//!
//! The agent hands over a command's output in one answer when it has ended, and libvirt loses an answer that is too long (see
//! [`crate::libvirt::agent`]). So the shell that runs the command in the guest lets no more of it through than fits, and
//! reads the rest away: the command never notices. What comes from the guest is bytes, bounded and not interpreted.

use std::time::{Duration, Instant};

use provisioner_contract::{Record, VmName};
use serde_json::{Value, json};

use crate::host::Host;
use crate::journal::Journal;
use crate::libvirt::agent::{decode_base64, encode_base64};
use crate::libvirt::{Domain, DomainState};
use crate::lock::VmLock;
use crate::ownership::OwnDomain;
use crate::{Error, ErrorKind, Result, power, recovery};

/// The most that is passed on of each of a command's stdout and stderr, in bytes. Both as base64 are less than the 4 MiB
/// that libvirt carries.
pub const OUTPUT_LIMIT: usize = 1 << 20;

/// A VM that is being made or removed is not waited for.
const LOCK_WAIT: Duration = Duration::from_secs(2);
/// Until an agent that can answer must have answered. libvirt alone takes 5 s to find that one does not, callers have 5.
const CONTACT_LIMIT: Duration = Duration::from_millis(4500);
/// One ping, however late its channel was opened.
const LEAST_LIMIT: Duration = Duration::from_millis(500);
/// Starting a process, for an agent that has just answered.
const START_LIMIT: Duration = Duration::from_secs(10);
/// One question whether the command has ended. The answer may be 3 MB, which an emulated guest needs a second for.
const STATUS_LIMIT: Duration = Duration::from_secs(15);
/// What libvirt is told: below our own limit, so that the slot is free again when we give up.
const ANSWER_SECONDS: u8 = 8;
/// One look at what libvirt knows of the domain.
const LOOK_LIMIT: Duration = Duration::from_secs(5);
/// A guest that runs but does not answer, because it is short of memory or CPU, or a libvirtd that restarts.
const SILENCE_LIMIT: Duration = Duration::from_secs(30);
/// The same where nothing can answer: the VM is paused, or no agent has its channel open.
const DEAF_LIMIT: Duration = Duration::from_secs(5);
/// Between two questions at first, and after a while.
const FIRST_PAUSE: Duration = Duration::from_millis(10);
const LAST_PAUSE: Duration = Duration::from_secs(1);

/// Runs what it reads on stdin as `/bin/sh -c` would, without stdin, and ends as that does, 128+N for a signal. Not as
/// an argument, because the agent writes those to the guest's journal. One byte more than [`OUTPUT_LIMIT`] of each
/// stream shows that something was cut off. The shell's own stderr is closed to its remarks on signals, so the
/// command is started in a subshell that alone has the real one.
const WRAPPER: &str = r#"command=$(cat; echo x)
exec 3>&1 4>&2 2>/dev/null </dev/null
limit() { head -c 1048577; cat >/dev/null; }
code=$({ { { (exec 2>&1 >&6 3>&- 4>&- 5>&- 6>&-; exec /bin/sh -c -- "${command%x}"); echo $? >&5; } | limit >&4 5>&- 6>&-; } 6>&1 | limit >&3 5>&-; } 5>&1)
exit "${code:-126}""#;

/// What to run in a guest, as root. It has no `Debug`, as it may hold secrets.
#[derive(Clone)]
pub enum GuestCommand {
    /// Text for `/bin/sh -c`, any bytes but NUL.
    Shell(Vec<u8>),
    /// A program and its arguments, without a shell. The guest's journal shows them.
    Program {
        /// Its path in the guest.
        path: &'static str,
        /// Its arguments, without its name.
        arguments: Vec<String>,
    },
}

impl GuestCommand {
    /// The arguments of the agent's `guest-exec`.
    fn request(&self) -> Value {
        match self {
            Self::Shell(text) => json!({
                "path": "/bin/sh", "arg": ["-c", WRAPPER], "input-data": encode_base64(text), "capture-output": true,
            }),
            Self::Program { path, arguments } => json!({"path": path, "arg": arguments, "capture-output": true}),
        }
    }
}

/// How a command ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// With this exit code. A shell command that was killed by signal N has 128+N, as in any shell.
    Exited(u8),
    /// Killed by this signal, 1 to 127.
    Killed(u8),
}

impl End {
    /// The exit code a shell gives it.
    #[must_use]
    pub fn code(self) -> u8 {
        match self {
            Self::Exited(code) => code,
            Self::Killed(signal) => signal.saturating_add(128),
        }
    }
}

/// One stream of a command's output.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Captured {
    /// At most [`OUTPUT_LIMIT`] bytes, as the guest sent them.
    pub bytes: Vec<u8>,
    /// Whether there was more.
    pub truncated: bool,
}

/// A command that has ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finished {
    /// How.
    pub end: End,
    /// What it wrote to stdout.
    pub stdout: Captured,
    /// What it wrote to stderr.
    pub stderr: Captured,
}

/// Runs `command` in the guest of `name` and waits until it has ended, however long that takes, or for at most `limit`.
///
/// # Errors
/// `NotFound` when there is no such VM and `Conflict` when it is not ours or does not run; `Busy` when it is being made or
/// removed; `TimedOut` when its agent does not answer (within 5 s at first), `Hypervisor` when it refuses, forgets the
/// command, or sends what was not asked for; `Interrupted`; `Unavailable` when libvirt cannot be asked. Once the command
/// may have been started, the error says so.
pub fn run(host: &Host, name: &VmName, command: &GuestCommand, limit: Option<Duration>) -> Result<Finished> {
    Guest::reach(host, name)?.0.run(command, limit)
}

/// A VM whose agent has just answered.
pub(crate) struct Guest<'a> {
    host: &'a Host,
    name: &'a VmName,
    pub(crate) domain: Domain,
}

/// Whether a VM can answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Condition {
    /// It runs, and something has the agent's channel open.
    Listening,
    /// It runs without.
    Deaf,
    /// Its vCPUs are stopped.
    Halted(DomainState),
    /// There is nothing that could.
    Off,
}

impl Condition {
    fn of(domain: &Domain) -> Result<Self> {
        Ok(match domain.state()? {
            Some(state) if state.is_running() => match domain.agent_connected() {
                Ok(true) => Self::Listening,
                Ok(false) => Self::Deaf,
                Err(error) if error.kind == ErrorKind::NotFound => Self::Off,
                Err(error) => return Err(error),
            },
            Some(state @ (DomainState::Paused | DomainState::PmSuspended)) => Self::Halted(state),
            Some(_) | None => Self::Off,
        })
    }
}

impl<'a> Guest<'a> {
    /// The VM with what its description says, and its record. What a dead command left of it is cleared first.
    ///
    /// # Errors
    /// Those of [`run`] before anything is started.
    pub(crate) fn reach(host: &'a Host, name: &'a VmName) -> Result<(Self, OwnDomain, Option<Record>)> {
        // Nothing here needs the lock, but a VM that is half made or half removed is not one to run commands in.
        if Journal::load(&host.dirs, name)?.is_some() {
            let lock = VmLock::acquire(&host.dirs, name, LOCK_WAIT, &host.cancel, &host.command)?;
            recovery::recover(host, name, &lock)?;
        }
        let (own, record) = power::look_up(host, name)?;
        let guest = Self { host, name, domain: own.domain.clone() };
        guest.contact()?;
        Ok((guest, own, record))
    }

    /// Waits until the agent answers.
    fn contact(&self) -> Result<()> {
        let end = Instant::now() + CONTACT_LIMIT;
        let left = || end.saturating_duration_since(Instant::now());
        loop {
            let silence = match self.domain.within(LOOK_LIMIT, &self.host.cancel, Condition::of)? {
                Condition::Listening => match self.ask("guest-ping", Value::Null, left().max(LEAST_LIMIT)) {
                    Ok(_) => return Ok(()),
                    Err(error) if error.kind == ErrorKind::TimedOut => Some(error),
                    Err(error) => return Err(error),
                },
                Condition::Deaf => None,
                Condition::Halted(state) => {
                    let how = if state == DomainState::Paused { "paused" } else { "asleep" };
                    return Err(Error::new(ErrorKind::Conflict, format!("{} is {how}", self.name))
                        .hint(format!("blockhost-vm-start {} lets it run again", self.name)));
                }
                Condition::Off => {
                    return Err(Error::new(ErrorKind::Conflict, format!("{} does not run", self.name))
                        .hint(format!("blockhost-vm-start {} starts it", self.name)));
                }
            };
            if left().is_zero() {
                return Err(match silence {
                    Some(error) => error.hint("the guest, or its qemu-guest-agent, hangs"),
                    None => Error::new(ErrorKind::TimedOut, format!("no guest agent runs in {}", self.name))
                        .hint("it may still be booting; in the guest: systemctl status qemu-guest-agent"),
                });
            }
            self.host.cancel.sleep(Duration::from_millis(200).min(left()))?;
        }
    }

    fn ask(&self, command: &'static str, arguments: Value, limit: Duration) -> Result<Value> {
        let ask = move |domain: &Domain| domain.agent(command, &arguments, ANSWER_SECONDS);
        self.domain.within(limit, &self.host.cancel, ask)
    }

    /// Runs `command`, for at most `limit`.
    ///
    /// # Errors
    /// Those of [`run`] once the agent has answered.
    pub(crate) fn run(&mut self, command: &GuestCommand, limit: Option<Duration>) -> Result<Finished> {
        let begin = Instant::now();
        let left = |most: Duration| limit.map_or(most, |limit| most.min(limit.saturating_sub(begin.elapsed())));
        let started =
            self.ask("guest-exec", command.request(), left(START_LIMIT)).map_err(|error| match error.kind {
                ErrorKind::Hypervisor if is_switched_off(&error) => {
                    error.hint("the qemu-guest-agent in the guest must allow guest-exec")
                }
                ErrorKind::Hypervisor => error,
                _ => self.lost("it is not known whether the command was started in", Some(error)),
            })?;
        let pid = parse_started(&started)
            .ok_or_else(|| self.lost("the guest agent sent no process id for the command in", None))?;
        let mut heard = Instant::now();
        let mut pause = FIRST_PAUSE;
        loop {
            self.host.cancel.sleep(left(pause)).map_err(|error| self.lost("stopped waiting for", Some(error)))?;
            if left(LAST_PAUSE).is_zero() {
                return Err(self.lost("the command takes too long in", None));
            }
            match self.ask("guest-exec-status", json!({ "pid": pid }), left(STATUS_LIMIT)) {
                Ok(answer) => match parse_status(&answer) {
                    Ok(Some(finished)) => return Ok(finished),
                    Ok(None) => heard = Instant::now(),
                    Err(what) => {
                        let cause = format!("its answer has no valid {what}");
                        return Err(self.lost("the guest agent sent what was not asked for from", None).because(cause));
                    }
                },
                Err(error) if error.kind == ErrorKind::Interrupted => {
                    return Err(self.lost("stopped waiting for", Some(error)));
                }
                Err(error) => self.go_on(error, heard)?,
            }
            pause = (pause * 3 / 2).min(LAST_PAUSE);
        }
    }

    /// Whether to ask again after `error`, having last heard of the command at `heard`.
    fn go_on(&mut self, error: Error, heard: Instant) -> Result<()> {
        let condition = match self.domain.within(LOOK_LIMIT, &self.host.cancel, Condition::of) {
            Ok(condition) => condition,
            Err(look) if look.kind == ErrorKind::Interrupted => {
                return Err(self.lost("stopped waiting for", Some(look)));
            }
            // The guest goes on without libvirtd, and its agent keeps the command for us.
            Err(_) => match power::look_up(self.host, self.name) {
                Ok((own, _)) => {
                    self.domain = own.domain;
                    Condition::Listening
                }
                Err(look) if look.kind == ErrorKind::Unavailable && heard.elapsed() < SILENCE_LIMIT => return Ok(()),
                Err(look) => return Err(self.lost("lost sight of", Some(look))),
            },
        };
        if condition == Condition::Off {
            return Err(Error::new(ErrorKind::Conflict, format!("{} went off while the command ran", self.name)));
        }
        let patience = if condition == Condition::Listening { SILENCE_LIMIT } else { DEAF_LIMIT };
        match error.kind {
            ErrorKind::TimedOut | ErrorKind::Unavailable if heard.elapsed() < patience => Ok(()),
            ErrorKind::TimedOut | ErrorKind::Unavailable => match condition {
                Condition::Halted(_) => Err(self.lost("the VM was paused during the command in", Some(error))),
                _ => Err(self.lost("nothing more is heard of the command in", Some(error))),
            },
            _ => {
                Err(self.lost("the guest agent no longer knows the command, as after a restart of it, in", Some(error)))
            }
        }
    }

    /// A failure after which the command may be running, or have run.
    fn lost(&self, what: &str, cause: Option<Error>) -> Error {
        let kind = cause.as_ref().map_or(ErrorKind::Hypervisor, |cause| cause.kind);
        let error =
            Error::new(kind, format!("{what} {}", self.name)).hint("the command may still be running in the guest");
        match cause {
            Some(cause) => error.because(cause),
            None => error,
        }
    }
}

/// Whether the agent refuses the command as such.
fn is_switched_off(error: &Error) -> bool {
    let said = error.in_full();
    said.contains("has been disabled") || said.contains("has not been found")
}

/// The process id in the agent's answer to `guest-exec`.
#[must_use]
pub fn parse_started(answer: &Value) -> Option<i64> {
    answer.get("pid").and_then(Value::as_i64).filter(|pid| *pid > 0)
}

/// The agent's answer to `guest-exec-status`: `None` while the command runs.
///
/// # Errors
/// The key whose value is missing, of the wrong type, or not possible.
pub fn parse_status(answer: &Value) -> std::result::Result<Option<Finished>, &'static str> {
    if !answer.get("exited").and_then(Value::as_bool).ok_or("exited")? {
        return Ok(None);
    }
    let number = |key: &'static str| answer.get(key).map(|value| value.as_u64().ok_or(key)).transpose();
    let end = match (number("exitcode")?, number("signal")?) {
        (Some(code), None) => End::Exited(u8::try_from(code).map_err(|_| "exitcode")?),
        (None, Some(signal @ 1..=127)) => End::Killed(u8::try_from(signal).map_err(|_| "signal")?),
        (None, Some(_)) => return Err("signal"),
        (Some(_), Some(_)) | (None, None) => return Err("exitcode"),
    };
    let stream = |data: &'static str, truncated: &'static str| -> std::result::Result<Captured, &'static str> {
        let mut bytes = match answer.get(data) {
            None => Vec::new(),
            Some(text) => text.as_str().and_then(|text| decode_base64(text, OUTPUT_LIMIT + 1)).ok_or(data)?,
        };
        let by_agent = match answer.get(truncated) {
            None => false,
            Some(value) => value.as_bool().ok_or(truncated)?,
        };
        let truncated = by_agent || bytes.len() > OUTPUT_LIMIT;
        bytes.truncate(OUTPUT_LIMIT);
        Ok(Captured { bytes, truncated })
    };
    Ok(Some(Finished {
        end,
        stdout: stream("out-data", "out-truncated")?,
        stderr: stream("err-data", "err-truncated")?,
    }))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::io::Write as _;
    use std::process::{Command, Stdio};

    use super::*;
    use proptest::prelude::*;

    fn ended(end: End, stdout: &[u8], stderr: &[u8]) -> Finished {
        let stream = |bytes: &[u8]| Captured { bytes: bytes.to_vec(), truncated: false };
        Finished { end, stdout: stream(stdout), stderr: stream(stderr) }
    }

    #[test]
    fn what_the_agent_says_of_a_command_is_read() {
        assert_eq!(parse_started(&json!({"pid": 77})), Some(77));
        assert_eq!(parse_status(&json!({"exited": false})), Ok(None));
        let answer =
            json!({"exited": true, "exitcode": 7, "out-data": "/wo=", "out-truncated": false, "err-data": "ZQ=="});
        assert_eq!(parse_status(&answer), Ok(Some(ended(End::Exited(7), b"\xff\n", b"e"))));
        let killed = parse_status(&json!({"exited": true, "signal": 9})).unwrap().unwrap();
        assert_eq!(killed, ended(End::Killed(9), b"", b""));
        assert_eq!(killed.end.code(), 137);
    }

    #[test]
    fn an_answer_that_was_not_asked_for_is_refused() {
        for pid in
            [json!({}), json!({"pid": "7"}), json!({"pid": 0}), json!({"pid": -7}), json!({"pid": 7.5}), json!([7])]
        {
            assert_eq!(parse_started(&pid), None, "{pid}");
        }
        let cases = [
            (json!({}), "exited"),
            (json!([]), "exited"),
            (json!("exited"), "exited"),
            (json!({"exited": "true"}), "exited"),
            (json!({"exited": 1, "exitcode": 0}), "exited"),
            (json!({"exited": true}), "exitcode"),
            (json!({"exited": true, "exitcode": null}), "exitcode"),
            (json!({"exited": true, "exitcode": "0"}), "exitcode"),
            (json!({"exited": true, "exitcode": -1}), "exitcode"),
            (json!({"exited": true, "exitcode": 0.5}), "exitcode"),
            // As a byte it would be a success.
            (json!({"exited": true, "exitcode": 256}), "exitcode"),
            (json!({"exited": true, "exitcode": 0, "signal": 9}), "exitcode"),
            (json!({"exited": true, "signal": 0}), "signal"),
            (json!({"exited": true, "signal": 128}), "signal"),
            (json!({"exited": true, "signal": "9"}), "signal"),
            (json!({"exited": true, "exitcode": 0, "out-data": 5}), "out-data"),
            (json!({"exited": true, "exitcode": 0, "out-data": "no base64"}), "out-data"),
            (json!({"exited": true, "exitcode": 0, "err-data": {}}), "err-data"),
            (json!({"exited": true, "exitcode": 0, "err-truncated": "no"}), "err-truncated"),
        ];
        for (answer, key) in cases {
            assert_eq!(parse_status(&answer), Err(key), "{answer}");
        }
    }

    #[test]
    fn no_more_than_the_limit_is_passed_on() {
        let answer = |length: usize| {
            parse_status(&json!({"exited": true, "exitcode": 0, "out-data": encode_base64(&vec![b'a'; length])}))
        };
        let stdout = |length: usize| answer(length).unwrap().unwrap().stdout;
        assert!(!stdout(OUTPUT_LIMIT).truncated);
        assert!(stdout(OUTPUT_LIMIT + 1).truncated);
        assert_eq!(stdout(OUTPUT_LIMIT + 1).bytes.len(), OUTPUT_LIMIT);
        assert_eq!(answer(OUTPUT_LIMIT + 4), Err("out-data"), "more than was let through");
        let cut = json!({"exited": true, "exitcode": 0, "err-data": "ZQ==", "err-truncated": true});
        assert!(parse_status(&cut).unwrap().unwrap().stderr.truncated);
    }

    /// Two streams at their limit must fit into what libvirt carries.
    #[test]
    fn the_longest_answer_fits_into_libvirts_protocol() {
        assert!(2 * encode_base64(&vec![0; OUTPUT_LIMIT + 1]).len() + 1024 < 4 << 20);
        assert!(WRAPPER.contains(&format!("head -c {};", OUTPUT_LIMIT + 1)));
    }

    #[test]
    fn the_command_is_no_argument_of_a_process_the_agent_starts() {
        let request = GuestCommand::Shell(b"echo s3cret".to_vec()).request();
        assert!(!request["arg"].to_string().contains("s3cret"));
        assert_eq!(decode_base64(request["input-data"].as_str().unwrap(), 99).unwrap(), b"echo s3cret");
    }

    /// Runs the wrapper as the agent does, in this machine's shell.
    fn wrapped(command: &[u8]) -> (Option<i32>, Vec<u8>, Vec<u8>) {
        let mut child = Command::new("/bin/sh")
            .args(["-c", WRAPPER])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        child.stdin.take().unwrap().write_all(command).unwrap();
        let output = child.wait_with_output().unwrap();
        (output.status.code(), output.stdout, output.stderr)
    }

    #[test]
    fn the_wrapper_changes_nothing_but_the_amount_of_output() {
        let both = wrapped(b"echo out; echo err >&2; exit 7");
        assert_eq!(both, (Some(7), b"out\n".to_vec(), b"err\n".to_vec()));
        assert_eq!(wrapped(b"--help").0, Some(127), "a command of that name, not an option of the shell");
        assert_eq!(wrapped(b"kill -9 $$"), (Some(137), vec![], vec![]), "no word of the shell's own");
        assert_eq!(wrapped(b"cat; printf '\\377%s' \"\xfe\n\n\"\n\n").1, b"\xff\xfe\n\n");
        // More than a pipe holds on both streams at once, and nothing breaks the command's pipe.
        let script = "head -c 3000000 /dev/zero; head -c 3000000 /dev/zero >&2; echo still >/dev/null && exit 5";
        let (code, stdout, stderr) = wrapped(script.as_bytes());
        assert_eq!((code, stdout.len(), stderr.len()), (Some(5), OUTPUT_LIMIT + 1, OUTPUT_LIMIT + 1));
    }

    fn any_json() -> impl Strategy<Value = Value> {
        prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            any::<f64>().prop_map(Value::from),
            "[A-Za-z0-9+/=]{0,20}|.{0,10}".prop_map(Value::from),
            Just(json!([])),
            Just(json!({"exited": true})),
        ]
    }

    proptest! {
        #[test]
        fn no_answer_panics_or_is_taken_for_more_than_it_says(
            exited in any_json(), code in proptest::option::of(any_json()), signal in proptest::option::of(any_json()),
            out in proptest::option::of(any_json()), cut in proptest::option::of(any_json()),
        ) {
            let mut answer = json!({ "exited": exited });
            for (key, value) in [("exitcode", &code), ("signal", &signal), ("out-data", &out), ("out-truncated", &cut)] {
                if let Some(value) = value {
                    answer[key] = value.clone();
                }
            }
            if let Ok(Some(finished)) = parse_status(&answer) {
                prop_assert_eq!(&exited, &json!(true));
                prop_assert!(code.is_some() != signal.is_some());
                if finished.end.code() == 0 {
                    prop_assert_eq!(code, Some(json!(0)));
                }
            }
            let _ = parse_started(&exited);
        }
    }
}
