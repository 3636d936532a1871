//! Snapshots: a point up to which the state of a group is on disk, and files with the whole state for replicas that need it.
//!
//! A snapshot is made when all that is applied is in tables on disk: the log is purged behind it, and nothing is copied. Only when a
//! replica needs what is purged, its leader writes the state, as it is then, to a file and sends it. The file ends with the hash of all
//! before it, so whoever has received it knows that it is whole. It has a name only while it is written or received: nothing that
//! must last is in it. The format is described in `docs/storage.md`.

use std::{
    io::{self, BufReader, Read},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
};

use serde::{Deserialize, Serialize};
use verdict_failpoints::failpoint;
use verdict_protocol::ids::GroupId;

use crate::{
    disk::{Disk, damaged, unseal},
    state::{AppliedState, prefix, prefix_end},
    storage::{File, Open, Start, Storage, Table},
    types::{LogId, SnapshotMeta, checksum},
};

/// First bytes of a file: "VERDICT", then the version of the format.
const MAGIC: &[u8; 8] = b"VERDICT\x01";
/// Pairs of keys and values are gathered into chunks of this size.
const CHUNK_BYTES: usize = 256 << 10;
/// A file that is written goes to the disk each time it has grown by so much: all at once would hold up the syncs of the log.
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

/// A whole snapshot file, held open: it can be read even after it was removed.
#[derive(Clone, Debug)]
pub(crate) struct SnapshotFile {
    pub(crate) file: Arc<dyn File>,
    pub(crate) bytes: u64,
}

impl SnapshotFile {
    fn new(file: Arc<dyn File>) -> io::Result<SnapshotFile> {
        let bytes = file.bytes()?;
        Ok(SnapshotFile { file, bytes })
    }

    /// The next bytes from `offset`, at most `bytes_max` of them; none at the end.
    pub(crate) fn read_at(&self, offset: u64, bytes_max: usize) -> io::Result<Vec<u8>> {
        let length = (self.bytes.saturating_sub(offset)).min(bytes_max as u64) as usize;
        let mut bytes = vec![0; length];
        self.file.read_exact_at(&mut bytes, offset)?;
        Ok(bytes)
    }
}

/// Whoever has the state of a group on disk, and can write it to a file.
pub(crate) trait Source: Send + Sync {
    /// The state as it is now, at `least` or later. May take as long as reading all of it.
    fn write_snapshot(&self, least: Option<LogId>) -> io::Result<SnapshotFile>;
}

/// What a snapshot is made of.
#[derive(Clone)]
pub(crate) enum Contents {
    /// The state of a replica here, which goes as far as the snapshot says, or further.
    State(Arc<dyn Source>),
    /// A file that was received.
    File(SnapshotFile),
}

impl Contents {
    /// A file with all of it.
    pub(crate) fn file(&self, meta: &SnapshotMeta) -> io::Result<SnapshotFile> {
        match self {
            Contents::State(source) => source.write_snapshot(meta.last_log_id),
            Contents::File(file) => Ok(file.clone()),
        }
    }
}

/// The snapshots of one group.
pub(crate) struct Snapshots {
    storage: Arc<dyn Storage>,
    group: GroupId,
    directory: PathBuf,
    point: Mutex<Option<SnapshotMeta>>,
    /// What was last written for others, until the next snapshot: two may need it, or one again.
    written: Mutex<Option<(SnapshotMeta, SnapshotFile)>>,
    sending: Arc<AtomicUsize>,
    stop: AtomicBool,
}

/// While it lives, somebody needs the log behind the snapshot.
#[derive(Debug)]
pub(crate) struct Sending(Arc<AtomicUsize>);

impl Drop for Sending {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

impl Snapshots {
    pub(crate) fn new(storage: Arc<dyn Storage>, directory: &Path, group: GroupId) -> Snapshots {
        Snapshots {
            storage,
            group,
            directory: directory.to_owned(),
            point: Mutex::default(),
            written: Mutex::default(),
            sending: Arc::default(),
            stop: AtomicBool::new(false),
        }
    }

    /// What the newest snapshot covers.
    pub(crate) fn point(&self) -> Option<SnapshotMeta> {
        held(&self.point).clone()
    }

    /// The state up to there is in tables on disk, and counts: from now on the log may go. An older one changes nothing.
    pub(crate) fn advance(&self, meta: SnapshotMeta) {
        let mut point = held(&self.point);
        if point.as_ref().is_none_or(|point| point.last_log_id < meta.last_log_id) {
            *point = Some(meta);
        }
        drop(point);
        // Whoever is writing one looks at what it covers; nobody waits for that here.
        if let Ok(mut written) = self.written.try_lock() {
            written.take();
        }
    }

    /// Gives up writing.
    pub(crate) fn stop(&self) {
        self.stop.store(true, Ordering::Release);
    }

    /// A snapshot is sent as long as what is given lives.
    pub(crate) fn send(&self) -> Sending {
        self.sending.fetch_add(1, Ordering::AcqRel);
        Sending(self.sending.clone())
    }

    /// Whether somebody is sent a snapshot.
    pub(crate) fn is_sending(&self) -> bool {
        self.sending.load(Ordering::Acquire) > 0
    }

    /// A name for a file. What has one is removed when the host opens.
    pub(crate) fn temporary(&self) -> PathBuf {
        self.directory.join(format!("{:08}-{}.tmp", self.group.0, uuid::Uuid::new_v4().simple()))
    }

    /// A file with the state of `generation`, at `least` or later. It has no name any more.
    pub(crate) fn write(
        &self,
        disk: &Disk,
        generation: u32,
        least: Option<LogId>,
    ) -> io::Result<SnapshotFile> {
        // Whoever comes second waits, and gets the same.
        let mut written = held(&self.written);
        if let Some((meta, file)) = &*written
            && meta.last_log_id >= least
        {
            return Ok(file.clone());
        }
        let path = self.temporary();
        let wrote = self.write_to(&path, disk, generation, least);
        let removed = self.storage.remove(&path);
        let (meta, file) = wrote?;
        removed?;
        *written = Some((meta, file.clone()));
        Ok(file)
    }

    fn write_to(
        &self,
        path: &Path,
        disk: &Disk,
        generation: u32,
        least: Option<LogId>,
    ) -> io::Result<(SnapshotMeta, SnapshotFile)> {
        let view = disk.tables().view();
        let start = prefix(self.group, generation);
        let applied = view.get(Table::State, &[&start, APPLIED].concat())?;
        let state: AppliedState = match applied {
            None => AppliedState::default(),
            Some(value) => unseal(APPLIED, &value)?,
        };
        if state.applied < least {
            return Err(io::Error::other("the state was replaced by another one"));
        }
        let meta = state.covered();
        let end = prefix_end(&start).expect("group and generation are never all ones");
        let mut cursor = view.cursor(Table::State, &start, Some(&end), Start::First);
        let mut writer = FileWriter::create(&*self.storage, path, self.group, &meta)?;
        while let Some((key, value)) = cursor.item() {
            if self.stop.load(Ordering::Acquire) {
                return Err(io::Error::other("the host was shut down"));
            }
            writer.pair(&key[start.len()..], value)?;
            cursor.next();
        }
        cursor.status()?;
        failpoint!(SNAPSHOT_WRITING, self.group.0);
        Ok((meta, writer.finish()?))
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
}

fn held<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().expect("nothing panics while it holds a lock of the snapshots")
}

/// Reads a file from end to end, and gives what it is a snapshot of.
fn verify(file: &SnapshotFile, group: GroupId) -> io::Result<SnapshotMeta> {
    let mut reader = FileReader::open(file, group)?;
    while reader.chunk()?.is_some() {}
    Ok(reader.header.meta)
}

/// What a file is a snapshot of, without reading all of it.
pub(crate) fn meta(file: &SnapshotFile, group: GroupId) -> io::Result<SnapshotMeta> {
    FileReader::open(file, group).map(|reader| reader.header.meta)
}

/// A file that was received, if it is whole.
pub(crate) fn received(file: Arc<dyn File>, group: GroupId) -> io::Result<SnapshotFile> {
    let file = SnapshotFile::new(file)?;
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

    fn finish(mut self) -> io::Result<SnapshotFile> {
        if !self.chunk.is_empty() {
            self.flush_chunk()?;
        }
        self.write(&0_u32.to_be_bytes())?;
        let hash = *self.hasher.finalize().as_bytes();
        self.waiting.extend_from_slice(&hash);
        self.flush()?;
        SnapshotFile::new(self.file)
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
        let checked = || received(OnDisk.open(&path, Open::Existing).unwrap(), GroupId(3));
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
