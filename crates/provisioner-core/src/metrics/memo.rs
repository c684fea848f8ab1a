//! What the sampler remembers from one sample to the next, besides the sample itself: facts that rarely change, what the
//! guests' agents said, and which VMs hang. Lost or damaged, it is found out again.

use std::collections::BTreeMap;
use std::path::PathBuf;

use provisioner_metrics::sample::Run;
use provisioner_metrics::store::Store;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// Facts about all VMs, of one boot.
#[derive(Debug, Serialize, Deserialize)]
pub struct Memo<T> {
    boot_id: String,
    /// By the VM's name.
    pub vms: BTreeMap<String, T>,
}

/// What the sampler itself has found out about a VM. Times are nanoseconds since boot, sizes bytes.
#[derive(Debug, Default, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmMemo {
    /// PID and start of the QEMU process this is about; none for a VM that is off.
    pub run: Option<(u32, u64)>,
    /// When its description was read.
    pub described: Option<u64>,
    /// Whether the agent's channel was open then.
    pub connected: bool,
    /// vCPUs.
    pub vcpus: Option<u64>,
    /// Memory allocated.
    pub memory: Option<u64>,
    /// The host's ends of its interfaces.
    pub taps: Vec<String>,
    /// Its writable disks.
    pub targets: Vec<String>,
    /// Their size.
    pub capacity: Option<u64>,
    /// Where its CPU time is.
    pub cpu_file: Option<PathBuf>,
    /// When the balloon was asked for.
    pub balloon: Option<u64>,
    /// What it said.
    pub memory_used: Option<u64>,
    /// Until when its monitor is left alone.
    pub stuck_until: Option<u64>,
    /// How often in a row it has not answered.
    #[serde(default)]
    pub silences: u32,
}

/// What the agent of a VM said last.
#[derive(Debug, Default, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AgentMemo {
    /// PID and start of the QEMU process this is about.
    pub run: Option<(u32, u64)>,
    /// When it was asked.
    pub asked: u64,
    /// Whether it answered.
    pub answered: bool,
    /// Bytes used in the guest's file systems.
    pub disk_used: Option<u64>,
    /// Established connections.
    pub connections: Option<u64>,
}

/// A run as the files hold it.
#[must_use]
pub fn key(run: Option<Run>) -> Option<(u32, u64)> {
    run.map(|run| (run.pid, run.start))
}

impl<T: Serialize + DeserializeOwned> Memo<T> {
    /// An empty one.
    #[must_use]
    pub fn new(boot_id: &str) -> Self {
        Self { boot_id: boot_id.to_owned(), vms: BTreeMap::new() }
    }

    /// What the file called `name` holds of this boot; nothing when it cannot be read.
    #[must_use]
    pub fn load(store: &Store, name: &str, boot_id: &str) -> Self {
        let found = store.read(name).ok().and_then(|bytes| serde_json::from_slice::<Self>(&bytes).ok());
        found.filter(|memo| memo.boot_id == boot_id).unwrap_or_else(|| Self::new(boot_id))
    }

    /// Keeps it for the next time, and says whether the directory could be written.
    pub fn store(&self, store: &Store, name: &str) -> bool {
        let kept = serde_json::to_vec(self).map_err(Into::into).and_then(|bytes| store.replace(name, &bytes));
        kept.inspect_err(|error: &std::io::Error| tracing::debug!("cannot keep {name}: {error}")).is_ok()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn what_is_remembered_is_of_this_boot_and_whole_or_not_at_all() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::new(dir.path());
        let mut memo = Memo::new("boot");
        memo.vms.insert("web1".into(), AgentMemo { asked: 7, disk_used: Some(1 << 50), ..AgentMemo::default() });
        assert!(memo.store(&store, "agents.json"));
        assert_eq!(Memo::load(&store, "agents.json", "boot").vms, memo.vms);
        assert!(Memo::<AgentMemo>::load(&store, "agents.json", "other").vms.is_empty());
        let text = String::from_utf8(store.read("agents.json").unwrap()).unwrap();
        store.replace("agents.json", &text.as_bytes()[..text.len() - 3]).unwrap();
        assert!(Memo::<AgentMemo>::load(&store, "agents.json", "boot").vms.is_empty());
    }
}
