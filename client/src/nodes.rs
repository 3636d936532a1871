//! The nodes that a client knows, and which of them it asks.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use tokio::time::Instant;
use tonic::transport::Channel;
use verdict_proto::connect::Connect;

use crate::{ClientError, failure::Failure, tries::Place};

/// Channels to addresses that servers named as leaders, beyond those that the caller gave.
const HINTED_MAX: usize = 64;
/// How long a named leader that didn't answer isn't gone to. Nodes name each other as they know each other, and a client may know
/// them by other addresses, as it does outside the cluster's private network. Any node that the caller gave hands the call on.
const OUT_OF_REACH: Duration = Duration::from_secs(60);

/// The nodes.
#[derive(Debug)]
pub(crate) struct Nodes {
    connect: Arc<dyn Connect>,
    /// As the caller gave them.
    addresses: Vec<String>,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    channels: BTreeMap<String, Channel>,
    /// The one that answered last, as far as is known.
    preferred: String,
    /// Named leaders that didn't answer, and since when.
    out_of_reach: BTreeMap<String, Instant>,
    /// Nodes to which there was no connection when they were last asked, and why.
    unreached: BTreeMap<String, String>,
    /// What a node said last instead of an answer, until one answers.
    refusal: Option<String>,
    /// Whether any node has ever answered, if only by a refusal.
    is_reached: bool,
}

impl Nodes {
    pub(crate) fn new(connect: Arc<dyn Connect>, addresses: Vec<String>) -> Result<Nodes, ClientError> {
        let mut channels = BTreeMap::new();
        for address in &addresses {
            let wrong = |message| ClientError::InvalidArgument { field: "addresses".into(), message };
            let port = address.rsplit_once(':').and_then(|(_, port)| port.parse::<u16>().ok());
            if port.is_none() {
                return Err(wrong(format!("{address:?} is no host:port")));
            }
            let channel = connect
                .channel(address)
                .map_err(|error| wrong(format!("{address:?} is no host:port: {error}")))?;
            channels.insert(address.clone(), channel);
        }
        let Some(preferred) = addresses.first().cloned() else {
            let message = "at least one address is needed".into();
            return Err(ClientError::InvalidArgument { field: "addresses".into(), message });
        };
        Ok(Nodes {
            connect,
            addresses,
            state: Mutex::new(State {
                channels,
                preferred,
                out_of_reach: BTreeMap::new(),
                unreached: BTreeMap::new(),
                refusal: None,
                is_reached: false,
            }),
        })
    }

    pub(crate) fn addresses(&self) -> &[String] {
        &self.addresses
    }

    /// The node to ask first.
    pub(crate) fn preferred(&self) -> String {
        self.lock().preferred.clone()
    }

    /// The node to ask after `asked` gave no answer. Other calls follow, unless they have moved on by themselves.
    pub(crate) fn next(&self, asked: &str, place: Place) -> String {
        let failed = place == Place::Other;
        let next = match place {
            Place::Same => return asked.to_owned(),
            Place::Leader(leader) if leader != asked && self.is_in_reach(&leader) => leader,
            Place::Leader(_) | Place::Other => self.neighbour(asked),
        };
        let mut state = self.lock();
        if failed && !self.addresses.iter().any(|address| address == asked) {
            state.out_of_reach.insert(asked.to_owned(), Instant::now());
        }
        if state.preferred == asked {
            state.preferred.clone_from(&next);
        }
        next
    }

    /// Takes note of how a try went at a node. None: it answered.
    pub(crate) fn note(&self, asked: &str, failure: Option<&Failure>) {
        let mut state = self.lock();
        if let Some(Failure::Unreached(why)) = failure {
            state.unreached.insert(asked.to_owned(), why.clone());
            return;
        }
        state.unreached.remove(asked);
        state.is_reached |= !matches!(failure, Some(Failure::Lost(_)));
        state.refusal = match failure {
            None | Some(Failure::Final(_)) => None,
            Some(Failure::Refused { error, .. }) => Some(error.to_string()),
            Some(Failure::Lost(message)) => Some(message.clone()),
            Some(Failure::Unreached(_)) => unreachable!("it was told above"),
        };
    }

    /// Whether any node has ever answered, if only by a refusal.
    pub(crate) fn is_reached(&self) -> bool {
        self.lock().is_reached
    }

    /// Why no call succeeds, as far as is known: what a node said last, or else to which nodes there is no connection.
    pub(crate) fn trouble(&self) -> Option<String> {
        let refusal = self.lock().refusal.clone();
        refusal.or_else(|| self.unreached())
    }

    /// The nodes to which there was no connection when they were last asked, with the reasons, if there are any.
    pub(crate) fn unreached(&self) -> Option<String> {
        let state = self.lock();
        let told: Vec<String> =
            state.unreached.iter().map(|(address, why)| format!("{address} ({why})")).collect();
        (!told.is_empty()).then(|| format!("no connection to {}", told.join(", ")))
    }

    /// The error of a call that reached nobody.
    pub(crate) fn nobody(&self) -> ClientError {
        let message = self.unreached().unwrap_or_else(|| "time ran out before any try".to_owned());
        ClientError::Unavailable { message }
    }

    /// Whether a leader that was named may be gone to.
    fn is_in_reach(&self, leader: &str) -> bool {
        let failed = self.lock().out_of_reach.get(leader).copied();
        failed.is_none_or(|failed| failed.elapsed() > OUT_OF_REACH) && self.channel(leader).is_ok()
    }

    /// A channel to the node at an address.
    pub(crate) fn channel(&self, address: &str) -> Result<Channel, ClientError> {
        let mut state = self.lock();
        if let Some(channel) = state.channels.get(address) {
            return Ok(channel.clone());
        }
        let refused = |message: String| ClientError::Unavailable { message };
        if state.channels.len() >= self.addresses.len() + HINTED_MAX {
            return Err(refused(format!("too many leaders were named to go to {address}")));
        }
        let channel =
            self.connect.channel(address).map_err(|error| refused(format!("{address:?}: {error}")))?;
        state.channels.insert(address.to_owned(), channel.clone());
        Ok(channel)
    }

    fn neighbour(&self, asked: &str) -> String {
        let place = self.addresses.iter().position(|address| address == asked);
        let next = place.map_or(0, |place| (place + 1) % self.addresses.len());
        self.addresses[next].clone()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("nothing panics while it holds this lock")
    }
}

#[cfg(test)]
mod tests {
    use verdict_proto::connect::InProcess;

    use super::*;

    #[tokio::test]
    async fn an_address_has_a_port() {
        for wrong in ["", "host", "host:", "host:http", "host:99999", "a b:1"] {
            let nodes = Nodes::new(Arc::new(InProcess::default()), vec![wrong.to_owned()]);
            let told = nodes.unwrap_err().to_string();
            assert!(told.starts_with(&format!("addresses: {wrong:?} is no host:port")), "{told}");
        }
        assert!(Nodes::new(Arc::new(InProcess::default()), vec!["[::1]:7400".to_owned()]).is_ok());
    }

    #[tokio::test]
    async fn a_named_leader_that_is_out_of_reach_is_not_gone_to_again() {
        let nodes = Nodes::new(Arc::new(InProcess::default()), vec!["a:1".into(), "b:2".into()]).unwrap();
        let inside = || Place::Leader("inside:1".into());
        assert_eq!(nodes.next("a:1", inside()), "inside:1");
        assert_eq!(nodes.next("inside:1", Place::Other), "a:1");
        assert_eq!(nodes.preferred(), "a:1");
        assert_eq!(nodes.next("a:1", inside()), "b:2", "it was not there a moment ago");
        assert_eq!(nodes.next("b:2", Place::Other), "a:1");
        assert_eq!(
            nodes.next("a:1", Place::Leader("b:2".into())),
            "b:2",
            "an address that was given always counts"
        );
        nodes.lock().out_of_reach.clear();
        assert_eq!(nodes.next("b:2", inside()), "inside:1");
    }
}
