//! Storage volumes: overlay, seed and console log of a VM, all in the configured pool and all made, filled and
//! deleted by libvirtd, which creates them as root with mode 0600.

use std::path::{Path, PathBuf};
use std::time::Duration;

use provisioner_contract::VmName;
use quick_xml::Writer;
use quick_xml::events::BytesText;
use virt::storage_pool::StoragePool;
use virt::storage_vol::StorageVol;
use virt::stream::Stream;

use super::{Connection, bounded, change_limit, failure};
use crate::{Error, ErrorKind, Result};

/// A few kilobytes of a volume are read at once, unless the storage hangs.
const READ_LIMIT: Duration = Duration::from_secs(10);

/// The names a VM's volumes have. They follow from the VM's name alone, so that undoing a create needs no memory
/// of how far it came, and keep the suffixes by which AppArmor's helper knows an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VolumeNames {
    /// The disk, an overlay of the template.
    pub overlay: String,
    /// The cloud-init seed.
    pub seed: String,
    /// What the guest wrote to its serial console.
    pub console: String,
}

impl VolumeNames {
    /// The names for `vm`.
    #[must_use]
    pub fn of(vm: &VmName) -> Self {
        Self { overlay: format!("{vm}.qcow2"), seed: format!("{vm}.iso"), console: format!("{vm}.console.log") }
    }

    /// All of them.
    #[must_use]
    pub fn all(&self) -> [&str; 3] {
        [&self.overlay, &self.seed, &self.console]
    }

    /// Whether `volume` is one of these, or a rotated console log.
    #[must_use]
    pub fn include(&self, volume: &str) -> bool {
        self.all().contains(&volume) || self.is_rotated(volume)
    }

    /// Whether `volume` is a rotated console log, such as `….console.log.0`.
    #[must_use]
    pub fn is_rotated(&self, volume: &str) -> bool {
        volume
            .strip_prefix(&self.console)
            .and_then(|rest| rest.strip_prefix('.'))
            .is_some_and(|n| !n.is_empty() && n.bytes().all(|b| b.is_ascii_digit()))
    }
}

/// An active storage pool whose volumes are files in one directory.
#[derive(Debug)]
pub struct Pool {
    pool: StoragePool,
    conn: virt::connect::Connect,
    name: String,
    target: PathBuf,
}

impl Connection {
    /// The pool called `name`.
    ///
    /// # Errors
    /// `NotFound` when there is none, `Conflict` when it is not active or has no directory.
    pub fn pool(&self, name: &str) -> Result<Pool> {
        let what = || format!("cannot use storage pool {name:?}");
        let pool = self.raw().lookup_storage_pool_by_name(name).map_err(|e| {
            let error = failure(what(), &e);
            match error.kind {
                ErrorKind::NotFound => error.hint(format!("define it, then: virsh pool-start {name}")),
                _ => error,
            }
        })?;
        if !pool.is_active().map_err(|e| failure(what(), &e))? {
            return Err(Error::new(ErrorKind::Conflict, format!("storage pool {name:?} is not active"))
                .hint(format!("virsh pool-start {name}; virsh pool-autostart {name}")));
        }
        let xml = pool.xml_desc(0).map_err(|e| failure(what(), &e))?;
        let target = target_path(&xml)
            .ok_or_else(|| Error::new(ErrorKind::Conflict, format!("storage pool {name:?} has no target directory")))?;
        Ok(Pool { pool, conn: self.raw().clone(), name: name.to_owned(), target })
    }
}

fn target_path(xml: &str) -> Option<PathBuf> {
    let document = roxmltree::Document::parse(xml).ok()?;
    let target = document.root_element().children().find(|n| n.has_tag_name("target"))?;
    Some(target.children().find(|n| n.has_tag_name("path"))?.text()?.into())
}

fn backing_path(xml: &str) -> Option<PathBuf> {
    let document = roxmltree::Document::parse(xml).ok()?;
    let backing = document.root_element().children().find(|n| n.has_tag_name("backingStore"))?;
    Some(backing.children().find(|n| n.has_tag_name("path"))?.text()?.into())
}

impl Connection {
    /// The name of the active pool whose volumes are in `directory`, or `None` when there is none.
    ///
    /// # Errors
    /// When libvirt cannot be asked.
    pub fn pool_at(&self, directory: &Path) -> Result<Option<String>> {
        let what = || format!("cannot look for a storage pool at {}", directory.display());
        let found = self.raw().lookup_storage_pool_by_target_path(&directory.to_string_lossy());
        match found.and_then(|pool| pool.name()).map_err(|e| failure(what(), &e)) {
            Ok(name) => Ok(Some(name)),
            Err(error) if error.kind == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }
}

impl Pool {
    pub(super) fn raw(&self) -> &StoragePool {
        &self.pool
    }

    /// The pool's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The directory its volumes are in.
    #[must_use]
    pub fn target(&self) -> &Path {
        &self.target
    }

    /// The path of the volume `name`, which need not exist.
    #[must_use]
    pub fn path(&self, name: &str) -> PathBuf {
        self.target.join(name)
    }

    /// Free bytes.
    ///
    /// # Errors
    /// When libvirt cannot be asked.
    pub fn available(&self) -> Result<u64> {
        let info = self.pool.info().map_err(|e| failure(format!("cannot ask for storage pool {:?}", self.name), &e))?;
        Ok(info.available)
    }

    fn find(&self, name: &str) -> Result<Option<StorageVol>> {
        match self.pool.lookup_storage_vol_by_name(name) {
            Ok(volume) => Ok(Some(volume)),
            Err(e) => match failure(format!("cannot look up volume {name:?}"), &e) {
                error if error.kind == ErrorKind::NotFound => Ok(None),
                error => Err(error),
            },
        }
    }

    /// Whether the pool knows a volume called `name`.
    ///
    /// # Errors
    /// When libvirt cannot be asked.
    pub fn contains(&self, name: &str) -> Result<bool> {
        Ok(self.find(name)?.is_some())
    }

    /// Whether `name` is taken: by a volume, or by a file that libvirt has not noticed yet.
    ///
    /// # Errors
    /// When libvirt cannot be asked.
    pub fn is_taken(&self, name: &str) -> Result<bool> {
        if self.contains(name)? {
            return Ok(true);
        }
        match self.path(name).try_exists() {
            Ok(exists) => Ok(exists),
            // A directory that is not for our eyes: libvirtd has to look.
            Err(_) => self.refresh().and_then(|()| self.contains(name)),
        }
    }

    /// Makes libvirtd look at the directory again, so that files it did not make itself become volumes.
    ///
    /// # Errors
    /// When libvirt refuses; while another process fills a volume it does.
    pub fn refresh(&self) -> Result<()> {
        self.pool.refresh(0).map(drop).map_err(|e| failure(format!("cannot refresh storage pool {:?}", self.name), &e))
    }

    /// The names of all volumes.
    ///
    /// # Errors
    /// When libvirt cannot be asked.
    pub fn volumes(&self) -> Result<Vec<String>> {
        // The call that lists names alone ends, in the binding, at 1024 of them and does not say so.
        let what = || format!("cannot list storage pool {:?}", self.name);
        let all = self.pool.list_all_volumes(0).map_err(|e| failure(what(), &e))?;
        all.iter().map(|volume| volume.name().map_err(|e| failure(what(), &e))).collect()
    }

    /// The names of all volumes, each with its backing file as the volume's description names it.
    ///
    /// # Errors
    /// When libvirt cannot be asked.
    pub fn backing_files(&self) -> Result<Vec<(String, Option<PathBuf>)>> {
        let what = || format!("cannot list storage pool {:?}", self.name);
        let mut found = Vec::new();
        for volume in self.pool.list_all_volumes(0).map_err(|e| failure(what(), &e))? {
            let described = volume.name().and_then(|name| Ok((name, volume.xml_desc(0)?)));
            match described.map_err(|e| failure(what(), &e)) {
                Ok((name, xml)) => found.push((name, backing_path(&xml))),
                // Deleted since it was listed.
                Err(error) if error.kind == ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
        found.sort();
        Ok(found)
    }

    /// Creates a qcow2 overlay of `capacity` bytes on the qcow2 file `base`.
    ///
    /// # Errors
    /// When libvirt refuses, for instance because the volume exists or the disk is full.
    pub fn create_overlay(&self, name: &str, capacity: u64, base: &Path) -> Result<PathBuf> {
        self.create(name, &volume_xml(name, "qcow2", capacity, Some(base))).map(|_| self.path(name))
    }

    /// Creates an empty raw volume.
    ///
    /// # Errors
    /// As [`Pool::create_overlay`].
    pub fn create_empty(&self, name: &str) -> Result<PathBuf> {
        self.create(name, &volume_xml(name, "raw", 0, None)).map(|_| self.path(name))
    }

    /// Creates a raw volume with `content`.
    ///
    /// # Errors
    /// As [`Pool::create_overlay`]; after a failure the volume may exist, empty or in part.
    pub fn create_filled(&self, name: &str, content: &[u8]) -> Result<PathBuf> {
        let length = content.len() as u64;
        let volume = self.create(name, &volume_xml(name, "raw", length, None))?;
        let (conn, content) = (self.conn.clone(), content.to_owned());
        let what = format!("cannot fill volume {name:?}");
        let upload = move || {
            let stream = Stream::new(&conn, 0)?;
            volume.upload(&stream, 0, length, 0)?;
            let mut rest = content.as_slice();
            while !rest.is_empty() {
                let sent = stream.send(rest)?;
                rest = usize::try_from(sent).ok().and_then(|sent| rest.get(sent..)).unwrap_or_default();
            }
            stream.finish()
        };
        bounded(change_limit(), &what, upload)?.map_err(|e: virt::error::Error| failure(what, &e))?;
        Ok(self.path(name))
    }

    fn create(&self, name: &str, xml: &str) -> Result<StorageVol> {
        tracing::debug!(volume = name, "creating a volume");
        let (pool, xml) = (self.pool.clone(), xml.to_owned());
        let what = format!("cannot create volume {name:?} in storage pool {:?}", self.name);
        bounded(change_limit(), &what, move || StorageVol::create_xml(&pool, &xml, 0))?.map_err(|e| failure(what, &e))
    }

    /// The last `most` bytes of the volume `name`.
    ///
    /// # Errors
    /// When libvirt cannot be asked or refuses.
    pub fn tail(&self, name: &str, most: u64) -> Result<Vec<u8>> {
        let what = format!("cannot read volume {name:?}");
        let Some(volume) = self.find(name)? else { return Err(Error::new(ErrorKind::NotFound, what)) };
        let conn = self.conn.clone();
        let read = move || {
            let length = volume.info()?.capacity;
            let stream = Stream::new(&conn, 0)?;
            volume.download(&stream, length.saturating_sub(most), most, 0)?;
            let mut all = Vec::new();
            let mut chunk = vec![0; 4096];
            while let Some(part) = usize::try_from(stream.recv(&mut chunk)?).ok().and_then(|n| chunk.get(..n)) {
                if part.is_empty() {
                    break;
                }
                all.extend_from_slice(part);
            }
            stream.finish()?;
            Ok(all)
        };
        bounded(READ_LIMIT, &what, read)?.map_err(|e: virt::error::Error| failure(what, &e))
    }

    /// Deletes the volume `name`; that it does not exist is a success.
    ///
    /// # Errors
    /// When libvirt cannot be asked or refuses.
    pub fn ensure_absent(&self, name: &str) -> Result<()> {
        let path = self.path(name);
        let volume = match self.find(name)? {
            Some(volume) => volume,
            // A file libvirt has not noticed yet. Where we may not look, it is libvirtd's look at destroy that tells.
            None if path.exists() => {
                self.refresh()?;
                match self.find(name)? {
                    Some(volume) => volume,
                    None if path.exists() => {
                        let what =
                            format!("{} is there, but is no volume of storage pool {:?}", path.display(), self.name);
                        return Err(Error::new(ErrorKind::Conflict, what).hint("look at it, and remove it by hand"));
                    }
                    None => return Ok(()),
                }
            }
            None => return Ok(()),
        };
        let mut attempts = 0;
        loop {
            let what = format!("cannot delete volume {name:?} of storage pool {:?}", self.name);
            let doomed = volume.clone();
            let error = match bounded(change_limit(), &what, move || doomed.delete(0))? {
                Ok(()) => return Ok(()),
                Err(e) => failure(what, &e),
            };
            // Somebody else deleted it, or its file went away under libvirt, which then drops it on a refresh.
            if self.find(name)?.is_none() {
                return Ok(());
            }
            attempts += 1;
            if error.kind == ErrorKind::Unavailable || attempts == 20 {
                return Err(error);
            }
            // A volume whose upload died with its process is in use until the daemon has noticed.
            if !self.path(name).exists() {
                let _ = self.refresh();
            }
            std::thread::sleep(Duration::from_millis(100));
        }
    }
}

fn volume_xml(name: &str, format: &str, capacity: u64, base: Option<&Path>) -> String {
    let mut writer = Writer::new(Vec::new());
    // Writing to memory cannot fail.
    let _ = writer.create_element("volume").write_inner_content(|w| {
        w.create_element("name").write_text_content(BytesText::new(name))?;
        w.create_element("capacity")
            .with_attribute(("unit", "bytes"))
            .write_text_content(BytesText::new(&capacity.to_string()))?;
        w.create_element("allocation").write_text_content(BytesText::new("0"))?;
        w.create_element("target").write_inner_content(|w| {
            w.create_element("format").with_attribute(("type", format)).write_empty()?;
            w.create_element("permissions").write_inner_content(|w| {
                w.create_element("mode").write_text_content(BytesText::new("0600"))?;
                Ok(())
            })?;
            if format == "qcow2" {
                // Without it libvirt makes the format of 2008, which cannot mark what a guest has discarded.
                w.create_element("compat").write_text_content(BytesText::new("1.1"))?;
            }
            Ok(())
        })?;
        if let Some(base) = base {
            w.create_element("backingStore").write_inner_content(|w| {
                w.create_element("path").write_text_content(BytesText::new(&base.to_string_lossy()))?;
                w.create_element("format").with_attribute(("type", "qcow2")).write_empty()?;
                Ok(())
            })?;
        }
        Ok(())
    });
    String::from_utf8_lossy(&writer.into_inner()).into_owned()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn names_of_different_vms_never_meet() {
        let names: Vec<_> = ["a", "a.iso", "a.qcow2", "a.console.log", "a.console.log.0"]
            .iter()
            .map(|n| VolumeNames::of(&VmName::new(n).unwrap()))
            .collect();
        for (i, one) in names.iter().enumerate() {
            for (j, other) in names.iter().enumerate() {
                for volume in other.all() {
                    assert_eq!(one.include(volume), i == j, "{volume}");
                }
            }
        }
        assert!(names[0].include("a.console.log.0"));
        assert!(!names[0].include("a.console.log.x"));
        assert!(!names[0].include("a.console.log."));
    }

    #[test]
    fn the_volume_names_its_base_and_both_formats() {
        let xml = volume_xml("web1.qcow2", "qcow2", 1 << 30, Some(Path::new("/base & co.qcow2")));
        let document = roxmltree::Document::parse(&xml).unwrap();
        let text = |tag: &str| document.descendants().find(|n| n.has_tag_name(tag)).unwrap().text().unwrap().to_owned();
        assert_eq!(text("path"), "/base & co.qcow2");
        assert_eq!(text("capacity"), "1073741824");
        assert_eq!(text("compat"), "1.1");
        assert_eq!(document.descendants().filter(|n| n.attribute("type") == Some("qcow2")).count(), 2);
    }
}
