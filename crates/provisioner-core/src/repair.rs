//! Finding and mending what drifts apart: the database, which others rewrite, libvirt's domains and volumes, journals,
//! addresses, host routes.
//!
//! One look is taken at everything ([`look`]), compared ([`compare`]), and named. Mending ([`mend`]) is for what can be told
//! without doubt and destroys nothing: no domain, no volume and no record of a VM is ever removed. What came back of one that was
//! removed already, as its tombstone shows, goes. What was found is looked at again under the VM's lock, or the database's, right
//! before the act.

mod compare;
mod look;
mod mend;

use provisioner_contract::VmName;
use serde::Serialize;

use crate::ascii::printable;
use crate::host::Host;
use crate::lock::Holder;
use crate::{Error, Result};

use mend::Mend;

/// Looks and acts in turn until nothing new can come up: journals, records, what records show, one to spare.
const PASSES: u32 = 4;

/// What is not as it should be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// The database cannot be read.
    DatabaseUnreadable,
    /// There are VMs and no database.
    DatabaseMissing,
    /// A create or destroy died.
    DeadJournal,
    /// A journal cannot be read.
    DamagedJournal,
    /// `provisioning.lock` says that a create is in flight, and none is.
    StaleProvisioningLock,
    /// A domain of ours has no record.
    DomainWithoutRecord,
    /// A live record has no domain.
    RecordWithoutDomain,
    /// A record is destroyed, and its domain exists.
    DestroyedVmExists,
    /// A part of a VM that was removed has come back: libvirt carried out late what was given up.
    RemovedVmReturned,
    /// The domain of a record's name is somebody else's.
    ForeignDomain,
    /// A domain's metadata cannot be read.
    DamagedMetadata,
    /// A running VM would be gone when it stops: libvirt keeps no definition of it.
    DomainNotPersistent,
    /// A record cannot be read.
    DamagedRecord,
    /// A record lacks what the domain's metadata has.
    IncompleteRecord,
    /// A record and the domain's metadata say different things.
    RecordDisagrees,
    /// A suspended VM runs.
    SuspendedVmRuns,
    /// An active VM would not start with the host.
    AutostartOff,
    /// A suspended VM would start with the host.
    AutostartOn,
    /// A VM's address could be given to another.
    AddressNotAllocated,
    /// An allocated address is nobody's.
    AddressWithoutOwner,
    /// Two VMs have one address.
    AddressTwice,
    /// An address is listed several times.
    AddressListedTwice,
    /// A list of addresses has an entry that is none.
    DamagedAddressEntry,
    /// `next_vmid` is a number in use.
    NextVmidBehind,
    /// The pool cannot be looked at.
    PoolUnusable,
    /// A volume of ours belongs to no VM.
    OrphanedVolume,
    /// The image that a VM's disk is an overlay of is gone.
    BaseMissing,
    /// A running VM has no host route.
    MissingRoute,
    /// A running VM's address is not tied to its MAC address.
    MissingNeighbour,
    /// A host route leads to nobody.
    StaleRoute,
    /// An address is tied to a MAC address and is nobody's.
    StaleNeighbour,
}

/// One difference. All texts are printable ASCII.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// What kind it is.
    pub kind: Kind,
    /// The VM it is about, if it is about one.
    pub vm: Option<String>,
    /// What it is about: a file, an address, a volume, a key of the record.
    pub object: String,
    /// What is wrong.
    pub explanation: String,
    /// What mending does, when it can.
    pub apply: Option<String>,
    /// What the operator can do, when mending cannot.
    pub operator: Option<String>,
    /// Why mending has failed.
    pub failure: Option<String>,
    #[serde(skip)]
    mend: Option<Mend>,
}

impl Finding {
    fn new(kind: Kind, vm: Option<&str>, object: impl AsRef<str>, explanation: impl AsRef<str>) -> Self {
        Self {
            kind,
            vm: vm.map(printable),
            object: printable(object.as_ref()),
            explanation: printable(explanation.as_ref()),
            apply: None,
            operator: None,
            failure: None,
            mend: None,
        }
    }

    fn applies(mut self, mend: Mend, what: impl AsRef<str>) -> Self {
        self.mend = Some(mend);
        self.apply = Some(printable(what.as_ref()));
        self
    }

    fn operator(mut self, what: impl AsRef<str>) -> Self {
        self.operator = Some(printable(what.as_ref()));
        self
    }

    /// The same thing, found again.
    fn is(&self, other: &Self) -> bool {
        (self.kind, &self.vm, &self.object) == (other.kind, &other.vm, &other.object)
    }
}

/// A VM that a command is working on, and that was therefore left alone.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Busy {
    /// The VM.
    pub vm: String,
    /// The command, when its lock says so.
    pub command: Option<String>,
    /// Its PID.
    pub pid: Option<u32>,
}

impl Busy {
    fn new(vm: &VmName, holder: Option<&Holder>) -> Self {
        Self { vm: vm.to_string(), command: holder.map(|h| printable(&h.command)), pid: holder.map(|h| h.pid) }
    }
}

/// What was found, and what was done about it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Report {
    /// Whether nothing is left to be done.
    pub healthy: bool,
    /// The VMs the database knows, or else libvirt.
    pub vms: usize,
    /// The differences that there are, after mending.
    pub findings: Vec<Finding>,
    /// The differences that were mended.
    pub repaired: Vec<Finding>,
    /// The VMs that were not looked at.
    pub busy: Vec<Busy>,
    /// What else is worth knowing.
    pub notes: Vec<String>,
}

impl Report {
    /// How many differences mending could remove.
    #[must_use]
    pub fn mendable(&self) -> usize {
        self.findings.iter().filter(|finding| finding.apply.is_some()).count()
    }
}

fn report(host: &Host, look: &look::Look, findings: Vec<Finding>, repaired: Vec<Finding>) -> Report {
    Report {
        healthy: findings.is_empty(),
        vms: look.vms(host),
        findings,
        repaired,
        busy: look.busy.iter().map(|(vm, holder)| Busy::new(vm, holder.as_ref())).collect(),
        notes: look.notes.iter().map(|note| printable(note)).collect(),
    }
}

/// Looks at everything and names what is wrong. Changes nothing.
///
/// # Errors
/// When libvirt cannot be asked: then nothing can be told.
pub fn check(host: &Host) -> Result<Report> {
    host.progress.phase("comparing the database with libvirt and the host");
    let look = look::take(host, &host.connect()?, None)?;
    let findings = compare::findings(host, &look);
    Ok(report(host, &look, findings, Vec::new()))
}

/// Mends what can be mended without destroying anything, and reports what is left.
///
/// # Errors
/// When libvirt cannot be asked. One thing that cannot be mended does not keep the others from it: it stays a finding, with
/// its reason.
pub fn apply(host: &Host) -> Result<Report> {
    let connection = host.connect()?;
    let mut repaired = Vec::new();
    let mut failed: Vec<(Finding, Error)> = Vec::new();
    let mut passes = 0;
    let (look, mut findings) = loop {
        host.progress.phase("comparing the database with libvirt and the host");
        let look = look::take(host, &connection, None)?;
        let findings = compare::findings(host, &look);
        let is_new =
            |finding: &&Finding| finding.mend.is_some() && !failed.iter().any(|(failed, _)| failed.is(finding));
        let mut wanted: Vec<_> = findings.iter().filter(is_new).cloned().collect();
        // What a dead command has left comes first: it decides what else is wrong. And a record that is back may show what
        // else its VM lacks.
        if wanted.iter().any(|finding| finding.mend == Some(Mend::Recover)) {
            wanted.retain(|finding| finding.mend == Some(Mend::Recover));
        }
        if wanted.is_empty() || passes == PASSES {
            break (look, findings);
        }
        passes += 1;
        while let Some(first) = wanted.first() {
            host.cancel.check()?;
            let vm = first.vm.clone();
            let (together, rest) = wanted.into_iter().partition(|finding| finding.vm == vm);
            wanted = rest;
            let outcome = mend::together(host, &connection, vm.as_deref(), together);
            repaired.extend(outcome.done);
            failed.extend(outcome.failed);
        }
    };
    for finding in &mut findings {
        let why = failed.iter().find(|(failed, _)| failed.is(finding));
        finding.failure = why.map(|(_, error)| printable(&error.in_full()));
    }
    repaired.retain(|done: &Finding| !findings.iter().any(|left| left.is(done)));
    Ok(report(host, &look, findings, repaired))
}
