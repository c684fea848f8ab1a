//! The service user: owner of the state directory, and nothing more. How it is let in to libvirtd is the host's affair
//! (polkit, a group); here its connection comes through a proxy.
#![allow(clippy::unwrap_used, missing_docs)]

mod common;

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::process::Command;

use common::proxy::Proxy;
use common::{Guest, Lab, Outcome, finish, output};

/// The user `nobody`: libvirt refuses one without a name.
const USER: &str = "65534";

fn own_everything(lab: &Lab) {
    for part in ["state", "config", "run"] {
        // Not the templates behind the symlink: they stay root's.
        output("chown", &["-hR", &format!("{USER}:{USER}"), lab.dir.join(part).to_str().unwrap()]);
    }
    output("chmod", &["0750", lab.dir.join("config").to_str().unwrap()]);
}

fn as_user(lab: &Lab, proxy: &Proxy, command: &Command) -> Outcome {
    let mut unprivileged = Command::new("setpriv");
    unprivileged
        .args(["--reuid", USER, "--regid", USER, "--clear-groups", "--no-new-privs", "--bounding-set=-all"])
        .arg(command.get_program())
        .args(command.get_args())
        .stdin(std::process::Stdio::null())
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .current_dir(lab.state());
    for (key, value) in command.get_envs() {
        match value {
            Some(value) => unprivileged.env(key, value),
            None => unprivileged.env_remove(key),
        };
    }
    finish(unprivileged.env("BLOCKHOST_LIBVIRT_URI", proxy.uri()).spawn().unwrap())
}

#[test]
fn the_service_user_and_root_work_on_the_same_vms() {
    let lab = Lab::new(Guest::Small);
    let proxy = Proxy::new(&lab);
    own_everything(&lab);
    output("chmod", &["0666", lab.dir.join("libvirt-sock").to_str().unwrap()]);
    let run = |program: &str, arguments: &[&str]| as_user(&lab, &proxy, lab.command(program).args(arguments));
    let (own, roots) = (lab.name("own"), lab.name("roots"));

    // All by itself, without a root agent: only the host's IPv6 route is missing, and it says so.
    let created = run("blockhost-vm-create", &lab.create_arguments(&own)).success();
    assert_eq!(created.stderr.contains("is not reachable through this host"), lab.ipv6(), "{created:?}");
    assert_eq!(run("blockhost-vm-status", &[&own]).stdout, "active\n");
    run("blockhost-vm-kill", &[&own]).success();
    run("blockhost-vm-start", &[&own]).success();

    // What root writes in between the service user can still read and write.
    lab.create(&roots).success();
    for file in [lab.database(), lab.state().join("vms.json.lock")] {
        assert_eq!(fs::metadata(&file).unwrap().uid().to_string(), USER, "{}", file.display());
    }
    let listed = run("blockhost-vm-list", &[]).success().stdout;
    assert!(listed.contains(&own) && listed.contains(&roots), "{listed}");
    lab.destroy(&own).success();
    run("blockhost-vm-stop", &[&roots]).success();
    let destroyed = run("blockhost-vm-destroy", &[&roots]);
    if lab.ipv6() {
        // Root's create has set the host's route, which needs root or the root agent to go. Nothing is pretended: the
        // rest is finished when somebody can.
        destroyed.fails_finishing("root agent");
        lab.destroy(&roots).success();
    } else {
        destroyed.success();
    }
    lab.assert_no_traces("after both were destroyed");

    // Killed as one user, cleared up by the other.
    for (killed_as_root, point) in [(true, "create.define"), (false, "create.start"), (true, "create.journal")] {
        let vm = lab.name(&format!("killed-{point}"));
        let mut command = lab.command("blockhost-vm-create");
        command.args(lab.create_arguments(&vm)).env("BLOCKHOST_FAILPOINT", format!("{point}=kill"));
        if killed_as_root {
            assert_eq!(finish(command.spawn().unwrap()).code, None);
            run("blockhost-vm-destroy", &[&vm]).success();
        } else {
            // setpriv becomes the command, so that is what the signal ends.
            assert_eq!(as_user(&lab, &proxy, &command).code, None);
            lab.destroy(&vm).success();
        }
        lab.assert_no_traces(point);
    }
}
