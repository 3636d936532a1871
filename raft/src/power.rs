//! Rule R9, call by call: what somebody was told survives a loss of power. On a disk in memory that keeps nothing but what was synced,
//! and of the state what was made durable, or any run of batches more; and that can lose the power before any chosen step.

use std::{
    collections::BTreeMap,
    fmt, io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard},
};

use bytes::Bytes;
use openraft::{
    EntryPayload, RaftLogReader as _,
    entry::RaftEntry as _,
    storage::{RaftLogStorage as _, RaftLogStorageExt as _, RaftStateMachine as _},
};
use verdict_protocol::{
    ids::{GroupId, NodeId},
    machine::Machine,
    store::{Store, StoreError},
};

use crate::{
    acknowledged::{Acknowledged, Mark},
    api::{HostConfig, HostError, Limits, Timing},
    disk::{Disk, Identity, snapshot_directory},
    fatal::Fatal,
    log::{GroupLog, LogStore},
    replica::{Replica, StateMachine},
    snapshot::{self, Contents as SnapshotContents, SnapshotFile, Snapshots, Source as _},
    standing::Life,
    state::StoreLimits,
    storage::{Batch, Cursor, File, Open, Reads, Start, Storage, Table, Tables},
    types::{Command, Entry, LogId, SnapshotMeta, Vote},
    writer::{Running, Writer},
};

const GROUP: GroupId = GroupId(7);

type Pairs = BTreeMap<Vec<u8>, Bytes>;

/// What is on the disk, by name of table or file.
#[derive(Clone, Default)]
struct Contents {
    tables: [Pairs; 3],
    files: BTreeMap<PathBuf, Vec<u8>>,
}

#[derive(Default)]
struct Inner {
    now: Contents,
    synced: Contents,
    /// Files without a name.
    removed: BTreeMap<PathBuf, Vec<u8>>,
    /// The state after each batch since it was last made durable: a loss of power may leave any of them.
    states: Vec<Pairs>,
    /// The power is lost before the step after so many others.
    steps_left: Option<u64>,
    lost: bool,
}

impl Inner {
    fn file(&self, path: &Path) -> Option<&Vec<u8>> {
        self.now.files.get(path).or_else(|| self.removed.get(path))
    }
}

/// The disk. `Log` and `Meta` are synced together, the state and each file by itself; names at once.
#[derive(Clone, Default)]
struct Forgetful(Arc<Mutex<Inner>>);

impl fmt::Debug for Forgetful {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Forgetful")
    }
}

impl Forgetful {
    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap()
    }

    /// A write or a sync.
    fn step<T>(&self, perform: impl FnOnce(&mut Inner) -> T) -> io::Result<T> {
        let mut inner = self.inner();
        match &mut inner.steps_left {
            Some(0) => inner.lost = true,
            Some(left) => *left -= 1,
            None => {}
        }
        if inner.lost { Err(io::Error::other("the power was lost")) } else { Ok(perform(&mut inner)) }
    }

    /// The disk after a loss of power now, with as little as it may have.
    fn after_loss(&self) -> Forgetful {
        self.after_losses().swap_remove(0)
    }

    /// All disks that there may be after a loss of power now.
    fn after_losses(&self) -> Vec<Forgetful> {
        let inner = self.inner();
        let states = std::iter::once(&inner.synced.tables[Table::State as usize]).chain(&inner.states);
        let found = states.map(|state| {
            let mut synced = inner.synced.clone();
            synced.tables[Table::State as usize] = state.clone();
            Forgetful(Arc::new(Mutex::new(Inner { now: synced.clone(), synced, ..Inner::default() })))
        });
        found.collect()
    }
}

struct RamCursor {
    pairs: Vec<(Vec<u8>, Bytes)>,
    place: usize,
}

impl Cursor for RamCursor {
    fn item(&self) -> Option<(&[u8], &[u8])> {
        self.pairs.get(self.place).map(|(key, value)| (&key[..], &value[..]))
    }

    fn next(&mut self) {
        self.place = self.place.wrapping_add(1);
    }

    fn prev(&mut self) {
        self.place = self.place.wrapping_sub(1);
    }

    fn status(&self) -> io::Result<()> {
        Ok(())
    }
}

struct View([Pairs; 3]);

impl Reads for View {
    fn get(&self, table: Table, key: &[u8]) -> io::Result<Option<Bytes>> {
        Ok(self.0[table as usize].get(key).cloned())
    }

    fn cursor<'a>(
        &'a self,
        table: Table,
        from: &[u8],
        to: Option<&[u8]>,
        start: Start,
    ) -> Box<dyn Cursor + 'a> {
        let pairs: Vec<_> = self.0[table as usize]
            .range(from.to_vec()..)
            .take_while(|(key, _)| to.is_none_or(|to| key.as_slice() < to))
            .map(|(key, value)| (key.clone(), value.clone()))
            .collect();
        let place = if start == Start::First { 0 } else { pairs.len().wrapping_sub(1) };
        Box::new(RamCursor { pairs, place })
    }
}

struct RamTables(Forgetful);

impl RamTables {
    fn now(&self) -> View {
        View(self.0.inner().now.tables.clone())
    }
}

impl Reads for RamTables {
    fn get(&self, table: Table, key: &[u8]) -> io::Result<Option<Bytes>> {
        self.now().get(table, key)
    }

    fn cursor<'a>(
        &'a self,
        table: Table,
        from: &[u8],
        to: Option<&[u8]>,
        start: Start,
    ) -> Box<dyn Cursor + 'a> {
        let View(tables) = self.now();
        let view = View(tables);
        let mut all = Vec::new();
        let mut cursor = view.cursor(table, from, to, Start::First);
        while let Some((key, value)) = cursor.item() {
            all.push((key.to_vec(), Bytes::copy_from_slice(value)));
            cursor.next();
        }
        let place = if start == Start::First { 0 } else { all.len().wrapping_sub(1) };
        Box::new(RamCursor { pairs: all, place })
    }
}

impl Tables for RamTables {
    fn batch(&self) -> Box<dyn Batch> {
        Box::new(RamBatch { disk: self.0.clone(), changes: Vec::new() })
    }

    fn sync(&self) -> io::Result<()> {
        self.0.step(|inner| {
            for table in Table::ALL.into_iter().filter(|table| !table.is_state()) {
                inner.synced.tables[table as usize] = inner.now.tables[table as usize].clone();
            }
        })
    }

    fn make_state_durable(&self) -> io::Result<()> {
        self.0.step(|inner| {
            let state = Table::State as usize;
            inner.synced.tables[state] = inner.now.tables[state].clone();
            inner.states.clear();
        })
    }

    fn view(&self) -> Box<dyn Reads + '_> {
        Box::new(self.now())
    }
}

enum Change {
    Put(Table, Vec<u8>, Bytes),
    Delete(Table, Vec<u8>),
    DeleteRange(Table, Vec<u8>, Vec<u8>),
}

impl Change {
    fn is_of_state(&self) -> bool {
        let (Change::Put(table, ..) | Change::Delete(table, _) | Change::DeleteRange(table, ..)) = self;
        table.is_state()
    }
}

struct RamBatch {
    disk: Forgetful,
    changes: Vec<Change>,
}

impl Batch for RamBatch {
    fn put(&mut self, table: Table, key: &[u8], value: &[u8]) {
        self.changes.push(Change::Put(table, key.to_vec(), Bytes::copy_from_slice(value)));
    }

    fn delete(&mut self, table: Table, key: &[u8]) {
        self.changes.push(Change::Delete(table, key.to_vec()));
    }

    fn delete_range(&mut self, table: Table, from: &[u8], to: &[u8]) {
        self.changes.push(Change::DeleteRange(table, from.to_vec(), to.to_vec()));
    }

    fn bytes(&self) -> usize {
        0
    }

    fn write(self: Box<Self>) -> io::Result<()> {
        let RamBatch { disk, changes } = *self;
        let of_state = changes.iter().any(Change::is_of_state);
        assert!(
            !of_state || changes.iter().all(Change::is_of_state),
            "a batch changes the state alone, or others"
        );
        disk.step(|inner| {
            for change in changes {
                match change {
                    Change::Put(table, key, value) => {
                        inner.now.tables[table as usize].insert(key, value);
                    }
                    Change::Delete(table, key) => {
                        inner.now.tables[table as usize].remove(&key);
                    }
                    Change::DeleteRange(table, from, to) => {
                        inner.now.tables[table as usize].retain(|key, _| *key < from || *key >= to);
                    }
                }
            }
            if of_state {
                inner.states.push(inner.now.tables[Table::State as usize].clone());
            }
        })
    }
}

#[derive(Debug)]
struct RamFile(Forgetful, PathBuf);

impl File for RamFile {
    fn bytes(&self) -> io::Result<u64> {
        Ok(self.0.inner().file(&self.1).map_or(0, |bytes| bytes.len() as u64))
    }

    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let inner = self.0.inner();
        let bytes = inner.file(&self.1).ok_or(io::ErrorKind::NotFound)?;
        let found = bytes.get(offset as usize..).and_then(|rest| rest.get(..buffer.len()));
        buffer.copy_from_slice(found.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }

    fn write_all_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.0.step(|inner| {
            let file = inner.now.files.entry(self.1.clone()).or_default();
            file.resize(file.len().max(offset as usize + bytes.len()), 0);
            file[offset as usize..][..bytes.len()].copy_from_slice(bytes);
        })
    }

    fn sync(&self) -> io::Result<()> {
        self.0.step(|inner| {
            let file = inner.file(&self.1).cloned().unwrap_or_default();
            inner.synced.files.insert(self.1.clone(), file);
        })
    }
}

impl Storage for Forgetful {
    fn open_tables(&self, _: &Path, _: usize) -> Result<Box<dyn Tables>, HostError> {
        Ok(Box::new(RamTables(self.clone())))
    }

    fn create_folder(&self, _: &Path) -> io::Result<()> {
        Ok(())
    }

    fn list(&self, folder: &Path) -> io::Result<Vec<PathBuf>> {
        Ok(self.inner().now.files.keys().filter(|path| path.parent() == Some(folder)).cloned().collect())
    }

    fn open(&self, path: &Path, how: Open) -> io::Result<Arc<dyn File>> {
        let mut inner = self.inner();
        match how {
            Open::Existing if !inner.now.files.contains_key(path) => {
                return Err(io::ErrorKind::NotFound.into());
            }
            Open::Existing => {}
            Open::OrCreate => drop(inner.now.files.entry(path.to_owned()).or_default()),
            Open::Empty => drop(inner.now.files.insert(path.to_owned(), Vec::new())),
        }
        Ok(Arc::new(RamFile(self.clone(), path.to_owned())))
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        self.step(|inner| {
            // Whoever has it open reads it still.
            let file = inner.now.files.remove(path).unwrap_or_default();
            inner.removed.insert(path.to_owned(), file);
            inner.synced.files.remove(path);
        })
    }

    fn waits(&self) -> bool {
        false
    }
}

/// Counts what it is told, key by key.
struct Registers;

impl Machine for Registers {
    type Reply = ();
    type Config = ();

    fn open((): &(), _: &dyn Store) -> Result<Registers, StoreError> {
        Ok(Registers)
    }

    fn apply(&mut self, store: &mut dyn Store, _: u64, command: &[u8]) -> Result<(), StoreError> {
        store.put(&[b"\x11", command].concat(), command)
    }

    fn flush(&mut self, _: &mut dyn Store) -> Result<(), StoreError> {
        Ok(())
    }

    fn trim(&mut self, _: usize) {}
}

/// The log and the state of one group, on a disk.
struct Opened {
    disk: Forgetful,
    log: Arc<GroupLog>,
    store: LogStore,
    machine: StateMachine<Registers>,
    writer: Writer,
    _running: Running,
}

fn folder() -> &'static Path {
    Path::new("/node")
}

fn tables(disk: &Forgetful) -> Arc<Disk> {
    Disk::open(Arc::new(disk.clone()), folder(), 0).unwrap()
}

fn opened(disk: &Forgetful) -> io::Result<Opened> {
    let tables = tables(disk);
    let snapshots = snapshot_directory(folder());
    snapshot::clean_up(disk, &snapshots)?;
    let snapshots = Snapshots::new(Arc::new(disk.clone()), &snapshots, GROUP);
    let acknowledged = Acknowledged::open(disk, folder())?;
    let mark = acknowledged.marks().get(&GROUP.0).copied().unwrap_or_else(Mark::default);
    let log = GroupLog::open(tables.clone(), GROUP, 0, mark)?;
    let fatal = Fatal::new();
    let (writer, running) = Writer::start(tables.clone(), acknowledged, Arc::default(), fatal.clone(), 64)?;
    let limits = StoreLimits::of(&Limits::default());
    let replica = Replica::open(tables, GROUP, (), snapshots, limits, fatal)?;
    Ok(Opened {
        disk: disk.clone(),
        store: LogStore::new(log.clone(), writer.clone()),
        log,
        machine: StateMachine(Arc::new(replica)),
        writer,
        _running: running,
    })
}

impl Opened {
    /// The power is lost now, and comes back.
    fn again(&self) -> Opened {
        opened(&self.disk.after_loss()).unwrap()
    }

    /// The same, with all that may be found then.
    fn all_again(&self) -> Vec<Opened> {
        self.disk.after_losses().iter().map(|disk| opened(disk).unwrap()).collect()
    }

    async fn apply(&mut self, entries: Vec<Entry>) -> io::Result<()> {
        let entries = entries.into_iter().map(|entry| Ok((entry, None)));
        self.machine.apply(futures::stream::iter(entries)).await
    }

    fn applied(&self) -> Option<u64> {
        self.machine.0.applied().borrow().map(|id| id.index)
    }

    fn holds(&self, index: u64) -> bool {
        let key = [&b"\x11"[..], &index.to_be_bytes()].concat();
        self.machine.0.read(|_, store| store.get(&key).unwrap().is_some())
    }
}

fn log_id(index: u64) -> LogId {
    LogId::new(openraft::vote::leader_id_std::CommittedLeaderId::new(1), index)
}

/// An entry that writes its index; the first one is Raft's own.
fn entry(index: u64) -> Entry {
    let command = Command(Bytes::copy_from_slice(&index.to_be_bytes()));
    let payload = if index == 0 { EntryPayload::Blank } else { EntryPayload::Normal(command) };
    Entry::new(log_id(index), payload)
}

async fn entries_of(opened: &mut Opened) -> Vec<u64> {
    let entries = opened.store.try_get_log_entries(..).await.unwrap();
    entries.iter().map(|entry| entry.log_id.index).collect()
}

#[tokio::test]
async fn a_vote_that_was_told_survives() {
    let mut node = opened(&Forgetful::default()).unwrap();
    for term in [3, 8] {
        let vote = Vote::new(term, 2);
        node.store.save_vote(&vote).await.unwrap();
        assert_eq!(node.again().store.read_vote().await.unwrap(), Some(vote));
    }
}

#[tokio::test]
async fn entries_and_truncations_that_were_told_survive() {
    let mut node = opened(&Forgetful::default()).unwrap();
    node.store.blocking_append((0..10).map(entry)).await.unwrap();
    assert_eq!(entries_of(&mut node.again()).await, (0..10).collect::<Vec<_>>());
    node.store.truncate_after(Some(log_id(6))).await.unwrap();
    let mut again = node.again();
    assert_eq!(entries_of(&mut again).await, (0..7).collect::<Vec<_>>());
    again.store.blocking_append([entry(7)]).await.unwrap();
    assert_eq!(entries_of(&mut again.again()).await, (0..8).collect::<Vec<_>>());
}

/// The file that tells how far the log went is written without a sync, and may reach the disk all the same. A log that was made shorter on
/// purpose must not be taken for one that was cut.
#[tokio::test]
async fn a_truncation_is_no_damage_whatever_has_reached_the_disk() {
    let mut node = opened(&Forgetful::default()).unwrap();
    node.store.blocking_append((0..10).map(entry)).await.unwrap();
    node.disk.open(&folder().join("acknowledged"), Open::OrCreate).unwrap().sync().unwrap();
    node.store.truncate_after(Some(log_id(6))).await.unwrap();
    assert_eq!(entries_of(&mut node.again()).await, (0..7).collect::<Vec<_>>());
}

/// A purged entry is never needed again: what it did is in the state.
#[tokio::test]
async fn what_is_purged_is_in_the_state() {
    let mut node = opened(&Forgetful::default()).unwrap();
    node.store.blocking_append((0..10).map(entry)).await.unwrap();
    node.apply((0..10).map(entry).collect()).await.unwrap();
    node.machine.0.snapshot().unwrap();
    node.store.purge(log_id(8)).await.unwrap();
    let mut again = node.again();
    assert_eq!(again.log.purged().map(|id| id.index), Some(8));
    assert_eq!(entries_of(&mut again).await, [9]);
    assert!(again.applied() >= Some(8), "it can't be applied again: {:?}", again.applied());
    assert!((1..=8).all(|index| again.holds(index)));
}

/// The state isn't synced with the log: what is found is the state after some of its flushes, with the entry it ends at, and the log
/// still has the rest.
#[tokio::test]
async fn what_is_lost_of_the_state_is_still_in_the_log() {
    let mut node = opened(&Forgetful::default()).unwrap();
    let mut found = std::collections::BTreeSet::new();
    for round in 0..4 {
        let entries = || (round * 10..round * 10 + 10).map(entry);
        node.store.blocking_append(entries()).await.unwrap();
        node.apply(entries().collect()).await.unwrap();
        node.machine.0.flush().unwrap();
        if round == 1 {
            node.machine.0.snapshot().unwrap();
            node.store.purge(log_id(15)).await.unwrap();
        }
        for mut again in node.all_again() {
            let applied = again.applied();
            assert!((1..40).all(|index| again.holds(index) == (Some(index) <= applied)), "half of a flush");
            let next = applied.map_or(0, |applied| applied + 1);
            let wanted: Vec<u64> = (next..round * 10 + 10).collect();
            assert!(entries_of(&mut again).await.ends_with(&wanted), "round {round}: {applied:?} and a hole");
            again.machine.0.check_reaches(again.log.purged()).unwrap();
            found.insert((round, applied));
        }
    }
    assert!(found.contains(&(0, None)) && found.contains(&(3, Some(19))), "{found:?}");
    assert!(!found.contains(&(1, None)) && found.contains(&(3, Some(39))), "{found:?}");
}

/// Damage, as no loss of power leaves it: the state is that of an earlier day.
#[tokio::test]
async fn a_state_that_ends_before_the_log_begins_is_refused() {
    let mut node = opened(&Forgetful::default()).unwrap();
    node.store.blocking_append((0..10).map(entry)).await.unwrap();
    node.apply((0..10).map(entry).collect()).await.unwrap();
    node.machine.0.snapshot().unwrap();
    node.store.purge(log_id(8)).await.unwrap();
    let disk = node.disk.after_loss();
    disk.inner().now.tables[Table::State as usize].clear();
    let again = opened(&disk).unwrap();
    let refused = again.machine.0.check_reaches(again.log.purged()).unwrap_err();
    assert_eq!(refused.kind(), io::ErrorKind::InvalidData);
    assert!(refused.to_string().contains("purged up to entry 8"), "{refused}");
}

/// A snapshot of the first ten entries, as a file under a temporary name on another node's disk.
async fn received(on: &Opened) -> SnapshotFile {
    let mut source = opened(&Forgetful::default()).unwrap();
    source.apply((0..10).map(entry).collect()).await.unwrap();
    source.machine.0.flush().unwrap();
    let sent = source.machine.0.write_snapshot(Some(log_id(9))).unwrap();
    let bytes = sent.read_at(0, usize::MAX).unwrap();
    let file = on.disk.open(&on.machine.0.snapshots.temporary(), Open::Empty).unwrap();
    file.write_all_at(&bytes, 0).unwrap();
    snapshot::received(file, GROUP).unwrap()
}

/// What was received, with what it covers.
async fn received_whole(on: &Opened) -> (SnapshotMeta, SnapshotContents) {
    let file = received(on).await;
    (snapshot::meta(&file, GROUP).unwrap(), SnapshotContents::File(file))
}

/// Who has installed a snapshot counts as one of those who have all of its entries.
#[tokio::test]
async fn an_installed_snapshot_survives() {
    let mut node = opened(&Forgetful::default()).unwrap();
    let (meta, file) = received_whole(&node).await;
    node.machine.install_snapshot(&meta, file).await.unwrap();
    assert_eq!(node.machine.0.snapshots.point(), Some(meta.clone()));
    let again = node.again();
    assert_eq!(again.applied(), Some(9));
    assert!((1..10).all(|index| again.holds(index)));
    assert_eq!(again.machine.0.snapshots.point(), Some(meta), "it can be passed on");
}

/// The power is lost before each write and each sync of an install and of the purge that follows: what is found is the state before or
/// the state after, whole, and no entry is gone that it doesn't have.
#[tokio::test]
async fn a_loss_of_power_anywhere_in_an_install_leaves_the_old_state_or_the_new_one() {
    let mut steps = 0;
    let mut found = [0, 0];
    loop {
        let mut node = opened(&Forgetful::default()).unwrap();
        node.store.blocking_append((0..3).map(entry)).await.unwrap();
        node.apply((0..3).map(entry).collect()).await.unwrap();
        let (meta, file) = received_whole(&node).await;
        node.disk.inner().steps_left = Some(steps);
        let installed = node.machine.install_snapshot(&meta, file).await.is_ok();
        let purged = installed && node.store.purge(log_id(9)).await.is_ok();
        for mut again in node.all_again() {
            let new = again.applied() == Some(9);
            assert!(new || !installed, "before step {steps}: it was told, and is forgotten");
            assert!(again.applied() >= again.log.purged().map(|id| id.index), "before step {steps}: a hole");
            let held = |index| new || again.applied() >= Some(index);
            assert!((1..10).all(|index| again.holds(index) == held(index)), "before step {steps}");
            found[usize::from(new)] += 1;
            // It can be done again.
            let (meta, file) = received_whole(&again).await;
            again.machine.install_snapshot(&meta, file).await.unwrap();
            for again in again.all_again() {
                assert!((1..10).all(|index| again.holds(index)), "before step {steps}");
            }
        }
        steps += 1;
        if purged {
            break;
        }
    }
    assert!(found[0] > 3 && found[1] > 1, "{found:?} of {steps} steps");
}

/// A disk that comes back under its old name must remember who it is, and be a later start than all before.
#[tokio::test]
async fn a_start_and_an_identity_that_were_told_survive() {
    let disk = Forgetful::default();
    let config = HostConfig {
        cluster: "test".to_owned(),
        node: NodeId(1),
        address: "node1:1".to_owned(),
        directory: folder().to_owned(),
        timing: Timing::default(),
        limits: Limits::default(),
    };
    let first = Identity::establish(&tables(&disk), &config).unwrap();
    let life = Life::begin(&tables(&disk)).unwrap();
    let disk = disk.after_loss();
    assert_eq!(Identity::establish(&tables(&disk), &config).unwrap(), first);
    let next = Life::begin(&tables(&disk)).unwrap();
    assert_eq!((next.now.number, next.past.len()), (life.now.number + 1, 1));
    assert_eq!(next.past[0].start, life.now);
}

/// The others are told how many promises a disk holds, and refuse one that comes back with fewer.
#[tokio::test]
async fn promises_are_counted_by_what_is_durable() {
    let mut node = opened(&Forgetful::default()).unwrap();
    node.store.save_vote(&Vote::new(3, 2)).await.unwrap();
    node.store.blocking_append([entry(0)]).await.unwrap();
    let told = node.writer.promises();
    assert_eq!(told, 2);
    assert_eq!(node.again().writer.promises(), told);
}

/// Behind a snapshot the log is purged, and from it others catch up.
#[tokio::test]
async fn a_snapshot_that_was_made_survives_and_no_older_one_takes_its_place() {
    let mut node = opened(&Forgetful::default()).unwrap();
    node.apply((0..13).map(entry).collect()).await.unwrap();
    let newest = |node: &Opened| node.machine.0.snapshots.point().and_then(|meta| meta.last_log_id);
    assert_eq!(newest(&node), None);
    node.machine.0.snapshot().unwrap();
    assert_eq!(newest(&node), Some(log_id(12)));
    assert_eq!(newest(&node.again()), Some(log_id(12)), "it counted before its state was on disk");
    let (older, _) = received_whole(&node).await;
    node.machine.0.snapshots.advance(older);
    assert_eq!(newest(&node), Some(log_id(12)));
}

/// A leader goes on while it sends: what is sent is at least what was promised, and a state that doesn't go so far is not sent.
#[tokio::test]
async fn what_is_sent_goes_at_least_as_far_as_the_snapshot() {
    let mut node = opened(&Forgetful::default()).unwrap();
    node.apply((0..5).map(entry).collect()).await.unwrap();
    let meta = node.machine.0.snapshot().unwrap();
    node.apply((5..8).map(entry).collect()).await.unwrap();
    node.machine.0.flush().unwrap();
    let reaches = |file: &SnapshotFile| snapshot::meta(file, GROUP).unwrap().last_log_id;
    let sent = node.machine.0.write_snapshot(meta.last_log_id).unwrap();
    assert_eq!(reaches(&sent), Some(log_id(7)));
    assert!(node.machine.0.write_snapshot(Some(log_id(8))).is_err());
    // Kept for whoever needs it next, and not when there is a newer snapshot.
    node.apply((8..9).map(entry).collect()).await.unwrap();
    node.machine.0.flush().unwrap();
    assert_eq!(reaches(&node.machine.0.write_snapshot(Some(log_id(7))).unwrap()), Some(log_id(7)));
    node.machine.0.snapshot().unwrap();
    assert_eq!(reaches(&node.machine.0.write_snapshot(Some(log_id(7))).unwrap()), Some(log_id(8)));
    assert_eq!(node.disk.list(&snapshot_directory(folder())).unwrap(), [] as [PathBuf; 0]);
    assert_eq!(node.all_again().len(), 1, "all of it is in tables");
}

/// Others rely on the vote and on the entries alike.
#[tokio::test]
async fn a_disk_that_has_lost_its_vote_or_an_entry_is_refused() {
    let mut node = opened(&Forgetful::default()).unwrap();
    node.store.save_vote(&Vote::new(3, 2)).await.unwrap();
    node.store.blocking_append((0..5).map(entry)).await.unwrap();
    let open = |last_index, vote_term| {
        GroupLog::open(tables(&node.disk), GROUP, 0, Mark { last_index, vote_term }).map(drop)
    };
    open(4, 3).unwrap();
    assert!(open(5, 3).is_err() && open(4, 4).is_err());
}

#[test]
fn a_torn_write_of_what_was_acknowledged_leaves_the_one_before() {
    let disk = Forgetful::default();
    let mut acknowledged = Acknowledged::open(&disk, folder()).unwrap();
    for last_index in [1, 2] {
        acknowledged.update(&[(GROUP.0, Mark { last_index, vote_term: 0 })], false).unwrap();
    }
    disk.open(&folder().join("acknowledged"), Open::OrCreate).unwrap().write_all_at(&[0xff; 20], 0).unwrap();
    let marks = Acknowledged::open(&disk, folder()).unwrap().marks();
    assert_eq!(marks[&GROUP.0].last_index, 1);
}
