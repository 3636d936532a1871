//! What a disk would have, kept beside the watched folder.
//!
//! | path in the shadow | what |
//! |---|---|
//! | `names` | the journal of changes of names ([`crate::names`]) |
//! | `inodes/N.live` | a hard link to the file with inode N, as the process sees it: so it can't be lost, nor its number used again |
//! | `inodes/N.durable` | its contents as of its last sync; what survives besides is chosen when power is lost |
//! | `attached` | the id of the process under which the layer was last loaded |
//! | `failed` | why the layer ended a process, if it did |
//! | `last-loss` | what the last loss of power took |

use std::{
    collections::{BTreeMap, HashMap},
    fs::{self, File, OpenOptions},
    io::{self, Write},
    os::unix::fs::{FileExt, MetadataExt},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, Weak,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use crate::{
    names::{Change, Names, Node},
    random::Random,
};

/// So many ranges are remembered of one file; beyond that all of it counts as changed.
const RANGES_MAX: usize = 512;
/// Contents are copied and compared in pieces of this size.
pub(crate) const PIECE: usize = 256 << 10;
/// Of each hundred writes so many reach the disk at once, without a sync, as the kernel may do at any time.
const WRITTEN_BACK_PERCENT: u64 = 10;
/// Every so many syncs of a file it is checked that no write was missed, in a window before the file's end.
const CHECK_EVERY: u64 = 32;
const CHECK_BYTES: u64 = 1 << 20;

/// The layer's memory.
pub(crate) struct Shadow {
    pub(crate) path: PathBuf,
    names: Mutex<Journal>,
    inodes: Mutex<HashMap<u64, Weak<Inode>>>,
    random: Mutex<Random>,
}

/// The names, and the file that they are written to.
pub(crate) struct Journal {
    names: Names,
    file: File,
}

/// One file that is open.
pub(crate) struct Inode {
    number: u64,
    folder: PathBuf,
    files: OnceLock<(File, File)>,
    dirty: Mutex<Dirty>,
    /// Held during a sync: a second one must not return before the first has made its part durable.
    syncing: Mutex<()>,
    syncs: AtomicU64,
    /// It is written in ways that can't be followed (a mapping, a C stream): each sync takes all of it.
    unfollowed: AtomicBool,
    /// A sync has failed: what it should have made durable isn't, and will not be.
    has_failed: AtomicBool,
}

/// What was changed since the last sync.
#[derive(Default)]
struct Dirty {
    all: bool,
    ranges: Vec<(u64, u64)>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

impl Shadow {
    /// Opens the shadow of a folder. What stands in the folder without being known counts as just made; if there is no shadow yet, as
    /// durable.
    pub(crate) fn open(path: &Path, folder: &Path, seed: u64) -> io::Result<Shadow> {
        fs::create_dir_all(path.join("inodes"))?;
        if !path.join("names").exists() {
            adopt(path, folder)?;
        }
        let names = Names::replay(&fs::read_to_string(path.join("names"))?).map_err(io::Error::other)?;
        // A line that was cut by a kill is nothing that anybody was told of.
        let text = fs::read(path.join("names"))?;
        let whole = text.iter().rposition(|byte| *byte == b'\n').map_or(0, |end| end + 1);
        let file = OpenOptions::new().append(true).open(path.join("names"))?;
        file.set_len(whole as u64)?;
        let journal = Journal { names, file };
        let shadow = Shadow {
            path: path.to_owned(),
            names: Mutex::new(journal),
            inodes: Mutex::default(),
            random: Mutex::new(Random(seed)),
        };
        shadow.reconcile(folder)?;
        fs::write(path.join("attached"), std::process::id().to_string())?;
        Ok(shadow)
    }

    /// A kill may have come between a change and its line.
    fn reconcile(&self, folder: &Path) -> io::Result<()> {
        let found = walk(folder)?;
        let mut journal = self.journal();
        let gone: Vec<String> =
            journal.names.live.keys().rev().filter(|path| !found.contains_key(*path)).cloned().collect();
        for path in gone {
            journal.note(Change::Remove(path))?;
        }
        for (path, node) in found {
            if journal.names.live.get(&path) != Some(&node) {
                if let Node::File(inode) = node {
                    self.take_in(&folder.join(&path), inode)?;
                }
                journal.note(Change::Set(path, node))?;
            }
        }
        Ok(())
    }

    pub(crate) fn journal(&self) -> MutexGuard<'_, Journal> {
        lock(&self.names)
    }

    /// Begins to watch a file that was just made.
    pub(crate) fn take_in(&self, path: &Path, inode: u64) -> io::Result<()> {
        let live = self.path.join(format!("inodes/{inode}.live"));
        if !live.exists() {
            fs::hard_link(path, live)?;
            File::create(self.path.join(format!("inodes/{inode}.durable")))?;
        }
        Ok(())
    }

    /// The file with that inode. One that this process hasn't made may have changes from before that were never synced.
    pub(crate) fn inode(&self, number: u64, made_now: bool) -> Arc<Inode> {
        let mut inodes = lock(&self.inodes);
        if let Some(known) = inodes.get(&number).and_then(Weak::upgrade) {
            return known;
        }
        let inode = Arc::new(Inode {
            number,
            folder: self.path.join("inodes"),
            files: OnceLock::new(),
            dirty: Mutex::new(Dirty { all: !made_now, ranges: Vec::new() }),
            syncing: Mutex::default(),
            syncs: AtomicU64::new(0),
            unfollowed: AtomicBool::new(false),
            has_failed: AtomicBool::new(false),
        });
        inodes.retain(|_, known| known.strong_count() > 0);
        inodes.insert(number, Arc::downgrade(&inode));
        inode
    }

    /// Whether this write is to reach the disk at once.
    pub(crate) fn writes_back(&self) -> bool {
        lock(&self.random).percent(WRITTEN_BACK_PERCENT)
    }
}

impl Journal {
    pub(crate) fn note(&mut self, change: Change) -> io::Result<()> {
        self.file.write_all(change.line().as_bytes())?;
        self.names.apply(change);
        Ok(())
    }

    pub(crate) fn live(&self) -> &BTreeMap<String, Node> {
        &self.names.live
    }
}

impl Inode {
    fn files(&self) -> io::Result<&(File, File)> {
        if let Some(files) = self.files.get() {
            return Ok(files);
        }
        let live = File::open(self.folder.join(format!("{}.live", self.number)))?;
        let durable = self.folder.join(format!("{}.durable", self.number));
        let durable = OpenOptions::new().read(true).write(true).open(durable)?;
        Ok(self.files.get_or_init(|| (live, durable)))
    }

    pub(crate) fn follow_no_more(&self) {
        self.unfollowed.store(true, Ordering::Release);
    }

    /// Writes by `call`, which gives the range that it has changed, if any.
    pub(crate) fn write<T>(
        &self,
        shadow: &Shadow,
        call: impl FnOnce() -> (T, Option<(u64, u64)>),
    ) -> io::Result<T> {
        let mut dirty = lock(&self.dirty);
        let (answer, range) = call();
        let Some((from, to)) = range.filter(|(from, to)| from < to) else { return Ok(answer) };
        dirty.add(from, to);
        if shadow.writes_back() {
            let (live, durable) = self.files()?;
            copy(live, durable, from, to)?;
        }
        Ok(answer)
    }

    /// Changes the length by `call`.
    pub(crate) fn resize<T>(&self, call: impl FnOnce() -> T) -> io::Result<T> {
        let (live, _) = self.files()?;
        let mut dirty = lock(&self.dirty);
        let before = live.metadata()?.len();
        let answer = call();
        let after = live.metadata()?.len();
        dirty.add(before.min(after), before.max(after));
        Ok(answer)
    }

    /// Syncs by `call`. What it should have made durable is lost for good if it fails: the kernel counts such pages as written.
    pub(crate) fn sync(&self, call: impl FnOnce() -> libc::c_int) -> io::Result<libc::c_int> {
        let _syncing = lock(&self.syncing);
        let (live, durable) = self.files()?;
        let (taken, bytes) = {
            let mut dirty = lock(&self.dirty);
            (std::mem::take(&mut *dirty), live.metadata()?.len())
        };
        let answer = call();
        if answer != 0 {
            self.has_failed.store(true, Ordering::Release);
            return Ok(answer);
        }
        let whole = [(0, bytes)];
        let all = taken.all || self.unfollowed.load(Ordering::Acquire);
        for (from, to) in if all { &whole[..] } else { &taken.ranges } {
            copy(live, durable, *from, (*to).min(bytes))?;
        }
        if durable.metadata()?.len() != bytes {
            durable.set_len(bytes)?;
        }
        if self.syncs.fetch_add(1, Ordering::Relaxed).is_multiple_of(CHECK_EVERY) {
            self.check(bytes)?;
        }
        Ok(answer)
    }

    /// What wasn't written since the sync must be equal: else there was a write that wasn't followed.
    fn check(&self, synced: u64) -> io::Result<()> {
        let (live, durable) = self.files()?;
        let dirty = lock(&self.dirty);
        if dirty.all || self.unfollowed.load(Ordering::Acquire) || self.has_failed.load(Ordering::Acquire) {
            return Ok(());
        }
        let end = synced.min(live.metadata()?.len());
        let from = end.saturating_sub(CHECK_BYTES);
        let length = (end - from) as usize;
        let (mut left, mut right) = (vec![0; length], vec![0; length]);
        live.read_exact_at(&mut left, from)?;
        durable.read_exact_at(&mut right, from)?;
        for (start, stop) in &dirty.ranges {
            let place = |at: u64| (at.clamp(from, end) - from) as usize;
            left[place(*start)..place(*stop)].fill(0);
            right[place(*start)..place(*stop)].fill(0);
        }
        if left != right {
            let what = format!("file {} was written in a way that isn't followed", self.number);
            return Err(io::Error::other(what));
        }
        Ok(())
    }
}

impl Dirty {
    fn add(&mut self, from: u64, to: u64) {
        if self.all || from >= to {
            return;
        }
        match self.ranges.last_mut() {
            Some(last) if from <= last.1 && to >= last.0 => *last = (last.0.min(from), last.1.max(to)),
            _ => self.ranges.push((from, to)),
        }
        self.all = self.ranges.len() > RANGES_MAX;
    }
}

fn copy(live: &File, durable: &File, from: u64, to: u64) -> io::Result<()> {
    let mut piece = vec![0; PIECE.min(to.saturating_sub(from) as usize)];
    let mut at = from;
    while at < to {
        let length = piece.len().min((to - at) as usize);
        let read = live.read_at(&mut piece[..length], at)?;
        if read == 0 {
            return Ok(());
        }
        durable.write_all_at(&piece[..read], at)?;
        at += read as u64;
    }
    Ok(())
}

/// All names below a folder.
pub(crate) fn walk(folder: &Path) -> io::Result<BTreeMap<String, Node>> {
    let mut found = BTreeMap::new();
    let mut folders = vec![String::new()];
    while let Some(name) = folders.pop() {
        for entry in fs::read_dir(folder.join(&name))? {
            let entry = entry?;
            let last =
                entry.file_name().into_string().map_err(|_| io::Error::other("a name that is no text"))?;
            let path = if name.is_empty() { last } else { format!("{name}/{last}") };
            let data = entry.metadata()?;
            if data.is_dir() {
                folders.push(path.clone());
                found.insert(path, Node::Folder);
            } else {
                found.insert(path, Node::File(data.ino()));
            }
        }
    }
    Ok(found)
}

/// Begins a shadow: everything that is in the folder counts as durable.
pub(crate) fn adopt(shadow: &Path, folder: &Path) -> io::Result<()> {
    let found = walk(folder)?;
    for (path, node) in &found {
        if let Node::File(inode) = node {
            let live = shadow.join(format!("inodes/{inode}.live"));
            if !live.exists() {
                fs::hard_link(folder.join(path), &live)?;
                fs::copy(&live, shadow.join(format!("inodes/{inode}.durable")))?;
            }
        }
    }
    write_base(shadow, &found)
}

/// Writes a journal that says that exactly these names are there, and durable.
pub(crate) fn write_base(shadow: &Path, names: &BTreeMap<String, Node>) -> io::Result<()> {
    let mut text = String::new();
    let mut folders = vec![String::new()];
    for (path, node) in names {
        text.push_str(&Change::Set(path.clone(), *node).line());
        if *node == Node::Folder {
            folders.push(path.clone());
        }
    }
    for folder in folders {
        text.push_str(&Change::Sync(folder).line());
    }
    fs::write(shadow.join("names.new"), text)?;
    fs::rename(shadow.join("names.new"), shadow.join("names"))
}
