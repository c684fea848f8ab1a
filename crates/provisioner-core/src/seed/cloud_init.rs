//! The user-data: the base package's template with this VM's values, or a file given by the caller.
//!
//! Nothing is added to either. No value can end a quoted YAML string or a line, because of the types it comes from; the
//! characters that can occur are
//!
//! | variable | characters |
//! |---|---|
//! | `VM_NAME`, `VM_FQDN`, `SIGNING_DOMAIN` | `A-Z a-z 0-9 . _ -` |
//! | `VM_IP`, `VM_IPV6` | `0-9 a-f . :` |
//! | `SIGNING_HOST` | all of those, and `[ ]` around an IPv6 address |
//! | `USERNAME` | `a-z 0-9 _ -` |
//! | `NFT_TOKEN_ID`, `WALLET_ADDRESS` | `A-Z a-z 0-9 _` |
//! | `OTP_LENGTH`, `OTP_TTL` | `0-9` |
//! | `SECRET_KEY` | `0-9 a-f` |
//! | `SSH_KEYS` | always empty |
//!
//! A template must still quote: unquoted, a VM called `1e3` or `true` is a number or a truth value, an id a number, and
//! `[fd00::2]` a list.

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::Read;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use provisioner_contract::{LoginName, NftId, VmName, WalletAddress};

use super::substitute::safe_substitute;
use crate::paths::Directories;
use crate::{Error, ErrorKind, Result};

/// The template every VM is made from.
pub const TEMPLATE: &str = "nft-auth.yaml";

/// The largest template or user-data file, in bytes. Real ones have a few KiB; the limit keeps a wrong file name from
/// becoming a huge seed.
pub const MAX_USER_DATA: usize = 1 << 20;

/// The key of a VM's one-time passwords: 64 lower-case hex digits. Never shown by `Debug`.
#[derive(Clone, PartialEq, Eq)]
pub struct SecretKey(String);

impl SecretKey {
    /// A new one, from the kernel's random numbers.
    ///
    /// # Errors
    /// [`ErrorKind::Io`] when the kernel gives none.
    pub fn random() -> Result<Self> {
        let mut bytes = [0; 32];
        getrandom::fill(&mut bytes)
            .map_err(|source| Error::new(ErrorKind::Io, "cannot get random numbers from the kernel").because(source))?;
        Ok(Self(bytes.iter().map(|byte| format!("{byte:02x}")).collect()))
    }

    /// The digits.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for SecretKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SecretKey(..)")
    }
}

/// What a template is filled in with.
#[derive(Debug, Clone)]
pub struct Guest<'a> {
    /// The VM's name.
    pub name: &'a VmName,
    /// Its IPv4 address.
    pub ipv4: Ipv4Addr,
    /// Its IPv6 address, if the host has a prefix.
    pub ipv6: Option<Ipv6Addr>,
    /// The login user.
    pub username: &'a LoginName,
    /// The owner's wallet.
    pub wallet: &'a WalletAddress,
    /// The NFT, when it is known already; `NFT_TOKEN_ID` is empty otherwise.
    pub nft: Option<&'a NftId>,
    /// Digits of a one-time password.
    pub otp_length: u32,
    /// How long one is valid, in seconds.
    pub otp_ttl_seconds: u64,
    /// The zone in which the broker names VMs.
    pub dns_zone: Option<&'a str>,
    /// The key of the one-time passwords.
    pub secret_key: &'a SecretKey,
}

impl Guest<'_> {
    /// `template` with this VM's values.
    ///
    /// # Errors
    /// [`ErrorKind::Config`] when `dns_zone` is no domain name.
    pub fn render(&self, template: &str) -> Result<String> {
        let signing_domain = match (self.ipv6, self.dns_zone) {
            (Some(ipv6), Some(zone)) => Some(signing_domain(ipv6, zone)?),
            _ => None,
        };
        let ip = self.ipv4.to_string();
        let ipv6 = self.ipv6.map(|ipv6| ipv6.to_string()).unwrap_or_default();
        let signing_host = match (&signing_domain, self.ipv6) {
            (Some(domain), _) => domain.clone(),
            (None, Some(_)) => format!("[{ipv6}]"),
            (None, None) => ip.clone(),
        };
        let fqdn = signing_domain.clone().unwrap_or_else(|| format!("{}.local", self.name));
        let (otp_length, otp_ttl) = (self.otp_length.to_string(), self.otp_ttl_seconds.to_string());
        Ok(safe_substitute(template, |name| {
            Some(match name {
                "VM_NAME" => self.name.as_str(),
                "VM_FQDN" => &fqdn,
                "VM_IP" => &ip,
                "VM_IPV6" => &ipv6,
                "SIGNING_HOST" => &signing_host,
                "SIGNING_DOMAIN" => signing_domain.as_deref().unwrap_or(""),
                "USERNAME" => self.username.as_str(),
                "NFT_TOKEN_ID" => self.nft.map_or("", NftId::as_str),
                "WALLET_ADDRESS" => self.wallet.as_str(),
                "OTP_LENGTH" => &otp_length,
                "OTP_TTL" => &otp_ttl,
                "SECRET_KEY" => self.secret_key.as_str(),
                "SSH_KEYS" => "",
                _ => return None,
            })
        }))
    }
}

/// The name the broker gives the VM: the low 64 bits of `ipv6` in hex, without leading zeros (the number as it is
/// usually written, `2` for `fd00::2`), then `zone`.
///
/// # Errors
/// [`ErrorKind::Config`] when `zone` is no domain name. A dot at its end is dropped.
pub fn signing_domain(ipv6: Ipv6Addr, zone: &str) -> Result<String> {
    let labels = zone.strip_suffix('.').unwrap_or(zone);
    let valid = |label: &str| {
        (1..=63).contains(&label.len()) && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
    };
    // 253 is the longest domain name, 16 digits and a dot come first.
    if labels.len() > 253 - 17 || !labels.split('.').all(valid) {
        return Err(Error::new(ErrorKind::Config, format!("the broker's dns_zone {zone:?} is not a domain name"))
            .hint("correct `dns_zone` in broker-allocation.json"));
    }
    Ok(format!("{:x}.{labels}", u128::from(ipv6) as u64))
}

/// Where templates are searched, in this order.
#[must_use]
pub fn template_dirs(directories: &Directories) -> Vec<PathBuf> {
    vec![directories.share.join("cloud-init/templates"), "cloud-init/templates".into()]
}

/// The text of the first [`TEMPLATE`] along `dirs`.
///
/// # Errors
/// [`ErrorKind::Config`] when there is none, or the first one is not a readable regular file of UTF-8 text of at most
/// [`MAX_USER_DATA`] bytes.
pub fn read_template(dirs: &[PathBuf]) -> Result<String> {
    let Some(path) = dirs.iter().map(|dir| dir.join(TEMPLATE)).find(|path| path.exists()) else {
        let dirs: Vec<_> = dirs.iter().map(|dir| dir.display().to_string()).collect();
        return Err(Error::new(
            ErrorKind::Config,
            format!("there is no cloud-init template {TEMPLATE} in {}", dirs.join(" or ")),
        )
        .hint("install BlockHost's base package, or give a file with --cloud-init-content"));
    };
    let bytes = read_capped(&path, ErrorKind::Config)?;
    String::from_utf8(bytes).map_err(|source| {
        Error::new(ErrorKind::Config, format!("the template {} is not UTF-8 text", path.display())).because(source)
    })
}

/// The bytes of a user-data file the caller names.
///
/// # Errors
/// [`ErrorKind::Invalid`] when it is not a readable regular file, or has more than [`MAX_USER_DATA`] bytes.
pub fn read_user_data(path: &Path) -> Result<Vec<u8>> {
    read_capped(path, ErrorKind::Invalid)
}

fn read_capped(path: &Path, kind: ErrorKind) -> Result<Vec<u8>> {
    let cannot = |source| Error::new(kind, format!("cannot read {}", path.display())).because(source);
    // Opening a FIFO would wait for its other end.
    let flags = nix::fcntl::OFlag::O_NONBLOCK.bits();
    let file: File = OpenOptions::new().read(true).custom_flags(flags).open(path).map_err(cannot)?;
    if !file.metadata().map_err(cannot)?.is_file() {
        return Err(Error::new(kind, format!("{} is not a regular file", path.display())));
    }
    let mut bytes = Vec::new();
    file.take(MAX_USER_DATA as u64 + 1).read_to_end(&mut bytes).map_err(cannot)?;
    if bytes.len() > MAX_USER_DATA {
        return Err(Error::new(kind, format!("{} has more than {MAX_USER_DATA} bytes", path.display()))
            .hint("user-data of a VM has a few KiB; is this the right file?"));
    }
    Ok(bytes)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::fs;
    use std::process::Command;

    use super::*;

    const TEST_TEMPLATE: &str = include_str!("../../../../tests/data/cloud-init/nft-auth.yaml");

    fn render(name: &str, ipv6: Option<&str>, zone: Option<&str>, nft: Option<&str>, template: &str) -> String {
        Guest {
            name: &VmName::new(name).unwrap(),
            ipv4: "192.168.122.200".parse().unwrap(),
            ipv6: ipv6.map(|a| a.parse().unwrap()),
            username: &LoginName::new("admin").unwrap(),
            wallet: &WalletAddress::new("0x52908400098527886E0F7030069857D2E4169EE7").unwrap(),
            nft: nft.map(|id| NftId::new(id).unwrap()).as_ref(),
            otp_length: 6,
            otp_ttl_seconds: 300,
            dns_zone: zone,
            secret_key: &SecretKey("ab".repeat(32)),
        }
        .render(template)
        .unwrap()
    }

    #[test]
    fn every_variable_has_its_value() {
        let template = "$VM_NAME|$VM_FQDN|$VM_IP|$VM_IPV6|$SIGNING_HOST|$SIGNING_DOMAIN|$USERNAME|$NFT_TOKEN_ID|\
                        $WALLET_ADDRESS|$OTP_LENGTH|$OTP_TTL|$SECRET_KEY|<$SSH_KEYS>|$OTHER|$$1";
        let key = "ab".repeat(32);
        let tail = format!("0x52908400098527886E0F7030069857D2E4169EE7|6|300|{key}|<>|$OTHER|$1");
        let v4 = "web1|web1.local|192.168.122.200||192.168.122.200||admin||";
        assert_eq!(render("web1", None, None, None, template), format!("{v4}{tail}"));
        assert_eq!(render("web1", None, Some("vm.example"), None, template), format!("{v4}{tail}"));
        let v6 = "web1|web1.local|192.168.122.200|fd00::2|[fd00::2]||admin|12|";
        assert_eq!(render("web1", Some("fd00::2"), None, Some("12"), template), format!("{v6}{tail}"));
        let named = "web1|2.vm.example|192.168.122.200|fd00::2|2.vm.example|2.vm.example|admin|12|";
        assert_eq!(render("web1", Some("fd00::2"), Some("vm.example"), Some("12"), template), format!("{named}{tail}"));
    }

    #[test]
    fn signing_domain_is_the_low_half() {
        let domain = |ipv6: &str, zone| signing_domain(ipv6.parse().unwrap(), zone);
        assert_eq!(domain("2001:db8::aa:0:0:1", "z.example").unwrap(), "aa000000000001.z.example");
        assert_eq!(domain("2001:db8:ffff:ffff:abcd::", "z.example.").unwrap(), "abcd000000000000.z.example");
        assert_eq!(domain("2001:db8::", "z").unwrap(), "0.z");
        for zone in ["", ".", ".a", "a..b", "a b", "a\n", "a\"", "ü", &"x".repeat(64), &"x.".repeat(130)] {
            assert_eq!(domain("fd00::2", zone).unwrap_err().kind, ErrorKind::Config, "{zone:?}");
        }
    }

    #[test]
    fn secret_keys_are_random_hex_and_not_shown() {
        let (a, b) = (SecretKey::random().unwrap(), SecretKey::random().unwrap());
        assert!(a.as_str().len() == 64 && a.as_str().bytes().all(|c| matches!(c, b'0'..=b'9' | b'a'..=b'f')));
        assert_ne!(a, b);
        assert!(!format!("{a:?}").contains(&a.as_str()[..4]));
    }

    #[test]
    fn the_first_template_wins_and_none_is_a_setting_error() {
        let dir = tempfile::tempdir().unwrap();
        let dirs = [dir.path().join("a"), dir.path().join("b")];
        let missing = read_template(&dirs).unwrap_err();
        assert_eq!(missing.kind, ErrorKind::Config);
        assert!(missing.message.contains("/a or ") && missing.hint.is_some(), "{missing}");
        for dir in dirs.iter().rev() {
            fs::create_dir(dir).unwrap();
            fs::write(dir.join(TEMPLATE), dir.file_name().unwrap().as_encoded_bytes()).unwrap();
            assert_eq!(read_template(&dirs).unwrap(), dir.file_name().unwrap().to_str().unwrap());
        }
        fs::write(dirs[0].join(TEMPLATE), [0xff]).unwrap();
        assert!(read_template(&dirs).unwrap_err().message.contains("UTF-8"));
    }

    #[test]
    fn user_data_files_come_back_byte_for_byte_within_the_limit() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("user");
        let bytes: Vec<u8> = (0..MAX_USER_DATA).map(|i| i as u8).collect();
        fs::write(&path, &bytes).unwrap();
        assert!(read_user_data(&path).unwrap() == bytes);
        fs::write(&path, [&bytes[..], b"x"].concat()).unwrap();
        assert_eq!(read_user_data(&path).unwrap_err().kind, ErrorKind::Invalid);
        let fifo = dir.path().join("fifo");
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
        for path in [dir.path(), &fifo, Path::new("/dev/zero")] {
            assert!(read_user_data(path).unwrap_err().message.contains("not a regular file"), "{}", path.display());
        }
        assert_eq!(read_user_data(&dir.path().join("none")).unwrap_err().kind, ErrorKind::Invalid);
    }

    /// The names that YAML would take for something else stay text in a template that quotes.
    #[test]
    fn the_test_template_survives_odd_names() {
        for (name, ipv6) in [("123", None), ("1e3", Some("fd00::2")), ("true", None), ("null", None), ("a.b_c-", None)]
        {
            let text = render(name, ipv6, None, Some("077"), TEST_TEMPLATE);
            let check = "import sys, yaml; d = yaml.safe_load(sys.stdin.read())\n\
                         assert d['hostname'] == sys.argv[1] and d['fqdn'] == sys.argv[1] + '.local', d\n\
                         assert d['users'][0]['name'] == 'admin' and d['users'][0]['gecos'].endswith(',nft=077'), d\n\
                         assert 'ab' * 32 in d['write_files'][0]['content'], d\n\
                         assert '$$' not in str(d) and '${HOME:-/root}' in d['runcmd'][0][2], d";
            let file = tempfile::NamedTempFile::new().unwrap();
            fs::write(&file, &text).unwrap();
            let output = Command::new("/usr/bin/python3")
                .args(["-c", check, name])
                .stdin(File::open(&file).unwrap())
                .output()
                .unwrap();
            assert!(output.status.success(), "{text}\n{}", String::from_utf8_lossy(&output.stderr));
        }
    }
}
