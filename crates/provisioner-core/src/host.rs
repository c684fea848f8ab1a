//! What a use case is given: where things are, the settings, whom to tell, and when to stop.

use std::net::Ipv6Addr;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use crate::cancel::Cancel;
use crate::database::Database;
use crate::host_route::{Entry, Way};
use crate::libvirt::Connection;
use crate::paths::Directories;
use crate::progress::Progress;
use crate::settings::Settings;
use crate::{ErrorKind, Result};

/// How long undoing waits for a libvirtd that has just gone away: a restart takes a few seconds.
const RECONNECT_LIMIT: Duration = Duration::from_secs(15);

/// The root agent serves one request after the other, for the whole host.
const ROUTE_LIMIT: Duration = Duration::from_secs(10);

/// One host, as one command sees it.
#[derive(Clone)]
pub struct Host {
    /// Where files are.
    pub dirs: Directories,
    /// The settings.
    pub settings: Settings,
    /// libvirt's URI.
    pub uri: String,
    /// Whom to tell.
    pub progress: Arc<dyn Progress>,
    /// When to stop.
    pub cancel: Cancel,
    /// The command's name, shown to whoever waits for a lock it holds.
    pub command: String,
}

impl Host {
    /// Connects to libvirt.
    ///
    /// # Errors
    /// [`ErrorKind::Unavailable`].
    pub fn connect(&self) -> Result<Connection> {
        Connection::open_watched(&self.uri)
    }

    /// Connects, trying again for a while: for what must be finished although a signal has come or libvirtd
    /// restarts.
    ///
    /// # Errors
    /// [`ErrorKind::Unavailable`] after about 15 s.
    pub(crate) fn reconnect(&self) -> Result<Connection> {
        let deadline = Instant::now() + RECONNECT_LIMIT;
        loop {
            match self.connect() {
                Err(error) if error.kind == ErrorKind::Unavailable && Instant::now() < deadline => {
                    thread::sleep(Duration::from_millis(500));
                }
                outcome => return outcome,
            }
        }
    }

    /// Makes sure that the host routes `address` to `bridge`, and takes no other MAC address for it than `mac`. Only warns: the
    /// VM works over IPv4 without, and a failed create loses a paid subscription.
    pub(crate) fn ensure_reachable(&self, bridge: &str, address: Ipv6Addr, mac: Option<[u8; 6]>) {
        if let Err(error) = self.ensure_entry(Entry::Route, bridge, address) {
            self.progress.warn(&format!(
                "{address} is not reachable through this host until blockhost-vm-start has set its route: {}",
                error.in_full()
            ));
            // What is not reachable cannot be taken over either.
            return;
        }
        let Some(mac) = mac else { return };
        if let Err(error) = self.ensure_entry(Entry::Neighbour(mac), bridge, address) {
            self.progress.warn(&format!(
                "another VM could claim {address} until blockhost-vm-start has tied it to its MAC address: {}",
                error.in_full()
            ));
        }
    }

    /// One of the two.
    ///
    /// # Errors
    /// When neither the kernel nor the root agent does it.
    pub(crate) fn ensure_entry(&self, entry: Entry, bridge: &str, address: Ipv6Addr) -> Result<()> {
        Way::of_this_process(&self.dirs.run).ensure(entry, bridge, address, ROUTE_LIMIT)
    }

    /// Takes both back.
    ///
    /// # Errors
    /// When one is there and stays.
    pub(crate) fn forget_address(&self, bridge: &str, address: Ipv6Addr) -> Result<()> {
        let way = Way::of_this_process(&self.dirs.run);
        // Whoever cannot do the one may still do the other.
        let neighbour = way.remove(Entry::Neighbour([0; 6]), bridge, address, ROUTE_LIMIT);
        way.remove(Entry::Route, bridge, address, ROUTE_LIMIT)?;
        neighbour
    }

    /// The VM database.
    #[must_use]
    pub fn database(&self) -> Database {
        Database::new(&self.settings.db_file)
    }
}
