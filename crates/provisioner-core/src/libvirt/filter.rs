//! The network filter every VM's interface refers to: a guest sends only with its own MAC address and its own
//! addresses, and never as a router or a DHCP server.
//!
//! libvirt's ready-made `clean-traffic` drops all IPv6, and `no-ipv6-spoofing` breaks neighbour discovery, so the
//! filter is our own. Its name carries a version: redefining a filter in use re-applies it to every running VM, so
//! a changed one gets a new name instead and VMs keep what they were made with.

use std::net::{Ipv4Addr, Ipv6Addr};

use virt::error::ErrorNumber;

use super::{Connection, bounded, change_limit, failure, known};
use crate::Result;

/// For a VM with an IPv6 address.
const DUAL_STACK: &str = "blockhost-guest-dual-2";
/// For a VM without.
const IPV4_ONLY: &str = "blockhost-guest-ipv4-2";

/// A filter with the values of one VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FilterRef {
    /// The filter's name.
    pub filter: &'static str,
    /// Its parameters; libvirt adds `MAC` itself.
    pub parameters: Vec<(&'static str, String)>,
}

impl FilterRef {
    /// The filter for an interface with these addresses.
    #[must_use]
    pub fn new(mac: [u8; 6], ipv4: Ipv4Addr, ipv6: Option<Ipv6Addr>) -> Self {
        let mut parameters = vec![("IP", ipv4.to_string())];
        match ipv6 {
            Some(address) => {
                parameters.push(("IPV6", address.to_string()));
                parameters.push(("LINKLOCAL", link_local(mac).to_string()));
                Self { filter: DUAL_STACK, parameters }
            }
            None => Self { filter: IPV4_ONLY, parameters },
        }
    }
}

/// The link-local address systemd-networkd gives an interface: EUI-64 of the MAC (RFC 4291, appendix A).
fn link_local(mac: [u8; 6]) -> Ipv6Addr {
    let [a, b, c, d, e, f] = mac;
    let group = |high: u8, low: u8| u16::from_be_bytes([high, low]);
    Ipv6Addr::new(0xfe80, 0, 0, 0, group(a ^ 2, b), group(c, 0xff), group(0xfe, d), group(e, f))
}

/// The rules, first match wins within libvirt's priority order. `out` is what the guest sends.
fn filter_xml(name: &str) -> String {
    const IPV4: &str = "
  <rule action='drop' direction='out' priority='-990'><mac match='no' srcmacaddr='$MAC'/></rule>
  <rule action='accept' direction='out' priority='-500'><arp match='yes' arpsrcmacaddr='$MAC' arpsrcipaddr='$IP'/></rule>
  <rule action='accept' direction='out' priority='-499'><arp match='yes' arpsrcmacaddr='$MAC' arpsrcipaddr='0.0.0.0'/></rule>
  <rule action='drop' direction='out' priority='-490'><arp/></rule>
  <rule action='drop' direction='out' priority='-480'><ip protocol='udp' srcportstart='67'/></rule>
  <rule action='accept' direction='out' priority='-470'><ip srcipaddr='$IP'/></rule>
  <rule action='drop' direction='out' priority='-460'><ip/></rule>";
    // What may be sent is listed, by the first header alone: behind an extension header a router advertisement would pass
    // a rule that looks for it (RFC 7113). Of ICMPv6 (RFC 4443, 4861) go errors 1 to 4, echo 128 and 129, router
    // solicitation 133, neighbour solicitation and advertisement 135 and 136; not 134, router advertisement, and 137,
    // redirect. Port 547 is a DHCPv6 server's. Duplicate address detection comes from `::`, and multicast reports, which
    // carry a hop-by-hop header, go to ff02::16.
    let mut ipv6 = String::new();
    if name == DUAL_STACK {
        let mut rule = |action: &str, priority: i32, matches: &str| {
            ipv6 +=
                &format!("\n  <rule action='{action}' direction='out' priority='{priority}'><ipv6 {matches}/></rule>");
        };
        rule("drop", -390, "protocol='udp' srcportstart='547'");
        for source in ["$IPV6", "$LINKLOCAL"] {
            for protocol in ["tcp", "udp", "sctp", "esp"] {
                rule("accept", -380, &format!("srcipaddr='{source}' protocol='{protocol}'"));
            }
            for kind in [1, 2, 3, 4, 128, 129, 133, 135, 136] {
                rule("accept", -370, &format!("srcipaddr='{source}' protocol='icmpv6' type='{kind}'"));
            }
            rule("accept", -360, &format!("srcipaddr='{source}' dstipaddr='ff02::16'"));
        }
        rule("accept", -350, "srcipaddr='::' protocol='icmpv6' type='135'");
        rule("accept", -350, "srcipaddr='::' dstipaddr='ff02::16'");
    }
    const REST: &str = "
  <rule action='drop' direction='out' priority='-300'><ipv6/></rule>
  <rule action='drop' direction='out' priority='900'><mac/></rule>";
    format!("<filter name='{name}' chain='root' priority='-700'>{IPV4}{ipv6}{REST}\n</filter>\n")
}

impl Connection {
    /// Defines the filter `reference` names, unless it is there.
    ///
    /// # Errors
    /// When libvirt refuses.
    pub fn ensure_filter(&self, reference: &FilterRef) -> Result<()> {
        let name = reference.filter;
        let what = || format!("cannot define network filter {name}");
        let missing = |e: &virt::error::Error| known(e) == ErrorNumber::NoNwfilter;
        match self.raw().lookup_nwfilter_by_name(name) {
            Ok(_) => return Ok(()),
            Err(e) if missing(&e) => {}
            Err(e) => return Err(failure(what(), &e)),
        }
        let (conn, xml) = (self.raw().clone(), filter_xml(name));
        // Should it be given up and come later, it is the same filter that the next VM needs.
        match bounded(change_limit(), &what(), move || conn.define_nwfilter_xml(&xml).map(drop))? {
            Ok(()) => Ok(()),
            // A create beside this one may have been first.
            Err(_) if self.raw().lookup_nwfilter_by_name(name).is_ok() => Ok(()),
            Err(e) => {
                Err(failure(what(), &e).hint("libvirt's nwfilter driver needs the packages ebtables and iptables"))
            }
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn link_local_is_the_eui_64_of_the_mac() {
        let mac = [0x52, 0x54, 0x00, 0x12, 0x34, 0x56];
        assert_eq!(link_local(mac).to_string(), "fe80::5054:ff:fe12:3456");
    }

    #[test]
    fn every_variable_a_filter_uses_is_given() {
        for ipv6 in [None, Some(Ipv6Addr::LOCALHOST)] {
            let reference = FilterRef::new([0x52, 0x54, 0, 1, 2, 3], Ipv4Addr::new(10, 0, 0, 7), ipv6);
            let xml = filter_xml(reference.filter);
            roxmltree::Document::parse(&xml).unwrap();
            for used in xml.split('$').skip(1) {
                let variable = used.split('\'').next().unwrap();
                assert!(
                    variable == "MAC" || reference.parameters.iter().any(|(name, _)| *name == variable),
                    "{variable}"
                );
            }
        }
    }
}
