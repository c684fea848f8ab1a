//! Makes a bootable qcow2 image from a directory tree, in the disk format of the templates: what the tests'
//! small template is made with. `assemble-image TREE IMAGE MEBIBYTES [KERNEL-COMMAND-LINE]`

use std::path::Path;
use std::process::ExitCode;

use provisioner_core::Result;
use provisioner_core::cancel::Cancel;
use provisioner_core::template::disk::{DiskPlan, assemble, random_uuid};

fn run(tree: &Path, image: &Path, mebibytes: u64, command_line: &str) -> Result<()> {
    let work = tree.parent().unwrap_or(Path::new("."));
    let plan = DiskPlan {
        size: mebibytes << 20,
        label: "small-root".to_owned(),
        uuid: random_uuid()?,
        command_line: command_line.to_owned(),
        menu_seconds: 0,
    };
    assemble(tree, image, work, &plan, &Cancel::default())
}

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().collect();
    let [_, tree, image, mebibytes, rest @ ..] = args.as_slice() else {
        eprintln!("usage: assemble-image TREE IMAGE MEBIBYTES [KERNEL-COMMAND-LINE]");
        return ExitCode::from(2);
    };
    let Ok(mebibytes) = mebibytes.parse() else {
        eprintln!("error: {mebibytes:?} is not a size in MiB");
        return ExitCode::from(2);
    };
    match run(tree.as_ref(), image.as_ref(), mebibytes, &rest.join(" ")) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}: {}", error.source.as_ref().map(ToString::to_string).unwrap_or_default());
            ExitCode::FAILURE
        }
    }
}
