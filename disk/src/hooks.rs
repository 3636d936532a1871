//! The functions that stand in for those of the C library.
//!
//! Each passes its call on. What is done around it is in [`crate::layer`].

use std::ptr;

use libc::{
    AT_FDCWD, DIR, FILE, c_char, c_int, c_long, c_uint, c_void, iovec, mode_t, off_t, size_t, ssize_t,
};

use crate::{
    layer::{layer, watching},
    real,
};

/// A function that opens or makes a file.
macro_rules! opens {
    ($($name:ident($($folder:ident)?) $at:expr;)*) => {
        $(
            /// Stands in for the C function of that name.
            ///
            /// # Safety
            /// As that function asks.
            #[unsafe(no_mangle)]
            pub unsafe extern "C" fn $name($($folder: c_int,)? path: *const c_char, flags: c_int, mode: mode_t) -> c_int {
                // SAFETY: the arguments are the caller's.
                let call = || unsafe { real::$name($($folder,)? path, flags, mode) };
                match layer() {
                    None => call(),
                    Some((layer, _inside)) => layer.open_file($at, path, flags, call),
                }
            }
        )*
    };
}

opens! {
    open() AT_FDCWD;
    open64() AT_FDCWD;
    openat(folder) folder;
    openat64(folder) folder;
}

/// Stands in for the C function of that name: `open` for what is compiled with checks of its arguments.
///
/// # Safety
/// As that function asks.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn __open_2(path: *const c_char, flags: c_int) -> c_int {
    // SAFETY: the arguments are the caller's.
    unsafe { open(path, flags, 0) }
}

/// Stands in for the C function of that name.
///
/// # Safety
/// As that function asks.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn __open64_2(path: *const c_char, flags: c_int) -> c_int {
    // SAFETY: the arguments are the caller's.
    unsafe { open64(path, flags, 0) }
}

/// Stands in for the C function of that name.
///
/// # Safety
/// As that function asks.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn __openat_2(folder: c_int, path: *const c_char, flags: c_int) -> c_int {
    // SAFETY: the arguments are the caller's.
    unsafe { openat(folder, path, flags, 0) }
}

/// Stands in for the C function of that name.
///
/// # Safety
/// As that function asks.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn __openat64_2(folder: c_int, path: *const c_char, flags: c_int) -> c_int {
    // SAFETY: the arguments are the caller's.
    unsafe { openat64(folder, path, flags, 0) }
}

/// Stands in for the C function of that name.
///
/// # Safety
/// As that function asks.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn creat(path: *const c_char, mode: mode_t) -> c_int {
    // SAFETY: the arguments are the caller's.
    unsafe { open(path, libc::O_CREAT | libc::O_WRONLY | libc::O_TRUNC, mode) }
}

/// Stands in for the C function of that name.
///
/// # Safety
/// As that function asks.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn creat64(path: *const c_char, mode: mode_t) -> c_int {
    // SAFETY: the arguments are the caller's.
    unsafe { open64(path, libc::O_CREAT | libc::O_WRONLY | libc::O_TRUNC, mode) }
}

/// A function that opens a C stream. What is written through one isn't seen, so all of its file is taken at each sync.
macro_rules! streams {
    ($($name:ident;)*) => {
        $(
            /// Stands in for the C function of that name.
            ///
            /// # Safety
            /// As that function asks.
            #[unsafe(no_mangle)]
            pub unsafe extern "C" fn $name(path: *const c_char, mode: *const c_char) -> *mut FILE {
                let mut stream = ptr::null_mut();
                let call = || {
                    // SAFETY: the arguments are the caller's.
                    stream = unsafe { real::$name(path, mode) };
                    // SAFETY: it is an open stream.
                    if stream.is_null() { -1 } else { unsafe { libc::fileno(stream) } }
                };
                let Some((layer, inside)) = layer() else {
                    // SAFETY: the arguments are the caller's.
                    return unsafe { real::$name(path, mode) };
                };
                // SAFETY: a mode has at least one character before its end.
                let reads = unsafe { *mode } == b'r' as c_char;
                let flags = if reads { libc::O_RDONLY } else { libc::O_CREAT };
                let fd = layer.open_file(AT_FDCWD, path, flags, call);
                drop(inside);
                unfollow(fd);
                stream
            }
        )*
    };
}

streams! {
    fopen;
    fopen64;
}

fn unfollow(fd: c_int) {
    if let Some((layer, _inside, open)) = watching(fd) {
        layer.write_anyhow(&open, || ());
    }
}

/// Stands in for the C function of that name.
///
/// # Safety
/// As that function asks.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fdopen(fd: c_int, mode: *const c_char) -> *mut FILE {
    unfollow(fd);
    // SAFETY: the arguments are the caller's.
    unsafe { real::fdopen(fd, mode) }
}

/// Stands in for the C function of that name.
///
/// # Safety
/// As that function asks.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fclose(stream: *mut FILE) -> c_int {
    // SAFETY: it is the caller's open stream.
    forget(unsafe { libc::fileno(stream) });
    // SAFETY: the arguments are the caller's.
    unsafe { real::fclose(stream) }
}

/// Stands in for the C function of that name.
///
/// # Safety
/// As that function asks.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn closedir(stream: *mut DIR) -> c_int {
    // SAFETY: it is the caller's open stream.
    forget(unsafe { libc::dirfd(stream) });
    // SAFETY: the arguments are the caller's.
    unsafe { real::closedir(stream) }
}

/// Stands in for the C function of that name.
///
/// # Safety
/// As that function asks.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn close(fd: c_int) -> c_int {
    forget(fd);
    // SAFETY: the arguments are the caller's.
    unsafe { real::close(fd) }
}

/// A descriptor is about to be closed: from then on its number may mean something else.
fn forget(fd: c_int) {
    if let Some((layer, _inside, _)) = watching(fd) {
        layer.closed(fd);
    }
}

/// A descriptor that was made from another one.
fn duplicate(from: c_int, to: c_int) {
    if to < 0 {
        return;
    }
    if let Some((layer, _inside, open)) = watching(from) {
        layer.duplicated(open, to);
    }
}

/// Stands in for the C function of that name.
///
/// # Safety
/// As that function asks.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dup(fd: c_int) -> c_int {
    // SAFETY: the arguments are the caller's.
    let to = unsafe { real::dup(fd) };
    duplicate(fd, to);
    to
}

/// Stands in for the C function of that name.
///
/// # Safety
/// As that function asks.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dup2(fd: c_int, to: c_int) -> c_int {
    forget(to);
    // SAFETY: the arguments are the caller's.
    let to = unsafe { real::dup2(fd, to) };
    duplicate(fd, to);
    to
}

/// Stands in for the C function of that name.
///
/// # Safety
/// As that function asks.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dup3(fd: c_int, to: c_int, flags: c_int) -> c_int {
    forget(to);
    // SAFETY: the arguments are the caller's.
    let to = unsafe { real::dup3(fd, to, flags) };
    duplicate(fd, to);
    to
}

/// A function that duplicates a descriptor, among other things.
macro_rules! controls {
    ($($name:ident;)*) => {
        $(
            /// Stands in for the C function of that name.
            ///
            /// # Safety
            /// As that function asks.
            #[unsafe(no_mangle)]
            pub unsafe extern "C" fn $name(fd: c_int, command: c_int, argument: *mut c_void) -> c_int {
                // SAFETY: the arguments are the caller's.
                let answer = unsafe { real::$name(fd, command, argument) };
                if matches!(command, libc::F_DUPFD | libc::F_DUPFD_CLOEXEC) {
                    duplicate(fd, answer);
                }
                answer
            }
        )*
    };
}

controls! {
    fcntl;
    fcntl64;
}

/// Stands in for the C function of that name.
///
/// # Safety
/// As that function asks.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn write(fd: c_int, bytes: *const c_void, count: size_t) -> ssize_t {
    // SAFETY: the arguments are the caller's; never more is written than it gave.
    let call = |count| unsafe { real::write(fd, bytes, count) };
    match watching(fd) {
        None => call(count),
        Some((layer, _inside, open)) => layer.write(&open, fd, None, count, false, call),
    }
}

/// A function that writes at a place.
macro_rules! writes_at {
    ($($name:ident;)*) => {
        $(
            /// Stands in for the C function of that name.
            ///
            /// # Safety
            /// As that function asks.
            #[unsafe(no_mangle)]
            pub unsafe extern "C" fn $name(fd: c_int, bytes: *const c_void, count: size_t, at: off_t) -> ssize_t {
                // SAFETY: the arguments are the caller's; never more is written than it gave.
                let call = |count| unsafe { real::$name(fd, bytes, count, at) };
                match watching(fd) {
                    None => call(count),
                    Some((layer, _inside, open)) => layer.write(&open, fd, Some(at), count, false, call),
                }
            }
        )*
    };
}

writes_at! {
    pwrite;
    pwrite64;
}

/// How many bytes these parts have.
///
/// # Safety
/// There are so many parts.
unsafe fn bytes_in(parts: *const iovec, count: c_int) -> usize {
    // SAFETY: the caller says so.
    (0..count.max(0) as usize).map(|part| unsafe { (*parts.add(part)).iov_len }).sum()
}

/// Stands in for the C function of that name.
///
/// # Safety
/// As that function asks.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn writev(fd: c_int, parts: *const iovec, count: c_int) -> ssize_t {
    // SAFETY: the arguments are the caller's.
    let call = |_| unsafe { real::writev(fd, parts, count) };
    match watching(fd) {
        None => call(0),
        Some((layer, _inside, open)) => {
            // SAFETY: the arguments are the caller's.
            let bytes = unsafe { bytes_in(parts, count) };
            layer.write(&open, fd, None, bytes, true, call)
        }
    }
}

/// A function that writes several parts at a place.
macro_rules! writes_parts_at {
    ($($name:ident($($flags:ident)?);)*) => {
        $(
            /// Stands in for the C function of that name.
            ///
            /// # Safety
            /// As that function asks.
            #[unsafe(no_mangle)]
            pub unsafe extern "C" fn $name(fd: c_int, parts: *const iovec, count: c_int, at: off_t $(, $flags: c_int)?) -> ssize_t {
                // SAFETY: the arguments are the caller's.
                let call = |_| unsafe { real::$name(fd, parts, count, at $(, $flags)?) };
                let Some((layer, _inside, open)) = watching(fd) else { return call(0) };
                // SAFETY: the arguments are the caller's.
                let bytes = unsafe { bytes_in(parts, count) };
                layer.write(&open, fd, (at >= 0).then_some(at), bytes, true, call)
            }
        )*
    };
}

writes_parts_at! {
    pwritev();
    pwritev64();
    pwritev2(flags);
    pwritev64v2(flags);
}

/// Writes to `to` in a way of which the place isn't known.
fn anyhow<T>(to: c_int, call: impl FnOnce() -> T) -> T {
    match watching(to) {
        None => call(),
        Some((layer, _inside, open)) => layer.write_anyhow(&open, call),
    }
}

/// Stands in for the C function of that name.
///
/// # Safety
/// As that function asks.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn copy_file_range(
    from: c_int,
    at: *mut off_t,
    to: c_int,
    to_at: *mut off_t,
    count: size_t,
    flags: c_uint,
) -> ssize_t {
    // SAFETY: the arguments are the caller's.
    anyhow(to, || unsafe { real::copy_file_range(from, at, to, to_at, count, flags) })
}

/// Stands in for the C function of that name.
///
/// # Safety
/// As that function asks.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sendfile(to: c_int, from: c_int, at: *mut off_t, count: size_t) -> ssize_t {
    // SAFETY: the arguments are the caller's.
    anyhow(to, || unsafe { real::sendfile(to, from, at, count) })
}

/// Stands in for the C function of that name.
///
/// # Safety
/// As that function asks.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sendfile64(to: c_int, from: c_int, at: *mut off_t, count: size_t) -> ssize_t {
    // SAFETY: the arguments are the caller's.
    anyhow(to, || unsafe { real::sendfile64(to, from, at, count) })
}

/// Stands in for the C function of that name.
///
/// # Safety
/// As that function asks.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn splice(
    from: c_int,
    at: *mut off_t,
    to: c_int,
    to_at: *mut off_t,
    count: size_t,
    flags: c_uint,
) -> ssize_t {
    // SAFETY: the arguments are the caller's.
    anyhow(to, || unsafe { real::splice(from, at, to, to_at, count, flags) })
}

/// A function that changes the length of an open file. What it answers is 0, or not.
macro_rules! resizes {
    ($($name:ident($($argument:ident: $type:ty),*) $grows:expr;)*) => {
        $(
            /// Stands in for the C function of that name.
            ///
            /// # Safety
            /// As that function asks.
            #[unsafe(no_mangle)]
            pub unsafe extern "C" fn $name(fd: c_int, $($argument: $type),*) -> c_int {
                // SAFETY: the arguments are the caller's.
                let call = || unsafe { real::$name(fd, $($argument),*) };
                match watching(fd) {
                    None => call(),
                    Some((layer, _inside, open)) => layer.resize(&open, $grows, call),
                }
            }
        )*
    };
}

resizes! {
    ftruncate(bytes: off_t) false;
    ftruncate64(bytes: off_t) false;
    fallocate(mode: c_int, at: off_t, bytes: off_t) true;
    fallocate64(mode: c_int, at: off_t, bytes: off_t) true;
    posix_fallocate(at: off_t, bytes: off_t) true;
    posix_fallocate64(at: off_t, bytes: off_t) true;
}

/// A function that changes something by a path, in a way that isn't followed inside the folder.
macro_rules! refuses {
    ($($name:ident($($argument:ident: $type:ty),*) $folder:expr, $path:ident, $what:expr;)*) => {
        $(
            /// Stands in for the C function of that name.
            ///
            /// # Safety
            /// As that function asks.
            #[unsafe(no_mangle)]
            pub unsafe extern "C" fn $name($($argument: $type),*) -> c_int {
                if let Some((layer, _inside)) = layer() {
                    layer.refuse_inside($folder, $path, $what);
                }
                // SAFETY: the arguments are the caller's.
                unsafe { real::$name($($argument),*) }
            }
        )*
    };
}

refuses! {
    truncate(path: *const c_char, bytes: off_t) AT_FDCWD, path, "truncate by a path";
    truncate64(path: *const c_char, bytes: off_t) AT_FDCWD, path, "truncate by a path";
    symlink(to: *const c_char, path: *const c_char) AT_FDCWD, path, "a symbolic link";
    symlinkat(to: *const c_char, folder: c_int, path: *const c_char) folder, path, "a symbolic link";
}

/// A function that makes or removes a name.
macro_rules! names {
    ($($name:ident($($argument:ident: $type:ty),*) $folder:expr, $path:ident;)*) => {
        $(
            /// Stands in for the C function of that name.
            ///
            /// # Safety
            /// As that function asks.
            #[unsafe(no_mangle)]
            pub unsafe extern "C" fn $name($($argument: $type),*) -> c_int {
                // SAFETY: the arguments are the caller's.
                let call = || unsafe { real::$name($($argument),*) };
                match layer() {
                    None => call(),
                    Some((layer, _inside)) => layer.name($folder, $path, call),
                }
            }
        )*
    };
}

names! {
    link(from: *const c_char, to: *const c_char) AT_FDCWD, to;
    linkat(from_folder: c_int, from: *const c_char, folder: c_int, to: *const c_char, flags: c_int) folder, to;
    unlink(path: *const c_char) AT_FDCWD, path;
    unlinkat(folder: c_int, path: *const c_char, flags: c_int) folder, path;
    remove(path: *const c_char) AT_FDCWD, path;
    mkdir(path: *const c_char, mode: mode_t) AT_FDCWD, path;
    mkdirat(folder: c_int, path: *const c_char, mode: mode_t) folder, path;
    rmdir(path: *const c_char) AT_FDCWD, path;
}

/// Stands in for the C function of that name.
///
/// # Safety
/// As that function asks.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn rename(from: *const c_char, to: *const c_char) -> c_int {
    // SAFETY: the arguments are the caller's.
    let call = || unsafe { real::rename(from, to) };
    match layer() {
        None => call(),
        Some((layer, _inside)) => layer.rename((AT_FDCWD, from), (AT_FDCWD, to), call),
    }
}

/// A function that renames, with folders.
macro_rules! renames {
    ($($name:ident($($flags:ident)?);)*) => {
        $(
            /// Stands in for the C function of that name.
            ///
            /// # Safety
            /// As that function asks.
            #[unsafe(no_mangle)]
            pub unsafe extern "C" fn $name(
                from_folder: c_int,
                from: *const c_char,
                to_folder: c_int,
                to: *const c_char
                $(, $flags: c_uint)?
            ) -> c_int {
                // SAFETY: the arguments are the caller's.
                let call = || unsafe { real::$name(from_folder, from, to_folder, to $(, $flags)?) };
                match layer() {
                    None => call(),
                    Some((layer, _inside)) => layer.rename((from_folder, from), (to_folder, to), call),
                }
            }
        )*
    };
}

renames! {
    renameat();
    renameat2(flags);
}

/// A function that syncs one file or folder.
macro_rules! syncs {
    ($($name:ident;)*) => {
        $(
            /// Stands in for the C function of that name.
            ///
            /// # Safety
            /// As that function asks.
            #[unsafe(no_mangle)]
            pub unsafe extern "C" fn $name(fd: c_int) -> c_int {
                // SAFETY: the arguments are the caller's.
                let call = || unsafe { real::$name(fd) };
                if let Some((layer, _inside, open)) = watching(fd) {
                    return layer.sync(&open, call);
                }
                if let Some((layer, _inside)) = layer() {
                    layer.check_unknown(fd);
                }
                call()
            }
        )*
    };
}

syncs! {
    fsync;
    fdatasync;
}

/// Stands in for the C function of that name.
///
/// # Safety
/// As that function asks.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn syncfs(fd: c_int) -> c_int {
    if let Some((layer, _inside)) = layer()
        && layer.follows()
    {
        layer.fail("syncfs isn't followed");
    }
    // SAFETY: the arguments are the caller's.
    unsafe { real::syncfs(fd) }
}

/// Stands in for the C function of that name.
///
/// # Safety
/// As that function asks.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn msync(address: *mut c_void, bytes: size_t, flags: c_int) -> c_int {
    if let Some((layer, _inside)) = layer()
        && layer.follows()
    {
        layer.fail("msync isn't followed");
    }
    // SAFETY: the arguments are the caller's.
    unsafe { real::msync(address, bytes, flags) }
}

/// A function that maps a file. What is written through a mapping isn't seen, so all of its file is taken at each sync.
macro_rules! maps {
    ($($name:ident;)*) => {
        $(
            /// Stands in for the C function of that name.
            ///
            /// # Safety
            /// As that function asks.
            #[unsafe(no_mangle)]
            pub unsafe extern "C" fn $name(
                address: *mut c_void,
                bytes: size_t,
                protection: c_int,
                flags: c_int,
                fd: c_int,
                at: off_t,
            ) -> *mut c_void {
                if fd >= 0 && flags & libc::MAP_TYPE != libc::MAP_PRIVATE && protection & libc::PROT_WRITE != 0 {
                    unfollow(fd);
                }
                // SAFETY: the arguments are the caller's.
                unsafe { real::$name(address, bytes, protection, flags, fd, at) }
            }
        )*
    };
}

maps! {
    mmap;
    mmap64;
}

/// Calls of the kernel that change files: nobody who goes this way is followed.
fn changes_files(number: c_long) -> bool {
    matches!(
        number,
        libc::SYS_write
            | libc::SYS_pwrite64
            | libc::SYS_writev
            | libc::SYS_pwritev
            | libc::SYS_pwritev2
            | libc::SYS_openat
            | libc::SYS_openat2
            | libc::SYS_renameat2
            | libc::SYS_linkat
            | libc::SYS_unlinkat
            | libc::SYS_mkdirat
            | libc::SYS_fsync
            | libc::SYS_fdatasync
            | libc::SYS_syncfs
            | libc::SYS_ftruncate
            | libc::SYS_truncate
            | libc::SYS_fallocate
            | libc::SYS_copy_file_range
            | libc::SYS_io_uring_setup
            | libc::SYS_io_submit
    )
}

/// Stands in for the C function of that name.
///
/// # Safety
/// As that function asks.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn syscall(
    number: c_long,
    a: c_long,
    b: c_long,
    c: c_long,
    d: c_long,
    e: c_long,
    f: c_long,
) -> c_long {
    if changes_files(number)
        && let Some((layer, _inside)) = layer()
        && layer.follows()
    {
        layer.fail(&format!("call {number} of the kernel isn't followed"));
    }
    // SAFETY: the arguments are the caller's; those that it didn't give are not looked at.
    unsafe { real::syscall(number, a, b, c, d, e, f) }
}
