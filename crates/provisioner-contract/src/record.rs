//! The record of one VM in the shared database. Other programs write these records too and add keys of their own, so
//! reading is tolerant and writing is strict.

use std::fmt;
use std::net::{Ipv4Addr, Ipv6Addr};

use serde_json::{Map, Value};

use crate::{LoginName, NftId, Timestamp, VmName, WalletAddress};

/// What the database says about a VM. What the hypervisor says is [`crate::VmStatus`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum RecordStatus {
    /// Paid for.
    Active,
    /// Expired and shut down; can be resumed until the grace is over.
    Suspended,
    /// Gone. The name may be used again.
    Destroyed,
}

impl RecordStatus {
    /// The word in the database.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Active => "active",
            Self::Suspended => "suspended",
            Self::Destroyed => "destroyed",
        }
    }

    /// The status a word of the database stands for.
    #[must_use]
    pub fn from_word(word: &str) -> Option<Self> {
        [Self::Active, Self::Suspended, Self::Destroyed].into_iter().find(|status| status.as_str() == word)
    }
}

impl fmt::Display for RecordStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Why a record cannot be understood: `key` is what is wrong, `expected` what it should be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{key} must be {expected}, not {found}")]
pub struct InvalidRecord {
    /// The offending key, or `record` for the whole.
    pub key: &'static str,
    /// What should be there.
    pub expected: &'static str,
    /// What is there, in words.
    pub found: String,
}

/// What a record says, as far as this suite needs it. A missing or null text is `""`, a missing time `None`.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, schemars::JsonSchema)]
pub struct Record {
    /// The VM's name.
    pub vm_name: String,
    /// A number other hypervisors use; 0 for libvirt.
    pub vmid: i64,
    /// Dotted, or `""`.
    pub ip_address: String,
    /// `""` if there is none.
    pub ipv6_address: String,
    /// When the subscription ends; without it, it does not.
    pub expires_at: Option<Timestamp>,
    /// Who owns it, in the words of whoever registered it.
    pub owner: String,
    /// Paid for, expired or gone.
    pub status: RecordStatus,
    /// When it was registered.
    pub created_at: Option<Timestamp>,
    /// What it is for; free text.
    pub purpose: String,
    /// The wallet that paid.
    pub wallet_address: String,
    /// The login user in the guest; `""` in records older than that key.
    pub username: String,
    /// The host's network mode when the VM was made.
    pub network_mode: String,
    /// Since when it is suspended.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub suspended_at: Option<Timestamp>,
    /// Since when it is gone.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub destroyed_at: Option<Timestamp>,
    /// The subscription's NFT, once an engine has written it; an integer or a text in the file.
    #[serde(skip_serializing_if = "Option::is_none", serialize_with = "crate::result::nft_as_json")]
    #[schemars(with = "Option<crate::result::NftTokenId>")]
    pub nft_token_id: Option<NftId>,
}

/// The kind of a JSON value, with its article.
fn kind(value: &Value) -> String {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(n) if n.is_i64() || n.is_u64() => "an integer",
        Value::Number(_) => "a number",
        Value::String(_) => "a text",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
    .to_owned()
}

fn text(map: &Map<String, Value>, key: &'static str) -> Result<String, InvalidRecord> {
    match map.get(key) {
        None | Some(Value::Null) => Ok(String::new()),
        Some(Value::String(text)) => Ok(text.clone()),
        Some(other) => Err(InvalidRecord { key, expected: "a text", found: kind(other) }),
    }
}

fn time(map: &Map<String, Value>, key: &'static str) -> Result<Option<Timestamp>, InvalidRecord> {
    let text = text(map, key)?;
    if text.is_empty() {
        return Ok(None);
    }
    text.parse().map(Some).map_err(|_| InvalidRecord {
        key,
        expected: "an ISO 8601 time",
        found: format!("{:?}", text.chars().take(40).collect::<String>()),
    })
}

impl Record {
    /// Reads the record stored under `name`.
    ///
    /// # Errors
    /// [`InvalidRecord`] when it is not an object, has no known status, or one of its values has the wrong type.
    pub fn from_json(name: &str, value: &Value) -> Result<Self, InvalidRecord> {
        let Value::Object(map) = value else {
            return Err(InvalidRecord { key: "record", expected: "an object", found: kind(value) });
        };
        let status = text(map, "status")?;
        let status = RecordStatus::from_word(&status).ok_or_else(|| InvalidRecord {
            key: "status",
            expected: "active, suspended or destroyed",
            found: format!("{:?}", status.chars().take(40).collect::<String>()),
        })?;
        let vmid = match map.get("vmid") {
            None | Some(Value::Null) => 0,
            Some(value) => value.as_i64().or_else(|| value.as_str()?.parse().ok()).ok_or_else(|| InvalidRecord {
                key: "vmid",
                expected: "an integer",
                found: kind(value),
            })?,
        };
        // Other programs' key, and of no use to the rest of the record: what is no id counts as none.
        let nft_token_id = match map.get("nft_token_id") {
            Some(Value::String(text)) => NftId::new(text).ok(),
            Some(value @ Value::Number(_)) => NftId::new(&value.to_string()).ok(),
            _ => None,
        };
        let vm_name = text(map, "vm_name")?;
        Ok(Self {
            // The key it is stored under is what every program looks it up by.
            vm_name: if vm_name.is_empty() { name.to_owned() } else { vm_name },
            vmid,
            ip_address: text(map, "ip_address")?,
            ipv6_address: text(map, "ipv6_address")?,
            expires_at: time(map, "expires_at")?,
            owner: text(map, "owner")?,
            status,
            created_at: time(map, "created_at")?,
            purpose: text(map, "purpose")?,
            wallet_address: text(map, "wallet_address")?,
            username: text(map, "username")?,
            network_mode: text(map, "network_mode")?,
            suspended_at: time(map, "suspended_at")?,
            destroyed_at: time(map, "destroyed_at")?,
            nft_token_id,
        })
    }

    /// The IPv4 address, if the record holds a readable one.
    #[must_use]
    pub fn ipv4(&self) -> Option<Ipv4Addr> {
        self.ip_address.parse().ok()
    }

    /// The IPv6 address, if the record holds a readable one.
    #[must_use]
    pub fn ipv6(&self) -> Option<Ipv6Addr> {
        self.ipv6_address.parse().ok()
    }

    /// Whether the record stands for a VM, as opposed to a name that is free again.
    #[must_use]
    pub fn is_live(&self) -> bool {
        self.status != RecordStatus::Destroyed
    }
}

/// A record to be registered. Its fields are in the order the database has them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewRecord {
    /// The VM's name.
    pub vm_name: VmName,
    /// 0 for libvirt.
    pub vmid: u64,
    /// Its address on the bridge.
    pub ip_address: Ipv4Addr,
    /// Its IPv6 address, if the host has a prefix.
    pub ipv6_address: Option<Ipv6Addr>,
    /// When the subscription ends.
    pub expires_at: Timestamp,
    /// Who owns it.
    pub owner: String,
    /// Usually [`RecordStatus::Active`].
    pub status: RecordStatus,
    /// When it was made.
    pub created_at: Timestamp,
    /// What it is for; may be empty.
    pub purpose: String,
    /// The wallet that paid.
    pub wallet_address: WalletAddress,
    /// The login user in the guest.
    pub username: LoginName,
    /// The host's network mode.
    pub network_mode: String,
}

impl NewRecord {
    /// The record as it goes into the database: exactly its keys, in its order, nothing null.
    #[must_use]
    pub fn to_json(&self) -> Value {
        let mut map = Map::new();
        let mut put = |key: &str, value: Value| map.insert(key.to_owned(), value);
        put("vm_name", self.vm_name.as_str().into());
        put("vmid", self.vmid.into());
        put("ip_address", self.ip_address.to_string().into());
        put("ipv6_address", self.ipv6_address.map(|a| a.to_string()).unwrap_or_default().into());
        put("expires_at", self.expires_at.to_string().into());
        put("owner", self.owner.as_str().into());
        put("status", self.status.as_str().into());
        put("created_at", self.created_at.to_string().into());
        put("purpose", self.purpose.as_str().into());
        put("wallet_address", self.wallet_address.as_str().into());
        put("username", self.username.as_str().into());
        put("network_mode", self.network_mode.as_str().into());
        Value::Object(map)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    fn new_record() -> NewRecord {
        NewRecord {
            vm_name: VmName::new("web1").unwrap(),
            vmid: 0,
            ip_address: "10.0.0.7".parse().unwrap(),
            ipv6_address: None,
            expires_at: "2026-12-21T00:00:00Z".parse().unwrap(),
            owner: "0xabc".into(),
            status: RecordStatus::Active,
            created_at: "2026-11-21T00:00:00Z".parse().unwrap(),
            purpose: String::new(),
            wallet_address: WalletAddress::new("0xabc").unwrap(),
            username: LoginName::new("admin").unwrap(),
            network_mode: "broker".into(),
        }
    }

    #[test]
    fn a_new_record_has_the_keys_of_the_database_in_its_order() {
        assert_eq!(
            new_record().to_json().to_string(),
            concat!(
                r#"{"vm_name":"web1","vmid":0,"ip_address":"10.0.0.7","ipv6_address":"","#,
                r#""expires_at":"2026-12-21T00:00:00.000000+00:00","owner":"0xabc","status":"active","#,
                r#""created_at":"2026-11-21T00:00:00.000000+00:00","purpose":"","wallet_address":"0xabc","#,
                r#""username":"admin","network_mode":"broker"}"#
            )
        );
    }

    #[test]
    fn a_new_record_reads_back() {
        let record = Record::from_json("web1", &new_record().to_json()).unwrap();
        assert_eq!(record.ipv4(), Some("10.0.0.7".parse().unwrap()));
        assert_eq!(record.ipv6(), None);
        assert!(record.is_live());
        assert_eq!(record.expires_at.unwrap().date(), "2026-12-21");
    }

    #[test]
    fn an_nft_id_may_be_a_number_of_any_size_or_a_text() {
        for (value, expected) in [
            (json!(7), Some("7")),
            (json!("7"), Some("7")),
            (json!("00ffab"), Some("00ffab")),
            (json!(""), None),
            (Value::Null, None),
            (json!(-1), None),
            (json!({}), None),
            (
                "115792089237316195423570985008687907853269984665640564039457584007913129639935".parse().unwrap(),
                Some("115792089237316195423570985008687907853269984665640564039457584007913129639935"),
            ),
        ] {
            let record = Record::from_json("a", &json!({"status": "active", "nft_token_id": value})).unwrap();
            assert_eq!(record.nft_token_id.as_ref().map(NftId::as_str), expected);
        }
    }

    #[test]
    fn old_records_without_later_keys_are_understood() {
        let record = Record::from_json("old", &json!({"status": "suspended", "ipv6_address": null})).unwrap();
        assert_eq!((record.vm_name.as_str(), record.vmid, record.ipv6_address.as_str()), ("old", 0, ""));
        assert_eq!(record.created_at, None);
    }

    #[test]
    fn a_damaged_record_says_which_key_and_why() {
        let wrong = |value| Record::from_json("a", &value).unwrap_err().to_string();
        assert_eq!(wrong(json!(["active"])), "record must be an object, not a list");
        assert_eq!(wrong(json!({"status": "paid"})), "status must be active, suspended or destroyed, not \"paid\"");
        assert_eq!(wrong(json!({"status": "active", "owner": 5})), "owner must be a text, not an integer");
        assert_eq!(
            wrong(json!({"status": "active", "expires_at": "soon"})),
            "expires_at must be an ISO 8601 time, not \"soon\""
        );
        assert_eq!(wrong(json!({"status": "active", "vmid": [1]})), "vmid must be an integer, not a list");
    }

    proptest! {
        #[test]
        fn no_value_makes_reading_panic(status in ".{0,10}", key in "vmid|expires_at|nft_token_id|owner", number: f64, text in ".{0,40}") {
            for value in [json!(number), json!(text), json!([text]), json!({"a": number})] {
                let _ = Record::from_json("a", &json!({"status": status, &*key: value.clone()}));
                let _ = Record::from_json("a", &json!({"status": "active", &*key: value}));
            }
        }
    }
}
