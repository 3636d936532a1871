//! Plays the steps of a scenario, at their times, and writes down what was really done and when.

use std::{
    collections::BTreeSet,
    sync::Mutex,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail};
use tokio::time::sleep;
use verdict_client::Client;

use super::{
    field::Field,
    load::Load,
    record::{Event, EventKind},
    scenario::{Action, Scenario, Step, Target, Way, When},
    screen::Screen,
};
use crate::{
    cluster_state::{self, group_name, group_names},
    ctl::member,
};

/// How long a leader may take to be another one, when it is asked to move.
const MOVE_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a new node may take to be let in everywhere: it is sent all that its groups hold.
const REPLACE_TIMEOUT: Duration = Duration::from_secs(60);
/// How often something is asked for again.
const POLL: Duration = Duration::from_millis(100);

/// Plays a scenario.
pub struct Player<'a> {
    /// The cluster.
    pub field: &'a tokio::sync::Mutex<Field>,
    /// How many shards it has.
    pub shards: u32,
    /// A client of it.
    pub client: &'a Client,
    /// The load, for its clock.
    pub load: &'a Load<'a>,
    /// The screen.
    pub screen: &'a Screen,
    /// The nodes that can't take part at the moment, those included that were replaced or may take the place of others later.
    pub impaired: &'a Mutex<BTreeSet<u64>>,
}

/// What happened with the nodes.
#[derive(Debug, Default)]
struct State {
    /// What `it` means.
    it: Vec<u64>,
    down: BTreeSet<u64>,
    paused: BTreeSet<u64>,
    cut: BTreeSet<u64>,
    slow: BTreeSet<u64>,
    full: BTreeSet<u64>,
    slow_disks: BTreeSet<u64>,
    /// Spare nodes that are no members yet, and members that were replaced.
    outside: BTreeSet<u64>,
}

impl State {
    /// A node has gone for good: nothing of it is to be mended.
    fn forget(&mut self, node: u64) {
        for set in [
            &mut self.down,
            &mut self.paused,
            &mut self.cut,
            &mut self.slow,
            &mut self.full,
            &mut self.slow_disks,
        ] {
            set.remove(&node);
        }
    }

    /// Notes which of these nodes have ended by themselves, and tells of them.
    fn note_ended(&mut self, nodes: &[u64], running: &[u64]) -> Vec<String> {
        // A node whose disk is full ends, as it should; one that isn't a member yet, or no more, may not run at all.
        let known = [&self.down, &self.full, &self.outside];
        let expected = |node: &u64| running.contains(node) || known.iter().any(|set| set.contains(node));
        let ended: Vec<u64> = nodes.iter().copied().filter(|node| !expected(node)).collect();
        self.down.extend(&ended);
        ended.into_iter().map(|node| format!("node {node} ended by itself")).collect()
    }

    fn impaired(&self) -> BTreeSet<u64> {
        [&self.down, &self.paused, &self.cut, &self.full].into_iter().flatten().copied().collect()
    }
}

/// What a step does to processes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Deed {
    Kill,
    Stop,
    Start,
    Restart,
    Pause,
    Resume,
}

impl Deed {
    /// None: it is about something else.
    fn of(action: &Action) -> Option<Deed> {
        match action {
            Action::Kill(_) => Some(Deed::Kill),
            Action::Stop(_) => Some(Deed::Stop),
            Action::Start(_) => Some(Deed::Start),
            Action::Restart(_) => Some(Deed::Restart),
            Action::Pause(_) => Some(Deed::Pause),
            Action::Resume(_) => Some(Deed::Resume),
            Action::CutOff(..)
            | Action::SlowNetwork(..)
            | Action::MendNetwork(_)
            | Action::SlowDisk(..)
            | Action::FillDisk(_)
            | Action::MendDisk(_)
            | Action::Replace(_)
            | Action::MoveLeader(_)
            | Action::WaitWhole => None,
        }
    }
}

/// What a deed comes to, with the nodes as they are.
#[derive(Debug, PartialEq)]
struct Plan {
    /// Those that it changes.
    nodes: Vec<u64>,
    /// What is done, and which nodes are as they should be already; for people.
    what: String,
    kind: EventKind,
}

impl Plan {
    fn new(deed: Deed, nodes: &[u64], who: &str, running: &[u64], paused: &BTreeSet<u64>) -> Plan {
        let runs = |node: &u64| running.contains(node);
        let is_paused = |node: &u64| runs(node) && paused.contains(node);
        let (fault, killing) = (EventKind::Fault { kills: false }, EventKind::Fault { kills: true });
        let (verb, kind, already) = match deed {
            Deed::Kill => ("kill -9", killing, "already down"),
            Deed::Stop => ("stop in order", killing, "already down"),
            Deed::Restart if !running.is_empty() => ("stop in order and start again", killing, ""),
            Deed::Start | Deed::Restart => ("start", EventKind::Repair, "already up"),
            Deed::Pause => ("pause", fault, "already paused or down"),
            Deed::Resume => ("resume", EventKind::Repair, "not paused"),
        };
        let changes = |node: &u64| match deed {
            Deed::Kill | Deed::Stop => runs(node),
            Deed::Start => !runs(node),
            Deed::Restart => true,
            Deed::Pause => runs(node) && !is_paused(node),
            Deed::Resume => is_paused(node),
        };
        let (changed, left): (Vec<u64>, Vec<u64>) = nodes.iter().copied().partition(|node| changes(node));
        let (what, kind) = match (changed.is_empty(), left.is_empty()) {
            (true, _) => (format!("{verb}: nothing to do ({already}: {})", names(&left)), EventKind::Wait),
            (false, true) => (format!("{verb}: {who}"), kind),
            (false, false) => (format!("{verb}: {who} ({already}: {})", names(&left)), kind),
        };
        Plan { nodes: changed, what, kind }
    }
}

impl Player<'_> {
    /// Plays all steps, and in the end mends what is still broken. Gives what was done.
    pub async fn play(&self, scenario: &Scenario) -> anyhow::Result<Vec<Event>> {
        let mut events = Vec::new();
        let spares = self.field.lock().await.spares();
        let outside = spares.into_iter().map(|(node, _)| node).collect();
        let mut state = State { outside, ..State::default() };
        self.set_impaired(&state);
        let mut ended = self.load.began();
        for step in &scenario.steps {
            let due = match step.when {
                When::At(at) => self.load.began() + at,
                When::After(after) => ended + after,
            };
            sleep(due.saturating_duration_since(Instant::now())).await;
            let done = self.step(step, &mut state).await;
            events.extend(done.with_context(|| format!("line {}: {}", step.line, step.text))?);
            ended = Instant::now();
        }
        // What the scenario leaves broken stays so until the load ends.
        let end = self.load.began() + scenario.seconds;
        sleep(end.saturating_duration_since(Instant::now())).await;
        if let Some(event) = self.mend_all(&mut state).await.context("mend everything in the end")? {
            events.push(event);
        }
        Ok(events)
    }

    async fn step(&self, step: &Step, state: &mut State) -> anyhow::Result<Vec<Event>> {
        if let Action::Replace(target) = &step.action {
            return self.replace(step, target, state).await;
        }
        let at = self.load.now();
        let mut troubles = Vec::new();
        let (what, kind) = match &step.action {
            Action::WaitWhole => match self.wait_whole().await {
                Ok(()) => ("all replicas take part".to_owned(), EventKind::Wait),
                Err(error) => {
                    let what = error.to_string();
                    troubles.push(what.clone());
                    (what, EventKind::Wait)
                }
            },
            Action::MoveLeader(group) => (self.move_leader(*group).await?, EventKind::Fault { kills: false }),
            action => {
                let (nodes, who) = match action.target() {
                    Some(target) => self.find(target, state).await?,
                    None => bail!("this step has no target"),
                };
                let done = match Deed::of(action) {
                    Some(deed) => {
                        let (plan, mut ended) = self.change(deed, &nodes, &who, at, state).await?;
                        troubles.append(&mut ended);
                        (plan.what, plan.kind)
                    }
                    None => self.act(action, &nodes, &who, at, state).await?,
                };
                state.it = nodes;
                done
            }
        };
        self.set_impaired(state);
        let event = Event { kind, troubles, ..self.event(at, step, what, state) };
        let done = event.done;
        if kind == EventKind::Wait {
            self.screen.say(&format!("{done:>6.1} s  {}", event.what));
        }
        Ok(vec![event])
    }

    /// A repair that has just been done; the caller changes what is otherwise.
    fn event(&self, at: f64, step: &Step, what: String, state: &State) -> Event {
        Event {
            at,
            done: self.load.now(),
            step: step.text.clone(),
            what,
            kind: EventKind::Repair,
            impaired: state.impaired(),
            replaced: None,
            troubles: Vec::new(),
        }
    }

    /// Takes a node away for good, process and disk, and lets a new one take its place. `it` is the new one then.
    async fn replace(&self, step: &Step, target: &Target, state: &mut State) -> anyhow::Result<Vec<Event>> {
        let (nodes, who) = self.find(target, state).await?;
        let [old] = nodes[..] else { bail!("one node can be replaced at a time, not {who}") };
        let mut events = Vec::new();
        state.forget(old);
        state.down.insert(old);
        self.set_impaired(state);
        let mut field = self.field.lock().await;
        if field.runs(old).await? {
            let (at, what) = (self.load.now(), format!("kill -9 for good: {who}"));
            self.screen.say(&format!("{at:>6.1} s  {what}"));
            field.kill(&[old]).await?;
            events
                .push(Event { kind: EventKind::Fault { kills: true }, ..self.event(at, step, what, state) });
        }
        let at = self.load.now();
        let (new, address) = field.replace(old).await?;
        drop(field);
        let what = format!("node {new} takes the place of node {old}, whose disk is lost");
        self.screen.say(&format!("{at:>6.1} s  {what}"));
        let began = Instant::now();
        let let_in = self.let_in(old, new, &address).await;
        state.down.remove(&old);
        state.outside.remove(&new);
        state.outside.insert(old);
        state.it = vec![new];
        self.set_impaired(state);
        let event = match let_in {
            Ok(groups) => {
                let (count, seconds) = (groups.len(), began.elapsed().as_secs_f64());
                let plural = if count == 1 { "" } else { "s" };
                let end = format!("it votes in {count} group{plural} and has caught up after {seconds:.1} s");
                self.screen.say(&format!("{:>6.1} s  node {new}: {end}", self.load.now()));
                let what = format!("{what}: {end}");
                Event { replaced: Some((old, new)), ..self.event(at, step, what, state) }
            }
            Err(error) => {
                let trouble = format!("node {new} could not take the place of node {old}: {error:#}");
                self.screen.say(&format!("{:>6.1} s  {trouble}", self.load.now()));
                Event { troubles: vec![trouble], ..self.event(at, step, what, state) }
            }
        };
        events.push(event);
        Ok(events)
    }

    /// Lets a new node into all groups of another, as `verdict ctl member replace` does, and waits until it has caught up.
    async fn let_in(&self, old: u64, new: u64, address: &str) -> anyhow::Result<Vec<u32>> {
        let deadline = Instant::now() + REPLACE_TIMEOUT;
        // It has only just been started, and groups may be without a leader: the same is asked for again.
        while let Err(error) = member::replace(self.client, old, (new, address), deadline, &|_| ()).await {
            if Instant::now() >= deadline {
                return Err(error);
            }
            sleep(POLL).await;
        }
        cluster_state::wait_caught_up(self.client, new).await
    }

    /// Starts, ends, pauses or resumes processes, those that aren't so already. Gives what it was, and what should not have
    /// happened before.
    async fn change(
        &self,
        deed: Deed,
        nodes: &[u64],
        who: &str,
        at: f64,
        state: &mut State,
    ) -> anyhow::Result<(Plan, Vec<String>)> {
        let mut field = self.field.lock().await;
        let running = field.running(nodes).await?;
        let troubles = state.note_ended(nodes, &running);
        let plan = Plan::new(deed, nodes, who, &running, &state.paused);
        if plan.nodes.is_empty() {
            return Ok((plan, troubles));
        }
        self.screen.say(&format!("{at:>6.1} s  {}", plan.what));
        // Who asks the others meanwhile must know before it happens.
        match deed {
            Deed::Kill | Deed::Stop | Deed::Restart => state.down.extend(&running),
            Deed::Pause => state.paused.extend(&plan.nodes),
            Deed::Start | Deed::Resume => {}
        }
        self.set_impaired(state);
        match deed {
            Deed::Kill => field.kill(&plan.nodes).await?,
            Deed::Stop => stop(&mut field, &running, &state.paused).await?,
            Deed::Start | Deed::Restart => {
                if deed == Deed::Restart {
                    stop(&mut field, &running, &state.paused).await?;
                }
                for node in &plan.nodes {
                    field.start_node(*node).await?;
                }
                state.down.retain(|node| !plan.nodes.contains(node));
            }
            Deed::Pause => field.pause(&plan.nodes).await?,
            Deed::Resume => field.resume(&plan.nodes).await?,
        }
        if deed != Deed::Pause {
            state.paused.retain(|node| !plan.nodes.contains(node));
        }
        Ok((plan, troubles))
    }

    /// Does something to the networks or disks of nodes. Gives what it was, for people.
    async fn act(
        &self,
        action: &Action,
        nodes: &[u64],
        who: &str,
        at: f64,
        state: &mut State,
    ) -> anyhow::Result<(String, EventKind)> {
        let (fault, killing) = (EventKind::Fault { kills: false }, EventKind::Fault { kills: true });
        let say = |what: String, kind| {
            self.screen.say(&format!("{at:>6.1} s  {what}"));
            (what, kind)
        };
        let set: BTreeSet<u64> = nodes.iter().copied().collect();
        let mut field = self.field.lock().await;
        // Who asks the others meanwhile must know before it happens.
        match action {
            Action::CutOff(_, way) => {
                state.cut.extend(&set);
                self.set_impaired(state);
                let said = say(format!("cut off {}: {who}", way_name(*way)), fault);
                field.cut_off(nodes, *way).await?;
                Ok(said)
            }
            Action::SlowNetwork(_, delay) => {
                state.slow.extend(&set);
                let said = say(format!("network slower by {} ms: {who}", delay.as_millis()), fault);
                field.slow_network(nodes, *delay).await?;
                Ok(said)
            }
            Action::MendNetwork(_) => {
                let said = say(format!("network mended: {who}"), EventKind::Repair);
                field.mend_network(nodes).await?;
                state.cut.retain(|node| !set.contains(node));
                state.slow.retain(|node| !set.contains(node));
                Ok(said)
            }
            Action::SlowDisk(_, delay) => {
                let said = say(format!("disk slower by {} ms: {who}", delay.as_millis()), fault);
                state.slow_disks.extend(&set);
                field.slow_disk(nodes, *delay)?;
                Ok(said)
            }
            Action::FillDisk(_) => {
                // A node whose writes fail stops for good.
                state.full.extend(&set);
                self.set_impaired(state);
                let said = say(format!("disk full: {who}"), killing);
                field.fill_disk(nodes)?;
                Ok(said)
            }
            Action::MendDisk(_) => {
                let said = say(format!("disk mended: {who}"), EventKind::Repair);
                field.mend_disk(nodes)?;
                for node in nodes {
                    if state.full.remove(node) && !field.runs(*node).await? {
                        state.down.insert(*node);
                    }
                    state.slow_disks.remove(node);
                }
                Ok(said)
            }
            Action::Kill(_)
            | Action::Stop(_)
            | Action::Start(_)
            | Action::Restart(_)
            | Action::Pause(_)
            | Action::Resume(_)
            | Action::Replace(_)
            | Action::MoveLeader(_)
            | Action::WaitWhole => bail!("this step is done elsewhere"),
        }
    }

    /// The nodes that a target means now, and what to call them.
    async fn find(&self, target: &Target, state: &State) -> anyhow::Result<(Vec<u64>, String)> {
        let named = |nodes: Vec<u64>| {
            let text = names(&nodes);
            (nodes, text)
        };
        match target {
            Target::Node(node) => Ok(named(vec![*node])),
            Target::It => Ok(named(state.it.clone())),
            Target::All => {
                let nodes = self.field.lock().await.nodes();
                let text = format!("all {} nodes", nodes.len());
                Ok((nodes, text))
            }
            Target::Leader(group) => {
                let (node, led) = cluster_state::leader_of(self.client, *group, self.shards).await?;
                Ok((vec![node], format!("node {node}, which leads {}", group_names(&led))))
            }
            Target::Follower(group) => {
                let (leader, _) = cluster_state::leader_of(self.client, *group, self.shards).await?;
                let nodes = self.replicas(*group).await?;
                let follower = nodes.into_iter().find(|node| *node != leader);
                let follower = follower.with_context(|| format!("{} has one replica", group_name(*group)))?;
                Ok((vec![follower], format!("node {follower}, which follows in {}", group_name(*group))))
            }
            Target::Replicas(group) => {
                let (nodes, text) = named(self.replicas(*group).await?);
                Ok((nodes, format!("{text}, all of {}", group_name(*group))))
            }
        }
    }

    /// The voters of a group.
    async fn replicas(&self, group: u32) -> anyhow::Result<Vec<u64>> {
        let status = self.client.status().await.context("ask for the replicas of a group")?;
        let voters = crate::ctl::status::replicas(&status)
            .filter(|(_, replica)| replica.group_id == group)
            .max_by_key(|(_, replica)| replica.term)
            .map(|(_, replica)| replica.voters.clone());
        voters.filter(|voters| !voters.is_empty()).with_context(|| format!("group {group} isn't known"))
    }

    async fn move_leader(&self, group: u32) -> anyhow::Result<String> {
        let (from, _) = cluster_state::leader_of(self.client, group, self.shards).await?;
        let text = format!("move the leader of {} away from node {from}", group_name(group));
        self.screen.say(&format!("{:>6.1} s  {text}", self.load.now()));
        let started = Instant::now();
        while started.elapsed() < MOVE_TIMEOUT {
            // It may be refused while others change; the status tells what counts.
            let asked = self.client.transfer_leader(group, 0).await;
            sleep(POLL).await;
            let (now, _) = cluster_state::leader_of(self.client, group, self.shards).await?;
            if now != from {
                return Ok(format!(
                    "the leader of {} moves from node {from} to node {now}",
                    group_name(group)
                ));
            }
            asked.map(drop).or_else(|error| match started.elapsed() < MOVE_TIMEOUT / 2 {
                true => Ok(()),
                false => Err(error),
            })?;
        }
        bail!("node {from} still leads {} after {} s", group_name(group), MOVE_TIMEOUT.as_secs())
    }

    async fn wait_whole(&self) -> anyhow::Result<()> {
        let nodes = self.field.lock().await.nodes();
        cluster_state::wait_whole(self.client, &nodes, self.shards, || Ok(())).await
    }

    /// Mends what is still broken, and waits until the cluster is whole.
    async fn mend_all(&self, state: &mut State) -> anyhow::Result<Option<Event>> {
        let at = self.load.now();
        let mut field = self.field.lock().await;
        let nodes = |set: &BTreeSet<u64>| set.iter().copied().collect::<Vec<u64>>();
        let mut mended = Vec::new();
        let paused = field.running(&nodes(&state.paused)).await?;
        if !paused.is_empty() {
            field.resume(&paused).await?;
            mended.push("resumed");
        }
        if !state.cut.is_empty() || !state.slow.is_empty() {
            let touched: BTreeSet<u64> = state.cut.union(&state.slow).copied().collect();
            field.mend_network(&nodes(&touched)).await?;
            mended.push("connected");
        }
        if !state.full.is_empty() || !state.slow_disks.is_empty() {
            let touched: BTreeSet<u64> = state.full.union(&state.slow_disks).copied().collect();
            field.mend_disk(&nodes(&touched))?;
            mended.push("given a good disk");
        }
        let (mut started, mut troubles) = (false, Vec::new());
        for node in field.nodes() {
            if !field.runs(node).await? {
                if !state.impaired().contains(&node) {
                    troubles.push(format!("node {node} ended by itself"));
                }
                field.start_node(node).await?;
                started = true;
            }
        }
        if started {
            mended.push("started");
        }
        drop(field);
        if !mended.is_empty() {
            self.screen.say(&format!("{at:>6.1} s  what is still broken is {}", mended.join(", ")));
        }
        *state = State { outside: std::mem::take(&mut state.outside), ..State::default() };
        self.set_impaired(state);
        if let Err(error) = self.wait_whole().await {
            troubles.push(error.to_string());
        }
        if mended.is_empty() && troubles.is_empty() {
            return Ok(None);
        }
        let what = match mended.is_empty() {
            true => "the end of the load".to_owned(),
            false => format!("at the end, what is still broken is {}", mended.join(", ")),
        };
        let step = "at the end".to_owned();
        Ok(Some(Event {
            at,
            done: self.load.now(),
            step,
            what,
            kind: EventKind::Repair,
            impaired: BTreeSet::new(),
            replaced: None,
            troubles,
        }))
    }

    fn set_impaired(&self, state: &State) {
        let impaired = &state.impaired() | &state.outside;
        *self.impaired.lock().expect("nothing panics while it holds this lock") = impaired;
    }
}

/// Stops nodes in order. One that stands still goes on first: it would not notice that it is asked to end.
async fn stop(field: &mut Field, running: &[u64], paused: &BTreeSet<u64>) -> anyhow::Result<()> {
    let still: Vec<u64> = running.iter().copied().filter(|node| paused.contains(node)).collect();
    if !still.is_empty() {
        field.resume(&still).await?;
    }
    match running.is_empty() {
        true => Ok(()),
        false => field.stop(running).await,
    }
}

fn names(nodes: &[u64]) -> String {
    let names: Vec<String> = nodes.iter().map(u64::to_string).collect();
    let plural = if nodes.len() == 1 { "" } else { "s" };
    format!("node{plural} {}", names.join(", "))
}

fn way_name(way: Way) -> &'static str {
    match way {
        Way::Both => "both ways",
        Way::Incoming => "one way, nothing gets in",
        Way::Outgoing => "one way, nothing gets out",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FAULT: EventKind = EventKind::Fault { kills: false };
    const KILLING: EventKind = EventKind::Fault { kills: true };

    /// What it comes to if nodes 2 and 3 of three run, and node 3 is paused.
    fn plan(deed: Deed, nodes: &[u64]) -> Plan {
        let running: Vec<u64> = nodes.iter().copied().filter(|node| *node != 1).collect();
        Plan::new(deed, nodes, "these", &running, &[3].into())
    }

    fn expected(nodes: &[u64], what: &str, kind: EventKind) -> Plan {
        Plan { nodes: nodes.to_vec(), what: what.to_owned(), kind }
    }

    #[test]
    fn only_nodes_that_are_not_so_already_are_changed_and_the_others_are_named() {
        let all = &[1, 2, 3];
        let kill = "kill -9: these (already down: node 1)";
        assert_eq!(plan(Deed::Kill, all), expected(&[2, 3], kill, KILLING));
        let start = "start: these (already up: nodes 2, 3)";
        assert_eq!(plan(Deed::Start, all), expected(&[1], start, EventKind::Repair));
        let restart = "stop in order and start again: these";
        assert_eq!(plan(Deed::Restart, all), expected(all, restart, KILLING));
        let pause = "pause: these (already paused or down: nodes 1, 3)";
        assert_eq!(plan(Deed::Pause, all), expected(&[2], pause, FAULT));
        let resume = "resume: these (not paused: nodes 1, 2)";
        assert_eq!(plan(Deed::Resume, all), expected(&[3], resume, EventKind::Repair));

        assert_eq!(plan(Deed::Stop, &[2]), expected(&[2], "stop in order: these", KILLING));
        assert_eq!(plan(Deed::Restart, &[1]), expected(&[1], "start: these", EventKind::Repair));
        let nothing = "stop in order: nothing to do (already down: node 1)";
        assert_eq!(plan(Deed::Stop, &[1]), expected(&[], nothing, EventKind::Wait));
    }

    #[test]
    fn a_node_that_ended_by_itself_is_told_once_and_one_with_a_full_disk_is_not() {
        let mut state = State { down: [1].into(), full: [2].into(), ..State::default() };
        assert_eq!(state.note_ended(&[1, 2, 3, 4], &[4]), ["node 3 ended by itself"]);
        assert_eq!(state.note_ended(&[1, 2, 3, 4], &[4]), [] as [&str; 0]);
    }
}
