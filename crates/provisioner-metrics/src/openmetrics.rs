//! The sample in OpenMetrics text, for node_exporter's textfile collector or any scraper. Counters are given raw: whoever
//! stores them makes better rates over any time than we could. Names, units and labels are stable.

use std::fmt::Write as _;

use provisioner_contract::MetricsState;

use crate::sample::{Reading, VmSample};

const STATES: [MetricsState; 4] =
    [MetricsState::Running, MetricsState::Paused, MetricsState::Stopped, MetricsState::Unknown];

/// How a value is written: as it is, or nanoseconds as seconds.
#[derive(Clone, Copy)]
enum Scale {
    One,
    Nanoseconds,
}

struct Family {
    name: &'static str,
    kind: &'static str,
    unit: &'static str,
    help: &'static str,
    scale: Scale,
    value: fn(&VmSample, u64) -> Option<u64>,
}

fn counter<const N: usize>(reading: Option<Reading<N>>, index: usize) -> Option<u64> {
    reading?.values[index]
}

const FAMILIES: &[Family] = &[
    Family {
        name: "blockhost_vm_vcpus",
        kind: "gauge",
        unit: "",
        help: "Virtual CPUs of the VM.",
        scale: Scale::One,
        value: |vm, _| vm.vcpus,
    },
    Family {
        name: "blockhost_vm_cpu_seconds",
        kind: "counter",
        unit: "seconds",
        help: "CPU time the VM has used since it was started.",
        scale: Scale::Nanoseconds,
        value: |vm, _| counter(vm.host.now, 0),
    },
    Family {
        name: "blockhost_vm_memory_used_bytes",
        kind: "gauge",
        unit: "bytes",
        help: "Memory the guest uses and could not give away.",
        scale: Scale::One,
        value: |vm, _| vm.memory_used,
    },
    Family {
        name: "blockhost_vm_memory_allocated_bytes",
        kind: "gauge",
        unit: "bytes",
        help: "Memory allocated to the VM.",
        scale: Scale::One,
        value: |vm, _| vm.memory_total,
    },
    Family {
        name: "blockhost_vm_filesystem_used_bytes",
        kind: "gauge",
        unit: "bytes",
        help: "Used in the guest's file systems, as its agent reports.",
        scale: Scale::One,
        value: |vm, _| vm.disk_used,
    },
    Family {
        name: "blockhost_vm_disk_size_bytes",
        kind: "gauge",
        unit: "bytes",
        help: "Size of the VM's disks.",
        scale: Scale::One,
        value: |vm, _| vm.disk_total,
    },
    Family {
        name: "blockhost_vm_disk_reads",
        kind: "counter",
        unit: "",
        help: "Read requests of the guest to its disks.",
        scale: Scale::One,
        value: |vm, _| counter(vm.block.now, 0),
    },
    Family {
        name: "blockhost_vm_disk_writes",
        kind: "counter",
        unit: "",
        help: "Write requests of the guest to its disks.",
        scale: Scale::One,
        value: |vm, _| counter(vm.block.now, 1),
    },
    Family {
        name: "blockhost_vm_disk_read_bytes",
        kind: "counter",
        unit: "bytes",
        help: "Bytes the guest has read from its disks.",
        scale: Scale::One,
        value: |vm, _| counter(vm.block.now, 2),
    },
    Family {
        name: "blockhost_vm_disk_written_bytes",
        kind: "counter",
        unit: "bytes",
        help: "Bytes the guest has written to its disks.",
        scale: Scale::One,
        value: |vm, _| counter(vm.block.now, 3),
    },
    Family {
        name: "blockhost_vm_network_receive_bytes",
        kind: "counter",
        unit: "bytes",
        help: "Bytes the guest has received.",
        scale: Scale::One,
        value: |vm, _| counter(vm.host.now, 1),
    },
    Family {
        name: "blockhost_vm_network_transmit_bytes",
        kind: "counter",
        unit: "bytes",
        help: "Bytes the guest has sent.",
        scale: Scale::One,
        value: |vm, _| counter(vm.host.now, 2),
    },
    Family {
        name: "blockhost_vm_tcp_connections",
        kind: "gauge",
        unit: "",
        help: "Established TCP connections in the guest.",
        scale: Scale::One,
        value: |vm, _| vm.connections,
    },
    Family {
        name: "blockhost_vm_guest_agent_responsive",
        kind: "gauge",
        unit: "",
        help: "Whether the guest agent answered when it was last asked.",
        scale: Scale::One,
        value: |vm, _| Some(vm.agent.into()),
    },
    Family {
        name: "blockhost_vm_uptime_seconds",
        kind: "gauge",
        unit: "seconds",
        help: "Time since the VM was started.",
        scale: Scale::Nanoseconds,
        value: |vm, now| vm.run.map(|run| now.saturating_sub(run.start)),
    },
];

/// The whole exposition, with its `# EOF`. What is not known of a VM is left out. `now` is in nanoseconds since boot.
#[must_use]
pub fn text(vms: &[VmSample], now: u64) -> String {
    let mut out = String::new();
    // Writing to memory cannot fail, and a VM's name needs no escaping.
    let _ = writeln!(out, "# TYPE blockhost_vm_state stateset\n# HELP blockhost_vm_state What the VM is doing.");
    for vm in vms {
        for state in STATES {
            let on = u8::from(vm.state == state);
            let state = state.as_str();
            let _ = writeln!(out, "blockhost_vm_state{{vm=\"{}\",blockhost_vm_state=\"{state}\"}} {on}", vm.name);
        }
    }
    for family in FAMILIES {
        let Family { name, kind, unit, help, scale, value } = family;
        let _ = writeln!(out, "# TYPE {name} {kind}");
        if !unit.is_empty() {
            let _ = writeln!(out, "# UNIT {name} {unit}");
        }
        let _ = writeln!(out, "# HELP {name} {help}");
        let suffix = if *kind == "counter" { "_total" } else { "" };
        for vm in vms {
            let Some(value) = value(vm, now) else { continue };
            let _ = write!(out, "{name}{suffix}{{vm=\"{}\"}} ", vm.name);
            let _ = match scale {
                Scale::One => writeln!(out, "{value}"),
                Scale::Nanoseconds => writeln!(out, "{}.{:09}", value / 1_000_000_000, value % 1_000_000_000),
            };
        }
    }
    out.push_str("# EOF\n");
    out
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use provisioner_contract::VmName;

    #[test]
    fn every_family_has_its_lines_in_order_and_unknown_values_are_left_out() {
        let mut vm = VmSample::new(VmName::new("web1").unwrap(), MetricsState::Running);
        vm.host.now = Some(Reading { at: 9, values: [Some(1_500_000_000), Some(7), None] });
        let text = text(&[vm], 0);
        assert!(text.ends_with("# EOF\n"));
        assert!(text.contains("blockhost_vm_cpu_seconds_total{vm=\"web1\"} 1.500000000\n"), "{text}");
        assert!(text.contains("blockhost_vm_network_receive_bytes_total{vm=\"web1\"} 7\n"), "{text}");
        assert!(!text.contains("transmit_bytes_total"), "{text}");
        assert!(text.contains("{vm=\"web1\",blockhost_vm_state=\"running\"} 1\n"), "{text}");
        assert!(text.contains("{vm=\"web1\",blockhost_vm_state=\"stopped\"} 0\n"), "{text}");
        for family in FAMILIES {
            assert!(family.unit.is_empty() || family.name.ends_with(family.unit), "{}", family.name);
            assert!(text.contains(&format!("# HELP {} ", family.name)));
            assert!(!family.name.ends_with("_total"), "the suffix is added: {}", family.name);
        }
    }
}
