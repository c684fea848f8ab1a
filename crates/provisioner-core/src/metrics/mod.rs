//! Taking the sample of all VMs that every call of `metrics` answers from (see `provisioner-metrics`).
//!
//! What costs a round trip to QEMU's monitor is asked for all VMs at once and only where nothing cheaper knows it: block
//! counters always, the guest's memory every ten seconds. The rest comes from the kernel and from descriptions that are
//! read again every half minute. A QEMU that hangs takes neither the others' values nor the time of whoever waits: see
//! [`ask_monitors`].

mod guest;
mod memo;
mod process;

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use provisioner_contract::{MetricsState, VmName};
use provisioner_metrics::clock;
use provisioner_metrics::sample::{self, Reading, Sample, Standing, VmSample};
use provisioner_metrics::store::Store;

use self::memo::{AgentMemo, Memo, VmMemo, key};
use self::process::Process;
use crate::libvirt::domain_xml::Facts;
use crate::libvirt::stats::{DomainStats, stats};
use crate::libvirt::{Connection, Domain, DomainState, bounded};
use crate::{Error, ErrorKind, Result};

/// The whole of a sample: callers give up after 1.2 s, of which starting this program and answering take some.
const LIMIT: Duration = Duration::from_millis(1000);

/// A libvirtd that does not take a connection in this time cannot be reached.
const CONNECT_LIMIT: Duration = Duration::from_millis(700);

/// A list of all domains takes a few milliseconds, but libvirt waits in it for each domain that is just being started.
const LIST_LIMIT: Duration = Duration::from_millis(250);

/// How long one VM may take to answer when it is asked alone, which takes a few milliseconds.
const ALONE_LIMIT: Duration = Duration::from_millis(80);

/// How often a description is read again, in nanoseconds.
const DESCRIBE_EVERY: u64 = 30 * SECOND;

/// The same while the agent's channel is not open yet: a new VM should not wait half a minute for its agent's facts.
const DESCRIBE_WITHOUT_AGENT_EVERY: u64 = 4 * SECOND;

/// Guests report their memory every ten seconds, so asking more often brings nothing.
const BALLOON_EVERY: u64 = 10 * SECOND;

/// How often an agent is asked, whether it has answered or not.
const AGENT_EVERY: u64 = 30 * SECOND;

/// An agent's answer counts until the next one should be there.
const AGENT_REMEMBERED: u64 = 90 * SECOND;

/// How long the monitor of a VM that did not answer is left alone, in nanoseconds: the first time, when the host may just have
/// been busy, and at the most. It doubles each time.
const STUCK_FOR: [u64; 2] = [2 * SECOND, 20 * SECOND];

const SECOND: u64 = 1_000_000_000;

pub(crate) const MEMO: &str = "memo.json";
pub(crate) const AGENTS: &str = "agents.json";

/// One VM on its way into the sample.
struct Vm {
    sample: VmSample,
    memo: VmMemo,
    process: Option<Process>,
    /// Absent when the domains could not be listed in time.
    domain: Option<Domain>,
    /// Whether its description was read for this sample.
    described: bool,
}

/// Takes a sample, keeps it in the store of the state directory `state`, and hands its text to `answer`. Afterwards, when
/// the caller has what it waits for, asks some of the guests' agents for the next sample. `wanted` is the VM the caller
/// asks about: it is looked for even when the domains cannot be listed.
///
/// # Errors
/// [`ErrorKind::Unavailable`] when libvirt cannot be asked, [`ErrorKind::NotFound`] when the domains could not be listed but
/// libvirt says that `wanted` is none of them. That the store cannot be written is no failure.
pub fn take(state: &Path, uri: &str, wanted: Option<&VmName>, answer: impl FnOnce(&str)) -> Result<()> {
    let end = Instant::now() + LIMIT;
    let begun = clock::now();
    let store = Store::new(state);
    let boot_id = clock::boot_id().map_err(|e| Error::new(ErrorKind::Io, "cannot read the boot's id").because(e))?;
    let target = uri.to_owned();
    let connection =
        bounded(CONNECT_LIMIT, &format!("cannot connect to libvirt at {uri}"), move || Connection::open(&target))??;
    let mut memos = Memo::<VmMemo>::load(&store, MEMO, &boot_id);
    let agents = Memo::<AgentMemo>::load(&store, AGENTS, &boot_id);
    let text = store.read_sample().unwrap_or_default();
    let mut history: BTreeMap<VmName, VmSample> = Sample::parse(&text, &boot_id, clock::now())
        .map(|sample| sample.vms().map(|vm| (vm.name.clone(), vm)).collect())
        .unwrap_or_default();

    let listed = list(&connection, end)?;
    let standing = if listed.is_some() { Standing::Complete } else { Standing::Partial };
    let known: Vec<(VmName, MetricsState, Option<Domain>)> = match listed {
        // A domain of another kind of name is none of ours.
        Some(domains) => domains
            .into_iter()
            .filter_map(|(domain, state)| Some((VmName::new(domain.name()).ok()?, state, Some(domain))))
            .collect(),
        None => {
            let new = wanted.into_iter().filter(|name| !history.contains_key(name));
            let new = new.map(|name| (name.clone(), MetricsState::Unknown, None));
            history.values().map(|vm| (vm.name.clone(), vm.state, None)).chain(new).collect()
        }
    };
    let mut vms: Vec<Vm> = Vec::with_capacity(known.len());
    for (name, state, domain) in known {
        let memo = memos.vms.remove(name.as_str()).unwrap_or_default();
        let old = history.remove(&name);
        vms.push(Vm::new(domain, name, state, memo, old));
    }
    describe(&mut vms, end);
    let mut answers = ask_monitors(&mut vms, uri, end);
    let gone: BTreeSet<VmName> = vms
        .extract_if(.., |vm| answers.get(vm.name()).is_some_and(|answer| answer.gone))
        .map(|vm| vm.sample.name)
        .collect();
    for vm in &mut vms {
        vm.read(answers.remove(vm.sample.name.as_str()), agents.vms.get(vm.name()));
    }

    let samples: Vec<VmSample> = vms.iter().map(|vm| vm.sample.clone()).collect();
    let text = sample::write(&boot_id, begun, clock::now(), standing, &samples);
    if let Err(error) = store.write_sample(&text) {
        tracing::debug!("cannot keep the sample: {error}");
    }
    if let Some(name) = wanted.filter(|name| gone.contains(*name)) {
        return Err(Error::new(ErrorKind::NotFound, format!("there is no VM {name}")));
    }
    answer(&text);
    if standing == Standing::Complete {
        // Those that are left have no domain any more.
        memos.vms.clear();
    }
    memos.vms.extend(vms.iter().map(|vm| (vm.name().to_owned(), vm.memo.clone())));
    memos.store(&store, MEMO);
    ask_agents(&store, &boot_id, &vms);
    Ok(())
}

/// All domains and their states; `None` when libvirt takes too long, as while it starts a VM.
fn list(connection: &Connection, end: Instant) -> Result<Option<Vec<(Domain, MetricsState)>>> {
    let connection = connection.clone();
    let (send, receive) = mpsc::channel();
    run(move || {
        let domains = connection.domain_states().and_then(|states| {
            let states: HashMap<String, DomainState> = states.into_iter().collect();
            let with_state = |domain: Domain| {
                let state = states.get(domain.name()).copied()?;
                Some((domain, state.into()))
            };
            Ok(connection.domains()?.into_iter().filter_map(with_state).collect())
        });
        // Nobody listens any more when it took too long.
        let _ = send.send(domains);
    });
    let limit = LIST_LIMIT.min(end.saturating_duration_since(Instant::now()));
    receive.recv_timeout(limit).ok().transpose()
}

impl From<DomainState> for MetricsState {
    fn from(state: DomainState) -> Self {
        match state {
            DomainState::Running | DomainState::ShuttingDown => Self::Running,
            DomainState::Paused | DomainState::PmSuspended => Self::Paused,
            DomainState::ShutOff | DomainState::Crashed => Self::Stopped,
        }
    }
}

impl Vm {
    fn new(domain: Option<Domain>, name: VmName, state: MetricsState, memo: VmMemo, old: Option<VmSample>) -> Self {
        // What was off may run by now, if libvirt did not say so just now.
        let off = state == MetricsState::Stopped && domain.is_some();
        let process = if off { None } else { process(name.as_str(), &memo) };
        let run = process.map(|process| process.run);
        // Most of what was known of another run is not true of this one. Its size mostly is; that is read again as well.
        let memo = if memo.run == key(run) {
            memo
        } else {
            let VmMemo { vcpus, memory, targets, capacity, .. } = memo;
            VmMemo { run: key(run), vcpus, memory, targets, capacity, ..VmMemo::default() }
        };
        let mut sample = VmSample::new(name, state);
        sample.run = run;
        if let Some(old) = old.filter(|old| old.run == run) {
            (sample.host, sample.block) = (old.host, old.block);
        }
        Self { sample, memo, process, domain, described: false }
    }

    fn name(&self) -> &str {
        self.sample.name.as_str()
    }

    fn is_active(&self) -> bool {
        self.sample.state != MetricsState::Stopped || self.process.is_some()
    }

    /// Whether its monitor would not answer: then it is not asked.
    fn is_stuck(&self, now: u64) -> bool {
        self.process.is_some_and(|process| process.frozen) || self.memo.stuck_until.is_some_and(|until| until > now)
    }

    fn needs_description(&self, now: u64) -> bool {
        let every =
            if self.is_active() && !self.memo.connected { DESCRIBE_WITHOUT_AGENT_EVERY } else { DESCRIBE_EVERY };
        is_due(self.memo.described, every, now)
    }

    fn described_as(&mut self, facts: Facts, now: u64) {
        let memo = &mut self.memo;
        memo.described = Some(now);
        memo.connected = facts.agent_connected;
        (memo.vcpus, memo.memory) = (facts.vcpus, facts.memory);
        (memo.taps, memo.targets) = (facts.taps, facts.targets);
        memo.cpu_file = self.process.and_then(|process| process::cpu_file(process.run.pid));
        self.described = true;
    }

    /// Puts together what is known of it by now.
    fn read(&mut self, mut answer: Option<Answer>, agent: Option<&AgentMemo>) {
        match answer.as_ref().and_then(|answer| answer.state) {
            Some(state) => self.sample.state = state,
            // It was not listed, and did not answer alone: what it was doing it does still, as far as its process shows.
            None if self.domain.is_none() => {
                self.sample.state = match (self.sample.state, self.process) {
                    (MetricsState::Stopped | MetricsState::Unknown, Some(_)) => MetricsState::Running,
                    (MetricsState::Running | MetricsState::Paused, None) => MetricsState::Unknown,
                    (state, _) => state,
                };
            }
            None => {}
        }
        if let Some(facts) = answer.as_mut().and_then(|answer| answer.facts.take()) {
            self.described_as(facts, clock::now());
        }
        if let Some(answer) = &answer {
            let sizes = answer.stats.capacity.iter().filter(|(target, _)| self.memo.targets.contains(target));
            self.memo.capacity = sizes.map(|(_, size)| *size).reduce(u64::saturating_add).or(self.memo.capacity);
            if answer.balloon {
                self.memo.balloon = Some(answer.at);
                self.memo.memory_used = answer.stats.memory_used;
            }
        }
        let now = clock::now();
        let stuck = self.is_stuck(now);
        let sample = &mut self.sample;
        (sample.vcpus, sample.memory_total, sample.disk_total) =
            (self.memo.vcpus, self.memo.memory, self.memo.capacity);
        if sample.state == MetricsState::Stopped {
            return;
        }
        let block = answer.and_then(|answer| Some(Reading { at: answer.at, values: answer.stats.block?.map(Some) }));
        sample.block = sample.block.then(block);
        let process =
            self.process.and_then(|process| Process::of(process.run.pid)).filter(|p| Some(p.run) == sample.run);
        let host = process.map(|process| {
            let [received, sent] = process::traffic(&self.memo.taps);
            let cpu = self.memo.cpu_file.as_deref().and_then(process::cpu_time).unwrap_or(process.cpu);
            Reading { at: now, values: [Some(cpu), received, sent] }
        });
        sample.host = sample.host.then(host);
        // A guest that does not report its memory uses at least what its process holds.
        sample.memory_used = self.memo.memory_used.or(process.map(|process| process.resident));
        let agent =
            agent.filter(|agent| agent.run == self.memo.run && now.saturating_sub(agent.asked) < AGENT_REMEMBERED);
        if let Some(agent) = agent.filter(|agent| agent.answered) {
            (sample.disk_used, sample.connections) = (agent.disk_used, agent.connections);
            sample.agent = self.memo.connected && sample.state == MetricsState::Running && !stuck;
        }
    }
}

impl VmMemo {
    fn fell_silent(&mut self, now: u64) {
        let [first, most] = STUCK_FOR;
        self.stuck_until = Some(now + (first << self.silences.min(8)).min(most));
        self.silences = self.silences.saturating_add(1);
    }
}

/// The process a domain had the last time, if it still runs, or else the one it has now.
fn process(name: &str, memo: &VmMemo) -> Option<Process> {
    let same = memo.run.and_then(|(pid, start)| Process::of(pid).filter(|process| process.run.start == start));
    same.or_else(|| Process::of_domain(name))
}

fn is_due(last: Option<u64>, every: u64, now: u64) -> bool {
    last.is_none_or(|last| now.saturating_sub(last) >= every)
}

/// Reads the descriptions that are due, as far as they come in time.
fn describe(vms: &mut [Vm], end: Instant) {
    let now = clock::now();
    let due = vms.iter().enumerate().filter(|(_, vm)| vm.needs_description(now));
    let mut due: Vec<(usize, Domain)> = due.filter_map(|(i, vm)| Some((i, vm.domain.clone()?))).collect();
    if due.is_empty() {
        return;
    }
    // A description enters no monitor; should one hang all the same, it is that of a VM that hangs anyway.
    due.sort_by_key(|(i, _)| vms[*i].is_stuck(now));
    let limit = end.min(Instant::now() + Duration::from_millis(100 + 4 * due.len() as u64));
    let (send, receive) = mpsc::channel();
    run(move || {
        for (index, domain) in due {
            if let Ok(facts) = domain.description().and_then(|xml| Facts::parse(&xml))
                && send.send((index, facts)).is_err()
            {
                return;
            }
        }
    });
    while let Ok((index, facts)) = receive.recv_timeout(limit.saturating_duration_since(Instant::now())) {
        vms[index].described_as(facts, now);
    }
}

/// What libvirt and QEMU said about one VM.
#[derive(Default)]
struct Answer {
    /// When, in nanoseconds since boot.
    at: u64,
    /// Whether its memory was asked for.
    balloon: bool,
    /// There is no such domain any more.
    gone: bool,
    /// Its state, if that was asked for.
    state: Option<MetricsState>,
    /// Its description, if that was asked for.
    facts: Option<Facts>,
    stats: DomainStats,
}

/// What is to be asked about one VM.
#[derive(Clone)]
struct Wanted {
    name: VmName,
    active: bool,
    balloon: bool,
    /// Whether it has never been described yet.
    describe: bool,
    /// Whether its monitor may be entered.
    monitor: bool,
    /// Whether it did not answer the last time. Then it is asked alone, not to hold up the call for all once more.
    suspect: bool,
    domain: Option<Domain>,
}

/// Asks QEMU's monitors for what only they know: first all in one call. One VM can hold up that call for all, when its QEMU
/// hangs without having been stopped by a signal, or while libvirt is starting it. Then each is asked alone, and the one that
/// does not answer is left alone for a while, the longer the more often.
fn ask_monitors(vms: &mut [Vm], uri: &str, end: Instant) -> HashMap<String, Answer> {
    let now = clock::now();
    let mut wanted: Vec<Wanted> = Vec::new();
    for vm in vms.iter() {
        let active = vm.is_active();
        let balloon = active && is_due(vm.memo.balloon, BALLOON_EVERY, now);
        // Of a VM that is off only the size of its disk is wanted, which changes rarely.
        let monitor = !vm.is_stuck(now);
        // Of one that hangs its state can be had, should the list not have said it.
        let worth = if active { monitor || vm.domain.is_none() } else { vm.described || vm.memo.capacity.is_none() };
        if worth {
            let describe = vm.memo.described.is_none();
            let (name, domain) = (vm.sample.name.clone(), vm.domain.clone());
            let suspect = vm.memo.silences > 0;
            wanted.push(Wanted { name, active, balloon, describe, monitor, suspect, domain });
        }
    }
    let mut answers = HashMap::new();
    if wanted.iter().all(|vm| vm.domain.is_some()) {
        let patience = Duration::from_millis(150 + 5 * wanted.len() as u64);
        ask_together(&wanted, end.min(Instant::now() + patience), &mut answers);
    }
    // A domain that is not in a complete answer has gone; that shows when it is asked alone.
    wanted.retain(|vm| {
        let incomplete = |answer: &Answer| vm.describe || vm.active && answer.stats.block.is_none();
        answers.get(vm.name.as_str()).is_none_or(incomplete)
    });
    if wanted.is_empty() {
        return answers;
    }
    let stuck = ask_alone(wanted, uri, end, &mut answers);
    for vm in vms {
        if stuck.contains(&vm.sample.name) {
            tracing::debug!(domain = vm.name(), "its monitor does not answer");
            vm.memo.fell_silent(clock::now());
        } else if !vm.is_stuck(now) && answers.contains_key(vm.name()) {
            vm.memo.silences = 0;
        }
    }
    answers
}

/// One call for those whose memory is wanted and one for the others.
fn ask_together(wanted: &[Wanted], limit: Instant, answers: &mut HashMap<String, Answer>) {
    let lists = [false, true].map(|balloon| {
        let those = wanted.iter().filter(|vm| vm.balloon == balloon && !vm.suspect);
        (balloon, those.filter_map(|vm| vm.domain.clone()).collect::<Vec<_>>())
    });
    let (send, receive) = mpsc::channel();
    run(move || {
        for (balloon, list) in lists.into_iter().filter(|(_, list)| !list.is_empty()) {
            let Ok(stats) = stats(&list, balloon, false) else { return };
            if send.send((clock::now(), balloon, stats)).is_err() {
                return;
            }
        }
    });
    while let Ok((at, balloon, all)) = receive.recv_timeout(limit.saturating_duration_since(Instant::now())) {
        for stats in all {
            answers.insert(stats.name.clone(), Answer { at, balloon, stats, ..Answer::default() });
        }
    }
}

/// What the thread that asks one VM after the other reports.
enum Step {
    Asking(VmName),
    Said(VmName, Box<Answer>),
}

/// Asks each VM alone, over another connection as the first may be held up, and returns those that did not answer. Whoever
/// does not is passed over: another thread goes on with the next.
fn ask_alone(wanted: Vec<Wanted>, uri: &str, end: Instant, answers: &mut HashMap<String, Answer>) -> BTreeSet<VmName> {
    let queue = Arc::new(Mutex::new(VecDeque::from(wanted)));
    let mut stuck = BTreeSet::new();
    while Instant::now() < end && !queue.lock().unwrap_or_else(PoisonError::into_inner).is_empty() {
        let (send, receive) = mpsc::channel();
        let (queue, uri) = (Arc::clone(&queue), uri.to_owned());
        run(move || {
            let Ok(connection) = Connection::open(&uri) else { return };
            loop {
                let next = queue.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
                let Some(vm) = next else { return };
                let name = vm.name.clone();
                if send.send(Step::Asking(name.clone())).is_err() {
                    // Given up on meanwhile; somebody else takes it.
                    queue.lock().unwrap_or_else(PoisonError::into_inner).push_front(vm);
                    return;
                }
                let Some(answer) = ask_one(&connection, &vm) else { continue };
                if send.send(Step::Said(name, Box::new(answer))).is_err() {
                    return;
                }
            }
        });
        let (mut asking, mut begun) = (None, false);
        loop {
            let limit = ALONE_LIMIT.min(end.saturating_duration_since(Instant::now()));
            match receive.recv_timeout(limit) {
                Ok(Step::Asking(name)) => (asking, begun) = (Some(name), true),
                Ok(Step::Said(name, answer)) => {
                    answers.insert(name.as_str().to_owned(), *answer);
                    asking = None;
                }
                Err(mpsc::RecvTimeoutError::Disconnected) if begun => break,
                // No connection: another try would fail too.
                Err(mpsc::RecvTimeoutError::Disconnected) => return stuck,
                Err(mpsc::RecvTimeoutError::Timeout) => {
                    // When the time for all is over, nothing is said about this one.
                    stuck.extend(asking.take().filter(|_| limit == ALONE_LIMIT));
                    break;
                }
            }
        }
    }
    stuck
}

/// `None` when libvirt's answer says nothing.
fn ask_one(connection: &Connection, vm: &Wanted) -> Option<Answer> {
    let gone = || Answer { gone: true, ..Answer::default() };
    let Some(domain) = connection.domain(&vm.name).ok()? else { return Some(gone()) };
    let Some(state) = domain.state().ok()? else { return Some(gone()) };
    if !vm.monitor {
        return Some(Answer { at: clock::now(), state: Some(state.into()), ..Answer::default() });
    }
    let facts = if vm.describe { Some(Facts::parse(&domain.description().ok()?).ok()?) } else { None };
    let stats = stats(std::slice::from_ref(&domain), vm.balloon, true).ok()?.pop().unwrap_or_default();
    Some(Answer { at: clock::now(), balloon: vm.balloon, gone: false, state: Some(state.into()), facts, stats })
}

fn run(work: impl FnOnce() + Send + 'static) {
    if let Err(error) = thread::Builder::new().name("sampler".into()).spawn(work) {
        tracing::debug!("cannot start a thread: {error}");
    }
}

/// Asks the agents whose answer is oldest, and keeps what they say. Only where it can be kept: else every call would ask.
fn ask_agents(store: &Store, boot_id: &str, vms: &[Vm]) {
    let Ok(lock) = store.open_lock("agents") else { return };
    if lock.try_lock().is_err() {
        return;
    }
    let mut agents = Memo::<AgentMemo>::load(store, AGENTS, boot_id);
    let now = clock::now();
    let mut due = Vec::new();
    for vm in vms {
        let Some(domain) = vm.domain.clone() else { continue };
        let last = agents.vms.get(vm.name()).filter(|agent| agent.run == vm.memo.run).map(|agent| agent.asked);
        let running = vm.sample.state == MetricsState::Running && vm.memo.run.is_some();
        if running && vm.memo.connected && !vm.is_stuck(now) && is_due(last, AGENT_EVERY, now) {
            due.push((last, domain, vm.memo.run));
        }
    }
    let before = agents.vms.len();
    agents.vms.retain(|name, _| vms.iter().any(|vm| vm.name() == name));
    if due.is_empty() && agents.vms.len() == before {
        return;
    }
    if !agents.store(store, AGENTS) {
        return;
    }
    due.sort_by_key(|(last, _, _)| *last);
    agents.vms.extend(guest::ask(due.into_iter().map(|(_, domain, run)| (domain, run)).collect()));
    agents.store(store, AGENTS);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_monitor_that_stays_silent_is_left_alone_for_longer_each_time() {
        let mut memo = VmMemo::default();
        let pauses: Vec<u64> = (0..40)
            .map(|_| {
                memo.fell_silent(7);
                memo.stuck_until.unwrap_or_default() - 7
            })
            .collect();
        assert_eq!(pauses[..5], [2, 4, 8, 16, 20].map(|seconds| seconds * SECOND));
        assert!(pauses[5..].iter().all(|pause| *pause == 20 * SECOND));
    }
}
