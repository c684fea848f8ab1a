//! The checks. Each looks at one part and changes nothing.

use std::collections::HashSet;
use std::fs;
use std::net::IpAddr;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, SystemTime};

use nix::unistd::{AccessFlags, Group, Uid, User, access};
use serde_json::json;

use super::{Check, Context, Level, Verdict, all, fail, failed, ok, warn};
use crate::access::{self, KVM, READ, Who, barrier, may};
use crate::database::Document;
use crate::database::mending::Entry;
use crate::libvirt::inventory::Version;
use crate::libvirt::{kvm, tuning};
use crate::lock::ProvisioningLock;
use crate::seed::cloud_init;
use crate::settings::{DomainType, Settings};
use crate::{ErrorKind, bridge, child, root_agent, template};

type Outcome = Result<Verdict, Verdict>;

/// All of them, what others depend on first.
pub(super) const ALL: &[(&str, Check)] = &[
    ("settings", settings),
    ("libvirt", libvirt),
    ("emulator", emulator),
    ("kvm", hardware),
    ("kvm-access", kvm_access),
    ("service-user", service_user),
    ("state-directories", state_directories),
    ("database", database),
    ("pool", pool),
    ("pool-space", pool_space),
    ("template", current_template),
    ("qemu-access", qemu_access),
    ("cloud-init-template", cloud_init_template),
    ("bridge", host_bridge),
    ("ipv4-addresses", ipv4_addresses),
    ("ipv6", ipv6),
    ("network-filters", network_filters),
    ("bandwidth-limits", bandwidth_limits),
    ("cpu-limits", cpu_limits),
    ("root-agent", agent),
    ("provisioning-lock", provisioning_lock),
    ("gc-timer", gc_timer),
    ("default-network", default_network),
    ("apparmor", apparmor),
    ("clock", clock),
];

/// The oldest libvirt and QEMU that all of this was seen to work with.
const TESTED: (Version, Version) = (Version(9_000_000), Version(7_002_000));

/// Below this a create is refused; and what makes an operator think of more.
const LEAST_SPACE: u64 = 256 << 20;
const LITTLE_SPACE: u64 = 5 << 30;

/// So few addresses are left that somebody should know.
const FEW_ADDRESSES: usize = 5;

/// A healthy root agent answers within milliseconds, unless it is busy with another's request.
const AGENT_LIMIT: Duration = Duration::from_secs(4);

const SERVICE_USER: &str = "blockhost";
const GC_TIMER: &str = "blockhost-gc.timer";

fn settings(context: &Context) -> Outcome {
    let settings = match &context.settings {
        Ok(settings) => settings,
        Err(error) => return Err(failed(Level::Fail, error, "correct it, or restore it from a backup")),
    };
    let mut verdicts: Vec<_> =
        settings.warnings.iter().map(|warning| warn(warning.as_str(), "correct the file it names")).collect();
    let remedy = "correct the file it names: creating VMs fails until then";
    verdicts.extend(settings.broker.as_ref().err().map(|why| fail(why.as_str(), remedy)));
    verdicts.extend(settings.otp.as_ref().err().map(|why| fail(why.as_str(), remedy)));
    verdicts.extend(settings.network_mode.as_ref().err().map(|why| {
        fail(
            format!("no network mode: {why}"),
            "enable exactly one mode in network-modes.enabled, or write its name to /etc/blockhost/network-mode",
        )
    }));
    let Some(file) = context.dirs.find_config("db.yaml") else {
        verdicts.push(fail(
            "there is no db.yaml: no addresses to give to VMs",
            "run BlockHost's installer, or write /etc/blockhost/db.yaml",
        ));
        return Ok(all(verdicts, ""));
    };
    // It tells where everything is: whoever writes it decides what root does.
    verdicts.extend(writable_by_others(&file));
    Ok(all(verdicts, format!("{} is read", file.display())))
}

fn writable_by_others(path: &Path) -> Option<Verdict> {
    let mode = fs::metadata(path).ok()?.mode();
    let path = path.display();
    (mode & 0o002 != 0).then(|| fail(format!("{path} can be written by everybody"), format!("chmod o-w {path}")))
}

fn libvirt(context: &Context) -> Outcome {
    let connection = match &context.connection {
        Ok(connection) => connection,
        Err(error) => {
            let mut verdict = failed(Level::Fail, error, "systemctl start libvirtd");
            if !context.root && verdict.1.contains("ermission denied") {
                verdict.2 = Some(format!("usermod -aG libvirt {}", user_name()));
            }
            return Err(verdict);
        }
    };
    let (daemon, qemu) = connection.versions().map_err(|e| failed(Level::Fail, &e, "systemctl restart libvirtd"))?;
    let text = format!("libvirt {daemon} with QEMU {qemu} at {}", context.uri);
    Ok(if daemon < TESTED.0 || qemu < TESTED.1 {
        warn(format!("{text} is older than {} with QEMU {}", TESTED.0, TESTED.1), "use Debian 12 or later")
    } else {
        ok(text)
    })
}

fn user_name() -> String {
    let user = Uid::effective();
    User::from_uid(user).ok().flatten().map_or_else(|| user.to_string(), |user| user.name)
}

fn emulator(context: &Context) -> Outcome {
    let connection = context.connection()?;
    for domain_type in ["kvm", "qemu"] {
        let found =
            connection.emulator(domain_type).map_err(|e| failed(Level::Fail, &e, "systemctl restart libvirtd"))?;
        if let Some(found) = found {
            return Ok(ok(format!("{} runs x86-64 guests as {}", found.path.display(), found.machine)));
        }
    }
    Ok(fail("libvirt cannot run x86-64 guests on q35", "apt-get install qemu-system-x86; systemctl restart libvirtd"))
}

fn hardware(context: &Context) -> Outcome {
    let wanted = context.settings.as_ref().map_or(DomainType::Auto, |settings| settings.libvirt.domain_type);
    if wanted == DomainType::Qemu {
        return Ok(ok("emulation is configured, KVM is not used"));
    }
    let level = if wanted == DomainType::Kvm { Level::Fail } else { Level::Warn };
    let slow = |text: String, remedy: &str| Verdict(level, text, Some(remedy.to_owned()));
    if !Path::new(KVM).exists() {
        return Ok(slow(
            "there is no /dev/kvm: VMs run under emulation, many times slower".into(),
            "enable virtualisation in the firmware, then: modprobe -a kvm_intel kvm_amd",
        ));
    }
    if !context.connection()?.offers("kvm").map_err(|e| failed(Level::Fail, &e, "systemctl restart libvirtd"))? {
        return Ok(slow(
            "/dev/kvm is there, and libvirt does not offer KVM".into(),
            "systemctl restart libvirtd; virt-host-validate qemu",
        ));
    }
    let memory = context.dirs.kvm_answer();
    Ok(match kvm::remembered(&memory) {
        Some(true) => ok("a kernel was seen to boot under KVM"),
        Some(false) => slow(
            "KVM is offered, and no kernel boots under it: VMs run under emulation, many times slower".into(),
            &format!(
                "enable nested virtualisation on the machine below; rm {} to have it tried again",
                memory.display()
            ),
        ),
        None => ok("KVM is offered; the first create tries whether a kernel boots under it"),
    })
}

fn kvm_access(context: &Context) -> Outcome {
    if !Path::new(KVM).exists() {
        return Ok(ok(format!("there is no {KVM} to have access to")));
    }
    let barred = access::barred_from_kvm(context.connection()?)
        .map_err(|e| failed(Level::Fail, &e, "systemctl restart libvirtd"))?;
    Ok(match barred {
        Some(user) => fail(
            format!("{KVM} is there, and QEMU's user {user} cannot open it: every question to libvirt takes seconds"),
            access::KVM_REMEDY,
        ),
        None => ok(format!("QEMU's user may open {KVM}")),
    })
}

fn service_user(_: &Context) -> Outcome {
    let user = User::from_name(SERVICE_USER).ok().flatten();
    let Some(user) = user else {
        let remedy = "install blockhost-common, which makes it";
        return Ok(warn(format!("there is no user {SERVICE_USER}, as whom engines run the commands"), remedy));
    };
    let groups = Who::of(&user).gids;
    let member = |group: &Group| groups.contains(&group.gid.as_raw());
    let missing = ["libvirt", "libvirt-qemu"].into_iter().filter(|name| {
        // A group that is not there cannot be what somebody lacks.
        Group::from_name(name).ok().flatten().is_some_and(|group| !member(&group))
    });
    let verdicts = missing.map(|group| {
        fail(format!("{SERVICE_USER} is not in the group {group}"), format!("usermod -aG {group} {SERVICE_USER}"))
    });
    Ok(all(verdicts, format!("{SERVICE_USER} is in the groups libvirt and libvirt-qemu")))
}

fn state_directories(context: &Context) -> Outcome {
    let dirs = &context.dirs;
    let state = &dirs.state;
    let Ok(base) = fs::metadata(state) else {
        let path = state.display();
        let remedy = format!("install -d -o {SERVICE_USER} -g {SERVICE_USER} -m 0755 {path}");
        return Ok(fail(format!("{path} does not exist, or may not be looked at"), remedy));
    };
    let mut verdicts = Vec::new();
    verdicts.extend(writable_by_others(state));
    for dir in [dirs.journal(), dirs.locks(), dirs.metrics()] {
        let Ok(metadata) = fs::metadata(&dir) else { continue };
        verdicts.extend(writable_by_others(&dir));
        if metadata.uid() != base.uid() {
            let path = dir.display();
            verdicts.push(warn(
                format!("{path} belongs to another user than {}", state.display()),
                format!("chown -R --reference={} {path}", state.display()),
            ));
        }
        if access(&dir, AccessFlags::W_OK).is_err() {
            let (path, user) = (dir.display(), user_name());
            verdicts.push(fail(
                format!("{user} cannot write {path}"),
                format!("chown -R --reference={} {path}", state.display()),
            ));
        }
    }
    if access(state, AccessFlags::W_OK).is_err() {
        verdicts.push(fail(
            format!("{} cannot write {}", user_name(), state.display()),
            format!("run the commands as root or {SERVICE_USER}; chown {SERVICE_USER}: {}", state.display()),
        ));
    }
    if !dirs.run.is_dir() {
        let path = dirs.run.display();
        verdicts.push(warn(
            format!("there is no {path}: engines cannot see that a create is in flight"),
            "start BlockHost's root agent, which makes it: systemctl start blockhost-root-agent",
        ));
    }
    Ok(all(verdicts, format!("{} can be written", state.display())))
}

fn database(context: &Context) -> Outcome {
    let settings = context.settings()?;
    let file = &settings.db_file;
    let path = file.display();
    let metadata = match fs::metadata(file) {
        Ok(metadata) => metadata,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound && fs::symlink_metadata(file).is_err() => {
            let there = file.parent().is_some_and(|dir| dir.as_os_str().is_empty() || dir.is_dir());
            return Ok(if there {
                ok(format!("{path} does not exist yet: the first create makes it"))
            } else {
                fail(
                    format!("the directory of {path} does not exist"),
                    "correct db_file in db.yaml, or mount what belongs there",
                )
            });
        }
        Err(e) => {
            return Ok(fail(format!("cannot look at {path}: {e}"), "run it as root, or see the owner of the file"));
        }
    };
    let document = host_document(settings).map_err(|e| failed(Level::Fail, &e, "restore it from a backup"))?;
    let mut verdicts = Vec::new();
    verdicts.extend(writable_by_others(file));
    if let Some(dir) = file.parent().and_then(|dir| fs::metadata(dir).ok())
        && dir.uid() != 0
        && metadata.uid() != dir.uid()
        && metadata.gid() != dir.gid()
    {
        verdicts.push(fail(
            format!("{path} belongs to another user than its directory: the service user may not read it"),
            format!("chown --reference=$(dirname {path}) {path}"),
        ));
    }
    if access(file, AccessFlags::W_OK).is_err() {
        verdicts.push(fail(
            format!("{} cannot write {path}", user_name()),
            format!("chown {SERVICE_USER}:{SERVICE_USER} {path}; chmod 0660 {path}"),
        ));
    }
    let damaged = document.records().filter(|(_, record)| record.is_err()).count();
    if damaged > 0 {
        verdicts.push(fail(format!("{path} has {damaged} damaged records"), "blockhost-provisioner-repair"));
    }
    let vms = document.raw_records().filter(|(_, record)| Document::stands_for_a_vm(record)).count();
    Ok(all(verdicts, format!("{path} is read: {vms} VMs")))
}

fn host_document(settings: &Settings) -> crate::Result<Document> {
    crate::database::Database::new(&settings.db_file).read()
}

fn pool(context: &Context) -> Outcome {
    let (settings, connection) = (context.settings()?, context.connection()?);
    let (name, path) = (&settings.storage_pool, settings.storage_path.display());
    let pool = connection.pool(name).map_err(|error| {
        let define = format!(
            "virsh pool-define-as {name} dir --target {path}; virsh pool-build {name}; virsh pool-start {name}; virsh pool-autostart {name}"
        );
        match error.kind {
            ErrorKind::NotFound => Verdict(Level::Fail, error.parts().0, Some(define)),
            _ => failed(Level::Fail, &error, &define),
        }
    })?;
    let mut verdicts = Vec::new();
    if pool.target() != settings.storage_path {
        verdicts.push(fail(
            format!("storage pool {name:?} is at {}, and db.yaml says {path}", pool.target().display()),
            format!("set storage_path: {} in db.yaml", pool.target().display()),
        ));
    }
    if !pool.autostart().map_err(|e| failed(Level::Fail, &e, "systemctl restart libvirtd"))? {
        verdicts.push(warn(
            format!("storage pool {name:?} is not made available when the host starts: no VM would start with it"),
            format!("virsh pool-autostart {name}"),
        ));
    }
    Ok(all(verdicts, format!("storage pool {name:?} is active at {path}")))
}

fn pool_space(context: &Context) -> Outcome {
    let (settings, connection) = (context.settings()?, context.connection()?);
    let Ok(pool) = connection.pool(&settings.storage_pool) else {
        return Err(warn("not looked at: the storage pool cannot be used", "see pool"));
    };
    let free = pool.available().map_err(|e| failed(Level::Fail, &e, "virsh pool-refresh"))?;
    let remedy = "destroy VMs that are no longer needed, or enlarge its file system";
    let text = format!("{:.1} GiB are free in storage pool {:?}", free as f64 / f64::from(1 << 30), pool.name());
    Ok(if free <= LEAST_SPACE {
        fail(format!("{text}: no VM can be created"), remedy)
    } else if free <= LITTLE_SPACE {
        warn(text, remedy)
    } else {
        ok(text)
    })
}

fn current_template(context: &Context) -> Outcome {
    let current =
        template::current(&context.dirs).map_err(|e| failed(Level::Fail, &e, "sudo blockhost-build-template"))?;
    let path = current.path.display();
    let mut verdicts = Vec::new();
    match fs::metadata(&current.path) {
        Ok(metadata) if metadata.uid() != 0 || metadata.mode() & 0o022 != 0 => verdicts.push(warn(
            format!("{path} can be written by others than root: whoever does changes the disks of all VMs"),
            format!("chown root:root {path}; chmod 0444 {path}"),
        )),
        Ok(_) => {}
        Err(error) => verdicts.push(fail(format!("cannot look at {path}: {error}"), "see who may enter its directory")),
    }
    Ok(all(verdicts, format!("{path} stands alone, {} GiB", current.virtual_size.div_ceil(1 << 30))))
}

fn qemu_access(context: &Context) -> Outcome {
    let (settings, connection) = (context.settings()?, context.connection()?);
    let user = Who::runs_qemu(connection).map_err(|e| failed(Level::Fail, &e, "systemctl restart libvirtd"))?;
    let Some((who, name)) = user else { return Ok(ok("libvirt does not say as whom QEMU runs")) };
    let mut files = vec![settings.storage_path.join("x")];
    files.extend(template::current(&context.dirs).ok().map(|template| template.path));
    let mut verdicts = Vec::new();
    let mut barred = HashSet::new();
    for file in &files {
        if let Some(dir) = barrier(file, &who).filter(|dir| barred.insert(dir.clone())) {
            let dir = dir.display();
            verdicts.push(fail(
                format!("QEMU's user {name} cannot pass through {dir}: VMs do not start"),
                format!("setfacl -m u:{name}:x {dir}"),
            ));
        }
    }
    if let Some(template) = files.get(1)
        && may(template, &who, READ) == Some(false)
    {
        let path = template.display();
        verdicts.push(fail(format!("QEMU's user {name} cannot read {path}"), format!("chmod 0444 {path}")));
    }
    Ok(all(verdicts, format!("QEMU's user {name} reaches pool and template")))
}

fn cloud_init_template(context: &Context) -> Outcome {
    cloud_init::read_template(&cloud_init::template_dirs(&context.dirs))
        .map_err(|e| failed(Level::Fail, &e, "apt-get install --reinstall blockhost-common"))?;
    Ok(ok(format!("{} is there", cloud_init::TEMPLATE)))
}

fn is_up(interface: &str) -> Option<bool> {
    let flags = fs::read_to_string(Path::new(bridge::SYS_CLASS_NET).join(interface).join("flags")).ok()?;
    let flags = u32::from_str_radix(flags.trim().trim_start_matches("0x"), 16).ok()?;
    Some(flags & 1 != 0)
}

fn host_bridge(context: &Context) -> Outcome {
    let settings = context.settings()?;
    let name = &settings.bridge;
    let found = bridge::look_up(name).map_err(|e| failed(Level::Fail, &e, "ip -br link show type bridge"))?;
    if is_up(name) == Some(false) {
        return Ok(fail(
            format!("bridge {name} is down"),
            format!("ip link set {name} up, and see what configures it at boot"),
        ));
    }
    let addresses: Vec<_> = found.ipv4.iter().map(|(address, len)| format!("{address}/{len}")).collect();
    let text = format!(
        "bridge {name} is up with {}",
        if addresses.is_empty() { "no IPv4 address".into() } else { addresses.join(", ") }
    );
    let Some(pool) = &settings.ipv4_pool else { return Ok(ok(text)) };
    let inside = found.address_in(pool.network, pool.prefix_len);
    Ok(match (inside, pool.gateway) {
        (Some(_), _) => ok(text),
        (None, None) => fail(
            format!(
                "{text}, none of them in ip_pool {}/{}, and no gateway is configured: VMs would have no way out",
                pool.network, pool.prefix_len
            ),
            format!(
                "ip addr add ADDRESS/{} dev {name}, or set ip_pool.gateway and ip_pool.network in db.yaml",
                pool.prefix_len
            ),
        ),
        (None, Some(gateway)) => warn(
            format!(
                "{text}, none of them in ip_pool {}/{}: VMs reach nothing unless {gateway} is on that bridge",
                pool.network, pool.prefix_len
            ),
            "see that ip_pool in db.yaml is the network of that bridge",
        ),
    })
}

fn ipv4_addresses(context: &Context) -> Outcome {
    let settings = context.settings()?;
    let pool = settings.require_ipv4_pool().map_err(|e| failed(Level::Fail, &e, "set ip_pool in db.yaml"))?;
    let document = readable(settings)?;
    let used = used_addresses(&document)?;
    let (mut total, mut free) = (0_usize, 0_usize);
    for address in pool.candidates() {
        total += 1;
        free += usize::from(!used.contains(&address.into()));
    }
    let text = format!("{free} of {total} addresses of ip_pool are left");
    let remedy = "destroy VMs that are no longer needed, or widen start and end of ip_pool in db.yaml";
    Ok(match free {
        0 => fail(format!("{text}: no VM can be created"), remedy),
        1..FEW_ADDRESSES => warn(text, remedy),
        _ => ok(text),
    })
}

fn readable(settings: &Settings) -> Result<Document, Verdict> {
    host_document(settings).map_err(|_| warn("not looked at: the database cannot be read", "see database"))
}

/// What a create passes over: what VMs have, and the host itself.
fn used_addresses(document: &Document) -> Result<HashSet<IpAddr>, Verdict> {
    let own = bridge::own_addresses().map_err(|e| failed(Level::Warn, &e, "ip address"))?;
    let listed = document.allocated().into_iter().filter_map(|entry| match entry {
        Entry::Address(address) => Some(address),
        Entry::Other(_) => None,
    });
    let records = document.raw_records().filter(|(_, record)| Document::stands_for_a_vm(record));
    let recorded = records.flat_map(|(_, record)| Document::addresses_of(record).unwrap_or_default());
    Ok(listed.chain(recorded).chain(own).collect())
}

fn ipv6(context: &Context) -> Outcome {
    let settings = context.settings()?;
    let broker = match &settings.broker {
        Ok(broker) => broker,
        Err(_) => return Err(warn("not looked at: broker-allocation.json cannot be read", "see settings")),
    };
    let Some(pool) = &broker.ipv6_pool else { return Ok(ok("no IPv6 prefix is allocated to this host")) };
    let mut verdicts = Vec::new();
    let document = readable(settings)?;
    let used = used_addresses(&document)?;
    if !pool.candidates().any(|address| !used.contains(&address.into())) {
        verdicts.push(fail("no address of the IPv6 prefix is left", "widen start and end of ipv6_pool in db.yaml"));
    }
    let setting = |path: &str| {
        fs::read_to_string(format!("/proc/sys/net/ipv6/conf/{path}")).ok().map(|text| text.trim().to_owned())
    };
    if setting(&format!("{}/disable_ipv6", settings.bridge)).as_deref() == Some("1") {
        let bridge = &settings.bridge;
        verdicts.push(fail(
            format!("IPv6 is disabled on bridge {bridge}"),
            format!("sysctl -w net.ipv6.conf.{bridge}.disable_ipv6=0"),
        ));
    }
    if setting("all/forwarding").as_deref() != Some("1") {
        verdicts.push(warn(
            "the host does not forward IPv6: VMs are not reachable by their IPv6 addresses",
            "echo net.ipv6.conf.all.forwarding=1 > /etc/sysctl.d/50-blockhost.conf; sysctl --system",
        ));
    }
    Ok(all(verdicts, format!("{}/{} is allocated, and IPv6 is forwarded", pool.prefix, pool.prefix_len)))
}

fn network_filters(context: &Context) -> Outcome {
    if let Err(error) = child::require(&[("ebtables", "ebtables"), ("iptables", "iptables"), ("ip6tables", "iptables")])
    {
        return Ok(failed(Level::Fail, &error, "apt-get install ebtables iptables"));
    }
    let filters = context.connection()?.filters().map_err(|e| {
        failed(Level::Fail, &e, "apt-get install libvirt-daemon-config-nwfilter; systemctl restart libvirtd")
    })?;
    let ours = filters.iter().filter(|name| name.starts_with("blockhost-")).count();
    Ok(ok(format!("libvirt's network filters work; {ours} of them are ours")))
}

fn bandwidth_limits(_: &Context) -> Outcome {
    if let Err(error) = child::require(&[("tc", "iproute2")]) {
        return Ok(failed(Level::Warn, &error, "apt-get install iproute2"));
    }
    Ok(if tuning::traffic_control_is_missing() {
        warn(tuning::traffic_control_hint(), "apt-get install linux-image-amd64, and start that kernel")
    } else {
        ok("tc and the kernel's modules for it are there")
    })
}

fn cpu_limits(_: &Context) -> Outcome {
    let mounts = cgroups_rs::hierarchies::mountinfo_self();
    if mounts.iter().any(|mount| mount.super_opts.iter().any(|option| option == "cpu")) {
        return Ok(ok("the CPU controller is one of cgroup version 1"));
    }
    let Some(unified) = mounts.iter().find(|mount| mount.fs_type.0 == "cgroup2") else {
        return Ok(warn(
            "no control groups are mounted: VMs cannot be throttled",
            "mount -t cgroup2 none /sys/fs/cgroup",
        ));
    };
    let controllers = fs::read_to_string(unified.mount_point.join("cgroup.controllers")).unwrap_or_default();
    Ok(if controllers.split_whitespace().any(|controller| controller == "cpu") {
        ok("cgroup version 2 with the CPU controller")
    } else {
        warn(
            "cgroup version 2 lacks the CPU controller: blockhost-vm-throttle cannot limit CPUs",
            "end processes with real-time scheduling outside the root group, then: echo +cpu > /sys/fs/cgroup/cgroup.subtree_control",
        )
    })
}

fn agent(context: &Context) -> Outcome {
    let socket = context.dirs.run.join("root-agent.sock");
    let prefix = context.settings.as_ref().ok().and_then(|settings| settings.broker.as_ref().ok());
    let needed = prefix.is_some_and(|broker| broker.ipv6_pool.is_some());
    // Root sets the routes itself.
    let level = if needed && !context.root { Level::Fail } else { Level::Warn };
    let remedy = "systemctl restart blockhost-root-agent";
    if !socket.exists() {
        let text = format!("there is no {}: without root, no host route to a VM can be set", socket.display());
        return Ok(match (needed, level) {
            (false, _) => ok("the root agent does not run; without an IPv6 prefix it is not needed"),
            (true, level) => Verdict(level, text, Some(remedy.to_owned())),
        });
    }
    // No action of that name: its refusal shows that it answers, and nothing is done.
    match root_agent::request(&socket, "ping", json!({}), AGENT_LIMIT) {
        Ok(_) => Ok(ok("the root agent answers")),
        Err(error) if error.kind == ErrorKind::Io => Ok(ok("the root agent answers")),
        Err(error) => {
            let mut verdict = failed(level, &error, remedy);
            verdict.2 = Some(remedy.to_owned());
            Ok(verdict)
        }
    }
}

fn provisioning_lock(context: &Context) -> Outcome {
    let path = context.dirs.run.join("provisioning.lock");
    Ok(match ProvisioningLock::look(&context.dirs) {
        None => ok("no create is in flight"),
        Some(true) => ok("a create is in flight"),
        Some(false) => warn(
            format!("{} says that a create is in flight, and none is: engines wait for it", path.display()),
            "blockhost-provisioner-repair --apply",
        ),
    })
}

fn gc_timer(_: &Context) -> Outcome {
    if !Path::new("/run/systemd/system").is_dir() {
        return Ok(warn(
            "systemd does not run here: nothing collects expired VMs",
            "run blockhost-vm-gc --execute once a day",
        ));
    }
    let enabled = ["/etc/systemd/system", "/run/systemd/system", "/usr/lib/systemd/system"]
        .iter()
        .any(|dir| fs::symlink_metadata(Path::new(dir).join("timers.target.wants").join(GC_TIMER)).is_ok());
    Ok(if enabled {
        ok(format!("{GC_TIMER} is enabled"))
    } else {
        warn(
            format!("{GC_TIMER} is not enabled: expired VMs run on for free"),
            format!("systemctl enable --now {GC_TIMER}"),
        )
    })
}

fn default_network(context: &Context) -> Outcome {
    const BRIDGE: &str = "virbr0";
    let wanted = context.settings.as_ref().is_ok_and(|settings| settings.bridge == BRIDGE);
    Ok(match is_up(BRIDGE) {
        Some(true) if wanted => ok(format!("{BRIDGE} is the bridge of the VMs")),
        Some(true) => warn(
            format!("libvirt's default network is up: its {BRIDGE} may be taken for the bridge of the VMs"),
            "virsh net-destroy default; virsh net-autostart --disable default",
        ),
        _ => ok("libvirt's default network is off"),
    })
}

fn apparmor(context: &Context) -> Outcome {
    let enabled = fs::read_to_string("/sys/module/apparmor/parameters/enabled").is_ok_and(|text| text.trim() == "Y");
    if !enabled {
        return Ok(warn(
            "AppArmor is off: a QEMU that its guest has taken over is confined by its user alone",
            "apt-get install apparmor; start the kernel with apparmor=1",
        ));
    }
    let (_, models) =
        context.connection()?.security().map_err(|e| failed(Level::Warn, &e, "systemctl restart libvirtd"))?;
    Ok(if models.iter().any(|model| model == "apparmor") {
        ok("AppArmor confines each QEMU")
    } else {
        warn(
            "AppArmor is on, and libvirt does not use it",
            "remove security_driver from /etc/libvirt/qemu.conf; systemctl restart libvirtd",
        )
    })
}

/// Expiry is a matter of the clock: one that is ahead suspends what is paid for.
fn clock(context: &Context) -> Outcome {
    /// This program did not exist before: 2026-01-01.
    const EARLIEST: Duration = Duration::from_secs(1_767_225_600);
    let now = SystemTime::now();
    let remedy = "timedatectl set-ntp true";
    if now.duration_since(SystemTime::UNIX_EPOCH).is_ok_and(|time| time < EARLIEST) {
        return Ok(fail("the clock is years behind: nothing would ever expire", remedy));
    }
    // What was written in the future was written before the clock was set back.
    let written =
        context.settings.as_ref().ok().and_then(|settings| fs::metadata(&settings.db_file).ok()?.modified().ok());
    if written.is_some_and(|written| written > now + Duration::from_secs(60)) {
        return Ok(warn("the VM database was written later than the clock says it is now", remedy));
    }
    let managed = Path::new("/run/systemd/timesync").is_dir();
    Ok(if managed && !Path::new("/run/systemd/timesync/synchronized").exists() {
        warn("the clock is not synchronised", remedy)
    } else {
        ok("the clock is not off by what can be seen here")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique() {
        let names: HashSet<_> = ALL.iter().map(|(name, _)| name).collect();
        assert_eq!(names.len(), ALL.len());
    }
}
