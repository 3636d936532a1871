//! Rules that the machines keep by themselves, whatever the leaders above them do.

mod world;

use verdict_protocol::{
    batch::{Batch, Operation, OperationKind, Placement, RowKey},
    coordinator::{Act, CoordinatorEntry, CoordinatorReply, Keep, Window},
    ids::{BatchId, ContentHash, Epoch, GroupId, Millis, NodeId, Number, ShardId, Stamp},
    leader::{Event, Reply},
    machine::{self, Machine, encode, position},
    messages::{
        Abort, AbortReason, Decision, Done, FromShard, PartOutcome, Prepare, RowValue, ToShard, VoteKind,
    },
    roster::{self, NodeChange, NodeRefusal, NodeWish},
    shard::{Shard, ShardConfig, ShardEntry},
    store::{MemoryStore, Store},
    wire::EncodedPart,
};
use world::{Packet, START, World};

fn id(letter: u8) -> BatchId {
    BatchId::from_parts(Millis(START.0 + u64::from(letter)), [letter; 10])
}

fn number(epoch: u64, sequence: u64) -> Number {
    Number { epoch: Epoch(epoch), sequence }
}

fn row() -> RowKey {
    RowKey::new("a", "USD").unwrap()
}

fn part(operation: &Operation) -> EncodedPart {
    EncodedPart::new([(0, operation)])
}

fn prepare(letter: u8, number: Number, delta: i128) -> Prepare {
    let kind = OperationKind::Add { delta, floor: None, ceiling: None };
    Prepare {
        number,
        id: id(letter),
        hash: ContentHash([letter; 32]),
        shards: vec![ShardId(1)],
        gives_up: Vec::new(),
        sole: None,
        part: part(&Operation { row: row(), kind }),
    }
}

fn outcome(letter: u8, number: Number, commit: Option<u64>) -> PartOutcome {
    PartOutcome { id: id(letter), number, commit: commit.map(Stamp), gives_up: Vec::new() }
}

fn say(world: &mut World, message: ToShard) -> (FromShard, Vec<String>) {
    let message = ToShard { placement: world.config.placement, ..message };
    let entry = world.shard_entry(message);
    let reply = world.shards.get_mut(&ShardId(1)).unwrap().commit(encode(&entry));
    let answer = reply.messages.into_iter().next().map(|(_, message)| message).unwrap_or_default();
    (answer, reply.alarms)
}

fn greeted(epoch: u64) -> World {
    let mut world = World::new(1, 2);
    say(&mut world, ToShard { epoch: Epoch(epoch), greet: true, ..ToShard::default() });
    world
}

#[test]
fn the_first_decision_wins() {
    let mut world = World::new(1, 2);
    let open =
        CoordinatorEntry::Open { node: NodeId(1), placement: Placement { shards: 1 }, keep: Keep::default() };
    world.coordinator.commit(encode(&open));
    let decide = |world: &mut World, result| {
        let decision = Decision {
            id: id(7),
            hash: Some(ContentHash([7; 32])),
            shards: vec![ShardId(1)],
            number: number(1, 1),
            result,
        };
        let act = Act { epoch: Epoch(1), decisions: vec![decision], ..Act::default() };
        match world.coordinator.commit(encode(&CoordinatorEntry::Act(act))) {
            CoordinatorReply::Acted(acted) => acted.decisions[0].result.clone(),
            other => panic!("{other:?}"),
        }
    };
    let abort = Err(Abort::because(AbortReason::Contention));
    assert_eq!(decide(&mut world, abort.clone()), abort);
    assert_eq!(decide(&mut world, Ok(Stamp(1))), abort, "R1: a decision never changes");
    assert_eq!(world.decisions().len(), 1);
}

#[test]
fn another_number_of_shards_is_refused() {
    let mut world = World::new(1, 2);
    let open = |shards| CoordinatorEntry::Open {
        node: NodeId(1),
        placement: Placement { shards },
        keep: Keep::default(),
    };
    world.coordinator.commit(encode(&open(4)));
    let reply = world.coordinator.commit(encode(&open(5)));
    assert_eq!(reply, CoordinatorReply::OtherPlacement { recorded: Placement { shards: 4 } });
}

#[test]
fn a_commit_under_another_number_than_the_vote_has_no_effect() {
    let mut world = greeted(1);
    let message =
        ToShard { epoch: Epoch(1), prepares: vec![prepare(7, number(1, 1), 5)], ..ToShard::default() };
    assert_eq!(say(&mut world, message).0.votes[0].kind, VoteKind::Yes);
    let message =
        ToShard { epoch: Epoch(1), outcomes: vec![outcome(7, number(1, 2), Some(9))], ..ToShard::default() };
    let (answer, alarms) = say(&mut world, message);
    assert!(answer.done[0].lost, "R4: votes and outcomes belong to one number");
    assert_eq!(alarms.len(), 1);
    // Nor if the earlier try is given up with it: what voted YES under the later number is not here.
    let giving_up = PartOutcome { gives_up: vec![number(1, 1)], ..outcome(7, number(1, 2), Some(9)) };
    let message = ToShard { epoch: Epoch(1), outcomes: vec![giving_up], ..ToShard::default() };
    let (answer, alarms) = say(&mut world, message);
    assert!(answer.done[0].lost && alarms.len() == 1, "R4: {answer:?}");
    assert_eq!(world.row(&row()).value, RowValue::Absent);
    assert_eq!(
        world.shards[&ShardId(1)].leading().machine.counts().in_doubt,
        1,
        "R3: the part is still held"
    );
}

#[test]
fn a_mark_never_takes_away_what_is_held() {
    let mut world = greeted(1);
    let message =
        ToShard { epoch: Epoch(1), prepares: vec![prepare(7, number(1, 1), 5)], ..ToShard::default() };
    say(&mut world, message);
    let (_, alarms) = say(&mut world, ToShard { epoch: Epoch(1), mark: number(1, 4), ..ToShard::default() });
    assert_eq!(alarms.len(), 1);
    assert_eq!(world.shards[&ShardId(1)].leading().machine.counts().in_doubt, 1);
}

#[test]
fn below_the_mark_everything_is_refused_after_a_restart_too() {
    let mut world = greeted(1);
    say(&mut world, ToShard { epoch: Epoch(1), mark: number(1, 4), ..ToShard::default() });
    for place in 0..2 {
        let group = world.shards.get_mut(&ShardId(1)).unwrap();
        group.catch_up(place);
        group.restart(place);
    }
    let message =
        ToShard { epoch: Epoch(1), prepares: vec![prepare(7, number(1, 3), 5)], ..ToShard::default() };
    assert_eq!(say(&mut world, message).0.votes[0].kind, VoteKind::Finished);
}

#[test]
fn batches_of_two_coordinators_never_wait_for_each_other() {
    let mut world = greeted(1);
    let other = GroupId(9);
    say(&mut world, ToShard { coordinator: other, epoch: Epoch(1), greet: true, ..ToShard::default() });
    let put = |letter: u8, coordinator| {
        let mut prepare = prepare(letter, number(1, u64::from(letter)), 0);
        prepare.part =
            part(&Operation { row: row(), kind: OperationKind::Put(bytes::Bytes::from_static(b"x")) });
        ToShard { coordinator, epoch: Epoch(1), prepares: vec![prepare], ..ToShard::default() }
    };
    assert_eq!(say(&mut world, put(1, GroupId(0))).0.votes[0].kind, VoteKind::Yes);
    assert_eq!(say(&mut world, put(2, GroupId(0))).0.votes[0].kind, VoteKind::Waiting);
    assert_eq!(say(&mut world, put(3, other)).0.votes[0].kind, VoteKind::Conflict);
}

#[test]
fn forgotten_ids_are_refused_and_unfinished_ones_are_not_forgotten() {
    let mut world = World::with(1, 2, |config| (config.retention_ms, config.alone) = (10_000, false));
    world.elect();
    world.settle();
    let batch = |letter: u8| verdict_protocol::batch::Batch {
        id: id(letter),
        timeout_ms: 0,
        operations: vec![Operation {
            row: row(),
            kind: OperationKind::Add { delta: 1, floor: None, ceiling: None },
        }],
        zero_sum: false,
    };
    world.submit(batch(1));
    world.settle();
    world.submit(batch(2));
    // The outcome of the second one never arrives, and an hour passes.
    for _ in 0..8 {
        world.deliver_all_but_outcomes();
        world.tick(500);
    }
    world.tick(3_600_000);
    world.deliver_all_but_outcomes();
    assert_eq!(world.decisions().len(), 1, "the finished one is forgotten, the unfinished one is not");
    let token = world.submit(batch(1)).unwrap();
    assert!(
        matches!(
            world.reply(token),
            Some(verdict_protocol::leader::Reply::Refused(verdict_protocol::leader::Refusal::TooOld { .. }))
        ),
        "G3: an id that is forgotten is refused, never run again: {:?}",
        world.reply(token)
    );
    world.settle();
    assert_eq!(world.row(&row()).value, RowValue::Balance(2));
}

#[test]
fn an_id_that_was_just_forgotten_is_refused_before_the_leader_hears_of_it() {
    let mut world = World::with(1, 2, |config| config.retention_ms = 10_000);
    world.elect();
    world.settle();
    let batch = verdict_protocol::batch::Batch {
        id: id(1),
        timeout_ms: 0,
        operations: vec![Operation {
            row: row(),
            kind: OperationKind::Add { delta: 1, floor: None, ceiling: None },
        }],
        zero_sum: false,
    };
    world.submit(batch.clone());
    world.settle();
    world.tick(60_000);
    // The horizon is in the log and applied; the leader has not been told yet.
    let act = world.leaders[0].acts.remove(0);
    assert!(act.horizon.is_some(), "the leader asks for a later horizon");
    world.coordinator.commit(encode(&CoordinatorEntry::Act(act)));
    assert!(world.decisions().is_empty(), "the decision is forgotten");
    let token = world.submit(batch).unwrap();
    assert!(
        matches!(
            world.reply(token),
            Some(verdict_protocol::leader::Reply::Refused(verdict_protocol::leader::Refusal::TooOld { .. }))
        ),
        "G3: {:?}",
        world.reply(token)
    );
}

#[test]
fn a_coordinator_that_speaks_of_another_number_of_shards_is_not_heard() {
    let mut world = greeted(1);
    let entry = world.shard_entry(ToShard {
        placement: Placement { shards: 7 },
        epoch: Epoch(9),
        greet: true,
        ..ToShard::default()
    });
    let reply = world.shards.get_mut(&ShardId(1)).unwrap().commit(encode(&entry));
    assert_eq!((reply.messages.len(), reply.alarms.len()), (0, 1));
    assert_eq!(world.shards[&ShardId(1)].leading().machine.epoch(GroupId(0)), Epoch(1));
}

#[test]
fn an_id_of_a_node_is_never_given_twice() {
    let mut world = World::new(1, 2);
    let mut wish = |node, wish| {
        let founders = (1..=3).map(|node| (NodeId(node), format!("n{node}:1"))).collect();
        let change = NodeChange { founders, node: NodeId(node), wish };
        match world.coordinator.commit(encode(&CoordinatorEntry::Node(change))) {
            CoordinatorReply::Node(result) => result,
            other => panic!("{other:?}"),
        }
    };
    let at = |address: &str| NodeWish::Add(address.to_owned());
    assert_eq!(wish(9, NodeWish::Remove), Err(NodeRefusal::Unknown));
    assert_eq!(wish(4, at("n1:1")), Err(NodeRefusal::AddressTaken(NodeId(1))));
    for _ in 0..2 {
        assert_eq!(wish(4, at("n4:1")), Ok(()), "what is so already is done");
    }
    assert_eq!(wish(4, at("n5:1")), Err(NodeRefusal::OtherAddress("n4:1".to_owned())));
    for _ in 0..2 {
        assert_eq!(wish(1, NodeWish::Remove), Ok(()));
        assert_eq!(wish(1, at("n1:1")), Err(NodeRefusal::UsedBefore), "a founder's id");
        assert_eq!(wish(1, at("n9:1")), Err(NodeRefusal::UsedBefore));
    }
    assert_eq!(wish(5, at("n1:1")), Ok(()), "an address may serve again");
    assert_eq!(wish(4, NodeWish::Remove), Ok(()));
    assert_eq!(wish(4, at("n4:1")), Err(NodeRefusal::UsedBefore), "the id of a node that was added later");
    let lead = &world.coordinator.replicas[world.coordinator.lead];
    let records = roster::nodes(&lead.store).unwrap();
    let listed: Vec<_> = records.iter().map(|(node, record)| (node.0, record.removed)).collect();
    assert_eq!(listed, [(1, true), (2, false), (3, false), (4, true), (5, false)]);
}

fn only_vote(world: &mut World, epoch: u64, prepare: Prepare) -> VoteKind {
    let message = ToShard { epoch: Epoch(epoch), prepares: vec![prepare], ..ToShard::default() };
    say(world, message).0.votes[0].kind.clone()
}

fn end(world: &mut World, outcome: PartOutcome) {
    say(world, ToShard { epoch: Epoch(1), outcomes: vec![outcome], ..ToShard::default() });
}

fn restart_all(world: &mut World) {
    let group = world.shards.get_mut(&ShardId(1)).unwrap();
    for place in 0..2 {
        group.catch_up(place);
        group.restart(place);
    }
}

#[test]
fn a_finished_number_is_known_after_a_restart() {
    let mut world = greeted(1);
    end(&mut world, outcome(7, number(1, 3), None));
    restart_all(&mut world);
    assert_eq!(only_vote(&mut world, 1, prepare(7, number(1, 3), 5)), VoteKind::Finished);
}

#[test]
fn a_prepare_that_comes_after_its_commit_is_refused() {
    let mut world = greeted(1);
    assert_eq!(only_vote(&mut world, 1, prepare(7, number(1, 3), 5)), VoteKind::Yes);
    end(&mut world, outcome(7, number(1, 3), Some(4)));
    assert_eq!(only_vote(&mut world, 1, prepare(7, number(1, 3), 5)), VoteKind::Finished);
    restart_all(&mut world);
    assert_eq!(only_vote(&mut world, 1, prepare(7, number(1, 3), 5)), VoteKind::Finished);
    assert_eq!(world.shards[&ShardId(1)].leading().machine.counts().held_rows, 0);
    assert_eq!(world.row(&row()).value, RowValue::Balance(5));
}

#[test]
fn a_finished_part_does_not_come_back_with_a_restart() {
    let mut world = greeted(1);
    assert_eq!(only_vote(&mut world, 1, prepare(7, number(1, 1), 5)), VoteKind::Yes);
    assert_eq!(only_vote(&mut world, 1, prepare(8, number(1, 2), 5)), VoteKind::Yes);
    end(&mut world, outcome(7, number(1, 1), Some(4)));
    end(&mut world, outcome(8, number(1, 2), None));
    restart_all(&mut world);
    assert_eq!(world.shards[&ShardId(1)].leading().machine.held().count(), 0);
    end(&mut world, outcome(7, number(1, 1), Some(4)));
    assert_eq!(world.row(&row()).value, RowValue::Balance(5), "a second commit has a second effect");
    // One that was there at the start is no other.
    assert_eq!(only_vote(&mut world, 1, prepare(9, number(1, 3), 5)), VoteKind::Yes);
    restart_all(&mut world);
    end(&mut world, outcome(9, number(1, 3), None));
    restart_all(&mut world);
    assert_eq!(world.shards[&ShardId(1)].leading().machine.held().count(), 0);
}

/// The earlier try of a batch goes, and the later one comes, with the same entry.
#[test]
fn a_later_try_is_held_after_a_restart() {
    let mut world = greeted(1);
    for sequence in 1..4 {
        let prepare = prepare(7, number(1, sequence), 5);
        assert_eq!(only_vote(&mut world, 1, prepare), VoteKind::Yes);
        restart_all(&mut world);
        let held: Vec<_> = world.shards[&ShardId(1)].leading().machine.held().collect();
        assert_eq!(held.len(), 1, "R3: try {sequence}");
        assert_eq!((held[0].part.number, &held[0].part.vote), (number(1, sequence), &VoteKind::Yes));
    }
    end(&mut world, outcome(7, number(1, 3), Some(4)));
    restart_all(&mut world);
    assert_eq!(world.row(&row()).value, RowValue::Balance(5));
    assert_eq!(world.shards[&ShardId(1)].leading().machine.held().count(), 0);
}

#[test]
fn a_part_that_was_let_in_is_held_after_a_restart() {
    let mut world = greeted(1);
    let put = |letter: u8, sequence| {
        let mut prepare = prepare(letter, number(1, sequence), 0);
        prepare.part =
            part(&Operation { row: row(), kind: OperationKind::Put(bytes::Bytes::from(vec![letter])) });
        prepare
    };
    for (letter, vote) in [(7, VoteKind::Yes), (8, VoteKind::Waiting), (9, VoteKind::Waiting)] {
        assert_eq!(only_vote(&mut world, 1, put(letter, letter.into())), vote);
    }
    restart_all(&mut world);
    for (letter, next) in [(7, 8), (8, 9)] {
        let outcomes = vec![outcome(letter, number(1, letter.into()), Some(letter.into()))];
        let (answer, _) = say(&mut world, ToShard { epoch: Epoch(1), outcomes, ..ToShard::default() });
        assert_eq!(answer.done.len(), 1);
        assert!(!answer.done[0].lost);
        let votes: Vec<_> = answer.votes.iter().map(|vote| (vote.id, &vote.kind)).collect();
        assert_eq!(votes, [(id(next), &VoteKind::Yes)], "who waits is let in");
        restart_all(&mut world);
        assert_eq!(only_vote(&mut world, 1, put(next, next.into())), VoteKind::Yes, "R3: a YES stands");
    }
    assert_eq!(world.row(&row()).value, RowValue::Record(bytes::Bytes::from(vec![8])));
}

/// Promise G10: two replicas that were the same and are not have other hashes once it makes a difference.
#[test]
fn a_replica_that_has_lost_a_row_is_told_by_its_hash() {
    let mut world = greeted(1);
    assert_eq!(only_vote(&mut world, 1, prepare(7, number(1, 1), 5)), VoteKind::Yes);
    end(&mut world, outcome(7, number(1, 1), Some(4)));
    let group = world.shards.get_mut(&ShardId(1)).unwrap();
    group.check_replicas();
    let (store, _) = &mut group.replicas[1].flushed;
    let found: Vec<_> = store.iter().map(|(key, _)| key.to_vec()).filter(|key| key[0] == 0x10).collect();
    assert_eq!(found.len(), 1, "the settled value of a row");
    store.delete(&found[0]).unwrap();
    group.restart(1);
    let hashes = |world: &mut World| {
        let group = world.shards.get_mut(&ShardId(1)).unwrap();
        group.catch_up(1);
        [0, 1].map(|place| position(&group.replicas[place].store).unwrap().hash)
    };
    let [one, other] = hashes(&mut world);
    assert_eq!(one, other, "nothing was done with it");
    assert_eq!(only_vote(&mut world, 1, prepare(8, number(1, 2), 5)), VoteKind::Yes);
    let [one, other] = hashes(&mut world);
    assert_eq!(one, other, "the vote is the same");
    end(&mut world, outcome(8, number(1, 2), Some(6)));
    let [one, other] = hashes(&mut world);
    assert_ne!(one, other, "one holds 10, the other 5");
}

#[test]
fn a_day_in_doubt_takes_nothing_away() {
    let mut world = greeted(1);
    assert_eq!(only_vote(&mut world, 1, prepare(7, number(1, 1), 5)), VoteKind::Yes);
    let mut put = prepare(8, number(1, 2), 0);
    put.part = part(&Operation { row: row(), kind: OperationKind::Put(bytes::Bytes::from_static(b"x")) });
    assert_eq!(only_vote(&mut world, 1, put), VoteKind::Waiting);
    for hour in 0..25 {
        world.now = Millis(world.now.0 + 3_600_000);
        // Other work goes on, and so does the shard's clock.
        let other = number(1, 10 + hour);
        let mut elsewhere = prepare(9, other, 1);
        let kind = OperationKind::Add { delta: 1, floor: None, ceiling: None };
        elsewhere.part = part(&Operation { row: RowKey::new("b", "USD").unwrap(), kind });
        assert_eq!(only_vote(&mut world, 1, elsewhere), VoteKind::Yes);
        end(&mut world, outcome(9, other, None));
        restart_all(&mut world);
    }
    let counts = world.shards[&ShardId(1)].leading().machine.counts();
    assert_eq!((counts.in_doubt, counts.waiting, counts.held_rows), (1, 1, 1), "R3: no timer ends a part");
    assert_eq!(only_vote(&mut world, 1, prepare(7, number(1, 1), 5)), VoteKind::Yes);
}

fn add_batch(letter: u8, rows: &[RowKey]) -> Batch {
    let kind = OperationKind::Add { delta: 1, floor: None, ceiling: None };
    let operations = rows.iter().map(|row| Operation { row: row.clone(), kind: kind.clone() }).collect();
    Batch { id: id(letter), timeout_ms: 0, operations, zero_sum: false }
}

/// A row on each of two shards.
fn rows_of_two(world: &World) -> [RowKey; 2] {
    [1, 2].map(|shard| {
        let placement = world.config.placement;
        let mut names = (0..).map(|place| format!("user:{place}"));
        let partition = names.find(|name| placement.shard_of(name) == ShardId(shard)).unwrap();
        RowKey::new(&partition, "USD").unwrap()
    })
}

#[test]
fn a_new_leader_does_not_say_not_seen_before_all_shards_have_answered() {
    let mut world = World::new(2, 2);
    world.elect();
    world.deliver_all();
    let rows = rows_of_two(&world);
    world.submit(add_batch(7, &rows));
    // Both vote YES, and the leader dies before it hears of it.
    for packet in std::mem::take(&mut world.packets) {
        world.deliver(packet, 0);
    }
    world.packets.clear();
    world.crash(0);
    world.elect();
    let token = world.query(id(7), false);
    assert_eq!(world.reply(token), Some(&Reply::InProgress), "a shard may hold a part of it, and does");
    let other = world.query(id(8), false);
    assert_eq!(world.reply(other), Some(&Reply::InProgress));
    world.settle();
    let token = world.query(id(7), false);
    assert!(matches!(world.reply(token), Some(Reply::Decided(_))), "{:?}", world.reply(token));
    let other = world.query(id(8), false);
    assert_eq!(world.reply(other), Some(&Reply::NotSeen));
}

#[test]
fn the_next_leader_tells_of_aborts_too() {
    let mut world = World::new(2, 2);
    world.elect();
    world.deliver_all();
    let rows = rows_of_two(&world);
    world.submit(add_batch(7, &rows));
    // Only the first shard gets its prepare; at the deadline the batch is aborted, and its outcome is lost with the leader.
    world.down.insert(ShardId(2));
    world.deliver_all();
    world.tick(20_000);
    world.apply_act(0);
    assert_eq!(world.decisions().len(), 1);
    world.packets.clear();
    world.crash(0);
    world.down.clear();
    world.elect();
    assert_eq!(world.leaders[0].leader.in_flight(), 1, "an abort that is not confirmed is handed on");
    world.settle();
    world.check_at_rest();
}

#[test]
fn what_an_older_epoch_records_is_refused() {
    let mut world = World::new(1, 2);
    let placement = Placement { shards: 1 };
    let open = CoordinatorEntry::Open { node: NodeId(1), placement, keep: Keep::default() };
    world.coordinator.commit(encode(&open));
    world.coordinator.commit(encode(&open));
    let decision = Decision {
        id: id(7),
        hash: Some(ContentHash([7; 32])),
        shards: vec![ShardId(1)],
        number: number(1, 1),
        result: Ok(Stamp(1)),
    };
    let act = Act {
        epoch: Epoch(1),
        decisions: vec![decision],
        horizon: Some(START),
        ceiling: Some(Stamp(1 << 40)),
        ..Act::default()
    };
    let reply = world.coordinator.commit(encode(&CoordinatorEntry::Act(act)));
    assert_eq!(reply, CoordinatorReply::OldEpoch { newer: Epoch(2) }, "R6");
    assert!(world.decisions().is_empty(), "R6: an older epoch has decided");
    assert_eq!(world.coordinator.leading().machine.counts().horizon, Millis(0));
}

#[test]
fn a_confirmation_counts_for_its_own_shard_and_number_only() {
    let mut world = World::new(2, 2);
    world.elect();
    world.deliver_all();
    let rows = rows_of_two(&world);
    world.submit(add_batch(7, &rows));
    world.deliver_all_but_outcomes();
    assert_eq!((world.decisions().len(), world.leaders[0].leader.in_flight()), (1, 1));
    let decided = world.decisions()[0].number;
    let mut done = |shard: u32, letter: u8, number: Number, lost: bool| {
        let done = vec![Done { id: id(letter), number, lost }];
        let message = FromShard { done, ..FromShard::default() };
        world.step(0, Event::FromShard { shard: ShardId(shard), message });
        world.leaders[0].leader.in_flight()
    };
    let other = Number { sequence: decided.sequence + 1, ..decided };
    for shard in [1, 2] {
        assert_eq!(done(shard, 7, other, false), 1, "R4: another number");
        assert_eq!(done(shard, 8, decided, false), 1, "R2: another batch");
        assert_eq!(done(shard, 7, decided, true), 1, "R2: lost is not done");
    }
    for _ in 0..2 {
        assert_eq!(done(1, 7, decided, false), 1, "R2: the other participant has not said so");
    }
    assert_eq!(done(2, 7, decided, false), 0);
}

#[test]
fn a_deposed_leader_answers_no_read() {
    let mut world = World::new(1, 2);
    world.elect();
    world.deliver_all();
    world.elect();
    world.deliver_all();
    assert_eq!(world.leaders.len(), 2, "the first one doesn't know yet");
    world.submit(add_batch(7, &[row()]));
    world.deliver_all();
    // The outcome goes with the next tick; until then the read would wait for the part.
    world.tick(20);
    world.deliver_all();
    let token = world.read_at(0, vec![row()]);
    for _ in 0..2 {
        // The question, then the shard's answer. Nobody confirms that the first one leads.
        for packet in std::mem::take(&mut world.packets) {
            world.deliver(packet, 0);
        }
    }
    assert_eq!(world.reply(token), None, "it would miss what the second one has answered");
    let token = world.read_at(1, vec![row()]);
    world.deliver_all();
    assert!(matches!(world.reply(token), Some(Reply::Rows { .. })), "{:?}", world.reply(token));
}

/// Rule R7: what was asked before a read came says nothing about who leads when it comes.
#[test]
fn a_confirmation_that_was_asked_for_before_a_read_does_not_count_for_it() {
    let mut world = World::new(1, 2);
    world.elect();
    world.deliver_all();
    let first = world.read_at(0, vec![row()]);
    let asked = world.leaders[0].confirm.take().expect("a read wants the leadership to be confirmed");
    let second = world.read_at(0, vec![row()]);
    for _ in 0..2 {
        for packet in std::mem::take(&mut world.packets) {
            world.deliver(packet, 0);
        }
    }
    world.step(0, Event::Confirmed { asked });
    assert!(world.reply(first).is_some());
    assert_eq!(world.reply(second), None, "another one may lead since");
    let asked = world.leaders[0].confirm.take().expect("the second read wants one of its own");
    world.step(0, Event::Confirmed { asked });
    assert!(world.reply(second).is_some());
}

#[test]
fn a_list_of_decisions_is_whole_however_it_is_cut() {
    let mut world = World::new(1, 2);
    world.elect();
    world.deliver_all();
    for n in 0..50 {
        world.submit(add_batch(n, &[row()]));
    }
    world.settle();
    let replica = world.coordinator.leading();
    let (all, next) = replica.machine.list(&replica.store, 0, usize::MAX).unwrap();
    assert_eq!((all.len(), next), (50, None));
    for limit in [1, 7, 49, 50, 51] {
        let (mut found, mut next) = (Vec::new(), Some(0));
        while let Some(from) = next {
            let (page, after) = replica.machine.list(&replica.store, from, limit).unwrap();
            assert!(page.len() <= limit && (after.is_none() || page.len() == limit));
            found.extend(page);
            next = after;
        }
        assert_eq!(found, all, "{limit} at a time");
    }
}

#[test]
fn a_read_waits_for_a_decision_that_is_on_its_way_into_the_log() {
    let mut world = World::new(2, 2);
    world.elect();
    world.deliver_all();
    let rows = rows_of_two(&world);
    world.submit(add_batch(7, &rows));
    for _ in 0..2 {
        for packet in std::mem::take(&mut world.packets) {
            world.deliver(packet, 0);
        }
    }
    assert_eq!(
        (world.leaders[0].acts.len(), world.decisions().len()),
        (1, 0),
        "it has a stamp, and is not recorded"
    );
    let token = world.read(rows.to_vec());
    world.confirm();
    for _ in 0..4 {
        for packet in std::mem::take(&mut world.packets) {
            world.deliver(packet, 0);
        }
    }
    assert_eq!(world.reply(token), None, "what has a stamp at or below the position belongs to it");
    world.settle();
    let Some(Reply::Rows { rows, position }) = world.reply(token) else { panic!("{:?}", world.reply(token)) };
    let values: Vec<_> = rows.iter().map(|row| row.value.clone()).collect();
    assert_eq!(values, [RowValue::Balance(1), RowValue::Balance(1)], "at {position}");
}

#[test]
fn a_late_greeting_takes_no_epoch_back() {
    let mut world = greeted(5);
    assert_eq!(only_vote(&mut world, 5, prepare(7, number(5, 1), 5)), VoteKind::Yes);
    let late = ToShard { epoch: Epoch(3), greet: true, ..ToShard::default() };
    let greeting = say(&mut world, late).0.greeting.unwrap();
    assert_eq!((greeting.epoch, greeting.parts.len()), (Epoch(5), 1), "R11: what is recorded is told");
    assert_eq!(only_vote(&mut world, 3, prepare(8, number(3, 9), 5)), VoteKind::OldEpoch);
    restart_all(&mut world);
    assert_eq!(world.shards[&ShardId(1)].leading().machine.epoch(GroupId(0)), Epoch(5));
    assert_eq!(only_vote(&mut world, 5, prepare(9, number(5, 2), 5)), VoteKind::Yes);
}

/// A stamp above the ceiling that is recorded may be given again by the next leader, which begins there.
#[test]
fn no_stamp_is_given_above_the_recorded_ceiling() {
    for alone in [false, true] {
        let mut world = World::with(1, 2, |config| config.alone = alone);
        world.elect_with(|opened| {
            opened.ceiling = Stamp(opened.floor.0 + 2);
            // It is there already, or recording it would tell the leader of the ceiling that is recorded in truth.
            let window = Window { after: Millis(0), up_to: Millis(u64::MAX) };
            opened.windows.insert(ShardId(1), window);
        });
        world.deliver_all();
        for letter in 0..5 {
            world.submit(add_batch(letter, &[row()]));
        }
        let mut given = Vec::new();
        for _ in 0..2 {
            for packet in std::mem::take(&mut world.packets) {
                if let Packet::ToShard(_, message) = &packet {
                    given.extend(message.prepares.iter().filter_map(|prepare| prepare.sole));
                }
                world.deliver(packet, 0);
            }
        }
        let acts = &world.leaders[0].acts;
        given.extend(acts.iter().flat_map(|act| &act.decisions).filter_map(|one| one.result.clone().ok()));
        assert_eq!(
            given,
            [Stamp(1), Stamp(2)],
            "the others wait until the ceiling is raised (alone: {alone})"
        );
        assert!(acts.iter().any(|act| act.ceiling.is_some()), "nobody asks for a higher one");
        world.settle();
        let mut stamps: Vec<_> = world.recorded.iter().map(|one| one.result.clone().unwrap()).collect();
        stamps.sort();
        assert_eq!(stamps, [1, 2, 3, 4, 5].map(Stamp));
        world.check_at_rest();
    }
}

fn alone(letter: u8, number: Number, delta: i128, stamp: u64) -> Prepare {
    Prepare { sole: Some(Stamp(stamp)), ..prepare(letter, number, delta) }
}

#[test]
fn what_a_shard_committed_is_kept_without_rows_until_it_is_recorded() {
    let mut world = greeted(1);
    let committed = VoteKind::Committed(Stamp(4));
    let check_counts = |world: &World| {
        let counts = world.shards[&ShardId(1)].leading().machine.counts();
        assert_eq!((counts.in_doubt, counts.waiting, counts.settled, counts.held_rows), (0, 0, 1, 0));
    };
    assert_eq!(only_vote(&mut world, 1, alone(7, number(1, 1), 5, 4)), committed);
    check_counts(&world);
    restart_all(&mut world);
    assert_eq!(only_vote(&mut world, 1, alone(7, number(1, 1), 5, 4)), committed, "a repeat");
    check_counts(&world);
    let again = Prepare { gives_up: vec![number(1, 1)], ..prepare(7, number(1, 2), 5) };
    let message = ToShard { epoch: Epoch(1), prepares: vec![again], ..ToShard::default() };
    let vote = say(&mut world, message).0.votes.remove(0);
    assert_eq!((vote.number, vote.kind), (number(1, 1), committed), "whichever number asks, it has happened");
    let message =
        ToShard { epoch: Epoch(1), outcomes: vec![outcome(7, number(1, 1), None)], ..ToShard::default() };
    let (answer, alarms) = say(&mut world, message);
    assert!(answer.done[0].lost && alarms.len() == 1, "what has happened can't be aborted");
    let message = ToShard { epoch: Epoch(2), greet: true, ..ToShard::default() };
    let parts = say(&mut world, message).0.greeting.unwrap().parts;
    assert_eq!(parts.len(), 1, "R11: a greeting lists it");
    end(&mut world, outcome(7, number(1, 1), Some(4)));
    restart_all(&mut world);
    assert_eq!(world.shards[&ShardId(1)].leading().machine.held().count(), 0);
    assert_eq!(world.row(&row()).value, RowValue::Balance(5));
}

#[test]
fn a_shard_commits_in_the_order_of_stamps_after_a_restart_too() {
    let mut world = greeted(1);
    let committed = |stamp| VoteKind::Committed(Stamp(stamp));
    assert_eq!(only_vote(&mut world, 1, alone(7, number(1, 1), 5, 9)), committed(9));
    restart_all(&mut world);
    assert_eq!(only_vote(&mut world, 1, alone(8, number(1, 2), 5, 8)), VoteKind::Yes);
    assert_eq!(only_vote(&mut world, 1, alone(9, number(1, 3), 5, 10)), committed(10));
    end(&mut world, outcome(8, number(1, 2), Some(20)));
    assert_eq!(only_vote(&mut world, 1, alone(10, number(1, 4), 5, 15)), VoteKind::Yes);
    assert_eq!(only_vote(&mut world, 1, alone(11, number(1, 5), 5, 21)), committed(21));
}

/// Promise G10: when replicas are flushed makes no difference to what they answer, drop and hash.
#[test]
fn a_replica_that_is_never_flushed_does_what_the_others_do() {
    let placement = Placement { shards: 1 };
    let config = ShardConfig { shard: ShardId(1), placement, sweep_interval: 4 };
    let mut replicas = [1, 3, u64::MAX].map(|flushed_after| {
        let store = MemoryStore::default();
        (flushed_after, Shard::open(&config, &store).unwrap(), store)
    });
    for index in 1..=60 {
        // What the shard committed is recorded with the next entry. Now and then one is committed late, at a stamp below the newest.
        let before = 10 * (index - 1);
        let mut outcomes = vec![outcome(7, number(1, index - 1), Some(before))];
        let mut prepares = vec![alone(7, number(1, index), 1, 10 * index)];
        match index % 5 {
            0 => prepares.push(prepare(8, number(1, 1000 + index), 1)),
            1 => outcomes.push(outcome(8, number(1, 999 + index), Some(before.saturating_sub(5)))),
            _ => {}
        }
        if index == 1 {
            outcomes.clear();
        }
        let message = ToShard {
            placement,
            epoch: Epoch(1),
            greet: index == 1,
            history: Stamp(before.saturating_sub(20)),
            outcomes,
            prepares,
            ..ToShard::default()
        };
        let entry = encode(&ShardEntry { now: START, parts_max: 9, messages: vec![message] });
        let answers = replicas.each_mut().map(|(flushed_after, shard, store)| {
            let reply = machine::apply(shard, store, index, &entry).unwrap();
            if index.is_multiple_of(*flushed_after) {
                shard.flush(store).unwrap();
                shard.trim(0);
            }
            assert_eq!(reply.alarms, Vec::<String>::new());
            (reply, position(store).unwrap())
        });
        assert!(answers.iter().all(|answer| *answer == answers[0]), "entry {index}: {answers:?}");
    }
    let stores = replicas.map(|(_, mut shard, mut store)| {
        shard.flush(&mut store).unwrap();
        shard.trim(0);
        store
    });
    assert!(stores.iter().all(|store| *store == stores[0]));
    let entries = stores[0].iter().filter(|(key, _)| key[0] == 0x11).count();
    assert!(entries < 20, "{entries} of 60 undo entries are left");
}

#[test]
fn a_copy_of_what_was_refused_commits_nothing() {
    let mut world = greeted(1);
    let put = |prepare: Prepare| {
        let mut prepare = prepare;
        prepare.part =
            part(&Operation { row: row(), kind: OperationKind::Put(bytes::Bytes::from_static(b"x")) });
        prepare
    };
    assert_eq!(only_vote(&mut world, 1, put(prepare(8, number(1, 2), 0))), VoteKind::Yes);
    assert_eq!(only_vote(&mut world, 1, put(alone(7, number(1, 1), 0, 1))), VoteKind::Conflict);
    end(&mut world, outcome(8, number(1, 2), None));
    restart_all(&mut world);
    assert_eq!(only_vote(&mut world, 1, put(alone(7, number(1, 1), 0, 1))), VoteKind::Finished);
}

#[test]
fn an_id_that_a_silent_shard_may_have_committed_is_not_sealed() {
    let mut world = World::new(2, 2);
    world.elect();
    world.deliver_all();
    world.elect();
    let token = world.query(id(7), true);
    assert_eq!(world.reply(token), Some(&Reply::InProgress), "R13: nobody knows yet");
    world.deliver_all();
    let token = world.query(id(7), true);
    world.deliver_all();
    assert!(matches!(world.reply(token), Some(Reply::Decided(_))));
}

#[test]
fn a_batch_for_a_silent_shard_that_was_never_sent_ends_without_a_claim() {
    let mut world = World::new(2, 2);
    world.elect();
    world.deliver_all();
    world.down.insert(ShardId(2));
    world.crash(0);
    world.elect();
    world.deliver_all();
    let [_, row] = rows_of_two(&world);
    let token = world.submit(add_batch(7, std::slice::from_ref(&row))).unwrap();
    let new = BatchId::from_parts(Millis(START.0 + 9_000), [9; 10]);
    let later = world.submit(Batch { id: new, ..add_batch(9, &[row]) }).unwrap();
    world.tick(11_000);
    assert_eq!(world.reply(token), Some(&Reply::InProgress), "R13: an earlier leader may have sent it");
    assert_eq!(world.leaders[0].leader.in_flight(), 1, "G9: nothing is kept of it");
    world.deliver_all();
    let Some(Reply::Decided(decision)) = world.reply(later) else {
        panic!("no earlier leader can have let this")
    };
    assert!(decision.result.is_err());
}

#[test]
fn a_window_begins_before_all_that_is_not_recorded() {
    let mut world = World::with(2, 2, |config| config.alone_behind_ms = 0);
    world.elect();
    world.deliver_all();
    let [row, _] = rows_of_two(&world);
    world.submit(add_batch(7, std::slice::from_ref(&row)));
    let [Packet::ToShard(_, message)] = &world.packets[..] else { panic!("one prepare") };
    assert!(message.prepares[0].sole.is_some());
    world.packets.clear();
    world.tick(400);
    world.submit(add_batch(8, std::slice::from_ref(&row)));
    world.deliver_all();
    world.tick(400);
    world.submit(add_batch(9, &[row]));
    let window = world.leaders[0].acts.last().expect("a later window is asked for").windows[&ShardId(1)];
    assert!(window.contains(id(7)), "the shard may have committed it: {window:?}");
    assert!(window.up_to > world.now);
}

#[test]
fn what_comes_behind_a_no_is_not_committed_below_it() {
    let mut world = greeted(1);
    // The credit was sent first, with stamp 3. The debit overtakes it, and is refused for want of it.
    let debit = prepare(8, number(1, 2), -5);
    assert!(matches!(only_vote(&mut world, 1, debit.clone()), VoteKind::No(_)));
    restart_all(&mut world);
    let credit = alone(7, number(1, 1), 5, 3);
    assert_eq!(only_vote(&mut world, 1, credit), VoteKind::Yes, "G6: at stamp 3 the NO would be false");
    assert_eq!(only_vote(&mut world, 1, alone(9, number(1, 3), 1, 4)), VoteKind::Committed(Stamp(4)));
    assert!(matches!(only_vote(&mut world, 1, debit), VoteKind::No(_)), "a NO stands");
}
