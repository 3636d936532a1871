//! What a drill does, as people write it: a small text file, read line by line.
//!
//! ```text
//! title    A shard's leader is killed
//! about    Its batches wait for a new leader; the others go on.
//! seconds  20
//! nodes    3
//! shards   4
//! place coordinator on 1 2 3
//!
//! at 5s    kill leader of shard 2
//! at 9s    restart it
//! then     wait until whole
//! ```
//!
//! `at` counts from the start of the load, `after` and `then` from the end of the step before. Steps run one after the other,
//! in the order of the file. What is wrong is told with its line, and with what was expected there.

use std::{collections::BTreeMap, fmt, time::Duration};

/// The most nodes and shards of a cluster that a drill starts.
const NODES_MAX: u64 = 9;
const SHARDS_MAX: u32 = 16;
/// The greatest id of a node of any cluster.
const NODE_ID_MAX: u64 = 999;
/// The longest load, in seconds.
pub const SECONDS_MAX: u64 = 3600;
/// The longest delay of a network or a disk.
const DELAY_MAX: Duration = Duration::from_secs(10);
/// How long the load runs if the file doesn't say.
const SECONDS_DEFAULT: Duration = Duration::from_secs(20);

/// A scenario.
#[derive(Clone, Debug, PartialEq)]
pub struct Scenario {
    /// What it is called.
    pub name: String,
    /// What happens, in a line.
    pub title: String,
    /// What it shows, in some sentences.
    pub about: String,
    /// How long the load runs.
    pub seconds: Duration,
    /// The nodes of a cluster of our own.
    pub nodes: u64,
    /// Its shards.
    pub shards: u32,
    /// Where the replicas of a group are; a group that isn't listed has one on every node. Group 0 is the coordinator.
    pub place: BTreeMap<u32, Vec<u64>>,
    /// What is done.
    pub steps: Vec<Step>,
}

/// One thing that is done.
#[derive(Clone, Debug, PartialEq)]
pub struct Step {
    /// Its line in the file.
    pub line: usize,
    /// When.
    pub when: When,
    /// What.
    pub action: Action,
    /// As it was written, without the time.
    pub text: String,
}

/// When a step begins.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum When {
    /// So long after the load began, or when the step before has ended, if that is later.
    At(Duration),
    /// So long after the step before has ended.
    After(Duration),
}

/// What a step does.
#[derive(Clone, Debug, PartialEq)]
pub enum Action {
    /// SIGKILL.
    Kill(Target),
    /// SIGTERM, and waits for the end.
    Stop(Target),
    /// Starts what doesn't run.
    Start(Target),
    /// Stops what runs, and starts it again.
    Restart(Target),
    /// SIGSTOP.
    Pause(Target),
    /// SIGCONT.
    Resume(Target),
    /// Its packets are dropped.
    CutOff(Target, Way),
    /// What goes between these nodes and others takes so much longer, each way.
    SlowNetwork(Target, Duration),
    /// Undoes cuts and delays.
    MendNetwork(Target),
    /// Each sync takes so much longer.
    SlowDisk(Target, Duration),
    /// Writes fail: no space is left.
    FillDisk(Target),
    /// Undoes both.
    MendDisk(Target),
    /// The node's process and its disk are lost for good; a new node takes its place, under a new id.
    Replace(Target),
    /// Another replica becomes the leader.
    MoveLeader(u32),
    /// Waits until all replicas of all groups take part.
    WaitWhole,
}

/// Which packets are dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// Both ways, between this node and all others.
    Both,
    /// What the others send to it.
    Incoming,
    /// What it sends to the others.
    Outgoing,
}

/// Which nodes.
#[derive(Clone, Debug, PartialEq)]
pub enum Target {
    /// This one.
    Node(u64),
    /// All.
    All,
    /// Those of the step before; after a replacement, the new node.
    It,
    /// The leader of a group.
    Leader(u32),
    /// One node with a replica of the group that doesn't lead it.
    Follower(u32),
    /// All that have a replica of a group.
    Replicas(u32),
}

/// Why a scenario can't be read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ScenarioError {
    /// The file or the name.
    pub name: String,
    /// The line, from 1; 0: the whole.
    pub line: usize,
    /// What is wrong, and what was expected.
    pub problem: String,
}

impl std::error::Error for ScenarioError {}

impl fmt::Display for ScenarioError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.line {
            0 => write!(f, "{}: {}", self.name, self.problem),
            line => write!(f, "{}: line {line}: {}", self.name, self.problem),
        }
    }
}

/// The scenarios that come with the program, by name, in the order in which they are told.
pub const BUILT_IN: [(&str, &str); 18] = [
    ("kill-coordinator", include_str!("../../../drills/kill-coordinator.drill")),
    ("kill-shard", include_str!("../../../drills/kill-shard.drill")),
    ("kill-coordinators", include_str!("../../../drills/kill-coordinators.drill")),
    ("kill-shard-group", include_str!("../../../drills/kill-shard-group.drill")),
    ("kill-all", include_str!("../../../drills/kill-all.drill")),
    ("pause-coordinator", include_str!("../../../drills/pause-coordinator.drill")),
    ("pause-shard", include_str!("../../../drills/pause-shard.drill")),
    ("cut-coordinator", include_str!("../../../drills/cut-coordinator.drill")),
    ("cut-coordinator-one-way", include_str!("../../../drills/cut-coordinator-one-way.drill")),
    ("cut-shard", include_str!("../../../drills/cut-shard.drill")),
    ("slow-network", include_str!("../../../drills/slow-network.drill")),
    ("slow-disk", include_str!("../../../drills/slow-disk.drill")),
    ("full-disk", include_str!("../../../drills/full-disk.drill")),
    ("restart-all", include_str!("../../../drills/restart-all.drill")),
    ("rolling-restart", include_str!("../../../drills/rolling-restart.drill")),
    ("replace-node", include_str!("../../../drills/replace-node.drill")),
    ("move-leaders", include_str!("../../../drills/move-leaders.drill")),
    ("storm", include_str!("../../../drills/storm.drill")),
];

/// A built-in scenario.
pub fn built_in(name: &str) -> Option<Result<Scenario, ScenarioError>> {
    BUILT_IN.iter().find(|(known, _)| *known == name).map(|(name, text)| Scenario::parse(name, text))
}

impl Scenario {
    /// Reads a scenario.
    pub fn parse(name: &str, text: &str) -> Result<Scenario, ScenarioError> {
        let mut scenario = Scenario {
            name: name.to_owned(),
            title: String::new(),
            about: String::new(),
            seconds: SECONDS_DEFAULT,
            nodes: 3,
            shards: 4,
            place: BTreeMap::new(),
            steps: Vec::new(),
        };
        let error = |line, problem| ScenarioError { name: name.to_owned(), line, problem };
        for (line, text) in (1..).zip(text.lines()) {
            let text = text.split('#').next().unwrap_or_default().trim();
            if !text.is_empty() {
                scenario.read_line(line, text).map_err(|problem| error(line, problem))?;
            }
        }
        scenario.check().map_err(|(line, problem)| error(line, problem))?;
        scenario.check_times()?;
        Ok(scenario)
    }

    /// The nodes that have a replica of a group.
    pub fn replicas(&self, group: u32) -> Vec<u64> {
        self.place.get(&group).cloned().unwrap_or_else(|| (1..=self.nodes).collect())
    }

    fn read_line(&mut self, line: usize, text: &str) -> Result<(), String> {
        let mut words = Words::new(text);
        match words.next() {
            "title" => self.title = words.rest(),
            "about" => {
                let separator = if self.about.is_empty() { "" } else { " " };
                self.about += &format!("{separator}{}", words.rest());
            }
            "seconds" => self.seconds = Duration::from_secs(words.number("seconds", 1, SECONDS_MAX)?),
            "nodes" => self.nodes = words.number("nodes", 1, NODES_MAX)?,
            "shards" => self.shards = words.number("shards", 1, u64::from(SHARDS_MAX))? as u32,
            "place" => {
                let group = words.group()?;
                words.expect("on")?;
                let mut nodes = vec![words.number("a node's number", 1, NODES_MAX)?];
                while !words.is_end() {
                    nodes.push(words.number("a node's number", 1, NODES_MAX)?);
                }
                self.place.insert(group, nodes);
            }
            "at" => {
                let at = words.duration()?;
                self.read_step(line, When::At(at), words)?;
                return Ok(());
            }
            "after" => {
                let after = words.duration()?;
                return self.read_step(line, When::After(after), words);
            }
            "then" => return self.read_step(line, When::After(Duration::ZERO), words),
            other => {
                let known = ["title", "about", "seconds", "nodes", "shards", "place", "at", "after", "then"];
                return Err(expected(other, &known));
            }
        }
        words.end()
    }

    fn read_step(&mut self, line: usize, when: When, mut words: Words<'_>) -> Result<(), String> {
        let text = words.remaining();
        let action = words.action()?;
        words.end()?;
        self.steps.push(Step { line, when, action, text });
        Ok(())
    }

    /// What no single line tells.
    fn check(&mut self) -> Result<(), (usize, String)> {
        if self.title.is_empty() {
            self.title.clone_from(&self.name);
        }
        for (group, nodes) in &self.place {
            let name = group_name(*group);
            if *group > self.shards {
                return Err((0, format!("`place` names {name}, but there are {} shards", self.shards)));
            }
            if let Some(node) = nodes.iter().find(|node| **node > self.nodes) {
                return Err((0, format!("`place` puts {name} on node {node}, but there are {}", self.nodes)));
            }
        }
        let mut before = Duration::ZERO;
        let mut had_target = false;
        for step in &self.steps {
            if let When::At(at) = step.when {
                if at < before {
                    let text = format!("{at:?} comes before the step above: steps stand in order of time");
                    return Err((step.line, text));
                }
                before = at;
            }
            if step.action.target() == Some(&Target::It) && !had_target {
                return Err((step.line, "`it` means the nodes of the step before, and there is none".into()));
            }
            had_target |= step.action.target().is_some();
        }
        for (step, target) in self.replacements() {
            if matches!(target, Target::All | Target::Replicas(_)) {
                let text =
                    "one node can be replaced at a time: expected node N, leader of GROUP, follower of GROUP";
                return Err((step.line, text.into()));
            }
        }
        Ok(())
    }

    /// The steps that replace a node, in order, with what `it` means in them.
    pub fn replacements(&self) -> Vec<(&Step, &Target)> {
        let (mut it, mut found) = (None, Vec::new());
        for step in &self.steps {
            let Some(target) = step.action.target() else { continue };
            if *target != Target::It {
                it = Some(target);
            }
            if matches!(step.action, Action::Replace(_)) {
                found.push((step, it.unwrap_or(target)));
            }
        }
        found
    }

    /// Whether the nodes that the steps name are there, or are spare ones that take the place of others.
    pub fn check_for(&self, nodes: &[u64], spares: &[u64]) -> Result<(), ScenarioError> {
        let error = |step: &Step, problem| self.error(step, problem);
        // Clients know the first nodes only.
        if let Some((step, _)) = self.replacements().get(nodes.len().saturating_sub(1)) {
            let text = format!("all {} nodes would be replaced: one of them must stay", nodes.len());
            return Err(error(step, text));
        }
        let mut gone = Vec::new();
        for step in &self.steps {
            if let Some(Target::Node(node)) = step.action.target() {
                if !nodes.contains(node) && !spares.contains(node) {
                    return Err(error(step, format!("there is no node {node}: there are {nodes:?}")));
                }
                if gone.contains(node) {
                    return Err(error(step, format!("node {node} was replaced: its id is never used again")));
                }
                if matches!(step.action, Action::Replace(_)) {
                    gone.push(*node);
                }
            }
            if let Some(group) = step.action.group()
                && group > self.shards
            {
                return Err(error(step, format!("there is no shard {group}: there are {}", self.shards)));
            }
        }
        Ok(())
    }

    /// Whether all steps that have a time come before the end of the load, and the others don't hold it up for too long.
    pub fn check_times(&self) -> Result<(), ScenarioError> {
        let mut waits = Duration::ZERO;
        for step in &self.steps {
            match step.when {
                When::At(at) if at >= self.seconds => {
                    let text =
                        format!("{at:?} is after the end of the load, which runs for {:?}", self.seconds);
                    return Err(self.error(step, text));
                }
                When::At(_) => {}
                When::After(after) => waits += after,
            }
            if waits > Duration::from_secs(SECONDS_MAX) {
                let text =
                    format!("the waits up to here add up to {waits:?}: expected up to {SECONDS_MAX}s in all");
                return Err(self.error(step, text));
            }
        }
        Ok(())
    }

    /// All waits between steps together: the load may have to run so much longer than `seconds`.
    pub fn waits(&self) -> Duration {
        let waits = self.steps.iter().map(|step| match step.when {
            When::At(_) => Duration::ZERO,
            When::After(after) => after,
        });
        waits.sum()
    }

    /// What is wrong with a step.
    pub fn error(&self, step: &Step, problem: String) -> ScenarioError {
        ScenarioError { name: self.name.clone(), line: step.line, problem }
    }
}

impl Action {
    /// The nodes it is about.
    pub fn target(&self) -> Option<&Target> {
        match self {
            Action::Kill(target)
            | Action::Stop(target)
            | Action::Start(target)
            | Action::Restart(target)
            | Action::Pause(target)
            | Action::Resume(target)
            | Action::CutOff(target, _)
            | Action::SlowNetwork(target, _)
            | Action::MendNetwork(target)
            | Action::SlowDisk(target, _)
            | Action::FillDisk(target)
            | Action::MendDisk(target)
            | Action::Replace(target) => Some(target),
            Action::MoveLeader(_) | Action::WaitWhole => None,
        }
    }

    fn group(&self) -> Option<u32> {
        match (self, self.target()) {
            (Action::MoveLeader(group), _) => Some(*group),
            (_, Some(Target::Leader(group) | Target::Follower(group) | Target::Replicas(group))) => {
                Some(*group)
            }
            (_, Some(Target::Node(_) | Target::All | Target::It) | None) => None,
        }
    }

    /// Whether it needs a disk that can be made slow or full.
    pub fn needs_disk(&self) -> bool {
        matches!(self, Action::SlowDisk(..) | Action::FillDisk(_) | Action::MendDisk(_))
    }
}

/// What people call a group.
pub fn group_name(group: u32) -> String {
    if group == 0 { "coordinator".to_owned() } else { format!("shard {group}") }
}

/// The words of a line.
struct Words<'a> {
    words: Vec<&'a str>,
    next: usize,
}

impl<'a> Words<'a> {
    fn new(text: &'a str) -> Words<'a> {
        Words { words: text.split_whitespace().collect(), next: 0 }
    }

    /// The next word; empty at the end.
    fn next(&mut self) -> &'a str {
        let word = self.words.get(self.next).copied().unwrap_or_default();
        self.next += 1;
        word
    }

    fn peek(&self) -> &'a str {
        self.words.get(self.next).copied().unwrap_or_default()
    }

    fn take(&mut self, word: &str) -> bool {
        let found = self.peek() == word;
        self.next += usize::from(found);
        found
    }

    fn is_end(&self) -> bool {
        self.next >= self.words.len()
    }

    fn remaining(&self) -> String {
        self.words[self.next.min(self.words.len())..].join(" ")
    }

    fn rest(&mut self) -> String {
        let rest = self.remaining();
        self.next = self.words.len();
        rest
    }

    fn end(&self) -> Result<(), String> {
        if self.is_end() {
            return Ok(());
        }
        Err(format!("{:?} is too much: expected the end of the line", self.remaining()))
    }

    fn expect(&mut self, word: &str) -> Result<(), String> {
        if self.take(word) { Ok(()) } else { Err(expected(self.peek(), &[word])) }
    }

    fn number(&mut self, what: &str, min: u64, max: u64) -> Result<u64, String> {
        let word = self.next();
        let number = word.parse().ok().filter(|number| (min..=max).contains(number));
        number.ok_or_else(|| {
            format!("{} instead of {what}: expected a number from {min} to {max}", quoted(word))
        })
    }

    fn duration(&mut self) -> Result<Duration, String> {
        let word = self.next();
        let problem = || format!("{} is no time: expected one like 5s, 1.5s or 200ms", quoted(word));
        let (number, unit) = match word.strip_suffix("ms") {
            Some(number) => (number, 0.001),
            None => (word.strip_suffix('s').ok_or_else(problem)?, 1.0),
        };
        let seconds = number.parse::<f64>().map_err(|_| problem())? * unit;
        // In whole microseconds: what is written as 0.1 is meant exactly.
        let limit = 0.0..=SECONDS_MAX as f64;
        if !limit.contains(&seconds) {
            return Err(format!("{word:?} is out of range: expected 0s to {SECONDS_MAX}s"));
        }
        Ok(Duration::from_micros((seconds * 1e6).round() as u64))
    }

    fn delay(&mut self) -> Result<Duration, String> {
        self.expect("by")?;
        let delay = self.duration()?;
        if delay > DELAY_MAX {
            return Err(format!("{delay:?} is out of range: expected up to {DELAY_MAX:?}"));
        }
        Ok(delay)
    }

    fn group(&mut self) -> Result<u32, String> {
        match self.next() {
            "coordinator" => Ok(0),
            "shard" => Ok(self.number("a shard's number", 1, u64::from(SHARDS_MAX))? as u32),
            other => Err(expected(other, &["coordinator", "shard N"])),
        }
    }

    fn target(&mut self) -> Result<Target, String> {
        match self.next() {
            "it" => Ok(Target::It),
            "all" => Ok(Target::All),
            "node" => Ok(Target::Node(self.number("a node's number", 1, NODE_ID_MAX)?)),
            "leader" => self.of_group(Target::Leader),
            "follower" => self.of_group(Target::Follower),
            "replicas" => self.of_group(Target::Replicas),
            other => {
                let known =
                    ["it", "all", "node N", "leader of GROUP", "follower of GROUP", "replicas of GROUP"];
                Err(expected(other, &known))
            }
        }
    }

    fn of_group(&mut self, target: impl Fn(u32) -> Target) -> Result<Target, String> {
        self.expect("of")?;
        Ok(target(self.group()?))
    }

    fn action(&mut self) -> Result<Action, String> {
        match self.next() {
            "kill" => Ok(Action::Kill(self.target()?)),
            "stop" => Ok(Action::Stop(self.target()?)),
            "start" => Ok(Action::Start(self.target()?)),
            "restart" => Ok(Action::Restart(self.target()?)),
            "pause" => Ok(Action::Pause(self.target()?)),
            "resume" => Ok(Action::Resume(self.target()?)),
            "replace" => Ok(Action::Replace(self.target()?)),
            "cut" => {
                self.expect("off")?;
                let target = self.target()?;
                let way = match self.next() {
                    "" | "both" => Way::Both,
                    "incoming" => Way::Incoming,
                    "outgoing" => Way::Outgoing,
                    other => return Err(expected(other, &["incoming", "outgoing", "both", "nothing"])),
                };
                Ok(Action::CutOff(target, way))
            }
            "slow" => match self.medium()? {
                Medium::Network => Ok(Action::SlowNetwork(self.target()?, self.delay()?)),
                Medium::Disk => Ok(Action::SlowDisk(self.target()?, self.delay()?)),
            },
            "fill" => {
                self.expect("disk")?;
                self.expect("of")?;
                Ok(Action::FillDisk(self.target()?))
            }
            "mend" => match self.medium()? {
                Medium::Network => Ok(Action::MendNetwork(self.target()?)),
                Medium::Disk => Ok(Action::MendDisk(self.target()?)),
            },
            "move" => {
                self.expect("leader")?;
                self.expect("of")?;
                Ok(Action::MoveLeader(self.group()?))
            }
            "wait" => {
                self.expect("until")?;
                self.expect("whole")?;
                Ok(Action::WaitWhole)
            }
            other => {
                let known = [
                    "kill",
                    "stop",
                    "start",
                    "restart",
                    "pause",
                    "resume",
                    "cut off",
                    "slow network of",
                    "slow disk of",
                    "fill disk of",
                    "mend network of",
                    "mend disk of",
                    "replace",
                    "move leader of",
                    "wait until whole",
                ];
                Err(expected(other, &known))
            }
        }
    }

    fn medium(&mut self) -> Result<Medium, String> {
        let medium = match self.next() {
            "network" => Medium::Network,
            "disk" => Medium::Disk,
            other => return Err(expected(other, &["network of", "disk of"])),
        };
        self.expect("of")?;
        Ok(medium)
    }
}

enum Medium {
    Network,
    Disk,
}

fn quoted(word: &str) -> String {
    if word.is_empty() { "the end of the line".to_owned() } else { format!("{word:?}") }
}

/// What was met and what was expected; if it looks like a slip of the pen, what was meant.
fn expected(met: &str, known: &[&str]) -> String {
    let mut text = format!("{}: expected {}", quoted(met), known.join(", "));
    let near = known.iter().find(|word| !met.is_empty() && distance(met, first_word(word)) <= 2);
    if let Some(near) = near
        && known.len() > 1
    {
        text += &format!(" (did you mean {:?}?)", first_word(near));
    }
    text
}

fn first_word(text: &str) -> &str {
    text.split(' ').next().unwrap_or(text)
}

/// How many letters differ, are missing or are too many (Levenshtein).
fn distance(one: &str, other: &str) -> usize {
    let other: Vec<char> = other.chars().collect();
    let mut row: Vec<usize> = (0..=other.len()).collect();
    for (line, letter) in one.chars().enumerate() {
        let mut before = row[0];
        row[0] = line + 1;
        for (column, &there) in other.iter().enumerate() {
            let changed = before + usize::from(letter != there);
            before = row[column + 1];
            row[column + 1] = changed.min(row[column] + 1).min(before + 1);
        }
    }
    row[other.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(from: u64, to: u64) -> Vec<u64> {
        (from..=to).collect()
    }

    fn problem(text: &str) -> String {
        let read = Scenario::parse("x.drill", text);
        let checked = read.and_then(|read| {
            let spares = read.nodes + read.replacements().len() as u64;
            read.check_for(&numbers(1, read.nodes), &numbers(read.nodes + 1, spares))
        });
        checked.unwrap_err().to_string()
    }

    #[test]
    fn a_scenario_is_read_as_it_is_written() {
        let text = "title  The leader dies\nabout One\nabout two # and a remark\nseconds 12\nnodes 6\nshards 2\n\
                    place shard 2 on 4 5 6\n\nat 1.5s kill leader of shard 2\nafter 200ms restart it\n\
                    then wait until whole\nat 9s cut off follower of coordinator outgoing\n\
                    at 10s slow disk of replicas of shard 1 by 30ms\n";
        let scenario = Scenario::parse("x", text).unwrap();
        assert_eq!((scenario.title.as_str(), scenario.about.as_str()), ("The leader dies", "One two"));
        assert_eq!((scenario.seconds, scenario.nodes, scenario.shards), (Duration::from_secs(12), 6, 2));
        assert_eq!(scenario.replicas(2), [4, 5, 6]);
        assert_eq!(scenario.replicas(0), [1, 2, 3, 4, 5, 6]);
        let steps: Vec<(usize, When, Action)> =
            scenario.steps.into_iter().map(|step| (step.line, step.when, step.action)).collect();
        let at = |ms| When::At(Duration::from_millis(ms));
        let after = |ms| When::After(Duration::from_millis(ms));
        let expected = [
            (9, at(1500), Action::Kill(Target::Leader(2))),
            (10, after(200), Action::Restart(Target::It)),
            (11, after(0), Action::WaitWhole),
            (12, at(9000), Action::CutOff(Target::Follower(0), Way::Outgoing)),
            (13, at(10_000), Action::SlowDisk(Target::Replicas(1), Duration::from_millis(30))),
        ];
        assert_eq!(steps, expected);
    }

    #[test]
    fn every_verb_is_read() {
        let text = "at 1s kill node 1\nat 1s stop it\nat 1s start it\nat 1s restart all\nat 1s pause it\n\
                    at 1s resume it\nat 1s cut off it\nat 1s cut off it both\nat 1s cut off it incoming\n\
                    at 1s slow network of all by 5ms\nat 1s mend network of all\nat 1s slow disk of it by 1s\n\
                    at 1s fill disk of it\nat 1s mend disk of it\nat 1s replace node 2\n\
                    at 1s move leader of shard 1\nat 1s wait until whole";
        assert_eq!(Scenario::parse("x", text).unwrap().steps.len(), 17);
    }

    #[test]
    fn a_replaced_node_may_have_been_broken_before_and_the_new_one_may_be_named() {
        let text = "at 1s kill leader of shard 2\nat 2s replace it\nthen kill it\nat 3s restart node 4\n\
                    at 4s replace node 3\nat 5s pause node 5";
        let scenario = Scenario::parse("x", text).unwrap();
        let replacements = scenario.replacements();
        let replaced: Vec<(usize, &Target)> =
            replacements.iter().map(|(step, target)| (step.line, *target)).collect();
        assert_eq!(replaced, [(2, &Target::Leader(2)), (5, &Target::Node(3))]);
        assert_eq!(scenario.check_for(&[1, 2, 3], &[4, 5]), Ok(()));
    }

    #[test]
    fn what_is_wrong_is_told_with_its_line_and_what_was_expected() {
        for (text, told) in [
            ("\nat 5s kil node 1", "x.drill: line 2: \"kil\": expected kill, stop,"),
            ("at 5s kil node 1", "(did you mean \"kill\"?)"),
            ("att 5s kill node 1", "line 1: \"att\": expected title,"),
            ("at five kill node 1", "line 1: \"five\" is no time: expected one like 5s, 1.5s or 200ms"),
            ("at 5 kill node 1", "\"5\" is no time"),
            ("at -1s kill node 1", "out of range"),
            ("at NaNs kill node 1", "out of range"),
            ("at 5s kill", "the end of the line: expected it, all, node N, leader of GROUP"),
            ("at 5s kill leader shard 2", "\"shard\": expected of"),
            ("at 5s kill leader of chard 2", "expected coordinator, shard N (did you mean \"shard\"?)"),
            ("at 5s kill leader of shard 9", "line 1: there is no shard 9: there are 4"),
            (
                "at 5s kill leader of shard two",
                "\"two\" instead of a shard's number: expected a number from 1",
            ),
            ("at 5s kill node 4", "line 1: there is no node 4: there are [1, 2, 3]"),
            ("at 5s kill it", "`it` means the nodes of the step before"),
            ("at 5s kill node 1 now", "\"now\" is too much: expected the end of the line"),
            ("at 5s slow disk of node 1", "the end of the line: expected by"),
            ("at 5s slow disk of node 1 by 11s", "expected up to 10s"),
            ("at 5s slow tape of node 1", "\"tape\": expected network of, disk of"),
            ("at 5s kill node 1\nat 4s start it", "line 2: 4s comes before the step above"),
            ("seconds 5\nat 5s kill node 1", "line 2: 5s is after the end of the load, which runs for 5s"),
            (
                "at 5s kill node 1\nafter 3000s start it\nafter 601s kill it",
                "line 3: the waits up to here add up to 3601s: expected up to 3600s in all",
            ),
            ("seconds 0", "line 1: \"0\" instead of seconds: expected a number from 1 to 3600"),
            ("place shard 1 on 4", "puts shard 1 on node 4, but there are 3"),
            ("place shard 5 on 1", "names shard 5, but there are 4 shards"),
            ("place shard 1", "the end of the line: expected on"),
            ("at 5s replace all", "line 1: one node can be replaced at a time"),
            ("at 5s kill replicas of shard 1\nthen replace it", "line 2: one node can be replaced at a time"),
            ("at 5s replace node 5", "line 1: there is no node 5: there are [1, 2, 3]"),
            ("at 5s replace node 2\nthen start node 2", "line 2: node 2 was replaced"),
            (
                "nodes 2\nat 1s replace node 1\nthen replace node 2",
                "line 3: all 2 nodes would be replaced: one of them must stay",
            ),
        ] {
            let problem = problem(text);
            assert!(problem.contains(told), "{text:?} gives {problem:?}, which lacks {told:?}");
        }
    }

    #[test]
    fn all_built_in_scenarios_are_right_and_say_what_they_are_about() {
        for (name, text) in BUILT_IN {
            let scenario = Scenario::parse(name, text).unwrap();
            assert!(scenario.title != name && !scenario.about.is_empty(), "{name} has no title or text");
            assert!(!scenario.steps.is_empty(), "{name} does nothing");
            assert!(scenario.title.chars().count() <= 60, "{name}: the title is too long for a list");
        }
    }
}
