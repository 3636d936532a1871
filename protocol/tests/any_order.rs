//! Any order, loss and repetition of messages, with leaders that die, are deposed without knowing it, or come back with an empty
//! memory, ends in the same state on all replicas, with promises G1-G3 and G5-G7 held. See `world::World::check_at_rest`.

mod world;

use std::collections::BTreeMap;

use bytes::Bytes;
use proptest::prelude::*;
use verdict_protocol::{
    batch::{Batch, Condition, Operation, OperationKind, RowKey},
    coordinator::Keep,
    ids::{BatchId, Millis, Stamp},
    leader::Reply,
    messages::RowValue,
};
use world::{START, World};

const ACCOUNTS: u8 = 4;

fn balance_row(account: u8) -> RowKey {
    RowKey::new(&format!("user:{account}"), "USD").unwrap()
}

fn add(account: u8, delta: i128, floor: Option<i128>) -> Operation {
    let kind = OperationKind::Add { delta, floor, ceiling: None };
    Operation { row: balance_row(account), kind }
}

fn id_of(number: u8) -> BatchId {
    BatchId::from_parts(Millis(START.0 + u64::from(number)), [number; 10])
}

/// The batch with a number: always the same contents.
fn batch_of(number: u8) -> Batch {
    let (from, to) = (number % ACCOUNTS, (number / 3 + 1) % ACCOUNTS);
    let record = |name: u8| RowKey::new(&format!("trade:{name}"), "record").unwrap();
    let mut operations = match number % 8 {
        0 => vec![add(from, 100, None)],
        1..=3 if from != to => vec![add(from, -30, None), add(to, 30, None)],
        4 => vec![add(from, -60, Some(-20)), add(to, 25, None), add(0, 35, None)],
        5 => vec![
            Operation { row: balance_row(from), kind: OperationKind::Require(Condition::AtLeast(50)) },
            Operation { row: record(number % 3), kind: OperationKind::Put(Bytes::from(vec![number])) },
        ],
        6 => vec![
            Operation { row: record(number % 3), kind: OperationKind::Require(Condition::Exists(false)) },
            add(to, 5, None),
        ],
        _ => vec![
            Operation { row: record(number % 5), kind: OperationKind::Insert(Bytes::from(vec![number])) },
            add(to, -1, None),
        ],
    };
    if number % 16 == 11 {
        operations.push(Operation { row: record(2), kind: OperationKind::Delete });
    }
    Batch { id: id_of(number), timeout_ms: 3_000, operations, zero_sum: false }
}

/// What happens next.
#[derive(Clone, Debug)]
enum Choice {
    Submit(u8),
    /// The id of one batch for the contents of another, by mistake.
    Misuse(u8, u8),
    Deliver(u16, bool),
    Lose(u16),
    Apply,
    ApplyDeposed(u8),
    DeliverToDeposed(u16, u8),
    Tick(u16),
    Elect,
    Crash(u8),
    MoveShard(u8),
    Restart(u8),
    Reconnect(u8),
    Cancel(u8),
    Read,
    ReadAtAny(u8),
}

fn choice() -> impl Strategy<Value = Choice> {
    prop_oneof![
        10 => (0..24u8).prop_map(Choice::Submit),
        3 => (0..24u8, 0..24u8).prop_map(|(id, contents)| Choice::Misuse(id, contents)),
        40 => (any::<u16>(), prop::bool::weighted(0.2)).prop_map(|(which, keep)| Choice::Deliver(which, keep)),
        4 => any::<u16>().prop_map(Choice::Lose),
        14 => Just(Choice::Apply),
        3 => any::<u8>().prop_map(Choice::ApplyDeposed),
        4 => (any::<u16>(), any::<u8>()).prop_map(|(which, to)| Choice::DeliverToDeposed(which, to)),
        4 => (1..900u16).prop_map(Choice::Tick),
        2 => Just(Choice::Elect),
        2 => any::<u8>().prop_map(Choice::Crash),
        2 => any::<u8>().prop_map(Choice::MoveShard),
        2 => any::<u8>().prop_map(Choice::Restart),
        2 => any::<u8>().prop_map(Choice::Reconnect),
        1 => (0..24u8).prop_map(Choice::Cancel),
        4 => Just(Choice::Read),
        2 => any::<u8>().prop_map(Choice::ReadAtAny),
    ]
}

/// How far windows reach: ids are made in the first 24 ms.
fn window() -> impl Strategy<Value = (u64, u64)> {
    prop_oneof![
        3 => Just((1_000, 60_000)),
        1 => (0..60u64, 0..2_000u64),
    ]
}

fn take(world: &mut World, choice: Choice) {
    let shards = world.config.placement.shards;
    match choice {
        Choice::Submit(number) => {
            world.submit(batch_of(number));
        }
        Choice::Misuse(id, contents) => {
            world.submit(Batch { id: id_of(id), ..batch_of(contents) });
        }
        Choice::Deliver(which, keep) if !world.packets.is_empty() => {
            let place = usize::from(which) % world.packets.len();
            let packet = if keep { world.packets[place].clone() } else { world.packets.remove(place) };
            let newest = world.leaders.len().saturating_sub(1);
            world.deliver(packet, newest);
        }
        Choice::DeliverToDeposed(which, to) if !world.packets.is_empty() && !world.leaders.is_empty() => {
            let packet = world.packets[usize::from(which) % world.packets.len()].clone();
            let to = usize::from(to) % world.leaders.len();
            world.deliver(packet, to);
        }
        Choice::Lose(which) if !world.packets.is_empty() => {
            let place = usize::from(which) % world.packets.len();
            world.packets.remove(place);
        }
        Choice::Deliver(..) | Choice::DeliverToDeposed(..) | Choice::Lose(_) => {}
        Choice::Apply => {
            if let Some(newest) = world.leaders.len().checked_sub(1) {
                world.apply_act(newest);
                world.confirm();
            }
        }
        Choice::ApplyDeposed(which) => {
            if !world.leaders.is_empty() {
                let place = usize::from(which) % world.leaders.len();
                world.apply_act(place);
            }
        }
        Choice::Tick(millis) => world.tick(u64::from(millis)),
        Choice::Elect => {
            if world.leaders.len() < 4 {
                world.elect();
            }
        }
        Choice::Crash(committed) => {
            world.crash(usize::from(committed % 4));
            // Those before it stay deposed: nobody leads until the next election.
            world.elect();
        }
        Choice::MoveShard(which) => {
            let shard = verdict_protocol::ids::ShardId(1 + u32::from(which) % shards);
            let group = world.shards.get_mut(&shard).unwrap();
            group.lead = (group.lead + 1) % group.replicas.len();
            group.catch_up(group.lead);
        }
        Choice::Restart(which) => {
            let shard = verdict_protocol::ids::ShardId(1 + u32::from(which) % shards);
            let group = world.shards.get_mut(&shard).unwrap();
            group.restart(group.lead);
            world.coordinator.restart(world.coordinator.lead);
        }
        Choice::Reconnect(which) => {
            if let Some(newest) = world.leaders.len().checked_sub(1) {
                let shard = verdict_protocol::ids::ShardId(1 + u32::from(which) % shards);
                world.step(newest, verdict_protocol::leader::Event::Reconnected { shard });
            }
        }
        Choice::Cancel(number) => {
            if !world.leaders.is_empty() {
                world.query(id_of(number), true);
            }
        }
        Choice::ReadAtAny(which) => {
            if !world.leaders.is_empty() {
                let place = usize::from(which) % world.leaders.len();
                world.read_at(place, (0..ACCOUNTS).map(balance_row).collect());
            }
        }
        Choice::Read => {
            if !world.leaders.is_empty() {
                world.read((0..ACCOUNTS).map(balance_row).collect());
            }
        }
    }
}

/// Promise G5 for reads: each equals the state after exactly the batches with stamps up to its position, and none is older than what
/// had been told before it began.
fn check_reads(world: &World) {
    let decisions = &world.recorded;
    for (token, reply) in &world.replies {
        let Reply::Rows { position, rows } = reply else { continue };
        let after = world.read_after[token];
        assert!(*position >= after, "read {token:?} is answered at {position}, after {after} was told");
        let mut sums: BTreeMap<RowKey, (i128, Stamp)> = BTreeMap::new();
        for decision in decisions {
            let Ok(stamp) = decision.result else { continue };
            if stamp > *position {
                continue;
            }
            for operation in &world.contents(decision).operations {
                if let OperationKind::Add { delta, .. } = operation.kind {
                    let entry = sums.entry(operation.row.clone()).or_default();
                    entry.0 += delta;
                    entry.1 = entry.1.max(stamp);
                }
            }
        }
        for account in 0..ACCOUNTS {
            let found = &rows[usize::from(account)];
            let expected = match sums.get(&balance_row(account)) {
                None => (RowValue::Absent, Stamp(0)),
                Some((sum, stamp)) => (RowValue::Balance(*sum), *stamp),
            };
            assert_eq!(
                (found.value.clone(), found.version),
                expected,
                "read {token:?} at {position} of account {account}"
            );
        }
    }
}

/// `PROPTEST_CASES` runs more; a failing case is shrunk and kept beside this file.
fn config() -> ProptestConfig {
    let number = |name: &str, default| {
        std::env::var(name).ok().and_then(|number| number.parse().ok()).unwrap_or(default)
    };
    ProptestConfig {
        cases: number("PROPTEST_CASES", 3000),
        max_shrink_iters: number("PROPTEST_MAX_SHRINK_ITERS", 20_000),
        ..ProptestConfig::default()
    }
}

proptest! {
    #![proptest_config(config())]

    /// The same while next to nothing is remembered: ids are forgotten, and undo entries dropped, as soon as can be.
    #[test]
    fn forgetting_early_breaks_no_promise(
        shards in 1..=3u32,
        alone in prop::bool::weighted(0.8),
        window in window(),
        keep in (1..4u64, 1..4u64).prop_map(|(decisions_max, history_max)| Keep { decisions_max, history_max }),
        choices in prop::collection::vec(choice(), 1..220),
    ) {
        let mut world = World::with(shards, 2, |config| {
            (config.keep, config.young_ms, config.alone) = (keep, 0, alone);
            (config.alone_ahead_ms, config.alone_behind_ms) = window;
        });
        world.elect();
        world.deliver_all();
        for number in [0, 8, 16] {
            world.submit(batch_of(number));
        }
        for choice in choices {
            take(&mut world, choice);
        }
        world.settle();
        let token = world.read((0..ACCOUNTS).map(balance_row).collect());
        world.settle();
        prop_assert!(matches!(world.reply(token), Some(Reply::Rows { .. })), "{:?}", world.reply(token));
        world.check_at_rest();
        check_reads(&world);
    }

    #[test]
    fn any_order_ends_in_one_true_state(
        shards in 1..=3u32,
        alone in prop::bool::weighted(0.8),
        window in window(),
        prompt in any::<bool>(),
        choices in prop::collection::vec(choice(), 1..220),
    ) {
        let mut world = World::with(shards, 2, |config| {
            config.alone = alone;
            (config.alone_ahead_ms, config.alone_behind_ms) = window;
        });
        world.elect();
        if prompt {
            world.deliver_all();
        }
        for number in [0, 8, 16] {
            world.submit(batch_of(number));
        }
        for choice in choices {
            take(&mut world, choice);
        }
        world.settle();
        world.check_at_rest();
        check_reads(&world);
    }
}
