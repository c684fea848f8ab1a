//! Domain descriptions: anybody who may talk to libvirt writes them.
#![no_main]

libfuzzer_sys::fuzz_target!(|text: &str| {
    let _ = provisioner_core::libvirt::domain_xml::Facts::parse(text);
});
