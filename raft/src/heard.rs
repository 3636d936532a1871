//! When the other replicas were asked what they have answered since: by that a leader knows that it led then.
//!
//! Raft's library tells the answers of appends apart by the entries alone, and credits one with the last request that went out for the
//! same entries, which may be a later one than the one that was answered. So a leader that was stopped for a while, and replaced, could
//! take answers from before for a confirmation, and answer a read with what is no longer so. Here an answer counts for the moment
//! at which its own request was handed in.

use std::collections::{BTreeMap, BTreeSet};

use tokio::{sync::watch, time::Instant};

/// What the others of one group have answered.
#[derive(Debug, Default)]
pub(crate) struct Heard(watch::Sender<BTreeMap<u64, (u64, Instant)>>);

impl Heard {
    /// A replica has answered an append of that term, which was handed in then, and knows of no later term.
    pub(crate) fn note(&self, from: u64, term: u64, asked: Instant) {
        self.0.send_if_modified(|heard| {
            let newest = heard.entry(from).or_insert((term, asked));
            let newer = *newest <= (term, asked);
            if newer {
                *newest = (term, asked);
            }
            newer
        });
    }

    /// Waits until a majority of each of these sets of voters, this node included, has answered what was asked in that term since then.
    pub(crate) async fn confirm(&self, here: u64, term: u64, since: Instant, voters: &[BTreeSet<u64>]) {
        let confirmed = |heard: &BTreeMap<u64, (u64, Instant)>| {
            let has = |voter: &u64| {
                *voter == here
                    || heard.get(voter).is_some_and(|(in_term, at)| *in_term == term && *at >= since)
            };
            voters.iter().all(|set| 2 * set.iter().filter(|voter| has(voter)).count() > set.len())
        };
        // It lives as long as this does.
        let _ = self.0.subscribe().wait_for(confirmed).await;
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use futures::FutureExt;

    use super::*;

    fn confirms(heard: &Heard, term: u64, since: Instant, voters: &[&[u64]]) -> bool {
        let voters: Vec<BTreeSet<u64>> = voters.iter().map(|set| set.iter().copied().collect()).collect();
        heard.confirm(1, term, since, &voters).now_or_never().is_some()
    }

    /// B24: a leader that was stopped wakes up with answers from before.
    #[tokio::test]
    async fn an_answer_counts_for_the_moment_of_its_own_request() {
        let (heard, before) = (Heard::default(), Instant::now());
        let now = before + Duration::from_secs(5);
        heard.note(2, 7, before);
        heard.note(3, 7, before);
        assert!(confirms(&heard, 7, before, &[&[1, 2, 3]]));
        assert!(!confirms(&heard, 7, now, &[&[1, 2, 3]]), "asked before the read");
        heard.note(3, 7, now);
        assert!(confirms(&heard, 7, now, &[&[1, 2, 3]]));
        // An answer that comes late takes nothing back.
        heard.note(3, 7, before);
        assert!(confirms(&heard, 7, now, &[&[1, 2, 3]]));
        assert!(!confirms(&heard, 8, now, &[&[1, 2, 3]]), "in another term");
        assert!(!confirms(&heard, 7, now, &[&[1, 2, 3, 4, 5]]));
        assert!(!confirms(&heard, 7, now, &[&[1, 2, 3], &[1, 4, 5]]), "both of two sets of voters");
        assert!(!confirms(&heard, 7, now, &[&[2, 3, 4]]), "a leader that has no vote");
        assert!(confirms(&heard, 7, now, &[&[1]]));
    }

    #[tokio::test]
    async fn who_waits_is_woken_by_the_answer() {
        let (heard, since) = (Heard::default(), Instant::now());
        let voters = [BTreeSet::from([1, 2, 3])];
        let answer = async {
            tokio::task::yield_now().await;
            heard.note(2, 7, since);
        };
        let waiting = heard.confirm(1, 7, since, &voters);
        let both = async { tokio::join!(waiting, answer) };
        tokio::time::timeout(Duration::from_secs(30), both).await.expect("it is woken");
    }
}
