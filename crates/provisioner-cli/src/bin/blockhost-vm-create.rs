//! `blockhost-vm-create`: see `--help`.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use provisioner_cli::limits::LimitOptions;
use provisioner_cli::output;
use provisioner_contract::{CreateResult, LoginName, NftId, VmName, WalletAddress};
use provisioner_core::create::{self, CreateRequest};
use provisioner_core::database::Database;

/// Create a VM, wait until it can be handed to its owner, and register it.
///
/// Without --apply it prints what it would do: nothing is written, allocated or locked.
#[derive(Parser)]
#[command(
    name = "blockhost-vm-create",
    version,
    after_help = "\
On success stdout has exactly two lines: the result as JSON, and the same after `BLOCKHOST_RESULT: `.
On failure everything is undone; the reason is the last line of stderr.

Examples:
  blockhost-vm-create web1 --owner-wallet 0x00000000000000000000000000000000000000aa --apply
  blockhost-vm-create web1 --owner-wallet 0x00000000000000000000000000000000000000aa \\
      --cpu 2 --memory 4096 --disk 40 --expiry-days 90 --apply"
)]
pub struct Arguments {
    /// Name of the VM: letters, digits, `.`, `_` and `-`, at most 64.
    name: VmName,
    /// Wallet address of the owner.
    #[arg(long, value_name = "ADDR")]
    owner_wallet: WalletAddress,
    /// Id of the subscription's NFT, when it is known already.
    #[arg(long, value_name = "ID")]
    nft_token_id: Option<NftId>,
    /// Days until the subscription expires [default: default_expiry_days in db.yaml, else 30].
    #[arg(long, value_name = "N")]
    expiry_days: Option<u32>,
    /// Number of vCPUs.
    #[arg(long, value_name = "N", default_value_t = 1)]
    cpu: u32,
    /// Memory in MB (of 1024 kB).
    #[arg(long, value_name = "MB", default_value_t = 2048)]
    memory: u64,
    /// Size of the disk in GB (of 1024 MB).
    #[arg(long, value_name = "GB", default_value_t = 20)]
    disk: u64,
    /// Login user in the guest.
    #[arg(long, value_name = "NAME", default_value = "admin")]
    username: LoginName,
    /// Take this file as cloud-init user-data, byte for byte, instead of the installed template.
    #[arg(long, value_name = "FILE")]
    cloud_init_content: Option<PathBuf>,
    /// Do it. Without this option only the plan is printed.
    #[arg(long)]
    apply: bool,
    /// Use ./mock-db.json instead of the real database, and no hypervisor.
    #[arg(long)]
    mock: bool,
    #[command(flatten)]
    limits: LimitOptions,
}

fn main() -> ExitCode {
    provisioner_cli::main("blockhost-vm-create", |command, arguments: Arguments| {
        let mut host = command.host()?;
        let request = CreateRequest {
            name: arguments.name,
            owner_wallet: arguments.owner_wallet,
            nft_token_id: arguments.nft_token_id,
            expiry_days: arguments.expiry_days,
            vcpus: arguments.cpu,
            memory_mib: arguments.memory,
            disk_gib: arguments.disk,
            username: arguments.username,
            user_data: arguments.cloud_init_content,
            limits: arguments.limits.limits(),
        };
        let print = |result: &CreateResult| output::stdout_lines(result.lines());
        if arguments.mock {
            host.settings = host.settings.mock();
            print(&create::mock(&host, &Database::mock(), &request, arguments.apply)?)?;
        } else if arguments.apply {
            create::create(&host, &request, &print)?;
        } else {
            print(&create::plan(&host, &request)?)?;
        }
        if !arguments.apply {
            command.progress().note("this is a plan: nothing was created or allocated; --apply does it");
        }
        Ok(())
    })
}
