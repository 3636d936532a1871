//! A replica of one group.

use std::{collections::BTreeSet, future::Future, marker::PhantomData, sync::Arc};

use tokio::sync::watch;
use verdict_protocol::{
    ids::{GroupId, NodeId},
    machine::Machine,
    store::Store,
};

use crate::api::{AdminError, Applied, GroupStatus, Leadership, ProposeError, ReadError};

/// The replica of a group on this node. A cheap handle.
pub struct Group<M: Machine> {
    machine: PhantomData<Arc<std::sync::Mutex<M>>>,
}

impl<M: Machine> Clone for Group<M> {
    fn clone(&self) -> Self {
        Group { machine: PhantomData }
    }
}

impl<M: Machine> Group<M> {
    /// The group.
    pub fn id(&self) -> GroupId {
        todo!()
    }

    /// Replicates and applies one command.
    pub async fn propose(&self, command: Vec<u8>) -> Result<Applied<M::Reply>, ProposeError> {
        self.start_propose(command).await
    }

    /// Queues a command at once; entries are appended in the order of the calls. The future gives the outcome; dropping it
    /// changes nothing.
    pub fn start_propose(
        &self,
        command: Vec<u8>,
    ) -> impl Future<Output = Result<Applied<M::Reply>, ProposeError>> + Send + 'static {
        let _ = command;
        async { todo!() }
    }

    /// Confirms with a quorum, after the call began, that this replica leads, and waits until it has applied everything that
    /// was committed then. Gives that index.
    pub async fn read_barrier(&self) -> Result<u64, ReadError> {
        todo!()
    }

    /// Looks at the machine and its store between two applies. `look` must be quick: applying waits for it.
    pub fn read<T>(&self, look: impl FnOnce(&M, &dyn Store) -> T) -> T {
        let _ = look;
        todo!()
    }

    /// Who leads.
    pub fn leadership(&self) -> watch::Receiver<Leadership> {
        todo!()
    }

    /// How the group looks from here.
    pub fn status(&self) -> GroupStatus {
        todo!()
    }

    /// Hands the leadership over to `to`, or to the voter that is furthest on. Gives the new leader.
    pub async fn transfer_leader(&self, to: Option<NodeId>) -> Result<NodeId, AdminError> {
        let _ = to;
        todo!()
    }

    /// Makes a snapshot now. Gives the index of the last entry in it.
    pub async fn trigger_snapshot(&self) -> Result<u64, AdminError> {
        todo!()
    }

    /// Adds a replica without a vote, and waits until it has caught up.
    pub async fn add_learner(&self, node: NodeId, address: String) -> Result<(), AdminError> {
        let _ = (node, address);
        todo!()
    }

    /// Makes exactly `voters` vote. All must be replicas already. Those who no longer vote are removed.
    pub async fn change_membership(&self, voters: BTreeSet<NodeId>) -> Result<(), AdminError> {
        let _ = voters;
        todo!()
    }
}
