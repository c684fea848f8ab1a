//! `blockhost-vm-status`: see `--help`.

use std::process::ExitCode;

use clap::Parser;
use clap::error::ErrorKind;
use provisioner_cli::{Command, output};
use provisioner_contract::{VmName, VmStatus};
use provisioner_core::query;

/// Print in one word what a VM does: active, suspended, destroyed or unknown.
#[derive(Parser)]
#[command(
    name = "blockhost-vm-status",
    version,
    after_help = "\
  active     it runs
  suspended  it exists but does not run: shut off, paused, crashed
  destroyed  there is a record of it, but no domain
  unknown    neither, or libvirt cannot be asked, or the name is no VM name

The exit code is always 0; why a status is unknown is on stderr.

Example:
  blockhost-vm-status web1"
)]
pub struct Arguments {
    /// Name of the VM.
    name: VmName,
}

fn main() -> ExitCode {
    let command = Command::new("blockhost-vm-status");
    let status = match Arguments::try_parse() {
        Ok(arguments) => command.host().and_then(|host| Ok(query::status(&host, &arguments.name)?)),
        Err(text) if matches!(text.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion) => text.exit(),
        Err(error) => {
            // Callers read one word and never look at the exit code.
            command.complain_usage(&error);
            Ok(VmStatus::Unknown)
        }
    };
    let status = status.unwrap_or_else(|error| {
        command.complain(&error);
        VmStatus::Unknown
    });
    // With nobody to read the word there is nothing left to say.
    let _ = output::stdout_lines([status.as_str()]);
    ExitCode::SUCCESS
}
