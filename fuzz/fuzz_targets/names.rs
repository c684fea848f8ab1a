//! What callers name: what is accepted is plain ASCII and is what was given.
#![no_main]

use libfuzzer_sys::fuzz_target;
use provisioner_contract::{LoginName, NftId, Timestamp, VmName, WalletAddress};

fuzz_target!(|text: &str| {
    let accepted = [
        VmName::new(text).map(|n| n.to_string()),
        WalletAddress::new(text).map(|n| n.to_string()),
        NftId::new(text).map(|n| n.to_string()),
        LoginName::new(text).map(|n| n.to_string()),
    ];
    for name in accepted.into_iter().flatten() {
        assert_eq!(name, text);
        assert!(name.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b)));
    }
    if let Ok(time) = text.parse::<Timestamp>() {
        assert_eq!(time.to_string().parse::<Timestamp>(), Ok(time));
    }
});
