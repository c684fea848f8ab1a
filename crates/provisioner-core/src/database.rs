//! The VM database, a JSON file that several other programs rewrite at the same time.
//!
//! What is not ours in it, unknown keys, key order, damaged records and the digits of numbers, comes back out as it went
//! in, and what we write looks as if Python's `json.dump(indent=2)` had written it. One of the other writers rewrites
//! the file in place without a lock: a text that cannot be parsed is read again, and is never taken for "empty".

pub mod mending;

use std::collections::HashSet;
use std::fs;
use std::hash::Hash;
use std::io::{self, ErrorKind as Io};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::thread;
use std::time::Duration;

use provisioner_contract::{NewRecord, Record, RecordStatus, Timestamp, VmName};
use serde::Serialize;
use serde_json::ser::{Formatter, PrettyFormatter};
use serde_json::{Map, Value};

use crate::settings::{Ipv4Pool, Ipv6Pool};
use crate::{Error, ErrorKind, Result, durable};

/// How long others may keep the lock before we give up. They hold it for one rewrite of a small file.
const LOCK_WAIT: Duration = Duration::from_secs(30);

/// Waits between attempts to read a file that is being rewritten: a little over a second in all.
const TORN_WAITS_MS: [u64; 9] = [2, 5, 10, 20, 50, 100, 200, 300, 400];

/// How often an update begins again because somebody without a lock changed the file meanwhile.
const OVERTAKEN_TRIES: usize = 8;

/// Others read the file too; the installer gives it to the service user.
const NEW_FILE_MODE: u32 = 0o660;

/// The file and how to work on it.
#[derive(Debug, Clone)]
pub struct Database {
    path: PathBuf,
    lock_wait: Duration,
}

/// What identifies one content of the file, as far as the file system tells.
type Version = Option<(u64, u64, u64, i64, i64)>;

impl Database {
    /// The database in `path`. A missing file is an empty database, made by the first update.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into(), lock_wait: LOCK_WAIT }
    }

    /// The database of `--mock`: `./mock-db.json`.
    #[must_use]
    pub fn mock() -> Self {
        Self::new("mock-db.json")
    }

    /// The same, giving up on the lock after `wait`.
    #[must_use]
    pub fn lock_wait(mut self, wait: Duration) -> Self {
        self.lock_wait = wait;
        self
    }

    /// The file.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What the file says now.
    ///
    /// # Errors
    /// [`ErrorKind::Io`] when it cannot be read, [`ErrorKind::Invalid`] when it stays unreadable for over a second.
    pub fn read(&self) -> Result<Document> {
        self.read_version().map(|(document, _)| document)
    }

    /// Changes the database under its lock, and returns what `change` does. When `change` fails or changes nothing,
    /// nothing is written. It is called again, on the new content, when a program without a lock was faster.
    ///
    /// # Errors
    /// Those of [`Self::read`] and of `change`; [`ErrorKind::Busy`] naming the lock file when others keep it;
    /// [`ErrorKind::Io`] when the file cannot be written, and then it is as it was.
    pub fn update<T>(&self, mut change: impl FnMut(&mut Document) -> Result<T>) -> Result<T> {
        let mut lock = self.path.clone().into_os_string();
        lock.push(".lock");
        let _lock = durable::lock_file(Path::new(&lock), self.lock_wait)?;
        let mut tries = 0;
        loop {
            tries += 1;
            let (mut document, version) = self.read_version()?;
            let before = document.render();
            let outcome = change(&mut document)?;
            let after = document.render();
            if before == after {
                return Ok(outcome);
            }
            let staged = durable::stage(&self.path, after.as_bytes(), NEW_FILE_MODE)?;
            // The last look before the rename. What is written in between is lost, and nothing can help it.
            if tries >= OVERTAKEN_TRIES || self.version()? == version {
                staged.commit()?;
                return Ok(outcome);
            }
        }
    }

    fn version(&self) -> Result<Version> {
        match fs::metadata(&self.path) {
            Ok(m) => Ok(Some((m.dev(), m.ino(), m.size(), m.mtime(), m.mtime_nsec()))),
            Err(e) if e.kind() == Io::NotFound => Ok(None),
            Err(e) => Err(Error::io("read", &self.path, e)),
        }
    }

    fn read_version(&self) -> Result<(Document, Version)> {
        let mut waits = TORN_WAITS_MS.iter();
        loop {
            // Before the content: if it changes while we read, the next look at it tells.
            let version = self.version()?;
            let bytes = match fs::read(&self.path) {
                Ok(bytes) => bytes,
                Err(e) if e.kind() == Io::NotFound => return Ok((Document::default(), None)),
                Err(e) => return Err(Error::io("read", &self.path, e)),
            };
            let parsed = std::str::from_utf8(&bytes)
                .map_err(|e| Error::new(ErrorKind::Invalid, "it is not UTF-8").because(e))
                .and_then(Document::parse);
            match (parsed, waits.next()) {
                (Ok(document), _) => return Ok((document, version)),
                (Err(_), Some(wait)) => thread::sleep(Duration::from_millis(*wait)),
                (Err(error), None) => {
                    return Err(Error {
                        message: format!("cannot use VM database {}: {}", self.path.display(), error.message),
                        hint: Some("nothing was changed; repair the file or restore it from a backup".into()),
                        ..error
                    });
                }
            }
        }
    }
}

/// The content of the database.
#[derive(Debug, Clone, PartialEq)]
pub struct Document {
    root: Map<String, Value>,
}

impl Default for Document {
    /// An empty database, with the keys every program expects.
    fn default() -> Self {
        let mut root = Map::new();
        root.insert("vms".into(), Value::Object(Map::new()));
        root.insert("next_vmid".into(), 0.into());
        root.insert(IPV4_LIST.into(), Value::Array(Vec::new()));
        root.insert(IPV6_LIST.into(), Value::Array(Vec::new()));
        Self { root }
    }
}

const IPV4_LIST: &str = "allocated_ips";
const IPV6_LIST: &str = "allocated_ipv6";

fn wrong(key: &str, expected: &str) -> Error {
    Error::new(ErrorKind::Invalid, format!("{key:?} must be {expected}"))
}

impl Document {
    /// Reads the text of a database.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] when it is no JSON object, or when one of the four keys of the suite has the wrong type.
    /// A damaged record is not an error here.
    pub fn parse(text: &str) -> Result<Self> {
        if text.trim_ascii().is_empty() {
            return Err(Error::new(ErrorKind::Invalid, "it is empty"));
        }
        let root: Value = serde_json::from_str(text)
            .map_err(|e| Error::new(ErrorKind::Invalid, "it is not valid JSON").because(e))?;
        let Value::Object(root) = root else {
            return Err(Error::new(ErrorKind::Invalid, "it is not a JSON object"));
        };
        if root.get("vms").is_some_and(|vms| !vms.is_object()) {
            return Err(wrong("vms", "an object"));
        }
        for list in [IPV4_LIST, IPV6_LIST] {
            if root.get(list).is_some_and(|list| !list.is_array()) {
                return Err(wrong(list, "a list"));
            }
        }
        if root.get("next_vmid").is_some_and(|next| next.as_i64().is_none()) {
            return Err(wrong("next_vmid", "an integer"));
        }
        Ok(Self { root })
    }

    /// The text of the database, as Python's `json.dump(indent=2)` would write it.
    #[must_use]
    pub fn render(&self) -> String {
        let mut bytes = Vec::new();
        let mut serializer =
            serde_json::Serializer::with_formatter(&mut bytes, PythonFormatter(PrettyFormatter::with_indent(b"  ")));
        // Writing JSON values into memory cannot fail.
        let _ = self.root.serialize(&mut serializer);
        String::from_utf8_lossy(&bytes).into_owned()
    }

    fn vms(&self) -> Option<&Map<String, Value>> {
        self.root.get("vms").and_then(Value::as_object)
    }

    fn vms_mut(&mut self) -> Result<&mut Map<String, Value>> {
        self.root
            .entry("vms")
            .or_insert_with(|| Value::Object(Map::new()))
            .as_object_mut()
            .ok_or_else(|| wrong("vms", "an object"))
    }

    fn list_mut(&mut self, list: &str) -> Result<&mut Vec<Value>> {
        self.root
            .entry(list)
            .or_insert_with(|| Value::Array(Vec::new()))
            .as_array_mut()
            .ok_or_else(|| wrong(list, "a list"))
    }

    /// The record of a VM, or `None`.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] naming VM and key when the record is damaged.
    pub fn record(&self, name: &VmName) -> Result<Option<Record>> {
        self.raw_record(name).map(|value| readable(name.as_str(), value)).transpose()
    }

    /// The record of a VM as it stands in the file.
    #[must_use]
    pub fn raw_record(&self, name: &VmName) -> Option<&Value> {
        self.vms()?.get(name.as_str())
    }

    /// All records in the file's order, by the name they are stored under. A damaged one has its error.
    pub fn records(&self) -> impl Iterator<Item = (String, Result<Record>)> + '_ {
        self.vms().into_iter().flatten().map(|(name, value)| (name.clone(), readable(name, value)))
    }

    /// The addresses in use: those in the list, readable or not, and those of records that are not destroyed. The
    /// latter because the list is lost now and then.
    fn in_use<A: FromStr + Eq + Hash>(&self, list: &str, key: &str) -> HashSet<A> {
        let listed = self.root.get(list).and_then(Value::as_array).into_iter().flatten();
        let held = self.vms().into_iter().flatten().filter(|(_, r)| is_live(r)).filter_map(|(_, r)| r.get(key));
        listed.chain(held).filter_map(|value| value.as_str()?.trim().parse().ok()).collect()
    }

    /// The IPv4 address the next VM would get. `taken` tells of addresses in use that the database does not know.
    ///
    /// # Errors
    /// [`ErrorKind::Exhausted`] with the range and how much of it is in use, or [`ErrorKind::Config`] when the range
    /// holds no usable address at all.
    pub fn next_ipv4(&self, pool: &Ipv4Pool, taken: &dyn Fn(Ipv4Addr) -> bool) -> Result<Ipv4Addr> {
        let used = self.in_use::<Ipv4Addr>(IPV4_LIST, "ip_address");
        first_free(pool.candidates(), "ip_pool", &pool.to_string(), |a| used.contains(a) || taken(*a))
    }

    /// Takes [`Self::next_ipv4`].
    ///
    /// # Errors
    /// As [`Self::next_ipv4`].
    pub fn allocate_ipv4(&mut self, pool: &Ipv4Pool, taken: &dyn Fn(Ipv4Addr) -> bool) -> Result<Ipv4Addr> {
        let address = self.next_ipv4(pool, taken)?;
        self.list_mut(IPV4_LIST)?.push(address.to_string().into());
        Ok(address)
    }

    /// The IPv6 address the next VM would get.
    ///
    /// # Errors
    /// As [`Self::next_ipv4`].
    pub fn next_ipv6(&self, pool: &Ipv6Pool, taken: &dyn Fn(Ipv6Addr) -> bool) -> Result<Ipv6Addr> {
        let used = self.in_use::<Ipv6Addr>(IPV6_LIST, "ipv6_address");
        first_free(pool.candidates(), "ipv6_pool", &pool.to_string(), |a| used.contains(a) || taken(*a))
    }

    /// Takes [`Self::next_ipv6`].
    ///
    /// # Errors
    /// As [`Self::next_ipv4`].
    pub fn allocate_ipv6(&mut self, pool: &Ipv6Pool, taken: &dyn Fn(Ipv6Addr) -> bool) -> Result<Ipv6Addr> {
        let address = self.next_ipv6(pool, taken)?;
        self.list_mut(IPV6_LIST)?.push(address.to_string().into());
        Ok(address)
    }

    /// Gives addresses back, except those that a live record of another VM than `name` holds by now, and those that
    /// `claimed` says are somebody's although no record does.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] when a list is no list.
    pub fn release_addresses(
        &mut self,
        name: &VmName,
        ipv4: Option<Ipv4Addr>,
        ipv6: Option<Ipv6Addr>,
        claimed: &dyn Fn(IpAddr) -> bool,
    ) -> Result<()> {
        if let Some(address) = ipv4.filter(|address| !claimed((*address).into())) {
            self.release(name, IPV4_LIST, "ip_address", address)?;
        }
        if let Some(address) = ipv6.filter(|address| !claimed((*address).into())) {
            self.release(name, IPV6_LIST, "ipv6_address", address)?;
        }
        Ok(())
    }

    fn holder<A: FromStr + PartialEq>(&self, except: &VmName, key: &str, address: &A) -> Option<&str> {
        let held = |record: &Value| parsed::<A>(record.get(key)).is_some_and(|a| a == *address);
        self.vms()?
            .iter()
            .find(|(name, record)| name.as_str() != except.as_str() && is_live(record) && held(record))
            .map(|(name, _)| name.as_str())
    }

    fn release<A: FromStr + PartialEq>(&mut self, name: &VmName, list: &str, key: &str, address: A) -> Result<()> {
        // A missing list holds nothing; giving back must not add keys.
        if self.holder(name, key, &address).is_none() && self.root.contains_key(list) {
            self.list_mut(list)?.retain(|entry| parsed::<A>(Some(entry)).is_none_or(|a| a != address));
        }
        Ok(())
    }

    fn ensure_listed<A: FromStr + PartialEq + ToString>(&mut self, list: &str, address: &A) -> Result<()> {
        let entries = self.list_mut(list)?;
        if !entries.iter().any(|entry| parsed::<A>(Some(entry)).is_some_and(|a| a == *address)) {
            entries.push(address.to_string().into());
        }
        Ok(())
    }

    /// Adds a VM. A destroyed one of that name is replaced and returned, so that [`Self::unregister`] can put it back.
    ///
    /// # Errors
    /// [`ErrorKind::Conflict`] when the name has a record that is not destroyed, readable or not, or when a live record
    /// of another VM holds one of the addresses.
    pub fn register(&mut self, new: &NewRecord) -> Result<Option<Value>> {
        let name = &new.vm_name;
        if let Some(old) = self.raw_record(name)
            && is_live(old)
        {
            let status = old.get("status").and_then(Value::as_str).unwrap_or("damaged");
            return Err(Error::new(ErrorKind::Conflict, format!("VM {name} is already in the database, {status}"))
                .hint(format!("choose another name, or destroy it first: blockhost-vm-destroy {name}")));
        }
        let ipv4 = self.holder(name, "ip_address", &new.ip_address).map(|other| (new.ip_address.to_string(), other));
        let ipv6 = new.ipv6_address.and_then(|a| Some((a.to_string(), self.holder(name, "ipv6_address", &a)?)));
        if let Some((address, other)) = ipv4.or(ipv6) {
            return Err(Error::new(
                ErrorKind::Conflict,
                format!("cannot register VM {name}: VM {other} has address {address}"),
            ));
        }
        self.ensure_listed(IPV4_LIST, &new.ip_address)?;
        if let Some(address) = &new.ipv6_address {
            self.ensure_listed(IPV6_LIST, address)?;
        }
        let next = self.root.get("next_vmid").and_then(Value::as_u64).unwrap_or(0);
        if new.vmid >= next {
            self.root.insert("next_vmid".into(), new.vmid.saturating_add(1).into());
        }
        Ok(self.vms_mut()?.insert(name.as_str().to_owned(), new.to_json()))
    }

    /// Takes back [`Self::register`]: puts `replaced` where the record is, or removes it. The addresses stay taken.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] when `vms` is no object.
    pub fn unregister(&mut self, name: &VmName, replaced: Option<&Value>) -> Result<()> {
        match replaced {
            Some(old) => {
                self.vms_mut()?.insert(name.as_str().to_owned(), old.clone());
            }
            // Not `remove`, which would move the last record into the gap.
            None if self.raw_record(name).is_some() => {
                self.vms_mut()?.shift_remove(name.as_str());
            }
            None => {}
        }
        Ok(())
    }

    /// The record of `name` to be changed, and its status.
    fn existing(&mut self, name: &VmName) -> Result<(&mut Map<String, Value>, RecordStatus)> {
        let damaged = |what: &str| {
            Error::new(ErrorKind::Invalid, format!("the record of VM {name} is damaged: {what}"))
                .hint("repair it in the VM database")
        };
        let missing = || Error::new(ErrorKind::NotFound, format!("VM {name} is not in the database"));
        let record = self.vms_mut()?.get_mut(name.as_str()).ok_or_else(missing)?;
        let record = record.as_object_mut().ok_or_else(|| damaged("it is not an object"))?;
        let status = record.get("status").and_then(Value::as_str).and_then(RecordStatus::from_word);
        let status = status.ok_or_else(|| damaged("status must be active, suspended or destroyed"))?;
        Ok((record, status))
    }

    /// Marks a VM as expired and shut down since `at`. One that is already suspended keeps its time.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] without a record, [`ErrorKind::Conflict`] when it is destroyed.
    pub fn mark_suspended(&mut self, name: &VmName, at: Timestamp) -> Result<()> {
        let (record, status) = self.existing(name)?;
        if status == RecordStatus::Destroyed {
            return Err(destroyed(name, "suspend"));
        }
        let since = record.get("suspended_at").and_then(Value::as_str).is_some_and(|t| t.parse::<Timestamp>().is_ok());
        if status == RecordStatus::Active || !since {
            record.insert("status".into(), RecordStatus::Suspended.as_str().into());
            record.insert("suspended_at".into(), at.to_string().into());
        }
        Ok(())
    }

    /// Marks a VM as paid for, with a new end of the subscription or the one it has.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] without a record, [`ErrorKind::Conflict`] when it is destroyed.
    pub fn mark_active(&mut self, name: &VmName, expires_at: Option<Timestamp>) -> Result<()> {
        let (record, status) = self.existing(name)?;
        if status == RecordStatus::Destroyed {
            return Err(destroyed(name, "resume"));
        }
        record.insert("status".into(), RecordStatus::Active.as_str().into());
        record.shift_remove("suspended_at");
        if let Some(expires_at) = expires_at {
            record.insert("expires_at".into(), expires_at.to_string().into());
        }
        Ok(())
    }

    /// Marks a VM as gone since `at` and gives its addresses back, as [`Self::release_addresses`] does. Says whether that changed anything: a second time,
    /// and without a record, it does not.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] when the record is so damaged that its status cannot be told.
    pub fn mark_destroyed(&mut self, name: &VmName, at: Timestamp, claimed: &dyn Fn(IpAddr) -> bool) -> Result<bool> {
        if self.raw_record(name).is_none() {
            return Ok(false);
        }
        let (record, status) = self.existing(name)?;
        if status == RecordStatus::Destroyed {
            return Ok(false);
        }
        record.insert("status".into(), RecordStatus::Destroyed.as_str().into());
        record.insert("destroyed_at".into(), at.to_string().into());
        let ipv4 = parsed(record.get("ip_address"));
        let ipv6 = parsed(record.get("ipv6_address"));
        self.release_addresses(name, ipv4, ipv6, claimed)?;
        Ok(true)
    }
}

fn destroyed(name: &VmName, verb: &str) -> Error {
    Error::new(ErrorKind::Conflict, format!("cannot {verb} VM {name}: it is destroyed"))
}

fn parsed<A: FromStr>(value: Option<&Value>) -> Option<A> {
    value?.as_str()?.trim().parse().ok()
}

fn readable(name: &str, value: &Value) -> Result<Record> {
    Record::from_json(name, value)
        .map_err(|e| Error::new(ErrorKind::Invalid, format!("the record of VM {name:?} is damaged: {e}")))
}

/// A record that cannot be told to be destroyed counts as a VM.
fn is_live(record: &Value) -> bool {
    record.get("status").and_then(Value::as_str) != Some(RecordStatus::Destroyed.as_str())
}

fn first_free<A>(
    candidates: impl Iterator<Item = A>,
    key: &str,
    range: &str,
    mut is_used: impl FnMut(&A) -> bool,
) -> Result<A> {
    let mut used = 0u64;
    for address in candidates {
        if !is_used(&address) {
            return Ok(address);
        }
        used += 1;
    }
    if used == 0 {
        return Err(Error::new(
            ErrorKind::Config,
            format!("cannot allocate an address: {key} {range} holds no usable address"),
        )
        .hint(format!("correct {key} in db.yaml")));
    }
    Err(Error::new(
        ErrorKind::Exhausted,
        format!("cannot allocate an address: {key} {range} is exhausted, all {used} are in use"),
    )
    .hint(format!("destroy VMs that are no longer needed, or widen {key} in db.yaml")))
}

/// Indents like Python and, like Python, writes ASCII only.
struct PythonFormatter<'a>(PrettyFormatter<'a>);

impl Formatter for PythonFormatter<'_> {
    fn write_string_fragment<W: io::Write + ?Sized>(&mut self, writer: &mut W, fragment: &str) -> io::Result<()> {
        for part in fragment.split_inclusive(|c: char| !matches!(c, ' '..='~')) {
            let plain = part.trim_end_matches(|c: char| !matches!(c, ' '..='~'));
            writer.write_all(plain.as_bytes())?;
            let mut units = [0; 2];
            for unit in part[plain.len()..].chars().flat_map(|c| c.encode_utf16(&mut units).to_vec()) {
                write!(writer, "\\u{unit:04x}")?;
            }
        }
        Ok(())
    }

    fn begin_array<W: io::Write + ?Sized>(&mut self, w: &mut W) -> io::Result<()> {
        self.0.begin_array(w)
    }
    fn end_array<W: io::Write + ?Sized>(&mut self, w: &mut W) -> io::Result<()> {
        self.0.end_array(w)
    }
    fn begin_array_value<W: io::Write + ?Sized>(&mut self, w: &mut W, first: bool) -> io::Result<()> {
        self.0.begin_array_value(w, first)
    }
    fn end_array_value<W: io::Write + ?Sized>(&mut self, w: &mut W) -> io::Result<()> {
        self.0.end_array_value(w)
    }
    fn begin_object<W: io::Write + ?Sized>(&mut self, w: &mut W) -> io::Result<()> {
        self.0.begin_object(w)
    }
    fn end_object<W: io::Write + ?Sized>(&mut self, w: &mut W) -> io::Result<()> {
        self.0.end_object(w)
    }
    fn begin_object_key<W: io::Write + ?Sized>(&mut self, w: &mut W, first: bool) -> io::Result<()> {
        self.0.begin_object_key(w, first)
    }
    fn begin_object_value<W: io::Write + ?Sized>(&mut self, w: &mut W) -> io::Result<()> {
        self.0.begin_object_value(w)
    }
    fn end_object_value<W: io::Write + ?Sized>(&mut self, w: &mut W) -> io::Result<()> {
        self.0.end_object_value(w)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use provisioner_contract::{LoginName, WalletAddress};
    use serde_json::json;

    fn name(text: &str) -> VmName {
        VmName::new(text).unwrap()
    }

    fn time(text: &str) -> Timestamp {
        text.parse().unwrap()
    }

    fn at() -> Timestamp {
        time("2026-11-21T00:00:00Z")
    }

    fn new_record(vm: &str, ip: &str, ipv6: Option<&str>) -> NewRecord {
        NewRecord {
            vm_name: name(vm),
            vmid: 0,
            ip_address: ip.parse().unwrap(),
            ipv6_address: ipv6.map(|a| a.parse().unwrap()),
            expires_at: time("2026-12-21T00:00:00Z"),
            owner: "0xabc".into(),
            status: RecordStatus::Active,
            created_at: at(),
            purpose: String::new(),
            wallet_address: WalletAddress::new("0xabc").unwrap(),
            username: LoginName::new("admin").unwrap(),
            network_mode: "broker".into(),
        }
    }

    fn pool(start: u8, end: u8) -> Ipv4Pool {
        Ipv4Pool {
            network: Ipv4Addr::new(10, 0, 0, 0),
            prefix_len: 24,
            start,
            end,
            gateway: Some(Ipv4Addr::new(10, 0, 0, 1)),
        }
    }

    fn document(value: Value) -> Document {
        Document::parse(&value.to_string()).unwrap()
    }

    fn nobody(_: Ipv4Addr) -> bool {
        false
    }

    #[test]
    fn an_address_somebody_claims_is_not_given_back() {
        let mut db = Document::parse(
            r#"{"vms":{"a":{"status":"active","ip_address":"10.0.0.7"}},"allocated_ips":["10.0.0.7"]}"#,
        )
        .unwrap();
        let claimed = "10.0.0.7".parse::<IpAddr>().unwrap();
        assert!(db.mark_destroyed(&name("a"), Timestamp::now(), &|address| address == claimed).unwrap());
        assert!(db.render().contains("\"10.0.0.7\"\n  ]"), "{}", db.render());
    }

    #[test]
    fn addresses_are_given_out_in_order_and_skip_lists_records_and_what_else_is_known() {
        let mut db = document(json!({
            "vms": {
                "lost": {"status": "active", "ip_address": "10.0.0.3"},
                "gone": {"status": "destroyed", "ip_address": "10.0.0.4"},
                "odd": {"ip_address": "10.0.0.5"},
                "damaged": 7,
            },
            "allocated_ips": ["10.0.0.2", "rubbish", 5],
        }));
        let taken = |address: Ipv4Addr| address == Ipv4Addr::new(10, 0, 0, 6);
        assert_eq!(db.next_ipv4(&pool(0, 9), &taken).unwrap().to_string(), "10.0.0.4");
        assert_eq!(db.allocate_ipv4(&pool(0, 9), &taken).unwrap().to_string(), "10.0.0.4");
        assert_eq!(db.allocate_ipv4(&pool(0, 9), &taken).unwrap().to_string(), "10.0.0.7");
        let text = db.render();
        assert!(text.contains("rubbish"), "what we cannot read in a list stays: {text}");
        let error = db.allocate_ipv4(&pool(0, 7), &taken).unwrap_err();
        assert_eq!(error.kind, ErrorKind::Exhausted);
        assert_eq!(
            error.to_string(),
            "cannot allocate an address: ip_pool 10.0.0.0/24 .0 to .7 is exhausted, all 6 are in use"
        );
        assert_eq!(db.allocate_ipv4(&pool(0, 1), &taken).unwrap_err().kind, ErrorKind::Config);
    }

    #[test]
    fn ipv6_addresses_are_compressed_and_need_no_list_to_begin_with() {
        let mut db = document(json!({"vms": {}, "allocated_ips": []}));
        let prefix = "2001:db8:0:1::".parse().unwrap();
        let pool =
            Ipv6Pool { prefix, prefix_len: 120, start: 0, end: 254, gateway: Some("2001:db8:0:1::2".parse().unwrap()) };
        assert_eq!(db.allocate_ipv6(&pool, &|_| false).unwrap().to_string(), "2001:db8:0:1::3");
        assert_eq!(db.root["allocated_ipv6"], json!(["2001:db8:0:1::3"]));
        let mut spelled = document(json!({"allocated_ipv6": ["2001:0DB8:0000:0001:0:0:0:0003"]}));
        assert_eq!(spelled.allocate_ipv6(&pool, &|_| false).unwrap().to_string(), "2001:db8:0:1::4");
    }

    #[test]
    fn registering_refuses_a_live_name_and_replaces_a_destroyed_one_in_its_place() {
        let mut db = document(json!({
            "vms": {"a": {"status": "destroyed", "ip_address": "10.0.0.9", "k": 1}, "b": {"status": "suspended"}, "c": [1]},
            "next_vmid": 0, "allocated_ips": []
        }));
        for taken in ["b", "c"] {
            assert_eq!(db.register(&new_record(taken, "10.0.0.2", None)).unwrap_err().kind, ErrorKind::Conflict);
        }
        let before = db.render();
        let new = new_record("a", "10.0.0.2", Some("2001:db8::2"));
        let replaced = db.register(&new).unwrap().unwrap();
        assert_eq!(replaced["k"], 1);
        assert_eq!(db.vms().unwrap().keys().collect::<Vec<_>>(), ["a", "b", "c"]);
        assert_eq!(db.root["next_vmid"], 1);
        assert_eq!(
            (&db.root["allocated_ips"], &db.root["allocated_ipv6"]),
            (&json!(["10.0.0.2"]), &json!(["2001:db8::2"]))
        );
        assert_eq!(db.record(&new.vm_name).unwrap().unwrap().ipv6(), new.ipv6_address);
        assert_eq!(
            db.register(&new_record("d", "10.0.0.2", None)).unwrap_err().to_string(),
            "cannot register VM d: VM a has address 10.0.0.2"
        );
        assert_eq!(
            db.register(&new_record("d", "10.0.0.3", Some("2001:db8:0::2"))).unwrap_err().kind,
            ErrorKind::Conflict
        );
        db.unregister(&new.vm_name, Some(&replaced)).unwrap();
        db.release_addresses(&new.vm_name, Some(new.ip_address), new.ipv6_address, &|_| false).unwrap();
        assert_eq!(document(before.parse().unwrap()).vms(), db.vms());
        assert_eq!(db.root["allocated_ips"], json!([]));
        db.register(&new_record("z", "10.0.0.7", None)).unwrap();
        db.unregister(&name("b"), None).unwrap();
        db.unregister(&name("b"), None).unwrap();
        assert_eq!(db.vms().unwrap().keys().collect::<Vec<_>>(), ["a", "c", "z"], "the others keep their order");
    }

    #[test]
    fn next_vmid_grows_only_past_what_was_used() {
        let mut db = document(json!({"next_vmid": 105, "vms": {}}));
        db.register(&new_record("a", "10.0.0.2", None)).unwrap();
        assert_eq!(db.root["next_vmid"], 105);
        db.register(&NewRecord { vmid: 200, ..new_record("b", "10.0.0.3", None) }).unwrap();
        assert_eq!(db.root["next_vmid"], 201);
    }

    #[test]
    fn destroying_twice_does_not_free_the_address_of_its_new_owner() {
        let mut db = Document::default();
        db.register(&new_record("old", "10.0.0.2", Some("2001:db8::2"))).unwrap();
        assert!(db.mark_destroyed(&name("old"), at(), &|_| false).unwrap());
        assert_eq!((&db.root["allocated_ips"], &db.root["allocated_ipv6"]), (&json!([]), &json!([])));
        db.register(&new_record("new", "10.0.0.2", Some("2001:db8::2"))).unwrap();
        let before = db.render();
        assert!(!db.mark_destroyed(&name("old"), time("2027-01-01T00:00:00Z"), &|_| false).unwrap());
        db.release_addresses(&name("old"), Some(Ipv4Addr::new(10, 0, 0, 2)), "2001:db8::2".parse().ok(), &|_| false)
            .unwrap();
        assert!(!db.mark_destroyed(&name("never-was"), at(), &|_| false).unwrap());
        assert_eq!(db.render(), before);
        let old = db.record(&name("old")).unwrap().unwrap();
        assert_eq!((old.status, old.destroyed_at), (RecordStatus::Destroyed, Some(at())));
    }

    #[test]
    fn an_address_two_live_records_share_stays_taken_until_both_are_gone() {
        let mut db = document(json!({"vms": {
            "a": {"status": "active", "ip_address": "10.0.0.2"}, "b": {"status": "active", "ip_address": "10.0.0.2"}
        }, "allocated_ips": ["10.0.0.2"]}));
        db.mark_destroyed(&name("a"), at(), &|_| false).unwrap();
        assert_eq!(db.root["allocated_ips"], json!(["10.0.0.2"]));
        db.mark_destroyed(&name("b"), at(), &|_| false).unwrap();
        assert_eq!(db.root["allocated_ips"], json!([]));
    }

    #[test]
    fn suspending_and_resuming_keep_foreign_keys_and_never_touch_the_owners_wallet() {
        let mut db = document(json!({"vms": {"a": {
            "status": "active", "expires_at": "2026-01-01T00:00:00Z", "owner_wallet": "0x1", "nft_token_id": "7", "gecos_synced": true
        }}}));
        let before = db.render();
        db.mark_suspended(&name("a"), at()).unwrap();
        let suspended = db.render();
        db.mark_suspended(&name("a"), time("2027-01-01T00:00:00Z")).unwrap();
        assert_eq!(db.render(), suspended, "the grace is counted from the first time");
        assert_eq!(db.root["vms"]["a"]["suspended_at"], "2026-11-21T00:00:00.000000+00:00");
        db.mark_active(&name("a"), None).unwrap();
        assert_eq!(db.render(), before);
        db.mark_active(&name("a"), Some(at())).unwrap();
        assert_eq!(db.record(&name("a")).unwrap().unwrap().expires_at, Some(at()));
        assert_eq!(db.root["vms"]["a"]["owner_wallet"], "0x1");
        assert_eq!(db.mark_suspended(&name("b"), at()).unwrap_err().kind, ErrorKind::NotFound);
        db.mark_destroyed(&name("a"), at(), &|_| false).unwrap();
        assert_eq!(db.mark_active(&name("a"), None).unwrap_err().kind, ErrorKind::Conflict);
        assert_eq!(db.mark_suspended(&name("a"), at()).unwrap_err().kind, ErrorKind::Conflict);
    }

    #[test]
    fn a_damaged_record_is_an_error_of_its_own_and_stays_as_it_is() {
        let mut db = document(json!({"vms": {"a": null, "b": {"status": "active"}, "c": {"status": 3}}}));
        let records: Vec<_> = db.records().map(|(name, record)| (name, record.is_ok())).collect();
        assert_eq!(records, [("a".into(), false), ("b".into(), true), ("c".into(), false)]);
        assert!(
            db.record(&name("c"))
                .unwrap_err()
                .to_string()
                .contains("the record of VM \"c\" is damaged: status must be")
        );
        assert_eq!(db.mark_destroyed(&name("a"), at(), &|_| false).unwrap_err().kind, ErrorKind::Invalid);
        db.register(&new_record("d", "10.0.0.2", None)).unwrap();
        assert!(db.render().contains("\"a\": null,"));
    }

    #[test]
    fn a_database_of_the_wrong_shape_is_refused() {
        for (text, why) in [
            ("", "it is empty"),
            (" \n", "it is empty"),
            ("{\"vms\": {", "it is not valid JSON"),
            ("{} x", "it is not valid JSON"),
            ("[]", "it is not a JSON object"),
            (r#"{"vms": []}"#, "\"vms\" must be an object"),
            (r#"{"vms": null}"#, "\"vms\" must be an object"),
            (r#"{"allocated_ips": {}}"#, "\"allocated_ips\" must be a list"),
            (r#"{"allocated_ipv6": null}"#, "\"allocated_ipv6\" must be a list"),
            (r#"{"next_vmid": "7"}"#, "\"next_vmid\" must be an integer"),
        ] {
            assert_eq!(Document::parse(text).unwrap_err().to_string(), why, "{text}");
        }
        assert_eq!(Document::parse("{}").unwrap().records().count(), 0);
    }

    fn any_json() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            "[0-9]{20,80}".prop_map(|digits| format!("1{digits}").parse().unwrap()),
            any::<String>().prop_map(Value::from),
        ];
        leaf.prop_recursive(4, 40, 6, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..5).prop_map(Value::from),
                prop::collection::vec((any::<String>(), inner), 0..5)
                    .prop_map(|pairs| Value::Object(pairs.into_iter().collect())),
            ]
        })
    }

    proptest! {
        #[test]
        fn what_others_wrote_comes_out_as_it_went_in(extra in any_json(), key in "\\PC{1,10}", record in any_json()) {
            prop_assume!(!["vms", "next_vmid", "allocated_ips", "allocated_ipv6"].contains(&key.as_str()));
            let db = document(json!({key: extra, "vms": {"z": record, "a": {}}, "allocated_ips": []}));
            let text = db.render();
            prop_assert!(text.is_ascii());
            let again = Document::parse(&text).unwrap();
            prop_assert_eq!(again.render(), text);
            prop_assert_eq!(again, db);
        }

        #[test]
        fn no_address_is_given_out_twice(listed in prop::collection::vec(0u8..12, 0..8), taken in prop::collection::vec(0u8..12, 0..8), len in 22u8..30) {
            let pool = Ipv4Pool { prefix_len: len, ..pool(0, 11) };
            let texts: Vec<_> = listed.iter().map(|i| format!("10.0.0.{i}")).collect();
            let mut db = document(json!({"allocated_ips": texts}));
            let is_taken = |a: Ipv4Addr| taken.contains(&a.octets()[3]);
            let mut given = HashSet::new();
            while let Ok(address) = db.allocate_ipv4(&pool, &is_taken) {
                prop_assert!(given.insert(address));
                prop_assert!(!listed.contains(&address.octets()[3]) && !is_taken(address));
                prop_assert!(pool.candidates().any(|c| c == address));
            }
            let free = pool.candidates().filter(|c| !listed.contains(&c.octets()[3]) && !is_taken(*c)).count();
            prop_assert_eq!(given.len(), free, "and none is forgotten");
        }

        #[test]
        fn no_bytes_make_anything_panic(noise: Vec<u8>, record in any_json(), list in prop::collection::vec(any_json(), 0..4)) {
            let _ = Document::parse(&String::from_utf8_lossy(&noise));
            let mut db = document(json!({"vms": {"a": record}, "allocated_ips": list}));
            let _ = db.records().count();
            let _ = db.allocate_ipv4(&pool(0, 9), &nobody);
            let _ = db.mark_suspended(&name("a"), at());
            let _ = db.mark_active(&name("a"), None);
            let _ = db.mark_destroyed(&name("a"), at(), &|_| false);
            let _ = db.register(&new_record("a", "10.0.0.2", None));
            prop_assert!(Document::parse(&db.render()).is_ok());
        }
    }
}
