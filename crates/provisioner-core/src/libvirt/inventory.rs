//! What libvirt says about itself and the host, for a check of the host.

use std::path::PathBuf;

use roxmltree::{Document, Node};

use super::volume::Pool;
use super::{Connection, failure, is_unavailable};
use crate::Result;

/// A version as libvirt counts it: major × 1 000 000 + minor × 1000 + release.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version(pub u32);

impl std::fmt::Display for Version {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}.{}", self.0 / 1_000_000, self.0 / 1000 % 1000, self.0 % 1000)
    }
}

/// The numbers of a user and its group.
pub type UserAndGroup = (u32, u32);

/// The QEMU that runs x86-64 guests.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Emulator {
    /// The program.
    pub path: PathBuf,
    /// What `q35` stands for.
    pub machine: String,
}

impl Connection {
    /// The versions of libvirtd and of QEMU.
    ///
    /// # Errors
    /// When libvirt cannot be asked.
    pub fn versions(&self) -> Result<(Version, Version)> {
        let what = "cannot ask libvirt for its version";
        let daemon = self.raw().lib_version().map_err(|e| failure(what, &e))?;
        let qemu = self.raw().hyp_version().map_err(|e| failure(what, &e))?;
        Ok((Version(daemon), Version(qemu)))
    }

    /// The emulator for x86-64 guests of `domain_type` (`kvm` or `qemu`) on q35; `None` when there is none.
    ///
    /// # Errors
    /// When libvirt cannot be asked.
    pub fn emulator(&self, domain_type: &str) -> Result<Option<Emulator>> {
        match self.raw().domain_capabilities(None, Some("x86_64"), Some("q35"), Some(domain_type), 0) {
            Ok(xml) => Ok(emulator(&xml)),
            Err(e) if is_unavailable(&e) => Err(failure("cannot ask for the hypervisor's capabilities", &e)),
            Err(_) => Ok(None),
        }
    }

    /// The user QEMU runs as, and the security models that confine it, such as `apparmor`.
    ///
    /// # Errors
    /// When libvirt cannot be asked.
    pub fn security(&self) -> Result<(Option<UserAndGroup>, Vec<String>)> {
        let xml = self.raw().capabilities().map_err(|e| failure("cannot ask for the host's capabilities", &e))?;
        Ok(security(&xml))
    }

    /// The names of the network filters there are.
    ///
    /// # Errors
    /// When libvirt has no driver for them, or cannot be asked.
    pub fn filters(&self) -> Result<Vec<String>> {
        let filters = self.raw().list_all_nw_filters(0).map_err(|e| failure("cannot list network filters", &e))?;
        Ok(filters.iter().filter_map(|filter| filter.name().ok()).collect())
    }
}

impl Pool {
    /// Whether it is made available when the host starts.
    ///
    /// # Errors
    /// When libvirt cannot be asked.
    pub fn autostart(&self) -> Result<bool> {
        self.raw().autostart().map_err(|e| failure(format!("cannot ask for storage pool {:?}", self.name()), &e))
    }
}

fn child<'a, 'i>(node: Node<'a, 'i>, tag: &str) -> Option<Node<'a, 'i>> {
    node.children().find(|child| child.has_tag_name(tag))
}

fn emulator(xml: &str) -> Option<Emulator> {
    let document = Document::parse(xml).ok()?;
    let text = |tag| Some(child(document.root_element(), tag)?.text()?.to_owned());
    Some(Emulator { path: text("path")?.into(), machine: text("machine")? })
}

fn security(xml: &str) -> (Option<UserAndGroup>, Vec<String>) {
    let Ok(document) = Document::parse(xml) else { return (None, Vec::new()) };
    let host = child(document.root_element(), "host");
    let mut user = None;
    let mut models = Vec::new();
    for model in host.iter().flat_map(|host| host.children()).filter(|n| n.has_tag_name("secmodel")) {
        let Some(name) = child(model, "model").and_then(|n| n.text()) else { continue };
        models.push(name.to_owned());
        let label = model.children().find(|n| n.has_tag_name("baselabel")).and_then(|n| n.text());
        if let ("dac", Some((uid, gid))) = (name, label.and_then(|label| label.split_once(':'))) {
            let number = |text: &str| text.trim_start_matches('+').parse::<u32>().ok();
            user = number(uid).zip(number(gid));
        }
    }
    (user, models)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_libvirt_says() {
        let xml = "<capabilities><host><secmodel><model>none</model></secmodel><secmodel><model>dac</model>\
                   <baselabel type='kvm'>+64055:+108</baselabel></secmodel></host></capabilities>";
        assert_eq!(security(xml), (Some((64055, 108)), vec!["none".to_owned(), "dac".to_owned()]));
        assert_eq!(security("junk"), (None, Vec::new()));
        let xml = "<domainCapabilities><path>/usr/bin/q</path><machine>pc-q35-7.2</machine></domainCapabilities>";
        assert_eq!(emulator(xml), Some(Emulator { path: "/usr/bin/q".into(), machine: "pc-q35-7.2".into() }));
        assert_eq!(Version(9_000_001).to_string(), "9.0.1");
    }
}
