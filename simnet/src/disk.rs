//! A disk that forgets: what wasn't synced may be lost with the power, a sync may fail, there may be no room.
//!
//! It outlives the node that uses it. What a node wrote stays visible to it at once; what survives is decided when the power is lost:
//! - Of the batches since the last sync an unbroken run from the first survives: all, none, or any number. A batch whose write
//!   was torn is one that doesn't survive, as a database with checksums in its log has it.
//! - The state is apart from the other tables, and goes its own way: of its batches since it was last made durable an unbroken run from
//!   the first survives, whatever becomes of the others. That is so when the process ends as well: it was in its memory.
//! - Of the writes to a file since its last sync any survive, each whole or torn. A file that was never synced may vanish; one
//!   that was removed since the last loss of power may be back.
//! - After a failed sync what was to be synced, and all that comes later, never reaches the disk, though later syncs say that it
//!   does: whoever tries again is lied to, as kernels have done.

use std::{
    collections::BTreeMap,
    fmt, io,
    ops::Bound,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use bytes::Bytes;
use futures::future::BoxFuture;
use verdict_raft::{
    HostError,
    storage::{Batch, Cursor, File, Open, Reads, Start, Storage, Table, Tables},
};
use verdict_tests::random::Random;

type Pairs = BTreeMap<Vec<u8>, Bytes>;

/// What a write to the tables does.
#[derive(Clone, Debug)]
enum Change {
    Put(Table, Vec<u8>, Bytes),
    Delete(Table, Vec<u8>),
    DeleteRange(Table, Vec<u8>, Vec<u8>),
}

/// The contents of all tables. Cheap to clone.
#[derive(Clone, Debug, Default)]
struct Contents([Arc<Pairs>; Table::ALL.len()]);

impl Change {
    fn is_of_state(&self) -> bool {
        let (Change::Put(table, ..) | Change::Delete(table, _) | Change::DeleteRange(table, ..)) = self;
        table.is_state()
    }
}

impl Contents {
    fn of(&self, table: Table) -> &Arc<Pairs> {
        &self.0[table as usize]
    }

    fn apply(&mut self, batch: &[Change]) {
        for change in batch {
            match change {
                Change::Put(table, key, value) => {
                    self.pairs(*table).insert(key.clone(), value.clone());
                }
                Change::Delete(table, key) => {
                    self.pairs(*table).remove(key);
                }
                Change::DeleteRange(table, from, to) => {
                    let pairs = self.pairs(*table);
                    let range = (Bound::Included(from.clone()), Bound::Excluded(to.clone()));
                    let gone: Vec<Vec<u8>> = pairs.range(range).map(|(key, _)| key.clone()).collect();
                    for key in gone {
                        pairs.remove(&key);
                    }
                }
            }
        }
    }

    fn pairs_of_state(&mut self) -> &mut Arc<Pairs> {
        &mut self.0[Table::State as usize]
    }

    fn pairs(&mut self, table: Table) -> &mut Pairs {
        Arc::make_mut(&mut self.0[table as usize])
    }
}

/// A file: what is on the disk, and what was written since.
#[derive(Clone, Debug, Default)]
struct Contained {
    /// None: it was never synced.
    synced: Option<Vec<u8>>,
    written: Vec<(u64, Vec<u8>)>,
    now: Vec<u8>,
    /// A sync of it has failed: what is written never reaches the disk.
    lying: bool,
}

/// A file lives on while it is open, whatever becomes of its name.
type SharedFile = Arc<Mutex<Contained>>;

fn write_at(contents: &mut Vec<u8>, offset: u64, bytes: &[u8]) {
    let (from, to) = (offset as usize, offset as usize + bytes.len());
    if contents.len() < to {
        contents.resize(to, 0);
    }
    contents[from..to].copy_from_slice(bytes);
}

/// What a disk is made to do.
#[derive(Clone, Debug, Default)]
pub(crate) struct Faults {
    /// A sync of the log takes this long at most.
    pub(crate) sync_ms_max: u64,
    /// The sync after so many others fails; 0: the next one.
    pub(crate) fail_sync_after: Option<u64>,
    /// Nothing can be written any more.
    pub(crate) full: bool,
    /// The power is lost instead of the write or sync after so many others; 0: the next one.
    pub(crate) lose_power_after: Option<u64>,
}

/// What a disk did to the node that has it open, after which that node stops.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Harm {
    /// It refused a write for want of room.
    Full,
    /// A sync failed.
    FailedSync,
    /// It lost power, or its process was killed.
    Off,
}

/// What happened on a disk.
#[derive(Clone, Debug, Default)]
pub(crate) struct Counts {
    pub(crate) syncs: u64,
    /// Of the tables: those of files aren't counted.
    pub(crate) failed_syncs: u64,
    pub(crate) refused_full: u64,
    pub(crate) batches_lost: u64,
    pub(crate) batches_kept_by_chance: u64,
    pub(crate) torn_files: u64,
}

struct Inner {
    random: Random,
    /// Counts the starts of the machine. What an earlier one has open is dead.
    boot: u64,
    /// The power was lost: nothing works until the next start.
    off: bool,
    /// A sync has failed: nothing reaches the disk any more.
    lying: bool,
    now: Contents,
    synced: Contents,
    /// Batches since the last sync, and the number of the first of them.
    unsynced: Vec<Vec<Change>>,
    unsynced_first: u64,
    /// Batches of the state since it was last made durable.
    volatile: Vec<Vec<Change>>,
    /// The state could not be made durable once: it never is again.
    lying_of_state: bool,
    files: BTreeMap<PathBuf, SharedFile>,
    removed: BTreeMap<PathBuf, SharedFile>,
    faults: Faults,
    /// The last harm since the node started.
    harm: Option<Harm>,
    counts: Counts,
    on_power_loss: Box<dyn Fn() + Send>,
}

impl fmt::Debug for Inner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Inner").field("boot", &self.boot).field("off", &self.off).finish_non_exhaustive()
    }
}

/// The disk of one host. All clones are the same disk; each is used by one start of its node.
#[derive(Clone, Debug)]
pub(crate) struct Disk {
    inner: Arc<Mutex<Inner>>,
    boot: u64,
}

impl Disk {
    /// An empty disk. `on_power_loss` is called when it makes the power fail.
    pub(crate) fn new(random: Random, on_power_loss: impl Fn() + Send + 'static) -> Disk {
        let inner = Inner {
            random,
            boot: 0,
            off: false,
            lying: false,
            now: Contents::default(),
            synced: Contents::default(),
            unsynced: Vec::new(),
            unsynced_first: 0,
            volatile: Vec::new(),
            lying_of_state: false,
            files: BTreeMap::new(),
            removed: BTreeMap::new(),
            faults: Faults::default(),
            harm: None,
            counts: Counts::default(),
            on_power_loss: Box::new(on_power_loss),
        };
        Disk { inner: Arc::new(Mutex::new(inner)), boot: 0 }
    }

    /// The power is back.
    pub(crate) fn switch_on(&self) {
        self.lock().off = false;
    }

    /// The node starts: whatever was open is no longer.
    pub(crate) fn start(&self) -> Disk {
        self.switch_on();
        let mut inner = self.lock();
        inner.boot += 1;
        inner.harm = None;
        inner.lose_state();
        Disk { inner: self.inner.clone(), boot: inner.boot }
    }

    /// The process was killed: all that it wrote is still there, but for the state, and nothing it has open works any more.
    pub(crate) fn kill(&self) {
        let mut inner = self.lock();
        (inner.off, inner.harm) = (true, Some(Harm::Off));
    }

    /// The power is lost.
    pub(crate) fn lose_power(&self) {
        self.lock().lose_power();
    }

    /// Whether the power was lost, or the process killed.
    pub(crate) fn is_off(&self) -> bool {
        self.lock().off
    }

    /// What it did to the node that has it open.
    pub(crate) fn harm(&self) -> Option<Harm> {
        self.lock().harm
    }

    /// Changes what it is made to do.
    pub(crate) fn fault(&self, change: impl FnOnce(&mut Faults)) {
        change(&mut self.lock().faults);
    }

    /// What happened so far.
    pub(crate) fn counts(&self) -> Counts {
        self.lock().counts.clone()
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().expect("nothing panics while it holds the disk's lock")
    }

    /// The disk, for an action of the node that has it open.
    fn act(&self) -> io::Result<MutexGuard<'_, Inner>> {
        let inner = self.lock();
        if inner.off || inner.boot != self.boot {
            Err(io::Error::other("the machine is off"))
        } else {
            Ok(inner)
        }
    }

    /// The same, for a write or a sync: it may be the moment in which the power is lost.
    fn change(&self) -> io::Result<MutexGuard<'_, Inner>> {
        let mut inner = self.act()?;
        match &mut inner.faults.lose_power_after {
            Some(0) => {
                inner.faults.lose_power_after = None;
                inner.lose_power();
                (inner.on_power_loss)();
                return Err(io::Error::other("the power was lost"));
            }
            Some(more) => *more -= 1,
            None => {}
        }
        Ok(inner)
    }

    fn write(&self, batch: Vec<Change>) -> io::Result<()> {
        let mut inner = self.change()?;
        inner.need_room()?;
        inner.now.apply(&batch);
        let of_state = batch.iter().any(Change::is_of_state);
        assert!(
            !of_state || batch.iter().all(Change::is_of_state),
            "a batch changes the state alone, or others"
        );
        if of_state {
            inner.volatile.push(batch)
        } else {
            inner.unsynced.push(batch)
        }
        Ok(())
    }

    /// Syncs the batches up to this number.
    fn sync_up_to(&self, end: u64) -> io::Result<()> {
        let mut inner = self.change()?;
        if let Err(error) = inner.may_fail_sync() {
            inner.lying = true;
            inner.counts.failed_syncs += 1;
            return Err(error);
        }
        if inner.lying {
            return Ok(());
        }
        let count = end.saturating_sub(inner.unsynced_first) as usize;
        for batch in inner.unsynced.drain(..count).collect::<Vec<_>>() {
            inner.synced.apply(&batch);
        }
        inner.unsynced_first = inner.unsynced_first.max(end);
        Ok(())
    }

    fn written(&self) -> io::Result<u64> {
        let inner = self.act()?;
        Ok(inner.unsynced_first + inner.unsynced.len() as u64)
    }
}

impl Inner {
    fn need_room(&mut self) -> io::Result<()> {
        if self.faults.full {
            self.counts.refused_full += 1;
            self.harm = self.harm.or(Some(Harm::Full));
            return Err(io::Error::from(io::ErrorKind::StorageFull));
        }
        Ok(())
    }

    fn may_fail_sync(&mut self) -> io::Result<()> {
        self.counts.syncs += 1;
        match &mut self.faults.fail_sync_after {
            Some(0) => {
                self.faults.fail_sync_after = None;
                self.harm = Some(Harm::FailedSync);
                Err(io::Error::other("the sync failed"))
            }
            Some(more) => {
                *more -= 1;
                Ok(())
            }
            None => Ok(()),
        }
    }

    /// What wasn't made durable of the state is gone, but for what the database had made so by itself.
    fn lose_state(&mut self) {
        let waiting = self.volatile.len() as u64;
        let lying = std::mem::take(&mut self.lying_of_state);
        if waiting == 0 {
            return;
        }
        let kept = match self.random.below(3) {
            _ if lying => 0,
            0 => 0,
            1 => waiting,
            _ => self.random.below(waiting + 1),
        };
        self.counts.batches_kept_by_chance += kept;
        self.counts.batches_lost += waiting - kept;
        for batch in std::mem::take(&mut self.volatile).into_iter().take(kept as usize) {
            self.synced.apply(&batch);
        }
        *self.now.pairs_of_state() = self.synced.of(Table::State).clone();
    }

    fn lose_power(&mut self) {
        self.lose_state();
        (self.off, self.harm) = (true, Some(Harm::Off));
        let waiting = self.unsynced.len() as u64;
        let kept = match self.random.below(3) {
            _ if self.lying => 0,
            0 => 0,
            1 => waiting,
            _ => self.random.below(waiting + 1),
        };
        self.counts.batches_kept_by_chance += kept;
        self.counts.batches_lost += waiting - kept;
        for batch in std::mem::take(&mut self.unsynced).into_iter().take(kept as usize) {
            self.synced.apply(&batch);
        }
        self.unsynced_first += waiting;
        self.now = self.synced.clone();
        self.lying = false;
        for (path, file) in std::mem::take(&mut self.removed) {
            if self.random.below(2) == 0 {
                self.files.entry(path).or_insert(file);
            }
        }
        let (random, counts) = (&mut self.random, &mut self.counts);
        self.files.retain(|_, file| held(file).lose_power(random, counts));
    }
}

impl Contained {
    /// False: there is no such file any more.
    fn lose_power(&mut self, random: &mut Random, counts: &mut Counts) -> bool {
        let written = std::mem::take(&mut self.written);
        let lying = std::mem::take(&mut self.lying);
        if self.synced.is_none() && random.below(2) == 0 {
            return false;
        }
        let mut contents = self.synced.take().unwrap_or_default();
        for (offset, bytes) in written {
            let kept = match random.below(3) {
                _ if lying => 0,
                0 => 0,
                1 => bytes.len(),
                _ => random.below(bytes.len() as u64 + 1) as usize,
            };
            counts.torn_files += u64::from(kept > 0 && kept < bytes.len());
            if kept > 0 {
                write_at(&mut contents, offset, &bytes[..kept]);
            }
        }
        (self.synced, self.now) = (Some(contents.clone()), contents);
        true
    }
}

impl Storage for Disk {
    fn open_tables(&self, _: &Path, _: usize) -> Result<Box<dyn Tables>, HostError> {
        Ok(Box::new(self.clone()))
    }

    fn create_folder(&self, _: &Path) -> io::Result<()> {
        self.act().map(drop)
    }

    fn list(&self, folder: &Path) -> io::Result<Vec<PathBuf>> {
        let inner = self.act()?;
        Ok(inner.files.keys().filter(|path| path.parent() == Some(folder)).cloned().collect())
    }

    fn open(&self, path: &Path, how: Open) -> io::Result<Arc<dyn File>> {
        let missing = !self.act()?.files.contains_key(path);
        match how {
            Open::Existing if missing => return Err(io::Error::from(io::ErrorKind::NotFound)),
            Open::Existing => {}
            Open::OrCreate | Open::Empty => {
                if missing || how == Open::Empty {
                    let mut inner = self.change()?;
                    inner.need_room()?;
                    inner.files.insert(path.to_owned(), SharedFile::default());
                }
            }
        }
        let file = self.act()?.files[path].clone();
        Ok(Arc::new(OpenFile { disk: self.clone(), file }))
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        let mut inner = self.change()?;
        let file = inner.files.remove(path).ok_or(io::ErrorKind::NotFound)?;
        inner.removed.insert(path.to_owned(), file);
        Ok(())
    }

    fn waits(&self) -> bool {
        false
    }
}

fn held(file: &SharedFile) -> MutexGuard<'_, Contained> {
    file.lock().expect("nothing panics while it holds a file's lock")
}

/// A file that a node has open.
#[derive(Debug)]
struct OpenFile {
    disk: Disk,
    file: SharedFile,
}

impl File for OpenFile {
    fn bytes(&self) -> io::Result<u64> {
        let _on = self.disk.act()?;
        Ok(held(&self.file).now.len() as u64)
    }

    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let _on = self.disk.act()?;
        let file = held(&self.file);
        let from = usize::try_from(offset).unwrap_or(usize::MAX);
        let there = file.now.get(from..).and_then(|rest| rest.get(..buffer.len()));
        buffer.copy_from_slice(there.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }

    fn write_all_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.disk.change()?.need_room()?;
        let mut file = held(&self.file);
        write_at(&mut file.now, offset, bytes);
        file.written.push((offset, bytes.to_vec()));
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        let synced = self.disk.change()?.may_fail_sync();
        let mut file = held(&self.file);
        file.lying |= synced.is_err();
        if !file.lying {
            file.written.clear();
            file.synced = Some(file.now.clone());
        }
        synced
    }
}

impl Reads for Disk {
    fn get(&self, table: Table, key: &[u8]) -> io::Result<Option<Bytes>> {
        Ok(self.act()?.now.of(table).get(key).cloned())
    }

    fn cursor<'a>(
        &'a self,
        table: Table,
        from: &[u8],
        to: Option<&[u8]>,
        start: Start,
    ) -> Box<dyn Cursor + 'a> {
        let failed = self.act().err().map(|error| error.to_string());
        Place::boxed(self.lock().now.of(table).clone(), from, to, start, failed)
    }
}

impl Tables for Disk {
    fn batch(&self) -> Box<dyn Batch> {
        Box::new(Changes { disk: self.clone(), changes: Vec::new(), bytes: 0 })
    }

    fn sync(&self) -> io::Result<()> {
        self.sync_up_to(self.written()?)
    }

    fn make_state_durable(&self) -> io::Result<()> {
        let mut inner = self.change()?;
        inner.need_room()?;
        if let Err(error) = inner.may_fail_sync() {
            inner.lying_of_state = true;
            inner.counts.failed_syncs += 1;
            return Err(error);
        }
        if !inner.lying_of_state {
            for batch in std::mem::take(&mut inner.volatile) {
                inner.synced.apply(&batch);
            }
        }
        Ok(())
    }

    fn sync_in_time(&self) -> BoxFuture<'_, io::Result<()>> {
        Box::pin(async {
            let end = self.written()?;
            let pause = {
                let mut inner = self.act()?;
                let most = inner.faults.sync_ms_max;
                inner.random.below(most + 1)
            };
            if pause > 0 {
                tokio::time::sleep(Duration::from_millis(pause)).await;
            }
            self.sync_up_to(end)
        })
    }

    fn view(&self) -> Box<dyn Reads + '_> {
        Box::new(View(self.lock().now.clone()))
    }
}

/// The tables as they were.
struct View(Contents);

impl Reads for View {
    fn get(&self, table: Table, key: &[u8]) -> io::Result<Option<Bytes>> {
        Ok(self.0.of(table).get(key).cloned())
    }

    fn cursor<'a>(
        &'a self,
        table: Table,
        from: &[u8],
        to: Option<&[u8]>,
        start: Start,
    ) -> Box<dyn Cursor + 'a> {
        Place::boxed(self.0.of(table).clone(), from, to, start, None)
    }
}

/// A place in the pairs as they were when the cursor was made.
struct Place {
    pairs: Arc<Pairs>,
    from: Vec<u8>,
    to: Option<Vec<u8>>,
    at: Option<(Vec<u8>, Bytes)>,
    failed: Option<String>,
}

impl Place {
    fn boxed<'a>(
        pairs: Arc<Pairs>,
        from: &[u8],
        to: Option<&[u8]>,
        start: Start,
        failed: Option<String>,
    ) -> Box<dyn Cursor + 'a> {
        let mut place = Place { pairs, from: from.to_vec(), to: to.map(<[u8]>::to_vec), at: None, failed };
        if place.failed.is_none() {
            let (first, last) = (Bound::Included(&place.from[..]), place.end());
            place.at = match start {
                Start::First => place.found(first, last, false),
                Start::Last => place.found(first, last, true),
            };
        }
        Box::new(place)
    }

    fn end(&self) -> Bound<&[u8]> {
        self.to.as_deref().map_or(Bound::Unbounded, Bound::Excluded)
    }

    fn found(&self, from: Bound<&[u8]>, to: Bound<&[u8]>, last: bool) -> Option<(Vec<u8>, Bytes)> {
        if let (Bound::Included(from) | Bound::Excluded(from), Bound::Excluded(to)) = (from, to)
            && from >= to
        {
            return None;
        }
        let mut range = self.pairs.range::<[u8], _>((from, to));
        let pair = if last { range.next_back() } else { range.next() };
        pair.map(|(key, value)| (key.clone(), value.clone()))
    }
}

impl Cursor for Place {
    fn item(&self) -> Option<(&[u8], &[u8])> {
        self.at.as_ref().map(|(key, value)| (&key[..], &value[..]))
    }

    fn next(&mut self) {
        if let Some((key, _)) = self.at.take() {
            self.at = self.found(Bound::Excluded(&key), self.end(), false);
        }
    }

    fn prev(&mut self) {
        if let Some((key, _)) = self.at.take() {
            self.at = self.found(Bound::Included(&self.from), Bound::Excluded(&key), true);
        }
    }

    fn status(&self) -> io::Result<()> {
        self.failed.clone().map_or(Ok(()), |why| Err(io::Error::other(why)))
    }
}

struct Changes {
    disk: Disk,
    changes: Vec<Change>,
    bytes: usize,
}

impl Batch for Changes {
    fn put(&mut self, table: Table, key: &[u8], value: &[u8]) {
        self.bytes += key.len() + value.len();
        self.changes.push(Change::Put(table, key.to_vec(), Bytes::copy_from_slice(value)));
    }

    fn delete(&mut self, table: Table, key: &[u8]) {
        self.bytes += key.len();
        self.changes.push(Change::Delete(table, key.to_vec()));
    }

    fn delete_range(&mut self, table: Table, from: &[u8], to: &[u8]) {
        self.bytes += from.len() + to.len();
        self.changes.push(Change::DeleteRange(table, from.to_vec(), to.to_vec()));
    }

    fn bytes(&self) -> usize {
        self.bytes
    }

    fn write(self: Box<Self>) -> io::Result<()> {
        self.disk.write(self.changes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(disk: &Disk, key: &str) {
        let mut batch = disk.batch();
        for table in [Table::Log, Table::Meta] {
            batch.put(table, key.as_bytes(), b"value");
        }
        batch.write().unwrap();
    }

    fn has(disk: &Disk, table: Table, key: &str) -> bool {
        disk.get(table, key.as_bytes()).unwrap().is_some()
    }

    fn fresh(seed: u64) -> Disk {
        Disk::new(Random::of(seed), || {}).start()
    }

    #[test]
    fn what_was_synced_survives_and_of_the_rest_an_unbroken_run_of_whole_batches() {
        let mut kept = [0; 4];
        for seed in 0..200 {
            let disk = fresh(seed);
            write(&disk, "a");
            disk.sync().unwrap();
            for key in ["b", "c", "d"] {
                write(&disk, key);
            }
            disk.lose_power();
            assert!(disk.get(Table::Log, b"a").is_err(), "nothing works without power");
            let disk = disk.start();
            assert!(has(&disk, Table::Log, "a"));
            let there: Vec<bool> = ["b", "c", "d"].map(|key| has(&disk, Table::Log, key)).into();
            assert!(there.is_sorted_by(|before, after| before >= after), "a hole: {there:?}");
            for (key, there) in ["b", "c", "d"].iter().zip(&there) {
                assert_eq!(has(&disk, Table::Meta, key), *there, "half a batch");
            }
            kept[there.iter().filter(|there| **there).count()] += 1;
        }
        assert!(kept.iter().all(|times| *times > 0), "every length happens: {kept:?}");
    }

    #[test]
    fn of_the_state_a_run_of_whole_batches_survives_whether_the_power_is_lost_or_the_process_killed() {
        for kills in [false, true] {
            let mut kept = [0; 4];
            for seed in 0..200 {
                let disk = fresh(seed);
                let write = |key: &str| {
                    let mut batch = disk.batch();
                    batch.put(Table::State, key.as_bytes(), b"value");
                    batch.put(Table::State, format!("{key}2").as_bytes(), b"value");
                    batch.write().unwrap();
                };
                write("a");
                disk.make_state_durable().unwrap();
                ["b", "c", "d"].into_iter().for_each(write);
                disk.sync().unwrap();
                if kills {
                    disk.kill()
                } else {
                    disk.lose_power()
                }
                let disk = disk.start();
                assert!(has(&disk, Table::State, "a"));
                let there: Vec<bool> = ["b", "c", "d"].map(|key| has(&disk, Table::State, key)).into();
                assert!(there.is_sorted_by(|before, after| before >= after), "a hole: {there:?}");
                let others = ["b2", "c2", "d2"].map(|key| has(&disk, Table::State, key));
                assert_eq!(there, others, "half a batch");
                kept[there.iter().filter(|there| **there).count()] += 1;
            }
            assert!(kept.iter().all(|times| *times > 0), "every length happens: {kept:?}");
        }
    }

    #[test]
    fn a_state_that_could_not_be_made_durable_never_is() {
        for seed in 0..20 {
            let disk = fresh(seed);
            let mut batch = disk.batch();
            batch.put(Table::State, b"a", b"value");
            batch.write().unwrap();
            disk.fault(|faults| faults.fail_sync_after = Some(0));
            assert!(disk.make_state_durable().is_err());
            disk.make_state_durable().unwrap();
            disk.kill();
            assert!(!has(&disk.start(), Table::State, "a"));
        }
    }

    #[test]
    fn after_a_failed_sync_nothing_reaches_the_disk_whatever_later_syncs_say() {
        for seed in 0..20 {
            let disk = fresh(seed);
            disk.fault(|faults| faults.fail_sync_after = Some(0));
            write(&disk, "a");
            assert!(disk.sync().is_err());
            write(&disk, "b");
            disk.sync().unwrap();
            assert!(has(&disk, Table::Log, "b"), "it can be read");
            disk.lose_power();
            let disk = disk.start();
            assert!(!has(&disk, Table::Log, "a") && !has(&disk, Table::Log, "b"));
        }
    }

    #[test]
    fn a_file_that_was_not_synced_may_be_torn_and_one_that_was_is_not() {
        let (path, mut torn) = (Path::new("/data/file"), 0);
        for seed in 0..200 {
            let disk = fresh(seed);
            let file = disk.open(path, Open::Empty).unwrap();
            file.write_all_at(b"first", 0).unwrap();
            file.sync().unwrap();
            file.write_all_at(b"later", 5).unwrap();
            disk.lose_power();
            let disk = disk.start();
            let file = disk.open(path, Open::Existing).unwrap();
            let mut first = [0; 5];
            file.read_exact_at(&mut first, 0).unwrap();
            assert_eq!(&first, b"first");
            torn += u64::from(![5, 10].contains(&file.bytes().unwrap()));
        }
        assert!(torn > 0);
    }

    #[test]
    fn a_full_disk_takes_nothing_and_forgets_nothing() {
        let disk = fresh(1);
        write(&disk, "a");
        disk.fault(|faults| faults.full = true);
        let mut batch = disk.batch();
        batch.put(Table::Log, b"b", b"value");
        assert_eq!(batch.write().unwrap_err().kind(), io::ErrorKind::StorageFull);
        assert!(disk.open(Path::new("/data/file"), Open::Empty).is_err());
        assert!(has(&disk, Table::Log, "a") && !has(&disk, Table::Log, "b"));
    }

    #[test]
    fn the_cursor_goes_both_ways_within_its_range() {
        let disk = fresh(1);
        for key in ["a", "b", "c", "d"] {
            write(&disk, key);
        }
        let keys = |start, forward: bool| {
            let mut cursor = disk.cursor(Table::Log, b"b", Some(b"d"), start);
            let mut keys = String::new();
            while let Some((key, _)) = cursor.item() {
                keys.push_str(std::str::from_utf8(key).unwrap());
                if forward { cursor.next() } else { cursor.prev() }
            }
            keys
        };
        assert_eq!((keys(Start::First, true), keys(Start::Last, false)), ("bc".to_owned(), "cb".to_owned()));
        assert_eq!(disk.cursor(Table::Log, b"x", Some(b"y"), Start::First).item(), None);
    }
}
