//! The disk of this machine: RocksDB and plain files.
//!
//! Two databases, opened and closed together. `db` holds the logs and what belongs to them, with a write-ahead log that is synced.
//! `state` holds the state of the machines and has no log: what is written stands in memory until RocksDB makes a table of
//! it, by itself when there is enough or because it is told to. Tables are made in the order of the writes, and count from one
//! synced record of the manifest on. So what is found after a crash is the state after an unbroken run of whole batches.

use std::{
    fs::{self, OpenOptions, TryLockError},
    io,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::{
        Arc, LazyLock, Mutex, MutexGuard,
        atomic::{AtomicU64, Ordering},
    },
};

use bytes::Bytes;
use rocksdb::{
    BlockBasedOptions, Cache, ColumnFamily, ColumnFamilyDescriptor, DB, DBRawIterator, DBRecoveryMode,
    DEFAULT_COLUMN_FAMILY_NAME, Env, Options, ReadOptions, WriteBatch,
};

use crate::{
    api::HostError,
    disk::{GROUP_BYTES, damaged, host_error, seal},
    state::PREFIX_BYTES,
    storage::{Batch, Cursor, File, Open, Reads, Start, Storage, Table, Tables},
    wal::{self, Manifest, SYNCED, Synced, SyncedFile},
};

/// Memtables: small ones would be flushed all the time, large ones make recovery slow. Of the state's, what isn't in a table yet is
/// what a killed node applies again.
const LOG_MEMTABLE_BYTES: usize = 64 << 20;
const META_MEMTABLE_BYTES: usize = 16 << 20;
const STATE_MEMTABLE_BYTES: usize = 64 << 20;
/// How much of the state's memtable is a filter that tells which keys it doesn't have: some 17 bits for each. More would only lie in no
/// cache.
const MEMTABLE_BLOOM_RATIO: f64 = 0.0125;
/// The write-ahead log is cut when it reaches this size in all.
const WAL_BYTES_MAX: u64 = 512 << 20;
/// What RocksDB writes goes to the disk each time there is so much: a whole table at once would hold up the syncs of the log.
const BYTES_PER_SYNC: u64 = 1 << 20;
/// Tables of the log before they are merged: by then most of what they hold is purged.
const LOG_TABLES: i32 = 16;
/// Tables of the state before they are merged into the level below, and how large that is then: fewer merges, each of more.
const STATE_TABLES: i32 = 8;
const STATE_LEVEL_BYTES: u64 = 1 << 30;
/// So many times the tables that call for a merge may there be before writes are held up, and before they wait: merges have what
/// processor time others leave.
const TABLES_SLOW: i32 = 4;
const TABLES_STOP: i32 = 6;
/// How often RocksDB's own threads have failed.
const BACKGROUND_ERRORS: &str = "rocksdb.background-errors";

/// RocksDB and plain files.
#[derive(Clone, Copy, Debug, Default)]
pub struct OnDisk;

impl Storage for OnDisk {
    fn open_tables(&self, folder: &Path, cache_bytes: usize) -> Result<Box<dyn Tables>, HostError> {
        let lock = lock_folder(folder)?;
        let cache = Cache::new_lru_cache(cache_bytes);
        let (db, synced) = open_logged(folder, &cache)?;
        let (state, state_synced) = open_state(folder, &cache)?;
        // The names of the databases and of the files beside them.
        sync_folder(folder).map_err(host_error)?;
        let tables = Shared {
            db,
            synced: AtomicU64::new(0),
            file: Mutex::new(synced),
            state,
            state_file: Mutex::new(state_synced),
            _lock: lock,
        };
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

    fn remove(&self, path: &Path) -> io::Result<()> {
        fs::remove_file(path)
    }
}

/// Opens the database with a write-ahead log.
fn open_logged(folder: &Path, cache: &Cache) -> Result<(DB, SyncedFile), HostError> {
    let path = folder.join("db");
    let synced = SyncedFile::open(&folder.join("synced")).map_err(host_error)?;
    let remembered = synced.newest();
    remembered.manifest.check(&path).map_err(host_error)?;
    wal::mend(&path, remembered.sequence, || oldest_log(&path)).map_err(host_error)?;
    // A sync of space that was set aside, and not written, takes longer than one of a file that grows.
    let options = database_options().get_options_from_string("allow_fallocate=false");
    let mut options = options.map_err(|error| open_error(&path, error))?;
    // What was torn is cut off already: anything else is damage.
    options.set_wal_recovery_mode(DBRecoveryMode::AbsoluteConsistency);
    options.set_track_and_verify_wals_in_manifest(true);
    options.set_max_total_wal_size(WAL_BYTES_MAX);
    let families = [Table::Log, Table::Meta].map(|table| family_options(table, cache));
    let db = DB::open_cf_descriptors(&options, &path, families).map_err(|error| open_error(&path, error))?;
    check_end(&db, remembered)?;
    Ok((db, synced))
}

/// Opens the database without one.
fn open_state(folder: &Path, cache: &Cache) -> Result<(DB, SyncedFile), HostError> {
    let path = folder.join("state");
    let synced = SyncedFile::open(&folder.join("synced-state")).map_err(host_error)?;
    let remembered = synced.newest();
    // A manifest that was cut would be taken for an earlier state, perhaps one with half of a snapshot loaded.
    remembered.manifest.check(&path).map_err(host_error)?;
    let families = [family_options(Table::State, cache)];
    let db = DB::open_cf_descriptors(&database_options(), &path, families);
    let db = db.map_err(|error| open_error(&path, error))?;
    check_end(&db, remembered)?;
    Ok((db, synced))
}

fn database_options() -> Options {
    let mut options = Options::default();
    options.create_if_missing(true);
    options.create_missing_column_families(true);
    options.set_paranoid_checks(true);
    options.set_max_background_jobs(2);
    options.set_keep_log_file_num(2);
    options.set_max_open_files(512);
    options.set_bytes_per_sync(BYTES_PER_SYNC);
    options.set_env(background());
    options
}

/// RocksDB's threads that merge tables, which all databases of this process share. Nobody waits for a merge unless far too many
/// are due, so it takes what processor time others leave.
fn background() -> &'static Env {
    static ENV: LazyLock<Env> = LazyLock::new(|| {
        let mut env = Env::new().expect("RocksDB has an environment of its own");
        env.lower_thread_pool_cpu_priority();
        env
    });
    &ENV
}

fn family_options(table: Table, cache: &Cache) -> ColumnFamilyDescriptor {
    let mut blocks = BlockBasedOptions::default();
    blocks.set_block_cache(cache);
    blocks.set_bloom_filter(10.0, false);
    let mut options =
        Options::default().get_options_from_string(hint(table)).expect("RocksDB knows this option");
    options.set_block_based_table_factory(&blocks);
    options.set_write_buffer_size(match table {
        Table::Log => LOG_MEMTABLE_BYTES,
        Table::Meta => META_MEMTABLE_BYTES,
        Table::State => STATE_MEMTABLE_BYTES,
    });
    if table == Table::Log {
        options.set_compression_type(rocksdb::DBCompressionType::None);
        set_tables(&mut options, LOG_TABLES);
    } else {
        options.set_compression_type(rocksdb::DBCompressionType::Lz4);
    }
    if table.is_state() {
        set_tables(&mut options, STATE_TABLES);
        options.set_max_bytes_for_level_base(STATE_LEVEL_BYTES);
        // Every new record is looked up once before it is there.
        options.set_memtable_prefix_bloom_ratio(MEMTABLE_BLOOM_RATIO);
        options.set_memtable_whole_key_filtering(true);
    }
    ColumnFamilyDescriptor::new(name(table), options)
}

/// Keys that begin alike come in order, so each is put into the memtable behind the one before, without a search from the top: entries of
/// one group; and with each flush, keys of one table of a group's state.
fn hint(table: Table) -> String {
    let alike = match table {
        Table::Log => GROUP_BYTES,
        Table::Meta => return String::new(),
        // And the machine's mark, and its table.
        Table::State => PREFIX_BYTES + 2,
    };
    format!("memtable_insert_with_hint_prefix_extractor=rocksdb.FixedPrefix.{alike}")
}

/// How many tables of the newest level call for a merge.
fn set_tables(options: &mut Options, tables: i32) {
    options.set_level_zero_file_num_compaction_trigger(tables);
    options.set_level_zero_slowdown_writes_trigger(TABLES_SLOW * tables);
    options.set_level_zero_stop_writes_trigger(TABLES_STOP * tables);
}

/// Fails if a database ends before what is remembered of it.
fn check_end(db: &DB, remembered: Synced) -> Result<(), HostError> {
    let found = db.latest_sequence_number();
    if found < remembered.sequence {
        return Err(HostError::Damaged(format!(
            "{}: everything up to write {} was synced, but it ends at {found}",
            db.path().display(),
            remembered.sequence
        )));
    }
    Ok(())
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

/// The databases: a column family for each table.
struct Rocks(Arc<Shared>);

struct Shared {
    /// `Log` and `Meta`.
    db: DB,
    /// Everything in `db` up to this sequence number is on disk, if it isn't 0, and no batch has said so yet.
    synced: AtomicU64,
    file: Mutex<SyncedFile>,
    /// `State`. It has one family only: several would be flushed one by one, and a batch must not be found in halves.
    state: DB,
    state_file: Mutex<SyncedFile>,
    _lock: fs::File,
}

impl Drop for Shared {
    /// What was written since the last sync is in the files, and so is what the manifest says of it. The state is brought there, so
    /// that the next start needn't apply what this one has.
    fn drop(&mut self) {
        let mut file = held(&self.file);
        let Synced { sequence, manifest } = file.newest();
        // If it fails, the file lags, as after a kill.
        if let Ok(manifest) = synced_manifest(&self.db, manifest) {
            let _ = file.write(Synced { sequence, manifest });
        }
        drop(file);
        if let Err(error) = self.make_state_durable() {
            tracing::debug!(%error, "the state isn't in its tables");
        }
    }
}

impl Shared {
    fn make_state_durable(&self) -> io::Result<()> {
        let mut file = held(&self.state_file);
        let sequence = self.state.latest_sequence_number();
        // Tables are synced before the manifest lists them, and it is synced before this returns.
        self.state.flush_cf(family(&self.state, Table::State)).map_err(io_error)?;
        self.check_background()?;
        let manifest = synced_manifest(&self.state, file.newest().manifest)?;
        file.write(Synced { sequence, manifest })
    }

    /// A table that couldn't be made is tried again by RocksDB, for as long as it takes, and meanwhile nobody would be told: writes
    /// wait. The first error is final here, as everywhere.
    fn check_background(&self) -> io::Result<()> {
        match self.state.property_int_value(BACKGROUND_ERRORS).map_err(io_error)? {
            Some(0) => Ok(()),
            _ => Err(io::Error::other("the state couldn't be brought into a table")),
        }
    }

    fn database(&self, table: Table) -> &DB {
        if table.is_state() { &self.state } else { &self.db }
    }
}

/// How far a manifest goes, synced. It seldom changes.
fn synced_manifest(db: &DB, known: Manifest) -> io::Result<Manifest> {
    let path = db.path();
    let bytes = fs::metadata(Manifest::path(path, known.number)).map(|data| data.len());
    if bytes.is_ok_and(|bytes| bytes == known.bytes) {
        return Ok(known);
    }
    let found = Manifest::find(path).ok_or_else(|| io::Error::other("the manifest can't be found"))?;
    fs::File::open(Manifest::path(path, found.number))?.sync_all()?;
    Ok(found)
}

fn held(file: &Mutex<SyncedFile>) -> MutexGuard<'_, SyncedFile> {
    file.lock().expect("nothing panics while it holds this lock")
}

fn name(table: Table) -> &'static str {
    match table {
        Table::Log => "log",
        Table::Meta => "meta",
        Table::State => DEFAULT_COLUMN_FAMILY_NAME,
    }
}

fn family(db: &DB, table: Table) -> &ColumnFamily {
    db.cf_handle(name(table)).expect("all column families are made when the database is opened")
}

impl Reads for Rocks {
    fn get(&self, table: Table, key: &[u8]) -> io::Result<Option<Bytes>> {
        let db = self.0.database(table);
        let value = db.get_pinned_cf(family(db, table), key).map_err(io_error)?;
        Ok(value.map(|value| Bytes::copy_from_slice(&value)))
    }

    fn cursor<'a>(
        &'a self,
        table: Table,
        from: &[u8],
        to: Option<&[u8]>,
        start: Start,
    ) -> Box<dyn Cursor + 'a> {
        let db = self.0.database(table);
        place(db.raw_iterator_cf_opt(family(db, table), range(from, to)), start)
    }
}

impl Tables for Rocks {
    fn batch(&self) -> Box<dyn Batch> {
        Box::new(RocksBatch { tables: self.0.clone(), changes: WriteBatch::default(), of_state: None })
    }

    fn sync(&self) -> io::Result<()> {
        let mut file = held(&self.0.file);
        let sequence = self.0.db.latest_sequence_number();
        self.0.db.flush_wal(true).map_err(io_error)?;
        let manifest = synced_manifest(&self.0.db, file.newest().manifest)?;
        file.write(Synced { sequence, manifest })?;
        self.0.synced.store(sequence, Ordering::Release);
        Ok(())
    }

    fn make_state_durable(&self) -> io::Result<()> {
        self.0.make_state_durable()
    }

    fn view(&self) -> Box<dyn Reads + '_> {
        let (db, state) = (self.0.db.snapshot(), self.0.state.snapshot());
        Box::new(RocksView { tables: &self.0, db, state })
    }
}

struct RocksView<'d> {
    tables: &'d Shared,
    db: rocksdb::Snapshot<'d>,
    state: rocksdb::Snapshot<'d>,
}

impl<'d> RocksView<'d> {
    fn of(&self, table: Table) -> (&rocksdb::Snapshot<'d>, &ColumnFamily) {
        let snapshot = if table.is_state() { &self.state } else { &self.db };
        (snapshot, family(self.tables.database(table), table))
    }
}

impl Reads for RocksView<'_> {
    fn get(&self, table: Table, key: &[u8]) -> io::Result<Option<Bytes>> {
        let (snapshot, family) = self.of(table);
        let value = snapshot.get_cf(family, key).map_err(io_error)?;
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
        let (snapshot, family) = self.of(table);
        place(snapshot.raw_iterator_cf_opt(family, options), start)
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
    /// Whether it changes the state; None: it is empty.
    of_state: Option<bool>,
}

impl RocksBatch {
    fn keep_apart(&mut self, table: Table) {
        let of_state = *self.of_state.get_or_insert(table.is_state());
        assert_eq!(of_state, table.is_state(), "a batch changes the state alone, or other tables alone");
    }
}

impl Batch for RocksBatch {
    fn put(&mut self, table: Table, key: &[u8], value: &[u8]) {
        self.keep_apart(table);
        self.changes.put_cf(family(self.tables.database(table), table), key, value);
    }

    fn delete(&mut self, table: Table, key: &[u8]) {
        self.keep_apart(table);
        self.changes.delete_cf(family(self.tables.database(table), table), key);
    }

    fn delete_range(&mut self, table: Table, from: &[u8], to: &[u8]) {
        self.keep_apart(table);
        self.changes.delete_range_cf(family(self.tables.database(table), table), from, to);
    }

    fn bytes(&self) -> usize {
        self.changes.size_in_bytes()
    }

    fn write(self: Box<Self>) -> io::Result<()> {
        let RocksBatch { tables, mut changes, of_state } = *self;
        if of_state == Some(true) {
            tables.check_background()?;
            return tables.state.write_without_wal(changes).map_err(io_error);
        }
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
        batch.put(Table::Log, &number.to_be_bytes(), &[number as u8; 3000]);
        batch.write().unwrap();
    }

    fn open(folder: &Path) -> Result<Box<dyn Tables>, HostError> {
        OnDisk.open_tables(folder, 1 << 20)
    }

    /// The numbers that are there.
    fn found(tables: &dyn Tables) -> Vec<u64> {
        let mut cursor = tables.cursor(Table::Log, &[], None, Start::First);
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

    /// Writes a number to the state, in two places.
    fn put_state(tables: &dyn Tables, number: u64, bytes: usize) {
        let mut batch = tables.batch();
        for place in [0, 1] {
            batch.put(
                Table::State,
                &[&[place][..], &number.to_be_bytes()].concat(),
                &vec![number as u8; bytes],
            );
        }
        batch.write().unwrap();
    }

    /// How many numbers the state holds, which must be the first ones, and whole.
    fn found_state(tables: &dyn Tables) -> u64 {
        let count = |place: u8| {
            let mut cursor = tables.cursor(Table::State, &[place], Some(&[place + 1]), Start::First);
            let mut expected = 0_u64;
            while let Some((key, _)) = cursor.item() {
                assert_eq!(key[1..], expected.to_be_bytes(), "a batch is missing");
                expected += 1;
                cursor.next();
            }
            cursor.status().unwrap();
            expected
        };
        assert_eq!(count(0), count(1), "half a batch");
        count(0)
    }

    /// What a process that is killed now leaves behind.
    fn left_by_a_kill(folder: &Path) -> tempfile::TempDir {
        let copy = tempfile::tempdir().unwrap();
        for part in ["db", "state"] {
            fs::create_dir(copy.path().join(part)).unwrap();
            for entry in fs::read_dir(folder.join(part)).unwrap() {
                let entry = entry.unwrap();
                fs::copy(entry.path(), copy.path().join(part).join(entry.file_name())).unwrap();
            }
        }
        for name in ["synced", "synced-state"] {
            fs::copy(folder.join(name), copy.path().join(name)).unwrap();
        }
        copy
    }

    #[test]
    fn a_kill_leaves_the_state_after_a_run_of_whole_batches_and_all_that_was_made_durable() {
        let folder = tempfile::tempdir().unwrap();
        let tables = open(folder.path()).unwrap();
        (0..5).for_each(|number| put_state(&*tables, number, 1000));
        tables.sync().unwrap();
        assert_eq!(
            found_state(&*open(left_by_a_kill(folder.path()).path()).unwrap()),
            0,
            "a sync took it along"
        );
        tables.make_state_durable().unwrap();
        (5..9).for_each(|number| put_state(&*tables, number, 1000));
        assert_eq!(found_state(&*open(left_by_a_kill(folder.path()).path()).unwrap()), 5);
        // More than is kept in memory: RocksDB makes tables by itself, and where they end is its own affair.
        (9..200).for_each(|number| put_state(&*tables, number, 1 << 19));
        let begun = std::time::Instant::now();
        loop {
            let copy = left_by_a_kill(folder.path());
            // A table may have been made while its files were copied.
            if let Ok(killed) = open(copy.path())
                && (10..200).contains(&found_state(&*killed))
            {
                break;
            }
            assert!(begun.elapsed().as_secs() < 60, "nothing reaches the disk");
        }
        drop(tables);
        assert_eq!(found_state(&*open(folder.path()).unwrap()), 200, "it was closed in order");
    }

    #[test]
    fn the_write_ahead_log_holds_nothing_of_the_state() {
        let folder = tempfile::tempdir().unwrap();
        let tables = open(folder.path()).unwrap();
        put(&*tables, 0);
        tables.sync().unwrap();
        let log = newest_log(folder.path());
        let bytes = log.metadata().unwrap().len();
        (0..50).for_each(|number| put_state(&*tables, number, 1000));
        tables.sync().unwrap();
        assert_eq!((newest_log(folder.path()), log.metadata().unwrap().len()), (log, bytes));
        let logs = fs::read_dir(folder.path().join("state")).unwrap().map(|entry| entry.unwrap());
        let written = logs.filter(|entry| entry.path().extension().is_some_and(|end| end == "log"));
        assert_eq!(written.map(|entry| entry.metadata().unwrap().len()).sum::<u64>(), 0);
    }

    #[test]
    #[should_panic(expected = "a batch changes the state alone, or other tables alone")]
    fn a_batch_of_the_state_and_of_the_log_is_a_bug() {
        let folder = tempfile::tempdir().unwrap();
        let tables = open(folder.path()).unwrap();
        let mut batch = tables.batch();
        batch.put(Table::State, b"a", b"");
        batch.delete(Table::Log, b"a");
    }

    /// An earlier state is whole, but it isn't the one that something relied on: it may hold half of a snapshot that was loaded later.
    #[test]
    fn a_state_that_ends_before_what_was_made_durable_is_damage() {
        let folder = tempfile::tempdir().unwrap();
        for number in 0..3 {
            let tables = open(folder.path()).unwrap();
            put_state(&*tables, number, 1000);
            tables.make_state_durable().unwrap();
        }
        let state = folder.path().join("state");
        let refused = |what: &str| {
            let refused = open(folder.path()).err().expect(what);
            assert!(matches!(refused, HostError::Damaged(_)), "{what}: {refused}");
        };
        let Manifest { number, bytes } = Manifest::find(&state).unwrap();
        let path = Manifest::path(&state, number);
        let whole = fs::read(&path).unwrap();
        for end in (0..bytes as usize).step_by(11).chain([bytes as usize - 1]) {
            fs::write(&path, &whole[..end]).unwrap();
            refused("a cut manifest");
        }
        fs::write(&path, &whole).unwrap();
        fs::rename(&state, folder.path().join("aside")).unwrap();
        refused("no state at all");
        fs::remove_dir_all(&state).unwrap();
        fs::rename(folder.path().join("aside"), &state).unwrap();
        assert_eq!(found_state(&*open(folder.path()).unwrap()), 3);
    }

    #[test]
    fn a_damaged_table_of_the_state_is_told() {
        let folder = tempfile::tempdir().unwrap();
        let tables = open(folder.path()).unwrap();
        (0..100).for_each(|number| put_state(&*tables, number, 1000));
        drop(tables);
        let files = fs::read_dir(folder.path().join("state")).unwrap().map(|entry| entry.unwrap().path());
        let table = files.filter(|path| path.extension().is_some_and(|end| end == "sst")).max().unwrap();
        let mut bytes = fs::read(&table).unwrap();
        bytes[50] ^= 4;
        fs::write(&table, bytes).unwrap();
        let read = open(folder.path()).map(|tables| {
            let mut cursor = tables.cursor(Table::State, &[], None, Start::First);
            while cursor.item().is_some() {
                cursor.next();
            }
            cursor.status().map_err(host_error)
        });
        assert!(matches!(read.and_then(|read| read), Err(HostError::Damaged(_))));
    }
}
