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
