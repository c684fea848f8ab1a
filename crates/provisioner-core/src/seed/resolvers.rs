//! The host's own name servers, for guests when none are configured.

use std::fs;
use std::io::ErrorKind as IoKind;
use std::net::IpAddr;
use std::path::Path;

use crate::{Error, Result};

/// Where a host's name servers stand. Where systemd-resolved or another local cache serves the first file, it names
/// only the loopback address, and the real ones are in the second.
pub const RESOLV_CONF: [&str; 2] = ["/etc/resolv.conf", "/run/systemd/resolve/resolv.conf"];

/// The name servers in the first of `files` that names one a guest can ask; empty when none does. A missing file is
/// no error.
///
/// # Errors
/// [`crate::ErrorKind::Io`] when a file exists and cannot be read.
pub fn host_resolvers<P: AsRef<Path>>(files: &[P]) -> Result<Vec<IpAddr>> {
    for file in files.iter().map(AsRef::as_ref) {
        match fs::read(file) {
            Ok(bytes) => {
                let servers = parse(&String::from_utf8_lossy(&bytes));
                if !servers.is_empty() {
                    return Ok(servers);
                }
            }
            Err(error) if error.kind() == IoKind::NotFound => {}
            Err(error) => return Err(Error::io("read", file, error)),
        }
    }
    Ok(Vec::new())
}

/// The `nameserver` lines of a resolv.conf, without what means nothing inside a guest: loopback, `0.0.0.0` and
/// link-local addresses.
#[must_use]
pub fn parse(text: &str) -> Vec<IpAddr> {
    let mut servers = Vec::new();
    for line in text.lines() {
        let mut words = line.split_ascii_whitespace();
        if words.next() != Some("nameserver") {
            continue;
        }
        let Some(Ok(ip)) = words.next().map(str::parse::<IpAddr>) else { continue };
        let ip = ip.to_canonical();
        let link_local = match ip {
            IpAddr::V4(ip) => ip.is_link_local(),
            IpAddr::V6(ip) => ip.is_unicast_link_local(),
        };
        if !(ip.is_loopback() || ip.is_unspecified() || link_local || servers.contains(&ip)) {
            servers.push(ip);
        }
    }
    servers
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn takes_what_a_guest_can_ask() {
        let text = "# nameserver 1.1.1.1\n; x\nsearch example\n nameserver\t10.0.0.53 # ours\nnameserver 127.0.0.53\n\
                    nameserver ::1\nnameserver fe80::1%eth0\nnameserver fe80::1\nnameserver 2001:db8::53\nnameserver\n\
                    nameserver 10.0.0.53\nnameservers 1.2.3.4\nnameserver 0.0.0.0\noptions edns0\nnameserver dns.example";
        let expected: Vec<IpAddr> = vec!["10.0.0.53".parse().unwrap(), "2001:db8::53".parse().unwrap()];
        assert_eq!(parse(text), expected);
    }

    #[test]
    fn a_local_cache_leads_to_the_second_file() {
        let dir = tempfile::tempdir().unwrap();
        let files = [dir.path().join("resolv.conf"), dir.path().join("real.conf")];
        assert!(host_resolvers(&files).unwrap().is_empty());
        fs::write(&files[1], "nameserver 192.0.2.1\n").unwrap();
        fs::write(&files[0], "nameserver 127.0.0.53\n").unwrap();
        assert_eq!(host_resolvers(&files).unwrap(), ["192.0.2.1".parse::<IpAddr>().unwrap()]);
        fs::write(&files[0], "nameserver 192.0.2.2\n").unwrap();
        assert_eq!(host_resolvers(&files).unwrap(), ["192.0.2.2".parse::<IpAddr>().unwrap()]);
    }

    proptest! {
        #[test]
        fn any_text_is_read(text in "(nameserver [0-9a-f.:%]{0,12}\n|.{0,20}\n)*") {
            for ip in parse(&text) {
                prop_assert!(!ip.is_loopback() && !ip.is_unspecified());
            }
        }
    }
}
