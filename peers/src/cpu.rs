//! How much processor time the servers and this program take, and how much others take meanwhile.

use std::{collections::BTreeMap, fs};

use anyhow::Context as _;

/// What the kernel calls a tick: Linux shows processor time to programs in hundredths of a second, on all machines.
const TICKS_PER_SECOND: f64 = 100.0;

/// Processor time up to now, in seconds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Cpu {
    /// Of this program and all that descends from it.
    pub ours: f64,
    /// Of the whole machine.
    pub machine: f64,
}

impl Cpu {
    /// Up to now.
    pub fn now() -> anyhow::Result<Cpu> {
        let mut processes = BTreeMap::new();
        for entry in fs::read_dir("/proc").context("list /proc")? {
            let name = entry.context("list /proc")?.file_name();
            let Some(id) = name.to_str().and_then(|name| name.parse::<u32>().ok()) else { continue };
            // A process may end while it is looked at.
            let Ok(text) = fs::read_to_string(format!("/proc/{id}/stat")) else { continue };
            if let Some(process) = parse_process(&text) {
                processes.insert(id, process);
            }
        }
        let ours = ticks_of_family(std::process::id(), &processes);
        let stat = fs::read_to_string("/proc/stat").context("read /proc/stat")?;
        let machine = parse_machine(&stat).context("understand /proc/stat")?;
        Ok(Cpu { ours: ours as f64 / TICKS_PER_SECOND, machine: machine as f64 / TICKS_PER_SECOND })
    }

    /// What was used since an earlier time.
    pub fn since(&self, earlier: &Cpu) -> Cpu {
        Cpu { ours: self.ours - earlier.ours, machine: self.machine - earlier.machine }
    }

    /// What others used.
    pub fn others(&self) -> f64 {
        (self.machine - self.ours).max(0.0)
    }
}

/// One process: its parent, and the ticks it and those of its children that have ended used.
type Process = (u32, u64);

fn parse_process(stat: &str) -> Option<Process> {
    // The name, in brackets, may hold anything.
    let (_, rest) = stat.rsplit_once(')')?;
    let fields: Vec<&str> = rest.split_whitespace().collect();
    let parent = fields.get(1)?.parse().ok()?;
    let ticks = fields.get(11..15)?.iter().map(|field| field.parse::<i64>().unwrap_or(0).max(0) as u64);
    Some((parent, ticks.sum()))
}

fn ticks_of_family(ancestor: u32, processes: &BTreeMap<u32, Process>) -> u64 {
    let descends = |mut id: u32| {
        // No chain of parents is longer than the list.
        for _ in 0..=processes.len() {
            if id == ancestor {
                return true;
            }
            match processes.get(&id) {
                Some((parent, _)) => id = *parent,
                None => return false,
            }
        }
        false
    };
    processes.iter().filter(|(id, _)| descends(**id)).map(|(_, (_, ticks))| ticks).sum()
}

/// Busy ticks: user, nice, system, interrupts.
fn parse_machine(stat: &str) -> Option<u64> {
    let line = stat.lines().next()?.strip_prefix("cpu ")?;
    let fields: Vec<u64> = line.split_whitespace().map_while(|field| field.parse().ok()).collect();
    Some([0, 1, 2, 5, 6].iter().map(|at| fields.get(*at).copied().unwrap_or(0)).sum())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_read_even_with_a_strange_name() {
        let stat = "12 (a) b (c)) S 7 12 12 0 -1 4194304 1 2 3 4 100 20 3 4 20 0 1 0 55 9 9";
        assert_eq!(parse_process(stat), Some((7, 127)));
        assert_eq!(parse_process("nonsense"), None);
    }

    #[test]
    fn a_family_is_all_that_descends() {
        let processes =
            BTreeMap::from([(1, (0, 1)), (5, (1, 10)), (6, (5, 100)), (7, (6, 1000)), (8, (1, 7))]);
        assert_eq!(ticks_of_family(5, &processes), 1110);
        assert_eq!(ticks_of_family(8, &processes), 7);
    }

    #[test]
    fn the_machine_is_busy_but_not_while_it_waits() {
        assert_eq!(parse_machine("cpu  1 2 4 1000 1000 8 16 5000 0 0\ncpu0 1"), Some(31));
        assert_eq!(parse_machine("intr 5"), None);
    }
}
