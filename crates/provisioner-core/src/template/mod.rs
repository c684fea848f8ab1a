//! Builds the base image every VM is an overlay of, from a cloud image or from Debian packages, and finds the current one.
//!
//! A build works in a staging directory and publishes a finished, synced, immutable image with one rename; whatever
//! happens before leaves the previous template in use. [`store`](self) rules are in the module `store`.

mod apt;
mod checksum;
mod cloud_image;
pub mod disk;
mod download;
mod from_packages;
mod packages;
pub mod qcow2;
mod store;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

pub use checksum::Sha512Hex;
pub use packages::TemplatePackage;
pub use qcow2::backing_file;
pub use store::{Pinned, Template, current, pin};

use crate::cancel::Cancel;
use crate::paths::Directories;
use crate::progress::Progress;
use crate::{Error, ErrorKind, Result};
use store::Store;

/// The script that turns a Debian system into a template, from inside.
const CUSTOMISE: &str = include_str!("customise.sh");
/// Format of the manifest; a template with another one is rebuilt.
const MANIFEST_FORMAT: u32 = 1;
/// Debian's own cloud image.
pub const DEFAULT_IMAGE: &str = "https://cloud.debian.org/images/cloud/bookworm/latest/debian-12-generic-amd64.qcow2";
/// The release templates are made of.
pub const DEFAULT_SUITE: &str = "bookworm";

/// What a template is made of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// A cloud image. Its SHA-512 is always verified; without `sha512` it is taken from the `SHA512SUMS` beside it.
    CloudImage {
        /// An `http://` or `https://` URL, or a path.
        location: String,
        /// The expected sum.
        sha512: Option<Sha512Hex>,
    },
    /// Packages of this Debian release, from the mirrors this machine's apt uses.
    Packages {
        /// Code name of the release, such as `bookworm`.
        suite: String,
    },
}

/// What to build, and how.
pub struct BuildRequest<'a> {
    /// What to make it of.
    pub source: Source,
    /// Build even if the current template was made of the same things.
    pub force: bool,
    /// Accept that there is no package to install: nobody can log in to such an image.
    pub allow_no_packages: bool,
    /// URL of an HTTP proxy for cloud images.
    pub proxy: Option<String>,
    /// Whether a cloud image must be changed in an emulated machine, because KVM does not work here.
    pub emulate: bool,
    /// The backing files of all overlays there are; an error keeps every old template.
    pub in_use: &'a dyn Fn() -> Result<BTreeSet<PathBuf>>,
}

/// The outcome of a build.
#[derive(Debug)]
pub struct Built {
    /// The template in use from now on.
    pub template: Template,
    /// Whether it was made by this call; otherwise it was up to date already.
    pub fresh: bool,
    /// Old templates that were removed.
    pub removed: Vec<PathBuf>,
}

/// What decides whether a template is up to date.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Inputs {
    /// What it was made of, with the sum of a cloud image or the package sources.
    source: String,
    packages: Vec<TemplatePackage>,
    /// Sum of the script that configured it.
    customise: Sha512Hex,
}

/// What stands beside a template.
#[derive(Debug, Serialize, Deserialize)]
struct Manifest {
    format: u32,
    created_at: String,
    inputs: Inputs,
    /// Every package in the image.
    installed: BTreeMap<String, String>,
}

/// What a maker works with.
struct Stage<'a> {
    /// The staging directory of this build.
    directory: &'a Path,
    /// Holds `packages/`, `packages.list` and `customise.sh`, to be taken into the image.
    work: &'a Path,
    /// Where the finished image must be.
    image: &'a Path,
}

/// One way to make an image.
trait Maker {
    /// What it is made of, in words that differ when the result would.
    fn identity(&mut self, progress: &dyn Progress, cancel: &Cancel) -> Result<String>;
    /// Free space it needs, in bytes.
    fn space(&self) -> u64;
    /// Makes the image; returns the packages in it with their versions.
    fn make(&mut self, stage: &Stage, progress: &dyn Progress, cancel: &Cancel) -> Result<BTreeMap<String, String>>;
    /// Called after the template was published: what was kept for another attempt can go.
    fn finished(&mut self) {}
}

/// Builds the template, unless the current one was made of the same things; only root can. Waits for another build.
///
/// # Errors
/// [`ErrorKind::Conflict`] without root's rights, or if the packages cannot be installed together;
/// [`ErrorKind::NotFound`] without packages; [`ErrorKind::Unavailable`] if a program or a server is missing;
/// [`ErrorKind::Exhausted`] without space; [`ErrorKind::Invalid`] for a source that is not what it should be;
/// [`ErrorKind::Io`]; [`ErrorKind::Interrupted`]. The previous template is then still in use, and nothing else is left.
pub fn build(
    request: &BuildRequest,
    directories: &Directories,
    progress: &dyn Progress,
    cancel: &Cancel,
) -> Result<Built> {
    if !nix::unistd::geteuid().is_root() {
        return Err(Error::new(ErrorKind::Conflict, "cannot build a template without root's rights")
            .hint("run it as root, for instance with sudo"));
    }
    match &request.source {
        Source::CloudImage { location, sha512 } => {
            let downloads = directories.templates().join(".download");
            let mut maker = cloud_image::CloudImage::new(location, sha512.clone(), request, &downloads)?;
            build_with(&mut maker, request, directories, progress, cancel)
        }
        Source::Packages { suite } => {
            let mut maker = from_packages::FromPackages::new(suite)?;
            build_with(&mut maker, request, directories, progress, cancel)
        }
    }
}

fn build_with(
    maker: &mut dyn Maker,
    request: &BuildRequest,
    directories: &Directories,
    progress: &dyn Progress,
    cancel: &Cancel,
) -> Result<Built> {
    let templates = directories.templates();
    let store = Store::open(&templates, progress, cancel)?;
    let staging = store.stage()?;
    let work = staging.path.join("work");
    fs::create_dir(&work).map_err(|error| Error::io("create", &work, error))?;
    let packages = packages::collect(&directories.template_packages(), &work.join("packages"), cancel)?;
    if packages.is_empty() && !request.allow_no_packages {
        let message = format!("there is no package in {}", directories.template_packages().display());
        return Err(Error::new(ErrorKind::NotFound, message).hint(
            "nobody could log in to VMs of such a template; put libpam-web3's .deb there, or give --allow-no-packages",
        ));
    }
    let source = maker.identity(progress, cancel)?;
    let inputs = Inputs { source, packages, customise: Sha512Hex::of(CUSTOMISE.as_bytes()) };
    if !request.force
        && let Ok(template) = current(directories)
        && inputs_of(&template.path).as_ref() == Some(&inputs)
    {
        drop(staging);
        progress.note(&format!("{} is up to date", template.path.display()));
        let removed = store.settle(&template.path, request.in_use, progress, cancel)?;
        return Ok(Built { template, fresh: false, removed });
    }
    check_space(store.path(), maker.space())?;
    let list: String = inputs.packages.iter().map(|p| format!("{} {}\n", p.name, p.version)).collect();
    for (name, text) in [("packages.list", list.as_str()), ("customise.sh", CUSTOMISE)] {
        let path = work.join(name);
        fs::write(&path, text).map_err(|error| Error::io("write", &path, error))?;
    }
    let image = staging.path.join("template.qcow2");
    let stage = Stage { directory: &staging.path, work: &work, image: &image };
    let installed = maker.make(&stage, progress, cancel).map_err(|error| explain_space(error, &templates))?;
    packages::verify(&inputs.packages, &installed)?;
    let virtual_size = qcow2::standalone_size(&image)?;
    cancel.check()?;

    progress.phase("publishing the template");
    let created_at = jiff::Timestamp::now().to_string();
    let key = Sha512Hex::of(format!("{created_at} {inputs:?} {}", disk::random_uuid()?).as_bytes());
    let manifest = Manifest { format: MANIFEST_FORMAT, created_at, inputs, installed };
    let text = serde_json::to_vec_pretty(&manifest)
        .map_err(|error| Error::new(ErrorKind::Io, "cannot write the manifest").because(error))?;
    let manifest_path = staging.path.join("manifest.json");
    fs::write(&manifest_path, text).map_err(|error| Error::io("write", &manifest_path, error))?;
    let path = store.publish(&image, &manifest_path, &store::new_stem(key.short(8)))?;
    drop(staging);
    maker.finished();
    let removed = store.settle(&path, request.in_use, progress, cancel)?;
    Ok(Built { template: Template { path, virtual_size }, fresh: true, removed })
}

/// What a template was made of, by its manifest. `None` for one without: it was made by another program.
fn inputs_of(template: &Path) -> Option<Inputs> {
    let manifest: Manifest = serde_json::from_slice(&fs::read(template.with_extension("json")).ok()?).ok()?;
    (manifest.format == MANIFEST_FORMAT).then_some(manifest.inputs)
}

fn check_space(directory: &Path, needed: u64) -> Result<()> {
    let space = nix::sys::statvfs::statvfs(directory)
        .map_err(|error| Error::io("ask for the free space of", directory, error.into()))?;
    let free = space.blocks_available().saturating_mul(space.fragment_size());
    if free >= needed {
        return Ok(());
    }
    let message =
        format!("not enough space in {}: {} MiB free of {} MiB needed", directory.display(), free >> 20, needed >> 20);
    Err(Error::new(ErrorKind::Exhausted, message).hint("free some space, or make its filesystem larger"))
}

/// A step that failed for want of space is told so, whatever the program it ran said last.
fn explain_space(error: Error, directory: &Path) -> Error {
    let full = nix::sys::statvfs::statvfs(directory)
        .is_ok_and(|space| space.blocks_available().saturating_mul(space.fragment_size()) < 32 << 20);
    if full && error.hint.is_none() && error.kind == ErrorKind::Io {
        return error.hint(format!("the filesystem of {} is full", directory.display()));
    }
    error
}

/// Runs a command that runs the customise script: its phases become progress, its own error the cause of a failure.
fn run_customise(
    command: &mut std::process::Command,
    what: &str,
    progress: &dyn Progress,
    cancel: &Cancel,
) -> Result<()> {
    use crate::child::CommandExt;
    let mut reason = None;
    let result = command.run_watched(what, cancel, &mut |line| {
        let Some((_, said)) = line.split_once("customise: ") else {
            // apt names the package that stands in the way before it gives up.
            if reason.is_none() && (line.starts_with("E: ") || line.contains(" : Depends: ")) {
                reason = Some(line.trim().to_owned());
            }
            return;
        };
        if let Some(phase) = said.strip_prefix("phase ") {
            progress.phase(phase);
        } else if let Some(warning) = said.strip_prefix("warning: ") {
            progress.warn(warning);
        } else if let Some(error) = said.strip_prefix("error: ") {
            reason = Some(match reason.take() {
                Some(before) => format!("{error} ({before})"),
                None => error.to_owned(),
            });
        }
    });
    match (result, reason) {
        (Err(error), Some(reason)) if error.kind == ErrorKind::Io => {
            let reason: String = reason.chars().take(300).collect();
            // What the program said around it would only repeat it, and the installer shows 500 characters.
            Err(Error::new(ErrorKind::Conflict, format!("{what}: {reason}")))
        }
        (result, _) => result.map(drop),
    }
}

/// Makes `path` and everything above it down to the staging directory readable for programs that drop root's rights.
fn readable(path: &Path) -> Result<()> {
    fs::set_permissions(path, fs::Permissions::from_mode(0o755))
        .map_err(|error| Error::io("set the mode of", path, error))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::progress::Silent;
    use std::time::{Duration, Instant};

    /// Makes the smallest possible image at once.
    #[derive(Default)]
    struct Quick {
        identity: &'static str,
        fail: bool,
        made: u32,
        space: u64,
        without_packages: bool,
    }

    impl Maker for Quick {
        fn identity(&mut self, _progress: &dyn Progress, _cancel: &Cancel) -> Result<String> {
            Ok(self.identity.to_owned())
        }
        fn space(&self) -> u64 {
            self.space
        }
        fn make(&mut self, stage: &Stage, _: &dyn Progress, cancel: &Cancel) -> Result<BTreeMap<String, String>> {
            self.made += 1;
            fs::write(stage.image, qcow2::tests::image(3 << 30, None, 0)).unwrap();
            cancel.check()?;
            if self.fail {
                return Err(Error::new(ErrorKind::Io, "cannot install: no"));
            }
            let list = fs::read_to_string(stage.work.join("packages.list")).unwrap();
            let pairs = list.lines().map(|line| line.split_once(' ').unwrap());
            Ok(pairs.filter(|_| !self.without_packages).map(|(a, b)| (a.to_owned(), b.to_owned())).collect())
        }
    }

    fn directories(state: &Path) -> Directories {
        Directories { state: state.to_owned(), ..Directories::default() }
    }

    fn nobody() -> Result<BTreeSet<PathBuf>> {
        Ok(BTreeSet::new())
    }

    fn request(force: bool, allow_no_packages: bool) -> BuildRequest<'static> {
        BuildRequest {
            source: Source::Packages { suite: DEFAULT_SUITE.to_owned() },
            force,
            allow_no_packages,
            proxy: None,
            emulate: true,
            in_use: &nobody,
        }
    }

    fn run(maker: &mut Quick, force: bool, state: &Path) -> Result<Built> {
        build_with(maker, &request(force, true), &directories(state), &Silent, &Cancel::default())
    }

    fn names(state: &Path) -> Vec<String> {
        let mut names: Vec<String> = fs::read_dir(state.join("templates"))
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn the_same_inputs_are_built_once_and_anything_new_again() {
        let dir = tempfile::tempdir().unwrap();
        let state = dir.path();
        let mut maker = Quick { identity: "one", ..Quick::default() };
        let first = run(&mut maker, false, state).unwrap();
        assert!(first.fresh);
        let again = run(&mut maker, false, state).unwrap();
        assert!(!again.fresh);
        assert_eq!(again.template, first.template);
        assert_eq!(maker.made, 1);

        let forced = run(&mut maker, true, state).unwrap();
        assert_ne!(forced.template.path, first.template.path);
        assert_eq!(forced.removed, [first.template.path]);

        maker.identity = "two";
        assert!(run(&mut maker, false, state).unwrap().fresh);

        let packages = directories(state).template_packages();
        fs::create_dir(&packages).unwrap();
        if packages::tests::deb(&packages, "a.deb", "a", "1").is_none() {
            return;
        }
        assert!(run(&mut maker, false, state).unwrap().fresh);
        assert!(!run(&mut maker, false, state).unwrap().fresh);
        packages::tests::deb(&packages, "a.deb", "a", "2").unwrap();
        let last = run(&mut maker, false, state).unwrap();
        assert!(last.fresh);
        let manifest = fs::read_to_string(last.template.path.with_extension("json")).unwrap();
        let manifest: Manifest = serde_json::from_str(&manifest).unwrap();
        assert_eq!(manifest.installed.get("a").map(String::as_str), Some("2"));
        assert_eq!(names(state).len(), 6, "{:?}", names(state));
    }

    #[test]
    fn a_failed_build_leaves_the_previous_template_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let state = dir.path();
        let good = run(&mut Quick::default(), false, state).unwrap();
        let before = names(state);
        let packages = directories(state).template_packages();
        fs::create_dir(&packages).unwrap();
        let has_dpkg = packages::tests::deb(&packages, "a.deb", "a", "1").is_some();

        let failed = run(&mut Quick { fail: true, ..Quick::default() }, true, state).unwrap_err();
        assert_eq!(failed.message, "cannot install: no");
        let full = run(&mut Quick { space: u64::MAX, ..Quick::default() }, true, state).unwrap_err();
        assert_eq!(full.kind, ErrorKind::Exhausted);
        if has_dpkg {
            let lacking = run(&mut Quick { without_packages: true, ..Quick::default() }, true, state).unwrap_err();
            assert_eq!(lacking.message, "not installed in the image: a 1");
        }
        let cancel = Cancel::default();
        cancel.cancel();
        let stopped =
            build_with(&mut Quick::default(), &request(true, true), &directories(state), &Silent, &cancel).unwrap_err();
        assert_eq!(stopped.kind, ErrorKind::Interrupted);

        assert_eq!(names(state), before);
        assert_eq!(current(&directories(state)).unwrap(), good.template);
    }

    #[test]
    fn an_image_nobody_could_log_in_to_is_refused_unless_asked_for() {
        let dir = tempfile::tempdir().unwrap();
        let mut maker = Quick::default();
        let error =
            build_with(&mut maker, &request(false, false), &directories(dir.path()), &Silent, &Cancel::default())
                .unwrap_err();
        assert_eq!(error.kind, ErrorKind::NotFound);
        assert!(error.hint.unwrap().contains("--allow-no-packages"));
        assert_eq!(maker.made, 0);
    }

    #[test]
    fn two_builds_at_once_make_one_template() {
        let dir = tempfile::tempdir().unwrap();
        let state = dir.path();
        let outcomes: Vec<Built> = std::thread::scope(|scope| {
            let builds: Vec<_> =
                (0..4).map(|_| scope.spawn(|| run(&mut Quick::default(), false, state).unwrap())).collect();
            builds.into_iter().map(|build| build.join().unwrap()).collect()
        });
        assert_eq!(outcomes.iter().filter(|built| built.fresh).count(), 1);
        assert!(outcomes.iter().all(|built| built.template == outcomes[0].template));
    }

    /// Where the child of the next test builds; set only for that child.
    const KILLED_BUILD: &str = "BLOCKHOST_TEST_KILLED_BUILD";

    struct Endless;

    impl Maker for Endless {
        fn identity(&mut self, _progress: &dyn Progress, _cancel: &Cancel) -> Result<String> {
            Ok("endless".into())
        }
        fn space(&self) -> u64 {
            0
        }
        fn make(&mut self, stage: &Stage, _: &dyn Progress, cancel: &Cancel) -> Result<BTreeMap<String, String>> {
            use crate::child::CommandExt;
            let pid = stage.directory.join("pid");
            crate::child::tied("sh")
                .args(["-c", "mkdir -p \"$1.d/a/b\"; echo $$ > \"$1\"; exec sleep 300", "sh"])
                .arg(pid)
                .run("cannot sleep", cancel)?;
            Ok(BTreeMap::new())
        }
    }

    #[test]
    fn a_killed_build_leaves_no_process_and_the_next_build_no_trace() {
        if let Some(state) = std::env::var_os(KILLED_BUILD) {
            let directories = directories(Path::new(&state));
            let _ = build_with(&mut Endless, &request(true, true), &directories, &Silent, &Cancel::default());
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let state = dir.path();
        let old = run(&mut Quick::default(), false, state).unwrap();
        let before = names(state);
        let mut build = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "template::tests::a_killed_build_leaves_no_process_and_the_next_build_no_trace"])
            .env(KILLED_BUILD, state)
            .stdout(std::process::Stdio::null())
            .spawn()
            .unwrap();
        let end = Instant::now() + Duration::from_secs(60);
        let pid = loop {
            assert!(Instant::now() < end);
            std::thread::sleep(Duration::from_millis(10));
            let staging = names(state).into_iter().find(|name| name.starts_with(".staging-"));
            let pid = staging.and_then(|s| fs::read_to_string(state.join("templates").join(s).join("pid")).ok());
            if let Some(pid) = pid.filter(|pid| pid.ends_with('\n')) {
                break pid.trim().to_owned();
            }
        };
        build.kill().unwrap();
        build.wait().unwrap();
        assert_eq!(current(&directories(state)).unwrap(), old.template);
        let gone = || fs::read_to_string(format!("/proc/{pid}/stat")).map_or(true, |stat| stat.contains(") Z"));
        while !gone() {
            assert!(Instant::now() < end, "the build's child outlives it");
            std::thread::sleep(Duration::from_millis(10));
        }
        assert!(names(state).len() > before.len());
        assert!(!run(&mut Quick::default(), false, state).unwrap().fresh);
        assert_eq!(names(state), before);
    }
}
