//! The configuration files: whatever is in them, parsing ends, in a value or an error of one line.
#![no_main]

use std::path::Path;

use libfuzzer_sys::fuzz_target;
use provisioner_core::settings::{parse_broker_allocation, parse_db, parse_engine, parse_web3_defaults};

fuzz_target!(|text: &str| {
    let file = Path::new("f");
    match parse_db(file, text) {
        Ok(db) => {
            if let Some(pool) = db.ipv4_pool {
                assert!(pool.candidates().count() <= 256);
            }
        }
        Err(e) => assert!(!e.to_string().contains('\n')),
    }
    let _ = parse_web3_defaults(file, text);
    let _ = parse_broker_allocation(file, text);
    let _ = parse_engine(file, text);
});
