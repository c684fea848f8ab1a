//! `blockhost-build-template`: see `--help`.

use std::collections::BTreeSet;
use std::fs::OpenOptions;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use provisioner_core::host::Host;
use provisioner_core::libvirt::{InUse, kvm};
use provisioner_core::settings::DomainType;
use provisioner_core::template::{self, BuildRequest, DEFAULT_IMAGE, DEFAULT_SUITE, Sha512Hex, Source};

/// Build the base image every VM is made from, unless the current one is up to date. Needs root.
///
/// Every .deb in /var/lib/blockhost/template-packages is installed in it. VMs keep the very file they were made from,
/// for as long as they live; a build that fails or is killed leaves the previous template in use.
#[derive(Parser)]
#[command(
    name = "blockhost-build-template",
    version,
    after_help = "\
Without an option the image is libvirt.template_url of db.yaml, else Debian's official generic image. Its SHA-512 is
always verified.

Examples:
  blockhost-build-template
  blockhost-build-template --image ./debian-12-generic-amd64.qcow2 --force
  blockhost-build-template --from-packages"
)]
pub struct Arguments {
    /// Build even if the current template was made of the same image, packages and settings.
    #[arg(long)]
    force: bool,
    /// Cloud image to start from: a path or a URL, with its SHA512SUMS beside it.
    #[arg(long, value_name = "PATH|URL", conflicts_with = "from_packages")]
    image: Option<String>,
    /// SHA-512 of the image, instead of the one in SHA512SUMS.
    #[arg(long, value_name = "HEX", requires = "image")]
    sha512: Option<Sha512Hex>,
    /// Build from Debian packages, from the mirrors this machine's apt uses, instead of a cloud image.
    #[arg(long)]
    from_packages: bool,
    /// Debian release to build from packages.
    #[arg(long, value_name = "NAME", default_value = DEFAULT_SUITE, requires = "from_packages")]
    suite: String,
    /// Accept that there is no package to install: nobody can log in to VMs of such a template.
    #[arg(long)]
    allow_no_packages: bool,
}

fn source(arguments: Arguments, host: &Host) -> anyhow::Result<Source> {
    if arguments.from_packages {
        return Ok(Source::Packages { suite: arguments.suite });
    }
    if let Some(location) = arguments.image {
        return Ok(Source::CloudImage { location, sha512: arguments.sha512 });
    }
    let settings = &host.settings.libvirt;
    let sha512 = settings.template_sha512.as_deref().map(str::parse).transpose()?;
    Ok(Source::CloudImage {
        location: settings.template_url.clone().unwrap_or_else(|| DEFAULT_IMAGE.to_owned()),
        sha512,
    })
}

/// The backing files of every overlay, of defined domains and in the pool's directory.
fn in_use(host: &Host) -> provisioner_core::Result<BTreeSet<PathBuf>> {
    let connection = host.connect()?;
    let mut files: BTreeSet<_> = InUse::of(&connection)?.files.into_keys().collect();
    let pool = connection.pool(&host.settings.storage_pool)?;
    files.extend(template::qcow2::backing_files_in(pool.target())?);
    Ok(files)
}

/// Finds out whether KVM works while nobody waits for a VM; a create would otherwise have to.
fn settle_domain_type(host: &Host) {
    let settled = host.connect().and_then(|connection| {
        let template = template::current(&host.dirs)?;
        kvm::choose(&connection, &template.path, &host.dirs.kvm_answer(), &*host.progress, &host.cancel)
    });
    if let Err(error) = settled {
        host.progress.warn(&format!("whether KVM works will be found out by the first create: {}", error.in_full()));
    }
}

fn main() -> ExitCode {
    provisioner_cli::main("blockhost-build-template", |command, arguments: Arguments| {
        let host = command.host()?;
        let (force, allow_no_packages) = (arguments.force, arguments.allow_no_packages);
        let no_kvm = || OpenOptions::new().read(true).write(true).open("/dev/kvm").is_err();
        let request = BuildRequest {
            source: source(arguments, &host)?,
            force,
            allow_no_packages,
            proxy: ["https_proxy", "HTTPS_PROXY", "all_proxy"].iter().find_map(|name| std::env::var(name).ok()),
            emulate: host.settings.libvirt.domain_type == DomainType::Qemu
                || kvm::remembered(&host.dirs.kvm_answer()) == Some(false)
                || no_kvm(),
            in_use: &|| in_use(&host),
        };
        let built = template::build(&request, &host.dirs, &*host.progress, &host.cancel)?;
        let path = built.template.path.display();
        if built.fresh {
            host.progress.note(&format!("the template is {path}"));
            if host.settings.libvirt.domain_type == DomainType::Auto {
                settle_domain_type(&host);
            }
        } else {
            host.progress.note(&format!("the template {path} is up to date"));
        }
        Ok(())
    })
}
