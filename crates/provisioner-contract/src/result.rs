//! What the commands print for other programs.

use std::fmt;
use std::net::{Ipv4Addr, Ipv6Addr};

use serde::{Serialize, Serializer};

use crate::{LoginName, NftId, Timestamp, VmName};

/// The only status a printed result has: a create that fails prints no result.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, schemars::JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum CreateStatus {
    /// The VM runs and is registered.
    #[default]
    Ok,
}

/// An NFT id in JSON, for the schema alone: a number if decimal, else a text, or null. Not an `Option`, because
/// a schema lets those be left out and the key is always there.
#[derive(schemars::JsonSchema)]
#[schemars(untagged)]
#[allow(dead_code, reason = "describes a shape, holds nothing")]
pub(crate) enum NftTokenId {
    Number(u64),
    Text(NftId),
    Absent(()),
}

pub(crate) fn nft_as_json<S: Serializer>(id: &Option<NftId>, serializer: S) -> Result<S::Ok, S::Error> {
    id.as_ref().map(NftId::to_json).serialize(serializer)
}

fn or_empty<T: fmt::Display, S: Serializer>(value: &Option<T>, serializer: S) -> Result<S::Ok, S::Error> {
    match value {
        Some(value) => serializer.collect_str(value),
        None => serializer.serialize_str(""),
    }
}

fn date_or_empty<S: Serializer>(time: &Option<Timestamp>, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&time.map(Timestamp::date).unwrap_or_default())
}

/// The result of `create`. All its values have been checked, so its JSON is ASCII.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, schemars::JsonSchema)]
pub struct CreateResult {
    /// Always `ok`.
    pub status: CreateStatus,
    /// The VM's name.
    pub vm_name: VmName,
    /// Its address on the bridge.
    pub ip: Ipv4Addr,
    /// Its IPv6 address, or `""`.
    #[serde(serialize_with = "or_empty")]
    #[schemars(with = "String")]
    pub ipv6: Option<Ipv6Addr>,
    /// The name of the libvirt domain, which is the VM's.
    pub vmid: VmName,
    /// A decimal id as a number, any other as a text, none as null.
    #[serde(serialize_with = "nft_as_json")]
    #[schemars(with = "NftTokenId")]
    pub nft_token_id: Option<NftId>,
    /// The login user in the guest.
    pub username: LoginName,
}

impl CreateResult {
    /// The result for a VM, whose domain has the VM's name.
    #[must_use]
    pub fn new(
        vm_name: VmName,
        ip: Ipv4Addr,
        ipv6: Option<Ipv6Addr>,
        nft_token_id: Option<NftId>,
        username: LoginName,
    ) -> Self {
        Self { status: CreateStatus::Ok, vmid: vm_name.clone(), vm_name, ip, ipv6, nft_token_id, username }
    }

    /// The two lines of stdout, without the line ends: some engines look for the first, others for the second.
    #[must_use]
    pub fn lines(&self) -> [String; 2] {
        // Serialising texts and numbers into memory cannot fail.
        let json = serde_json::to_string(self).unwrap_or_default();
        let tagged = format!("BLOCKHOST_RESULT: {json}");
        [json, tagged]
    }
}

/// What `status` and `list` say about a VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, schemars::JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum VmStatus {
    /// Runs.
    Active,
    /// Exists but does not run: shut off, paused, crashed.
    Suspended,
    /// There is a record but no domain.
    Destroyed,
    /// Neither, or nobody could be asked.
    Unknown,
}

impl VmStatus {
    /// The word on stdout.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Active => "active",
            Self::Suspended => "suspended",
            Self::Destroyed => "destroyed",
            Self::Unknown => "unknown",
        }
    }
}

impl fmt::Display for VmStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// One VM of `list`. The admin panel puts these values into HTML as they are, so none is free text.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, schemars::JsonSchema)]
pub struct ListRow {
    /// The VM's name.
    pub name: VmName,
    /// What it does.
    pub status: VmStatus,
    /// Its IPv4 address, or `""`.
    #[serde(serialize_with = "or_empty")]
    #[schemars(with = "String")]
    pub ip: Option<Ipv4Addr>,
    /// The date it was made, `YYYY-MM-DD`, or `""`.
    #[serde(serialize_with = "date_or_empty")]
    #[schemars(with = "String")]
    pub created: Option<Timestamp>,
}

impl ListRow {
    /// The head of the table.
    pub const HEADER: &'static str = "NAME\tSTATUS\tIP\tCREATED";

    /// The row as tab-separated text, without the line end.
    #[must_use]
    pub fn line(&self) -> String {
        let ip = self.ip.map(|ip| ip.to_string()).unwrap_or_default();
        let created = self.created.map(Timestamp::date).unwrap_or_default();
        format!("{}\t{}\t{ip}\t{created}", self.name, self.status)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use serde_json::json;

    fn result(ipv6: Option<&str>, nft: Option<&str>) -> CreateResult {
        CreateResult::new(
            VmName::new("web1").unwrap(),
            Ipv4Addr::new(10, 0, 0, 7),
            ipv6.map(|a| a.parse().unwrap()),
            nft.map(|id| NftId::new(id).unwrap()),
            LoginName::new("admin").unwrap(),
        )
    }

    #[test]
    fn the_two_lines_are_those_of_the_contract() {
        let json = r#"{"status":"ok","vm_name":"web1","ip":"10.0.0.7","ipv6":"","vmid":"web1","nft_token_id":null,"username":"admin"}"#;
        assert_eq!(result(None, None).lines(), [json.to_owned(), format!("BLOCKHOST_RESULT: {json}")]);
    }

    #[test]
    fn a_decimal_nft_id_is_a_number_and_any_other_a_text() {
        let id = |nft| serde_json::to_value(result(Some("2001:DB8::1"), Some(nft))).unwrap()["nft_token_id"].clone();
        assert_eq!(id("42"), json!(42));
        assert_eq!(id("0042"), json!("0042"));
        assert_eq!(id("ab"), json!("ab"));
        assert!(result(Some("2001:DB8:0::1"), None).lines()[0].contains(r#""ipv6":"2001:db8::1""#));
    }

    #[test]
    fn a_list_row_is_four_columns_or_four_keys() {
        let row = ListRow {
            name: VmName::new("1e3").unwrap(),
            status: VmStatus::Suspended,
            ip: Some(Ipv4Addr::new(10, 0, 0, 9)),
            created: Some("2026-11-21T23:59:59.999999Z".parse().unwrap()),
        };
        assert_eq!(row.line(), "1e3\tsuspended\t10.0.0.9\t2026-11-21");
        assert_eq!(
            serde_json::to_string(&row).unwrap(),
            r#"{"name":"1e3","status":"suspended","ip":"10.0.0.9","created":"2026-11-21"}"#
        );
        let bare = ListRow { ip: None, created: None, status: VmStatus::Unknown, ..row };
        assert_eq!(bare.line(), "1e3\tunknown\t\t");
    }

    #[test]
    fn the_schemas_describe_what_is_printed() {
        let schemas: std::collections::BTreeMap<_, _> = crate::schemas().into_iter().collect();
        let names = ["CreateResult", "GcReport", "ListRow", "Manifest", "Metrics", "Record"];
        assert_eq!(schemas.keys().copied().collect::<Vec<_>>(), names);
        let printed = serde_json::to_value(result(None, None)).unwrap();
        let keys: Vec<_> = printed.as_object().unwrap().keys().cloned().collect();
        let described: Vec<_> = schemas["CreateResult"]["properties"].as_object().unwrap().keys().cloned().collect();
        assert_eq!(keys, described);
        assert_eq!(schemas["CreateResult"]["required"], json!(keys));
        assert_eq!(schemas["ListRow"]["properties"]["ip"]["type"], "string");
        assert_eq!(schemas["Record"]["properties"]["vmid"]["type"], "integer");
    }
}
