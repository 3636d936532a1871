//! What must hold: of each step of a part, and of each state of the cluster.
//!
//! The rules look at the machines from outside, and compare them with what a [`Witness`] has seen: an observer who sees every
//! entry of the coordinators' log and hears every answer, and whom nothing in the cluster knows.

use std::collections::BTreeMap;

use verdict_protocol::{
    batch::{Batch, Operation, OperationKind, Placement, RowKey},
    coordinator::{Act, Coordinator, CoordinatorEntry},
    ids::{BatchId, GroupId, Number, ShardId, Stamp},
    machine::Machine,
    messages::{
        Abort, AbortReason, Decision, FromShard, HeldPart, PartOutcome, RowAt, RowChange, RowValue,
        ShardQuery, ShardRead, ShardReadAnswer, ToShard, VoteKind,
    },
    plain,
    shard::{Shard, ShardConfig},
    show::name_of,
};

use crate::{
    case::{Contents, shard_of},
    parts::{Replica, apply_to_coordinator, apply_to_shard},
};

/// What was seen of a path that leads to a state, as far as the rules need it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Witness {
    /// All decisions, in the order of recording.
    pub decisions: Vec<Decision>,
    /// For each batch of the case that was submitted: the greatest stamp that anybody had been told by then.
    pub submitted: Vec<Option<Stamp>>,
    /// The greatest stamp that anybody was told, in an outcome or as the position of a read.
    pub told: Stamp,
    /// The read has begun: the greatest stamp that anybody had been told by then.
    pub read_after: Option<Stamp>,
    /// The greatest position of an answered read.
    pub read_at: Stamp,
}

/// A rule that is broken says how.
pub type Checked = Result<(), String>;

fn demand(holds: bool, broken: impl FnOnce() -> String) -> Checked {
    if holds { Ok(()) } else { Err(broken()) }
}

impl Witness {
    /// The decision of an id.
    pub fn decision(&self, id: BatchId) -> Option<&Decision> {
        self.decisions.iter().find(|decision| decision.id == id)
    }

    /// What all rows hold at a position, by the plain meaning of all committed batches in the order of their stamps.
    fn rows_at(&self, contents: &Contents, position: Stamp) -> Result<BTreeMap<RowKey, RowAt>, String> {
        let mut rows = BTreeMap::new();
        for (stamp, batch) in self.committed(contents) {
            if stamp <= position {
                run_all(&mut rows, stamp, &batch.operations).map_err(|why| {
                    format!("batch {} is committed at {stamp}, but {why}", name_of(batch.id))
                })?;
            }
        }
        Ok(rows)
    }

    fn committed<'a>(&'a self, contents: &'a Contents) -> Vec<(Stamp, &'a Batch)> {
        let mut committed: Vec<(Stamp, &Batch)> = self
            .decisions
            .iter()
            .filter_map(|decision| Some((*decision.result.as_ref().ok()?, contents.of(decision)?)))
            .collect();
        committed.sort_unstable_by_key(|(stamp, _)| *stamp);
        committed
    }

    /// A decision is recorded. `holds` tells of each shard what it holds of the batch.
    pub fn record(&mut self, contents: &Contents, decision: &Decision, held: &[Vec<HeldPart>]) -> Checked {
        let (id, name) = (decision.id, name_of(decision.id));
        if let Some(before) = self.decision(id) {
            return Err(format!("{name} is decided a second time: {decision:?} after {before:?}"));
        }
        match &decision.result {
            Ok(stamp) => {
                self.may_commit(contents, decision, *stamp)?;
                self.is_voted(decision, held)?;
                self.decisions.push(decision.clone());
                self.rows_at(contents, Stamp(u64::MAX))?;
            }
            Err(abort) => {
                if matches!(
                    abort.reason,
                    AbortReason::ShortOfFunds | AbortReason::ConditionNotMet | AbortReason::RowExists
                ) {
                    self.is_true_rejection(contents, decision)?;
                }
                self.decisions.push(decision.clone());
            }
        }
        Ok(())
    }

    /// A shard commits a batch on its own word.
    pub fn settle(&mut self, contents: &Contents, decision: &Decision) -> Checked {
        if let Some(before) = self.decision(decision.id) {
            return Err(format!(
                "{} is committed by its shard: {decision:?} after {before:?}",
                name_of(decision.id)
            ));
        }
        let stamp = decision.result.clone().expect("only commits are settled");
        self.may_commit(contents, decision, stamp)?;
        self.decisions.push(decision.clone());
        self.rows_at(contents, Stamp(u64::MAX)).map(|_| ())
    }

    /// The order of stamps.
    fn may_commit(&self, contents: &Contents, decision: &Decision, stamp: Stamp) -> Checked {
        let name = name_of(decision.id);
        let place = self.place(contents, decision)?;
        let after = self.submitted[place].unwrap_or_default();
        demand(stamp > after, || format!("{name} gets stamp {stamp}, but {after} was told before it came"))?;
        demand(stamp > self.read_at, || {
            format!("{name} gets stamp {stamp}, but a read at {} was answered", self.read_at)
        })?;
        let twice = self.decisions.iter().find(|other| other.result.as_ref().ok() == Some(&stamp));
        demand(twice.is_none(), || format!("stamp {stamp} is given twice"))
    }

    /// Vote durability.
    fn is_voted(&self, decision: &Decision, held: &[Vec<HeldPart>]) -> Checked {
        let name = name_of(decision.id);
        for shard in &decision.shards {
            let parts = &held[shard.0 as usize - 1];
            demand(parts.iter().any(|part| is_yes(part, decision)), || {
                format!(
                    "{name} is committed under {}, but shard {shard} holds no YES under it",
                    decision.number
                )
            })?;
        }
        Ok(())
    }

    fn place(&self, contents: &Contents, decision: &Decision) -> Result<usize, String> {
        let found = contents
            .split
            .iter()
            .position(|batch| decision.hash == Some(batch.hash) && batch.id == decision.id);
        match found {
            Some(place) if self.submitted[place].is_some() => Ok(place),
            _ => Err(format!("{} is decided with contents that nobody submitted", name_of(decision.id))),
        }
    }

    /// Promise G6: a business rejection is true at some place in the order of all batches since its batch came.
    fn is_true_rejection(&self, contents: &Contents, decision: &Decision) -> Checked {
        let place = self.place(contents, decision)?;
        let from = self.submitted[place].unwrap_or_default();
        let operations = &contents.batches[place].operations;
        let fails =
            |rows: &BTreeMap<RowKey, RowAt>| run_all(&mut rows.clone(), Stamp(u64::MAX), operations).is_err();
        let mut rows = BTreeMap::new();
        let mut is_true = from == Stamp(0) && fails(&rows);
        for (stamp, batch) in self.committed(contents) {
            run_all(&mut rows, stamp, &batch.operations)?;
            is_true |= stamp >= from && fails(&rows);
        }
        demand(is_true, || {
            format!(
                "{} is rejected by {:?}, which was never so since it came",
                name_of(decision.id),
                decision.result
            )
        })
    }

    /// An outcome is told to a caller.
    pub fn tell(&mut self, decision: &Decision) -> Checked {
        let stands = self.decision(decision.id);
        demand(stands == Some(decision), || {
            format!("{} is answered with {:?}, but {stands:?} stands", name_of(decision.id), decision.result)
        })?;
        if let Ok(stamp) = decision.result {
            self.told = self.told.max(stamp);
        }
        Ok(())
    }

    /// A read is answered.
    pub fn tell_read(
        &mut self,
        contents: &Contents,
        asked: &[RowKey],
        position: Stamp,
        rows: &[RowAt],
    ) -> Checked {
        let after = self.read_after.expect("only a read that began is answered");
        demand(position >= after, || {
            format!("a read is answered at {position}, but {after} was told before it began")
        })?;
        let expected = self.rows_at(contents, position)?;
        for (row, found) in asked.iter().zip(rows) {
            let should = expected.get(row).cloned().unwrap_or_default();
            demand(*found == should, || {
                format!("a read at {position} sees {found:?} in {row:?}, not {should:?}")
            })?;
        }
        self.read_at = self.read_at.max(position);
        self.told = self.told.max(position);
        Ok(())
    }
}

fn is_yes(part: &HeldPart, decision: &Decision) -> bool {
    part.id == decision.id && part.number == decision.number && part.vote == VoteKind::Yes
}

fn run_all(rows: &mut BTreeMap<RowKey, RowAt>, stamp: Stamp, operations: &[Operation]) -> Checked {
    operations.iter().try_for_each(|operation| {
        let row = rows.entry(operation.row.clone()).or_default();
        plain::run(row, stamp, &operation.kind).map_err(|why| format!("{:?}: {why}", operation.row))
    })
}

/// What a shard holds, by number.
pub fn held(shard: &Replica<Shard>) -> Vec<HeldPart> {
    shard.machine.held().map(|held| held.part).collect()
}

/// What a shard commits on its own word with a message.
pub fn committed(
    before: &Replica<Shard>,
    shard: ShardId,
    message: &ToShard,
    answer: &FromShard,
) -> Vec<Decision> {
    let known = held(before);
    let mut committed: Vec<Decision> = Vec::new();
    for vote in &answer.votes {
        let VoteKind::Committed(stamp) = vote.kind else { continue };
        let prepare = message.prepares.iter().find(|prepare| prepare.number == vote.number);
        if let Some(prepare) = prepare
            && !known.iter().any(|part| part.number == vote.number)
        {
            let (id, hash) = (vote.id, Some(prepare.hash));
            committed.push(Decision {
                id,
                hash,
                shards: vec![shard],
                number: vote.number,
                result: Ok(stamp),
            });
        }
    }
    committed
}

/// What every entry of a shard's log must keep.
pub fn shard_step(
    before: &Replica<Shard>,
    after: &Replica<Shard>,
    message: &ToShard,
    answer: &FromShard,
) -> Checked {
    let coordinator = GroupId::COORDINATOR;
    let (old, new) = (&before.machine, &after.machine);
    let (held_before, held_after) = (held(before), held(after));
    let epoch = new.epoch(coordinator);
    demand(epoch >= old.epoch(coordinator), || "a shard's epoch goes back".to_owned())?;
    if let Some(greeting) = &answer.greeting {
        demand(greeting.epoch == epoch && epoch >= message.epoch, || {
            "R11: a greeting is answered before its epoch is recorded".to_owned()
        })?;
        let all = held_before.iter().all(|part| greeting.parts.contains(part));
        demand(all && greeting.parts.len() == held_before.len(), || {
            "R11: a greeting is answered without all that is held".to_owned()
        })?;
    }
    for part in held_before.iter().filter(|part| part.vote == VoteKind::Yes) {
        let stays = held_after.contains(part);
        let ended = message.outcomes.iter().any(|outcome| {
            outcome.id == part.id
                && (outcome.number == part.number
                    || (outcome.commit.is_none() && outcome.gives_up.contains(&part.number)))
        });
        let given_up = message.prepares.iter().any(|prepare| {
            prepare.id == part.id
                && prepare.number > part.number
                && prepare.number.epoch == part.number.epoch
                && part.number.epoch == epoch
        });
        demand(stays || ended || given_up, || {
            format!("R3: the YES of {} under {} is gone without an outcome", name_of(part.id), part.number)
        })?;
    }
    for part in &held_before {
        let VoteKind::Committed(stamp) = part.vote else { continue };
        let recorded = message.outcomes.iter().any(|outcome| {
            outcome.id == part.id && outcome.number == part.number && outcome.commit == Some(stamp)
        });
        demand(recorded || held_after.contains(part), || {
            format!("R13: the commit of {} is gone before it was recorded", name_of(part.id))
        })?;
    }
    for prepare in &message.prepares {
        let (number, name) = (prepare.number, name_of(prepare.id));
        let vote = answer.votes.iter().find(|vote| vote.number == number).map(|vote| &vote.kind);
        let was_held = held_before.iter().find(|part| part.number == number);
        let is_held = held_after.iter().find(|part| part.number == number);
        let is_late = number.epoch != epoch || old.is_finished(coordinator, number);
        if is_late {
            let refused = is_held.is_none() || was_held.is_some();
            demand(refused, || format!("R4: a late prepare of {name} under {number} is taken"))?;
            let no_vote = matches!(vote, None | Some(VoteKind::OldEpoch | VoteKind::Finished));
            demand(no_vote, || format!("R4: a late prepare of {name} under {number} gets {vote:?}"))?;
        } else if let Some(part) = was_held
            && !message.outcomes.iter().any(|outcome| outcome.id == prepare.id)
        {
            demand(vote == Some(&part.vote) || part.vote == VoteKind::Waiting, || {
                format!("R4: {name} under {number} had the vote {:?}, now {vote:?}", part.vote)
            })?;
        }
        if vote == Some(&VoteKind::Yes) {
            demand(is_held.is_some_and(|part| part.vote == VoteKind::Yes), || {
                format!("{name} under {number} is answered YES, and not held")
            })?;
        }
    }
    for done in answer.done.iter().filter(|done| !done.lost) {
        let remains = held_after.iter().any(|part| part.id == done.id && part.number == done.number);
        demand(!remains && new.is_finished(coordinator, done.number), || {
            format!("R2: {} under {} is said to be done, and isn't", name_of(done.id), done.number)
        })?;
    }
    Ok(())
}

/// A replica that starts again from what it has stored is what it was: no lock, part or number lives in memory alone (R5).
pub fn reopens(shard: &Replica<Shard>, id: ShardId, placement: Placement) -> Checked {
    let config = ShardConfig { shard: id, placement, sweep_interval: 1 };
    let again = Shard::open(&config, &shard.store).map_err(|error| error.to_string())?;
    demand(again == shard.machine, || {
        format!("R5: shard {id}, opened again from its store, is not what it was: {again:?}")
    })
}

/// A message that no leader of this protocol would send must not hurt: a mark above what is held takes nothing away (R3), and an
/// outcome of something unknown is never confirmed (R2).
pub fn bears_lies(shard: &Replica<Shard>, placement: Placement) -> Checked {
    let epoch = shard.machine.epoch(GroupId::COORDINATOR);
    let lie = ToShard { coordinator: GroupId::COORDINATOR, placement, epoch, ..ToShard::default() };
    let never = Number { epoch, sequence: u64::MAX - 1 };
    let mut marked = shard.clone();
    let is_held = held(shard);
    apply_to_shard(
        &mut marked,
        u32::MAX,
        &ToShard { mark: Number { sequence: never.sequence - 1, ..never }, ..lie.clone() },
    );
    demand(held(&marked) == is_held, || "R3: a mark takes away what is held".to_owned())?;
    let id = is_held.first().map_or(BatchId([7; 16]), |part| part.id);
    let outcome = PartOutcome { id, number: never, commit: Some(Stamp(u64::MAX - 1)), gives_up: Vec::new() };
    let mut told = shard.clone();
    let reply = apply_to_shard(&mut told, u32::MAX, &ToShard { outcomes: vec![outcome], ..lie });
    let lost = reply.messages.iter().flat_map(|(_, answer)| &answer.done).all(|done| done.lost);
    demand(lost && held(&told) == is_held, || {
        format!("R2: a commit under {never}, which was never voted on, is said to be done")
    })
}

/// Whatever a leader proposes, a decision that stands stands (R1).
pub fn bears_contradiction(coordinator: &Replica<Coordinator>) -> Checked {
    let list = |replica: &Replica<Coordinator>| {
        let listed = replica.machine.list(&replica.store, 0, usize::MAX).expect("memory doesn't fail");
        listed.0.into_iter().map(|listed| listed.decision).collect::<Vec<_>>()
    };
    let stand = list(coordinator);
    let epoch = coordinator.machine.counts().epoch;
    let turned = stand.iter().map(|decision| Decision {
        result: match decision.result {
            Ok(_) => Err(Abort::because(AbortReason::Interrupted)),
            Err(_) => Ok(Stamp(1)),
        },
        ..decision.clone()
    });
    let act = Act { epoch, decisions: turned.collect(), ..Act::default() };
    let mut after = coordinator.clone();
    apply_to_coordinator(&mut after, &CoordinatorEntry::Act(act));
    demand(list(&after) == stand, || "R1: a second decision of an id changes the first".to_owned())
}

/// What an entry of the coordinators' log recorded. What stood before still stands, or was finished and is forgotten.
pub fn recorded(
    before: &Replica<Coordinator>,
    after: &Replica<Coordinator>,
) -> Result<Vec<Decision>, String> {
    let again = Coordinator::open(&(), &after.store).map_err(|error| error.to_string())?;
    demand(again == after.machine, || {
        "R5: the coordinators, opened again, are not what they were".to_owned()
    })?;
    let list = |replica: &Replica<Coordinator>| {
        replica.machine.list(&replica.store, 0, usize::MAX).map_err(|error| error.to_string())
    };
    let ((old, _), (new, _)) = (list(before)?, list(after)?);
    for was in &old {
        let is = new.iter().find(|listed| listed.decision.id == was.decision.id);
        let name = name_of(was.decision.id);
        match is {
            Some(is) => demand(is.decision == was.decision, || {
                format!("R1: the decision of {name} changes from {:?} to {:?}", was.decision, is.decision)
            })?,
            None => {
                let horizon = after.machine.counts().horizon;
                demand(was.decision.id.time() <= horizon, || format!("the decision of {name} vanishes"))?;
            }
        }
    }
    let is_new = |decision: &Decision| !old.iter().any(|was| was.decision.id == decision.id);
    Ok(new.into_iter().map(|listed| listed.decision).filter(is_new).collect())
}

/// The changes that a shard has made to a row.
fn changes(shard: &Replica<Shard>, row: &RowKey) -> Vec<RowChange> {
    let query = ShardQuery::History { row: row.clone(), from: Stamp(0), limit: usize::MAX };
    let read = ShardRead { position: Stamp(u64::MAX - 1), known: true, wait_for: Vec::new(), query };
    match shard.machine.read(&shard.store, GroupId::COORDINATOR, &read) {
        Ok(Some(ShardReadAnswer::History { changes, .. })) => changes,
        other => panic!("a history is answered with {other:?}"),
    }
}

/// What a shard has settled in a row.
pub fn settled(shard: &Replica<Shard>, row: &RowKey) -> RowAt {
    let query = ShardQuery::Rows(vec![row.clone()]);
    let read = ShardRead { position: Stamp(u64::MAX - 1), known: true, wait_for: Vec::new(), query };
    match shard.machine.read(&shard.store, GroupId::COORDINATOR, &read) {
        Ok(Some(ShardReadAnswer::Rows(mut rows))) => rows.pop().expect("one row was asked for"),
        other => panic!("a row is answered with {other:?}"),
    }
}

fn operations_of(batch: &Batch, placement: Placement, shard: ShardId) -> Vec<Operation> {
    let on_shard = |operation: &&Operation| shard_of(placement, &operation.row) == shard;
    batch.operations.iter().filter(on_shard).cloned().collect()
}

fn writes(operations: &[Operation]) -> bool {
    operations.iter().any(|operation| !matches!(operation.kind, OperationKind::Require(_)))
}

/// A shard against all that is decided: atomicity, exactly once, vote durability, and what its rows hold.
pub fn shard_and_witness(
    contents: &Contents,
    placement: Placement,
    shard: &Replica<Shard>,
    witness: &Witness,
) -> Checked {
    let id = shard.machine.id();
    let parts = held(shard);
    let mut rows: BTreeMap<RowKey, Vec<RowChange>> = BTreeMap::new();
    for operation in contents.batches.iter().flat_map(|batch| operations_of(batch, placement, id)) {
        let changes = changes(shard, &operation.row);
        rows.insert(operation.row, changes);
    }
    rows_hold_what_was_done(contents, shard, witness, &rows)?;
    for decision in witness.decisions.iter().filter(|decision| decision.shards.contains(&id)) {
        let name = name_of(decision.id);
        let batch = contents.of(decision).ok_or_else(|| format!("nobody submitted {name} like this"))?;
        let operations = operations_of(batch, placement, id);
        let mut stamps = rows.values().flatten().filter(|change| change.id == decision.id);
        let is_held = parts.iter().any(|part| is_yes(part, decision));
        match &decision.result {
            Err(_) => demand(stamps.next().is_none(), || {
                format!("G1: {name} is aborted, and has an effect on shard {id}")
            })?,
            Ok(stamp) => {
                let done = stamps.count();
                let changed: Vec<&RowKey> = rows
                    .iter()
                    .filter(|(_, changes)| changes.iter().any(|change| change.id == decision.id))
                    .map(|(row, _)| row)
                    .collect();
                let all = operations
                    .iter()
                    .filter(|operation| !matches!(operation.kind, OperationKind::Require(_)))
                    .all(|operation| changed.contains(&&operation.row));
                demand(done == changed.len() && (done == 0 || all), || {
                    format!(
                        "G3: {name} at {stamp} has an effect more than once, or half of one, on shard {id}"
                    )
                })?;
                let committed = |part: &HeldPart| {
                    part.number == decision.number && part.vote == VoteKind::Committed(*stamp)
                };
                let finished = shard.machine.is_finished(GroupId::COORDINATOR, decision.number)
                    || parts.iter().any(committed);
                let is_done = if writes(&operations) { done > 0 } else { !is_held && finished };
                demand(is_held != is_done, || {
                    format!(
                        "G1: {name} is committed under {} and shard {id} holds its YES: {is_held}, has carried it \
                         out: {is_done}",
                        decision.number
                    )
                })?;
                let again = parts.iter().any(|part| part.id == decision.id && part.number != decision.number);
                let hash = decision.hash;
                let same = parts.iter().any(|part| part.id == decision.id && Some(part.hash) == hash);
                demand(!(is_done && again && same), || {
                    format!("G3: {name} is committed and carried out, and held once more on shard {id}")
                })?;
            }
        }
    }
    any_outcome_will_do(contents, placement, shard, &parts)
}

/// Every change belongs to a commit, and the values are what the operations make of them in the order of the stamps.
fn rows_hold_what_was_done(
    contents: &Contents,
    shard: &Replica<Shard>,
    witness: &Witness,
    rows: &BTreeMap<RowKey, Vec<RowChange>>,
) -> Checked {
    for (row, changes) in rows {
        let mut now = RowAt::default();
        for change in changes {
            let name = name_of(change.id);
            let decision = witness.decision(change.id);
            let decision = decision.filter(|decision| decision.result.as_ref().ok() == Some(&change.stamp));
            let Some(decision) = decision else {
                return Err(format!(
                    "G1: {row:?} was changed by {name} at {}, which isn't decided",
                    change.stamp
                ));
            };
            let batch = contents.of(decision).ok_or_else(|| format!("nobody submitted {name} like this"))?;
            for operation in batch.operations.iter().filter(|operation| operation.row == *row) {
                plain::run(&mut now, change.stamp, &operation.kind)
                    .map_err(|why| format!("G7: {name} at {} on {row:?}: {why}", change.stamp))?;
            }
            demand(now.value == change.result, || {
                format!("{row:?} is {:?} after {name}, not {:?}", change.result, now.value)
            })?;
        }
        let found = settled(shard, row);
        demand(found == now, || format!("{row:?} is {found:?}, not {now:?}"))?;
    }
    Ok(())
}

/// Whatever becomes of the others, each part that voted YES can be carried out: its bounds and conditions hold for every subset of
/// the other parts in doubt.
fn any_outcome_will_do(
    contents: &Contents,
    placement: Placement,
    shard: &Replica<Shard>,
    parts: &[HeldPart],
) -> Checked {
    let id = shard.machine.id();
    let mut granted = Vec::new();
    for part in parts.iter().filter(|part| part.vote == VoteKind::Yes) {
        let batch = contents.held(part.id, part.hash);
        let batch = batch.ok_or_else(|| format!("{} is held as nobody submitted it", name_of(part.id)))?;
        granted.push((part, operations_of(batch, placement, id)));
    }
    for (place, (part, operations)) in granted.iter().enumerate() {
        for subset in 0..1_u32 << granted.len() {
            if subset & (1 << place) != 0 {
                continue;
            }
            let mut rows: BTreeMap<RowKey, RowAt> = operations
                .iter()
                .map(|operation| (operation.row.clone(), settled(shard, &operation.row)))
                .collect();
            let others = granted.iter().enumerate().filter(|(other, _)| subset & (1 << other) != 0);
            for operation in others.flat_map(|(_, (_, operations))| operations) {
                if let Some(row) = rows.get_mut(&operation.row) {
                    do_anyway(row, &operation.kind);
                }
            }
            run_all(&mut rows, Stamp(u64::MAX), operations).map_err(|why| {
                format!("G7: shard {id} voted YES to {}, but if others commit, {why}", name_of(part.id))
            })?;
        }
    }
    Ok(())
}

/// The effect of an operation whose conditions somebody else answers for.
fn do_anyway(row: &mut RowAt, kind: &OperationKind) {
    match kind {
        OperationKind::Add { delta, .. } => {
            let before = if let RowValue::Balance(before) = row.value { before } else { 0 };
            row.value = RowValue::Balance(before + delta);
        }
        OperationKind::Put(value) | OperationKind::Insert(value) => {
            row.value = RowValue::Record(value.clone());
        }
        OperationKind::Delete => row.value = RowValue::Absent,
        OperationKind::Require(_) => return,
    }
    row.version = Stamp(u64::MAX);
}

/// What the coordinators take for finished has ended on every participant.
pub fn shard_and_coordinator(
    contents: &Contents,
    placement: Placement,
    shard: &Replica<Shard>,
    coordinator: &Replica<Coordinator>,
) -> Checked {
    let id = shard.machine.id();
    let parts = held(shard);
    let listed = coordinator.machine.list(&coordinator.store, 0, usize::MAX);
    let (listed, _) = listed.map_err(|error| error.to_string())?;
    for finished in listed.iter().filter(|listed| listed.finished) {
        let decision = &finished.decision;
        let name = name_of(decision.id);
        if !decision.shards.contains(&id) {
            continue;
        }
        // An aborted batch may be held under a number that its decision doesn't know: a stray, which is ended on its own.
        let held = parts.iter().any(|part| {
            part.id == decision.id
                && part.number == decision.number
                && !matches!(part.vote, VoteKind::Committed(_))
        });
        demand(!held, || format!("R2: {name} is recorded as finished, and shard {id} still holds a part"))?;
        if decision.result.is_ok()
            && let Some(batch) = contents.of(decision)
            && let operations = operations_of(batch, placement, id)
            && writes(&operations)
        {
            let done = operations.iter().any(|operation| {
                changes(shard, &operation.row).iter().any(|change| change.id == decision.id)
            });
            demand(done, || format!("R2: {name} is recorded as finished, and shard {id} has not done it"))?;
        }
    }
    Ok(())
}
