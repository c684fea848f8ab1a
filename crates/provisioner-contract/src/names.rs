//! Newtypes for everything a caller names. A value of one of these types has been checked, so the
//! code behind it may put it into a file name, XML, YAML or JSON.

use std::fmt;
use std::str::FromStr;

/// A value that was refused, with the rule it broke.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{what} {value:?} is not valid: {rule}")]
pub struct InvalidName {
    /// What kind of name it was meant to be, such as `VM name`.
    pub what: &'static str,
    /// The refused value, cut to a length that can be shown.
    pub value: String,
    /// The rule, in words.
    pub rule: &'static str,
}

impl InvalidName {
    fn new(what: &'static str, value: &str, rule: &'static str) -> Self {
        Self { what, value: value.chars().take(80).collect(), rule }
    }
}

macro_rules! name_type {
    ($(#[$doc:meta])* $type:ident, $what:literal, $rule:literal, $check:expr) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, schemars::JsonSchema)]
        #[serde(transparent)]
        pub struct $type(String);

        impl $type {
            /// Checks `value` against the rule of this type.
            ///
            /// # Errors
            /// [`InvalidName`] with the rule that was broken.
            pub fn new(value: &str) -> Result<Self, InvalidName> {
                let check: fn(&str) -> bool = $check;
                if check(value) {
                    Ok(Self(value.to_owned()))
                } else {
                    Err(InvalidName::new($what, value, $rule))
                }
            }

            /// The checked text.
            #[must_use]
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl FromStr for $type {
            type Err = InvalidName;
            fn from_str(value: &str) -> Result<Self, InvalidName> {
                Self::new(value)
            }
        }

        impl AsRef<str> for $type {
            fn as_ref(&self) -> &str {
                &self.0
            }
        }

        impl<'de> serde::Deserialize<'de> for $type {
            fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let value = String::deserialize(deserializer)?;
                Self::new(&value).map_err(serde::de::Error::custom)
            }
        }
    };
}

name_type!(
    /// The name of a VM: `^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$` over the whole text.
    VmName,
    "VM name",
    "1 to 64 of A-Z a-z 0-9 . _ -, the first a letter or digit",
    |v| {
        (1..=64).contains(&v.len())
            && v.as_bytes()[0].is_ascii_alphanumeric()
            && v.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'))
    }
);

name_type!(
    /// A wallet address of any supported chain: `^[A-Za-z0-9_]{1,256}$`.
    WalletAddress,
    "wallet address",
    "1 to 256 of A-Z a-z 0-9 _",
    |v| (1..=256).contains(&v.len()) && v.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_')
);

name_type!(
    /// The id of the NFT that stands for a subscription: `^[0-9A-Za-z]{1,128}$`.
    NftId,
    "NFT id",
    "1 to 128 of 0-9 A-Z a-z",
    |v| (1..=128).contains(&v.len()) && v.bytes().all(|b| b.is_ascii_alphanumeric())
);

name_type!(
    /// A login user in the guest: what `useradd` of Debian takes, `^[a-z_][a-z0-9_-]{0,31}$`, without `root`.
    LoginName,
    "user name",
    "1 to 32 of a-z 0-9 _ -, the first a letter or _, not root",
    |v| {
        (1..=32).contains(&v.len())
            && v != "root"
            && matches!(v.as_bytes()[0], b'a'..=b'z' | b'_')
            && v.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'_' | b'-'))
    }
);

impl NftId {
    /// The id as the suite prints it in JSON: a decimal id is a number, any other a string.
    ///
    /// A decimal id beyond 64 bits, or with leading zeros, stays a string: as a number its digits would be lost.
    #[must_use]
    pub fn to_json(&self) -> serde_json::Value {
        match self.0.parse::<u64>() {
            Ok(number) if number.to_string() == self.0 => number.into(),
            _ => self.0.clone().into(),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    const HOSTILE: &[&str] = &[
        "",
        " ",
        "a b",
        "a\n",
        "\na",
        "a\0",
        "../a",
        "a/b",
        "$(id)",
        "`id`",
        "a;b",
        "a'b",
        "a\"b",
        "a:b",
        "a,b",
        "a=b",
        "ä",
        "а",
        "a\u{200b}",
        "<a>",
        "&amp;",
        "-a-",
        "*",
    ];

    #[test]
    fn hostile_texts_are_refused_by_every_type() {
        for text in HOSTILE {
            if *text != "-a-" {
                assert!(WalletAddress::new(text).is_err(), "{text:?}");
            }
            assert!(VmName::new(text).is_err(), "{text:?}");
            assert!(NftId::new(text).is_err(), "{text:?}");
            assert!(LoginName::new(text).is_err(), "{text:?}");
        }
    }

    #[test]
    fn names_that_look_like_yaml_values_are_names() {
        for name in ["1", "1e3", "true", "null", "0x10", "a", "A.b_c-d", "no", &"x".repeat(64)] {
            assert_eq!(VmName::new(name).unwrap().as_str(), name);
        }
        assert!(VmName::new(&"x".repeat(65)).is_err());
        for name in [".", "..", ".a", "-a", "_a"] {
            assert!(VmName::new(name).is_err(), "{name}");
        }
    }

    #[test]
    fn every_chains_address_is_a_wallet() {
        for address in [
            "0x52908400098527886E0F7030069857D2E4169EE7",
            &format!("0x{}", "a1".repeat(32)),
            &"ab".repeat(28),
            "addr_test1qz2fxv2umyhttkxyxp8x0dlpdt3k6cwng5pxj3jhsydzer3jcu5d8ps7zex2k2xt3uqxgjqnnj83ws8lhrn648jjxtwq2ytjqp",
            "9fRAWhdxEsTcdb8PhGNrZfwqa65zfkuYHAMmkQLcic1gdLSV5vA",
            "bc1qw508d6qejxtdg4y5r3zarvary0c5xw7kv8f3t4",
        ] {
            assert!(WalletAddress::new(address).is_ok(), "{address}");
        }
        assert!(WalletAddress::new(&"a".repeat(257)).is_err());
    }

    #[test]
    fn a_login_name_is_one_useradd_takes_and_not_root() {
        for name in ["admin", "_svc", "a-b_c9"] {
            assert!(LoginName::new(name).is_ok(), "{name}");
        }
        for name in ["root", "Admin", "9a", "-a", &"a".repeat(33), "a.b", "a$"] {
            assert!(LoginName::new(name).is_err(), "{name}");
        }
    }

    #[test]
    fn a_decimal_id_is_a_number_in_json_unless_that_would_change_its_digits() {
        let json = |id: &str| NftId::new(id).unwrap().to_json();
        assert_eq!(json("0"), json!(0));
        assert_eq!(json("18446744073709551615"), json!(u64::MAX));
        assert_eq!(json("18446744073709551616"), json!("18446744073709551616"));
        assert_eq!(json("007"), json!("007"));
        assert_eq!(json(&"f0".repeat(32)), json!("f0".repeat(32)));
    }

    #[test]
    fn the_error_shows_the_value_safely_and_the_rule() {
        let error = VmName::new("bad\nname").unwrap_err().to_string();
        assert!(error.starts_with("VM name \"bad\\nname\" is not valid: 1 to 64"), "{error}");
        assert!(VmName::new(&"x/".repeat(9999)).unwrap_err().to_string().len() < 250);
    }

    proptest! {
        #[test]
        fn what_is_accepted_is_safe_in_a_path_in_yaml_and_in_xml(text in "\\PC{0,70}|[A-Za-z0-9._-]{0,70}|.{0,5}") {
            for accepted in [
                VmName::new(&text).ok().map(|n| n.to_string()),
                WalletAddress::new(&text).ok().map(|n| n.to_string()),
                NftId::new(&text).ok().map(|n| n.to_string()),
                LoginName::new(&text).ok().map(|n| n.to_string()),
            ].into_iter().flatten() {
                prop_assert_eq!(&accepted, &text);
                prop_assert!(accepted.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b)));
                prop_assert!(!accepted.starts_with(['.', '-']));
            }
        }

        #[test]
        fn the_rule_is_the_pattern_of_the_contract(text in "[A-Za-z0-9._-]{1,64}") {
            prop_assert_eq!(VmName::new(&text).is_ok(), text.as_bytes()[0].is_ascii_alphanumeric());
            prop_assert_eq!(serde_json::from_value::<VmName>(json!(&text)).is_ok(), VmName::new(&text).is_ok());
        }
    }
}
