//! Waiting by asking again, with a bound.

use std::time::{Duration, Instant};

/// How often is asked.
const POLL: Duration = Duration::from_millis(50);

/// Asks until the answer is good, and tells how long that took. What was missing last is the message of the failure.
pub async fn eventually<T, F>(what: &str, bound: Duration, mut ask: impl FnMut() -> F) -> (T, Duration)
where
    F: Future<Output = Result<T, String>>,
{
    let began = Instant::now();
    loop {
        // An answer that was under way when the time ran out still counts, within reason.
        let missing = match tokio::time::timeout(bound.max(Duration::from_secs(1)), ask()).await {
            Ok(Ok(answer)) => return (answer, began.elapsed()),
            Ok(Err(missing)) => missing,
            Err(_) => "no answer to the question itself".to_owned(),
        };
        assert!(began.elapsed() < bound, "{what}: not within {bound:?}: {missing}");
        tokio::time::sleep(POLL).await;
    }
}
