//! The promises that are made to clients (G1 to G8 of the design), checked against what clients were told.
//!
//! [`judge`] is pure. It gets everything that was sent, answered and read while the world was failing, the outcome of every id as the
//! cluster tells it afterwards, and what the rows hold in the end. It runs all committed batches in the order of their stamps through
//! a model that knows no shards, and says what doesn't fit. Whatever the load was, it finds:
//!
//! - G1, G3: rows that don't hold exactly what the committed batches come to, each once;
//! - G2, G4, G6: an answer that doesn't stand, an id without an end, a rejection that isn't true, a commit of what was said not to be
//!   proposed;
//! - G5: a condition or an insert that fails in the order of stamps, a reading that isn't the state at its position, an order of stamps
//!   against the order of real time;
//! - G7: a balance below its floor anywhere in that order.

use std::{
    collections::{BTreeMap, HashMap},
    fmt,
    sync::Arc,
    time::Instant,
};

use verdict_proto::v1::{AbortReason, Aborted, outcome, value};

/// Of each kind of violation so many are told.
const TOLD_MAX: usize = 10;

/// Partition and name of a row.
pub type RowKey = (Arc<str>, Arc<str>);

/// A part of a batch, as the model runs it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Adds to a balance; a debit never leaves it below 0.
    Add(RowKey, i128),
    /// Writes a record that must not exist.
    Insert(RowKey, String),
    /// Writes a record.
    Put(RowKey, String),
    /// Demands that a record holds exactly this.
    Equals(RowKey, String),
}

impl Step {
    /// The row that it is about.
    pub fn row(&self) -> &RowKey {
        match self {
            Step::Add(row, _) | Step::Insert(row, _) | Step::Put(row, _) | Step::Equals(row, _) => row,
        }
    }
}

/// What a row holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Held {
    /// Nothing.
    Absent,
    /// A balance.
    Balance(i128),
    /// A record.
    Record(String),
}

/// A batch that was sent, once or more often under its one id.
#[derive(Clone, Debug)]
pub struct Sent {
    /// When it was sent for the first time.
    pub began: Instant,
    /// What it does.
    pub steps: Vec<Step>,
    /// The first definite answer, and when it came.
    pub answer: Option<(Instant, outcome::Result)>,
    /// It was given up after each time that it was sent was answered with "nothing was proposed": whoever sent it may have settled the
    /// same under another id.
    pub given_up: bool,
}

/// A strict read that was answered.
#[derive(Clone, Debug)]
pub struct Reading {
    /// When it was asked for.
    pub began: Instant,
    /// When it was answered.
    pub ended: Instant,
    /// At which position.
    pub position: u64,
    /// The rows.
    pub rows: Arc<Vec<RowKey>>,
    /// What they held, in the same order.
    pub held: Vec<Held>,
}

/// Everything that clients did and were told.
#[derive(Clone, Debug, Default)]
pub struct Notes {
    /// The batches, by id.
    pub sent: BTreeMap<String, Sent>,
    /// The reads.
    pub readings: Vec<Reading>,
}

/// A promise that was not kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    /// Which one.
    pub promise: &'static str,
    /// What was seen.
    pub what: String,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.promise, self.what)
    }
}

/// Says what doesn't fit. `outcomes` are those of all ids, as told in the end; `last` is what every row of the load holds in the end.
pub fn judge(
    notes: &Notes,
    outcomes: &BTreeMap<String, outcome::Result>,
    last: &BTreeMap<RowKey, Held>,
) -> Vec<Violation> {
    let mut judge = Judge::default();
    judge.answers(notes, outcomes);
    let mut committed: Vec<(u64, &str, &Sent)> = Vec::new();
    for (id, sent) in &notes.sent {
        if let Some(outcome::Result::Committed(told)) = outcomes.get(id) {
            committed.push((told.stamp, id, sent));
        }
    }
    committed.sort_by_key(|(stamp, _, _)| *stamp);
    judge.replay(&committed, &notes.readings, last);
    judge.real_time(&committed, &notes.readings);
    judge.violations
}

#[derive(Default)]
struct Judge {
    violations: Vec<Violation>,
    told: HashMap<(&'static str, &'static str), usize>,
}

impl Judge {
    /// Notes a violation. Of one kind only the first few are kept.
    fn blame(&mut self, promise: &'static str, kind: &'static str, what: impl FnOnce() -> String) {
        let told = self.told.entry((promise, kind)).or_default();
        *told += 1;
        if *told <= TOLD_MAX {
            self.violations.push(Violation { promise, what: format!("{kind}: {}", what()) });
        }
    }

    /// Every answer stands, every id has an end, every rejection is true.
    fn answers(&mut self, notes: &Notes, outcomes: &BTreeMap<String, outcome::Result>) {
        for (id, sent) in &notes.sent {
            let outcome = outcomes.get(id);
            match (&sent.answer, outcome) {
                (Some((_, answer)), Some(outcome)) if answer != outcome => {
                    let kind = match answer {
                        outcome::Result::Committed(_) => "an answered commit doesn't stand",
                        _ => "an answered abort doesn't stand",
                    };
                    self.blame("G2, G4", kind, || format!("{id}: answered {answer:?}, now {outcome:?}"));
                }
                _ => {}
            }
            match outcome {
                None | Some(outcome::Result::Undecided(_)) => {
                    self.blame("G8", "no outcome in the end", || format!("{id}: {outcome:?}"));
                }
                Some(outcome::Result::Aborted(aborted)) => self.rejection(id, sent, aborted),
                Some(outcome::Result::Committed(_)) if sent.given_up => {
                    self.blame("G6", "committed, though nothing was to be proposed", || id.clone());
                }
                Some(outcome::Result::Committed(_)) => {}
            }
        }
    }

    /// What a rejection says of itself must be a reason.
    fn rejection(&mut self, id: &str, sent: &Sent, aborted: &Aborted) {
        let step = aborted.operation.and_then(|place| sent.steps.get(place as usize));
        let met = aborted.met.as_ref().and_then(|met| met.kind.as_ref());
        let is_true = match (aborted.reason(), step, met) {
            (AbortReason::ShortOfFunds, Some(Step::Add(_, delta)), Some(value::Kind::Balance(balance))) => {
                balance.parse::<i128>().is_ok_and(|balance| balance + delta < 0)
            }
            (AbortReason::ShortOfFunds, Some(Step::Add(_, delta)), Some(value::Kind::Absent(_))) => {
                *delta < 0
            }
            (
                AbortReason::ConditionNotMet,
                Some(Step::Equals(_, wanted)),
                Some(value::Kind::Record(record)),
            ) => record[..] != *wanted.as_bytes(),
            (
                AbortReason::Interrupted
                | AbortReason::Cancelled
                | AbortReason::Contention
                | AbortReason::ParticipantUnavailable,
                None,
                None,
            ) => true,
            // An insert that meets its own row was done twice, and nothing else was asked for.
            _ => false,
        };
        if !is_true {
            self.blame("G6", "an untrue rejection", || format!("{id}: {aborted:?} of {:?}", sent.steps));
        }
    }

    /// Runs all committed batches in the order of their stamps.
    fn replay(
        &mut self,
        committed: &[(u64, &str, &Sent)],
        readings: &[Reading],
        last: &BTreeMap<RowKey, Held>,
    ) {
        let mut model = Model::default();
        let mut by_position: Vec<&Reading> = readings.iter().collect();
        by_position.sort_by_key(|reading| reading.position);
        let mut rest = committed.iter().peekable();
        for reading in by_position {
            while let Some((stamp, id, sent)) = rest.next_if(|(stamp, _, _)| *stamp <= reading.position) {
                self.run(&mut model, *stamp, id, sent);
            }
            self.reading(&model, reading);
        }
        for (stamp, id, sent) in rest {
            self.run(&mut model, *stamp, id, sent);
        }
        for (row, held) in last {
            let expected = model.held(row);
            if *held != expected {
                self.blame("G1, G3", "a row doesn't hold what the outcomes come to", || {
                    format!("{row:?}: {held:?} instead of {expected:?}")
                });
            }
        }
    }

    fn run(&mut self, model: &mut Model, stamp: u64, id: &str, sent: &Sent) {
        if stamp <= model.stamp {
            self.blame("G5", "a stamp was given twice", || format!("{id} at {stamp}"));
        }
        model.stamp = stamp;
        for step in &sent.steps {
            let before = model.held(step.row());
            let (promise, fits) = match (step, &before) {
                (Step::Add(_, delta), Held::Balance(balance)) => ("G7", *delta >= 0 || balance + delta >= 0),
                (Step::Add(_, delta), Held::Absent) => ("G7", *delta >= 0),
                (Step::Insert(..), held) => ("G3", *held == Held::Absent),
                (Step::Put(..), held) => ("G5", !matches!(held, Held::Balance(_))),
                (Step::Equals(_, value), Held::Record(record)) => ("G5", record == value),
                (Step::Add(_, _) | Step::Equals(_, _), _) => ("G5", false),
            };
            if !fits {
                self.blame(promise, "a committed batch doesn't fit where it stands", || {
                    format!("{id} at {stamp}: {step:?} meets {before:?}")
                });
            }
            model.take(step, before);
        }
    }

    fn reading(&mut self, model: &Model, reading: &Reading) {
        let pairs = reading.rows.iter().zip(&reading.held);
        for (row, held) in pairs {
            let expected = model.held(row);
            if *held != expected {
                self.blame("G5", "a reading isn't the state at its position", || {
                    format!("{row:?} at {}: {held:?} instead of {expected:?}", reading.position)
                });
            }
        }
    }

    /// What ended before something else began stands before it: stamps and positions follow real time.
    fn real_time(&mut self, committed: &[(u64, &str, &Sent)], readings: &[Reading]) {
        struct Span<'a> {
            began: Instant,
            ended: Option<Instant>,
            at: u64,
            batch: Option<&'a str>,
        }
        let batches = committed.iter().map(|(stamp, id, sent)| Span {
            began: sent.began,
            ended: sent.answer.as_ref().map(|(at, _)| *at),
            at: *stamp,
            batch: Some(id),
        });
        let reads = readings.iter().map(|reading| Span {
            began: reading.began,
            ended: Some(reading.ended),
            at: reading.position,
            batch: None,
        });
        let mut by_begin: Vec<Span<'_>> = batches.chain(reads).collect();
        by_begin.sort_by_key(|span| span.began);
        let mut by_end: Vec<(Instant, u64)> =
            by_begin.iter().filter_map(|span| Some((span.ended?, span.at))).collect();
        by_end.sort();
        let (mut ended, mut seen) = (by_end.into_iter().peekable(), 0);
        for span in &by_begin {
            while let Some((_, at)) = ended.next_if(|(end, _)| *end < span.began) {
                seen = seen.max(at);
            }
            // A read may have the position of what was answered before; a batch comes after it.
            match span.batch {
                Some(id) if span.at <= seen => {
                    self.blame("G5", "a stamp against real time", || {
                        format!("{id} at {}, though {seen} was answered before it was sent", span.at)
                    });
                }
                None if span.at < seen => {
                    self.blame("G5", "a stale read", || {
                        format!("at {}, though {seen} was answered before", span.at)
                    });
                }
                _ => {}
            }
        }
    }
}

/// All rows at one stamp.
#[derive(Default)]
struct Model {
    stamp: u64,
    rows: HashMap<RowKey, Held>,
}

impl Model {
    fn held(&self, row: &RowKey) -> Held {
        self.rows.get(row).cloned().unwrap_or(Held::Absent)
    }

    fn take(&mut self, step: &Step, before: Held) {
        let after = match (step, before) {
            (Step::Add(_, delta), Held::Balance(balance)) => Held::Balance(balance + delta),
            (Step::Add(_, delta), _) => Held::Balance(*delta),
            (Step::Insert(_, value) | Step::Put(_, value), _) => Held::Record(value.clone()),
            (Step::Equals(..), before) => before,
        };
        if after != Held::Absent {
            self.rows.insert(step.row().clone(), after);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use verdict_proto::v1;

    use super::*;

    fn row(name: &str) -> RowKey {
        (name.into(), "USD".into())
    }

    fn committed(stamp: u64) -> outcome::Result {
        outcome::Result::Committed(v1::Committed { stamp })
    }

    fn rejected(reason: AbortReason, met: Option<value::Kind>) -> outcome::Result {
        let operation = met.as_ref().map(|_| 0);
        let met = met.map(|kind| v1::Value { kind: Some(kind) });
        outcome::Result::Aborted(Aborted { reason: reason.into(), operation, met, message: String::new() })
    }

    /// A small world, in which everything is right until a test spoils it.
    struct World {
        start: Instant,
        notes: Notes,
        outcomes: BTreeMap<String, outcome::Result>,
        last: BTreeMap<RowKey, Held>,
    }

    impl World {
        fn new() -> World {
            let mut world = World {
                start: Instant::now(),
                notes: Notes::default(),
                outcomes: BTreeMap::new(),
                last: BTreeMap::new(),
            };
            world.batch("fund", (0, 1), vec![Step::Add(row("a"), 10)], committed(1));
            let steps = vec![
                Step::Add(row("a"), -7),
                Step::Add(row("b"), 7),
                Step::Insert(row("trade"), "x".to_owned()),
            ];
            world.batch("move", (2, 3), steps, committed(2));
            world.read((4, 5), 2, &[("a", 3), ("b", 7)]);
            world.last = [("a", 3), ("b", 7)].map(|(name, amount)| (row(name), Held::Balance(amount))).into();
            world.last.insert(row("trade"), Held::Record("x".to_owned()));
            world
        }

        fn at(&self, second: u64) -> Instant {
            self.start + Duration::from_secs(second)
        }

        fn batch(
            &mut self,
            id: &str,
            (began, ended): (u64, u64),
            steps: Vec<Step>,
            outcome: outcome::Result,
        ) {
            let answer = Some((self.at(ended), outcome.clone()));
            self.notes
                .sent
                .insert(id.to_owned(), Sent { began: self.at(began), steps, answer, given_up: false });
            self.outcomes.insert(id.to_owned(), outcome);
        }

        fn read(&mut self, (began, ended): (u64, u64), position: u64, held: &[(&str, i128)]) {
            self.notes.readings.push(Reading {
                began: self.at(began),
                ended: self.at(ended),
                position,
                rows: Arc::new(held.iter().map(|(name, _)| row(name)).collect()),
                held: held.iter().map(|(_, amount)| Held::Balance(*amount)).collect(),
            });
        }

        fn blamed(&self) -> Vec<&'static str> {
            judge(&self.notes, &self.outcomes, &self.last).iter().map(|violation| violation.promise).collect()
        }
    }

    #[test]
    fn nothing_is_blamed_where_all_is_right() {
        let mut world = World::new();
        let short = rejected(AbortReason::ShortOfFunds, Some(value::Kind::Balance("3".to_owned())));
        world.batch("short", (6, 7), vec![Step::Add(row("a"), -4), Step::Add(row("b"), 4)], short);
        // Nobody heard of this one, and it is committed all the same: before or after the reading.
        world.batch("unheard", (3, 4), vec![Step::Add(row("b"), 1)], committed(3));
        world.notes.sent.get_mut("unheard").unwrap().answer = None;
        world.last.insert(row("b"), Held::Balance(8));
        assert_eq!(world.blamed(), Vec::<&str>::new());
    }

    #[test]
    fn an_answer_that_does_not_stand_is_blamed() {
        let mut world = World::new();
        world.outcomes.insert("move".to_owned(), rejected(AbortReason::Interrupted, None));
        assert_eq!(world.blamed()[0], "G2, G4");
        world.outcomes.remove("move");
        assert_eq!(world.blamed()[0], "G8");
    }

    #[test]
    fn a_commit_of_what_was_said_not_to_be_proposed_is_blamed() {
        let mut world = World::new();
        let sent = world.notes.sent.get_mut("move").unwrap();
        (sent.answer, sent.given_up) = (None, true);
        assert_eq!(world.blamed(), ["G6"]);
        world.outcomes.insert("move".to_owned(), rejected(AbortReason::Cancelled, None));
        world.notes.readings.clear();
        world.last = [(row("a"), Held::Balance(10))].into();
        assert_eq!(world.blamed(), Vec::<&str>::new(), "cancelled afterwards");
    }

    #[test]
    fn an_effect_that_came_twice_or_not_at_all_is_blamed() {
        let mut world = World::new();
        world.last.insert(row("b"), Held::Balance(14));
        assert_eq!(world.blamed(), ["G1, G3"]);
        let mut world = World::new();
        world.last.insert(row("trade"), Held::Absent);
        assert_eq!(world.blamed(), ["G1, G3"]);
        let mut world = World::new();
        let again = rejected(AbortReason::RowExists, Some(value::Kind::Record(bytes::Bytes::new())));
        world.batch("again", (6, 7), vec![Step::Insert(row("other"), "x".to_owned())], again);
        assert_eq!(world.blamed(), ["G6"], "nobody but itself could have inserted it");
    }

    #[test]
    fn an_overdraft_is_blamed_even_if_it_was_mended_later() {
        let mut world = World::new();
        world.batch("over", (6, 7), vec![Step::Add(row("a"), -4), Step::Add(row("b"), 4)], committed(3));
        world.batch("back", (8, 9), vec![Step::Add(row("a"), 4), Step::Add(row("b"), -4)], committed(4));
        assert_eq!(world.blamed(), ["G7"]);
    }

    #[test]
    fn an_untrue_rejection_is_blamed() {
        let mut world = World::new();
        let short = rejected(AbortReason::ShortOfFunds, Some(value::Kind::Balance("5".to_owned())));
        world.batch("short", (6, 7), vec![Step::Add(row("a"), -4)], short);
        assert_eq!(world.blamed(), ["G6"]);
    }

    #[test]
    fn a_lost_update_is_blamed() {
        let mut world = World::new();
        let count = |from: &str, to: &str| {
            vec![Step::Equals(row("trade"), from.to_owned()), Step::Put(row("trade"), to.to_owned())]
        };
        world.batch("one", (6, 7), count("x", "y"), committed(3));
        world.batch("two", (6, 7), count("x", "z"), committed(4));
        world.last.insert(row("trade"), Held::Record("z".to_owned()));
        assert_eq!(world.blamed(), ["G5"]);
    }

    #[test]
    fn a_torn_reading_and_a_stale_one_are_blamed() {
        let mut world = World::new();
        world.read((6, 7), 2, &[("a", 3), ("b", 0)]);
        assert_eq!(world.blamed(), ["G5"]);
        let mut world = World::new();
        world.read((6, 7), 1, &[("a", 10)]);
        assert_eq!(world.blamed(), ["G5"], "2 was answered before it began");
    }

    #[test]
    fn stamps_against_real_time_are_blamed() {
        let mut world = World::new();
        world.batch("late", (6, 7), vec![Step::Add(row("b"), 0)], committed(9));
        world.batch("later", (8, 9), vec![Step::Add(row("b"), 0)], committed(4));
        assert_eq!(world.blamed(), ["G5"]);
        let mut world = World::new();
        world.batch("below", (6, 7), vec![Step::Add(row("c"), 0)], committed(2));
        world.last.insert(row("c"), Held::Balance(0));
        assert_eq!(world.blamed(), ["G5", "G5"], "the stamp was given before, and a read was above it");
    }
}
