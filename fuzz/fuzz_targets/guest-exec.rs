//! What a guest's agent says of a command, and of its `/etc/passwd`.
#![no_main]

use provisioner_contract::LoginName;
use provisioner_core::{gecos, guest_exec};

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    if let Ok(answer) = serde_json::from_slice(bytes) {
        let _ = guest_exec::parse_started(&answer);
        if let Ok(Some(finished)) = guest_exec::parse_status(&answer) {
            assert!(finished.stdout.bytes.len() <= guest_exec::OUTPUT_LIMIT);
            assert!(finished.stderr.bytes.len() <= guest_exec::OUTPUT_LIMIT);
        }
    }
    if let Ok(user) = LoginName::new("admin") {
        let _ = gecos::gecos_of(bytes, &user);
    }
});
