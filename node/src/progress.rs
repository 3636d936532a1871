//! Shows how far a run has come: a bar on a terminal, a plain line every two seconds elsewhere. Both go to stderr, so that
//! stdout is the result alone.

use std::{
    io::IsTerminal as _,
    sync::{
        Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use indicatif::{ProgressBar, ProgressStyle};

/// Plain lines come so often.
const LINE_INTERVAL: Duration = Duration::from_secs(2);
/// The rate that is shown is that of so much time.
const RATE_SPAN: Duration = Duration::from_secs(1);

/// How far a run has come. Shared by reference: all that changes is inside.
#[derive(Debug)]
pub struct Progress {
    label: String,
    total: u64,
    committed: AtomicU64,
    aborted: AtomicU64,
    /// None where stderr is no terminal.
    bar: Option<ProgressBar>,
    shown: Mutex<Shown>,
}

#[derive(Debug)]
struct Shown {
    line_at: Instant,
    rate_at: Instant,
    rate_from: u64,
    rate: f64,
}

impl Progress {
    /// Progress of `total` batches.
    pub fn new(label: &str, total: u64) -> Progress {
        let style = ProgressStyle::with_template("{prefix:>10} [{wide_bar}] {pos}/{len} {msg}")
            .expect("the template is right")
            .progress_chars("=> ");
        let bar = std::io::stderr()
            .is_terminal()
            .then(|| ProgressBar::new(total).with_style(style).with_prefix(label.to_owned()));
        let now = Instant::now();
        let shown = Shown { line_at: now, rate_at: now, rate_from: 0, rate: 0.0 };
        let (committed, aborted) = Default::default();
        Progress { label: label.to_owned(), total, committed, aborted, bar, shown: Mutex::new(shown) }
    }

    /// Counts a batch that is over.
    pub fn count(&self, committed: bool) {
        let counter = if committed { &self.committed } else { &self.aborted };
        counter.fetch_add(1, Ordering::Relaxed);
    }

    /// Counts so many that are done at once.
    pub fn advance(&self, count: u64) {
        self.committed.fetch_add(count, Ordering::Relaxed);
    }

    /// How many batches are over.
    pub fn done(&self) -> u64 {
        self.committed.load(Ordering::Relaxed) + self.aborted.load(Ordering::Relaxed)
    }

    /// Shows the present state, if it is time. To be called several times a second.
    pub fn tick(&self) {
        let (committed, aborted) =
            (self.committed.load(Ordering::Relaxed), self.aborted.load(Ordering::Relaxed));
        let mut shown = self.shown.lock().expect("nothing panics while it holds this lock");
        let span = shown.rate_at.elapsed();
        if span >= RATE_SPAN {
            let now = self.done();
            shown.rate = (now - shown.rate_from) as f64 / span.as_secs_f64();
            (shown.rate_at, shown.rate_from) = (Instant::now(), now);
        }
        let text = format!("committed {committed}, aborted {aborted}, {:.0}/s", shown.rate);
        if let Some(bar) = &self.bar {
            bar.set_position(committed + aborted);
            // Short: with the bar it must fit a line of 80 columns.
            bar.set_message(format!("{aborted} aborted, {:.0}/s", shown.rate));
        } else if shown.line_at.elapsed() >= LINE_INTERVAL {
            shown.line_at = Instant::now();
            crate::err!("{:>10} {}/{} {text}", self.label, committed + aborted, self.total);
        }
    }

    /// Shows a line about something that happened, above the bar.
    pub fn say(&self, line: &str) {
        match &self.bar {
            Some(bar) => bar.suspend(|| crate::err!("{line}")),
            None => crate::err!("{line}"),
        }
    }

    /// Removes the bar.
    pub fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
