//! `blockhost-vm-metrics`: see `--help`. Answers from the shared sample; takes no sample itself, so that it need not be
//! linked with libvirt, whose library takes longer to load than the rest of this program takes to run.

use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};
use std::process::{ChildStdout, Command, ExitCode, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use clap::{Parser, ValueEnum};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use provisioner_contract::{Metrics, MetricsState, VmName, exit};
use provisioner_metrics::sample::{Sample, Standing, VmSample};
use provisioner_metrics::store::Store;
use provisioner_metrics::{SAMPLER, clock, openmetrics};

const NAME: &str = "blockhost-vm-metrics";

/// The monitor sets no limit and waits for all its VMs: after this time it gets what there is.
const LIMIT: Duration = Duration::from_millis(1200);

/// With less left of it no sample is begun: its answer would come too late, and it would only add to what keeps the host busy.
const LEAST: Duration = Duration::from_millis(100);

/// Print the metrics of a VM.
///
/// Rates are those since the previous sample. One sample of all VMs serves every call of a second. -1 stands for what is
/// not available. A VM that is off is a success.
#[derive(Parser)]
#[command(
    name = NAME,
    version,
    after_help = "\
The exit code is 1 only if there is no such VM or libvirt cannot be reached.

Examples:
  blockhost-vm-metrics web1
  blockhost-vm-metrics --all | jq 'map_values(.cpu_percent)'
  blockhost-vm-metrics --all --format openmetrics > /var/lib/node_exporter/blockhost.prom"
)]
pub struct Arguments {
    /// Name of the VM.
    #[arg(required_unless_present = "all", conflicts_with = "all")]
    name: Option<VmName>,
    /// All VMs: an object with an object per VM.
    #[arg(long)]
    all: bool,
    /// How to print them.
    #[arg(long, value_enum, default_value_t = Format::Json)]
    format: Format,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Format {
    /// One object.
    Json,
    /// OpenMetrics text with raw counters, as for node_exporter's textfile collector.
    Openmetrics,
}

impl Arguments {
    /// The monitor's call is a name and nothing else; it need not pay for the parser. What is wrong with the arguments is
    /// said in one line, as by all commands.
    fn read() -> Result<Self, ExitCode> {
        let mut arguments = std::env::args_os().skip(1);
        if let (Some(name), None) = (arguments.next(), arguments.next())
            && let Some(Ok(name)) = name.to_str().map(VmName::new)
        {
            return Ok(Self { name: Some(name), all: false, format: Format::Json });
        }
        Self::try_parse().map_err(|error| {
            if !error.use_stderr() {
                // With nobody to read the help there is nothing left to say.
                let _ = error.print();
                return ExitCode::from(exit::SUCCESS);
            }
            let text = error.render().to_string();
            let reason = text.split("\n\n").next().unwrap_or_default().trim_start_matches("error: ");
            let reason = reason.split_whitespace().collect::<Vec<_>>().join(" ");
            complain(&format!("{reason} (hint: see {NAME} --help)"));
            ExitCode::from(exit::USAGE)
        })
    }
}

/// Says on stderr why there is no answer; others' text may be part of it.
fn complain(reason: &str) {
    let reason: String = reason.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    let _ = writeln!(io::stderr(), "{NAME}: error: {reason}");
}

fn main() -> ExitCode {
    let started = Instant::now();
    let begun = clock::now();
    let arguments = match Arguments::read() {
        Ok(arguments) => arguments,
        Err(code) => return code,
    };
    match run(&arguments, started, begun) {
        Ok(()) => ExitCode::from(exit::SUCCESS),
        Err(reason) => {
            complain(&reason);
            ExitCode::from(exit::FAILURE)
        }
    }
}

fn run(arguments: &Arguments, started: Instant, begun: u64) -> Result<(), String> {
    let state = std::env::var_os("BLOCKHOST_STATE_DIR").filter(|dir| !dir.is_empty());
    let store = Store::new(&state.map_or_else(|| PathBuf::from("/var/lib/blockhost"), PathBuf::from));
    let boot_id = clock::boot_id().map_err(|e| format!("cannot read the boot's id: {e}"))?;
    let question = Question { arguments, boot_id: &boot_id, begun };
    if let Ok(text) = store.read_sample()
        && let Some(vms) = question.answered_by(&text)
    {
        return question.print(&vms);
    }
    match ask(&store, &question, started + LIMIT) {
        Outcome::Text(text) => {
            let sample = Sample::parse(&text, &boot_id, clock::now()).ok_or("the sampler sent no sample")?;
            match question.choose(&sample) {
                // It may exist all the same; nobody could say so in time.
                Err(_) if sample.standing == Standing::Partial => question.print(&question.what_is_left(&store)?),
                chosen => question.print(&chosen?),
            }
        }
        Outcome::Failed(reason) => Err(reason),
        Outcome::Late => question.print(&question.what_is_left(&store)?),
    }
}

/// What is asked for, and since when.
struct Question<'a> {
    arguments: &'a Arguments,
    boot_id: &'a str,
    begun: u64,
}

impl Question<'_> {
    /// The answer of a sample file, if it has one: it is fresh, and knows the VM, or is so new that a VM it does not know is
    /// none.
    fn answered_by(&self, text: &[u8]) -> Option<Vec<VmSample>> {
        let now = clock::now();
        let sample = Sample::parse(text, self.boot_id, now).filter(|sample| sample.is_fresh(now))?;
        self.choose(&sample).ok()
    }

    /// The VMs of a sample that was taken for this question.
    fn choose(&self, sample: &Sample<'_>) -> Result<Vec<VmSample>, String> {
        match &self.arguments.name {
            None => Ok(sample.vms().collect()),
            Some(name) => sample.vm(name).map(|vm| vec![vm]).ok_or_else(|| format!("there is no VM {name}")),
        }
    }

    /// Whether a sample says for good that there is no such VM: it was begun after we were asked.
    fn denied_by(&self, text: &[u8]) -> bool {
        Sample::parse(text, self.boot_id, clock::now()).is_some_and(|sample| {
            sample.standing == Standing::Complete && sample.begun >= self.begun && self.choose(&sample).is_err()
        })
    }

    /// When the time is over: the unchanging facts of an older sample, and that nobody knows the rest.
    fn what_is_left(&self, store: &Store) -> Result<Vec<VmSample>, String> {
        let text = store.read_sample().unwrap_or_default();
        let sample = Sample::parse(&text, self.boot_id, clock::now());
        let mut vms = match (&sample, &self.arguments.name) {
            (Some(sample), None) => sample.vms().collect(),
            (None, None) => return Err("libvirt did not answer in time".to_owned()),
            (sample, Some(name)) => {
                let vm = sample.as_ref().and_then(|sample| sample.vm(name));
                vec![vm.unwrap_or_else(|| VmSample::new(name.clone(), MetricsState::Unknown))]
            }
        };
        for vm in &mut vms {
            *vm = VmSample {
                vcpus: vm.vcpus,
                memory_total: vm.memory_total,
                disk_total: vm.disk_total,
                ..VmSample::new(vm.name.clone(), MetricsState::Unknown)
            };
        }
        Ok(vms)
    }

    fn print(&self, vms: &[VmSample]) -> Result<(), String> {
        let now = clock::now();
        let text = match (self.arguments.format, vms) {
            (Format::Openmetrics, _) => openmetrics::text(vms, now),
            (Format::Json, [vm]) if !self.arguments.all => vm.metrics(now).json() + "\n",
            (Format::Json, _) => {
                let object = |vm: &VmSample| format!("\"{}\":{}", vm.name, Metrics::json(&vm.metrics(now)));
                format!("{{{}}}\n", vms.iter().map(object).collect::<Vec<_>>().join(","))
            }
        };
        let mut out = io::stdout().lock();
        out.write_all(text.as_bytes()).and_then(|()| out.flush()).map_err(|e| format!("cannot write to stdout: {e}"))
    }
}

/// What came of asking for a new sample.
enum Outcome {
    /// A sample, from the sampler or from a caller that was quicker.
    Text(Vec<u8>),
    /// There is none, and this is why.
    Failed(String),
    /// Nothing until the deadline.
    Late,
}

/// Gets a new sample: one caller has it taken, the others wait for that one. Where nothing can be shared, as in a directory
/// that cannot be written, each has its own taken.
fn ask(store: &Store, question: &Question<'_>, deadline: Instant) -> Outcome {
    let _turn = match take_turn(store, deadline) {
        Turn::Mine(lock) => {
            if let Ok(text) = store.read_sample()
                && (question.answered_by(&text).is_some() || question.denied_by(&text))
            {
                return Outcome::Text(text);
            }
            if deadline.saturating_duration_since(Instant::now()) < LEAST {
                return Outcome::Late;
            }
            Some(lock)
        }
        Turn::Nobodys => None,
        Turn::Late => return Outcome::Late,
    };
    let sampler = match find_sampler() {
        Some(sampler) => sampler,
        None => return Outcome::Failed(format!("cannot find {SAMPLER} beside this program, in libexec or in $PATH")),
    };
    // Its stderr is not ours: it lives a little longer than this process, and whoever reads our pipes waits until nobody
    // holds them any more.
    let mut command = Command::new(&sampler);
    command.args(question.arguments.name.as_ref().map(VmName::as_str));
    let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn();
    let output = match child {
        Ok(mut child) => child.stdout.take(),
        Err(e) => return Outcome::Failed(format!("cannot run {}: {e}", sampler.display())),
    };
    match output.map(|output| receive(output, deadline)) {
        Some(Ok(Some(text))) => match text.strip_prefix(b"error ") {
            Some(reason) => Outcome::Failed(String::from_utf8_lossy(reason).trim_end().to_owned()),
            None => Outcome::Text(text),
        },
        Some(Ok(None)) => Outcome::Late,
        Some(Err(e)) => Outcome::Failed(format!("cannot read what {SAMPLER} sends: {e}")),
        None => Outcome::Failed(format!("{SAMPLER} has no output")),
    }
}

enum Turn {
    Mine(File),
    Nobodys,
    Late,
}

fn take_turn(store: &Store, deadline: Instant) -> Turn {
    let Ok(lock) = store.open_lock("sample") else { return Turn::Nobodys };
    if lock.try_lock().is_ok() {
        return Turn::Mine(lock);
    }
    // The kernel queues those that wait inside flock, which cannot be given a limit.
    let (send, receive) = mpsc::sync_channel(1);
    let waiting = thread::Builder::new().spawn(move || {
        let _ = send.send(lock.lock().map(|()| lock));
    });
    if waiting.is_err() {
        return Turn::Nobodys;
    }
    match receive.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
        Ok(Ok(lock)) => Turn::Mine(lock),
        Ok(Err(_)) => Turn::Nobodys,
        Err(_) => Turn::Late,
    }
}

/// Beside this program, where packages put programs that nobody calls by hand, then in `$PATH`.
fn find_sampler() -> Option<PathBuf> {
    let is_file = |path: &Path| path.metadata().is_ok_and(|meta| meta.is_file());
    if let Ok(own) = std::env::current_exe()
        && let Some(dir) = own.parent()
    {
        let near = [dir.join(SAMPLER), dir.join("../libexec").join(SAMPLER)];
        if let Some(found) = near.into_iter().find(|path| is_file(path)) {
            return Some(found);
        }
    }
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|dir| dir.join(SAMPLER)).find(|path| is_file(path))
}

/// Reads one answer: up to its last line, not up to the end of the stream, as the sampler goes on to ask the guests' agents.
/// `None` when the time is over.
fn receive(mut stream: ChildStdout, deadline: Instant) -> io::Result<Option<Vec<u8>>> {
    let mut text = Vec::new();
    let mut buffer = vec![0; 64 * 1024];
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let mut descriptors = [PollFd::new(stream.as_fd(), PollFlags::POLLIN)];
        let limit = PollTimeout::try_from(left).unwrap_or(PollTimeout::ZERO);
        match poll(&mut descriptors, limit) {
            Ok(0) if left.is_zero() => return Ok(None),
            Ok(0) | Err(nix::errno::Errno::EINTR) => continue,
            Ok(_) => {}
            Err(e) => return Err(e.into()),
        }
        let length = stream.read(&mut buffer)?;
        text.extend_from_slice(&buffer[..length]);
        let last = text.strip_suffix(b"\n").map(|t| t.rsplit(|b| *b == b'\n').next().unwrap_or(t));
        if last.is_some_and(|line| line.starts_with(b"end ") || line.starts_with(b"error ")) {
            return Ok(Some(text));
        }
        if length == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn no_sample_is_begun_that_would_come_too_late() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::new(dir.path());
        let arguments = Arguments { name: Some(VmName::new("web1").unwrap()), all: false, format: Format::Json };
        let question = Question { arguments: &arguments, boot_id: "", begun: 0 };
        // Nobody holds the lock, and there is no sampler beside a test: one that was looked for would be missed.
        assert!(matches!(ask(&store, &question, Instant::now() + LEAST / 2), Outcome::Late));
        assert!(!matches!(ask(&store, &question, Instant::now() + Duration::from_secs(60)), Outcome::Late));
    }
}
