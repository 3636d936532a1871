//! One simulation, from its seed to its verdict.

use std::{
    cell::{Cell, RefCell},
    collections::BTreeMap,
    rc::Rc,
    sync::Arc,
    time::Duration,
};

use serde::{Deserialize, Serialize};
use turmoil::Sim;
use verdict_client::{Client, Options, Outcome};
use verdict_proto::v1::{self, outcome};
use verdict_protocol::ids::{GroupId, NodeId};
use verdict_tests::{
    bank::{Bank, Findings, Pace, Shape as BankShape},
    random::Random,
};

use crate::{
    cluster::{Host, Shape, name},
    disk::{Counts, Harm},
    faults::{Death, Faults, LATENCY_MS_MAX},
    nature,
    net::SimulatedTcp,
    trace,
};

/// Hosts with a client that knows the SDK.
const SDK_CLIENTS: usize = 2;
/// How long things go wrong.
const CHAOS_MS: std::ops::Range<u64> = 8_000..20_000;
/// How long everything may take once all is well: to come back, and to tell all outcomes.
const END_WITHIN: Duration = Duration::from_secs(90);
/// How long anything may be in doubt once all is well.
const DOUBT_WITHIN: Duration = Duration::from_secs(15);
/// How long replicas may take to be equal, once there is nothing left to do.
const EQUAL_WITHIN: Duration = Duration::from_secs(15);
/// A node whose sync has failed must have stopped after this time.
const STOP_WITHIN: Duration = Duration::from_millis(20);
/// How often the replicas are looked at.
const LOOK_EVERY: u32 = 20;

/// What came of a seed.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Report {
    pub(crate) seed: u64,
    /// How long it lasted, in simulated time.
    pub(crate) simulated_ms: u64,
    /// The hash of everything that happened.
    pub(crate) trace: String,
    /// Writes to the network.
    pub(crate) messages: u64,
    /// Faults that fired, by kind.
    pub(crate) faults: BTreeMap<String, u64>,
    pub(crate) sent: usize,
    pub(crate) committed: usize,
    pub(crate) readings: usize,
    /// How long something was in doubt once all was well.
    pub(crate) doubt_ms: u64,
    pub(crate) violations: Vec<String>,
}

/// What the hosts of clients and the driver tell each other.
#[derive(Default)]
struct Shared {
    bank: RefCell<Option<Arc<Bank>>>,
    healed: Cell<bool>,
    findings: RefCell<Option<Findings>>,
    without_doubt: Cell<bool>,
    sdk_answers: Cell<u64>,
}

/// Runs one seed on this thread, which must be fresh.
pub(crate) fn run(seed: u64) -> Report {
    nature::begin(seed);
    let mut random = Random::of(seed);
    let shape = Shape::draw(&mut random);
    trace::note(format_args!("seed {seed}: {} nodes, {} shards", shape.nodes, shape.shards));
    let mut sim = turmoil::Builder::new()
        .rng_seed(random.number())
        .epoch(std::time::UNIX_EPOCH + Duration::from_secs(nature::EPOCH_SECONDS))
        .simulation_duration(Duration::from_secs(3600))
        .min_message_latency(Duration::from_micros(100))
        .max_message_latency(Duration::from_millis(LATENCY_MS_MAX))
        .tcp_capacity(1 << 16)
        .enable_random_order()
        .build();
    let hosts: Vec<Rc<Host>> =
        (1..=shape.nodes).map(|number| Host::new(&shape, number, &mut random)).collect();
    for host in &hosts {
        let host = host.clone();
        sim.host(name(host.number), move || host.clone().run());
    }
    let shared = Rc::new(Shared::default());
    let mut clients = vec!["bank".to_owned()];
    sim.client("bank", keep_bank(shared.clone(), shape.clone(), random.split()));
    for number in 1..=SDK_CLIENTS {
        clients.push(format!("sdk-{number}"));
        sim.client(format!("sdk-{number}"), use_sdk(shared.clone(), shape.clone(), random.split()));
    }
    let faults = Faults::new(random.split(), hosts.clone(), &clients);
    let chaos = Duration::from_millis(CHAOS_MS.start + random.below(CHAOS_MS.end - CHAOS_MS.start));
    let mut world = World {
        shape,
        hosts,
        shared,
        faults,
        hashes: BTreeMap::new(),
        leaders: BTreeMap::new(),
        failed_syncs: BTreeMap::new(),
        violations: Vec::new(),
    };
    let mut report = world.live(&mut sim, chaos, random.split());
    report.seed = seed;
    report
}

/// The bank opens while all is well, is robbed of its peace, and is audited when all is well again.
async fn keep_bank(shared: Rc<Shared>, shape: Shape, mut random: Random) -> turmoil::Result {
    let bank = Bank::open(&shape, "bank", BankShape { rich: 2, poor: 2, counters: 2, ballast: 0 }).await;
    *shared.bank.borrow_mut() = Some(bank.clone());
    let rest = Duration::from_millis(5 + random.below(60));
    let pace = Pace { workers: 4, rest, readers: 1, reader_rest: rest };
    let load = bank.load(&shape, pace, &mut random);
    healed(&shared).await;
    load.end().await;
    while !is_without_doubt(&shape).await {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    shared.without_doubt.set(true);
    trace::note("nothing is in doubt");
    let findings = bank.check(&shape).await;
    trace::note(format_args!("{} sent, {} committed", findings.sent, findings.committed));
    *shared.findings.borrow_mut() = Some(findings);
    Ok(())
}

async fn healed(shared: &Shared) {
    while !shared.healed.get() {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

fn sdk(shape: &Shape) -> Client {
    let (timeout, try_timeout) = (Duration::from_secs(8), Duration::from_secs(1));
    let options = Options { connect: Arc::new(SimulatedTcp), timeout, try_timeout };
    Client::connect(shape.addresses(), options).expect("host:port is an address")
}

async fn is_without_doubt(shape: &Shape) -> bool {
    match sdk(shape).list_in_doubt(100).await {
        Ok(told) => told.parts.is_empty() && told.unreachable_shards.is_empty(),
        Err(_) => false,
    }
}

/// Settles with the SDK, one by one and on a stream, and now and then moves a leader.
async fn use_sdk(shared: Rc<Shared>, shape: Shape, mut random: Random) -> turmoil::Result {
    while shared.bank.borrow().is_none() {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let bank = shared.bank.borrow().clone().expect("it has just opened");
    let client = sdk(&shape);
    let submitter = client.submitter(4);
    while !shared.healed.get() {
        if random.below(40) == 0 {
            let group = random.below(u64::from(shape.shards) + 1) as u32;
            let moved = client.with_timeout(Duration::from_secs(1)).transfer_leader(group, 0).await;
            trace::note(format_args!("asked for another leader of group {group}: {}", moved.is_ok()));
        }
        let batch = bank.noted(bank.choose(&mut random));
        let answer = match random.below(2) {
            0 => client.submit(&batch).await,
            _ => submitter.submit(batch.clone()).await.result,
        };
        match answer.map(definite) {
            Ok(Some(answer)) => {
                shared.sdk_answers.set(shared.sdk_answers.get() + 1);
                bank.answered(&batch.id, answer);
            }
            Ok(None) => {}
            // An error says that nothing was proposed.
            Err(_) => bank.given_up(&batch.id),
        }
        tokio::time::sleep(Duration::from_millis(random.below(50))).await;
    }
    Ok(())
}

/// The answer as it travels.
fn definite(outcome: Outcome) -> Option<outcome::Result> {
    match outcome {
        Outcome::Committed { stamp } => Some(outcome::Result::Committed(v1::Committed { stamp })),
        Outcome::Aborted { reason, operation, met, message } => {
            let reason = reason.into();
            Some(outcome::Result::Aborted(v1::Aborted { reason, operation, met, message }))
        }
        Outcome::Unknown { .. } => None,
    }
}

struct World {
    shape: Shape,
    hosts: Vec<Rc<Host>>,
    shared: Rc<Shared>,
    faults: Faults,
    /// The hash of each group's state at each index, as the first replica had it.
    hashes: BTreeMap<(GroupId, u64), ([u8; 32], u64)>,
    /// Who led each group in each term.
    leaders: BTreeMap<(GroupId, u64), NodeId>,
    /// When a failed sync of each host was first seen, and how many there were.
    failed_syncs: BTreeMap<u64, (Duration, u64)>,
    violations: Vec<String>,
}

impl World {
    fn live(&mut self, sim: &mut Sim<'_>, chaos: Duration, mut random: Random) -> Report {
        let mut chaos_began = None;
        let mut healed_at: Option<Duration> = None;
        let mut doubt_ended = None;
        for step in 0_u32.. {
            let now = sim.elapsed();
            nature::set_elapsed(now);
            trace::set_elapsed(now);
            match sim.step() {
                Ok(false) => {}
                Ok(true) => break,
                Err(error) => {
                    self.blame(format!("a client failed: {error}"));
                    break;
                }
            }
            if chaos_began.is_none() && self.shared.bank.borrow().is_some() {
                chaos_began = Some(now);
            }
            match (chaos_began, healed_at) {
                (Some(began), None) if now < began + chaos => self.faults.go_on(sim, now),
                (Some(_), None) => {
                    trace::note("all is well again");
                    self.faults.heal(sim);
                    self.shared.healed.set(true);
                    healed_at = Some(now);
                }
                (_, Some(_)) => self.faults.heal(sim),
                (None, None) => {}
            }
            self.take_down_the_stopped(sim, now, &mut random);
            if step.is_multiple_of(LOOK_EVERY) {
                self.look();
            }
            if let Some(healed) = healed_at
                && doubt_ended.is_none()
                && self.shared.without_doubt.get()
            {
                doubt_ended = Some(now - healed);
            }
            if now > healed_at.unwrap_or(Duration::from_secs(30)) + END_WITHIN {
                self.blame("G8: no end though all is well".to_owned());
                break;
            }
            if self.violations.len() > 20 {
                break;
            }
        }
        self.equal(sim);
        self.report(sim, doubt_ended)
    }

    fn blame(&mut self, what: String) {
        trace::note(format_args!("VIOLATION {what}"));
        self.violations.push(what);
    }

    /// Ends the hosts whose nodes have stopped by themselves, as a process ends.
    fn take_down_the_stopped(&mut self, sim: &mut Sim<'_>, now: Duration, random: &mut Random) {
        for host in self.hosts.clone() {
            if self.faults.is_down(host.number) {
                continue;
            }
            let Counts { failed_syncs, .. } = host.disk.counts();
            let (since, before) = self.failed_syncs.entry(host.number).or_default();
            if failed_syncs > *before {
                (*since, *before) = (now, failed_syncs);
            }
            let must_have_stopped = *since > Duration::ZERO && now > *since + STOP_WITHIN;
            let stopped = host.stopped();
            if stopped.is_none() && !host.disk.is_off() {
                if must_have_stopped {
                    self.failed_syncs.insert(host.number, (Duration::ZERO, failed_syncs));
                    self.blame(format!("R9: the sync of {} failed, and it goes on", name(host.number)));
                }
                continue;
            }
            self.failed_syncs.insert(host.number, (Duration::ZERO, failed_syncs));
            let why = stopped.unwrap_or_else(|| "its machine lost power".to_owned());
            trace::note(format_args!("{} stopped: {why}", name(host.number)));
            let death = match host.disk.harm() {
                // A machine whose disk has failed is started anew, not only its process.
                Some(Harm::FailedSync | Harm::Off) => Death::PowerLost,
                Some(Harm::Full) => Death::Killed,
                None => {
                    self.blame(format!("{} stopped without a reason: {why}", name(host.number)));
                    Death::Killed
                }
            };
            let until = now + Duration::from_millis(50 + random.below(1000));
            self.faults.take_down(sim, host.number, death, until);
        }
    }

    /// What must hold at any moment.
    fn look(&mut self) {
        for group in self.shape.groups() {
            for host in self.hosts.clone() {
                let Some(status) = host.status(group) else { continue };
                if host.disk.is_off() {
                    continue;
                }
                let at = (group, status.position.index);
                let (hash, first) = *self.hashes.entry(at).or_insert((status.position.hash, host.number));
                if hash != status.position.hash {
                    self.blame(format!(
                        "G10: group {group} at {}: nodes {first} and {} differ",
                        status.position.index, host.number
                    ));
                }
                if status.role == verdict_raft::Role::Leader {
                    let here = NodeId(host.number);
                    let leader = *self.leaders.entry((group, status.term)).or_insert(here);
                    if leader != here {
                        self.blame(format!("two leaders of group {group} in term {}", status.term));
                    }
                }
            }
        }
    }

    /// Waits until all replicas have applied the same, and compares.
    fn equal(&mut self, sim: &mut Sim<'_>) {
        if !self.violations.is_empty() {
            return;
        }
        let until = sim.elapsed() + EQUAL_WITHIN;
        while sim.elapsed() < until {
            let now = sim.elapsed();
            nature::set_elapsed(now);
            trace::set_elapsed(now);
            if let Err(error) = sim.step() {
                return self.blame(format!("a client failed: {error}"));
            }
            if self.is_equal() {
                self.look();
                return;
            }
        }
        let seen: Vec<String> = self
            .shape
            .groups()
            .flat_map(|group| self.hosts.iter().filter_map(move |host| host.status(group)))
            .map(|status| format!("{} at {}", status.group, status.applied_index))
            .collect();
        self.blame(format!("replicas aren't equal after {EQUAL_WITHIN:?}: {}", seen.join(", ")));
    }

    fn is_equal(&self) -> bool {
        self.shape.groups().all(|group| {
            let states: Vec<_> = self.hosts.iter().filter_map(|host| host.status(group)).collect();
            let same = |a: &verdict_raft::GroupStatus, b: &verdict_raft::GroupStatus| {
                a.applied_index == b.applied_index && a.position.index == b.position.index
            };
            states.len() == self.shape.replicas(group)
                && states.windows(2).all(|pair| same(&pair[0], &pair[1]))
        })
    }

    fn report(&mut self, sim: &Sim<'_>, doubt: Option<Duration>) -> Report {
        let findings = self.shared.findings.borrow().clone();
        let findings = findings.unwrap_or_else(|| {
            self.blame("the bank was never audited".to_owned());
            Findings::default()
        });
        for violation in &findings.violations {
            self.blame(violation.to_string());
        }
        if doubt.is_some_and(|doubt| doubt > DOUBT_WITHIN) {
            self.blame(format!("G8: something was in doubt for {doubt:?} though all was well"));
        }
        let mut faults: BTreeMap<String, u64> =
            self.faults.fired().iter().map(|(kind, times)| ((*kind).to_owned(), *times)).collect();
        for counts in self.hosts.iter().map(|host| host.disk.counts()) {
            let Counts { failed_syncs, refused_full, batches_lost, torn_files, .. } = counts;
            for (kind, times) in [
                ("(disk) syncs that failed", failed_syncs),
                ("(disk) writes refused for want of room", refused_full),
                ("(disk) unsynced batches lost", batches_lost),
                ("(disk) writes to files torn", torn_files),
            ] {
                *faults.entry(kind.to_owned()).or_default() += times;
            }
        }
        faults.retain(|_, times| *times > 0);
        let (trace, messages) = trace::hash();
        Report {
            seed: 0,
            simulated_ms: sim.elapsed().as_millis() as u64,
            trace,
            messages,
            faults,
            sent: findings.sent,
            committed: findings.committed,
            readings: findings.readings,
            doubt_ms: doubt.unwrap_or_default().as_millis() as u64,
            violations: self.violations.clone(),
        }
    }
}
