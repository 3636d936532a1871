//! PostgreSQL as a user would do it: an instance for each shard, two-phase commit between them by PREPARE TRANSACTION, and a
//! decision row that is durable before anything is committed. Optionally each instance has a synchronous standby.
//!
//! Nothing that makes an answer durable is switched off: `fsync`, `full_page_writes` and `synchronous_commit` are as delivered,
//! and looked at before the run. What is set is what anybody sets: memory, connections, room for the log.

mod client;
mod instance;

use std::{path::Path, time::Duration};

use anyhow::Context as _;

pub use self::client::TwoPhase;
use self::instance::{Binaries, Instance};
use crate::{
    process::{Servers, User, free_ports},
    trade::{ASSETS, INITIAL_BALANCE, Load, SHARDS},
};

/// How long a standby may take to have what its primary has.
const STANDBY_PATIENCE: Duration = Duration::from_secs(30);

/// Two instances, and their standbys.
#[derive(Debug)]
pub struct Postgres {
    primaries: Vec<Instance>,
    standbys: Vec<Instance>,
    users: u64,
}

/// Where the programs are, and who runs them.
#[derive(Clone, Debug)]
pub struct Installation {
    binaries: Binaries,
    user: User,
}

impl Installation {
    /// Looks for PostgreSQL; `folder` is where its programs are, if not where Debian puts them.
    pub async fn find(folder: Option<&Path>) -> anyhow::Result<Installation> {
        let binaries = Binaries::find(folder)?;
        // PostgreSQL refuses to run as root.
        let user = match rustix::process::geteuid().is_root() {
            true => User::look_up("postgres").await.context("find somebody to run PostgreSQL as")?,
            false => User::Same,
        };
        Ok(Installation { binaries, user })
    }

    /// "PostgreSQL 15.18" or the like.
    pub async fn version(&self) -> anyhow::Result<String> {
        self.binaries.version().await
    }
}

impl Postgres {
    /// Makes, starts and fills the instances in `folder`.
    pub async fn start(
        installation: &Installation,
        servers: &mut Servers,
        folder: &Path,
        users: u64,
        with_standbys: bool,
    ) -> anyhow::Result<Postgres> {
        let Installation { binaries, user } = installation;
        user.make_folder(folder)?;
        let ports = free_ports(SHARDS as usize * 2)?;
        let mut primaries = Vec::new();
        for (shard, port) in (0..SHARDS).zip(&ports) {
            let instance = Instance::new(&format!("primary-{shard}"), folder, *port);
            instance.make(binaries, user).await?;
            instance.start(binaries, user, servers).await?;
            instance.fill(shard, users).await?;
            primaries.push(instance);
        }
        let mut standbys = Vec::new();
        if with_standbys {
            for (primary, port) in primaries.iter().zip(ports.iter().skip(SHARDS as usize)) {
                let standby = Instance::new(&format!("standby-of-{}", primary.name()), folder, *port);
                standby.copy(primary, binaries, user).await?;
                standby.start(binaries, user, servers).await?;
                primary.wait_for_standby().await?;
                standbys.push(standby);
            }
        }
        for primary in &primaries {
            primary.check_durable(with_standbys).await?;
        }
        Ok(Postgres { primaries, standbys, users })
    }

    /// Clients for a load.
    pub async fn clients(&self, count: usize, load: Load) -> anyhow::Result<Vec<TwoPhase>> {
        let mut clients = Vec::with_capacity(count);
        for _ in 0..count {
            clients.push(TwoPhase::connect(&self.primaries, load).await?);
        }
        Ok(clients)
    }

    /// Writes out what waits in memory, so that a case doesn't pay for the one before.
    pub async fn settle_down(&self) -> anyhow::Result<()> {
        for primary in &self.primaries {
            primary.checkpoint().await?;
        }
        Ok(())
    }

    /// Whether what was answered is there, once, and no money was made or lost; on the standbys too.
    pub async fn check(&self, answered: u64) -> anyhow::Result<()> {
        let mut sums = [0_i128; ASSETS.len()];
        let (mut trades, mut decisions) = (0, 0);
        for primary in &self.primaries {
            let holdings = primary.holdings().await?;
            anyhow::ensure!(holdings.prepared == 0, "{} transactions are left prepared", holdings.prepared);
            for (sum, held) in sums.iter_mut().zip(holdings.sums) {
                *sum += i128::from(held);
            }
            trades += holdings.trades;
            decisions += holdings.decisions;
        }
        let initial = i128::from(INITIAL_BALANCE) * i128::from(self.users);
        anyhow::ensure!(sums == [initial; ASSETS.len()], "the balances add up to {sums:?}, not {initial}");
        anyhow::ensure!(trades == answered, "{answered} trades were answered, {trades} are recorded");
        anyhow::ensure!(decisions == answered, "{answered} trades were answered, {decisions} are decided");
        for (primary, standby) in self.primaries.iter().zip(&self.standbys) {
            primary.check_durable(true).await?;
            let wanted = primary.holdings().await?;
            let check = async {
                while standby.holdings().await? != wanted {
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
                anyhow::Ok(())
            };
            tokio::time::timeout(STANDBY_PATIENCE, check)
                .await
                .with_context(|| format!("{} doesn't hold what its primary holds", standby.name()))??;
        }
        Ok(())
    }
}
