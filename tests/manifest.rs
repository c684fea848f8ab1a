//! The manifest, and what has to agree with it: versions, commands, files. Needs no host.
#![allow(clippy::unwrap_used, missing_docs)]

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use provisioner_contract::Manifest;

/// Verbs that engines, monitor, panel and network plugins look up.
const VERBS: [&str; 14] = [
    "build-template",
    "create",
    "destroy",
    "gc",
    "guest-exec",
    "kill",
    "list",
    "metrics",
    "resume",
    "start",
    "status",
    "stop",
    "throttle",
    "update-gecos",
];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

fn text(file: &str) -> String {
    fs::read_to_string(root().join(file)).unwrap_or_else(|error| panic!("{file}: {error}"))
}

fn manifest() -> Manifest {
    serde_json::from_str(&text("provisioner.json")).unwrap()
}

/// The commands of the workspace: file names below `src/bin`.
fn sources() -> BTreeSet<String> {
    let crates = fs::read_dir(root().join("crates")).unwrap();
    let bins = crates.filter_map(|entry| fs::read_dir(entry.unwrap().path().join("src/bin")).ok()).flatten();
    bins.map(|entry| entry.unwrap().path().file_stem().unwrap().to_str().unwrap().to_owned()).collect()
}

#[test]
fn it_says_what_the_rest_of_blockhost_relies_on() {
    let manifest = manifest();
    assert_eq!(manifest.name, "libvirt");
    assert_eq!(manifest.display_name, "libvirt/KVM + cloud-init");
    assert_eq!(manifest.accent_color, "#005F61");
    assert_eq!(manifest.commands.keys().collect::<Vec<_>>(), VERBS);
    for (verb, command) in &manifest.commands {
        let expected =
            if verb == "build-template" { "blockhost-build-template" } else { &format!("blockhost-vm-{verb}") };
        assert_eq!(command, expected);
    }
    assert_eq!(manifest.setup.detect, "blockhost-provisioner-detect");
    assert_eq!(manifest.setup.finalization_steps, ["storage", "network", "db_config", "template"]);
    assert_eq!(manifest.config_keys.session_key, manifest.name);
}

#[test]
fn every_version_is_the_same() {
    let version = env!("CARGO_PKG_VERSION");
    assert_eq!(manifest().version, version);
    let debian = text("debian/changelog");
    let debian = debian.split_once('(').unwrap().1.split_once(')').unwrap().0;
    assert_eq!(debian, version, "debian/changelog");
    let changelog = text("CHANGELOG.md");
    let newest = changelog.lines().find_map(|line| line.strip_prefix("## [")).unwrap();
    assert_eq!(newest.split_once(']').unwrap().0, version, "CHANGELOG.md");
    let numbers: Vec<u32> = version.split('.').map(|number| number.parse().unwrap()).collect();
    assert!(numbers > vec![0, 2, 0], "{version}: hosts have 0.2.0");
}

#[test]
fn everything_it_names_exists() {
    let manifest = manifest();
    let sources = sources();
    for command in manifest.commands.values().chain([&manifest.setup.detect]) {
        assert!(sources.contains(command), "{command}: there is no such command");
    }
    let module = format!("wizard/{}.py", manifest.setup.wizard_module.replace('.', "/"));
    for (installed, source) in [
        (manifest.setup.first_boot_hook.as_str(), "provisioner-hooks/first-boot.sh"),
        (manifest.root_agent_actions.as_str(), "root-agent-actions/virsh.py"),
        ("/usr/share/blockhost/provisioner.json", "provisioner.json"),
    ] {
        assert_eq!(installed, format!("/usr/share/blockhost/{source}"));
        assert!(root().join(source).is_file(), "{source}");
    }
    assert!(root().join(&module).is_file(), "{module}");
    let hook = root().join("provisioner-hooks/first-boot.sh");
    assert_eq!(hook.metadata().unwrap().permissions().mode() & 0o111, 0o111, "the hook must be executable");
}

/// The page is written from the source file, which the generator has to be told of.
#[test]
fn every_command_has_a_man_page() {
    let generator = text("crates/provisioner-cli/examples/manual.rs");
    for command in sources() {
        // Nobody calls it by hand.
        if command != "blockhost-metrics-sampler" {
            assert!(generator.contains(&format!("/{command}.rs\"")), "{command}: not in examples/manual.rs");
        }
    }
}
