//! The VM database: what can be read can be written, and reads back as the same.
#![no_main]

use libfuzzer_sys::fuzz_target;
use provisioner_contract::{Timestamp, VmName};
use provisioner_core::database::Document;

fuzz_target!(|text: &str| {
    let Ok(mut document) = Document::parse(text) else { return };
    let rendered = document.render();
    assert!(rendered.is_ascii());
    assert_eq!(Document::parse(&rendered).expect("our own text").render(), rendered);
    let names: Vec<_> = document.records().filter_map(|(name, _)| VmName::new(&name).ok()).collect();
    for name in names {
        let now = Timestamp::now();
        let _ = document.mark_suspended(&name, now);
        let _ = document.mark_active(&name, None);
        let _ = document.mark_destroyed(&name, now, &|_| false);
    }
    assert!(Document::parse(&document.render()).is_ok());
});
