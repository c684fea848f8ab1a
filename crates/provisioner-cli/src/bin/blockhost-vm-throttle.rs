//! `blockhost-vm-throttle`: see `--help`.

use std::process::ExitCode;

use clap::Parser;
use provisioner_cli::limits::LimitOptions;
use provisioner_cli::{Format, output};
use provisioner_contract::VmName;
use provisioner_core::limits::{InForce, Limit};
use provisioner_core::throttle;

/// Limit what a VM takes of its host, at once and for every later start.
///
/// What is not named keeps its value. Without options it shows what is in force.
#[derive(Parser)]
#[command(
    name = "blockhost-vm-throttle",
    version,
    after_help = "\
stdout has a line per change with the value that is in force, read back from the hypervisor. All options are checked
before the first is applied; if one then cannot be, the last line of stderr says which are in force.

Examples:
  blockhost-vm-throttle web1
  blockhost-vm-throttle web1 --cpu-quota 50 --bandwidth-out 10000
  blockhost-vm-throttle web1 --reset --iops-write 200"
)]
pub struct Arguments {
    /// Name of the VM.
    name: VmName,
    #[command(flatten)]
    limits: LimitOptions,
    /// First set every limit back to what the VM was created with.
    #[arg(long)]
    reset: bool,
    /// How to print; JSON always has all limits.
    #[arg(long, value_enum, default_value_t = Format::Text)]
    format: Format,
}

fn main() -> ExitCode {
    provisioner_cli::main("blockhost-vm-throttle", |command, arguments: Arguments| {
        let host = command.host()?;
        let changes = arguments.limits.limits();
        if changes.is_empty() && !arguments.reset {
            return print(arguments.format, &throttle::show(&host, &arguments.name)?, Limit::ALL);
        }
        let throttled = throttle::throttle(&host, &arguments.name, &changes, arguments.reset)?;
        print(arguments.format, &throttled.in_force, throttled.changed)
    })
}

fn print(format: Format, in_force: &InForce, limits: impl IntoIterator<Item = Limit>) -> anyhow::Result<()> {
    match format {
        Format::Json => output::stdout_lines([serde_json::to_string(in_force)?])?,
        Format::Text => output::stdout_lines(limits.into_iter().map(|limit| in_force.line(limit)))?,
    }
    Ok(())
}
