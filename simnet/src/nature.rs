//! What a program takes from its machine without being asked: randomness and the time of day.
//!
//! The keys of `HashMap`s, ids, election timeouts and the random choices of tokio's `select!` all begin with `getrandom`; all
//! clocks that aren't tokio's begin with `clock_gettime`. This program has functions of its own under these names. On the thread
//! of a simulation they answer from the seed and from simulated time, everywhere else they ask the machine. So the very code
//! of the product runs, and nothing in it knows.
//!
//! Why this replays: a simulation runs in a fresh process (so that nothing that lives as long as a process, such as tokio's
//! count of runtimes, differs) and on one fresh thread (whose `HashMap` keys are not drawn yet).
#![allow(unsafe_code)] // Symbols of the C library can be replaced in no other way.

use std::{
    cell::{Cell, RefCell},
    collections::BTreeMap,
};

use tokio::runtime::{Handle, Id};
use verdict_tests::random::Random;

/// When simulated time begins: 2026-01-01, so that ids carry a plausible time.
pub(crate) const EPOCH_SECONDS: u64 = 1_767_225_600;

thread_local! {
    static SIMULATED: Cell<bool> = const { Cell::new(false) };
    static ELAPSED_NANOS: Cell<u64> = const { Cell::new(0) };
    static RANDOM: RefCell<Random> = RefCell::new(Random::of(0));
    /// By how many seconds the wall clock of each runtime, that is of each host, is off.
    static OFF: RefCell<BTreeMap<String, i64>> = const { RefCell::new(BTreeMap::new()) };
}

/// From now on this thread lives in a simulation.
pub(crate) fn begin(seed: u64) {
    RANDOM.with_borrow_mut(|random| *random = Random::of(seed));
    SIMULATED.set(true);
}

/// Simulated time, since its beginning.
pub(crate) fn set_elapsed(elapsed: std::time::Duration) {
    ELAPSED_NANOS.set(u64::try_from(elapsed.as_nanos()).expect("a simulation lasts no centuries"));
}

/// Puts the wall clock of the host whose runtime this is off by so many seconds.
pub(crate) fn set_wall_clock(runtime: Id, off_seconds: i64) {
    OFF.with_borrow_mut(|off| off.insert(runtime.to_string(), off_seconds));
}

fn wall_clock_off() -> i64 {
    let Ok(handle) = Handle::try_current() else { return 0 };
    OFF.with_borrow(
        |off| if off.is_empty() { 0 } else { off.get(&handle.id().to_string()).copied().unwrap_or(0) },
    )
}

/// Fills a buffer with random bytes.
///
/// # Safety
/// As for the function of the C library: `buffer` has room for `bytes`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn getrandom(buffer: *mut libc::c_void, bytes: usize, flags: u32) -> isize {
    // Not accessible: the thread is ending, and no simulation needs it any more.
    if !SIMULATED.try_with(Cell::get).unwrap_or(false) {
        // SAFETY: the caller's promise is handed on.
        return unsafe { libc::syscall(libc::SYS_getrandom, buffer, bytes, flags) } as isize;
    }
    RANDOM.with_borrow_mut(|random| {
        for place in 0..bytes {
            // SAFETY: within the buffer that the caller gave.
            unsafe { buffer.cast::<u8>().add(place).write(random.number() as u8) };
        }
    });
    bytes as isize
}

/// Tells the time of a clock.
///
/// # Safety
/// As for the function of the C library: `time` points to room for a time.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn clock_gettime(clock: libc::clockid_t, time: *mut libc::timespec) -> libc::c_int {
    if !SIMULATED.try_with(Cell::get).unwrap_or(false) {
        // SAFETY: the caller's promise is handed on.
        return unsafe { libc::syscall(libc::SYS_clock_gettime, clock, time) } as libc::c_int;
    }
    let elapsed = ELAPSED_NANOS.get();
    let mut seconds = EPOCH_SECONDS + elapsed / 1_000_000_000;
    if clock == libc::CLOCK_REALTIME {
        seconds = seconds.saturating_add_signed(wall_clock_off());
    }
    let told = libc::timespec { tv_sec: seconds as _, tv_nsec: (elapsed % 1_000_000_000) as _ };
    // SAFETY: the caller gave room for it.
    unsafe { time.write(told) };
    0
}
