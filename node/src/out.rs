//! Writing for people and pipes: what nobody reads any more (`verdict demo | head`) is no reason to panic.
//!
//! [`out!`](crate::out!) and [`err!`](crate::err!) are `println!` and `eprintln!` without the panic. Any other failure of stdout
//! (a full disk) is remembered, so that the program doesn't end as if all had been written.

use std::{
    fmt::Arguments,
    io::{self, ErrorKind, Write as _},
    sync::OnceLock,
};

use tokio::sync::Notify;

static FAILURE: OnceLock<String> = OnceLock::new();
/// Told when a reader is found to be gone. It keeps that until somebody asks.
static READER_GONE: Notify = Notify::const_new();

/// Writes to stdout. Use [`out!`](crate::out!).
pub fn write_out(text: Arguments<'_>) {
    let mut stdout = io::stdout().lock();
    match stdout.write_fmt(text).and_then(|()| stdout.flush()) {
        Ok(()) => {}
        Err(error) if error.kind() == ErrorKind::BrokenPipe => READER_GONE.notify_one(),
        // The first failure is the one to tell.
        Err(error) => drop(FAILURE.set(error.to_string())),
    }
}

/// Writes to stderr. There is nobody to tell if that fails. Use [`err!`](crate::err!).
pub fn write_err(text: Arguments<'_>) {
    if let Err(error) = io::stderr().lock().write_fmt(text)
        && error.kind() == ErrorKind::BrokenPipe
    {
        READER_GONE.notify_one();
    }
}

/// Ends when something was written that nobody reads any more.
pub async fn reader_gone() {
    READER_GONE.notified().await;
}

/// Why something could not be written to stdout, other than that nobody reads it any more.
pub fn failure() -> Option<&'static str> {
    FAILURE.get().map(String::as_str)
}

/// A line on stdout.
#[macro_export]
macro_rules! out {
    () => { $crate::out::write_out(format_args!("\n")) };
    ($($argument:tt)*) => { $crate::out::write_out(format_args!("{}\n", format_args!($($argument)*))) };
}

/// A line on stderr.
#[macro_export]
macro_rules! err {
    ($($argument:tt)*) => { $crate::out::write_err(format_args!("{}\n", format_args!($($argument)*))) };
}
