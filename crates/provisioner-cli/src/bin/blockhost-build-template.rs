//! `blockhost-build-template`: builds the base image every VM is an overlay of.

use std::collections::BTreeSet;
use std::process::ExitCode;

use clap::Parser;
use provisioner_core::cancel::Cancel;
use provisioner_core::paths::Directories;
use provisioner_core::progress::Progress;
use provisioner_core::template::{self, BuildRequest, DEFAULT_IMAGE, DEFAULT_SUITE, Sha512Hex, Source};

/// Build the base image every VM is made from, unless the current one is up to date.
///
/// Every .deb in /var/lib/blockhost/template-packages is installed in it. VMs keep the very file they were made from.
#[derive(Debug, Parser)]
#[command(
    version,
    after_help = "Examples:
  blockhost-build-template
  blockhost-build-template --image ./debian-12-generic-amd64.qcow2 --force
  blockhost-build-template --from-packages"
)]
struct Args {
    /// Build even if the current template was made of the same image, packages and settings
    #[arg(long)]
    force: bool,
    /// Cloud image to start from: a path or a URL, with its SHA512SUMS beside it
    #[arg(long, value_name = "PATH|URL", default_value = DEFAULT_IMAGE, conflicts_with = "from_packages")]
    image: String,
    /// SHA-512 of the image, instead of the one in SHA512SUMS
    #[arg(long, value_name = "HEX", conflicts_with = "from_packages")]
    sha512: Option<Sha512Hex>,
    /// Build from Debian packages, from the mirrors this machine's apt uses, instead of a cloud image
    #[arg(long)]
    from_packages: bool,
    /// Debian release to build from packages
    #[arg(long, value_name = "NAME", default_value = DEFAULT_SUITE, requires = "from_packages")]
    suite: String,
    /// Accept that there is no package to install: nobody can log in to VMs of such a template
    #[arg(long)]
    allow_no_packages: bool,
}

struct Lines;

impl Progress for Lines {
    fn phase(&self, what: &str) {
        eprintln!("{what}");
    }
    fn bytes(&self, _done: u64, _total: Option<u64>) {}
    fn note(&self, text: &str) {
        eprintln!("{text}");
    }
    fn warn(&self, text: &str) {
        eprintln!("warning: {text}");
    }
}

fn main() -> ExitCode {
    let args = Args::parse();
    let source = if args.from_packages {
        Source::Packages { suite: args.suite }
    } else {
        Source::CloudImage { location: args.image, sha512: args.sha512 }
    };
    let mut directories = Directories::default();
    if let Some(state) = std::env::var_os("BLOCKHOST_STATE_DIR") {
        directories.state = state.into();
    }
    let in_use = || template::qcow2::backing_files_in(&directories.state.join("vms")).or(Ok(BTreeSet::new()));
    let request = BuildRequest {
        source,
        force: args.force,
        allow_no_packages: args.allow_no_packages,
        proxy: ["https_proxy", "HTTPS_PROXY", "all_proxy"].iter().find_map(|name| std::env::var(name).ok()),
        emulate: true,
        in_use: &in_use,
    };
    let cancel = Cancel::default();
    watch_signals(&cancel);
    match template::build(&request, &directories, &Lines, &cancel) {
        Ok(built) => {
            println!("{}", built.template.path.display());
            ExitCode::SUCCESS
        }
        Err(error) => {
            let mut line = format!("error: {error}");
            let mut source = std::error::Error::source(&error);
            while let Some(cause) = source {
                line.push_str(&format!(": {cause}"));
                source = cause.source();
            }
            eprintln!("{line}");
            if let Some(hint) = &error.hint {
                eprintln!("hint: {hint}");
            }
            ExitCode::FAILURE
        }
    }
}

fn watch_signals(cancel: &Cancel) {
    use nix::sys::signal::{SigSet, Signal};
    let mut signals = SigSet::empty();
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        signals.add(signal);
    }
    if signals.thread_block().is_ok() {
        let cancel = cancel.clone();
        std::thread::spawn(move || {
            if signals.wait().is_ok() {
                cancel.cancel();
            }
        });
    }
}
