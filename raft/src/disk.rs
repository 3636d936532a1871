//! The tables of a node: their keys, their values, its identity.
//!
//! All formats are described in `docs/storage.md`.
//!
//! Invariants:
//! - Every value carries a version byte; those of `log` and `meta` carry a checksum over key and contents as well.
//! - A value that doesn't check out is an error, never an absent value.
//! - Whoever syncs a write to `log` or `meta` has synced every write to them before it. The state has no part in that: it is durable
//!   once it was made so ([`Tables::make_state_durable`]), and whoever lets something go that it replaces makes it so first.

use std::{
    collections::BTreeMap,
    io,
    path::{Path, PathBuf},
    sync::Arc,
};

use serde::{Deserialize, Serialize, de::DeserializeOwned};
use tokio::task::JoinHandle;
use verdict_protocol::ids::{GroupId, NodeId};

use crate::{
    api::{HostConfig, HostError},
    standing::{STANDING, Standing},
    storage::{Start, Storage, Table, Tables},
    types::checksum,
};

/// Version byte of every value in `log` and `meta`.
const VERSION: u8 = 1;
/// Version byte and checksum stand before the contents.
const HEADER_BYTES: usize = 9;

/// The node's disk, with its tables open.
pub(crate) struct Disk {
    storage: Arc<dyn Storage>,
    tables: Box<dyn Tables>,
}

impl Disk {
    /// Opens or makes the tables below `directory`.
    pub(crate) fn open(
        storage: Arc<dyn Storage>,
        directory: &Path,
        cache_bytes: usize,
    ) -> Result<Arc<Disk>, HostError> {
        let tables = storage.open_tables(directory, cache_bytes)?;
        Ok(Arc::new(Disk { storage, tables }))
    }

    pub(crate) fn tables(&self) -> &dyn Tables {
        &*self.tables
    }

    pub(crate) fn storage(&self) -> &Arc<dyn Storage> {
        &self.storage
    }

    /// Reads a value of `meta`.
    pub(crate) fn read_meta<T: DeserializeOwned>(&self, key: &[u8]) -> io::Result<Option<T>> {
        match self.tables.get(Table::Meta, key)? {
            None => Ok(None),
            Some(value) => unseal(key, &value).map(Some),
        }
    }

    /// Writes a value of `meta`, synced.
    pub(crate) fn write_meta<T: Serialize>(&self, key: &[u8], value: &T) -> io::Result<()> {
        let mut batch = self.tables.batch();
        batch.put(Table::Meta, key, &seal(key, value));
        batch.write()?;
        self.tables.sync()
    }

    /// The incarnations of other nodes, as first seen.
    pub(crate) fn incarnations(&self) -> io::Result<BTreeMap<u64, Vec<u8>>> {
        self.of_nodes(INCARNATION)
    }

    /// How far other nodes are known to have come.
    pub(crate) fn standings(&self) -> io::Result<BTreeMap<u64, Standing>> {
        self.of_nodes(STANDING)
    }

    /// All values of `meta` whose keys are this byte and the id of a node.
    fn of_nodes<T: DeserializeOwned>(&self, first: u8) -> io::Result<BTreeMap<u64, T>> {
        let mut known = BTreeMap::new();
        let mut cursor = self.tables.cursor(Table::Meta, &[first], Some(&[first + 1]), Start::First);
        while let Some((key, value)) = cursor.item() {
            let id = key[1..].try_into().map_err(|_| damaged("the key of what is known of a node"))?;
            known.insert(u64::from_be_bytes(id), unseal(key, value)?);
            cursor.next();
        }
        cursor.status()?;
        Ok(known)
    }
}

/// Runs work that may wait for the disk: apart from the threads that run tasks, if the disk makes a thread wait at all.
pub(crate) fn apart<T: Send + 'static>(
    storage: &Arc<dyn Storage>,
    work: impl FnOnce() -> T + Send + 'static,
) -> JoinHandle<T> {
    if storage.waits() { tokio::task::spawn_blocking(work) } else { tokio::spawn(async { work() }) }
}

const IDENTITY: &[u8] = &[0x01];
const INCARNATION: u8 = 0x02;
const GROUP: u8 = 0x10;

/// What one group keeps in `meta`.
#[derive(Clone, Copy)]
pub(crate) enum GroupKey {
    /// The vote.
    Vote = 1,
    /// The last purged log id.
    Purged = 2,
    /// The committed log id; may lag.
    Committed = 3,
    /// The generation of the state that counts.
    Generation = 4,
}

/// The key of a group's value in `meta`.
pub(crate) fn group_key(group: GroupId, key: GroupKey) -> [u8; 6] {
    let id = group.0.to_be_bytes();
    [GROUP, id[0], id[1], id[2], id[3], key as u8]
}

/// The key in `meta` of another node's incarnation.
pub(crate) fn incarnation_key(node: u64) -> [u8; 9] {
    let mut key = [INCARNATION; 9];
    key[1..].copy_from_slice(&node.to_be_bytes());
    key
}

/// How long the group is with which keys begin.
pub(crate) const GROUP_BYTES: usize = 4;

/// The key of an entry in `log`.
pub(crate) fn log_key(group: GroupId, index: u64) -> [u8; 12] {
    let mut key = [0; 12];
    key[..GROUP_BYTES].copy_from_slice(&group.0.to_be_bytes());
    key[GROUP_BYTES..].copy_from_slice(&index.to_be_bytes());
    key
}

/// Version, checksum over key and contents, contents.
pub(crate) fn seal<T: Serialize>(key: &[u8], value: &T) -> Vec<u8> {
    let mut sealed = encode_behind(HEADER_BYTES, value);
    sealed[0] = VERSION;
    let sum = checksum(&[key, &sealed[HEADER_BYTES..]]);
    sealed[1..HEADER_BYTES].copy_from_slice(&sum);
    sealed
}

/// A value behind so many zeros, in memory that is taken once: entries may be long, and a buffer that grows is copied again and again. Its
/// size costs little: what is long in it are strings of bytes.
pub(crate) fn encode_behind<T: Serialize>(zeros: usize, value: &T) -> Vec<u8> {
    let bytes = postcard::experimental::serialized_size(value).expect("what is encoded has a size");
    let mut encoded = Vec::with_capacity(zeros + bytes);
    encoded.resize(zeros, 0);
    postcard::to_extend(value, encoded).expect("encoding into memory can't fail")
}

/// The contents of what [`seal`] made.
pub(crate) fn unseal<T: DeserializeOwned>(key: &[u8], sealed: &[u8]) -> io::Result<T> {
    let what = || format!("the value of key {}", hex(key));
    if sealed.len() < HEADER_BYTES {
        return Err(damaged(&format!("{} is cut", what())));
    }
    if sealed[0] != VERSION {
        return Err(damaged(&format!("{} has unknown version {}", what(), sealed[0])));
    }
    if checksum(&[key, &sealed[HEADER_BYTES..]]) != sealed[1..HEADER_BYTES] {
        return Err(damaged(&format!("{} fails its checksum", what())));
    }
    postcard::from_bytes(&sealed[HEADER_BYTES..]).map_err(|error| damaged(&format!("{}: {error}", what())))
}

/// Who this disk belongs to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Identity {
    pub(crate) cluster: String,
    pub(crate) node: u64,
    /// Random, made with the disk.
    pub(crate) incarnation: Vec<u8>,
}

impl Identity {
    /// Reads the identity, or makes it on a fresh disk.
    pub(crate) fn establish(disk: &Disk, config: &HostConfig) -> Result<Identity, HostError> {
        if let Some(identity) = disk.read_meta::<Identity>(IDENTITY).map_err(host_error)? {
            if identity.cluster != config.cluster || NodeId(identity.node) != config.node {
                return Err(HostError::Config(format!(
                    "{} belongs to node {} of cluster {:?}, not to node {} of cluster {:?}",
                    config.directory.display(),
                    identity.node,
                    identity.cluster,
                    config.node,
                    config.cluster
                )));
            }
            return Ok(identity);
        }
        let incarnation = uuid::Uuid::new_v4().as_bytes().to_vec();
        let identity = Identity { cluster: config.cluster.clone(), node: config.node.0, incarnation };
        disk.write_meta(IDENTITY, &identity).map_err(host_error)?;
        Ok(identity)
    }
}

/// Where snapshots are kept.
pub(crate) fn snapshot_directory(directory: &Path) -> PathBuf {
    directory.join("snapshots")
}

/// What is on the disk isn't what was written.
pub(crate) fn damaged(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("damaged: {what}"))
}

pub(crate) fn host_error(error: io::Error) -> HostError {
    match error.kind() {
        io::ErrorKind::InvalidData => HostError::Damaged(error.to_string()),
        _ => HostError::Storage(error.to_string()),
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
