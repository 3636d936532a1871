//! A way to a node on which replies get lost: what goes there arrives, but now and then the connection is cut in the moment in which
//! something comes back.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    task::JoinHandle,
};

use crate::random::Random;

/// The proxy of one node. Ends when it is dropped.
#[derive(Debug)]
pub struct Proxy {
    address: String,
    lost: Arc<AtomicU64>,
    task: JoinHandle<()>,
}

impl Proxy {
    /// Starts it. One of `loses_one_of` pieces that come back is lost, and the connection with it.
    pub async fn start(target: String, loses_one_of: u64, mut random: Random) -> Proxy {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("listen on a free port");
        let address = listener.local_addr().expect("a bound listener has an address").to_string();
        let lost = Arc::new(AtomicU64::new(0));
        let counter = lost.clone();
        let task = tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                tokio::spawn(relay(client, target.clone(), loses_one_of, random.split(), counter.clone()));
            }
        });
        Proxy { address, lost, task }
    }

    /// Where it listens.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// How many pieces were lost.
    pub fn lost(&self) -> u64 {
        self.lost.load(Ordering::Relaxed)
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn relay(
    client: TcpStream,
    target: String,
    loses_one_of: u64,
    mut random: Random,
    lost: Arc<AtomicU64>,
) {
    // A node that is down refuses; so the client's connection just ends.
    let Ok(server) = TcpStream::connect(target).await else { return };
    let (mut from_client, mut to_client) = client.into_split();
    let (mut from_server, mut to_server) = server.into_split();
    let there = async { tokio::io::copy(&mut from_client, &mut to_server).await.map(drop) };
    let back = async {
        let mut piece = vec![0; 16 << 10];
        loop {
            let count = from_server.read(&mut piece).await?;
            if count == 0 {
                return Ok::<_, std::io::Error>(());
            }
            if random.below(loses_one_of) == 0 {
                lost.fetch_add(1, Ordering::Relaxed);
                return Ok(());
            }
            to_client.write_all(&piece[..count]).await?;
        }
    };
    // Whichever ends first ends both; an error is an end too.
    tokio::select! {
        _ = there => {}
        _ = back => {}
    }
}
