//! What is measured: the systems, and the cases of each.

use std::fmt;

use clap::ValueEnum;
use serde::Serialize;

use crate::trade::Load;

/// A system.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum System {
    /// Verdict, three processes, by `verdict bench`.
    Verdict,
    /// Two instances of PostgreSQL and two-phase commit.
    Postgres,
    /// The same with a synchronous standby for each.
    PostgresStandby,
    /// Three nodes of etcd and one transaction for each trade.
    Etcd,
}

/// All of them.
pub const SYSTEMS: [System; 4] = [System::Verdict, System::Postgres, System::PostgresStandby, System::Etcd];

/// One case of a system.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Case {
    /// Its name: for Verdict that of `verdict bench`.
    pub name: String,
    /// Whether one account is in every trade.
    pub is_hot: bool,
    /// Who sends the trades.
    pub clients: Clients,
}

/// Who sends the trades.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Clients {
    /// So many, each with one trade at a time.
    Callers(usize),
    /// So many streams, with a window of trades in flight on all of them together.
    Streams(usize),
}

impl System {
    /// Its name in tables.
    pub fn title(self) -> &'static str {
        match self {
            System::Verdict => "Verdict",
            System::Postgres => "PostgreSQL 2PC",
            System::PostgresStandby => "PostgreSQL 2PC, standbys",
            System::Etcd => "etcd",
        }
    }

    /// Its cases; few of them for a short try.
    pub fn cases(self, is_quick: bool) -> Vec<Case> {
        let (uniform, hot): (&[usize], &[usize]) = match (self, is_quick) {
            (System::Verdict, false) => return verdict_cases(&VERDICT),
            (System::Verdict, true) => return verdict_cases(&VERDICT_QUICK),
            (System::Postgres, false) => (&[1, 16, 64, 128], &[16, 64, 128]),
            (System::PostgresStandby, false) => (&[1, 16, 64, 128], &[16, 64]),
            (System::Etcd, false) => (&[1, 16, 64, 256], &[16, 64]),
            (System::Postgres | System::PostgresStandby | System::Etcd, true) => (&[64], &[16]),
        };
        let uniform = uniform.iter().map(|clients| Case::closed(Load::Uniform, *clients));
        uniform.chain(hot.iter().map(|clients| Case::closed(Load::Hot, *clients))).collect()
    }
}

impl fmt::Display for System {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.title())
    }
}

/// The cases of `verdict bench`: name, whether it is hot, clients.
type VerdictCase = (&'static str, bool, Clients);

const VERDICT: [VerdictCase; 8] = [
    ("unary-1", false, Clients::Callers(1)),
    ("unary-16", false, Clients::Callers(16)),
    ("unary-64", false, Clients::Callers(64)),
    ("unary-256", false, Clients::Callers(256)),
    ("stream-1", false, Clients::Streams(1)),
    ("stream-4", false, Clients::Streams(4)),
    ("hot-256", true, Clients::Callers(256)),
    ("hot-stream", true, Clients::Streams(4)),
];
const VERDICT_QUICK: [VerdictCase; 3] = [
    ("unary-64", false, Clients::Callers(64)),
    ("stream-1", false, Clients::Streams(1)),
    ("hot-256", true, Clients::Callers(256)),
];

fn verdict_cases(cases: &[VerdictCase]) -> Vec<Case> {
    let case = |(name, is_hot, clients): &VerdictCase| Case {
        name: (*name).to_owned(),
        is_hot: *is_hot,
        clients: *clients,
    };
    cases.iter().map(case).collect()
}

impl Case {
    fn closed(load: Load, clients: usize) -> Case {
        let (prefix, is_hot) = match load {
            Load::Uniform => ("uniform", false),
            Load::Hot => ("hot", true),
        };
        Case { name: format!("{prefix}-{clients}"), is_hot, clients: Clients::Callers(clients) }
    }

    /// The trades of the case.
    pub fn load(&self) -> Load {
        if self.is_hot { Load::Hot } else { Load::Uniform }
    }

    /// The load, for people.
    pub fn load_text(&self) -> &'static str {
        if self.is_hot { "hot account" } else { "uniform" }
    }

    /// The clients, for people: "64 clients".
    pub fn clients_text(&self) -> String {
        let (count, noun) = match self.clients {
            Clients::Callers(count) => (count, "client"),
            Clients::Streams(count) => (count, "stream"),
        };
        format!("{count} {noun}{}", if count == 1 { "" } else { "s" })
    }
}
