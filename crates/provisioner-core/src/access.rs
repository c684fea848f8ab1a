//! Whether another user, such as the one QEMU runs as, may pass through a directory or open a file: by its mode and its access
//! control list, without being that user.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nix::unistd::{Gid, Uid, User};

use crate::Result;
use crate::libvirt::Connection;

/// What opens hardware virtualisation.
pub(crate) const KVM: &str = "/dev/kvm";

/// The name Debian's libvirt runs QEMU under.
const QEMU_USER: &str = "libvirt-qemu";

/// To read; to read and write; and to pass through, for a directory. The bits of `rwx`.
pub(crate) const READ: u32 = 4;
const READ_WRITE: u32 = 6;
pub(crate) const PASS: u32 = 1;

/// Somebody.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Who {
    pub uid: u32,
    pub gids: Vec<u32>,
}

impl Who {
    /// A user of this host, with all groups.
    pub(crate) fn of(user: &User) -> Self {
        let name = std::ffi::CString::new(user.name.as_bytes()).unwrap_or_default();
        let groups = nix::unistd::getgrouplist(&name, user.gid).unwrap_or_else(|_| vec![user.gid]);
        Self { uid: user.uid.as_raw(), gids: groups.into_iter().map(Gid::as_raw).collect() }
    }

    /// The user as whom libvirt runs QEMU, with its name; `None` when libvirt does not say.
    ///
    /// # Errors
    /// When libvirt cannot be asked.
    pub(crate) fn runs_qemu(connection: &Connection) -> Result<Option<(Self, String)>> {
        let Some((uid, gid)) = connection.security()?.0 else { return Ok(None) };
        let named = User::from_uid(Uid::from_raw(uid)).ok().flatten();
        let mut who = named.as_ref().map_or(Self { uid, gids: Vec::new() }, Self::of);
        who.gids.push(gid);
        Ok(Some((who, named.map_or_else(|| uid.to_string(), |user| user.name))))
    }
}

/// The user QEMU runs as, when [`KVM`] is there and that user may not open it. libvirt then takes all it knows of QEMU for out
/// of date at every question, and tries it out anew: each takes seconds.
///
/// # Errors
/// When libvirt cannot be asked.
pub(crate) fn barred_from_kvm(connection: &Connection) -> Result<Option<String>> {
    let device = Path::new(KVM);
    let barred = |who: &Who| may(device, who, READ_WRITE) == Some(false);
    // On a healthy host that is seen without asking.
    let usual = User::from_name(QEMU_USER).ok().flatten();
    if !device.exists() || usual.is_some_and(|user| !barred(&Who::of(&user))) {
        return Ok(None);
    }
    Ok(Who::runs_qemu(connection)?.filter(|(who, _)| barred(who)).map(|(_, name)| name))
}

/// What gives QEMU's user the access that Debian's own rule for the device gives.
pub(crate) const KVM_REMEDY: &str = "chgrp kvm /dev/kvm && chmod 0660 /dev/kvm; for good: apt-get install --reinstall udev, or make the rule that sets this on the machine";

/// The first directory above `file` that `who` cannot pass through, if one is known. What cannot be looked at, because this
/// process itself may not, is not known.
pub(crate) fn barrier(file: &Path, who: &Who) -> Option<PathBuf> {
    let mut above: Vec<_> = file.ancestors().skip(1).filter(|dir| dir.is_absolute()).collect();
    above.reverse();
    above.into_iter().find(|dir| may(dir, who, PASS) == Some(false)).map(Path::to_path_buf)
}

/// Whether `who` has the right `want` on `path`; `None` when it cannot be looked at.
pub(crate) fn may(path: &Path, who: &Who, want: u32) -> Option<bool> {
    let metadata = std::fs::metadata(path).ok()?;
    let mut list = vec![0; 64 * 1024];
    // Without a list, or on a file system without lists, the mode says all.
    let length = rustix::fs::getxattr(path, "system.posix_acl_access", &mut list[..]).unwrap_or(0);
    Some(allowed(metadata.mode(), metadata.uid(), metadata.gid(), &list[..length], who, want))
}

const VERSION: u32 = 2;
const USER: u16 = 0x02;
const GROUP_OBJECT: u16 = 0x04;
const GROUP: u16 = 0x08;
const MASK: u16 = 0x10;

/// The check of `acl(5)`. A list is its version and entries of tag, rights and id, little-endian.
fn allowed(mode: u32, uid: u32, gid: u32, list: &[u8], who: &Who, want: u32) -> bool {
    let has = |rights: u32| rights & want == want;
    if who.uid == 0 {
        return true;
    }
    if who.uid == uid {
        return has(mode >> 6);
    }
    let entries = match list.split_first_chunk::<4>() {
        Some((version, entries)) if u32::from_le_bytes(*version) == VERSION => entries,
        _ => &[],
    };
    let entries: Vec<(u16, u32, u32)> = entries
        .chunks_exact(8)
        .map(|e| {
            let short = |at: usize| u16::from_le_bytes([e[at], e[at + 1]]);
            (short(0), u32::from(short(2)), u32::from_le_bytes([e[4], e[5], e[6], e[7]]))
        })
        .collect();
    if entries.is_empty() {
        return has(if who.gids.contains(&gid) { mode >> 3 } else { mode });
    }
    let mask = entries.iter().find(|(tag, ..)| *tag == MASK).map_or(7, |(_, rights, _)| *rights);
    if let Some((_, rights, _)) = entries.iter().find(|(tag, _, id)| *tag == USER && *id == who.uid) {
        return has(rights & mask);
    }
    let of_group = |(tag, _, id): &&(u16, u32, u32)| {
        (*tag == GROUP_OBJECT && who.gids.contains(&gid)) || (*tag == GROUP && who.gids.contains(id))
    };
    let groups: Vec<_> = entries.iter().filter(of_group).collect();
    if groups.is_empty() { has(mode) } else { groups.iter().any(|(_, rights, _)| has(rights & mask)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(entries: &[(u16, u16, u32)]) -> Vec<u8> {
        let mut bytes = VERSION.to_le_bytes().to_vec();
        for (tag, rights, id) in entries {
            bytes.extend(tag.to_le_bytes());
            bytes.extend(rights.to_le_bytes());
            bytes.extend(id.to_le_bytes());
        }
        bytes
    }

    #[test]
    fn the_mode_decides_without_a_list() {
        let may = |mode, uid, gids: &[u32]| allowed(mode, 10, 20, &[], &Who { uid, gids: gids.to_vec() }, PASS);
        assert!(may(0o750, 10, &[]) && may(0o750, 11, &[20]) && may(0o701, 11, &[21]) && may(0, 0, &[]));
        assert!(!may(0o750, 11, &[21]) && !may(0o705, 11, &[20]) && !may(0o055, 10, &[20]));
    }

    #[test]
    fn a_list_names_users_within_its_mask() {
        let who = |uid, gids: &[u32]| Who { uid, gids: gids.to_vec() };
        let named =
            list(&[(1, 7, 0), (USER, 1, 64055), (GROUP_OBJECT, 0, 0), (GROUP, 1, 30), (MASK, 1, 0), (0x20, 0, 0)]);
        let may = |list: &[u8], who: &Who| allowed(0o710, 10, 20, list, who, PASS);
        assert!(may(&named, &who(64055, &[])) && may(&named, &who(5, &[30])));
        assert!(!may(&named, &who(5, &[20])) && !may(&named, &who(5, &[])));
        let masked = list(&[(USER, 7, 64055), (MASK, 4, 0)]);
        assert!(!may(&masked, &who(64055, &[])));
        // A damaged one grants nothing by itself.
        assert!(!may(&[1, 2], &who(64055, &[])));
    }
}
