//! Keeps a replica from voting until the others have looked at its disk.
//!
//! An older copy of a disk has forgotten votes and entries that others rely on. Whoever knows more refuses its greeting, and it
//! stops ([`crate::standing`]); but it must not vote before it has met them. So after a start a replica neither answers the others'
//! appends and votes nor asks for votes until all other voters of its group have taken its greeting; or, after a while, so many that
//! they and it are a majority: a node that is gone must not keep the rest from going on.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use tokio::{
    sync::watch,
    time::{Instant, sleep, timeout},
};
use verdict_protocol::ids::GroupId;

use crate::{node::Node, peer::kind};

/// How often those who haven't taken the greeting are asked again.
const AGAIN: Duration = Duration::from_millis(50);

/// Opens once, for one group.
#[derive(Clone)]
pub(crate) struct Gate {
    open: Arc<watch::Sender<bool>>,
}

impl Gate {
    pub(crate) fn new() -> Gate {
        Gate { open: Arc::new(watch::Sender::new(false)) }
    }

    /// Waits until the replica may vote. The error says that it still may not.
    pub(crate) async fn pass(&self, patience: Duration) -> Result<(), String> {
        if *self.open.borrow() {
            return Ok(());
        }
        let mut open = self.open.subscribe();
        let passed = timeout(patience, open.wait_for(|open| *open)).await;
        match passed {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(_)) | Err(_) => Err("the other nodes haven't looked at this node's disk yet".to_owned()),
        }
    }

    /// As [`Gate::pass`], for what must be taken in the order in which it comes: who had to wait isn't let in, since those who came
    /// later may have been by then. It is sent again.
    pub(crate) async fn pass_in_order(&self, patience: Duration) -> Result<(), String> {
        if *self.open.borrow() {
            return Ok(());
        }
        self.pass(patience).await?;
        Err("the other nodes have just looked at this node's disk: send it again".to_owned())
    }

    /// Greets the other voters, whom `voters` gives with their addresses, until the gate may open; then opens it.
    pub(crate) async fn open_when_greeted(
        self,
        node: Arc<Node>,
        group: GroupId,
        voters: impl Fn() -> BTreeMap<u64, String>,
    ) {
        let began = Instant::now();
        let patience = Duration::from_millis(node.config.timing.greeting_patience_ms);
        let mut accepted = node.accepted();
        loop {
            let voters = voters();
            let taken = accepted.borrow_and_update().clone();
            let missing: Vec<(&u64, &String)> =
                voters.iter().filter(|(id, _)| **id != node.config.node.0 && !taken.contains(id)).collect();
            if missing.is_empty() || (began.elapsed() >= patience && is_majority(&voters, missing.len())) {
                if !missing.is_empty() {
                    let silent: BTreeSet<&u64> = missing.iter().map(|(id, _)| *id).collect();
                    tracing::info!(%group, ?silent, "going on without those who can't be reached");
                }
                self.open.send_replace(true);
                return;
            }
            for (id, address) in missing {
                // The answer doesn't matter: that the connection stands says that the greeting was taken.
                drop(node.peer(*id, address).request(group.0, kind::GREET, Vec::new()).await);
            }
            tokio::select! {
                _ = accepted.changed() => {}
                () = sleep(AGAIN) => {}
            }
        }
    }
}

/// Whether those voters who aren't missing, this one included, are a majority.
fn is_majority(voters: &BTreeMap<u64, String>, missing: usize) -> bool {
    (voters.len() - missing) * 2 > voters.len()
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;

    use super::*;

    /// A leader's Raft stops if appends are answered in another order than they were sent in.
    #[tokio::test]
    async fn who_waited_does_not_come_in_behind_those_who_came_later() {
        let (gate, patience) = (Gate::new(), Duration::from_secs(10));
        let mut first = Box::pin(gate.pass_in_order(patience));
        let mut vote = Box::pin(gate.pass(patience));
        assert!((&mut first).now_or_never().is_none() && (&mut vote).now_or_never().is_none(), "it is open");
        gate.open.send_replace(true);
        assert_eq!(gate.pass_in_order(patience).now_or_never(), Some(Ok(())));
        assert!(first.await.is_err(), "it came in behind the second");
        assert_eq!(vote.await, Ok(()));
    }
}
