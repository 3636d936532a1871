//! How much memory this process may use, and what part of it rows may take where nobody says so.

use std::{fs, path::Path};

/// What is assumed where Linux doesn't tell.
const UNKNOWN: u64 = 4 << 30;
/// Rows may take one part of so many.
const ROWS: u64 = 4;
/// And at least so much, in MiB.
const ROWS_MIB_MIN: usize = 64;

/// The rows of each of some nodes that share this machine may take so much, in MiB.
pub fn row_cache_mib(nodes: u64) -> usize {
    share(available(), nodes)
}

fn share(available: u64, nodes: u64) -> usize {
    let mib = (available >> 20) / ROWS / nodes.max(1);
    usize::try_from(mib).unwrap_or(usize::MAX).max(ROWS_MIB_MIN)
}

/// The memory of the machine, or the limit of the container if that is lower, in bytes.
fn available() -> u64 {
    let own = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let own = own.lines().find_map(|line| line.strip_prefix("0::/")).unwrap_or_default();
    let limits = [
        format!("/sys/fs/cgroup/{own}/memory.max"),
        "/sys/fs/cgroup/memory.max".to_owned(),
        "/sys/fs/cgroup/memory/memory.limit_in_bytes".to_owned(),
    ];
    let limits = limits.iter().filter_map(|file| number(Path::new(file)));
    limits.chain(machine()).min().unwrap_or(UNKNOWN)
}

/// A file that holds one number. A limit that isn't set is a word.
fn number(file: &Path) -> Option<u64> {
    fs::read_to_string(file).ok()?.trim().parse().ok()
}

fn machine() -> Option<u64> {
    total(&fs::read_to_string("/proc/meminfo").ok()?)
}

/// All memory, as `/proc/meminfo` tells it.
fn total(meminfo: &str) -> Option<u64> {
    let rest = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    let kib: u64 = rest.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib << 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nodes_share_a_quarter_of_the_memory() {
        assert_eq!(total("MemTotal:       16384 kB\nMemFree: 1 kB\n"), Some(16 << 20));
        assert_eq!(total("nothing"), None);
        assert_eq!(share(24 << 30, 3), 2048);
        assert_eq!(share(1 << 30, 1), 256);
        assert_eq!(share(1 << 20, 3), ROWS_MIB_MIN);
        assert!(row_cache_mib(1) >= ROWS_MIB_MIN);
    }
}
