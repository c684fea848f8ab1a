//! `blockhost-metrics-sampler`: takes the sample that `blockhost-vm-metrics` answers from. Started by that command when there
//! is no fresh one, not by people, with the name of the VM that is asked about, if it is one. The sample goes to stdout, or one
//! line `error <reason>`.

use std::io::{self, Write as _};
use std::process::ExitCode;

use provisioner_cli::{describe, directories, uri};
use provisioner_contract::{VmName, exit};

fn main() -> ExitCode {
    // The caller may have given up: the sample is in its file all the same, for the next one.
    let send = |text: &str| {
        let mut out = io::stdout().lock();
        let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
    };
    let wanted = std::env::args().nth(1).and_then(|name| VmName::new(&name).ok());
    match provisioner_core::metrics::take(&directories().state, &uri(), wanted.as_ref(), send) {
        Ok(()) => ExitCode::from(exit::SUCCESS),
        Err(error) => {
            let reason = describe(&error.into());
            send(&format!("error {}\n", reason.replace(|c: char| c.is_control(), " ")));
            ExitCode::from(exit::FAILURE)
        }
    }
}
