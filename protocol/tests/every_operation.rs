//! Every kind of operation, in any mixture on few rows, is judged as `verdict_protocol::plain` judges it: a second, plain account of
//! what operations mean. See `world::World::check_at_rest`.

mod world;

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use proptest::prelude::*;
use verdict_protocol::{
    batch::{Batch, BatchLimits, Condition, Operation, OperationKind, RowKey},
    ids::{BatchId, Millis, Stamp},
    leader::Reply,
    messages::RowAt,
    plain,
};
use world::{START, World};

const PLACES: u8 = 3;

fn text() -> impl Strategy<Value = Bytes> {
    (0..3u8).prop_map(|letter| Bytes::from(vec![b'a' + letter]))
}

fn on_balance() -> impl Strategy<Value = OperationKind> {
    let bound = || prop::option::weighted(0.4, -30..60i128);
    prop_oneof![
        6 => (-40..60i128, bound(), bound())
            .prop_map(|(delta, floor, ceiling)| OperationKind::Add { delta, floor, ceiling }),
        1 => (-20..60i128).prop_map(|amount| OperationKind::Require(Condition::AtLeast(amount))),
        1 => (-20..60i128).prop_map(|amount| OperationKind::Require(Condition::AtMost(amount))),
        1 => (0..5i128).prop_map(|tens| OperationKind::Require(Condition::BalanceIs(10 * tens))),
        1 => condition(),
    ]
}

fn on_record() -> impl Strategy<Value = OperationKind> {
    prop_oneof![
        2 => text().prop_map(OperationKind::Put),
        2 => text().prop_map(OperationKind::Insert),
        1 => Just(OperationKind::Delete),
        1 => text().prop_map(|text| OperationKind::Require(Condition::RecordIs(text))),
        1 => condition(),
    ]
}

fn condition() -> impl Strategy<Value = OperationKind> {
    prop_oneof![
        any::<bool>().prop_map(|wanted| OperationKind::Require(Condition::Exists(wanted))),
        (0..6u64).prop_map(|version| OperationKind::Require(Condition::VersionIs(Stamp(version)))),
    ]
}

fn operation() -> impl Strategy<Value = Operation> {
    let kind = prop_oneof![
        2 => on_balance().prop_map(|kind| ("USD", kind)),
        1 => on_record().prop_map(|kind| ("note", kind)),
    ];
    (0..PLACES, kind).prop_map(|(place, (name, kind))| Operation {
        row: RowKey::new(&format!("user:{place}"), name).expect("a good name"),
        kind,
    })
}

fn operations() -> impl Strategy<Value = Vec<Operation>> {
    prop::collection::vec(operation(), 1..5).prop_map(|mut operations| {
        // A version is that of the row before the batch.
        let is_version =
            |one: &Operation| matches!(one.kind, OperationKind::Require(Condition::VersionIs(_)));
        operations.sort_by_key(|one| !is_version(one));
        operations
    })
}

fn batch(number: u64, operations: Vec<Operation>) -> Batch {
    let id = BatchId::from_parts(Millis(START.0 + number), [7; 10]);
    Batch { id, timeout_ms: 3_000, operations, zero_sum: false }
}

/// Not all mixtures make sense.
fn is_sound(world: &World, batch: &Batch) -> bool {
    batch.check(&BatchLimits::default(), world.config.placement).is_ok()
}

/// Runs a batch by the plain account. The rows on which something fails; none: the batch is carried out.
fn run(model: &mut BTreeMap<RowKey, RowAt>, stamp: Stamp, batch: &Batch) -> BTreeSet<RowKey> {
    let mut after = model.clone();
    let mut failed = BTreeSet::new();
    for Operation { row, kind } in &batch.operations {
        if plain::run(after.entry(row.clone()).or_default(), stamp, kind).is_err() {
            failed.insert(row.clone());
        }
    }
    if failed.is_empty() {
        *model = after;
    }
    failed
}

fn config(cases: u32) -> ProptestConfig {
    let number = |name: &str, default| {
        std::env::var(name).ok().and_then(|number| number.parse().ok()).unwrap_or(default)
    };
    ProptestConfig {
        cases: number("PROPTEST_CASES", cases),
        max_shrink_iters: number("PROPTEST_MAX_SHRINK_ITERS", 20_000),
        ..ProptestConfig::default()
    }
}

/// What happens next, where nothing breaks.
#[derive(Clone, Debug)]
enum Choice {
    Submit(Vec<Operation>),
    Deliver(u16),
    Apply,
    Tick(u16),
    MoveShard(u8),
    Restart(u8),
}

fn choice() -> impl Strategy<Value = Choice> {
    prop_oneof![
        8 => operations().prop_map(Choice::Submit),
        20 => any::<u16>().prop_map(Choice::Deliver),
        6 => Just(Choice::Apply),
        1 => (1..300u16).prop_map(Choice::Tick),
        1 => any::<u8>().prop_map(Choice::MoveShard),
        1 => any::<u8>().prop_map(Choice::Restart),
    ]
}

fn take(world: &mut World, place: u64, choice: Choice) {
    let shard_of =
        |which: u8| verdict_protocol::ids::ShardId(1 + u32::from(which) % world.config.placement.shards);
    match choice {
        Choice::Submit(operations) => {
            let batch = batch(place, operations);
            if is_sound(world, &batch) {
                world.submit(batch);
            }
        }
        Choice::Deliver(which) if !world.packets.is_empty() => {
            let packet = world.packets.remove(usize::from(which) % world.packets.len());
            world.deliver(packet, 0);
        }
        Choice::Deliver(_) => {}
        Choice::Apply => world.apply_act(0),
        Choice::Tick(millis) => world.tick(u64::from(millis)),
        Choice::MoveShard(which) => {
            let group = world.shards.get_mut(&shard_of(which)).unwrap();
            group.lead = (group.lead + 1) % group.replicas.len();
            group.catch_up(group.lead);
        }
        Choice::Restart(which) => {
            let group = world.shards.get_mut(&shard_of(which)).unwrap();
            group.restart(group.lead);
        }
    }
}

proptest! {
    #![proptest_config(config(1500))]

    #[test]
    fn one_after_the_other_every_batch_ends_as_the_plain_account_says(
        shards in 1..=2u32,
        batches in prop::collection::vec(operations(), 1..12),
    ) {
        let mut world = World::new(shards, 1);
        world.elect();
        world.deliver_all();
        let mut model = BTreeMap::new();
        for (number, operations) in batches.into_iter().enumerate() {
            let batch = batch(number as u64, operations);
            if !is_sound(&world, &batch) {
                continue;
            }
            let token = world.submit(batch.clone()).expect("there is a leader");
            world.deliver_all();
            world.tick(20);
            world.deliver_all();
            let Some(Reply::Decided(decision)) = world.reply(token).cloned() else {
                panic!("nobody is in its way, and it is not decided: {:?}", world.reply(token))
            };
            let stamp = decision.result.as_ref().ok().copied().unwrap_or_default();
            let failed = run(&mut model, stamp, &batch);
            match &decision.result {
                Ok(_) => prop_assert!(failed.is_empty(), "{batch:?} is committed, and must not on {failed:?}"),
                Err(abort) => {
                    let place = abort.operation.map(|place| batch.operations[place as usize].row.clone());
                    prop_assert!(
                        place.as_ref().is_some_and(|row| failed.contains(row)),
                        "{batch:?} is rejected by {abort:?}, and what fails is on {failed:?}"
                    );
                }
            }
            for (row, expected) in &model {
                prop_assert_eq!(&world.row(row), expected, "{:?} after {:?}", row, batch);
            }
        }
    }

    #[test]
    fn side_by_side_all_that_is_committed_fits_into_one_order(
        shards in 1..=2u32,
        choices in prop::collection::vec(choice(), 1..100),
    ) {
        let mut world = World::new(shards, 2);
        world.elect();
        world.deliver_all();
        for (place, choice) in choices.into_iter().enumerate() {
            take(&mut world, place as u64, choice);
        }
        world.settle();
        world.check_at_rest();
    }
}
