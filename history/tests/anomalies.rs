//! Every anomaly is found: written by hand one by one, and by running random transactions on a small database that can be told to
//! break its promises. Where both look at lists, our check and the `adya` crate must agree.

use std::collections::BTreeMap;

use verdict_history::{Fate, Key, List, Recorder, Transaction, appends, appends::Violation, elle, witness};

/// One committed transaction: process, begin, end, reads, appends.
fn one(process: u64, span: (u64, u64), reads: &[(Key, &[u64])], writes: &[(Key, u64)]) -> Transaction<List> {
    Transaction {
        process,
        invoked: span.0,
        completed: Some(span.1),
        fate: Fate::Committed,
        position: None,
        reads: reads.iter().map(|(key, list)| (*key, list.to_vec())).collect(),
        writes: writes.to_vec(),
    }
}

fn violations(history: &[Transaction<List>]) -> Vec<Violation> {
    let violations = appends::check(history).expect_err("there is something wrong with it");
    assert!(elle::check(history).is_err(), "adya finds nothing wrong where we found {violations:?}");
    violations
}

#[track_caller]
fn assert_cycle(history: &[Transaction<List>], says: &str) {
    match violations(history).as_slice() {
        [Violation::Cycle(text)] => assert!(text.contains(says), "{text}"),
        other => panic!("not one cycle: {other:?}"),
    }
}

#[test]
fn a_serial_history_is_valid() {
    let history = [
        one(1, (1, 2), &[], &[(1, 1)]),
        one(2, (3, 4), &[(1, &[1])], &[(1, 2)]),
        one(1, (5, 6), &[(1, &[1, 2])], &[]),
    ];
    let summary = appends::check(&history).expect("a valid history");
    assert_eq!((summary.transactions, summary.unknown), (3, 0));
    assert!(summary.dependencies >= 3, "{summary:?}");
    elle::check(&history).expect("adya agrees");
}

#[test]
fn write_skew_is_a_cycle() {
    let history =
        [one(1, (1, 4), &[(1, &[]), (2, &[])], &[(1, 1)]), one(2, (2, 3), &[(1, &[]), (2, &[])], &[(2, 2)])];
    let seen = one(3, (5, 6), &[(1, &[1]), (2, &[2])], &[]);
    assert_cycle(&[history.to_vec(), vec![seen]].concat(), "did not see");
}

#[test]
fn a_long_fork_is_a_cycle() {
    let history = [
        one(1, (1, 8), &[], &[(1, 1)]),
        one(2, (2, 7), &[], &[(2, 2)]),
        one(3, (3, 6), &[(1, &[1]), (2, &[])], &[]),
        one(4, (4, 5), &[(1, &[]), (2, &[2])], &[]),
        one(5, (9, 10), &[(1, &[1]), (2, &[2])], &[]),
    ];
    assert_cycle(&history, "was seen by");
}

#[test]
fn read_skew_is_a_cycle() {
    let history = [
        one(1, (1, 4), &[], &[(1, 1), (2, 2)]),
        one(2, (2, 3), &[(1, &[1]), (2, &[])], &[]),
        one(3, (5, 6), &[(1, &[1]), (2, &[2])], &[]),
    ];
    assert_cycle(&history, "did not see");
}

#[test]
fn a_stale_read_is_a_cycle_with_real_time() {
    let history =
        [one(1, (1, 2), &[], &[(1, 1)]), one(2, (3, 4), &[(1, &[])], &[]), one(3, (5, 6), &[(1, &[1])], &[])];
    assert_cycle(&history, "had ended before");
}

#[test]
fn a_committed_append_that_is_never_seen_is_a_cycle() {
    // Two appended; the later of the two is lost.
    let history =
        [one(1, (1, 2), &[], &[(1, 1)]), one(1, (3, 4), &[], &[(1, 2)]), one(2, (5, 6), &[(1, &[1])], &[])];
    assert_cycle(&history, "did not see");
}

#[test]
fn an_aborted_append_must_not_be_seen() {
    let mut history = [one(1, (1, 2), &[], &[(1, 1)]), one(2, (3, 4), &[(1, &[1])], &[])];
    history[0].fate = Fate::Aborted;
    assert!(matches!(violations(&history).as_slice(), [Violation::Aborted(_)]));
}

#[test]
fn half_of_what_a_transaction_appended_must_not_be_seen() {
    let history = [
        one(1, (1, 4), &[], &[(1, 1), (1, 2)]),
        one(2, (2, 3), &[(1, &[1])], &[]),
        one(3, (5, 6), &[(1, &[1, 2])], &[]),
    ];
    assert!(matches!(violations(&history).as_slice(), [Violation::Partial(_)]));
}

#[test]
fn an_effect_must_not_be_there_twice() {
    let history = [one(1, (1, 2), &[], &[(1, 1)]), one(2, (3, 4), &[(1, &[1, 1])], &[])];
    assert!(violations(&history).iter().any(|violation| matches!(violation, Violation::Made(_))));
}

#[test]
fn two_orders_of_one_key_are_wrong() {
    let history = [
        one(1, (1, 4), &[], &[(1, 1)]),
        one(2, (2, 3), &[], &[(1, 2)]),
        one(3, (5, 6), &[(1, &[1, 2])], &[]),
        one(4, (5, 7), &[(1, &[2, 1])], &[]),
    ];
    assert!(matches!(violations(&history).as_slice(), [Violation::Order(_)]));
}

#[test]
fn an_unknown_fate_may_be_either() {
    let mut history = vec![one(1, (1, 2), &[], &[(1, 1)]), one(2, (3, 4), &[(1, &[])], &[])];
    (history[0].fate, history[0].completed) = (Fate::Unknown, None);
    assert_eq!(appends::check(&history).expect("it may not have happened").unknown, 0);
    elle::check(&history).expect("adya agrees");
    // It may happen much later than it was sent.
    history.push(one(3, (5, 6), &[(1, &[1])], &[]));
    assert_eq!(appends::check(&history).expect("it happened late").unknown, 1);
    elle::check(&history).expect("adya agrees");
    // But not be undone.
    history.push(one(3, (7, 8), &[(1, &[])], &[]));
    assert_cycle(&history, "T3 did not see T0");
}

/// Balances: process, span, position, reads, adds.
fn bank(span: (u64, u64), position: u64, reads: &[(Key, i128)], writes: &[(Key, i128)]) -> Transaction<i128> {
    Transaction {
        process: span.0,
        invoked: span.0,
        completed: Some(span.1),
        fate: Fate::Committed,
        position: Some(position),
        reads: reads.to_vec(),
        writes: writes.to_vec(),
    }
}

#[test]
fn the_order_that_is_claimed_must_give_what_was_read() {
    let start = BTreeMap::from([(1, 100), (2, 100)]);
    let good = vec![
        bank((1, 4), 10, &[], &[(1, -30), (2, 30)]),
        bank((2, 3), 9, &[(1, 100), (2, 100)], &[]),
        bank((5, 6), 10, &[(1, 70), (2, 130)], &[]),
    ];
    let (summary, end) = witness::check(&start, &good).expect("a valid history");
    assert_eq!((summary.writers, summary.values, end), (1, 4, BTreeMap::from([(1, 70), (2, 130)])));
    let wrong = |change: &dyn Fn(&mut Vec<Transaction<i128>>)| {
        let mut history = good.clone();
        change(&mut history);
        witness::check(&start, &history).expect_err("there is something wrong with it").join("; ")
    };
    assert!(wrong(&|history| history[2].reads[0].1 = 100).contains("but it held 70"));
    // A stale position: it had ended before the read began.
    assert!(
        wrong(&|history| (history[2].position, history[2].reads) = (Some(9), vec![]))
            .contains("had ended before")
    );
    assert!(wrong(&|history| history.push(bank((1, 9), 10, &[], &[(1, 1)]))).contains("one stamp"));
    assert!(wrong(&|history| history[0].fate = Fate::Unknown).contains("nobody has told"));
    assert!(wrong(&|history| history[0].position = None).contains("without a position"));
}

#[test]
fn two_reads_at_one_position_may_come_in_either_order() {
    let history = vec![bank((1, 2), 5, &[(1, 0)], &[]), bank((3, 4), 5, &[(1, 0)], &[])];
    let backwards: Vec<_> = history.iter().rev().cloned().collect();
    witness::check(&BTreeMap::new(), &history).expect("a valid history");
    witness::check(&BTreeMap::new(), &backwards).expect("a valid history");
}

/// SplitMix64 (Steele, Lea, Flood 2014).
struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % bound
    }
}

/// What the small database does wrong.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Broken {
    Nothing,
    /// Reads are of an earlier state.
    Stale,
    /// An aborted transaction leaves its appends.
    Leaks,
    /// A transaction's second append is lost.
    Loses,
}

/// Runs transactions of several processes on one state, each at one moment between its begin and its end.
fn run(seed: u64, broken: Broken) -> Vec<Transaction<List>> {
    let mut random = Random(seed);
    let recorder = Recorder::<List>::default();
    let mut state: BTreeMap<Key, List> = BTreeMap::new();
    let mut past = vec![state.clone()];
    let mut element = 0;
    // For each process: the number of what it has in flight, and whether that has happened.
    let mut running: BTreeMap<u64, (usize, bool)> = BTreeMap::new();
    for step in 0..400 {
        let process = random.below(6);
        match running.get(&process).copied() {
            None if step < 360 => {
                running.insert(process, (recorder.invoke(process, Vec::new()), false));
            }
            None => {}
            Some((number, false)) => {
                let amiss = broken != Broken::Nothing && random.below(4) == 0;
                let seen = match broken {
                    Broken::Stale if amiss => &past[past.len().saturating_sub(4)],
                    _ => &state,
                };
                let keys: Vec<Key> = (0..=random.below(3)).map(|_| random.below(5)).collect();
                let reads: BTreeMap<Key, List> =
                    keys.iter().map(|key| (*key, seen.get(key).cloned().unwrap_or_default())).collect();
                let writes: Vec<(Key, u64)> = (0..random.below(3))
                    .map(|_| {
                        element += 1;
                        (random.below(5), element)
                    })
                    .collect();
                let aborted = random.below(10) == 0;
                for (place, (key, element)) in writes.iter().enumerate() {
                    let kept = !(broken == Broken::Loses && amiss && place == 1);
                    if kept && (!aborted || broken == Broken::Leaks && amiss) {
                        state.entry(*key).or_default().push(*element);
                    }
                }
                past.push(state.clone());
                recorder.read(number, reads.into_iter().collect(), writes);
                running.insert(process, (number, true));
                if aborted {
                    recorder.complete(number, Fate::Aborted, None);
                    running.remove(&process);
                } else if random.below(12) == 0 {
                    // Its answer is lost.
                    running.remove(&process);
                }
            }
            Some((number, true)) => {
                recorder.complete(number, Fate::Committed, None);
                running.remove(&process);
            }
        }
    }
    // A last look at everything.
    let last = recorder.invoke(9, Vec::new());
    recorder.read(last, state.into_iter().collect(), Vec::new());
    recorder.complete(last, Fate::Committed, None);
    recorder.history()
}

#[test]
fn both_checks_agree_about_random_histories() {
    for broken in [Broken::Nothing, Broken::Stale, Broken::Leaks, Broken::Loses] {
        let mut found = 0;
        for seed in 0..60 {
            let history = run(seed, broken);
            let (ours, theirs) = (appends::check(&history), elle::check(&history));
            assert_eq!(ours.is_ok(), theirs.is_ok(), "{broken:?}, seed {seed}: {ours:?}, adya: {theirs:?}");
            found += u32::from(ours.is_err());
        }
        match broken {
            Broken::Nothing => assert_eq!(found, 0),
            _ => assert!(found >= 50, "{broken:?} was found in {found} of 60 histories only"),
        }
    }
}
