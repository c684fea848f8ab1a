//! What `gc` reports: for each phase which VMs it was about and what became of each.

use std::fmt::Write as _;

use crate::{Timestamp, VmName};

/// What became of one candidate.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, schemars::JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum GcOutcome {
    /// A dry run found it; nothing was done.
    Planned,
    /// Done.
    Done,
    /// Left alone on purpose: an extension came, another command works on it, the run was stopped.
    Skipped,
    /// Could not be done.
    Failed,
}

/// One candidate of a phase.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, schemars::JsonSchema)]
pub struct GcEntry {
    /// The VM.
    pub name: VmName,
    /// What became of it.
    pub outcome: GcOutcome,
    /// What was done, or why not, for people.
    pub detail: String,
}

/// One phase of a run.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize, schemars::JsonSchema)]
pub struct GcPhase {
    /// The candidates, in the order they were dealt with.
    pub candidates: Vec<GcEntry>,
}

impl GcPhase {
    /// How many candidates ended so.
    #[must_use]
    pub fn count(&self, outcome: GcOutcome) -> usize {
        self.candidates.iter().filter(|entry| entry.outcome == outcome).count()
    }
}

/// A record of the database, or a VM, that is no candidate.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, schemars::JsonSchema)]
pub struct GcKept {
    /// The key in the database, which need not be a valid name.
    pub name: String,
    /// Why it is left alone.
    pub why: String,
}

/// A whole run.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, schemars::JsonSchema)]
pub struct GcReport {
    /// Whether things were done, as opposed to looked at.
    pub execute: bool,
    /// When it began; what has expired had done so by then.
    pub started_at: Timestamp,
    /// Days between suspension and destruction.
    pub grace_days: u32,
    /// Creates, destroys and suspensions whose process died.
    pub recover: GcPhase,
    /// Expired VMs.
    pub suspend: GcPhase,
    /// VMs whose grace is over.
    pub destroy: GcPhase,
    /// Files that dead processes or VMs had left and that are gone now.
    pub cleared: Vec<String>,
    /// Records that cannot be judged, because they are damaged. Each makes the run a failure.
    pub damaged: Vec<GcKept>,
    /// Records that are no candidates.
    pub kept: Vec<GcKept>,
    /// Why the run ended before its end, if it did. That too makes it a failure.
    pub stopped: Option<String>,
}

impl GcReport {
    /// The phases by what they are called.
    pub fn phases(&self) -> impl Iterator<Item = (&'static str, &GcPhase)> {
        [("Recover", &self.recover), ("Suspend", &self.suspend), ("Destroy", &self.destroy)].into_iter()
    }

    /// What failed, one text each. Empty when the run was a success.
    #[must_use]
    pub fn failures(&self) -> Vec<String> {
        let entries = self.phases().flat_map(|(_, phase)| &phase.candidates);
        let failed = entries.filter(|entry| entry.outcome == GcOutcome::Failed);
        failed
            .map(|entry| format!("{}: {}", entry.name, entry.detail))
            .chain(self.damaged.iter().map(|record| record.why.clone()))
            .chain(self.stopped.clone())
            .collect()
    }

    /// The report for people, one text per line. With `verbose`, also what is no candidate and why.
    #[must_use]
    pub fn lines(&self, verbose: bool) -> Vec<String> {
        let mut lines = Vec::new();
        for (title, phase) in self.phases() {
            lines.push(format!("{title}: {} candidates", phase.candidates.len()));
            for GcEntry { name, outcome, detail } in &phase.candidates {
                lines.push(match outcome {
                    GcOutcome::Planned | GcOutcome::Done => format!("  {name}: {detail}"),
                    GcOutcome::Skipped => format!("  {name}: skipped: {detail}"),
                    GcOutcome::Failed => format!("  {name}: failed: {detail}"),
                });
            }
        }
        lines.extend(self.damaged.iter().map(|record| format!("Damaged: {}", record.why)));
        lines.extend(self.cleared.iter().map(|what| format!("Cleared: {what}")));
        if verbose {
            lines.extend(self.kept.iter().map(|record| format!("Kept: {}: {}", record.name, record.why)));
        }
        lines.extend(self.stopped.iter().map(|why| format!("Stopped: {why}")));
        lines.push(if self.execute { self.totals() } else { "Dry run: nothing was changed; --execute does it".into() });
        lines
    }

    fn totals(&self) -> String {
        let mut text = String::from("Done:");
        for (verb, phase) in [("recovered", &self.recover), ("suspended", &self.suspend), ("destroyed", &self.destroy)]
        {
            let _ = write!(text, " {} {verb},", phase.count(GcOutcome::Done));
        }
        let skipped: usize = self.phases().map(|(_, phase)| phase.count(GcOutcome::Skipped)).sum();
        let _ = write!(text, " {skipped} skipped, {} failed", self.failures().len());
        text
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn the_report_has_a_count_per_phase_and_a_line_per_vm() {
        let entry = |name: &str, outcome, detail: &str| GcEntry {
            name: VmName::new(name).unwrap(),
            outcome,
            detail: detail.into(),
        };
        let mut report = GcReport {
            execute: true,
            started_at: "2026-11-21T00:00:00Z".parse().unwrap(),
            grace_days: 7,
            recover: GcPhase::default(),
            suspend: GcPhase {
                candidates: vec![
                    entry("web1", GcOutcome::Done, "shut down and suspended"),
                    entry("web2", GcOutcome::Skipped, "extended"),
                    entry("web3", GcOutcome::Failed, "cannot power off"),
                ],
            },
            destroy: GcPhase::default(),
            cleared: vec!["provisioning.lock".into()],
            damaged: vec![GcKept { name: "odd".into(), why: "the record of VM \"odd\" is damaged".into() }],
            kept: vec![GcKept { name: "web9".into(), why: "paid".into() }],
            stopped: None,
        };
        let text = [
            "Recover: 0 candidates",
            "Suspend: 3 candidates",
            "  web1: shut down and suspended",
            "  web2: skipped: extended",
            "  web3: failed: cannot power off",
            "Destroy: 0 candidates",
            "Damaged: the record of VM \"odd\" is damaged",
            "Cleared: provisioning.lock",
            "Done: 0 recovered, 1 suspended, 0 destroyed, 1 skipped, 2 failed",
        ];
        assert_eq!(report.lines(false), text);
        assert!(report.lines(true).contains(&"Kept: web9: paid".to_owned()));
        assert_eq!(report.failures(), ["web3: cannot power off", "the record of VM \"odd\" is damaged"]);
        report.execute = false;
        assert!(report.lines(false).last().unwrap().starts_with("Dry run"));
    }
}
