//! Runs plans, one or very many.

use std::{
    any::Any,
    panic::{AssertUnwindSafe, catch_unwind},
};

use crate::{
    faults::{COUNT, KINDS, Tally},
    plan::Plan,
    trace::Trace,
    witness::Violation,
    world::{Report, World},
};

/// Runs a plan. A panic, which is an assertion of the machines or of the model of Raft that failed, is a violation like others.
pub fn run(plan: &Plan, trace: Trace) -> Report {
    let mut world = World::new(plan.clone(), trace);
    let ended = catch_unwind(AssertUnwindSafe(|| world.run()));
    let mut report = world.report();
    if let Err(panic) = ended {
        let text = panic_text(panic.as_ref());
        report.violation = Some(Violation { invariant: "assertion".to_owned(), text, at: 0 });
    }
    report
}

fn panic_text(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().cloned();
    text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned())).unwrap_or_default()
}

/// The sum of many runs.
#[derive(Clone, Debug)]
pub struct Sum {
    /// Runs.
    pub seeds: u64,
    /// Events.
    pub steps: u64,
    /// Batches: committed, rejected, aborted otherwise.
    pub outcomes: [u64; 3],
    /// Reads that were answered.
    pub reads: u64,
    /// The longest recovery, in microseconds, and its seed.
    pub recovery: (u64, u64),
    /// All recoveries together.
    pub recoveries: u64,
    /// Faults, all together.
    pub faults: Tally,
    /// Faults of each kind in the run that had the fewest.
    pub fewest: Tally,
    /// Runs in which a kind happened.
    pub with: Tally,
    /// The fewest faults of a run, and its seed.
    pub mildest: (u64, u64),
    /// All hashes together, in any order.
    pub hash: u64,
    /// Runs with a violation.
    pub failed: Vec<Report>,
}

impl Default for Sum {
    fn default() -> Sum {
        Sum {
            seeds: 0,
            steps: 0,
            outcomes: [0; 3],
            reads: 0,
            recovery: (0, 0),
            recoveries: 0,
            faults: Tally::default(),
            fewest: Tally([u64::MAX; COUNT]),
            with: Tally::default(),
            mildest: (u64::MAX, 0),
            hash: 0,
            failed: Vec::new(),
        }
    }
}

impl Sum {
    /// Adds a run.
    pub fn add(&mut self, report: Report) {
        self.seeds += 1;
        self.steps += report.steps;
        for (sum, count) in self.outcomes.iter_mut().zip(report.outcomes) {
            *sum += count;
        }
        self.reads += report.reads;
        self.recovery = self.recovery.max((report.recovery, report.seed));
        self.recoveries += report.recovery;
        for (kind, count) in report.tally.0.iter().enumerate() {
            self.faults.0[kind] += count;
            self.fewest.0[kind] = self.fewest.0[kind].min(*count);
            self.with.0[kind] += u64::from(*count > 0);
        }
        self.hash = self.hash.wrapping_add(report.hash);
        if report.violation.is_some() {
            self.failed.push(report);
        } else {
            self.mildest = self.mildest.min((report.tally.total(), report.seed));
        }
    }

    /// Adds many.
    pub fn join(&mut self, other: Sum) {
        self.seeds += other.seeds;
        self.steps += other.steps;
        for (sum, count) in self.outcomes.iter_mut().zip(other.outcomes) {
            *sum += count;
        }
        self.reads += other.reads;
        self.recovery = self.recovery.max(other.recovery);
        self.recoveries += other.recoveries;
        for kind in 0..COUNT {
            self.faults.0[kind] += other.faults.0[kind];
            self.fewest.0[kind] = self.fewest.0[kind].min(other.fewest.0[kind]);
            self.with.0[kind] += other.with.0[kind];
        }
        self.mildest = self.mildest.min(other.mildest);
        self.hash = self.hash.wrapping_add(other.hash);
        self.failed.extend(other.failed);
    }

    /// For people.
    pub fn show(&self, seconds: f64) -> String {
        let seeds = self.seeds.max(1);
        let hour = self.seeds as f64 / seconds * 3600.0;
        let [committed, rejected, aborted] = self.outcomes;
        let mut text = format!(
            "seeds                {} in {seconds:.1} s, {hour:.0} an hour\n\
             events               {} ({} a seed)\n\
             batches              {committed} committed, {rejected} rejected, {aborted} aborted\n\
             reads                {}\n\
             faults               {} ({} a seed; the fewest: {} in seed {})\n\
             recovery             mean {:.2} s, longest {:.2} s in seed {}\n\
             hash of all traces   {:016x}\n\n\
             {:<46}{:>12}{:>10}{:>8}{:>12}\n",
            self.seeds,
            self.steps,
            self.steps / seeds,
            self.reads,
            self.faults.total(),
            self.faults.total() / seeds,
            self.mildest.0,
            self.mildest.1,
            self.recoveries as f64 / seeds as f64 / 1e6,
            self.recovery.0 as f64 / 1e6,
            self.recovery.1,
            self.hash,
            "faults that happened",
            "total",
            "a seed",
            "fewest",
            "in seeds",
        );
        for (place, (_, name)) in KINDS.iter().enumerate() {
            let total = self.faults.0[place];
            let mean = total as f64 / seeds as f64;
            let (fewest, with) = (self.fewest.0[place], self.with.0[place]);
            let fewest = if self.seeds == 0 { 0 } else { fewest };
            text += &format!("{name:<46}{total:>12}{mean:>10.2}{fewest:>8}{with:>12}\n");
        }
        text
    }
}
