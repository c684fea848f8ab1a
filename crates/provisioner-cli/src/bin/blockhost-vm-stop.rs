//! `blockhost-vm-stop`: see `--help`.

use std::process::ExitCode;

use clap::Parser;
use provisioner_cli::Command;
use provisioner_contract::VmName;
use provisioner_core::power;

/// Shut a VM down, and wait until it is off.
///
/// A VM that is off already is a success. A guest that ignores the request for 35 s makes the command fail; it is then
/// still running, and `blockhost-vm-kill` takes its power away.
#[derive(Parser)]
#[command(name = "blockhost-vm-stop", version, after_help = "Example:\n  blockhost-vm-stop web1")]
pub struct Arguments {
    /// Name of the VM.
    name: VmName,
}

fn main() -> ExitCode {
    let command = Command::new("blockhost-vm-stop");
    let arguments: Arguments = match command.arguments() {
        Ok(arguments) => arguments,
        Err(code) => return code,
    };
    command.run(|command| Ok(power::stop(&command.host()?, &arguments.name)?))
}
