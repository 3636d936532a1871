//! Which names a disk would have: changes of a folder become durable, in their order, when the folder is synced.
//!
//! Paths are relative to the watched folder, `/` between their parts; the folder itself is the empty path. The journal has one change
//! in a line, its parts separated by tabs:
//!
//! | line | what |
//! |---|---|
//! | `+ PATH INODE` | the name now means this file; `d` instead of a number: a folder |
//! | `- PATH` | the name is gone |
//! | `> FROM TO` | renamed, within one folder |
//! | `= PATH` | the folder was synced |

use std::collections::BTreeMap;

use crate::random::Random;

/// What a name means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Node {
    /// A file, by the number of its inode.
    File(u64),
    Folder,
}

/// One change, or a sync.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Change {
    Set(String, Node),
    Remove(String),
    Rename(String, String),
    Sync(String),
}

impl Change {
    pub(crate) fn line(&self) -> String {
        match self {
            Change::Set(path, Node::File(inode)) => format!("+\t{path}\t{inode}\n"),
            Change::Set(path, Node::Folder) => format!("+\t{path}\td\n"),
            Change::Remove(path) => format!("-\t{path}\n"),
            Change::Rename(from, to) => format!(">\t{from}\t{to}\n"),
            Change::Sync(path) => format!("=\t{path}\n"),
        }
    }

    fn parse(line: &str) -> Option<Change> {
        let parts: Vec<&str> = line.split('\t').collect();
        match parts[..] {
            ["+", path, "d"] => Some(Change::Set(path.to_owned(), Node::Folder)),
            ["+", path, inode] => Some(Change::Set(path.to_owned(), Node::File(inode.parse().ok()?))),
            ["-", path] => Some(Change::Remove(path.to_owned())),
            [">", from, to] => Some(Change::Rename(from.to_owned(), to.to_owned())),
            ["=", path] => Some(Change::Sync(path.to_owned())),
            _ => None,
        }
    }
}

/// The folder that a path is in.
pub(crate) fn parent(path: &str) -> &str {
    path.rsplit_once('/').map_or("", |(parent, _)| parent)
}

/// Names as the process sees them, as the disk has them, and what lies between.
#[derive(Clone, Debug, Default)]
pub(crate) struct Names {
    pub(crate) live: BTreeMap<String, Node>,
    pub(crate) durable: BTreeMap<String, Node>,
    /// By folder, in order.
    pending: BTreeMap<String, Vec<Change>>,
}

impl Names {
    /// Reads a journal.
    pub(crate) fn replay(journal: &str) -> Result<Names, String> {
        let mut names = Names::default();
        // The process may have been killed within the last line.
        let whole = journal.rfind('\n').map_or("", |end| &journal[..end]);
        for line in whole.lines() {
            names.apply(Change::parse(line).ok_or_else(|| format!("a bad line in the journal: {line:?}"))?);
        }
        Ok(names)
    }

    pub(crate) fn apply(&mut self, change: Change) {
        let folder = match &change {
            Change::Sync(path) => {
                for change in self.pending.remove(path).unwrap_or_default() {
                    carry_out(&mut self.durable, &change);
                }
                return;
            }
            Change::Set(path, _) | Change::Remove(path) | Change::Rename(_, path) => parent(path).to_owned(),
        };
        carry_out(&mut self.live, &change);
        self.pending.entry(folder).or_default().push(change);
    }

    /// Takes power away: of what waits in each folder, the first few changes survive, or all, or none. Gives the names that the disk
    /// has then, and how many changes were lost.
    pub(crate) fn lose(mut self, random: &mut Random) -> (BTreeMap<String, Node>, usize) {
        let mut lost = 0;
        for changes in self.pending.values() {
            let waiting = changes.len() as u64;
            let choices = [0, waiting, random.up_to(waiting)];
            let kept = random.pick(&choices) as usize;
            lost += changes.len() - kept;
            changes[..kept].iter().for_each(|change| carry_out(&mut self.durable, change));
        }
        // What is in a folder that isn't there can't be reached.
        let folders = self.durable.clone();
        let is_folder = |path: &str| path.is_empty() || folders.get(path) == Some(&Node::Folder);
        let reachable = |path: &String| {
            let mut above = parent(path);
            while is_folder(above) && !above.is_empty() {
                above = parent(above);
            }
            above.is_empty() && is_folder(parent(path))
        };
        self.durable.retain(|path, _| reachable(path));
        (self.durable, lost)
    }
}

fn carry_out(names: &mut BTreeMap<String, Node>, change: &Change) {
    match change {
        Change::Set(path, node) => drop(names.insert(path.clone(), *node)),
        Change::Remove(path) => drop(names.remove(path)),
        Change::Rename(from, to) => {
            if let Some(node) = names.remove(from) {
                names.insert(to.clone(), node);
            }
        }
        Change::Sync(_) => unreachable!("a sync is no change"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lose(names: &Names) -> Vec<Vec<String>> {
        let mut seen = Vec::new();
        for seed in 0..200 {
            let kept: Vec<String> = names.clone().lose(&mut Random(seed)).0.into_keys().collect();
            if !seen.contains(&kept) {
                seen.push(kept);
            }
        }
        seen.sort();
        seen
    }

    #[test]
    fn what_waits_survives_in_its_order_and_what_was_synced_always() {
        let mut names = Names::default();
        let set = |names: &mut Names, path: &str, inode| {
            names.apply(Change::Set(path.to_owned(), Node::File(inode)))
        };
        set(&mut names, "old", 1);
        names.apply(Change::Sync(String::new()));
        set(&mut names, "new", 2);
        names.apply(Change::Rename("new".to_owned(), "old".to_owned()));
        let text = |list: &[&str]| list.iter().map(|&name| name.to_owned()).collect::<Vec<_>>();
        assert_eq!(lose(&names), [text(&["new", "old"]), text(&["old"])]);
        let inodes: std::collections::BTreeSet<String> =
            (0..50).map(|seed| format!("{:?}", names.clone().lose(&mut Random(seed)).0["old"])).collect();
        assert_eq!(inodes.len(), 2, "the rename survived always or never: {inodes:?}");
    }

    #[test]
    fn a_file_in_a_folder_whose_name_was_not_synced_may_go_with_it() {
        let journal = "+\tfolder\td\n+\tfolder/file\t5\n=\tfolder\n+\tfolder/oth";
        let names = Names::replay(journal).unwrap();
        let both = vec!["folder".to_owned(), "folder/file".to_owned()];
        assert_eq!(lose(&names), [vec![], both]);
    }

    #[test]
    fn the_journal_says_what_was_done() {
        let changes = [
            Change::Set("a b".to_owned(), Node::Folder),
            Change::Set("a b/c".to_owned(), Node::File(77)),
            Change::Rename("a b/c".to_owned(), "a b/d".to_owned()),
            Change::Remove("a b/d".to_owned()),
            Change::Sync("a b".to_owned()),
            Change::Sync(String::new()),
        ];
        for change in changes {
            assert_eq!(Change::parse(change.line().trim_end_matches('\n')), Some(change));
        }
        assert!(Names::replay("?\tx\n").is_err());
    }
}
