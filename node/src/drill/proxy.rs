//! The network between the nodes of a drill's own cluster: every connection goes through a relay, which can drop what goes one
//! way or the other, and can make it slow.
//!
//! - Each node has one public address, at which the relay listens. Who connects is told by the address from which it comes
//!   (`connect_from` of the node's configuration); everybody else is a client, and is never cut off.
//! - A cut link drops without a word: bytes are not delivered, connections are not closed, new ones hang. What was sent meanwhile
//!   arrives after the cut is mended, as TCP would send it again.
//! - A slow link delivers each piece so much later; its throughput stays.

use std::{
    collections::BTreeMap,
    net::IpAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{
        TcpListener, TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::{mpsc, watch},
    task::JoinHandle,
};

use crate::processes::{Addresses, source_address};

/// The largest piece that is relayed at once.
const PIECE_BYTES: usize = 64 << 10;
/// Pieces on their way in one direction of one connection.
const PIECES_MAX: usize = 256;

/// Everybody who is no node.
pub const CLIENT: u64 = 0;

/// One direction between two nodes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Link {
    /// Nothing arrives.
    pub cut: bool,
    /// So much later.
    pub delay: Duration,
}

/// All directions, as (from, to).
type Links = Arc<BTreeMap<(u64, u64), watch::Sender<Link>>>;

/// The network. Ends when it is dropped.
#[derive(Debug)]
pub struct Network {
    links: Links,
    listeners: Vec<JoinHandle<()>>,
}

impl Network {
    /// Starts the relays of these nodes.
    pub async fn start(nodes: &[(u64, Addresses)]) -> anyhow::Result<Network> {
        let ids: Vec<u64> = std::iter::once(CLIENT).chain(nodes.iter().map(|(node, _)| *node)).collect();
        let pairs = ids.iter().flat_map(|from| ids.iter().map(move |to| (*from, *to)));
        let links: Links = Arc::new(pairs.map(|pair| (pair, watch::Sender::default())).collect());
        let mut sources: BTreeMap<IpAddr, u64> = BTreeMap::new();
        for (node, _) in nodes {
            sources.insert(source_address(*node).parse().context("make an address")?, *node);
        }
        let sources = Arc::new(sources);
        let mut listeners = Vec::new();
        for (node, addresses) in nodes {
            let listener = TcpListener::bind(&addresses.public).await.with_context(|| {
                format!("listen on {} (all of 127.0.0.0/8 must be this machine)", addresses.public)
            })?;
            let (links, sources, target) = (links.clone(), sources.clone(), addresses.listen.clone());
            listeners.push(tokio::spawn(accept(listener, *node, target, links, sources)));
        }
        Ok(Network { links, listeners })
    }

    /// Changes the links of which `which` says so, by (from, to). Links of clients stay as they are.
    pub fn change(&self, which: impl Fn(u64, u64) -> bool, change: impl Fn(&mut Link)) {
        for ((from, to), link) in self.links.iter() {
            if *from != CLIENT && *to != CLIENT && from != to && which(*from, *to) {
                link.send_modify(&change);
            }
        }
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        for listener in &self.listeners {
            listener.abort();
        }
    }
}

async fn accept(
    listener: TcpListener,
    node: u64,
    target: String,
    links: Links,
    sources: Arc<BTreeMap<IpAddr, u64>>,
) {
    loop {
        let Ok((stream, from)) = listener.accept().await else {
            // Too many open files, say: there may be room again soon.
            tokio::time::sleep(Duration::from_millis(20)).await;
            continue;
        };
        let from = sources.get(&from.ip()).copied().unwrap_or(CLIENT);
        let there = links[&(from, node)].subscribe();
        let back = links[&(node, from)].subscribe();
        let target = target.clone();
        tokio::spawn(async move {
            // An end with an error is an end.
            let _ = relay(stream, target, there, back).await;
        });
    }
}

async fn relay(
    stream: TcpStream,
    target: String,
    mut there: watch::Receiver<Link>,
    mut back: watch::Receiver<Link>,
) -> std::io::Result<()> {
    // To open a connection takes both ways.
    whole(&mut there).await;
    whole(&mut back).await;
    let server = TcpStream::connect(target).await?;
    for stream in [&stream, &server] {
        stream.set_nodelay(true)?;
    }
    let (from_client, to_client) = stream.into_split();
    let (from_server, to_server) = server.into_split();
    tokio::join!(pump(from_client, to_server, there), pump(from_server, to_client, back));
    Ok(())
}

/// Carries what comes in one direction. The end of it is carried too, like all else.
async fn pump(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, link: watch::Receiver<Link>) {
    let (sender, mut pieces) = mpsc::channel::<(Instant, Vec<u8>)>(PIECES_MAX);
    let (mut reading, mut writing) = (link.clone(), link);
    let read = async move {
        loop {
            whole(&mut reading).await;
            let mut piece = vec![0; PIECE_BYTES];
            let count = from.read(&mut piece).await.unwrap_or(0);
            if count == 0 {
                break;
            }
            piece.truncate(count);
            let due = Instant::now() + reading.borrow().delay;
            if sender.send((due, piece)).await.is_err() {
                break;
            }
        }
    };
    let write = async move {
        while let Some((due, piece)) = pieces.recv().await {
            tokio::time::sleep_until(due.into()).await;
            whole(&mut writing).await;
            if to.write_all(&piece).await.is_err() {
                break;
            }
        }
        whole(&mut writing).await;
        // The other side may have gone already.
        let _ = to.shutdown().await;
    };
    tokio::join!(read, write);
}

/// Waits until a link isn't cut.
async fn whole(link: &mut watch::Receiver<Link>) {
    // The network has gone: nothing is cut any more.
    let _ = link.wait_for(|link| !link.cut).await;
}

#[cfg(test)]
mod tests {
    use tokio::net::TcpSocket;

    use super::*;

    const PATIENCE: Duration = Duration::from_millis(300);

    /// A node that sends back what it gets, and its relay.
    async fn echo() -> (Network, String) {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let listen = listener.local_addr().unwrap().to_string();
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                tokio::spawn(async move {
                    let (mut from, mut to) = stream.split();
                    let _ = tokio::io::copy(&mut from, &mut to).await;
                });
            }
        });
        let free = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
        let public = free.local_addr().unwrap().to_string();
        drop(free);
        let other = Addresses { listen: listen.clone(), public: "127.0.0.1:0".into() };
        let nodes = [(1, Addresses { listen, public: public.clone() }), (2, other)];
        (Network::start(&nodes).await.unwrap(), public)
    }

    async fn connect_as(node: u64, to: &str) -> TcpStream {
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind(format!("{}:0", source_address(node)).parse().unwrap()).unwrap();
        socket.connect(to.parse().unwrap()).await.unwrap()
    }

    async fn say(stream: &mut TcpStream, text: &[u8; 4]) -> Option<[u8; 4]> {
        stream.write_all(text).await.unwrap();
        hear(stream).await
    }

    async fn hear(stream: &mut TcpStream) -> Option<[u8; 4]> {
        let mut answer = [0; 4];
        let heard = tokio::time::timeout(PATIENCE, stream.read_exact(&mut answer)).await;
        heard.ok().map(|read| read.map(|_| answer).unwrap())
    }

    #[tokio::test]
    async fn a_cut_link_drops_without_a_word_and_what_was_sent_arrives_when_it_is_mended() {
        let (network, public) = echo().await;
        let mut stream = connect_as(2, &public).await;
        assert_eq!(say(&mut stream, b"well").await, Some(*b"well"));
        // Only what node 2 sends to node 1.
        network.change(|from, _| from == 2, |link| link.cut = true);
        assert_eq!(say(&mut stream, b"lost").await, None);
        let mut fresh = connect_as(2, &public).await;
        assert_eq!(say(&mut fresh, b"hang").await, None);
        // Clients are not concerned.
        let mut client = connect_as(77, &public).await;
        assert_eq!(say(&mut client, b"open").await, Some(*b"open"));
        network.change(|_, _| true, |link| link.cut = false);
        assert_eq!((hear(&mut stream).await, hear(&mut fresh).await), (Some(*b"lost"), Some(*b"hang")));
    }

    #[tokio::test]
    async fn answers_are_dropped_if_only_the_way_back_is_cut() {
        let (network, public) = echo().await;
        let mut stream = connect_as(2, &public).await;
        assert_eq!(say(&mut stream, b"well").await, Some(*b"well"));
        network.change(|from, to| (from, to) == (1, 2), |link| link.cut = true);
        assert_eq!(say(&mut stream, b"back").await, None);
        network.change(|_, _| true, |link| link.cut = false);
        assert_eq!(hear(&mut stream).await, Some(*b"back"));
    }

    #[tokio::test]
    async fn a_slow_link_delivers_later_each_way() {
        let (network, public) = echo().await;
        network.change(|_, _| true, |link| link.delay = Duration::from_millis(60));
        let mut stream = connect_as(2, &public).await;
        let began = Instant::now();
        assert_eq!(say(&mut stream, b"slow").await, Some(*b"slow"));
        assert!(began.elapsed() >= Duration::from_millis(120), "{:?}", began.elapsed());
    }
}
