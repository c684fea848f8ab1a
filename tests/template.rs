//! `blockhost-build-template`: what fails or is killed leaves the template in use and nothing else. From packages, that a build
//! succeeds and its image boots is what every test with a Debian guest stands on; from a cloud image, it is shown here.
#![allow(clippy::unwrap_used, missing_docs)]

mod common;
#[path = "template/server.rs"]
mod server;

use std::fs;
use std::io::Write as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use common::{Guest, Lab, Outcome, finish, greeting, in_guest, output, wait_until};
use server::Server;

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

/// Everything in the directory but the lock files and the directory for downloads, which stay.
fn listing(dir: &Path) -> String {
    let all = output("find", &[dir.to_str().unwrap(), "-printf", "%P %l %s %T@\n"]);
    let mut lines: Vec<_> = all
        .lines()
        .filter(|l| ![".lock ", ".build.lock ", ".download "].iter().any(|own| l.starts_with(own)))
        .collect();
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

const SUMS: &str = "/images/SHA512SUMS";
const IMAGE: &str = "/images/debian-12-generic-amd64.qcow2";
/// Of the image that is no image: long enough to break off twice.
const LENGTH: usize = 3 << 20;
const PART: usize = 1 << 20;

/// A server with an "image": a raw disk with a boot sector's mark and noise, of which each number gives another.
fn serving(number: u32) -> (Server, Arc<Vec<u8>>) {
    let server = Server::new();
    let disk = disk(number);
    server.put(IMAGE, &disk, Some("\"one\""));
    publish_sum(&server, &disk);
    (server, disk)
}

fn disk(number: u32) -> Arc<Vec<u8>> {
    let words = (0..u32::try_from(LENGTH / 4).unwrap()).map(|n| n.wrapping_mul(2_654_435_761).wrapping_add(number));
    let mut disk: Vec<u8> = words.flat_map(u32::to_le_bytes).collect();
    disk[510..512].copy_from_slice(&[0x55, 0xaa]);
    Arc::new(disk)
}

fn sha512(bytes: &[u8]) -> String {
    let mut child = Command::new("sha512sum").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    // It answers only once it has everything.
    child.stdin.take().unwrap().write_all(bytes).unwrap();
    let said = child.wait_with_output().unwrap().stdout;
    String::from_utf8(said).unwrap().split(' ').next().unwrap().to_owned()
}

/// The list beside the image, as Debian's: with other files in it.
fn publish_sum(server: &Server, image: &[u8]) {
    let name = IMAGE.rsplit('/').next().unwrap();
    let text = format!("{}  debian-12-generic-amd64.raw\n{}  {name}\n", "0".repeat(128), sha512(image));
    server.put(SUMS, &Arc::new(text.into_bytes()), None);
}

/// A build of the image at `url`, in which `virt-customize` says whether it was given `expected` and then fails: what is looked at
/// is what comes before it, and a machine of libguestfs's takes half a minute.
fn start_build(lab: &Lab, url: &str, expected: &[u8]) -> Child {
    let (disk, program) = (lab.dir.join("expected.raw"), lab.dir.join("virt-customize"));
    fs::write(&disk, expected).unwrap();
    let script = format!(
        "#!/bin/sh\n\
         while [ \"$1\" != --add ]; do shift; done\n\
         qemu-img compare -q -f qcow2 -F raw \"$2\" {} >/dev/null 2>&1 && what=whole || what=another\n\
         echo \"customise: error: it is the $what image\" >&2\n\
         exit 1\n",
        disk.display()
    );
    fs::write(&program, script).unwrap();
    output("chmod", &["755", program.to_str().unwrap()]);
    let build = lab.command("blockhost-build-template");
    // In a mount namespace of its own; unshare and sh become the build, so that its process is the child.
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-c", "mount --bind \"$1\" /usr/bin/virt-customize && shift && exec \"$@\"", "sh"]);
    command.arg(program).arg(build.get_program()).args(["--image", url]);
    for (key, value) in build.get_envs() {
        match value {
            Some(value) => command.env(key, value),
            None => command.env_remove(key),
        };
    }
    for name in ["https_proxy", "HTTPS_PROXY", "all_proxy"] {
        command.env_remove(name);
    }
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

fn build(lab: &Lab, url: &str, expected: &[u8]) -> Outcome {
    finish(start_build(lab, url, expected))
}

fn asked(requests: &[(&str, usize)]) -> Vec<(String, usize)> {
    requests.iter().map(|(path, start)| ((*path).to_owned(), *start)).collect()
}

/// The sizes of what has arrived of an image so far.
fn parts(templates: &Path) -> Vec<u64> {
    let files = fs::read_dir(templates.join(".download")).into_iter().flatten().flatten();
    let parts = files.filter(|file| file.path().extension().is_some_and(|end| end == "part"));
    parts.map(|file| file.metadata().unwrap().len()).collect()
}

#[test]
fn a_cloud_image_that_breaks_off_is_continued_also_by_the_next_build() {
    let (lab, before) = lab_with_template();
    package(&lab);
    let templates = lab.state().join("templates");
    let (server, disk) = serving(1);
    let url = format!("{}{IMAGE}", server.url);
    server.change(|site| site.cut = Some(PART));
    build(&lab, &url, &disk).fails_with(1).says("it is the whole image");
    assert_eq!(server.requests(), asked(&[(SUMS, 0), (IMAGE, 0), (IMAGE, PART), (IMAGE, 2 * PART)]));
    // What was fetched whole is not fetched again after a failure that has nothing to do with it.
    build(&lab, &url, &disk).fails_with(1).says("it is the whole image");
    assert_eq!(server.requests(), asked(&[(SUMS, 0)]));

    // Killed while the server says nothing more; the next one goes on where it stopped.
    let (server, disk) = serving(2);
    let url = format!("{}{IMAGE}", server.url);
    server.change(|site| site.stall = Some(PART));
    let mut child = start_build(&lab, &url, &disk);
    wait_until("a third to arrive", Duration::from_secs(60), || parts(&templates).contains(&(PART as u64)));
    output("kill", &["-KILL", &child.id().to_string()]);
    child.wait().unwrap();
    server.change(|site| site.stall = None);
    server.requests();
    build(&lab, &url, &disk).fails_with(1).says("it is the whole image");
    assert_eq!(server.requests(), asked(&[(SUMS, 0), (IMAGE, PART)]));

    // A server that is gone for good.
    let (server, disk) = serving(3);
    let url = format!("{}{IMAGE}", server.url);
    server.change(|site| site.cut = Some(0));
    build(&lab, &url, &disk).fails_with(1).says("broke off");
    let after = listing(&templates);
    let others: Vec<_> = after.lines().filter(|line| !line.starts_with(".download/")).collect();
    assert_eq!(others.join("\n"), before);
}

#[test]
fn a_cloud_image_with_a_wrong_checksum_or_none_or_that_is_not_there_leaves_nothing() {
    let (lab, before) = lab_with_template();
    package(&lab);
    let templates = lab.state().join("templates");
    let (server, image) = serving(1);
    let url = format!("{}{IMAGE}", server.url);

    publish_sum(&server, &disk(2));
    build(&lab, &url, &image).fails_with(1).says("has the SHA-512");
    assert_eq!(server.requests(), asked(&[(SUMS, 0), (IMAGE, 0)]));
    assert_eq!(listing(&templates), before);

    // Not in the list; no list; both before a byte of the image is fetched.
    build(&lab, &format!("{}/images/other.qcow2", server.url), &image).fails_with(1).says("--sha512");
    server.change(|site| site.files.remove(SUMS));
    build(&lab, &url, &image).fails_with(1).says("--sha512");
    assert_eq!(server.requests(), asked(&[(SUMS, 0), (SUMS, 0)]));

    publish_sum(&server, &image);
    server.change(|site| site.files.remove(IMAGE));
    build(&lab, &url, &image).fails_with(1).says("404");
    assert_eq!(server.requests(), asked(&[(SUMS, 0), (IMAGE, 0)]));
    assert_eq!(listing(&templates), before);
}

#[test]
fn a_cloud_image_is_found_behind_redirects_and_continued_there() {
    let (lab, _) = lab_with_template();
    package(&lab);
    let (server, disk) = serving(1);
    for path in [SUMS, IMAGE] {
        let latest = path.replace("images", "latest");
        server.change(|site| site.redirects.insert(latest, path.to_owned()));
    }
    server.change(|site| site.cut = Some(2 * PART));
    build(&lab, &format!("{}{}", server.url, IMAGE.replace("images", "latest")), &disk)
        .fails_with(1)
        .says("it is the whole image");
    let images: Vec<_> = server.requests().into_iter().filter(|(path, _)| path == IMAGE).collect();
    assert_eq!(images, asked(&[(IMAGE, 0), (IMAGE, 2 * PART)]));
}

#[test]
fn two_versions_of_a_cloud_image_are_never_put_together() {
    let (lab, before) = lab_with_template();
    package(&lab);
    let templates = lab.state().join("templates");
    // With an ETag the server says so itself, and sends the new one from its beginning; without one it continues with the new one.
    for (number, etags) in [(10, [Some("\"one\""), Some("\"two\"")]), (20, [None, None])] {
        let (server, old) = serving(number);
        let new = disk(number + 1);
        let url = format!("{}{IMAGE}", server.url);
        server.put(IMAGE, &old, etags[0]);
        server.change(|site| site.stall = Some(PART));
        let mut child = start_build(&lab, &url, &old);
        wait_until("a third to arrive", Duration::from_secs(60), || parts(&templates).contains(&(PART as u64)));
        output("kill", &["-KILL", &child.id().to_string()]);
        child.wait().unwrap();
        server.change(|site| site.stall = None);

        // The image is replaced, its checksum not yet.
        server.put(IMAGE, &new, etags[1]);
        server.requests();
        build(&lab, &url, &new).fails_with(1).says("has the SHA-512");
        let images: Vec<_> = server.requests().into_iter().filter(|(path, _)| path == IMAGE).collect();
        let expected: &[_] = if etags[0].is_some() { &[(IMAGE, PART)] } else { &[(IMAGE, PART), (IMAGE, 0)] };
        assert_eq!(images, asked(expected));
        assert_eq!(listing(&templates), before);
        // Now both are.
        publish_sum(&server, &new);
        build(&lab, &url, &new).fails_with(1).says("it is the whole image");
        fs::remove_dir_all(templates.join(".download")).unwrap();
    }
}

#[test]
fn a_template_from_a_cloud_image_boots_and_lets_its_user_in() {
    let (lab, _) = lab_with_template();
    // What it depends on is in the image: no mirror is reached from libguestfs's machine.
    let deb = lab.state().join("template-packages/y_1.0_all.deb");
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/images/make-deb");
    output(script.to_str().unwrap(), &[deb.to_str().unwrap(), "blockhost-test-plugin", "curl"]);
    let image = std::env::var("BLOCKHOST_TEST_CLOUD_IMAGE").expect("BLOCKHOST_TEST_CLOUD_IMAGE: run `make test`");
    let image = Arc::new(fs::read(image).unwrap());
    let server = Server::new();
    server.put(IMAGE, &image, Some("\"official\""));
    publish_sum(&server, &image);
    let url = format!("{}{IMAGE}", server.url);
    // What production does: no option, and a URL from the configuration in place of Debian's.
    lab.configure(&format!(
        "libvirt: {{domain_type: qemu, guest_ready_timeout_seconds: 600, template_url: {url:?}}}\n"
    ));
    let build = || {
        let mut command = lab.command("blockhost-build-template");
        for name in ["https_proxy", "HTTPS_PROXY", "all_proxy"] {
            command.env_remove(name);
        }
        finish(command.spawn().unwrap()).success()
    };
    let old = lab.base();
    build();
    assert_ne!(lab.base(), old);
    assert!(!lab.state().join("templates/.download").exists(), "the download is kept");
    assert_eq!(server.requests(), asked(&[(SUMS, 0), (IMAGE, 0)]));
    drop(image);
    build().says("is up to date");
    assert_eq!(server.requests(), asked(&[(SUMS, 0)]));

    let vm = lab.name("cloud");
    let sizes = ["--cpu", "1", "--memory", "1024", "--disk", "6", "--username", "alice"];
    let wallet = ["--owner-wallet", common::WALLET, "--apply"];
    lab.run("blockhost-vm-create", &[&[&*vm], &wallet[..], &sizes[..]].concat()).success();
    assert!(greeting(&lab.address(0), 22, Duration::from_secs(120)).starts_with("SSH-2.0-"));
    let seen = in_guest(
        &vm,
        "hostname; cat /usr/share/blockhost-test-plugin/marker; getent passwd alice | cut -d: -f6; sshd -T | grep ^usepam; \
         findmnt -no SOURCE /; findmnt -no FSTYPE /boot/efi; [ $(df -k --output=size / | tail -n 1) -gt 4500000 ] && echo grown",
    );
    let wanted = [&*vm, "installed from template-packages", "/home/alice", "usepam yes", "/dev/vda1", "vfat", "grown"];
    assert_eq!(seen.lines().collect::<Vec<_>>(), wanted);
    lab.destroy(&vm).success();
    assert_eq!(lab.traces(), Vec::<String>::new());
}
