//! The cases by their names.

use std::{fmt, sync::Arc};

use super::{
    load::Senders,
    trade::{Form, Mix, Population},
    zipf::Zipf,
};

/// Cases that are run if none is named.
pub const USUAL: &str =
    "unary-1,unary-16,unary-64,unary-256,stream-1,stream-4,hot-256,hot-stream,one-shard,independent,skewed";
/// Streams where the name doesn't say how many.
const STREAMS: usize = 4;
/// The bounds of the numbers in names.
pub const CLIENTS_MAX: u64 = 4096;
const STREAMS_MAX: u64 = 64;
const RATE_MAX: u64 = 10_000_000;
const WINDOW_MAX: u64 = 1_000_000;
/// Fewer than the users that there are at least.
const LEGS_MAX: u64 = 64;
/// Accounts and shards of a cluster.
pub const ACCOUNTS: std::ops::RangeInclusive<u64> = 200..=20_000_000;
/// A trade needs two.
pub const SHARDS: std::ops::RangeInclusive<u64> = 2..=64;

/// One case.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Case {
    /// Its name.
    pub name: String,
    /// What is done.
    pub kind: Kind,
    /// Accounts of its cluster, if not as many as all others have.
    pub accounts: Option<u64>,
    /// Shards of its cluster, if not as many as all others have.
    pub shards: Option<u32>,
    /// Trades in flight, if not as many as all others have.
    pub window: Option<usize>,
}

/// What a case does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Unary clients, each with one call at a time.
    Unary {
        /// How many.
        clients: usize,
        /// Who trades.
        users: Users,
    },
    /// Streams with a window.
    Streams {
        /// How many.
        count: usize,
        /// Who trades.
        users: Users,
        /// In one batch or in several.
        form: Form,
    },
    /// Streams with a given rate.
    Open {
        /// Trades per second.
        per_second: u64,
    },
    /// Three times the peak.
    Overload,
    /// A node that leads nothing is killed or stands still.
    Follower {
        /// It stands still; otherwise it is killed.
        is_paused: bool,
    },
}

/// Which users trade.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Users {
    /// Each as often as any other.
    Uniform,
    /// One is in every trade.
    Hot,
    /// Some more often.
    Skewed,
    /// Both on one shard, and the record too.
    OneShard,
    /// So many in each trade.
    Legs(u32),
}

impl Users {
    /// How that is drawn from a population.
    pub fn mix(self, population: Population) -> Mix {
        match self {
            Users::Uniform => Mix::Uniform,
            Users::Hot => Mix::Hot,
            Users::Skewed => Mix::Skewed(Arc::new(Zipf::new(population.users))),
            Users::OneShard => Mix::OneShard,
            Users::Legs(count) => Mix::Legs(count),
        }
    }
}

/// A name that no case has, and why.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum CaseError {
    /// There is none like it.
    #[error("there is no case {0:?}: `verdict bench --list` tells them")]
    Unknown(String),
    /// Its number is missing or out of bounds.
    #[error("case {name:?}: {problem}")]
    Number {
        /// As it was given.
        name: String,
        /// What is wrong.
        problem: String,
    },
}

/// What there is: the names, and what they mean.
pub const LIST: &[(&str, &str)] = &[
    ("unary-N", "N clients, each with one unary call at a time (closed loop)"),
    ("stream-N", "N streams with --window trades in flight on all of them together (closed loop)"),
    ("hot-N", "like unary-N, and one user is a party of every trade, by turns as buyer and seller"),
    ("hot-stream", "like stream-4, and one user is a party of every trade"),
    ("skewed", "like stream-4, with users drawn by Zipf's law (0.99)"),
    ("one-shard", "like stream-4, with buyer, seller and record on one shard"),
    ("window-N", "one stream with N trades in flight, whatever --window says"),
    ("legs-N", "like stream-4, N balances in each batch change by turns down and up, on any shards; 2 to 64"),
    ("independent", "like stream-4, each trade sent as one batch for each shard: what atomicity costs"),
    (
        "open-RATE",
        "RATE trades a second on 4 streams (open loop), latency from the intended time; 20k is 20000",
    ),
    ("accounts-N", "like stream-4, on a cluster of its own with N accounts, two to a user; 10k, 10m"),
    ("shards-N", "like stream-4, on a cluster of its own with N shards"),
    ("overload", "three times the peak for --overload-seconds, and how soon it is over (open loop)"),
    ("follower-dead", "like stream-4, with a node killed that leads nothing, against the whole cluster"),
    ("follower-paused", "the same with a node that stands still"),
];

impl Case {
    /// The case with this name.
    pub fn parse(name: &str) -> Result<Case, CaseError> {
        let streams = |users, form| Kind::Streams { count: STREAMS, users, form };
        let uniform = streams(Users::Uniform, Form::Atomic);
        let case = |kind| Case { name: name.to_owned(), kind, accounts: None, shards: None, window: None };
        let whole = match name {
            "hot-stream" => Some(streams(Users::Hot, Form::Atomic)),
            "skewed" => Some(streams(Users::Skewed, Form::Atomic)),
            "one-shard" => Some(streams(Users::OneShard, Form::Atomic)),
            "independent" => Some(streams(Users::Uniform, Form::Independent)),
            "overload" => Some(Kind::Overload),
            "follower-dead" => Some(Kind::Follower { is_paused: false }),
            "follower-paused" => Some(Kind::Follower { is_paused: true }),
            _ => None,
        };
        if let Some(kind) = whole {
            return Ok(case(kind));
        }
        let unknown = || CaseError::Unknown(name.to_owned());
        let (family, number) = name.rsplit_once('-').ok_or_else(unknown)?;
        let number = |bounds: std::ops::RangeInclusive<u64>| {
            let problem = |problem| CaseError::Number { name: name.to_owned(), problem };
            let parsed = count(number).ok_or_else(|| problem(format!("{number:?} is no number")))?;
            let is_inside = bounds.contains(&parsed);
            let outside = format!("it must be {} to {}", bounds.start(), bounds.end());
            if is_inside { Ok(parsed) } else { Err(problem(outside)) }
        };
        Ok(match family {
            "unary" | "hot" => {
                let users = if family == "hot" { Users::Hot } else { Users::Uniform };
                case(Kind::Unary { clients: number(1..=CLIENTS_MAX)? as usize, users })
            }
            "stream" => case(Kind::Streams {
                count: number(1..=STREAMS_MAX)? as usize,
                users: Users::Uniform,
                form: Form::Atomic,
            }),
            "open" => case(Kind::Open { per_second: number(1..=RATE_MAX)? }),
            "window" => Case {
                window: Some(number(1..=WINDOW_MAX)? as usize),
                ..case(Kind::Streams { count: 1, users: Users::Uniform, form: Form::Atomic })
            },
            "legs" => {
                let count = number(2..=LEGS_MAX)? as u32;
                if !count.is_multiple_of(2) {
                    let problem = "it must be even: half of them pay, and half are paid".to_owned();
                    return Err(CaseError::Number { name: name.to_owned(), problem });
                }
                case(streams(Users::Legs(count), Form::Atomic))
            }
            "accounts" => Case { accounts: Some(number(ACCOUNTS)?), ..case(uniform) },
            "shards" => Case { shards: Some(number(SHARDS)? as u32), ..case(uniform) },
            _ => return Err(unknown()),
        })
    }

    /// Who sends in a case that is one load. `window` is what the case has if it doesn't say otherwise.
    pub fn senders(&self, window: usize) -> Senders {
        let window = self.window.unwrap_or(window);
        match self.kind {
            Kind::Unary { clients, .. } => Senders::Unary(clients),
            Kind::Streams { count, .. } => Senders::Streams { count, window },
            Kind::Open { per_second } => {
                Senders::Open { count: STREAMS, per_second: per_second as f64, patience: None }
            }
            Kind::Overload | Kind::Follower { .. } => Senders::Streams { count: STREAMS, window },
        }
    }

    /// Which users trade.
    pub fn users(&self) -> Users {
        match self.kind {
            Kind::Unary { users, .. } | Kind::Streams { users, .. } => users,
            Kind::Open { .. } | Kind::Overload | Kind::Follower { .. } => Users::Uniform,
        }
    }

    /// Whether each batch has rows of one shard only. (A fee is mostly on another one.)
    pub fn is_on_one_shard(&self, has_fee: bool) -> bool {
        self.form() == Form::Independent || (self.users() == Users::OneShard && !has_fee)
    }

    /// In one batch or in several.
    pub fn form(&self) -> Form {
        match self.kind {
            Kind::Streams { form, .. } => form,
            Kind::Unary { .. } | Kind::Open { .. } | Kind::Overload | Kind::Follower { .. } => Form::Atomic,
        }
    }
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)
    }
}

/// A number, which may end in `k` or `m` for thousands and millions.
pub fn count(text: &str) -> Option<u64> {
    let (digits, unit) = match text.as_bytes().last()? {
        b'k' | b'K' => (&text[..text.len() - 1], 1000),
        b'm' | b'M' => (&text[..text.len() - 1], 1_000_000),
        _ => (text, 1),
    };
    let is_plain = !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit());
    is_plain.then(|| digits.parse::<u64>().ok()?.checked_mul(unit)).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_usual_cases_and_those_of_the_list_exist() {
        for name in USUAL.split(',') {
            assert_eq!(Case::parse(name).unwrap().to_string(), name);
        }
        for (name, _) in LIST {
            let name = name.replace("-N", "-300").replace("-RATE", "-20k").replace("shards-300", "shards-16");
            let name = name.replace("stream-300", "stream-3").replace("legs-300", "legs-8");
            Case::parse(&name).unwrap_or_else(|error| panic!("{error}"));
        }
    }

    #[test]
    fn numbers_may_have_units() {
        assert_eq!([count("7"), count("20k"), count("10m")], [Some(7), Some(20_000), Some(10_000_000)]);
        for wrong in ["", "k", "-1", "1.5k", "1g", "99999999999999999999", "99999999999999999m", "１"] {
            assert_eq!(count(wrong), None, "{wrong}");
        }
        assert_eq!(Case::parse("accounts-10m").unwrap().accounts, Some(10_000_000));
        assert_eq!(Case::parse("shards-16").unwrap().shards, Some(16));
        let senders = Case::parse("window-16").unwrap().senders(512);
        assert_eq!(senders, Senders::Streams { count: 1, window: 16 });
        assert_eq!(Case::parse("legs-32").unwrap().users(), Users::Legs(32));
        assert_eq!(Case::parse("open-20k").unwrap().kind, Kind::Open { per_second: 20_000 });
    }

    #[test]
    fn batches_on_one_shard_are_known() {
        let is_on_one_shard = |name: &str, has_fee| Case::parse(name).unwrap().is_on_one_shard(has_fee);
        assert!(is_on_one_shard("one-shard", false) && !is_on_one_shard("one-shard", true));
        assert!(is_on_one_shard("independent", true) && !is_on_one_shard("unary-1", false));
    }

    #[test]
    fn what_is_no_case_is_told() {
        for name in ["", "nonsense", "non-sense", "unary", "hot", "stream-four", "overload-3"] {
            assert!(Case::parse(name).is_err(), "{name}");
        }
        assert_eq!(Case::parse("unary-0").unwrap_err().to_string(), "case \"unary-0\": it must be 1 to 4096");
        assert_eq!(Case::parse("unary-x").unwrap_err().to_string(), "case \"unary-x\": \"x\" is no number");
        assert!(Case::parse("shards-1").is_err(), "a trade needs two shards");
        assert!(Case::parse("legs-3").is_err() && Case::parse("legs-66").is_err());
    }
}
