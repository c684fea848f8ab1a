//! Makes an image from a cloud image, which a small virtual machine of libguestfs changes from inside.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::checksum::{Sha512Hex, find_in_sums};
use super::download::Http;
use super::{BuildRequest, Maker, Stage, apt, disk, packages, qcow2, run_customise};
use crate::cancel::Cancel;
use crate::child::{self, CommandExt};
use crate::progress::Progress;
use crate::{Error, ErrorKind, Result};

/// Where the work directory is in the image.
const INSIDE: &str = "/var/tmp";

/// See the module.
pub(super) struct CloudImage {
    location: Location,
    sha512: Option<Sha512Hex>,
    http: Http,
    emulate: bool,
    downloads: PathBuf,
}

enum Location {
    Url(String),
    File(PathBuf),
}

impl CloudImage {
    /// A maker for the image at `location`; downloads are kept below `downloads` until a build succeeds.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] if a local file does not exist, [`ErrorKind::Invalid`] for an unknown kind of URL.
    pub fn new(location: &str, sha512: Option<Sha512Hex>, request: &BuildRequest, downloads: &Path) -> Result<Self> {
        let location = match location.split_once("://") {
            Some(("http" | "https", _)) => Location::Url(location.to_owned()),
            Some(("file", path)) => Location::File(path.into()),
            Some((scheme, _)) => {
                let message = format!("cannot fetch an image through {scheme}: only http, https and files");
                return Err(Error::new(ErrorKind::Invalid, message));
            }
            None => Location::File(location.into()),
        };
        if let Location::File(path) = &location
            && !path.exists()
        {
            return Err(Error::new(ErrorKind::NotFound, format!("there is no image {}", path.display())));
        }
        Ok(Self {
            location,
            sha512,
            http: Http { proxy: request.proxy.clone(), pause: Duration::from_secs(2) },
            emulate: request.emulate,
            downloads: downloads.to_owned(),
        })
    }

    fn expected(&self) -> Result<Sha512Hex> {
        self.sha512.clone().ok_or_else(|| Error::new(ErrorKind::Invalid, "the image's checksum is not known"))
    }

    fn guestfs(&self, program: &str, stage: &Stage) -> std::process::Command {
        let mut command = child::contained(program);
        command.env("LIBGUESTFS_BACKEND", "direct").env("LIBGUESTFS_TMPDIR", stage.directory);
        if self.emulate {
            command.env("LIBGUESTFS_BACKEND_SETTINGS", "force_tcg");
        }
        command
    }
}

impl Maker for CloudImage {
    fn identity(&mut self, progress: &dyn Progress, cancel: &Cancel) -> Result<String> {
        child::require(&[
            ("virt-customize", "libguestfs-tools"),
            ("qemu-img", "qemu-utils"),
            ("dpkg-deb", "dpkg"),
            ("setpriv", "util-linux"),
        ])?;
        if self.sha512.is_none() {
            self.sha512 = Some(match &self.location {
                Location::Url(url) => {
                    progress.phase("fetching the image's checksum");
                    if url.starts_with("http://") {
                        progress
                            .warn("the checksum comes over plain HTTP: it protects from damage, not from an attacker");
                    }
                    self.http.checksum_beside(url, cancel)?
                }
                Location::File(path) => checksum_beside(path)?,
            });
        }
        let location = match &self.location {
            Location::Url(url) => url.clone(),
            Location::File(path) => path.display().to_string(),
        };
        Ok(format!("image {location} sha512 {}", self.expected()?))
    }

    fn space(&self) -> u64 {
        // The image as it comes, and the template with what is installed in it.
        4 << 30
    }

    fn make(&mut self, stage: &Stage, progress: &dyn Progress, cancel: &Cancel) -> Result<BTreeMap<String, String>> {
        let expected = self.expected()?;
        let source = match &self.location {
            Location::Url(url) => {
                progress.phase(&format!("downloading {url}"));
                self.http.fetch(url, &expected, &self.downloads, progress, cancel)?
            }
            Location::File(path) => {
                progress.phase(&format!("checking {}", path.display()));
                let copy = stage.directory.join("source.img");
                let actual = packages::copy_hashed(path, &copy, cancel)?;
                if actual != expected {
                    let message = format!(
                        "{} has the SHA-512 {}… instead of {}…",
                        path.display(),
                        actual.short(16),
                        expected.short(16)
                    );
                    return Err(Error::new(ErrorKind::Invalid, message).hint("fetch the image again"));
                }
                copy
            }
        };
        progress.phase("converting the image");
        disk::to_qcow2(&source, format_of(&source)?, stage.image, cancel)?;

        progress.phase("installing in the image");
        let proxy = apt::proxy_settings(cancel)?;
        if !proxy.is_empty() {
            let path = stage.work.join("apt.conf");
            fs::write(&path, proxy).map_err(|error| Error::io("write", &path, error))?;
        }
        let inside = format!("{INSIDE}/{}", stage.work.file_name().unwrap_or_default().display());
        let mut command = self.guestfs("virt-customize", stage);
        // stdout carries the script's words where it succeeds, stderr where it fails.
        command
            .args(["--no-logfile", "--format", "qcow2", "--add"])
            .arg(stage.image)
            .arg("--copy-in")
            .arg(format!("{}:{INSIDE}", stage.work.display()))
            .arg("--run-command")
            .arg(format!("sh {inside}/customise.sh {inside}"));
        run_customise(&mut command, "cannot change the image", progress, cancel)?;
        progress.phase("checking the image");
        let status = self
            .guestfs("virt-cat", stage)
            .args(["--format=qcow2", "-a"])
            .arg(stage.image)
            .arg("/var/lib/dpkg/status")
            .run("cannot read the image's packages", cancel)?;
        Ok(packages::installed(&String::from_utf8_lossy(&status)))
    }

    fn finished(&mut self) {
        // What is left is a download that is done, or one of an image that is not wanted any more.
        if let Err(error) = fs::remove_dir_all(&self.downloads)
            && error.kind() != std::io::ErrorKind::NotFound
        {
            tracing::warn!(%error, directory = %self.downloads.display(), "downloads stay");
        }
    }
}

/// The SHA-512 of a local image, from the `SHA512SUMS` beside it.
///
/// # Errors
/// [`ErrorKind::NotFound`] if there is none.
fn checksum_beside(image: &Path) -> Result<Sha512Hex> {
    let list = image.with_file_name("SHA512SUMS");
    let name = image.file_name().unwrap_or_default().to_string_lossy();
    fs::read_to_string(&list).ok().and_then(|text| find_in_sums(&text, &name)).ok_or_else(|| {
        Error::new(ErrorKind::NotFound, format!("there is no checksum of {name} in {}", list.display()))
            .hint("the checksum of an image is always verified: give it with --sha512")
    })
}

/// qcow2 or raw, decided here and never by a program that would open whatever else an image names.
///
/// # Errors
/// [`ErrorKind::Invalid`] for anything else, and for a qcow2 image that needs another file.
fn format_of(image: &Path) -> Result<&'static str> {
    let read = |offset: u64, buffer: &mut [u8]| {
        fs::File::open(image).and_then(|file| file.read_exact_at(buffer, offset)).is_ok()
    };
    let (mut magic, mut mark) = ([0; 4], [0; 2]);
    if read(0, &mut magic) && magic == *b"QFI\xfb" {
        qcow2::standalone_size(image)?;
        return Ok("qcow2");
    }
    if read(510, &mut mark) && mark == [0x55, 0xaa] {
        return Ok("raw");
    }
    Err(Error::new(ErrorKind::Invalid, format!("{} is neither a qcow2 image nor a raw disk", image.display())))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn the_format_is_decided_by_what_the_file_is() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x");
        let mut raw = vec![0; 1024];
        raw[510..512].copy_from_slice(&[0x55, 0xaa]);
        fs::write(&path, &raw).unwrap();
        assert_eq!(format_of(&path).unwrap(), "raw");
        fs::write(&path, qcow2::tests::image(1, None, 0)).unwrap();
        assert_eq!(format_of(&path).unwrap(), "qcow2");
        fs::write(&path, qcow2::tests::image(1, Some("/etc/shadow"), 0)).unwrap();
        assert!(format_of(&path).is_err());
        fs::write(&path, b"<html>404</html>").unwrap();
        assert!(format_of(&path).is_err());
    }

    #[test]
    fn a_local_image_needs_a_checksum_too() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.qcow2");
        assert!(checksum_beside(&path).unwrap_err().hint.unwrap().contains("--sha512"));
        fs::write(dir.path().join("SHA512SUMS"), format!("{}  x.qcow2\n", Sha512Hex::of(b"1"))).unwrap();
        assert_eq!(checksum_beside(&path).unwrap(), Sha512Hex::of(b"1"));
    }
}
