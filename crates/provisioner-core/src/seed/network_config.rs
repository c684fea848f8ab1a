//! The network-config: netplan version 2, one interface found by its MAC address, everything static.
//!
//! Written as JSON, which is YAML. Default routes are written `0.0.0.0/0` and `::/0`, not `default`, because
//! cloud-init's own reader of the format knows only those. The IPv6 address is a `/128`: nothing but the router is on
//! the link, so the router gets a host route, and the default route says that its gateway is on the link. DHCP and
//! router advertisements are off: whatever a neighbour sends does not change a guest's addresses.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use serde_json::{Value, json};

use crate::{Error, ErrorKind, Result};

/// What the guest's interface is to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Network {
    /// The MAC address of the VM's interface.
    pub mac: [u8; 6],
    /// The guest's IPv4 address.
    pub address: Ipv4Addr,
    /// The prefix length of the pool's network, 1 to 32.
    pub prefix_len: u8,
    /// The default gateway: the one configured, else the bridge's own address. `None`: no default route.
    pub gateway: Option<Ipv4Addr>,
    /// The name servers: the ones configured, else the host's own ([`super::resolvers`]). IPv6 ones are left out for a
    /// guest without IPv6.
    pub name_servers: Vec<IpAddr>,
    /// The guest's IPv6 side, if the host has a prefix.
    pub ipv6: Option<Ipv6Network>,
}

/// The IPv6 side of a guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ipv6Network {
    /// The guest's address; it gets it as a `/128`.
    pub address: Ipv6Addr,
    /// The host's address on the bridge.
    pub router: Ipv6Addr,
}

impl Network {
    /// The text of the seed's `network-config`.
    ///
    /// # Errors
    /// [`ErrorKind::Config`] when the prefix length is not 1 to 32, or a gateway has the guest's own address.
    pub fn to_yaml(&self) -> Result<String> {
        if !(1..=32).contains(&self.prefix_len) {
            return Err(config(format!("/{} is not the prefix length of an IPv4 network", self.prefix_len)));
        }
        if self.gateway == Some(self.address) {
            return Err(config(format!("the gateway {} and the VM have the same address", self.address)));
        }
        let mut addresses = vec![format!("{}/{}", self.address, self.prefix_len)];
        let mut routes = Vec::new();
        if let Some(gateway) = self.gateway {
            let mut route = json!({"to": "0.0.0.0/0", "via": gateway});
            if !self.on_link(gateway) {
                route["on-link"] = Value::Bool(true);
            }
            routes.push(route);
        }
        if let Some(Ipv6Network { address, router }) = self.ipv6 {
            if address == router {
                return Err(config(format!("the host and the VM have the same address {address}")));
            }
            addresses.push(format!("{address}/128"));
            routes.push(json!({"to": format!("{router}/128"), "scope": "link"}));
            routes.push(json!({"to": "::/0", "via": router, "on-link": true}));
        }
        let mac: Vec<_> = self.mac.iter().map(|byte| format!("{byte:02x}")).collect();
        let mut interface = json!({
            "match": {"macaddress": mac.join(":")},
            "dhcp4": false,
            "dhcp6": false,
            "accept-ra": false,
            "addresses": addresses,
        });
        if !routes.is_empty() {
            interface["routes"] = routes.into();
        }
        let servers: Vec<_> = self.name_servers.iter().filter(|ip| ip.is_ipv4() || self.ipv6.is_some()).collect();
        if !servers.is_empty() {
            interface["nameservers"] = json!({"addresses": servers});
        }
        Ok(format!("{:#}\n", json!({"version": 2, "ethernets": {"lan": interface}})))
    }

    fn on_link(&self, other: Ipv4Addr) -> bool {
        let mask = u32::MAX << (32 - u32::from(self.prefix_len));
        (u32::from(self.address) ^ u32::from(other)) & mask == 0
    }
}

fn config(message: String) -> Error {
    Error::new(ErrorKind::Config, message)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt;
    use std::process::Command;

    use super::*;

    fn dual_stack() -> Network {
        Network {
            mac: [0x52, 0x54, 0, 0xab, 0xcd, 0x0e],
            address: "10.20.4.200".parse().unwrap(),
            prefix_len: 22,
            gateway: Some("10.20.5.1".parse().unwrap()),
            name_servers: vec!["9.9.9.9".parse().unwrap(), "2620:fe::fe".parse().unwrap()],
            ipv6: Some(Ipv6Network { address: "fd00:1::2".parse().unwrap(), router: "fd00:1::1".parse().unwrap() }),
        }
    }

    fn ipv4_only() -> Network {
        Network { ipv6: None, ..dual_stack() }
    }

    /// The networkd unit that Debian's netplan (package netplan.io) makes of it, without the files' other parts.
    fn networkd(network: &Network) -> String {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("etc/netplan");
        fs::create_dir_all(&dir).unwrap();
        let yaml: Value = serde_json::from_str(&network.to_yaml().unwrap()).unwrap();
        let file = dir.join("50-cloud-init.yaml");
        fs::write(&file, json!({"network": yaml}).to_string()).unwrap();
        fs::set_permissions(&file, PermissionsExt::from_mode(0o600)).unwrap();
        let output = Command::new("netplan").args(["generate", "--root-dir"]).arg(root.path()).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{said}");
        assert!(!said.contains("WARNING") && !said.contains("rror"), "{said}");
        fs::read_to_string(root.path().join("run/systemd/network/10-netplan-lan.network")).unwrap()
    }

    #[test]
    fn text_of_a_dual_stack_guest() {
        insta::assert_snapshot!(dual_stack().to_yaml().unwrap(), @r#"
        {
          "version": 2,
          "ethernets": {
            "lan": {
              "match": {
                "macaddress": "52:54:00:ab:cd:0e"
              },
              "dhcp4": false,
              "dhcp6": false,
              "accept-ra": false,
              "addresses": [
                "10.20.4.200/22",
                "fd00:1::2/128"
              ],
              "routes": [
                {
                  "to": "0.0.0.0/0",
                  "via": "10.20.5.1"
                },
                {
                  "to": "fd00:1::1/128",
                  "scope": "link"
                },
                {
                  "to": "::/0",
                  "via": "fd00:1::1",
                  "on-link": true
                }
              ],
              "nameservers": {
                "addresses": [
                  "9.9.9.9",
                  "2620:fe::fe"
                ]
              }
            }
          }
        }
        "#);
    }

    #[test]
    fn netplan_takes_it() {
        insta::assert_snapshot!(networkd(&dual_stack()), @r#"
        [Match]
        PermanentMACAddress=52:54:00:ab:cd:0e

        [Network]
        LinkLocalAddressing=ipv6
        Address=10.20.4.200/22
        Address=fd00:1::2/128
        IPv6AcceptRA=no
        DNS=9.9.9.9
        DNS=2620:fe::fe

        [Route]
        Destination=0.0.0.0/0
        Gateway=10.20.5.1

        [Route]
        Destination=fd00:1::1/128
        Scope=link

        [Route]
        Destination=::/0
        Gateway=fd00:1::1
        GatewayOnLink=true
        "#);
        insta::assert_snapshot!(networkd(&ipv4_only()), @r#"
        [Match]
        PermanentMACAddress=52:54:00:ab:cd:0e

        [Network]
        LinkLocalAddressing=ipv6
        Address=10.20.4.200/22
        IPv6AcceptRA=no
        DNS=9.9.9.9

        [Route]
        Destination=0.0.0.0/0
        Gateway=10.20.5.1
        "#);
    }

    #[test]
    fn netplan_takes_a_gateway_outside_the_network_and_no_gateway_at_all() {
        let outside = networkd(&Network { gateway: Some("10.99.0.1".parse().unwrap()), ..ipv4_only() });
        assert!(outside.contains("Gateway=10.99.0.1\nGatewayOnLink=true\n"), "{outside}");
        let none = networkd(&Network { gateway: None, name_servers: Vec::new(), ..ipv4_only() });
        assert!(!none.contains("[Route]") && !none.contains("DNS="), "{none}");
    }

    #[test]
    fn refuses_contradictions() {
        let same = "fd00::1".parse().unwrap();
        for network in [
            Network { prefix_len: 0, ..ipv4_only() },
            Network { prefix_len: 33, ..ipv4_only() },
            Network { gateway: Some(ipv4_only().address), ..ipv4_only() },
            Network { ipv6: Some(Ipv6Network { address: same, router: same }), ..ipv4_only() },
        ] {
            assert_eq!(network.to_yaml().unwrap_err().kind, ErrorKind::Config, "{network:?}");
        }
    }
}
