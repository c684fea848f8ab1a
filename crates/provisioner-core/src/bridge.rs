//! Facts about the bridge the VMs are attached to.

use std::net::{IpAddr, Ipv4Addr};
use std::path::Path;

use nix::ifaddrs::{InterfaceAddress, getifaddrs};

use crate::{Error, ErrorKind, Result};

/// Where the kernel shows network interfaces.
pub const SYS_CLASS_NET: &str = "/sys/class/net";

/// A bridge that exists.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bridge {
    /// Its name.
    pub name: String,
    /// Its IPv4 addresses with their prefix lengths.
    pub ipv4: Vec<(Ipv4Addr, u8)>,
}

impl Bridge {
    /// The bridge's own address in the network `address/prefix_len`: the gateway when none is configured.
    #[must_use]
    pub fn address_in(&self, address: Ipv4Addr, prefix_len: u8) -> Option<Ipv4Addr> {
        let mask = u32::MAX.checked_shl(32_u32.saturating_sub(u32::from(prefix_len))).unwrap_or(0);
        let same = |own: &Ipv4Addr| (u32::from(*own) ^ u32::from(address)) & mask == 0;
        self.ipv4.iter().map(|(own, _)| *own).find(same)
    }
}

/// Whether the kernel would take `name` for an interface.
#[must_use]
pub fn is_interface_name(name: &str) -> bool {
    (1..=15).contains(&name.len())
        && !matches!(name, "." | "..")
        && name.bytes().all(|b| b.is_ascii_graphic() && !matches!(b, b'/' | b':'))
}

/// The bridge `name`.
///
/// # Errors
/// [`ErrorKind::Config`] when there is no such interface, or it is not a bridge; [`ErrorKind::Io`] when the kernel
/// cannot be asked for addresses.
pub fn look_up(name: &str) -> Result<Bridge> {
    look_up_in(Path::new(SYS_CLASS_NET), name)
}

/// The addresses of the host itself, of all its interfaces.
///
/// # Errors
/// [`ErrorKind::Io`] when the kernel cannot be asked.
pub fn own_addresses() -> Result<Vec<IpAddr>> {
    let interfaces =
        getifaddrs().map_err(|e| Error::new(ErrorKind::Io, "cannot ask for the addresses of this host").because(e))?;
    let address = |interface: InterfaceAddress| {
        let address = interface.address?;
        let ipv4 = address.as_sockaddr_in().map(|v4| v4.ip().into());
        ipv4.or_else(|| address.as_sockaddr_in6().map(|v6| v6.ip().into()))
    };
    Ok(interfaces.filter_map(address).collect())
}

fn look_up_in(sys_class_net: &Path, name: &str) -> Result<Bridge> {
    let refuse =
        |what: &str, hint: &str| Err(Error::new(ErrorKind::Config, format!("bridge {name:?} {what}")).hint(hint));
    if !is_interface_name(name) {
        return refuse("is not a name of a network interface", "correct `bridge` in db.yaml");
    }
    let interface = sys_class_net.join(name);
    if !interface.exists() {
        return refuse("does not exist", "create it, or name another one as `bridge` in db.yaml");
    }
    if !interface.join("bridge").is_dir() {
        return refuse("is a network interface, but not a bridge", "name a bridge as `bridge` in db.yaml");
    }
    let addresses = getifaddrs().map_err(|errno| {
        Error::new(ErrorKind::Io, format!("cannot read the addresses of bridge {name:?}")).because(errno)
    })?;
    let mut ipv4 = Vec::new();
    for entry in addresses.filter(|entry| entry.interface_name == name) {
        let address = entry.address.as_ref().and_then(|a| a.as_sockaddr_in()).map(|a| a.ip());
        let mask = entry.netmask.as_ref().and_then(|m| m.as_sockaddr_in()).map(|m| u32::from(m.ip()));
        if let (Some(address), Some(mask)) = (address, mask) {
            ipv4.push((address, mask.leading_ones() as u8));
        }
    }
    Ok(Bridge { name: name.to_owned(), ipv4 })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn tells_no_interface_from_no_bridge() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("eth0")).unwrap();
        fs::create_dir_all(dir.path().join("lo/bridge")).unwrap();
        let message = |name| look_up_in(dir.path(), name).unwrap_err().to_string();
        assert_eq!(message("br0"), "bridge \"br0\" does not exist");
        assert_eq!(message("eth0"), "bridge \"eth0\" is a network interface, but not a bridge");
        for name in ["", "..", "lo/../lo", "a b", "sixteen-letters-"] {
            assert!(message(name).contains("not a name"), "{name}");
        }
        // Where the loopback interface is shown as a bridge, its real address is found.
        let bridge = look_up_in(dir.path(), "lo").unwrap();
        assert!(bridge.ipv4.contains(&(Ipv4Addr::LOCALHOST, 8)), "{bridge:?}");
        assert_eq!(look_up("lo").unwrap_err().kind, ErrorKind::Config);
    }

    #[test]
    fn the_gateway_is_the_address_in_the_pools_network() {
        let bridge = Bridge {
            name: "br0".into(),
            ipv4: vec![("10.0.0.1".parse().unwrap(), 24), ("192.168.122.1".parse().unwrap(), 24)],
        };
        let address_in = |network: &str, len| bridge.address_in(network.parse().unwrap(), len).map(|a| a.to_string());
        assert_eq!(address_in("192.168.122.0", 24).as_deref(), Some("192.168.122.1"));
        assert_eq!(address_in("10.0.1.0", 24), None);
        assert_eq!(address_in("10.0.1.0", 23).as_deref(), Some("10.0.0.1"));
        assert_eq!(address_in("10.0.1.0", 0).as_deref(), Some("10.0.0.1"));
        assert_eq!(address_in("10.0.0.1", 32).as_deref(), Some("10.0.0.1"));
    }
}
