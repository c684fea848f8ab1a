//! `blockhost-vm-start`: see `--help`.

use std::process::ExitCode;

use clap::Parser;
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
    provisioner_cli::main("blockhost-vm-start", |command, arguments: Arguments| {
        Ok(power::start(&command.host()?, &arguments.name)?)
    })
}
