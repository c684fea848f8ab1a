//! The host's route to a VM's IPv6 address: `<ipv6>/128 dev <bridge>`.
//!
//! The kernel is asked over netlink, which needs no privilege and no process; only a change needs root, or the root
//! agent. Both acts may be repeated. `/proc/net/ipv6_route` will not do: its text comes in pieces, and whoever reads while
//! other routes change misses lines that were there all the time.

use std::io;
use std::net::Ipv6Addr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_REPLACE, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload,
};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteProtocol, RouteScope, RouteType,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};
use nix::errno::Errno;
use nix::net::if_::if_nametoindex;
use serde_json::json;

use crate::bridge::is_interface_name;
use crate::{Error, ErrorKind, Result, root_agent};

/// Who changes the host's routes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Way {
    /// This process, which is root.
    Direct,
    /// The root agent at this socket.
    RootAgent(PathBuf),
}

impl Way {
    /// Root acts directly, anybody else through the agent whose socket is in `run`.
    #[must_use]
    pub fn of_this_process(run: &Path) -> Self {
        if nix::unistd::geteuid().is_root() { Self::Direct } else { Self::RootAgent(run.join("root-agent.sock")) }
    }

    /// Makes sure that `address` is routed to `bridge`; at most `timeout`.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] when `bridge` is no interface name; [`ErrorKind::Io`] when the kernel or the agent
    /// refuses; [`ErrorKind::TimedOut`]; [`ErrorKind::Unavailable`] without an agent.
    pub fn ensure(&self, bridge: &str, address: Ipv6Addr, timeout: Duration) -> Result<()> {
        self.change(bridge, address, timeout, true)
    }

    /// Makes sure that `address` is not routed to `bridge`; at most `timeout`. A bridge that does not exist has no routes.
    ///
    /// # Errors
    /// Those of [`Way::ensure`].
    pub fn remove(&self, bridge: &str, address: Ipv6Addr, timeout: Duration) -> Result<()> {
        self.change(bridge, address, timeout, false)
    }

    fn change(&self, bridge: &str, address: Ipv6Addr, timeout: Duration, wanted: bool) -> Result<()> {
        if !is_interface_name(bridge) {
            return Err(Error::new(ErrorKind::Invalid, format!("{bridge:?} is not a name of a network interface")));
        }
        if exists(bridge, address)? == wanted {
            return Ok(());
        }
        let route = format!("{address}/128");
        let done = match self {
            Self::Direct => set(bridge, address, wanted),
            Self::RootAgent(socket) => {
                let action = if wanted { "ip6-route-add" } else { "ip6-route-del" };
                root_agent::request(socket, action, json!({"address": route, "dev": bridge}), timeout).map(drop)
            }
        };
        // Somebody else may have made the same change since; then a refusal means nothing.
        if exists(bridge, address)? == wanted {
            return Ok(());
        }
        let act = if wanted { "add" } else { "remove" };
        let message = format!("cannot {act} the host route {route} on {bridge}");
        Err(match done {
            Ok(()) => Error::new(ErrorKind::Io, format!("{message}: it was reported as done, but was not"))
                .hint("see what else changes routes on this host"),
            // The cause has its own hint where it knows one.
            Err(error) if error.hint.is_some() => Error::new(error.kind, message).because(error),
            Err(error) => Error::new(error.kind, message).because(error).hint(format!(
                "does the bridge {bridge} exist, and is IPv6 enabled on it? the root agent knows only some bridges by name"
            )),
        })
    }
}

/// Whether the kernel routes `address/128` to `bridge`, with no gateway between.
fn exists(bridge: &str, address: Ipv6Addr) -> Result<bool> {
    let Some(interface) = index(bridge)? else { return Ok(false) };
    let mut question = message(address, None);
    // The entry of the table that matches, not the route that a packet would take.
    question.header.flags = RouteFlags::FibMatch;
    match request(RouteNetlinkMessage::GetRoute(question), 0) {
        Ok(Some(RouteNetlinkMessage::NewRoute(found))) => Ok(leads_to(&found, interface, address)),
        Ok(_) => Ok(false),
        // There is none; or the kernel knows no IPv6.
        Err(error)
            if [Errno::ENETUNREACH, Errno::EAFNOSUPPORT, Errno::EOPNOTSUPP]
                .map(|errno| Some(errno as i32))
                .contains(&error.raw_os_error()) =>
        {
            Ok(false)
        }
        Err(error) => {
            Err(Error::new(ErrorKind::Io, format!("cannot ask the kernel for the route to {address}")).because(error))
        }
    }
}

/// Whether `found` is the route of `address` alone, by way of `interface`, to what is on that link.
fn leads_to(found: &RouteMessage, interface: u32, address: Ipv6Addr) -> bool {
    let has = |wanted: &RouteAttribute| found.attributes.contains(wanted);
    found.header.kind == RouteType::Unicast
        && found.header.destination_prefix_length == 128
        && has(&RouteAttribute::Destination(RouteAddress::Inet6(address)))
        && has(&RouteAttribute::Oif(interface))
        && !found.attributes.iter().any(|a| matches!(a, RouteAttribute::Gateway(_) | RouteAttribute::Via(_)))
}

/// Adds or removes the route.
fn set(bridge: &str, address: Ipv6Addr, wanted: bool) -> Result<()> {
    let failed = || Error::new(ErrorKind::Io, "cannot change the host's routes");
    let interface = index(bridge)?.ok_or_else(|| failed().because(io::Error::from(Errno::ENODEV)))?;
    let route = message(address, Some(interface));
    if wanted {
        request(RouteNetlinkMessage::NewRoute(route), NLM_F_CREATE | NLM_F_REPLACE)
    } else {
        request(RouteNetlinkMessage::DelRoute(route), 0)
    }
    .map(drop)
    .map_err(|error| failed().because(error))
}

/// What names the route to the kernel: with an interface to add or remove it, without to ask.
fn message(address: Ipv6Addr, interface: Option<u32>) -> RouteMessage {
    let mut message = RouteMessage::default();
    message.header =
        RouteHeader { address_family: AddressFamily::Inet6, destination_prefix_length: 128, ..RouteHeader::default() };
    message.attributes.push(RouteAttribute::Destination(RouteAddress::Inet6(address)));
    if let Some(interface) = interface {
        message.header.table = RouteHeader::RT_TABLE_MAIN;
        message.header.protocol = RouteProtocol::Boot;
        message.header.scope = RouteScope::Universe;
        message.header.kind = RouteType::Unicast;
        message.attributes.push(RouteAttribute::Oif(interface));
    }
    message
}

/// Sends one message and returns what the kernel answers, `None` for a bare acknowledgement. The kernel answers at once.
fn request(message: RouteNetlinkMessage, flags: u16) -> io::Result<Option<RouteNetlinkMessage>> {
    let mut header = NetlinkHeader::default();
    let asks = matches!(message, RouteNetlinkMessage::GetRoute(_));
    header.flags = NLM_F_REQUEST | flags | if asks { 0 } else { NLM_F_ACK };
    let mut packet = NetlinkMessage::new(header, NetlinkPayload::from(message));
    packet.finalize();
    let mut bytes = vec![0; packet.buffer_len()];
    packet.serialize(&mut bytes);
    let mut socket = Socket::new(NETLINK_ROUTE)?;
    socket.bind_auto()?;
    socket.connect(&SocketAddr::new(0, 0))?;
    socket.send(&bytes, 0)?;
    let (answer, _) = socket.recv_from_full()?;
    match NetlinkMessage::<RouteNetlinkMessage>::deserialize(&answer).map_err(io::Error::other)?.payload {
        NetlinkPayload::InnerMessage(answer) => Ok(Some(answer)),
        NetlinkPayload::Error(error) if error.code.is_some() => Err(error.to_io()),
        _ => Ok(None),
    }
}

/// The kernel's number of an interface, `None` without one of that name.
fn index(bridge: &str) -> Result<Option<u32>> {
    match if_nametoindex(bridge) {
        Ok(index) => Ok(Some(index)),
        Err(Errno::ENODEV) => Ok(None),
        Err(errno) => Err(Error::io("look up", Path::new(bridge), errno.into())),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::env;
    use std::process::Command;

    use super::*;

    const INSIDE: &str = "PROVISIONER_TEST_IN_NETNS";
    const LIMIT: Duration = Duration::from_secs(10);

    /// Runs the test called `test` again in a network namespace of its own, with two bridges; true in that second run.
    fn in_a_namespace(test: &str) -> bool {
        const SETUP: &str = "mount -t sysfs sysfs /sys && ip link set lo up \
            && for b in br0 br1; do ip link add $b type bridge && ip link set $b up || exit 1; done \
            && ip addr add 10.1.2.1/22 dev br0 && exec \"$@\"";
        if env::var_os(INSIDE).is_some() {
            return true;
        }
        let output = Command::new("unshare")
            .args(["--map-root-user", "--net", "--mount", "sh", "-c", SETUP, "sh"])
            .arg(env::current_exe().unwrap())
            .args(["--exact", test, "--nocapture"])
            .env(INSIDE, "1")
            .output()
            .unwrap();
        let said = [output.stdout, output.stderr].concat();
        let said = String::from_utf8_lossy(&said);
        assert!(output.status.success() && said.contains("1 passed"), "{said}");
        false
    }

    fn shown(address: &str) -> Vec<String> {
        let output = Command::new("ip").args(["-6", "route", "show", address]).output().unwrap();
        let said = String::from_utf8(output.stdout).unwrap();
        said.lines().map(|line| line.split(" metric").next().unwrap().trim_end().to_owned()).collect()
    }

    #[test]
    fn direct_is_repeatable_and_follows_the_bridge() {
        if !in_a_namespace("host_route::tests::direct_is_repeatable_and_follows_the_bridge") {
            return;
        }
        let address = "fd00:1::2".parse().unwrap();
        let way = Way::of_this_process(Path::new("/nowhere"));
        assert_eq!(way, Way::Direct);
        way.remove("br0", address, LIMIT).unwrap();
        for _ in 0..2 {
            way.ensure("br0", address, LIMIT).unwrap();
            assert_eq!(shown("fd00:1::2"), ["fd00:1::2 dev br0"]);
        }
        way.remove("br1", address, LIMIT).unwrap();
        assert_eq!(shown("fd00:1::2"), ["fd00:1::2 dev br0"]);
        way.ensure("br1", address, LIMIT).unwrap();
        assert_eq!(shown("fd00:1::2"), ["fd00:1::2 dev br1"]);
        for _ in 0..2 {
            way.remove("br1", address, LIMIT).unwrap();
            assert!(shown("fd00:1::2").is_empty());
        }
        way.remove("br9", address, LIMIT).unwrap();
        let error = way.ensure("br9", address, LIMIT).unwrap_err();
        assert!(error.kind == ErrorKind::Io && error.message.contains("br9") && error.hint.is_some(), "{error}");

        // The host's own address and a route through a gateway are not the route to a VM.
        for args in [
            &["addr", "add", "fd00:1::1/128", "dev", "br0", "nodad"][..],
            &["-6", "route", "add", "fd00:2::2/128", "via", "fe80::9", "dev", "br0"],
        ] {
            assert!(Command::new("ip").args(args).status().unwrap().success());
        }
        assert!(!exists("br0", "fd00:2::2".parse().unwrap()).unwrap());

        let bridge = crate::bridge::look_up("br0").unwrap();
        assert_eq!(bridge.ipv4, [("10.1.2.1".parse().unwrap(), 22)]);
        assert_eq!(
            crate::bridge::look_up("lo").unwrap_err().message,
            "bridge \"lo\" is a network interface, but not a bridge"
        );
    }

    #[test]
    fn the_root_agent_is_asked_and_its_word_is_checked() {
        if !in_a_namespace("host_route::tests::the_root_agent_is_asked_and_its_word_is_checked") {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let address: Ipv6Addr = "fd00:1::2".parse().unwrap();
        let ask = |name: &str, answer: serde_json::Value, wanted: bool| {
            let socket = dir.path().join(name);
            let agent = root_agent::tests::agent(&socket, root_agent::encode(&answer).unwrap());
            let result = Way::RootAgent(socket).change("br0", address, LIMIT, wanted);
            (result, agent.join().unwrap())
        };
        let (result, asked) = ask("a", json!({"ok": false, "error": "Invalid device"}), true);
        assert_eq!(asked, json!({"action": "ip6-route-add", "params": {"address": "fd00:1::2/128", "dev": "br0"}}));
        let error = result.unwrap_err();
        assert!(
            error.kind == ErrorKind::Io && error.in_full().contains("the root agent refused: Invalid device"),
            "{error}"
        );
        let (result, _) = ask("b", json!({"ok": true}), true);
        assert!(result.unwrap_err().message.contains("was not"));

        Way::Direct.ensure("br0", address, LIMIT).unwrap();
        let nobody = Way::RootAgent(dir.path().join("none"));
        // What is there already needs no agent.
        nobody.ensure("br0", address, LIMIT).unwrap();
        assert_eq!(nobody.remove("br0", address, LIMIT).unwrap_err().kind, ErrorKind::Unavailable);
        let (result, asked) = ask("c", json!({"ok": true}), false);
        assert_eq!(asked, json!({"action": "ip6-route-del", "params": {"address": "fd00:1::2/128", "dev": "br0"}}));
        assert!(result.is_err());
        Way::Direct.remove("br0", address, LIMIT).unwrap();
        nobody.remove("br0", address, LIMIT).unwrap();
        assert_eq!(nobody.ensure("../x", address, LIMIT).unwrap_err().kind, ErrorKind::Invalid);
    }

    /// Other routes come and go all the time on a host with many VMs.
    #[test]
    fn a_route_is_seen_while_others_change() {
        if !in_a_namespace("host_route::tests::a_route_is_seen_while_others_change") {
            return;
        }
        let stays: Ipv6Addr = "fd00:1::ff".parse().unwrap();
        set("br0", stays, true).unwrap();
        let end = std::time::Instant::now() + Duration::from_secs(1);
        let changing = std::thread::spawn(move || {
            while std::time::Instant::now() < end {
                for (host, wanted) in (1..100_u128).flat_map(|host| [(host, true), (host, false)]) {
                    let other = Ipv6Addr::from(0xfd00_0001_u128 << 96 | host);
                    set("br0", other, wanted).unwrap();
                }
            }
        });
        let mut seen = 0;
        while !changing.is_finished() {
            assert!(exists("br0", stays).unwrap(), "missed after {seen} looks");
            seen += 1;
        }
        changing.join().unwrap();
        assert!(seen > 100, "{seen}");
    }

    #[test]
    fn only_the_route_of_the_address_itself_on_the_bridge_counts() {
        let address = "fd00:1::2".parse().unwrap();
        let route = message(address, Some(7));
        assert!(leads_to(&route, 7, address));
        assert!(!leads_to(&route, 8, address));
        assert!(!leads_to(&route, 7, "fd00:1::3".parse().unwrap()));
        let mut network = route.clone();
        network.header.destination_prefix_length = 64;
        let mut own = route.clone();
        own.header.kind = RouteType::Local;
        let mut beyond = route;
        beyond.attributes.push(RouteAttribute::Gateway(RouteAddress::Inet6("fe80::1".parse().unwrap())));
        for other in [network, own, beyond] {
            assert!(!leads_to(&other, 7, address), "{other:?}");
        }
    }
}
