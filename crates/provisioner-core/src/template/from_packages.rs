//! Makes an image from Debian packages alone: for machines that reach a package mirror and nothing else.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use super::{Maker, Stage, apt, disk, packages, readable, run_customise};
use crate::cancel::Cancel;
use crate::child;
use crate::progress::Progress;
use crate::{Error, ErrorKind, Result};

/// What mmdebstrap installs; the rest is the customise script's.
const PACKAGES: &str = "apt,linux-image-cloud-amd64,initramfs-tools,systemd-sysv,dbus,udev,kmod,e2fsprogs,fdisk,\
    cloud-init,cloud-guest-utils,netplan.io,systemd-resolved,qemu-guest-agent,openssh-server,sudo,curl,ca-certificates,\
    debian-archive-keyring,iproute2,iputils-ping,less,nano,procps";
/// The smallest disk: a template larger than a small VM's disk would keep that VM from being made.
const SMALLEST_DISK: u64 = 3 << 30;
const LABEL: &str = "blockhost-root";

/// Run by mmdebstrap with the tree as its argument: takes the work directory in and runs the customise script there.
const HOOK: &str = r#"#!/bin/sh
set -eu
root=$1
inside=/var/tmp/blockhost-build
cp -R "$BLOCKHOST_WORK" "$root$inside"
# The tree may have a resolver of its own by now, which does not run.
rm -f "$root/etc/resolv.conf"
[ ! -f /etc/resolv.conf ] || cp -L /etc/resolv.conf "$root/etc/resolv.conf"
exec chroot "$root" /bin/sh "$inside/customise.sh" "$inside"
"#;

/// See the module.
pub(super) struct FromPackages {
    suite: String,
    sources: Vec<String>,
}

impl FromPackages {
    /// A maker for a Debian release.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] for something that cannot be a release's name.
    pub fn new(suite: &str) -> Result<Self> {
        if suite.is_empty() || !suite.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit()) {
            return Err(Error::new(ErrorKind::Invalid, format!("{suite:?} is not the code name of a Debian release")));
        }
        Ok(Self { suite: suite.to_owned(), sources: Vec::new() })
    }
}

impl Maker for FromPackages {
    fn identity(&mut self, _progress: &dyn Progress, cancel: &Cancel) -> Result<String> {
        child::require(&[
            ("mmdebstrap", "mmdebstrap"),
            ("dpkg-deb", "dpkg"),
            ("apt-get", "apt"),
            ("setpriv", "util-linux"),
            ("unshare", "util-linux"),
        ])?;
        disk::check_tools()?;
        self.sources = apt::host_sources(&self.suite, cancel)?;
        Ok(format!("packages {PACKAGES} from {}", self.sources.join(", ")))
    }

    fn space(&self) -> u64 {
        // The tree, the raw disk and the image, 600 to 700 MiB each, and the packages that are downloaded.
        3 << 30
    }

    fn make(&mut self, stage: &Stage, progress: &dyn Progress, cancel: &Cancel) -> Result<BTreeMap<String, String>> {
        let write = |path: &Path, text: &str| fs::write(path, text).map_err(|error| Error::io("write", path, error));
        let root = stage.directory.join("root");
        let hook = stage.directory.join("hook");
        write(&hook, HOOK)?;
        fs::set_permissions(&hook, fs::Permissions::from_mode(0o755))
            .map_err(|error| Error::io("write", &hook, error))?;
        readable(stage.work)?;
        let proxy = apt::proxy_settings(cancel)?;
        let proxy_file = stage.directory.join("apt-proxy.conf");
        progress.phase("installing Debian from packages");
        let mut command = child::contained("mmdebstrap");
        command
            .args(["--mode=root", "--variant=minbase", "--architectures=amd64"])
            .arg(format!("--include={PACKAGES}"))
            // The script has done it, with apt inside the tree; mmdebstrap would do it with the host's.
            .arg("--skip=cleanup/apt")
            // Translations of programs' messages, a tenth of the image.
            .args([
                "--dpkgopt=path-exclude=/usr/share/locale/*",
                "--dpkgopt=path-include=/usr/share/locale/locale.alias",
            ])
            .arg("--customize-hook=\"$BLOCKHOST_HOOK\" \"$1\"")
            .env("BLOCKHOST_HOOK", &hook)
            .env("BLOCKHOST_WORK", stage.work)
            .env("TMPDIR", stage.directory);
        if !proxy.is_empty() {
            write(&proxy_file, &proxy)?;
            command.arg(format!("--aptopt={}", proxy_file.display()));
        }
        command.arg(&self.suite).arg(&root).args(&self.sources);
        run_customise(&mut command, "cannot install Debian from packages", progress, cancel)?;

        progress.phase("assembling the disk");
        let status_path = root.join("var/lib/dpkg/status");
        let status = fs::read_to_string(&status_path).map_err(|error| Error::io("read", &status_path, error))?;
        let uuid = disk::random_uuid()?;
        write(&root.join("etc/fstab"), &format!("UUID={uuid} / ext4 discard,errors=remount-ro 0 1\n"))?;
        let plan = disk::DiskPlan {
            // Room to install a few packages even on the smallest disk.
            size: SMALLEST_DISK.max(tree_size(&root)? * 13 / 10 + (512 << 20)),
            label: LABEL.to_owned(),
            uuid,
            command_line: "console=tty0 console=ttyS0,115200".to_owned(),
            menu_seconds: 1,
        };
        disk::assemble(&root, stage.image, stage.directory, &plan, cancel)?;
        Ok(packages::installed(&status))
    }
}

/// Space the files of a tree take, in bytes.
fn tree_size(root: &Path) -> Result<u64> {
    use std::os::unix::fs::MetadataExt;
    let mut total = 0;
    let mut pending = vec![root.to_owned()];
    while let Some(directory) = pending.pop() {
        let entries = fs::read_dir(&directory).map_err(|error| Error::io("list", &directory, error))?;
        for entry in entries {
            let entry = entry.map_err(|error| Error::io("list", &directory, error))?;
            let meta = entry.metadata().map_err(|error| Error::io("examine", &entry.path(), error))?;
            total += meta.blocks() * 512;
            if meta.is_dir() {
                pending.push(entry.path());
            }
        }
    }
    Ok(total)
}
