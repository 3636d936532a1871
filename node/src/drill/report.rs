//! What a drill tells in the end. Written as JSON it is this, field by field (docs/operations.md lists them).

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// The form of the JSON: changed when a field changes its meaning or goes.
pub const FORMAT: u32 = 1;

/// The report. Times are in seconds since the load began.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
pub struct Report {
    /// The form of this JSON.
    pub format: u32,
    /// The program's version.
    pub version: String,
    /// When the load began, as `2026-11-21 12:30:00 UTC`.
    pub began: String,
    /// The scenario's name.
    pub scenario: String,
    /// Its title.
    pub title: String,
    /// What it shows.
    pub about: String,
    /// What it ran on.
    pub cluster: String,
    /// Nodes of the cluster.
    pub nodes: u64,
    /// Shards of the cluster.
    pub shards: u32,
    /// Whether no promise was violated.
    pub held: bool,
    /// The load.
    pub load: LoadReport,
    /// What was done to the cluster, in order.
    pub events: Vec<EventReport>,
    /// G1 to G10.
    pub promises: Vec<Promise>,
    /// How it went over time.
    pub series: Series,
}

/// The load.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
pub struct LoadReport {
    /// How long new batches were started.
    pub seconds: f64,
    /// Trades per second that were wanted; 0: as fast as the answers came.
    pub rate: u32,
    /// Batches in flight, at most.
    pub window: usize,
    /// Clients, each with a stream of its own.
    pub clients: usize,
    /// The seed of the tape.
    pub seed: u64,
    /// Batches.
    pub batches: u64,
    /// What became of them.
    pub outcomes: Outcomes,
    /// Committed batches per second.
    pub per_second: f64,
    /// Until the definite answer: the median, in milliseconds.
    pub p50_ms: f64,
    /// One of a hundred took longer, in milliseconds.
    pub p99_ms: f64,
    /// The longest, in milliseconds.
    pub max_ms: f64,
    /// Reads of all balances that were answered.
    pub reads: u64,
    /// Reads without an answer in time.
    pub reads_unanswered: u64,
    /// The greatest memory of one node, in bytes, where it can be told.
    pub memory_max: Option<u64>,
    /// How long after the load everything was finished: no part in doubt, no row held.
    pub quiet_seconds: f64,
}

/// Batches by what became of them.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
pub struct Outcomes {
    /// Committed.
    pub committed: u64,
    /// Aborted, by reason.
    pub aborted: BTreeMap<String, u64>,
    /// Of all: those whose answer was UNKNOWN at first.
    pub unknown: u64,
    /// Of the unknown ones: committed, as their id told.
    pub unknown_committed: u64,
    /// Of the unknown ones: aborted, as their id told.
    pub unknown_aborted: u64,
    /// Of the unknown ones: there was no trace of the id, and it was submitted again under the same id.
    pub unknown_never_seen: u64,
    /// Answers that were lost on the way and asked for again by the client, under the same id.
    pub answers_lost: u64,
    /// Refusals before anything was proposed; the same id was submitted again.
    pub refused: u64,
    /// Without a definite outcome in the end.
    pub unresolved: u64,
}

/// What was done, and what followed.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
pub struct EventReport {
    /// When it began.
    pub at: f64,
    /// When it was done.
    pub done_at: f64,
    /// As it stands in the scenario.
    pub step: String,
    /// What was really done.
    pub what: String,
    /// `fault`, `repair` or `wait`.
    pub kind: String,
    /// The nodes that could not take part after it: dead, paused, cut off.
    pub impaired: Vec<u64>,
    /// Groups that had no majority after it.
    pub without_majority: Vec<u32>,
    /// The longest stretch without a commit that touches the time from this event to the next one, counted from this event.
    pub without_commits_seconds: f64,
    /// When that ended, if it did while the load ran.
    pub commits_again_at: Option<f64>,
    /// From this event until nothing was in doubt any more that was so before commits went on.
    pub resolved_seconds: Option<f64>,
    /// The same, counted from when every group had a majority (again).
    pub resolved_after_majority_seconds: Option<f64>,
    /// Batches that came to their end between this event and the next.
    pub outcomes: Outcomes,
}

/// A promise and what was seen of it.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Promise {
    /// `G1` to `G10`.
    pub id: String,
    /// Its name.
    pub name: String,
    /// What it says, in short.
    pub says: String,
    /// The verdict.
    pub verdict: Verdict,
    /// What was checked.
    pub checks: Vec<Check>,
    /// What else to know: what was not exercised, for example.
    pub notes: Vec<String>,
}

/// A verdict on a promise.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// All that was checked is right.
    Held,
    /// Something that was checked is wrong.
    Violated,
    /// This scenario, or this run of it, says nothing about it.
    NotExercised,
}

/// One thing that was checked.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
pub struct Check {
    /// What.
    pub what: String,
    /// How many cases.
    pub checked: u64,
    /// How many of them are wrong.
    pub wrong: u64,
    /// The first of these.
    pub examples: Vec<String>,
}

/// How it went over time, in steps of equal length.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
pub struct Series {
    /// The length of a step.
    pub step_seconds: f64,
    /// Batches committed in each step.
    pub committed: Vec<u32>,
    /// Batches aborted in each step.
    pub aborted: Vec<u32>,
    /// UNKNOWN answers in each step.
    pub unknown: Vec<u32>,
    /// The median latency of those that came to their end in the step, in milliseconds; none if none did.
    pub p50_ms: Vec<Option<f64>>,
    /// The latency that one of a hundred exceeded.
    pub p99_ms: Vec<Option<f64>>,
    /// Parts in doubt or in line on the leaders of the shards, the most in the step; none if nobody told.
    pub parts: Vec<Option<u32>>,
}

/// The most examples of a check.
const EXAMPLES_MAX: usize = 5;

impl Check {
    /// Nothing was checked yet.
    pub fn new(what: impl Into<String>) -> Check {
        Check { what: what.into(), ..Check::default() }
    }

    /// Notes one case.
    pub fn see(&mut self, right: bool, example: impl FnOnce() -> String) {
        self.checked += 1;
        if !right {
            self.wrong += 1;
            if self.examples.len() < EXAMPLES_MAX {
                self.examples.push(example());
            }
        }
    }
}

impl Promise {
    /// The verdict follows from the checks.
    pub fn new(id: &str, name: &str, says: &str, checks: Vec<Check>, notes: Vec<String>) -> Promise {
        let verdict = if checks.iter().any(|check| check.wrong > 0) {
            Verdict::Violated
        } else if checks.iter().any(|check| check.checked > 0) {
            Verdict::Held
        } else {
            Verdict::NotExercised
        };
        Promise { id: id.into(), name: name.into(), says: says.into(), verdict, checks, notes }
    }
}

impl Verdict {
    /// For people.
    pub fn name(self) -> &'static str {
        match self {
            Verdict::Held => "held",
            Verdict::Violated => "VIOLATED",
            Verdict::NotExercised => "not exercised",
        }
    }
}

impl Outcomes {
    /// All that are aborted.
    pub fn aborted_sum(&self) -> u64 {
        self.aborted.values().sum()
    }

    /// In words, such as `812 committed, 3 aborted (INTERRUPTED 3)`.
    pub fn in_words(&self) -> String {
        let reasons: Vec<String> =
            self.aborted.iter().map(|(reason, count)| format!("{reason} {count}")).collect();
        let mut text = format!("{} committed, {} aborted", self.committed, self.aborted_sum());
        if !reasons.is_empty() {
            text += &format!(" ({})", reasons.join(", "));
        }
        text
    }
}
