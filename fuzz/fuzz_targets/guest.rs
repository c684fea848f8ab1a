//! A guest's `/etc/passwd`.
#![no_main]

libfuzzer_sys::fuzz_target!(|passwd: &[u8]| {
    let _ = provisioner_core::libvirt::agent::has_user(passwd, "admin");
});
