//! Says early why a cluster doesn't answer, and what to do about it.
//!
//! A call is tried until its time runs out: a node may be starting. Whoever waits for it should not wait in the dark.

use std::{future::Future, pin::pin, time::Duration};

use anyhow::anyhow;
use tokio::time::{Instant, sleep};
use verdict_client::{Client, ClientError};
use verdict_proto::v1::StatusResponse;

/// How long a cluster may take to answer at all.
const REACH_TIMEOUT: Duration = Duration::from_secs(15);
/// What is wrong after this time is told.
const SILENCE: Duration = Duration::from_secs(1);
/// If something else is wrong, it is told after this time at the earliest.
const INTERVAL: Duration = Duration::from_secs(3);
/// How often the client is looked at.
const LOOK: Duration = Duration::from_millis(200);

/// What to do where not one node was reached.
const ADVICE: &str = "is a node running there? --connect HOST:PORT,... says where nodes are";

/// Asks for the status of a cluster with which a longer work begins: wrong addresses are told before it.
pub async fn reach(client: &Client) -> anyhow::Result<StatusResponse> {
    let client = client.with_timeout(REACH_TIMEOUT);
    let tell = |trouble| crate::err!("{trouble}");
    let status = telling(&client, REACH_TIMEOUT, tell, client.status()).await;
    status.map_err(|error| advised(&client, error.into()))
}

/// Adds to an error what to do, if not one node was reached.
pub fn advised(client: &Client, error: anyhow::Error) -> anyhow::Error {
    match error.downcast_ref() {
        Some(ClientError::Unavailable { .. }) if !client.is_reached() => anyhow!("{error:#}; {ADVICE}"),
        Some(_) | None => error,
    }
}

/// Waits for calls that end within `patience`, and tells meanwhile why there is no answer.
pub async fn telling<T>(
    client: &Client,
    patience: Duration,
    mut tell: impl FnMut(String),
    calls: impl Future<Output = T>,
) -> T {
    let mut calls = pin!(calls);
    let deadline = Instant::now() + patience;
    let mut next = Instant::now() + SILENCE;
    let mut told = None;
    loop {
        tokio::select! {
            end = &mut calls => return end,
            () = sleep(LOOK) => {}
        }
        let now = Instant::now();
        let trouble = client.trouble();
        if now >= next && trouble.is_some() && trouble != told {
            let left = deadline.saturating_duration_since(now).as_secs();
            tell(format!("{}; trying for {left} s more", trouble.as_deref().unwrap_or_default()));
            (told, next) = (trouble, now + INTERVAL);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use verdict_client::{Options, connect::InProcess};

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn it_is_told_early_that_nobody_listens_and_then_what_was_tried() {
        let patience = Duration::from_secs(15);
        let connect = Arc::new(InProcess::default());
        let options = Options { connect, timeout: patience, ..Options::default() };
        let client = Client::connect(["a:1", "b:2"], options).unwrap();
        let (began, mut told) = (Instant::now(), Vec::new());
        let call = client.status();
        let end = telling(&client, patience, |text| told.push((began.elapsed(), text)), call).await;
        let error = advised(&client, end.unwrap_err().into()).to_string();
        let why = "no connection to a:1 (nobody listens there), b:2 (nobody listens there)";
        assert_eq!(error, format!("no node is available: {why}; {ADVICE}"));
        let [(at, text)] = &told[..] else { panic!("{told:?}") };
        assert!(*at <= Duration::from_secs(2) && text.starts_with(why), "{told:?}");
        assert!(
            text.ends_with("; trying for 13 s more") || text.ends_with("; trying for 14 s more"),
            "{text}"
        );
    }
}
