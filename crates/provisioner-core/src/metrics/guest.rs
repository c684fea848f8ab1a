//! What only the guest knows: how full its file systems are, how many connections it has. Its agent is asked, after the
//! sample has been given to whoever waits for it, and no process is started in the guest. Nothing it says is believed
//! beyond being a number.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use provisioner_metrics::clock;
use serde_json::Value;

use super::memo::AgentMemo;
use crate::Result;
use crate::libvirt::Domain;

/// No VM's agent is begun to be asked after this time: the rest is asked after the next sample.
const BUDGET: Duration = Duration::from_millis(150);

/// Those that are being asked may take this long; nobody waits for them.
const PATIENCE: Duration = Duration::from_millis(1500);

/// A hung agent holds up one of these, and not the others.
const AT_ONCE: usize = 3;

/// The shortest time libvirt can be told to wait for an agent, in seconds.
const ANSWER_LIMIT: u8 = 1;

/// File systems that only show what was brought along, such as the seed.
const IMAGES: [&str; 3] = ["iso9660", "udf", "squashfs"];

/// A domain to be asked, with its run.
pub type Asked = (Domain, Option<(u32, u64)>);

/// Asks the agents of `domains`, in that order, until the budget is used up; what each said, by name.
#[must_use]
pub fn ask(domains: Vec<Asked>) -> BTreeMap<String, AgentMemo> {
    let end = Instant::now() + BUDGET;
    let queue = Arc::new(Mutex::new(domains.into_iter()));
    let (send, receive) = mpsc::channel();
    for _ in 0..AT_ONCE {
        let (queue, send) = (Arc::clone(&queue), send.clone());
        let worker = thread::Builder::new().name("agent".into()).spawn(move || {
            while Instant::now() < end {
                let Some((domain, run)) = queue.lock().unwrap_or_else(PoisonError::into_inner).next() else { return };
                let asked = clock::now();
                let said = facts(&domain);
                if let Err(error) = &said {
                    tracing::debug!(domain = domain.name(), "agent: {error}");
                }
                let answered = said.is_ok();
                let (disk_used, connections) = said.unwrap_or_default();
                let memo = AgentMemo { run, asked, answered, disk_used, connections };
                if send.send((domain.name().to_owned(), memo)).is_err() {
                    return;
                }
            }
        });
        if let Err(error) = worker {
            tracing::debug!("cannot start a thread: {error}");
        }
    }
    drop(send);
    let patience = Instant::now() + PATIENCE;
    let mut all = BTreeMap::new();
    while let Ok((name, memo)) = receive.recv_timeout(patience.saturating_duration_since(Instant::now())) {
        all.insert(name, memo);
    }
    all
}

/// Bytes used and established connections. An agent that answers but does not know one of them is still one that answers.
fn facts(domain: &Domain) -> Result<(Option<u64>, Option<u64>)> {
    let systems = domain.agent("guest-get-fsinfo", &Value::Null, ANSWER_LIMIT);
    let used = match systems {
        Ok(systems) => used(&systems),
        Err(error) if error.kind == crate::ErrorKind::TimedOut => return Err(error),
        // Disabled in the guest, or broken there. Whether it answers at all is another question.
        Err(_) => domain.agent("guest-ping", &Value::Null, ANSWER_LIMIT).map(|_| None)?,
    };
    let connections = domain.read_guest_file("/proc/net/snmp", ANSWER_LIMIT).ok();
    Ok((used, connections.and_then(|text| established(&text))))
}

/// The sum over the guest's file systems, each counted once wherever it is mounted.
fn used(systems: &Value) -> Option<u64> {
    let mut by_device = BTreeMap::new();
    for system in systems.as_array()? {
        let word = |key: &str| system.get(key).and_then(Value::as_str);
        let image = word("type").is_none_or(|kind| IMAGES.contains(&kind));
        if let (false, Some(used)) = (image, system.get("used-bytes").and_then(Value::as_u64)) {
            by_device.insert(word("name").unwrap_or_default(), used);
        }
    }
    // None that says how full it is: an initramfs, or an old agent.
    by_device.values().copied().reduce(u64::saturating_add)
}

/// `CurrEstab` of the line `Tcp:`, which counts IPv4 and IPv6.
fn established(snmp: &[u8]) -> Option<u64> {
    let text = String::from_utf8_lossy(snmp);
    let mut lines = text.lines().filter_map(|line| line.strip_prefix("Tcp:"));
    let (names, values) = (lines.next()?, lines.next()?);
    let index = names.split_ascii_whitespace().position(|name| name == "CurrEstab")?;
    values.split_ascii_whitespace().nth(index)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    #[test]
    fn a_file_system_counts_once_and_an_image_never() {
        let systems = json!([
            {"name": "vda1", "type": "ext4", "mountpoint": "/", "used-bytes": 1000, "total-bytes": 5000},
            {"name": "vda1", "type": "ext4", "mountpoint": "/snap", "used-bytes": 1000, "total-bytes": 5000},
            {"name": "vda15", "type": "vfat", "mountpoint": "/boot/efi", "used-bytes": 30, "total-bytes": 100},
            {"name": "vdb", "type": "iso9660", "mountpoint": "/seed", "used-bytes": 7, "total-bytes": 7},
            {"name": "tmp", "type": "ext4", "used-bytes": "much"},
        ]);
        assert_eq!(used(&systems), Some(1030));
        assert_eq!(used(&json!([])), None);
        assert_eq!(used(&json!({"a": 1})), None);
        let huge =
            json!([{"name": "a", "type": "x", "used-bytes": u64::MAX}, {"name": "b", "type": "x", "used-bytes": 1}]);
        assert_eq!(used(&huge), Some(u64::MAX));
    }

    #[test]
    fn the_connections_are_those_established() {
        let text = "Ip: Forwarding DefaultTTL\nIp: 2 64\nTcp: RtoAlgorithm MaxConn CurrEstab InSegs\nTcp: 1 -1 4 99\n";
        assert_eq!(established(text.as_bytes()), Some(4));
        assert_eq!(established(b"Tcp: CurrEstab\n"), None);
        assert_eq!(established(b"Tcp: CurrEstab\nTcp: -4\n"), None);
    }

    proptest! {
        #[test]
        fn no_answer_of_a_guest_makes_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200), text in "(Tcp: [A-Za-z0-9 ]*\n){0,4}") {
            let _ = established(&bytes);
            let _ = established(text.as_bytes());
        }
    }
}
