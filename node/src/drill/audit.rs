//! The questions after a drill, when everything is mended and the load has ended.

use std::{
    collections::BTreeMap,
    sync::atomic::{AtomicUsize, Ordering},
    time::Duration,
};

use futures::{StreamExt as _, stream};
use tokio::time::{Instant, sleep};
use uuid::{NoContext, Timestamp, Uuid};
use verdict_client::{Batch, BatchBuilder, Client, Options, Row, row, value::Kind};
use verdict_proto::v1::{Decision, history_entry::Change, outcome};

use super::{
    load::Load,
    record::{Attempt, Audit, Said},
};
use crate::{
    book::{Book, FEE_ACCOUNT},
    cluster_state::{all_at_one_index, equal_replicas, wait_quiet},
    ctl::status::{replicas, replicas_differ},
    totals::{ROWS_PER_READ, Totals},
};

/// Questions in flight at one node.
const QUESTIONS: usize = 64;
/// Batches in flight that are submitted again.
const WINDOW: usize = 256;
/// How long one answer may take.
const PATIENCE: Duration = Duration::from_secs(15);
/// How long the server is asked to wait for a decision.
const DECISION_WAIT: Duration = Duration::from_secs(5);
/// How often one question is asked, at most, until there is an answer, and the time between.
const TRIES: u32 = 4;
const AGAIN_AFTER: Duration = Duration::from_millis(500);
/// So many questions are asked again in all, at one node: where nobody answers, each takes its whole time.
const AGAIN_MAX: usize = 500;
/// Decisions, or changes, on one page.
const PAGE: u32 = 10_000;
/// The most pages.
const PAGES_MAX: usize = 300;
/// Ids that are submitted with other contents.
const OTHER_CONTENTS: usize = 10;

/// Asks everything. What can't be answered is noted, and the rest is asked all the same.
pub async fn audit(
    load: &Load<'_>,
    book: &Book,
    client: &Client,
    nodes: &[(u64, String)],
    batches: &[Attempt],
    from_position: u64,
) -> Audit {
    let mut audit = Audit::default();
    let began = Instant::now();
    audit.not_quiet = wait_quiet(client).await.err().map(|error| error.to_string());
    audit.quiet_seconds = began.elapsed().as_secs_f64();

    audit.asked = ask_nodes(nodes, batches, &mut audit.troubles).await;
    audit.again = submit_again(load, client, batches).await;
    (audit.other_contents, audit.too_old) = submit_wrong(client, batches).await;
    let mut troubles = Vec::new();
    let mut note = |what: &str, error: &anyhow::Error| troubles.push(format!("{what}: {error:#}"));
    match records(load, client, batches).await {
        Ok(records) => audit.records = records,
        Err(error) => note("read the records", &error),
    }
    match decisions(client, batches).await {
        Ok((decisions, complete)) => (audit.decisions, audit.decisions_complete) = (decisions, complete),
        Err(error) => note("list the decisions", &error),
    }
    match fees(client, book, from_position).await {
        Ok(fees) => audit.fees = Some(fees),
        Err(error) => note("read the history of the fee account", &error),
    }
    if let Err(error) = wait_quiet(client).await {
        audit.not_quiet = Some(error.to_string());
    }
    match Totals::read(client, load.accounts()).await {
        Ok(totals) => audit.balances = totals.balances.into_iter().map(|(_, balance)| balance).collect(),
        Err(error) => note("read the balances", &error),
    }
    match equal_replicas(client).await {
        Ok(status) => {
            audit.equal = all_at_one_index(&status).then(|| !replicas_differ(&status));
            if replicas_differ(&status) {
                audit.equal = Some(false);
            }
        }
        Err(error) => note("compare the replicas", &error),
    }
    audit.troubles.append(&mut troubles);
    audit
}

/// Asks each node for each id.
async fn ask_nodes(
    nodes: &[(u64, String)],
    batches: &[Attempt],
    troubles: &mut Vec<String>,
) -> Vec<(u64, usize, Said)> {
    let mut clients = Vec::new();
    for (node, address) in nodes {
        let options = Options { timeout: PATIENCE, ..Options::default() };
        match Client::connect([address.clone()], options) {
            Ok(client) => clients.push((*node, client)),
            Err(error) => troubles.push(format!("ask node {node}: {error}")),
        }
    }
    let asked = clients.iter().map(|(node, client)| async move {
        let again = &AtomicUsize::new(AGAIN_MAX);
        let questions = batches.iter().enumerate().map(|(number, batch)| async move {
            let id = batch.id.to_string();
            let ask = || async { Said::of(&client.get_batch(&id, false, DECISION_WAIT).await) };
            (*node, number, until_answered(again, ask).await)
        });
        stream::iter(questions).buffer_unordered(QUESTIONS).collect::<Vec<_>>().await
    });
    futures::future::join_all(asked).await.into_iter().flatten().collect()
}

/// Submits every batch again under its id.
async fn submit_again(load: &Load<'_>, client: &Client, batches: &[Attempt]) -> Vec<(usize, Said)> {
    let submitter = &client.submitter(WINDOW);
    let again = &AtomicUsize::new(AGAIN_MAX);
    let work = batches.iter().enumerate().map(|(number, batch)| async move {
        let ask = || async { Said::of(&submitter.submit(load.batch(number, batch.id)).await.result) };
        (number, until_answered(again, ask).await)
    });
    stream::iter(work).buffer_unordered(WINDOW).collect().await
}

/// Asks, and asks again while there is no answer, `again` times in all.
async fn until_answered<F: Future<Output = Said>>(again: &AtomicUsize, ask: impl Fn() -> F) -> Said {
    let mut said = ask().await;
    for _ in 1..TRIES {
        let may_ask =
            || again.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1)).is_ok();
        if said.is_answer() || !may_ask() {
            break;
        }
        sleep(AGAIN_AFTER).await;
        said = ask().await;
    }
    said
}

/// Submits what must be refused: known ids with other contents, and an id that is too old.
async fn submit_wrong(client: &Client, batches: &[Attempt]) -> (Vec<Said>, Option<Said>) {
    let again = &AtomicUsize::new(AGAIN_MAX);
    let submit = |batch: Batch| async move {
        until_answered(again, || async { Said::of(&client.submit(&batch).await) }).await
    };
    let known = batches.iter().filter(|batch| batch.end().is_some()).take(OTHER_CONTENTS);
    let mut others = Vec::new();
    for batch in known {
        let other = BatchBuilder::with_id(batch.id.to_string()).add(FEE_ACCOUNT, "other", 1).build();
        others.push(submit(other).await);
    }
    // A young cluster has forgotten nothing yet.
    let Some(horizon_ms) = horizon_ms(client).await.filter(|horizon_ms| *horizon_ms > 0) else {
        return (others, None);
    };
    let (seconds, nanoseconds) = (horizon_ms / 1000, (horizon_ms % 1000) as u32 * 1_000_000);
    let id = Uuid::new_v7(Timestamp::from_unix(NoContext, seconds, nanoseconds));
    let old = BatchBuilder::with_id(id.to_string()).add(FEE_ACCOUNT, "other", 1).build();
    (others, Some(submit(old).await))
}

/// Up to where ids are refused because they are too old.
async fn horizon_ms(client: &Client) -> Option<u64> {
    let status = client.status().await.ok()?;
    replicas(&status).map(|(_, replica)| replica.horizon_ms).max()
}

/// Whether each batch's record, its first operation, exists.
async fn records(load: &Load<'_>, client: &Client, batches: &[Attempt]) -> anyhow::Result<Vec<bool>> {
    let mut rows: Vec<Row> = Vec::with_capacity(batches.len());
    for (number, batch) in batches.iter().enumerate() {
        rows.extend(load.batch(number, batch.id).operations.into_iter().next().and_then(|first| first.row));
    }
    anyhow::ensure!(rows.len() == batches.len(), "a batch has no record");
    let mut records = Vec::with_capacity(rows.len());
    for rows in rows.chunks(ROWS_PER_READ) {
        let values = client.read(rows.to_vec()).await?.values;
        anyhow::ensure!(values.len() == rows.len(), "asked for {} rows and got {}", rows.len(), values.len());
        records.extend(values.into_iter().map(|value| {
            let kind = value.value.and_then(|value| value.kind);
            matches!(kind, Some(Kind::Record(_)))
        }));
    }
    Ok(records)
}

/// What the log says about our ids, and whether all of it was looked at.
async fn decisions(client: &Client, batches: &[Attempt]) -> anyhow::Result<(Vec<(usize, Said)>, bool)> {
    let ours: BTreeMap<String, usize> =
        batches.iter().enumerate().map(|(number, batch)| (batch.id.to_string(), number)).collect();
    let (mut decisions, mut from) = (Vec::new(), 0);
    for _ in 0..PAGES_MAX {
        let page = client.list_decisions(from, PAGE).await?;
        decisions.extend(page.decisions.iter().filter_map(|decision| {
            let number = ours.get(&decision.outcome.as_ref()?.batch_id)?;
            Some((*number, said(decision)?))
        }));
        from = page.next;
        if from == 0 {
            return Ok((decisions, true));
        }
    }
    Ok((decisions, false))
}

fn said(decision: &Decision) -> Option<Said> {
    match decision.outcome.as_ref()?.result.as_ref()? {
        outcome::Result::Committed(committed) => Some(Said::Committed(committed.stamp)),
        outcome::Result::Aborted(aborted) => Some(Said::Aborted(aborted.reason())),
        outcome::Result::Undecided(_) => Some(Said::Unknown),
    }
}

/// Who changed the fee account after a position, and by how much.
async fn fees(client: &Client, book: &Book, from_position: u64) -> anyhow::Result<Vec<(Uuid, i128)>> {
    let account = row(FEE_ACCOUNT, book.tape().symbol.quote.clone());
    let (mut fees, mut from) = (Vec::new(), from_position + 1);
    for _ in 0..PAGES_MAX {
        let page = client.history(account.clone(), from, PAGE).await?;
        for entry in page.entries {
            let Some(Change::Delta(delta)) = entry.change else { anyhow::bail!("a fee is no delta") };
            fees.push((entry.batch_id.parse()?, delta.parse()?));
        }
        from = page.next;
        if from == 0 {
            return Ok(fees);
        }
    }
    anyhow::bail!("there are more than {PAGES_MAX} pages of {PAGE}")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Gives one after the other, the last of them for ever; tells how often it was asked too.
    async fn ask(again: &AtomicUsize, answers: &[Said]) -> (Said, usize) {
        let asked = &AtomicUsize::new(0);
        let next = || async {
            let place = asked.fetch_add(1, Ordering::Relaxed);
            answers[place.min(answers.len() - 1)].clone()
        };
        let said = until_answered(again, next).await;
        (said, asked.load(Ordering::Relaxed))
    }

    #[tokio::test(start_paused = true)]
    async fn a_question_without_an_answer_is_asked_again_some_times() {
        let again = AtomicUsize::new(7);
        let failed = || Said::Failed("no".into());
        let late = [Said::Unknown, Said::Refused, Said::Committed(7)];
        assert_eq!(ask(&again, &[Said::NotSeen, Said::Committed(7)]).await, (Said::NotSeen, 1));
        assert_eq!(ask(&again, &late).await, (Said::Committed(7), 3));
        assert_eq!(ask(&again, &[failed()]).await, (failed(), 4));
        assert_eq!(ask(&again, &[failed()]).await, (failed(), 3), "two were left of seven");
        assert_eq!(ask(&again, &late).await, (Said::Unknown, 1));
    }
}
