//! Collecting what has expired: VMs past their end are shut down and marked suspended, those suspended for longer than the
//! grace are destroyed, and what dead processes left is cleared.
//!
//! The database has other writers, and a payment may arrive at any moment. So candidates are only a list of where to look:
//! each is judged again under its lock, and once more under the database's lock in the very update that marks it, or that
//! begins its destroy. An extension that is written before that wins.
//!
//! Both lists are made at the start: a VM suspended in this run is destroyed in a later one at the earliest.

use std::collections::{BTreeSet, HashMap};
use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use provisioner_contract::{GcEntry, GcKept, GcOutcome, GcPhase, GcReport, Record, RecordStatus, Timestamp, VmName};

use crate::cancel::Cancel;
use crate::child::{self, CommandExt as _};
use crate::database::{Database, Document};
use crate::host::Host;
use crate::journal::{Journal, Operation, PoolVolume};
use crate::libvirt::{Connection, Domain, DomainState, bounded};
use crate::lock::VmLock;
use crate::ownership::{self, OwnDomain};
use crate::power::{self, Held};
use crate::{Error, ErrorKind, Result, destroy, durable, failpoint, metrics, recovery, tombstone};

/// How long another command on a VM is waited for. It may be a create, or another collection: then it is that one's.
const LOCK_WAIT: Duration = Duration::from_secs(5);
/// One question about all domains. libvirt does not answer it while somebody powers frozen QEMUs off, 11 s for each.
const LIST_LIMIT: Duration = Duration::from_secs(60);
/// The hook takes rules away, which takes seconds; the VM goes whether it succeeds or not.
const HOOK_LIMIT: Duration = Duration::from_secs(30);
/// For a guest that has been told to shut down by a process that died since.
const SHUTDOWN_AGAIN_LIMIT: Duration = Duration::from_secs(20);

/// The points at which a test can stop a collection, in their order.
pub const FAILPOINTS: &[&str] =
    &["gc.listed", "gc.locked", "gc.journal", "gc.stopped", "gc.autostart", "gc.marked", "gc.hook"];

/// What is asked for.
#[derive(Debug, Clone)]
pub struct GcRequest {
    /// Do it, and not only say what would be done.
    pub execute: bool,
    /// Whether to suspend what has expired.
    pub suspend: bool,
    /// Whether to destroy what was suspended long enough.
    pub destroy: bool,
    /// Days between the two; the configured number when absent.
    pub grace_days: Option<u32>,
    /// How long a guest may take to shut down before its power is taken.
    pub shutdown_limit: Duration,
    /// The network plugin's program, which is run before a VM is destroyed.
    pub network_hook: Option<PathBuf>,
}

impl GcRequest {
    fn rules(&self, configured: u32) -> Rules {
        Rules { now: Timestamp::now(), grace_days: self.grace_days.unwrap_or(configured) }
    }

    fn report(&self, rules: Rules) -> GcReport {
        GcReport {
            execute: self.execute,
            started_at: rules.now,
            grace_days: rules.grace_days,
            recover: GcPhase::default(),
            suspend: GcPhase::default(),
            destroy: GcPhase::default(),
            cleared: Vec::new(),
            damaged: Vec::new(),
            kept: Vec::new(),
            stopped: None,
        }
    }
}

/// By what a record is judged.
#[derive(Debug, Clone, Copy)]
struct Rules {
    now: Timestamp,
    grace_days: u32,
}

/// `Ok` says why something is to be done, `Err` why not.
type Judgement = Result<String, String>;

impl Rules {
    /// Whether the subscription is over. A record without an end has none.
    fn expired(&self, record: &Record) -> Judgement {
        match record.expires_at {
            None => Err("it does not expire".into()),
            Some(at) if at > self.now => Err(format!("it is paid for until {at}")),
            Some(at) => Ok(format!("expired {at}")),
        }
    }

    /// Whether the VM is to be shut down and marked. `up` says whether its domain has a process: a suspended VM that
    /// has one was started by somebody, or its guest ignored an earlier shutdown.
    fn suspend(&self, record: &Record, up: bool) -> Judgement {
        if record.status == RecordStatus::Destroyed {
            return Err("it is destroyed".into());
        }
        let expired = self.expired(record)?;
        match (record.status, record.suspended_at) {
            (RecordStatus::Active, _) => Ok(expired),
            _ if up => Ok(format!("{expired}, recorded as suspended, and on")),
            // Nobody knows how much of the grace is over, so it begins now.
            (_, None) => Ok(format!("{expired}, suspended nobody knows since when")),
            (_, Some(at)) => Err(format!("it is suspended since {at}")),
        }
    }

    /// Whether the VM is to be destroyed.
    fn destroy(&self, record: &Record) -> Judgement {
        match (record.status, record.suspended_at) {
            (RecordStatus::Suspended, Some(at)) if at.plus_days(self.grace_days) <= self.now => {
                self.expired(record).map(|expired| format!("{expired}, suspended {at}"))
            }
            (RecordStatus::Suspended, Some(at)) => Err(format!("its grace ends {}", at.plus_days(self.grace_days))),
            (RecordStatus::Suspended, None) => Err("since when it is suspended is not recorded".into()),
            (status, _) => Err(format!("it is {status}")),
        }
    }
}

/// The candidates, each with the reason.
type Candidates = Vec<(VmName, String)>;

/// Sorts the records into the phases; what is damaged or stays goes into the report.
fn candidates(
    document: &Document,
    up: &dyn Fn(&VmName) -> bool,
    rules: Rules,
    request: &GcRequest,
    report: &mut GcReport,
) -> (Candidates, Candidates) {
    let (mut suspend, mut destroy) = (Vec::new(), Vec::new());
    for (key, record) in document.records() {
        let judged = VmName::new(&key).map_err(Error::from).and_then(|name| Ok((name, record?)));
        let (name, record) = match judged {
            Ok((_, record)) if !record.is_live() => continue,
            Ok(judged) => judged,
            Err(error) => {
                let key: String = key.chars().take(80).collect();
                report.damaged.push(GcKept { name: key, why: error.in_full() });
                continue;
            }
        };
        // Who is to be destroyed need not be shut down first.
        let why = match (rules.destroy(&record), rules.suspend(&record, up(&name))) {
            (Ok(why), _) if request.destroy => {
                destroy.push((name, why));
                continue;
            }
            (_, Ok(why)) if request.suspend => {
                suspend.push((name, why));
                continue;
            }
            (Ok(why), _) | (_, Ok(why)) => format!("{why}; this run does not deal with such"),
            (Err(why), _) if record.status == RecordStatus::Suspended => why,
            (_, Err(why)) => why,
        };
        report.kept.push(GcKept { name: key, why });
    }
    (suspend, destroy)
}

/// What became of a candidate, unless it failed.
enum Dealt {
    Done(String),
    Skipped(String),
}

/// Collects. What fails for one VM is in the report and does not keep it from the others.
///
/// # Errors
/// When nothing can be judged: libvirt cannot be asked or the database cannot be read.
pub fn gc(host: &Host, request: &GcRequest) -> Result<GcReport> {
    let rules = request.rules(host.settings.gc_grace_days);
    let mut run = Run { host, request, rules, report: request.report(rules) };
    // Before anything else: without libvirt nothing can be finished either.
    drop(host.connect()?);
    if request.execute && recovery::sweep(host) {
        run.report.cleared.push("provisioning.lock, whose create is dead".into());
    }
    run.recover()?;

    let document = host.database().read()?;
    let states = states(host)?;
    let up = |name: &VmName| states.get(name.as_str()).is_some_and(|state| *state != DomainState::ShutOff);
    let (suspend, destroy) = candidates(&document, &up, rules, request, &mut run.report);
    for (name, record) in document.records() {
        if let Ok(record) = record
            && record.status == RecordStatus::Suspended
            && let (Some(end), Err(_)) = (record.expires_at, rules.expired(&record))
        {
            host.progress.warn(&format!(
                "{name} is recorded as suspended, and is paid for until {end}; bring it back: blockhost-vm-resume {name}"
            ));
        }
    }
    failpoint::hit("gc.listed")?;
    run.each(|report| &mut report.suspend, suspend, |run, name, why| run.suspend(name, why));
    run.each(|report| &mut report.destroy, destroy, |run, name, why| run.destroy(name, why));
    if request.execute && run.report.stopped.is_none() {
        run.clear_files(&document, &states);
    }
    Ok(run.report)
}

/// The same against a database file alone.
///
/// # Errors
/// When it cannot be read or written.
pub fn mock(database: &Database, configured_grace_days: u32, request: &GcRequest) -> Result<GcReport> {
    let rules = request.rules(configured_grace_days);
    let mut report = request.report(rules);
    let document = database.read()?;
    let (suspend, destroy) = candidates(&document, &|_| false, rules, request, &mut report);
    type Act<'a> = &'a dyn Fn(&mut Document, &VmName, &Record) -> Result<Judgement>;
    let suspending: Act<'_> = &|document, name, record| {
        let judgement = rules.suspend(record, false);
        if judgement.is_ok() {
            document.mark_suspended(name, Timestamp::now())?;
        }
        Ok(judgement.map(|why| format!("suspended ({why})")))
    };
    let destroying: Act<'_> = &|document, name, record| {
        let judgement = rules.destroy(record);
        if judgement.is_ok() {
            document.mark_destroyed(name, Timestamp::now(), &|_| false)?;
        }
        Ok(judgement.map(|why| format!("destroyed ({why})")))
    };
    for (phase, list, verb, act) in [
        (&mut report.suspend, suspend, "suspended", suspending),
        (&mut report.destroy, destroy, "destroyed", destroying),
    ] {
        for (name, why) in list {
            let (outcome, detail) = if request.execute {
                let judgement = database.update(|document| match document.record(&name)? {
                    Some(record) => act(document, &name, &record),
                    None => Ok(Err("its record has gone".into())),
                })?;
                match judgement {
                    Ok(done) => (GcOutcome::Done, done),
                    Err(why) => (GcOutcome::Skipped, why),
                }
            } else {
                (GcOutcome::Planned, format!("would be {verb}: {why}"))
            };
            phase.candidates.push(GcEntry { name, outcome, detail });
        }
    }
    Ok(report)
}

/// The state of every domain, from one question.
fn states(host: &Host) -> Result<HashMap<String, DomainState>> {
    let uri = host.uri.clone();
    let ask = move || Connection::open(&uri)?.domain_states();
    Ok(bounded(LIST_LIMIT, "cannot ask libvirt about the VMs", ask)??.into_iter().collect())
}

struct Run<'a> {
    host: &'a Host,
    request: &'a GcRequest,
    rules: Rules,
    report: GcReport,
}

impl Run<'_> {
    /// Deals with one candidate after the other, until a signal comes or libvirt is gone.
    fn each(
        &mut self,
        phase: impl Fn(&mut GcReport) -> &mut GcPhase,
        candidates: Candidates,
        deal: impl Fn(&Self, &VmName, &str) -> Result<Dealt>,
    ) {
        for (name, why) in candidates {
            if self.report.stopped.is_none() && self.host.cancel.is_cancelled() {
                self.report.stopped = Some("stopped by a signal".into());
            }
            let (outcome, detail) = match &self.report.stopped {
                Some(_) => (GcOutcome::Skipped, "the run ended before its turn".to_owned()),
                None => match deal(self, &name, &why) {
                    Ok(Dealt::Done(how)) if self.request.execute => (GcOutcome::Done, how),
                    Ok(Dealt::Done(how)) => (GcOutcome::Planned, how),
                    Ok(Dealt::Skipped(why)) => (GcOutcome::Skipped, why),
                    Err(error) if error.kind == ErrorKind::Interrupted => {
                        self.report.stopped = Some(error.to_string());
                        (GcOutcome::Skipped, "the run was stopped".into())
                    }
                    Err(error) => {
                        self.host.progress.warn(&format!("{name}: {}", error.in_full()));
                        if error.kind == ErrorKind::Unavailable
                            && let Err(gone) = self.host.connect()
                        {
                            self.report.stopped = Some(gone.in_full());
                        }
                        (GcOutcome::Failed, error.in_full())
                    }
                },
            };
            phase(&mut self.report).candidates.push(GcEntry { name, outcome, detail });
        }
    }

    /// The VM's lock, or why it is not to be had.
    fn hold(&self, name: &VmName) -> Result<Result<Held, String>> {
        match Held::acquire(self.host, name, LOCK_WAIT) {
            Ok(held) => Ok(Ok(held)),
            Err(error) if error.kind == ErrorKind::Busy => Ok(Err(error.to_string())),
            Err(error) => Err(error),
        }
    }

    /// Finishes what dead processes began. One whose process lives is under way, unless nobody holds its lock.
    fn recover(&mut self) -> Result<()> {
        let (host, execute) = (self.host, self.request.execute);
        let mut found = Vec::new();
        for (name, journal) in Journal::list(&host.dirs)? {
            let why = match &journal {
                Ok(journal) if journal.owner.is_alive() => {
                    let free = execute && VmLock::try_acquire(&host.dirs, &name, &host.command)?.is_some();
                    if !free {
                        let why = format!("{} (PID {}) is at it", journal.command, journal.owner.pid);
                        self.report.kept.push(GcKept { name: name.to_string(), why });
                        continue;
                    }
                    begun(journal)
                }
                Ok(journal) => begun(journal),
                Err(_) => String::new(),
            };
            found.push((name, why));
        }
        self.each(|report| &mut report.recover, found, |run, name, why| run.finish(name, why));
        // The other VMs can be judged all the same.
        if let Err(error) = self.clear_late() {
            self.host.progress.warn(&format!("what came back of removed VMs is not cleared: {}", error.in_full()));
        }
        Ok(())
    }

    /// Removes what has come back of VMs that are gone. What nobody can send any more is forgotten.
    fn clear_late(&mut self) -> Result<()> {
        let host = self.host;
        if self.request.execute {
            tombstone::prune(&host.dirs, self.rules.now)?;
        }
        let stones = tombstone::all(&host.dirs)?;
        if stones.is_empty() || self.report.stopped.is_some() {
            return Ok(());
        }
        let uri = host.uri.clone();
        let pools: BTreeSet<_> =
            stones.iter().flat_map(|stone| &stone.volumes).map(|volume| volume.pool.clone()).collect();
        let ask = move || -> Result<_> {
            let connection = Connection::open(&uri)?;
            let mut volumes = BTreeSet::new();
            for pool in pools {
                // A pool that is gone, or off, brings nothing back.
                let Ok(open) = connection.pool(&pool) else { continue };
                let _ = open.refresh();
                volumes.extend(open.volumes()?.into_iter().map(|name| PoolVolume { pool: pool.clone(), name }));
            }
            Ok((connection.domain_uuids()?, volumes))
        };
        let (domains, volumes) = bounded(LIST_LIMIT, "cannot ask libvirt what there is", ask)??;
        let document = host.database().read()?;
        let mut found = Vec::new();
        for stone in stones {
            let name = &stone.vm_name;
            let (domain, live) =
                (domains.get(name.as_str()), document.raw_record(name).is_some_and(Document::stands_for_a_vm));
            let exists = |volume: &PoolVolume| Ok(volumes.contains(volume));
            let Some(returned) = tombstone::returned(stone, domain.map(String::as_str), live, exists)? else {
                continue;
            };
            let why = format!("{} came back after the VM was removed", returned.what());
            let stone = returned.stone;
            if returned.restored {
                let why = format!(
                    "{why}, with its disk: if it was restored, correct its status in the database; if not: blockhost-vm-destroy {}",
                    stone.vm_name
                );
                self.report.kept.push(GcKept { name: stone.vm_name.to_string(), why });
            } else {
                found.push((stone.vm_name, why));
            }
        }
        self.each(
            |report| &mut report.recover,
            found,
            |run, name, why| {
                if !run.request.execute {
                    return Ok(Dealt::Done(format!("would be removed: {why}")));
                }
                let held = match run.hold(name)? {
                    Ok(held) => held,
                    Err(why) => return Ok(Dealt::Skipped(why)),
                };
                if Journal::load(&run.host.dirs, name)?.is_some() {
                    return Ok(Dealt::Skipped("a command is at it".into()));
                }
                match recovery::clear_late(run.host, name, held.lock())?.as_slice() {
                    [] => Ok(Dealt::Skipped("it has gone by now".into())),
                    removed => Ok(Dealt::Done(format!("removed {}: {why}", removed.join(", ")))),
                }
            },
        );
        Ok(())
    }

    fn finish(&self, name: &VmName, begun: &str) -> Result<Dealt> {
        if !self.request.execute {
            // A damaged one is as much a failure when it is only looked at.
            Journal::load(&self.host.dirs, name)?;
            return Ok(Dealt::Done(format!("would be cleared: {begun}")));
        }
        let held = match self.hold(name)? {
            Ok(held) => held,
            Err(why) => return Ok(Dealt::Skipped(why)),
        };
        recovery::recover(self.host, name, held.lock())?;
        Ok(Dealt::Done(format!("cleared: {begun}")))
    }

    /// The VM's lock, after what a dead command left was cleared, and its record as it is now; or why there is nothing to do.
    fn look_again(&self, name: &VmName) -> Result<Result<(Held, Record), String>> {
        let held = match self.hold(name)? {
            Ok(held) => held,
            Err(why) => return Ok(Err(why)),
        };
        failpoint::hit("gc.locked")?;
        recovery::recover(self.host, name, held.lock())?;
        let record = self.host.database().read()?.record(name)?;
        Ok(record.map(|record| (held, record)).ok_or_else(|| "its record has gone".into()))
    }

    /// Looks at the VM again, and if its subscription is still over shuts it down and marks it.
    fn suspend(&self, name: &VmName, why: &str) -> Result<Dealt> {
        if !self.request.execute {
            return Ok(Dealt::Done(format!("would be suspended: {why}")));
        }
        let host = self.host;
        host.progress.phase(&format!("suspending {name}"));
        let (_held, record) = match self.look_again(name)? {
            Ok(found) => found,
            Err(why) => return Ok(Dealt::Skipped(why)),
        };
        let own = ownership::find(host, &host.connect()?, name, Some(&record))?;
        let up = own.as_ref().map_or(Ok(false), |own| own.domain.is_active())?;
        if let Err(why) = self.rules.suspend(&record, up) {
            return Ok(Dealt::Skipped(why));
        }
        host.cancel.check()?;
        // From here on a signal waits: a guest that was told to shut down and is not recorded as suspended would be off
        // although it may be paid for by the time somebody looks.
        let host = Host { cancel: Cancel::default(), ..host.clone() };
        if up {
            let bridge = &host.settings.bridge;
            let id = own.as_ref().and_then(|own| own.facts.metadata.as_ref()).map_or("", |m| &m.creation_id);
            Journal::begin(Operation::Suspend, name, &host.command, id, bridge)?.store(&host.dirs)?;
            failpoint::hit("gc.journal")?;
        }
        let settled = settle(&host, name, own.as_ref(), up, self.request.shutdown_limit, self.rules)?;
        if settled.paid && up {
            begin_again(&host, name, own.as_ref(), &record)?;
        }
        Journal::remove(&host.dirs, name)?;
        Ok(match settled {
            Settled { called_off: None, how, .. } => Dealt::Done(format!("suspended: {how} ({why})")),
            Settled { called_off: Some(why), paid, .. } if paid && up => {
                Dealt::Skipped(format!("{why} by now; it was started again"))
            }
            Settled { called_off: Some(why), .. } => Dealt::Skipped(why),
        })
    }

    /// Looks at the VM again, and if it is still to go destroys it.
    fn destroy(&self, name: &VmName, why: &str) -> Result<Dealt> {
        if !self.request.execute {
            return Ok(Dealt::Done(format!("would be destroyed: {why}")));
        }
        let host = self.host;
        host.progress.phase(&format!("destroying {name}"));
        let (held, record) = match self.look_again(name)? {
            Ok(found) => found,
            Err(why) => return Ok(Dealt::Skipped(why)),
        };
        if let Err(why) = self.rules.destroy(&record) {
            return Ok(Dealt::Skipped(why));
        }
        self.clean_network(name)?;
        failpoint::hit("gc.hook")?;
        let wanted = |record: &Record| self.rules.destroy(record).is_ok();
        match destroy::under_lock(host, name, held.lock(), Some(&wanted))? {
            Some(_) => Ok(Dealt::Done(format!("destroyed ({why})"))),
            None => Ok(Dealt::Skipped("its record was changed meanwhile".into())),
        }
    }

    /// Best effort: what a network plugin keeps of the VM must not keep the VM.
    fn clean_network(&self, name: &VmName) -> Result<()> {
        let Some(hook) = &self.request.network_hook else { return Ok(()) };
        let mut command = child::tied(&hook.to_string_lossy());
        command.args(["cleanup", name.as_str()]);
        let what = format!("cannot clean the network of {name} up");
        match command.run_within(&what, HOOK_LIMIT, &self.host.cancel) {
            Err(error) if error.kind == ErrorKind::Interrupted => Err(error),
            Err(error) => {
                self.host.progress.warn(&error.in_full());
                Ok(())
            }
            Ok(_) => Ok(()),
        }
    }

    /// Removes files of VMs that are no more, and of locks that nobody holds.
    fn clear_files(&mut self, document: &Document, states: &HashMap<String, DomainState>) {
        let host = self.host;
        if let Err(error) = VmLock::sweep(&host.dirs, &host.command) {
            host.progress.warn(&error.in_full());
        }
        // An earlier provisioner kept a file per VM there; two of the same form are the sampler's own.
        let entries = fs::read_dir(host.dirs.metrics()).into_iter().flatten().flatten();
        for file in entries.filter_map(|entry| entry.file_name().into_string().ok()) {
            let stem = file.strip_suffix(".json").and_then(|stem| VmName::new(stem).ok());
            let Some(name) = stem.filter(|_| file != metrics::MEMO && file != metrics::AGENTS) else { continue };
            // A record that cannot be read counts as a VM.
            let live = document.raw_record(&name).is_some()
                && document.record(&name).ok().flatten().is_none_or(|r| r.is_live());
            if live || states.contains_key(name.as_str()) {
                continue;
            }
            match durable::remove_entry(&host.dirs.metrics(), &file) {
                Ok(()) => self.report.cleared.push(format!("the sample of {name}, which is no more")),
                Err(error) => host.progress.warn(&error.in_full()),
            }
        }
    }
}

fn begun(journal: &Journal) -> String {
    let what = match journal.operation {
        Operation::Create => "a create to be undone",
        Operation::Destroy => "a destroy to be finished",
        Operation::Suspend => "a suspension to be finished",
    };
    format!("{what}, begun {} by {} (PID {})", journal.started_at, journal.command, journal.owner.pid)
}

/// How a suspension ended.
struct Settled {
    /// How the domain came to be off.
    how: String,
    /// Why the record was not marked, if it was not.
    called_off: Option<String>,
    /// Whether that is because it has been paid for.
    paid: bool,
}

/// Makes sure that the domain is off and does not start with the host, and marks the record, unless that says by now that
/// it is not to be.
fn settle(
    host: &Host,
    name: &VmName,
    own: Option<&OwnDomain>,
    up: bool,
    limit: Duration,
    rules: Rules,
) -> Result<Settled> {
    let mut how = "its domain is gone".to_owned();
    if let Some(own) = own {
        how = turn_off(host, &own.domain, limit)?;
        failpoint::hit("gc.stopped")?;
        set_autostart(&own.domain, false)?;
        failpoint::hit("gc.autostart")?;
    }
    let (called_off, paid) = host.database().update(|document| {
        let Some(record) = document.record(name)? else { return Ok((Some("its record has gone".to_owned()), false)) };
        match rules.suspend(&record, up) {
            Ok(_) => {
                document.mark_suspended(name, Timestamp::now())?;
                Ok((None, false))
            }
            Err(why) => Ok((Some(why), record.is_live() && rules.expired(&record).is_err())),
        }
    })?;
    failpoint::hit("gc.marked")?;
    if let Some(own) = own
        && paid
    {
        set_autostart(&own.domain, true)?;
    }
    Ok(Settled { how, called_off, paid })
}

/// A domain without a definition, as somebody may have left it, has no autostart.
pub(crate) fn set_autostart(domain: &Domain, on: bool) -> Result<()> {
    if domain.is_persistent()? { domain.set_autostart(on) } else { Ok(()) }
}

/// Shuts the domain down, and takes its power if that does not help.
fn turn_off(host: &Host, domain: &Domain, limit: Duration) -> Result<String> {
    if !domain.is_active()? {
        return Ok("it was off".into());
    }
    match power::shut_down(host, domain, limit, Instant::now() + limit) {
        Ok(()) => Ok("shut down".into()),
        Err(error) if error.kind == ErrorKind::Interrupted => Err(error),
        Err(error) => {
            host.progress.phase(&format!("powering {} off: {error}", domain.name()));
            domain.power_off()?;
            Ok("powered off, as it did not shut down".into())
        }
    }
}

/// A payment came while the VM was being shut down. It ran when we came, so it runs on.
fn begin_again(host: &Host, name: &VmName, own: Option<&OwnDomain>, record: &Record) -> Result<()> {
    let Some(own) = own else { return Ok(()) };
    power::bring_up(host, &own.domain).map_err(|error| {
        let what = format!("{name} was paid for while it was being suspended, and cannot be started again");
        Error::new(error.kind, what).because(error).hint(format!("start it: blockhost-vm-start {name}"))
    })?;
    power::restore_route(host, own, Some(record));
    Ok(())
}

/// Finishes the suspension behind `journal`, whose process is dead. The guest has been told to shut down, and may do so
/// at any moment: so it is seen off first, and started again if it has been paid for since.
///
/// # Errors
/// When it cannot be stopped or marked; the journal stays.
pub(crate) fn finish_suspension(host: &Host, journal: &Journal) -> Result<()> {
    let name = &journal.vm_name;
    let rules = Rules { now: Timestamp::now(), grace_days: host.settings.gc_grace_days };
    let record = host.database().read()?.record(name)?;
    let own = match ownership::find(host, &host.reconnect()?, name, record.as_ref()) {
        // Somebody else's domain has that name by now; it was not the one we stopped.
        Err(error) if error.kind == ErrorKind::Conflict => {
            host.progress.warn(&error.in_full());
            None
        }
        outcome => outcome?,
    };
    let settled = settle(host, name, own.as_ref(), true, SHUTDOWN_AGAIN_LIMIT, rules)?;
    if settled.paid
        && let Some(record) = &record
        && let Err(error) = begin_again(host, name, own.as_ref(), record)
    {
        // What cannot be started must not keep every other command from the VM.
        host.progress.warn(&error.in_full());
    }
    Journal::remove(&host.dirs, name)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use serde_json::json;

    const PAST: &str = "2026-11-01T00:00:00Z";
    const FUTURE: &str = "2026-12-01T00:00:00Z";
    const NOW: &str = "2026-11-21T00:00:00Z";

    fn rules() -> Rules {
        Rules { now: NOW.parse().unwrap(), grace_days: 7 }
    }

    fn request(suspend: bool, destroy: bool) -> GcRequest {
        let shutdown_limit = Duration::from_secs(1);
        GcRequest { execute: false, suspend, destroy, grace_days: None, shutdown_limit, network_hook: None }
    }

    /// All that decides: status, end, since when it is suspended, whether the domain is on; and in which list it comes.
    #[test]
    fn each_record_comes_into_the_right_list() {
        const RECENT: &str = "2026-11-20T00:00:00Z";
        let long = Some("2026-11-14T00:00:00Z");
        for (status, end, since, up, expected) in [
            ("active", Some(PAST), None, true, "suspend"),
            ("active", Some(PAST), None, false, "suspend"),
            ("active", Some(NOW), None, true, "suspend"),
            ("active", Some(PAST), long, true, "suspend"),
            ("active", Some(FUTURE), None, true, ""),
            ("active", Some(FUTURE), long, false, ""),
            ("active", None, None, true, ""),
            ("suspended", Some(PAST), Some(RECENT), false, ""),
            ("suspended", Some(PAST), Some(RECENT), true, "suspend"),
            ("suspended", Some(PAST), None, false, "suspend"),
            ("suspended", Some(PAST), None, true, "suspend"),
            ("suspended", Some(PAST), long, false, "destroy"),
            ("suspended", Some(PAST), long, true, "destroy"),
            ("suspended", Some(FUTURE), long, false, ""),
            ("suspended", Some(FUTURE), long, true, ""),
            ("suspended", Some(FUTURE), None, true, ""),
            ("suspended", None, long, false, ""),
            ("destroyed", Some(PAST), long, false, ""),
            ("destroyed", Some(PAST), None, true, ""),
        ] {
            let record = json!({"status": status, "expires_at": end, "suspended_at": since});
            let document = Document::parse(&json!({"vms": {"a": record}}).to_string()).unwrap();
            let sorted = |request: GcRequest| {
                let mut report = request.report(rules());
                let (suspend, destroy) = candidates(&document, &|_| up, rules(), &request, &mut report);
                assert!(report.damaged.is_empty());
                let kept = report.kept.len() + usize::from(status == "destroyed");
                assert_eq!(suspend.len() + destroy.len() + kept, 1, "{record}");
                if !suspend.is_empty() {
                    "suspend"
                } else if !destroy.is_empty() {
                    "destroy"
                } else {
                    ""
                }
            };
            assert_eq!(sorted(request(true, true)), expected, "{record}, on: {up}");
            let with_suspend = match expected {
                // Left to run on for free until somebody destroys it: it is at least stopped.
                "destroy" if up => "suspend",
                "destroy" => "",
                other => other,
            };
            assert_eq!(sorted(request(true, false)), with_suspend, "{record}, on: {up}, suspending only");
            let with_destroy = if expected == "destroy" { expected } else { "" };
            assert_eq!(sorted(request(false, true)), with_destroy, "{record}, on: {up}, destroying only");
        }
    }

    #[test]
    fn a_grace_of_any_length_is_counted_and_damaged_records_are_told() {
        let since = json!({"status": "suspended", "expires_at": PAST, "suspended_at": PAST});
        let record = Record::from_json("a", &since).unwrap();
        for (grace_days, due) in [(0, true), (20, true), (21, false), (u32::MAX, false)] {
            assert_eq!(Rules { grace_days, ..rules() }.destroy(&record).is_ok(), due, "{grace_days}");
        }
        let vms = json!({"a": since, "b": 7, "../c": {"status": "active"}, "d": {"status": "active", "expires_at": "soon"},
            "e/f": {"status": "destroyed"}});
        let document = Document::parse(&json!({"vms": vms}).to_string()).unwrap();
        let request = request(true, true);
        let mut report = request.report(rules());
        let (suspend, destroy) = candidates(&document, &|_| true, rules(), &request, &mut report);
        assert_eq!((suspend.len(), destroy.len()), (0, 1));
        let damaged: Vec<_> = report.damaged.iter().map(|record| record.name.as_str()).collect();
        assert_eq!(damaged, ["b", "../c", "d", "e/f"]);
    }
}
