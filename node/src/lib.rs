//! The parts of the `verdict` program.

pub mod bench;
pub mod book;
pub mod cluster_state;
pub mod config;
pub mod ctl;
pub mod demo;
pub mod dev;
pub mod drill;
pub mod embedded;
pub mod folder;
pub mod local;
pub mod memory;
pub mod node;
pub mod out;
pub mod page;
pub mod processes;
pub mod progress;
pub mod reach;
pub mod script;
pub mod serve;
pub mod settle;
pub mod tape;
pub mod totals;
pub mod usage;
