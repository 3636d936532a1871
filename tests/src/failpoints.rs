//! Kills real processes at named places, in the roles that come there, under load, and measures how soon the others go on.
//!
//! A [`Harness`] is one cluster of three nodes with a [`Bank`] under load. [`Harness::kill`] brings a node into a role, arms one
//! failpoint of it, does what leads there, waits until the process has really killed itself, sees the cluster recover, and makes it
//! whole again. At the end [`Harness::end`] judges everything that clients were told.
//!
//! What is measured for each kill, from the moment that the process itself wrote down:
//!
//! - *without commits*: the longest time without an answered commit that touches the group, until things go on;
//! - *resolved*: until no part is in doubt any more whose batch had been made before the kill;
//! - *after a quorum*: the same, from when every group was first seen led by a quorum again. Mostly two of three nodes live on, but one of
//!   them may lack so much of the log that it can't vote for anybody before it has a snapshot.

use std::{
    fmt,
    sync::Arc,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use uuid::Uuid;
use verdict_failpoints::{Cause, Failpoint, Role};
use verdict_proto::v1;

use crate::{
    bank::{Bank, BankLoad, Findings, Pace, Shape},
    cluster::{Cluster, Settings, leader_in, replicas_of},
    random::Random,
};

/// How long a process may take to come to an armed failpoint, after all was done that leads there.
const FIRES_WITHIN: Duration = Duration::from_secs(8);
/// So long it takes at most until a process knows that it is armed no more, and until one that has just come to a failpoint is dead.
const DISARMED_WITHIN: Duration = Duration::from_millis(50);
/// How often something that hangs on a race is tried (for instance: that entries are lost).
const TRIES: u32 = 3;
/// A recovery that takes longer is a failure, whatever the goals are.
const RECOVERS_WITHIN: Duration = Duration::from_secs(20);
/// Answers that come so soon after a kill were on their way.
const ON_THE_WAY: Duration = Duration::from_millis(40);
/// So many commits show that things go on.
const GOES_ON: usize = 10;
/// After the end of the load nothing may be left over for longer.
const QUIET_WITHIN: Duration = Duration::from_secs(20);
/// The log behind a snapshot, in entries; small, so that a replica that was away needs the snapshot.
const KEEP_ENTRIES: u64 = 20;
/// How long it takes, mostly, until a log is dropped behind a snapshot.
const DROPS_LOG_WITHIN: Duration = Duration::from_millis(1200);
/// How often is looked whether something has happened.
const LOOK: Duration = Duration::from_millis(2);
/// How often the parts in doubt are asked for.
const ASK: Duration = Duration::from_millis(15);

/// One kill.
#[derive(Clone, Copy, Debug)]
pub struct Kill {
    /// The longest time in which clients were answered no commit that touches the group.
    pub without_commits: Duration,
    /// Until nothing older than the kill was in doubt.
    pub resolved: Duration,
    /// How much of it passed after every group was led by a quorum again.
    pub after_quorum: Duration,
}

/// Why a kill doesn't count: nobody came to the failpoint, or the others didn't go on.
#[derive(Clone, Debug)]
pub struct Failure(pub String);

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A cluster under load whose processes are killed.
#[derive(Debug)]
pub struct Harness {
    cluster: Cluster,
    bank: Arc<Bank>,
    load: BankLoad,
    random: Random,
    turn: u32,
}

impl Harness {
    /// Three nodes, two shards, all groups on all nodes.
    pub async fn start(mut random: Random) -> Harness {
        let settings = Settings {
            shards: 2,
            lines: format!("keep_entries = {KEEP_ENTRIES}\nsnapshot_after_entries = 100000"),
            failpoints: true,
            ..Settings::default()
        };
        let cluster = Cluster::start_with(settings).await;
        let bank = Bank::open(&cluster, "kill", Shape { ballast: 64, ..Shape::default() }).await;
        let load = bank.load(&cluster, Pace::default(), &mut random);
        bank.commit_more(50).await;
        Harness { cluster, bank, load, random, turn: 0 }
    }

    /// Kills a process at a failpoint, in a role, and waits until the cluster is whole again.
    pub async fn kill(&mut self, point: &Failpoint, role: Role) -> Result<Kill, Failure> {
        self.turn += 1;
        let group = if role.coordinates() { 0 } else { 1 + self.turn % self.cluster.shards() };
        let mut failure = Failure(String::new());
        for attempt in 1..=TRIES {
            let victim = self.cast(group, role).await;
            self.bank.commit_more(GOES_ON).await;
            match self.bring_about(point, group, victim, attempt).await {
                Ok(at) => {
                    let kill = self.recovers(group, victim, at).await;
                    self.mend().await;
                    return kill;
                }
                Err(why) => failure = why,
            }
            self.mend().await;
        }
        Err(failure)
    }

    /// Ends the load, and judges everything.
    pub async fn end(self) -> Findings {
        self.load.end().await;
        self.cluster.wait_whole().await;
        let findings = self.bank.check(&self.cluster).await;
        self.cluster.wait_quiet(QUIET_WITHIN).await;
        findings
    }

    /// Brings a node into the role. One that leads the group leads nothing else; one that follows leads nothing at all.
    async fn cast(&self, group: u32, role: Role) -> u64 {
        let leader = self.cluster.leader(group).await;
        let victim = if role.leads() { leader } else { 1 + (leader + u64::from(self.turn) % 2) % 3 };
        for other in (0..=self.cluster.shards()).filter(|other| *other != group) {
            if self.cluster.leader(other).await == victim {
                let heir =
                    self.cluster.nodes().find(|node| *node != victim && (role.leads() || *node != leader));
                self.cluster.move_leader(other, heir.unwrap_or(leader)).await;
            }
        }
        victim
    }

    /// Arms the failpoint and does what leads there. Gives the time at which the process has killed itself.
    async fn bring_about(
        &mut self,
        point: &Failpoint,
        group: u32,
        victim: u64,
        attempt: u32,
    ) -> Result<SystemTime, Failure> {
        let order = |hit: u64| format!("{}/{group}=kill@{hit}", point.name);
        match point.cause {
            Cause::Load => {
                let hit = 1 + self.random.below(20);
                self.cluster.arm(victim, &order(hit));
            }
            Cause::Election => return self.elects(point, group, victim).await,
            Cause::Snapshot | Cause::Purge => {
                self.cluster.arm(victim, &order(1));
                // Those that are armed to be killed give no answer.
                let mut admin = self.cluster.admin(victim);
                let wish = v1::TriggerSnapshotRequest { group_id: group };
                tokio::spawn(async move { admin.trigger_snapshot(wish).await });
            }
            Cause::NeedsSnapshot => {
                self.falls_behind(group, victim, attempt).await;
                self.cluster.arm(victim, &order(1));
                self.cluster.restart(victim);
            }
            Cause::GivesSnapshot => {
                let behind = self.cluster.nodes().find(|node| *node != victim).expect("there are three");
                self.falls_behind(group, behind, attempt).await;
                self.cluster.arm(victim, &order(1));
                self.cluster.restart(behind);
            }
            Cause::Truncation => {
                // The last entries of the group reach nobody but its leader, which is killed then.
                let leader = self.cluster.leader(group).await;
                self.is_left_alone(group, leader).await?;
                self.cluster.arm(leader, &order(1));
                self.cluster.restart(leader);
                return self.fires(point, leader).await;
            }
        }
        self.fires(point, victim).await
    }

    /// The leadership moves: to the victim if the failpoint is a leader's, else to anybody while the victim has a vote.
    async fn elects(&mut self, point: &Failpoint, group: u32, victim: u64) -> Result<SystemTime, Failure> {
        let leads = point.roles.iter().all(|role| role.leads());
        let (victim, heir) = if leads {
            let next = 1 + victim % 3;
            (next, next)
        } else {
            let leader = self.cluster.leader(group).await;
            let third = self.cluster.nodes().find(|node| ![leader, victim].contains(node));
            (victim, if self.turn % 4 < 2 { victim } else { third.expect("there are three") })
        };
        self.cluster.arm(victim, &format!("{}/{group}=kill", point.name));
        let began = Instant::now();
        while began.elapsed() < FIRES_WITHIN && self.cluster.has_ended(victim).is_none() {
            let wish = v1::TransferLeaderRequest { group_id: group, to_node: heir };
            let mut admin = self.cluster.admin(1 + heir % 3);
            // Refused, it is tried again.
            let _ = tokio::time::timeout(Duration::from_millis(300), admin.transfer_leader(wish)).await;
        }
        self.fires(point, victim).await
    }

    /// Kills a node, and lets the others drop the log that it would need.
    async fn falls_behind(&mut self, group: u32, node: u64, attempt: u32) {
        let last = |status: &v1::StatusResponse| {
            replicas_of(status, group).iter().map(|(_, replica)| replica.last_index).max().unwrap_or_default()
        };
        let before = self.cluster.status().await.map_or(0, |status| last(&status));
        self.cluster.kill9(node);
        let enough = || async {
            let status = self.cluster.status().await?;
            leader_in(&status, group).ok_or("no leader")?;
            let ahead = last(&status).saturating_sub(before);
            if ahead > 4 * KEEP_ENTRIES { Ok(()) } else { Err(format!("{ahead} entries ahead")) }
        };
        crate::wait::eventually("the others go on", RECOVERS_WITHIN, enough).await;
        for other in self.cluster.nodes().filter(|other| *other != node) {
            let wish = v1::TriggerSnapshotRequest { group_id: group };
            self.cluster.admin(other).trigger_snapshot(wish).await.expect("a snapshot is made");
        }
        // A leader drops its log when it next fails to send it to the one that is away: soon; nothing tells when.
        tokio::time::sleep(attempt * DROPS_LOG_WITHIN).await;
    }

    /// The others die when they get the next entries of the group; then the leader dies; then the others come back without it.
    async fn is_left_alone(&mut self, group: u32, leader: u64) -> Result<(), Failure> {
        let others: Vec<u64> = self.cluster.nodes().filter(|node| *node != leader).collect();
        for other in &others {
            self.cluster.arm(*other, &format!("append-received/{group}=kill"));
        }
        let began = Instant::now();
        while others.iter().any(|other| self.cluster.runs(*other)) {
            for other in &others {
                self.cluster.has_ended(*other);
            }
            if began.elapsed() > FIRES_WITHIN {
                return Err(Failure("the leader was not left alone".to_owned()));
            }
            tokio::time::sleep(LOOK).await;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
        self.cluster.kill9(leader);
        for other in others {
            self.cluster.arm(other, "");
            self.cluster.restart(other);
        }
        self.cluster.wait_whole().await;
        self.bank.commit_more(GOES_ON).await;
        Ok(())
    }

    /// Waits until the process has killed itself at the failpoint, and gives the time that it wrote down.
    async fn fires(&mut self, point: &Failpoint, victim: u64) -> Result<SystemTime, Failure> {
        let began = Instant::now();
        while self.cluster.runs(victim) && self.cluster.has_ended(victim).is_none() {
            if began.elapsed() > FIRES_WITHIN {
                return Err(Failure(format!("node {victim} never came to {}", point.name)));
            }
            tokio::time::sleep(LOOK).await;
        }
        let log = self.cluster.log(victim);
        let line = log.lines().rev().find(|line| line.starts_with(&format!("failpoint {} ", point.name)));
        let micros = line.and_then(|line| line.split(" at ").nth(1)?.split(' ').next()?.parse().ok());
        let at = micros.map(|micros| UNIX_EPOCH + Duration::from_micros(micros));
        // The last line of an earlier kill would be older than this try.
        let at = at.filter(|at| at.elapsed().is_ok_and(|age| age < began.elapsed() + FIRES_WITHIN));
        at.ok_or_else(|| Failure(format!("node {victim} ended otherwise than at {}", point.name)))
    }

    /// Sees the others go on.
    async fn recovers(&self, group: u32, victim: u64, at: SystemTime) -> Result<Kill, Failure> {
        let killed = Instant::now() - at.elapsed().unwrap_or_default();
        let resolved = async {
            let mut led = None;
            loop {
                let why = match self.in_doubt_since_before(victim, at).await {
                    Err(why) => why,
                    Ok(old) => {
                        let led = *led.get_or_insert_with(|| killed.elapsed());
                        if old == 0 {
                            return Ok((killed.elapsed(), killed.elapsed() - led));
                        }
                        format!("{old} parts in doubt since before the kill")
                    }
                };
                if killed.elapsed() > RECOVERS_WITHIN {
                    return Err(Failure(why));
                }
                tokio::time::sleep(ASK).await;
            }
        };
        let goes_on = async {
            while self.bank.commits_since(group, killed + ON_THE_WAY) < GOES_ON {
                if killed.elapsed() > RECOVERS_WITHIN {
                    return Err(Failure(format!("no commits for {RECOVERS_WITHIN:?}")));
                }
                tokio::time::sleep(LOOK).await;
            }
            Ok(())
        };
        let (resolved, goes_on) = tokio::join!(resolved, goes_on);
        goes_on?;
        let without_commits = self.bank.longest_gap(group, killed, Instant::now());
        let (resolved, after_quorum) = resolved?;
        Ok(Kill { without_commits, resolved, after_quorum })
    }

    /// How many parts are in doubt whose batches were made before. Fails while a group's leader, confirmed by a quorum, can't be asked.
    async fn in_doubt_since_before(&self, victim: u64, at: SystemTime) -> Result<usize, String> {
        let node = self.cluster.nodes().find(|node| *node != victim && self.cluster.runs(*node));
        let mut admin = self.cluster.admin(node.ok_or("nobody runs")?);
        let asked = admin.list_in_doubt(v1::ListInDoubtRequest { limit: 10_000 });
        let listed =
            tokio::time::timeout(Duration::from_secs(1), asked).await.map_err(|late| late.to_string())?;
        let listed = listed.map_err(|status| status.to_string())?.into_inner();
        if !listed.unreachable_shards.is_empty() {
            return Err(format!("shards without leaders: {:?}", listed.unreachable_shards));
        }
        let at = at.duration_since(UNIX_EPOCH).unwrap_or_default();
        Ok(listed.parts.iter().filter(|part| !part.waiting && made(&part.batch_id) < at).count())
    }

    /// Disarms all, starts those that are down, and waits until the cluster is whole.
    async fn mend(&mut self) {
        for node in self.cluster.nodes() {
            self.cluster.arm(node, "");
        }
        // One that came there in this very moment may still die of it.
        tokio::time::sleep(DISARMED_WITHIN).await;
        for node in self.cluster.nodes() {
            self.cluster.has_ended(node);
            if !self.cluster.runs(node) {
                self.cluster.restart(node);
            }
        }
        self.cluster.wait_whole().await;
    }
}

/// When an id was made.
fn made(id: &str) -> Duration {
    let id = Uuid::parse_str(id).expect("an id is a UUID");
    let (seconds, nanoseconds) = id.get_timestamp().expect("of version 7").to_unix();
    Duration::new(seconds, nanoseconds)
}
