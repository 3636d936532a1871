//! Tells a path as golden scripts do: what is done after `>`, and below it what is said.

use std::fmt::Write as _;

use verdict_protocol::{
    ids::BatchId,
    show::{self, name_of},
};

use crate::{
    case::BEFORE,
    model::{Action, Model, State},
    parts::{Packet, Parts},
};

/// A path to a broken rule.
pub fn tell(model: &Model, first: &State, path: &[Action], rule: &str) -> String {
    let case = &model.parts.case;
    let mut out = format!("# {rule}\n> world {}\n> elect\n> rest\n", case.shards);
    if !case.before.is_empty() {
        writeln!(out, "> submit {BEFORE} {}\n> rest", case.before).expect("a string takes all");
    }
    let mut state = first.clone();
    for action in path {
        writeln!(out, "> {}", step(model, &state, *action)).expect("a string takes all");
        let Ok(Some(next)) = model.next(&state, *action) else { break };
        for line in said(model, &state, &next) {
            writeln!(out, "{line}").expect("a string takes all");
        }
        state = next;
    }
    write!(out, "# broken after {} steps: {rule}", path.len()).expect("a string takes all");
    out
}

fn step(model: &Model, state: &State, action: Action) -> String {
    let parts = &model.parts;
    let whose = |seat: u8| if usize::from(seat) + 1 == state.seats.len() { "" } else { " old" };
    let batch_of = |place: u8| {
        let (letter, text) = parts.case.batches[usize::from(place) - parts.contents.first];
        (letter, text)
    };
    match action {
        Action::Submit { seat, batch } => {
            let (letter, text) = batch_of(batch);
            format!("submit{} {letter} {text}", whose(seat))
        }
        Action::Seal { batch } => format!("cancel {}", batch_of(batch).0),
        Action::Read { seat } => format!("read{} {}", whose(seat), parts.case.read),
        Action::Deliver { seat, packet, keep } => {
            let verb = if keep { "repeat" } else { "deliver" };
            let packet = parts.packets.get(packet);
            let to_leader = matches!(packet, Packet::FromShard(..) | Packet::Answer(..));
            format!("{verb}{} {}", if to_leader { whose(seat) } else { "" }, shown(packet))
        }
        Action::Record { seat } if parts.case.prompt => format!("apply{}", whose(seat)),
        Action::Record { seat } => format!("apply{} (recorded)", whose(seat)),
        Action::Hear { seat } => format!("apply{} (heard)", whose(seat)),
        Action::Confirm => "confirm".to_owned(),
        Action::Tick { seat } => format!("tick{} {}", whose(seat), crate::case::TICK_MS),
        Action::Beat { seat } => format!("tick{} 0", whose(seat)),
        Action::Elect if parts.case.deposed => "elect".to_owned(),
        Action::Elect => "crash 0\n> elect".to_owned(),
        Action::Move { shard } => format!("reconnect {}", shard + 1),
        Action::Ask { shard } => format!("ask {}", shard + 1),
    }
}

fn shown(packet: &Packet) -> String {
    match packet {
        Packet::ToShard(shard, message) => format!("to {shard}: {}", show::to_shard(message)),
        Packet::Read(shard, _, read) => format!("to {shard}: {}", show::read(read)),
        Packet::FromShard(shard, message) => format!("from {shard}: {}", show::from_shard(message)),
        Packet::Answer(shard, _, answer) => format!("from {shard}: {}", show::read_answer(answer)),
    }
}

/// What was sent, decided and done in a step.
fn said(model: &Model, before: &State, after: &State) -> Vec<String> {
    let parts = &model.parts;
    let sent = after.packets.iter().filter(|packet| !before.packets.contains(packet));
    let mut lines: Vec<String> = sent.map(|packet| shown(parts.packets.get(*packet))).collect();
    let (old, new) = (model.witnesses.get(before.witness), model.witnesses.get(after.witness));
    for decision in &new.decisions[old.decisions.len()..] {
        let (name, number) = (name_of(decision.id), decision.number);
        lines.push(format!("decided: {name} {number} {}", show::decision(decision)));
    }
    if new.told > old.told {
        lines.push(format!("told: up to stamp {}", new.told));
    }
    for (shard, (was, is)) in before.shards.iter().zip(&after.shards).enumerate() {
        if was != is {
            lines.push(format!("shard {} holds [{}]", shard + 1, holds(parts, *is)));
        }
    }
    lines
}

fn holds(parts: &Parts, shard: u32) -> String {
    let held = crate::rules::held(parts.shards.get(shard));
    let held = held.iter().map(|part| {
        let id: BatchId = part.id;
        format!("{} {} {}", name_of(id), part.number, show::vote(&part.vote))
    });
    held.collect::<Vec<_>>().join("; ")
}
