//! The parts of the `verdict` program.

pub mod book;
pub mod ctl;
pub mod demo;
pub mod progress;
pub mod settle;
pub mod tape;
pub mod totals;
