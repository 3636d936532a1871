//! Verdict is measured by its own `verdict bench`, once in each round.

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::Context as _;
use serde::Deserialize;
use tokio::process::Command;

use crate::{
    load::Figures,
    plan::Case,
    process::{User, run_to_end},
};

/// How long a case may take beyond what is measured, and the whole beyond the cases.
const OVERHEAD_SECONDS: u64 = 120;

/// The program.
#[derive(Clone, Debug)]
pub struct Program(PathBuf);

/// What is asked of it.
#[derive(Clone, Debug)]
pub struct Question<'a> {
    /// The cases.
    pub cases: &'a [Case],
    /// How long each is measured.
    pub seconds: u64,
    /// How long it runs before.
    pub warm_up_seconds: u64,
    /// How many users, with two balances each.
    pub users: u64,
    /// Where its data and its answer go.
    pub folder: &'a Path,
}

#[derive(Deserialize)]
struct Report {
    cases: Vec<Answer>,
}

#[derive(Deserialize)]
struct Answer {
    case: String,
    trades_per_second: Number,
    p50_ms: Number,
    p99_ms: Number,
    max_ms: Option<Number>,
    /// Of the nodes.
    cpu_us_per_trade: Option<Number>,
    /// Of the clients.
    client_cpu_us_per_trade: Option<Number>,
    answers: Answers,
}

/// What became of all trades, those outside of the measured time too.
#[derive(Deserialize)]
struct Answers {
    committed: u64,
    /// Tries.
    refused: u64,
}

/// A number, or the median of several.
#[derive(Clone, Copy, Deserialize)]
#[serde(untagged)]
enum Number {
    Plain(f64),
    Several { median: f64 },
}

impl Program {
    /// The program at this path.
    pub fn find(path: Option<&Path>) -> anyhow::Result<Program> {
        let hint =
            "say where it is (--verdict PATH), or leave it out (--only postgres,postgres-standby,etcd)";
        let path = path.with_context(|| format!("where is Verdict's program? {hint}"))?;
        anyhow::ensure!(path.is_file(), "there is no {}: {hint}", path.display());
        let path = path.canonicalize().with_context(|| format!("find {}", path.display()))?;
        Ok(Program(path))
    }

    /// "Verdict 0.1.0" or the like.
    pub async fn version(&self) -> anyhow::Result<String> {
        let out =
            Command::new(&self.0).arg("--version").output().await.context("ask Verdict for its version")?;
        let text = String::from_utf8_lossy(&out.stdout);
        let version = text.trim().strip_prefix("verdict ").context("understand Verdict's version")?;
        Ok(format!("Verdict {version}"))
    }

    /// Runs it. The figures are in the order of the cases.
    pub async fn measure(&self, question: &Question<'_>) -> anyhow::Result<Vec<Figures>> {
        let Question { cases, seconds, warm_up_seconds, users, folder } = question;
        fs::create_dir_all(folder).with_context(|| format!("make {}", folder.display()))?;
        let json = folder.join("verdict.json");
        let names: Vec<&str> = cases.iter().map(|case| case.name.as_str()).collect();
        let mut command = User::Same.command(&self.0, "TERM");
        command.env("TMPDIR", folder).args(["bench", "--case", &names.join(","), "--json"]).arg(&json);
        command.args(["--repeat", "1", "--seconds", &seconds.to_string()]);
        command.args(["--warm-up", &warm_up_seconds.to_string(), "--accounts", &(users * 2).to_string()]);
        let count = cases.len() as u64;
        let timeout = (seconds + warm_up_seconds + OVERHEAD_SECONDS) * count + OVERHEAD_SECONDS;
        run_to_end("verdict bench", command, Duration::from_secs(timeout)).await?;
        let text = fs::read_to_string(&json).context("read what `verdict bench` wrote")?;
        figures(&text, cases)
    }
}

fn figures(json: &str, cases: &[Case]) -> anyhow::Result<Vec<Figures>> {
    let report: Report = serde_json::from_str(json).context("understand what `verdict bench` wrote")?;
    let figures = |case: &Case| {
        let answer = report.cases.iter().find(|answer| answer.case == case.name);
        let answer = answer.with_context(|| format!("`verdict bench` tells nothing about {}", case.name))?;
        Ok(Figures {
            trades_per_second: answer.trades_per_second.value(),
            p50_ms: answer.p50_ms.value(),
            p99_ms: answer.p99_ms.value(),
            max_ms: answer.max_ms.map(Number::value),
            failed_tries_per_trade: answer.answers.refused as f64 / answer.answers.committed.max(1) as f64,
            cpu_us_per_trade: answer.cpu_us_per_trade.zip(answer.client_cpu_us_per_trade).map(both),
            others_cpus: None,
        })
    };
    cases.iter().map(figures).collect()
}

/// As for the peers: servers and clients together.
fn both((servers, clients): (Number, Number)) -> f64 {
    servers.value() + clients.value()
}

impl Number {
    fn value(self) -> f64 {
        match self {
            Number::Plain(number) | Number::Several { median: number } => number,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::System;

    #[test]
    fn figures_are_found_by_the_case() {
        let json = r#"{"cases": [
            {"case": "stream-1", "trades_per_second": {"median": 70000.0, "min": 1}, "p50_ms": 9.5, "p99_ms": {"median": 44},
             "answers": {"committed": 400, "refused": 100, "lost": 0}},
            {"case": "hot-256", "trades_per_second": 5, "p50_ms": 1, "p99_ms": 2, "cpu_us_per_trade": 30.5,
             "client_cpu_us_per_trade": 4, "max_ms": 9.5, "more": [], "answers": {"committed": 0, "refused": 0}},
            {"case": "unary-64", "trades_per_second": {"median": 20000.5}, "p50_ms": {"median": 3}, "p99_ms": 7,
             "answers": {"committed": 1, "refused": 0}}
        ]}"#;
        let cases = System::Verdict.cases(true);
        let figures = figures(json, &cases).unwrap();
        let rates: Vec<f64> = figures.iter().map(|figures| figures.trades_per_second).collect();
        assert_eq!(rates, [20000.5, 70000.0, 5.0]);
        assert_eq!((figures[1].p99_ms, figures[2].cpu_us_per_trade), (44.0, Some(34.5)));
        let tries: Vec<f64> = figures.iter().map(|figures| figures.failed_tries_per_trade).collect();
        assert_eq!(tries, [0.0, 0.25, 0.0]);
    }

    #[test]
    fn a_case_without_an_answer_is_an_error() {
        let error = figures(r#"{"cases": []}"#, &System::Verdict.cases(true)).unwrap_err();
        assert!(error.to_string().contains("unary-64"), "{error:#}");
    }
}
