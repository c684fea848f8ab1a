//! `blockhost-vm-start`: see `--help`.

use std::process::ExitCode;

use clap::Parser;
use provisioner_cli::Command;
use provisioner_contract::VmName;
use provisioner_core::power;

/// Start a VM, or let a paused one run again.
///
/// A VM that runs already is a success. The host route of its IPv6 address is restored.
#[derive(Parser)]
#[command(name = "blockhost-vm-start", version, after_help = "Example:\n  blockhost-vm-start web1")]
pub struct Arguments {
    /// Name of the VM.
    name: VmName,
}

fn main() -> ExitCode {
    let command = Command::new("blockhost-vm-start");
    let arguments: Arguments = match command.arguments() {
        Ok(arguments) => arguments,
        Err(code) => return code,
    };
    command.run(|command| Ok(power::start(&command.host()?, &arguments.name)?))
}
