//! Who holds something: a process, told apart from a later one that got the same PID.

use std::fs;

use nix::errno::Errno;
use nix::sys::signal::kill;
use nix::unistd::Pid;

use crate::{Error, Result};

/// A process of this host. A PID alone is reused within hours; with the start time and the boot it is unique.
#[derive(Debug, Clone, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
pub struct ProcessId {
    /// The PID.
    pub pid: u32,
    /// When it started, in clock ticks since boot: field 22 of `/proc/<pid>/stat`.
    pub start_time: u64,
    /// `/proc/sys/kernel/random/boot_id` of the boot it ran in.
    pub boot_id: String,
}

/// What `/proc/<pid>/stat` says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stat {
    state: char,
    start_time: u64,
}

/// Reads the two fields wanted of a `stat` line. The command name in it is free text in brackets, brackets included.
fn parse_stat(text: &str) -> Option<Stat> {
    let mut fields = text.get(text.rfind(')')? + 1..)?.split_ascii_whitespace();
    let state = fields.next()?.chars().next()?;
    // The state is field 3, the start time field 22.
    let start_time = fields.nth(18)?.parse().ok()?;
    Some(Stat { state, start_time })
}

fn stat(pid: u32) -> Option<Stat> {
    parse_stat(&fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
}

fn boot_id() -> Result<String> {
    let path = std::path::Path::new("/proc/sys/kernel/random/boot_id");
    let text = fs::read_to_string(path).map_err(|e| Error::io("read", path, e))?;
    Ok(text.trim().to_owned())
}

/// Whether a process of that PID exists but is hidden from us, as `/proc` mounted with `hidepid` does.
fn exists_unseen(pid: u32) -> bool {
    match i32::try_from(pid) {
        Ok(pid) if pid > 0 => matches!(kill(Pid::from_raw(pid), None), Ok(()) | Err(Errno::EPERM)),
        _ => false,
    }
}

impl ProcessId {
    /// This process.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Io`] when `/proc` cannot be read.
    pub fn current() -> Result<Self> {
        let path = std::path::Path::new("/proc/self/stat");
        let text = fs::read_to_string(path).map_err(|e| Error::io("read", path, e))?;
        let stat = parse_stat(&text)
            .ok_or_else(|| Error::new(crate::ErrorKind::Io, format!("cannot make sense of {}", path.display())))?;
        Ok(Self { pid: std::process::id(), start_time: stat.start_time, boot_id: boot_id()? })
    }

    /// Whether that very process still runs. A zombie does not: it can undo nothing any more.
    #[must_use]
    pub fn is_alive(&self) -> bool {
        // When the boot cannot be told, the start time decides alone.
        if boot_id().is_ok_and(|now| now != self.boot_id) {
            return false;
        }
        runs(self.pid, self.start_time)
    }
}

/// Whether `pid` is a running program whose command line contains `name`.
pub(crate) fn runs_program(pid: u32, name: &str) -> bool {
    fs::read(format!("/proc/{pid}/cmdline"))
        .is_ok_and(|line| line.split(|b| *b == 0).any(|part| String::from_utf8_lossy(part).contains(name)))
}

/// The start time of this process, for names of files that die with it.
pub(crate) fn own_start_time() -> u64 {
    stat(std::process::id()).map_or(0, |stat| stat.start_time)
}

/// Whether the process of that PID which started at that time, in this boot, still runs.
pub(crate) fn runs(pid: u32, start_time: u64) -> bool {
    match stat(pid) {
        Some(stat) => stat.start_time == start_time && !matches!(stat.state, 'Z' | 'X'),
        None => exists_unseen(pid),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::process::{Command, Stdio};

    #[test]
    fn this_process_is_alive_and_its_namesakes_are_not() {
        let me = ProcessId::current().unwrap();
        assert!(me.is_alive());
        assert!(!ProcessId { start_time: me.start_time + 1, ..me.clone() }.is_alive());
        assert!(!ProcessId { boot_id: "another".into(), ..me }.is_alive());
    }

    #[test]
    fn a_process_is_dead_as_a_zombie_and_after() {
        let mut child = Command::new("cat").stdin(Stdio::piped()).spawn().unwrap();
        let id = ProcessId {
            pid: child.id(),
            start_time: stat(child.id()).unwrap().start_time,
            boot_id: boot_id().unwrap(),
        };
        assert!(id.is_alive());
        drop(child.stdin.take());
        for _ in 0..500 {
            if !id.is_alive() {
                break;
            }
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        assert!(!id.is_alive(), "still alive, though nobody but its parent knows of it");
        child.wait().unwrap();
        assert!(!id.is_alive());
    }

    #[test]
    fn a_command_name_full_of_brackets_hides_nothing() {
        let line = "42 (a) S 1) R) R 1 42 42 0 -1 0 0 0 0 0 0 0 0 0 20 0 1 0 777 0 0";
        assert_eq!(parse_stat(line), Some(Stat { state: 'R', start_time: 777 }));
        assert_eq!(parse_stat("42 (a) S 1"), None);
        assert_eq!(parse_stat(""), None);
    }
}
