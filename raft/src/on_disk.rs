//! The disk of this machine: RocksDB and plain files.

use std::{
    fs::{self, OpenOptions},
    io,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::Arc,
};

use bytes::Bytes;
use rocksdb::{
    BlockBasedOptions, Cache, ColumnFamily, ColumnFamilyDescriptor, DB, DBRawIterator, DBRecoveryMode,
    Options, ReadOptions, WriteBatch,
};

use crate::{
    api::HostError,
    disk::damaged,
    storage::{Batch, Cursor, File, Open, Reads, Start, Storage, Table, Tables},
};

/// Memtables: small ones would be flushed all the time, large ones make recovery slow.
const LOG_MEMTABLE_BYTES: usize = 64 << 20;
const META_MEMTABLE_BYTES: usize = 1 << 20;
const STATE_MEMTABLE_BYTES: usize = 32 << 20;
/// The write-ahead log is cut when it reaches this size in all.
const WAL_BYTES_MAX: u64 = 512 << 20;

/// RocksDB and plain files.
#[derive(Clone, Copy, Debug, Default)]
pub struct OnDisk;

impl Storage for OnDisk {
    fn open_tables(&self, folder: &Path, cache_bytes: usize) -> Result<Box<dyn Tables>, HostError> {
        let path = folder.join("db");
        let mut options = Options::default();
        options.create_if_missing(true);
        options.create_missing_column_families(true);
        options.set_paranoid_checks(true);
        // Damage inside the write-ahead log is an error; only a torn last record is its end.
        options.set_wal_recovery_mode(DBRecoveryMode::TolerateCorruptedTailRecords);
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
            ColumnFamilyDescriptor::new(name(table), options)
        };
        match DB::open_cf_descriptors(&options, &path, Table::ALL.map(family)) {
            Ok(db) => Ok(Box::new(Rocks(Arc::new(db)))),
            Err(error) => Err(open_error(&path, error)),
        }
    }

    fn create_folder(&self, folder: &Path) -> io::Result<()> {
        fs::create_dir_all(folder)
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
        let folder = to.parent().ok_or_else(|| io::Error::other("a file stands in a folder"))?;
        fs::File::open(folder)?.sync_all()
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

/// The database: a column family for each table.
struct Rocks(Arc<DB>);

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
        let value = self.0.get_pinned_cf(family(&self.0, table), key).map_err(io_error)?;
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
        place(self.0.raw_iterator_cf_opt(family(&self.0, table), options), start)
    }
}

impl Tables for Rocks {
    fn batch(&self) -> Box<dyn Batch> {
        Box::new(RocksBatch { db: self.0.clone(), changes: WriteBatch::default() })
    }

    fn sync(&self) -> io::Result<()> {
        self.0.flush_wal(true).map_err(io_error)
    }

    fn view(&self) -> Box<dyn Reads + '_> {
        Box::new(RocksView { db: &self.0, snapshot: self.0.snapshot() })
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
    db: Arc<DB>,
    changes: WriteBatch,
}

impl Batch for RocksBatch {
    fn put(&mut self, table: Table, key: &[u8], value: &[u8]) {
        self.changes.put_cf(family(&self.db, table), key, value);
    }

    fn delete(&mut self, table: Table, key: &[u8]) {
        self.changes.delete_cf(family(&self.db, table), key);
    }

    fn delete_range(&mut self, table: Table, from: &[u8], to: &[u8]) {
        self.changes.delete_range_cf(family(&self.db, table), from, to);
    }

    fn bytes(&self) -> usize {
        self.changes.size_in_bytes()
    }

    fn write(self: Box<Self>) -> io::Result<()> {
        let RocksBatch { db, changes } = *self;
        db.write(changes).map_err(io_error)
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
