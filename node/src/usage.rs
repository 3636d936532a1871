//! What processes of this machine have used, as Linux tells it under `/proc`.

use std::{fs, io, time::Duration};

use anyhow::Context as _;

/// `/proc` counts processor time in hundredths of a second (USER_HZ), on every machine that this program runs on.
const TICK: Duration = Duration::from_millis(10);

/// What a process has used since it began.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Processor time, of all threads, in the process and in the system on its behalf.
    pub processor: Duration,
    /// Bytes that it caused to be written to disks.
    pub bytes_written: u64,
    /// Calls of `write` and the like, on files and connections.
    pub write_calls: u64,
    /// The memory that it holds now.
    pub resident_bytes: u64,
}

impl Usage {
    /// Of a process of this machine that one may look at.
    pub fn of(process: u32) -> anyhow::Result<Usage> {
        let read =
            |file: &str| -> io::Result<String> { fs::read_to_string(format!("/proc/{process}/{file}")) };
        let usage = || -> anyhow::Result<Usage> {
            let io = read("io")?;
            let field = |name| field(&io, name).with_context(|| format!("there is no {name}"));
            Ok(Usage {
                processor: processor(&read("stat")?).context("read its processor time")?,
                bytes_written: field("write_bytes")?,
                write_calls: field("syscw")?,
                resident_bytes: resident(&read("status")?).context("there is no VmRSS")?,
            })
        };
        usage().with_context(|| format!("look at process {process}"))
    }

    /// What was used since then. The memory is that of now.
    pub fn since(&self, before: &Usage) -> Usage {
        Usage {
            processor: self.processor.saturating_sub(before.processor),
            bytes_written: self.bytes_written.saturating_sub(before.bytes_written),
            write_calls: self.write_calls.saturating_sub(before.write_calls),
            resident_bytes: self.resident_bytes,
        }
    }
}

/// The processor time in `/proc/PID/stat`. The name of the process comes second, in parentheses, and may hold anything.
fn processor(stat: &str) -> Option<Duration> {
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace();
    // Fields 14 and 15; the first here is the third.
    let user: u32 = fields.nth(11)?.parse().ok()?;
    let system: u32 = fields.next()?.parse().ok()?;
    Some(TICK * user.checked_add(system)?)
}

/// The memory in `/proc/PID/status`, in bytes.
fn resident(status: &str) -> Option<u64> {
    Some(field(status, "VmRSS")? * 1024)
}

/// A number after a name and a colon.
fn field(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    line.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processor_time_is_found_whatever_the_process_is_called() {
        let rest = "S 1 2 3 4 -1 4194560 100 0 0 0 1234 66 7 8 20 0 9 0 100 1000 200";
        for name in ["verdict", "a b", "x) S 1 (y"] {
            let stat = format!("77 ({name}) {rest}");
            assert_eq!(processor(&stat), Some(Duration::from_millis(13_000)), "{name}");
        }
        assert_eq!(processor("77 (verdict) S 1 2"), None);
        assert_eq!(processor(""), None);
    }

    #[test]
    fn fields_are_found_by_their_whole_name() {
        let io = "rchar: 5\nwchar: 6\nsyscr: 7\nsyscw: 8\nread_bytes: 9\nwrite_bytes: 10\ncancelled_write_bytes: 11\n";
        assert_eq!((field(io, "write_bytes"), field(io, "syscw")), (Some(10), Some(8)));
        assert_eq!((field(io, "write"), field(io, "nothing")), (None, None));
        assert_eq!(resident("VmPeak:\t 90 kB\nVmRSS:\t  12 kB\n"), Some(12 * 1024));
    }

    #[test]
    fn this_process_uses_memory_and_time() {
        let before = Usage::of(std::process::id()).unwrap();
        assert!(before.resident_bytes > 100_000);
        let mut sum = 0_u64;
        while Usage::of(std::process::id()).unwrap().since(&before).processor < Duration::from_millis(20) {
            sum = (0..100_000).fold(sum, |sum, number| sum.wrapping_mul(31).wrapping_add(number));
        }
        assert!(std::hint::black_box(sum) != 1);
        assert!(Usage::of(u32::MAX).is_err());
    }
}
