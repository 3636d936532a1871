//! Whether the disk can take a bench, and whether it is one.

use std::path::Path;

use anyhow::{Context as _, ensure};
use rustix::fs::{statfs, statvfs};

/// What Linux calls a file system in memory (`TMPFS_MAGIC` of `linux/magic.h`).
const IN_MEMORY: i128 = 0x0102_1994;
/// A bench without accounts may need so much: logs, snapshots and the rows of all trades, on three nodes.
const BYTES_ALWAYS: u64 = 3 << 30;
/// An account may need so much more, on three nodes.
const BYTES_PER_ACCOUNT: u64 = 1 << 10;

/// Checks that a folder's disk has room for so many accounts. Returns a warning, if there is one to give.
pub fn check(folder: &Path, accounts: u64) -> anyhow::Result<Option<String>> {
    let look = || format!("look at the disk of {}", folder.display());
    let (found, kind) = (statvfs(folder).with_context(look)?, statfs(folder).with_context(look)?.f_type);
    enough(found.f_bavail.saturating_mul(found.f_frsize), accounts)
        .with_context(|| format!("{} is too small", folder.display()))?;
    let warning = || {
        format!(
            "{} is in memory, where syncing costs nothing: the figures are not those of a disk; choose one with --data",
            folder.display()
        )
    };
    Ok((i128::from(kind) == IN_MEMORY).then(warning))
}

fn enough(free: u64, accounts: u64) -> anyhow::Result<()> {
    let needed = BYTES_ALWAYS.saturating_add(accounts.saturating_mul(BYTES_PER_ACCOUNT));
    let gib = |bytes: u64| bytes as f64 / (1_u64 << 30) as f64;
    ensure!(
        free >= needed,
        "{:.1} GiB are free, and {:.1} GiB may be needed: choose another disk with --data, or fewer --accounts",
        gib(free),
        gib(needed)
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_that_is_too_small_is_told_with_what_is_needed() {
        enough(4 << 30, 1_000_000).unwrap();
        let told = enough(4 << 30, 10_000_000).unwrap_err().to_string();
        assert!(told.contains("4.0 GiB are free") && told.contains("12.5 GiB may be needed"), "{told}");
        assert!(enough(0, u64::MAX).is_err());
    }

    #[test]
    fn what_isnt_there_is_told_by_its_name() {
        let folder = tempfile::tempdir().unwrap();
        let told = check(&folder.path().join("nowhere"), 1).unwrap_err().to_string();
        assert!(told.contains("nowhere"), "{told}");
    }
}
