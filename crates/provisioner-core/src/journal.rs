//! The intent journal: one small file per VM that a create, destroy or suspension is working on, written before each effect. After
//! a crash it says what may exist. It is removed when nothing is left to do.

use std::collections::BTreeSet;
use std::fs;
use std::io::ErrorKind as Io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::PathBuf;

use provisioner_contract::{Timestamp, VmName};
use serde_json::Value;

use crate::owner::ProcessId;
use crate::paths::Directories;
use crate::{Error, ErrorKind, Result, durable};

/// The format this program writes, and the only one it reads.
pub const VERSION: u32 = 1;

/// What was being done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Operation {
    /// To be undone, unless it is committed.
    Create,
    /// To be finished.
    Destroy,
    /// To be finished: the VM has been told to shut down and would be off without being recorded as suspended.
    Suspend,
}

/// A volume by the names libvirt knows it by.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PoolVolume {
    /// The storage pool.
    pub pool: String,
    /// The volume in it.
    pub name: String,
}

/// What a create or destroy has made, or is about to make or remove. Every effect is named here before it happens.
#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Journal {
    /// [`VERSION`].
    pub version: u32,
    /// Which of the two it is.
    pub operation: Operation,
    /// The VM.
    pub vm_name: VmName,
    /// The process that is at it; when it is dead, another finishes.
    pub owner: ProcessId,
    /// The command it runs.
    pub command: String,
    /// Unique per create; a domain that carries another was not made by this one.
    pub creation_id: String,
    /// When it began.
    pub started_at: Timestamp,
    /// The volumes, each in its pool.
    pub volumes: Vec<PoolVolume>,
    /// The IPv4 address taken for it.
    pub ipv4: Option<Ipv4Addr>,
    /// The IPv6 address taken for it, and routed to `bridge`.
    pub ipv6: Option<Ipv6Addr>,
    /// The domain, once it has a UUID.
    pub domain_uuid: Option<String>,
    /// The host's bridge.
    pub bridge: String,
    /// The record of a destroyed VM of that name which registering replaced; put back by an undo.
    pub replaced_record: Option<Value>,
}

impl Journal {
    /// A journal of this process that names nothing yet.
    ///
    /// # Errors
    /// [`ErrorKind::Io`] when `/proc` cannot be read.
    pub fn begin(
        operation: Operation,
        vm_name: &VmName,
        command: &str,
        creation_id: &str,
        bridge: &str,
    ) -> Result<Self> {
        Ok(Self {
            version: VERSION,
            operation,
            vm_name: vm_name.clone(),
            owner: ProcessId::current()?,
            command: command.to_owned(),
            creation_id: creation_id.to_owned(),
            started_at: Timestamp::now(),
            volumes: Vec::new(),
            ipv4: None,
            ipv6: None,
            domain_uuid: None,
            bridge: bridge.to_owned(),
            replaced_record: None,
        })
    }

    /// Writes it durably, in place of an earlier state of it.
    ///
    /// # Errors
    /// [`ErrorKind::Io`] naming the file.
    pub fn store(&self, dirs: &Directories) -> Result<()> {
        durable::create_dir_owned(&dirs.journal(), 0o770)?;
        let path = path(dirs, &self.vm_name);
        let mut bytes = serde_json::to_vec_pretty(self)
            .map_err(|e| Error::new(ErrorKind::Invalid, format!("cannot write {}", path.display())).because(e))?;
        bytes.push(b'\n');
        durable::write_atomic(&path, &bytes, 0o660)
    }

    /// The journal of `name`, or `None` when nothing is or was under way.
    ///
    /// # Errors
    /// [`ErrorKind::Io`] when it cannot be read, [`ErrorKind::Invalid`] when it is damaged or of another version. Both
    /// name the file, and neither means that there is nothing to clear.
    pub fn load(dirs: &Directories, name: &VmName) -> Result<Option<Self>> {
        let path = path(dirs, name);
        let bytes = match fs::read(&path) {
            Ok(bytes) => bytes,
            Err(e) if e.kind() == Io::NotFound => return Ok(None),
            Err(e) => return Err(Error::io("read", &path, e)),
        };
        let damaged = |error: Error| Error {
            message: format!("cannot use journal {}: {}", path.display(), error.message),
            hint: Some(format!(
                "it says what an interrupted command left of VM {name}; look at what exists of that VM, remove it, then remove the file"
            )),
            ..error
        };
        let journal = parse(&String::from_utf8_lossy(&bytes)).map_err(damaged)?;
        if journal.vm_name != *name {
            return Err(damaged(Error::new(ErrorKind::Invalid, format!("it is about VM {}", journal.vm_name))));
        }
        Ok(Some(journal))
    }

    /// Removes the journal of `name` durably; none is no failure.
    ///
    /// # Errors
    /// [`ErrorKind::Io`] naming the file.
    pub fn remove(dirs: &Directories, name: &VmName) -> Result<()> {
        durable::remove_durable(&path(dirs, name)).map(|_| ())
    }

    /// The addresses that journals of other VMs than `except` claim. One that cannot be read as a journal claims what
    /// addresses it still shows: a damaged file of one VM must not stop the others.
    ///
    /// # Errors
    /// [`ErrorKind::Io`] when the directory or a file is there and cannot be read.
    pub fn claims(dirs: &Directories, except: &VmName) -> Result<BTreeSet<IpAddr>> {
        Self::claims_of(dirs, |name| name != except)
    }

    /// The same for the journals of `whose` VMs.
    ///
    /// # Errors
    /// Those of [`Journal::claims`].
    pub fn claims_of(dirs: &Directories, whose: impl Fn(&VmName) -> bool) -> Result<BTreeSet<IpAddr>> {
        let mut claims = BTreeSet::new();
        for (name, journal) in Self::list(dirs)? {
            if !whose(&name) {
                continue;
            }
            match journal {
                Ok(journal) => {
                    claims.extend(journal.ipv4.map(IpAddr::from));
                    claims.extend(journal.ipv6.map(IpAddr::from));
                }
                Err(error) if error.kind == ErrorKind::Invalid => {
                    let text = fs::read_to_string(path(dirs, &name)).unwrap_or_default();
                    let value: Value = serde_json::from_str(&text).unwrap_or_default();
                    let shown =
                        ["ipv4", "ipv6"].iter().filter_map(|key| value.get(key)?.as_str()?.parse::<IpAddr>().ok());
                    claims.extend(shown);
                }
                Err(error) => return Err(error),
            }
        }
        Ok(claims)
    }

    /// All journals, by name. A damaged one is in the list, with its error.
    ///
    /// # Errors
    /// [`ErrorKind::Io`] when the directory is there and cannot be read.
    pub fn list(dirs: &Directories) -> Result<Vec<(VmName, Result<Self>)>> {
        let mut found = Vec::new();
        for entry in durable::entries(&dirs.journal())? {
            let file = entry.file_name();
            // Temporary files begin with a dot, which no VM's name does.
            let Some(stem) = file.to_str().and_then(|file| file.strip_suffix(".json")) else { continue };
            let Ok(name) = VmName::new(stem) else { continue };
            // One that is gone by now is finished.
            if let Some(journal) = Self::load(dirs, &name).transpose() {
                found.push((name, journal));
            }
        }
        found.sort_by(|a, b| a.0.cmp(&b.0));
        Ok(found)
    }
}

fn path(dirs: &Directories, name: &VmName) -> PathBuf {
    dirs.journal().join(format!("{name}.json"))
}

/// Reads the text of a journal.
///
/// # Errors
/// [`ErrorKind::Invalid`] when it is no journal, or one of another version.
pub fn parse(text: &str) -> Result<Journal> {
    if text.is_empty() {
        return Err(Error::new(ErrorKind::Invalid, "it is empty"));
    }
    let damaged = |e: serde_json::Error| Error::new(ErrorKind::Invalid, "it is damaged").because(e);
    let value: Value = serde_json::from_str(text).map_err(damaged)?;
    match value.get("version").and_then(Value::as_u64) {
        Some(version) if version == u64::from(VERSION) => {}
        Some(version) => {
            return Err(Error::new(
                ErrorKind::Invalid,
                format!("it is of version {version}, this program knows {VERSION}"),
            ));
        }
        None => return Err(Error::new(ErrorKind::Invalid, "it has no version")),
    }
    // From the text again: a number inside `replaced_record` keeps its digits only on this way.
    serde_json::from_str(text).map_err(damaged)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn host() -> (tempfile::TempDir, Directories) {
        let root = tempfile::tempdir().unwrap();
        let dirs = Directories { state: root.path().to_owned(), ..Directories::default() };
        (root, dirs)
    }

    fn journal(name: &str) -> Journal {
        let name = VmName::new(name).unwrap();
        let mut journal = Journal::begin(Operation::Create, &name, "blockhost-vm-create", "c0ffee", "br0").unwrap();
        journal.volumes = vec![PoolVolume { pool: "blockhost".into(), name: format!("{name}.qcow2") }];
        journal.ipv4 = Some(Ipv4Addr::new(10, 0, 0, 7));
        journal.ipv6 = Some("2001:db8::7".parse().unwrap());
        journal.replaced_record =
            Some(r#"{"z":1,"a":{"nft_token_id":123456789012345678901234567890,"x":1.50}}"#.parse().unwrap());
        journal
    }

    #[test]
    fn journals_claim_addresses_even_when_they_cannot_be_read() {
        let (_root, dirs) = host();
        journal("web1").store(&dirs).unwrap();
        fs::write(dirs.journal().join("odd.json"), r#"{"version": 9, "ipv4": "10.0.0.9", "ipv6": 5}"#).unwrap();
        fs::write(dirs.journal().join("broken.json"), "{").unwrap();
        let claims = |except: &str| {
            let except = VmName::new(except).unwrap();
            Journal::claims(&dirs, &except).unwrap().iter().map(ToString::to_string).collect::<Vec<_>>()
        };
        assert_eq!(claims("web2"), ["10.0.0.7", "10.0.0.9", "2001:db8::7"]);
        assert_eq!(claims("web1"), ["10.0.0.9"]);
    }

    #[test]
    fn what_is_stored_is_loaded_and_removed() {
        let (_root, dirs) = host();
        let mut written = journal("web1");
        assert_eq!(Journal::load(&dirs, &written.vm_name).unwrap(), None);
        written.store(&dirs).unwrap();
        written.domain_uuid = Some("6a3c".into());
        written.store(&dirs).unwrap();
        let read = Journal::load(&dirs, &written.vm_name).unwrap().unwrap();
        assert_eq!(read, written);
        assert!(read.owner.is_alive());
        assert_eq!(read.replaced_record.unwrap().to_string(), written.replaced_record.unwrap().to_string());
        Journal::remove(&dirs, &written.vm_name).unwrap();
        Journal::remove(&dirs, &written.vm_name).unwrap();
        assert_eq!(Journal::load(&dirs, &written.vm_name).unwrap(), None);
    }

    #[test]
    fn damaged_journals_are_errors_that_name_the_file_and_never_nothing() {
        let (_root, dirs) = host();
        let name = VmName::new("a").unwrap();
        journal("a").store(&dirs).unwrap();
        let file = dirs.journal().join("a.json");
        let good = fs::read_to_string(&file).unwrap();
        for (text, why) in [
            (String::new(), "it is empty"),
            (good[..good.len() / 2].to_owned(), "it is damaged"),
            ("[]".into(), "it has no version"),
            (good.replace("\"version\": 1", "\"version\": 2"), "it is of version 2, this program knows 1"),
            (good.replace("\"pool\"", "\"pond\""), "it is damaged"),
            (good.replace("\"vm_name\": \"a\"", "\"vm_name\": \"b\""), "it is about VM b"),
        ] {
            fs::write(&file, text).unwrap();
            let error = Journal::load(&dirs, &name).unwrap_err();
            assert_eq!(error.to_string(), format!("cannot use journal {}: {why}", file.display()));
            assert!(error.hint.is_some());
            assert!(Journal::list(&dirs).unwrap()[0].1.is_err());
        }
    }

    #[test]
    fn the_list_is_by_name_and_knows_only_journals() {
        let (_root, dirs) = host();
        assert!(Journal::list(&dirs).unwrap().is_empty());
        for name in ["b", "a", "a.json"] {
            journal(name).store(&dirs).unwrap();
        }
        fs::write(dirs.journal().join(".c.json.1-2-abcdef.tmp"), "").unwrap();
        fs::write(dirs.journal().join("README"), "").unwrap();
        let list = Journal::list(&dirs).unwrap();
        let names: Vec<_> = list.iter().map(|(name, journal)| (name.as_str(), journal.is_ok())).collect();
        assert_eq!(names, [("a", true), ("a.json", true), ("b", true)]);
    }

    proptest! {
        #[test]
        fn no_text_makes_parsing_panic(text in "\\PC{0,200}", cut in 0usize..900) {
            let _ = parse(&text);
            let good = serde_json::to_string(&journal("a")).unwrap();
            let cut = cut.min(good.len() - 1);
            prop_assert!(parse(&good[..cut]).is_err());
        }
    }
}
