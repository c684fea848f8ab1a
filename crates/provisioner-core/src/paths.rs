//! Where the suite's files are. The defaults are the host's; tests and packaging checks move them.

use std::path::PathBuf;

/// The four directories everything else is derived from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Directories {
    /// Configuration, searched in this order: `/etc/blockhost`, then `./config`.
    pub config: Vec<PathBuf>,
    /// State that outlives a reboot: `/var/lib/blockhost`.
    pub state: PathBuf,
    /// State that does not: `/run/blockhost`. May be read-only or absent.
    pub run: PathBuf,
    /// What packages install: `/usr/share/blockhost`.
    pub share: PathBuf,
}

impl Default for Directories {
    fn default() -> Self {
        Self {
            config: vec!["/etc/blockhost".into(), "config".into()],
            state: "/var/lib/blockhost".into(),
            run: "/run/blockhost".into(),
            share: "/usr/share/blockhost".into(),
        }
    }
}

impl Directories {
    /// Base images; `blockhost-base.qcow2` in it names the current one.
    #[must_use]
    pub fn templates(&self) -> PathBuf {
        self.state.join("templates")
    }

    /// The `.deb` files every template must contain.
    #[must_use]
    pub fn template_packages(&self) -> PathBuf {
        self.state.join("template-packages")
    }

    /// One lock file per VM that is being worked on.
    #[must_use]
    pub fn locks(&self) -> PathBuf {
        self.state.join("locks")
    }

    /// One intent journal per VM whose create or destroy is under way, or was when its process died.
    #[must_use]
    pub fn journal(&self) -> PathBuf {
        self.state.join("journal")
    }

    /// One [tombstone](crate::tombstone) per VM that was destroyed, or whose create was undone, in the last weeks.
    #[must_use]
    pub fn tombstones(&self) -> PathBuf {
        self.state.join("destroyed")
    }

    /// Whether hardware virtualisation was found to work.
    #[must_use]
    pub fn kvm_answer(&self) -> PathBuf {
        self.state.join("kvm.json")
    }

    /// The first existing file called `name` along the configuration search path.
    #[must_use]
    pub fn find_config(&self, name: &str) -> Option<PathBuf> {
        self.config.iter().map(|dir| dir.join(name)).find(|path| path.exists())
    }

    /// The sample cache of one VM, left by earlier provisioners.
    #[must_use]
    pub fn metrics(&self) -> PathBuf {
        self.state.join("metrics")
    }

    /// Seeds of the earlier Python provisioner, a directory per VM.
    #[must_use]
    pub fn legacy_seeds(&self) -> PathBuf {
        self.state.join("cloud-init")
    }
}
