//! A writer for the one kind of ISO 9660 image a seed needs: a label and a few small files in the root directory.
//!
//! ISO 9660 level 1 with Rock Ridge (RRIP 1991A), which gives the files their real names, owner root and modes; the
//! plain ISO names are the upper-case 8.3 forms. There is no Joliet tree: everything that runs cloud-init reads Rock
//! Ridge. The same input gives the same bytes.
//!
//! Layout in 2048-byte sectors: 0 to 15 empty, 16 the volume descriptor, 17 the end of the descriptors, 18 and 19 the
//! path table in either byte order, 20 the root directory, 21 and on the files.

use jiff::Timestamp;
use jiff::civil::DateTime;
use jiff::tz::TimeZone;

use crate::{Error, ErrorKind, Result};

const SECTOR: usize = 2048;
const DESCRIPTOR: usize = 16;
const DESCRIPTOR_END: usize = 17;
const PATH_TABLE_LITTLE: u32 = 18;
const PATH_TABLE_BIG: u32 = 19;
const ROOT: u32 = 20;
const FIRST_FILE: u32 = 21;
/// The root's path table entry: 8 fixed bytes, a one-byte name, one byte of padding.
const PATH_TABLE_LEN: u32 = 10;

/// Only root reads a seed: it holds the secret of the VM's one-time passwords.
const MODE_DIRECTORY: u32 = 0o040_500;
const MODE_FILE: u32 = 0o100_400;

/// A file of the image's root directory.
#[derive(Debug, Clone, Copy)]
pub struct File<'a> {
    /// Its name: 1 to 64 of `A-Z a-z 0-9 . _ -`.
    pub name: &'a str,
    /// Its content.
    pub data: &'a [u8],
}

/// The bytes of an image labelled `label` (1 to 32 of `A-Z a-z 0-9 _ -`) that holds `files`, all dated `time`.
///
/// # Errors
/// [`ErrorKind::Invalid`] when the label or a name breaks its rule, two names have the same 8.3 form, the files do not
/// fit into a directory of one sector (about 13 files), or the image would pass 4 GiB.
pub fn image(label: &str, files: &[File<'_>], time: Timestamp) -> Result<Vec<u8>> {
    if !(1..=32).contains(&label.len()) || !label.bytes().all(|b| b.is_ascii_alphanumeric() || b"_-".contains(&b)) {
        return Err(invalid(format!("volume label {label:?} is not 1 to 32 of A-Z a-z 0-9 _ -")));
    }
    let time = time.to_zoned(TimeZone::UTC).datetime();
    let mut named = files.iter().map(|file| Ok((short_name(file.name)?, file))).collect::<Result<Vec<_>>>()?;
    // The standard wants a directory sorted by the plain names.
    named.sort_by(|a, b| a.0.cmp(&b.0));
    if let Some(pair) = named.windows(2).find(|pair| pair[0].0 == pair[1].0) {
        return Err(invalid(format!(
            "the files {:?} and {:?} have the same short name",
            pair[0].1.name, pair[1].1.name
        )));
    }

    let sector_len = SECTOR as u32;
    let mut directory = Vec::with_capacity(SECTOR);
    let root_stamp = [posix(MODE_DIRECTORY, 2), times(time)].concat();
    directory.extend(record(
        &[0],
        ROOT,
        sector_len,
        true,
        time,
        &[sharing(), root_stamp.clone(), extension()].concat(),
    ));
    directory.extend(record(&[1], ROOT, sector_len, true, time, &root_stamp));
    let mut next = FIRST_FILE;
    for (short, file) in &named {
        let size = u32::try_from(file.data.len()).map_err(|_| too_large())?;
        let system_use = [name(file.name), posix(MODE_FILE, 1), times(time)].concat();
        directory.extend(record(format!("{short};1").as_bytes(), next, size, false, time, &system_use));
        next = next.checked_add(size.div_ceil(sector_len)).ok_or_else(too_large)?;
    }
    if directory.len() > SECTOR {
        return Err(invalid(format!("{} files do not fit into one directory sector", files.len())));
    }
    if next > u32::MAX / sector_len {
        return Err(too_large());
    }

    let mut image = vec![0; FIRST_FILE as usize * SECTOR];
    image.reserve_exact((next - FIRST_FILE) as usize * SECTOR);
    put(&mut image, DESCRIPTOR * SECTOR, &descriptor(label, next, time));
    put(&mut image, DESCRIPTOR_END * SECTOR, b"\xffCD001\x01");
    put(&mut image, PATH_TABLE_LITTLE as usize * SECTOR, &path_table(ROOT.to_le_bytes(), 1_u16.to_le_bytes()));
    put(&mut image, PATH_TABLE_BIG as usize * SECTOR, &path_table(ROOT.to_be_bytes(), 1_u16.to_be_bytes()));
    put(&mut image, ROOT as usize * SECTOR, &directory);
    for (_, file) in &named {
        image.extend_from_slice(file.data);
        image.resize(image.len().next_multiple_of(SECTOR), 0);
    }
    Ok(image)
}

fn invalid(message: String) -> Error {
    Error::new(ErrorKind::Invalid, message)
}

fn too_large() -> Error {
    invalid("the files are too large for a seed image".to_owned())
}

/// The 8.3 form: `user-data` is `USER_DAT.`.
fn short_name(name: &str) -> Result<String> {
    let allowed = |b: u8| b.is_ascii_alphanumeric() || b"._-".contains(&b);
    if !(1..=64).contains(&name.len()) || !name.bytes().all(allowed) || matches!(name, "." | "..") {
        return Err(invalid(format!("file name {name:?} is not 1 to 64 of A-Z a-z 0-9 . _ -")));
    }
    let plain = |part: &str, len: usize| -> String {
        let char = |c: char| if c.is_ascii_alphanumeric() { c.to_ascii_uppercase() } else { '_' };
        part.chars().take(len).map(char).collect()
    };
    let (stem, suffix) = name.rsplit_once('.').unwrap_or((name, ""));
    Ok(format!("{}.{}", plain(stem, 8), plain(suffix, 3)))
}

fn descriptor(label: &str, sectors: u32, time: DateTime) -> Vec<u8> {
    let mut d = vec![0; SECTOR];
    put(&mut d, 0, b"\x01CD001\x01");
    put(&mut d, 8, &[b' '; 32]);
    put(&mut d, 40, &[b' '; 32]);
    put(&mut d, 40, label.as_bytes());
    put(&mut d, 80, &both32(sectors));
    put(&mut d, 120, &both16(1));
    put(&mut d, 124, &both16(1));
    put(&mut d, 128, &both16(SECTOR as u16));
    put(&mut d, 132, &both32(PATH_TABLE_LEN));
    put(&mut d, 140, &PATH_TABLE_LITTLE.to_le_bytes());
    put(&mut d, 148, &PATH_TABLE_BIG.to_be_bytes());
    put(&mut d, 156, &record(&[0], ROOT, SECTOR as u32, true, time, &[]));
    // The names of the set, publisher, preparer, application and three files: none of them given.
    put(&mut d, 190, &[b' '; 623]);
    // Hundredths of a second and the offset from UTC are 0.
    let stamp = format!("{}00\0", time.strftime("%Y%m%d%H%M%S"));
    put(&mut d, 813, stamp.as_bytes());
    put(&mut d, 830, stamp.as_bytes());
    put(&mut d, 847, b"0000000000000000\0");
    put(&mut d, 864, b"0000000000000000\0");
    d[881] = 1;
    d
}

fn path_table(extent: [u8; 4], parent: [u8; 2]) -> Vec<u8> {
    [&[1, 0][..], &extent, &parent, &[0, 0]].concat()
}

fn record(id: &[u8], extent: u32, size: u32, directory: bool, time: DateTime, system_use: &[u8]) -> Vec<u8> {
    let mut r = vec![0, 0];
    r.extend(both32(extent));
    r.extend(both32(size));
    r.extend(short_time(time));
    r.extend([if directory { 2 } else { 0 }, 0, 0]);
    r.extend(both16(1));
    r.push(id.len() as u8);
    r.extend(id);
    r.resize(r.len().next_multiple_of(2), 0);
    r.extend(system_use);
    r.resize(r.len().next_multiple_of(2), 0);
    // At most 34 + 14 + 69 + 36 + 26 bytes: names are short.
    r[0] = r.len() as u8;
    r
}

/// `SP`: the system use areas of this volume follow the sharing protocol.
fn sharing() -> Vec<u8> {
    b"SP\x07\x01\xbe\xef\x00".to_vec()
}

/// `ER`: they hold Rock Ridge entries.
fn extension() -> Vec<u8> {
    b"ER\x12\x01\x0a\x00\x00\x01RRIP_1991A".to_vec()
}

/// `PX`: mode and links; owner and group are root.
fn posix(mode: u32, links: u32) -> Vec<u8> {
    [&b"PX\x24\x01"[..], &both32(mode), &both32(links), &both32(0), &both32(0)].concat()
}

/// `TF`: times of the last change, access and attribute change, all the same.
fn times(time: DateTime) -> Vec<u8> {
    let stamp = short_time(time);
    [&b"TF\x1a\x01\x0e"[..], &stamp, &stamp, &stamp].concat()
}

/// `NM`: the real name.
fn name(name: &str) -> Vec<u8> {
    [&[b'N', b'M', 5 + name.len() as u8, 1, 0][..], name.as_bytes()].concat()
}

/// The seven-byte time; it can hold the years 1900 to 2155.
fn short_time(time: DateTime) -> [u8; 7] {
    let year = (time.year().clamp(1900, 2155) - 1900) as u8;
    [year, time.month() as u8, time.day() as u8, time.hour() as u8, time.minute() as u8, time.second() as u8, 0]
}

fn both16(value: u16) -> [u8; 4] {
    let ([a, b], [c, d]) = (value.to_le_bytes(), value.to_be_bytes());
    [a, b, c, d]
}

fn both32(value: u32) -> Vec<u8> {
    [value.to_le_bytes(), value.to_be_bytes()].concat()
}

fn put(to: &mut [u8], at: usize, bytes: &[u8]) {
    to[at..at + bytes.len()].copy_from_slice(bytes);
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::fs;
    use std::path::Path;
    use std::process::Command;

    use super::*;

    const TIME: &str = "2026-03-04T05:06:07Z";

    fn build(label: &str, files: &[(&str, &[u8])]) -> Result<Vec<u8>> {
        let files: Vec<_> = files.iter().map(|(name, data)| File { name, data }).collect();
        image(label, &files, TIME.parse().unwrap())
    }

    /// The output of a tool of Debian's (packages util-linux, xorriso, genisoimage).
    fn tool(program: &str, args: &[&str], iso: &Path) -> String {
        let output = Command::new(program).args(args).arg(iso).output().unwrap_or_else(|e| panic!("{program}: {e}"));
        assert!(output.status.success(), "{program}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    #[test]
    fn blkid_finds_label_and_type() {
        let dir = tempfile::tempdir().unwrap();
        let iso = dir.path().join("seed.iso");
        fs::write(&iso, build("cidata", &[("user-data", b"x")]).unwrap()).unwrap();
        let found = tool("blkid", &["-p", "-o", "export"], &iso);
        assert!(found.lines().any(|line| line == "LABEL=cidata"), "{found}");
        assert!(found.lines().any(|line| line == "TYPE=iso9660"), "{found}");
        assert!(found.lines().any(|line| line == "UUID=2026-03-04-05-06-07-00"), "{found}");
    }

    #[test]
    fn isoinfo_sees_names_modes_and_times() {
        let dir = tempfile::tempdir().unwrap();
        let iso = dir.path().join("seed.iso");
        let files: [(&str, &[u8]); 3] = [("user-data", b"one"), ("meta-data", b""), ("network-config", &[7; 5000])];
        fs::write(&iso, build("cidata", &files).unwrap()).unwrap();
        let listing = tool("isoinfo", &["-R", "-l", "-i"], &iso);
        for (mode, size, name) in [
            ("dr-x------", 2048, "."),
            ("-r--------", 3, "user-data"),
            ("-r--------", 0, "meta-data"),
            ("-r--------", 5000, "network-config"),
        ] {
            let line = listing.lines().find(|line| line.split_whitespace().last() == Some(name));
            let line = line.unwrap_or_else(|| panic!("{name} in {listing}"));
            let words: Vec<_> = line.split_whitespace().collect();
            assert_eq!((words[0], words[2], words[3], words[4]), (mode, "0", "0", size.to_string().as_str()), "{line}");
            assert!(line.contains("Mar  4 2026"), "{line}");
        }
        let plain = tool("isoinfo", &["-f", "-i"], &iso);
        assert_eq!(plain, "/META_DAT.;1\n/NETWORK_.;1\n/USER_DAT.;1\n");
    }

    #[test]
    fn xorriso_extracts_what_went_in() {
        let dir = tempfile::tempdir().unwrap();
        let iso = dir.path().join("seed.iso");
        let large: Vec<u8> = (0..1 << 20).map(|i: u32| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
        let files: [(&str, &[u8]); 4] =
            [("user-data", &large), ("meta-data", b""), ("network-config", &[7; 2048]), ("A.b-c", b"\0")];
        fs::write(&iso, build("cidata", &files).unwrap()).unwrap();
        let out = dir.path().join("out");
        let output = Command::new("xorriso")
            .args(["-indev", iso.to_str().unwrap(), "-osirrox", "on", "-extract", "/", out.to_str().unwrap()])
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() && !said.contains("WARNING") && !said.contains("SORRY"), "{said}");
        for (name, data) in files {
            assert!(fs::read(out.join(name)).unwrap() == data, "{name}");
        }
        assert_eq!(fs::read_dir(&out).unwrap().count(), files.len());
    }

    #[test]
    fn same_input_same_bytes_and_whole_sectors() {
        let files: [(&str, &[u8]); 2] = [("user-data", b"#cloud-config\n"), ("meta-data", b"{}")];
        let image = build("cidata", &files).unwrap();
        assert_eq!(image.len(), 23 * SECTOR);
        assert_eq!(image, build("cidata", &files).unwrap());
        // The directory is sorted, whatever order the files come in; their data follows the directory.
        assert_eq!(image, build("cidata", &[files[1], files[0]]).unwrap());
        let sum = <sha2::Sha256 as sha2::Digest>::digest(&image);
        let sum: String = sum.iter().map(|b| format!("{b:02x}")).collect();
        assert_eq!(sum, "125dde1d1018f42cf46bf2b31881c816b3ac1c74845bdc1f7026eb87e1a30e26");
    }

    #[test]
    fn refuses_what_it_cannot_write() {
        for label in ["", "a label", "x".repeat(33).as_str(), "ü"] {
            assert_eq!(build(label, &[]).unwrap_err().kind, ErrorKind::Invalid, "{label:?}");
        }
        for name in ["", ".", "..", "a/b", "ü", "x".repeat(65).as_str()] {
            assert_eq!(build("l", &[(name, b"")]).unwrap_err().kind, ErrorKind::Invalid, "{name:?}");
        }
        assert!(build("l", &[("user-data", b""), ("user-date", b"")]).unwrap_err().message.contains("short name"));
        let names: Vec<String> = (0..20).map(|i| format!("{i}{}", "x".repeat(60))).collect();
        let many: Vec<(&str, &[u8])> = names.iter().map(|n| (n.as_str(), &b""[..])).collect();
        assert!(build("l", &many).unwrap_err().message.contains("directory"));
    }
}
