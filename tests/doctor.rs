//! `blockhost-provisioner-doctor`: each part of a host broken on purpose is named with its remedy, and nothing else is.
#![allow(clippy::unwrap_used, missing_docs)]

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::io::{Read as _, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use common::proxy::{Mode, Proxy};
use common::{Guest, Lab, Outcome, finish, output, patience, virsh};
use serde_json::{Value, json};

const DOCTOR: &str = "blockhost-provisioner-doctor";

type Checks = BTreeMap<String, (String, String, String)>;

fn parse(outcome: &Outcome) -> Checks {
    assert!(outcome.stdout.is_ascii(), "{outcome:?}");
    let report: Value = serde_json::from_str(&outcome.stdout).unwrap();
    let checks = report["checks"].as_array().unwrap();
    let fails = checks.iter().any(|check| check["level"] == "fail");
    assert_eq!(outcome.code, Some(i32::from(fails)), "{outcome:?}");
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let all: Checks = checks
        .iter()
        .map(|check| (text(&check["check"]), (text(&check["level"]), text(&check["text"]), text(&check["remedy"]))))
        .collect();
    for (name, (level, text, remedy)) in &all {
        assert!(!text.is_empty() && (level == "ok") == remedy.is_empty(), "{name}: {text} / {remedy}");
    }
    all
}

impl Lab {
    fn doctor(&self) -> Checks {
        parse(&self.run(DOCTOR, &["--json"]))
    }

    /// That only these checks are other than before, at this level, and that their texts or remedies have these parts.
    #[track_caller]
    fn complains(&self, before: &Checks, expected: &[(&str, &str, &str)]) {
        let now = self.doctor();
        let level = |checks: &Checks, name: &str| checks[name].0.clone();
        let changed: Vec<_> = now.keys().filter(|name| level(&now, name) != level(before, name)).cloned().collect();
        let mut names: Vec<_> = expected.iter().map(|(name, ..)| (*name).to_owned()).collect();
        names.sort();
        assert_eq!(changed, names, "{now:#?}");
        for (name, wanted, part) in expected {
            let (level, text, remedy) = &now[*name];
            assert_eq!(level, wanted, "{name}: {text}");
            assert!(text.contains(part) || remedy.contains(part), "{name}: {part:?} is not in {text} / {remedy}");
        }
    }
}

fn mode(path: &Path, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}

/// Answers one request after the other as the base package's agent answers an action it does not know.
fn refuse_everything(listener: &UnixListener) {
    for stream in listener.incoming() {
        let mut stream = stream.unwrap();
        let mut length = [0; 4];
        stream.read_exact(&mut length).unwrap();
        let mut request = vec![0; u32::from_be_bytes(length) as usize];
        stream.read_exact(&mut request).unwrap();
        let answer = br#"{"ok": false, "error": "unknown action"}"#;
        stream.write_all(&u32::try_from(answer.len()).unwrap().to_be_bytes()).unwrap();
        stream.write_all(answer).unwrap();
    }
}

#[test]
fn a_host_that_can_run_vms_passes_and_what_is_broken_is_named() {
    let lab = Lab::new(Guest::Blank);
    virsh(&["pool-autostart", &lab.pool]);
    lab.add_record(&lab.name("web"), &lab.address(0));
    let socket = lab.dir.join("run/root-agent.sock");
    let listener = UnixListener::bind(&socket).unwrap();
    thread::spawn(move || refuse_everything(&listener));
    let contents = |lab: &Lab| output("find", &[lab.dir.to_str().unwrap(), "-printf", "%p %s %m %u %T@\n"]);
    lab.define(&lab.name("off"), "");
    // Those of others come and go.
    let domains = || {
        let own = lab.name("");
        virsh(&["list", "--all"]).lines().filter(|line| line.contains(&own)).map(str::to_owned).collect::<Vec<_>>()
    };
    let before = (contents(&lab), domains());
    let good = lab.doctor();
    assert_eq!((contents(&lab), domains()), before, "looking has changed something");
    for (name, (level, text, _)) in &good {
        assert_ne!(level, "fail", "{name}: {text}");
    }
    for name in
        ["libvirt", "emulator", "pool", "template", "bridge", "ipv4-addresses", "database", "cloud-init-template"]
    {
        assert_eq!(good[name].0, "ok", "{name}: {:?}", good[name]);
    }
    let text = lab.run(DOCTOR, &[]).success().stdout;
    // How much room there is changes while others run.
    for (name, (_, what, remedy)) in good.iter().filter(|(name, _)| *name != "pool-space") {
        assert!(text.contains(name) && text.contains(what) && text.contains(remedy), "{name} is not in {text}");
    }
    lab.run(DOCTOR, &["--json", "--format", "text"]).fails_with(2);

    // Settings, and what is read besides db.yaml.
    let config = lab.dir.join("config");
    let db = fs::read_to_string(config.join("db.yaml")).unwrap();
    lab.configure("bridge: nobridge9\n");
    lab.complains(&good, &[("bridge", "fail", "does not exist")]);
    lab.configure("bridge: lo\n");
    lab.complains(&good, &[("bridge", "fail", "not a bridge")]);
    lab.configure("ip_pool: {network: \"10.99.0.0/24\", start: 5, end: 6, gateway: 10.99.0.1}\n");
    lab.complains(&good, &[("bridge", "warn", "ip_pool"), ("ipv4-addresses", "warn", "2 of 2")]);
    // The bridge has the first of them.
    let net = lab.network.rsplit_once('.').unwrap().0;
    lab.configure(&format!("ip_pool: {{network: {:?}, start: 1, end: 2, gateway: {net}.254}}\n", lab.network));
    let left = &lab.doctor()["ipv4-addresses"].1;
    assert!(left.contains("1 of 2"), "{left}");
    lab.configure("ip_pool: {network: \"10.99.0.0/24\"}\n");
    lab.complains(&good, &[("bridge", "fail", "no way out")]);
    lab.configure("storage_pool: no-such-pool\n");
    lab.complains(
        &good,
        &[("pool", "fail", "virsh pool-define-as no-such-pool dir"), ("pool-space", "warn", "see pool")],
    );
    lab.configure("storage_path: /srv/elsewhere\n");
    lab.complains(&good, &[("pool", "fail", "storage_path")]);
    fs::write(config.join("db.yaml"), format!("{db}bridge: [\n")).unwrap();
    let unread = lab.doctor();
    assert_eq!(unread["settings"].0, "fail");
    assert_eq!((unread["pool"].0.as_str(), unread["pool"].2.as_str()), ("warn", "see settings"));
    assert_eq!(unread["libvirt"].0, "ok", "one check that fails keeps no other from being made");
    fs::write(config.join("db.yaml"), &db).unwrap();
    mode(&config.join("db.yaml"), 0o666);
    lab.complains(&good, &[("settings", "fail", "chmod o-w")]);
    mode(&config.join("db.yaml"), 0o644);
    fs::remove_file(config.join("network-mode")).unwrap();
    lab.complains(&good, &[("settings", "fail", "network-mode")]);
    fs::write(config.join("network-mode"), "broker\n").unwrap();

    // The database and its directory.
    let database = lab.database();
    let whole = fs::read(&database).unwrap();
    fs::write(&database, &whole[..whole.len() / 2]).unwrap();
    let torn = lab.doctor();
    assert_eq!((torn["database"].0.as_str(), torn["ipv4-addresses"].2.as_str()), ("fail", "see database"));
    fs::write(&database, &whole).unwrap();
    lab.edit_database(|vms| vms["vms"]["x"] = json!({"status": 1}));
    lab.complains(&good, &[("database", "fail", "blockhost-provisioner-repair")]);
    fs::remove_file(&database).unwrap();
    lab.complains(&good, &[]);
    fs::write(&database, &whole).unwrap();
    output("chown", &["nobody:nogroup", lab.state().to_str().unwrap()]);
    lab.complains(
        &good,
        &[("database", "fail", "chown --reference"), ("state-directories", "warn", "chown -R --reference")],
    );
    output("chown", &["root:root", lab.state().to_str().unwrap()]);
    let all: Vec<Value> = (0..14).map(|index| lab.address(index).into()).collect();
    lab.edit_database(|vms| vms["allocated_ips"] = all.into());
    lab.complains(&good, &[("ipv4-addresses", "fail", "widen")]);
    fs::write(&database, &whole).unwrap();

    // Who may pass through to the disks: an upgrade of the base package has reset the mode.
    let (user, _) = qemu_user();
    if user != 0 {
        mode(&lab.state(), 0o750);
        lab.complains(&good, &[("qemu-access", "fail", "setfacl -m u:")]);
        output("setfacl", &["-m", &format!("u:{user}:x"), lab.state().to_str().unwrap()]);
        lab.complains(&good, &[]);
        output("setfacl", &["-b", lab.state().to_str().unwrap()]);
    }
    mode(&lab.state(), 0o711);

    let base = lab.base();
    mode(&base, 0o666);
    lab.complains(&good, &[("template", "warn", "chmod 0444")]);
    mode(&base, 0o444);
    fs::rename(&base, base.with_extension("aside")).unwrap();
    lab.complains(&good, &[("template", "fail", "blockhost-build-template")]);
    fs::rename(base.with_extension("aside"), &base).unwrap();
    let cloud_init = lab.dir.join("share/cloud-init/templates/nft-auth.yaml");
    fs::rename(&cloud_init, cloud_init.with_extension("aside")).unwrap();
    lab.complains(&good, &[("cloud-init-template", "fail", "nft-auth.yaml")]);
    fs::rename(cloud_init.with_extension("aside"), &cloud_init).unwrap();

    virsh(&["pool-autostart", "--disable", &lab.pool]);
    lab.complains(&good, &[("pool", "warn", "virsh pool-autostart")]);
    virsh(&["pool-destroy", &lab.pool]);
    lab.complains(&good, &[("pool", "fail", "virsh pool-start"), ("pool-space", "warn", "see pool")]);
    virsh(&["pool-start", &lab.pool]);
    virsh(&["pool-autostart", &lab.pool]);

    fs::write(lab.provisioning_lock(), "999999").unwrap();
    lab.complains(&good, &[("provisioning-lock", "warn", "blockhost-provisioner-repair --apply")]);
    fs::remove_file(lab.provisioning_lock()).unwrap();
    fs::write(lab.state().join("kvm.json"), r#"{"host":"x","works":true}"#).unwrap();
    lab.complains(&good, &[]);
    lab.configure("libvirt: {domain_type: kvm}\n");
    fs::write(lab.state().join("kvm.json"), r#"{"host":"x","works":false}"#).unwrap();
    lab.complains(&good, &[("kvm", "fail", "kvm")]);
    fs::write(config.join("db.yaml"), &db).unwrap();

    // Root sets the routes itself; the agent matters to the others.
    fs::remove_file(&socket).unwrap();
    if lab.ipv6() {
        lab.complains(&good, &[("root-agent", "warn", "systemctl restart")]);
        let _silent = UnixListener::bind(&socket).unwrap();
        lab.complains(&good, &[("root-agent", "warn", "did not answer")]);
    } else {
        lab.complains(&good, &[]);
    }
    output("touch", &["-d", "+2 days", database.to_str().unwrap()]);
    let later = lab.doctor();
    assert_eq!(later["clock"].0, "warn", "{later:#?}");
    virsh(&["pool-autostart", "--disable", &lab.pool]);
}

/// The user and group libvirt runs QEMU as.
fn qemu_user() -> (u32, u32) {
    let capabilities = virsh(&["capabilities"]);
    let label = capabilities.split("<baselabel type='kvm'>+").nth(1).unwrap().split('<').next().unwrap().to_owned();
    let (user, group) = label.split_once(":+").unwrap();
    (user.parse().unwrap(), group.parse().unwrap())
}

#[test]
fn it_needs_neither_libvirt_nor_root_and_waits_for_nobody() {
    let lab = Lab::new(Guest::Blank);
    let proxy = Proxy::new(&lab);
    for mode in [Mode::Down, Mode::Hung] {
        proxy.set(mode);
        let begun = Instant::now();
        let mut command = lab.command(DOCTOR);
        command.arg("--json").env("BLOCKHOST_LIBVIRT_URI", proxy.uri());
        let outcome = finish(command.spawn().unwrap());
        assert!(begun.elapsed() < patience(Duration::from_secs(40)), "{:?}", begun.elapsed());
        assert!(outcome.reason().contains("libvirt"), "{outcome:?}");
        let checks = parse(&outcome);
        assert_eq!(checks["libvirt"].0, "fail");
        for name in ["pool", "emulator", "qemu-access"] {
            assert_eq!((checks[name].0.as_str(), checks[name].2.as_str()), ("warn", "see libvirt"), "{name}");
        }
        for name in ["settings", "template", "bridge", "ipv4-addresses", "cloud-init-template"] {
            assert_eq!(checks[name].0, "ok", "{name}: {:?}", checks[name]);
        }
    }

    proxy.set(Mode::Forward);
    let user = |program: &Command| {
        let mut user = Command::new("setpriv");
        user.args(["--reuid", "65534", "--regid", "65534", "--clear-groups", "--bounding-set=-all"]);
        user.arg(program.get_program()).arg("--json").current_dir("/").stdin(std::process::Stdio::null());
        user.envs(program.get_envs().filter_map(|(key, value)| Some((key, value?))));
        user.env("BLOCKHOST_LIBVIRT_URI", proxy.uri());
        user.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped());
        finish(user.spawn().unwrap())
    };
    // Not let in to libvirt's socket, and not the owner of anything.
    mode(&lab.dir.join("libvirt-sock"), 0o600);
    let checks = parse(&user(&lab.command(DOCTOR)));
    assert_eq!(checks["libvirt"].0, "fail");
    assert!(checks["libvirt"].2.contains("usermod -aG libvirt nobody"), "{:?}", checks["libvirt"]);
    assert_eq!(checks["state-directories"].0, "fail", "{:?}", checks["state-directories"]);
    mode(&lab.dir.join("libvirt-sock"), 0o666);
    output("chown", &["-hR", "65534:65534", lab.state().to_str().unwrap()]);
    let checks = parse(&user(&lab.command(DOCTOR)));
    assert_eq!(checks["libvirt"].0, "ok", "{:?}", checks["libvirt"]);
    assert_eq!(checks["state-directories"].0, "ok", "{:?}", checks["state-directories"]);
    assert_eq!(checks["root-agent"].0, if lab.ipv6() { "fail" } else { "ok" }, "{:?}", checks["root-agent"]);
}

/// The command sees a `/dev` of its own in which `/dev/kvm` is root's alone, as where no udev has run. libvirtd sees its own.
fn where_kvm_is_roots(lab: &Lab, program: &str, arguments: &[&str]) -> common::Outcome {
    const SETUP: &str = "d=$1; shift; mount -t tmpfs tmpfs \"$d\" && for n in null zero random urandom; do : > \"$d/$n\" \
        && mount --bind /dev/$n \"$d/$n\" || exit 99; done; : > \"$d/kvm\"; chmod 600 \"$d/kvm\"; \
        mount --rbind \"$d\" /dev && exec \"$@\"";
    let dev = lab.dir.join("dev");
    fs::create_dir_all(&dev).unwrap();
    let inner = lab.command(program);
    let mut outer = std::process::Command::new("unshare");
    outer.args(["--mount", "sh", "-c", SETUP, "sh"]).arg(&dev).arg(inner.get_program()).args(arguments);
    for (name, value) in inner.get_envs() {
        match value {
            Some(value) => outer.env(name, value),
            None => outer.env_remove(name),
        };
    }
    outer.stdin(std::process::Stdio::null()).stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped());
    finish(outer.spawn().unwrap())
}

#[test]
fn a_kvm_that_qemus_user_cannot_open_is_told_by_doctor_and_create() {
    let lab = Lab::new(Guest::Blank);
    let told = where_kvm_is_roots(&lab, "blockhost-provisioner-doctor", &["--json"]);
    let report: serde_json::Value = serde_json::from_str(&told.stdout).unwrap();
    let check = report["checks"].as_array().unwrap().iter().find(|check| check["check"] == "kvm-access").unwrap();
    assert_eq!(check["level"], "fail", "{check:#}");
    assert!(check["text"].as_str().unwrap().contains("libvirt-qemu cannot open it"), "{check:#}");
    assert!(check["remedy"].as_str().unwrap().contains("chgrp kvm /dev/kvm"), "{check:#}");

    let vm = lab.name("slow");
    let plan = ["--owner-wallet", common::WALLET, "--disk", "4"];
    let planned = where_kvm_is_roots(&lab, "blockhost-vm-create", &[&[vm.as_str()][..], &plan].concat()).success();
    assert!(planned.stderr.contains("libvirt-qemu cannot open it"), "{planned:#?}");
    let usual = lab.run("blockhost-vm-create", &[&[vm.as_str()][..], &plan].concat()).success();
    assert!(!usual.stderr.contains("cannot open it"), "{usual:#?}");
}
