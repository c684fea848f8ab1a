//! The seed: the small ISO image that cloud-init's NoCloud source finds by its label and configures the guest from.

pub mod cloud_init;
pub mod iso9660;
pub mod network_config;
pub mod resolvers;
pub mod substitute;

use jiff::Timestamp;
use provisioner_contract::VmName;

use self::network_config::Network;
use crate::{Error, ErrorKind, Result};

/// The label by which NoCloud finds its image.
pub const LABEL: &str = "cidata";

/// Everything a seed is made of.
#[derive(Debug, Clone, Copy)]
pub struct SeedInput<'a> {
    /// Names this creation of the VM: cloud-init takes a new one for a new machine and configures it from the start.
    pub instance_id: &'a str,
    /// The VM's name, from which the host name is made.
    pub name: &'a VmName,
    /// The user-data, as it is.
    pub user_data: &'a [u8],
    /// The guest's network.
    pub network: &'a Network,
    /// The time of the image and its files.
    pub created: Timestamp,
}

impl SeedInput<'_> {
    /// The bytes of the seed. The same input gives the same bytes.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] when the user-data has more than [`cloud_init::MAX_USER_DATA`] bytes or the instance id
    /// is empty; those of [`Network::to_yaml`].
    pub fn image(&self) -> Result<Vec<u8>> {
        if self.user_data.len() > cloud_init::MAX_USER_DATA {
            let message = format!("the user-data has more than {} bytes", cloud_init::MAX_USER_DATA);
            return Err(Error::new(ErrorKind::Invalid, message));
        }
        if self.instance_id.is_empty() {
            return Err(Error::new(ErrorKind::Invalid, "the seed's instance id is empty"));
        }
        let network = self.network.to_yaml()?;
        let meta_data = meta_data(self.instance_id, self.name);
        let files = [
            iso9660::File { name: "user-data", data: self.user_data },
            iso9660::File { name: "meta-data", data: meta_data.as_bytes() },
            iso9660::File { name: "network-config", data: network.as_bytes() },
        ];
        iso9660::image(LABEL, &files, self.created)
    }
}

/// The text of the seed's meta-data, JSON and so YAML: a VM called `1e3` stays text.
#[must_use]
pub fn meta_data(instance_id: &str, name: &VmName) -> String {
    format!("{:#}\n", serde_json::json!({"instance-id": instance_id, "local-hostname": host_name(name)}))
}

/// The VM's name as a host name: `_` becomes `-`, every label between dots is cut to 63 characters and loses `-` at
/// either end, and labels of which nothing is left go. Never empty, because a VM name begins with a letter or digit;
/// at most 64 characters, as Linux wants it.
#[must_use]
pub fn host_name(name: &VmName) -> String {
    let name = name.as_str().replace('_', "-");
    let labels = name.split('.').map(|label| label[..label.len().min(63)].trim_matches('-'));
    labels.filter(|label| !label.is_empty()).collect::<Vec<_>>().join(".")
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::fs;
    use std::process::Command;

    use proptest::prelude::*;

    use super::*;

    fn network() -> Network {
        Network {
            mac: [0x52, 0x54, 0, 1, 2, 3],
            address: "192.168.122.200".parse().unwrap(),
            prefix_len: 24,
            gateway: Some("192.168.122.1".parse().unwrap()),
            name_servers: vec!["9.9.9.9".parse().unwrap()],
            ipv6: None,
        }
    }

    fn seed(user_data: &[u8], instance_id: &str) -> Result<Vec<u8>> {
        let created = "2026-03-04T05:06:07Z".parse().unwrap();
        let name = VmName::new("web1").unwrap();
        SeedInput { instance_id, name: &name, user_data, network: &network(), created }.image()
    }

    #[test]
    fn holds_the_three_files_nocloud_reads() {
        let dir = tempfile::tempdir().unwrap();
        let iso = dir.path().join("seed.iso");
        fs::write(&iso, seed(b"#cloud-config\n{}\n", "c-1").unwrap()).unwrap();
        let read = |name: &str| {
            let output = Command::new("isoinfo").args(["-R", "-x", name, "-i"]).arg(&iso).output().unwrap();
            String::from_utf8(output.stdout).unwrap()
        };
        assert_eq!(read("/user-data"), "#cloud-config\n{}\n");
        assert_eq!(read("/meta-data"), "{\n  \"instance-id\": \"c-1\",\n  \"local-hostname\": \"web1\"\n}\n");
        assert_eq!(read("/network-config"), network().to_yaml().unwrap());
    }

    #[test]
    fn refuses_what_is_too_large_or_unnamed() {
        assert!(seed(&vec![b' '; cloud_init::MAX_USER_DATA], "c-1").unwrap().len() < (1 << 20) + (1 << 16));
        assert_eq!(seed(&vec![b' '; cloud_init::MAX_USER_DATA + 1], "c-1").unwrap_err().kind, ErrorKind::Invalid);
        assert_eq!(seed(b"", "").unwrap_err().kind, ErrorKind::Invalid);
    }

    #[test]
    fn host_names_of_odd_vm_names() {
        let long = format!("a{}", "b".repeat(63));
        for (name, host) in [
            ("web1", "web1"),
            ("1e3", "1e3"),
            ("my_vm.", "my-vm"),
            ("a-", "a"),
            ("a..b", "a.b"),
            ("a._-.b", "a.b"),
            ("Web.Example", "Web.Example"),
            (&long, &long[..63]),
        ] {
            assert_eq!(host_name(&VmName::new(name).unwrap()), host, "{name}");
        }
    }

    proptest! {
        #[test]
        fn host_names_are_valid(name in "[A-Za-z0-9][A-Za-z0-9._-]{0,63}") {
            let host = host_name(&VmName::new(&name).unwrap());
            prop_assert!((1..=64).contains(&host.len()));
            for label in host.split('.') {
                prop_assert!((1..=63).contains(&label.len()), "{host}");
                prop_assert!(label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-'), "{host}");
                prop_assert!(!label.starts_with('-') && !label.ends_with('-'), "{host}");
            }
        }
    }
}
