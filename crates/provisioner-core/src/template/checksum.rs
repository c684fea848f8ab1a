//! SHA-512 sums, and the lists of them that stand beside images.

use std::fmt;
use std::str::FromStr;

use sha2::{Digest, Sha512};

use crate::{Error, ErrorKind};

/// A SHA-512 as 128 lower-case hexadecimal digits.
#[derive(Debug, Clone, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(transparent)]
pub struct Sha512Hex(String);

impl Sha512Hex {
    /// The sum of `bytes`.
    #[must_use]
    pub fn of(bytes: &[u8]) -> Self {
        Self::from_digest(&Sha512::digest(bytes))
    }

    pub(super) fn from_digest(digest: &[u8]) -> Self {
        use fmt::Write;
        Self(digest.iter().fold(String::with_capacity(128), |mut text, byte| {
            let _ = write!(text, "{byte:02x}");
            text
        }))
    }

    /// The first `digits` digits, to tell sums apart in names and messages.
    #[must_use]
    pub fn short(&self, digits: usize) -> &str {
        &self.0[..digits.min(self.0.len())]
    }
}

impl fmt::Display for Sha512Hex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for Sha512Hex {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        if text.len() == 128 && text.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Ok(Self(text.to_ascii_lowercase()));
        }
        Err(Error::new(ErrorKind::Invalid, "a SHA-512 has 128 hexadecimal digits"))
    }
}

/// The sum of the file `name` in the output of `sha512sum`. Two different sums for one name are none.
#[must_use]
pub(super) fn find_in_sums(text: &str, name: &str) -> Option<Sha512Hex> {
    let mut found = None;
    for line in text.lines() {
        let Some((sum, file)) = line.split_once([' ', '\t']) else { continue };
        let file = file.trim_start().trim_start_matches('*').trim_end();
        if file.strip_prefix("./").unwrap_or(file) != name {
            continue;
        }
        let Ok(sum) = sum.parse::<Sha512Hex>() else { continue };
        if found.as_ref().is_some_and(|other| *other != sum) {
            return None;
        }
        found = Some(sum);
    }
    found
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn the_sum_of_exactly_that_name_is_found() {
        let (a, b) = (Sha512Hex::of(b"a"), Sha512Hex::of(b"b"));
        let list = format!("{a}  x.qcow2\n{b} *./y.qcow2\nshort  z.qcow2\n{a}  x.qcow2\n");
        assert_eq!(find_in_sums(&list, "x.qcow2"), Some(a.clone()));
        assert_eq!(find_in_sums(&list, "y.qcow2"), Some(b.clone()));
        assert_eq!(find_in_sums(&list, "z.qcow2"), None);
        assert_eq!(find_in_sums(&list, "qcow2"), None);
        assert_eq!(find_in_sums(&format!("{a}  x\n{b}  x\n"), "x"), None);
    }

    #[test]
    fn a_sum_has_128_digits() {
        assert!("abc".parse::<Sha512Hex>().is_err());
        assert!("g".repeat(128).parse::<Sha512Hex>().is_err());
        assert_eq!("A".repeat(128).parse::<Sha512Hex>().unwrap().to_string(), "a".repeat(128));
        // The well-known sum of nothing.
        assert!(Sha512Hex::of(b"").to_string().starts_with("cf83e1357eefb8bdf1542850d66d8007"));
    }
}
