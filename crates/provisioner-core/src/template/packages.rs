//! The `.deb` files every template must contain, and the check that it does.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::Command;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha512};

use super::checksum::Sha512Hex;
use crate::cancel::Cancel;
use crate::child::CommandExt;
use crate::{Error, ErrorKind, Result};

/// One package to install in the image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TemplatePackage {
    /// Debian's name of it.
    pub name: String,
    /// Debian's version of it.
    pub version: String,
    /// Sum of the file.
    pub sha512: Sha512Hex,
}

/// Copies every `*.deb` of `from` into the new directory `to`, under plain names, and reads what they are. What was
/// hashed is what will be installed, whatever happens to the originals meanwhile. A missing `from` holds none.
///
/// # Errors
/// [`ErrorKind::Io`]; [`ErrorKind::Invalid`] for a file that is no Debian package; [`ErrorKind::Conflict`] for two
/// versions of one package.
pub(super) fn collect(from: &Path, to: &Path, cancel: &Cancel) -> Result<Vec<TemplatePackage>> {
    fs::create_dir(to).map_err(|error| Error::io("create", to, error))?;
    let mut files: Vec<PathBuf> = match fs::read_dir(from) {
        Ok(entries) => entries.map(|entry| entry.map(|e| e.path())).collect::<std::io::Result<_>>(),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error),
    }
    .map_err(|error| Error::io("list", from, error))?;
    files.retain(|path| path.extension().is_some_and(|extension| extension == "deb"));
    files.sort();
    let mut packages: Vec<TemplatePackage> = Vec::new();
    for (number, file) in files.iter().enumerate() {
        cancel.check()?;
        let copy = to.join(format!("{number:03}.deb"));
        let sha512 = copy_hashed(file, &copy, cancel)?;
        let not_a_package = || Error::new(ErrorKind::Invalid, format!("{} is not a Debian package", file.display()));
        let output = Command::new("dpkg-deb")
            .args(["--show", "--showformat=${Package} ${Version} ${Architecture}"])
            .arg(&copy)
            .run(&format!("cannot read {}", file.display()), cancel)
            .map_err(|error| if error.kind == ErrorKind::Io { not_a_package().because(error) } else { error })?;
        let text = String::from_utf8_lossy(&output);
        let fields: Vec<&str> = text.trim().split(' ').collect();
        let &[name, version, architecture] = fields.as_slice() else { return Err(not_a_package()) };
        let plain =
            |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"+-.~:".contains(&b));
        if !plain(name) || !plain(version) || name.starts_with('-') {
            return Err(not_a_package());
        }
        if !matches!(architecture, "all" | "amd64") {
            let message = format!("{} is for {architecture}, the template is amd64", file.display());
            return Err(Error::new(ErrorKind::Invalid, message));
        }
        if let Some(other) = packages.iter().find(|other| other.name == name) {
            let message = format!(
                "{} holds two packages called {name}: versions {} and {version}",
                from.display(),
                other.version
            );
            return Err(Error::new(ErrorKind::Conflict, message).hint("remove the older file"));
        }
        packages.push(TemplatePackage { name: name.to_owned(), version: version.to_owned(), sha512 });
    }
    packages.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(packages)
}

/// Copies a file and returns the SHA-512 of what was written.
///
/// # Errors
/// [`ErrorKind::Io`], [`ErrorKind::Invalid`] for something that is no file, [`ErrorKind::Interrupted`].
pub(super) fn copy_hashed(from: &Path, to: &Path, cancel: &Cancel) -> Result<Sha512Hex> {
    let mut source = File::open(from).map_err(|error| Error::io("open", from, error))?;
    if !source.metadata().map_err(|error| Error::io("examine", from, error))?.is_file() {
        return Err(Error::new(ErrorKind::Invalid, format!("{} is not a file", from.display())));
    }
    let mut target = File::create_new(to).map_err(|error| Error::io("create", to, error))?;
    let mut hash = Sha512::new();
    let mut buffer = vec![0; 1 << 18];
    loop {
        cancel.check()?;
        let length = source.read(&mut buffer).map_err(|error| Error::io("read", from, error))?;
        if length == 0 {
            return Ok(Sha512Hex::from_digest(&hash.finalize()));
        }
        hash.update(&buffer[..length]);
        target.write_all(&buffer[..length]).map_err(|error| Error::io("write", to, error))?;
    }
}

/// Name and version of every package that dpkg's status file lists as properly installed.
#[must_use]
pub(super) fn installed(status: &str) -> BTreeMap<String, String> {
    let mut found = BTreeMap::new();
    for paragraph in status.split("\n\n") {
        let field =
            |name: &str| paragraph.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':').map(str::trim));
        if let (Some(name), Some(version), Some("install ok installed")) =
            (field("Package"), field("Version"), field("Status"))
        {
            found.insert(name.to_owned(), version.to_owned());
        }
    }
    found
}

/// Fails unless every one of `wanted` is among `installed`, in its version.
///
/// # Errors
/// [`ErrorKind::Conflict`] that names each one that is not.
pub(super) fn verify(wanted: &[TemplatePackage], installed: &BTreeMap<String, String>) -> Result<()> {
    let missing: Vec<String> = wanted
        .iter()
        .filter(|package| installed.get(&package.name) != Some(&package.version))
        .map(|package| format!("{} {}", package.name, package.version))
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    Err(Error::new(ErrorKind::Conflict, format!("not installed in the image: {}", missing.join(", "))))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
pub(crate) mod tests {
    use super::*;

    /// Builds a small package; `None` where dpkg-deb is not there.
    pub(crate) fn deb(dir: &Path, file: &str, name: &str, version: &str) -> Option<()> {
        if crate::skipping::lacks("dpkg-deb") {
            return None;
        }
        let tree = tempfile::tempdir().unwrap();
        let control = tree.path().join("DEBIAN/control");
        fs::create_dir(control.parent().unwrap()).unwrap();
        let text = format!(
            "Package: {name}\nVersion: {version}\nArchitecture: all\nMaintainer: Nobody <nobody@localhost>\nDescription: test\n"
        );
        fs::write(control, text).unwrap();
        Command::new("dpkg-deb")
            .args(["--build", "--root-owner-group", "-Znone"])
            .arg(tree.path())
            .arg(dir.join(file))
            .run("cannot build", &Cancel::default())
            .unwrap();
        Some(())
    }

    #[test]
    fn packages_are_copied_under_plain_names_and_known_by_what_they_are() {
        let dir = tempfile::tempdir().unwrap();
        let from = dir.path().join("from");
        fs::create_dir(&from).unwrap();
        let Some(()) = deb(&from, "odd $(name) '.deb", "b-package", "2:1.0~rc1-1") else { return };
        deb(&from, "a.deb", "a-package", "1.0");
        fs::write(from.join("readme.txt"), b"not a package").unwrap();
        let cancel = Cancel::default();
        let packages = collect(&from, &dir.path().join("to"), &cancel).unwrap();
        let names: Vec<_> = packages.iter().map(|p| (p.name.as_str(), p.version.as_str())).collect();
        assert_eq!(names, [("a-package", "1.0"), ("b-package", "2:1.0~rc1-1")]);
        assert_eq!(fs::read_dir(dir.path().join("to")).unwrap().count(), 2);

        deb(&from, "newer.deb", "a-package", "2.0");
        let error = collect(&from, &dir.path().join("to2"), &cancel).unwrap_err();
        assert_eq!(error.kind, ErrorKind::Conflict);
        fs::write(from.join("newer.deb"), b"half a download").unwrap();
        let error = collect(&from, &dir.path().join("to3"), &cancel).unwrap_err();
        assert!(error.message.ends_with("newer.deb is not a Debian package"), "{}", error.message);
    }

    #[test]
    fn a_missing_directory_holds_no_packages() {
        let dir = tempfile::tempdir().unwrap();
        let to = dir.path().join("to");
        assert_eq!(collect(&dir.path().join("none"), &to, &Cancel::default()).unwrap(), []);
    }

    #[test]
    fn only_properly_installed_packages_in_that_version_count() {
        let status = "Package: a\nStatus: install ok installed\nVersion: 1\nDescription: x\n Package: z\n\n\
                      Package: b\nStatus: install ok half-configured\nVersion: 1\n\n\
                      Package: c\nVersion: 3\nStatus: install ok installed\n";
        let installed = installed(status);
        assert_eq!(installed.len(), 2);
        let wanted = |name: &str, version: &str| TemplatePackage {
            name: name.into(),
            version: version.into(),
            sha512: Sha512Hex::of(b""),
        };
        verify(&[wanted("a", "1"), wanted("c", "3")], &installed).unwrap();
        let error = verify(&[wanted("a", "2"), wanted("b", "1"), wanted("c", "3")], &installed).unwrap_err();
        assert_eq!(error.message, "not installed in the image: a 2, b 1");
    }
}
