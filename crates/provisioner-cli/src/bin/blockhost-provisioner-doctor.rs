//! `blockhost-provisioner-doctor`: see `--help`.

use std::process::ExitCode;

use clap::Parser;
use provisioner_cli::{Format, directories, output};
use provisioner_core::doctor::{self, Level, Report};
use provisioner_core::{Error, ErrorKind};

/// Check everything this host needs to run VMs, all at once, and say what to do about each thing that is wrong.
///
/// Nothing is changed. What the current user cannot see is said; run it as root, and as the service user, to be told
/// about both.
#[derive(Parser)]
#[command(
    name = "blockhost-provisioner-doctor",
    version,
    after_help = "\
A warning is about what is missing for some VMs or some of the commands; a failure keeps VMs from being created, started or
managed. The exit code is 1 when any check fails, else 0. What has drifted apart between VMs and the database is found by
blockhost-provisioner-repair.

Examples:
  blockhost-provisioner-doctor
  sudo -u blockhost blockhost-provisioner-doctor
  blockhost-provisioner-doctor --json | jq -r '.checks[] | select(.level != \"ok\").remedy'"
)]
pub struct Arguments {
    /// How to print.
    #[arg(long, value_enum, default_value_t = Format::Text)]
    format: Format,
    /// The same as --format json.
    #[arg(long, conflicts_with = "format")]
    json: bool,
}

fn main() -> ExitCode {
    provisioner_cli::main("blockhost-provisioner-doctor", |command, arguments: Arguments| {
        let report = doctor::examine(&directories(), command.uri());
        if arguments.json || arguments.format == Format::Json {
            output::stdout_lines([serde_json::to_string(&report)?])?;
        } else {
            output::stdout_lines(lines(&report))?;
        }
        let failed = report.checks.iter().filter(|check| check.level == Level::Fail);
        let failed: Vec<_> = failed.map(|check| check.check).collect();
        if failed.is_empty() {
            return Ok(());
        }
        let what = format!("{} of {} checks fail: {}", failed.len(), report.checks.len(), failed.join(", "));
        Err(Error::new(ErrorKind::Config, what).hint("each is shown with its remedy").into())
    })
}

fn lines(report: &Report) -> Vec<String> {
    let mut lines = Vec::new();
    for check in &report.checks {
        let level = match check.level {
            Level::Ok => "ok",
            Level::Warn => "warn",
            Level::Fail => "FAIL",
        };
        lines.push(format!("{level:<5} {:<20} {}", check.check, check.text));
        lines.extend(check.remedy.as_ref().map(|remedy| format!("{:26} remedy: {remedy}", "")));
    }
    let count = |level| report.count(level);
    lines.push(format!("{} ok, {} warnings, {} failures", count(Level::Ok), count(Level::Warn), count(Level::Fail)));
    lines
}
