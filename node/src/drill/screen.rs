//! What a drill shows while it runs: a line that moves on a terminal, a plain line every two seconds elsewhere, and a line for
//! everything that is done. All goes to stderr.

use std::{
    io::IsTerminal as _,
    sync::{
        Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use indicatif::{ProgressBar, ProgressStyle};

use super::record::{Attempt, Said};

/// Plain lines come so often.
const LINE_INTERVAL: Duration = Duration::from_secs(2);

/// The screen. Shared by reference: all that changes is inside.
#[derive(Debug)]
pub struct Screen {
    total: Duration,
    committed: AtomicU64,
    aborted: AtomicU64,
    unknown: AtomicU64,
    /// None where stderr is no terminal.
    bar: Option<ProgressBar>,
    shown: Mutex<(Instant, u64)>,
}

impl Screen {
    /// A screen for a load that runs for so long.
    pub fn new(total: Duration) -> Screen {
        let style = ProgressStyle::with_template("{prefix} [{wide_bar}] {msg}")
            .expect("the template is right")
            .progress_chars("=> ");
        let bar = std::io::stderr().is_terminal().then(|| ProgressBar::new(total.as_millis() as u64));
        let bar = bar.map(|bar| bar.with_style(style));
        let (committed, aborted, unknown) = Default::default();
        Screen { total, committed, aborted, unknown, bar, shown: Mutex::new((Instant::now(), 0)) }
    }

    /// Counts a batch.
    pub fn count(&self, attempt: &Attempt) {
        if attempt.was_unknown() {
            self.unknown.fetch_add(1, Ordering::Relaxed);
        }
        let counter = match attempt.end().map(|end| &end.said) {
            Some(Said::Committed(_)) => &self.committed,
            Some(_) => &self.aborted,
            None => return,
        };
        counter.fetch_add(1, Ordering::Relaxed);
    }

    /// Shows how far the load has come.
    pub fn tick(&self, elapsed: f64) {
        let [committed, aborted, unknown] =
            [&self.committed, &self.aborted, &self.unknown].map(|counter| counter.load(Ordering::Relaxed));
        let text = format!("{committed} committed, {aborted} aborted, {unknown} unknown");
        let total = self.total.as_secs();
        if let Some(bar) = &self.bar {
            bar.set_position((elapsed * 1000.0) as u64);
            bar.set_prefix(format!("{elapsed:>4.0}/{total} s"));
            bar.set_message(text);
            return;
        }
        let mut shown = self.shown.lock().expect("nothing panics while it holds this lock");
        let span = shown.0.elapsed();
        if span >= LINE_INTERVAL {
            let rate = (committed - shown.1) as f64 / span.as_secs_f64();
            *shown = (Instant::now(), committed);
            crate::err!("{elapsed:>6.1} s  {text}, {rate:.0}/s");
        }
    }

    /// Shows a line about something that happened.
    pub fn say(&self, line: &str) {
        match &self.bar {
            Some(bar) => bar.suspend(|| crate::err!("{line}")),
            None => crate::err!("{line}"),
        }
    }

    /// Removes the line that moves.
    pub fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
