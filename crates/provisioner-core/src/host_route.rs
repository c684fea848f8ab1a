//! The host's route to a VM's IPv6 address: `<ipv6>/128 dev <bridge>`.
//!
//! What is there is read from the kernel's table, which needs no privilege and no process; only a change is made by
//! `ip` (as root) or by the root agent. Both acts may be repeated.

use std::fs;
use std::io::ErrorKind as IoKind;
use std::net::Ipv6Addr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::json;

use crate::bridge::is_interface_name;
use crate::cancel::Cancel;
use crate::child::{self, CommandExt as _};
use crate::{Error, ErrorKind, Result, root_agent};

const TABLE: &str = "/proc/net/ipv6_route";

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
            Self::Direct => ip(&["-6", "route", if wanted { "replace" } else { "del" }, &route, "dev", bridge]),
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

/// The single addresses that the kernel routes to `bridge`, with no gateway between.
///
/// # Errors
/// [`ErrorKind::Io`] when the kernel's table cannot be read.
pub fn addresses(bridge: &str) -> Result<Vec<Ipv6Addr>> {
    match fs::read_to_string(TABLE) {
        Ok(table) => Ok(routes(&table, bridge).collect()),
        // A kernel without IPv6.
        Err(error) if error.kind() == IoKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(Error::io("read", Path::new(TABLE), error)),
    }
}

/// Whether the kernel routes `address/128` to `bridge`, with no gateway between.
fn exists(bridge: &str, address: Ipv6Addr) -> Result<bool> {
    Ok(addresses(bridge)?.contains(&address))
}

/// The same from the text of `/proc/net/ipv6_route`: destination and its prefix length, source and its length, next hop,
/// metric, two counters, flags, all in hex, and the interface.
fn routes<'a>(table: &'a str, bridge: &'a str) -> impl Iterator<Item = Ipv6Addr> + 'a {
    const UP: u32 = 0x1;
    /// Through a gateway, a reject route, a cache entry, an address of the host itself.
    const OTHER: u32 = 0x2 | 0x200 | 0x0100_0000 | 0x8000_0000;
    table.lines().filter_map(move |line| {
        let words: Vec<_> = line.split_ascii_whitespace().collect();
        let [to, len, .., flags, interface] = words[..] else { return None };
        let flags = u32::from_str_radix(flags, 16).unwrap_or(0);
        let ours = len == "80" && interface == bridge && flags & UP != 0 && flags & OTHER == 0;
        u128::from_str_radix(to, 16).ok().filter(|_| ours).map(Ipv6Addr::from)
    })
}

/// Runs `ip`; its complaint is the error. Not interrupted by a signal: it takes milliseconds, and undoing must go through.
fn ip(args: &[&str]) -> Result<()> {
    child::tied("ip").args(args).run("cannot change the host's routes", &Cancel::default()).map(drop)
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

    #[test]
    fn the_table_is_read_exactly() {
        let line = |to: &str, len: &str, flags: &str, interface: &str| {
            let zero = "0".repeat(32);
            format!("{to} {len} {zero} 00 {zero} 00000400 00000001 00000000 {flags}      {interface}\n")
        };
        let to = "fd000001000000000000000000000002";
        let address: Ipv6Addr = "fd00:1::2".parse().unwrap();
        let routed = |table: &str| routes(table, "br0").any(|found| found == address);
        assert!(routed(&format!("junk\n{}", line(to, "80", "00000001", "br0"))));
        for (len, flags, interface) in [
            ("40", "00000001", "br0"),
            ("80", "00000000", "br0"),
            ("80", "00000003", "br0"),
            ("80", "80200001", "br0"),
            ("80", "00200201", "br0"),
            ("80", "00000001", "br01"),
        ] {
            assert!(!routed(&line(to, len, flags, interface)), "{len} {flags} {interface}");
        }
    }
}
