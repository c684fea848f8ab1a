//! libvirtd behind a socket of the test's own, which it can cut, hang and restore, and where single requests can be held back.

use std::collections::HashMap;
use std::fs;
use std::io::{Read as _, Write as _};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use super::{Lab, wait_until};

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

/// What a client may ask libvirtd for, by the numbers of its protocol (`remote_protocol.x`), which never change.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Request {
    DefineDomain = 350,
    UndefineDomain = 231,
    StartDomain = 9,
    CreateVolume = 93,
    DeleteVolume = 94,
    SetSchedulerParameters = 219,
}

/// A request that came and was not passed on yet.
struct Held {
    server: UnixStream,
    frame: Vec<u8>,
    answered: Arc<AtomicBool>,
}

#[derive(Default)]
struct Connections {
    streams: Vec<UnixStream>,
    /// Requests of these kinds are held back.
    hold: Vec<Request>,
    held: Vec<Held>,
}

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

    /// Holds requests of these kinds back from now on, as a libvirtd that hangs at them does. All else is answered.
    pub fn hold(&self, kinds: &[Request]) {
        self.state.lock().unwrap().1.hold = kinds.to_vec();
    }

    /// Waits until a request is held back.
    pub fn wait_for_held(&self) {
        wait_until("a request to be held back", Duration::from_secs(120), || {
            !self.state.lock().unwrap().1.held.is_empty()
        });
    }

    /// Passes on what was held back, whether its client still lives or not, and waits until libvirtd has dealt with it.
    pub fn release(&self) {
        let held = {
            let mut state = self.state.lock().unwrap();
            state.1.hold.clear();
            std::mem::take(&mut state.1.held)
        };
        assert!(!held.is_empty(), "nothing was held back");
        for Held { mut server, frame, answered } in held {
            server.write_all(&frame).unwrap();
            wait_until("an answer to what was held back", Duration::from_secs(120), || answered.load(Ordering::SeqCst));
        }
    }

    pub fn set(&self, mode: Mode) {
        let mut state = self.state.lock().unwrap();
        state.0 = mode;
        if mode == Mode::Frozen {
            return;
        }
        for stream in state.1.streams.drain(..) {
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
            let answers: Answers = Arc::default();
            let ends =
                || (client.try_clone().unwrap(), server.try_clone().unwrap(), Arc::clone(shared), Arc::clone(&answers));
            let (from, to, all, known) = ends();
            thread::spawn(move || requests(from, to, &all, &known));
            let (to, from, all, known) = ends();
            thread::spawn(move || replies(from, to, &all, &known));
            state.1.streams.push(server);
        }
        state.1.streams.push(client);
    }
}

/// Those who wait for an answer, by its serial number.
type Answers = Arc<Mutex<HashMap<u32, Arc<AtomicBool>>>>;

/// One message: its length, which counts itself, and then program, version, procedure, type, serial, status.
fn message(from: &mut UnixStream) -> Option<Vec<u8>> {
    let mut frame = vec![0; 4];
    from.read_exact(&mut frame).ok()?;
    let length = word(&frame, 0) as usize;
    frame.resize(length.max(4), 0);
    from.read_exact(&mut frame[4..]).ok()?;
    Some(frame)
}

fn word(frame: &[u8], index: usize) -> u32 {
    frame.get(index * 4..index * 4 + 4).map_or(0, |bytes| u32::from_be_bytes(bytes.try_into().unwrap()))
}

const REMOTE_PROGRAM: u32 = 0x2000_8086;
const CALL: u32 = 0;
const REPLY: u32 = 1;

fn thaw(shared: &Mutex<(Mode, Connections)>) {
    while shared.lock().unwrap().0 == Mode::Frozen {
        thread::sleep(Duration::from_millis(50));
    }
}

fn requests(mut client: UnixStream, mut server: UnixStream, shared: &Mutex<(Mode, Connections)>, answers: &Answers) {
    let mut waits = false;
    while let Some(frame) = message(&mut client) {
        thaw(shared);
        let mut state = shared.lock().unwrap();
        let is_call = word(&frame, 1) == REMOTE_PROGRAM && word(&frame, 4) == CALL;
        if is_call && state.1.hold.iter().any(|kind| *kind as u32 == word(&frame, 3)) {
            let answered = Arc::<AtomicBool>::default();
            answers.lock().unwrap().insert(word(&frame, 5), Arc::clone(&answered));
            state.1.held.push(Held { server: server.try_clone().unwrap(), frame, answered });
            waits = true;
            continue;
        }
        drop(state);
        if server.write_all(&frame).is_err() {
            break;
        }
    }
    // A libvirtd that has taken a request carries it out though the client is gone.
    if !waits {
        let _ = server.shutdown(Shutdown::Both);
    }
    let _ = client.shutdown(Shutdown::Both);
}

fn replies(mut server: UnixStream, mut client: UnixStream, shared: &Mutex<(Mode, Connections)>, answers: &Answers) {
    while let Some(frame) = message(&mut server) {
        thaw(shared);
        if word(&frame, 4) == REPLY
            && let Some(answered) = answers.lock().unwrap().remove(&word(&frame, 5))
        {
            answered.store(true, Ordering::SeqCst);
        }
        // To a client that is gone: for nothing.
        let _ = client.write_all(&frame);
    }
    let _ = client.shutdown(Shutdown::Both);
    let _ = server.shutdown(Shutdown::Both);
}
