//! The cases: what is checked.
//!
//! The small ones together take seconds and run with the tests; each looks at one thing. The full ones let more happen at once, and
//! the huge ones so much that they were never run to their ends.

use crate::case::{ANY, Bounds, Case, Size};

const NONE: Bounds =
    Bounds { elections: 0, repeats: 0, ticks: 0, moves: 0, asks: 0, retries: 0, seals: 0, reads: 0 };

/// All cases, small ones first.
pub fn all() -> Vec<Case> {
    let mut cases = small();
    cases.extend(full());
    cases.extend(huge());
    cases
}

/// A trade on two shards.
const TRADE: &[(char, &str)] = &[('A', "add a@1 -10; add b@2 10")];
/// Two trades, of whose debits only the one that may overdraw surely fits.
const TWO_DEBITS: &[(char, &str)] =
    &[('A', "add a@1 -7 floor -9; add b@2 7"), ('B', "add a@1 -7; add c@2 7")];
/// One brings in what the other one wants to spend, on both shards.
const SPENDING: &[(char, &str)] = &[('A', "add a@1 5; add b@2 -5"), ('B', "add a@1 -12; add b@2 12")];
/// Two settle the same trade, in different orders of the shards.
const SAME_RECORD: &[(char, &str)] =
    &[('A', "insert t@1/r A; add b@2 -3"), ('B', "add b@2 -4; insert t@1/r B")];
/// Two share a condition that a third thing, their own writes, would change.
const SHARED: &[(char, &str)] =
    &[('A', "absent t@1/r; put u@2/r A"), ('B', "absent t@1/r; absent u@2/r; add b@2 1")];
/// A condition on one shard lets a write on the other happen; the other way round too: write skew, if it were let.
const SKEW: &[(char, &str)] = &[('A', "atleast a@1 5; add b@2 -5"), ('B', "atleast b@2 5; add a@1 -5")];
/// One id, two contents.
const TWO_CONTENTS: &[(char, &str)] = &[('A', "add a@1 -10; add b@2 10"), ('A', "add a@1 -3")];

fn small() -> Vec<Case> {
    vec![
        Case {
            name: "trade",
            about: "one trade; a change of leaders, one message repeated",
            before: "add a@1 10",
            batches: TRADE,
            bounds: Bounds { elections: 1, repeats: 1, ..NONE },
            ..Case::PLAIN
        },
        Case {
            name: "trade-repeats",
            about: "one trade; two changes of leaders, every message again and again",
            before: "add a@1 10",
            batches: TRADE,
            bounds: Bounds { elections: 2, repeats: ANY, ..NONE },
            deposed: false,
            prompt: true,
            ..Case::PLAIN
        },
        Case {
            name: "trade-time",
            about: "one trade; a change of leaders, a clock that moves",
            before: "add a@1 10",
            batches: TRADE,
            bounds: Bounds { elections: 1, ticks: 1, ..NONE },
            deposed: false,
            prompt: true,
            ..Case::PLAIN
        },
        Case {
            name: "trade-three",
            about: "one batch on three shards; a change of leaders",
            shards: 3,
            before: "add a@1 10",
            batches: &[('A', "add a@1 -10; add b@2 4; add c@3 6")],
            bounds: Bounds { elections: 1, ..NONE },
            deposed: false,
            prompt: true,
            ..Case::PLAIN
        },
        Case {
            name: "room",
            about: "two batches on shards that hold one part each; a change of leaders",
            before: "add a@1 10",
            batches: &[('A', "add a@1 1; add b@2 1"), ('B', "add c@2 1")],
            room: 1,
            bounds: Bounds { elections: 1, ..NONE },
            deposed: false,
            prompt: true,
            ..Case::PLAIN
        },
        Case {
            name: "debits",
            about: "two trades, one balance that bears one of them; no fault",
            before: "add a@1 10",
            batches: TWO_DEBITS,
            bounds: NONE,
            ..Case::PLAIN
        },
        Case {
            name: "spending",
            about: "what an undecided batch brings in can't be spent",
            before: "add a@1 10; add b@2 10",
            batches: SPENDING,
            prompt: true,
            ..Case::PLAIN
        },
        Case {
            name: "record",
            about: "two batches insert one record",
            before: "add b@2 10",
            batches: SAME_RECORD,
            prompt: true,
            ..Case::PLAIN
        },
        Case {
            name: "shared",
            about: "two batches share a condition; one writes what the other one has a condition on",
            batches: SHARED,
            prompt: true,
            ..Case::PLAIN
        },
        Case {
            name: "one-shard",
            about: "two debits on one shard; a change of leaders, a repeated message, a retry",
            shards: 1,
            before: "add a@1 10",
            batches: &[('A', "add a@1 -7"), ('B', "add a@1 -7")],
            bounds: Bounds { elections: 1, retries: 1, ..NONE },
            deposed: false,
            prompt: true,
            ..Case::PLAIN
        },
        Case {
            name: "seal",
            about: "an id is sealed while its batch may be anywhere; a change of leaders",
            before: "add a@1 10",
            batches: TRADE,
            bounds: Bounds { elections: 1, seals: 1, retries: 1, ..NONE },
            deposed: false,
            prompt: true,
            ..Case::PLAIN
        },
        Case {
            name: "contents",
            about: "one id with two contents; a change of leaders",
            before: "add a@1 10",
            batches: TWO_CONTENTS,
            bounds: Bounds { elections: 1, ..NONE },
            deposed: false,
            prompt: true,
            ..Case::PLAIN
        },
        Case {
            name: "read",
            about: "a read across two shards beside a trade",
            before: "add a@1 10",
            batches: TRADE,
            read: "a@1 b@2",
            bounds: Bounds { reads: 1, ..NONE },
            prompt: true,
            ..Case::PLAIN
        },
        Case {
            name: "read-deposed",
            about: "a read on one shard, perhaps of a deposed leader, beside a batch",
            shards: 1,
            before: "add a@1 10",
            batches: &[('A', "add a@1 -7")],
            read: "a@1",
            bounds: Bounds { reads: 1, elections: 1, ..NONE },
            prompt: true,
            ..Case::PLAIN
        },
        Case {
            name: "moves",
            about: "one trade; shards that are led elsewhere, and ask by themselves; a change of leaders",
            before: "add a@1 10",
            batches: TRADE,
            bounds: Bounds { elections: 1, moves: 1, asks: 1, ..NONE },
            deposed: false,
            prompt: true,
            ..Case::PLAIN
        },
        Case {
            name: "forgetful",
            about: "one id with two contents; decisions that are forgotten as soon as they may be",
            before: "add a@1 10",
            batches: TWO_CONTENTS,
            bounds: Bounds { ticks: 1, elections: 1, ..NONE },
            deposed: false,
            prompt: true,
            forgetful: true,
            heal_every: 8,
            ..Case::PLAIN
        },
        Case {
            name: "alone",
            about: "two debits, of which one fits, that a shard may commit on its own word; a change of leaders, a retry",
            shards: 1,
            before: "add a@1 10",
            batches: &[('A', "add a@1 -7"), ('B', "add a@1 -7")],
            bounds: Bounds { elections: 1, retries: 1, ..NONE },
            deposed: false,
            prompt: true,
            alone: true,
            ..Case::PLAIN
        },
        Case {
            name: "alone-repeats",
            about: "a batch that a shard may commit on its own word; a change of leaders, the deposed one goes on, messages repeated",
            shards: 1,
            before: "add a@1 10",
            batches: &[('A', "add a@1 -7")],
            bounds: Bounds { elections: 1, repeats: 2, ..NONE },
            alone: true,
            ..Case::PLAIN
        },
        Case {
            name: "alone-time",
            about: "the same, while its time runs out and somebody seals its id",
            shards: 1,
            before: "add a@1 10",
            batches: &[('A', "add a@1 -7")],
            bounds: Bounds { elections: 1, ticks: 3, seals: 1, retries: 1, ..NONE },
            deposed: false,
            prompt: true,
            alone: true,
            ..Case::PLAIN
        },
        Case {
            name: "alone-read",
            about: "a read, perhaps of a deposed leader, beside a batch that a shard may commit on its own word",
            shards: 1,
            before: "add a@1 10",
            batches: &[('A', "add a@1 -7")],
            read: "a@1",
            bounds: Bounds { reads: 1, elections: 1, repeats: 1, ..NONE },
            prompt: true,
            alone: true,
            ..Case::PLAIN
        },
        Case {
            name: "alone-beside",
            about: "a trade on two shards beside a batch that one of them may commit on its own word",
            before: "add a@1 10",
            batches: &[('A', "add a@1 -7; add b@2 7"), ('B', "atleast a@1 5; insert t@1/r B")],
            bounds: Bounds { retries: 1, ..NONE },
            prompt: true,
            alone: true,
            heal_every: 4,
            ..Case::PLAIN
        },
        Case {
            name: "alone-contents",
            about: "one id with two contents, on two shards that may each commit theirs by themselves; two changes of leaders",
            before: "add a@1 10; add b@2 1",
            batches: &[('A', "add a@1 -7"), ('A', "add b@2 5")],
            bounds: Bounds { elections: 2, ..NONE },
            deposed: false,
            prompt: true,
            alone: true,
            ..Case::PLAIN
        },
        Case {
            name: "alone-forgotten",
            about: "a batch that a shard may commit on its own word, and decisions that are forgotten as soon as they may be",
            shards: 1,
            before: "add a@1 10",
            batches: &[('A', "add a@1 -7")],
            bounds: Bounds { elections: 2, ticks: 2, ..NONE },
            deposed: false,
            prompt: true,
            forgetful: true,
            alone: true,
            ..Case::PLAIN
        },
    ]
}

fn full() -> Vec<Case> {
    let full = Case { size: Size::Full, deposed: false, prompt: true, ..Case::PLAIN };
    vec![
        Case {
            name: "full-skew",
            about: "each of two batches has a condition on what the other one changes; up to three new tries",
            before: "add a@1 9; add b@2 9",
            batches: SKEW,
            numbers_max: 6,
            heal_every: 16,
            ..full
        },
        Case {
            name: "full-debits",
            about: "two trades, one balance that bears one of them; a change of leaders",
            before: "add a@1 10",
            batches: TWO_DEBITS,
            bounds: Bounds { elections: 1, ..NONE },
            ..full
        },
        Case {
            name: "full-deposed",
            about: "one trade; two changes of leaders, the deposed ones go on",
            before: "add a@1 10",
            batches: TRADE,
            bounds: Bounds { elections: 2, ..NONE },
            deposed: true,
            prompt: false,
            ..full
        },
        Case {
            name: "full-time",
            about: "one trade; a change of leaders, clocks that move, a client that retries, a repeated message",
            before: "add a@1 10",
            batches: TRADE,
            bounds: Bounds { elections: 1, ticks: 2, retries: 1, repeats: 1, ..NONE },
            ..full
        },
        Case {
            name: "full-read",
            about: "a read across two shards beside a trade; a change of leaders, the deposed one goes on",
            before: "add a@1 10",
            batches: TRADE,
            read: "a@1 b@2",
            bounds: Bounds { reads: 1, elections: 1, ..NONE },
            deposed: true,
            ..full
        },
        Case {
            name: "full-forgetful",
            about: "one id with two contents; decisions that are forgotten as soon as they may be",
            before: "add a@1 10",
            batches: TWO_CONTENTS,
            bounds: Bounds { ticks: 2, elections: 1, retries: 1, ..NONE },
            forgetful: true,
            ..full
        },
        Case {
            name: "full-alone",
            about: "a batch that a shard may commit on its own word, a trade beside it; a change of leaders",
            before: "add a@1 10",
            batches: &[('A', "add a@1 -7; add b@2 7"), ('B', "add a@1 -7")],
            bounds: Bounds { elections: 1, ..NONE },
            alone: true,
            heal_every: 16,
            ..full
        },
        Case {
            name: "full-alone-contents",
            about: "one id with two contents, on two shards that may each commit theirs by themselves; deposed leaders go on",
            before: "add a@1 10; add b@2 1",
            batches: &[('A', "add a@1 -7"), ('A', "add b@2 5")],
            bounds: Bounds { elections: 2, ..NONE },
            deposed: true,
            alone: true,
            heal_every: 16,
            ..full
        },
        Case {
            name: "full-alone-time",
            about: "one id with two contents, one of them on one shard, while time runs out and somebody seals the id",
            before: "add a@1 10",
            batches: &[('A', "add a@1 -7"), ('A', "add a@1 -1; add b@2 1")],
            bounds: Bounds { elections: 1, ticks: 2, seals: 1, ..NONE },
            deposed: false,
            prompt: true,
            alone: true,
            heal_every: 4,
            ..full
        },
        Case {
            name: "full-three",
            about: "one batch on three shards, another one on two of them; no fault",
            shards: 3,
            before: "add a@1 10",
            batches: &[('A', "add a@1 -7; add b@2 3; add c@3 4"), ('B', "add a@1 -7; add c@3 7")],
            heal_every: 16,
            ..full
        },
        Case {
            name: "full-moves",
            about: "two trades, one balance that bears one of them; a shard is led elsewhere",
            before: "add a@1 10",
            batches: TWO_DEBITS,
            bounds: Bounds { moves: 1, ..NONE },
            ..full
        },
        Case {
            name: "full-chain",
            about: "two batches on three shards, one of which both need; a change of leaders",
            shards: 3,
            before: "add b@2 6",
            batches: &[('A', "add a@1 1; add b@2 -5"), ('B', "add b@2 -5; add c@3 1")],
            bounds: Bounds { elections: 1, ..NONE },
            heal_every: 8,
            ..full
        },
        Case {
            name: "full-crowd",
            about: "three batches on one balance: two debits, and what pays for the second; a change of leaders",
            shards: 1,
            before: "add a@1 10",
            batches: &[('A', "add a@1 -7"), ('B', "add a@1 -7"), ('C', "add a@1 5")],
            bounds: Bounds { elections: 1, ..NONE },
            heal_every: 8,
            ..full
        },
    ]
}

fn huge() -> Vec<Case> {
    let huge = Case { size: Size::Huge, deposed: false, prompt: true, ..Case::PLAIN };
    vec![
        Case {
            name: "huge-alone-read",
            about: "a read across two shards beside a batch that one of them may commit on its own word; clocks that move",
            before: "add a@1 10; add b@2 1",
            batches: &[('A', "add a@1 -7"), ('B', "add a@1 -2; add b@2 2")],
            read: "a@1 b@2",
            bounds: Bounds { reads: 1, ticks: 1, ..NONE },
            alone: true,
            heal_every: 16,
            ..huge
        },
        Case {
            name: "huge-room",
            about: "two batches on shards that hold one part each; a message comes twice, a leader is deposed",
            before: "add a@1 10",
            batches: &[('A', "add a@1 1; add b@2 1"), ('B', "add c@2 1")],
            room: 1,
            bounds: Bounds { elections: 1, repeats: 1, ..NONE },
            deposed: true,
            ..huge
        },
        Case {
            name: "huge-both",
            about: "two trades, one balance that bears one of them; a change of leaders, the deposed one goes on",
            before: "add a@1 10",
            batches: TWO_DEBITS,
            bounds: Bounds { elections: 1, ..NONE },
            deposed: true,
            heal_every: 16,
            ..huge
        },
        Case {
            name: "huge-batches",
            about: "three batches on two shards: a debit, what pays for it, and a condition; no fault",
            before: "add a@1 3",
            batches: &[
                ('A', "add a@1 -7; add b@2 7"),
                ('B', "add a@1 5; add c@2 -5 floor -5"),
                ('C', "atleast a@1 2; put t@2/r C"),
            ],
            heal_every: 16,
            ..huge
        },
    ]
}
