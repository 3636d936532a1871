//! Which faults really happened, counted where they did.

macro_rules! fired {
    ($($name:ident => $text:literal,)*) => {
        /// A kind of fault.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[allow(missing_docs)] // the text tells
        pub enum Fired { $($name,)* }

        /// All kinds, with what they are.
        pub const KINDS: &[(Fired, &str)] = &[$((Fired::$name, $text),)*];
    };
}

fired! {
    Lost => "message lost",
    Repeated => "message repeated",
    Delayed => "message delayed",
    Overtaken => "late message overtaken by later ones",
    Cut => "message lost in a two-way partition",
    CutOneWay => "message lost in a one-way partition",
    Deaf => "Raft message of one group lost",
    Severed => "message between coordinators and a shard lost",
    Kill => "process killed",
    PowerLoss => "node lost power",
    LeaderDied => "the dead node led a group",
    UnsyncedLost => "crash lost writes that were not synced",
    StateRewound => "state came back older and was replayed",
    LogBehindState => "log came back shorter than what was applied",
    GroupDown => "all nodes of a group down at once",
    AllDown => "all nodes down at once",
    Pause => "node paused",
    DeposedWoke => "paused leader woke up deposed",
    Reset => "connections of a node reset",
    HandOver => "leadership handed over",
    Snapshot => "snapshot made on demand",
    LogCut => "log cut behind a snapshot",
    Install => "snapshot installed by a laggard",
    Clock => "clock jumped",
    SlowSync => "sync slowed down",
    Storm => "batch sent again in a storm",
    Overloaded => "prepare refused, too many parts held",
    QueueFull => "message dropped, queue full",
    Refused => "batch refused, too many in flight",
}

/// How many kinds there are.
pub const COUNT: usize = KINDS.len();

/// Counts by kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tally(pub [u64; COUNT]);

impl Default for Tally {
    fn default() -> Tally {
        Tally([0; COUNT])
    }
}

impl Tally {
    /// One more.
    pub fn count(&mut self, kind: Fired) {
        self.0[kind as usize] += 1;
    }

    /// How many of a kind.
    pub fn of(&self, kind: Fired) -> u64 {
        self.0[kind as usize]
    }

    /// All together. What follows from another fault that is counted already is left out.
    pub fn total(&self) -> u64 {
        let follows = [
            Fired::Overtaken,
            Fired::LeaderDied,
            Fired::UnsyncedLost,
            Fired::StateRewound,
            Fired::LogBehindState,
            Fired::GroupDown,
            Fired::AllDown,
            Fired::DeposedWoke,
            Fired::LogCut,
        ];
        self.0.iter().sum::<u64>() - follows.iter().map(|kind| self.of(*kind)).sum::<u64>()
    }
}
