//! `blockhost-provisioner-detect`: see `--help`.

use std::process::ExitCode;

use clap::Parser;
use provisioner_cli::Command;
use provisioner_contract::exit;
use provisioner_core::query;

/// Tell by the exit code whether this host can run VMs through libvirt: 0 if it can, 1 if not. Prints nothing.
#[derive(Parser)]
#[command(
    name = "blockhost-provisioner-detect",
    version,
    after_help = "\
RUST_LOG=info tells on stderr why it cannot.

Example:
  blockhost-provisioner-detect && echo yes"
)]
pub struct Arguments {}

fn main() -> ExitCode {
    let command = Command::new("blockhost-provisioner-detect");
    let Arguments {} = match command.arguments() {
        Ok(arguments) => arguments,
        Err(code) => return code,
    };
    match query::detect(command.uri()) {
        Ok(()) => ExitCode::from(exit::SUCCESS),
        Err(error) => {
            tracing::info!("{error}");
            ExitCode::from(exit::FAILURE)
        }
    }
}
