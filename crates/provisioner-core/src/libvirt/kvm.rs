//! Whether hardware virtualisation really works here.
//!
//! That `/dev/kvm` exists, opens and even creates VMs proves nothing: there are machines, mostly VMs themselves,
//! where no stock kernel gets past its boot loader. The proof is a kernel that reaches its init. So the probe boots
//! the template, read-only and without network, and reads its serial console. The domain is transient and
//! auto-destroyed with our connection: a probe that is killed leaves nothing.

use std::path::Path;
use std::time::{Duration, Instant};

use quick_xml::escape::escape;
use serde::{Deserialize, Serialize};
use virt::stream::Stream;

use super::domain_xml::DomainType;
use super::{Connection, bounded, failure};
use crate::cancel::Cancel;
use crate::progress::Progress;
use crate::{Error, ErrorKind, Result, durable};

/// A stock kernel needs about 2 s to its init under working KVM. Nested twice and on a busy host some more.
const PROBE_LIMIT: Duration = Duration::from_secs(40);

/// What shows on the console once a kernel has handed over to its init: the kernel's own line, systemd's first.
const REACHED_INIT: [&[u8]; 2] = [b"as init process", b"systemd[1]:"];

/// The remembered answer, valid for one combination of kernel, CPU and libvirt.
#[derive(Debug, Serialize, Deserialize, PartialEq, Eq)]
struct Remembered {
    host: String,
    /// `None`: it could not be told.
    works: Option<bool>,
}

/// The domain type `auto` stands for on this host: [`DomainType::Kvm`] when a kernel was seen to boot under it.
///
/// The answer is kept in `memory` until kernel, CPU or hypervisor change. `template` is the disk to boot.
///
/// # Errors
/// When libvirt cannot be asked or starts no VM of any kind, or on a request to stop.
pub fn choose(
    connection: &Connection,
    template: &Path,
    memory: &Path,
    progress: &dyn Progress,
    cancel: &Cancel,
) -> Result<DomainType> {
    if !connection.offers("kvm")? {
        progress.warn("this host offers no hardware virtualisation (KVM): VMs run under emulation, many times slower");
        return Ok(DomainType::Qemu);
    }
    let host = fingerprint(connection);
    let works = match read_answer(memory) {
        Some(answer) if answer.host == host => answer.works,
        _ => {
            progress.phase("checking that hardware virtualisation works");
            let works = works(connection, template, cancel)?;
            let answer = serde_json::to_vec(&Remembered { host, works }).unwrap_or_default();
            if let Err(error) = durable::write_atomic(memory, &answer, 0o644) {
                progress.warn(&format!("the answer cannot be kept, the next create asks again: {}", error.in_full()));
            }
            works
        }
    };
    match works {
        Some(true) => return Ok(DomainType::Kvm),
        Some(false) => {
            progress.warn("KVM is offered but no kernel boots under it: VMs run under emulation, many times slower");
        }
        None => progress.warn(
            "whether KVM works cannot be told, the template shows nothing on its serial console: VMs run under emulation, \
             many times slower, unless libvirt.domain_type in db.yaml says kvm",
        ),
    }
    Ok(DomainType::Qemu)
}

/// Whether KVM works, `None` when that cannot be told.
///
/// "It does not" is remembered and makes every VM slow, so a failure under KVM counts only when the same disk does better
/// under emulation.
fn works(connection: &Connection, template: &Path, cancel: &Cancel) -> Result<Option<bool>> {
    match probe(connection, template, DomainType::Kvm, cancel)? {
        Probe::ReachedInit => Ok(Some(true)),
        Probe::Silent => match probe(connection, template, DomainType::Qemu, cancel)? {
            Probe::ReachedInit => Ok(Some(false)),
            Probe::Silent => Ok(None),
            Probe::Refused(error) => Err(error),
        },
        Probe::Refused(error) => {
            tracing::debug!("the KVM probe does not start: {error:?}");
            match start(connection, &probe_xml(template, DomainType::Qemu))? {
                Ok(domain) => {
                    let _ = domain.destroy();
                    Ok(Some(false))
                }
                Err(error) => Err(error),
            }
        }
    }
}

/// The answer kept in `memory`, whatever host it was found on.
#[must_use]
pub fn remembered(memory: &Path) -> Option<bool> {
    read_answer(memory).and_then(|answer| answer.works)
}

fn read_answer(memory: &Path) -> Option<Remembered> {
    serde_json::from_slice(&std::fs::read(memory).ok()?).ok()
}

fn fingerprint(connection: &Connection) -> String {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let cpu = read("/proc/cpuinfo").lines().find(|l| l.starts_with("model name")).unwrap_or_default().to_owned();
    let version = connection.raw().hyp_version().unwrap_or_default();
    format!("{} | {} | {version}", read("/proc/sys/kernel/osrelease").trim(), cpu.trim())
}

/// What became of a probe.
enum Probe {
    /// A kernel handed over to its init.
    ReachedInit,
    /// It ran, and nothing of the kind was to be seen.
    Silent,
    /// It did not start.
    Refused(Error),
}

fn start(connection: &Connection, xml: &str) -> Result<Result<virt::domain::Domain>> {
    let (conn, xml) = (connection.raw().clone(), xml.to_owned());
    let what = "cannot start a VM to see whether KVM works";
    let started =
        bounded(PROBE_LIMIT, what, move || conn.create_domain_xml(&xml, virt_sys::VIR_DOMAIN_START_AUTODESTROY))?;
    match started.map_err(|e| failure(what, &e)) {
        Err(error) if error.kind == ErrorKind::Unavailable => Err(error),
        outcome => Ok(outcome),
    }
}

fn probe(connection: &Connection, template: &Path, kind: DomainType, cancel: &Cancel) -> Result<Probe> {
    let domain = match start(connection, &probe_xml(template, kind))? {
        Ok(domain) => domain,
        Err(error) => return Ok(Probe::Refused(error)),
    };
    let answer = watch(connection, &domain, cancel);
    // Also ends a reader that still waits for output. Should it fail, closing the connection does it.
    let _ = domain.destroy();
    Ok(if answer? { Probe::ReachedInit } else { Probe::Silent })
}

fn watch(connection: &Connection, domain: &virt::domain::Domain, cancel: &Cancel) -> Result<bool> {
    let what = "cannot read the KVM probe's console";
    let stream = Stream::new(connection.raw(), 0).map_err(|e| failure(what, &e))?;
    domain.open_console(Some("serial0"), &stream, 0).map_err(|e| failure(what, &e))?;
    let (send, receive) = std::sync::mpsc::channel();
    let reader = std::thread::Builder::new().name("console".into()).spawn(move || {
        let mut buffer = vec![0; 4096];
        while let Ok(length) = stream.recv(&mut buffer) {
            let Some(chunk) = usize::try_from(length).ok().filter(|l| *l > 0).and_then(|l| buffer.get(..l)) else {
                break;
            };
            if send.send(chunk.to_vec()).is_err() {
                break;
            }
        }
    });
    if reader.is_err() {
        return Ok(false);
    }
    let deadline = Instant::now() + PROBE_LIMIT;
    let mut output = Vec::new();
    while Instant::now() < deadline {
        cancel.check()?;
        match receive.recv_timeout(Duration::from_millis(100)) {
            Ok(chunk) => output.extend(chunk),
            Err(std::sync::mpsc::RecvTimeoutError::Timeout) => continue,
            Err(std::sync::mpsc::RecvTimeoutError::Disconnected) => break,
        }
        if REACHED_INIT.iter().any(|mark| output.windows(mark.len()).any(|w| w == *mark)) {
            return Ok(true);
        }
    }
    tracing::debug!(console = %String::from_utf8_lossy(&output), "no kernel reached its init under KVM");
    Ok(false)
}

fn probe_xml(template: &Path, kind: DomainType) -> String {
    let template = template.to_string_lossy();
    let cpu = if kind == DomainType::Kvm { "host-model" } else { "maximum" };
    format!(
        "<domain type='{}'><name>blockhost-kvm-probe-{}</name><memory unit='MiB'>512</memory><vcpu>1</vcpu>\
         <os><type arch='x86_64' machine='q35'>hvm</type><boot dev='hd'/></os><features><acpi/><apic/></features>\
         <cpu mode='{cpu}'/><on_poweroff>destroy</on_poweroff><on_reboot>destroy</on_reboot>\
         <on_crash>destroy</on_crash><devices><disk type='file' device='disk'>\
         <driver name='qemu' type='qcow2'/><source file='{}'><seclabel model='dac' relabel='no'/></source>\
         <backingStore/><target dev='vda' bus='virtio'/><readonly/></disk>\
         <controller type='usb' model='none'/><serial type='pty'><alias name='serial0'/></serial>\
         <memballoon model='none'/></devices></domain>",
        kind.as_str(),
        std::process::id(),
        escape(&*template)
    )
}
