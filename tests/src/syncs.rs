//! The synced writes of a node, as `strace -f -ttt -T` sees them.
//!
//! The times are comparable between nodes of one machine, and with the clock of the test. strace stops a process before and after each
//! call; so a call has not begun before its first time, and nothing that follows from it has happened before its second.

use std::{collections::BTreeMap, env, process::Command, time::SystemTime};

/// One sync: from when to when, in microseconds since 1970.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Sync {
    /// Before it was called.
    pub begun: u64,
    /// After it had returned.
    pub ended: u64,
}

/// Whether strace is there and may trace; if not, what to do.
pub fn can_trace() -> Result<(), &'static str> {
    match Command::new("strace").args(["-o", "/dev/null", "-e", "trace=fsync", "true"]).output() {
        Ok(output) if output.status.success() => Ok(()),
        Ok(_) => Err("strace may not trace here (a container without CAP_SYS_PTRACE?)"),
        Err(_) => {
            assert!(env::var_os("CI").is_none(), "CI must have strace: run scripts/setup.sh --test");
            Err("there is no strace here; scripts/setup.sh --test installs it (the Debian package is strace)")
        }
    }
}

/// The clock of the test, as strace shows it.
pub fn now() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_micros() as u64
}

/// All syncs that succeeded, in the order of their ends.
pub fn parse(trace: &str) -> Vec<Sync> {
    let mut begun: BTreeMap<&str, u64> = BTreeMap::new();
    let mut syncs = Vec::new();
    for line in trace.lines() {
        let mut words = line.split_whitespace();
        let (Some(thread), Some(time), Some(call)) = (words.next(), words.next(), words.next()) else {
            continue;
        };
        let Some(time) = micros(time) else { continue };
        let succeeded =
            line.split_once(')').is_some_and(|(_, result)| result.trim_start().starts_with("= 0 "));
        if line.ends_with("<unfinished ...>") {
            begun.insert(thread, time);
        } else if call == "<..." {
            if let Some(start) = begun.remove(thread).filter(|_| succeeded) {
                syncs.push(Sync { begun: start, ended: time.max(start + taken(line)) });
            }
        } else if succeeded {
            syncs.push(Sync { begun: time, ended: time + taken(line) });
        }
    }
    syncs.sort_by_key(|sync| sync.ended);
    syncs
}

/// Whether, for an answer to one lone batch between two moments, a majority of three disks was synced twice, one after the other:
/// first with the votes, then, begun only when a majority held these, with the decision.
pub fn voted_then_decided(nodes: &[Vec<Sync>], asked: u64, answered: u64) -> Result<(), String> {
    let majority = nodes.len() / 2 + 1;
    let within = |from: u64| {
        let mut ends: Vec<u64> = nodes
            .iter()
            .filter_map(|syncs| {
                syncs.iter().find(|sync| sync.begun >= from && sync.ended <= answered).map(|sync| sync.ended)
            })
            .collect();
        ends.sort_unstable();
        ends
    };
    let votes = within(asked);
    let Some(voted) = votes.get(majority - 1) else {
        return Err(format!("only {} nodes synced anything before the answer", votes.len()));
    };
    let decisions = within(*voted).len();
    if decisions < majority {
        return Err(format!(
            "only {decisions} nodes synced again between the votes (after {} us) and the answer (after {} us)",
            voted - asked,
            answered - asked
        ));
    }
    Ok(())
}

fn micros(time: &str) -> Option<u64> {
    let (seconds, rest) = time.split_once('.')?;
    Some(seconds.parse::<u64>().ok()? * 1_000_000 + rest.parse::<u64>().ok()?)
}

/// The time at the end of a line: `<0.001576>`, in microseconds.
fn taken(line: &str) -> u64 {
    let text = line.rsplit_once('<').map_or("", |(_, text)| text.trim_end_matches('>'));
    micros(text).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_trace_is_understood() {
        let trace = "\
            606   1795182663.247840 fdatasync(15)     = 0 <0.001576>\n\
            607   1795182663.300000 fsync(9 <unfinished ...>\n\
            606   1795182663.300100 fdatasync(15) = -1 EIO (Input/output error) <0.000002>\n\
            607   1795182663.300900 <... fsync resumed>) = 0 <0.000800>\n\
            608   1795182663.400000 +++ exited with 0 +++\n";
        let at = |micros: u64| 1_795_182_663_000_000 + micros;
        let expected = [
            Sync { begun: at(247_840), ended: at(249_416) },
            Sync { begun: at(300_000), ended: at(300_900) },
        ];
        assert_eq!(parse(trace), expected);
    }

    #[test]
    fn one_sync_per_node_is_not_enough_for_an_answer() {
        let sync = |begun, ended| Sync { begun, ended };
        let good = [
            vec![sync(110, 120), sync(130, 140)],
            vec![sync(112, 124), sync(132, 144)],
            vec![sync(190, 195)],
        ];
        voted_then_decided(&good, 100, 150).unwrap();
        let answered_early = voted_then_decided(&good, 100, 142);
        assert!(answered_early.unwrap_err().contains("only 1 nodes synced again"), "decided on one disk");
        let at_once = [vec![sync(110, 120), sync(121, 140)], vec![sync(112, 124)], vec![sync(122, 130)]];
        assert!(voted_then_decided(&at_once, 100, 150).is_err(), "decision before the votes");
        assert!(voted_then_decided(&[vec![], vec![], vec![]], 100, 150).is_err(), "nothing at all");
    }
}
