//! Progress on stderr: a spinner with the elapsed time on a terminal, plain lines elsewhere.

use std::io::IsTerminal as _;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};
use provisioner_core::progress::Progress;

use crate::output;

/// The progress every command shows on stderr.
pub struct StderrProgress {
    command: &'static str,
    begin: Instant,
    terminal: bool,
    running: Mutex<Option<Running>>,
}

struct Running {
    what: String,
    since: Instant,
    bar: Option<ProgressBar>,
}

impl StderrProgress {
    /// Progress of `command`; nothing is shown before the first phase.
    #[must_use]
    pub fn new(command: &'static str) -> Self {
        Self { command, begin: Instant::now(), terminal: std::io::stderr().is_terminal(), running: Mutex::new(None) }
    }

    /// Replaces the running phase. On a terminal the old one becomes a line with the time it took.
    fn switch(&self, next: Option<Running>) {
        let Ok(mut running) = self.running.lock() else { return };
        if let Some(old) = std::mem::replace(&mut *running, next)
            && let Some(bar) = old.bar
        {
            bar.finish_and_clear();
            output::stderr_line(&format!("  {} ({:.1} s)", old.what, old.since.elapsed().as_secs_f64()));
        }
    }

    fn line(&self, kind: &str, text: &str) {
        let line = format!("{}: {kind}{text}", self.command);
        match self.running.lock().ok().as_deref() {
            Some(Some(Running { bar: Some(bar), .. })) => bar.suspend(|| output::stderr_line(&line)),
            _ => output::stderr_line(&line),
        }
    }
}

impl Progress for StderrProgress {
    fn phase(&self, what: &str) {
        let bar = self.terminal.then(|| {
            let bar = ProgressBar::new_spinner().with_message(what.to_owned());
            if let Ok(style) = ProgressStyle::with_template("{spinner} {msg} {elapsed}") {
                bar.set_style(style);
            }
            bar.enable_steady_tick(Duration::from_millis(120));
            bar
        });
        if bar.is_none() {
            let elapsed = self.begin.elapsed().as_secs_f64();
            output::stderr_line(&format!("{}: [{elapsed:8.3} s] {what}", self.command));
        }
        self.switch(Some(Running { what: what.to_owned(), since: Instant::now(), bar }));
    }

    fn bytes(&self, done: u64, total: Option<u64>) {
        let running = self.running.lock();
        let Ok(Some(Running { bar: Some(bar), .. })) = running.as_deref() else { return };
        if let Some(total) = total
            && bar.length() != Some(total)
        {
            bar.set_length(total);
            let template = "{spinner} {msg} [{bar:30}] {bytes}/{total_bytes} {bytes_per_sec} {eta}";
            if let Ok(style) = ProgressStyle::with_template(template) {
                bar.set_style(style.progress_chars("=> "));
            }
        }
        bar.set_position(done);
    }

    fn note(&self, text: &str) {
        self.line("", text);
    }

    fn warn(&self, text: &str) {
        self.line("warning: ", text);
    }

    fn end(&self) {
        self.switch(None);
    }
}

/// Progress as plain lines on stdout, for the command whose contract has it there. Warnings stay on stderr.
pub struct Plain<P>(pub P);

impl<P: AsRef<dyn Progress> + Send + Sync> Progress for Plain<P> {
    fn phase(&self, what: &str) {
        let _ = output::stdout_lines([what]);
    }
    fn bytes(&self, _done: u64, _total: Option<u64>) {}
    fn note(&self, text: &str) {
        let _ = output::stdout_lines([text]);
    }
    fn warn(&self, text: &str) {
        self.0.as_ref().warn(text);
    }
    fn end(&self) {}
}
