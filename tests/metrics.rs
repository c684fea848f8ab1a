//! `blockhost-vm-metrics`: what the monitor can rely on, whatever the guests, the cache or libvirt do.
#![allow(clippy::unwrap_used, missing_docs)]

mod common;

use std::any::Any;
use std::fs;
use std::io::{Read as _, Write as _};
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use common::{Guest, Lab, Outcome, agent, binary, finish, in_guest, output, patience, try_virsh, virsh, wait_until};
use serde_json::{Value, json};

const PROGRAM: &str = "blockhost-vm-metrics";

/// The contract's keys, in its order.
const KEYS: [&str; 16] = [
    "cpu_percent",
    "cpu_count",
    "memory_used_mb",
    "memory_total_mb",
    "disk_used_mb",
    "disk_total_mb",
    "disk_read_iops",
    "disk_write_iops",
    "disk_read_bytes_sec",
    "disk_write_bytes_sec",
    "net_rx_bytes_sec",
    "net_tx_bytes_sec",
    "net_connections",
    "guest_agent_responsive",
    "uptime_seconds",
    "state",
];

/// Reads the whole of stdout as strictly as the monitor: integers where it has `int`.
#[track_caller]
fn strict(stdout: &str) -> Value {
    let value: Value = serde_json::from_str(stdout).unwrap_or_else(|e| panic!("{e}: {stdout:?}"));
    check(&value);
    value
}

#[track_caller]
fn check(value: &Value) {
    let object = value.as_object().unwrap();
    assert_eq!(object.keys().map(String::as_str).collect::<Vec<_>>(), KEYS);
    for (key, value) in object {
        let literal = value.to_string();
        match key.as_str() {
            "state" => assert!(["\"running\"", "\"paused\"", "\"stopped\"", "\"unknown\""].contains(&literal.as_str())),
            "guest_agent_responsive" => assert!(value.is_boolean(), "{key}: {literal}"),
            "cpu_percent" => {
                let most = 100.0 * object["cpu_count"].as_f64().unwrap();
                let percent = value.as_f64().unwrap();
                assert!(percent == -1.0 || (0.0..=most).contains(&percent), "{key}: {literal}");
            }
            _ => assert!(literal == "-1" || literal.bytes().all(|b| b.is_ascii_digit()), "{key}: {literal}"),
        }
    }
}

/// Asks again where libvirt did not take the connection in the time there is: a machine that is busy elsewhere shows nothing.
fn asked(lab: &Lab, arguments: &[&str]) -> Outcome {
    let late = |outcome: &Outcome| outcome.code == Some(1) && outcome.stderr.contains("no answer within");
    let mut outcome = lab.run(PROGRAM, arguments);
    for _ in 0..10 {
        if !late(&outcome) {
            break;
        }
        outcome = lab.run(PROGRAM, arguments);
    }
    outcome
}

/// The metrics of a VM whose state is known: that it is not says only that nothing came in the time there is, and is asked again.
#[track_caller]
fn measure(lab: &Lab, vm: &str) -> Value {
    let mut metrics = Value::Null;
    for _ in 0..10 {
        let outcome = asked(lab, &[vm]).success();
        assert_eq!(outcome.stdout.lines().count(), 1, "{outcome:?}");
        metrics = strict(&outcome.stdout);
        if metrics["state"] != "unknown" {
            break;
        }
    }
    metrics
}

/// Measures when the last sample has become too old to answer.
#[track_caller]
fn measure_anew(lab: &Lab, vm: &str) -> Value {
    thread::sleep(Duration::from_millis(1100));
    measure(lab, vm)
}

/// Measures anew until `right` holds.
#[track_caller]
fn eventually(lab: &Lab, vm: &str, what: &str, right: impl Fn(&Value) -> bool) -> Value {
    let end = Instant::now() + patience(Duration::from_secs(60));
    loop {
        let metrics = measure_anew(lab, vm);
        if right(&metrics) {
            return metrics;
        }
        assert!(Instant::now() < end, "{what}: {metrics}");
    }
}

fn pid(vm: &str) -> String {
    fs::read_to_string(format!("/run/libvirt/qemu/{vm}.pid")).unwrap().trim().to_owned()
}

/// Sends a signal when made and SIGCONT when dropped, so that a failing test leaves nothing stopped.
struct Stopped(String);

impl Stopped {
    fn new(vm: &str) -> Self {
        let pid = pid(vm);
        output("kill", &["-STOP", &pid]);
        Self(pid)
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        let _ = Command::new("kill").args(["-CONT", &self.0]).status();
    }
}

fn metrics_file(lab: &Lab, name: &str) -> PathBuf {
    lab.state().join("metrics").join(name)
}

fn create(lab: &Lab, vm: &str) {
    let arguments = [&lab.create_arguments(vm)[..], &["--cpu", "2"]].concat();
    lab.run("blockhost-vm-create", &arguments).success();
}

#[test]
fn every_state_of_a_vm_is_a_valid_object() {
    let lab = Lab::new(Guest::Small);
    let vm = lab.name("states");
    lab.run(PROGRAM, &[&vm]).fails_with(1).says("there is no VM");
    create(&lab, &vm);

    // Just created: nothing is known from before, and nothing is absurd.
    measure(&lab, &vm);
    eventually(&lab, &vm, "its sizes", |m| {
        let sizes = ["cpu_count", "memory_total_mb", "disk_total_mb"].map(|key| m[key].as_i64().unwrap());
        m["state"] == "running" && sizes == [2, 192, 4096]
    });
    let known = eventually(&lab, &vm, "the agent's facts", |m| m["guest_agent_responsive"] == true);
    assert!(known["disk_used_mb"].as_i64().unwrap() >= 0 && known["net_connections"].as_i64().unwrap() >= 0, "{known}");
    let used = known["memory_used_mb"].as_i64().unwrap();
    assert!(used > 0 && used <= 192, "{known}");
    eventually(&lab, &vm, "counters of the disk", |m| m["disk_read_iops"].as_i64().unwrap() >= 0);

    virsh(&["suspend", &vm]);
    let paused = eventually(&lab, &vm, "paused", |m| m["state"] == "paused");
    assert_eq!((&paused["cpu_count"], &paused["guest_agent_responsive"]), (&json!(2), &json!(false)));
    virsh(&["resume", &vm]);
    eventually(&lab, &vm, "resumed", |m| m["state"] == "running");

    {
        // Frozen, and looked at for as long as it would take libvirt to notice.
        let _frozen = Stopped::new(&vm);
        for _ in 0..3 {
            let frozen = measure_anew(&lab, &vm);
            assert_eq!((&frozen["state"], &frozen["disk_read_iops"]), (&json!("running"), &json!(-1)), "{frozen}");
            assert!(frozen["cpu_percent"].as_f64().unwrap() >= 0.0 && frozen["uptime_seconds"].as_i64().unwrap() > 0);
            assert_eq!(frozen["memory_total_mb"], 192);
        }
    }
    eventually(&lab, &vm, "thawed", |m| m["disk_read_iops"].as_i64().unwrap() >= 0);

    // An agent whose process is stopped: its facts are old at most half a minute, and nobody waits for it.
    let stop = json!({"execute": "guest-exec", "arguments": {"path": "/bin/sh", "arg": ["-c", "sleep 1; kill -STOP $(pidof qemu-ga)"]}});
    agent(&vm, &stop);
    wait_until("the agent to hang", Duration::from_secs(60), || {
        try_virsh(&["qemu-agent-command", &vm, "{\"execute\": \"guest-ping\"}", "--timeout", "2"]).is_none()
    });
    fs::remove_file(metrics_file(&lab, "agents.json")).unwrap();
    eventually(&lab, &vm, "hung agent", |m| {
        m["guest_agent_responsive"] == false && m["state"] == "running" && m["disk_used_mb"] == -1
    });

    // Booting, with counters that began again at zero.
    lab.run("blockhost-vm-kill", &[&vm]).success();
    let off = measure(&lab, &vm);
    assert_eq!(
        (&off["state"], &off["uptime_seconds"], &off["cpu_percent"]),
        (&json!("stopped"), &json!(0), &json!(0.0))
    );
    assert_eq!(
        (&off["cpu_count"], &off["memory_total_mb"], &off["disk_total_mb"]),
        (&json!(2), &json!(192), &json!(4096))
    );
    lab.run("blockhost-vm-start", &[&vm]).success();
    let booting = measure(&lab, &vm);
    assert_eq!(booting["guest_agent_responsive"], false);
    assert!(booting["uptime_seconds"].as_i64().unwrap() < 30, "{booting}");
    eventually(&lab, &vm, "booting", |m| m["state"] == "running" && m["disk_read_iops"].as_i64().unwrap() >= 0);

    lab.destroy(&vm).success();
    lab.run(PROGRAM, &[&vm]).fails_with(1).says("there is no VM");
    lab.assert_no_traces("after destroy");
}

#[test]
fn a_frozen_qemu_costs_the_others_nothing() {
    let lab = Lab::new(Guest::Small);
    let (well, ill) = (lab.name("well"), lab.name("ill"));
    create(&lab, &well);
    create(&lab, &ill);
    let group = fs::read_to_string(format!("/proc/{}/cgroup", pid(&ill))).unwrap();
    let counted = |metrics: &Value| metrics["disk_read_iops"].as_i64().unwrap() >= 0;
    let attempt = || -> Result<(), String> {
        for vm in [&well, &ill] {
            eventually(&lab, vm, "its counters", counted);
        }
        // Not by a signal, which would show: by the freezer, so that its monitor simply never answers.
        let _frozen = Freezer::new(&group);
        for _ in 0..4 {
            for (vm, found) in [(&well, measure_anew(&lab, &well)), (&ill, measure(&lab, &ill))] {
                if found["state"] != "running" || counted(&found) != (vm == &well) {
                    return Err(format!("{vm}: {found}"));
                }
            }
        }
        Ok(())
    };
    // A machine that is busy elsewhere may make a monitor miss its time.
    let failures: Vec<_> = (0..3).map_while(|_| attempt().err()).collect();
    assert!(failures.len() < 3, "{failures:#?}");
    eventually(&lab, &ill, "thawed", |m| m["disk_read_iops"].as_i64().unwrap() >= 0);
    let all: Value = serde_json::from_str(&asked(&lab, &["--all"]).success().stdout).unwrap();
    for vm in [&well, &ill] {
        check(&all[vm]);
    }
}

struct Freezer {
    file: PathBuf,
    thaw: &'static str,
}

impl Freezer {
    fn new(groups: &str) -> Self {
        let path = |line: &str| line.splitn(3, ':').nth(2).unwrap().trim_start_matches('/').to_owned();
        let domain = |path: &str| path.trim_end_matches("/emulator").trim_end_matches("/libvirt").to_owned();
        let v1 = groups.lines().find(|line| line.contains(":freezer:")).map(path).filter(|path| path.contains("qemu"));
        let freezer = match v1 {
            Some(path) => {
                let file = Path::new("/sys/fs/cgroup/freezer").join(domain(&path)).join("freezer.state");
                fs::write(&file, "FROZEN").unwrap();
                Self { file, thaw: "THAWED" }
            }
            None => {
                let path = domain(&path(groups.lines().find(|line| line.starts_with("0::")).unwrap()));
                let roots = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"];
                let file = roots.map(|root| Path::new(root).join(&path).join("cgroup.freeze"));
                let file = file.into_iter().find(|file| file.exists()).unwrap();
                fs::write(&file, "1").unwrap();
                Self { file, thaw: "0" }
            }
        };
        assert!(freezer.file.to_string_lossy().contains("qemu"), "{}", freezer.file.display());
        freezer
    }
}

impl Drop for Freezer {
    fn drop(&mut self) {
        fs::write(&self.file, self.thaw).unwrap();
    }
}

/// Starts this many VMs that run and do nothing: instead of a firmware they have one instruction, a halt. Their QEMUs are as
/// real as any.
fn start_idle(lab: &Lab, count: usize) -> Vec<String> {
    let rom = lab.dir.join("halt.rom");
    // Where a processor begins: 16 bytes below the end.
    let mut code = vec![0x90; 65536 - 16];
    code.extend([0xf4, 0xeb, 0xfd]);
    code.resize(65536, 0x90);
    fs::write(&rom, code).unwrap();
    let names: Vec<String> = (0..count).map(|i| lab.name(&format!("idle{i}"))).collect();
    let mut script = String::new();
    for name in &names {
        let disk = lab.dir.join(format!("{name}.img"));
        fs::File::create(&disk).unwrap().set_len(16 << 20).unwrap();
        let xml = lab.dir.join(format!("{name}.xml"));
        let text = format!(
            "<domain type='qemu'><name>{name}</name><memory unit='MiB'>32</memory><vcpu>1</vcpu>\
             <os><type arch='x86_64' machine='pc'>hvm</type><loader type='rom'>{}</loader></os><features><acpi/></features>\
             <devices><controller type='usb' model='none'/><memballoon model='none'/>\
             <disk type='file' device='disk'><driver name='qemu' type='raw'/><source file='{}'/>\
             <target dev='vda' bus='virtio'/></disk></devices></domain>",
            rom.display(),
            disk.display()
        );
        fs::write(&xml, text).unwrap();
        script += &format!("create {};", xml.display());
    }
    virsh(&[&script]);
    names
}

/// A monitor's round: two callers, each asks about the next VM when it has its answer.
fn round(lab: &Lab, vms: &[String]) -> (Duration, Vec<Value>) {
    let next = AtomicUsize::new(0);
    let begun = Instant::now();
    let ask = || {
        let mine = || Some(next.fetch_add(1, Ordering::SeqCst)).filter(|i| *i < vms.len());
        std::iter::from_fn(mine).map(|i| (i, asked(lab, &[&vms[i]]))).collect::<Vec<_>>()
    };
    let mut answers = thread::scope(|scope| {
        let other = scope.spawn(ask);
        let mut answers = ask();
        answers.extend(other.join().unwrap());
        answers
    });
    let took = begun.elapsed();
    answers.sort_by_key(|(i, _)| *i);
    (took, answers.into_iter().map(|(_, outcome)| strict(&outcome.success().stdout)).collect())
}

/// VMs that end together: libvirt takes seconds to destroy one that does nothing.
struct Idle(Vec<String>);

impl Drop for Idle {
    fn drop(&mut self) {
        let pids: Vec<_> = self.0.iter().map(|vm| pid(vm)).collect();
        let _ = Command::new("kill").arg("-KILL").args(pids).status();
        let left = || virsh(&["list", "--name"]).lines().any(|name| self.0.iter().any(|vm| vm == name));
        let end = Instant::now() + patience(Duration::from_secs(60));
        while left() && Instant::now() < end {
            thread::sleep(Duration::from_millis(200));
        }
    }
}

#[test]
fn one_frozen_qemu_among_fifty_delays_no_round() {
    let lab = Lab::new(Guest::Blank);
    let vms = Idle(start_idle(&lab, 50));
    let ill = &vms.0[17];
    let look = || -> Result<(), String> {
        thread::sleep(Duration::from_millis(1100));
        let (took, answers) = round(&lab, &vms.0);
        for (vm, found) in vms.0.iter().zip(&answers) {
            let known = ["cpu_count", "memory_total_mb", "disk_total_mb"].map(|key| found[key].as_i64().unwrap());
            let answered = found["disk_read_iops"].as_i64().unwrap() >= 0;
            if found["state"] != "running" || known != [1, 32, 16] || answered == (vm == ill) {
                return Err(format!("{vm}: {found}"));
            }
        }
        if took > Duration::from_millis(1500) { Err(format!("the round took {took:?}")) } else { Ok(()) }
    };
    // All of them: on a busy machine another may have been too slow just before.
    let well = || {
        let end = Instant::now() + patience(Duration::from_secs(60));
        loop {
            thread::sleep(Duration::from_millis(1100));
            let (_, answers) = round(&lab, &vms.0);
            match answers.iter().position(|found| found["disk_read_iops"].as_i64().unwrap() < 0) {
                None => return,
                Some(i) => assert!(Instant::now() < end, "{}: {}", vms.0[i], answers[i]),
            }
        }
    };
    // Stopped by a signal, which shows, and by the freezer, which does not: then the monitor just never answers.
    type Freeze<'a> = &'a dyn Fn() -> Box<dyn Any>;
    let stop: Freeze = &|| Box::new(Stopped::new(ill));
    let freeze: Freeze = &|| Box::new(Freezer::new(&fs::read_to_string(format!("/proc/{}/cgroup", pid(ill))).unwrap()));
    for (how, freeze) in [("stopped", stop), ("frozen", freeze)] {
        // The round it happens in, and those that follow. Another test that is just starting a VM holds libvirt up for
        // all, and the machine may be busy elsewhere.
        let attempt = || {
            well();
            let _frozen = freeze();
            (0..3).try_for_each(|number| look().map_err(|error| format!("{how}, round {number}: {error}")))
        };
        let failures: Vec<_> = (0..3).map_while(|_| attempt().err()).collect();
        eprintln!("{how}: {failures:?}");
        assert!(failures.len() < 3, "{failures:#?}");
    }
}

#[test]
fn a_sample_that_is_none_only_costs_a_new_one() {
    let lab = Lab::new(Guest::Small);
    let vm = lab.name("cache");
    create(&lab, &vm);
    measure(&lab, &vm);
    let samples = metrics_file(&lab, "samples");
    let good = fs::read_to_string(&samples).unwrap();
    let boot_id = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
    let line = good.lines().find(|line| line.starts_with(&vm)).unwrap();
    let damaged: [Vec<u8>; 7] = [
        Vec::new(),
        good.as_bytes()[..good.len() / 2].to_vec(),
        good.replace("running", "runming").into_bytes(),
        good.replace(line, &line.replace(" 2 ", " -2 ")).into_bytes(),
        good.replace(boot_id.trim(), "00000000-0000-0000-0000-000000000000").into_bytes(),
        b"{\"cpu_percent\": 1e9}\n".to_vec(),
        vec![0xff; 100_000],
    ];
    for text in damaged {
        fs::write(&samples, &text).unwrap();
        let metrics = measure(&lab, &vm);
        assert_eq!((&metrics["state"], &metrics["cpu_count"]), (&json!("running"), &json!(2)), "{metrics}");
        // It was replaced.
        assert!(fs::read_to_string(&samples).unwrap().starts_with("blockhost-samples 1 "));
    }
    for file in ["memo.json", "agents.json"] {
        fs::write(metrics_file(&lab, file), "{\"boot_id\": 7").unwrap();
        measure_anew(&lab, &vm);
    }
    // Something that is no file at all.
    fs::remove_file(&samples).unwrap();
    fs::create_dir(&samples).unwrap();
    assert_eq!(measure(&lab, &vm)["state"], "running");
}

/// A mount that a failing test does not leave.
struct Mounted<'a>(&'a str);

impl Drop for Mounted<'_> {
    fn drop(&mut self) {
        let _ = Command::new("umount").args(["-l", self.0]).status();
    }
}

#[test]
fn an_answer_comes_where_nothing_can_be_kept() {
    let lab = Lab::new(Guest::Small);
    let vm = lab.name("kept");
    create(&lab, &vm);
    let dir = lab.state().join("metrics");
    let path = dir.to_str().unwrap();
    output("mount", &["-t", "tmpfs", "-o", "size=64k,mode=755", "none", path]);
    let mounted = Mounted(path);
    // A full disk.
    assert!(fs::write(dir.join("filler"), vec![1; 1 << 20]).is_err());
    assert_eq!(measure(&lab, &vm)["state"], "running");
    // The sampler may still be asking the agent, with its lock open.
    wait_until("the directory to be nobody's", Duration::from_secs(60), || {
        Command::new("mount").args(["-o", "remount,ro", path]).output().unwrap().status.success()
    });
    assert_eq!(measure(&lab, &vm)["state"], "running");
    drop(mounted);
    // Something else has its name.
    fs::remove_dir_all(&dir).unwrap();
    fs::write(&dir, "").unwrap();
    assert_eq!(measure(&lab, &vm)["state"], "running");
    fs::remove_file(&dir).unwrap();
    // Not there yet.
    assert_eq!(measure(&lab, &vm)["state"], "running");
    assert!(metrics_file(&lab, "samples").exists());
}

/// The metrics command with a sampler beside it that leaves a line in a file each time it is started.
fn counted(lab: &Lab) -> (PathBuf, PathBuf) {
    let dir = lab.dir.join("counted");
    fs::create_dir(&dir).unwrap();
    fs::copy(binary(PROGRAM), dir.join(PROGRAM)).unwrap();
    let (sampler, count) = (dir.join("blockhost-metrics-sampler"), dir.join("count"));
    let real = binary("blockhost-metrics-sampler");
    fs::write(&sampler, format!("#!/bin/sh\necho >> '{}'\nexec '{}'\n", count.display(), real.display())).unwrap();
    fs::set_permissions(&sampler, fs::Permissions::from_mode(0o755)).unwrap();
    (dir.join(PROGRAM), count)
}

#[test]
fn two_hundred_at_once_are_all_answered_from_a_few_samples() {
    let lab = Lab::new(Guest::Small);
    let vms = [lab.name("many"), lab.name("off")];
    create(&lab, &vms[0]);
    create(&lab, &vms[1]);
    lab.run("blockhost-vm-kill", &[&vms[1]]).success();
    let (program, count) = counted(&lab);
    let mut late = 0;
    let started = Instant::now();
    let children: Vec<_> = (0..200)
        .map(|i| {
            let mut command = lab.command(PROGRAM);
            let mut counted = Command::new(&program);
            counted.args([&vms[i % 2]]).stdin(std::process::Stdio::null());
            counted.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped());
            for (key, value) in command.arg("x").get_envs() {
                if let Some(value) = value {
                    counted.env(key, value);
                }
            }
            (i % 2, counted.spawn().unwrap())
        })
        .collect();
    for (index, child) in children {
        let outcome: Outcome = finish(child).success();
        let state = strict(&outcome.stdout)["state"].clone();
        late += usize::from(state == "unknown");
        assert!(state == ["running", "stopped"][index] || state == "unknown", "{outcome:?}");
    }
    let took = started.elapsed();
    let samples = fs::read_to_string(&count).unwrap().lines().count();
    // One a second, however many ask; and another where the machine is so busy that one took longer than its caller waits.
    assert!(samples as u64 <= took.as_secs() + 2 + (late as u64).min(10), "{samples} samples in {took:?}, {late} late");
    // No temporary file is left, and none has a name that two could share.
    thread::sleep(Duration::from_secs(2));
    let mut names: Vec<_> =
        fs::read_dir(lab.state().join("metrics")).unwrap().map(|e| e.unwrap().file_name()).collect();
    names.retain(|name| name.to_string_lossy().contains("tmp"));
    assert_eq!(names, Vec::<std::ffi::OsString>::new());
}

#[test]
fn a_sample_is_for_all_vms_and_serves_until_it_is_a_second_old() {
    let lab = Lab::new(Guest::Small);
    let vms = [lab.name("one"), lab.name("two")];
    create(&lab, &vms[0]);
    create(&lab, &vms[1]);
    // A machine that is busy elsewhere may take longer for this than a sample lives; then it shows nothing and is done again.
    let elsewhere = ("BLOCKHOST_LIBVIRT_URI", "qemu+unix:///system?socket=/nonexistent");
    let ask = || finish(lab.command(PROGRAM).env(elsewhere.0, elsewhere.1).arg(&vms[0]).spawn().unwrap());
    let shared = (0..20).any(|_| {
        measure_anew(&lab, &vms[0]);
        let begun = Instant::now();
        let before = fs::read(metrics_file(&lab, "samples")).unwrap();
        measure(&lab, &vms[1]);
        measure(&lab, &vms[0]);
        // While it is fresh libvirt is not even needed.
        let without_libvirt = ask();
        let same = fs::read(metrics_file(&lab, "samples")).unwrap() == before;
        // Nor is a sample shared that libvirt could only give in part, because it was just starting another test's VM.
        if begun.elapsed() > Duration::from_millis(500) || !same {
            return false;
        }
        assert_eq!(strict(&without_libvirt.success().stdout)["state"], "running");
        true
    });
    assert!(shared, "in twenty seconds no sample was shared");
    let before = fs::read(metrics_file(&lab, "samples")).unwrap();
    measure_anew(&lab, &vms[1]);
    assert_ne!(fs::read(metrics_file(&lab, "samples")).unwrap(), before);
    thread::sleep(Duration::from_millis(1100));
    ask().fails_with(1).says("cannot connect to libvirt");
}

#[test]
fn the_command_is_not_linked_with_libvirt() {
    let needed = output("readelf", &["-d", binary(PROGRAM).to_str().unwrap()]);
    assert!(needed.contains("libc.so.6"), "{needed}");
    assert!(!needed.contains("virt"), "{needed}");
}

#[test]
fn wrong_usage_is_told_from_a_vm_that_is_not_there() {
    let lab = Lab::new(Guest::Small);
    for arguments in [&[][..], &["-x"], &["bad name"], &["a", "b"], &["a", "--all"], &["--format", "xml", "a"]] {
        lab.run(PROGRAM, arguments).fails_with(2);
    }
    lab.run(PROGRAM, &[&lab.name("nobody")]).fails_with(1).says("there is no VM");
}

/// The value of a counter or gauge in OpenMetrics text.
fn value(text: &str, name: &str, vm: &str) -> f64 {
    let prefix = format!("{name}{{vm=\"{vm}\"}} ");
    let line = text.lines().find_map(|line| line.strip_prefix(&prefix));
    line.unwrap_or_else(|| panic!("{prefix} is not in {text}")).parse().unwrap()
}

#[test]
fn the_figures_agree_with_a_load_of_known_size() {
    let lab = Lab::new(Guest::Small);
    let vm = lab.name("load");
    create(&lab, &vm);
    measure(&lab, &vm);
    let exposition = || {
        let end = Instant::now() + patience(Duration::from_secs(60));
        loop {
            thread::sleep(Duration::from_millis(1100));
            let text = asked(&lab, &[&vm, "--format", "openmetrics"]).success().stdout;
            assert!(text.ends_with("# EOF\n"), "{text}");
            // What a monitor did not say in time is left out.
            if ["blockhost_vm_disk_read_bytes_total{", "blockhost_vm_vcpus{"].iter().all(|name| text.contains(name)) {
                return text;
            }
            assert!(Instant::now() < end, "{text}");
        }
    };
    let near = |measured: f64, real: f64| assert!((measured / real - 1.0).abs() < 0.1, "{measured} for {real}");

    let before = exposition();
    const READ: usize = 24 << 20;
    in_guest(&vm, "echo 3 > /proc/sys/vm/drop_caches; dd if=/dev/vda of=/dev/null bs=1M count=24 skip=60");
    const WRITTEN: usize = 16 << 20;
    in_guest(&vm, "dd if=/dev/zero of=/dev/vda bs=1M count=16 seek=2000; sync");
    const SENT: usize = 6_000_000;
    let listener = TcpListener::bind("0.0.0.0:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let receiver = thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut buffer = vec![0; 1 << 16];
        let mut total = 0;
        while total < SENT {
            match stream.read(&mut buffer).unwrap() {
                0 => break,
                length => total += length,
            }
        }
        stream.write_all(b"done\n").unwrap();
        total
    });
    let gateway = std::env::var("BLOCKHOST_TEST_GATEWAY").unwrap();
    in_guest(&vm, &format!("head -c {SENT} /dev/zero | nc -w 10 {gateway} {port}"));
    assert_eq!(receiver.join().unwrap(), SENT);
    let after = exposition();

    let grown = |name: &str| value(&after, name, &vm) - value(&before, name, &vm);
    near(grown("blockhost_vm_disk_read_bytes_total"), READ as f64);
    near(grown("blockhost_vm_disk_written_bytes_total"), WRITTEN as f64);
    near(grown("blockhost_vm_network_transmit_bytes_total"), SENT as f64);
    // What the guest sent is not what it received.
    assert!(grown("blockhost_vm_network_receive_bytes_total") < SENT as f64 / 4.0);
    assert_eq!(value(&after, "blockhost_vm_vcpus", &vm), 2.0);
}

#[test]
fn a_busy_vcpu_shows_as_one_and_nothing_is_started_in_the_guest() {
    let lab = Lab::new(Guest::Small);
    let vm = lab.name("busy");
    create(&lab, &vm);
    eventually(&lab, &vm, "agent", |m| m["guest_agent_responsive"] == true);

    // Every process the guest ever made, but for those of the question itself.
    let forks = || in_guest(&vm, "sed -n 's/^processes //p' /proc/stat").trim().parse::<i64>().unwrap();
    let (first, second) = (forks(), forks());
    for _ in 0..6 {
        // The agent is asked each time, since nobody remembers that it was.
        let _ = fs::remove_file(metrics_file(&lab, "agents.json"));
        measure_anew(&lab, &vm);
    }
    let made = forks() - second - (second - first);
    // The kernel makes a thread of its own now and then.
    assert!(made < 4, "{made} processes in the guest");

    in_guest(&vm, "sh -c 'while :; do :; done' > /dev/null 2>&1 &");
    let ticks = || -> f64 {
        let stat = fs::read_to_string(format!("/proc/{}/stat", pid(&vm))).unwrap();
        let fields: Vec<&str> = stat[stat.rfind(')').unwrap()..].split(' ').collect();
        fields[12].parse::<f64>().unwrap() + fields[13].parse::<f64>().unwrap()
    };
    thread::sleep(Duration::from_secs(2));
    let attempt = || -> Result<(), String> {
        measure_anew(&lab, &vm);
        let (started, before) = (Instant::now(), ticks());
        thread::sleep(Duration::from_secs(4));
        let metrics = measure(&lab, &vm);
        let real = (ticks() - before) / started.elapsed().as_secs_f64();
        let shown = metrics["cpu_percent"].as_f64().unwrap();
        // 100 where the host is idle enough to give the vCPU a CPU of its own; what the kernel gave it in any case.
        let agree = (shown - real).abs() < 10.0 && real < 112.0;
        if agree { Ok(()) } else { Err(format!("{shown} shown, {real} used, by one busy of two vCPUs")) }
    };
    // A machine that is busy elsewhere may let much time pass between the two looks.
    let failures: Vec<_> = (0..3).map_while(|_| attempt().err()).collect();
    assert!(failures.len() < 3, "{failures:#?}");
}
