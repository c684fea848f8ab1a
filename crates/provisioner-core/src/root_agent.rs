//! A client of BlockHost's root agent: one request per connection over a Unix socket, each frame a 4-byte big-endian
//! length and as many bytes of JSON.
//!
//! The agent handles all requests of the host one after the other, so an answer can be a while in coming even when
//! nothing is wrong; and connecting itself waits once the queue is full.

use std::io::{ErrorKind as IoKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::socket::{self, AddressFamily, SockFlag, SockType, UnixAddr, sockopt};
use nix::sys::time::{TimeVal, TimeValLike};
use serde_json::{Map, Value, json};

use crate::{Error, ErrorKind, Result};

/// The largest frame the protocol allows, in bytes of JSON.
pub const MAX_FRAME: usize = 10 << 20;

/// The largest answer taken, in bytes of JSON. The ones we ask for have less than a hundred.
pub const MAX_ANSWER: usize = 1 << 20;

/// `message` as a frame.
///
/// # Errors
/// [`ErrorKind::Invalid`] when it has more than [`MAX_FRAME`] bytes.
pub fn encode(message: &Value) -> Result<Vec<u8>> {
    let json = message.to_string();
    match u32::try_from(json.len()) {
        Ok(len) if json.len() <= MAX_FRAME => Ok([&len.to_be_bytes()[..], json.as_bytes()].concat()),
        _ => Err(Error::new(ErrorKind::Invalid, format!("a request of {} bytes is too large", json.len()))),
    }
}

/// The bytes of JSON that follow the four length bytes of an answer.
///
/// # Errors
/// [`ErrorKind::Unavailable`] when they are more than [`MAX_ANSWER`].
pub fn decode_len(prefix: [u8; 4]) -> Result<usize> {
    let len = u32::from_be_bytes(prefix) as usize;
    if len > MAX_ANSWER {
        return Err(broken(format!("announces {len} bytes")));
    }
    Ok(len)
}

/// What an answer's JSON says: the object of one with `"ok": true`.
///
/// # Errors
/// [`ErrorKind::Io`] with the agent's own words for one with `"ok": false`: the request was understood and refused or
/// failed. [`ErrorKind::Unavailable`] for anything else.
pub fn decode(json: &[u8]) -> Result<Map<String, Value>> {
    let answer: Value = serde_json::from_slice(json).map_err(|error| broken("is not JSON".into()).because(error))?;
    let Value::Object(answer) = answer else { return Err(broken("is not an object".into())) };
    match answer.get("ok") {
        Some(Value::Bool(true)) => Ok(answer),
        Some(Value::Bool(false)) => {
            let reason = answer.get("error").and_then(Value::as_str).unwrap_or("no reason given");
            // One line, of a length that can be shown.
            let reason: String = reason.split_whitespace().collect::<Vec<_>>().join(" ").chars().take(300).collect();
            Err(Error::new(ErrorKind::Io, format!("the root agent refused: {reason}")))
        }
        _ => Err(broken("has no ok".into())),
    }
}

fn broken(what: String) -> Error {
    Error::new(ErrorKind::Unavailable, format!("the root agent's answer {what}"))
}

/// Asks the agent at `socket` to do `action` with `params`, an object; waits for its answer for at most `timeout`.
///
/// # Errors
/// [`ErrorKind::Unavailable`] when nobody listens at `socket`, this user may not connect, or the answer breaks the
/// protocol; [`ErrorKind::TimedOut`], after which the action may or may not happen; [`ErrorKind::Io`] when the agent
/// refuses.
pub fn request(socket: &Path, action: &str, params: Value, timeout: Duration) -> Result<Map<String, Value>> {
    let deadline = Instant::now() + timeout;
    let frame = encode(&json!({"action": action, "params": params}))?;
    let exchange = || -> std::io::Result<Result<Vec<u8>>> {
        let mut stream = connect(socket, left(deadline)?)?;
        let mut sent = 0;
        while sent < frame.len() {
            stream.set_write_timeout(Some(left(deadline)?))?;
            sent += retried(stream.write(&frame[sent..]))?.unwrap_or(0);
        }
        let mut prefix = [0; 4];
        read_exact(&mut stream, &mut prefix, deadline)?;
        let len = match decode_len(prefix) {
            Ok(len) => len,
            Err(error) => return Ok(Err(error)),
        };
        let mut json = vec![0; len];
        read_exact(&mut stream, &mut json, deadline)?;
        Ok(Ok(json))
    };
    let json = exchange().map_err(|error| match error.kind() {
        IoKind::WouldBlock | IoKind::TimedOut => Error::new(
            ErrorKind::TimedOut,
            format!("the root agent did not answer {action} within {} s", timeout.as_secs_f32()),
        )
        .hint("it handles one request at a time: see in its log what keeps it busy"),
        _ => Error::new(ErrorKind::Unavailable, format!("cannot ask the root agent at {}", socket.display()))
            .because(error)
            .hint("is the root agent running, and may this user connect to its socket?"),
    })??;
    decode(&json)
}

fn left(deadline: Instant) -> std::io::Result<Duration> {
    let left = deadline.saturating_duration_since(Instant::now());
    // Less than a microsecond would be rounded to "no limit" by the kernel's interface.
    if left < Duration::from_micros(1) { Err(IoKind::TimedOut.into()) } else { Ok(left) }
}

/// As `UnixStream::connect`, which waits for ever while the agent's queue is full.
fn connect(path: &Path, timeout: Duration) -> std::io::Result<UnixStream> {
    let fd = socket::socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    let limit = TimeVal::microseconds(i64::try_from(timeout.as_micros()).unwrap_or(i64::MAX));
    socket::setsockopt(&fd, sockopt::SendTimeout, &limit)?;
    loop {
        match socket::connect(std::os::fd::AsRawFd::as_raw_fd(&fd), &UnixAddr::new(path)?) {
            Ok(()) => return Ok(UnixStream::from(fd)),
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}

fn read_exact(stream: &mut UnixStream, buffer: &mut [u8], deadline: Instant) -> std::io::Result<()> {
    let mut read = 0;
    while read < buffer.len() {
        stream.set_read_timeout(Some(left(deadline)?))?;
        match retried(stream.read(&mut buffer[read..]))? {
            Some(0) => return Err(IoKind::UnexpectedEof.into()),
            Some(len) => read += len,
            None => {}
        }
    }
    Ok(())
}

/// `None` for a call that a signal cut short.
fn retried(result: std::io::Result<usize>) -> std::io::Result<Option<usize>> {
    match result {
        Ok(len) => Ok(Some(len)),
        Err(error) if error.kind() == IoKind::Interrupted => Ok(None),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
pub(crate) mod tests {
    use std::os::unix::net::UnixListener;
    use std::thread::{self, JoinHandle};

    use proptest::prelude::*;

    use super::*;

    /// An agent that answers one request with the bytes given, and returns what it was asked.
    pub(crate) fn agent(socket: &Path, answer: Vec<u8>) -> JoinHandle<Value> {
        let listener = UnixListener::bind(socket).unwrap();
        thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut prefix = [0; 4];
            stream.read_exact(&mut prefix).unwrap();
            let mut json = vec![0; u32::from_be_bytes(prefix) as usize];
            stream.read_exact(&mut json).unwrap();
            // In two pieces, as a socket may deliver it.
            let (head, tail) = answer.split_at(answer.len().min(2));
            stream.write_all(head).unwrap();
            thread::sleep(Duration::from_millis(20));
            let _ = stream.write_all(tail);
            serde_json::from_slice(&json).unwrap()
        })
    }

    fn ask(answer: &[u8]) -> (Result<Map<String, Value>>, Value) {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("s");
        let agent = agent(&socket, answer.to_vec());
        let result = request(&socket, "act", json!({"a": 1}), Duration::from_secs(5));
        (result, agent.join().unwrap())
    }

    #[test]
    fn asks_and_is_answered() {
        let (answer, asked) = ask(&encode(&json!({"ok": true, "x": "y"})).unwrap());
        assert_eq!(asked, json!({"action": "act", "params": {"a": 1}}));
        assert_eq!(answer.unwrap()["x"], "y");
    }

    #[test]
    fn a_refusal_is_one_line_in_the_agents_words() {
        let (answer, _) = ask(&encode(&json!({"ok": false, "error": "no\nsuch  dev"})).unwrap());
        let error = answer.unwrap_err();
        assert_eq!((error.kind, error.message.as_str()), (ErrorKind::Io, "the root agent refused: no such dev"));
    }

    #[test]
    fn an_answer_against_the_protocol_is_no_answer() {
        let frames: [&[u8]; 7] =
            [b"", b"\0\0", b"\0\0\0\x09{}", b"\0\0\0\x02[]", b"\0\0\0\x02{}", b"\0\0\0\x01{", b"\xff\xff\xff\xff{}"];
        for frame in frames {
            assert_eq!(ask(frame).0.unwrap_err().kind, ErrorKind::Unavailable, "{frame:?}");
        }
    }

    #[test]
    fn no_socket_no_listener_no_answer() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("s");
        let ask = |socket: &Path| {
            let begun = Instant::now();
            let error = request(socket, "act", json!({}), Duration::from_millis(200)).unwrap_err();
            assert!(begun.elapsed() < Duration::from_secs(5));
            error.kind
        };
        assert_eq!(ask(&socket), ErrorKind::Unavailable);
        assert_eq!(ask(&dir.path().join("x".repeat(200))), ErrorKind::Unavailable);
        let listener = UnixListener::bind(&socket).unwrap();
        assert_eq!(ask(&socket), ErrorKind::TimedOut);
        // Clients that never get accepted fill the queue; the next one must not wait for ever either.
        let mut waiting = Vec::new();
        while let Ok(stream) = connect(&socket, Duration::from_millis(50)) {
            waiting.push(stream);
        }
        assert_eq!(ask(&socket), ErrorKind::TimedOut);
        drop((listener, waiting));
        assert_eq!(ask(&socket), ErrorKind::Unavailable);
    }

    proptest! {
        #[test]
        fn frames_carry_any_text(text in ".*") {
            let frame = encode(&json!({"ok": true, "text": text})).unwrap();
            let (prefix, json) = frame.split_first_chunk::<4>().unwrap();
            prop_assert_eq!(decode_len(*prefix).unwrap(), json.len());
            let answer = decode(json).unwrap();
            prop_assert_eq!(answer["text"].as_str(), Some(text.as_str()));
        }

        #[test]
        fn any_bytes_are_decoded_or_refused(prefix: [u8; 4], json in prop::collection::vec(any::<u8>(), 0..40)) {
            if let Ok(len) = decode_len(prefix) {
                prop_assert!(len <= MAX_ANSWER);
            }
            prop_assert!(decode(&json).is_err());
        }
    }
}
