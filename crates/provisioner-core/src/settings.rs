//! The configuration of the host, as its installer, its operator and other packages have written it.
//!
//! Parsing takes texts; only [`Settings::load`] touches files. A value of the wrong type is an error that names file,
//! key and expectation. A key nobody knows is not: the files are shared.

use std::fmt;
use std::fs;
use std::io::ErrorKind as Io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};

use provisioner_contract::WalletAddress;
use serde_json::{Map, Value};

use crate::paths::Directories;
use crate::{Error, ErrorKind, Result};

/// What `libvirt.domain_type` asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DomainType {
    /// KVM where it really works, else emulation.
    #[default]
    Auto,
    /// KVM or nothing.
    Kvm,
    /// Emulation.
    Qemu,
}

/// Our own keys, under `libvirt:` in db.yaml.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LibvirtSettings {
    /// How guests are run.
    pub domain_type: DomainType,
    /// How long create waits for the guest agent and the login user, in seconds; by how the guest runs when absent.
    pub guest_ready_timeout_seconds: Option<u64>,
    /// Name servers of the guests; empty means the caller's choice.
    pub nameservers: Vec<IpAddr>,
    /// Where the cloud image for the template is.
    pub template_url: Option<String>,
    /// Its SHA-512, 128 lower case hex digits.
    pub template_sha512: Option<String>,
}

impl Default for LibvirtSettings {
    fn default() -> Self {
        Self {
            domain_type: DomainType::Auto,
            guest_ready_timeout_seconds: None,
            nameservers: Vec::new(),
            template_url: None,
            template_sha512: None,
        }
    }
}

/// The IPv4 addresses VMs get: those in the first three octets of `network` with a last octet in `start..=end`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ipv4Pool {
    /// The network's own address; bits of the host part are cleared.
    pub network: Ipv4Addr,
    /// Its prefix length, 0 to 32; also that of the guests.
    pub prefix_len: u8,
    /// First last octet.
    pub start: u8,
    /// Last last octet.
    pub end: u8,
    /// The guests' gateway; without it, the bridge's own address.
    pub gateway: Option<Ipv4Addr>,
}

impl Ipv4Pool {
    /// The addresses in the order they are given out: inside the network, without its own address, its broadcast
    /// address and the gateway.
    pub fn candidates(&self) -> impl Iterator<Item = Ipv4Addr> + '_ {
        let [a, b, c, _] = self.network.octets();
        let mask = mask4(self.prefix_len);
        let network = u32::from(self.network) & mask;
        let broadcast = network | !mask;
        (self.start..=self.end).map(move |last| Ipv4Addr::new(a, b, c, last)).filter(move |address| {
            let bits = u32::from(*address);
            // Networks of one or two addresses have neither a network nor a broadcast address.
            let usable = self.prefix_len >= 31 || (bits != network && bits != broadcast);
            bits & mask == network && usable && Some(*address) != self.gateway
        })
    }
}

impl fmt::Display for Ipv4Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{} .{} to .{}", self.network, self.prefix_len, self.start, self.end)
    }
}

/// The IPv6 addresses VMs get: `prefix` + i for i in `start..=end`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ipv6Pool {
    /// The prefix's first address.
    pub prefix: Ipv6Addr,
    /// The prefix length, 0 to 128.
    pub prefix_len: u8,
    /// First offset.
    pub start: u64,
    /// Last offset.
    pub end: u64,
    /// The broker's gateway, if the allocation names one.
    pub gateway: Option<Ipv6Addr>,
}

impl Ipv6Pool {
    /// The address guests and host use as router: prefix + 1.
    #[must_use]
    pub fn router(&self) -> Ipv6Addr {
        Ipv6Addr::from(u128::from(self.prefix).wrapping_add(1))
    }

    /// Whether `address` is one of [`Self::candidates`].
    #[must_use]
    pub fn contains(&self, address: Ipv6Addr) -> bool {
        let offset = u128::from(address).checked_sub(u128::from(self.prefix));
        let in_range = offset.is_some_and(|i| u128::from(self.start) <= i && i <= u128::from(self.end) && i != 0);
        let mask = mask6(self.prefix_len);
        let inside = u128::from(address) & mask == u128::from(self.prefix) & mask;
        in_range && inside && address != self.router() && Some(address) != self.gateway
    }

    /// The addresses in the order they are given out: inside the prefix, without its base, the router and the gateway.
    pub fn candidates(&self) -> impl Iterator<Item = Ipv6Addr> + '_ {
        let base = u128::from(self.prefix);
        let mask = mask6(self.prefix_len);
        (self.start..=self.end)
            .map_while(move |i| base.checked_add(u128::from(i)))
            .take_while(move |bits| bits & mask == base & mask)
            .filter(move |bits| *bits != base)
            .map(Ipv6Addr::from)
            .filter(move |address| *address != self.router() && Some(*address) != self.gateway)
    }
}

impl fmt::Display for Ipv6Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{} +{} to +{}", self.prefix, self.prefix_len, self.start, self.end)
    }
}

fn mask4(len: u8) -> u32 {
    u32::MAX.checked_shl(32 - u32::from(len.min(32))).unwrap_or(0)
}

fn mask6(len: u8) -> u128 {
    u128::MAX.checked_shl(128 - u32::from(len.min(128))).unwrap_or(0)
}

/// What the broker has allocated to the host.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct BrokerSettings {
    /// Only with a prefix allocated.
    pub ipv6_pool: Option<Ipv6Pool>,
    /// The zone in which the VMs' signing names are.
    pub dns_zone: Option<String>,
}

/// The guests' one-time passwords.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OtpSettings {
    /// Digits of one.
    pub length: u32,
    /// How long it is valid.
    pub ttl_seconds: u32,
}

/// Everything the commands need to know about the host.
#[derive(Debug, Clone, PartialEq)]
pub struct Settings {
    /// The VM database.
    pub db_file: PathBuf,
    /// Days a VM lives when the caller does not say.
    pub default_expiry_days: u32,
    /// Days between suspension and destruction.
    pub gc_grace_days: u32,
    /// The bridge VMs are attached to.
    pub bridge: String,
    /// The libvirt storage pool of overlays and seeds.
    pub storage_pool: String,
    /// That pool's target directory.
    pub storage_path: PathBuf,
    /// Without it no VM can be created.
    pub ipv4_pool: Option<Ipv4Pool>,
    /// What the broker has allocated to the host, or what is wrong with the file that says so. Only create needs it.
    pub broker: Result<BrokerSettings, String>,
    /// One-time passwords, or what is wrong with the file that says so. Only create needs it.
    pub otp: Result<OtpSettings, String>,
    /// The host's network mode, or why there is none. Only create needs it.
    pub network_mode: Result<String, String>,
    /// The engine's pattern for wallet addresses. A mismatch is worth a warning.
    pub address_pattern: Option<String>,
    /// Our own keys.
    pub libvirt: LibvirtSettings,
    /// What is wrong without being in the way, one line each.
    pub warnings: Vec<String>,
}

impl Settings {
    /// Reads every file of the configuration. Missing files mean defaults. A fault in a file that only create needs is kept
    /// for it, so that it does not stop the host's other commands.
    ///
    /// # Errors
    /// Those of db.yaml: [`ErrorKind::Config`] naming file, key and expectation; [`ErrorKind::Io`] when it is unreadable.
    pub fn load(dirs: &Directories) -> Result<Self> {
        let mut warnings = Vec::new();
        let db = match config_file(dirs, "db.yaml")? {
            Some((path, text)) => parse_db(&path, &text)?,
            None => Db::default(),
        };
        let otp = config_file(dirs, "web3-defaults.yaml")
            .and_then(|file| file.map_or(Ok(OTP_DEFAULTS), |(path, text)| parse_web3_defaults(&path, &text)))
            .map(|(length, ttl_seconds)| OtpSettings { length, ttl_seconds });
        let broker = config_file(dirs, "broker-allocation.json")
            .and_then(|file| file.map_or(Ok(Broker::default()), |(path, text)| parse_broker_allocation(&path, &text)))
            .map(|broker| BrokerSettings {
                ipv6_pool: broker.prefix.map(|(prefix, prefix_len)| Ipv6Pool {
                    prefix,
                    prefix_len,
                    start: db.ipv6_range.0,
                    end: db.ipv6_range.1,
                    gateway: broker.gateway,
                }),
                dns_zone: broker.dns_zone,
            });
        let engine = dirs.share.join("engine.json");
        let pattern = read(&engine).and_then(|text| text.map_or(Ok(None), |text| parse_engine(&engine, &text)));
        let address_pattern = pattern.unwrap_or_else(|e| {
            warnings.push(e.to_string());
            None
        });
        let bridge = match db.bridge {
            Some(bridge) => bridge,
            None => bridge_of_run(dirs, &mut warnings),
        };
        Ok(Self {
            db_file: db.db_file,
            default_expiry_days: db.default_expiry_days,
            gc_grace_days: db.gc_grace_days,
            bridge,
            storage_pool: db.storage_pool,
            storage_path: db.storage_path,
            ipv4_pool: db.ipv4_pool,
            broker: broker.map_err(|e| e.in_full()),
            otp: otp.map_err(|e| e.in_full()),
            network_mode: network_mode(dirs).unwrap_or_else(|e| Err(e.in_full())),
            address_pattern,
            libvirt: db.libvirt,
            warnings,
        })
    }

    /// The same host as `--mock` sees it: IPv6 from `fd00::/120`, whatever is allocated, and IPv4 from libvirt's usual
    /// network where none is configured.
    #[must_use]
    pub fn mock(mut self) -> Self {
        let configured = self.broker.ok().and_then(|broker| broker.ipv6_pool);
        let (start, end) = configured.map_or(IPV6_RANGE, |pool| (pool.start, pool.end));
        let prefix = Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 0);
        let ipv6_pool = Some(Ipv6Pool { prefix, prefix_len: 120, start, end, gateway: None });
        self.broker = Ok(BrokerSettings { ipv6_pool, dns_zone: None });
        let network = Ipv4Addr::new(192, 168, 122, 0);
        self.ipv4_pool.get_or_insert(Ipv4Pool {
            network,
            prefix_len: 24,
            start: IPV4_RANGE.0,
            end: IPV4_RANGE.1,
            gateway: None,
        });
        self
    }

    /// What the broker has allocated, for what cannot do without.
    ///
    /// # Errors
    /// [`ErrorKind::Config`] saying what is wrong with it.
    pub fn require_broker(&self) -> Result<&BrokerSettings> {
        self.broker.as_ref().map_err(|why| Error::new(ErrorKind::Config, why))
    }

    /// The one-time passwords' settings, for what cannot do without.
    ///
    /// # Errors
    /// [`ErrorKind::Config`] saying what is wrong with them.
    pub fn require_otp(&self) -> Result<OtpSettings> {
        self.otp.as_ref().copied().map_err(|why| Error::new(ErrorKind::Config, why))
    }

    /// The IPv4 pool, for what cannot do without.
    ///
    /// # Errors
    /// [`ErrorKind::Config`] when none is configured.
    pub fn require_ipv4_pool(&self) -> Result<&Ipv4Pool> {
        self.ipv4_pool.as_ref().ok_or_else(|| {
            Error::new(ErrorKind::Config, "cannot allocate an address: no ip_pool is configured")
                .hint("set ip_pool.network, start, end and gateway in /etc/blockhost/db.yaml")
        })
    }

    /// The network mode, for what cannot do without.
    ///
    /// # Errors
    /// [`ErrorKind::Config`] saying why there is none.
    pub fn require_network_mode(&self) -> Result<&str> {
        self.network_mode.as_deref().map_err(|why| {
            Error::new(ErrorKind::Config, format!("cannot tell the network mode: {why}"))
                .hint("enable exactly one mode in network-modes.enabled, or write its name to network-mode")
        })
    }

    /// A warning when `wallet` is not what the host's engine calls an address, or when its pattern cannot be used.
    #[must_use]
    pub fn address_warning(&self, wallet: &WalletAddress) -> Option<String> {
        let pattern = self.address_pattern.as_deref()?;
        match regex_lite::Regex::new(pattern) {
            Ok(regex) if regex.is_match(wallet.as_str()) => None,
            Ok(_) => Some(format!("wallet address {wallet} does not match the engine's pattern {pattern}")),
            Err(e) => {
                Some(format!("cannot check wallet address {wallet}: the engine's pattern {pattern} is unusable: {e}"))
            }
        }
    }
}

/// What db.yaml says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Db {
    /// See [`Settings::db_file`].
    pub db_file: PathBuf,
    /// See [`Settings::default_expiry_days`].
    pub default_expiry_days: u32,
    /// See [`Settings::gc_grace_days`].
    pub gc_grace_days: u32,
    /// The bridge, if the file names one.
    pub bridge: Option<String>,
    /// See [`Settings::storage_pool`].
    pub storage_pool: String,
    /// See [`Settings::storage_path`].
    pub storage_path: PathBuf,
    /// See [`Settings::ipv4_pool`].
    pub ipv4_pool: Option<Ipv4Pool>,
    /// First and last offset in the IPv6 prefix.
    pub ipv6_range: (u64, u64),
    /// See [`Settings::libvirt`].
    pub libvirt: LibvirtSettings,
}

impl Default for Db {
    fn default() -> Self {
        Self {
            db_file: "/var/lib/blockhost/vms.json".into(),
            default_expiry_days: 30,
            gc_grace_days: 7,
            bridge: None,
            storage_pool: "blockhost".into(),
            storage_path: "/var/lib/blockhost/vms".into(),
            ipv4_pool: None,
            ipv6_range: IPV6_RANGE,
            libvirt: LibvirtSettings::default(),
        }
    }
}

const IPV4_RANGE: (u8, u8) = (200, 250);
const IPV6_RANGE: (u64, u64) = (2, 254);
const OTP_DEFAULTS: (u32, u32) = (6, 300);

/// What broker-allocation.json says.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Broker {
    /// First address and length of the host's prefix.
    pub prefix: Option<(Ipv6Addr, u8)>,
    /// The gateway, if named.
    pub gateway: Option<Ipv6Addr>,
    /// See [`Settings::dns_zone`].
    pub dns_zone: Option<String>,
}

/// A mapping of a file, with what is needed to name a value of it.
struct Section<'a> {
    file: &'a Path,
    path: String,
    map: Map<String, Value>,
}

impl<'a> Section<'a> {
    fn yaml(file: &'a Path, text: &str) -> Result<Self> {
        let value = yaml(text).map_err(|e| {
            Error::new(ErrorKind::Config, format!("{} is not valid YAML: {}", file.display(), one_line(&e)))
        })?;
        Self::root(file, value)
    }

    fn json(file: &'a Path, text: &str) -> Result<Self> {
        let value = serde_json::from_str(text)
            .map_err(|e| Error::new(ErrorKind::Config, format!("{} is not valid JSON: {e}", file.display())))?;
        Self::root(file, value)
    }

    fn root(file: &'a Path, value: Value) -> Result<Self> {
        match value {
            // A file of comments only.
            Value::Null => Ok(Self { file, path: String::new(), map: Map::new() }),
            Value::Object(map) => Ok(Self { file, path: String::new(), map }),
            other => Err(Error::new(
                ErrorKind::Config,
                format!("{}: the file must be a mapping, not {}", file.display(), kind(&other)),
            )),
        }
    }

    fn wrong(&self, key: &str, expected: &str, found: &Value) -> Error {
        let shown = match found {
            Value::String(text) => format!("{:?}", text.chars().take(60).collect::<String>()),
            Value::Number(number) => number.to_string(),
            other => kind(other).to_owned(),
        };
        Error::new(
            ErrorKind::Config,
            format!("{}: {}{key} must be {expected}, not {shown}", self.file.display(), self.path),
        )
    }

    /// A value that is there and not null.
    fn get(&self, key: &str) -> Option<&Value> {
        self.map.get(key).filter(|value| !value.is_null())
    }

    fn section(&self, key: &str) -> Result<Option<Section<'a>>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Object(map)) => {
                Ok(Some(Section { file: self.file, path: format!("{}{key}.", self.path), map: map.clone() }))
            }
            Some(other) => Err(self.wrong(key, "a mapping", other)),
        }
    }

    /// A text that is not empty.
    fn text(&self, key: &str) -> Result<Option<&str>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::String(text)) if text.is_empty() => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(other) => Err(self.wrong(key, "a text", other)),
        }
    }

    fn parsed<T>(&self, key: &str, expected: &str, parse: impl FnOnce(&str) -> Option<T>) -> Result<Option<T>> {
        match self.text(key) {
            Ok(None) => Ok(None),
            Ok(Some(text)) => match parse(text.trim()) {
                Some(value) => Ok(Some(value)),
                None => Err(self.wrong(key, expected, &Value::from(text))),
            },
            Err(_) => Err(self.wrong(key, expected, self.get(key).unwrap_or(&Value::Null))),
        }
    }

    /// An integer, or a text that is one.
    fn number(&self, key: &str, least: u32) -> Result<Option<u32>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let number = value.as_u64().or_else(|| value.as_str()?.trim().parse().ok());
        match number.and_then(|n| u32::try_from(n).ok()) {
            Some(number) if number >= least => Ok(Some(number)),
            _ => Err(self.wrong(key, &format!("an integer from {least} on"), value)),
        }
    }

    /// The end of a range: an integer, a text that is one, or a full address, of which `last_part` counts.
    fn bound(&self, key: &str, most: u64, last_part: impl FnOnce(&str) -> Option<u64>) -> Result<Option<u64>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let number = match value {
            Value::Number(number) => number.as_u64(),
            Value::String(text) => text.trim().parse().ok().or_else(|| last_part(text.trim())),
            _ => None,
        };
        match (number, value) {
            (Some(number), _) if number <= most => Ok(Some(number)),
            (None, Value::Array(_) | Value::Object(_) | Value::Bool(_)) => {
                Err(self.wrong(key, "an integer or an address", value))
            }
            _ => Err(self.wrong(key, &format!("an integer from 0 to {most} or an address"), value)),
        }
    }
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a text",
        Value::Array(_) => "a list",
        Value::Object(_) => "a mapping",
    }
}

fn one_line(error: &dyn fmt::Display) -> String {
    error.to_string().split_whitespace().collect::<Vec<_>>().join(" ").chars().take(300).collect()
}

/// Reads YAML as the Python programs that share the file do, as far as our keys can tell: version 1.1, the last of
/// two equal keys counts. Merge keys and anchors work within narrow limits; includes and tags of code do not exist.
fn yaml(text: &str) -> Result<Value, serde_saphyr::Error> {
    let options = serde_saphyr::options! {
        duplicate_keys: serde_saphyr::DuplicateKeyPolicy::LastWins,
        legacy_octal_numbers: true,
        non_finite_float_policy: serde_saphyr::NonFiniteFloatPolicy::AsString,
        with_snippet: false,
        budget: serde_saphyr::budget! {
            max_depth: 64,
            max_nodes: 20_000,
            max_total_scalar_bytes: 1 << 20,
        },
    };
    serde_saphyr::from_str_with_options(text, options)
}

fn network4(text: &str) -> Option<(Ipv4Addr, u8)> {
    let (address, len) = text.split_once('/')?;
    let (address, len): (Ipv4Addr, u8) = (address.parse().ok()?, len.parse().ok()?);
    (len <= 32).then(|| (Ipv4Addr::from(u32::from(address) & mask4(len)), len))
}

fn network6(text: &str) -> Option<(Ipv6Addr, u8)> {
    let (address, len) = text.split_once('/')?;
    let (address, len): (Ipv6Addr, u8) = (address.parse().ok()?, len.parse().ok()?);
    (len <= 128).then(|| (Ipv6Addr::from(u128::from(address) & mask6(len)), len))
}

/// A name the kernel takes for a network interface, and that is safe in a path and in XML.
fn interface(text: &str) -> Option<String> {
    let fits = (1..=15).contains(&text.len()) && text != "." && text != "..";
    let plain = text.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-' | b'@'));
    (fits && plain && !text.starts_with('-')).then(|| text.to_owned())
}

fn absolute(text: &str) -> Option<PathBuf> {
    text.starts_with('/').then(|| text.into())
}

fn dns_name(text: &str) -> Option<String> {
    let text = text.trim_end_matches('.');
    let label = |label: &str| {
        (1..=63).contains(&label.len()) && label.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_'))
    };
    (text.len() <= 220 && text.split('.').all(label)).then(|| text.to_ascii_lowercase())
}

/// Reads db.yaml. `file` is for errors.
///
/// # Errors
/// [`ErrorKind::Config`] naming file, key and expectation.
pub fn parse_db(file: &Path, text: &str) -> Result<Db> {
    let root = Section::yaml(file, text)?;
    let defaults = Db::default();
    let grace = match root.number("gc_grace_days", 0)? {
        Some(days) => Some(days),
        None => root.number("grace_days", 0)?,
    };
    let ipv4_pool = match root.section("ip_pool")? {
        Some(pool) => parse_ipv4_pool(&pool)?,
        None => None,
    };
    let ipv6_range = match root.section("ipv6_pool")? {
        Some(pool) => {
            // Of a full address, the part that counts up within any prefix.
            let last = |text: &str| text.parse::<Ipv6Addr>().ok().map(|a| u64::from(a.segments()[7]));
            let start = pool.bound("start", u64::MAX, last)?.unwrap_or(IPV6_RANGE.0);
            let end = pool.bound("end", u64::MAX, last)?.unwrap_or(IPV6_RANGE.1);
            ordered(&pool, start, end)?
        }
        None => IPV6_RANGE,
    };
    Ok(Db {
        db_file: match root.text("db_file")? {
            // Relative to the working directory, as for the other programs.
            Some(path) => path.into(),
            None => defaults.db_file,
        },
        default_expiry_days: root.number("default_expiry_days", 0)?.unwrap_or(defaults.default_expiry_days),
        gc_grace_days: grace.unwrap_or(defaults.gc_grace_days),
        bridge: root.parsed("bridge", "the name of a network interface", interface)?,
        storage_pool: root
            .parsed("storage_pool", "the name of a libvirt storage pool", pool_name)?
            .unwrap_or(defaults.storage_pool),
        storage_path: root.parsed("storage_path", "an absolute path", absolute)?.unwrap_or(defaults.storage_path),
        ipv4_pool,
        ipv6_range,
        libvirt: match root.section("libvirt")? {
            Some(own) => parse_libvirt(&own)?,
            None => defaults.libvirt,
        },
    })
}

fn pool_name(text: &str) -> Option<String> {
    let plain = !text.chars().any(|c| c.is_control() || c == '/');
    (plain && (1..=128).contains(&text.len())).then(|| text.to_owned())
}

fn ordered<N: PartialOrd + fmt::Display>(pool: &Section<'_>, start: N, end: N) -> Result<(N, N)> {
    if start > end {
        return Err(Error::new(
            ErrorKind::Config,
            format!(
                "{}: {}start must not be beyond {}end, {start} is beyond {end}",
                pool.file.display(),
                pool.path,
                pool.path
            ),
        ));
    }
    Ok((start, end))
}

fn parse_ipv4_pool(pool: &Section<'_>) -> Result<Option<Ipv4Pool>> {
    let network = pool.parsed("network", "a network such as 192.168.122.0/24", network4)?;
    let last = |text: &str| text.parse::<Ipv4Addr>().ok().map(|a| u64::from(a.octets()[3]));
    let octet = |key, default| -> Result<u8> {
        Ok(pool.bound(key, 255, last)?.and_then(|n| u8::try_from(n).ok()).unwrap_or(default))
    };
    let (start, end) = ordered(pool, octet("start", IPV4_RANGE.0)?, octet("end", IPV4_RANGE.1)?)?;
    let gateway = pool.parsed("gateway", "an IPv4 address", |text| text.parse().ok())?;
    Ok(network.map(|(network, prefix_len)| Ipv4Pool { network, prefix_len, start, end, gateway }))
}

fn parse_libvirt(own: &Section<'_>) -> Result<LibvirtSettings> {
    let domain_type = own.parsed("domain_type", "auto, kvm or qemu", |text| match text {
        "auto" => Some(DomainType::Auto),
        "kvm" => Some(DomainType::Kvm),
        "qemu" => Some(DomainType::Qemu),
        _ => None,
    })?;
    let expected = "a list of IP addresses";
    let nameservers = match own.get("nameservers") {
        None => Vec::new(),
        Some(value @ Value::Array(list)) => {
            let parsed = |entry: &Value| match entry.as_str().and_then(|text| text.trim().parse().ok()) {
                Some(address) => Ok(address),
                None => Err(own.wrong("nameservers", expected, if entry.is_null() { value } else { entry })),
            };
            list.iter().map(parsed).collect::<Result<_>>()?
        }
        Some(other) => return Err(own.wrong("nameservers", expected, other)),
    };
    let sha512 = own.parsed("template_sha512", "128 hex digits", |text| {
        (text.len() == 128 && text.bytes().all(|b| b.is_ascii_hexdigit())).then(|| text.to_ascii_lowercase())
    })?;
    Ok(LibvirtSettings {
        domain_type: domain_type.unwrap_or_default(),
        guest_ready_timeout_seconds: own.number("guest_ready_timeout_seconds", 1)?.map(u64::from),
        nameservers,
        template_url: own.text("template_url")?.map(str::to_owned),
        template_sha512: sha512,
    })
}

/// Reads web3-defaults.yaml: length in digits and lifetime in seconds of a one-time password.
///
/// # Errors
/// [`ErrorKind::Config`] naming file, key and expectation.
pub fn parse_web3_defaults(file: &Path, text: &str) -> Result<(u32, u32)> {
    let root = Section::yaml(file, text)?;
    let Some(auth) = root.section("auth")? else { return Ok(OTP_DEFAULTS) };
    Ok((
        auth.number("otp_length", 1)?.unwrap_or(OTP_DEFAULTS.0),
        auth.number("otp_ttl_seconds", 1)?.unwrap_or(OTP_DEFAULTS.1),
    ))
}

/// Reads broker-allocation.json.
///
/// # Errors
/// [`ErrorKind::Config`] naming file, key and expectation.
pub fn parse_broker_allocation(file: &Path, text: &str) -> Result<Broker> {
    let root = Section::json(file, text)?;
    let key = if root.get("prefix").is_some() { "prefix" } else { "ipv6_prefix" };
    Ok(Broker {
        prefix: root.parsed(key, "an IPv6 prefix such as 2001:db8::/120", network6)?,
        gateway: root.parsed("gateway", "an IPv6 address", |text| text.parse().ok())?,
        dns_zone: root.parsed("dns_zone", "a DNS name", dns_name)?,
    })
}

/// Reads the pattern for wallet addresses from engine.json.
///
/// # Errors
/// [`ErrorKind::Config`] naming file, key and expectation.
pub fn parse_engine(file: &Path, text: &str) -> Result<Option<String>> {
    let root = Section::json(file, text)?;
    let Some(constraints) = root.section("constraints")? else { return Ok(None) };
    Ok(constraints.text("address_pattern")?.map(str::to_owned))
}

/// The text of a file, or `None` when there is none.
fn read(path: &Path) -> Result<Option<String>> {
    match fs::read(path) {
        Ok(bytes) => match String::from_utf8(bytes) {
            Ok(text) => Ok(Some(text)),
            Err(_) => Err(Error::new(ErrorKind::Config, format!("{} is not UTF-8", path.display()))),
        },
        Err(e) if matches!(e.kind(), Io::NotFound | Io::NotADirectory) => Ok(None),
        Err(e) => Err(Error::io("read", path, e)),
    }
}

fn config_file(dirs: &Directories, name: &str) -> Result<Option<(PathBuf, String)>> {
    for dir in &dirs.config {
        let path = dir.join(name);
        if let Some(text) = read(&path)? {
            return Ok(Some((path, text)));
        }
    }
    Ok(None)
}

const DEFAULT_BRIDGE: &str = "br0";

fn bridge_of_run(dirs: &Directories, warnings: &mut Vec<String>) -> String {
    let path = dirs.run.join("bridge");
    match read(&path) {
        Ok(None) => return DEFAULT_BRIDGE.to_owned(),
        Ok(Some(text)) => match interface(text.trim()) {
            Some(bridge) => return bridge,
            None => warnings.push(format!("{} names no network interface, using {DEFAULT_BRIDGE}", path.display())),
        },
        Err(e) => warnings.push(format!("{e}, using bridge {DEFAULT_BRIDGE}")),
    }
    DEFAULT_BRIDGE.to_owned()
}

/// The network mode, or in words why there is none.
fn network_mode(dirs: &Directories) -> Result<Result<String, String>> {
    let mut why = "no network mode is enabled".to_owned();
    if let Some(enabled) = dirs.find_config("network-modes.enabled") {
        let entries = fs::read_dir(&enabled).map_err(|e| Error::io("read directory", &enabled, e))?;
        let mut modes: Vec<String> = entries
            .flatten()
            .filter_map(|entry| Some(entry.file_name().to_str()?.strip_suffix(".json")?.to_owned()))
            .filter(|mode| !mode.is_empty() && !mode.starts_with('.'))
            .collect();
        modes.sort();
        match modes.as_slice() {
            [only] => return Ok(checked_mode(only, &enabled)),
            [] => why = format!("no mode is enabled in {}", enabled.display()),
            several => why = format!("several modes are enabled in {}: {}", enabled.display(), several.join(", ")),
        }
    }
    if let Some((path, text)) = config_file(dirs, "network-mode")? {
        let mut lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
        return Ok(match (lines.next(), lines.next()) {
            (Some(only), None) => checked_mode(only, &path),
            (None, _) => Err(format!("{why}, and {} is empty", path.display())),
            (Some(_), Some(_)) => Err(format!("{why}, and {} has more than one line", path.display())),
        });
    }
    Ok(Err(why))
}

fn checked_mode(mode: &str, source: &Path) -> Result<String, String> {
    let plain = mode.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'));
    if plain && mode.len() <= 64 {
        return Ok(mode.to_owned());
    }
    Err(format!("{:?} from {} is not a mode's name", mode.chars().take(64).collect::<String>(), source.display()))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;
    use std::io::Write;
    use std::process::{Command, Stdio};

    /// What PyYAML, with which the other programs read these files, makes of `text`.
    fn pyyaml(text: &str) -> Value {
        let script = "import json,sys,yaml; json.dump(yaml.safe_load(sys.stdin.read()), sys.stdout)";
        let mut python =
            Command::new("python3").args(["-c", script]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        python.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
        let output = python.wait_with_output().unwrap();
        assert!(output.status.success(), "PyYAML refuses {text}");
        serde_json::from_slice(&output.stdout).unwrap()
    }

    const DB: &str = r#"
# written by the installer
db_file: "/srv/bh/vms.json"
default_expiry_days: 14
gc_grace_days: '3'
bridge: vmbr0
storage_pool: fast       # a libvirt pool
storage_path: /srv/bh/vms
ip_pool:
  network: "10.9.0.0/16"
  start: "20"
  end: 10.9.0.30
  gateway: 10.9.0.1
ipv6_pool: {start: 5, end: "2001:db8::ff"}
libvirt:
  domain_type: qemu
  guest_ready_timeout_seconds: 60
  nameservers: [9.9.9.9, "2620:fe::fe"]
terraform_dir: /opt/x
"#;

    fn db(text: &str) -> Result<Db> {
        parse_db(Path::new("/etc/blockhost/db.yaml"), text)
    }

    fn refusal(text: &str) -> String {
        let error = db(text).unwrap_err();
        assert_eq!(error.kind, ErrorKind::Config);
        error.to_string()
    }

    #[test]
    fn yaml_means_what_pyyaml_takes_it_for() {
        let mut files = vec![
            DB.to_owned(),
            "auth:\n  otp_length: 8\n  otp_ttl_seconds: '120'\n".into(),
            "ipv6_pool:\n  prefix: \"2001:db8:1::/120\"\nip_pool: {network: 192.168.122.0/24, start: 200}\n".into(),
            "# nothing but a comment\n".into(),
            "a: 1\na: 2\n".into(),
            "base: &x {start: 1, end: 5}\nip_pool:\n  <<: *x\n  end: 9\n".into(),
            "---\na: \"x\\u00e4\\n\"\nb: 'it''s'\nc: |\n  x\n  y\nd: >\n  x\n  y\n...\n".into(),
            "\u{feff}a: 1\r\nb: 2\r\n".into(),
        ];
        // Where the two differ (y, n, 1e3, 1:30) none of our keys takes either reading: it is refused, not misread.
        for scalar in [
            "yes",
            "No",
            "on",
            "off",
            "true",
            "TRUE",
            "null",
            "~",
            "",
            "''",
            "\"200\"",
            "'1e3'",
            "'null'",
            "\"yes\"",
            "1",
            "0200",
            "0x1F",
            "0b11",
            "1_000",
            "+5",
            "-3",
            "1.5",
            ".5",
            "5.",
            "192.168.1.1",
            "10.0.0.0/24",
            "2001:db8::1",
            "fd00::/120",
            "::1",
            "br0",
            "0xZZ",
        ] {
            files.push(format!("k: {scalar}\n"));
        }
        for text in files {
            assert_eq!(yaml(&text).unwrap(), pyyaml(&text), "{text}");
        }
    }

    #[test]
    fn yaml_cannot_be_made_to_read_files_or_fill_the_memory() {
        let mut bomb = "a0: &a0 [x,x,x,x,x,x,x,x,x]\n".to_owned();
        for i in 1..12 {
            let line = vec![format!("*a{}", i - 1); 9].join(",");
            bomb.push_str(&format!("a{i}: &a{i} [{line}]\n"));
        }
        assert!(refusal(&bomb).starts_with("/etc/blockhost/db.yaml is not valid YAML: "));
        assert!(refusal(&"[".repeat(100_000)).starts_with("/etc/blockhost/db.yaml is not valid YAML: "));
        assert_eq!(db("storage_pool: !include /etc/hostname\n").unwrap_err().kind, ErrorKind::Config);
    }

    #[test]
    fn every_key_is_read_in_every_spelling() {
        let read = db(DB).unwrap();
        let expected = Db {
            db_file: "/srv/bh/vms.json".into(),
            default_expiry_days: 14,
            gc_grace_days: 3,
            bridge: Some("vmbr0".into()),
            storage_pool: "fast".into(),
            storage_path: "/srv/bh/vms".into(),
            ipv4_pool: Some(Ipv4Pool {
                network: Ipv4Addr::new(10, 9, 0, 0),
                prefix_len: 16,
                start: 20,
                end: 30,
                gateway: Some(Ipv4Addr::new(10, 9, 0, 1)),
            }),
            ipv6_range: (5, 255),
            libvirt: LibvirtSettings {
                domain_type: DomainType::Qemu,
                guest_ready_timeout_seconds: Some(60),
                nameservers: vec!["9.9.9.9".parse().unwrap(), "2620:fe::fe".parse().unwrap()],
                template_url: None,
                template_sha512: None,
            },
        };
        assert_eq!(read, expected);
    }

    #[test]
    fn every_key_is_optional() {
        for text in ["", "# x\n", "{}", "ip_pool:\nlibvirt:\n", "ipv6_pool: {prefix: 'x'}", "unknown: [1]\n"] {
            assert_eq!(db(text).unwrap(), Db::default(), "{text}");
        }
        assert_eq!(db("grace_days: 9").unwrap().gc_grace_days, 9);
        assert_eq!(db("grace_days: 9\ngc_grace_days: 4").unwrap().gc_grace_days, 4);
        let pool = db("ip_pool: {network: 192.168.122.77/24}").unwrap().ipv4_pool.unwrap();
        assert_eq!(
            (pool.network, pool.start, pool.end, pool.gateway),
            (Ipv4Addr::new(192, 168, 122, 0), 200, 250, None)
        );
    }

    #[test]
    fn a_wrong_value_names_file_key_and_expectation() {
        let file = "/etc/blockhost/db.yaml: ";
        for (text, expected) in [
            ("ip_pool: {start: [1]}", "ip_pool.start must be an integer or an address, not a list"),
            ("ip_pool: {start: 256}", "ip_pool.start must be an integer from 0 to 255 or an address, not 256"),
            ("ip_pool: {end: -1}", "ip_pool.end must be an integer from 0 to 255 or an address, not -1"),
            ("ip_pool: {end: soon}", "ip_pool.end must be an integer from 0 to 255 or an address, not \"soon\""),
            ("ip_pool: {start: 9, end: 8}", "ip_pool.start must not be beyond ip_pool.end, 9 is beyond 8"),
            (
                "ip_pool: {network: 10.0.0.0}",
                "ip_pool.network must be a network such as 192.168.122.0/24, not \"10.0.0.0\"",
            ),
            (
                "ip_pool: {network: 10.0.0.0/33}",
                "ip_pool.network must be a network such as 192.168.122.0/24, not \"10.0.0.0/33\"",
            ),
            ("ip_pool: {gateway: 5}", "ip_pool.gateway must be an IPv4 address, not 5"),
            ("ip_pool: 10.0.0.0/8", "ip_pool must be a mapping, not \"10.0.0.0/8\""),
            ("default_expiry_days: true", "default_expiry_days must be an integer from 0 on, not a boolean"),
            ("grace_days: -1", "grace_days must be an integer from 0 on, not -1"),
            ("bridge: br0/../x", "bridge must be the name of a network interface, not \"br0/../x\""),
            ("bridge: [br0]", "bridge must be the name of a network interface, not a list"),
            ("storage_path: vms", "storage_path must be an absolute path, not \"vms\""),
            ("db_file: 5", "db_file must be a text, not 5"),
            ("libvirt: {domain_type: xen}", "libvirt.domain_type must be auto, kvm or qemu, not \"xen\""),
            ("libvirt: {nameservers: 9.9.9.9}", "libvirt.nameservers must be a list of IP addresses, not \"9.9.9.9\""),
            (
                "libvirt: {nameservers: [dns.example]}",
                "libvirt.nameservers must be a list of IP addresses, not \"dns.example\"",
            ),
            (
                "libvirt: {guest_ready_timeout_seconds: 0}",
                "libvirt.guest_ready_timeout_seconds must be an integer from 1 on, not 0",
            ),
            ("libvirt: {template_sha512: abc}", "libvirt.template_sha512 must be 128 hex digits, not \"abc\""),
            ("- a", "the file must be a mapping, not a list"),
        ] {
            assert_eq!(refusal(text), format!("{file}{expected}"));
        }
        assert!(refusal("a: [").starts_with("/etc/blockhost/db.yaml is not valid YAML: "));
        assert!(!refusal("a: [\n").contains('\n'));
    }

    #[test]
    fn the_other_files_are_read_too() {
        let file = Path::new("f");
        assert_eq!(parse_web3_defaults(file, "auth: {otp_length: 8, other: 1}").unwrap(), (8, 300));
        assert_eq!(parse_web3_defaults(file, "chain: x").unwrap(), (6, 300));
        assert_eq!(
            parse_web3_defaults(file, "auth: {otp_length: 0}").unwrap_err().to_string(),
            "f: auth.otp_length must be an integer from 1 on, not 0"
        );
        let broker =
            parse_broker_allocation(file, r#"{"ipv6_prefix":"2001:DB8::5/120","dns_zone":"vm.Example.","x":1}"#)
                .unwrap();
        assert_eq!(broker.prefix, Some(("2001:db8::".parse().unwrap(), 120)));
        assert_eq!((broker.gateway, broker.dns_zone.as_deref()), (None, Some("vm.example")));
        let newer = r#"{"prefix":"fd01::/64","ipv6_prefix":"fd02::/64","gateway":"fe80::1","dns_zone":null}"#;
        let broker = parse_broker_allocation(file, newer).unwrap();
        assert_eq!(broker.prefix.unwrap().0, "fd01::".parse::<Ipv6Addr>().unwrap());
        assert_eq!(broker.gateway, Some("fe80::1".parse().unwrap()));
        assert!(
            parse_broker_allocation(file, r#"{"prefix":"x"}"#).unwrap_err().to_string().contains("f: prefix must be")
        );
        assert!(parse_broker_allocation(file, r#"{"dns_zone":"a b"}"#).is_err());
        assert_eq!(parse_engine(file, r#"{"constraints":{"address_pattern":"^0x"}}"#).unwrap().as_deref(), Some("^0x"));
        assert_eq!(parse_engine(file, r#"{"name":"evm"}"#).unwrap(), None);
    }

    struct Host {
        _root: tempfile::TempDir,
        dirs: Directories,
    }

    fn host(files: &[(&str, &str)]) -> Host {
        let root = tempfile::tempdir().unwrap();
        let at = |name: &str| root.path().join(name);
        let dirs = Directories {
            config: vec![at("etc"), at("config")],
            state: at("state"),
            run: at("run"),
            share: at("share"),
        };
        for (name, text) in files {
            fs::create_dir_all(at(name).parent().unwrap()).unwrap();
            fs::write(at(name), text).unwrap();
        }
        Host { _root: root, dirs }
    }

    #[test]
    fn a_host_without_any_file_has_the_defaults_and_says_what_is_missing() {
        let settings = Settings::load(&host(&[]).dirs).unwrap();
        assert_eq!(settings.bridge, "br0");
        assert_eq!(settings.otp, Ok(OtpSettings { length: 6, ttl_seconds: 300 }));
        assert_eq!(settings.broker, Ok(BrokerSettings::default()));
        assert_eq!(settings.require_ipv4_pool().unwrap_err().kind, ErrorKind::Config);
        let error = settings.require_network_mode().unwrap_err();
        assert_eq!(error.to_string(), "cannot tell the network mode: no network mode is enabled");
        assert!(settings.warnings.is_empty());
    }

    /// Stopping a VM must not depend on the digits of a password.
    #[test]
    fn a_fault_in_a_file_that_only_create_needs_is_kept_for_create() {
        let host = host(&[
            ("etc/web3-defaults.yaml", "auth: {otp_length: six}"),
            ("etc/broker-allocation.json", "{"),
            ("etc/network-modes.enabled", "no directory"),
        ]);
        let settings = Settings::load(&host.dirs).unwrap();
        assert!(settings.require_otp().unwrap_err().message.contains("auth.otp_length"));
        assert!(settings.require_broker().unwrap_err().message.contains("broker-allocation.json"));
        assert!(settings.require_network_mode().unwrap_err().message.contains("network-modes.enabled"));
    }

    #[test]
    fn the_first_directory_with_a_file_wins() {
        let host = host(&[("config/db.yaml", "bridge: b2\n"), ("config/web3-defaults.yaml", "auth: {otp_length: 9}")]);
        assert_eq!(Settings::load(&host.dirs).unwrap().bridge, "b2");
        fs::create_dir_all(&host.dirs.config[0]).unwrap();
        fs::write(host.dirs.config[0].join("db.yaml"), "bridge: b1\n").unwrap();
        let settings = Settings::load(&host.dirs).unwrap();
        assert_eq!((settings.bridge.as_str(), settings.require_otp().unwrap().length), ("b1", 9));
    }

    #[test]
    fn the_bridge_is_that_of_the_run_directory_unless_configured() {
        assert_eq!(Settings::load(&host(&[("run/bridge", "vmbr0\n")]).dirs).unwrap().bridge, "vmbr0");
        let both = host(&[("run/bridge", "vmbr0\n"), ("etc/db.yaml", "bridge: br7")]);
        assert_eq!(Settings::load(&both.dirs).unwrap().bridge, "br7");
        let settings = Settings::load(&host(&[("run/bridge", "../x")]).dirs).unwrap();
        assert_eq!((settings.bridge.as_str(), settings.warnings.len()), ("br0", 1));
    }

    #[test]
    fn the_network_mode_is_the_one_enabled_or_else_the_one_line() {
        let mode = |files: &[(&str, &str)]| Settings::load(&host(files).dirs).unwrap().network_mode;
        let (a, b) = (("etc/network-modes.enabled/broker.json", "{}"), ("etc/network-modes.enabled/manual.json", "{}"));
        let line = ("etc/network-mode", "onion\n");
        assert_eq!(mode(&[a]).unwrap(), "broker");
        assert_eq!(mode(&[a, line, ("etc/network-modes.enabled/README", "")]).unwrap(), "broker");
        assert_eq!(mode(&[a, b, line]).unwrap(), "onion");
        assert_eq!(mode(&[line]).unwrap(), "onion");
        assert!(mode(&[a, b]).unwrap_err().contains("broker, manual"));
        assert!(mode(&[("etc/network-mode", "\n")]).unwrap_err().contains("empty"));
        assert!(mode(&[("etc/network-mode", "a\nb\n")]).unwrap_err().contains("more than one line"));
        assert!(mode(&[("etc/network-mode", "a: b\n")]).unwrap_err().contains("not a mode's name"));
    }

    #[test]
    fn a_wallet_the_engine_does_not_know_is_worth_a_warning_and_so_is_a_bad_pattern() {
        let wallet = WalletAddress::new("0xAB").unwrap();
        let warning = |pattern: &str| {
            let json = json!({"constraints": {"address_pattern": pattern}}).to_string();
            Settings::load(&host(&[("share/engine.json", &json)]).dirs).unwrap().address_warning(&wallet)
        };
        assert_eq!(warning("^0x[0-9a-fA-F]+$"), None);
        assert!(warning("^9[a-z]+$").unwrap().contains("does not match"));
        assert!(warning("[").unwrap().contains("unusable"));
        let settings = Settings::load(&host(&[("share/engine.json", "not json")]).dirs).unwrap();
        assert_eq!((settings.address_warning(&wallet), settings.warnings.len()), (None, 1));
    }

    #[test]
    fn ipv6_needs_an_allocation_and_the_mock_has_one() {
        let files = [
            ("etc/db.yaml", "ipv6_pool: {start: 1, end: 4}"),
            ("etc/broker-allocation.json", r#"{"prefix":"2001:db8::/125"}"#),
        ];
        let settings = Settings::load(&host(&files).dirs).unwrap();
        let pool = settings.require_broker().unwrap().ipv6_pool.clone().unwrap();
        let texts: Vec<_> = pool.candidates().map(|a| a.to_string()).collect();
        assert_eq!(texts, ["2001:db8::2", "2001:db8::3", "2001:db8::4"]);
        let mock = settings.mock();
        assert_eq!(mock.require_ipv4_pool().unwrap().to_string(), "192.168.122.0/24 .200 to .250");
        let pool = mock.broker.unwrap().ipv6_pool.unwrap();
        assert_eq!(
            (pool.to_string().as_str(), pool.candidates().next()),
            ("fd00::/120 +1 to +4", "fd00::2".parse().ok())
        );
    }

    #[test]
    fn candidates_lie_in_the_network_and_are_nobody_elses() {
        let pool = |network: &str, start, end, gateway: Option<&str>| {
            let (network, prefix_len) = network4(network).unwrap();
            Ipv4Pool { network, prefix_len, start, end, gateway: gateway.map(|g| g.parse().unwrap()) }
                .candidates()
                .map(|a| a.to_string())
                .collect::<Vec<_>>()
        };
        assert_eq!(pool("10.0.0.0/24", 0, 2, Some("10.0.0.1")), ["10.0.0.2"]);
        assert_eq!(pool("10.0.0.0/24", 254, 255, None), ["10.0.0.254"]);
        assert_eq!(pool("10.1.0.0/16", 255, 255, None), ["10.1.0.255"]);
        assert_eq!(pool("10.0.0.128/30", 100, 140, None), ["10.0.0.129", "10.0.0.130"]);
        assert!(pool("10.0.0.128/25", 2, 100, None).is_empty());
        assert_eq!(pool("10.0.0.8/31", 0, 255, None), ["10.0.0.8", "10.0.0.9"]);
        assert_eq!(pool("0.0.0.0/0", 1, 1, None), ["0.0.0.1"]);
    }

    proptest! {
        #[test]
        fn candidates_of_any_pool_are_inside_it_and_distinct(bits: u32, len in 0u8..=32, a: u8, b: u8, base: u128, len6 in 0u8..=128, offset in 0u64..1000) {
            let network = Ipv4Addr::from(bits & mask4(len));
            let pool = Ipv4Pool { network, prefix_len: len, start: a.min(b), end: a.max(b), gateway: None };
            let all: Vec<_> = pool.candidates().collect();
            prop_assert!(all.windows(2).all(|pair| pair[0] < pair[1]));
            prop_assert!(all.iter().all(|c| u32::from(*c) & mask4(len) == u32::from(network)));
            prop_assert!(all.iter().all(|c| (pool.start..=pool.end).contains(&c.octets()[3])));
            let prefix = Ipv6Addr::from(base & mask6(len6));
            let pool = Ipv6Pool { prefix, prefix_len: len6, start: offset, end: u64::MAX, gateway: None };
            let all: Vec<_> = pool.candidates().take(20).collect();
            prop_assert!(all.windows(2).all(|pair| pair[0] < pair[1]));
            prop_assert!(all.iter().all(|c| u128::from(*c) & mask6(len6) == u128::from(prefix) && *c != pool.router() && *c != prefix));
            prop_assert!(all.iter().all(|c| pool.contains(*c)));
            let outside = [prefix, pool.router(), Ipv6Addr::from(u128::from(prefix).wrapping_sub(1))];
            prop_assert!(outside.iter().all(|c| !pool.contains(*c)));
        }

        #[test]
        fn no_text_makes_parsing_panic(text in "\\PC{0,120}|[a-z:{}\\[\\]&*!|>'\"#\n -]{0,120}", key in "ip_pool|libvirt|bridge|grace_days|auth", noise: Vec<u8>) {
            let file = Path::new("f");
            for text in [text.clone(), format!("{key}: {text}"), format!("{key}:\n  start: {text}"), String::from_utf8_lossy(&noise).into_owned()] {
                let _ = parse_db(file, &text);
                let _ = parse_web3_defaults(file, &text);
                let _ = parse_broker_allocation(file, &text);
                let _ = parse_engine(file, &text);
            }
        }
    }
}
