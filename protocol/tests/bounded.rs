//! Promise G9: what is remembered is bounded, and nothing that is still needed is forgotten for it.

mod world;

use verdict_protocol::{
    batch::{Batch, Operation, OperationKind, RowKey},
    coordinator::{Act, CoordinatorEntry, CoordinatorReply, Keep},
    ids::{BatchId, ContentHash, Epoch, GroupId, Millis, Number, ShardId, Stamp},
    leader::{LeaderConfig, Refusal, Reply},
    machine::encode,
    messages::{Abort, AbortReason, Decision, RowValue, ShardQuery, ShardRead, ShardReadAnswer, ToShard},
};
use world::{Packet, World};

/// A row that lives in a shard.
fn row_on(world: &World, shard: u32) -> RowKey {
    let placement = world.config.placement;
    let names = (0..).map(|place| format!("user:{place}"));
    let partition = names.into_iter().find(|name| placement.shard_of(name) == ShardId(shard)).unwrap();
    RowKey::new(&partition, "USD").unwrap()
}

/// A credit of 1 on one row of each of these shards, with an id of this moment.
fn credit(world: &World, serial: u64, shards: &[u32]) -> Batch {
    let mut tail = [0; 10];
    tail[2..].copy_from_slice(&serial.to_be_bytes());
    let kind = OperationKind::Add { delta: 1, floor: None, ceiling: None };
    let operation = |shard: &u32| Operation { row: row_on(world, *shard), kind: kind.clone() };
    let operations = shards.iter().map(operation).collect();
    Batch { id: BatchId::from_parts(world.now, tail), timeout_ms: 2_000, operations, zero_sum: false }
}

fn remembering(decisions_max: u64, history_max: u64) -> impl FnOnce(&mut LeaderConfig) {
    move |config| (config.keep, config.young_ms) = (Keep { decisions_max, history_max }, 0)
}

/// Submits a batch, and lets everything come to its end.
fn settle_one(world: &mut World, serial: u64, shards: &[u32]) -> (Batch, Option<Reply>) {
    let batch = credit(world, serial, shards);
    let token = world.submit(batch.clone()).unwrap();
    world.deliver_all();
    world.tick(20);
    world.deliver_all();
    let reply = world.reply(token).cloned();
    (batch, reply)
}

fn started(shards: u32, change: impl FnOnce(&mut LeaderConfig)) -> World {
    let mut world = World::with(shards, 2, change);
    world.elect();
    world.deliver_all();
    world
}

#[test]
fn decisions_are_bounded_in_number_and_what_is_forgotten_is_never_run_again() {
    let mut world = started(1, remembering(50, 1000));
    let mut batches = Vec::new();
    for serial in 0..600 {
        let (batch, reply) = settle_one(&mut world, serial, &[1]);
        assert!(matches!(reply, Some(Reply::Decided(_))), "{reply:?}");
        batches.push(batch);
        assert!(world.decisions().len() <= 52, "{} decisions are remembered", world.decisions().len());
    }
    for batch in &batches[..500] {
        let token = world.submit(batch.clone()).unwrap();
        let refused = world.reply(token);
        assert!(matches!(refused, Some(Reply::Refused(Refusal::TooOld { .. }))), "G3: {refused:?}");
    }
    let token = world.submit(batches[599].clone()).unwrap();
    assert!(matches!(world.reply(token), Some(Reply::Decided(_))), "the youngest are remembered");
    world.settle();
    assert_eq!(world.row(&row_on(&world, 1)).value, RowValue::Balance(600));
    world.check_at_rest();
}

#[test]
fn clocks_that_are_ahead_make_no_room_at_the_cost_of_others() {
    let mut world = started(1, |config| {
        (config.keep.decisions_max, config.young_ms, config.batches_max) = (20, 60_000, 10);
    });
    let here = world.now;
    let mut refused = 0;
    for serial in 0..100 {
        let mut batch = credit(&world, serial, &[1]);
        batch.id = BatchId::from_parts(Millis(here.0 + 300_000), batch.id.0[6..].try_into().unwrap());
        let token = world.submit(batch).unwrap();
        world.deliver_all();
        world.tick(20);
        world.deliver_all();
        match world.reply(token) {
            Some(Reply::Decided(_)) => {}
            Some(Reply::Refused(Refusal::Overloaded)) => refused += 1,
            other => panic!("{other:?}"),
        }
    }
    assert!(world.decisions().len() <= 34, "{} decisions are remembered", world.decisions().len());
    assert!(refused > 50, "too many are refused early, and told so");
    let (_, reply) = settle_one(&mut world, 1000, &[1]);
    assert_eq!(reply, Some(Reply::Refused(Refusal::Overloaded)), "and not as too old");
    // As soon as they are old enough to be forgotten there is room again, without anybody's help.
    world.tick(400_000);
    for _ in 0..10 {
        world.deliver_all();
        world.tick(100);
    }
    let (_, reply) = settle_one(&mut world, 1001, &[1]);
    assert!(matches!(reply, Some(Reply::Decided(_))), "{reply:?}");
}

#[test]
fn behind_the_horizon_nothing_commits_any_more() {
    for behind in [0, 1] {
        nothing_commits_behind(behind);
    }
}

/// An id that lies so many milliseconds behind the horizon, or at it.
fn nothing_commits_behind(behind: u64) {
    let mut world = started(1, |_| {});
    let epoch = world.leaders[0].leader.epoch();
    let decision = Decision {
        id: BatchId::from_parts(world.now, [1; 10]),
        hash: Some(ContentHash([1; 32])),
        shards: vec![ShardId(1)],
        number: Number { epoch, sequence: 1 },
        result: Ok(Stamp(1)),
    };
    let later = Millis(world.now.0 + behind);
    let mut act = |act: Act| match world.coordinator.commit(encode(&CoordinatorEntry::Act(act))) {
        CoordinatorReply::Acted(acted) => acted,
        other => panic!("{other:?}"),
    };
    act(Act { epoch, horizon: Some(later), ..Act::default() });
    let acted = act(Act { epoch, decisions: vec![decision.clone()], ..Act::default() });
    let abort = Err(Abort::because(AbortReason::Interrupted));
    assert_eq!(acted.decisions[0].result, abort, "callers have been told that it is too old ({behind} ms)");
    let acted = act(Act { epoch, finished: vec![decision.id], ..Act::default() });
    assert_eq!(acted.remembered, 0, "and it is forgotten as soon as it is finished");
    let acted = act(Act { epoch, horizon: Some(Millis(1)), ..Act::default() });
    assert_eq!(acted.horizon, later, "the horizon moves forward only");
}

#[test]
fn an_id_at_the_asked_horizon_is_too_old_and_the_next_one_is_not() {
    let mut world = World::with(1, 2, |config| config.retention_ms = 10_000);
    world.elect();
    world.deliver_all();
    world.tick(60_000);
    let horizon = world.leaders[0].acts[0].horizon.expect("the leader asks for a later horizon");
    let batch = |world: &World, time: u64| {
        let batch = credit(world, time, &[1]);
        Batch { id: BatchId::from_parts(Millis(time), [3; 10]), ..batch }
    };
    let exactly = batch(&world, horizon.0);
    let at = world.submit(exactly).unwrap();
    assert_eq!(
        world.reply(at),
        None,
        "another leader, which doesn't know of the horizon, may still take it up"
    );
    let next = batch(&world, horizon.0 + 1);
    let behind = world.submit(next).unwrap();
    world.deliver_all();
    let refused = Reply::Refused(Refusal::TooOld { horizon });
    assert_eq!(world.reply(at), Some(&refused), "it would be forgotten while it is in flight");
    assert!(matches!(world.reply(behind), Some(Reply::Decided(_))), "{:?}", world.reply(behind));
}

/// The first leader lets shard 2 commit a batch, and dies. The next one doesn't hear the shard, forgets by number, and the horizon passes
/// the id. The shard gets the prepare after that, before it is greeted.
#[test]
fn an_id_that_a_silent_shard_may_still_commit_is_not_too_old() {
    let mut world = started(2, remembering(1, 1000));
    let batch = credit(&world, 1, &[2]);
    world.submit(batch.clone());
    let late = std::mem::take(&mut world.packets);
    let [Packet::ToShard(_, message)] = &late[..] else { panic!("one prepare") };
    assert!(message.prepares[0].sole.is_some());
    world.down.insert(ShardId(2));
    world.crash(0);
    world.elect();
    world.deliver_all();
    for serial in 2..9 {
        world.tick(1_000);
        settle_one(&mut world, serial, &[1]);
    }
    let token = world.submit(batch.clone()).unwrap();
    assert_eq!(world.reply(token), Some(&Reply::InProgress), "G6: that it won't commit isn't known");
    let token = world.query(batch.id, true);
    assert_eq!(world.reply(token), Some(&Reply::InProgress), "nor to who asks");
    world.down.clear();
    for packet in late {
        world.deliver(packet, 0);
    }
    world.settle();
    assert_eq!(world.row(&row_on(&world, 2)).value, RowValue::Balance(1));
    let token = world.submit(batch).unwrap();
    assert!(matches!(world.reply(token), Some(Reply::Refused(Refusal::TooOld { .. }))), "now it is");
    world.check_at_rest();
}

#[test]
fn what_a_shard_committed_is_recorded_whatever_the_horizon() {
    let mut world = started(1, |_| {});
    let epoch = world.leaders[0].leader.epoch();
    let decision = |tail: u8| Decision {
        id: BatchId::from_parts(world.now, [tail; 10]),
        hash: Some(ContentHash([1; 32])),
        shards: vec![ShardId(1)],
        number: Number { epoch, sequence: u64::from(tail) },
        result: Ok(Stamp(tail.into())),
    };
    let (before, after) = (decision(1), decision(2));
    let later = Millis(world.now.0 + 1);
    let mut act = |act: Act| match world.coordinator.commit(encode(&CoordinatorEntry::Act(act))) {
        CoordinatorReply::Acted(acted) => acted,
        other => panic!("{other:?}"),
    };
    let acted = act(Act { epoch, settled: vec![before.clone()], ..Act::default() });
    assert_eq!((acted.decisions, acted.remembered), (vec![before.clone()], 1));
    let acted = act(Act { epoch, horizon: Some(later), ..Act::default() });
    assert_eq!(acted.remembered, 0, "it was finished as soon as it was recorded");
    let acted = act(Act { epoch, settled: vec![after.clone(), before.clone()], ..Act::default() });
    assert_eq!(acted.decisions, [after, before], "it has happened, so it isn't turned into an abort");
    assert_eq!(acted.remembered, 0, "and nothing is kept that nobody would look for");
}

#[test]
fn a_list_that_comes_after_its_batch_was_forgotten_ends_nothing_that_was_committed() {
    let mut world = started(1, remembering(1, 1000));
    let batch = credit(&world, 1, &[1]);
    let token = world.submit(batch.clone()).unwrap();
    world.deliver_all_but_outcomes();
    assert!(matches!(world.reply(token), Some(Reply::Decided(_))));
    // The next leader greets; the answer, which lists the part, is held up.
    world.elect();
    let newest = world.leaders.len() - 1;
    for packet in std::mem::take(&mut world.packets) {
        world.deliver(packet, newest);
    }
    let listing: Vec<Packet> = std::mem::take(&mut world.packets);
    // The deposed leader's outcome arrives, its confirmation reaches the new one, and all of it is forgotten.
    world.tick(600);
    let outcomes: Vec<Packet> = std::mem::take(&mut world.packets);
    for packet in outcomes {
        if let Packet::ToShard(shard, mut message) = packet {
            message.greet = false;
            world.deliver(Packet::ToShard(shard, message), newest);
        }
    }
    for packet in std::mem::take(&mut world.packets) {
        world.deliver(packet, newest);
    }
    world.tick(20);
    while !world.leaders[newest].acts.is_empty() {
        world.apply_act(newest);
    }
    let horizon = batch.id.time();
    let epoch = world.leaders[newest].leader.epoch();
    let act = Act { epoch, horizon: Some(horizon), ..Act::default() };
    world.coordinator.commit(encode(&CoordinatorEntry::Act(act)));
    assert_eq!(world.decisions(), vec![], "it is finished and forgotten");
    for packet in listing {
        world.deliver(packet, newest);
    }
    world.settle();
    assert_eq!(world.row(&row_on(&world, 1)).value, RowValue::Balance(1));
    assert!(world.decisions().is_empty(), "a second decision was recorded: {:?}", world.decisions());
    world.check_at_rest();
}

/// Undo entries and checkpoints.
fn kept_of_the_history(world: &World, shard: u32) -> usize {
    let store = &world.shards[&ShardId(shard)].leading().store;
    store.iter().filter(|(key, _)| [0x11, 0x14].contains(&key[0])).count()
}

#[test]
fn the_undo_log_is_bounded_by_what_is_kept_of_the_history() {
    let mut world = started(1, remembering(10_000, 100));
    for serial in 0..1500 {
        settle_one(&mut world, serial, &[1]);
        let kept = kept_of_the_history(&world, 1);
        assert!(kept <= 107 + 64, "{kept} entries and checkpoints after {serial} commits");
    }
    let history = world.shards[&ShardId(1)].leading().machine.history();
    assert!(history >= Stamp(1390) && history <= Stamp(1400), "1500 commits, 100 kept: {history}");
    let ask = |position: u64, query| {
        let replica = world.shards[&ShardId(1)].leading();
        let read = ShardRead { position: Stamp(position), known: true, wait_for: Vec::new(), query };
        replica.machine.read(&replica.store, GroupId::COORDINATOR, &read).unwrap().unwrap()
    };
    let read = |position| ask(position, ShardQuery::Rows(vec![row_on(&world, 1)]));
    assert_eq!(read(history.0 - 1), ShardReadAnswer::Pruned { history }, "below the mark it is refused");
    for position in history.0..=1500 {
        let ShardReadAnswer::Rows(rows) = read(position) else { panic!("{position} is refused") };
        assert_eq!(rows[0].value, RowValue::Balance(position.into()), "at {position}");
    }
    let query = ShardQuery::History { row: row_on(&world, 1), from: Stamp(0), limit: usize::MAX };
    let ShardReadAnswer::History { changes, oldest, next: None } = ask(1500, query) else {
        panic!("the history is refused")
    };
    assert_eq!(oldest.0, history.0 + 1);
    assert!(
        changes.iter().map(|change| change.stamp.0).eq(oldest.0..=1500),
        "all above the mark, nothing below"
    );
    world.settle();
    world.check_at_rest();
}

/// Promise G10: when undo entries are dropped doesn't depend on how often a replica was started.
#[test]
fn a_replica_that_starts_again_drops_the_same_entries() {
    let mut world = started(1, remembering(10_000, 20));
    for serial in 0..200 {
        settle_one(&mut world, serial, &[1]);
        if serial % 7 == 0 {
            let group = world.shards.get_mut(&ShardId(1)).unwrap();
            group.restart((serial / 7 % 2) as usize);
            group.check_replicas();
        }
    }
    let kept = kept_of_the_history(&world, 1);
    assert!(kept < 100, "{kept} of 200 entries are left");
    world.settle();
    world.check_at_rest();
}

/// A shard remembers only who has said something that lasts, and so does one that starts again.
#[test]
fn a_coordinator_that_never_greeted_holds_back_no_history() {
    let mut world = started(1, remembering(10_000, 20));
    let (placement, coordinator) = (world.config.placement, GroupId(9));
    let entry = world.shard_entry(ToShard { placement, coordinator, epoch: Epoch(1), ..ToShard::default() });
    world.shards.get_mut(&ShardId(1)).unwrap().commit(encode(&entry));
    for serial in 0..100 {
        settle_one(&mut world, serial, &[1]);
    }
    let history = world.shards[&ShardId(1)].leading().machine.history();
    assert!(history > Stamp(50), "100 commits, 20 kept: {history}");
    world.settle();
    world.check_at_rest();
}

/// What is below the mark may be gone, whoever asks.
#[test]
fn the_mark_does_not_move_back_for_a_coordinator_that_is_new() {
    let mut world = started(1, remembering(10_000, 20));
    for serial in 0..100 {
        settle_one(&mut world, serial, &[1]);
    }
    let history = world.shards[&ShardId(1)].leading().machine.history();
    let (placement, coordinator) = (world.config.placement, GroupId(9));
    let greeting = ToShard { placement, coordinator, epoch: Epoch(1), greet: true, ..ToShard::default() };
    let entry = encode(&world.shard_entry(greeting));
    let group = world.shards.get_mut(&ShardId(1)).unwrap();
    group.commit(entry);
    assert!(history > Stamp(0));
    assert_eq!(group.leading().machine.history(), history);
    (0..2).for_each(|seat| group.restart(seat));
    assert_eq!(group.leading().machine.history(), history);
}

#[test]
fn a_read_that_waits_keeps_what_it_needs() {
    let mut world = started(1, |config| {
        (config.keep.history_max, config.read_timeout_ms) = (10, 3_600_000);
    });
    for serial in 0..50 {
        settle_one(&mut world, serial, &[1]);
    }
    let token = world.read(vec![row_on(&world, 1)]);
    // Its question is on the way for a long time.
    let asked = std::mem::take(&mut world.packets);
    for serial in 100..400 {
        let batch = credit(&world, serial, &[1]);
        world.submit(batch);
        world.deliver_all();
        // What the shard has committed is recorded, and moves the mark.
        world.tick(20);
        world.packets.retain(|packet| !matches!(packet, Packet::Read(..)));
    }
    let history = |world: &World| world.shards[&ShardId(1)].leading().machine.history();
    assert!(history(&world) <= Stamp(50), "the mark stays below a read that is under way");
    world.packets = asked;
    world.deliver_all();
    match world.reply(token) {
        Some(Reply::Rows { position: Stamp(50), rows }) => assert_eq!(rows[0].value, RowValue::Balance(50)),
        other => panic!("{other:?}"),
    }
    for serial in 400..420 {
        settle_one(&mut world, serial, &[1]);
    }
    assert!(history(&world) > Stamp(300), "and goes on afterwards");
}

#[test]
fn the_history_mark_is_replicated_and_only_rises() {
    let mut world = started(1, |_| {});
    let say = |world: &mut World, history: u64| {
        let placement = world.config.placement;
        let message = ToShard {
            placement,
            epoch: Epoch(1),
            history: Stamp(history),
            greet: true,
            ..ToShard::default()
        };
        let entry = world.shard_entry(message);
        world.shards.get_mut(&ShardId(1)).unwrap().commit(encode(&entry));
    };
    say(&mut world, 30);
    say(&mut world, 20);
    let group = world.shards.get_mut(&ShardId(1)).unwrap();
    for place in 0..2 {
        group.catch_up(place);
        group.restart(place);
        assert_eq!(group.replicas[place].machine.history(), Stamp(30));
    }
}

/// How much everything but one shard keeps, in keys and batches.
fn kept_without(world: &World, shard: u32) -> usize {
    let shards = world.shards.iter().filter(|(id, _)| **id != ShardId(shard));
    let keys: usize = shards.map(|(_, group)| group.leading().store.len()).sum();
    keys + world.coordinator.leading().store.len() + world.leaders[0].leader.in_flight()
}

/// One shard is down for an hour, while batches that touch it keep coming, and others do. Gives what the rest keeps afterwards.
fn an_hour_without_a_shard(world: &mut World) -> usize {
    world.down.insert(ShardId(2));
    let mut most = 0;
    let mut serial = 0;
    for second in 0..3600 {
        for shards in [&[1, 2][..], &[2], &[2], &[1], &[1, 3], &[3]] {
            serial += 1;
            let batch = credit(world, serial, shards);
            let token = world.submit(batch).unwrap();
            world.deliver_all();
            if !shards.contains(&2) {
                let reply = world.reply(token);
                let committed = matches!(reply, Some(Reply::Decided(Decision { result: Ok(_), .. })));
                assert!(committed, "second {second}: a batch on {shards:?} is answered {reply:?}");
            }
        }
        let row = row_on(world, 2);
        world.read(vec![row]);
        let row = row_on(world, 1);
        let token = world.read(vec![row]);
        world.deliver_all();
        assert!(matches!(world.reply(token), Some(Reply::Rows { .. })), "second {second}: a read is refused");
        world.tick(1000);
        world.deliver_all();
        if second > 600 {
            most = most.max(kept_without(world, 2));
        }
    }
    most
}

fn check_an_hour(world: &mut World) {
    let most = an_hour_without_a_shard(world);
    // 200 decisions with two keys each, the unfinished ones among them; 2 x 50 undo entries on two shards; rows, marks, positions.
    assert!(most < 200 * 2 + 200 * 3 + 2 * 3 * 60 + 300, "{most} keys and batches");
    world.down.clear();
    for _ in 0..20 {
        world.tick(500);
        world.deliver_all();
    }
    let (_, reply) = settle_one(world, 1 << 40, &[1, 2]);
    let committed = matches!(reply, Some(Reply::Decided(Decision { result: Ok(_), .. })));
    assert!(committed, "when it is back all goes on: {reply:?}");
    world.settle();
    world.check_at_rest();
}

fn small(config: &mut LeaderConfig) {
    config.keep = Keep { decisions_max: 200, history_max: 50 };
    (config.young_ms, config.batches_max, config.reads_max) = (5_000, 200, 20);
}

#[test]
fn a_shard_that_is_down_for_an_hour_holds_up_nobody_and_fills_nothing() {
    let mut world = started(3, small);
    check_an_hour(&mut world);
}

#[test]
fn a_shard_that_never_answered_this_leader_holds_up_nobody_and_fills_nothing() {
    let mut world = started(3, small);
    let batch = credit(&world, 9, &[1, 2]);
    world.submit(batch);
    world.deliver_all_but_outcomes();
    world.crash(0);
    world.packets.clear();
    world.down.insert(ShardId(2));
    // Ids that are made later lie beyond what the last leader may have let the shard commit by itself.
    world.tick(1_100);
    world.elect();
    check_an_hour(&mut world);
}
