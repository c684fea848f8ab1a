//! The intent journal: a damaged one is an error, never a crash.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    let _ = provisioner_core::journal::parse(text);
});
