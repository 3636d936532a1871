//! Golden scripts: each file of `scripts/` tells a story whose claim is its name. Lines with `>` are commands, the lines below each
//! are what happened. `UPDATE_SCRIPTS=1 cargo test -p verdict-protocol --test scripts` writes them anew; read the diff as code.
//!
//! Commands:
//! - `world SHARDS`, `world SHARDS alone`: shards may commit by themselves; `elect`: a new leader opens its epoch, the old one lives on
//!   unaware; `crash N`: the leader dies, its first N proposals are in the log all the same; `apply`: its next proposal is applied, `apply old`: that of the first deposed leader
//! - `submit X OP; OP; ...`, `query X`, `cancel X`, `read ROW ROW ...`, `history ROW`. `X+5000`: its id is made 5 s later. A row is `name@shard` for the balance of the
//!   user `name` on that shard, `name@shard/r` for a record. Operations: `add ROW DELTA [floor N] [ceiling N]`, `put|insert ROW TEXT`,
//!   `delete ROW`, `exists|absent ROW`, `version ROW N`, `is ROW TEXT`, `atleast|atmost|equals ROW N`
//! - `deliver [WHAT]`, `lose [WHAT]`, `repeat [WHAT]`: what is on its way now: `to N`, `from N` or all; `deliver old from N`: to the
//!   first deposed leader; `keep [WHAT]`: it is held up, until `release`; `confirm`: the leader hears that it still led; `rest`: everything, until nothing is left to do
//! - `room N`: a shard may hold N parts; `tick MILLISECONDS`, `reconnect N`, `move N`: another replica leads shard N; `restart N`: it forgets its memory;
//!   `wipe N`: a shard comes back with nothing
//! - `rows ROW ...`, `held N`, `check`: all that must hold at rest

mod world;

use std::{collections::BTreeMap, fmt::Write as _, fs, path::Path};

use verdict_protocol::{
    batch::Batch,
    ids::{BatchId, Millis, ShardId},
    leader::{Event, Token},
    show::{self, name_of},
};
use world::{Packet, START, World};

struct Script {
    world: World,
    names: BTreeMap<Token, String>,
    kept: Vec<Packet>,
    seen_replies: usize,
    seen_alarms: usize,
}

fn id_of(name: &str) -> BatchId {
    let letter = name.bytes().next().expect("a batch has a name");
    let later = name.split_once('+').map_or(0, |(_, millis)| millis.parse().expect("milliseconds"));
    BatchId::from_parts(Millis(START.0 + u64::from(letter) + later), [letter; 10])
}

impl Script {
    fn run(&mut self, command: &str) -> String {
        let mut words = command.split_whitespace();
        let verb = words.next().expect("a command has a word");
        let rest: Vec<&str> = words.collect();
        let number = |place: usize| rest[place].parse::<u64>().expect("a number");
        let placement = self.world.config.placement;
        let newest = self.world.leaders.len().wrapping_sub(1);
        let before = self.world.packets.len();
        let mut told = String::new();
        let mut arrived = before;
        match verb {
            "world" => *self = Script::new(number(0) as u32, rest.get(1) == Some(&"alone")),
            "room" => self.world.parts_max = number(0) as u32,
            "elect" => self.world.elect(),
            "crash" => self.world.crash(number(0) as usize),
            "apply" => self.world.apply_act(if rest.first() == Some(&"old") { 0 } else { newest }),
            "submit" => {
                let text = command.splitn(3, ' ').nth(2).expect("operations");
                let operations = text.split(';').map(|text| show::operation_of(placement, text)).collect();
                let batch = Batch { id: id_of(rest[0]), timeout_ms: 2000, operations, zero_sum: false };
                if let Some(token) = self.world.submit(batch) {
                    self.names.insert(token, format!("submit {}", rest[0]));
                }
            }
            "query" | "cancel" => {
                let token = self.world.query(id_of(rest[0]), verb == "cancel");
                self.names.insert(token, format!("{verb} {}", rest[0]));
            }
            "read" => {
                let rows = rest.iter().map(|text| show::row_of(placement, text)).collect();
                let token = self.world.read(rows);
                self.names.insert(token, "read".to_owned());
            }
            "confirm" => self.world.confirm(),
            "release" => self.world.packets.append(&mut self.kept),
            "wipe" => self.world.wipe(ShardId(number(0) as u32)),
            "deliver" | "lose" | "repeat" | "keep" => {
                let (place, what) = match rest.as_slice() {
                    ["old", what @ ..] => (0, what),
                    what => (newest, what),
                };
                let chosen: Vec<usize> =
                    (0..before).filter(|place| fits(&self.world.packets[*place], what)).collect();
                let packets: Vec<Packet> =
                    chosen.iter().map(|place| self.world.packets[*place].clone()).collect();
                if verb != "repeat" {
                    for place in chosen.iter().rev() {
                        self.world.packets.remove(*place);
                    }
                    arrived -= chosen.len();
                }
                if verb == "keep" {
                    self.kept.extend(packets);
                } else if verb != "lose" {
                    for packet in packets {
                        self.world.deliver(packet, place);
                    }
                }
            }
            "rest" => {
                self.world.settle();
                arrived = 0;
            }
            "tick" => self.world.tick(number(0)),
            "reconnect" => {
                self.world.step(newest, Event::Reconnected { shard: ShardId(number(0) as u32) });
            }
            "move" | "restart" => {
                let group = self.world.shards.get_mut(&ShardId(number(0) as u32)).expect("a shard");
                if verb == "move" {
                    group.lead = (group.lead + 1) % group.replicas.len();
                    group.catch_up(group.lead);
                } else {
                    group.restart(group.lead);
                }
            }
            "rows" => {
                for text in &rest {
                    let row = self.world.row(&show::row_of(placement, text));
                    writeln!(told, "{text}: {} (version {})", show::value(&row.value), row.version).unwrap();
                }
            }
            "held" => {
                for held in self.world.shards[&ShardId(number(0) as u32)].leading().machine.held() {
                    let part = held.part;
                    writeln!(told, "{} {} {}", name_of(part.id), part.number, show::vote(&part.vote))
                        .unwrap();
                }
            }
            "check" => {
                self.world.check_at_rest();
                writeln!(told, "all holds").unwrap();
            }
            _ => panic!("{verb} is no command"),
        }
        let from = arrived.min(self.world.packets.len());
        for packet in &self.world.packets[from..] {
            writeln!(told, "{}", shown(packet)).unwrap();
        }
        for (token, reply) in &self.world.replies[self.seen_replies..] {
            let name = self.names.get(token).map_or("somebody", String::as_str);
            writeln!(told, "reply to {name}: {}", show::answer(reply)).unwrap();
        }
        for alarm in &self.world.alarms[self.seen_alarms..] {
            writeln!(told, "ALARM {alarm}").unwrap();
        }
        self.seen_replies = self.world.replies.len();
        self.seen_alarms = self.world.alarms.len();
        told
    }

    fn new(shards: u32, alone: bool) -> Script {
        Script {
            // Far enough that windows seldom move while a story is told.
            world: World::with(shards, 2, |config| (config.alone, config.alone_ahead_ms) = (alone, 4_000)),
            names: BTreeMap::new(),
            kept: Vec::new(),
            seen_replies: 0,
            seen_alarms: 0,
        }
    }
}

fn fits(packet: &Packet, what: &[&str]) -> bool {
    let (direction, at) = match packet {
        Packet::ToShard(shard, _) | Packet::Read(shard, ..) => ("to", shard.0),
        Packet::FromShard(shard, _) | Packet::Answer(shard, ..) => ("from", shard.0),
    };
    match what {
        [] => true,
        [wanted] => *wanted == direction,
        [wanted, shard] => *wanted == direction && *shard == at.to_string(),
        _ => panic!("{what:?} says too much"),
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

/// Runs a script; the text that it should be.
fn play(text: &str) -> String {
    let mut script = Script::new(2, false);
    let mut out = String::new();
    for line in text.lines() {
        if let Some(command) = line.strip_prefix("> ") {
            writeln!(out, "{line}").unwrap();
            out.push_str(&script.run(command));
        } else if line.starts_with('#') || line.is_empty() {
            writeln!(out, "{line}").unwrap();
        }
    }
    out
}

#[test]
fn every_script_tells_its_story() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/scripts");
    let mut files: Vec<_> = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    assert!(!files.is_empty(), "there are no scripts");
    let update = std::env::var_os("UPDATE_SCRIPTS").is_some();
    let mut wrong = Vec::new();
    for file in files {
        let name = file.file_name().unwrap().to_string_lossy().into_owned();
        let text = fs::read_to_string(&file).unwrap();
        let told = std::panic::catch_unwind(|| play(&text));
        match told {
            Ok(told) if told == text => {}
            Ok(told) if update => fs::write(&file, told).unwrap(),
            Ok(told) => {
                let differs = told.lines().zip(text.lines()).position(|(now, before)| now != before);
                let line = differs.unwrap_or(told.lines().count().min(text.lines().count()));
                wrong.push(format!(
                    "{name}:{}: expected {:?}, found {:?}",
                    line + 1,
                    text.lines().nth(line).unwrap_or("(the end)"),
                    told.lines().nth(line).unwrap_or("(the end)")
                ));
            }
            Err(_) => wrong.push(format!("{name}: panicked, see above")),
        }
    }
    assert!(wrong.is_empty(), "scripts that tell another story:\n{}", wrong.join("\n"));
}
