//! What a domain says about itself in libvirt's `<metadata>`: it marks the domain as BlockHost's, and is enough
//! to rebuild its record when another program's rewrite of the database has lost it.

use std::net::{Ipv4Addr, Ipv6Addr};

use provisioner_contract::{LoginName, NftId, VmName, WalletAddress};
use roxmltree::Node;

use crate::limits::{Limit, Limits};
use crate::{Error, ErrorKind, Result};

/// The namespace of our element. It names a format, not a place.
pub const NAMESPACE: &str = "urn:blockhost:vm:1";

/// The facts kept in the domain. Times are ISO 8601 UTC as in the database.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Metadata {
    /// The VM's name, which is also the domain's.
    pub name: VmName,
    /// Unique per creation; also the domain's UUID and the seed's instance id.
    pub creation_id: String,
    /// When it was created.
    pub created_at: String,
    /// When it expired as of creation. The database has the current value.
    pub expires_at: String,
    /// Who pays.
    pub wallet_address: WalletAddress,
    /// The token, when it was known at creation.
    pub nft_token_id: Option<NftId>,
    /// The login user.
    pub username: LoginName,
    /// The network mode in force at creation.
    pub network_mode: String,
    /// Its address on the bridge.
    pub ipv4: Ipv4Addr,
    /// Its IPv6 address, when there is a prefix.
    pub ipv6: Option<Ipv6Addr>,
    /// The MAC address of its only interface, lower case.
    pub mac: String,
    /// The limits it was created with. Domains without the element were created without any.
    pub limits: Limits,
}

impl Metadata {
    /// The element's children as name and text, in the order they are written.
    #[must_use]
    pub fn fields(&self) -> Vec<(&'static str, String)> {
        let mut fields = vec![
            ("name", self.name.to_string()),
            ("creation-id", self.creation_id.clone()),
            ("created-at", self.created_at.clone()),
            ("expires-at", self.expires_at.clone()),
            ("wallet-address", self.wallet_address.to_string()),
        ];
        fields.extend(self.nft_token_id.as_ref().map(|id| ("nft-token-id", id.to_string())));
        fields.push(("username", self.username.to_string()));
        fields.push(("network-mode", self.network_mode.clone()));
        fields.push(("ipv4", self.ipv4.to_string()));
        fields.extend(self.ipv6.map(|address| ("ipv6", address.to_string())));
        fields.push(("mac", self.mac.clone()));
        fields
    }

    /// The attributes of the element `limits`, none when the VM was created without any.
    #[must_use]
    pub fn limit_attributes(&self) -> Vec<(&'static str, String)> {
        self.limits.named().map(|(limit, value)| (limit.name(), value.to_string())).collect()
    }

    /// Reads our element. `Ok(None)`: the domain has none, so it was not made by this suite.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] when it has one that breaks the format: others may edit a domain.
    pub fn find(domain: Node<'_, '_>) -> Result<Option<Self>> {
        let ours = domain
            .children()
            .filter(|node| node.has_tag_name("metadata"))
            .flat_map(|metadata| metadata.children())
            .find(|node| node.has_tag_name((NAMESPACE, "vm")));
        let Some(ours) = ours else { return Ok(None) };
        let optional = |tag: &str| {
            ours.children().find(|node| node.has_tag_name((NAMESPACE, tag))).map(|node| node.text().unwrap_or(""))
        };
        let required = |tag: &'static str| optional(tag).ok_or_else(|| damaged(tag));
        Ok(Some(Self {
            name: VmName::new(required("name")?)?,
            creation_id: required("creation-id")?.to_owned(),
            created_at: required("created-at")?.to_owned(),
            expires_at: required("expires-at")?.to_owned(),
            wallet_address: WalletAddress::new(required("wallet-address")?)?,
            nft_token_id: optional("nft-token-id").map(NftId::new).transpose()?,
            username: LoginName::new(required("username")?)?,
            network_mode: required("network-mode")?.to_owned(),
            ipv4: required("ipv4")?.parse().map_err(|_| damaged("ipv4"))?,
            ipv6: optional("ipv6").map(str::parse).transpose().map_err(|_| damaged("ipv6"))?,
            mac: required("mac")?.to_owned(),
            limits: find_limits(ours)?,
        }))
    }
}

fn find_limits(ours: Node<'_, '_>) -> Result<Limits> {
    let Some(node) = ours.children().find(|node| node.has_tag_name((NAMESPACE, "limits"))) else {
        return Ok(Limits::default());
    };
    let mut valid = true;
    let limits = Limits::new(|limit: Limit| {
        let value = node.attribute(limit.name())?.parse().ok();
        valid &= value.is_some();
        value
    });
    if valid && limits.check().is_ok() { Ok(limits) } else { Err(damaged("limits")) }
}

fn damaged(tag: &str) -> Error {
    Error::new(ErrorKind::Invalid, format!("the domain's BlockHost metadata has no valid {tag}"))
}
