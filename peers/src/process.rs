//! The servers that this program starts. Only these are ever signalled, by their handles.
//!
//! They end with this program: in order at the end, on errors and when it is interrupted (`kill_on_drop` covers what is left),
//! and by the kernel's parent-death signal (`setpriv --pdeathsig`) if it is killed.

use std::{
    ffi::OsStr,
    fs::{self, File},
    io::{Read as _, Seek as _, SeekFrom},
    net::TcpListener,
    os::unix::fs::{PermissionsExt as _, chown},
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use anyhow::{Context as _, bail};
use rustix::process::{Pid, Signal, kill_process};
use tokio::process::{Child, Command};

/// Ports are looked for from here on, below those that systems hand out by themselves.
const PORTS: std::ops::Range<u16> = 20_000..30_000;
/// How long a server may take to end.
const STOP_TIMEOUT: Duration = Duration::from_secs(20);
/// So much of a log is shown if something goes wrong.
const LOG_TAIL_BYTES: u64 = 2000;

/// As whom something is run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum User {
    /// As this program.
    Same,
    /// As another one, which only root can.
    Other {
        /// Its name.
        name: String,
        /// Its number.
        uid: u32,
        /// The number of its group.
        gid: u32,
    },
}

/// All that runs.
#[derive(Debug, Default)]
pub struct Servers(Vec<Server>);

#[derive(Debug)]
struct Server {
    name: String,
    child: Child,
    log: PathBuf,
    stop: Signal,
}

impl User {
    /// The user of this name, looked up by `id`.
    pub async fn look_up(name: &str) -> anyhow::Result<User> {
        let number = async |flag| -> anyhow::Result<u32> {
            let out = Command::new("id").args([flag, name]).output().await.context("run `id`")?;
            let text = String::from_utf8_lossy(&out.stdout);
            text.trim().parse().with_context(|| format!("there is no user {name}"))
        };
        Ok(User::Other { name: name.to_owned(), uid: number("-u").await?, gid: number("-g").await? })
    }

    /// A command that runs `program` as this user and has it end by `on_death` when this program dies.
    pub fn command(&self, program: &Path, on_death: &str) -> Command {
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", on_death]);
        if let User::Other { name, .. } = self {
            command.args(["--reuid", name, "--regid", name, "--init-groups"]);
        }
        command.arg("--").arg(program);
        command
    }

    /// Makes a folder that belongs to this user, and can be passed by everybody.
    pub fn make_folder(&self, path: &Path) -> anyhow::Result<()> {
        fs::create_dir_all(path).with_context(|| format!("make {}", path.display()))?;
        fs::set_permissions(path, fs::Permissions::from_mode(0o711))
            .with_context(|| format!("open {} to others", path.display()))?;
        if let User::Other { uid, gid, .. } = self {
            chown(path, Some(*uid), Some(*gid)).with_context(|| format!("hand over {}", path.display()))?;
        }
        Ok(())
    }
}

impl Servers {
    /// Starts one. What it writes goes to `log`, `stop` ends it.
    pub fn start(
        &mut self,
        name: &str,
        mut command: Command,
        log: PathBuf,
        stop: Signal,
    ) -> anyhow::Result<()> {
        let out = File::create(&log).with_context(|| format!("make {}", log.display()))?;
        let child = command
            .stdin(Stdio::null())
            .stdout(out.try_clone().context("share the log")?)
            .stderr(out)
            .kill_on_drop(true)
            .spawn()
            .with_context(|| format!("start {name}"))?;
        self.0.push(Server { name: name.to_owned(), child, log, stop });
        Ok(())
    }

    /// Fails if one has ended by itself.
    pub fn check_running(&mut self) -> anyhow::Result<()> {
        for server in &mut self.0 {
            if let Some(status) = server.child.try_wait().context("look at a server")? {
                bail!("{} has ended by itself: {status}", server.name);
            }
        }
        Ok(())
    }

    /// Ends all, the last started first.
    pub async fn end(&mut self) {
        while let Some(mut server) = self.0.pop() {
            // It is a child that nobody has waited for: its id can't belong to another process.
            if let Some(id) = server.child.id().and_then(|id| Pid::from_raw(id as i32)) {
                let _ = kill_process(id, server.stop);
            }
            if tokio::time::timeout(STOP_TIMEOUT, server.child.wait()).await.is_err() {
                // It may end just now.
                let _ = server.child.kill().await;
            }
        }
    }

    /// The ends of the logs, for people who look for what went wrong.
    pub fn log_tails(&self) -> String {
        let mut text = String::new();
        for server in &self.0 {
            let tail = tail(&server.log).unwrap_or_default();
            if !tail.trim().is_empty() {
                text += &format!("--- the end of the log of {}\n{}\n", server.name, tail.trim_end());
            }
        }
        text
    }
}

/// Runs something to its end. What it says is the error if it fails, or takes longer than `timeout`.
pub async fn run_to_end(what: &str, mut command: Command, timeout: Duration) -> anyhow::Result<()> {
    let running = command.stdin(Stdio::null()).kill_on_drop(true).output();
    let out = tokio::time::timeout(timeout, running)
        .await
        .with_context(|| format!("{what} took more than {} s", timeout.as_secs()))?
        .with_context(|| format!("run {what}"))?;
    let from = out.stderr.len().saturating_sub(LOG_TAIL_BYTES as usize);
    let said = String::from_utf8_lossy(&out.stderr[from..]);
    anyhow::ensure!(out.status.success(), "{what} failed ({}): {}", out.status, said.trim());
    Ok(())
}

/// Ports of 127.0.0.1 that nobody uses.
pub fn free_ports(count: usize) -> anyhow::Result<Vec<u16>> {
    // Programs side by side begin at different places.
    let span = PORTS.end - PORTS.start;
    let offset = (std::process::id() as u16).wrapping_mul(31) % span;
    let ports = (0..span).map(|step| PORTS.start + (offset + step) % span);
    let free: Vec<u16> =
        ports.filter(|port| TcpListener::bind(("0.0.0.0", *port)).is_ok()).take(count).collect();
    anyhow::ensure!(free.len() == count, "there are no free ports from {} to {}", PORTS.start, PORTS.end);
    Ok(free)
}

/// The first of these programs that exists, looked for in `PATH` if it is a bare name.
pub fn find_program(names: &[&str]) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders: Vec<PathBuf> = std::env::split_paths(OsStr::new(&path)).collect();
    let places = names.iter().flat_map(|name| folders.iter().map(move |folder| folder.join(name)));
    places.into_iter().find(|file| file.is_file())
}

fn tail(path: &Path) -> std::io::Result<String> {
    let mut file = File::open(path)?;
    let size = file.metadata()?.len();
    file.seek(SeekFrom::Start(size.saturating_sub(LOG_TAIL_BYTES)))?;
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}
