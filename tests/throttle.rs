//! `blockhost-vm-throttle`: what it reports, keeps and resets, and what a limit does to a busy guest.
#![allow(clippy::unwrap_used, missing_docs)]

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use common::{Guest, Lab, alone, finish, in_guest, output, patience, qemu_pid, virsh};
use serde_json::{Value, json};

const UNLIMITED: &str = "cpu-shares: 1024\ncpu-quota: unlimited\niops-read: unlimited\niops-write: unlimited\n\
    bandwidth-in: unlimited\nbandwidth-out: unlimited\n";

fn throttle(lab: &Lab, vm: &str, options: &[&str]) -> common::Outcome {
    let mut all = vec![vm];
    all.extend(options);
    lab.run("blockhost-vm-throttle", &all)
}

#[track_caller]
fn in_force(lab: &Lab, vm: &str) -> Value {
    serde_json::from_str(&throttle(lab, vm, &["--format", "json"]).success().stdout).unwrap()
}

/// What libvirt itself says, by name.
#[track_caller]
fn libvirt(question: &[&str]) -> BTreeMap<String, i64> {
    let number = |line: &str| {
        let (name, value) = line.split_once(':')?;
        Some((name.trim().to_owned(), value.trim().parse().ok()?))
    };
    virsh(question).lines().filter_map(number).collect()
}

fn tap(vm: &str) -> String {
    virsh(&["domiflist", vm]).split_whitespace().next().unwrap().to_owned()
}

/// What libvirt keeps of the VM, without what limits nothing: a share of the CPU that was once written down stays so, as the host's
/// default, and a bandwidth as an empty element.
fn definition(vm: &str) -> String {
    let default = format!("  <cputune>\n    <shares>{}</shares>\n  </cputune>\n", weight(1024));
    let empty = "      <bandwidth>\n      </bandwidth>\n";
    virsh(&["dumpxml", "--inactive", vm]).replace(&default, "").replace(empty, "")
}

/// The queues of the VM's interface, without their numbers, which are new each time.
fn queues(vm: &str) -> Vec<String> {
    let kinds =
        |line: &str| line.split(' ').enumerate().filter(|(i, _)| *i != 2).map(|(_, word)| word.to_owned()).collect();
    output("tc", &["qdisc", "show", "dev", &tap(vm)]).lines().map(kinds).map(|words: Vec<_>| words.join(" ")).collect()
}

fn create_with(lab: &Lab, vm: &str, options: &[&str]) {
    let mut all = lab.create_arguments(vm);
    all.extend(options);
    lab.run("blockhost-vm-create", &all).success();
}

/// The share libvirt is given: the host's control groups have one of two scales.
fn weight(shares: i64) -> i64 {
    let mounts = fs::read_to_string("/proc/mounts").unwrap();
    let v1 = mounts.lines().any(|line| {
        let fields: Vec<_> = line.split(' ').collect();
        fields[2] == "cgroup" && fields[3].split(',').any(|option| option == "cpu")
    });
    if v1 { shares } else { shares * 100 / 1024 }
}

#[test]
fn limits_add_up_and_a_reset_leaves_no_trace_of_them() {
    let lab = Lab::new(Guest::Small);
    let vm = lab.name("add");
    create_with(&lab, &vm, &["--cpu", "2"]);
    let state = || {
        (
            definition(&vm),
            virsh(&["schedinfo", &vm]),
            virsh(&["blkdeviotune", &vm, "vda"]),
            virsh(&["domiftune", &vm, &tap(&vm)]),
            queues(&vm),
        )
    };
    let never_throttled = state();
    assert_eq!(throttle(&lab, &vm, &[]).success().stdout, UNLIMITED);
    assert_eq!(throttle(&lab, &vm, &["--reset"]).success().stdout, UNLIMITED);
    assert_eq!(state(), never_throttled);

    // All are checked before the first is applied.
    for wrong in [
        ["--cpu-shares", "0"],
        ["--cpu-shares", "10001"],
        ["--cpu-quota", "0"],
        ["--cpu-quota", "101"],
        ["--cpu-quota", "50%"],
        ["--bandwidth-in", "-1"],
        ["--bandwidth-out", "400000001"],
        ["--iops-read", "1.5"],
        ["--iops-write", "100000001"],
    ] {
        let good = if wrong[0] == "--cpu-quota" { ["--cpu-shares", "7"] } else { ["--cpu-quota", "7"] };
        throttle(&lab, &vm, &[good, wrong].concat()).fails_with(2);
    }
    assert_eq!(state(), never_throttled);

    // Each keeps what the others have set, in the running domain and in its definition.
    assert_eq!(throttle(&lab, &vm, &["--cpu-shares", "512"]).success().stdout, "cpu-shares: 512\n");
    assert_eq!(throttle(&lab, &vm, &["--cpu-quota", "50"]).success().stdout, "cpu-quota: 50 %\n");
    assert_eq!(throttle(&lab, &vm, &["--iops-read", "300"]).success().stdout, "iops-read: 300\n");
    assert_eq!(
        throttle(&lab, &vm, &["--iops-write", "200", "--cpu-shares", "256"]).success().stdout,
        "cpu-shares: 256\niops-write: 200\n"
    );
    let expected = json!({"cpu_shares": 256, "cpu_quota_percent": 50, "bandwidth_in_kbps": 0, "bandwidth_out_kbps": 0,
        "iops_read": 300, "iops_write": 200});
    assert_eq!(in_force(&lab, &vm), expected);
    for place in ["--live", "--config"] {
        let cpu = libvirt(&["schedinfo", &vm, place]);
        assert_eq!(cpu["cpu_shares"], weight(256), "{place}");
        // Half of two vCPUs is one CPU.
        assert_eq!(cpu["global_quota"], cpu["global_period"], "{place}");
        let disk = libvirt(&["blkdeviotune", &vm, "vda", place]);
        assert_eq!((disk["read_iops_sec"], disk["write_iops_sec"]), (300, 200), "{place}");
    }
    assert_eq!(throttle(&lab, &vm, &["--iops-read", "0"]).success().stdout, "iops-read: unlimited\n");
    assert_eq!(in_force(&lab, &vm)["iops_write"], 200);

    // Commands at the same time do not undo each other.
    let options = [["--iops-read", "11"], ["--iops-write", "22"], ["--cpu-quota", "33"], ["--cpu-shares", "1024"]];
    let children: Vec<_> = options
        .iter()
        .map(|option| lab.command("blockhost-vm-throttle").arg(&vm).args(option).spawn().unwrap())
        .collect();
    children.into_iter().for_each(|child| drop(finish(child).success()));
    let expected = json!({"cpu_shares": 1024, "cpu_quota_percent": 33, "bandwidth_in_kbps": 0, "bandwidth_out_kbps": 0,
        "iops_read": 11, "iops_write": 22});
    assert_eq!(in_force(&lab, &vm), expected);

    // One of several that fails: stock kernels have what bandwidth needs, others lack some of it.
    let both = throttle(&lab, &vm, &["--cpu-quota", "44", "--bandwidth-in", "1", "--bandwidth-out", "8001"]);
    if both.code == Some(0) {
        assert_eq!(both.stdout, "cpu-quota: 44 %\nbandwidth-in: 8 kbps\nbandwidth-out: 8008 kbps\n");
    } else {
        let both = both.fails_with(1);
        for part in ["set and in force: cpu-quota: 44 %;", "not set: bandwidth-in, bandwidth-out", "tc ", "act_police"]
        {
            assert!(both.reason().contains(part), "{part:?}: {both:#?}");
        }
        // Nothing half-made is left to throttle the guest.
        assert_eq!(queues(&vm), never_throttled.4);
    }
    assert_eq!(in_force(&lab, &vm)["cpu_quota_percent"], 44);

    // What another tool has set goes too, and does not hold against a new limit.
    virsh(&["schedinfo", &vm, "--live", "--config", "vcpu_quota=20000", "emulator_quota=10000"]);
    virsh(&[
        "blkdeviotune",
        &vm,
        "vda",
        "--live",
        "--config",
        "--total-iops-sec",
        "99",
        "--total-bytes-sec",
        "1000000",
    ]);
    let now = in_force(&lab, &vm);
    assert_eq!((&now["cpu_quota_percent"], &now["iops_read"]), (&json!(20), &json!(99)));
    throttle(&lab, &vm, &["--cpu-quota", "90", "--iops-read", "40"]).success();
    let now = in_force(&lab, &vm);
    assert_eq!(
        (&now["cpu_quota_percent"], &now["iops_read"], &now["iops_write"]),
        (&json!(90), &json!(40), &json!(99))
    );

    // A reset does not swallow the other options, and by itself leaves nothing.
    let reset = throttle(&lab, &vm, &["--reset", "--cpu-quota", "70"]).success();
    assert_eq!(reset.stdout, UNLIMITED.replace("cpu-quota: unlimited", "cpu-quota: 70 %"));
    assert_eq!(throttle(&lab, &vm, &["--reset"]).success().stdout, UNLIMITED);
    assert_eq!(state(), never_throttled);

    lab.destroy(&vm).success();
    lab.assert_no_traces("after a throttled VM's destroy");
}

#[test]
fn limits_survive_stop_and_start_and_can_be_set_while_a_vm_is_off() {
    let lab = Lab::new(Guest::Small);
    let vm = lab.name("off");
    lab.create(&vm).success();
    let plain = definition(&vm);
    throttle(&lab, &vm, &["--cpu-quota", "40", "--iops-write", "70"]).success();
    lab.run("blockhost-vm-stop", &[&vm]).success();
    let expected = json!({"cpu_shares": 1024, "cpu_quota_percent": 40, "bandwidth_in_kbps": 0, "bandwidth_out_kbps": 0,
        "iops_read": 0, "iops_write": 70});
    assert_eq!(in_force(&lab, &vm), expected);
    assert_eq!(
        throttle(&lab, &vm, &["--cpu-shares", "2048", "--iops-read", "60"]).success().stdout,
        "cpu-shares: 2048\niops-read: 60\n"
    );
    lab.run("blockhost-vm-start", &[&vm]).success();
    let cpu = libvirt(&["schedinfo", &vm, "--live"]);
    assert_eq!((cpu["cpu_shares"], cpu["global_quota"], cpu["global_period"]), (weight(2048), 40_000, 100_000));
    let disk = libvirt(&["blkdeviotune", &vm, "vda", "--live"]);
    assert_eq!((disk["read_iops_sec"], disk["write_iops_sec"]), (60, 70));

    // A paused one is throttled like a running one.
    virsh(&["suspend", &vm]);
    throttle(&lab, &vm, &["--cpu-quota", "41", "--iops-write", "71"]).success();
    assert_eq!(libvirt(&["schedinfo", &vm, "--live"])["global_quota"], 41_000);
    assert_eq!(libvirt(&["blkdeviotune", &vm, "vda", "--live"])["write_iops_sec"], 71);
    virsh(&["resume", &vm]);

    // A QEMU that does not answer: what the kernel limits is limited, and the rest is given up in a bounded time.
    let pid = qemu_pid(&vm);
    output("kill", &["-STOP", &pid]);
    let begun = Instant::now();
    let frozen = throttle(&lab, &vm, &["--cpu-quota", "42", "--iops-write", "72"]);
    let took = begun.elapsed();
    output("kill", &["-CONT", &pid]);
    let frozen = frozen.fails_with(1);
    for part in ["set and in force: cpu-quota;", "not set: iops-write", "no answer within"] {
        assert!(frozen.reason().contains(part), "{part:?}: {frozen:#?}");
    }
    assert!(took < patience(Duration::from_secs(60)), "it took {took:?}");
    assert_eq!(libvirt(&["schedinfo", &vm, "--live"])["global_quota"], 42_000);
    throttle(&lab, &vm, &["--iops-write", "73"]).success();
    assert_eq!(libvirt(&["blkdeviotune", &vm, "vda", "--live"])["write_iops_sec"], 73);
    // A reset that comes to the disk then tells what it has taken away before.
    output("kill", &["-STOP", &pid]);
    let halfway = throttle(&lab, &vm, &["--reset", "--cpu-quota", "42"]);
    output("kill", &["-CONT", &pid]);
    let halfway = halfway.fails_with(1);
    for part in ["set and in force: cpu-shares;", "not set: cpu-quota, iops-read", "no answer within"] {
        assert!(halfway.reason().contains(part), "{part:?}: {halfway:#?}");
    }
    lab.run("blockhost-vm-kill", &[&vm]).success();

    // The smallest bandwidth is neither unlimited nor nothing, in is in, and out can take a whole frame.
    let off = throttle(&lab, &vm, &["--bandwidth-in", "1"]).success();
    assert_eq!(off.stdout, "bandwidth-in: 8 kbps\n");
    throttle(&lab, &vm, &["--bandwidth-out", "16000"]).success();
    let bandwidth = libvirt(&["domiftune", &vm, &mac(&vm), "--config"]);
    assert_eq!((bandwidth["inbound.average"], bandwidth["inbound.burst"]), (1, 0));
    assert_eq!((bandwidth["outbound.average"], bandwidth["outbound.burst"]), (2000, 196));
    throttle(&lab, &vm, &["--bandwidth-in", "0"]).success();
    assert_eq!(in_force(&lab, &vm)["bandwidth_out_kbps"], 16_000);

    assert_eq!(throttle(&lab, &vm, &["--reset"]).success().stdout, UNLIMITED);
    assert_eq!(definition(&vm), plain);
    lab.run("blockhost-vm-start", &[&vm]).success();
    assert_eq!(throttle(&lab, &vm, &[]).success().stdout, UNLIMITED);

    lab.destroy(&vm).success();
    for options in [&["--cpu-quota", "50"][..], &["--reset"], &[]] {
        throttle(&lab, &vm, options).fails_with(1).says(&vm);
    }
}

fn mac(vm: &str) -> String {
    virsh(&["domiflist", vm]).split_whitespace().last().unwrap().to_owned()
}

#[test]
fn a_reset_returns_to_what_the_vm_was_created_with() {
    let lab = Lab::new(Guest::Small);
    let vm = lab.name("born");
    let mut wrong = lab.create_arguments(&vm);
    wrong.extend(["--cpu-quota", "101"]);
    lab.run("blockhost-vm-create", &wrong).fails_with(2);
    create_with(&lab, &vm, &["--cpu-shares", "300", "--iops-write", "77"]);
    let created = UNLIMITED.replace("1024", "300").replace("iops-write: unlimited", "iops-write: 77");
    assert_eq!(throttle(&lab, &vm, &[]).success().stdout, created.replace("300", &shares_in_force(300).to_string()));
    let definition = virsh(&["dumpxml", "--inactive", &vm]);
    assert_eq!(libvirt(&["schedinfo", &vm, "--live"])["cpu_shares"], weight(300));

    throttle(&lab, &vm, &["--cpu-shares", "1024", "--iops-write", "0", "--iops-read", "5", "--cpu-quota", "9"])
        .success();
    throttle(&lab, &vm, &["--reset", "--iops-read", "6"]).success();
    let now = in_force(&lab, &vm);
    assert_eq!(
        (&now["iops_read"], &now["iops_write"], &now["cpu_quota_percent"]),
        (&json!(6), &json!(77), &Value::Null)
    );
    throttle(&lab, &vm, &["--reset"]).success();
    assert_eq!(virsh(&["dumpxml", "--inactive", &vm]), definition);
    assert_eq!(libvirt(&["blkdeviotune", &vm, "vda", "--live"])["write_iops_sec"], 77);
    assert_eq!(libvirt(&["schedinfo", &vm, "--live"])["cpu_shares"], weight(300));
}

#[test]
fn a_bandwidth_the_host_cannot_limit_fails_the_create_and_says_what_is_missing() {
    let lab = Lab::new(Guest::Small);
    let vm = lab.name("born");
    let mut options = lab.create_arguments(&vm);
    options.extend(["--bandwidth-out", "8000"]);
    let outcome = lab.run("blockhost-vm-create", &options);
    if outcome.code == Some(0) {
        assert_eq!(in_force(&lab, &vm)["bandwidth_out_kbps"], 8000);
        lab.destroy(&vm).success();
    } else {
        let outcome = outcome.fails_with(1);
        for part in ["cannot start", "tc ", "act_police"] {
            assert!(outcome.reason().contains(part), "{part:?}: {outcome:#?}");
        }
    }
    lab.assert_no_traces("after a create with a bandwidth");
}

/// The share that a request becomes on the host's scale.
fn shares_in_force(shares: i64) -> i64 {
    if weight(1024) == 1024 { shares } else { (weight(shares) * 1024 + 50) / 100 }
}

#[test]
fn a_domain_that_is_not_ours_is_neither_shown_nor_throttled() {
    let lab = Lab::new(Guest::Small);
    let vm = lab.name("foreign");
    lab.define(&vm, "");
    let before = virsh(&["dumpxml", &vm]);
    for options in [&["--cpu-shares", "5"][..], &["--reset"], &[]] {
        throttle(&lab, &vm, options).fails_with(1).says("not BlockHost's");
    }
    assert_eq!(virsh(&["dumpxml", &vm]), before);
}

/// CPU seconds for which the host's CPUs had nothing to do.
fn idle_seconds() -> f64 {
    let stat = fs::read_to_string("/proc/stat").unwrap();
    stat.split_whitespace().nth(4).unwrap().parse::<f64>().unwrap() / 100.0
}

/// How often the kernel has held the VM back because its quota was used up.
fn times_throttled(vm: &str) -> u64 {
    let pid = fs::read_to_string(format!("/run/libvirt/qemu/{vm}.pid")).unwrap();
    let groups = fs::read_to_string(format!("/proc/{}/cgroup", pid.trim())).unwrap();
    let mut total = 0;
    for line in groups.lines() {
        let (controllers, path) = line.split_once(':').unwrap().1.split_once(':').unwrap();
        let root = if controllers.is_empty() { "" } else { controllers };
        let group = Path::new("/sys/fs/cgroup").join(root).join(path.trim_start_matches('/'));
        for ancestor in group.ancestors() {
            let stat = fs::read_to_string(ancestor.join("cpu.stat")).unwrap_or_default();
            let count = stat.lines().find_map(|line| line.strip_prefix("nr_throttled "));
            total += count.map_or(0, |count| count.parse().unwrap());
        }
    }
    total
}

/// CPU seconds that all threads of the VM's QEMU have used.
fn cpu_seconds(vm: &str) -> f64 {
    let pid = fs::read_to_string(format!("/run/libvirt/qemu/{vm}.pid")).unwrap();
    let stat = fs::read_to_string(format!("/proc/{}/stat", pid.trim())).unwrap();
    let fields: Vec<_> = stat.rsplit_once(')').unwrap().1.split_whitespace().collect();
    let ticks: f64 = fields[11].parse::<f64>().unwrap() + fields[12].parse::<f64>().unwrap();
    ticks / 100.0
}

/// CPUs that each VM uses, on average over five seconds.
fn usage<const N: usize>(vms: [&str; N]) -> [f64; N] {
    let (begin, before) = (Instant::now(), vms.map(cpu_seconds));
    thread::sleep(Duration::from_secs(5));
    let (after, elapsed) = (vms.map(cpu_seconds), begin.elapsed().as_secs_f64());
    std::array::from_fn(|i| (after[i] - before[i]) / elapsed)
}

fn keep_busy(vm: &str, loops: u32) {
    for _ in 0..loops {
        in_guest(vm, "(while :; do :; done) < /dev/null > /dev/null 2>&1 &");
    }
}

#[test]
fn a_quota_caps_a_busy_guest_at_its_share_of_all_vcpus() {
    let _alone = alone();
    let lab = Lab::new(Guest::Small);
    for (vcpus, cap) in [(1, 0.5), (2, 1.0)] {
        let vm = lab.name(&format!("quota{vcpus}"));
        create_with(&lab, &vm, &["--cpu", &vcpus.to_string()]);
        keep_busy(&vm, vcpus);
        throttle(&lab, &vm, &["--cpu-quota", "50"]).success();
        // Nothing may let it get above its cap. What else runs on the machine may keep it below: then there was no idle
        // CPU, and yet the kernel has held it back now and then.
        let (mut best, mut idle, mut above): (f64, f64, u32) = (0.0, 0.0, 0);
        let throttled = times_throttled(&vm);
        for _ in 0..6 {
            let idle_before = idle_seconds();
            let [used] = usage([&vm]);
            idle = idle.max(idle_seconds() - idle_before);
            eprintln!("{vcpus} vCPU at 50 %: {used:.3} CPU, cap {cap}");
            // What the machine's own host took from a running vCPU counts as used, and is paid back in the next period.
            above = if used > cap * 1.1 { above + 1 } else { 0 };
            assert!(above < 2, "{vcpus} vCPUs use {used} CPUs at a cap of {cap}");
            best = best.max(used);
            if best >= cap * 0.9 && above == 0 {
                break;
            }
        }
        assert!(best >= cap * 0.9 || idle < 0.5, "{vcpus} busy vCPUs use only {best} of {cap} CPUs");
        assert!(times_throttled(&vm) > throttled, "the kernel never held it back");
        // Without it, it takes more: the cap was the throttle's and not the machine's.
        if vcpus == 1 {
            throttle(&lab, &vm, &["--reset"]).success();
            let throttled = times_throttled(&vm);
            let best = (0..6).map(|_| usage([&vm])[0]).find(|used| *used > cap * 1.2);
            assert!(best.is_some() || idle < 0.5, "after the reset the guest is still at its cap");
            assert_eq!(times_throttled(&vm), throttled);
        }
        lab.destroy(&vm).success();
    }
}

#[test]
fn shares_divide_a_contended_cpu() {
    let _alone = alone();
    let lab = Lab::new(Guest::Small);
    let (large, small) = (lab.name("large"), lab.name("small"));
    lab.create(&large).success();
    lab.create(&small).success();
    for (vm, shares) in [(&large, "1024"), (&small, "256")] {
        throttle(&lab, vm, &["--cpu-shares", shares]).success();
        virsh(&["vcpupin", vm, "0", "0"]);
        virsh(&["emulatorpin", vm, "0"]);
        keep_busy(vm, 1);
    }
    let mut ratios = Vec::new();
    while ratios.len() < 3 {
        let [a, b] = usage([&large, &small]);
        ratios.push(a / b);
        eprintln!("shares 1024 and 256: {a:.3} and {b:.3} CPU, {:.2} : 1", a / b);
        if (3.2..=4.8).contains(&(a / b)) {
            return;
        }
    }
    panic!("the ratios were {ratios:?}");
}

#[test]
fn iops_limits_hold_in_the_guest() {
    let _alone = alone();
    let lab = Lab::new(Guest::Small);
    let vm = lab.name("iops");
    lab.create(&vm).success();
    // Past everything that is on the disk, around the guest's cache.
    let read = "dd if=/dev/vda of=/dev/null bs=4k iflag=direct skip=300000";
    let write = "dd if=/dev/zero of=/dev/vda bs=4k oflag=direct seek=300000";
    let rate = |command: &str, count: u32| {
        let script = format!(
            "cut -d' ' -f1 /proc/uptime; {command} count={count} 2> /tmp/dd || cat /tmp/dd; cut -d' ' -f1 /proc/uptime"
        );
        let text = in_guest(&vm, &script);
        let times: Vec<f64> = text.lines().map(|line| line.parse().unwrap_or_else(|_| panic!("{text}"))).collect();
        f64::from(count) / (times[1] - times[0])
    };
    // A guest on a slow machine may not come to the limit at all.
    let free = [read, write].map(|command| rate(command, 600));
    throttle(&lab, &vm, &["--iops-read", "100", "--iops-write", "60"]).success();
    for ((command, limit), free) in [(read, 100.0), (write, 60.0)].into_iter().zip(free) {
        let least = f64::min(limit, free / 2.0) * 0.85;
        let mut best: f64 = 0.0;
        for _ in 0..3 {
            let rate = rate(command, (limit * 6.0) as u32);
            eprintln!("{} at {limit}, {free:.1} without: {rate:.1} operations per second", &command[..8]);
            assert!(rate <= limit * 1.15, "{rate} operations per second at a limit of {limit}");
            best = best.max(rate);
            if best >= least {
                break;
            }
        }
        assert!(best >= least, "only {best} operations per second at a limit of {limit}");
    }
}
