//! `blockhost-vm-destroy`: see `--help`.

use std::process::ExitCode;
use std::sync::Arc;

use clap::Parser;
use provisioner_cli::{Command, Plain, output};
use provisioner_contract::VmName;
use provisioner_core::destroy::{self, Destroyed};

/// Destroy a VM: its domain, disks, addresses and host route. Its record stays, marked as destroyed.
///
/// A VM that does not exist is a success. The template, other VMs' disks and foreign domains are never touched.
#[derive(Parser)]
#[command(
    name = "blockhost-vm-destroy",
    version,
    after_help = "\
When libvirt cannot be asked, nothing is deleted and the command fails. When the VM cannot be stopped, its disk
and addresses stay. A destroy that was interrupted is finished by the next command for that VM.

Example:
  blockhost-vm-destroy web1"
)]
pub struct Arguments {
    /// Name of the VM.
    name: VmName,
}

fn main() -> ExitCode {
    let command = Command::with_progress("blockhost-vm-destroy", |stderr| Arc::new(Plain(stderr)));
    let arguments: Arguments = match command.arguments() {
        Ok(arguments) => arguments,
        Err(code) => return code,
    };
    command.run(|command| {
        let name = &arguments.name;
        let text = match destroy::destroy(&command.host()?, name)? {
            Destroyed::Removed => format!("{name} is destroyed"),
            Destroyed::Nothing => format!("there is nothing of {name} to destroy"),
        };
        Ok(output::stdout_lines([text])?)
    })
}
