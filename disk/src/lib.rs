//! A disk layer for tests and drills, loaded under a node by `LD_PRELOAD`: a disk that forgets what was not synced, and that fails
//! on demand.
//!
//! It stands in for those functions of the C library that change files, passes every call on, and watches what is done to the files
//! below one folder. It is set by the environment:
//!
//! | variable | what |
//! |---|---|
//! | `VERDICT_DISK_FOLDER` | the folder that is watched; without it, nothing is done at all |
//! | `VERDICT_DISK_CONTROL` | a file that says which faults to make (`control`); it may come, change and go at any time |
//! | `VERDICT_DISK_SHADOW` | a folder beside it, on the same file system, where the layer keeps what a disk would have (`shadow`) |
//! | `VERDICT_DISK_LOSE_POWER` | a seed: before anything else, the folder is turned into what the disk would have after a loss of power (`loss`) |
//!
//! `kill -9` keeps what the kernel holds in memory, so it never shows a sync that is missing. Here the loss of power is the next
//! start: kill the process, start it with `VERDICT_DISK_LOSE_POWER`, and it meets a disk that has forgotten.
//!
//! Invariants:
//! - What was synced is never taken away, and what was not may be: each block by itself, each change of a folder in its order.
//! - What can't be followed ends the process with a message (`fail`): nothing is taken for durable by mistake.

mod control;
mod hooks;
mod layer;
mod loss;
mod names;
mod random;
mod real;
mod shadow;

use std::path::Path;

/// Ends the process: the layer has met something that it can't follow. Where a shadow is kept, the reason is left there.
fn fail(shadow: Option<&Path>, why: &str) -> ! {
    eprintln!("verdict-disk: {why}");
    if let Some(shadow) = shadow {
        // The process ends in any case.
        let _ = std::fs::write(shadow.join("failed"), why);
    }
    std::process::abort()
}
