//! Domains: looking one up, its state, and the acts the suite performs on it.

use std::collections::HashMap;
use std::time::Duration;

use provisioner_contract::VmName;
use virt::domain::Domain as Raw;
use virt::error::ErrorNumber;

use super::{Connection, bounded, change_limit, failure, ffi, known, tuning};
use crate::{Error, ErrorKind, Result};

/// libvirt kills a QEMU that does not react with SIGTERM and then SIGKILL, which takes it about 11 s; a second
/// try some more. Above that nothing will come.
const POWER_OFF_LIMIT: Duration = Duration::from_secs(35);

/// What libvirt says a domain is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DomainState {
    /// Runs (or is blocked on a resource, which for a VM is the same).
    Running,
    /// Its vCPUs are stopped; its memory is there.
    Paused,
    /// On its way down.
    ShuttingDown,
    /// Not running.
    ShutOff,
    /// Crashed, and perhaps kept for a look.
    Crashed,
    /// Suspended by its own power management.
    PmSuspended,
}

impl DomainState {
    pub(super) fn from_raw(raw: u32) -> Self {
        match raw {
            virt_sys::VIR_DOMAIN_PAUSED => Self::Paused,
            virt_sys::VIR_DOMAIN_SHUTDOWN => Self::ShuttingDown,
            virt_sys::VIR_DOMAIN_SHUTOFF => Self::ShutOff,
            virt_sys::VIR_DOMAIN_CRASHED => Self::Crashed,
            virt_sys::VIR_DOMAIN_PMSUSPENDED => Self::PmSuspended,
            // RUNNING, BLOCKED, and NOSTATE, which QEMU never reports.
            _ => Self::Running,
        }
    }

    /// Whether the guest's vCPUs run.
    #[must_use]
    pub fn is_running(self) -> bool {
        matches!(self, Self::Running | Self::ShuttingDown)
    }
}

/// One domain that existed when it was looked up.
#[derive(Clone)]
pub struct Domain {
    raw: Raw,
    label: String,
}

impl std::fmt::Debug for Domain {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Domain").field(&self.label).finish()
    }
}

impl Connection {
    /// The domain called `name`, or `None` when the hypervisor says that there is none.
    ///
    /// # Errors
    /// When libvirt cannot be asked, which is a different answer.
    pub fn domain(&self, name: &VmName) -> Result<Option<Domain>> {
        match self.raw().lookup_domain_by_name(name.as_str()) {
            Ok(raw) => Ok(Some(Domain { raw, label: name.to_string() })),
            Err(e) if known(&e) == ErrorNumber::NoDomain => Ok(None),
            Err(e) => Err(failure(format!("cannot look up domain {name}"), &e)),
        }
    }

    /// All domains, running or not.
    ///
    /// # Errors
    /// When libvirt cannot be asked.
    pub fn domains(&self) -> Result<Vec<Domain>> {
        let all = self.raw().list_all_domains(0).map_err(|e| failure("cannot list domains", &e))?;
        Ok(all.into_iter().map(|raw| Domain { label: raw.name().unwrap_or_default(), raw }).collect())
    }

    /// Name and state of all domains, from one question.
    ///
    /// # Errors
    /// When libvirt cannot be asked.
    pub fn domain_states(&self) -> Result<Vec<(String, DomainState)>> {
        let states =
            ffi::all_domain_states(self.raw()).map_err(|e| failure("cannot ask for the domains' states", &e))?;
        Ok(states.into_iter().map(|(name, raw)| (name, DomainState::from_raw(raw))).collect())
    }

    /// Name and UUID of all domains.
    ///
    /// # Errors
    /// When libvirt cannot be asked.
    pub fn domain_uuids(&self) -> Result<HashMap<String, String>> {
        // The listing brings both.
        self.domains()?.into_iter().map(|domain| Ok((domain.label.clone(), domain.uuid()?))).collect()
    }

    /// Defines a domain, without starting it. Given up after a while, the definition may still come.
    ///
    /// # Errors
    /// When libvirt refuses the description or takes too long.
    pub fn define(&self, name: &VmName, xml: &str) -> Result<Domain> {
        let (conn, xml) = (self.raw().clone(), xml.to_owned());
        let what = format!("cannot define domain {name}");
        let define = move || conn.define_domain_xml_flags(&xml, virt_sys::VIR_DOMAIN_DEFINE_VALIDATE);
        let raw = bounded(change_limit(), &what, define)?.map_err(|e| failure(what, &e))?;
        Ok(Domain { raw, label: name.to_string() })
    }
}

impl Domain {
    /// The domain's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.label
    }

    pub(super) fn raw(&self) -> &Raw {
        &self.raw
    }

    /// Its name, or `None` when it has gone since it was listed.
    pub(super) fn name_if_there(&self) -> Result<Option<String>> {
        match self.raw.is_active() {
            Ok(_) => Ok(Some(self.label.clone())),
            Err(e) if known(&e) == ErrorNumber::NoDomain => Ok(None),
            Err(e) => Err(self.failure("look at", &e)),
        }
    }

    fn failure(&self, verb: &str, e: &virt::error::Error) -> Error {
        failure(format!("cannot {verb} domain {}", self.label), e)
    }

    /// Runs a call that may enter QEMU's monitor, with a deadline. An answer "no such domain" becomes `Ok(None)`.
    pub(super) fn call<T: Send + 'static>(
        &self,
        limit: Duration,
        verb: &str,
        call: impl FnOnce(&Raw) -> Result<T, virt::error::Error> + Send + 'static,
    ) -> Result<Option<T>> {
        let raw = self.raw.clone();
        tracing::debug!(domain = self.label, verb, "calling libvirt");
        match bounded(limit, &format!("cannot {verb} domain {}", self.label), move || call(&raw))? {
            Ok(value) => Ok(Some(value)),
            Err(e) if known(&e) == ErrorNumber::NoDomain => Ok(None),
            Err(e) => Err(self.failure(verb, &e)),
        }
    }

    pub(super) fn gone(&self) -> Error {
        Error::new(ErrorKind::NotFound, format!("domain {} has gone meanwhile", self.label))
    }

    /// Its state, or `None` when it has gone meanwhile.
    ///
    /// # Errors
    /// When libvirt cannot be asked.
    pub fn state(&self) -> Result<Option<DomainState>> {
        match ffi::domain_state(&self.raw) {
            Ok(raw) => Ok(Some(DomainState::from_raw(raw))),
            Err(e) if known(&e) == ErrorNumber::NoDomain => Ok(None),
            Err(e) => Err(self.failure("ask for the state of", &e)),
        }
    }

    /// Whether it has a QEMU process, running or not.
    ///
    /// # Errors
    /// When libvirt cannot be asked.
    pub fn is_active(&self) -> Result<bool> {
        match self.raw.is_active() {
            Ok(active) => Ok(active),
            Err(e) if known(&e) == ErrorNumber::NoDomain => Ok(false),
            Err(e) => Err(self.failure("look at", &e)),
        }
    }

    /// Whether libvirt keeps a definition of it.
    ///
    /// # Errors
    /// When libvirt cannot be asked.
    pub fn is_persistent(&self) -> Result<bool> {
        match self.raw.is_persistent() {
            Ok(persistent) => Ok(persistent),
            Err(e) if known(&e) == ErrorNumber::NoDomain => Ok(false),
            Err(e) => Err(self.failure("look at", &e)),
        }
    }

    /// Its UUID.
    ///
    /// # Errors
    /// When libvirt cannot be asked.
    pub fn uuid(&self) -> Result<String> {
        self.raw.uuid_string().map_err(|e| self.failure("ask for the UUID of", &e))
    }

    /// Its current description as XML.
    ///
    /// # Errors
    /// When libvirt cannot be asked, or the domain has gone.
    pub fn description(&self) -> Result<String> {
        self.raw.xml_desc(0).map_err(|e| self.failure("describe", &e))
    }

    /// Its running and, where that differs, its persistent description. Empty when it has gone.
    pub(super) fn descriptions(&self) -> Result<Vec<String>> {
        let mut all = Vec::new();
        for flags in [0, virt_sys::VIR_DOMAIN_XML_INACTIVE] {
            match self.raw.xml_desc(flags) {
                Ok(xml) => all.push(xml),
                Err(e) if known(&e) == ErrorNumber::NoDomain => {}
                Err(e) => return Err(self.failure("describe", &e)),
            }
        }
        Ok(all)
    }

    /// Starts it.
    ///
    /// # Errors
    /// When libvirt refuses or takes too long.
    pub fn start(&self) -> Result<()> {
        let started =
            self.call(change_limit(), "start", |raw| raw.create().map(drop)).map_err(tuning::explain_traffic_control);
        let denied =
            |error: &Error| error.source.as_ref().is_some_and(|cause| cause.to_string().contains("ermission denied"));
        match started {
            Err(error) if denied(&error) => Err(error.hint(
                "QEMU's user must be able to pass through every directory above its disks: setfacl -m u:libvirt-qemu:x DIRECTORY",
            )),
            outcome => outcome?.ok_or_else(|| self.gone()),
        }
    }

    /// Lets a paused one run again.
    ///
    /// # Errors
    /// When libvirt refuses or takes too long.
    pub fn unpause(&self, limit: Duration) -> Result<()> {
        self.call(limit, "unpause", |raw| raw.resume().map(drop))?.ok_or_else(|| self.gone())
    }

    /// Wakes one that its own power management has suspended.
    ///
    /// # Errors
    /// When libvirt refuses or takes too long.
    pub fn wake(&self, limit: Duration) -> Result<()> {
        self.call(limit, "wake", |raw| raw.pm_wakeup(0).map(drop))?.ok_or_else(|| self.gone())
    }

    /// Whether the host starts it at boot.
    ///
    /// # Errors
    /// When libvirt refuses.
    pub fn set_autostart(&self, on: bool) -> Result<()> {
        self.call(change_limit(), "set autostart of", move |raw| raw.set_autostart(on).map(drop))?
            .ok_or_else(|| self.gone())
    }

    /// Presses the power button, and waits at most `limit` for that. `through_agent` asks the guest agent instead of ACPI.
    ///
    /// # Errors
    /// When libvirt refuses, the agent does not answer, or QEMU hangs.
    pub fn request_shutdown(&self, through_agent: bool, limit: Duration) -> Result<()> {
        let flag = if through_agent {
            virt_sys::VIR_DOMAIN_SHUTDOWN_GUEST_AGENT
        } else {
            virt_sys::VIR_DOMAIN_SHUTDOWN_ACPI_POWER_BTN
        };
        self.call(limit, "shut down", move |raw| raw.shutdown_flags(flag).map(drop)).map(drop)
    }

    /// Takes its power away, whatever it is doing. That it is off already, or gone, is a success.
    ///
    /// # Errors
    /// When it is still there afterwards: then nothing of it may be deleted.
    pub fn power_off(&self) -> Result<()> {
        if !self.is_active()? {
            return Ok(());
        }
        let answer = self.call(POWER_OFF_LIMIT, "power off", |raw| raw.destroy());
        // "Not running" may come as an error when it went down by itself, so the state decides.
        match (answer, self.is_active()) {
            (_, Ok(false)) => Ok(()),
            (Err(error), _) | (Ok(_), Err(error)) => Err(error),
            (Ok(_), Ok(true)) => {
                Err(Error::new(ErrorKind::Hypervisor, format!("cannot power off domain {}: it still runs", self.label))
                    .hint("its QEMU process may be stuck in the kernel; look at: dmesg, ps -o stat,wchan"))
            }
        }
    }

    /// Removes its definition with everything libvirt keeps of it: managed save image, snapshot and checkpoint
    /// metadata, NVRAM, TPM state. That it is gone is a success. Volumes stay.
    ///
    /// # Errors
    /// When libvirt refuses.
    pub fn undefine(&self) -> Result<()> {
        let flags = virt_sys::VIR_DOMAIN_UNDEFINE_MANAGED_SAVE
            | virt_sys::VIR_DOMAIN_UNDEFINE_SNAPSHOTS_METADATA
            | virt_sys::VIR_DOMAIN_UNDEFINE_CHECKPOINTS_METADATA
            | virt_sys::VIR_DOMAIN_UNDEFINE_NVRAM
            | virt_sys::VIR_DOMAIN_UNDEFINE_TPM;
        if !self.is_persistent()? {
            return Ok(());
        }
        self.call(change_limit(), "undefine", move |raw| raw.undefine_flags(flags)).map(drop)
    }
}
