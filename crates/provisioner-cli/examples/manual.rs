//! Writes man pages and shell completions of all commands, from the definitions that parse their arguments:
//!
//!     manual DIRECTORY
//!
//! makes `man`, `bash`, `zsh` and `fish` below it. Run when the package is built; neither shipped nor linked into a command.

use std::fs;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

use clap::CommandFactory;
use clap_complete::{Generator, Shell};
use clap_mangen::Man;
use clap_mangen::roff::{Roff, bold, roman};

/// Takes in the commands' own source files: what is not their `Arguments` goes unused here.
macro_rules! commands {
    ($($module:ident: $file:literal,)*) => {
        $(
            #[allow(dead_code, unreachable_pub, missing_docs)]
            #[path = $file]
            mod $module;
        )*

        fn commands() -> Vec<clap::Command> {
            vec![$(named($module::Arguments::command(), $file)),*]
        }
    };
}

commands! {
    build_template: "../src/bin/blockhost-build-template.rs",
    create: "../src/bin/blockhost-vm-create.rs",
    destroy: "../src/bin/blockhost-vm-destroy.rs",
    detect: "../src/bin/blockhost-provisioner-detect.rs",
    doctor: "../src/bin/blockhost-provisioner-doctor.rs",
    gc: "../src/bin/blockhost-vm-gc.rs",
    guest_exec: "../src/bin/blockhost-vm-guest-exec.rs",
    kill: "../src/bin/blockhost-vm-kill.rs",
    list: "../src/bin/blockhost-vm-list.rs",
    metrics: "../../provisioner-metrics/src/bin/blockhost-vm-metrics.rs",
    repair: "../src/bin/blockhost-provisioner-repair.rs",
    resume: "../src/bin/blockhost-vm-resume.rs",
    start: "../src/bin/blockhost-vm-start.rs",
    status: "../src/bin/blockhost-vm-status.rs",
    stop: "../src/bin/blockhost-vm-stop.rs",
    throttle: "../src/bin/blockhost-vm-throttle.rs",
    update_gecos: "../src/bin/blockhost-vm-update-gecos.rs",
}

/// A command that gives itself no name has that of its file.
fn named(command: clap::Command, file: &'static str) -> clap::Command {
    match Path::new(file).file_stem().and_then(|stem| stem.to_str()) {
        Some(stem) => command.name(stem).bin_name(stem),
        None => command,
    }
}

fn main() -> io::Result<()> {
    let Some(directory) = std::env::args_os().nth(1).map(PathBuf::from) else {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "usage: manual DIRECTORY"));
    };
    for kind in ["man", "bash", "zsh", "fish"] {
        fs::create_dir_all(directory.join(kind))?;
    }
    let names: Vec<String> = commands().iter().map(|command| command.get_name().to_owned()).collect();
    for mut command in commands() {
        let name = command.get_name().to_owned();
        complete(&mut command, Shell::Bash, &directory.join("bash").join(&name))?;
        complete(&mut command, Shell::Zsh, &directory.join("zsh").join(format!("_{name}")))?;
        complete(&mut command, Shell::Fish, &directory.join("fish").join(format!("{name}.fish")))?;
        fs::write(directory.join("man").join(format!("{name}.1")), page(command, &names)?)?;
    }
    Ok(())
}

fn complete(command: &mut clap::Command, shell: Shell, file: &Path) -> io::Result<()> {
    command.build();
    let mut text = Vec::new();
    shell.try_generate(command, &mut text)?;
    fs::write(file, text)
}

/// clap_mangen's sections, and those it lacks: examples with their line breaks, exit status, environment, where to look further.
fn page(command: clap::Command, all: &[String]) -> io::Result<Vec<u8>> {
    let name = command.get_name().to_owned();
    let help = command.get_after_long_help().or(command.get_after_help()).map(ToString::to_string).unwrap_or_default();
    let (prose, examples) = match help.find("Example") {
        Some(at) => help.split_at(at),
        None => (help.as_str(), ""),
    };
    // The line that says "Example:" is the section's heading.
    let examples: Vec<&str> = examples.lines().skip(1).collect();
    // A page has no one-line description but the first line of the text.
    let about = command.get_about().map(ToString::to_string).unwrap_or_default();
    let man = Man::new(command.about(about.trim_end_matches('.').to_owned()).after_help("").after_long_help(""))
        .title(name.to_uppercase())
        .section("1")
        .source(format!("BlockHost {}", env!("CARGO_PKG_VERSION")))
        .manual("libvirt provisioner")
        .date("");
    let mut out = Vec::new();
    man.render_title(&mut out)?;
    man.render_name_section(&mut out)?;
    man.render_synopsis_section(&mut out)?;
    man.render_description_section(&mut out)?;
    let mut roff = Roff::new();
    for paragraph in prose.split("\n\n").filter(|paragraph| !paragraph.trim().is_empty()) {
        roff.control("PP", []);
        roff.text([roman(paragraph.split_whitespace().collect::<Vec<_>>().join(" "))]);
    }
    roff.to_writer(&mut out)?;
    man.render_options_section(&mut out)?;

    let mut roff = Roff::new();
    if !examples.is_empty() {
        roff.control("SH", ["EXAMPLES"]);
        roff.control("nf", []);
        for line in examples {
            roff.text([roman(line)]);
        }
        roff.control("fi", []);
    }
    roff.control("SH", ["EXIT STATUS"]);
    let status = match name.as_str() {
        "blockhost-vm-status" | "blockhost-vm-list" => "Always 0.",
        "blockhost-vm-guest-exec" => {
            "That of the command in the guest, or 128 and the number of the signal that ended it; not 0 when it could not be run."
        }
        "blockhost-provisioner-doctor" => "0 when nothing fails, whatever it warns of; 1 otherwise; 2 on wrong usage.",
        "blockhost-provisioner-repair" => {
            "0 when nothing is wrong, or all of it was mended; 1 otherwise; 2 on wrong usage."
        }
        _ => "0 on success, 1 on failure, 2 on wrong usage. The reason is the last line of standard error.",
    };
    roff.text([roman(status)]);
    roff.control("SH", ["ENVIRONMENT"]);
    roff.control("TP", []);
    roff.text([bold("RUST_LOG")]);
    roff.text([roman("What is told on standard error beside that: info or debug.")]);
    roff.control("SH", ["FILES"]);
    for (file, what) in [
        ("/etc/blockhost/db.yaml", "Settings."),
        ("/var/lib/blockhost", "The VM database, disks, base images."),
        ("/usr/share/doc/blockhost-provisioner-libvirt/operations.md.gz", "What can go wrong, and what to do then."),
    ] {
        roff.control("TP", []);
        roff.text([bold(file)]);
        roff.text([roman(what)]);
    }
    roff.control("SH", ["SEE ALSO"]);
    let others: Vec<String> = all.iter().filter(|other| **other != name).map(|other| format!("{other}(1)")).collect();
    roff.text([roman(format!("{}, virsh(1)", others.join(", ")))]);
    roff.to_writer(&mut out)?;
    out.flush()?;
    Ok(out)
}
