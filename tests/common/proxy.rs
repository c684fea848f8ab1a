//! libvirtd behind a socket of the test's own, which it can cut, hang and restore.

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use super::Lab;

const LIBVIRTD: &str = "/run/libvirt/libvirt-sock";

#[derive(Clone, Copy, PartialEq)]
pub enum Mode {
    Forward,
    /// Nobody listens, as when the daemon has ended.
    Down,
    /// Connections are taken and nothing is ever answered.
    Hung,
    /// The same, and those that exist fall silent without being closed, as when the daemon is stopped.
    Frozen,
}

#[derive(Default)]
struct Connections(Vec<UnixStream>);

/// libvirtd's socket under another name.
pub struct Proxy {
    path: PathBuf,
    state: Arc<Mutex<(Mode, Connections)>>,
}

impl Proxy {
    pub fn new(lab: &Lab) -> Self {
        let path = lab.dir.join("libvirt-sock");
        let proxy = Self { path, state: Arc::new(Mutex::new((Mode::Down, Connections::default()))) };
        proxy.set(Mode::Forward);
        proxy
    }

    pub fn uri(&self) -> String {
        format!("qemu+unix:///system?socket={}", self.path.display())
    }

    pub fn cut(&self) {
        self.set(Mode::Down);
    }

    pub fn restore(&self) {
        self.set(Mode::Forward);
    }

    pub fn set(&self, mode: Mode) {
        let mut state = self.state.lock().unwrap();
        state.0 = mode;
        if mode == Mode::Frozen {
            return;
        }
        for stream in state.1.0.drain(..) {
            let _ = stream.shutdown(Shutdown::Both);
        }
        let _ = fs::remove_file(&self.path);
        if mode != Mode::Down {
            let listener = UnixListener::bind(&self.path).unwrap();
            let (path, state) = (self.path.clone(), Arc::clone(&self.state));
            thread::spawn(move || serve(&listener, &path, &state));
        }
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.cut();
    }
}

/// Serves until the socket is another's. A listener whose name is gone gets no more connections, so its thread just stays.
fn serve(listener: &UnixListener, path: &Path, shared: &Arc<Mutex<(Mode, Connections)>>) {
    for client in listener.incoming() {
        let Ok(client) = client else { return };
        let mut state = shared.lock().unwrap();
        if state.0 == Mode::Down || !path.exists() {
            return;
        }
        if state.0 == Mode::Forward {
            let server = UnixStream::connect(LIBVIRTD).unwrap();
            for (from, to) in [(&client, &server), (&server, &client)] {
                let (mut from, mut to) = (from.try_clone().unwrap(), to.try_clone().unwrap());
                let shared = Arc::clone(shared);
                thread::spawn(move || {
                    let mut buffer = vec![0; 1 << 16];
                    while let Ok(length @ 1..) = from.read(&mut buffer) {
                        while shared.lock().unwrap().0 == Mode::Frozen {
                            thread::sleep(Duration::from_millis(50));
                        }
                        if to.write_all(&buffer[..length]).is_err() {
                            break;
                        }
                    }
                    let _ = to.shutdown(Shutdown::Both);
                    let _ = from.shutdown(Shutdown::Both);
                });
            }
            state.1.0.push(server);
        }
        state.1.0.push(client);
    }
}
