//! `blockhost-vm-kill`: see `--help`.

use std::process::ExitCode;

use clap::Parser;
use provisioner_contract::VmName;
use provisioner_core::power;

/// Take a VM's power away, at once.
///
/// A VM that is off already is a success. The guest gets no chance to write what it has in memory.
#[derive(Parser)]
#[command(name = "blockhost-vm-kill", version, after_help = "Example:\n  blockhost-vm-kill web1")]
pub struct Arguments {
    /// Name of the VM.
    name: VmName,
}

fn main() -> ExitCode {
    provisioner_cli::main("blockhost-vm-kill", |command, arguments: Arguments| {
        Ok(power::kill(&command.host()?, &arguments.name)?)
    })
}
