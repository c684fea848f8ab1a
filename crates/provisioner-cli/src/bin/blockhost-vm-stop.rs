//! `blockhost-vm-stop`: see `--help`.

use std::process::ExitCode;

use clap::Parser;
use provisioner_contract::VmName;
use provisioner_core::power;

/// Shut a VM down, and wait until it is off.
///
/// A VM that is off already is a success. A guest that ignores the request for 45 s makes the command fail; it is then
/// still running, and `blockhost-vm-kill` takes its power away.
#[derive(Parser)]
#[command(name = "blockhost-vm-stop", version, after_help = "Example:\n  blockhost-vm-stop web1")]
pub struct Arguments {
    /// Name of the VM.
    name: VmName,
}

fn main() -> ExitCode {
    provisioner_cli::main("blockhost-vm-stop", |command, arguments: Arguments| {
        Ok(power::stop(&command.host()?, &arguments.name)?)
    })
}
