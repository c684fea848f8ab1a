//! `blockhost-provisioner-repair`: see `--help`.

use std::process::ExitCode;

use clap::Parser;
use provisioner_cli::{Format, output};
use provisioner_core::repair::{self, Finding, Report};
use provisioner_core::{Error, ErrorKind};

/// Find what has drifted apart between the VM database, libvirt, volumes, addresses and host routes, and mend it.
///
/// No domain, volume or record of a VM is ever removed: what would need that is reported with the command to use. What libvirt
/// brings back late of a VM that was removed already is removed again.
#[derive(Parser)]
#[command(
    name = "blockhost-provisioner-repair",
    version,
    after_help = "\
A VM that another command is working on is left alone and listed as busy. Lost records are rebuilt from the metadata
of their domains; a database that is there and cannot be read is never written over.

The exit code is 0 when nothing is wrong or everything was mended, 1 when something is left or could not be looked at.

Examples:
  blockhost-provisioner-repair
  blockhost-provisioner-repair --apply
  blockhost-provisioner-repair --format json | jq -r '.findings[] | [.kind, .vm, .object] | @tsv'"
)]
pub struct Arguments {
    /// Only say what is wrong; the default.
    #[arg(long, conflicts_with = "apply")]
    check: bool,
    /// Mend what can be mended without destroying anything.
    #[arg(long)]
    apply: bool,
    /// How to print.
    #[arg(long, value_enum, default_value_t = Format::Text)]
    format: Format,
}

fn main() -> ExitCode {
    provisioner_cli::main("blockhost-provisioner-repair", |command, arguments: Arguments| {
        let host = command.host()?;
        let report = if arguments.apply { repair::apply(&host)? } else { repair::check(&host)? };
        match arguments.format {
            Format::Json => output::stdout_lines([serde_json::to_string(&report)?])?,
            Format::Text => output::stdout_lines(lines(&report))?,
        }
        if report.healthy {
            return Ok(());
        }
        let left = Error::new(ErrorKind::Conflict, summary(&report));
        Err(match (arguments.apply, report.mendable()) {
            (false, 1..) => left.hint("blockhost-provisioner-repair --apply"),
            (_, _) => left.hint("what to do is said with each of them"),
        }
        .into())
    })
}

fn summary(report: &Report) -> String {
    let differences = match report.findings.len() {
        1 => "1 difference is".to_owned(),
        count => format!("{count} differences are"),
    };
    match report.mendable() {
        0 => format!("{differences} left for the operator"),
        mendable => format!("{differences} there, of which --apply can mend {mendable}"),
    }
}

fn lines(report: &Report) -> Vec<String> {
    let mut lines = Vec::new();
    for finding in &report.repaired {
        let act = finding.apply.as_deref().unwrap_or_default();
        lines.push(format!("mended {}", title(finding)));
        lines.push(format!("    {}: {act}", finding.explanation));
    }
    for finding in &report.findings {
        lines.push(title(finding));
        lines.push(format!("    {}", finding.explanation));
        let more = [("--apply", &finding.apply), ("to do", &finding.operator), ("failed", &finding.failure)];
        lines.extend(more.iter().filter_map(|(what, text)| Some(format!("    {what}: {}", text.as_ref()?))));
    }
    for busy in &report.busy {
        let who = match (&busy.command, busy.pid) {
            (Some(command), Some(pid)) => format!("{command} (PID {pid})"),
            _ => "another command".to_owned(),
        };
        lines.push(format!("busy {}: {who} is working on it, it was not looked at", busy.vm));
    }
    lines.extend(report.notes.iter().map(|note| format!("note: {note}")));
    let vms = if report.vms == 1 { "1 VM".to_owned() } else { format!("{} VMs", report.vms) };
    lines.push(match (report.healthy, report.repaired.len()) {
        (true, 0) => format!("{vms}, nothing is wrong"),
        (true, mended) => format!("{vms}, {mended} mended, nothing is left"),
        (false, _) => format!("{vms}, {}", summary(report)),
    });
    lines
}

fn title(finding: &Finding) -> String {
    let kind = serde_json::to_value(finding.kind).ok();
    let kind = kind.as_ref().and_then(|kind| kind.as_str()).unwrap_or_default();
    match &finding.vm {
        Some(vm) if *vm != finding.object => format!("{kind} {vm}: {}", finding.object),
        _ => format!("{kind} {}", finding.object),
    }
}
