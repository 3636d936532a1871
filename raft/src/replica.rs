//! The state machine of one group as openraft uses it: applies entries, makes and installs snapshots.
//!
//! Invariants:
//! - What is written of the state is the state after whole entries, with their log id and membership, in one atomic write (R5). It
//!   follows behind ([`GroupStore`]): whoever needs it to be in the database, as a snapshot does, flushes first.
//! - Nobody looks at the machine between the first and the last of the entries that are applied together.
//! - An error or a panic inside `apply` stops the node: the replica must not go on from a state that others don't have.
//! - A snapshot is installed beside the state that counts, is made durable, and counts from one synced write on.
//! - The log begins where the state on disk ends, or before ([`Replica::check_reaches`]).

use std::{
    io,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, Mutex, MutexGuard},
};

use futures::{Stream, StreamExt};
use openraft::{
    EntryPayload, OptionalSend, RaftSnapshotBuilder, Snapshot,
    storage::{ApplyResponder, EntryResponder, RaftStateMachine},
};
use tokio::sync::watch;
use verdict_failpoints::failpoint;
use verdict_protocol::{
    ids::GroupId,
    machine::{self, Machine, Position},
    store::{Store, StoreError},
};

use crate::{
    disk::{Disk, GroupKey, apart, damaged, group_key},
    fatal::Fatal,
    snapshot::{Contents, SnapshotFile, Snapshots, Source},
    state::{AppliedState, GroupStore, StoreLimits, remove_other_generations},
    storage::Storage,
    types::{Entry, LogId, Reply, SnapshotMeta, StoredMembership, Types},
};

/// Entries that are applied together, at most.
const APPLY_ENTRIES_MAX: usize = 256;
const APPLY_BYTES_MAX: usize = 4 << 20;

/// The machine of a group on this node, with its state.
pub(crate) struct Replica<M: Machine> {
    group: GroupId,
    config: M::Config,
    limits: StoreLimits,
    core: Mutex<Core<M>>,
    applied: watch::Sender<Option<LogId>>,
    pub(crate) snapshots: Snapshots,
    storage: Arc<dyn Storage>,
    fatal: Fatal,
}

struct Core<M> {
    machine: M,
    store: GroupStore,
    state: AppliedState,
    generation: u32,
    disk: Option<Arc<Disk>>,
}

impl<M: Machine> Replica<M> {
    pub(crate) fn open(
        disk: Arc<Disk>,
        group: GroupId,
        config: M::Config,
        snapshots: Snapshots,
        limits: StoreLimits,
        fatal: Fatal,
    ) -> io::Result<Replica<M>> {
        let generation = disk.read_meta(&group_key(group, GroupKey::Generation))?.unwrap_or(0);
        remove_other_generations(&disk, group, generation)?;
        let storage = disk.storage().clone();
        let core = Core::open(disk, group, generation, &config, limits)?;
        let applied = watch::Sender::new(core.state.applied);
        if core.state.applied.is_some() {
            // What is found is in tables.
            snapshots.advance(core.state.covered());
        }
        Ok(Replica { group, config, limits, core: Mutex::new(core), applied, snapshots, storage, fatal })
    }

    /// Looks at the machine and its store between two applies.
    pub(crate) fn read<T>(&self, look: impl FnOnce(&M, &dyn Store) -> T) -> T {
        let core = self.lock();
        look(&core.machine, &core.store)
    }

    /// Where the machine stands. Zero after the host was shut down.
    pub(crate) fn position(&self) -> Position {
        machine::position(&self.lock().store).unwrap_or_default()
    }

    /// The last applied log id, and its changes.
    pub(crate) fn applied(&self) -> watch::Receiver<Option<LogId>> {
        self.applied.subscribe()
    }

    /// Writes all that is applied, for tests.
    #[cfg(test)]
    pub(crate) fn flush(&self) -> io::Result<()> {
        self.take().map(drop)
    }

    /// Lets go of the database.
    pub(crate) fn close(&self) {
        self.snapshots.stop();
        // What isn't flushed is applied again from the log; this only makes the next start quick. After an error the state may be
        // that of half an entry, and must not be written.
        if let Ok(mut core) = self.core.lock()
            && self.fatal.check().is_ok()
            && let Err(error) = core.flush()
        {
            tracing::debug!(group = %self.group, %error, "the state isn't flushed");
        }
        // After a panic inside the machine there is still the database to let go of.
        let mut core = self.core.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        core.store.close();
        core.disk = None;
    }

    fn lock(&self) -> MutexGuard<'_, Core<M>> {
        self.core.lock().expect("the machine panicked earlier, and the node has stopped")
    }

    /// Writes what is applied, unless the host has just let go of the database: that has written it.
    fn write_if_open(&self) -> io::Result<()> {
        let mut core = self.lock();
        self.fatal.check()?;
        if core.disk.is_none() { Ok(()) } else { self.write_state(&mut core) }
    }

    /// Writes what is applied. An error stops the node, and nothing comes in between.
    fn write_state(&self, core: &mut Core<M>) -> io::Result<()> {
        failpoint!(STATE_BEFORE_FLUSH, self.group.0);
        let written = core.flush();
        failpoint!(STATE_FLUSHED, self.group.0);
        if let Err(error) = &written {
            self.fatal.raise(&format!("write the state of group {}: {error}", self.group));
        }
        written
    }

    fn disk(&self) -> io::Result<(Arc<Disk>, u32)> {
        let core = self.lock();
        let disk = core.disk.clone().ok_or_else(|| io::Error::other("the host was shut down"))?;
        Ok((disk, core.generation))
    }

    /// Gives whether it is time to write the state.
    fn apply_together(&self, entries: Vec<(Entry, Option<ApplyResponder<Types>>)>) -> io::Result<bool> {
        let (count, mut bytes) = (entries.len(), 0);
        let mut replies = Vec::with_capacity(count);
        let (applied, flush) = {
            let mut core = self.lock();
            self.fatal.check()?;
            for (entry, responder) in entries {
                if let EntryPayload::Normal(command) = &entry.payload {
                    bytes += command.0.len();
                }
                let reply = core.apply_one(entry, responder.is_some());
                if reply.is_err() {
                    // The state is that of half an entry: nothing may write it, whoever comes before the node has stopped.
                    core.store.close();
                }
                let reply = reply?;
                if let Some(responder) = responder {
                    replies.push((responder, reply));
                }
            }
            failpoint!(APPLIED, self.group.0);
            let keep_bytes = core.store.cache_bytes();
            core.machine.trim(keep_bytes);
            (core.state.applied, core.store.applied(count, bytes))
        };
        // Without the lock: whoever looks at what is applied may want it next. No answer depends on what is written of the state, for
        // the log has the entries.
        self.applied.send_replace(applied);
        for (responder, reply) in replies {
            responder.send(reply);
        }
        Ok(flush)
    }

    /// Applies, and writes the state if it is time. Stops the node if that fails.
    async fn apply_or_stop(
        self: &Arc<Self>,
        entries: Vec<(Entry, Option<ApplyResponder<Types>>)>,
    ) -> io::Result<()> {
        let outcome = self.stop_if_it_fails(|| self.apply_together(entries));
        if outcome? {
            // Those who were answered first, and nobody waits behind it for a thread.
            let replica = self.clone();
            let written = apart(&self.storage, move || replica.stop_if_it_fails(|| replica.write_if_open()));
            written.await.map_err(io::Error::other)??;
        }
        Ok(())
    }

    fn stop_if_it_fails<T>(&self, work: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        let outcome = catch_unwind(AssertUnwindSafe(work));
        let outcome = outcome.unwrap_or_else(|_| Err(io::Error::other("the machine panicked")));
        if let Err(error) = &outcome {
            self.fatal.raise(&format!("apply entries of group {}: {error}", self.group));
        }
        outcome
    }

    /// Fails if the state doesn't go as far as the log was purged: what is missing is nowhere.
    pub(crate) fn check_reaches(&self, purged: Option<LogId>) -> io::Result<()> {
        let applied = *self.applied.borrow();
        if applied >= purged {
            return Ok(());
        }
        let index = |id: Option<LogId>| id.map_or("nothing".to_owned(), |id| format!("entry {}", id.index));
        Err(damaged(&format!(
            "the log of group {} was purged up to {}, but its state on disk ends at {}",
            self.group,
            index(purged),
            index(applied)
        )))
    }

    /// Writes all that is applied. Gives what a snapshot of it covers, and the database.
    fn take(&self) -> io::Result<(Arc<Disk>, SnapshotMeta)> {
        let mut core = self.lock();
        self.fatal.check()?;
        self.write_state(&mut core)?;
        let disk = core.disk.clone().ok_or_else(|| io::Error::other("the host was shut down"))?;
        Ok((disk, core.state.covered()))
    }

    /// Makes a snapshot of what was taken.
    fn make_snapshot(&self, disk: &Disk, meta: SnapshotMeta) -> io::Result<SnapshotMeta> {
        failpoint!(SNAPSHOT_TAKEN, self.group.0, fails)?;
        disk.tables().make_state_durable()?;
        failpoint!(SNAPSHOT_DURABLE, self.group.0, fails)?;
        self.snapshots.advance(meta.clone());
        Ok(meta)
    }

    /// Makes a snapshot of all that is applied, for tests.
    #[cfg(test)]
    pub(crate) fn snapshot(&self) -> io::Result<SnapshotMeta> {
        let (disk, meta) = self.take()?;
        self.make_snapshot(&disk, meta)
    }

    fn install(&self, file: &SnapshotFile) -> io::Result<()> {
        let (disk, before) = self.disk()?;
        let generation = before.checked_add(1).expect("four billion snapshots are never installed");
        remove_other_generations(&disk, self.group, before)?;
        let meta = self.snapshots.load(&disk, file, generation)?;
        failpoint!(INSTALL_BEFORE_SWITCH, self.group.0, fails)?;
        // From this write on the new state counts. It is all on disk.
        disk.write_meta(&group_key(self.group, GroupKey::Generation), &generation)?;
        failpoint!(INSTALL_SWITCHED, self.group.0, fails)?;
        let core = Core::open(disk.clone(), self.group, generation, &self.config, self.limits)?;
        let applied = core.state.applied;
        *self.lock() = core;
        self.snapshots.advance(meta);
        self.applied.send_replace(applied);
        remove_other_generations(&disk, self.group, generation)
    }
}

impl<M: Machine> Core<M> {
    fn open(
        disk: Arc<Disk>,
        group: GroupId,
        generation: u32,
        config: &M::Config,
        limits: StoreLimits,
    ) -> io::Result<Core<M>> {
        let store = GroupStore::new(disk.clone(), group, generation, limits);
        let state = store.applied_state()?;
        let machine = M::open(config, &store).map_err(of_store)?;
        Ok(Core { machine, store, state, generation, disk: Some(disk) })
    }

    fn flush(&mut self) -> io::Result<()> {
        self.store.flush(&mut self.machine, &self.state)
    }

    fn apply_one(&mut self, entry: Entry, wanted: bool) -> io::Result<Reply> {
        let log_id = entry.log_id;
        let reply = match entry.payload {
            EntryPayload::Blank => Reply::none(),
            EntryPayload::Membership(membership) => {
                self.state.membership = StoredMembership::new(Some(log_id), membership);
                Reply::none()
            }
            EntryPayload::Normal(command) => {
                let reply = machine::apply(&mut self.machine, &mut self.store, log_id.index, &command.0)
                    .map_err(of_store)?;
                if wanted { Reply::some(reply) } else { Reply::none() }
            }
        };
        self.state.applied = Some(log_id);
        Ok(reply)
    }
}

/// The error as it was before the store had it: whoever tells it says that storage failed.
fn of_store(StoreError(what): StoreError) -> io::Error {
    io::Error::other(what)
}

/// The replica in the shape that openraft asks for.
pub(crate) struct StateMachine<M: Machine>(pub(crate) Arc<Replica<M>>);

impl<M: Machine> RaftStateMachine<Types> for StateMachine<M> {
    type SnapshotData = Contents;
    type SnapshotBuilder = Building<M>;

    async fn applied_state(&mut self) -> io::Result<(Option<LogId>, StoredMembership)> {
        let state = self.0.lock().state.clone();
        Ok((state.applied, state.membership))
    }

    async fn apply<Entries>(&mut self, mut entries: Entries) -> io::Result<()>
    where
        Entries: Stream<Item = io::Result<EntryResponder<Types>>> + Unpin + OptionalSend,
    {
        let mut together = Vec::new();
        let mut bytes = 0;
        while let Some(next) = entries.next().await {
            let (entry, responder) = next?;
            if let EntryPayload::Normal(command) = &entry.payload {
                bytes += command.0.len();
            }
            together.push((entry, responder));
            if together.len() >= APPLY_ENTRIES_MAX || bytes >= APPLY_BYTES_MAX {
                self.0.apply_or_stop(std::mem::take(&mut together)).await?;
                bytes = 0;
            }
        }
        if together.is_empty() { Ok(()) } else { self.0.apply_or_stop(together).await }
    }

    async fn get_snapshot_builder(&mut self) -> Building<M> {
        let replica = self.0.clone();
        // What is applied from now on isn't part of it. An error shows when it is made.
        let taken = apart(&self.0.storage, move || replica.take()).await;
        Building {
            replica: self.0.clone(),
            taken: Some(taken.unwrap_or_else(|error| Err(io::Error::other(error)))),
        }
    }

    async fn install_snapshot(&mut self, meta: &SnapshotMeta, snapshot: Contents) -> io::Result<()> {
        let (replica, meta) = (self.0.clone(), meta.clone());
        let job = apart(&self.0.storage, move || replica.install(&snapshot.file(&meta)?));
        let outcome = job.await.unwrap_or_else(|error| Err(io::Error::other(error.to_string())));
        if let Err(error) = &outcome {
            self.0.fatal.raise(&format!("install a snapshot of group {}: {error}", self.0.group));
        }
        outcome
    }

    async fn get_current_snapshot(
        &mut self,
    ) -> io::Result<Option<openraft::alias::SnapshotOf<Types, Contents>>> {
        let contents = Contents::State(self.0.clone());
        Ok(self.0.snapshots.point().map(|meta| Snapshot { meta, snapshot: contents }))
    }
}

impl<M: Machine> Source for Replica<M> {
    fn write_snapshot(&self, least: Option<LogId>) -> io::Result<SnapshotFile> {
        let (disk, generation) = self.disk()?;
        let written = self.snapshots.write(&disk, generation, least);
        match &written {
            Err(error) if error.kind() == io::ErrorKind::InvalidData => {
                self.fatal.raise(&format!("read the state of group {}: {error}", self.group));
            }
            // Nothing is lost: the replica that needs it waits until there is room again.
            Err(error) => {
                tracing::warn!(group = %self.group, %error, "can't write the state for a replica that needs it")
            }
            Ok(_) => {}
        }
        written
    }
}

/// A snapshot that is being made.
pub(crate) struct Building<M: Machine> {
    replica: Arc<Replica<M>>,
    taken: Option<io::Result<(Arc<Disk>, SnapshotMeta)>>,
}

impl<M: Machine> RaftSnapshotBuilder<Types> for Building<M> {
    type SnapshotData = Contents;

    async fn build_snapshot(&mut self) -> io::Result<openraft::alias::SnapshotOf<Types, Contents>> {
        let (disk, meta) =
            self.taken.take().ok_or_else(|| io::Error::other("a snapshot is built once"))??;
        let replica = self.replica.clone();
        let made = apart(&self.replica.storage, move || replica.make_snapshot(&disk, meta));
        let meta = made.await.map_err(io::Error::other)??;
        Ok(Snapshot { meta, snapshot: Contents::State(self.replica.clone()) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::host_error;

    #[test]
    fn an_error_of_the_store_says_once_that_storage_failed() {
        let told = host_error(of_store(StoreError("read a row: no such device".into()))).to_string();
        assert_eq!(told, "storage failed: read a row: no such device");
    }
}
