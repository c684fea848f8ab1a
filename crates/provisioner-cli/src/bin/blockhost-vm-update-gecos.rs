//! `blockhost-vm-update-gecos`: see `--help`.

use std::process::ExitCode;

use clap::Parser;
use provisioner_contract::{LoginName, NftId, VmName, WalletAddress};
use provisioner_core::gecos::{self, Updated};

/// Set the GECOS field of a VM's login user to its owner's wallet and token.
///
/// The field becomes wallet=ADDRESS,nft=ID, set by the guest agent and read back. Where it is that already nothing is
/// done, so this may be repeated at will. A VM that does not run is left as it is, and is a failure.
#[derive(Parser)]
#[command(
    name = "blockhost-vm-update-gecos",
    version,
    after_help = "\
Example:
  blockhost-vm-update-gecos web1 0x52908400098527886E0F7030069857D2E4169EE7 --nft-id 42"
)]
pub struct Arguments {
    /// Name of the VM.
    name: VmName,
    /// Wallet address of its owner.
    wallet: WalletAddress,
    /// Id of the token that stands for the subscription.
    #[arg(long, value_name = "ID")]
    nft_id: NftId,
    /// Login user in the guest [default: the one the VM was created with]
    #[arg(long, value_name = "NAME")]
    username: Option<LoginName>,
}

fn main() -> ExitCode {
    provisioner_cli::main("blockhost-vm-update-gecos", |command, arguments: Arguments| {
        let Arguments { name, wallet, nft_id, username } = &arguments;
        let updated = gecos::update(&command.host()?, name, username.as_ref(), wallet, nft_id)?;
        command.progress().note(&match updated {
            Updated::Changed => format!("{name} now belongs to wallet {wallet} by token {nft_id}"),
            Updated::AsItWas => format!("{name} belongs to wallet {wallet} by token {nft_id} already"),
        });
        Ok(())
    })
}
