//! What the kernel knows of a VM's QEMU process: CPU time from its cgroup, traffic of its interfaces, since when it runs.
//! None of it can hang, whatever the guest or QEMU do.

use std::fs;
use std::path::{Path, PathBuf};

use provisioner_metrics::sample::Run;

/// Clock ticks per second in `/proc`: Linux reports 100 to user space on x86, whatever the kernel's own rate is.
const TICKS: u64 = 100;

const NANOSECONDS_PER_TICK: u64 = 1_000_000_000 / TICKS;

/// Where libvirt says which process a domain has.
const PID_FILES: &str = "/run/libvirt/qemu";

/// Suffixes libvirt puts below a domain's own cgroup for its kinds of threads.
const THREAD_GROUPS: [&str; 3] = ["emulator", "vcpu", "iothread"];

/// What `/proc/<pid>/stat` says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Process {
    /// Which process, and since when.
    pub run: Run,
    /// Whether it has been stopped by a signal or a debugger: then its monitor answers nobody.
    pub frozen: bool,
    /// CPU time in nanoseconds.
    pub cpu: u64,
    /// Resident memory in bytes.
    pub resident: u64,
}

fn parse_stat(pid: u32, text: &str) -> Option<Process> {
    // The command's name is free text in brackets, brackets included. The state is field 3.
    let fields: Vec<&str> = text.get(text.rfind(')')? + 1..)?.split_ascii_whitespace().collect();
    let number = |field: usize| fields.get(field - 3)?.parse::<u64>().ok();
    let state = *fields.first()?;
    if matches!(state, "Z" | "X") {
        return None;
    }
    Some(Process {
        run: Run { pid, start: number(22)?.checked_mul(NANOSECONDS_PER_TICK)? },
        frozen: matches!(state, "T" | "t"),
        cpu: number(14)?.checked_add(number(15)?)?.checked_mul(NANOSECONDS_PER_TICK)?,
        resident: number(24)?.checked_mul(4096)?,
    })
}

impl Process {
    /// Looks at process `pid`.
    #[must_use]
    pub fn of(pid: u32) -> Option<Self> {
        parse_stat(pid, &fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
    }

    /// The process of the running domain `domain`.
    #[must_use]
    pub fn of_domain(domain: &str) -> Option<Self> {
        let pid = fs::read_to_string(format!("{PID_FILES}/{domain}.pid")).ok().and_then(|pid| pid.trim().parse().ok());
        if let Some(pid) = pid.filter(|pid| is_of(*pid, domain)) {
            return Self::of(pid);
        }
        // Another libvirt may keep its PID files elsewhere, or unreadable; its QEMUs still say whom they run.
        let mut pids = fs::read_dir("/proc").ok()?.flatten().filter_map(|e| e.file_name().to_str()?.parse().ok());
        pids.find(|pid| is_of(*pid, domain)).and_then(Self::of)
    }
}

/// Whether the process is the QEMU of `domain`, by libvirt's `-name guest=<domain>,…`.
fn is_of(pid: u32, domain: &str) -> bool {
    let Ok(line) = fs::read(format!("/proc/{pid}/cmdline")) else { return false };
    let mut words = line.split(|b| *b == 0);
    let name = words.by_ref().find(|word| *word == b"-name").and_then(|_| words.next());
    let guest = name.and_then(|name| name.strip_prefix(b"guest=")).map(|name| name.split(|b| *b == b',').next());
    guest == Some(Some(domain.as_bytes()))
}

/// The file with the CPU time of everything in the cgroup of process `pid`'s domain.
#[must_use]
pub fn cpu_file(pid: u32) -> Option<PathBuf> {
    let groups = fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?;
    let mounts = fs::read_to_string("/proc/self/mountinfo").ok()?;
    cpu_files(&groups, &mounts).into_iter().find(|file| file.exists())
}

/// Where it may be: with the controller of cgroup v1, then with v2. Both can be mounted, and only one counts.
fn cpu_files(groups: &str, mounts: &str) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for line in groups.lines() {
        let mut parts = line.splitn(3, ':');
        let (Some(_), Some(controllers), Some(path)) = (parts.next(), parts.next(), parts.next()) else { continue };
        let unified = controllers.is_empty();
        if !unified && !controllers.split(',').any(|c| c == "cpuacct") {
            continue;
        }
        for mount in mounts.lines() {
            let Some((own, fs)) = mount.split_once(" - ") else { continue };
            let (own, fs): (Vec<_>, Vec<_>) = (own.split(' ').collect(), fs.split(' ').collect());
            let (&[_, _, _, root, point, ..], &[kind, _, options, ..]) = (&*own, &*fs) else { continue };
            let right = if unified {
                kind == "cgroup2"
            } else {
                kind == "cgroup" && options.split(',').any(|o| o == "cpuacct")
            };
            // In a container the hierarchy is mounted from a group of its own.
            let below = if root == "/" { Some(path) } else { path.strip_prefix(root) };
            let domain = below.map(whole_domain);
            // A QEMU that libvirt has put into no group of its own shares that of others, whose time is not its.
            let domain = domain.filter(|path| path.rsplit('/').next().is_some_and(|group| group.contains("qemu")));
            if let (true, Some(domain)) = (right, domain) {
                let file = if unified { "cpu.stat" } else { "cpuacct.usage" };
                let group = Path::new(point).join(domain.trim_start_matches('/'));
                // Of v1 first: a v2 hierarchy beside it has no controllers.
                files.insert(if unified { files.len() } else { 0 }, group.join(file));
            }
        }
    }
    files
}

/// The domain's cgroup, given that of one of its threads.
fn whole_domain(path: &str) -> &str {
    let mut path = path.trim_end_matches('/');
    if let Some((above, last)) = path.rsplit_once('/')
        && THREAD_GROUPS.iter().any(|group| last.trim_end_matches(|c: char| c.is_ascii_digit()) == *group)
    {
        path = above;
    }
    // With systemd and v2 libvirt makes one more, as a group with processes may have no children.
    path.strip_suffix("/libvirt").unwrap_or(path)
}

/// Nanoseconds of CPU time from a file that [`cpu_file`] found.
#[must_use]
pub fn cpu_time(file: &Path) -> Option<u64> {
    parse_cpu_time(&fs::read_to_string(file).ok()?)
}

fn parse_cpu_time(text: &str) -> Option<u64> {
    match text.lines().find_map(|line| line.strip_prefix("usage_usec ")) {
        Some(microseconds) => microseconds.trim().parse::<u64>().ok()?.checked_mul(1000),
        None => text.trim().parse().ok(),
    }
}

/// Bytes that the guest behind `taps` has received and sent. What the host sends into a tap is what the guest receives.
#[must_use]
pub fn traffic(taps: &[String]) -> [Option<u64>; 2] {
    if taps.is_empty() {
        return [None, None];
    }
    ["tx_bytes", "rx_bytes"].map(|counter| {
        let mut sum = 0_u64;
        for tap in taps {
            let text = fs::read_to_string(format!("/sys/class/net/{tap}/statistics/{counter}")).ok()?;
            sum = sum.saturating_add(text.trim().parse().ok()?);
        }
        Some(sum)
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn the_fields_of_a_process_are_read_past_any_command_name() {
        let line = "42 (a) T 1) T 1 42 42 0 -1 0 0 0 0 0 150 50 0 0 20 0 1 0 777 9999 10 0";
        let process = parse_stat(42, line).unwrap();
        assert_eq!(process.run, Run { pid: 42, start: 7_770_000_000 });
        assert_eq!((process.frozen, process.cpu, process.resident), (true, 2_000_000_000, 40960));
        assert_eq!(parse_stat(42, &line.replace(") T ", ") Z ")), None);
        assert_eq!(parse_stat(42, "42 (a) S 1"), None);
        assert!(!Process::of(std::process::id()).unwrap().frozen);
    }

    #[test]
    fn the_group_of_the_whole_domain_counts_on_every_kind_of_host() {
        let v1 = "36 32 0:31 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n\
                  40 32 0:35 / /sys/fs/cgroup/unified rw shared:9 - cgroup2 none rw\n";
        let groups = "5:cpu,cpuacct:/machine/qemu-1-web1.libvirt-qemu/emulator\n0::/\n";
        assert_eq!(
            cpu_files(groups, v1),
            [Path::new("/sys/fs/cgroup/cpu,cpuacct/machine/qemu-1-web1.libvirt-qemu/cpuacct.usage")]
        );
        let v2 = "35 24 0:30 / /sys/fs/cgroup rw shared:4 - cgroup2 cgroup2 rw\n";
        let groups = r"0::/machine.slice/machine-qemu\x2d1\x2dweb1.scope/libvirt/emulator";
        assert_eq!(
            cpu_files(groups, v2),
            [Path::new(r"/sys/fs/cgroup/machine.slice/machine-qemu\x2d1\x2dweb1.scope/cpu.stat")]
        );
        // Mounted from a container's own group.
        let inner = "35 24 0:30 /docker/abc /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n";
        assert_eq!(
            cpu_files("0::/docker/abc/machine/qemu-1-a.libvirt-qemu/vcpu12", inner),
            [Path::new("/sys/fs/cgroup/machine/qemu-1-a.libvirt-qemu/cpu.stat")]
        );
    }

    #[test]
    fn both_kinds_of_cpu_time_are_nanoseconds() {
        assert_eq!(parse_cpu_time("123456789\n"), Some(123_456_789));
        assert_eq!(parse_cpu_time("usage_usec 250\nuser_usec 200\n"), Some(250_000));
        assert_eq!(parse_cpu_time("nonsense"), None);
    }

    #[test]
    fn an_interface_that_is_not_there_counts_nothing() {
        assert_eq!(traffic(&["no-such-tap".to_owned()]), [None, None]);
        assert_eq!(traffic(&[]), [None, None]);
        assert!(traffic(&["lo".to_owned()])[0].is_some());
    }
}
