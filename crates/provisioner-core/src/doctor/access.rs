//! Whether another user may pass through a directory or read a file: by its mode and its access control list, without being
//! that user.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// To read; and to pass through, for a directory. The bits of `rwx`.
pub(super) const READ: u32 = 4;
pub(super) const PASS: u32 = 1;

/// Somebody.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Who {
    pub uid: u32,
    pub gids: Vec<u32>,
}

/// The first directory above `file` that `who` cannot pass through, if one is known. What cannot be looked at, because this
/// process itself may not, is not known.
pub(super) fn barrier(file: &Path, who: &Who) -> Option<PathBuf> {
    let mut above: Vec<_> = file.ancestors().skip(1).filter(|dir| dir.is_absolute()).collect();
    above.reverse();
    above.into_iter().find(|dir| may(dir, who, PASS) == Some(false)).map(Path::to_path_buf)
}

/// Whether `who` has the right `want` on `path`; `None` when it cannot be looked at.
pub(super) fn may(path: &Path, who: &Who, want: u32) -> Option<bool> {
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
