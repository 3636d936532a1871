//! Named places in the code at which a debug build can be killed, stopped, delayed or failed, to prove that every promise survives it.
//!
//! [`FAILPOINTS`] lists them all: the only list, which the documentation, the harness and the tests take. In the code they stand as
//! [`failpoint!`], with the Raft group that the moment is about. **Release builds have none**: there the macro expands to nothing, this
//! crate has no code behind it, and [`start`] refuses to be asked for them.
//!
//! What happens at which of them is said by the environment of a process, in `VERDICT_FAILPOINTS`:
//!
//! ```text
//! vote-before-send=kill                   kill -9 of this process when it is first about to send a vote
//! vote-before-send/2=kill@17              the 17th time, of shard 2 alone
//! log-before-sync=error; vote-sent=stop   several; "stop" is SIGSTOP of the whole process, to look at it
//! decision-recorded=sleep:500@1+          half a second, each time from the first on
//! @/some/file                             whatever that file says, now and whenever it changes
//! ```
//!
//! A kill is SIGKILL to oneself: no destructor runs, nothing is flushed.
//!
//! Invariants:
//! - Nothing is done at a failpoint that nobody armed: one relaxed load.
//! - What is done at one is said on stderr before, so whoever looks for it knows that it has really been reached.

#[cfg(debug_assertions)]
mod armed;

/// Whether this build has failpoints.
pub const ENABLED: bool = cfg!(debug_assertions);

/// The variable that says what happens where.
pub const VARIABLE: &str = "VERDICT_FAILPOINTS";

/// The part that a process plays in a group when it comes to a failpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Role {
    /// Leads the coordinators.
    CoordinatorLeader,
    /// Follows the coordinators' leader.
    CoordinatorFollower,
    /// Leads a shard.
    ShardLeader,
    /// Follows a shard's leader.
    ShardFollower,
}

impl Role {
    /// As it is shown.
    pub fn name(self) -> &'static str {
        match self {
            Role::CoordinatorLeader => "coordinator leader",
            Role::CoordinatorFollower => "coordinator follower",
            Role::ShardLeader => "shard leader",
            Role::ShardFollower => "shard follower",
        }
    }

    /// Whether it leads.
    pub fn leads(self) -> bool {
        matches!(self, Role::CoordinatorLeader | Role::ShardLeader)
    }

    /// Whether the group is that of the coordinators.
    pub fn coordinates(self) -> bool {
        matches!(self, Role::CoordinatorLeader | Role::CoordinatorFollower)
    }
}

/// What brings a process to a failpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// Batches.
    Load,
    /// The leadership of the group moves to the process.
    Election,
    /// It is asked for a snapshot.
    Snapshot,
    /// The log before a snapshot is dropped.
    Purge,
    /// A replica comes back that needs a snapshot: the process.
    NeedsSnapshot,
    /// A replica comes back that needs a snapshot: another one.
    GivesSnapshot,
    /// It comes back with entries that were never committed.
    Truncation,
}

/// A failpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Failpoint {
    /// Its name.
    pub name: &'static str,
    /// Who comes to it. Raft's own are named with all roles that a kill there is tried in.
    pub roles: &'static [Role],
    /// What brings them there.
    pub cause: Cause,
    /// Whether it can also fail with an error.
    pub fails: bool,
    /// The moment.
    pub meaning: &'static str,
}

/// The name of a failpoint, as [`failpoint!`] takes it.
#[doc(hidden)]
pub type Point = &'static Failpoint;

macro_rules! failpoints {
    ($($point:ident $name:literal $cause:ident $roles:ident $fails:literal $meaning:literal)*) => {
        $(#[doc = $meaning] pub static $point: Failpoint =
            Failpoint { name: $name, roles: $roles, cause: Cause::$cause, fails: $fails, meaning: $meaning };)*

        /// All of them, in the order in which a batch meets them; then those of the log, of snapshots, of their installation.
        pub static FAILPOINTS: &[Point] = &[$(&$point),*];
    };
}

const COORDINATOR: &[Role] = &[Role::CoordinatorLeader];
const SHARD: &[Role] = &[Role::ShardLeader];
const LEADERS: &[Role] = &[Role::CoordinatorLeader, Role::ShardLeader];
const FOLLOWERS: &[Role] = &[Role::CoordinatorFollower, Role::ShardFollower];
const ONE_OF_EACH: &[Role] = &[Role::CoordinatorLeader, Role::ShardFollower];
const ALL: &[Role] =
    &[Role::CoordinatorLeader, Role::CoordinatorFollower, Role::ShardLeader, Role::ShardFollower];

failpoints! {
    BATCH_RECEIVED "batch-received" Load COORDINATOR false
        "a batch has come to the leader, which has done nothing with it"
    PREPARE_BEFORE_SEND "prepare-before-send" Load COORDINATOR false
        "prepares for one shard are about to be sent; others may have theirs"
    PREPARE_SENT "prepare-sent" Load COORDINATOR false
        "prepares for one shard are in the stream to it"
    PREPARE_RECEIVED "prepare-received" Load SHARD false
        "prepares have come to the shard, nothing is in its log"
    VOTE_BEFORE_SEND "vote-before-send" Load SHARD false
        "prepares are applied, nobody has heard the votes"
    VOTE_SENT "vote-sent" Load SHARD false
        "votes are in the stream to the coordinator"
    VOTE_RECEIVED "vote-received" Load COORDINATOR false
        "votes have come, nothing was made of them"
    DECISION_BEFORE_PROPOSE "decision-before-propose" Load COORDINATOR false
        "decisions are made, nothing is in the log"
    DECISION_PROPOSED "decision-proposed" Load COORDINATOR false
        "decisions are on their way into the log"
    DECISION_RECORDED "decision-recorded" Load COORDINATOR false
        "decided but not told: the log has them, nobody else knows"
    OUTCOME_SENT "outcome-sent" Load COORDINATOR false
        "outcomes for one shard are in the stream to it; others and the callers have heard nothing"
    CALLER_ANSWERED "caller-answered" Load COORDINATOR false
        "a caller is answered"
    OUTCOME_RECEIVED "outcome-received" Load SHARD false
        "outcomes have come to the shard, nothing is in its log"
    DONE_BEFORE_SEND "done-before-send" Load SHARD false
        "outcomes are applied, the coordinator has not heard it"
    DONE_RECEIVED "done-received" Load COORDINATOR false
        "a shard has confirmed outcomes, nothing was made of it"
    FINISHED_PROPOSED "finished-proposed" Load COORDINATOR false
        "that batches are finished is on its way into the log"
    EPOCH_OPENED "epoch-opened" Election COORDINATOR false
        "a new leader's epoch is in the log, no shard was greeted"
    GREETING_RECEIVED "greeting-received" Election COORDINATOR false
        "a shard has listed what it holds, recovery has just begun"
    APPEND_RECEIVED "append-received" Load FOLLOWERS false
        "entries or a heartbeat have come to a follower"
    APPLIED "applied" Load ALL false
        "entries are applied in memory alone, and nobody was told"
    STATE_BEFORE_FLUSH "state-before-flush" Snapshot ALL false
        "changes of many entries have gathered, and are about to be written"
    STATE_FLUSHED "state-flushed" Snapshot ALL false
        "they are written"
    LOG_BEFORE_WRITE "log-before-write" Load ALL true
        "the log writer holds a batch of entries"
    LOG_BEFORE_SYNC "log-before-sync" Load ALL true
        "they are written, not synced"
    LOG_SYNCED "log-synced" Load ALL false
        "they are synced, the file `acknowledged` doesn't say so"
    LOG_ACKNOWLEDGED "log-acknowledged" Load ALL false
        "the file `acknowledged` says so, nobody else was told"
    VOTE_SAVED "vote-saved" Election FOLLOWERS false
        "a vote for a leader is synced, nobody was told"
    TRUNCATE_MARKED "truncate-marked" Truncation FOLLOWERS false
        "the file `acknowledged` has the mark of a log that is about to be cut"
    TRUNCATE_SYNCED "truncate-synced" Truncation FOLLOWERS false
        "the log is cut, nobody was told"
    PURGE_SYNCED "purge-synced" Purge ONE_OF_EACH false
        "the beginning of the log is dropped, nobody was told"
    SNAPSHOT_TAKEN "snapshot-taken" Snapshot ONE_OF_EACH true
        "the state that makes a snapshot is written, and not in tables yet"
    SNAPSHOT_DURABLE "snapshot-durable" Snapshot ONE_OF_EACH true
        "it is in tables, and nobody knows"
    SNAPSHOT_WRITING "snapshot-writing" GivesSnapshot LEADERS false
        "the state is in a file, for a replica that needs it"
    SNAPSHOT_SENDING "snapshot-sending" GivesSnapshot LEADERS false
        "a part of a snapshot is sent"
    SNAPSHOT_RECEIVING "snapshot-receiving" NeedsSnapshot FOLLOWERS false
        "a part of a snapshot is received"
    INSTALL_LOADING "install-loading" NeedsSnapshot FOLLOWERS true
        "a part of a received snapshot is in the database, beside the state that counts"
    INSTALL_BEFORE_SWITCH "install-before-switch" NeedsSnapshot FOLLOWERS true
        "all of it is there, and the old state still counts"
    INSTALL_SWITCHED "install-switched" NeedsSnapshot FOLLOWERS true
        "the new state counts, the old one is still there"
}

/// Marks a place. `failpoint!(NAME, group)`; `failpoint!(NAME, any groups)` where it is about several groups at once;
/// `failpoint!(NAME, group, fails)?` where it may also give an [`std::io::Error`].
#[cfg(debug_assertions)]
#[macro_export]
macro_rules! failpoint {
    ($point:ident, any $groups:expr) => {
        // Only those that can fail give an error.
        let _ = $crate::hit(&$crate::$point, $groups);
    };
    ($point:ident, any $groups:expr, fails) => {
        $crate::hit(&$crate::$point, $groups)
    };
    ($point:ident, $group:expr) => {
        $crate::failpoint!($point, any[$group])
    };
    ($point:ident, $group:expr, fails) => {
        $crate::hit(&$crate::$point, [$group])
    };
}

/// Marks a place; in this build it is nothing.
#[cfg(not(debug_assertions))]
#[macro_export]
macro_rules! failpoint {
    ($point:ident, any $groups:expr) => {
        // What is there for failpoints alone counts as used.
        if false {
            let _ = $groups;
        }
    };
    ($point:ident, any $groups:expr, fails) => {{
        if false {
            let _ = $groups;
        }
        ::std::io::Result::Ok(())
    }};
    ($point:ident, $group:expr) => {
        $crate::failpoint!($point, any[$group])
    };
    ($point:ident, $group:expr, fails) => {
        $crate::failpoint!($point, any[$group], fails)
    };
}

#[cfg(debug_assertions)]
#[doc(hidden)]
pub use armed::hit;

/// Reads what the environment asks for. An error says what is wrong with it.
#[cfg(debug_assertions)]
pub fn start() -> Result<(), String> {
    armed::start(std::env::var(VARIABLE).ok())
}

/// Refuses if the environment asks for failpoints: this build has none.
#[cfg(not(debug_assertions))]
pub fn start() -> Result<(), String> {
    match std::env::var_os(VARIABLE) {
        None => Ok(()),
        Some(_) => Err(format!("{VARIABLE} is set, but this is a release build: it has no failpoints")),
    }
}

/// The list as a table in Markdown.
pub fn table() -> String {
    let mut table = "| failpoint | killed there | the moment |\n|---|---|---|\n".to_owned();
    for point in FAILPOINTS {
        let roles: Vec<_> = point.roles.iter().map(|role| role.name()).collect();
        table += &format!("| `{}` | {} | {} |\n", point.name, roles.join(", "), point.meaning);
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_and_the_documentation_lists_them_all() {
        let mut names: Vec<_> = FAILPOINTS.iter().map(|point| point.name).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), FAILPOINTS.len());
        let page = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/proof.md");
        let page = std::fs::read_to_string(page).unwrap();
        assert!(page.contains(&table()), "docs/proof.md must hold this table:\n{}", table());
    }
}
