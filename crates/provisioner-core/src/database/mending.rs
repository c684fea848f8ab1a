//! What a repair reads of the database and changes in it.

use std::net::IpAddr;

use provisioner_contract::{InvalidRecord, Record, VmName};
use serde_json::{Map, Value};

use super::{Document, IPV4_LIST, IPV6_LIST, is_live, parsed};
use crate::Result;

/// One entry of the lists of addresses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Entry {
    /// An address, in the list of its family.
    Address(IpAddr),
    /// Anything else, as JSON.
    Other(String),
}

fn entry(list: &str, value: &Value) -> Entry {
    match parsed::<IpAddr>(Some(value)) {
        Some(address) if list_of(address) == list => Entry::Address(address),
        _ => Entry::Other(value.to_string()),
    }
}

fn list_of(address: IpAddr) -> &'static str {
    if address.is_ipv4() { IPV4_LIST } else { IPV6_LIST }
}

impl Document {
    /// The entries of both lists, in their order.
    #[must_use]
    pub fn allocated(&self) -> Vec<Entry> {
        let list = |list: &'static str| {
            let values = self.root.get(list).and_then(Value::as_array).into_iter().flatten();
            values.map(move |value| entry(list, value))
        };
        list(IPV4_LIST).chain(list(IPV6_LIST)).collect()
    }

    /// Every record as it stands in the file, by the name it is stored under.
    pub fn raw_records(&self) -> impl Iterator<Item = (&str, &Value)> {
        self.vms().into_iter().flatten().map(|(name, value)| (name.as_str(), value))
    }

    /// The addresses of a record that stands for a VM, also of one that is damaged otherwise. `None` when it does not show its
    /// IPv4 address: then no address can be told to be nobody's.
    #[must_use]
    pub fn addresses_of(record: &Value) -> Option<Vec<IpAddr>> {
        let ipv4: std::net::Ipv4Addr = parsed(record.get("ip_address"))?;
        let ipv6: Option<std::net::Ipv6Addr> = match record.get("ipv6_address") {
            None | Some(Value::Null) => None,
            Some(Value::String(text)) if text.is_empty() => None,
            value => Some(parsed(value)?),
        };
        Some([Some(IpAddr::from(ipv4)), ipv6.map(IpAddr::from)].into_iter().flatten().collect())
    }

    /// Whether a record stands for a VM; one that cannot be told to be destroyed does.
    #[must_use]
    pub fn stands_for_a_vm(record: &Value) -> bool {
        is_live(record)
    }

    /// The VM whose live record has `address`, other than `except`.
    #[must_use]
    pub fn holder_of(&self, except: &str, address: IpAddr) -> Option<&str> {
        self.raw_records()
            .filter(|(name, record)| *name != except && is_live(record))
            .find(|(_, record)| {
                ["ip_address", "ipv6_address"].iter().any(|key| parsed::<IpAddr>(record.get(*key)) == Some(address))
            })
            .map(|(name, _)| name)
    }

    /// Puts `address` into its list, unless it is there.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Invalid`] when the list is no list.
    pub fn ensure_allocated(&mut self, address: IpAddr) -> Result<()> {
        self.ensure_listed(list_of(address), &address)
    }

    /// Takes `address` out of its list, unless a live record has it.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Invalid`] when the list is no list.
    pub fn free(&mut self, address: IpAddr) -> Result<()> {
        let list = list_of(address);
        if self.holder_of("", address).is_none() && self.root.contains_key(list) {
            self.list_mut(list)?.retain(|value| entry(list, value) != Entry::Address(address));
        }
        Ok(())
    }

    /// Keeps the first of several equal entries of `address`.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Invalid`] when the list is no list.
    pub fn list_once(&mut self, address: IpAddr) -> Result<()> {
        let list = list_of(address);
        let mut seen = false;
        if self.root.contains_key(list) {
            self.list_mut(list)?
                .retain(|value| entry(list, value) != Entry::Address(address) || !std::mem::replace(&mut seen, true));
        }
        Ok(())
    }

    /// What `next_vmid` should be, when it is at or below the number of a record. A file without the key needs none.
    #[must_use]
    pub fn late_next_vmid(&self) -> Option<i64> {
        let next = self.root.get("next_vmid")?.as_i64()?;
        let highest = self.raw_records().filter_map(|(_, record)| record.get("vmid")?.as_i64()).max()?;
        (highest >= next).then(|| highest.saturating_add(1))
    }

    /// Sets `next_vmid` to [`Self::late_next_vmid`].
    pub fn advance_next_vmid(&mut self) {
        if let Some(next) = self.late_next_vmid() {
            self.root.insert("next_vmid".into(), next.into());
        }
    }

    /// Sets one key of the record of `name`. Nothing is done without a record that is an object.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Invalid`] when `vms` is no object.
    pub fn set(&mut self, name: &VmName, key: &str, value: Value) -> Result<()> {
        if let Some(Value::Object(record)) = self.vms_mut()?.get_mut(name.as_str()) {
            record.insert(key.to_owned(), value);
        }
        Ok(())
    }
}

/// `record` with those keys replaced that have the wrong type, from what `truth` knows. `Err`: it has a fault that `truth`
/// knows nothing about.
///
/// # Errors
/// The first such fault.
pub fn mended(name: &str, record: &Value, truth: &Map<String, Value>) -> Result<Value, InvalidRecord> {
    let mut record = record.clone();
    loop {
        match Record::from_json(name, &record) {
            Ok(_) => return Ok(record),
            // Each key once: what is taken from `truth` is readable.
            Err(fault) => match (record.as_object_mut(), truth.get(fault.key)) {
                (Some(map), Some(value)) if map.get(fault.key) != Some(value) => {
                    map.insert(fault.key.to_owned(), value.clone());
                }
                _ => return Err(fault),
            },
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use serde_json::json;

    fn document(value: &Value) -> Document {
        Document::parse(&value.to_string()).unwrap()
    }

    #[test]
    fn an_address_is_freed_only_when_no_live_record_has_it() {
        let mut document = document(&json!({
            "vms": {"a": {"status": "damaged", "ip_address": "10.0.0.1"}, "b": {"status": "destroyed", "ip_address": "10.0.0.2"}},
            "allocated_ips": ["10.0.0.1", "10.0.0.2", "10.0.0.2", 7, "fd00::1"]
        }));
        for address in ["10.0.0.1", "10.0.0.2", "fd00::1"] {
            document.free(address.parse().unwrap()).unwrap();
        }
        let text = document.render();
        assert!(text.contains("\"10.0.0.1\",\n    7,\n    \"fd00::1\""), "{text}");
        assert!(!text.contains("allocated_ipv6"), "no key is added: {text}");
    }

    #[test]
    fn an_entry_is_listed_once() {
        let mut document = document(&json!({"vms": {}, "allocated_ipv6": ["fd00::1", "fd00::2", "FD00:0::1"]}));
        document.list_once("fd00::1".parse().unwrap()).unwrap();
        assert_eq!(
            document.allocated(),
            ["fd00::1", "fd00::2"].map(|address| Entry::Address(address.parse().unwrap())).to_vec()
        );
    }

    #[test]
    fn next_vmid_is_behind_at_a_number_in_use() {
        let late = |next: Value| {
            document(&json!({"vms": {"a": {"vmid": 0}, "b": {"vmid": 4}}, "next_vmid": next})).late_next_vmid()
        };
        assert_eq!((late(json!(4)), late(json!(5))), (Some(5), None));
        assert_eq!(document(&json!({"vms": {"a": {"vmid": 0}}})).late_next_vmid(), None);
    }

    #[test]
    fn only_faults_whose_truth_is_known_are_mended() {
        let truth = json!({"ip_address": "10.0.0.1", "username": "admin"});
        let truth = truth.as_object().unwrap();
        let broken = json!({"status": "active", "ip_address": 7, "username": [], "mine": 1});
        let good = json!({"status": "active", "ip_address": "10.0.0.1", "username": "admin", "mine": 1});
        assert_eq!(mended("a", &broken, truth).unwrap(), good);
        assert_eq!(mended("a", &json!({"status": "paid", "ip_address": 7}), truth).unwrap_err().key, "status");
        assert_eq!(mended("a", &json!([]), truth).unwrap_err().key, "record");
        assert_eq!(mended("a", &json!({"status": "active", "expires_at": 1}), truth).unwrap_err().key, "expires_at");
    }
}
