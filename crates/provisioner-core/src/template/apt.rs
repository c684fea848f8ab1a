//! The package sources of the building host, as apt itself understands them: every format, every option, its proxy.

use std::process::Command;

use crate::cancel::Cancel;
use crate::child::CommandExt;
use crate::{Error, ErrorKind, Result};

/// Fields of one line of `apt-get indextargets`, separated by tabs.
const FIELDS: &str = "$(CREATED_BY)\t$(REPO_URI)\t$(RELEASE)\t$(CODENAME)\t$(COMPONENT)\t$(ORIGIN)";
/// Debian's own archive areas, in the order they are written.
const COMPONENTS: [&str; 4] = ["main", "contrib", "non-free", "non-free-firmware"];

/// The lines for a `sources.list` with Debian's own `suite`, its updates and security updates, from the host's mirrors.
/// A third party's archive is left out.
///
/// # Errors
/// [`ErrorKind::Config`] if the host has no such source; whatever keeps apt from answering.
pub fn host_sources(suite: &str, cancel: &Cancel) -> Result<Vec<String>> {
    // By default apt shows only archives whose lists it has; on a fresh machine it has none, and then no origin either.
    for extra in [None, Some("--no-release-info")] {
        let output = Command::new("apt-get")
            .args(["indextargets", "--format", FIELDS])
            .args(extra)
            .run("cannot ask apt for this machine's package sources", cancel)?;
        let lines = sources(&String::from_utf8_lossy(&output), suite);
        if lines.iter().any(|line| line.contains(&format!(" {suite} "))) {
            return Ok(lines);
        }
    }
    Err(Error::new(ErrorKind::Config, format!("this machine's apt has no source for Debian's suite {suite}"))
        .hint("add one to /etc/apt/sources.list, or build from a cloud image with --image"))
}

fn sources(targets: &str, suite: &str) -> Vec<String> {
    let wanted = [suite.to_owned(), format!("{suite}-updates"), format!("{suite}-security")];
    // Suite's place, URI and components, in the order apt names them.
    let mut found: Vec<(usize, &str, Vec<&str>)> = Vec::new();
    for line in targets.lines() {
        let fields: Vec<&str> = line.split('\t').collect();
        let &[created_by, uri, release, codename, component, origin] = fields.as_slice() else { continue };
        let Some(place) = wanted.iter().position(|name| name == release || name == codename) else { continue };
        let Some(&component) = COMPONENTS.iter().find(|name| **name == component) else { continue };
        if created_by != "Packages" || !is_debian(uri, origin) {
            continue;
        }
        match found.iter_mut().find(|entry| entry.0 == place && entry.1 == uri) {
            Some(entry) if !entry.2.contains(&component) => entry.2.push(component),
            Some(_) => {}
            None => found.push((place, uri, vec![component])),
        }
    }
    found.sort_by_key(|entry| entry.0);
    found
        .into_iter()
        .map(|(place, uri, components)| {
            format!("deb {} {} {}", uri.trim_end_matches('/'), wanted[place], components.join(" "))
        })
        .collect()
}

/// Whether an archive is Debian's. Its Release file says so; on a machine whose lists were never fetched, the address
/// must do: mirrors keep the archive in a directory named `debian` or `debian-security`.
fn is_debian(uri: &str, origin: &str) -> bool {
    if uri.contains([' ', '\t', '[', ']', '#']) {
        return false;
    }
    // apt leaves the placeholder in place where it does not know.
    if !origin.is_empty() && !origin.starts_with('$') {
        return origin == "Debian";
    }
    let path = uri.split_once("://").map_or(uri, |(_, rest)| rest.split_once('/').map_or("", |(_, path)| path));
    path.split('/').any(|part| part == "debian" || part.starts_with("debian-"))
}

/// The host's proxy settings for apt, as a configuration file for apt in the image; empty if there are none.
///
/// # Errors
/// Whatever keeps apt from answering.
pub fn proxy_settings(cancel: &Cancel) -> Result<String> {
    let output = Command::new("apt-config").arg("dump").run("cannot ask apt for its proxy", cancel)?;
    let text = String::from_utf8_lossy(&output);
    let is_proxy = |line: &&str| {
        let name = line.split(' ').next().unwrap_or_default().to_ascii_lowercase();
        // Not Proxy-Auto-Detect: it names a program of the host.
        name.starts_with("acquire::") && name.split("::").any(|part| part == "proxy") && !line.contains("\"\"")
    };
    Ok(text.lines().filter(is_proxy).map(|line| format!("{line}\n")).collect())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn only_debians_own_suites_are_taken_and_components_are_joined() {
        let targets = "\
Packages\thttp://mirror.example/debian/\tbookworm\tbookworm\tmain\tDebian\n\
Translations\thttp://mirror.example/debian/\tbookworm\tbookworm\tcontrib\tDebian\n\
Packages\thttp://mirror.example/debian-security/\toldstable-security\tbookworm-security\tmain\tDebian\n\
Packages\thttp://mirror.example/debian/\tbookworm-updates\tbookworm-updates\tmain\tDebian\n\
Packages\thttp://mirror.example/debian/\tbookworm\tbookworm\tnon-free-firmware\tDebian\n\
Packages\thttp://mirror.example/debian/\tbookworm\tbookworm\tmain\tDebian\n\
Packages\thttp://mirror.example/debian/\tbookworm-backports\tbookworm-backports\tmain\tDebian\n\
Packages\thttp://mirror.example/debian/\ttrixie\ttrixie\tmain\tDebian\n\
Packages\thttp://vendor.example/debian/\tbookworm\tbookworm\tmain\tVendor\n\
Packages\thttp://vendor.example/apt/\tbookworm\t$(CODENAME)\tmain\t$(ORIGIN)\n\
Packages\thttp://vendor.example/debian/\tbookworm\tbookworm\tstable\t\n\
Packages\tfile:/srv/debian/\tbookworm\t$(CODENAME)\tmain\t$(ORIGIN)\n\
garbage\n";
        assert_eq!(
            sources(targets, "bookworm"),
            [
                "deb http://mirror.example/debian bookworm main non-free-firmware",
                "deb file:/srv/debian bookworm main",
                "deb http://mirror.example/debian bookworm-updates main",
                "deb http://mirror.example/debian-security bookworm-security main",
            ]
        );
    }

    #[test]
    fn an_archive_without_lists_is_known_by_its_path() {
        assert!(is_debian("http://a.example/debian/", ""));
        assert!(is_debian("http://a.example/archive/debian/20250101T000000Z/", ""));
        assert!(is_debian("http://a.example/debian-security", ""));
        assert!(!is_debian("http://debian.example/", ""));
        assert!(!is_debian("http://a.example/debian/", "Vendor"));
        assert!(!is_debian("http://a.example/debian x/", "Debian"));
    }
}
