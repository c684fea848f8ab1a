//! Assembles a bootable disk from a directory tree, without loop devices, mounts or a virtual machine: GPT with a
//! BIOS boot partition and one ext4 partition that comes last so that it can grow, GRUB for PC BIOS, and a static
//! `grub.cfg` that boots the kernel symlinks Debian maintains, so the guest needs no GRUB of its own.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;

use crate::cancel::Cancel;
use crate::child::{self, CommandExt};
use crate::{Error, ErrorKind, Result};

const SECTOR: u64 = 512;
const MIB: u64 = 1 << 20;
/// First sector and length of the BIOS boot partition: 1 MiB at 1 MiB.
const BOOT_START: u64 = 2048;
const BOOT_SECTORS: u64 = 2048;
/// Where the root filesystem starts.
const ROOT_START: u64 = BOOT_START + BOOT_SECTORS;
/// Room for the backup GPT, rounded up to keep the partition's end aligned.
const TAIL: u64 = MIB;
/// Type of the partition GRUB keeps its core image in.
const BIOS_BOOT: &str = "21686148-6449-6E6F-744E-656564454649";
const LINUX_DATA: &str = "0FC63DAF-8483-4772-8E79-3D69D8477DE4";
/// Where Debian's grub-pc-bin keeps its images and modules.
const GRUB_DIRECTORY: &str = "/usr/lib/grub/i386-pc";
/// What the core image must be able to do on its own; nothing is loaded from the disk but grub.cfg, kernel and initrd.
const GRUB_MODULES: [&str; 12] = [
    "biosdisk",
    "part_gpt",
    "ext2",
    "normal",
    "configfile",
    "linux16",
    "test",
    "echo",
    "serial",
    "terminal",
    "sleep",
    "reboot",
];

/// The programs [`assemble`] runs, with Debian's packages.
pub const PROGRAMS: [(&str, &str); 4] =
    [("sfdisk", "fdisk"), ("mke2fs", "e2fsprogs"), ("grub-mkimage", "grub-common"), ("qemu-img", "qemu-utils")];

/// What kind of disk to make.
#[derive(Debug, Clone)]
pub struct DiskPlan {
    /// Size of the disk in bytes; rounded up to whole MiB.
    pub size: u64,
    /// Label of the root filesystem, at most 16 bytes.
    pub label: String,
    /// UUID of the root filesystem.
    pub uuid: String,
    /// Words for the kernel's command line, in front of `root=`.
    pub command_line: String,
    /// Seconds the boot menu waits for a key.
    pub menu_seconds: u32,
}

/// Fails unless everything [`assemble`] needs is installed.
///
/// # Errors
/// [`ErrorKind::Unavailable`] with the packages to install.
pub fn check_tools() -> Result<()> {
    child::require(&PROGRAMS)?;
    if !Path::new(GRUB_DIRECTORY).join("boot.img").exists() {
        return Err(Error::new(ErrorKind::Unavailable, format!("not installed: {GRUB_DIRECTORY}/boot.img"))
            .hint("apt-get install grub-pc-bin"));
    }
    Ok(())
}

/// Makes the qcow2 image `image` from the tree at `root`; `work` is a directory for what lies in between, on a
/// filesystem with room for the tree once more. The tree must have `/vmlinuz` and `/initrd.img`; its
/// `/boot/grub/grub.cfg` is written here.
///
/// # Errors
/// [`ErrorKind::Io`] with what failed; [`ErrorKind::Unavailable`] if a program is missing.
pub fn assemble(root: &Path, image: &Path, work: &Path, plan: &DiskPlan, cancel: &Cancel) -> Result<()> {
    check_tools()?;
    let grub = root.join("boot/grub");
    fs::create_dir_all(&grub).map_err(|error| Error::io("create", &grub, error))?;
    let configuration = grub.join("grub.cfg");
    fs::write(&configuration, grub_configuration(plan)).map_err(|error| Error::io("write", &configuration, error))?;

    let raw = work.join("disk.raw");
    let size = plan.size.next_multiple_of(MIB);
    let disk = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open(&raw)
        .and_then(|file| file.set_len(size).map(|()| file))
        .map_err(|error| Error::io("create", &raw, error))?;
    partition(&raw, work, size, cancel)?;
    let root_bytes = size - TAIL - ROOT_START * SECTOR;
    Command::new("mke2fs")
        // Features that the GRUB of Debian 12 cannot read are off, whatever the defaults of a newer mke2fs.
        .args(["-q", "-F", "-t", "ext4", "-b", "4096", "-m", "1", "-O", "^metadata_csum_seed,^orphan_file"])
        .args(["-L", &plan.label, "-U", &plan.uuid])
        .args(["-E", &format!("offset={},lazy_itable_init=1,lazy_journal_init=1", ROOT_START * SECTOR)])
        .arg("-d")
        .args([root, &raw])
        .arg(format!("{}k", root_bytes / 1024))
        .run(&format!("cannot make a filesystem of {}", root.display()), cancel)?;
    install_grub(&disk, &raw, work, cancel)?;
    drop(disk);
    to_qcow2(&raw, "raw", image, cancel)?;
    fs::remove_file(&raw).map_err(|error| Error::io("remove", &raw, error))
}

/// Copies the image `from`, whose format is `format`, into the new qcow2 image `to`.
///
/// # Errors
/// [`ErrorKind::Io`] with what qemu-img said.
pub(super) fn to_qcow2(from: &Path, format: &str, to: &Path, cancel: &Cancel) -> Result<()> {
    child::tied("qemu-img")
        .args(["convert", "-f", format, "-O", "qcow2", "-o", "compat=1.1,lazy_refcounts=off"])
        // Unordered writes and a cache: the file is synced as a whole before it gets its name.
        .args(["-W", "-T", "writeback", "-t", "unsafe"])
        .args([from, to])
        .run(&format!("cannot convert {}", from.display()), cancel)
        .map(drop)
}

/// By way of `linux16` the kernel is entered as a BIOS enters it. Entered by `linux`, in 32-bit mode, it takes 2 s longer to its
/// first line under emulation.
fn grub_configuration(plan: &DiskPlan) -> String {
    let DiskPlan { uuid, command_line, menu_seconds, .. } = plan;
    format!(
        "# Written when the template was built. /vmlinuz and /initrd.img follow every kernel upgrade by themselves.
serial --unit=0 --speed=115200
terminal_input console serial
terminal_output console serial
set timeout={menu_seconds}
set default=0
menuentry 'Linux' {{
    linux16 /vmlinuz {command_line} root=UUID={uuid} ro
    initrd16 /initrd.img
}}
if [ -e /vmlinuz.old -a -e /initrd.img.old ]; then
    menuentry 'Linux, previous kernel' {{
        linux16 /vmlinuz.old {command_line} root=UUID={uuid} ro
        initrd16 /initrd.img.old
    }}
fi
"
    )
}

fn partition(raw: &Path, work: &Path, size: u64, cancel: &Cancel) -> Result<()> {
    let root_sectors = (size - TAIL) / SECTOR - ROOT_START;
    let script = work.join("partitions");
    let text = format!(
        "label: gpt\nunit: sectors\n\
         start={BOOT_START}, size={BOOT_SECTORS}, type={BIOS_BOOT}, name=bios\n\
         start={ROOT_START}, size={root_sectors}, type={LINUX_DATA}, name=root\n"
    );
    fs::write(&script, text).map_err(|error| Error::io("write", &script, error))?;
    // The shell only redirects: sfdisk reads its script from stdin, and children get none.
    Command::new("sh")
        .args(["-c", "exec sfdisk --quiet --no-reread --no-tell-kernel --wipe never \"$1\" < \"$2\"", "sfdisk"])
        .args([raw, &script])
        .run(&format!("cannot partition {}", raw.display()), cancel)
        .map(drop)
}

fn install_grub(disk: &File, raw: &Path, work: &Path, cancel: &Cancel) -> Result<()> {
    let core_path = work.join("core.img");
    Command::new("grub-mkimage")
        // The drive is the one the BIOS booted from; the second partition is the root filesystem.
        .args(["-O", "i386-pc", "-p", "(,gpt2)/boot/grub", "-d", GRUB_DIRECTORY, "-o"])
        .arg(&core_path)
        .args(GRUB_MODULES)
        .run("cannot make the boot loader", cancel)?;
    let mut core = fs::read(&core_path).map_err(|error| Error::io("read", &core_path, error))?;
    let boot_path = Path::new(GRUB_DIRECTORY).join("boot.img");
    let boot = fs::read(&boot_path).map_err(|error| Error::io("read", &boot_path, error))?;
    let mut mbr = [0; SECTOR as usize];
    disk.read_exact_at(&mut mbr, 0).map_err(|error| Error::io("read", raw, error))?;
    let fault = |why: String| Error::new(ErrorKind::Invalid, format!("cannot install the boot loader: {why}"));
    patch_core(&mut core, BOOT_START, BOOT_SECTORS).map_err(fault)?;
    let mbr = boot_sector(&boot, &mbr, BOOT_START).map_err(fault)?;
    disk.write_all_at(&core, BOOT_START * SECTOR)
        .and_then(|()| disk.write_all_at(&mbr, 0))
        .and_then(|()| (&*disk).flush())
        .map_err(|error| Error::io("write", raw, error))
}

/// Offset in boot.img of the sector the core image starts at (8 bytes, little endian): `kernel_sector` of GRUB's `boot.S`.
const KERNEL_SECTOR: usize = 0x5c;
/// From here on the master boot record belongs to the partition table: disk signature, partitions, end mark.
const PARTITION_TABLE: usize = 0x1b8;
/// The list of the core image's other sectors is the last 12 bytes of its first sector: start (8 bytes), length in
/// sectors (2), segment to load to (2), all little endian; `blocklist_default_*` of GRUB's `diskboot.S`.
const BLOCK_LIST: usize = 0x200 - 12;
/// Segment of everything but the core image's first sector: `GRUB_BOOT_MACHINE_KERNEL_SEG` plus one sector.
const LOAD_SEGMENT: u16 = 0x820;

/// GRUB's boot code with the sector of the core image, and the partition table that was there.
fn boot_sector(boot: &[u8], present: &[u8; 512], core_sector: u64) -> std::result::Result<[u8; 512], String> {
    let mut sector: [u8; 512] =
        boot.try_into().map_err(|_| format!("boot.img has {} bytes instead of 512", boot.len()))?;
    if sector[510..] != [0x55, 0xaa] || present[510..] != [0x55, 0xaa] {
        return Err("a boot sector without its end mark".into());
    }
    sector[KERNEL_SECTOR..KERNEL_SECTOR + 8].copy_from_slice(&core_sector.to_le_bytes());
    sector[PARTITION_TABLE..].copy_from_slice(&present[PARTITION_TABLE..]);
    Ok(sector)
}

/// Pads the core image to whole sectors and tells its first sector where the others are.
fn patch_core(core: &mut Vec<u8>, first_sector: u64, room: u64) -> std::result::Result<(), String> {
    core.resize(core.len().next_multiple_of(SECTOR as usize), 0);
    let sectors = core.len() as u64 / SECTOR;
    if sectors < 2 || sectors > room {
        return Err(format!("a core image of {sectors} sectors does not fit into {room}"));
    }
    let others = u16::try_from(sectors - 1).map_err(|_| "the core image is too large".to_owned())?;
    core[BLOCK_LIST..BLOCK_LIST + 8].copy_from_slice(&(first_sector + 1).to_le_bytes());
    core[BLOCK_LIST + 8..BLOCK_LIST + 10].copy_from_slice(&others.to_le_bytes());
    core[BLOCK_LIST + 10..BLOCK_LIST + 12].copy_from_slice(&LOAD_SEGMENT.to_le_bytes());
    Ok(())
}

/// A fresh random UUID, from the kernel.
///
/// # Errors
/// [`ErrorKind::Io`] if `/proc` is not there.
pub fn random_uuid() -> Result<String> {
    let path = Path::new("/proc/sys/kernel/random/uuid");
    let text = fs::read_to_string(path).map_err(|error| Error::io("read", path, error))?;
    Ok(text.trim().to_owned())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn boot_img() -> Vec<u8> {
        let mut boot = vec![0xEB; 512];
        boot[510..].copy_from_slice(&[0x55, 0xaa]);
        boot
    }

    #[test]
    fn the_partition_table_survives_and_the_rest_is_boot_code() {
        let mut present = [7; 512];
        present[510..].copy_from_slice(&[0x55, 0xaa]);
        let sector = boot_sector(&boot_img(), &present, 2048).unwrap();
        assert_eq!(sector[..0x5c], boot_img()[..0x5c]);
        assert_eq!(sector[0x5c..0x64], [0, 8, 0, 0, 0, 0, 0, 0]);
        assert_eq!(sector[0x64..0x1b8], boot_img()[0x64..0x1b8]);
        assert_eq!(sector[0x1b8..], present[0x1b8..]);
        assert!(boot_sector(&[0; 511], &present, 1).is_err());
        assert!(boot_sector(&[0; 512], &present, 1).is_err());
    }

    proptest! {
        #[test]
        fn the_block_list_covers_the_whole_core(length in 513usize..200_000, first in 1u64..1 << 40) {
            let original = vec![0xAB; length];
            let mut core = original.clone();
            patch_core(&mut core, first, 2048).unwrap();
            prop_assert_eq!(core.len() % 512, 0);
            prop_assert_eq!(u64::from_le_bytes(core[500..508].try_into().unwrap()), first + 1);
            let others = u16::from_le_bytes(core[508..510].try_into().unwrap());
            prop_assert_eq!((usize::from(others) + 1) * 512, core.len());
            prop_assert!(core.len() - length < 512);
            prop_assert_eq!(&core[510..512], &[0x20, 0x08]);
            prop_assert_eq!(&core[..500], &original[..500]);
            prop_assert_eq!(&core[512..length], &original[512.min(length)..]);
        }
    }

    #[test]
    fn a_core_that_does_not_fit_is_refused() {
        assert!(patch_core(&mut vec![0; 512], 2048, 2048).is_err());
        assert!(patch_core(&mut vec![0; 512 * 2049], 2048, 2048).is_err());
        assert!(patch_core(&mut vec![0; 512 * 2048], 2048, 2048).is_ok());
    }

    #[test]
    fn a_tree_becomes_a_disk_with_two_partitions_and_its_files() {
        if PROGRAMS.iter().any(|(tool, _)| crate::skipping::lacks(tool)) {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let (root, work, image) = (dir.path().join("root"), dir.path().join("work"), dir.path().join("x.qcow2"));
        fs::create_dir_all(&root).unwrap();
        fs::create_dir_all(&work).unwrap();
        fs::write(root.join("vmlinuz"), b"kernel of the test").unwrap();
        let plan = DiskPlan {
            size: 40 << 20,
            label: "test-root".into(),
            uuid: random_uuid().unwrap(),
            command_line: "quiet".into(),
            menu_seconds: 0,
        };
        let cancel = Cancel::default();
        assemble(&root, &image, &work, &plan, &cancel).unwrap();
        assert_eq!(super::super::qcow2::standalone_size(&image).unwrap(), 40 << 20);
        let raw = dir.path().join("back.raw");
        Command::new("qemu-img")
            .args(["convert", "-f", "qcow2", "-O", "raw"])
            .args([&image, &raw])
            .run("cannot convert", &cancel)
            .unwrap();
        let table = Command::new("sfdisk").arg("--json").arg(&raw).run("cannot list", &cancel).unwrap();
        let table: serde_json::Value = serde_json::from_slice(&table).unwrap();
        let partitions = table["partitiontable"]["partitions"].as_array().unwrap();
        assert_eq!(partitions.len(), 2);
        assert_eq!(partitions[0]["type"], BIOS_BOOT);
        assert_eq!(partitions[1]["start"], ROOT_START);
        let filesystem = dir.path().join("fs");
        let bytes = fs::read(&raw).unwrap();
        fs::write(&filesystem, &bytes[(ROOT_START * SECTOR) as usize..]).unwrap();
        let text =
            Command::new("debugfs").args(["-R", "cat /vmlinuz"]).arg(&filesystem).run("cannot read", &cancel).unwrap();
        assert_eq!(text, b"kernel of the test");
        let text = Command::new("debugfs")
            .args(["-R", "cat /boot/grub/grub.cfg"])
            .arg(&filesystem)
            .run("cannot read", &cancel)
            .unwrap();
        assert!(String::from_utf8(text).unwrap().contains(&format!("root=UUID={}", plan.uuid)));
        assert_eq!(bytes[BOOT_START as usize * 512 + 500..][..8], (BOOT_START + 1).to_le_bytes());
    }
}
