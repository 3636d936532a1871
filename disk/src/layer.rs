//! The layer of this process: which files are open, and what is done with each call.

use std::{
    cell::Cell,
    collections::HashMap,
    env,
    ffi::{CStr, OsStr},
    fs, io,
    os::unix::ffi::OsStrExt,
    path::{Component, Path, PathBuf},
    sync::{
        Arc, Mutex, OnceLock, RwLock,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use libc::{c_char, c_int, ssize_t};

use crate::{
    control::Faults,
    loss::lose_power,
    names::{Change, Node, parent},
    shadow::{Inode, Shadow},
};

/// File descriptors are below this; what is open is looked up without a lock.
const DESCRIPTORS: usize = 1 << 16;

static LAYER: OnceLock<Layer> = OnceLock::new();
static WATCHED: [AtomicBool; DESCRIPTORS] = [const { AtomicBool::new(false) }; DESCRIPTORS];

thread_local! {
    /// This thread is inside the layer: what it calls goes straight to the C library.
    static INSIDE: Cell<bool> = const { Cell::new(false) };
}

/// What a descriptor is.
#[derive(Clone)]
pub(crate) enum Open {
    /// A file; its inode where a shadow is kept.
    File(Option<Arc<Inode>>),
    /// A folder, by its path in the watched one.
    Folder(String),
}

/// What watches one folder.
pub(crate) struct Layer {
    folder: PathBuf,
    faults: Faults,
    shadow: Option<Shadow>,
    /// What must not change while names do.
    naming: Mutex<()>,
    open: RwLock<HashMap<c_int, Open>>,
}

/// Runs first of all, before there are threads.
#[used]
#[unsafe(link_section = ".init_array")]
static START: extern "C" fn() = start;

extern "C" fn start() {
    let Some(folder) = env::var_os("VERDICT_DISK_FOLDER") else { return };
    let _inside = Inside::enter();
    let shadow = env::var_os("VERDICT_DISK_SHADOW").map(PathBuf::from);
    match Layer::open(Path::new(&folder), shadow.as_deref()) {
        Ok(layer) => assert!(LAYER.set(layer).is_ok(), "a library is loaded once"),
        Err(error) => crate::fail(shadow.as_deref(), &format!("{}: {error}", folder.display())),
    }
}

/// While it lives, this thread's calls aren't watched.
pub(crate) struct Inside(());

impl Inside {
    /// None: this thread is inside already.
    fn enter() -> Option<Inside> {
        // A thread that is ending has nothing of its own any more; it isn't watched.
        match INSIDE.try_with(|inside| inside.replace(true)) {
            Ok(false) => Some(Inside(())),
            Ok(true) | Err(_) => None,
        }
    }
}

impl Drop for Inside {
    fn drop(&mut self) {
        // See `enter`.
        let _ = INSIDE.try_with(|inside| inside.set(false));
    }
}

/// The layer, if there is one and this thread isn't inside it.
pub(crate) fn layer() -> Option<(&'static Layer, Inside)> {
    let layer = LAYER.get()?;
    Some((layer, Inside::enter()?))
}

/// The layer, if this descriptor is one that it watches.
pub(crate) fn watching(fd: c_int) -> Option<(&'static Layer, Inside, Open)> {
    let watched = WATCHED.get(usize::try_from(fd).ok()?)?;
    if !watched.load(Ordering::Acquire) {
        return None;
    }
    let (layer, inside) = layer()?;
    let open = layer.open.read().unwrap_or_else(|poisoned| poisoned.into_inner()).get(&fd).cloned()?;
    Some((layer, inside, open))
}

/// Sets the error that the caller will find.
pub(crate) fn set_errno(error: c_int) {
    // SAFETY: the place is this thread's own.
    unsafe { *libc::__errno_location() = error };
}

fn errno() -> c_int {
    // SAFETY: the place is this thread's own.
    unsafe { *libc::__errno_location() }
}

/// Keeps the error of a call through what is done after it.
fn keeping_errno<T>(then: impl FnOnce() -> T) -> T {
    let error = errno();
    let value = then();
    set_errno(error);
    value
}

impl Layer {
    fn open(folder: &Path, shadow: Option<&Path>) -> io::Result<Layer> {
        fs::create_dir_all(folder)?;
        let folder = fs::canonicalize(folder)?;
        let seed = |name| env::var(name).ok().map(|seed| seed.parse().map_err(io::Error::other)).transpose();
        let loss: Option<u64> = seed("VERDICT_DISK_LOSE_POWER")?;
        let shadow = match shadow {
            None if loss.is_some() => return Err(io::Error::other("a loss of power needs a shadow")),
            None => None,
            Some(path) => {
                if let Some(seed) = loss
                    && path.join("names").exists()
                {
                    lose_power(&folder, path, seed)?;
                }
                Some(Shadow::open(path, &folder, loss.unwrap_or(0) ^ u64::from(std::process::id()))?)
            }
        };
        Ok(Layer {
            folder,
            faults: Faults::new(env::var_os("VERDICT_DISK_CONTROL").map(PathBuf::from)),
            shadow,
            naming: Mutex::default(),
            open: RwLock::default(),
        })
    }

    pub(crate) fn fail(&self, why: &str) -> ! {
        crate::fail(self.shadow.as_ref().map(|shadow| shadow.path.as_path()), why)
    }

    fn must<T>(&self, outcome: Result<T, impl std::fmt::Display>) -> T {
        outcome.unwrap_or_else(|why| self.fail(&why.to_string()))
    }

    /// Whether there is a shadow, so that nothing may be missed.
    pub(crate) fn follows(&self) -> bool {
        self.shadow.is_some()
    }

    /// The path inside the watched folder that a path means, if it is inside. Its last part need not exist.
    fn inside(&self, folder: c_int, path: *const c_char) -> Option<String> {
        // SAFETY: the caller of the C function gave a string that ends with a zero.
        let path = Path::new(OsStr::from_bytes(unsafe { CStr::from_ptr(path) }.to_bytes()));
        let base = match folder {
            _ if path.is_absolute() => PathBuf::new(),
            libc::AT_FDCWD => env::current_dir().ok()?,
            folder => fs::read_link(format!("/proc/self/fd/{folder}")).ok()?,
        };
        let whole = base.join(path);
        let mut plain = PathBuf::new();
        for part in whole.components() {
            match part {
                Component::CurDir => {}
                Component::ParentDir => drop(plain.pop()),
                part => plain.push(part),
            }
        }
        let place = match plain.strip_prefix(&self.folder) {
            Ok(place) => place.to_owned(),
            // By way of a link, perhaps.
            Err(_) => {
                let real = fs::canonicalize(plain.parent()?).ok()?.join(plain.file_name()?);
                real.strip_prefix(&self.folder).ok()?.to_owned()
            }
        };
        match place.to_str() {
            Some(text) if !text.contains(['\t', '\n']) => Some(text.to_owned()),
            _ => self.fail(&format!("a name that can't be noted: {}", place.display())),
        }
    }

    /// Opens or makes a file by `call`.
    pub(crate) fn open_file(
        &self,
        folder: c_int,
        path: *const c_char,
        flags: c_int,
        call: impl FnOnce() -> c_int,
    ) -> c_int {
        let may_make = flags & libc::O_CREAT != 0;
        let naming = may_make.then(|| self.naming.lock().unwrap_or_else(|poisoned| poisoned.into_inner()));
        if may_make
            && self.must(self.faults.is_full())
            && let Some(place) = self.inside(folder, path)
            && !self.folder.join(place).exists()
        {
            set_errno(libc::ENOSPC);
            return -1;
        }
        let fd = call();
        keeping_errno(|| self.opened(fd, flags));
        drop(naming);
        fd
    }

    /// Looks at what was just opened.
    pub(crate) fn opened(&self, fd: c_int, flags: c_int) {
        let Ok(slot) = usize::try_from(fd) else { return };
        self.closed(fd);
        let Ok(path) = fs::read_link(format!("/proc/self/fd/{fd}")) else { return };
        let Ok(place) = path.strip_prefix(&self.folder) else { return };
        if slot >= DESCRIPTORS {
            self.fail("too many open files");
        }
        let Some(place) = place.to_str() else { self.fail("a name that is no text") };
        let data = self.must(fs::metadata(format!("/proc/self/fd/{fd}")));
        let open = if data.is_dir() {
            if flags & libc::O_TMPFILE == libc::O_TMPFILE {
                self.fail("files without names aren't followed");
            }
            Open::Folder(place.to_owned())
        } else {
            Open::File(self.shadow.as_ref().map(|shadow| self.opened_file(shadow, place, &data, flags)))
        };
        self.open.write().unwrap_or_else(|poisoned| poisoned.into_inner()).insert(fd, open);
        WATCHED[slot].store(true, Ordering::Release);
    }

    fn opened_file(&self, shadow: &Shadow, place: &str, data: &fs::Metadata, flags: c_int) -> Arc<Inode> {
        use std::os::unix::fs::MetadataExt;
        let number = data.ino();
        let mut journal = shadow.journal();
        let made = journal.live().get(place) != Some(&Node::File(number));
        if made {
            self.must(shadow.take_in(&self.folder.join(place), number));
            self.must(journal.note(Change::Set(place.to_owned(), Node::File(number))));
        }
        drop(journal);
        let inode = shadow.inode(number, made);
        if flags & libc::O_TRUNC != 0 && !made {
            // How long it was isn't known any more.
            inode.follow_no_more();
        }
        inode
    }

    /// A descriptor stands for the same as another one.
    pub(crate) fn duplicated(&self, open: Open, fd: c_int) {
        let Ok(slot) = usize::try_from(fd) else { return };
        if slot >= DESCRIPTORS {
            self.fail("too many open files");
        }
        self.open.write().unwrap_or_else(|poisoned| poisoned.into_inner()).insert(fd, open);
        WATCHED[slot].store(true, Ordering::Release);
    }

    pub(crate) fn closed(&self, fd: c_int) {
        let Some(watched) = usize::try_from(fd).ok().and_then(|slot| WATCHED.get(slot)) else { return };
        if watched.swap(false, Ordering::AcqRel) {
            self.open.write().unwrap_or_else(|poisoned| poisoned.into_inner()).remove(&fd);
        }
    }

    /// Writes so many bytes by `call`, which is told how many there is room for. Without `at`, where the descriptor stands.
    pub(crate) fn write(
        &self,
        open: &Open,
        fd: c_int,
        at: Option<i64>,
        bytes: usize,
        whole: bool,
        call: impl FnOnce(usize) -> ssize_t,
    ) -> ssize_t {
        let room = self.room(fd, at, bytes, whole);
        if room == 0 && bytes > 0 {
            set_errno(libc::ENOSPC);
            return -1;
        }
        let Open::File(Some(inode)) = open else { return call(room) };
        let Some(shadow) = &self.shadow else { return call(room) };
        let written = inode.write(shadow, || {
            let written = call(room);
            let range = u64::try_from(written).ok().map(|count| {
                let from = match at {
                    Some(at) => at as u64,
                    None => keeping_errno(|| position(fd)).saturating_sub(count),
                };
                (from, from + count)
            });
            (written, range)
        });
        keeping_errno(|| self.must(written))
    }

    /// How many bytes of these there is room for.
    fn room(&self, fd: c_int, at: Option<i64>, bytes: usize, whole: bool) -> usize {
        if !self.must(self.faults.counts_bytes()) {
            return bytes;
        }
        let end = fs::metadata(format!("/proc/self/fd/{fd}")).map_or(0, |data| data.len());
        let growth = match at {
            None => bytes as u64,
            Some(at) => (at as u64 + bytes as u64).saturating_sub(end),
        };
        let granted = self.must(self.faults.take_room(growth));
        match granted == growth {
            true => bytes,
            false if whole => 0,
            false => bytes - (growth - granted) as usize,
        }
    }

    /// Changes the length of a file by `call`.
    pub(crate) fn resize(&self, open: &Open, grows: bool, call: impl FnOnce() -> c_int) -> c_int {
        if grows && self.must(self.faults.is_full()) {
            set_errno(libc::ENOSPC);
            return -1;
        }
        match open {
            Open::File(Some(inode)) => {
                let answer = inode.resize(call);
                keeping_errno(|| self.must(answer))
            }
            Open::File(None) | Open::Folder(_) => call(),
        }
    }

    /// Writes by `call` in a way of which the place isn't known.
    pub(crate) fn write_anyhow<T>(&self, open: &Open, call: impl FnOnce() -> T) -> T {
        if let Open::File(Some(inode)) = open {
            inode.follow_no_more();
        }
        call()
    }

    /// Syncs by `call`.
    pub(crate) fn sync(&self, open: &Open, call: impl FnOnce() -> c_int) -> c_int {
        let fault = self.must(self.faults.sync());
        if fault.delay_ms > 0 {
            std::thread::sleep(Duration::from_millis(fault.delay_ms));
        }
        let call = || match fault.fails {
            true => {
                set_errno(libc::EIO);
                -1
            }
            false => call(),
        };
        match (open, &self.shadow) {
            (Open::File(Some(inode)), _) => {
                let answer = inode.sync(call);
                keeping_errno(|| self.must(answer))
            }
            (Open::Folder(place), Some(shadow)) => {
                // What is done to names from now on isn't part of it.
                let mut journal = shadow.journal();
                let answer = call();
                if answer == 0 {
                    self.must(journal.note(Change::Sync(place.clone())));
                }
                answer
            }
            (Open::File(None) | Open::Folder(_), _) => call(),
        }
    }

    /// A sync of a descriptor that isn't known: it must not be one of ours.
    pub(crate) fn check_unknown(&self, fd: c_int) {
        let path = fs::read_link(format!("/proc/self/fd/{fd}"));
        if self.follows() && path.is_ok_and(|path| path.starts_with(&self.folder)) {
            self.fail("a file is synced that was opened in a way that isn't followed");
        }
    }

    /// Renames by `call`.
    pub(crate) fn rename(
        &self,
        from: (c_int, *const c_char),
        to: (c_int, *const c_char),
        call: impl FnOnce() -> c_int,
    ) -> c_int {
        let _naming = self.naming.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let places = (self.inside(from.0, from.1), self.inside(to.0, to.1));
        let answer = call();
        let Some(shadow) = self.shadow.as_ref().filter(|_| answer == 0) else { return answer };
        keeping_errno(|| match places {
            (None, None) => {}
            (Some(from), Some(to)) if parent(&from) == parent(&to) && !self.folder.join(&to).is_dir() => {
                self.must(shadow.journal().note(Change::Rename(from, to)));
            }
            places => self.fail(&format!("only files are renamed, within their folder: {places:?}")),
        });
        answer
    }

    /// Makes or removes the name of something by `call`.
    pub(crate) fn name(&self, folder: c_int, path: *const c_char, call: impl FnOnce() -> c_int) -> c_int {
        let _naming = self.naming.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let place = self.inside(folder, path);
        let answer = call();
        let (Some(shadow), Some(place), 0) = (&self.shadow, place, answer) else { return answer };
        keeping_errno(|| {
            let node = node_at(&self.folder.join(&place));
            let change = match node {
                None => Change::Remove(place),
                Some(Node::Folder) => Change::Set(place, Node::Folder),
                Some(Node::File(inode)) => {
                    self.must(shadow.take_in(&self.folder.join(&place), inode));
                    Change::Set(place, Node::File(inode))
                }
            };
            self.must(shadow.journal().note(change));
        });
        answer
    }

    /// Refuses, by ending the process, what must not be done inside the watched folder.
    pub(crate) fn refuse_inside(&self, folder: c_int, path: *const c_char, what: &str) {
        if self.follows() && self.inside(folder, path).is_some() {
            self.fail(&format!("{what} isn't followed"));
        }
    }
}

fn node_at(path: &Path) -> Option<Node> {
    use std::os::unix::fs::MetadataExt;
    let data = fs::symlink_metadata(path).ok()?;
    Some(if data.is_dir() { Node::Folder } else { Node::File(data.ino()) })
}

/// Where a descriptor stands.
fn position(fd: c_int) -> u64 {
    // SAFETY: it changes nothing.
    let at = unsafe { libc::lseek64(fd, 0, libc::SEEK_CUR) };
    u64::try_from(at).unwrap_or(0)
}
