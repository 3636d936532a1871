//! A load of transfers, and the account of what was answered.
//!
//! Every transfer moves an amount between two accounts on different shards. Workers submit each to any node until they have a definite
//! answer, or are told to end; then [`Ledger::audit`] asks for all outcomes, and computes from them what every account must hold.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use futures::{StreamExt as _, stream};
use tokio::task::JoinHandle;
use tonic::transport::Channel;
use verdict_proto::v1::{self, AbortReason, outcome, settlement_client::SettlementClient};

use crate::{
    api::{
        add, balance_of, batch, get_batch, may_be_tried_again, partition_on, read, row, settle, stamp_of,
        submit,
    },
    cluster::Cluster,
    random::Random,
};

/// What each account is given.
const FUNDS: i128 = 1_000_000;
/// How long a worker goes on with one id.
const ONE_WITHIN: Duration = Duration::from_secs(30);
/// Questions that are asked at a time.
const QUESTIONS: usize = 32;

/// The accounts and everything that was sent.
#[derive(Debug)]
pub struct Ledger {
    accounts: Vec<v1::Row>,
    sent: Mutex<BTreeMap<String, Sent>>,
    answered: AtomicU64,
    errors: Mutex<BTreeMap<String, u64>>,
}

/// A transfer and what was answered about it first.
#[derive(Clone, Debug)]
struct Sent {
    from: usize,
    to: usize,
    amount: i128,
    answer: Option<outcome::Result>,
}

/// Workers that go on until they are ended.
#[derive(Debug)]
pub struct Load {
    end: Arc<AtomicBool>,
    workers: Vec<JoinHandle<()>>,
}

/// What all transfers have come to.
#[derive(Clone, Debug, Default)]
pub struct Audit {
    /// How many were committed.
    pub committed: usize,
    /// How many were aborted, by reason.
    pub aborted: BTreeMap<&'static str, usize>,
    /// How many were answered while the load ran.
    pub answered: usize,
}

impl Ledger {
    /// Opens accounts, so many on each shard, and funds them.
    pub async fn open(cluster: &Cluster, tag: &str, accounts_per_shard: usize) -> Arc<Ledger> {
        let shards = 1..=cluster.shards();
        let accounts: Vec<v1::Row> = shards
            .flat_map(|shard| (0..accounts_per_shard).map(move |number| (shard, number)))
            .map(|(shard, number)| {
                row(&partition_on(shard, cluster.shards(), &format!("{tag}-{shard}-{number}")), "USD")
            })
            .collect();
        let fund = batch(accounts.iter().map(|account| add(account, FUNDS)).collect());
        stamp_of(&settle(&cluster.settlement(1), &fund).await);
        let ledger = Ledger {
            accounts,
            sent: Mutex::default(),
            answered: AtomicU64::new(0),
            errors: Mutex::default(),
        };
        Arc::new(ledger)
    }

    /// The accounts.
    pub fn accounts(&self) -> &[v1::Row] {
        &self.accounts
    }

    /// What all of them hold together, always.
    pub fn total(&self) -> i128 {
        FUNDS * self.accounts.len() as i128
    }

    /// Definite answers so far.
    pub fn answered(&self) -> u64 {
        self.answered.load(Ordering::Relaxed)
    }

    /// What calls ended with instead of an answer: the gRPC code, or `undecided`, and how often.
    pub fn errors(&self) -> BTreeMap<String, u64> {
        self.lock_errors().clone()
    }

    /// Starts workers, each of which has one transfer in flight.
    pub fn load(self: &Arc<Ledger>, cluster: &Cluster, workers: usize, random: &mut Random) -> Load {
        let end = Arc::new(AtomicBool::new(false));
        let worker = |_| {
            let (ledger, end, random) = (self.clone(), end.clone(), random.split());
            tokio::spawn(ledger.work(cluster.settlements(), end, random))
        };
        Load { workers: (0..workers).map(worker).collect(), end }
    }

    async fn work(
        self: Arc<Ledger>,
        mut clients: Vec<SettlementClient<Channel>>,
        end: Arc<AtomicBool>,
        mut random: Random,
    ) {
        while !end.load(Ordering::Relaxed) {
            let count = self.accounts.len() as u64;
            let from = random.below(count) as usize;
            let to = (from + 1 + random.below(count - 1) as usize) % count as usize;
            let amount = 1 + i128::from(random.below(100));
            let mut transfer =
                batch(vec![add(&self.accounts[from], -amount), add(&self.accounts[to], amount)]);
            transfer.zero_sum = true;
            let id = transfer.id.clone();
            self.lock_sent().insert(id.clone(), Sent { from, to, amount, answer: None });
            let began = Instant::now();
            while began.elapsed() < ONE_WITHIN {
                let node = random.below(clients.len() as u64) as usize;
                match submit(&mut clients[node], &transfer).await {
                    Ok(outcome::Result::Undecided(_)) => self.count_error("undecided".to_owned()),
                    Ok(definite) => {
                        self.lock_sent().get_mut(&id).expect("it was noted").answer = Some(definite);
                        self.answered.fetch_add(1, Ordering::Relaxed);
                        break;
                    }
                    Err(status) => {
                        assert!(may_be_tried_again(&status), "a good batch was refused: {status}");
                        self.count_error(format!("{:?}", status.code()));
                    }
                }
                if end.load(Ordering::Relaxed) {
                    // Left open: the audit asks.
                    return;
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        }
    }

    /// Asks for the outcome of everything that was sent, at one node after the other, and compares: with what was answered before,
    /// and with what the accounts hold.
    pub async fn audit(&self, cluster: &Cluster) -> Audit {
        let clients = cluster.settlements();
        let sent: Vec<(String, Sent)> =
            self.lock_sent().iter().map(|(id, sent)| (id.clone(), sent.clone())).collect();
        let questions = sent.into_iter().enumerate().map(|(place, (id, sent))| {
            let client = clients[place % clients.len()].clone();
            async move {
                let outcome = final_outcome(client, &id).await;
                (id, sent, outcome)
            }
        });
        let mut expected = vec![FUNDS; self.accounts.len()];
        let mut audit = Audit::default();
        let mut answers = stream::iter(questions).buffer_unordered(QUESTIONS);
        while let Some((id, sent, outcome)) = answers.next().await {
            if let Some(answer) = &sent.answer {
                assert_eq!(&outcome, answer, "batch {id} was answered otherwise before");
                audit.answered += 1;
            }
            match &outcome {
                outcome::Result::Committed(_) => {
                    expected[sent.from] -= sent.amount;
                    expected[sent.to] += sent.amount;
                    audit.committed += 1;
                }
                outcome::Result::Aborted(aborted) => {
                    *audit.aborted.entry(aborted.reason().as_str_name()).or_default() += 1;
                }
                outcome::Result::Undecided(undecided) => panic!("batch {id}: {undecided:?}"),
            }
        }
        let held = read(&clients[0], &self.accounts).await;
        let held: Vec<i128> = held.values.iter().map(balance_of).collect();
        assert_eq!(held, expected, "the accounts don't hold what the outcomes come to");
        audit
    }

    fn count_error(&self, what: String) {
        *self.lock_errors().entry(what).or_default() += 1;
    }

    fn lock_sent(&self) -> std::sync::MutexGuard<'_, BTreeMap<String, Sent>> {
        self.sent.lock().expect("nothing panics while it holds this lock")
    }

    fn lock_errors(&self) -> std::sync::MutexGuard<'_, BTreeMap<String, u64>> {
        self.errors.lock().expect("nothing panics while it holds this lock")
    }
}

impl Audit {
    /// How many were aborted for other reasons than that a leader changed, or that this audit cancelled them unseen.
    pub fn aborted_otherwise(&self) -> usize {
        let excused = [AbortReason::Interrupted, AbortReason::Cancelled].map(|reason| reason.as_str_name());
        self.aborted.iter().filter(|(reason, _)| !excused.contains(reason)).map(|(_, count)| count).sum()
    }
}

impl Load {
    /// Waits until so many more answers have come.
    pub async fn settle_more(&self, ledger: &Ledger, count: u64) {
        let target = ledger.answered() + count;
        let enough = || async {
            let answered = ledger.answered();
            if answered >= target { Ok(()) } else { Err(format!("{answered} of {target} answers")) }
        };
        crate::wait::eventually("the load goes on", ONE_WITHIN, enough).await;
    }

    /// Ends the workers. One that has panicked is the test's failure.
    pub async fn end(self) {
        self.end.store(true, Ordering::Relaxed);
        for worker in self.workers {
            worker.await.expect("a worker ends without a panic");
        }
    }
}

/// The outcome of a batch; if there is no trace of it, its abort.
async fn final_outcome(mut client: SettlementClient<Channel>, id: &str) -> outcome::Result {
    let began = Instant::now();
    loop {
        let request = v1::GetBatchRequest { batch_id: id.to_owned(), abort_if_not_seen: true, wait_ms: 5000 };
        let last = match client.get_batch(request).await {
            Ok(response) => match response.into_inner().outcome.and_then(|outcome| outcome.result) {
                None | Some(outcome::Result::Undecided(_)) => "undecided".to_owned(),
                Some(definite) => {
                    let again = get_batch(&mut client, id, 0).await;
                    if let Ok(again) = again {
                        assert_eq!(again, definite, "batch {id} has two outcomes");
                    }
                    return definite;
                }
            },
            Err(status) => status.to_string(),
        };
        assert!(began.elapsed() < ONE_WITHIN, "batch {id} isn't decided after {ONE_WITHIN:?}: {last}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}
