//! `blockhost-vm-resume`: see `--help`.

use std::process::ExitCode;

use clap::Parser;
use provisioner_cli::output;
use provisioner_contract::VmName;
use provisioner_core::database::Database;
use provisioner_core::resume;

/// Start a suspended VM and mark it active.
///
/// A VM that is active and runs already is a success.
#[derive(Parser)]
#[command(
    name = "blockhost-vm-resume",
    version,
    after_help = "\
With --extend-days the subscription ends that many days after now or after its present end,
whichever is later. Without, an end that lies ahead is kept, and one that has passed becomes now
plus default_expiry_days of db.yaml. If the VM cannot be started its record stays as it was.

Examples:
  blockhost-vm-resume web1
  blockhost-vm-resume web1 --extend-days 30"
)]
pub struct Arguments {
    /// Name of the VM.
    name: VmName,
    /// Extend the subscription by this many days.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=36_500))]
    extend_days: Option<u32>,
    /// Use ./mock-db.json instead of the real database, and no hypervisor.
    #[arg(long)]
    mock: bool,
    /// Only say what would be done.
    #[arg(long)]
    dry_run: bool,
}

fn main() -> ExitCode {
    provisioner_cli::main("blockhost-vm-resume", |command, arguments: Arguments| {
        let host = command.host()?;
        let (name, days) = (&arguments.name, arguments.extend_days);
        let resumed = if arguments.mock {
            let default_days = host.settings.default_expiry_days;
            resume::mock(&Database::mock(), default_days, name, days, !arguments.dry_run)?
        } else if arguments.dry_run {
            resume::plan(&host, name, days)?
        } else {
            resume::resume(&host, name, days)?
        };
        let end = resumed.expires_at.map_or_else(|| "for good".to_owned(), |end| format!("until {end}"));
        if arguments.dry_run {
            output::stdout_lines([format!("{name}, {}, would run and be active {end}", resumed.was)])?;
        } else {
            command.progress().note(&format!("{name} is active {end}"));
        }
        Ok(())
    })
}
