//! Looks at RocksDB's write-ahead logs before RocksDB does.
//!
//! After a loss of power the end of a log that was not synced may have holes: blocks that reached the disk behind others that
//! didn't. RocksDB passes over zeros and goes on behind them, so a change of the state would be missing while later ones are
//! there; and it can't tell such a hole, which is harmless, from damage to what was synced, which isn't. Here both are told
//! apart, and a harmless hole is cut off with all that is behind it.
//!
//! - Every write has a sequence number, and they have no gaps: the good part of the logs ends at the first record that isn't
//!   whole or doesn't continue the numbers.
//! - The first batch after each sync says up to which sequence number all was synced before it ([`SYNCED`]), and so does the file
//!   `synced` ([`SyncedFile`]). If anything readable says that what is missing was synced, the logs are damaged, and are left as
//!   they are.
//!
//! The format is RocksDB's own (`db/log_format.h`, `db/write_batch.cc`), of the one version that we build with.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use crate::{
    disk::{damaged, unseal},
    types::checksum,
};

/// The key in `meta` of the sequence number up to which all was on disk before the batch that holds it. No other table has keys of one
/// byte.
pub(crate) const SYNCED: &[u8] = &[0x03];

const BLOCK: usize = 32 << 10;
const HEADER: usize = 7;
/// Sequence number and count stand before the operations of a batch.
const BATCH_HEADER: usize = 12;

/// A record: the place where it begins, and the batch that it holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Record {
    start: u64,
    sequence: u64,
    count: u32,
    synced: u64,
}

/// What is readable in one log.
#[derive(Debug, Default)]
struct Scan {
    records: Vec<Record>,
    /// Where the first thing begins that is no whole record.
    bad: Option<u64>,
}

/// Where the good part of the logs ends.
#[derive(Debug, PartialEq, Eq)]
struct Break {
    /// Which of the logs.
    log: usize,
    at: u64,
    /// The sequence number that is missing, if a record stands before it.
    expected: Option<u64>,
    /// Up to where something behind says that all was synced; 0: nothing does.
    synced: u64,
}

/// Cuts off what was never synced. `remembered` is the sequence number up to which the node remembers to have synced; `oldest`
/// tells the number of the oldest log that RocksDB still needs, and is asked only if something is wrong. Gives how many bytes were
/// cut.
pub(crate) fn mend(
    db: &Path,
    remembered: u64,
    oldest: impl FnOnce() -> io::Result<u64>,
) -> io::Result<Option<u64>> {
    if !db.join("CURRENT").exists() {
        // It was never made to its end; or it is damaged, which RocksDB and the file `synced` tell.
        return Ok(None);
    }
    let mut logs = logs(db)?;
    let mut scans = logs.iter().map(|(_, path)| scan(path)).collect::<io::Result<Vec<_>>>()?;
    if find_break(&scans).is_none() {
        return Ok(None);
    }
    // Logs that are no longer needed may have come back with the loss of power, without their ends.
    let oldest = oldest()?;
    let unneeded = logs.iter().take_while(|(number, _)| *number < oldest).count();
    logs.drain(..unneeded);
    scans.drain(..unneeded);
    let Some(found) = find_break(&scans) else { return Ok(None) };
    let path = &logs[found.log].1;
    let missing = found.expected.unwrap_or(1);
    let relied_on = found.expected.map_or(0, |_| remembered).max(found.synced);
    if missing <= relied_on {
        return Err(damaged(&format!(
            "{} at byte {}: write {missing} was synced and can't be read any more (synced up to {relied_on})",
            path.display(),
            found.at
        )));
    }
    let mut cut = 0;
    for (place, (_, path)) in logs.iter().enumerate().skip(found.log) {
        let keep = if place == found.log { found.at } else { 0 };
        let file = OpenOptions::new().write(true).open(path)?;
        cut += file.metadata()?.len() - keep;
        file.set_len(keep)?;
        file.sync_all()?;
    }
    tracing::warn!(log = %path.display(), at = found.at, cut, "cut off what was never synced");
    Ok(Some(cut))
}

/// Remembers, outside of the database, up to which sequence number all was synced, and how far the manifest went.
///
/// Two slots of 512 bytes, written in turn after each sync, without one of their own: after a loss of power it may lag or be torn, but
/// it never leads.
pub(crate) struct SyncedFile {
    file: File,
    newest: Synced,
    slot: u64,
}

/// What was synced.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Synced {
    /// All writes up to this sequence number.
    pub(crate) sequence: u64,
    pub(crate) manifest: Manifest,
}

/// The file that lists what the database consists of. RocksDB takes one that ends early for an older state of the database.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Manifest {
    /// In its name; a later one has a greater number.
    pub(crate) number: u64,
    /// Its length.
    pub(crate) bytes: u64,
}

impl Manifest {
    /// The one that counts, if there is one that can be found.
    pub(crate) fn find(db: &Path) -> Option<Manifest> {
        let current = fs::read_to_string(db.join("CURRENT")).ok()?;
        let number = current.trim_end().strip_prefix("MANIFEST-")?.parse().ok()?;
        let bytes = fs::metadata(Manifest::path(db, number)).ok()?.len();
        Some(Manifest { number, bytes })
    }

    pub(crate) fn path(db: &Path, number: u64) -> PathBuf {
        db.join(format!("MANIFEST-{number:06}"))
    }

    /// Fails if the manifest doesn't go as far as this one. One that can't be found is RocksDB's to tell.
    pub(crate) fn check(self, db: &Path) -> io::Result<()> {
        match Manifest::find(db) {
            Some(found) if found < self && self.number > 0 => Err(damaged(&format!(
                "{}: it ends at byte {} of manifest {}, and was synced up to byte {} of manifest {}",
                db.display(),
                found.bytes,
                found.number,
                self.bytes,
                self.number
            ))),
            Some(_) | None => Ok(()),
        }
    }
}

impl SyncedFile {
    const SLOT_BYTES: u64 = 512;
    const VALUE_BYTES: usize = 24;

    pub(crate) fn open(path: &Path) -> io::Result<SyncedFile> {
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path)?;
        let mut newest = Synced::default();
        for slot in [0, 1] {
            let mut bytes = [0; 8 + SyncedFile::VALUE_BYTES];
            let read = file.read_exact_at(&mut bytes, slot * SyncedFile::SLOT_BYTES);
            let (sum, value) = bytes.split_at(8);
            if read.is_ok() && checksum(&[value]) == sum {
                let number = |at: usize| {
                    u64::from_be_bytes(value[at..at + 8].try_into().expect("eight bytes are there"))
                };
                let manifest = Manifest { number: number(8), bytes: number(16) };
                newest = newest.max(Synced { sequence: number(0), manifest });
            }
        }
        Ok(SyncedFile { file, newest, slot: 0 })
    }

    /// The newest that was written.
    pub(crate) fn newest(&self) -> Synced {
        self.newest
    }

    pub(crate) fn write(&mut self, synced: Synced) -> io::Result<()> {
        self.newest = synced;
        self.slot = 1 - self.slot;
        let Synced { sequence, manifest } = synced;
        let value = [sequence, manifest.number, manifest.bytes].map(u64::to_be_bytes).concat();
        let bytes = [&checksum(&[&value])[..], &value].concat();
        self.file.write_all_at(&bytes, self.slot * SyncedFile::SLOT_BYTES)
    }
}

/// The logs, with their numbers, in order.
fn logs(db: &Path) -> io::Result<Vec<(u64, PathBuf)>> {
    let mut logs = Vec::new();
    for entry in fs::read_dir(db)? {
        let path = entry?.path();
        let number = path.file_stem().and_then(|stem| stem.to_str()?.parse().ok());
        if let Some(number) = number.filter(|_| path.extension().is_some_and(|end| end == "log")) {
            logs.push((number, path));
        }
    }
    logs.sort();
    Ok(logs)
}

fn find_break(scans: &[Scan]) -> Option<Break> {
    let mut expected: Option<u64> = None;
    let mut found: Option<Break> = None;
    for (log, scan) in scans.iter().enumerate() {
        for record in &scan.records {
            if let Some(found) = &mut found {
                found.synced = found.synced.max(record.synced);
                continue;
            }
            let is_bad = scan.bad.is_some_and(|bad| record.start >= bad);
            if is_bad || expected.is_some_and(|expected| record.sequence != expected) {
                let at = if is_bad { scan.bad.unwrap_or(record.start) } else { record.start };
                found = Some(Break { log, at, expected, synced: record.synced });
                continue;
            }
            expected = Some(record.sequence + u64::from(record.count));
        }
        if let (None, Some(at)) = (&found, scan.bad) {
            found = Some(Break { log, at, expected, synced: 0 });
        }
    }
    found
}

/// Reads a log from end to end, going on behind what can't be read at the next block.
fn scan(path: &Path) -> io::Result<Scan> {
    let mut file = File::open(path)?;
    let mut scan = Scan::default();
    let mut block = vec![0; BLOCK];
    let mut at = 0;
    // The parts of a record that goes over several blocks, and where it begins.
    let mut parts: Option<(u64, Vec<u8>)> = None;
    loop {
        let length = read_full(&mut file, &mut block)?;
        let mut place = 0;
        while place < length {
            let start = at + place as u64;
            let rest = &block[place..length];
            if rest.len() < HEADER && length == BLOCK {
                break;
            }
            let Some((kind, payload)) = fragment(rest) else {
                scan.bad(parts.take().map_or(start, |(begun, _)| begun));
                break;
            };
            place += HEADER + payload.len();
            let whole = match (kind, parts.take()) {
                (FULL, None) => Some((start, payload.to_vec())),
                (FIRST, None) => {
                    parts = Some((start, payload.to_vec()));
                    None
                }
                (MIDDLE, Some((begun, mut bytes))) => {
                    bytes.extend_from_slice(payload);
                    parts = Some((begun, bytes));
                    None
                }
                (LAST, Some((begun, mut bytes))) => {
                    bytes.extend_from_slice(payload);
                    Some((begun, bytes))
                }
                // What RocksDB notes about the log itself.
                (kind, None) if kind > LAST => None,
                (_, begun) => {
                    scan.bad(begun.map_or(start, |(begun, _)| begun));
                    match kind {
                        FULL => Some((start, payload.to_vec())),
                        FIRST => {
                            parts = Some((start, payload.to_vec()));
                            None
                        }
                        _ => None,
                    }
                }
            };
            match whole.map(|(start, bytes)| (start, record(start, &bytes))) {
                None => {}
                Some((_, Some(record))) => scan.records.push(record),
                Some((start, None)) => scan.bad(start),
            }
        }
        at += length as u64;
        if length < BLOCK {
            break;
        }
    }
    if let Some((begun, _)) = parts {
        scan.bad(begun);
    }
    Ok(scan)
}

impl Scan {
    fn bad(&mut self, at: u64) {
        self.bad = Some(self.bad.map_or(at, |bad| bad.min(at)));
    }
}

fn read_full(file: &mut File, block: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    while filled < block.len() {
        match file.read(&mut block[filled..])? {
            0 => break,
            read => filled += read,
        }
    }
    Ok(filled)
}

// Kinds of fragments. Those of logs that are written over ("recyclable") never occur here.
const FULL: u8 = 1;
const FIRST: u8 = 2;
const MIDDLE: u8 = 3;
const LAST: u8 = 4;
/// Notes of RocksDB: how the log is compressed, sizes of timestamps, what the log before was.
const NOTES: [u8; 3] = [9, 10, 130];

/// The fragment at the start of these bytes: its kind and its payload.
fn fragment(bytes: &[u8]) -> Option<(u8, &[u8])> {
    let header = bytes.get(..HEADER)?;
    let length = usize::from(u16::from_le_bytes([header[4], header[5]]));
    let kind = header[6];
    let payload = bytes.get(HEADER..HEADER + length)?;
    let sum = crc32c::crc32c_append(crc32c::crc32c(&[kind]), payload);
    let masked = sum.rotate_right(15).wrapping_add(0xa282_ead8);
    let known = (FULL..=LAST).contains(&kind) || NOTES.contains(&kind);
    (known && masked.to_le_bytes() == header[..4]).then_some((kind, payload))
}

fn record(start: u64, batch: &[u8]) -> Option<Record> {
    let sequence = u64::from_le_bytes(batch.get(..8)?.try_into().ok()?);
    let count = u32::from_le_bytes(batch.get(8..BATCH_HEADER)?.try_into().ok()?);
    let synced = synced(&batch[BATCH_HEADER..]).unwrap_or(0);
    Some(Record { start, sequence, count, synced })
}

/// Up to where all was synced before this batch, if it says so.
fn synced(mut operations: &[u8]) -> Option<u64> {
    let mut found = None;
    while let Some((&tag, rest)) = operations.split_first() {
        operations = rest;
        // Of a column family: deletion, value, deletion of a range. We write nothing else.
        let parts = match tag {
            0x4 => 1,
            0x5 | 0xE => 2,
            _ => return found,
        };
        varint(&mut operations)?;
        let key = string(&mut operations)?;
        let value = if parts == 2 { string(&mut operations)? } else { &[] };
        if tag == 0x5 && key == SYNCED {
            found = unseal(SYNCED, value).ok().max(found);
        }
    }
    found
}

fn varint(bytes: &mut &[u8]) -> Option<u64> {
    let mut value = 0;
    for shift in (0..35).step_by(7) {
        let (&byte, rest) = bytes.split_first()?;
        *bytes = rest;
        value |= u64::from(byte & 0x7f) << shift;
        if byte < 0x80 {
            return Some(value);
        }
    }
    None
}

fn string<'a>(bytes: &mut &'a [u8]) -> Option<&'a [u8]> {
    let length = usize::try_from(varint(bytes)?).ok()?;
    let (string, rest) = bytes.split_at_checked(length)?;
    *bytes = rest;
    Some(string)
}
