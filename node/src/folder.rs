//! Where a cluster of this program's own keeps its data, and how such a run is interrupted.

use std::path::{Path, PathBuf};

use anyhow::Context as _;
use tokio::signal::unix::{SignalKind, signal};

/// Where the nodes keep their data.
#[derive(Debug)]
pub enum Folder {
    /// Removed in the end, unless something has failed.
    Temporary(tempfile::TempDir),
    /// Kept.
    Kept(PathBuf),
}

impl Folder {
    /// Makes it: at a given place, which must be empty, or a temporary one.
    pub fn make(given: Option<&Path>, keep: bool, prefix: &str) -> anyhow::Result<Folder> {
        if let Some(path) = given {
            std::fs::create_dir_all(path).with_context(|| format!("make {}", path.display()))?;
            let mut entries = std::fs::read_dir(path).with_context(|| format!("list {}", path.display()))?;
            anyhow::ensure!(
                entries.next().is_none(),
                "{} is not empty: a new cluster is needed",
                path.display()
            );
            let path = path.canonicalize().with_context(|| format!("find {}", path.display()))?;
            return Ok(Folder::Kept(path));
        }
        let folder = tempfile::Builder::new().prefix(prefix).tempdir().context("make a folder")?;
        Ok(if keep { Folder::Kept(folder.keep()) } else { Folder::Temporary(folder) })
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        match self {
            Folder::Temporary(folder) => folder.path(),
            Folder::Kept(path) => path,
        }
    }

    /// Keeps it for whoever looks for what went wrong.
    pub fn keep(self) {
        let path = match self {
            Folder::Temporary(folder) => folder.keep(),
            Folder::Kept(path) => path,
        };
        crate::err!("the nodes' data and logs are in {}", path.display());
    }

    /// Says where it is, if it stays.
    pub fn tell_if_kept(&self) {
        if let Folder::Kept(path) = self {
            crate::err!("the nodes' data and logs are in {}", path.display());
        }
    }
}

/// Waits until a person or the system asks this process to end, or nobody reads what it writes any more. Tells whether
/// somebody may still be reading.
pub async fn interrupted() -> bool {
    let ended = |kind| async move {
        match signal(kind) {
            Ok(mut signal) => {
                signal.recv().await;
            }
            // Without a handler the signal ends the process by itself.
            Err(_) => std::future::pending().await,
        }
    };
    tokio::select! {
        () = ended(SignalKind::interrupt()) => true,
        () = ended(SignalKind::terminate()) => true,
        () = ended(SignalKind::hangup()) => true,
        // Not SIGPIPE: connections that break raise it too.
        () = crate::out::reader_gone() => false,
    }
}
