//! Disks that are slow or full: a library between the node's process and the system (`disk/` of the repository), told by a file
//! for each node what to do.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use anyhow::Context as _;

use super::field::beside_program;
use crate::processes::Cluster;

/// The library's file.
const LIBRARY: &str = "libverdict_disk.so";

/// The disks of all nodes.
#[derive(Debug)]
pub struct Disks {
    folder: PathBuf,
    library: PathBuf,
    controls: BTreeMap<u64, PathBuf>,
}

impl Disks {
    /// Puts the library under all nodes that are started from now on.
    pub fn prepare(folder: &Path, cluster: &mut Cluster) -> anyhow::Result<Disks> {
        let library = beside_program(LIBRARY).with_context(|| {
            format!(
                "this scenario needs {LIBRARY} beside the program: build it with `make drill` or \
                 `cargo build -p verdict-disk` (with --release for a release build)"
            )
        })?;
        let mut disks = Disks { folder: folder.to_owned(), library, controls: BTreeMap::new() };
        for node in cluster.nodes() {
            disks.add(node, cluster)?;
        }
        Ok(disks)
    }

    /// Puts the library under a node, from its next start on.
    pub fn add(&mut self, node: u64, cluster: &mut Cluster) -> anyhow::Result<()> {
        let control = self.folder.join(format!("node-{node}.disk"));
        let data = cluster.data(node)?.to_path_buf();
        cluster.set_environment(node, "LD_PRELOAD", &self.library.to_string_lossy())?;
        cluster.set_environment(node, "VERDICT_DISK_FOLDER", &data.to_string_lossy())?;
        cluster.set_environment(node, "VERDICT_DISK_CONTROL", &control.to_string_lossy())?;
        self.controls.insert(node, control);
        Ok(())
    }

    /// Says what the disks of these nodes shall be like. Nothing: well.
    pub fn set(&self, nodes: &[u64], text: &str) -> anyhow::Result<()> {
        for node in nodes {
            let control = self.controls.get(node).with_context(|| format!("there is no node {node}"))?;
            // The library may look at any moment: it must see the old file or the new one.
            let aside = control.with_extension("new");
            fs::write(&aside, text).with_context(|| format!("write {}", aside.display()))?;
            fs::rename(&aside, control).with_context(|| format!("write {}", control.display()))?;
        }
        Ok(())
    }
}
