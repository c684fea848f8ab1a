//! Waiting until a VM can be handed to its owner: the guest agent answers and the login user exists.

use std::mem;
use std::time::{Duration, Instant};

use provisioner_contract::{LoginName, VmName};

use crate::host::Host;
use crate::libvirt::{Domain, agent};
use crate::{Error, ErrorKind, Result};

/// Between two looks. A look at the channel costs 0.2 ms, so this bounds what waiting adds to a boot.
const POLL: Duration = Duration::from_millis(250);

/// One agent call: the agent is alive by then, so this is generous; a longer one would block the VM's only slot.
const AGENT_SECONDS: u8 = 5;

/// What cloud-init writes when its last stage has ended.
const CLOUD_INIT_RESULT: &str = "/run/cloud-init/result.json";

/// Waits for the agent, then for the user in the guest's `/etc/passwd`. No process is started in the guest. A libvirtd that
/// goes away meanwhile is waited for too: the guest boots on without it.
///
/// With user-data of the caller's own (`own_user_data`) cloud-init may end without that user; then a warning is
/// given and the VM counts as ready.
///
/// # Errors
/// `TimedOut` after the configured limit, `Hypervisor` when the VM stops meanwhile or cloud-init ends without the
/// user, `Interrupted`, or libvirt's.
pub fn wait_until_ready(host: &Host, name: &VmName, user: &LoginName, own_user_data: bool) -> Result<()> {
    let limit = Duration::from_secs(host.settings.libvirt.guest_ready_timeout_seconds);
    let mut wait = Wait { host, name, deadline: Instant::now() + limit, domain: None, away: false };
    host.progress.phase("waiting for the guest agent");
    wait.until("its guest agent did not answer", &|domain| Ok(domain.agent_connected()? && domain.agent_answers(2)))?;
    host.progress.phase(&format!("waiting for the user {user} in the guest"));
    let has_user = |domain: &Domain| {
        domain.read_guest_file("/etc/passwd", AGENT_SECONDS).is_ok_and(|passwd| agent::has_user(&passwd, user.as_str()))
    };
    wait.until(&format!("the user {user} did not appear in it"), &|domain| {
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
        if own_user_data {
            host.progress.warn(&format!("cloud-init has finished and the given user-data made no user {user}"));
            return Ok(true);
        }
        Err(Error::new(ErrorKind::Hypervisor, format!("cloud-init in {name} made no user {user}"))
            .hint("look at the cloud-init template, and whether the name is one of the system's own users"))
    })
}

struct Wait<'a> {
    host: &'a Host,
    name: &'a VmName,
    deadline: Instant,
    /// Through the connection in use; none when that has been lost.
    domain: Option<Domain>,
    /// Whether libvirt could not be asked the last time. It may already have been away when the wait began.
    away: bool,
}

impl Wait<'_> {
    fn until(&mut self, otherwise: &str, ready: &dyn Fn(&Domain) -> Result<bool>) -> Result<()> {
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
                let limit = self.host.settings.libvirt.guest_ready_timeout_seconds;
                let what = format!("domain {} was not ready within {limit} s: {otherwise}", self.name);
                return Err(Error::new(ErrorKind::TimedOut, what)
                    .hint("libvirt.guest_ready_timeout_seconds in db.yaml sets the limit"));
            }
            self.host.cancel.sleep(POLL)?;
        }
    }

    fn look(&mut self, ready: &dyn Fn(&Domain) -> Result<bool>) -> Result<bool> {
        let name = self.name;
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
