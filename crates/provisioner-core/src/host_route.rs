//! What the host has to know of a VM's IPv6 address: its route, `<ipv6>/128 dev <bridge>`, and its permanent neighbour entry,
//! which says whose MAC address it is. Without the entry the host believes the first neighbour advertisement, and nothing
//! in front of it can look into one: a guest could take over the address of another.
//!
//! The kernel is asked over netlink, which needs no privilege and no process; only a change needs root, or the root
//! agent. Both acts may be repeated. `/proc/net/ipv6_route` will not do: its text comes in pieces, and whoever reads while
//! other routes change misses lines that were there all the time.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::Ipv6Addr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REPLACE, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage,
    NetlinkPayload,
};
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourHeader, NeighbourMessage, NeighbourState,
};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteProtocol, RouteScope, RouteType,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};
use nix::errno::Errno;
use nix::net::if_::if_nametoindex;
use serde_json::{Value, json};

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

    /// Makes sure that the host has `entry` for `address` on `bridge`; at most `timeout`.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] when `bridge` is no interface name; [`ErrorKind::Io`] when the kernel or the agent
    /// refuses; [`ErrorKind::TimedOut`]; [`ErrorKind::Unavailable`] without an agent.
    pub fn ensure(&self, entry: Entry, bridge: &str, address: Ipv6Addr, timeout: Duration) -> Result<()> {
        self.change(entry, bridge, address, timeout, true)
    }

    /// Makes sure that it does not; at most `timeout`. A bridge that does not exist has no entries. Whose MAC address a
    /// neighbour entry names does not matter.
    ///
    /// # Errors
    /// Those of [`Way::ensure`].
    pub fn remove(&self, entry: Entry, bridge: &str, address: Ipv6Addr, timeout: Duration) -> Result<()> {
        self.change(entry, bridge, address, timeout, false)
    }

    fn change(&self, entry: Entry, bridge: &str, address: Ipv6Addr, timeout: Duration, wanted: bool) -> Result<()> {
        if !is_interface_name(bridge) {
            return Err(Error::new(ErrorKind::Invalid, format!("{bridge:?} is not a name of a network interface")));
        }
        if entry.exists(bridge, address, wanted)? == wanted {
            return Ok(());
        }
        let done = match self {
            Self::Direct => entry.set(bridge, address, wanted),
            Self::RootAgent(socket) => {
                let (action, parameters) = entry.action(bridge, address, wanted);
                root_agent::request(socket, action, parameters, timeout).map(drop)
            }
        };
        // Somebody else may have made the same change since; then a refusal means nothing.
        if entry.exists(bridge, address, wanted)? == wanted {
            return Ok(());
        }
        let act = if wanted { "add" } else { "remove" };
        let message = format!("cannot {act} the host's {} {address} on {bridge}", entry.name());
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

/// One of the two things.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Entry {
    /// The route.
    Route,
    /// The permanent neighbour entry, with the VM's MAC address.
    Neighbour([u8; 6]),
}

impl Entry {
    fn name(self) -> &'static str {
        match self {
            Self::Route => "route to",
            Self::Neighbour(_) => "neighbour entry for",
        }
    }

    /// Whether the kernel has it. Asked in order to remove it, a neighbour entry counts whatever MAC address it names.
    fn exists(self, bridge: &str, address: Ipv6Addr, exactly: bool) -> Result<bool> {
        let Some(interface) = index(bridge)? else { return Ok(false) };
        let answer = match self {
            Self::Route => {
                let mut question = route_message(address, None);
                // The entry of the table that matches, not the route that a packet would take.
                question.header.flags = RouteFlags::FibMatch;
                request(RouteNetlinkMessage::GetRoute(question), 0)
            }
            Self::Neighbour(_) => {
                request(RouteNetlinkMessage::GetNeighbour(neighbour_message(address, interface, None)), 0)
            }
        };
        match answer {
            Ok(Some(RouteNetlinkMessage::NewRoute(found))) => Ok(leads_to(&found, interface, address)),
            Ok(Some(RouteNetlinkMessage::NewNeighbour(found))) => {
                let Self::Neighbour(mac) = self else { return Ok(false) };
                let named = NeighbourAttribute::LinkLayerAddress(mac.to_vec());
                Ok(found.header.state == NeighbourState::Permanent && (!exactly || found.attributes.contains(&named)))
            }
            Ok(_) => Ok(false),
            // There is none; or the kernel knows no IPv6.
            Err(error)
                if [Errno::ENETUNREACH, Errno::ENOENT, Errno::EAFNOSUPPORT, Errno::EOPNOTSUPP]
                    .map(|errno| Some(errno as i32))
                    .contains(&error.raw_os_error()) =>
            {
                Ok(false)
            }
            Err(error) => Err(Error::new(
                ErrorKind::Io,
                format!("cannot ask the kernel for the {} {address} on {bridge}", self.name()),
            )
            .because(error)),
        }
    }

    /// Adds or removes it.
    fn set(self, bridge: &str, address: Ipv6Addr, wanted: bool) -> Result<()> {
        let failed = |error| Error::new(ErrorKind::Io, "the kernel refuses").because(error);
        let interface = index(bridge)?.ok_or_else(|| failed(io::Error::from(Errno::ENODEV)))?;
        let message = match (self, wanted) {
            (Self::Route, true) => RouteNetlinkMessage::NewRoute(route_message(address, Some(interface))),
            (Self::Route, false) => RouteNetlinkMessage::DelRoute(route_message(address, Some(interface))),
            (Self::Neighbour(mac), true) => {
                RouteNetlinkMessage::NewNeighbour(neighbour_message(address, interface, Some(mac)))
            }
            (Self::Neighbour(_), false) => {
                RouteNetlinkMessage::DelNeighbour(neighbour_message(address, interface, None))
            }
        };
        request(message, if wanted { NLM_F_CREATE | NLM_F_REPLACE } else { 0 }).map(drop).map_err(failed)
    }

    /// What the root agent is asked for: the base package's action for the route, this package's for the neighbour.
    fn action(self, bridge: &str, address: Ipv6Addr, wanted: bool) -> (&'static str, Value) {
        match (self, wanted) {
            (Self::Route, true) => ("ip6-route-add", json!({"address": format!("{address}/128"), "dev": bridge})),
            (Self::Route, false) => ("ip6-route-del", json!({"address": format!("{address}/128"), "dev": bridge})),
            (Self::Neighbour(mac), true) => {
                ("virsh-neighbour-add", json!({"address": address, "mac": mac_text(mac), "dev": bridge}))
            }
            (Self::Neighbour(_), false) => ("virsh-neighbour-del", json!({"address": address, "dev": bridge})),
        }
    }
}

/// All that the host has for addresses of `bridge`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Entries {
    /// The single addresses that are routed there, with no gateway between.
    pub routes: BTreeSet<Ipv6Addr>,
    /// The permanent neighbours, with their MAC addresses.
    pub neighbours: BTreeMap<Ipv6Addr, [u8; 6]>,
}

impl Entries {
    /// What there is now. A bridge that does not exist has nothing.
    ///
    /// # Errors
    /// [`ErrorKind::Io`] when the kernel cannot be asked.
    pub fn of(bridge: &str) -> Result<Self> {
        let Some(interface) = index(bridge)? else { return Ok(Self::default()) };
        let mut all = Self::default();
        let mut routes = RouteMessage::default();
        routes.header.address_family = AddressFamily::Inet6;
        let mut neighbours = NeighbourMessage::default();
        neighbours.header.family = AddressFamily::Inet6;
        for question in [RouteNetlinkMessage::GetRoute(routes), RouteNetlinkMessage::GetNeighbour(neighbours)] {
            let answers = dump(&question).map_err(|error| {
                Error::new(ErrorKind::Io, format!("cannot ask the kernel for what it knows of {bridge}")).because(error)
            })?;
            for answer in answers {
                all.add(&answer, interface);
            }
        }
        Ok(all)
    }

    fn add(&mut self, answer: &RouteNetlinkMessage, interface: u32) {
        match answer {
            RouteNetlinkMessage::NewRoute(route) => {
                let to = route.attributes.iter().find_map(|attribute| match attribute {
                    RouteAttribute::Destination(RouteAddress::Inet6(to)) => Some(*to),
                    _ => None,
                });
                self.routes.extend(to.filter(|to| leads_to(route, interface, *to)));
            }
            RouteNetlinkMessage::NewNeighbour(neighbour)
                if neighbour.header.ifindex == interface && neighbour.header.state == NeighbourState::Permanent =>
            {
                let (mut address, mut mac) = (None, None);
                for attribute in &neighbour.attributes {
                    match attribute {
                        NeighbourAttribute::Destination(NeighbourAddress::Inet6(to)) => address = Some(*to),
                        NeighbourAttribute::LinkLayerAddress(bytes) => mac = <[u8; 6]>::try_from(&bytes[..]).ok(),
                        _ => {}
                    }
                }
                self.neighbours.extend(address.zip(mac));
            }
            _ => {}
        }
    }
}

/// A MAC address as everybody writes it.
#[must_use]
pub fn mac_text(mac: [u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

/// A MAC address from that text.
#[must_use]
pub fn parse_mac(text: &str) -> Option<[u8; 6]> {
    let mut parts = text.split(':');
    let mut mac = [0; 6];
    for byte in &mut mac {
        let part = parts.next().filter(|part| part.len() == 2 && part.bytes().all(|b| b.is_ascii_hexdigit()))?;
        *byte = u8::from_str_radix(part, 16).ok()?;
    }
    parts.next().is_none().then_some(mac)
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

/// What names the route to the kernel: with an interface to add or remove it, without to ask.
fn route_message(address: Ipv6Addr, interface: Option<u32>) -> RouteMessage {
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

/// What names the neighbour entry to the kernel: with a MAC address to set it, without to ask or remove it.
fn neighbour_message(address: Ipv6Addr, interface: u32, mac: Option<[u8; 6]>) -> NeighbourMessage {
    let mut message = NeighbourMessage::default();
    message.header = NeighbourHeader { family: AddressFamily::Inet6, ifindex: interface, ..NeighbourHeader::default() };
    message.attributes.push(NeighbourAttribute::Destination(NeighbourAddress::Inet6(address)));
    if let Some(mac) = mac {
        message.header.state = NeighbourState::Permanent;
        message.attributes.push(NeighbourAttribute::LinkLayerAddress(mac.to_vec()));
    }
    message
}

/// All answers to a question. Asked again when what it is about has changed meanwhile, which the kernel says.
fn dump(question: &RouteNetlinkMessage) -> io::Result<Vec<RouteNetlinkMessage>> {
    /// Where others never stop changing things, the last answer is as good as the next.
    const TRIES: u32 = 20;
    let mut tries = 0;
    loop {
        let socket = send(question.clone(), NLM_F_DUMP)?;
        let (mut answers, mut changed, mut ended) = (Vec::new(), false, false);
        while !ended {
            let (bytes, _) = socket.recv_from_full()?;
            let mut rest = &bytes[..];
            while !rest.is_empty() && !ended {
                let part = NetlinkMessage::<RouteNetlinkMessage>::deserialize(rest).map_err(io::Error::other)?;
                changed |= part.header.flags & NLM_F_DUMP_INTR != 0;
                let length = (part.header.length as usize).next_multiple_of(4);
                match part.payload {
                    NetlinkPayload::InnerMessage(answer) => answers.push(answer),
                    NetlinkPayload::Error(error) if error.code.is_some() => return Err(error.to_io()),
                    _ => ended = true,
                }
                rest = rest.get(length..).unwrap_or_default();
            }
        }
        tries += 1;
        if !changed || tries == TRIES {
            return Ok(answers);
        }
    }
}

/// Sends one message and returns what the kernel answers, `None` for a bare acknowledgement. The kernel answers at once.
fn request(message: RouteNetlinkMessage, flags: u16) -> io::Result<Option<RouteNetlinkMessage>> {
    let asks = matches!(message, RouteNetlinkMessage::GetRoute(_) | RouteNetlinkMessage::GetNeighbour(_));
    let socket = send(message, flags | if asks { 0 } else { NLM_F_ACK })?;
    let (answer, _) = socket.recv_from_full()?;
    match NetlinkMessage::<RouteNetlinkMessage>::deserialize(&answer).map_err(io::Error::other)?.payload {
        NetlinkPayload::InnerMessage(answer) => Ok(Some(answer)),
        NetlinkPayload::Error(error) if error.code.is_some() => Err(error.to_io()),
        _ => Ok(None),
    }
}

/// Sends one message, on a socket of its own.
fn send(message: RouteNetlinkMessage, flags: u16) -> io::Result<Socket> {
    let mut header = NetlinkHeader::default();
    header.flags = NLM_F_REQUEST | flags;
    let mut packet = NetlinkMessage::new(header, NetlinkPayload::from(message));
    packet.finalize();
    let mut bytes = vec![0; packet.buffer_len()];
    packet.serialize(&mut bytes);
    let mut socket = Socket::new(NETLINK_ROUTE)?;
    socket.bind_auto()?;
    socket.connect(&SocketAddr::new(0, 0))?;
    socket.send(&bytes, 0)?;
    Ok(socket)
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
        way.remove(Entry::Route, "br0", address, LIMIT).unwrap();
        for _ in 0..2 {
            way.ensure(Entry::Route, "br0", address, LIMIT).unwrap();
            assert_eq!(shown("fd00:1::2"), ["fd00:1::2 dev br0"]);
            assert_eq!(Entries::of("br0").unwrap().routes, [address].into());
            assert_eq!(Entries::of("br1").unwrap(), Entries::default());
        }
        way.remove(Entry::Route, "br1", address, LIMIT).unwrap();
        assert_eq!(shown("fd00:1::2"), ["fd00:1::2 dev br0"]);
        way.ensure(Entry::Route, "br1", address, LIMIT).unwrap();
        assert_eq!(shown("fd00:1::2"), ["fd00:1::2 dev br1"]);
        for _ in 0..2 {
            way.remove(Entry::Route, "br1", address, LIMIT).unwrap();
            assert!(shown("fd00:1::2").is_empty());
        }
        way.remove(Entry::Route, "br9", address, LIMIT).unwrap();
        let error = way.ensure(Entry::Route, "br9", address, LIMIT).unwrap_err();
        assert!(error.kind == ErrorKind::Io && error.message.contains("br9") && error.hint.is_some(), "{error}");

        // The host's own address and a route through a gateway are not the route to a VM.
        for args in [
            &["addr", "add", "fd00:1::1/128", "dev", "br0", "nodad"][..],
            &["-6", "route", "add", "fd00:2::2/128", "via", "fe80::9", "dev", "br0"],
        ] {
            assert!(Command::new("ip").args(args).status().unwrap().success());
        }
        assert!(!Entry::Route.exists("br0", "fd00:2::2".parse().unwrap(), true).unwrap());

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
        let ask = |entry: Entry, name: &str, answer: Value, wanted: bool| {
            let socket = dir.path().join(name);
            let agent = root_agent::tests::agent(&socket, root_agent::encode(&answer).unwrap());
            let result = Way::RootAgent(socket).change(entry, "br0", address, LIMIT, wanted);
            (result, agent.join().unwrap())
        };
        let (result, asked) = ask(Entry::Route, "a", json!({"ok": false, "error": "Invalid device"}), true);
        assert_eq!(asked, json!({"action": "ip6-route-add", "params": {"address": "fd00:1::2/128", "dev": "br0"}}));
        let error = result.unwrap_err();
        assert!(
            error.kind == ErrorKind::Io && error.in_full().contains("the root agent refused: Invalid device"),
            "{error}"
        );
        let (result, _) = ask(Entry::Route, "b", json!({"ok": true}), true);
        assert!(result.unwrap_err().message.contains("was not"));

        Way::Direct.ensure(Entry::Route, "br0", address, LIMIT).unwrap();
        let nobody = Way::RootAgent(dir.path().join("none"));
        // What is there already needs no agent.
        nobody.ensure(Entry::Route, "br0", address, LIMIT).unwrap();
        assert_eq!(nobody.remove(Entry::Route, "br0", address, LIMIT).unwrap_err().kind, ErrorKind::Unavailable);
        let (result, asked) = ask(Entry::Route, "c", json!({"ok": true}), false);
        assert_eq!(asked, json!({"action": "ip6-route-del", "params": {"address": "fd00:1::2/128", "dev": "br0"}}));
        assert!(result.is_err());
        Way::Direct.remove(Entry::Route, "br0", address, LIMIT).unwrap();

        let neighbour = Entry::Neighbour([0x52, 0x54, 0, 0xa, 0xb, 0xc]);
        let (_, asked) = ask(neighbour, "d", json!({"ok": false, "error": "no"}), true);
        let parameters = json!({"address": "fd00:1::2", "mac": "52:54:00:0a:0b:0c", "dev": "br0"});
        assert_eq!(asked, json!({"action": "virsh-neighbour-add", "params": parameters}));
        Way::Direct.ensure(neighbour, "br0", address, LIMIT).unwrap();
        nobody.ensure(neighbour, "br0", address, LIMIT).unwrap();
        let (_, asked) = ask(neighbour, "e", json!({"ok": true}), false);
        assert_eq!(asked, json!({"action": "virsh-neighbour-del", "params": {"address": "fd00:1::2", "dev": "br0"}}));
        Way::Direct.remove(neighbour, "br0", address, LIMIT).unwrap();
        nobody.remove(Entry::Route, "br0", address, LIMIT).unwrap();
        assert_eq!(nobody.ensure(Entry::Route, "../x", address, LIMIT).unwrap_err().kind, ErrorKind::Invalid);
    }

    /// Other routes come and go all the time on a host with many VMs.
    #[test]
    fn a_route_is_seen_while_others_change() {
        if !in_a_namespace("host_route::tests::a_route_is_seen_while_others_change") {
            return;
        }
        let stays: Ipv6Addr = "fd00:1::ff".parse().unwrap();
        Entry::Route.set("br0", stays, true).unwrap();
        let end = std::time::Instant::now() + Duration::from_secs(1);
        let changing = std::thread::spawn(move || {
            while std::time::Instant::now() < end {
                for (host, wanted) in (1..100_u128).flat_map(|host| [(host, true), (host, false)]) {
                    let other = Ipv6Addr::from(0xfd00_0001_u128 << 96 | host);
                    Entry::Route.set("br0", other, wanted).unwrap();
                }
            }
        });
        let mut seen = 0;
        while !changing.is_finished() {
            assert!(Entry::Route.exists("br0", stays, true).unwrap(), "missed after {seen} looks");
            assert!(Entries::of("br0").unwrap().routes.contains(&stays), "missed after {seen} looks at all");
            seen += 1;
        }
        changing.join().unwrap();
        assert!(seen > 100, "{seen}");
    }

    const MAC: [u8; 6] = [0x52, 0x54, 0, 1, 2, 3];

    #[test]
    fn a_neighbour_is_known_for_good_and_another_mac_replaces_it() {
        if !in_a_namespace("host_route::tests::a_neighbour_is_known_for_good_and_another_mac_replaces_it") {
            return;
        }
        let address: Ipv6Addr = "fd00:1::2".parse().unwrap();
        let other = [0x52, 0x54, 0, 1, 2, 4];
        let neighbours = || {
            let output = Command::new("ip").args(["-6", "neigh", "show", "dev", "br0"]).output().unwrap();
            String::from_utf8(output.stdout).unwrap().trim().to_owned()
        };
        for (mac, text) in [(MAC, "52:54:00:01:02:03"), (MAC, "52:54:00:01:02:03"), (other, "52:54:00:01:02:04")] {
            Way::Direct.ensure(Entry::Neighbour(mac), "br0", address, LIMIT).unwrap();
            assert_eq!(neighbours(), format!("fd00:1::2 lladdr {text} PERMANENT"));
            let all = Entries::of("br0").unwrap();
            assert_eq!((all.routes, all.neighbours), ([].into(), [(address, mac)].into()));
        }
        assert!(!Entry::Neighbour(MAC).exists("br0", address, true).unwrap());
        for _ in 0..2 {
            Way::Direct.remove(Entry::Neighbour(MAC), "br0", address, LIMIT).unwrap();
            assert!(!neighbours().contains("PERMANENT"), "{}", neighbours());
        }
        // What the host has learnt is not what it was told.
        let learnt =
            ["-6", "neigh", "replace", "fd00:1::3", "lladdr", "52:54:00:01:02:03", "nud", "reachable", "dev", "br0"];
        assert!(Command::new("ip").args(learnt).status().unwrap().success());
        assert!(!Entry::Neighbour(MAC).exists("br0", "fd00:1::3".parse().unwrap(), true).unwrap());
    }

    #[test]
    fn a_mac_address_is_six_pairs_of_hex_digits() {
        assert_eq!(parse_mac("52:54:00:01:02:03"), Some(MAC));
        assert_eq!(parse_mac(&mac_text(MAC)), Some(MAC));
        for wrong in
            ["", "52:54:00:01:02", "52:54:00:01:02:03:04", "52:54:00:01:02:3", "52:54:00:01:02:+3", "52-54-00-01-02-03"]
        {
            assert_eq!(parse_mac(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn only_the_route_of_the_address_itself_on_the_bridge_counts() {
        let address = "fd00:1::2".parse().unwrap();
        let route = route_message(address, Some(7));
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
