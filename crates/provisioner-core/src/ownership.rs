//! Whose a domain is. The suite acts on BlockHost's domains alone: those that carry our metadata, and those an
//! earlier provisioner made without any, which are known by their record and their disk.

use std::path::Path;

use provisioner_contract::{Record, VmName};

use crate::host::Host;
use crate::libvirt::domain_xml::Facts;
use crate::libvirt::{Connection, Domain};
use crate::{Error, ErrorKind, Result};

/// A domain of ours and what its description says.
#[derive(Debug)]
pub struct OwnDomain {
    /// The domain.
    pub domain: Domain,
    /// What its description says.
    pub facts: Facts,
}

/// The domain of the VM, or `None` when libvirt says that there is none.
///
/// # Errors
/// When libvirt cannot be asked; [`ErrorKind::Conflict`] when the domain of that name is somebody else's.
pub fn find(host: &Host, connection: &Connection, name: &VmName, record: Option<&Record>) -> Result<Option<OwnDomain>> {
    connection.domain(name)?.map(|domain| require_own(host, name, domain, record)).transpose()
}

/// Decides whether `domain` is ours.
///
/// # Errors
/// [`ErrorKind::Conflict`] when it is somebody else's.
pub fn require_own(host: &Host, name: &VmName, domain: Domain, record: Option<&Record>) -> Result<OwnDomain> {
    let facts = Facts::parse(&domain.description()?)?;
    if is_own(&facts, name, record.is_some(), &host.settings.storage_path) {
        return Ok(OwnDomain { domain, facts });
    }
    Err(Error::new(ErrorKind::Conflict, format!("domain {name} exists but is not BlockHost's"))
        .hint("it has neither BlockHost's metadata nor a record in the database with its disk; nothing was touched"))
}

/// Whether a domain with these `facts` is ours, as [`require_own`] decides it.
pub(crate) fn is_own(facts: &Facts, name: &VmName, has_record: bool, storage_path: &Path) -> bool {
    if let Some(metadata) = &facts.metadata {
        return metadata.name == *name;
    }
    // A mark that somebody's edit has damaged, or none because an earlier provisioner made the VM: the record
    // and the place of the disk must both speak for us.
    has_record && facts.disks.contains(&storage_path.join(format!("{name}.qcow2")))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn without_metadata_record_and_disk_must_both_speak_for_us() {
        let name = VmName::new("web1").unwrap();
        let pool = Path::new("/var/lib/blockhost/vms");
        let facts = |disk: &str| Facts { disks: vec![disk.into()], ..Facts::default() };
        let disk = "/var/lib/blockhost/vms/web1.qcow2";
        assert!(is_own(&facts(disk), &name, true, pool));
        assert!(!is_own(&facts(disk), &name, false, pool));
        assert!(!is_own(&facts("/var/lib/libvirt/images/web1.qcow2"), &name, true, pool));
        assert!(!is_own(&facts("/var/lib/blockhost/vms/web2.qcow2"), &name, true, pool));
        assert!(!is_own(&Facts::default(), &name, true, pool));
    }
}
