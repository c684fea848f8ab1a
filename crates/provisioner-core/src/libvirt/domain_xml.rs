//! The domain's XML: what we write for a new VM, and what we read from any domain.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use quick_xml::Writer;
use quick_xml::events::BytesText;
use roxmltree::{Document, Node};

use super::filter::FilterRef;
use super::metadata::{Metadata, NAMESPACE};
use crate::{Error, ErrorKind, Result};

/// The virtio-serial channel the guest agent listens on.
const AGENT_CHANNEL: &str = "org.qemu.guest_agent.0";

/// How the guest's vCPUs are run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DomainType {
    /// Hardware virtualisation.
    Kvm,
    /// Emulation (TCG): correct, and an order of magnitude slower.
    Qemu,
}

impl DomainType {
    /// libvirt's word.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Qemu => "qemu",
        }
    }
}

/// How QEMU reads and writes the overlay, by what the filesystem can do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DiskMode {
    /// QEMU's cache mode.
    pub cache: &'static str,
    /// QEMU's way of asynchronous I/O.
    pub io: &'static str,
}

impl DiskMode {
    /// For a pool on a filesystem with this `statfs` type (Linux, `linux/magic.h`), `None` when it is not known.
    ///
    /// `native` needs asynchronous direct I/O, which ext4 and XFS really have; elsewhere the calls block QEMU's
    /// main loop. Without direct I/O at all (tmpfs, overlayfs on it) `cache=none` cannot open the file.
    #[must_use]
    pub fn for_filesystem(magic: Option<i64>) -> Self {
        const EXT: i64 = 0xef53;
        const XFS: i64 = 0x5846_5342;
        const BTRFS: i64 = 0x9123_683e;
        const NFS: i64 = 0x6969;
        match magic {
            Some(EXT | XFS) => Self { cache: "none", io: "native" },
            Some(BTRFS | NFS) => Self { cache: "none", io: "threads" },
            _ => Self { cache: "writeback", io: "threads" },
        }
    }
}

/// Everything a new VM's domain is made of.
#[derive(Debug, Clone)]
pub struct DomainSpec<'a> {
    /// Who it is.
    pub metadata: &'a Metadata,
    /// Hardware or emulation.
    pub domain_type: DomainType,
    /// Number of vCPUs.
    pub vcpus: u32,
    /// Memory in MiB.
    pub memory_mib: u64,
    /// The overlay's path.
    pub overlay: &'a Path,
    /// The template the overlay is backed by.
    pub base: &'a Path,
    /// The seed's path.
    pub seed: &'a Path,
    /// The console log's path.
    pub console: &'a Path,
    /// The bridge.
    pub bridge: &'a str,
    /// The anti-spoofing filter with its values.
    pub filter: &'a FilterRef,
    /// Cache and I/O mode of the disk.
    pub disk_mode: DiskMode,
}

impl DomainSpec<'_> {
    /// The domain as libvirt takes it.
    #[must_use]
    pub fn to_xml(&self) -> String {
        let mut writer = Writer::new_with_indent(Vec::new(), b' ', 2);
        // Writing to memory cannot fail.
        let _ = writer
            .create_element("domain")
            .with_attribute(("type", self.domain_type.as_str()))
            .write_inner_content(|w| self.write_body(w));
        String::from_utf8_lossy(&writer.into_inner()).into_owned()
    }

    fn write_body(&self, w: &mut Out) -> io::Result<()> {
        text(w, "name", &[], self.metadata.name.as_str())?;
        text(w, "uuid", &[], &self.metadata.creation_id)?;
        w.create_element("metadata").write_inner_content(|w| {
            w.create_element("blockhost:vm").with_attribute(("xmlns:blockhost", NAMESPACE)).write_inner_content(
                |w| {
                    for (tag, value) in self.metadata.fields() {
                        text(w, &format!("blockhost:{tag}"), &[], &value)?;
                    }
                    let limits = self.metadata.limit_attributes();
                    if !limits.is_empty() {
                        let attributes: Vec<_> = limits.iter().map(|(name, value)| (*name, value.as_str())).collect();
                        empty(w, "blockhost:limits", &attributes)?;
                    }
                    Ok(())
                },
            )?;
            Ok(())
        })?;
        text(w, "memory", &[("unit", "MiB")], &self.memory_mib.to_string())?;
        text(w, "vcpu", &[], &self.vcpus.to_string())?;
        w.create_element("os").write_inner_content(|w| {
            text(w, "type", &[("arch", "x86_64"), ("machine", "q35")], "hvm")?;
            empty(w, "boot", &[("dev", "hd")])
        })?;
        // ACPI is what a shutdown request needs, and newer QEMUs refuse q35 without it.
        w.create_element("features").write_inner_content(|w| {
            empty(w, "acpi", &[])?;
            empty(w, "apic", &[])
        })?;
        empty(w, "cpu", &[("mode", if self.domain_type == DomainType::Kvm { "host-model" } else { "maximum" })])?;
        w.create_element("clock").with_attribute(("offset", "utc")).write_inner_content(|w| {
            empty(w, "timer", &[("name", "rtc"), ("tickpolicy", "catchup")])?;
            empty(w, "timer", &[("name", "hpet"), ("present", "no")])
        })?;
        text(w, "on_poweroff", &[], "destroy")?;
        text(w, "on_reboot", &[], "restart")?;
        text(w, "on_crash", &[], "destroy")?;
        w.create_element("devices").write_inner_content(|w| self.write_devices(w))?;
        Ok(())
    }

    fn write_devices(&self, w: &mut Out) -> io::Result<()> {
        let DiskMode { cache, io } = self.disk_mode;
        w.create_element("disk").with_attributes([("type", "file"), ("device", "disk")]).write_inner_content(|w| {
            let driver = [("name", "qemu"), ("type", "qcow2"), ("cache", cache), ("io", io), ("discard", "unmap")];
            empty(w, "driver", &driver)?;
            empty(w, "source", &[("file", &self.overlay.to_string_lossy())])?;
            // libvirt gives the whole chain to QEMU's user when the VM starts and never takes it back; then one
            // QEMU could rewrite the base of all. Written out with `relabel='no'` the base stays root's.
            w.create_element("backingStore").with_attribute(("type", "file")).write_inner_content(|w| {
                empty(w, "format", &[("type", "qcow2")])?;
                w.create_element("source")
                    .with_attribute(("file", &*self.base.to_string_lossy()))
                    .write_inner_content(|w| empty(w, "seclabel", &[("model", "dac"), ("relabel", "no")]))?;
                empty(w, "backingStore", &[])
            })?;
            empty(w, "target", &[("dev", "vda"), ("bus", "virtio")])
        })?;
        // A virtio disk and no CD-ROM: Debian's cloud kernel has no driver for q35's SATA controller, and NoCloud finds
        // the seed by its label wherever it is.
        w.create_element("disk").with_attributes([("type", "file"), ("device", "disk")]).write_inner_content(|w| {
            empty(w, "driver", &[("name", "qemu"), ("type", "raw")])?;
            empty(w, "source", &[("file", &self.seed.to_string_lossy())])?;
            empty(w, "target", &[("dev", "vdb"), ("bus", "virtio")])?;
            empty(w, "readonly", &[])
        })?;
        empty(w, "controller", &[("type", "usb"), ("model", "none")])?;
        w.create_element("interface").with_attribute(("type", "bridge")).write_inner_content(|w| {
            empty(w, "mac", &[("address", &self.metadata.mac)])?;
            empty(w, "source", &[("bridge", self.bridge)])?;
            empty(w, "model", &[("type", "virtio")])?;
            // Tenants on one bridge must not reach each other at layer 2.
            empty(w, "port", &[("isolated", "yes")])?;
            w.create_element("filterref").with_attribute(("filter", self.filter.filter)).write_inner_content(|w| {
                for (name, value) in &self.filter.parameters {
                    empty(w, "parameter", &[("name", name), ("value", value)])?;
                }
                Ok(())
            })?;
            Ok(())
        })?;
        w.create_element("channel")
            .with_attribute(("type", "unix"))
            .write_inner_content(|w| empty(w, "target", &[("type", "virtio"), ("name", AGENT_CHANNEL)]))?;
        w.create_element("serial").with_attribute(("type", "pty")).write_inner_content(|w| {
            empty(w, "log", &[("file", &self.console.to_string_lossy()), ("append", "on")])?;
            empty(w, "target", &[("port", "0")])
        })?;
        w.create_element("rng")
            .with_attribute(("model", "virtio"))
            .write_inner_content(|w| text(w, "backend", &[("model", "random")], "/dev/urandom"))?;
        w.create_element("memballoon")
            .with_attribute(("model", "virtio"))
            .write_inner_content(|w| empty(w, "stats", &[("period", "10")]))?;
        Ok(())
    }
}

type Out = Writer<Vec<u8>>;

fn text(w: &mut Out, tag: &str, attributes: &[(&str, &str)], value: &str) -> io::Result<()> {
    w.create_element(tag)
        .with_attributes(attributes.iter().copied())
        .write_text_content(BytesText::new(value))
        .map(drop)
}

fn empty(w: &mut Out, tag: &str, attributes: &[(&str, &str)]) -> io::Result<()> {
    w.create_element(tag).with_attributes(attributes.iter().copied()).write_empty().map(drop)
}

fn parse(xml: &str) -> Result<Document<'_>> {
    Document::parse(xml).map_err(|e| Error::new(ErrorKind::Hypervisor, "cannot read a domain's description").because(e))
}

/// What the suite reads from a domain's description, its own or anybody's.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Facts {
    /// Our metadata, when the domain has it.
    pub metadata: Option<Metadata>,
    /// Whether our metadata is there but cannot be read.
    pub metadata_damaged: bool,
    /// MAC addresses of all interfaces, lower case.
    pub macs: Vec<String>,
    /// Addresses the interfaces' filters let through.
    pub filter_addresses: Vec<IpAddr>,
    /// Every file that a disk of any kind, or its backing chain, names.
    pub files: Vec<PathBuf>,
    /// Pool and volume of disks that are named that way.
    pub volumes: Vec<(String, String)>,
    /// The files of writable disks alone, without CD-ROMs and backing files.
    pub disks: Vec<PathBuf>,
    /// The backing files named in the description.
    pub bases: BTreeSet<PathBuf>,
    /// Whether the guest has the agent's channel open.
    pub agent_connected: bool,
    /// The names of the writable disks in the guest's eyes, such as `vda`.
    pub targets: Vec<String>,
    /// The host's ends of the interfaces, such as `vnet0`, while the domain runs.
    pub taps: Vec<String>,
    /// vCPUs it has now.
    pub vcpus: Option<u64>,
    /// Memory allocated to it, in bytes.
    pub memory: Option<u64>,
}

impl Facts {
    /// Reads a domain description.
    ///
    /// # Errors
    /// [`ErrorKind::Hypervisor`] when it is not XML.
    pub fn parse(xml: &str) -> Result<Self> {
        let document = parse(xml)?;
        let root = document.root_element();
        let mut facts = Self::default();
        match Metadata::find(root) {
            Ok(metadata) => facts.metadata = metadata,
            Err(_) => facts.metadata_damaged = true,
        }
        let child = |tag| root.children().find(|n| n.has_tag_name(tag));
        facts.vcpus = child("vcpu").and_then(|n| n.attribute("current").or(n.text())?.trim().parse().ok());
        // libvirt always writes the unit KiB.
        let kib: Option<u64> = child("memory").and_then(|n| n.text()?.trim().parse().ok());
        facts.memory = kib.and_then(|kib| kib.checked_mul(1024));
        let devices = root.children().filter(|n| n.has_tag_name("devices")).flat_map(|n| n.children());
        for device in devices {
            match device.tag_name().name() {
                "disk" => facts.read_disk(device),
                "interface" => facts.read_interface(device),
                "channel" => {
                    facts.agent_connected |= device.children().any(|n| {
                        n.has_tag_name("target")
                            && n.attribute("name") == Some(AGENT_CHANNEL)
                            && n.attribute("state") == Some("connected")
                    });
                }
                _ => {}
            }
        }
        Ok(facts)
    }

    /// Every address this domain may use.
    #[must_use]
    pub fn addresses(&self) -> BTreeSet<IpAddr> {
        let mut all: BTreeSet<_> = self.filter_addresses.iter().copied().collect();
        if let Some(metadata) = &self.metadata {
            all.insert(metadata.ipv4.into());
            all.extend(metadata.ipv6.map(IpAddr::from));
        }
        all
    }

    fn read_disk(&mut self, disk: Node<'_, '_>) {
        let file =
            |source: Node<'_, '_>| source.attribute("file").or_else(|| source.attribute("dev")).map(PathBuf::from);
        let own = disk.children().find(|n| n.has_tag_name("source"));
        let writable = disk.attribute("device").unwrap_or("disk") == "disk"
            && !disk.children().any(|n| n.has_tag_name("readonly"));
        if writable {
            self.disks.extend(own.and_then(file));
            let target = disk.children().find(|n| n.has_tag_name("target")).and_then(|n| n.attribute("dev"));
            self.targets.extend(target.map(str::to_owned));
        }
        // Its own source, those of its backing chain, and that of a mirror being made.
        for source in disk.descendants().filter(|n| n.has_tag_name("source")) {
            self.files.extend(file(source));
            if let (Some(pool), Some(volume)) = (source.attribute("pool"), source.attribute("volume")) {
                self.volumes.push((pool.to_owned(), volume.to_owned()));
            }
            if source.parent_element().is_some_and(|parent| parent.has_tag_name("backingStore")) {
                self.bases.extend(file(source));
            }
        }
    }

    fn read_interface(&mut self, interface: Node<'_, '_>) {
        for node in interface.children() {
            match node.tag_name().name() {
                "mac" => self.macs.extend(node.attribute("address").map(str::to_ascii_lowercase)),
                "target" => self.taps.extend(node.attribute("dev").map(str::to_owned)),
                "filterref" => {
                    let parameters: BTreeMap<_, _> =
                        node.children().filter_map(|p| Some((p.attribute("name")?, p.attribute("value")?))).collect();
                    let addresses =
                        ["IP", "IPV6"].iter().filter_map(|name| parameters.get(name)?.parse::<IpAddr>().ok());
                    self.filter_addresses.extend(addresses);
                }
                _ => {}
            }
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::limits::{Limit, Limits};
    use provisioner_contract::{LoginName, VmName, WalletAddress};

    fn metadata() -> Metadata {
        Metadata {
            name: VmName::new("web1").unwrap(),
            creation_id: "3b0ad7ac-1fd1-4c2f-8c55-3c3a2d5a7b10".into(),
            created_at: "2026-11-21T02:00:00.000000+00:00".into(),
            expires_at: "2026-12-21T02:00:00.000000+00:00".into(),
            wallet_address: WalletAddress::new("0x00000000000000000000000000000000000000aa").unwrap(),
            nft_token_id: None,
            username: LoginName::new("admin").unwrap(),
            network_mode: "broker".into(),
            ipv4: "10.0.0.7".parse().unwrap(),
            ipv6: Some("fd00::7".parse().unwrap()),
            mac: "52:54:00:3b:0a:d7".into(),
            limits: Limits::default(),
        }
    }

    fn xml() -> String {
        xml_of(metadata())
    }

    fn xml_of(metadata: Metadata) -> String {
        let filter = FilterRef::new([0x52, 0x54, 0, 0x3b, 0x0a, 0xd7], metadata.ipv4, metadata.ipv6);
        DomainSpec {
            metadata: &metadata,
            domain_type: DomainType::Qemu,
            vcpus: 2,
            memory_mib: 2048,
            overlay: Path::new("/pool/web1.qcow2"),
            base: Path::new("/templates/base-1.qcow2"),
            seed: Path::new("/pool/web1.iso"),
            console: Path::new("/pool/web1.console.log"),
            bridge: "br0",
            filter: &filter,
            disk_mode: DiskMode::for_filesystem(Some(0xef53)),
        }
        .to_xml()
    }

    #[test]
    fn the_whole_domain() {
        insta::assert_snapshot!(xml());
    }

    #[test]
    fn what_is_written_is_read_back() {
        let facts = Facts::parse(&xml()).unwrap();
        assert_eq!(facts.metadata, Some(metadata()));
        assert_eq!(facts.macs, ["52:54:00:3b:0a:d7"]);
        assert_eq!(facts.disks, [PathBuf::from("/pool/web1.qcow2")]);
        assert_eq!(facts.bases.iter().collect::<Vec<_>>(), [Path::new("/templates/base-1.qcow2")]);
        assert_eq!(facts.files.len(), 3);
        assert_eq!(facts.addresses().len(), 2);
        assert!(!facts.agent_connected);
    }

    #[test]
    fn creation_time_limits_are_read_back_and_damaged_ones_noticed() {
        let limits = Limits::new(|limit| match limit {
            Limit::CpuShares => Some(512),
            Limit::BandwidthIn => Some(0),
            _ => None,
        });
        let xml = xml_of(Metadata { limits, ..metadata() });
        assert!(xml.contains(r#"<blockhost:limits cpu-shares="512" bandwidth-in="0"/>"#), "{xml}");
        assert_eq!(Facts::parse(&xml).unwrap().metadata.unwrap().limits, limits);
        for damage in ["\"x\"", "\"\"", "\"0\"", "\"10001\""] {
            assert!(Facts::parse(&xml.replace("\"512\"", damage)).unwrap().metadata_damaged, "{damage}");
        }
    }

    #[test]
    fn a_foreign_domain_is_not_ours_and_a_damaged_mark_is_noticed() {
        let facts = Facts::parse("<domain><metadata><x:y xmlns:x='urn:other'/></metadata></domain>").unwrap();
        assert_eq!((facts.metadata, facts.metadata_damaged), (None, false));
        let damaged = xml().replace("<blockhost:name>web1<", "<blockhost:name>../web1<");
        assert!(Facts::parse(&damaged).unwrap().metadata_damaged);
    }
}
