//! What happened, for people and for machines: a line for each event, and one hash over all of them and over every byte that
//! travelled.

use std::{cell::RefCell, fmt::Display, time::Duration};

thread_local! {
    static TRACE: RefCell<Trace> = RefCell::new(Trace::default());
}

#[derive(Default)]
struct Trace {
    hasher: blake3::Hasher,
    elapsed: Duration,
    print: bool,
    messages: u64,
}

/// Prints each line from now on.
pub(crate) fn print() {
    TRACE.with_borrow_mut(|trace| trace.print = true);
}

/// Simulated time goes on.
pub(crate) fn set_elapsed(elapsed: Duration) {
    TRACE.with_borrow_mut(|trace| trace.elapsed = elapsed);
}

/// Notes an event.
pub(crate) fn note(event: impl Display) {
    TRACE.with_borrow_mut(|trace| {
        let line = format!("{:>9.3} {event}", trace.elapsed.as_secs_f64());
        trace.hasher.update(line.as_bytes());
        if trace.print {
            println!("{line}");
        }
    });
}

/// Notes what was written into a connection.
pub(crate) fn sent(from: &str, to: &str, bytes: &[u8]) {
    TRACE.with_borrow_mut(|trace| {
        trace.messages += 1;
        trace.hasher.update(&trace.elapsed.as_nanos().to_be_bytes());
        trace.hasher.update(from.as_bytes()).update(to.as_bytes()).update(bytes);
    });
}

/// The hash of everything so far, and how many writes to the network are in it.
pub(crate) fn hash() -> (String, u64) {
    TRACE.with_borrow(|trace| (trace.hasher.finalize().to_hex()[..16].to_owned(), trace.messages))
}
