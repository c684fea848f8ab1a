//! Reads the header of a qcow2 image without trusting it and without running a program: the format, the virtual
//! size, the name of the backing file.

use std::fs::File;
use std::io::{ErrorKind as IoKind, Read, Seek, SeekFrom};
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use crate::{Error, ErrorKind, Result};

const MAGIC: [u8; 4] = *b"QFI\xfb";
/// QEMU's own limit for the name of a backing file, in bytes.
const BACKING_NAME_LIMIT: u32 = 1023;
/// Bit of the incompatible features: the data is in another file.
const EXTERNAL_DATA_FILE: u64 = 1 << 2;
/// Bit of the incompatible features: the image was not closed properly after corruption was found.
const CORRUPT: u64 = 1 << 1;
/// The largest header that is read: the fixed part of version 3.
const HEADER: usize = 104;

/// What the header of a qcow2 image says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    /// Format version, 2 or 3.
    pub version: u32,
    /// Size of the disk the guest sees, in bytes.
    pub virtual_size: u64,
    /// The name of the backing file as it is written in the image: often, not always, an absolute path.
    pub backing_file: Option<PathBuf>,
    /// Whether the data is in another file.
    pub external_data_file: bool,
    /// Whether QEMU has marked the image as damaged.
    pub corrupt: bool,
}

/// Parses the first bytes of an image. `name_at` reads `length` bytes (at most 1023) at an offset for the backing file's name.
///
/// # Errors
/// A rule of the format that the bytes break, in words.
fn parse(
    bytes: &[u8],
    name_at: impl FnOnce(u64, usize) -> std::io::Result<Vec<u8>>,
) -> std::result::Result<Header, String> {
    let be32 = |at: usize| bytes.get(at..at + 4).and_then(|b| b.try_into().ok()).map(u32::from_be_bytes);
    let be64 = |at: usize| bytes.get(at..at + 8).and_then(|b| b.try_into().ok()).map(u64::from_be_bytes);
    if bytes.get(..4) != Some(&MAGIC[..]) {
        return Err("not a qcow2 image".into());
    }
    let short = || "the file ends within the header".to_owned();
    let version = be32(4).ok_or_else(short)?;
    let features = match version {
        2 => 0,
        3 => be64(72).ok_or_else(short)?,
        other => return Err(format!("unknown qcow2 version {other}")),
    };
    let virtual_size = be64(24).ok_or_else(short)?;
    if virtual_size == 0 || virtual_size > 1 << 50 {
        return Err(format!("a virtual size of {virtual_size} bytes"));
    }
    let name_offset = be64(8).ok_or_else(short)?;
    let name_length = be32(16).ok_or_else(short)?;
    let backing_file = if name_offset == 0 {
        None
    } else if name_length == 0 || name_length > BACKING_NAME_LIMIT {
        return Err(format!("a backing file name of {name_length} bytes"));
    } else {
        let name = name_at(name_offset, name_length as usize).map_err(|error| format!("backing file name: {error}"))?;
        if name.contains(&0) {
            return Err("a backing file name with a zero byte".into());
        }
        Some(PathBuf::from(std::ffi::OsString::from_vec(name)))
    };
    Ok(Header {
        version,
        virtual_size,
        backing_file,
        external_data_file: features & EXTERNAL_DATA_FILE != 0,
        corrupt: features & CORRUPT != 0,
    })
}

/// Reads the header of the image at `path`.
///
/// # Errors
/// [`ErrorKind::Io`] if the file cannot be read, [`ErrorKind::Invalid`] if it is not a qcow2 image QEMU would open.
pub fn header(path: &Path) -> Result<Header> {
    let mut file = File::open(path).map_err(|error| Error::io("open", path, error))?;
    let kind = file.metadata().map_err(|error| Error::io("examine", path, error))?;
    if !kind.is_file() {
        return Err(Error::new(ErrorKind::Invalid, format!("{} is not a file", path.display())));
    }
    let mut bytes = Vec::with_capacity(HEADER);
    file.by_ref().take(HEADER as u64).read_to_end(&mut bytes).map_err(|error| Error::io("read", path, error))?;
    parse(&bytes, |offset, length| {
        let mut name = vec![0; length];
        file.seek(SeekFrom::Start(offset))?;
        file.read_exact(&mut name)?;
        Ok(name)
    })
    .map_err(|why| Error::new(ErrorKind::Invalid, format!("{} cannot be used: {why}", path.display())))
}

/// The backing file of a qcow2 image, as an absolute path where the image names a plain file; a relative name is
/// taken from the image's directory, as QEMU does. `None` for an image without one.
///
/// # Errors
/// As [`header`]; [`ErrorKind::Invalid`] for a name that is no path, such as `json:…` or `nbd:…`.
pub fn backing_file(path: &Path) -> Result<Option<PathBuf>> {
    let Some(name) = header(path)?.backing_file else { return Ok(None) };
    let text = name.to_string_lossy();
    let name = match text.split_once(':') {
        Some(("file", rest)) => PathBuf::from(rest),
        // As QEMU does: a colon before the first slash makes it a protocol, and json: can name any file.
        Some((protocol, _)) if !protocol.contains('/') => {
            let message = format!("{} has a backing file that is no plain path: {text}", path.display());
            return Err(Error::new(ErrorKind::Invalid, message));
        }
        _ => name,
    };
    Ok(Some(match path.parent() {
        Some(dir) if name.is_relative() => dir.join(name),
        _ => name,
    }))
}

/// The backing files of every qcow2 image directly in `directory` (a storage pool's target). A file that is no
/// qcow2 image, or vanishes meanwhile, has none.
///
/// # Errors
/// [`ErrorKind::Io`] if the directory or one of its images cannot be read: what it refers to is then unknown.
pub fn backing_files_in(directory: &Path) -> Result<std::collections::BTreeSet<PathBuf>> {
    let mut found = std::collections::BTreeSet::new();
    let entries = std::fs::read_dir(directory).map_err(|error| Error::io("list", directory, error))?;
    for entry in entries {
        let path = entry.map_err(|error| Error::io("list", directory, error))?.path();
        if !path.is_file() {
            continue;
        }
        match backing_file(&path) {
            Ok(backing) => found.extend(backing),
            Err(error) if error.kind == ErrorKind::Invalid && !starts_with_magic(&path)? => {}
            Err(error) => {
                let gone = !path.exists();
                if !gone {
                    return Err(error);
                }
            }
        }
    }
    Ok(found)
}

/// Whether the file claims to be qcow2, however broken the rest of its header is.
fn starts_with_magic(path: &Path) -> Result<bool> {
    let mut magic = [0; 4];
    match File::open(path).and_then(|mut file| file.read_exact(&mut magic)) {
        Ok(()) => Ok(magic == MAGIC),
        Err(error) if matches!(error.kind(), IoKind::UnexpectedEof | IoKind::NotFound) => Ok(false),
        Err(error) => Err(Error::io("read", path, error)),
    }
}

/// Fails unless `path` is a complete qcow2 image that stands alone, as a template must. Returns its virtual size in bytes.
///
/// # Errors
/// As [`header`]; [`ErrorKind::Invalid`] if it needs another file or is marked as damaged.
pub fn standalone_size(path: &Path) -> Result<u64> {
    let header = header(path)?;
    let fault = if let Some(backing) = &header.backing_file {
        format!("it is an overlay of {}", backing.display())
    } else if header.external_data_file {
        "its data is in another file".to_owned()
    } else if header.corrupt {
        "it is marked as damaged".to_owned()
    } else {
        return Ok(header.virtual_size);
    };
    Err(Error::new(ErrorKind::Invalid, format!("{} cannot be used as a template: {fault}", path.display())))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
pub(crate) mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The smallest file that passes for an image: a header, and the backing file's name behind it.
    pub(crate) fn image(virtual_size: u64, backing: Option<&str>, features: u64) -> Vec<u8> {
        let mut bytes = vec![0; 112];
        bytes[..4].copy_from_slice(&MAGIC);
        bytes[4..8].copy_from_slice(&3u32.to_be_bytes());
        bytes[20..24].copy_from_slice(&16u32.to_be_bytes());
        bytes[24..32].copy_from_slice(&virtual_size.to_be_bytes());
        bytes[72..80].copy_from_slice(&features.to_be_bytes());
        bytes[100..104].copy_from_slice(&104u32.to_be_bytes());
        if let Some(name) = backing {
            bytes[8..16].copy_from_slice(&112u64.to_be_bytes());
            bytes[16..20].copy_from_slice(&u32::try_from(name.len()).unwrap().to_be_bytes());
            bytes.extend_from_slice(name.as_bytes());
        }
        bytes
    }

    fn written(bytes: &[u8]) -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.qcow2");
        std::fs::write(&path, bytes).unwrap();
        (dir, path)
    }

    #[test]
    fn what_qemu_img_makes_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let (base, overlay) = (dir.path().join("base.qcow2"), dir.path().join("overlay.qcow2"));
        let create = |args: &[&std::ffi::OsStr]| {
            use crate::child::CommandExt;
            let mut command = std::process::Command::new("qemu-img");
            command.args(["create", "-q", "-f", "qcow2"]).args(args);
            command.run("cannot create", &crate::cancel::Cancel::default())
        };
        if crate::skipping::lacks("qemu-img") {
            return;
        }
        create(&[base.as_os_str(), "3G".as_ref()]).unwrap();
        create(&["-F".as_ref(), "qcow2".as_ref(), "-b".as_ref(), base.as_os_str(), overlay.as_os_str(), "5G".as_ref()])
            .unwrap();
        assert_eq!(standalone_size(&base).unwrap(), 3 << 30);
        assert_eq!(header(&overlay).unwrap().virtual_size, 5 << 30);
        assert_eq!(backing_file(&overlay).unwrap(), Some(base.clone()));
        assert!(standalone_size(&overlay).unwrap_err().message.contains("overlay of"));
        std::fs::write(dir.path().join("seed.iso"), b"not an image").unwrap();
        assert_eq!(backing_files_in(dir.path()).unwrap(), [base].into());
    }

    #[test]
    fn a_template_must_stand_alone() {
        for (bytes, says) in [
            (image(1 << 30, Some("/b"), 0), "overlay of /b"),
            (image(1 << 30, None, EXTERNAL_DATA_FILE), "in another file"),
            (image(1 << 30, None, CORRUPT), "damaged"),
            (image(0, None, 0), "virtual size"),
            (b"\x7fELF".to_vec(), "not a qcow2 image"),
            (image(1 << 30, None, 0)[..40].to_vec(), "ends within the header"),
            (Vec::new(), "not a qcow2 image"),
        ] {
            let (_dir, path) = written(&bytes);
            let error = standalone_size(&path).unwrap_err();
            assert_eq!(error.kind, ErrorKind::Invalid);
            assert!(error.message.contains(says), "{}", error.message);
        }
    }

    #[test]
    fn a_relative_backing_file_is_taken_from_the_images_directory() {
        let (dir, path) = written(&image(1, Some("base.qcow2"), 0));
        assert_eq!(backing_file(&path).unwrap(), Some(dir.path().join("base.qcow2")));
    }

    #[test]
    fn a_name_that_is_no_path_makes_the_answer_unknown() {
        for name in ["json:{\"driver\":\"qcow2\"}", "nbd:host:10809"] {
            let (dir, path) = written(&image(1, Some(name), 0));
            assert_eq!(backing_file(&path).unwrap_err().kind, ErrorKind::Invalid);
            assert!(backing_files_in(dir.path()).is_err());
        }
        let (_dir, path) = written(&image(1, Some("file:/base:1.qcow2"), 0));
        assert_eq!(backing_file(&path).unwrap(), Some(PathBuf::from("/base:1.qcow2")));
        let (_dir, path) = written(&image(1, Some("/base:1.qcow2"), 0));
        assert_eq!(backing_file(&path).unwrap(), Some(PathBuf::from("/base:1.qcow2")));
    }

    #[test]
    fn an_image_that_cannot_be_understood_makes_the_answer_unknown() {
        let mut bytes = image(1, None, 0);
        bytes[8..16].copy_from_slice(&u64::MAX.to_be_bytes());
        bytes[16..20].copy_from_slice(&9u32.to_be_bytes());
        let (dir, _path) = written(&bytes);
        assert!(backing_files_in(dir.path()).is_err());
    }

    proptest! {
        #[test]
        fn any_bytes_are_an_answer_never_a_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200), magic: bool) {
            let mut bytes = bytes;
            if magic && bytes.len() >= 8 {
                bytes[..4].copy_from_slice(&MAGIC);
                bytes[4..8].copy_from_slice(&[0, 0, 0, 3]);
            }
            let (_dir, path) = written(&bytes);
            if let Ok(header) = header(&path) {
                prop_assert!(header.virtual_size > 0);
                prop_assert!(header.backing_file.is_none_or(|name| name.as_os_str().len() <= 1023));
            }
        }

        #[test]
        fn a_backing_name_survives(name in "[a-zA-Z0-9/._-]{1,200}", size in 1u64..1 << 50) {
            let (_dir, path) = written(&image(size, Some(&name), 0));
            let header = header(&path).unwrap();
            prop_assert_eq!(header.backing_file, Some(PathBuf::from(name)));
            prop_assert_eq!(header.virtual_size, size);
        }
    }
}
