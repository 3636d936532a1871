//! One instance of PostgreSQL on a loopback port.

use std::{
    fs::{self, OpenOptions},
    io::Write as _,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::Context as _;
use rustix::process::Signal;
use tokio::process::Command;
use tokio_postgres::{Client, NoTls};

use crate::{
    process::{Servers, User, run_to_end},
    trade::{ASSETS, INITIAL_BALANCE, SHARDS},
};

/// Where Debian and Ubuntu put the programs, below the version.
const DEBIAN: &str = "/usr/lib/postgresql";
/// The user inside the instances.
const ROLE: &str = "peers";
/// How a standby is called.
const STANDBY: &str = "standby";
/// How long a step of making an instance may take.
const STEP_TIMEOUT: Duration = Duration::from_secs(120);
/// How long a start may take.
const START_TIMEOUT: Duration = Duration::from_secs(60);
/// What is set. Memory, room and connections as for a server of its own; nothing that makes an answer less durable.
const SETTINGS: &str = "
listen_addresses = '127.0.0.1'
unix_socket_directories = ''
max_connections = 300
max_prepared_transactions = 300
shared_buffers = 512MB
wal_buffers = 16MB
max_wal_size = 8GB
min_wal_size = 1GB
checkpoint_timeout = 15min
wal_level = replica
wal_keep_size = 1GB
max_wal_senders = 4
jit = off
log_checkpoints = off
log_min_messages = warning
log_min_error_statement = panic
";

/// The programs of PostgreSQL.
#[derive(Clone, Debug)]
pub struct Binaries(PathBuf);

/// One instance.
#[derive(Debug)]
pub struct Instance {
    name: String,
    data: PathBuf,
    log: PathBuf,
    port: u16,
}

/// What an instance holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holdings {
    /// The sum of all balances, for each asset.
    pub sums: [i64; ASSETS.len()],
    /// Records of trades.
    pub trades: u64,
    /// Decision rows.
    pub decisions: u64,
    /// Transactions that are prepared and not finished.
    pub prepared: u64,
}

impl Binaries {
    /// The programs in `folder`, or those of the newest version that a package installed.
    pub fn find(folder: Option<&Path>) -> anyhow::Result<Binaries> {
        let found = match folder {
            Some(folder) => Some(folder.to_owned()),
            None => newest_version(Path::new(DEBIAN)),
        };
        let missing = "PostgreSQL's server programs are missing: install the package `postgresql`";
        let folder = found.context(missing)?;
        for program in ["postgres", "initdb", "pg_basebackup"] {
            let file = folder.join(program);
            anyhow::ensure!(file.is_file(), "{missing} ({} isn't there)", file.display());
        }
        Ok(Binaries(folder))
    }

    /// The name and the version.
    pub async fn version(&self) -> anyhow::Result<String> {
        let out = Command::new(self.program("postgres")).arg("--version").output().await;
        let out = out.context("ask PostgreSQL for its version")?;
        let text = String::from_utf8_lossy(&out.stdout);
        let version = text.split_whitespace().nth(2).context("understand PostgreSQL's version")?;
        Ok(format!("PostgreSQL {version}"))
    }

    fn program(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

fn newest_version(folder: &Path) -> Option<PathBuf> {
    let entries = fs::read_dir(folder).ok()?;
    let versions = entries.filter_map(|entry| {
        let path = entry.ok()?.path();
        let version: u32 = path.file_name()?.to_str()?.parse().ok()?;
        let programs = path.join("bin");
        programs.join("postgres").is_file().then_some((version, programs))
    });
    versions.max().map(|(_, programs)| programs)
}

impl Instance {
    /// An instance that is to be below `folder`. Nothing is done yet.
    pub fn new(name: &str, folder: &Path, port: u16) -> Instance {
        let (data, log) = (folder.join(name), folder.join(format!("{name}.log")));
        Instance { name: name.to_owned(), data, log, port }
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Makes an empty database.
    pub async fn make(&self, binaries: &Binaries, user: &User) -> anyhow::Result<()> {
        let mut command = user.command(&binaries.program("initdb"), "KILL");
        command.current_dir("/").arg("--pgdata").arg(&self.data);
        command.args(["--username", ROLE, "--auth", "trust", "--encoding", "UTF8", "--locale", "C"]);
        run_to_end("initdb", command, STEP_TIMEOUT).await?;
        let file = self.data.join("postgresql.conf");
        let mut config = OpenOptions::new().append(true).open(&file).context("open the configuration")?;
        config.write_all(SETTINGS.as_bytes()).context("write the configuration")
    }

    /// Copies a primary, to follow it.
    pub async fn copy(&self, primary: &Instance, binaries: &Binaries, user: &User) -> anyhow::Result<()> {
        let mut command = user.command(&binaries.program("pg_basebackup"), "KILL");
        command.current_dir("/").arg("--pgdata").arg(&self.data);
        command.args(["--write-recovery-conf", "--wal-method", "stream", "--checkpoint", "fast", "--dbname"]);
        command.arg(format!("{} application_name={STANDBY}", primary.address()));
        run_to_end("pg_basebackup", command, STEP_TIMEOUT).await
    }

    /// Starts it, and waits until it answers.
    pub async fn start(&self, binaries: &Binaries, user: &User, servers: &mut Servers) -> anyhow::Result<()> {
        let mut command = user.command(&binaries.program("postgres"), "QUIT");
        command.current_dir("/").arg("-D").arg(&self.data).args(["-p", &self.port.to_string()]);
        // SIGQUIT ends all of its processes at once; nothing here is needed any more.
        servers.start(&format!("PostgreSQL's {}", self.name), command, self.log.clone(), Signal::QUIT)?;
        let until = Instant::now() + START_TIMEOUT;
        loop {
            servers.check_running()?;
            match self.connect().await {
                Ok(_) => return Ok(()),
                Err(error) if Instant::now() > until => return Err(error.context("wait for the start")),
                Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
            }
        }
    }

    /// A connection.
    pub async fn connect(&self) -> anyhow::Result<Client> {
        let connected = tokio_postgres::connect(&self.address(), NoTls).await;
        let (client, connection) = connected.with_context(|| format!("connect to {}", self.name))?;
        // It ends when the client is dropped; errors come to the client too.
        tokio::spawn(connection);
        Ok(client)
    }

    /// Makes the tables, and the balances of the users of this shard.
    pub async fn fill(&self, shard: u64, users: u64) -> anyhow::Result<()> {
        let assets = ASSETS.len() - 1;
        let sql = format!(
            "CREATE TABLE balances (
                 owner bigint, asset bigint, balance bigint NOT NULL CHECK (balance >= 0),
                 PRIMARY KEY (owner, asset)) WITH (fillfactor = 50);
             CREATE TABLE trades (id bigint PRIMARY KEY, record text NOT NULL);
             CREATE TABLE decisions (id bigint PRIMARY KEY);
             INSERT INTO balances SELECT owner, asset, {INITIAL_BALANCE}
                 FROM generate_series({shard}::bigint, {users} - 1, {SHARDS}) owner,
                      generate_series(0::bigint, {assets}) asset;"
        );
        let client = self.connect().await?;
        client.batch_execute(&sql).await.context("make the tables")?;
        // A vacuum can't stand in one message with others.
        client.batch_execute("VACUUM ANALYZE balances").await.context("vacuum")?;
        self.checkpoint().await
    }

    /// Writes out all changed pages.
    pub async fn checkpoint(&self) -> anyhow::Result<()> {
        self.connect().await?.batch_execute("CHECKPOINT").await.context("checkpoint")
    }

    /// Has the primary wait for its standby from now on, and waits until it does.
    pub async fn wait_for_standby(&self) -> anyhow::Result<()> {
        let client = self.connect().await?;
        let set = format!("ALTER SYSTEM SET synchronous_standby_names = '{STANDBY}'");
        client.batch_execute(&set).await.context("name the standby")?;
        client.batch_execute("SELECT pg_reload_conf()").await.context("reload the configuration")?;
        let until = Instant::now() + START_TIMEOUT;
        while !has_standby(&client).await? {
            anyhow::ensure!(Instant::now() < until, "{} has no synchronous standby", self.name);
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        Ok(())
    }

    /// Fails if what it answers isn't durable, or its standby doesn't follow.
    pub async fn check_durable(&self, with_standby: bool) -> anyhow::Result<()> {
        let client = self.connect().await?;
        for setting in ["fsync", "synchronous_commit", "full_page_writes"] {
            let row = client.query_one(&format!("SHOW {setting}"), &[]).await.context("read a setting")?;
            let value: &str = row.try_get(0).context("read a setting")?;
            anyhow::ensure!(value == "on", "{}: {setting} is {value}", self.name);
        }
        if with_standby {
            anyhow::ensure!(has_standby(&client).await?, "{} has no synchronous standby", self.name);
        }
        Ok(())
    }

    /// What it holds.
    pub async fn holdings(&self) -> anyhow::Result<Holdings> {
        let client = self.connect().await?;
        let number = async |sql: &str| -> anyhow::Result<i64> {
            let row =
                client.query_one(sql, &[]).await.with_context(|| format!("ask {}: {sql}", self.name))?;
            row.try_get(0).context("read a number")
        };
        let mut sums = [0; ASSETS.len()];
        for (asset, sum) in sums.iter_mut().enumerate() {
            let sql = format!("SELECT sum(balance)::bigint FROM balances WHERE asset = {asset}");
            *sum = number(&sql).await?;
        }
        let count = async |table: &str| -> anyhow::Result<u64> {
            let count = number(&format!("SELECT count(*) FROM {table}")).await?;
            u64::try_from(count).context("count rows")
        };
        Ok(Holdings {
            sums,
            trades: count("trades").await?,
            decisions: count("decisions").await?,
            prepared: count("pg_prepared_xacts").await?,
        })
    }

    fn address(&self) -> String {
        format!("host=127.0.0.1 port={} user={ROLE} dbname=postgres", self.port)
    }
}

async fn has_standby(client: &Client) -> anyhow::Result<bool> {
    let sql = "SELECT count(*) FROM pg_stat_replication WHERE sync_state = 'sync' AND state = 'streaming'";
    let row = client.query_one(sql, &[]).await.context("ask for the standby")?;
    Ok(row.try_get::<_, i64>(0).context("ask for the standby")? == 1)
}
