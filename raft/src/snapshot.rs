//! Snapshots: files with the whole state of a group at one log id.
//!
//! A file is written aside, synced, and renamed; it ends with the hash of all before it. So a file under its final name is
//! whole, or its hash tells. The format is described in `docs/storage.md`.
//!
//! The log is purged behind a snapshot. A snapshot may turn out to be damaged, so the state that it was made of, or loaded into, is
//! durable before it counts.

use std::{
    io::{self, BufReader, Read},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicBool, Ordering},
    },
};

use serde::{Deserialize, Serialize};
use verdict_failpoints::failpoint;
use verdict_protocol::ids::GroupId;

use crate::{
    disk::{Disk, damaged, unseal},
    state::{AppliedState, prefix, prefix_end},
    storage::{File, Open, Start, Storage, Table},
    types::{SnapshotMeta, checksum},
};

/// First bytes of a file: "VERDICT", then the version of the format.
const MAGIC: &[u8; 8] = b"VERDICT\x01";
/// Pairs of keys and values are gathered into chunks of this size.
const CHUNK_BYTES: usize = 256 << 10;
/// A file that is written is synced each time it has grown by so much: all at once would hold up the syncs of the log.
const SYNCED_BYTES: u64 = 4 << 20;
/// A chunk larger than this is damage. A single pair may make a chunk larger than [`CHUNK_BYTES`].
const CHUNK_BYTES_MAX: u32 = 256 << 20;
const HEADER_BYTES_MAX: u32 = 1 << 20;
const HASH_BYTES: usize = 32;
/// The key under which the state keeps how far it goes, without prefix.
const APPLIED: &[u8] = &[0, 1];

#[derive(Serialize, Deserialize)]
struct Header {
    group: u32,
    meta: SnapshotMeta,
}

/// A whole snapshot file, held open: it can be read even after it was replaced.
#[derive(Clone, Debug)]
pub(crate) struct SnapshotFile {
    pub(crate) path: PathBuf,
    pub(crate) file: Arc<dyn File>,
    pub(crate) bytes: u64,
}

impl SnapshotFile {
    fn open(storage: &dyn Storage, path: PathBuf) -> io::Result<SnapshotFile> {
        let file = storage.open(&path, Open::Existing)?;
        let bytes = file.bytes()?;
        Ok(SnapshotFile { path, file, bytes })
    }

    /// The next bytes from `offset`, at most `bytes_max` of them; none at the end.
    pub(crate) fn read_at(&self, offset: u64, bytes_max: usize) -> io::Result<Vec<u8>> {
        let length = (self.bytes.saturating_sub(offset)).min(bytes_max as u64) as usize;
        let mut bytes = vec![0; length];
        self.file.read_exact_at(&mut bytes, offset)?;
        Ok(bytes)
    }
}

/// The snapshots of one group.
pub(crate) struct Snapshots {
    storage: Arc<dyn Storage>,
    group: GroupId,
    directory: PathBuf,
    current: Mutex<Option<(SnapshotMeta, SnapshotFile)>>,
    stop: AtomicBool,
}

impl Snapshots {
    /// Finds the newest whole snapshot of a group and removes older ones.
    pub(crate) fn open(storage: Arc<dyn Storage>, directory: &Path, group: GroupId) -> io::Result<Snapshots> {
        let mut found: Vec<PathBuf> = Vec::new();
        for path in storage.list(directory)? {
            let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
            if name.starts_with(&format!("{:08}-", group.0)) && name.ends_with(".snapshot") {
                found.push(path);
            }
        }
        let mut current = None;
        while let Some(path) = found.pop() {
            if current.is_some() {
                storage.remove(&path)?;
                continue;
            }
            let file = SnapshotFile::open(&*storage, path)?;
            match verify(&file, group) {
                Ok(meta) => current = Some((meta, file)),
                // The state itself is in the database; a new snapshot will be made from it.
                Err(_) => {
                    tracing::warn!(path = %file.path.display(), "set a damaged snapshot aside");
                    storage.rename(&file.path, &file.path.with_extension("damaged"))?;
                }
            }
        }
        let current = Mutex::new(current);
        let (directory, stop) = (directory.to_owned(), AtomicBool::new(false));
        Ok(Snapshots { storage, group, directory, current, stop })
    }

    /// The newest snapshot.
    pub(crate) fn current(&self) -> Option<(SnapshotMeta, SnapshotFile)> {
        self.lock().clone()
    }

    /// Gives up building.
    pub(crate) fn stop(&self) {
        self.stop.store(true, Ordering::Release);
    }

    /// A name for a file that isn't whole yet. Such files are removed when the host opens.
    pub(crate) fn temporary(&self) -> PathBuf {
        self.directory.join(format!("{:08}-{}.tmp", self.group.0, uuid::Uuid::new_v4().simple()))
    }

    /// Writes the state of `generation` as it is now. `taken` is called as soon as later changes no longer matter.
    pub(crate) fn build(
        &self,
        disk: &Disk,
        generation: u32,
        taken: impl FnOnce(),
    ) -> io::Result<(SnapshotMeta, SnapshotFile)> {
        let view = disk.tables().view();
        taken();
        let start = prefix(self.group, generation);
        let applied = view.get(Table::State, &[&start, APPLIED].concat())?;
        let state: AppliedState = match applied {
            None => AppliedState::default(),
            Some(value) => unseal(APPLIED, &value)?,
        };
        let meta = SnapshotMeta { last_log_id: state.applied, last_membership: state.membership };
        let end = prefix_end(&start).expect("group and generation are never all ones");
        let mut cursor = view.cursor(Table::State, &start, Some(&end), Start::First);

        let path = self.temporary();
        let mut writer = FileWriter::create(&*self.storage, &path, self.group, &meta)?;
        while let Some((key, value)) = cursor.item() {
            if self.stop.load(Ordering::Acquire) {
                return Err(io::Error::other("the host was shut down"));
            }
            writer.pair(&key[start.len()..], value)?;
            cursor.next();
        }
        cursor.status()?;
        failpoint!(SNAPSHOT_BUILDING, self.group.0, fails)?;
        writer.finish()?;
        // All that the view shows was written before.
        disk.tables().make_state_durable()?;
        failpoint!(SNAPSHOT_BEFORE_RENAME, self.group.0, fails)?;
        self.publish(&path, meta)
    }

    /// Gives a whole, synced file its final name, and removes the one before it. An older snapshot than the current one is
    /// dropped.
    pub(crate) fn publish(
        &self,
        path: &Path,
        meta: SnapshotMeta,
    ) -> io::Result<(SnapshotMeta, SnapshotFile)> {
        let mut current = self.lock();
        if let Some((newest, file)) = &*current
            && newest.last_log_id > meta.last_log_id
        {
            self.storage.remove(path)?;
            return Ok((newest.clone(), file.clone()));
        }
        let index = meta.last_log_id.map_or(0, |id| id.index);
        let name = self.directory.join(format!("{:08}-{index:020}.snapshot", self.group.0));
        self.storage.rename(path, &name)?;
        failpoint!(SNAPSHOT_RENAMED, self.group.0, fails)?;
        let file = SnapshotFile::open(&*self.storage, name.clone())?;
        let before = current.replace((meta.clone(), file.clone()));
        if let Some((_, before)) = before
            && before.path != name
        {
            self.storage.remove(&before.path)?;
        }
        Ok((meta, file))
    }

    /// Loads a file into `generation`, which nobody reads yet, and checks the whole of it. Durable on return.
    pub(crate) fn load(&self, disk: &Disk, file: &SnapshotFile, generation: u32) -> io::Result<SnapshotMeta> {
        let start = prefix(self.group, generation);
        let mut reader = FileReader::open(file, self.group)?;
        while let Some(chunk) = reader.chunk()? {
            let mut batch = disk.tables().batch();
            let mut rest = chunk.as_slice();
            while !rest.is_empty() {
                let (key, value) = split_pair(&mut rest)?;
                batch.put(Table::State, &[&start, key].concat(), value);
            }
            batch.write()?;
            failpoint!(INSTALL_LOADING, self.group.0, fails)?;
        }
        disk.tables().make_state_durable()?;
        Ok(reader.header.meta)
    }

    fn lock(&self) -> MutexGuard<'_, Option<(SnapshotMeta, SnapshotFile)>> {
        self.current.lock().expect("nothing panics while it holds the lock of the snapshots")
    }
}

/// Reads a file from end to end, and gives what it is a snapshot of.
pub(crate) fn verify(file: &SnapshotFile, group: GroupId) -> io::Result<SnapshotMeta> {
    let mut reader = FileReader::open(file, group)?;
    while reader.chunk()?.is_some() {}
    Ok(reader.header.meta)
}

/// What a file is a snapshot of, without reading all of it.
pub(crate) fn meta(file: &SnapshotFile, group: GroupId) -> io::Result<SnapshotMeta> {
    FileReader::open(file, group).map(|reader| reader.header.meta)
}

/// A file that was received under a temporary name: durable, and whole.
pub(crate) fn received(
    storage: &dyn Storage,
    written: &dyn File,
    path: PathBuf,
    group: GroupId,
) -> io::Result<SnapshotFile> {
    written.sync()?;
    let file = SnapshotFile::open(storage, path)?;
    verify(&file, group)?;
    Ok(file)
}

/// Removes what was never finished.
pub(crate) fn clean_up(storage: &dyn Storage, directory: &Path) -> io::Result<()> {
    storage.create_folder(directory)?;
    for path in storage.list(directory)? {
        if path.extension().is_some_and(|extension| extension == "tmp") {
            storage.remove(&path)?;
        }
    }
    Ok(())
}

struct FileWriter {
    file: Arc<dyn File>,
    written: u64,
    /// How much of it is surely on disk.
    synced: u64,
    /// Bytes that aren't in the file yet.
    waiting: Vec<u8>,
    hasher: blake3::Hasher,
    chunk: Vec<u8>,
}

impl FileWriter {
    fn create(
        storage: &dyn Storage,
        path: &Path,
        group: GroupId,
        meta: &SnapshotMeta,
    ) -> io::Result<FileWriter> {
        let file = storage.open(path, Open::Empty)?;
        let (waiting, hasher, chunk) = (Vec::new(), blake3::Hasher::new(), Vec::new());
        let mut writer = FileWriter { file, written: 0, synced: 0, waiting, hasher, chunk };
        let header = Header { group: group.0, meta: meta.clone() };
        let header = postcard::to_stdvec(&header).expect("encoding into memory can't fail");
        writer.write(MAGIC)?;
        writer.write(&(header.len() as u32).to_be_bytes())?;
        writer.write(&header)?;
        writer.write(&checksum(&[&header]))?;
        Ok(writer)
    }

    fn pair(&mut self, key: &[u8], value: &[u8]) -> io::Result<()> {
        self.chunk.extend_from_slice(&(key.len() as u32).to_be_bytes());
        self.chunk.extend_from_slice(&(value.len() as u32).to_be_bytes());
        self.chunk.extend_from_slice(key);
        self.chunk.extend_from_slice(value);
        if self.chunk.len() >= CHUNK_BYTES { self.flush_chunk() } else { Ok(()) }
    }

    fn flush_chunk(&mut self) -> io::Result<()> {
        let chunk = std::mem::take(&mut self.chunk);
        self.write(&(chunk.len() as u32).to_be_bytes())?;
        self.write(&chunk)
    }

    fn finish(mut self) -> io::Result<()> {
        if !self.chunk.is_empty() {
            self.flush_chunk()?;
        }
        self.write(&0_u32.to_be_bytes())?;
        let hash = *self.hasher.finalize().as_bytes();
        self.waiting.extend_from_slice(&hash);
        self.flush()?;
        self.file.sync()
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.hasher.update(bytes);
        self.waiting.extend_from_slice(bytes);
        if self.waiting.len() >= CHUNK_BYTES { self.flush() } else { Ok(()) }
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.write_all_at(&self.waiting, self.written)?;
        self.written += self.waiting.len() as u64;
        self.waiting.clear();
        if self.written - self.synced >= SYNCED_BYTES {
            self.synced = self.written;
            self.file.sync()?;
        }
        Ok(())
    }
}

struct FileReader<'a> {
    file: BufReader<FileAt<'a>>,
    hasher: blake3::Hasher,
    header: Header,
}

impl FileReader<'_> {
    fn open(file: &SnapshotFile, group: GroupId) -> io::Result<FileReader<'_>> {
        let mut hashed =
            Hashed { inner: BufReader::new(FileAt { file, offset: 0 }), hasher: blake3::Hasher::new() };
        let header = read_header(&mut hashed)?;
        if header.group != group.0 {
            return Err(damaged("a snapshot of another group"));
        }
        Ok(FileReader { file: hashed.inner, hasher: hashed.hasher, header })
    }

    /// The next chunk; None after the last one, once the hash was found to be right.
    fn chunk(&mut self) -> io::Result<Option<Vec<u8>>> {
        let length = read_u32(&mut self.file)?;
        self.hasher.update(&length.to_be_bytes());
        if length == 0 {
            let mut hash = [0; HASH_BYTES];
            self.file.read_exact(&mut hash)?;
            if *self.hasher.finalize().as_bytes() != hash {
                return Err(damaged("a snapshot fails its hash"));
            }
            return Ok(None);
        }
        if length > CHUNK_BYTES_MAX {
            return Err(damaged("a snapshot has a chunk that is too large"));
        }
        let mut chunk = vec![0; length as usize];
        self.file.read_exact(&mut chunk)?;
        self.hasher.update(&chunk);
        Ok(Some(chunk))
    }
}

struct FileAt<'a> {
    file: &'a SnapshotFile,
    offset: u64,
}

impl Read for FileAt<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = (self.file.bytes.saturating_sub(self.offset)).min(buffer.len() as u64);
        self.file.file.read_exact_at(&mut buffer[..read as usize], self.offset)?;
        self.offset += read;
        Ok(read as usize)
    }
}

struct Hashed<R> {
    inner: R,
    hasher: blake3::Hasher,
}

impl<R: Read> Read for Hashed<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.inner.read(buffer)?;
        self.hasher.update(&buffer[..read]);
        Ok(read)
    }
}

fn read_u32(reader: &mut impl Read) -> io::Result<u32> {
    let mut bytes = [0; 4];
    reader.read_exact(&mut bytes)?;
    Ok(u32::from_be_bytes(bytes))
}

fn read_header(reader: &mut impl Read) -> io::Result<Header> {
    let mut magic = [0; 8];
    reader.read_exact(&mut magic)?;
    if magic != *MAGIC {
        return Err(damaged("not a snapshot, or one of an unknown version"));
    }
    let length = read_u32(reader)?;
    if length > HEADER_BYTES_MAX {
        return Err(damaged("the header of a snapshot is too large"));
    }
    let mut header = vec![0; length as usize];
    reader.read_exact(&mut header)?;
    let mut sum = [0; 8];
    reader.read_exact(&mut sum)?;
    if checksum(&[&header]) != sum {
        return Err(damaged("the header of a snapshot fails its checksum"));
    }
    postcard::from_bytes(&header).map_err(|error| damaged(&format!("the header of a snapshot: {error}")))
}

fn split_pair<'a>(rest: &mut &'a [u8]) -> io::Result<(&'a [u8], &'a [u8])> {
    let cut = || damaged("a pair of a snapshot is cut");
    let key_bytes = read_u32(rest)? as usize;
    let value_bytes = read_u32(rest)? as usize;
    let (key, after) = rest.split_at_checked(key_bytes).ok_or_else(cut)?;
    let (value, after) = after.split_at_checked(value_bytes).ok_or_else(cut)?;
    *rest = after;
    Ok((key, value))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt as _;

    use super::*;
    use crate::on_disk::OnDisk;

    /// Nothing else stands between what was damaged, on a disk or on its way, and the state of a replica.
    #[test]
    fn a_snapshot_with_any_byte_changed_is_no_snapshot() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        let meta =
            SnapshotMeta { last_log_id: None, last_membership: crate::types::StoredMembership::default() };
        let mut writer = FileWriter::create(&OnDisk, &path, GroupId(3), &meta).unwrap();
        for n in 0..40_u32 {
            writer.pair(&n.to_be_bytes(), &[n as u8; 50]).unwrap();
        }
        writer.finish().unwrap();
        let checked = || verify(&SnapshotFile::open(&OnDisk, path.clone()).unwrap(), GroupId(3));
        checked().unwrap();
        let file = std::fs::OpenOptions::new().read(true).write(true).open(&path).unwrap();
        for at in 0..file.metadata().unwrap().len() {
            let mut byte = [0];
            file.read_exact_at(&mut byte, at).unwrap();
            file.write_all_at(&[byte[0] ^ 0x10], at).unwrap();
            assert!(checked().is_err(), "with another byte {at}");
            file.write_all_at(&byte, at).unwrap();
        }
        checked().unwrap();
        file.set_len(file.metadata().unwrap().len() - 1).unwrap();
        assert!(checked().is_err(), "cut");
    }
}
