//! The floor: what the machine itself needs for the synced rounds and the round trips of one batch.
//!
//! A batch that is alone is on its way for four round trips: client and coordinator, coordinator and shard, and in each of the two
//! groups the leader and a follower. On two of them something is synced to disk, first the vote, then the decision. What the
//! leader of a group syncs meanwhile takes no time of its own.
//!
//! A batch on one shard is committed by that shard, and the coordinators record it in passing. So the round of their group falls away: one
//! synced round, and three round trips.

use std::{
    fs::File,
    io::Write as _,
    path::Path,
    thread,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use hdrhistogram::Histogram;
use serde::Serialize;
use tonic::Request;
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};
use verdict_proto::connect::{Connect as _, Tcp};

use super::tally::histogram;

/// What is appended and synced, in bytes.
const APPENDED: usize = 4096;
/// How long each of the three is measured.
const SPAN: Duration = Duration::from_millis(1000);
/// A round trip or a sync may take so long.
const TIMEOUT: Duration = Duration::from_secs(5);
/// Files that are synced side by side, as three replicas on one disk do.
const REPLICAS: usize = 3;
/// The rounds of a batch that is alone.
pub const SYNCED_ROUNDS: f64 = 2.0;
/// Its round trips.
pub const ROUND_TRIPS: f64 = 4.0;
/// The rounds of a batch on one shard.
pub const ONE_SHARD_SYNCED_ROUNDS: f64 = 1.0;
/// Its round trips.
pub const ONE_SHARD_ROUND_TRIPS: f64 = 3.0;

/// The floor, in milliseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Floor {
    /// The median of fdatasync after appending 4 KiB, alone on the disk.
    pub fdatasync_p50_ms: f64,
    /// The same, of three files that are synced side by side.
    pub fdatasync_of_three_p50_ms: f64,
    /// The median of a unary call that does nothing.
    pub round_trip_p50_ms: f64,
    /// Synced rounds of a batch that is alone.
    pub synced_rounds: f64,
    /// Round trips of a batch that is alone.
    pub round_trips: f64,
    /// What they take together.
    pub floor_ms: f64,
    /// The same of a batch on one shard: synced rounds...
    pub one_shard_synced_rounds: f64,
    /// ...round trips...
    pub one_shard_round_trips: f64,
    /// ...and together.
    pub one_shard_floor_ms: f64,
}

impl Floor {
    fn new(sync_ms: f64, of_three_ms: f64, round_trip_ms: f64) -> Floor {
        Floor {
            fdatasync_p50_ms: sync_ms,
            fdatasync_of_three_p50_ms: of_three_ms,
            round_trip_p50_ms: round_trip_ms,
            synced_rounds: SYNCED_ROUNDS,
            round_trips: ROUND_TRIPS,
            floor_ms: SYNCED_ROUNDS * sync_ms + ROUND_TRIPS * round_trip_ms,
            one_shard_synced_rounds: ONE_SHARD_SYNCED_ROUNDS,
            one_shard_round_trips: ONE_SHARD_ROUND_TRIPS,
            one_shard_floor_ms: ONE_SHARD_SYNCED_ROUNDS * sync_ms + ONE_SHARD_ROUND_TRIPS * round_trip_ms,
        }
    }

    /// That of a batch on several shards, or on one.
    pub fn of(&self, is_on_one_shard: bool) -> f64 {
        if is_on_one_shard { self.one_shard_floor_ms } else { self.floor_ms }
    }

    /// Measures it: on the disk of a folder, and with a node that has nothing else to do.
    pub async fn measure(folder: &Path, address: &str) -> anyhow::Result<Floor> {
        let (folder, address) = (folder.to_owned(), address.to_owned());
        let measure = move || -> anyhow::Result<Floor> {
            let alone = p50_ms(&syncs(&folder.join("floor-0"))?);
            let paths: Vec<_> = (0..REPLICAS).map(|place| folder.join(format!("floor-{place}"))).collect();
            let threads: Vec<_> = paths.into_iter().map(|path| thread::spawn(move || syncs(&path))).collect();
            let mut of_three = histogram();
            for thread in threads {
                of_three += thread.join().map_err(|_| anyhow::anyhow!("a thread has panicked"))??;
            }
            Ok(Floor::new(alone, p50_ms(&of_three), p50_ms(&round_trips(&address)?)))
        };
        tokio::task::spawn_blocking(measure).await.context("measure the floor")?
    }
}

/// How long it takes to append and sync, in microseconds. The file is removed in the end.
fn syncs(path: &Path) -> anyhow::Result<Histogram<u64>> {
    let measure = || -> std::io::Result<Histogram<u64>> {
        let mut file = File::create(path)?;
        let (bytes, began, mut found) = ([7; APPENDED], Instant::now(), histogram());
        while began.elapsed() < SPAN {
            file.write_all(&bytes)?;
            let before = Instant::now();
            file.sync_data()?;
            found.saturating_record(before.elapsed().as_micros() as u64);
        }
        std::fs::remove_file(path)?;
        Ok(found)
    };
    measure().with_context(|| format!("write and sync {}", path.display()))
}

/// How long a call takes that does nothing, in microseconds.
fn round_trips(address: &str) -> anyhow::Result<Histogram<u64>> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.context("start a runtime")?.block_on(async {
        let channel = Tcp.channel(address).with_context(|| format!("{address} is no host:port"))?;
        let (mut client, mut found) = (HealthClient::new(channel), histogram());
        // The first ones open the connection and warm it up.
        let mut call = async || -> anyhow::Result<u64> {
            let before = Instant::now();
            let check = client.check(Request::new(HealthCheckRequest::default()));
            tokio::time::timeout(TIMEOUT, check)
                .await
                .context("it doesn't answer")?
                .context("ask for its health")?;
            Ok(before.elapsed().as_micros() as u64)
        };
        let began = Instant::now();
        while began.elapsed() < SPAN / 4 {
            call().await?;
        }
        let began = Instant::now();
        while began.elapsed() < SPAN {
            found.saturating_record(call().await?);
        }
        anyhow::Ok(found)
    })
}

fn p50_ms(found: &Histogram<u64>) -> f64 {
    found.value_at_quantile(0.5) as f64 / 1000.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_floor_is_two_syncs_and_four_round_trips_and_on_one_shard_less() {
        let floor = Floor::new(0.2, 0.35, 0.1);
        assert!((floor.of(false) - 0.8).abs() < 1e-9, "{floor:?}");
        assert!((floor.of(true) - 0.5).abs() < 1e-9, "{floor:?}");
    }

    #[test]
    fn syncs_are_measured_and_leave_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let found = syncs(&folder.path().join("f")).unwrap();
        assert!(found.len() > 1 && p50_ms(&found) > 0.0);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
        let told = syncs(&folder.path().join("no/such")).unwrap_err().to_string();
        assert!(told.contains("no/such"), "{told}");
    }
}
