//! What a use case is given: where things are, the settings, whom to tell, and when to stop.

use std::net::Ipv6Addr;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use crate::cancel::Cancel;
use crate::database::Database;
use crate::host_route::Way;
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

    /// Makes sure that the host routes `address` to `bridge`.
    ///
    /// # Errors
    /// When neither the kernel nor the root agent does it.
    pub(crate) fn ensure_route(&self, bridge: &str, address: Ipv6Addr) -> Result<()> {
        Way::of_this_process(&self.dirs.run).ensure(bridge, address, ROUTE_LIMIT)
    }

    /// Makes sure that it does not.
    ///
    /// # Errors
    /// When the route is there and stays.
    pub(crate) fn remove_route(&self, bridge: &str, address: Ipv6Addr) -> Result<()> {
        Way::of_this_process(&self.dirs.run).remove(bridge, address, ROUTE_LIMIT)
    }

    /// The VM database.
    #[must_use]
    pub fn database(&self) -> Database {
        Database::new(&self.settings.db_file)
    }
}
