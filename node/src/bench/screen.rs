//! What a bench shows while it runs: a line that moves on a terminal, and a line for everything that has ended. All goes to
//! stderr, so that stdout is the result alone.

use std::{io::IsTerminal as _, time::Duration};

use indicatif::{ProgressBar, ProgressStyle};

use super::report::Round;

/// The screen. Shared by reference.
#[derive(Debug)]
pub struct Screen {
    /// None where stderr is no terminal.
    bar: Option<ProgressBar>,
}

impl Screen {
    /// One with nothing on it.
    pub fn new() -> Screen {
        let style = ProgressStyle::with_template("{prefix} [{wide_bar}] {msg}")
            .expect("the template is right")
            .progress_chars("=> ");
        let bar = std::io::stderr().is_terminal().then(|| ProgressBar::new(0).with_style(style));
        Screen { bar }
    }

    /// From now on it is about this.
    pub fn about(&self, what: &str) {
        if let Some(bar) = &self.bar {
            bar.set_prefix(what.to_owned());
        }
    }

    /// Shows how far it has come.
    pub fn tick(&self, what: &str, elapsed: Duration, span: Duration, rate: f64) {
        if let Some(bar) = &self.bar {
            bar.set_length(span.as_millis() as u64);
            bar.set_position(elapsed.as_millis() as u64);
            bar.set_message(format!("{what} {rate:.0}/s"));
        }
    }

    /// Tells what came of a round.
    pub fn round(&self, what: &str, round: &Round) {
        self.say(&format!(
            "{what}: {:.0} trades/s, p50 {:.2} ms, p99 {:.2} ms",
            round.trades_per_second, round.p50_ms, round.p99_ms
        ));
    }

    /// Shows a line.
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

impl Default for Screen {
    fn default() -> Self {
        Screen::new()
    }
}
