//! A host of its own for each test: configuration, state, pool and a slice of the run's network, on the libvirtd, bridge
//! and templates that `make test` has prepared. Without those a test fails; it never skips.
#![allow(dead_code, clippy::unwrap_used, missing_docs)]

pub mod proxy;

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, Read as _, Write as _};
use std::net::{Ipv4Addr, TcpStream, ToSocketAddrs as _};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Once;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;

pub const WALLET: &str = "0x00000000000000000000000000000000000000aa";

/// Which base image a lab's VMs are made from.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Guest {
    /// Debian 12 with cloud-init: the real thing, up in about 20 s.
    Debian,
    /// Debian's kernel, busybox and the real guest agent: up in about 4 s.
    Small,
    /// An empty disk of 1 GiB: for what happens before a guest has booted, and for what never boots one. Such a VM is
    /// never ready.
    Blank,
}

/// What a command did.
#[derive(Debug)]
pub struct Outcome {
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

impl Outcome {
    #[track_caller]
    pub fn success(self) -> Self {
        assert_eq!(self.code, Some(0), "{self:#?}");
        self
    }

    #[track_caller]
    pub fn fails_with(self, code: i32) -> Self {
        assert_eq!(self.code, Some(code), "{self:#?}");
        assert_eq!(self.stdout, "", "a failure says nothing on stdout: {self:#?}");
        self
    }

    /// A destroy that got somewhere, said so, and then failed for a reason that contains `part`.
    #[track_caller]
    pub fn fails_finishing(self, part: &str) -> Self {
        assert_eq!(self.code, Some(1), "{self:#?}");
        self.says(part)
    }

    /// The last line of stderr, where callers look for the reason.
    #[track_caller]
    pub fn reason(&self) -> &str {
        self.stderr.lines().last().unwrap_or_else(|| panic!("no reason on stderr: {self:#?}"))
    }

    #[track_caller]
    pub fn says(self, part: &str) -> Self {
        assert!(self.reason().contains(part), "{part:?} is not in the last line of stderr: {self:#?}");
        self
    }
}

pub struct Lab {
    pub dir: PathBuf,
    /// Says that its slice of the network is taken, until the process ends.
    _slice: File,
    pub pool: String,
    pub bridge: String,
    pub first: u8,
    pub last: u8,
    pub network: String,
    pub gateway: Ipv4Addr,
    prefix6: String,
    names: String,
}

fn variable(name: &str) -> String {
    std::env::var(name).unwrap_or_else(|_| panic!("{name} is not set: run the tests with `make test`"))
}

/// Each lab has addresses of its own, so that labs running side by side on one bridge do not meet.
static LABS: AtomicU32 = AtomicU32::new(0);
const SLICE: u8 = 14;
const SLICES: u8 = 17;

/// A slice that no other lab of the run has, in this process or another, and the lock that keeps it.
fn slice() -> (u8, File) {
    let directory = PathBuf::from(variable("BLOCKHOST_TEST_DIR")).join("slices");
    fs::create_dir_all(&directory).unwrap();
    let mut taken = None;
    wait_until("a free slice of the network", Duration::from_secs(600), || {
        let first = LABS.load(Ordering::SeqCst) as u8;
        taken = (0..SLICES).map(|i| (first.wrapping_add(i)) % SLICES).find_map(|number| {
            let lock = File::create(directory.join(number.to_string())).unwrap();
            lock.try_lock().is_ok().then_some((number, lock))
        });
        taken.is_some()
    });
    taken.unwrap()
}

/// Held by the tests that measure what busy guests get, in whatever process, so that they do not take it from each other.
pub fn alone() -> File {
    let lock = File::create(PathBuf::from(variable("BLOCKHOST_TEST_DIR")).join("measuring")).unwrap();
    lock.lock().unwrap();
    lock
}

/// How many times slower than usual this machine is, as `tests/run` has measured it; 1 at the least.
pub fn slowness() -> f64 {
    std::env::var("BLOCKHOST_TEST_SLOWNESS")
        .ok()
        .and_then(|text| text.parse().ok())
        .map_or(1.0, |n: f64| n.clamp(1.0, 20.0))
}

/// A limit of time for this machine, from the one for a usual machine. No test rests on how fast something is.
pub fn patience(usual: Duration) -> Duration {
    usual.mul_f64(slowness())
}

/// Where the time of a test goes, in microseconds, for the list of the slowest.
static CREATING: AtomicU64 = AtomicU64::new(0);
static ACTING: AtomicU64 = AtomicU64::new(0);
static WAITING: AtomicU64 = AtomicU64::new(0);

fn timed<T>(phase: &AtomicU64, act: impl FnOnce() -> T) -> T {
    let begin = Instant::now();
    let outcome = act();
    phase.fetch_add(begin.elapsed().as_micros() as u64, Ordering::Relaxed);
    outcome
}

fn phase_of(program: &str) -> &'static AtomicU64 {
    if program == "blockhost-vm-create" { &CREATING } else { &ACTING }
}

/// How long a guest may take here, in seconds: several of them boot at a time.
pub fn ready_limit() -> u64 {
    patience(Duration::from_secs(600)).as_secs()
}

impl Lab {
    pub fn new(guest: Guest) -> Self {
        let number = LABS.fetch_add(1, Ordering::SeqCst);
        let id = format!("{}-{number}", std::process::id());
        let (slice, lock) = slice();
        let dir = PathBuf::from(variable("BLOCKHOST_TEST_DIR")).join(format!("lab-{id}"));
        let first = 10 + slice * SLICE;
        let lab = Self {
            _slice: lock,
            pool: format!("bh-{}-{id}", variable("BLOCKHOST_TEST_ID")),
            bridge: variable("BLOCKHOST_TEST_BRIDGE"),
            network: variable("BLOCKHOST_TEST_NETWORK"),
            gateway: variable("BLOCKHOST_TEST_GATEWAY").parse().unwrap(),
            prefix6: std::env::var("BLOCKHOST_TEST_IPV6_PREFIX").unwrap_or_default(),
            names: format!("t{id}"),
            first,
            last: first + SLICE - 1,
            dir,
        };
        for part in
            ["config", "state/vms", "state/template-packages", "state/metrics", "run", "share/cloud-init/templates"]
        {
            fs::create_dir_all(lab.dir.join(part)).unwrap();
        }
        for part in ["", "state", "state/vms"] {
            fs::set_permissions(lab.dir.join(part), fs::Permissions::from_mode(0o711)).unwrap();
        }
        let template = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/data/cloud-init/nft-auth.yaml");
        fs::copy(template, lab.dir.join("share/cloud-init/templates/nft-auth.yaml")).unwrap();
        let templates = match guest {
            Guest::Small => PathBuf::from(variable("BLOCKHOST_TEST_SMALL_TEMPLATE")).parent().unwrap().to_owned(),
            Guest::Debian => PathBuf::from(variable("BLOCKHOST_STATE_DIR")).join("templates"),
            Guest::Blank => {
                let own = lab.dir.join("templates");
                fs::create_dir_all(&own).unwrap();
                let image = own.join("blockhost-base.qcow2");
                output("qemu-img", &["create", "-q", "-f", "qcow2", image.to_str().unwrap(), "1G"]);
                fs::set_permissions(&image, fs::Permissions::from_mode(0o444)).unwrap();
                own
            }
        };
        std::os::unix::fs::symlink(templates, lab.state().join("templates")).unwrap();
        fs::write(lab.dir.join("config/network-mode"), "broker\n").unwrap();
        lab.configure("");
        if !lab.prefix6.is_empty() {
            let allocation = serde_json::json!({"prefix": lab.prefix6, "dns_zone": "vm.blockhost.test"});
            fs::write(lab.dir.join("config/broker-allocation.json"), allocation.to_string()).unwrap();
        }
        let target = lab.state().join("vms");
        virsh(&["pool-define-as", &lab.pool, "dir", "--target", target.to_str().unwrap()]);
        virsh(&["pool-start", &lab.pool]);
        lab
    }

    /// Writes db.yaml, with `more` lines at its end; a key given there replaces the lab's.
    pub fn configure(&self, more: &str) {
        let defaults = [
            ("db_file", format!("{:?}", self.state().join("vms.json"))),
            ("bridge", self.bridge.clone()),
            ("storage_pool", self.pool.clone()),
            ("storage_path", format!("{:?}", self.state().join("vms"))),
            (
                "ip_pool",
                format!(
                    "{{network: {:?}, start: {}, end: {}, gateway: {}}}",
                    self.network, self.first, self.last, self.gateway
                ),
            ),
            ("ipv6_pool", format!("{{start: {}, end: {}}}", self.first, self.last)),
            ("libvirt", format!("{{domain_type: qemu, guest_ready_timeout_seconds: {}}}", ready_limit())),
        ];
        let mut text = String::new();
        for (key, value) in defaults {
            if !more.lines().any(|line| line.starts_with(&format!("{key}:"))) {
                text += &format!("{key}: {value}\n");
            }
        }
        fs::write(self.dir.join("config/db.yaml"), text + more).unwrap();
    }

    pub fn state(&self) -> PathBuf {
        self.dir.join("state")
    }

    pub fn database(&self) -> PathBuf {
        self.state().join("vms.json")
    }

    /// A VM name no other lab uses: domains are the host's.
    pub fn name(&self, vm: &str) -> String {
        format!("{}-{vm}", self.names)
    }

    /// Whether the run has IPv6, as it has wherever the host has it. A part of a test that is left out without it says so.
    pub fn ipv6(&self) -> bool {
        static TOLD: Once = Once::new();
        if self.prefix6.is_empty() {
            // Past the test harness, which keeps what passing tests print.
            TOLD.call_once(|| drop(writeln!(io::stderr(), "skipped: what needs IPv6: this host has none")));
        }
        !self.prefix6.is_empty()
    }

    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new(binary(program));
        command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .current_dir(self.state())
            .env("BLOCKHOST_CONFIG_DIR", self.dir.join("config"))
            .env("BLOCKHOST_STATE_DIR", self.state())
            .env("BLOCKHOST_RUN_DIR", self.dir.join("run"))
            .env("BLOCKHOST_SHARE_DIR", self.dir.join("share"))
            .env_remove("BLOCKHOST_FAILPOINT")
            .env_remove("RUST_LOG");
        command
    }

    pub fn run(&self, program: &str, arguments: &[&str]) -> Outcome {
        timed(phase_of(program), || finish(self.command(program).args(arguments).spawn().unwrap()))
    }

    pub fn run_at(&self, failpoint: &str, program: &str, arguments: &[&str]) -> Outcome {
        let mut command = self.command(program);
        command.env("BLOCKHOST_FAILPOINT", failpoint).args(arguments);
        timed(phase_of(program), || finish(command.spawn().unwrap()))
    }

    /// The arguments of a create as small as it can be.
    pub fn create_arguments<'a>(&self, vm: &'a str) -> Vec<&'a str> {
        vec![vm, "--owner-wallet", WALLET, "--memory", "192", "--disk", "4", "--apply"]
    }

    pub fn create(&self, vm: &str) -> Outcome {
        self.run("blockhost-vm-create", &self.create_arguments(vm))
    }

    pub fn destroy(&self, vm: &str) -> Outcome {
        self.run("blockhost-vm-destroy", &[vm])
    }

    pub fn status(&self, vm: &str) -> String {
        let outcome = self.run("blockhost-vm-status", &[vm]).success();
        outcome.stdout.trim_end_matches('\n').to_owned()
    }

    pub fn vms(&self) -> Value {
        match fs::read(self.database()) {
            Ok(text) => serde_json::from_slice(&text).unwrap(),
            Err(_) => serde_json::json!({"vms": {}, "allocated_ips": []}),
        }
    }

    pub fn record(&self, vm: &str) -> Value {
        self.vms()["vms"][vm].clone()
    }

    /// The base image of this lab's VMs.
    pub fn base(&self) -> PathBuf {
        fs::canonicalize(self.state().join("templates/blockhost-base.qcow2")).unwrap()
    }

    /// Where a volume of the lab's pool is.
    pub fn volume(&self, name: &str) -> PathBuf {
        self.state().join("vms").join(name)
    }

    /// The `index`th IPv4 address of this lab, counted from 0.
    pub fn address(&self, index: u8) -> String {
        let network: Ipv4Addr = self.network.split('/').next().unwrap().parse().unwrap();
        let [a, b, c, _] = network.octets();
        Ipv4Addr::new(a, b, c, self.first + index).to_string()
    }

    /// Changes the database as another program would, between two commands of ours.
    pub fn edit_database(&self, change: impl FnOnce(&mut Value)) {
        let mut vms = self.vms();
        change(&mut vms);
        fs::write(self.database(), serde_json::to_vec_pretty(&vms).unwrap()).unwrap();
    }

    /// A live record as another program writes it, its address allocated.
    pub fn add_record(&self, vm: &str, address: &str) {
        self.edit_database(|vms| {
            vms["vms"][vm] = serde_json::json!({"vm_name": vm, "vmid": 0, "ip_address": address, "ipv6_address": "",
                "expires_at": "2099-01-01T00:00:00.000000+00:00", "owner": WALLET, "status": "active",
                "created_at": "2026-01-02T03:04:05.000006+00:00", "purpose": "", "wallet_address": WALLET,
                "username": "admin", "network_mode": "broker"});
            vms["allocated_ips"].as_array_mut().unwrap().push(address.into());
        });
    }

    /// What the VMs of the earlier provisioner are overlays of. Not the template, which other tests use too: libvirt gives the
    /// base of such a VM to QEMU's user.
    pub fn legacy_base(&self) -> PathBuf {
        self.dir.join("legacy-base.qcow2")
    }

    /// A VM as the earlier provisioner made them: no metadata, the seed in a directory of its own. It is defined, not
    /// started.
    pub fn add_legacy_vm(&self, vm: &str, address: &str) {
        let disk = self.volume(&format!("{vm}.qcow2"));
        let base = self.legacy_base();
        if !base.exists() {
            output("qemu-img", &["create", "-q", "-f", "qcow2", base.to_str().unwrap(), "1G"]);
        }
        let options = format!("backing_file={},backing_fmt=qcow2", base.display());
        output("qemu-img", &["create", "-q", "-f", "qcow2", "-o", &options, disk.to_str().unwrap()]);
        let seed = self.state().join(format!("cloud-init/{vm}/cidata.iso"));
        fs::create_dir_all(seed.parent().unwrap()).unwrap();
        fs::write(&seed, vec![0; 65536]).unwrap();
        fs::write(seed.with_file_name("user-data"), "#cloud-config\n").unwrap();
        let devices = format!(
            "<disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='{}'/>\
             <target dev='vda' bus='virtio'/></disk>\
             <disk type='file' device='cdrom'><driver name='qemu' type='raw'/><source file='{}'/>\
             <target dev='sda' bus='sata'/><readonly/></disk>",
            disk.display(),
            seed.display()
        );
        self.define(vm, &devices);
        self.add_record(vm, address);
    }

    /// Defines a domain of nobody's, with these devices.
    pub fn define(&self, vm: &str, devices: &str) {
        let xml = self.dir.join(format!("{vm}.xml"));
        let text = format!(
            "<domain type='qemu'><name>{vm}</name><memory unit='MiB'>64</memory>\
             <os><type arch='x86_64' machine='q35'>hvm</type></os><features><acpi/></features>\
             <devices>{devices}</devices></domain>"
        );
        fs::write(&xml, text).unwrap();
        virsh(&["define", xml.to_str().unwrap()]);
    }

    /// Starts a command that stops at `failpoint`, and waits until it is there. [`Parked::go`] lets it go on.
    pub fn park(&self, failpoint: &str, program: &str, arguments: &[&str]) -> Parked {
        self.park_with(failpoint, self.command(program).args(arguments))
    }

    /// The same for a command that was prepared otherwise.
    pub fn park_with(&self, failpoint: &str, command: &mut Command) -> Parked {
        let mut parked = self.set_off(failpoint, command);
        parked.arrive();
        parked
    }

    /// The same without waiting: see [`Parked::arrive`].
    pub fn set_off(&self, failpoint: &str, command: &mut Command) -> Parked {
        static GATES: AtomicU32 = AtomicU32::new(0);
        let gate = self.dir.join(format!("gate-{}", GATES.fetch_add(1, Ordering::SeqCst)));
        let child = command.env("BLOCKHOST_FAILPOINT", format!("{failpoint}=wait:{}", gate.display())).spawn().unwrap();
        Parked { child, gate }
    }

    /// Everything that stands for a VM in this lab, whatever its name. An empty list is the proof that nothing leaked.
    pub fn traces(&self) -> Vec<String> {
        let mut traces = Vec::new();
        for domain in virsh(&["list", "--all", "--name"]).lines().filter(|name| name.starts_with(&self.names)) {
            traces.push(format!("domain {domain}"));
        }
        let mut listing = |what: &str, dir: PathBuf| {
            for entry in fs::read_dir(dir).into_iter().flatten() {
                traces.push(format!("{what} {}", entry.unwrap().file_name().to_string_lossy()));
            }
        };
        listing("volume", self.state().join("vms"));
        listing("journal", self.state().join("journal"));
        // The sample is one for all VMs, and of the whole host; its own files are no trace of a VM, their content may be.
        for entry in fs::read_dir(self.state().join("metrics")).into_iter().flatten() {
            let path = entry.unwrap().path();
            let text = String::from_utf8_lossy(&fs::read(&path).unwrap_or_default()).into_owned();
            let own = path.file_name().unwrap().to_string_lossy().contains(&self.names);
            if own || path.ends_with("samples") && text.contains(&self.names) {
                traces.push(format!("sample {}", path.display()));
            }
        }
        let locks = self.state().join("locks");
        for entry in fs::read_dir(locks).into_iter().flatten() {
            let name = entry.unwrap().file_name().to_string_lossy().into_owned();
            if name.starts_with(&self.names) {
                traces.push(format!("lock {name}"));
            }
        }
        if self.provisioning_lock().exists() {
            traces.push("provisioning.lock".into());
        }
        let vms = self.vms();
        for list in ["allocated_ips", "allocated_ipv6"] {
            for address in vms[list].as_array().into_iter().flatten() {
                traces.push(format!("{list} {address}"));
            }
        }
        for (name, record) in vms["vms"].as_object().into_iter().flatten() {
            if record["status"] != "destroyed" {
                traces.push(format!("record {name}"));
            }
        }
        traces.extend(self.links().into_iter().map(|(kind, address)| format!("{kind} {address}")));
        traces
    }

    /// The routes and permanent neighbour entries that the host has for this lab's addresses: `ip`'s word for it, and the address.
    fn links(&self) -> Vec<(&'static str, String)> {
        let mut links = Vec::new();
        if self.ipv6() {
            let own = self.addresses6();
            for (kind, filter) in [("route", ["metric", "1024"]), ("neigh", ["nud", "permanent"])] {
                let all = output("ip", &["-6", kind, "show", "dev", &self.bridge, filter[0], filter[1]]);
                let addresses = all.lines().filter_map(|line| line.split_whitespace().next());
                links.extend(
                    addresses.filter(|address| own.contains(*address)).map(|address| (kind, address.to_owned())),
                );
            }
        }
        links
    }

    fn addresses6(&self) -> BTreeSet<String> {
        let base: std::net::Ipv6Addr = self.prefix6.split('/').next().unwrap().parse().unwrap();
        (self.first..=self.last)
            .map(|i| std::net::Ipv6Addr::from(u128::from(base) + u128::from(i)).to_string())
            .collect()
    }

    #[track_caller]
    pub fn assert_no_traces(&self, after: &str) {
        assert_eq!(self.traces(), Vec::<String>::new(), "left {after}");
    }

    pub fn provisioning_lock(&self) -> PathBuf {
        self.dir.join("run/provisioning.lock")
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if let Ok(file) = std::env::var("BLOCKHOST_TEST_PHASES") {
            let seconds = |phase: &AtomicU64| phase.load(Ordering::Relaxed) as f64 / 1e6;
            let phases =
                serde_json::json!({"create": seconds(&CREATING), "act": seconds(&ACTING), "wait": seconds(&WAITING)});
            let _ = fs::write(file, phases.to_string());
        }
        for domain in try_virsh(&["list", "--all", "--name"]).unwrap_or_default().lines() {
            if domain.starts_with(&self.names) {
                let _ = try_virsh(&["destroy", domain]);
                let _ = try_virsh(&["undefine", domain, "--managed-save", "--snapshots-metadata", "--nvram"]);
            }
        }
        let _ = try_virsh(&["pool-destroy", &self.pool]);
        let _ = try_virsh(&["pool-undefine", &self.pool]);
        // The next lab with these addresses, in another process, must not find what the VMs of this one have left.
        for (kind, address) in self.links() {
            let _ = Command::new("ip").args(["-6", kind, "del", &address, "dev", &self.bridge]).status();
        }
        if thread::panicking() {
            eprintln!("the lab's files are kept until the end of the run: {}", self.dir.display());
        } else {
            let _ = fs::remove_dir_all(&self.dir);
        }
    }
}

/// A command that waits at a fail point.
pub struct Parked {
    child: Child,
    gate: PathBuf,
}

impl Parked {
    /// Waits until it has come to its fail point.
    pub fn arrive(&mut self) {
        let reached = PathBuf::from(format!("{}.reached", self.gate.display()));
        wait_until("a command to come to its fail point", Duration::from_secs(120), || {
            if !reached.exists() && self.child.try_wait().unwrap().is_some() {
                let mut text = String::new();
                self.child.stderr.take().unwrap().read_to_string(&mut text).unwrap();
                panic!("the command ended before its fail point: {text}");
            }
            reached.exists()
        });
    }

    /// Lets it go on.
    pub fn go(self) -> Child {
        fs::write(&self.gate, "").unwrap();
        self.child
    }

    /// Leaves it where it waits.
    pub fn abandon(self) -> Child {
        self.child
    }
}

#[track_caller]
pub fn wait_until(what: &str, limit: Duration, mut condition: impl FnMut() -> bool) {
    let end = Instant::now() + patience(limit);
    timed(&WAITING, || {
        while !condition() {
            assert!(Instant::now() < end, "waited in vain for {what}");
            thread::sleep(Duration::from_millis(50));
        }
    });
}

pub fn sha256(file: &Path) -> String {
    output("sha256sum", &[file.to_str().unwrap()]).split(' ').next().unwrap().to_owned()
}

/// The QEMU process of a running VM.
pub fn qemu_pid(vm: &str) -> String {
    fs::read_to_string(format!("/run/libvirt/qemu/{vm}.pid")).unwrap().trim().to_owned()
}

/// A filesystem mounted for a test, below its lab. Unmounted when dropped.
pub struct Mount(PathBuf);

impl Mount {
    /// An empty filesystem in memory.
    pub fn tmpfs(at: &Path, options: &str) -> Self {
        fs::create_dir_all(at).unwrap();
        output("mount", &["-t", "tmpfs", "-o", options, "tmpfs", at.to_str().unwrap()]);
        Self(at.to_owned())
    }

    /// The directory itself, which cannot be written any more.
    pub fn read_only(at: &Path) -> Self {
        let path = at.to_str().unwrap();
        output("mount", &["--bind", path, path]);
        let mount = Self(at.to_owned());
        output("mount", &["-o", "remount,bind,ro", path]);
        mount
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("--lazy").arg(&self.0).status();
    }
}

/// The path of a binary of this package, which cargo has built with fail points.
pub fn binary(program: &str) -> PathBuf {
    let mut path = std::env::current_exe().unwrap();
    path.pop();
    if path.ends_with("deps") {
        path.pop();
    }
    path.join(program)
}

pub fn finish(mut child: Child) -> Outcome {
    // Both pipes are read at once: a child that fills one while we wait for the other would wait for ever.
    let mut stderr = child.stderr.take().unwrap();
    let reader = thread::spawn(move || {
        let mut text = Vec::new();
        stderr.read_to_end(&mut text).unwrap();
        text
    });
    let mut stdout = Vec::new();
    child.stdout.take().unwrap().read_to_end(&mut stdout).unwrap();
    let status = child.wait().unwrap();
    Outcome {
        code: status.code(),
        stdout: String::from_utf8(stdout).unwrap(),
        stderr: String::from_utf8(reader.join().unwrap()).unwrap(),
    }
}

pub fn output(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).stdin(Stdio::null()).output().unwrap();
    assert!(
        output.status.success(),
        "{program} {arguments:?}: {}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).unwrap()
}

pub fn try_virsh(arguments: &[&str]) -> Option<String> {
    let output = Command::new("virsh").args(["-q", "-c", "qemu:///system"]).args(arguments).output().unwrap();
    output.status.success().then(|| String::from_utf8(output.stdout).unwrap())
}

#[track_caller]
pub fn virsh(arguments: &[&str]) -> String {
    let mut all = vec!["-q", "-c", "qemu:///system"];
    all.extend(arguments);
    output("virsh", &all)
}

/// The first bytes a server sends, within `limit`.
pub fn greeting(address: &str, port: u16, limit: Duration) -> String {
    let end = Instant::now() + patience(limit);
    let target = (address, port).to_socket_addrs().unwrap().next().unwrap();
    loop {
        if let Ok(mut stream) = TcpStream::connect_timeout(&target, Duration::from_secs(2)) {
            stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
            let mut buffer = [0; 64];
            if let Ok(length) = stream.read(&mut buffer)
                && length > 0
            {
                return String::from_utf8_lossy(&buffer[..length]).into_owned();
            }
        }
        assert!(Instant::now() < end, "no answer on {target}");
        thread::sleep(Duration::from_millis(300));
    }
}

/// Asks the guest agent, as virsh does.
#[track_caller]
pub fn agent(vm: &str, request: &Value) -> Value {
    let ask = || {
        Command::new("virsh")
            .args(["-q", "-c", "qemu:///system", "qemu-agent-command", vm, &request.to_string()])
            .output()
            .unwrap()
    };
    let mut answer = ask();
    for _ in 0..5 {
        // Before the command libvirt asks whether the agent listens, and waits 5 s for that, which a busy host may take. Then
        // the command was not sent.
        if !String::from_utf8_lossy(&answer.stderr).contains("agent not available for now") {
            break;
        }
        answer = ask();
    }
    assert!(answer.status.success(), "{answer:?}");
    serde_json::from_slice::<Value>(&answer.stdout).unwrap()["return"].clone()
}

/// Runs a shell command in the guest and returns its stdout.
pub fn in_guest(vm: &str, script: &str) -> String {
    let started = agent(
        vm,
        &serde_json::json!({"execute": "guest-exec", "arguments":
            {"path": "/bin/sh", "arg": ["-c", script], "capture-output": true}}),
    );
    let end = Instant::now() + patience(Duration::from_secs(300));
    loop {
        let status =
            agent(vm, &serde_json::json!({"execute": "guest-exec-status", "arguments": {"pid": started["pid"]}}));
        if status["exited"] == true {
            let text = status["out-data"].as_str().unwrap_or_default();
            return String::from_utf8(base64_decode(text)).unwrap();
        }
        assert!(Instant::now() < end, "{script:?} does not end in {vm}");
        thread::sleep(Duration::from_millis(200));
    }
}

fn base64_decode(text: &str) -> Vec<u8> {
    let mut child = Command::new("base64").arg("-d").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
    child.wait_with_output().unwrap().stdout
}
