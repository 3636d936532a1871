//! The parts of the `verdict` program.

pub mod book;
pub mod config;
pub mod ctl;
pub mod demo;
pub mod dev;
pub mod embedded;
pub mod local;
pub mod node;
pub mod progress;
pub mod serve;
pub mod settle;
pub mod tape;
pub mod totals;
