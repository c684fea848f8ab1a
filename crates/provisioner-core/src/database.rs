//! The VM database, a JSON file that several other programs rewrite at the same time.
//!
//! What is not ours in it, unknown keys, key order, damaged records and the digits of numbers, comes back out as it went
//! in, and what we write looks as if Python's `json.dump(indent=2)` had written it. One of the other writers rewrites
//! the file in place without a lock: a text that cannot be parsed is read again, and is never taken for "empty".

use std::collections::HashSet;
use std::fs;
use std::hash::Hash;
use std::io::{self, ErrorKind as Io};
use std::net::{Ipv4Addr, Ipv6Addr};
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
        for attempt in 1.. {
            let (mut document, version) = self.read_version()?;
            let before = document.render();
            let outcome = change(&mut document)?;
            let after = document.render();
            if before == after {
                return Ok(outcome);
            }
            let staged = durable::stage(&self.path, after.as_bytes(), NEW_FILE_MODE)?;
            // The last look before the rename. What is written in between is lost, and nothing can help it.
            if attempt >= OVERTAKEN_TRIES || self.version()? == version {
                staged.commit()?;
                return Ok(outcome);
            }
        }
        unreachable!("the loop has no end of its own")
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

    /// Gives addresses back, except those that a live record of another VM than `name` holds by now.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] when a list is no list.
    pub fn release_addresses(&mut self, name: &VmName, ipv4: Option<Ipv4Addr>, ipv6: Option<Ipv6Addr>) -> Result<()> {
        if let Some(address) = ipv4 {
            self.release(name, IPV4_LIST, "ip_address", address)?;
        }
        if let Some(address) = ipv6 {
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

    /// Marks a VM as gone since `at` and gives its addresses back. Says whether that changed anything: a second time,
    /// and without a record, it does not.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] when the record is so damaged that its status cannot be told.
    pub fn mark_destroyed(&mut self, name: &VmName, at: Timestamp) -> Result<bool> {
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
        self.release_addresses(name, ipv4, ipv6)?;
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
