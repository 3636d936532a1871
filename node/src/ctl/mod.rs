//! `verdict ctl`: asks a cluster, and gives it batches.
//!
//! A row is written `PARTITION#ROW`, divided at the last `#`: `user:1001#USDT`. A row whose name contains a `#` itself is written
//! as JSON: `["user:1001","a#b"]`.
//!
//! Exit codes: 0 done (for a batch: committed), 1 aborted, 2 not decided, 3 error. `status` ends with 3 if replicas differ.

mod batch_json;
pub mod member;
pub mod status;

use std::{
    io::Read as _,
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use anyhow::{Context as _, anyhow, bail};
use clap::{Args, Subcommand};
use serde_json::{Value as Json, json};
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};
use verdict_client::{Client, Options, Outcome, Row, UndecidedState, Value, no_connection, row, value::Kind};
use verdict_proto::connect::{Connect as _, Tcp};
use verdict_proto::v1::{Decision, HistoryEntry, InDoubtPart, history_entry::Change, outcome};

use crate::{
    reach::{advised, telling},
    settle::reason_name,
};

pub use batch_json::parse_batch;

/// The exit code of an aborted batch.
const ABORTED: u8 = 1;
/// The exit code of a batch that is not decided.
const UNDECIDED: u8 = 2;
/// The exit code of an error.
pub const ERROR: u8 = 3;
/// The largest batch file that is read, in bytes.
const FILE_BYTES_MAX: u64 = 64 << 20;

/// `verdict ctl`.
#[derive(Args, Clone, Debug)]
pub struct CtlArgs {
    /// Nodes to talk to
    #[arg(
        long,
        global = true,
        value_name = "HOST:PORT,...",
        value_delimiter = ',',
        default_value = "127.0.0.1:7400"
    )]
    pub connect: Vec<String>,
    /// Print JSON instead of a table
    #[arg(long, global = true)]
    pub json: bool,
    /// How long to try, in seconds
    #[arg(long, global = true, value_name = "SECONDS", default_value_t = 15, value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub timeout: u64,
    /// What to do
    #[command(subcommand)]
    pub command: CtlCommand,
}

/// What `verdict ctl` can do.
#[derive(Clone, Debug, Subcommand)]
pub enum CtlCommand {
    /// Submit a batch and wait for its outcome
    #[command(after_help = batch_json::HELP)]
    Submit {
        /// A file with the batch as JSON; - reads it from stdin
        #[arg(value_name = "FILE|-")]
        file: PathBuf,
    },
    /// Tell the outcome of a batch
    Get {
        /// Its id
        id: String,
        /// If there is no trace of it, abort it for good
        #[arg(long)]
        abort_if_not_seen: bool,
        /// Wait up to so many milliseconds while it is in progress
        #[arg(long, value_name = "MS", default_value_t = 0)]
        wait: u32,
    },
    /// Read rows, all at one position
    Read {
        /// Rows, like user:1001#USDT
        #[arg(value_name = "PARTITION#ROW", required = true, value_parser = parse_row)]
        rows: Vec<Row>,
    },
    /// List the changes of a row
    History {
        /// A row, like user:1001#USDT
        #[arg(value_name = "PARTITION#ROW", value_parser = parse_row)]
        row: Row,
        /// Only changes with this stamp or a later one
        #[arg(long, default_value_t = 0)]
        from: u64,
        /// At most so many
        #[arg(long, default_value_t = 100)]
        limit: u32,
    },
    /// Show all groups on all nodes, and whether replicas are equal
    Status,
    /// List decisions in the order in which they were recorded
    Decisions {
        /// Only those recorded at this position or later
        #[arg(long, default_value_t = 0)]
        from: u64,
        /// At most so many
        #[arg(long, default_value_t = 100)]
        limit: u32,
    },
    /// List the parts that shards hold without knowing the decision
    InDoubt {
        /// At most so many for each shard
        #[arg(long, default_value_t = 1000)]
        limit: u32,
    },
    /// Make another replica the leader of a group
    TransferLeader {
        /// The group: 0 is the coordinator group, N is shard N
        group: u32,
        /// The node that shall lead it; without it, any other voter
        #[arg(long, value_name = "NODE", default_value_t = 0)]
        to: u64,
    },
    /// Show the members of the cluster, add, remove and replace nodes
    #[command(subcommand)]
    Member(member::MemberCommand),
    /// Ask a node (the first of --connect) whether it serves
    Health,
    /// Make a node (the first of --connect) bring its replica of a group to the disk, so that the log before it may go
    Snapshot {
        /// The group: 0 is the coordinator group, N is shard N
        group: u32,
    },
}

/// Runs a command. Errors are printed here, since they have their own exit code.
pub async fn run(args: CtlArgs) -> anyhow::Result<ExitCode> {
    match execute(args).await {
        Ok(code) => Ok(ExitCode::from(code)),
        Err(error) => {
            crate::err!("error: {error:#}");
            Ok(ExitCode::from(ERROR))
        }
    }
}

async fn execute(args: CtlArgs) -> anyhow::Result<u8> {
    let timeout = Duration::from_secs(args.timeout);
    let options = Options { timeout, ..Options::default() };
    let client = Client::connect(args.connect.clone(), options)?;
    let own = if let CtlCommand::Member(change) = &args.command { change.patience() } else { None };
    let patience = own.unwrap_or(timeout);
    let tell = |trouble| crate::err!("{trouble}");
    let end = telling(&client, patience, tell, command(&client, args)).await;
    end.map_err(|error| advised(&client, error))
}

async fn command(client: &Client, args: CtlArgs) -> anyhow::Result<u8> {
    let first_node = args.connect.first().cloned().unwrap_or_default();
    match args.command {
        CtlCommand::Submit { file } => {
            let batch = parse_batch(&read_input(&file)?);
            let batch = batch.map_err(|problem| anyhow!("{}: {problem}", file.display()))?;
            // Before the first try: whoever loses the answer can ask for the id.
            crate::err!("batch {}", batch.id);
            let outcome = client.submit(&batch).await?;
            show(&outcome_json(&batch.id, &outcome))?;
            Ok(outcome_code(&outcome))
        }
        CtlCommand::Get { id, abort_if_not_seen, wait } => {
            let wait = Duration::from_millis(u64::from(wait));
            let outcome = client.get_batch(&id, abort_if_not_seen, wait).await?;
            show(&outcome_json(&id, &outcome))?;
            Ok(outcome_code(&outcome))
        }
        CtlCommand::Read { rows } => read(client, rows, args.json).await,
        CtlCommand::History { row, from, limit } => history(client, row, from, limit, args.json).await,
        CtlCommand::Status => {
            let status = client.status().await?;
            if args.json {
                show(&status::json(&status))?
            } else {
                crate::out!("{}", status::table(&status).trim_end())
            }
            Ok(if status::replicas_differ(&status) { ERROR } else { 0 })
        }
        CtlCommand::Decisions { from, limit } => {
            let list = client.list_decisions(from, limit).await?;
            list.decisions.iter().try_for_each(|decision| show_line(&decision_json(decision)))?;
            tell_next(list.next);
            Ok(0)
        }
        CtlCommand::InDoubt { limit } => {
            let list = client.list_in_doubt(limit).await?;
            list.parts.iter().try_for_each(|part| show_line(&in_doubt_json(part)))?;
            if list.unreachable_shards.is_empty() {
                return Ok(0);
            }
            bail!("shards that could not be asked: {:?}", list.unreachable_shards)
        }
        CtlCommand::TransferLeader { group, to } => {
            let answer = client.transfer_leader(group, to).await?;
            show(&json!({ "group": group, "to_node": answer.to_node }))?;
            Ok(0)
        }
        CtlCommand::Member(command) => member::run(client, command, args.json).await.map(|()| 0),
        CtlCommand::Health => health(&first_node, Duration::from_secs(args.timeout)).await,
        CtlCommand::Snapshot { group } => {
            let answer = client.trigger_snapshot(&first_node, group).await?;
            show(&json!({ "group": group, "node": first_node, "index": answer.index }))?;
            Ok(0)
        }
    }
}

/// Asks the standard health service.
async fn health(address: &str, patience: Duration) -> anyhow::Result<u8> {
    let channel = Tcp.channel(address).with_context(|| format!("{address:?} is no host:port"))?;
    let question = HealthCheckRequest { service: String::new() };
    let mut client = HealthClient::new(channel);
    let answer = tokio::time::timeout(patience, client.check(question)).await;
    let answer = answer.with_context(|| format!("no answer from {address} in time"))?;
    let answer = answer.map_err(|status| match no_connection(&status) {
        Some(why) => anyhow!("no connection to {address} ({why})"),
        None => anyhow!("{address} answered: {}", status.message()),
    })?;
    let answer = answer.into_inner();
    crate::out!("{}", answer.status().as_str_name());
    Ok(if answer.status() == ServingStatus::Serving { 0 } else { ERROR })
}

async fn read(client: &Client, rows: Vec<Row>, as_json: bool) -> anyhow::Result<u8> {
    let answer = client.read(rows).await?;
    let lines = answer.values.iter().map(|value| {
        let shown = value.row.as_ref().map(row_text).unwrap_or_default();
        (shown, value_json(value.value.as_ref()), value.version)
    });
    if as_json {
        let values: Vec<Json> = lines
            .map(|(row, value, version)| json!({ "row": row, "value": value, "version": version }))
            .collect();
        show(&json!({ "position": answer.position, "values": values }))?;
        return Ok(0);
    }
    crate::out!("position {}", answer.position);
    for (row, value, version) in lines {
        crate::out!("{row}  {value}  version {version}");
    }
    Ok(0)
}

async fn history(client: &Client, row: Row, from: u64, limit: u32, as_json: bool) -> anyhow::Result<u8> {
    let answer = client.history(row, from, limit).await?;
    if as_json {
        let entries: Vec<Json> = answer.entries.iter().map(entry_json).collect();
        let (position, next, oldest) = (answer.position, answer.next, answer.oldest);
        show(&json!({ "position": position, "oldest": oldest, "next": next, "entries": entries }))?;
        return Ok(0);
    }
    crate::out!("complete up to position {}", answer.position);
    if answer.oldest > 0 {
        crate::out!("changes below stamp {} are not kept", answer.oldest);
    }
    for entry in &answer.entries {
        let change = change_json(entry.change.as_ref());
        let result = value_json(entry.result.as_ref());
        crate::out!("{:>12}  {}  {change}  ->  {result}", entry.stamp, entry.batch_id);
    }
    tell_next(answer.next);
    Ok(0)
}

fn read_input(file: &Path) -> anyhow::Result<String> {
    let input: Box<dyn std::io::Read> = if file == Path::new("-") {
        Box::new(std::io::stdin())
    } else {
        Box::new(std::fs::File::open(file).with_context(|| format!("open {}", file.display()))?)
    };
    let mut text = String::new();
    let size = input
        .take(FILE_BYTES_MAX + 1)
        .read_to_string(&mut text)
        .with_context(|| format!("read {}", file.display()))?;
    anyhow::ensure!(size as u64 <= FILE_BYTES_MAX, "{} is larger than any batch can be", file.display());
    Ok(text)
}

/// Reads a row as it is written on the command line.
pub fn parse_row(text: &str) -> Result<Row, String> {
    if text.starts_with('[') {
        let pair: Result<(String, String), _> = serde_json::from_str(text);
        return pair
            .map(|(partition, name)| row(partition, name))
            .map_err(|error| format!("{text:?} is no JSON list of a partition and a row: {error}"));
    }
    match text.rsplit_once('#') {
        Some((partition, name)) if !partition.is_empty() && !name.is_empty() => Ok(row(partition, name)),
        Some(_) | None => Err(format!("{text:?} is no row: write PARTITION#ROW, like user:1001#USDT")),
    }
}

fn row_text(row: &Row) -> String {
    match row.name.contains('#') {
        true => json!([row.partition, row.name]).to_string(),
        false => format!("{}#{}", row.partition, row.name),
    }
}

fn outcome_code(outcome: &Outcome) -> u8 {
    match outcome {
        Outcome::Committed { .. } => 0,
        Outcome::Aborted { .. } => ABORTED,
        Outcome::Unknown { .. } => UNDECIDED,
    }
}

fn outcome_json(id: &str, outcome: &Outcome) -> Json {
    match outcome {
        Outcome::Committed { stamp } => json!({ "id": id, "outcome": "COMMITTED", "stamp": stamp }),
        Outcome::Aborted { reason, operation, met, message } => {
            let mut json = json!({ "id": id, "outcome": "ABORTED", "reason": reason_name(*reason) });
            if let Some(operation) = operation {
                json["operation"] = json!(operation);
            }
            if let Some(met) = met {
                json["met"] = value_json(Some(met));
            }
            json["message"] = json!(message);
            json
        }
        Outcome::Unknown { state, message } => {
            json!({ "id": id, "outcome": "UNKNOWN", "state": state_name(*state), "message": message })
        }
    }
}

fn state_name(state: UndecidedState) -> &'static str {
    state.as_str_name().trim_start_matches("UNDECIDED_STATE_")
}

/// What a row holds: `{"balance":"5"}`, `{"record":"text"}`, `{"record_hex":"00ff"}` or `"absent"`.
fn value_json(value: Option<&Value>) -> Json {
    match value.and_then(|value| value.kind.as_ref()) {
        Some(Kind::Balance(balance)) => json!({ "balance": balance }),
        Some(Kind::Record(bytes)) => record_json(bytes),
        Some(Kind::Version(version)) => json!({ "version": version }),
        Some(Kind::Absent(_)) => json!("absent"),
        None => Json::Null,
    }
}

fn record_json(bytes: &[u8]) -> Json {
    match std::str::from_utf8(bytes) {
        Ok(text) => json!({ "record": text }),
        Err(_) => json!({ "record_hex": bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>() }),
    }
}

fn change_json(change: Option<&Change>) -> Json {
    match change {
        Some(Change::Delta(delta)) => json!({ "delta": delta }),
        Some(Change::Value(bytes)) => record_json(bytes),
        Some(Change::Deleted(_)) => json!("deleted"),
        None => Json::Null,
    }
}

fn entry_json(entry: &HistoryEntry) -> Json {
    json!({
        "id": entry.batch_id,
        "stamp": entry.stamp,
        "change": change_json(entry.change.as_ref()),
        "result": value_json(entry.result.as_ref()),
    })
}

fn decision_json(decision: &Decision) -> Json {
    let outcome = decision.outcome.as_ref();
    let mut json = match outcome.and_then(|outcome| outcome.result.as_ref()) {
        Some(outcome::Result::Committed(committed)) => {
            json!({ "outcome": "COMMITTED", "stamp": committed.stamp })
        }
        Some(outcome::Result::Aborted(aborted)) => {
            json!({ "outcome": "ABORTED", "reason": reason_name(aborted.reason()), "message": aborted.message })
        }
        Some(outcome::Result::Undecided(_)) | None => json!({ "outcome": Json::Null }),
    };
    json["position"] = json!(decision.position);
    json["id"] = json!(outcome.map(|outcome| &outcome.batch_id));
    json["shards"] = json!(decision.shards);
    json["finished"] = json!(decision.finished);
    json
}

fn in_doubt_json(part: &InDoubtPart) -> Json {
    json!({
        "shard": part.shard,
        "id": part.batch_id,
        "number": [part.epoch, part.sequence],
        "waiting": part.waiting,
        "age_ms": part.age_ms,
        "shards": part.shards,
    })
}

fn show(json: &Json) -> anyhow::Result<()> {
    crate::out!("{}", serde_json::to_string_pretty(json)?);
    Ok(())
}

fn show_line(json: &Json) -> anyhow::Result<()> {
    crate::out!("{}", serde_json::to_string(json)?);
    Ok(())
}

fn tell_next(next: u64) {
    if next > 0 {
        crate::err!("there is more: --from {next}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_is_divided_at_its_last_hash_or_given_as_json() {
        assert_eq!(parse_row("user:1#USDT/margin"), Ok(row("user:1", "USDT/margin")));
        assert_eq!(parse_row("a#b#c"), Ok(row("a#b", "c")));
        assert_eq!(parse_row(r#"["a","b#c"]"#), Ok(row("a", "b#c")));
        for text in ["", "a", "#a", "a#", "[1]"] {
            assert!(parse_row(text).is_err(), "{text:?} was taken");
        }
        for key in [row("user:1", "USDT"), row("a#b", "c"), row("a", "b#c")] {
            assert_eq!(parse_row(&row_text(&key)), Ok(key));
        }
    }
}
