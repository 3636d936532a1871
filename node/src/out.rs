//! Writing for people and pipes: what nobody reads any more (`verdict demo | head`) is no reason to panic.
//!
//! [`out!`](crate::out!) and [`err!`](crate::err!) are `println!` and `eprintln!` without the panic. Any other failure of stdout
//! (a full disk) is remembered, so that the program doesn't end as if all had been written.

use std::{
    fmt::Arguments,
    io::{self, ErrorKind, Write as _},
    sync::OnceLock,
};

static FAILURE: OnceLock<String> = OnceLock::new();

/// Writes to stdout. Use [`out!`](crate::out!).
pub fn write_out(text: Arguments<'_>) {
    let mut stdout = io::stdout().lock();
    if let Err(error) = stdout.write_fmt(text).and_then(|()| stdout.flush())
        && error.kind() != ErrorKind::BrokenPipe
    {
        // The first failure is the one to tell.
        let _ = FAILURE.set(error.to_string());
    }
}

/// Writes to stderr. There is nobody to tell if that fails. Use [`err!`](crate::err!).
pub fn write_err(text: Arguments<'_>) {
    let _ = io::stderr().lock().write_fmt(text);
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
