//! Waiting until a VM can be handed to its owner: the guest agent answers and the login user exists.

use std::mem;
use std::time::{Duration, Instant};

use provisioner_contract::{LoginName, VmName};

use crate::ascii::printable;
use crate::host::Host;
use crate::libvirt::{Domain, agent};
use crate::{Error, ErrorKind, Result};

/// Between two looks. A look at the channel costs 0.2 ms, so this bounds what waiting adds to a boot.
const POLL: Duration = Duration::from_millis(250);

/// One agent call: the agent is alive by then, so this is generous; a longer one would block the VM's only slot.
const AGENT_SECONDS: u8 = 5;

/// What cloud-init writes when its last stage has ended.
const CLOUD_INIT_RESULT: &str = "/run/cloud-init/result.json";

/// How long a guest may take to be ready: under KVM, and emulated, which is ten times slower and on a slow host more.
const LIMIT: Duration = Duration::from_secs(180);
const EMULATED_LIMIT: Duration = Duration::from_secs(600);

/// How much of the console's end is read for its last line.
pub(crate) const CONSOLE_TAIL: u64 = 4096;

fn limit(configured_seconds: Option<u64>, emulated: bool) -> Duration {
    configured_seconds.map_or(if emulated { EMULATED_LIMIT } else { LIMIT }, Duration::from_secs)
}

/// What is waited for.
pub(crate) struct Awaited<'a> {
    pub(crate) name: &'a VmName,
    /// The login user.
    pub(crate) user: &'a LoginName,
    /// Whether the user-data is the caller's own.
    pub(crate) own_user_data: bool,
    /// Whether the guest runs without KVM.
    pub(crate) emulated: bool,
    /// The last line on the guest's console, for the reason of a failure; `None` when nothing is there.
    pub(crate) console: &'a dyn Fn() -> Result<Option<String>>,
}

/// The last line of a console's output that shows something, in printable characters and of bounded length.
pub(crate) fn last_line(output: &[u8]) -> Option<String> {
    let text = without_colours(&String::from_utf8_lossy(output));
    let last = text.split(['\n', '\r']).map(str::trim).rfind(|line| line.chars().any(|c| c.is_ascii_alphanumeric()))?;
    Some(printable(last).chars().take(200).collect())
}

/// Leaves out control sequences (ECMA-48, CSI), with which systemd paints its messages.
fn without_colours(text: &str) -> String {
    let mut parts = text.split("\u{1b}[");
    let first = parts.next().unwrap_or_default().to_owned();
    let is_final = |c: char| ('@'..='~').contains(&c);
    parts.fold(first, |rest, part| rest + part.split_once(is_final).map_or("", |(_, shown)| shown))
}

impl Awaited<'_> {
    /// Waits for the agent, then for the user in the guest's `/etc/passwd`. No process is started in the guest. A libvirtd
    /// that goes away meanwhile is waited for too: the guest boots on without it.
    ///
    /// With user-data of the caller's own cloud-init may end without that user; then a warning is given and the VM counts
    /// as ready.
    ///
    /// # Errors
    /// `TimedOut` after the configured limit, `Hypervisor` when the VM stops meanwhile or cloud-init ends without the
    /// user, `Interrupted`, or libvirt's.
    pub(crate) fn wait(&self, host: &Host) -> Result<()> {
        let (name, user) = (self.name, self.user);
        let limit = limit(host.settings.libvirt.guest_ready_timeout_seconds, self.emulated);
        let mut wait = Wait { host, awaited: self, limit, deadline: Instant::now() + limit, domain: None, away: false };
        host.progress.phase("waiting for the guest agent");
        let unanswered = |domain: &Domain| match domain.agent_connected() {
            Ok(true) => "its guest agent has the channel open and did not answer",
            Ok(false) => "its guest agent has not opened the channel",
            Err(_) => "its guest agent did not answer",
        };
        wait.until(&|domain| unanswered(domain).to_owned(), &|domain| {
            Ok(domain.agent_connected()? && domain.agent_answers(2))
        })?;
        host.progress.phase(&format!("waiting for the user {user} in the guest"));
        let has_user = |domain: &Domain| {
            domain
                .read_guest_file("/etc/passwd", AGENT_SECONDS)
                .is_ok_and(|passwd| agent::has_user(&passwd, user.as_str()))
        };
        let otherwise = format!("its guest agent answers, and the user {user} did not appear in it");
        wait.until(&|_| otherwise.clone(), &|domain| {
            if has_user(domain) {
                return Ok(true);
            }
            if domain.read_guest_file(CLOUD_INIT_RESULT, AGENT_SECONDS).is_err() {
                return Ok(false);
            }
            // It may have ended between the two looks.
            if has_user(domain) {
                return Ok(true);
            }
            if self.own_user_data {
                host.progress.warn(&format!("cloud-init has finished and the given user-data made no user {user}"));
                return Ok(true);
            }
            Err(Error::new(ErrorKind::Hypervisor, format!("cloud-init in {name} made no user {user}"))
                .hint("look at the cloud-init template, and whether the name is one of the system's own users"))
        })
    }
}

struct Wait<'a> {
    host: &'a Host,
    awaited: &'a Awaited<'a>,
    limit: Duration,
    deadline: Instant,
    /// Through the connection in use; none when that has been lost.
    domain: Option<Domain>,
    /// Whether libvirt could not be asked the last time. It may already have been away when the wait began.
    away: bool,
}

impl Wait<'_> {
    fn until(&mut self, otherwise: &dyn Fn(&Domain) -> String, ready: &dyn Fn(&Domain) -> Result<bool>) -> Result<()> {
        loop {
            self.host.cancel.check()?;
            let looked = self.look(ready);
            let was_away = mem::replace(&mut self.away, looked.is_err());
            match looked {
                Ok(true) => return Ok(()),
                Ok(false) => {}
                Err(error) if error.kind == ErrorKind::Unavailable && Instant::now() < self.deadline => {
                    self.domain = None;
                    if !was_away {
                        self.host.progress.warn("libvirt went away while the VM boots; waiting for it to come back");
                    }
                }
                Err(error) => return Err(error),
            }
            if Instant::now() >= self.deadline {
                let how_far = self.domain.as_ref().map_or_else(|| "libvirt could not be asked".to_owned(), otherwise);
                let console = match (self.awaited.console)() {
                    Ok(Some(line)) => format!("the last line on its console is {line:?}"),
                    Ok(None) => "nothing is on its console".to_owned(),
                    Err(error) => format!("its console cannot be read: {error}"),
                };
                let (name, limit) = (self.awaited.name, self.limit.as_secs());
                let what = format!("domain {name} was not ready within {limit} s: {how_far}; {console}");
                return Err(Error::new(ErrorKind::TimedOut, what)
                    .hint("libvirt.guest_ready_timeout_seconds in db.yaml sets the limit"));
            }
            self.host.cancel.sleep(POLL)?;
        }
    }

    fn look(&mut self, ready: &dyn Fn(&Domain) -> Result<bool>) -> Result<bool> {
        let name = self.awaited.name;
        let gone = || Error::new(ErrorKind::NotFound, format!("domain {name} was removed while it booted"));
        let domain = match &self.domain {
            Some(domain) => domain,
            None => self.domain.insert(self.host.connect()?.domain(name)?.ok_or_else(gone)?),
        };
        match domain.state()? {
            Some(state) if state.is_running() => ready(domain),
            Some(state) => {
                let what = format!("domain {name} stopped while it booted: {state:?}");
                Err(Error::new(ErrorKind::Hypervisor, what).hint("its console log may say why"))
            }
            None => Err(gone()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_emulated_guest_has_more_time_unless_a_limit_is_configured() {
        let seconds = |configured, emulated| limit(configured, emulated).as_secs();
        assert_eq!((seconds(None, false), seconds(None, true)), (180, 600));
        assert_eq!((seconds(Some(7), false), seconds(Some(7), true)), (7, 7));
    }

    #[test]
    fn the_last_line_of_a_console_is_one_that_says_something() {
        let line = |text: &str| last_line(text.as_bytes());
        let boot = "[    1.0] Run /init as init process\r\n[\x1b[0;32m  OK  \x1b[0m] Reached target\r\n\x1b[0m\r\n";
        assert_eq!(line(boot).as_deref(), Some("[  OK  ] Reached target"));
        assert_eq!(line("one\r\ntwo  \r\n---\r\n").as_deref(), Some("two"));
        assert_eq!(line("\r\n"), None);
        assert_eq!(last_line(&[0xff; 3000]), None);
        assert_eq!(line(&"x".repeat(3000)).map(|line| line.len()), Some(200));
    }
}
