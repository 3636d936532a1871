//! openraft's own tests of storage, on the real log and the real state.

use std::sync::Arc;

use openraft::{
    StorageError,
    testing::log::{StoreBuilder, Suite},
};
use tempfile::TempDir;
use verdict_protocol::{
    ids::GroupId,
    machine::Machine,
    store::{Store, StoreError},
};

use crate::{
    acknowledged::{Acknowledged, Mark},
    api::Limits,
    disk::{Disk, snapshot_directory},
    fatal::Fatal,
    log::{GroupLog, LogStore},
    on_disk::OnDisk,
    replica::{Replica, StateMachine},
    snapshot::{self, Snapshots},
    state::StoreLimits,
    storage::Storage,
    types::Types,
    writer::Writer,
};

struct Nothing;

impl Machine for Nothing {
    type Reply = ();
    type Config = ();

    fn open((): &(), _: &dyn Store) -> Result<Nothing, StoreError> {
        Ok(Nothing)
    }

    fn apply(&mut self, _: &mut dyn Store, _: u64, _: &[u8]) -> Result<(), StoreError> {
        Ok(())
    }

    fn flush(&mut self, _: &mut dyn Store) -> Result<(), StoreError> {
        Ok(())
    }

    fn trim(&mut self, _: usize) {}
}

/// Small enough that entries leave the memory and must be read from disk.
const TAIL_BYTES: usize = 200;

struct Builder;

impl StoreBuilder<Types, LogStore, StateMachine<Nothing>, TempDir> for Builder {
    async fn build(&self) -> Result<(TempDir, LogStore, StateMachine<Nothing>), StorageError<Types>> {
        let group = GroupId(7);
        let directory = tempfile::tempdir().unwrap();
        let storage: Arc<dyn Storage> = Arc::new(OnDisk);
        let disk = Disk::open(storage.clone(), directory.path(), 1 << 20).unwrap();
        let snapshots = snapshot_directory(directory.path());
        snapshot::clean_up(&*storage, &snapshots).unwrap();
        let snapshots = Snapshots::new(storage.clone(), &snapshots, group);
        let (fatal, log) =
            (Fatal::new(), GroupLog::open(disk.clone(), group, TAIL_BYTES, Mark::default()).unwrap());
        let acknowledged = Acknowledged::open(&*storage, directory.path()).unwrap();
        let (writer, _) =
            Writer::start(disk.clone(), acknowledged, Arc::default(), fatal.clone(), 64).unwrap();
        let replica =
            Replica::open(disk, group, (), snapshots, StoreLimits::of(&Limits::default()), fatal).unwrap();
        Ok((directory, LogStore::new(log, writer), StateMachine(Arc::new(replica))))
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_store_passes_the_suite_of_openraft() {
    Suite::test_all(Builder).await.unwrap();
}
