//! `blockhost-build-template`: what fails or is killed leaves the template in use and nothing else. That a build succeeds, and
//! that its image boots, is what every test with a Debian guest stands on.
#![allow(clippy::unwrap_used, missing_docs)]

mod common;

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use common::{Guest, Lab, finish, output, wait_until};

/// A lab with a template directory of its own, in which a template is in use.
fn lab_with_template() -> (Lab, String) {
    let lab = Lab::new(Guest::Blank);
    let templates = lab.state().join("templates");
    let _ = fs::remove_file(&templates);
    let _ = fs::remove_dir_all(&templates);
    fs::create_dir(&templates).unwrap();
    let image = templates.join("blockhost-base-20260101T000000Z-00000000.qcow2");
    output("qemu-img", &["create", "-q", "-f", "qcow2", image.to_str().unwrap(), "1G"]);
    for name in ["current.qcow2", "blockhost-base.qcow2"] {
        std::os::unix::fs::symlink(image.file_name().unwrap(), templates.join(name)).unwrap();
    }
    let before = listing(&templates);
    (lab, before)
}

/// Everything in the directory but the lock files, which stay.
fn listing(dir: &Path) -> String {
    let all = output("find", &[dir.to_str().unwrap(), "-printf", "%P %l %s %T@\n"]);
    let mut lines: Vec<_> =
        all.lines().filter(|l| !l.starts_with(".lock ") && !l.starts_with(".build.lock ")).collect();
    // The directory itself has the time of its last change.
    lines.retain(|line| !line.starts_with(' '));
    lines.sort_unstable();
    lines.join("\n")
}

fn package(lab: &Lab) {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/images/make-deb");
    let to = lab.state().join("template-packages/x_1.0_all.deb");
    output(script.to_str().unwrap(), &[to.to_str().unwrap()]);
}

#[test]
fn without_packages_or_with_another_checksum_there_is_no_new_template() {
    let (lab, before) = lab_with_template();
    let templates = lab.state().join("templates");
    lab.run("blockhost-build-template", &["--from-packages"]).fails_with(1).says("template-packages");
    package(&lab);
    let image = lab.dir.join("cloud.qcow2");
    output("qemu-img", &["create", "-q", "-f", "qcow2", image.to_str().unwrap(), "1G"]);
    let image = image.to_str().unwrap();
    lab.run("blockhost-build-template", &["--image", image]).fails_with(1).says("--sha512");
    let wrong = "0".repeat(128);
    lab.run("blockhost-build-template", &["--image", image, "--sha512", &wrong]).fails_with(1).says("SHA-512");
    lab.run("blockhost-build-template", &["--image", "/nonexistent.qcow2", "--sha512", &wrong]).fails_with(1);
    assert_eq!(listing(&templates), before);

    let mut unprivileged = Command::new("setpriv");
    let command = lab.command("blockhost-build-template");
    unprivileged.args(["--reuid", "65534", "--clear-groups"]).arg(command.get_program()).arg("--from-packages");
    unprivileged.stdin(std::process::Stdio::null());
    unprivileged.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped());
    for (key, value) in command.get_envs() {
        if let Some(value) = value {
            unprivileged.env(key, value);
        }
    }
    finish(unprivileged.spawn().unwrap()).fails_with(1).says("root");
}

/// The processes that work below `dir`, as their command lines.
fn workers(dir: &Path) -> Vec<String> {
    let dir = dir.to_str().unwrap();
    let processes = fs::read_dir("/proc").unwrap().flatten().filter_map(|entry| {
        let line = fs::read(entry.path().join("cmdline")).ok()?;
        let line = String::from_utf8_lossy(&line).replace('\0', " ");
        let root = fs::read_link(entry.path().join("root")).unwrap_or_default();
        (line.contains(dir) || root.starts_with(dir)).then_some(line)
    });
    processes.collect()
}

#[test]
fn killed_or_stopped_in_the_middle_a_build_leaves_the_old_template_and_nothing_else() {
    let (lab, before) = lab_with_template();
    package(&lab);
    let templates = lab.state().join("templates");
    let staging = || {
        let names = fs::read_dir(&templates).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap());
        names.filter(|name| name.starts_with(".staging")).collect::<Vec<_>>()
    };
    for signal in ["-KILL", "-TERM"] {
        let mut child = lab.command("blockhost-build-template").arg("--from-packages").spawn().unwrap();
        // In the middle of installing packages, far from either end.
        let busy = || {
            staging().iter().any(|name| {
                let tree = output("find", &[templates.join(name).to_str().unwrap(), "-maxdepth", "3", "-name", "dpkg"]);
                !tree.is_empty() || workers(&templates).iter().any(|line| line.contains("mmdebstrap"))
            })
        };
        wait_until("the build to be under way", Duration::from_secs(120), busy);
        // A second build waits for the first, and is told to stop while it does.
        let second = lab.command("blockhost-build-template").arg("--from-packages").spawn().unwrap();
        std::thread::sleep(Duration::from_secs(5));
        output("kill", &["-TERM", &second.id().to_string()]);
        finish(second).fails_with(1).says("stopped by a signal");
        assert_eq!(staging().len(), 1);

        output("kill", &[signal, &child.id().to_string()]);
        let code = child.wait().unwrap().code();
        wait_until("its processes to end", Duration::from_secs(20), || workers(&templates).is_empty());
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
        assert!(!mounts.contains(templates.to_str().unwrap()), "{mounts}");
        if signal == "-TERM" {
            assert_eq!(code, Some(1));
        } else {
            // What nobody could remove the next build does, even one that fails.
            assert_eq!(staging().len(), 1);
            fs::remove_file(lab.state().join("template-packages/x_1.0_all.deb")).unwrap();
            lab.run("blockhost-build-template", &["--from-packages"]).fails_with(1);
            package(&lab);
        }
        assert_eq!(listing(&templates), before, "after {signal}");
    }
}
