//! `blockhost-vm-list`: see `--help`.

use std::process::ExitCode;

use clap::Parser;
use clap::error::ErrorKind;
use provisioner_cli::{Command, Format, output};
use provisioner_contract::ListRow;
use provisioner_core::query;

/// List the VMs of the database with what they do.
#[derive(Parser)]
#[command(
    name = "blockhost-vm-list",
    version,
    after_help = "\
The words for the status are those of blockhost-vm-status. The exit code is always 0.

Examples:
  blockhost-vm-list
  blockhost-vm-list --format json | jq -r '.[] | select(.status == \"active\").name'"
)]
pub struct Arguments {
    /// How to print them.
    #[arg(long, value_enum, default_value_t = Format::Text)]
    format: Format,
}

fn main() -> ExitCode {
    let command = Command::new("blockhost-vm-list");
    let format = match Arguments::try_parse() {
        Ok(arguments) => arguments.format,
        Err(text) if matches!(text.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion) => text.exit(),
        Err(error) => {
            command.complain_usage(&error);
            Format::Text
        }
    };
    let listed = command.host().and_then(|host| Ok(query::list(&host)?));
    let rows = match listed {
        Ok((rows, warnings)) => {
            for warning in warnings {
                command.warn(&warning.into());
            }
            rows
        }
        Err(error) => {
            command.complain(&error);
            Vec::new()
        }
    };
    // With nobody to read the list there is nothing left to say.
    let _ = match format {
        Format::Json => serde_json::to_string(&rows).map_err(Into::into).and_then(|json| output::stdout_lines([json])),
        Format::Text => {
            let head = std::iter::once(ListRow::HEADER.to_owned());
            output::stdout_lines(head.chain(rows.iter().map(ListRow::line)))
        }
    };
    ExitCode::SUCCESS
}
