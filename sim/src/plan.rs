//! What a run is made of: the cluster, its settings, what clients do, and which faults come when.
//!
//! A plan follows from its seed alone ([`Plan::of_seed`]) and is plain data: it can be written to a file, made smaller, and run again.

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use verdict_protocol::{
    batch::{Batch, Condition, Operation, OperationKind, Placement, RowKey},
    ids::{BatchId, GroupId, Millis, NodeId},
};

use crate::{
    raft::{Defect, Timing},
    random::Random,
};

/// When a run begins, by a clock that is right.
pub const START: Millis = Millis(1_700_000_000_000);

/// Faults that every run has at least.
pub const FAULTS_MIN: u64 = 50;

/// The account that most trades pay their fee to.
pub const HOT: &str = "exchange/USD";

/// A whole run.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Plan {
    /// The seed: of the plan, and of all chance while it runs.
    pub seed: u64,
    /// How many nodes there are.
    pub nodes: u64,
    /// The nodes of each group's replicas; the first group is the coordinators.
    pub seats: Vec<Vec<u64>>,
    /// Settings.
    pub settings: Settings,
    /// For how long faults come, in milliseconds.
    pub faults_ms: u64,
    /// They go on, with messages that go wrong, until there were so many.
    pub faults_min: u64,
    /// The faults.
    pub faults: Vec<Fault>,
    /// What each client does, one after the other.
    pub clients: Vec<Vec<Step>>,
}

/// Settings of a run. Times in microseconds unless they say otherwise.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Settings {
    /// Raft's intervals.
    pub timing: Timing,
    /// A bug in the model of Raft.
    #[serde(default)]
    pub defect: Defect,
    /// How long a message takes.
    pub latency: (u64, u64),
    /// How long a sync takes.
    pub sync: (u64, u64),
    /// A snapshot is made after so many entries...
    pub snapshot_after: u64,
    /// ...and so many are kept behind it.
    pub keep_entries: u64,
    /// After so many entries the state machine's state reaches the disk by itself.
    pub flush_after: u64,
    /// Parts that a shard holds.
    pub parts_max: u32,
    /// Messages that wait at a shard.
    pub arrivals_max: usize,
    /// Entries of a shard, or of the coordinators, under way.
    pub entries_in_flight_max: usize,
    /// Whether the only participant of a batch may commit it on its own word.
    #[serde(default = "yes")]
    pub alone: bool,
    /// How far the windows of ids that shards may commit by themselves reach beyond the clock, and back.
    #[serde(default = "ahead")]
    pub alone_ahead_ms: u64,
    /// See above.
    #[serde(default = "behind")]
    pub alone_behind_ms: u64,
    /// Batches at the leader.
    pub batches_max: usize,
    /// How long a batch may take, in milliseconds.
    pub timeout_ms: u32,
    /// How long decisions are remembered, in milliseconds.
    pub retention_ms: u64,
    /// How many decisions are remembered, at least for so many milliseconds, and commits whose changes are.
    pub keep: (u64, u64, u64),
    /// How far ids may lie ahead, in milliseconds.
    pub future_max_ms: u64,
}

fn yes() -> bool {
    true
}

fn ahead() -> u64 {
    1_000
}

fn behind() -> u64 {
    60_000
}

/// A fault, and when it comes.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Fault {
    /// After so many milliseconds...
    pub at_ms: u64,
    /// ...and for so many, where it lasts.
    pub for_ms: u64,
    /// What happens.
    pub what: Trouble,
}

/// What can happen.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Trouble {
    /// A node's process dies and comes back. With `power`, what was not synced is lost too.
    Crash {
        /// The node.
        node: u64,
        /// Whether the machine loses power.
        power: bool,
    },
    /// Whoever leads a group dies.
    CrashLeader {
        /// The group.
        group: u32,
        /// Whether the machine loses power.
        power: bool,
    },
    /// All nodes of a group lose power.
    CrashGroup {
        /// The group.
        group: u32,
    },
    /// All nodes lose power.
    CrashAll,
    /// A node stands still, and goes on as if nothing had happened.
    Pause {
        /// The node.
        node: u64,
    },
    /// Whoever leads a group stands still.
    PauseLeader {
        /// The group.
        group: u32,
    },
    /// Nothing goes from one node to another.
    Cut {
        /// From here.
        from: u64,
        /// To there.
        to: u64,
        /// The other way neither.
        both: bool,
    },
    /// A node is cut off from all others: what it sends, what it is sent, or both.
    Isolate {
        /// The node.
        node: u64,
        /// What it sends is lost.
        out: bool,
        /// What it is sent is lost.
        into: bool,
    },
    /// Whoever leads a group is cut off both ways.
    IsolateLeader {
        /// The group.
        group: u32,
    },
    /// The Raft messages of whoever leads a group are lost, while all others arrive: it is deposed, and can still reach everybody.
    Deaf {
        /// The group.
        group: u32,
    },
    /// The coordinators' leader, whoever that is, and a shard don't hear each other, while the shard's replicas do.
    Sever {
        /// The shard.
        shard: u32,
        /// What the shard is told is lost.
        told: bool,
        /// What it says is lost.
        says: bool,
    },
    /// Connections of a node break.
    Reset {
        /// The node.
        node: u64,
    },
    /// The leadership of a group is handed over.
    HandOver {
        /// The group.
        group: u32,
        /// To this node, if it can.
        to: u64,
    },
    /// A replica makes a snapshot and cuts its log.
    Snapshot {
        /// The group.
        group: u32,
        /// The node.
        node: u64,
    },
    /// A node's clock jumps, and comes back later.
    Clock {
        /// The node.
        node: u64,
        /// By so many milliseconds.
        by_ms: i64,
    },
    /// A node's disk is slow.
    SlowDisk {
        /// The node.
        node: u64,
        /// A sync takes up to so many milliseconds longer.
        ms: u64,
    },
    /// Messages are lost, repeated and delayed, so many of 10,000.
    Net {
        /// Lost.
        lost: u64,
        /// Repeated.
        repeated: u64,
        /// Delayed...
        delayed: u64,
        /// ...by up to so many milliseconds.
        delay_ms: u64,
    },
    /// All clients send again what they have sent so far.
    Storm {
        /// So many of their last batches.
        last: u64,
    },
    /// Shards hold fewer parts and let fewer messages wait.
    Narrow {
        /// Parts.
        parts_max: u32,
        /// Messages.
        arrivals_max: usize,
    },
}

/// One thing that a client does.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Step {
    /// So long after the one before, in milliseconds.
    pub after_ms: u64,
    /// What.
    pub what: Act,
}

/// What a client can do.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Act {
    /// Submits a batch, until there is an answer.
    Submit(Contents),
    /// Asks for an outcome.
    Query {
        /// The id's number.
        id: u32,
        /// When it was made.
        made_ms: i64,
        /// Answer only when it is decided.
        wait: bool,
        /// Abort it if there is no trace of it.
        seal: bool,
    },
    /// Reads rows at one position.
    Read {
        /// The rows.
        rows: Vec<String>,
    },
    /// Reads the history of a row.
    History {
        /// The row.
        row: String,
    },
}

/// A batch.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Contents {
    /// Its id's number.
    pub id: u32,
    /// When the id was made, in milliseconds since the start.
    pub made_ms: i64,
    /// Whether deltas must add up to 0.
    pub zero_sum: bool,
    /// The operations.
    pub changes: Vec<Change>,
}

/// One operation on the row that it names (`partition/name`).
#[derive(Clone, Debug, Serialize, Deserialize)]
#[allow(missing_docs)] // each is an operation of the protocol
pub enum Change {
    Add(String, i64),
    AddWithin { row: String, delta: i64, floor: Option<i64>, ceiling: Option<i64> },
    Put(String, u32),
    Insert(String, u32),
    Delete(String),
    Exists(String, bool),
    AtLeast(String, i64),
    AtMost(String, i64),
    RecordIs(String, u32),
}

/// The key of a row that is named `partition/name`.
pub fn row_key(row: &str) -> RowKey {
    let (partition, name) = row.split_once('/').expect("a row of a plan has a partition and a name");
    RowKey::new(partition, name).expect("rows of plans are well-formed")
}

/// The id with a number that was made at a time.
pub fn batch_id(id: u32, made_ms: i64) -> BatchId {
    let mut tail = [0; 10];
    tail[6..].copy_from_slice(&id.to_be_bytes());
    BatchId::from_parts(Millis(START.0.saturating_add_signed(made_ms)), tail)
}

impl Contents {
    /// As a client submits it.
    pub fn batch(&self, timeout_ms: u32) -> Batch {
        let operations = self.changes.iter().map(Change::operation).collect();
        Batch { id: batch_id(self.id, self.made_ms), timeout_ms, operations, zero_sum: self.zero_sum }
    }
}

impl Change {
    fn operation(&self) -> Operation {
        let record = |value: &u32| Bytes::copy_from_slice(&value.to_be_bytes());
        let wide = |bound: &Option<i64>| bound.map(i128::from);
        let (row, kind) = match self {
            Change::Add(row, delta) => {
                (row, OperationKind::Add { delta: i128::from(*delta), floor: None, ceiling: None })
            }
            Change::AddWithin { row, delta, floor, ceiling } => {
                let (floor, ceiling) = (wide(floor), wide(ceiling));
                (row, OperationKind::Add { delta: i128::from(*delta), floor, ceiling })
            }
            Change::Put(row, value) => (row, OperationKind::Put(record(value))),
            Change::Insert(row, value) => (row, OperationKind::Insert(record(value))),
            Change::Delete(row) => (row, OperationKind::Delete),
            Change::Exists(row, wanted) => (row, OperationKind::Require(Condition::Exists(*wanted))),
            Change::AtLeast(row, amount) => {
                (row, OperationKind::Require(Condition::AtLeast(i128::from(*amount))))
            }
            Change::AtMost(row, amount) => {
                (row, OperationKind::Require(Condition::AtMost(i128::from(*amount))))
            }
            Change::RecordIs(row, value) => (row, OperationKind::Require(Condition::RecordIs(record(value)))),
        };
        Operation { row: row_key(row), kind }
    }
}

impl Plan {
    /// The plan of a seed.
    pub fn of_seed(seed: u64) -> Plan {
        let mut random = Random::new(seed);
        let random = &mut random;
        let nodes = random.range(3, 5);
        let shards = random.range(2, 3);
        let seats = (0..=shards).map(|_| seats(nodes, random)).collect();
        let settings = settings(random);
        let faults_ms = random.range(2_500, 5_000);
        let mut plan = Plan {
            seed,
            nodes,
            seats,
            settings,
            faults_ms,
            faults_min: FAULTS_MIN,
            faults: Vec::new(),
            clients: Vec::new(),
        };
        plan.faults = faults(&plan, random);
        plan.clients = clients(&plan, random);
        if random.chance(4000) {
            use_an_id_again(&mut plan, random);
        }
        plan
    }

    /// The nodes of a group's replicas.
    pub fn voters(&self, group: GroupId) -> Vec<NodeId> {
        self.seats[group.0 as usize].iter().copied().map(NodeId).collect()
    }

    /// How many shards there are.
    pub fn shards(&self) -> u32 {
        self.seats.len() as u32 - 1
    }
}

/// Three of the nodes.
fn seats(nodes: u64, random: &mut Random) -> Vec<u64> {
    let mut all: Vec<u64> = (1..=nodes).collect();
    random.shuffle(&mut all);
    all.truncate(3);
    all.sort_unstable();
    all
}

fn settings(random: &mut Random) -> Settings {
    let election_min = random.range(150, 400) * 1000;
    let timing = Timing {
        heartbeat: random.range(40, 100) * 1000,
        election_min,
        election_max: election_min + random.range(150, 400) * 1000,
    };
    let short = random.chance(3000);
    Settings {
        timing,
        defect: Defect::None,
        latency: (random.range(50, 300), random.range(400, 8_000)),
        sync: (random.range(50, 200), random.range(300, 3_000)),
        snapshot_after: random.range(6, 80),
        keep_entries: random.range(0, 8),
        flush_after: random.range(5, 80),
        parts_max: if random.chance(8000) { 1000 } else { random.range(1, 4) as u32 },
        arrivals_max: if random.chance(9000) { 1000 } else { random.range(1, 2) as usize },
        entries_in_flight_max: *random.pick(&[1, 1, 2, 16]),
        alone: random.chance(9000),
        alone_ahead_ms: *random.pick(&[1_000, 1_000, 4_000, 200]),
        alone_behind_ms: *random.pick(&[60_000, 60_000, 300]),
        batches_max: if random.chance(9000) { 1000 } else { random.range(1, 3) as usize },
        timeout_ms: random.range(1_500, 4_000) as u32,
        retention_ms: if short { random.range(3_000, 10_000) } else { 24 * 3_600_000 },
        keep: if random.chance(7000) {
            (10_000_000, 120_000, 10_000_000)
        } else {
            (random.range(3, 40), random.range(200, 4_000), random.range(1, 40))
        },
        future_max_ms: if random.chance(5000) { 600_000 } else { 24 * 3_600_000 },
    }
}

fn faults(plan: &Plan, random: &mut Random) -> Vec<Fault> {
    let count = random.range(18, 36);
    let mut faults: Vec<Fault> = (0..count)
        .map(|_| {
            let at_ms = random.range(300, plan.faults_ms);
            let long = random.range(50, 1_500);
            let for_ms = long.min(plan.faults_ms.saturating_sub(at_ms)).max(20);
            Fault { at_ms, for_ms, what: trouble(plan, random) }
        })
        .collect();
    // At all times some messages go wrong, in some runs few and in some many.
    let harsh = random.chance(3000);
    let most = if harsh { 1_500 } else { 700 };
    let what = Trouble::Net {
        lost: random.range(350, most),
        repeated: random.range(350, most),
        delayed: random.range(350, most),
        delay_ms: *random.pick(&[50, 500, 5_000, 20_000]),
    };
    faults.push(Fault { at_ms: 0, for_ms: plan.faults_ms, what });
    faults.sort_by_key(|fault| fault.at_ms);
    faults
}

fn trouble(plan: &Plan, random: &mut Random) -> Trouble {
    let node = random.range(1, plan.nodes);
    let other = 1 + (node - 1 + random.range(1, plan.nodes - 1)) % plan.nodes;
    let group = if random.chance(4000) { 0 } else { random.range(1, u64::from(plan.shards())) as u32 };
    match random.below(100) {
        0..14 => Trouble::Crash { node, power: random.chance(6000) },
        14..26 => Trouble::CrashLeader { group, power: random.chance(6000) },
        26..28 => Trouble::CrashGroup { group },
        28 => Trouble::CrashAll,
        29..35 => Trouble::Pause { node },
        35..45 => Trouble::PauseLeader { group },
        45..51 => Trouble::Cut { from: node, to: other, both: random.chance(4000) },
        51..57 => {
            let kind = random.below(3);
            Trouble::Isolate { node, out: kind != 1, into: kind != 0 }
        }
        57..60 => Trouble::IsolateLeader { group },
        60..63 => Trouble::Deaf { group },
        63..67 => Trouble::Reset { node },
        67..75 => Trouble::HandOver { group, to: *random.pick(&plan.seats[group as usize]) },
        75..80 => Trouble::Snapshot { group, node: *random.pick(&plan.seats[group as usize]) },
        80..85 => {
            // A leader whose clock is behind forgets later, and refuses new batches where little may be remembered.
            let remembers_little = plan.settings.retention_ms < 60_000 || plan.settings.keep.0 < 1_000_000;
            let most = if remembers_little { 4_000 } else { 7_200_000 };
            let by_ms = random.range(10, most) as i64;
            Trouble::Clock { node, by_ms: if random.chance(5000) { by_ms } else { -by_ms } }
        }
        85..91 => Trouble::SlowDisk { node, ms: random.range(5, 700) },
        91..95 => Trouble::Storm { last: random.range(1, 5) },
        95..97 => Trouble::Narrow {
            parts_max: random.range(1, 4) as u32,
            arrivals_max: random.range(1, 4) as usize,
        },
        _ => Trouble::Net {
            lost: random.range(0, 4_000),
            repeated: random.range(0, 3_000),
            delayed: random.range(0, 3_000),
            delay_ms: *random.pick(&[20, 200, 2_000, 20_000]),
        },
    }
}

const USERS: u64 = 4;
const RECORDS: u64 = 3;

fn user(random: &mut Random) -> String {
    format!("user:{}/USD", random.below(USERS))
}

fn record(random: &mut Random) -> String {
    format!("order:{}/state", random.below(RECORDS))
}

/// All balances that batches of a plan touch.
pub fn balances() -> Vec<String> {
    let users = (0..USERS).map(|user| format!("user:{user}/USD"));
    users.chain([HOT.to_owned(), "credit:1/USD".to_owned(), "vault:1/USD".to_owned()]).collect()
}

/// The lowest that a balance may ever be, and the highest.
pub fn bounds(row: &str) -> (i128, i128) {
    match row {
        "credit:1/USD" => (-50, i128::MAX),
        "vault:1/USD" => (0, 60),
        _ => (0, i128::MAX),
    }
}

/// Makes the steps of clients, with ids that are never used twice unless on purpose.
struct Maker<'a> {
    random: &'a mut Random,
    last_id: u32,
    made: Vec<Contents>,
    now_ms: i64,
}

fn clients(plan: &Plan, random: &mut Random) -> Vec<Vec<Step>> {
    let count = random.range(3, 6);
    let gap = random.range(150, 900);
    let mut maker = Maker { random, last_id: 0, made: Vec::new(), now_ms: 0 };
    let mut clients = Vec::new();
    for client in 0..count {
        maker.now_ms = 0;
        let mut steps = Vec::new();
        if client == 0 {
            // Money comes into being first.
            let rows = (0..USERS).map(|user| format!("user:{user}/USD"));
            let changes = rows.map(|row| Change::Add(row, 100)).collect();
            steps.push(Step { after_ms: 1, what: maker.submit(changes, false) });
        }
        while maker.now_ms < plan.faults_ms as i64 {
            let after_ms = maker.random.range(1, gap);
            maker.now_ms += after_ms as i64;
            let what = maker.act();
            steps.push(Step { after_ms, what });
        }
        clients.push(steps);
    }
    clients
}

/// A shard commits a batch by itself and can't say so, the coordinators' leader is lost before it knows, and the id is used again for
/// other contents on another shard while the first one is out of reach. Chance alone brings that together once in many thousand runs.
fn use_an_id_again(plan: &mut Plan, random: &mut Random) {
    let placement = Placement { shards: plan.shards() };
    let shard_of = |row: &str| placement.shard_of(row.split_once('/').expect("rows have partitions").0);
    let mut rows: Vec<String> = (0..USERS).map(|user| format!("user:{user}/USD")).collect();
    rows.push(HOT.to_owned());
    random.shuffle(&mut rows);
    let (first, shard) = (rows[0].clone(), shard_of(&rows[0]));
    let Some(other) = rows.iter().find(|row| shard_of(row) != shard).cloned() else { return };
    let made_ms = random.range(500, plan.faults_ms - 500);
    let say_nothing = made_ms - random.range(1, 30);
    let lost = made_ms + random.range(1, 400);
    let back = lost + random.range(300, 2_500);
    let mut fault =
        |at_ms: u64, until: u64, what| plan.faults.push(Fault { at_ms, for_ms: until - at_ms, what });
    fault(say_nothing, back, Trouble::Sever { shard: shard.0, told: false, says: true });
    if random.chance(3000) {
        // It doesn't hear the next leader either, and what the last one said may still come.
        fault(lost, back, Trouble::Sever { shard: shard.0, told: true, says: true });
    }
    let what = match random.below(3) {
        0 => Trouble::CrashLeader { group: 0, power: random.chance(5000) },
        1 => Trouble::PauseLeader { group: 0 },
        _ => Trouble::HandOver { group: 0, to: *random.pick(&plan.seats[0]) },
    };
    fault(lost, lost + random.range(300, 1_500), what);
    plan.faults.sort_by_key(|fault| fault.at_ms);
    let id = 800_000 + random.range(0, 9) as u32;
    let submit = |row: &str, delta, at_ms| {
        let changes = vec![Change::Add(row.to_owned(), delta)];
        let contents = Contents { id, made_ms: made_ms as i64, zero_sum: false, changes };
        Step { after_ms: at_ms, what: Act::Submit(contents) }
    };
    let again_ms = lost + random.range(50, 1_500);
    plan.clients.push(vec![submit(&first, 5, made_ms)]);
    plan.clients.push(vec![match random.below(8) {
        0 => Step {
            after_ms: again_ms,
            what: Act::Query { id, made_ms: made_ms as i64, wait: false, seal: true },
        },
        _ => submit(&other, 7, again_ms),
    }]);
}

impl Maker<'_> {
    fn submit(&mut self, changes: Vec<Change>, zero_sum: bool) -> Act {
        self.last_id += 1;
        let contents = Contents { id: self.last_id, made_ms: self.now_ms, zero_sum, changes };
        self.made.push(contents.clone());
        Act::Submit(contents)
    }

    fn act(&mut self) -> Act {
        match self.random.below(100) {
            0..22 => self.trade(),
            22..40 => self.alone(),
            40..48 => self.tight(),
            48..64 => self.records(),
            64..69 => {
                let changes = vec![Change::Add(user(self.random), self.random.range(1, 60) as i64)];
                self.submit(changes, false)
            }
            69..73 => self.bounded(),
            73..78 => self.again(),
            78..80 => self.old(),
            80..85 => self.query(),
            85..98 => self.read(),
            _ => {
                let rows = balances();
                Act::History { row: self.random.pick(&rows).clone() }
            }
        }
    }

    /// Money for a trade record, and a fee for the exchange.
    fn trade(&mut self) -> Act {
        let (from, to) = (user(self.random), user(self.random));
        let amount = self.random.range(1, 40) as i64;
        let mut changes =
            vec![Change::Add(from, -amount - 1), Change::Add(to, amount), Change::Add(HOT.to_owned(), 1)];
        if self.random.chance(5000) {
            let number = self.last_id + 1;
            // Sometimes the same trade is settled by two batches: only one can.
            let trade = if self.random.chance(1500) { number.saturating_sub(2) } else { number };
            changes.push(Change::Insert(format!("trade:{trade}/record"), number));
        }
        self.submit(changes, true)
    }

    /// What lives in one partition, hence on one shard: a debit or a credit, with a record of it or a condition.
    fn alone(&mut self) -> Act {
        let number = self.random.below(USERS);
        let balance = format!("user:{number}/USD");
        let order = format!("user:{number}/order");
        let value = self.last_id + 1;
        let amount = self.random.range(1, 40) as i64;
        let changes = match self.random.below(5) {
            0 => vec![Change::Add(balance, -amount), Change::Put(order, value)],
            1 => vec![Change::Add(balance, amount), Change::Put(order, value)],
            2 => vec![Change::Exists(order, true), Change::Add(balance, -amount)],
            3 => {
                vec![Change::Exists(order.clone(), false), Change::Put(order, value), Change::Add(balance, 1)]
            }
            _ => vec![Change::Delete(order), Change::Add(balance, amount)],
        };
        self.submit(changes, false)
    }

    /// More than there may be.
    fn tight(&mut self) -> Act {
        let (from, to) = (user(self.random), user(self.random));
        let amount = self.random.range(40, 140) as i64;
        self.submit(vec![Change::Add(from, -amount), Change::Add(to, amount)], true)
    }

    fn records(&mut self) -> Act {
        let (one, other) = (record(self.random), record(self.random));
        let value = self.last_id + 1;
        let mut changes = match self.random.below(7) {
            0 => vec![Change::Put(one.clone(), value)],
            1 => vec![Change::Insert(one.clone(), value)],
            2 => vec![Change::Delete(one.clone())],
            3 => vec![Change::Exists(one.clone(), false), Change::Add(user(self.random), 3)],
            4 => vec![Change::RecordIs(one.clone(), self.random.range(1, u64::from(value)) as u32)],
            // Write skew: each looks at one account and takes from another.
            5 => vec![Change::AtLeast(user(self.random), 50), Change::Put(one.clone(), value)],
            _ => vec![Change::AtMost(user(self.random), 120), Change::Put(one.clone(), value)],
        };
        if other != one && self.random.chance(6000) {
            changes.push(Change::Put(other, value));
        }
        self.submit(changes, false)
    }

    /// Balances with floors and ceilings of their own.
    fn bounded(&mut self) -> Act {
        let amount = self.random.range(1, 30) as i64;
        let sign = if self.random.chance(5000) { 1 } else { -1 };
        let change = if self.random.chance(5000) {
            let row = "credit:1/USD".to_owned();
            Change::AddWithin { row, delta: sign * amount, floor: Some(-50), ceiling: None }
        } else {
            let row = "vault:1/USD".to_owned();
            Change::AddWithin { row, delta: sign * amount, floor: Some(0), ceiling: Some(60) }
        };
        let mut changes = vec![change];
        if self.random.chance(6000) {
            let other = user(self.random);
            let delta = -sign * amount;
            changes.push(Change::AddWithin { row: other, delta, floor: Some(0), ceiling: None });
        }
        self.submit(changes, false)
    }

    /// A batch that was submitted before, as it was or with other contents.
    fn again(&mut self) -> Act {
        if self.made.is_empty() {
            return self.trade();
        }
        let recent = self.made.len().saturating_sub(30);
        let mut contents = self.random.pick(&self.made[recent..]).clone();
        if self.random.chance(4000) {
            if self.random.chance(6000) {
                // Perhaps on another shard alone.
                contents.changes.clear();
            }
            let row = if self.random.chance(5000) { HOT.to_owned() } else { user(self.random) };
            contents.changes.push(Change::Add(row, 7));
            contents.zero_sum = false;
        }
        Act::Submit(contents)
    }

    /// An id of long ago.
    fn old(&mut self) -> Act {
        let ago = *self.random.pick(&[5_000, 60_000, 25 * 3_600_000]);
        let changes = vec![Change::Add(user(self.random), 1)];
        let Act::Submit(mut contents) = self.submit(changes, false) else {
            unreachable!("a batch is submitted")
        };
        contents.made_ms -= ago;
        if let Some(last) = self.made.last_mut() {
            last.made_ms = contents.made_ms;
        }
        Act::Submit(contents)
    }

    fn query(&mut self) -> Act {
        let seal = self.random.chance(4000);
        let wait = self.random.chance(3000);
        let recent = self.made.len().saturating_sub(10);
        match self.made.get(recent..).filter(|made| !made.is_empty()) {
            Some(made) => {
                let contents = self.random.pick(made);
                Act::Query { id: contents.id, made_ms: contents.made_ms, wait, seal }
            }
            None => Act::Query { id: 900_000, made_ms: self.now_ms, wait: false, seal },
        }
    }

    fn read(&mut self) -> Act {
        let rows = if self.random.chance(6000) {
            balances()
        } else {
            let mut rows = vec![user(self.random), record(self.random), user(self.random)];
            rows.sort();
            rows.dedup();
            rows
        };
        Act::Read { rows }
    }
}
