//! Which faults to make: a small file that may come, change and go while the node runs.
//!
//! One `key = value` in a line; `#` begins a comment. No file, or an empty one: the disk is well. Replace it by a rename, so that it
//! is never read half written. It is looked at before every write, sync and creation of a file. A key or a value that isn't known ends
//! the process.
//!
//! | key | what |
//! |---|---|
//! | `slow_sync_ms = N` | every sync takes N milliseconds longer |
//! | `fail_sync = N` | the N-th sync from now on fails with EIO, once; 1 is the next one. What it should have made durable stays lost, as on Linux |
//! | `fail_syncs = true` | every sync fails with EIO |
//! | `free_bytes = N` | the disk is full after N further bytes; 0: it is full now. Then files can't grow or be made: ENOSPC |
//!
//! A count starts anew each time that the file changes.

use std::{fs, os::unix::fs::MetadataExt, path::PathBuf, sync::Mutex};

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Settings {
    slow_sync_ms: u64,
    fail_sync: u64,
    fail_syncs: bool,
    free_bytes: Option<u64>,
}

impl Settings {
    fn parse(text: &str) -> Result<Settings, String> {
        let mut settings = Settings::default();
        for line in text.lines() {
            let line = line.split('#').next().unwrap_or_default().trim();
            if line.is_empty() {
                continue;
            }
            let (key, value) = line.split_once('=').ok_or_else(|| format!("no `=` in {line:?}"))?;
            let value = value.trim();
            let number = || value.parse().map_err(|_| format!("no number in {line:?}"));
            match key.trim() {
                "slow_sync_ms" => settings.slow_sync_ms = number()?,
                "fail_sync" => settings.fail_sync = number()?,
                "fail_syncs" => {
                    settings.fail_syncs =
                        value.parse().map_err(|_| format!("neither true nor false in {line:?}"))?
                }
                "free_bytes" => settings.free_bytes = Some(number()?),
                _ => return Err(format!("unknown key in {line:?}")),
            }
        }
        Ok(settings)
    }
}

/// Tells one state of the file from another.
type Stamp = (u64, i64, i64, u64);

/// What a sync is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct SyncFault {
    pub(crate) delay_ms: u64,
    pub(crate) fails: bool,
}

/// The faults that are asked for.
pub(crate) struct Faults {
    path: Option<PathBuf>,
    now: Mutex<(Option<Stamp>, Settings)>,
}

impl Faults {
    pub(crate) fn new(path: Option<PathBuf>) -> Faults {
        Faults { path, now: Mutex::default() }
    }

    /// Reads the file if it has changed, then looks at the settings.
    fn with<T>(&self, look: impl FnOnce(&mut Settings) -> T) -> Result<T, String> {
        let mut now = self.now.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if let Some(path) = &self.path {
            let stamp = fs::metadata(path).ok();
            let stamp = stamp.map(|data| (data.ino(), data.mtime(), data.mtime_nsec(), data.size()));
            if stamp != now.0 {
                let text = if stamp.is_some() { fs::read_to_string(path) } else { Ok(String::new()) };
                // One that has gone in between is read as empty.
                let settings = Settings::parse(&text.unwrap_or_default());
                *now = (stamp, settings.map_err(|why| format!("{}: {why}", path.display()))?);
            }
        }
        Ok(look(&mut now.1))
    }

    /// What the sync that is asked for is to do.
    pub(crate) fn sync(&self) -> Result<SyncFault, String> {
        self.with(|settings| {
            let counted = settings.fail_sync == 1;
            settings.fail_sync = settings.fail_sync.saturating_sub(1);
            SyncFault { delay_ms: settings.slow_sync_ms, fails: counted || settings.fail_syncs }
        })
    }

    /// Whether the disk may run full, so that the growth of files must be known.
    pub(crate) fn counts_bytes(&self) -> Result<bool, String> {
        self.with(|settings| settings.free_bytes.is_some())
    }

    /// Takes room for so many bytes, or for as many as there are.
    pub(crate) fn take_room(&self, bytes: u64) -> Result<u64, String> {
        self.with(|settings| match &mut settings.free_bytes {
            None => bytes,
            Some(free) => {
                let taken = bytes.min(*free);
                *free -= taken;
                taken
            }
        })
    }

    /// Whether the disk is full.
    pub(crate) fn is_full(&self) -> Result<bool, String> {
        self.with(|settings| settings.free_bytes == Some(0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn faults_follow_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("control");
        let faults = Faults::new(Some(path.clone()));
        let put = |text: &str| {
            fs::write(folder.path().join("new"), text).unwrap();
            fs::rename(folder.path().join("new"), &path).unwrap();
        };
        let well = SyncFault { delay_ms: 0, fails: false };
        assert_eq!((faults.sync(), faults.is_full()), (Ok(well), Ok(false)));
        put("# a comment\nfail_sync = 2\nslow_sync_ms = 7\n");
        let slow = SyncFault { delay_ms: 7, fails: false };
        let syncs = [faults.sync(), faults.sync(), faults.sync()];
        assert_eq!(syncs, [Ok(slow), Ok(SyncFault { fails: true, ..slow }), Ok(slow)]);
        put("fail_syncs = true\nfree_bytes = 10");
        assert!(faults.sync().unwrap().fails && faults.sync().unwrap().fails);
        assert_eq!((faults.take_room(6), faults.is_full()), (Ok(6), Ok(false)));
        assert_eq!((faults.take_room(6), faults.is_full()), (Ok(4), Ok(true)));
        fs::remove_file(&path).unwrap();
        assert_eq!((faults.sync(), faults.is_full(), faults.take_room(6)), (Ok(well), Ok(false), Ok(6)));
        put("slow_syncs = 1");
        assert!(faults.sync().unwrap_err().contains("unknown key"));
    }
}
