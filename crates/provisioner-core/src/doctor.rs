//! What a host needs to run VMs: every part looked at, each with what to do about it. Nothing is changed, nothing waits
//! for ever, and neither root nor libvirt is needed to be told what is wrong with the rest.

mod checks;

use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use serde::Serialize;

use crate::ascii::printable;
use crate::libvirt::{Connection, bounded};
use crate::paths::Directories;
use crate::settings::Settings;
use crate::{Error, Result};

/// A part of a healthy host is looked at within milliseconds.
const LIMIT: Duration = Duration::from_secs(8);

/// How a part of the host is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    /// As it should be.
    Ok,
    /// VMs run, and something is missing or will be.
    Warn,
    /// Without it VMs cannot be created, reached or managed.
    Fail,
}

/// What was found out about one part.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Checked {
    /// The part's name, which stays the same.
    pub check: &'static str,
    /// How it is.
    pub level: Level,
    /// What is there, or wrong.
    pub text: String,
    /// What to do about it: commands where that is possible.
    pub remedy: Option<String>,
}

/// All parts, in an order in which they are best mended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Report {
    /// The worst of all.
    pub level: Level,
    /// Each part.
    pub checks: Vec<Checked>,
}

impl Report {
    /// How many parts are at `level`.
    #[must_use]
    pub fn count(&self, level: Level) -> usize {
        self.checks.iter().filter(|check| check.level == level).count()
    }
}

/// What a check says: how it is, what is there, what to do.
struct Verdict(Level, String, Option<String>);

fn ok(text: impl Into<String>) -> Verdict {
    Verdict(Level::Ok, text.into(), None)
}

fn warn(text: impl Into<String>, remedy: impl Into<String>) -> Verdict {
    Verdict(Level::Warn, text.into(), Some(remedy.into()))
}

fn fail(text: impl Into<String>, remedy: impl Into<String>) -> Verdict {
    Verdict(Level::Fail, text.into(), Some(remedy.into()))
}

/// An error as a verdict; `otherwise` is the remedy when it has no hint.
fn failed(level: Level, error: &Error, otherwise: &str) -> Verdict {
    let (text, hint) = error.parts();
    Verdict(level, text, Some(hint.unwrap_or(otherwise).to_owned()))
}

/// The verdict on several things at once: the worst, with all that is wrong; or `fine`.
fn all(verdicts: impl IntoIterator<Item = Verdict>, fine: impl Into<String>) -> Verdict {
    let wrong: Vec<_> = verdicts.into_iter().filter(|verdict| verdict.0 > Level::Ok).collect();
    let Some(level) = wrong.iter().map(|verdict| verdict.0).max() else { return ok(fine) };
    let texts: Vec<_> = wrong.iter().map(|verdict| verdict.1.as_str()).collect();
    let mut remedies: Vec<_> = wrong.iter().filter_map(|verdict| verdict.2.as_deref()).collect();
    remedies.dedup();
    Verdict(level, texts.join("; "), Some(remedies.join("; ")))
}

/// What the checks look at.
struct Context {
    dirs: Directories,
    uri: String,
    settings: Result<Settings>,
    connection: Result<Connection>,
    root: bool,
}

impl Context {
    fn settings(&self) -> Result<&Settings, Verdict> {
        let unread =
            || Verdict(Level::Warn, "not looked at: the settings cannot be read".into(), Some("see settings".into()));
        self.settings.as_ref().map_err(|_| unread())
    }

    fn connection(&self) -> Result<&Connection, Verdict> {
        let unasked =
            || Verdict(Level::Warn, "not looked at: libvirt cannot be asked".into(), Some("see libvirt".into()));
        self.connection.as_ref().map_err(|_| unasked())
    }
}

/// One check: the verdict either way, so that what it needs can be asked for with `?`.
type Check = fn(&Context) -> Result<Verdict, Verdict>;

/// Looks at everything at once. `uri` is libvirt's.
#[must_use]
pub fn examine(dirs: &Directories, uri: &str) -> Report {
    let files = dirs.clone();
    let settings = bounded(LIMIT, "cannot read the settings", move || Settings::load(&files))
        .unwrap_or_else(|late| Err(late.hint("see what the configuration's file system waits for")));
    let connection = Connection::open(uri);
    let root = nix::unistd::geteuid().is_root();
    let context = Arc::new(Context { dirs: dirs.clone(), uri: uri.to_owned(), settings, connection, root });
    let checks = run(&context, checks::ALL, LIMIT);
    let level = checks.iter().map(|check| check.level).max().unwrap_or(Level::Ok);
    Report { level, checks }
}

/// Runs all beside each other: one that hangs, as on storage that does, costs the others nothing.
fn run(context: &Arc<Context>, checks: &[(&'static str, Check)], limit: Duration) -> Vec<Checked> {
    let end = Instant::now() + limit;
    let begun: Vec<_> = checks
        .iter()
        .map(|(name, check)| {
            let (send, receive) = mpsc::sync_channel(1);
            let (context, check) = (Arc::clone(context), *check);
            let thread = thread::Builder::new().name((*name).to_owned()).spawn(move || {
                let verdict = check(&context).unwrap_or_else(|verdict| verdict);
                drop(context);
                let _ = send.send(verdict);
            });
            (*name, receive, thread)
        })
        .collect();
    begun
        .into_iter()
        .map(|(check, receive, thread)| {
            let answer = receive.recv_timeout(end.saturating_duration_since(Instant::now()));
            let verdict = match answer {
                Ok(verdict) => {
                    // Nothing is left to it but to end, which it must before the process does.
                    let _ = thread.map(thread::JoinHandle::join);
                    verdict
                }
                Err(RecvTimeoutError::Disconnected) => fail("the check itself has failed", "report it with its name"),
                Err(RecvTimeoutError::Timeout) => fail(
                    format!("no answer within {} s", limit.as_secs_f32()),
                    "see what hangs: ps -eo pid,stat,wchan,comm | grep ' D'",
                ),
            };
            Checked {
                check,
                level: verdict.0,
                text: printable(&verdict.1),
                remedy: verdict.2.as_deref().map(printable),
            }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ErrorKind;

    fn context() -> Arc<Context> {
        let refused = || Error::new(ErrorKind::Unavailable, "not here");
        Arc::new(Context {
            dirs: Directories::default(),
            uri: "test:///default".into(),
            settings: Err(refused()),
            connection: Err(refused()),
            root: false,
        })
    }

    #[test]
    fn one_that_hangs_costs_the_others_nothing() {
        let hangs: Check = |_| {
            thread::sleep(Duration::from_secs(30));
            Ok(ok("late"))
        };
        let begun = Instant::now();
        let context = context();
        let checked = run(
            &context,
            &[("a", hangs), ("b", |_| Ok(ok("fine"))), ("c", |c| Ok(warn(&*c.uri, "x")))],
            Duration::from_secs(3),
        );
        assert!(begun.elapsed() < Duration::from_secs(20));
        let levels: Vec<_> = checked.iter().map(|c| c.level).collect();
        assert_eq!(levels, [Level::Fail, Level::Ok, Level::Warn]);
    }

    #[test]
    fn the_worst_of_several_counts_and_all_that_is_wrong_is_said() {
        let Verdict(level, text, remedy) = all([ok("x"), warn("a", "do a"), fail("b", "do b")], "fine");
        assert_eq!((level, text.as_str(), remedy.as_deref()), (Level::Fail, "a; b", Some("do a; do b")));
        assert_eq!(all([ok("x")], "fine").1, "fine");
    }

    #[test]
    fn a_hint_is_the_remedy() {
        let error = Error::new(ErrorKind::Io, "cannot").because(Error::new(ErrorKind::Io, "no").hint("do (it)"));
        let Verdict(_, text, remedy) = failed(Level::Fail, &error, "else");
        assert_eq!((text.as_str(), remedy.as_deref()), ("cannot: no", Some("do (it)")));
    }

    #[test]
    fn without_libvirt_and_settings_every_check_still_has_a_verdict() {
        for checked in run(&context(), checks::ALL, LIMIT) {
            assert!(!checked.text.is_empty(), "{checked:?}");
            assert!(checked.level == Level::Ok || checked.remedy.is_some_and(|r| !r.is_empty()), "{}", checked.check);
        }
    }
}
