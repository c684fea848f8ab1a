//! The manifest by which the rest of BlockHost finds a provisioner: `/usr/share/blockhost/provisioner.json`. Its presence makes
//! this provisioner the active one.

use std::collections::BTreeMap;

use serde::Deserialize;

/// The whole file. Its readers are written in four languages, some of them strict: nothing else may be in it.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// Which provisioner this is; also the id of the wizard's step.
    pub name: String,
    /// Semantic version of the package.
    pub version: String,
    /// What people see. Its first word is the label of the wizard's step.
    pub display_name: String,
    /// `#RRGGBB`.
    pub accent_color: String,
    /// Verb to executable, found in `$PATH`. One that does not exist crashes an engine.
    pub commands: BTreeMap<String, String>,
    /// What the installer needs.
    pub setup: Setup,
    /// The module with the root agent's actions: an absolute path.
    pub root_agent_actions: String,
    /// Which settings are ours.
    pub config_keys: ConfigKeys,
}

/// What the installer needs.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Setup {
    /// Script that prepares the host: an absolute path.
    pub first_boot_hook: String,
    /// Executable that tells by its exit code whether the host can run VMs.
    pub detect: String,
    /// Python module of the wizard's page.
    pub wizard_module: String,
    /// Ids of the steps that module has, in their order.
    pub finalization_steps: Vec<String>,
}

/// Which settings are ours.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ConfigKeys {
    /// Where the wizard keeps its answers in the session.
    pub session_key: String,
    /// Keys of db.yaml.
    pub provisioner_config: Vec<String>,
}
