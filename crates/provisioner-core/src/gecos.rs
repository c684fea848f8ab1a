//! The GECOS field of a guest's login user, which names its owner's wallet and token: what the guest's PAM module decides by.
//!
//! Reconcilers ask for it again and again, so a field that is right already costs one file read through the agent and no
//! process in the guest. `usermod` changes it, because it takes the lock of `/etc/passwd` that every other tool takes; `chfn`
//! would too, but refuses `=` and commas. The record is left alone: what the field was set to is the engine's to keep.

use std::time::{Duration, Instant};

use provisioner_contract::{LoginName, NftId, Record, VmName, WalletAddress};

use crate::guest_exec::{Captured, End, Guest, GuestCommand};
use crate::host::Host;
use crate::libvirt::Domain;
use crate::ownership::OwnDomain;
use crate::{Error, ErrorKind, Result};

/// The whole of it: callers give up after 30 s.
const LIMIT: Duration = Duration::from_secs(26);
/// Reading a file: three short calls.
const READ_LIMIT: Duration = Duration::from_secs(5);
const READ_SECONDS: u8 = 2;
/// `usermod` itself waits up to 15 s for others that hold the lock of `/etc/passwd`.
const USERMOD_LIMIT: Duration = Duration::from_secs(17);

const USERMOD: &str = "/usr/sbin/usermod";

/// The login user where nothing names another.
const DEFAULT_USER: &str = "admin";

/// What an update did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Updated {
    /// The field was as it should be.
    AsItWas,
    /// It has been changed, and read back.
    Changed,
}

/// Makes `wallet=…,nft=…` the GECOS field of `user`, or else of the VM's login user.
///
/// # Errors
/// Those of [`crate::guest_exec::run`]; `NotFound` when the guest has no such user, `Hypervisor` when the guest cannot change
/// it, `TimedOut` when all together take too long (26 s).
pub fn update(
    host: &Host,
    name: &VmName,
    user: Option<&LoginName>,
    wallet: &WalletAddress,
    nft: &NftId,
) -> Result<Updated> {
    let end = Instant::now() + LIMIT;
    let left = |most: Duration| most.min(end.saturating_duration_since(Instant::now()));
    let (mut guest, own, record) = Guest::reach(host, name)?;
    let user = match user {
        Some(user) => user.clone(),
        None => login_user(&own, record.as_ref())?,
    };
    let wanted = format!("wallet={wallet},nft={nft}");
    let read = |domain: &Domain| -> Result<String> {
        let read = |domain: &Domain| domain.read_guest_file("/etc/passwd", READ_SECONDS);
        let passwd = domain.within(left(READ_LIMIT), &host.cancel, read)?;
        let gecos = gecos_of(&passwd, &user).ok_or_else(|| {
            Error::new(ErrorKind::NotFound, format!("{name} has no user {user}")).hint("--username names another one")
        })?;
        Ok(String::from_utf8_lossy(gecos).into_owned())
    };
    if read(&guest.domain)? == wanted {
        return Ok(Updated::AsItWas);
    }
    let what = format!("cannot set the GECOS field of {user} in {name}");
    let usermod = GuestCommand::Program {
        path: USERMOD,
        arguments: vec!["-c".into(), wanted.clone(), "--".into(), user.to_string()],
    };
    let done = guest.run(&usermod, Some(left(USERMOD_LIMIT))).map_err(|error| {
        let missing = error.kind == ErrorKind::Hypervisor && error.in_full().contains(USERMOD);
        let failed = Error::new(error.kind, what.as_str()).because(error);
        if missing { failed.hint("the image needs usermod, of Debian's package passwd") } else { failed }
    })?;
    if done.end != End::Exited(0) {
        let said = format!("usermod ended with {}: {}", done.end.code(), first_line(&done.stderr));
        return Err(Error::new(ErrorKind::Hypervisor, what).because(said));
    }
    if read(&guest.domain)? == wanted {
        return Ok(Updated::Changed);
    }
    Err(Error::new(ErrorKind::Hypervisor, what).because("usermod reported success, and the field is another"))
}

/// The user of the record, else the one the domain was made with.
fn login_user(own: &OwnDomain, record: Option<&Record>) -> Result<LoginName> {
    if let Some(record) = record
        && !record.username.is_empty()
    {
        return Ok(LoginName::new(&record.username)?);
    }
    match &own.facts.metadata {
        Some(metadata) => Ok(metadata.username.clone()),
        None => Ok(LoginName::new(DEFAULT_USER)?),
    }
}

/// The GECOS field of `user` in `passwd` (the text of `/etc/passwd`); of several lines the first counts, as for the C
/// library.
#[must_use]
pub fn gecos_of<'a>(passwd: &'a [u8], user: &LoginName) -> Option<&'a [u8]> {
    passwd.split(|byte| *byte == b'\n').find_map(|line| {
        let fields: Vec<_> = line.split(|byte| *byte == b':').collect();
        match fields[..] {
            [name, _, _, _, gecos, _, _] if name == user.as_str().as_bytes() => Some(gecos),
            _ => None,
        }
    })
}

/// The first line a guest's program wrote, cut to a length that can be shown.
fn first_line(stderr: &Captured) -> String {
    let text = String::from_utf8_lossy(&stderr.bytes);
    text.lines().next().unwrap_or_default().chars().take(200).collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_field_is_that_of_the_first_whole_line_of_the_very_user() {
        let user = |name: &str| LoginName::new(name).unwrap();
        let passwd = b"root:x:0:0:root:/root:/bin/sh\nadmin:x:broken\nadmin2:x:1001:1001:two:/:/bin/sh\n\
            admin:x:1000:1000:wallet=0xaa,nft=7:/home/admin:/bin/bash\nadmin:x:1000:1000:other:/:/bin/sh\n";
        assert_eq!(gecos_of(passwd, &user("admin")).unwrap(), b"wallet=0xaa,nft=7");
        assert_eq!(gecos_of(passwd, &user("admi")), None);
        assert_eq!(gecos_of(b"a:x:1:1::/:/bin/sh", &user("a")).unwrap(), b"");
        assert_eq!(gecos_of(b"", &user("a")), None);
    }

    #[test]
    fn what_usermod_says_is_one_short_line() {
        let stderr = |bytes: &[u8]| Captured { bytes: bytes.to_vec(), truncated: false };
        assert_eq!(first_line(&stderr(b"usermod: no\nmore")), "usermod: no");
        assert_eq!(first_line(&stderr(&[b'x'; 999])).len(), 200);
        assert_eq!(first_line(&stderr(b"")), "");
    }

    proptest! {
        #[test]
        fn no_passwd_of_a_guest_makes_it_panic(passwd in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = gecos_of(&passwd, &LoginName::new("a").unwrap());
        }
    }
}
