//! The parts of the `verdict` program.

pub mod book;
pub mod tape;
