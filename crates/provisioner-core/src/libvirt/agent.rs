//! The guest agent: asked rarely, only when its channel is connected, and never believed.
//!
//! The agent has one command slot per VM. A call whose caller has given up still occupies it until libvirt's own
//! time limit, so every call carries a short one. That limit is not the whole: before a command libvirt makes sure that the
//! agent listens, which takes up to 5 s more, and before that it waits up to 30 s for the slot. Who cannot wait that long
//! calls [`Domain::within`].
//!
//! How much an agent may say is limited too (measured, libvirt 9.0): an answer beyond 4 MiB does not fit into libvirt's
//! protocol and is lost, and one beyond 10 MiB makes libvirt give up the channel until the agent opens it anew. So
//! nothing is asked for whose answer can become that long.

use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde_json::{Value, json};
use virt::error::ErrorNumber;

use super::domain::Domain;
use super::{failure, interruptible, known};
use crate::cancel::Cancel;
use crate::{Error, ErrorKind, Result};

/// The most one file read returns, so that a guest cannot fill our memory.
const READ_LIMIT: usize = 256 * 1024;

impl Domain {
    /// Whether something in the guest has the agent's channel open.
    ///
    /// # Errors
    /// When libvirt cannot be asked, or the domain has gone.
    pub fn agent_connected(&self) -> Result<bool> {
        Ok(super::domain_xml::Facts::parse(&self.description()?)?.agent_connected)
    }

    /// Sends one command and returns what is under `return`.
    ///
    /// # Errors
    /// `TimedOut` when there is no answer within `seconds`, `Hypervisor` when the agent refuses or its answer is
    /// not one, `Unavailable` when libvirt cannot be asked.
    pub fn agent(&self, command: &str, arguments: &Value, seconds: u8) -> Result<Value> {
        let mut request = json!({ "execute": command });
        if !arguments.is_null() {
            request["arguments"] = arguments.clone();
        }
        let what = || format!("guest agent of {} does not answer {command}", self.name());
        let answer = self.raw().qemu_agent_command(&request.to_string(), i32::from(seconds), 0).map_err(|e| {
            match known(&e) {
                // The last is libvirt's word for a VM that is paused or off: its agent has refused nothing.
                ErrorNumber::AgentUnresponsive | ErrorNumber::AgentCommandTimeout | ErrorNumber::OperationInvalid => {
                    Error::new(ErrorKind::TimedOut, what()).because(super::Cause::from(&e))
                }
                _ => failure(format!("guest agent of {} refuses {command}", self.name()), &e),
            }
        })?;
        let mut answer: Value =
            serde_json::from_str(&answer).map_err(|e| Error::new(ErrorKind::Hypervisor, what()).because(e))?;
        match answer.get_mut("return") {
            Some(value) => Ok(value.take()),
            None => Err(Error::new(ErrorKind::Hypervisor, what())),
        }
    }

    /// Runs `calls`, which wait for the agent, for at most `limit` and until a stop is asked for. What was asked then may
    /// happen still.
    ///
    /// # Errors
    /// `TimedOut` when the time is over, `Interrupted`, or those of `calls`.
    pub fn within<T: Send + 'static>(
        &self,
        limit: Duration,
        cancel: &Cancel,
        calls: impl FnOnce(&Self) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let domain = self.clone();
        interruptible(limit, cancel, move || calls(&domain))?.unwrap_or_else(|| {
            let what = format!("guest agent of {} does not answer in time", self.name());
            Err(Error::new(ErrorKind::TimedOut, what))
        })
    }

    /// Whether the agent answers within `seconds`.
    #[must_use]
    pub fn agent_answers(&self, seconds: u8) -> bool {
        self.agent("guest-ping", &Value::Null, seconds).is_ok()
    }

    /// Reads a file in the guest through the agent's file calls, which start no process there. At most
    /// 256 KiB.
    ///
    /// # Errors
    /// As [`Domain::agent`]; the agent refuses a file that does not exist.
    pub fn read_guest_file(&self, path: &str, seconds: u8) -> Result<Vec<u8>> {
        let handle = self.agent("guest-file-open", &json!({"path": path, "mode": "r"}), seconds)?;
        let read = self.agent("guest-file-read", &json!({"handle": handle, "count": READ_LIMIT}), seconds);
        // The handle would stay open in the guest until its agent restarts.
        let closed = self.agent("guest-file-close", &json!({"handle": handle}), seconds);
        let read = read?;
        closed?;
        read.get("buf-b64")
            .and_then(Value::as_str)
            .and_then(|text| decode_base64(text, READ_LIMIT))
            .ok_or_else(|| Error::new(ErrorKind::Hypervisor, format!("guest agent of {} sent no file", self.name())))
    }
}

/// Bytes as the agent takes them.
#[must_use]
pub fn encode_base64(bytes: &[u8]) -> String {
    BASE64.encode(bytes)
}

/// What the agent sent as base64, or `None` when it is none or they are more than `limit`.
#[must_use]
pub fn decode_base64(text: &str, limit: usize) -> Option<Vec<u8>> {
    if text.len() / 4 * 3 > limit + 2 {
        return None;
    }
    BASE64.decode(text).ok().filter(|bytes| bytes.len() <= limit)
}

/// Whether `passwd` (the text of `/etc/passwd`) has the user `name` as a person's account. One of the system's own, such as
/// `daemon`, is there before cloud-init has done anything.
#[must_use]
pub fn has_user(passwd: &[u8], name: &str) -> bool {
    passwd.split(|b| *b == b'\n').any(|line| {
        let mut fields = line.split(|b| *b == b':');
        let uid = |field: &[u8]| std::str::from_utf8(field).ok()?.parse::<u32>().ok();
        fields.next() == Some(name.as_bytes())
            && fields.nth(1).and_then(uid).is_some_and(|uid| (1000..65534).contains(&uid))
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn what_is_too_long_or_no_base64_is_refused() {
        assert_eq!(decode_base64("Zm9vYg==", 100).unwrap(), b"foob");
        assert_eq!(decode_base64("Zm9v\n", 100), None);
        assert_eq!(decode_base64("Zm9vZm9vZm9v", 3), None);
    }

    #[test]
    fn only_a_whole_user_name_counts() {
        let passwd = b"root:x:0:0::/root:/bin/sh\nadmin2:x:1000:1000::/home/a:/bin/bash\n";
        assert!(has_user(passwd, "admin2"));
        assert!(!has_user(passwd, "admin"));
        assert!(!has_user(passwd, "root"), "a system account");
        assert!(!has_user(b"nobody:x:65534:65534::/:/bin/false\nx:y\n", "nobody"));
        assert!(!has_user(passwd, "x"));
        assert!(!has_user(b"", "admin"));
    }

    proptest! {
        #[test]
        fn no_text_from_a_guest_panics(text in ".*") {
            let _ = decode_base64(&text, 64);
        }
    }
}
