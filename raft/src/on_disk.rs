//! The disk of this machine: RocksDB and plain files.

use std::{
    fs::{self, OpenOptions, TryLockError},
    io,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicU64, Ordering},
    },
};

use bytes::Bytes;
use rocksdb::{
    BlockBasedOptions, Cache, ColumnFamily, ColumnFamilyDescriptor, DB, DBRawIterator, DBRecoveryMode,
    Options, ReadOptions, WriteBatch,
};

use crate::{
    api::HostError,
    disk::{damaged, host_error, seal},
    storage::{Batch, Cursor, File, Open, Reads, Start, Storage, Table, Tables},
    wal::{self, Manifest, SYNCED, Synced, SyncedFile},
};

/// Memtables: small ones would be flushed all the time, large ones make recovery slow.
const LOG_MEMTABLE_BYTES: usize = 64 << 20;
const META_MEMTABLE_BYTES: usize = 1 << 20;
const STATE_MEMTABLE_BYTES: usize = 32 << 20;
/// How much of the state's memtable is a filter that tells which keys it doesn't have.
const MEMTABLE_BLOOM_RATIO: f64 = 0.05;
/// The write-ahead log is cut when it reaches this size in all.
const WAL_BYTES_MAX: u64 = 512 << 20;

/// RocksDB and plain files.
#[derive(Clone, Copy, Debug, Default)]
pub struct OnDisk;

impl Storage for OnDisk {
    fn open_tables(&self, folder: &Path, cache_bytes: usize) -> Result<Box<dyn Tables>, HostError> {
        let path = folder.join("db");
        let lock = lock_folder(folder)?;
        let synced = SyncedFile::open(&folder.join("synced")).map_err(host_error)?;
        let remembered = synced.newest();
        remembered.manifest.check(&path).map_err(host_error)?;
        wal::mend(&path, remembered.sequence, || oldest_log(&path)).map_err(host_error)?;
        let mut options = Options::default();
        options.create_if_missing(true);
        options.create_missing_column_families(true);
        options.set_paranoid_checks(true);
        // What was torn is cut off already: anything else is damage.
        options.set_wal_recovery_mode(DBRecoveryMode::AbsoluteConsistency);
        options.set_track_and_verify_wals_in_manifest(true);
        options.set_max_total_wal_size(WAL_BYTES_MAX);
        options.set_max_background_jobs(2);
        options.set_keep_log_file_num(2);
        options.set_max_open_files(512);
        let cache = Cache::new_lru_cache(cache_bytes);
        let family = |table| {
            let mut blocks = BlockBasedOptions::default();
            blocks.set_block_cache(&cache);
            blocks.set_bloom_filter(10.0, false);
            let mut options = Options::default();
            options.set_block_based_table_factory(&blocks);
            options.set_write_buffer_size(match table {
                Table::Log => LOG_MEMTABLE_BYTES,
                Table::Meta => META_MEMTABLE_BYTES,
                Table::State => STATE_MEMTABLE_BYTES,
            });
            options.set_compression_type(rocksdb::DBCompressionType::Lz4);
            if table == Table::State {
                // Every new record is looked up once before it is there.
                options.set_memtable_prefix_bloom_ratio(MEMTABLE_BLOOM_RATIO);
                options.set_memtable_whole_key_filtering(true);
            }
            ColumnFamilyDescriptor::new(name(table), options)
        };
        let db = DB::open_cf_descriptors(&options, &path, Table::ALL.map(family));
        let db = db.map_err(|error| open_error(&path, error))?;
        let found = db.latest_sequence_number();
        if found < remembered.sequence {
            return Err(HostError::Damaged(format!(
                "{}: everything up to write {} was synced, but it ends at {found}",
                path.display(),
                remembered.sequence
            )));
        }
        // The names of the database and of the files beside it.
        sync_folder(folder).map_err(host_error)?;
        let tables = Shared { db, synced: AtomicU64::new(0), file: Mutex::new(synced), _lock: lock };
        Ok(Box::new(Rocks(Arc::new(tables))))
    }

    fn create_folder(&self, folder: &Path) -> io::Result<()> {
        let folder = std::path::absolute(folder)?;
        let missing = folder.ancestors().take_while(|above| !above.exists()).count();
        fs::create_dir_all(&folder)?;
        // The innermost one may have been made by a process that was killed before it could do this.
        folder.ancestors().skip(1).take(missing.max(1)).try_for_each(sync_folder)
    }

    fn list(&self, folder: &Path) -> io::Result<Vec<PathBuf>> {
        let mut paths = fs::read_dir(folder)?
            .map(|entry| entry.map(|entry| entry.path()))
            .collect::<io::Result<Vec<PathBuf>>>()?;
        paths.sort();
        Ok(paths)
    }

    fn open(&self, path: &Path, how: Open) -> io::Result<Arc<dyn File>> {
        let mut options = OpenOptions::new();
        options.read(true);
        match how {
            Open::Existing => options.write(false),
            Open::OrCreate => options.write(true).create(true).truncate(false),
            Open::Empty => options.write(true).create(true).truncate(true),
        };
        Ok(Arc::new(PlainFile(options.open(path)?)))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::rename(from, to)?;
        sync_folder(to.parent().ok_or_else(|| io::Error::other("a file stands in a folder"))?)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        fs::remove_file(path)
    }
}

#[derive(Debug)]
struct PlainFile(fs::File);

impl File for PlainFile {
    fn bytes(&self) -> io::Result<u64> {
        Ok(self.0.metadata()?.len())
    }

    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.0.read_exact_at(buffer, offset)
    }

    fn write_all_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.0.write_all_at(bytes, offset)
    }

    fn sync(&self) -> io::Result<()> {
        self.0.sync_all()
    }
}

/// Makes the names in a folder durable.
fn sync_folder(folder: &Path) -> io::Result<()> {
    fs::File::open(folder)?.sync_all()
}

/// Nobody else may open the tables of a folder while the file that is given lives. RocksDB has a lock of its own, but its logs are looked
/// at before.
fn lock_folder(folder: &Path) -> Result<fs::File, HostError> {
    let file = OpenOptions::new().create(true).truncate(false).write(true).open(folder.join("lock"));
    let file = file.map_err(host_error)?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(HostError::Locked(folder.to_path_buf())),
        Err(TryLockError::Error(error)) => Err(host_error(error)),
    }
}

/// The number of the oldest write-ahead log that the database still needs, as far as it knows without any of them.
fn oldest_log(path: &Path) -> io::Result<u64> {
    let nowhere = path.with_file_name("no-logs");
    fs::create_dir_all(&nowhere)?;
    let mut options = Options::default();
    options.set_wal_dir(&nowhere);
    let families = DB::list_cf(&options, path).map_err(io_error)?;
    let db = DB::open_cf_for_read_only(&options, path, families, false).map_err(io_error)?;
    let oldest = db.property_int_value("rocksdb.min-log-number-to-keep").map_err(io_error)?;
    drop(db);
    fs::remove_dir_all(&nowhere)?;
    oldest.ok_or_else(|| io::Error::other("the database doesn't tell its oldest log"))
}

/// The database: a column family for each table.
struct Rocks(Arc<Shared>);

struct Shared {
    db: DB,
    /// Everything up to this sequence number is on disk, if it isn't 0, and no batch has said so yet.
    synced: AtomicU64,
    file: Mutex<SyncedFile>,
    _lock: fs::File,
}

impl Drop for Shared {
    /// What was written since the last sync is in the files, and so is what the manifest says of it.
    fn drop(&mut self) {
        let mut file = self.file();
        let Synced { sequence, manifest } = file.newest();
        // If it fails, the file lags, as after a kill.
        if let Ok(manifest) = self.manifest(manifest) {
            let _ = file.write(Synced { sequence, manifest });
        }
    }
}

impl Shared {
    /// How far the manifest goes, synced. It seldom changes.
    fn manifest(&self, known: Manifest) -> io::Result<Manifest> {
        let path = self.db.path();
        let bytes = fs::metadata(Manifest::path(path, known.number)).map(|data| data.len());
        if bytes.is_ok_and(|bytes| bytes == known.bytes) {
            return Ok(known);
        }
        let found = Manifest::find(path).ok_or_else(|| io::Error::other("the manifest can't be found"))?;
        fs::File::open(Manifest::path(path, found.number))?.sync_all()?;
        Ok(found)
    }

    fn file(&self) -> MutexGuard<'_, SyncedFile> {
        self.file.lock().expect("nothing panics while it holds this lock")
    }
}

fn name(table: Table) -> &'static str {
    match table {
        Table::Log => "log",
        Table::Meta => "meta",
        Table::State => "state",
    }
}

fn family(db: &DB, table: Table) -> &ColumnFamily {
    db.cf_handle(name(table)).expect("all column families are made when the database is opened")
}

impl Reads for Rocks {
    fn get(&self, table: Table, key: &[u8]) -> io::Result<Option<Bytes>> {
        let value = self.0.db.get_pinned_cf(family(&self.0.db, table), key).map_err(io_error)?;
        Ok(value.map(|value| Bytes::copy_from_slice(&value)))
    }

    fn cursor<'a>(
        &'a self,
        table: Table,
        from: &[u8],
        to: Option<&[u8]>,
        start: Start,
    ) -> Box<dyn Cursor + 'a> {
        let options = range(from, to);
        place(self.0.db.raw_iterator_cf_opt(family(&self.0.db, table), options), start)
    }
}

impl Tables for Rocks {
    fn batch(&self) -> Box<dyn Batch> {
        Box::new(RocksBatch { tables: self.0.clone(), changes: WriteBatch::default() })
    }

    fn sync(&self) -> io::Result<()> {
        let mut file = self.0.file();
        let sequence = self.0.db.latest_sequence_number();
        self.0.db.flush_wal(true).map_err(io_error)?;
        let manifest = self.0.manifest(file.newest().manifest)?;
        file.write(Synced { sequence, manifest })?;
        self.0.synced.store(sequence, Ordering::Release);
        Ok(())
    }

    fn view(&self) -> Box<dyn Reads + '_> {
        Box::new(RocksView { db: &self.0.db, snapshot: self.0.db.snapshot() })
    }
}

struct RocksView<'d> {
    db: &'d DB,
    snapshot: rocksdb::Snapshot<'d>,
}

impl Reads for RocksView<'_> {
    fn get(&self, table: Table, key: &[u8]) -> io::Result<Option<Bytes>> {
        let value = self.snapshot.get_cf(family(self.db, table), key).map_err(io_error)?;
        Ok(value.map(Bytes::from))
    }

    fn cursor<'a>(
        &'a self,
        table: Table,
        from: &[u8],
        to: Option<&[u8]>,
        start: Start,
    ) -> Box<dyn Cursor + 'a> {
        let mut options = range(from, to);
        // Whoever reads a view reads all of it once: what is hot stays in the cache.
        options.fill_cache(false);
        place(self.snapshot.raw_iterator_cf_opt(family(self.db, table), options), start)
    }
}

fn range(from: &[u8], to: Option<&[u8]>) -> ReadOptions {
    let mut options = ReadOptions::default();
    options.set_iterate_lower_bound(from);
    if let Some(to) = to {
        options.set_iterate_upper_bound(to);
    }
    options
}

fn place<'a>(mut iterator: DBRawIterator<'a>, start: Start) -> Box<dyn Cursor + 'a> {
    match start {
        Start::First => iterator.seek_to_first(),
        Start::Last => iterator.seek_to_last(),
    }
    Box::new(RocksCursor(iterator))
}

struct RocksCursor<'a>(DBRawIterator<'a>);

impl Cursor for RocksCursor<'_> {
    fn item(&self) -> Option<(&[u8], &[u8])> {
        self.0.item()
    }

    fn next(&mut self) {
        self.0.next();
    }

    fn prev(&mut self) {
        self.0.prev();
    }

    fn status(&self) -> io::Result<()> {
        self.0.status().map_err(io_error)
    }
}

struct RocksBatch {
    tables: Arc<Shared>,
    changes: WriteBatch,
}

impl Batch for RocksBatch {
    fn put(&mut self, table: Table, key: &[u8], value: &[u8]) {
        self.changes.put_cf(family(&self.tables.db, table), key, value);
    }

    fn delete(&mut self, table: Table, key: &[u8]) {
        self.changes.delete_cf(family(&self.tables.db, table), key);
    }

    fn delete_range(&mut self, table: Table, from: &[u8], to: &[u8]) {
        self.changes.delete_range_cf(family(&self.tables.db, table), from, to);
    }

    fn bytes(&self) -> usize {
        self.changes.size_in_bytes()
    }

    fn write(self: Box<Self>) -> io::Result<()> {
        let RocksBatch { tables, mut changes } = *self;
        let synced = tables.synced.swap(0, Ordering::AcqRel);
        if synced > 0 {
            changes.put_cf(family(&tables.db, Table::Meta), SYNCED, seal(SYNCED, &synced));
        }
        tables.db.write(changes).map_err(io_error)
    }
}

fn open_error(path: &Path, error: rocksdb::Error) -> HostError {
    match error.kind() {
        rocksdb::ErrorKind::Corruption => HostError::Damaged(error.to_string()),
        _ if error.to_string().to_lowercase().contains("lock") => HostError::Locked(path.to_path_buf()),
        _ => HostError::Storage(error.to_string()),
    }
}

fn io_error(error: rocksdb::Error) -> io::Error {
    match error.kind() {
        rocksdb::ErrorKind::Corruption => damaged(error.as_ref()),
        _ => io::Error::other(error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY_BYTES: usize = 8;

    fn put(tables: &dyn Tables, number: u64) {
        let mut batch = tables.batch();
        batch.put(Table::State, &number.to_be_bytes(), &[number as u8; 3000]);
        batch.write().unwrap();
    }

    fn open(folder: &Path) -> Result<Box<dyn Tables>, HostError> {
        OnDisk.open_tables(folder, 1 << 20)
    }

    /// The numbers that are there.
    fn found(tables: &dyn Tables) -> Vec<u64> {
        let mut cursor = tables.cursor(Table::State, &[], None, Start::First);
        let mut numbers = Vec::new();
        while let Some((key, _)) = cursor.item() {
            assert_eq!(key.len(), KEY_BYTES);
            numbers.push(u64::from_be_bytes(key.try_into().unwrap()));
            cursor.next();
        }
        cursor.status().unwrap();
        numbers
    }

    fn newest_log(folder: &Path) -> PathBuf {
        let files = fs::read_dir(folder.join("db")).unwrap().map(|entry| entry.unwrap().path());
        let logs = files.filter(|path| path.extension().is_some_and(|extension| extension == "log"));
        logs.filter(|path| path.metadata().unwrap().len() > 0).max().unwrap()
    }

    /// Twenty numbers that were synced, and forty that were not. Gives the log, and how much of it was synced.
    fn filled(folder: &Path) -> (PathBuf, u64) {
        let tables = open(folder).unwrap();
        (0..20).for_each(|number| put(&*tables, number));
        tables.sync().unwrap();
        let log = newest_log(folder);
        let synced = log.metadata().unwrap().len();
        (20..60).for_each(|number| put(&*tables, number));
        (log, synced)
    }

    #[test]
    fn holes_in_what_was_not_synced_are_cut_off_with_all_that_is_behind_them() {
        let folder = tempfile::tempdir().unwrap();
        let (log, synced) = filled(folder.path());
        let whole = fs::read(&log).unwrap();
        let copy = folder.path().join("copy");
        let mut counts = Vec::new();
        for (place, hole) in
            [(70_000, 40_000), (synced, 4096), (synced + 4096, 512), (100_000, 1), (61_440, 80_000)]
        {
            let _ = fs::remove_dir_all(&copy);
            fs::create_dir_all(copy.join("db")).unwrap();
            for entry in fs::read_dir(folder.path().join("db")).unwrap() {
                let entry = entry.unwrap();
                fs::copy(entry.path(), copy.join("db").join(entry.file_name())).unwrap();
            }
            fs::copy(folder.path().join("synced"), copy.join("synced")).unwrap();
            let mut torn = whole.clone();
            let from = place.max(synced) as usize;
            torn[from..(from + hole).min(whole.len())].fill(0);
            fs::write(copy.join("db").join(log.file_name().unwrap()), torn).unwrap();
            let tables = open(&copy).unwrap();
            let numbers = found(&*tables);
            assert!(numbers.len() >= 20, "what was synced is lost: {numbers:?}");
            assert!(
                numbers.iter().copied().eq(0..numbers.len() as u64),
                "a hole was passed over: {numbers:?}"
            );
            counts.push(numbers.len());
        }
        assert!(counts.iter().all(|count| *count < 60), "nothing was torn: {counts:?}");
        assert!(counts.iter().any(|count| *count > 20), "all that wasn't synced is always cut: {counts:?}");
    }

    #[test]
    fn a_manifest_that_ends_early_is_damage_wherever_it_ends() {
        let folder = tempfile::tempdir().unwrap();
        for number in 0..3 {
            let tables = open(folder.path()).unwrap();
            put(&*tables, number);
            tables.sync().unwrap();
        }
        let db = folder.path().join("db");
        let Manifest { number, bytes } = Manifest::find(&db).unwrap();
        let path = Manifest::path(&db, number);
        let whole = fs::read(&path).unwrap();
        for end in (0..bytes as usize).step_by(11).chain([bytes as usize - 1]) {
            fs::write(&path, &whole[..end]).unwrap();
            let refused = open(folder.path()).err().expect("a cut manifest is refused");
            assert!(matches!(refused, HostError::Damaged(_)), "{refused}");
        }
        fs::write(&path, &whole).unwrap();
        assert_eq!(found(&*open(folder.path()).unwrap()), [0, 1, 2]);
    }

    #[test]
    fn a_hole_in_what_was_synced_is_damage_whatever_else_is_forgotten() {
        let folder = tempfile::tempdir().unwrap();
        {
            let tables = open(folder.path()).unwrap();
            for number in 0..60 {
                put(&*tables, number);
                tables.sync().unwrap();
            }
        }
        let log = newest_log(folder.path());
        let whole = fs::read(&log).unwrap();
        let beside = folder.path().join("synced");
        let remembered = fs::read(&beside).unwrap();
        for place in [100, 5_000, 40_000, 90_000] {
            for forgotten in [false, true] {
                let mut damaged = whole.clone();
                damaged[place] ^= 4;
                fs::write(&log, &damaged).unwrap();
                if forgotten {
                    // As after a loss of power.
                    fs::remove_file(&beside).unwrap();
                }
                let refused = open(folder.path()).err().expect("damage is refused");
                assert!(
                    matches!(&refused, HostError::Damaged(why) if why.contains("was synced")),
                    "{refused}"
                );
                assert_eq!(fs::read(&log).unwrap(), damaged, "it was changed");
                fs::write(&beside, &remembered).unwrap();
            }
        }
        // A log that ends too early has nothing behind it that tells.
        fs::write(&log, &whole[..whole.len() / 2]).unwrap();
        let refused = open(folder.path()).err().expect("a cut log is refused");
        assert!(matches!(&refused, HostError::Damaged(_)), "{refused}");
        fs::write(&log, &whole).unwrap();
        assert_eq!(found(&*open(folder.path()).unwrap()).len(), 60);
    }
}
