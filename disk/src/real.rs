//! The C library's own functions, behind those that stand in for them.

use std::{
    ffi::CStr,
    sync::atomic::{AtomicPtr, Ordering},
};

use libc::{DIR, FILE, c_char, c_int, c_long, c_uint, c_void, iovec, mode_t, off_t, size_t, ssize_t};

/// The next function of that name behind this library.
fn next(cache: &AtomicPtr<c_void>, name: &CStr) -> *mut c_void {
    let known = cache.load(Ordering::Acquire);
    if !known.is_null() {
        return known;
    }
    // SAFETY: the name ends with a zero, and `RTLD_NEXT` asks for nothing but the search order.
    let found = unsafe { libc::dlsym(libc::RTLD_NEXT, name.as_ptr()) };
    if found.is_null() {
        crate::fail(None, &format!("the C library has no {}", name.to_string_lossy()));
    }
    cache.store(found, Ordering::Release);
    found
}

macro_rules! real {
    ($($name:ident($($argument:ident: $type:ty),*) -> $result:ty;)*) => {
        $(
            /// The C library's function of that name.
            ///
            /// # Safety
            /// As that function asks.
            pub(crate) unsafe fn $name($($argument: $type),*) -> $result {
                static FOUND: AtomicPtr<c_void> = AtomicPtr::new(std::ptr::null_mut());
                const NAME: &CStr =
                    match CStr::from_bytes_with_nul(concat!(stringify!($name), "\0").as_bytes()) {
                        Ok(name) => name,
                        Err(_) => panic!("a name has no zero inside"),
                    };
                let found = next(&FOUND, NAME);
                // SAFETY: it is the C function of that name, and this is its type.
                let function: unsafe extern "C" fn($($type),*) -> $result = unsafe { std::mem::transmute(found) };
                // SAFETY: the caller keeps what the function asks.
                unsafe { function($($argument),*) }
            }
        )*
    };
}

// `open`, `fcntl` and `syscall` take a variable number of arguments in C. On Linux, on x86-64 and on 64-bit ARM, whole numbers and
// pointers travel in the same registers either way.
real! {
    open(path: *const c_char, flags: c_int, mode: mode_t) -> c_int;
    open64(path: *const c_char, flags: c_int, mode: mode_t) -> c_int;
    openat(folder: c_int, path: *const c_char, flags: c_int, mode: mode_t) -> c_int;
    openat64(folder: c_int, path: *const c_char, flags: c_int, mode: mode_t) -> c_int;
    fopen(path: *const c_char, mode: *const c_char) -> *mut FILE;
    fopen64(path: *const c_char, mode: *const c_char) -> *mut FILE;
    fdopen(fd: c_int, mode: *const c_char) -> *mut FILE;
    fclose(stream: *mut FILE) -> c_int;
    closedir(stream: *mut DIR) -> c_int;
    close(fd: c_int) -> c_int;
    dup(fd: c_int) -> c_int;
    dup2(fd: c_int, to: c_int) -> c_int;
    dup3(fd: c_int, to: c_int, flags: c_int) -> c_int;
    fcntl(fd: c_int, command: c_int, argument: *mut c_void) -> c_int;
    fcntl64(fd: c_int, command: c_int, argument: *mut c_void) -> c_int;
    write(fd: c_int, bytes: *const c_void, count: size_t) -> ssize_t;
    pwrite(fd: c_int, bytes: *const c_void, count: size_t, at: off_t) -> ssize_t;
    pwrite64(fd: c_int, bytes: *const c_void, count: size_t, at: off_t) -> ssize_t;
    writev(fd: c_int, parts: *const iovec, count: c_int) -> ssize_t;
    pwritev(fd: c_int, parts: *const iovec, count: c_int, at: off_t) -> ssize_t;
    pwritev64(fd: c_int, parts: *const iovec, count: c_int, at: off_t) -> ssize_t;
    pwritev2(fd: c_int, parts: *const iovec, count: c_int, at: off_t, flags: c_int) -> ssize_t;
    pwritev64v2(fd: c_int, parts: *const iovec, count: c_int, at: off_t, flags: c_int) -> ssize_t;
    copy_file_range(from: c_int, at: *mut off_t, to: c_int, to_at: *mut off_t, count: size_t, flags: c_uint) -> ssize_t;
    sendfile(to: c_int, from: c_int, at: *mut off_t, count: size_t) -> ssize_t;
    sendfile64(to: c_int, from: c_int, at: *mut off_t, count: size_t) -> ssize_t;
    splice(from: c_int, at: *mut off_t, to: c_int, to_at: *mut off_t, count: size_t, flags: c_uint) -> ssize_t;
    ftruncate(fd: c_int, bytes: off_t) -> c_int;
    ftruncate64(fd: c_int, bytes: off_t) -> c_int;
    truncate(path: *const c_char, bytes: off_t) -> c_int;
    truncate64(path: *const c_char, bytes: off_t) -> c_int;
    fallocate(fd: c_int, mode: c_int, at: off_t, bytes: off_t) -> c_int;
    fallocate64(fd: c_int, mode: c_int, at: off_t, bytes: off_t) -> c_int;
    posix_fallocate(fd: c_int, at: off_t, bytes: off_t) -> c_int;
    posix_fallocate64(fd: c_int, at: off_t, bytes: off_t) -> c_int;
    rename(from: *const c_char, to: *const c_char) -> c_int;
    renameat(from_folder: c_int, from: *const c_char, to_folder: c_int, to: *const c_char) -> c_int;
    renameat2(from_folder: c_int, from: *const c_char, to_folder: c_int, to: *const c_char, flags: c_uint) -> c_int;
    link(from: *const c_char, to: *const c_char) -> c_int;
    linkat(from_folder: c_int, from: *const c_char, to_folder: c_int, to: *const c_char, flags: c_int) -> c_int;
    symlink(to: *const c_char, path: *const c_char) -> c_int;
    symlinkat(to: *const c_char, folder: c_int, path: *const c_char) -> c_int;
    unlink(path: *const c_char) -> c_int;
    unlinkat(folder: c_int, path: *const c_char, flags: c_int) -> c_int;
    remove(path: *const c_char) -> c_int;
    mkdir(path: *const c_char, mode: mode_t) -> c_int;
    mkdirat(folder: c_int, path: *const c_char, mode: mode_t) -> c_int;
    rmdir(path: *const c_char) -> c_int;
    fsync(fd: c_int) -> c_int;
    fdatasync(fd: c_int) -> c_int;
    syncfs(fd: c_int) -> c_int;
    msync(address: *mut c_void, bytes: size_t, flags: c_int) -> c_int;
    mmap(address: *mut c_void, bytes: size_t, protection: c_int, flags: c_int, fd: c_int, at: off_t) -> *mut c_void;
    mmap64(address: *mut c_void, bytes: size_t, protection: c_int, flags: c_int, fd: c_int, at: off_t) -> *mut c_void;
    syscall(number: c_long, a: c_long, b: c_long, c: c_long, d: c_long, e: c_long, f: c_long) -> c_long;
}
