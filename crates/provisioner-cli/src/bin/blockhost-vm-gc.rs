//! `blockhost-vm-gc`: see `--help`.

use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use provisioner_cli::{Format, find_in_path, output};
use provisioner_core::database::Database;
use provisioner_core::gc::{self, GcRequest};

/// Suspend VMs that have expired, destroy those whose grace is over, and clear what dead commands left.
///
/// Without --execute it says what it would do: nothing is written or stopped.
#[derive(Parser)]
#[command(
    name = "blockhost-vm-gc",
    version,
    after_help = "\
An active VM past its end is shut down, by force if need be, and marked suspended. A suspended
one is destroyed when both its grace and its end have passed. Each is looked at again just before
that, so a payment that arrives meanwhile wins. What cannot be done for one VM does not keep it
from the others: the exit code is then 1, and the last line of stderr has the reasons.

Examples:
  blockhost-vm-gc
  blockhost-vm-gc --execute
  blockhost-vm-gc --destroy-only --grace-days 14 --format json | jq '.destroy.candidates[].name'"
)]
pub struct Arguments {
    /// Do it. Without this option it is only said what would be done.
    #[arg(long)]
    execute: bool,
    /// Suspend only.
    #[arg(long, conflicts_with = "destroy_only")]
    suspend_only: bool,
    /// Destroy only.
    #[arg(long)]
    destroy_only: bool,
    /// Days between suspension and destruction [default: gc_grace_days in db.yaml, else 7].
    #[arg(long, value_name = "N")]
    grace_days: Option<u32>,
    /// How long a guest may take to shut down before its power is taken.
    #[arg(long, value_name = "SECONDS", default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..=3600))]
    shutdown_timeout: u64,
    /// Use ./mock-db.json instead of the real database, and no hypervisor.
    #[arg(long)]
    mock: bool,
    /// Also say which VMs are left alone, and why.
    #[arg(long)]
    verbose: bool,
    /// How to print the report; JSON always has all of it.
    #[arg(long, value_enum, default_value_t = Format::Text)]
    format: Format,
}

fn main() -> ExitCode {
    provisioner_cli::main("blockhost-vm-gc", |command, arguments: Arguments| {
        let host = command.host()?;
        let request = GcRequest {
            execute: arguments.execute,
            suspend: !arguments.destroy_only,
            destroy: !arguments.suspend_only,
            grace_days: arguments.grace_days,
            shutdown_limit: Duration::from_secs(arguments.shutdown_timeout),
            network_hook: find_in_path("blockhost-network-hook"),
        };
        let report = if arguments.mock {
            gc::mock(&Database::mock(), host.settings.gc_grace_days, &request)?
        } else {
            gc::gc(&host, &request)?
        };
        match arguments.format {
            Format::Json => output::stdout_lines([serde_json::to_string(&report)?])?,
            Format::Text => output::stdout_lines(report.lines(arguments.verbose))?,
        }
        let failures = report.failures();
        if failures.is_empty() {
            return Ok(());
        }
        Err(anyhow::anyhow!("not all could be done: {}", failures.join("; ")))
    })
}
