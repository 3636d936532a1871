//! A loss of power: turns the watched folder into what a disk would have.
//!
//! Of the changes of names that were not synced, each folder keeps the first few, or all, or none. Of each file, what was not synced
//! survives block by block, of 512 or 4096 bytes, or as a whole, or not at all; its length is the old one, the new one, or one in
//! between, and where no block has survived there are zeros.

use std::{
    collections::BTreeSet,
    fs::{self, File, OpenOptions},
    io,
    os::unix::fs::FileExt,
    path::Path,
};

use crate::{
    names::{Names, Node},
    random::Random,
    shadow::{PIECE, write_base},
};

/// What was lost.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Loss {
    /// Files that had changes that were not synced.
    pub(crate) files: usize,
    pub(crate) blocks_kept: usize,
    pub(crate) blocks_lost: usize,
    /// Changes of names.
    pub(crate) names_lost: usize,
}

/// Takes power away from `folder`, with its `shadow`.
pub(crate) fn lose_power(folder: &Path, shadow: &Path, seed: u64) -> io::Result<Loss> {
    let mut random = Random(seed);
    let names = Names::replay(&fs::read_to_string(shadow.join("names"))?).map_err(io::Error::other)?;
    let (kept, names_lost) = names.lose(&mut random);
    let mut loss = Loss { names_lost, ..Loss::default() };
    let inodes: BTreeSet<u64> = kept
        .values()
        .filter_map(|node| match node {
            Node::File(inode) => Some(*inode),
            Node::Folder => None,
        })
        .collect();
    for inode in &inodes {
        let path = |which: &str| shadow.join(format!("inodes/{inode}.{which}"));
        forget(&path("live"), &path("durable"), &mut random, &mut loss)?;
    }
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() { fs::remove_dir_all(path)? } else { fs::remove_file(path)? }
    }
    for (path, node) in &kept {
        match node {
            Node::Folder => fs::create_dir(folder.join(path))?,
            Node::File(inode) => {
                fs::hard_link(shadow.join(format!("inodes/{inode}.live")), folder.join(path))?
            }
        }
    }
    write_base(shadow, &kept)?;
    for entry in fs::read_dir(shadow.join("inodes"))? {
        let path = entry?.path();
        let number = path.file_stem().and_then(|stem| stem.to_str()?.parse().ok());
        if number.is_none_or(|number| !inodes.contains(&number)) {
            fs::remove_file(path)?;
        }
    }
    let text = format!(
        "files={} blocks_kept={} blocks_lost={} names_lost={}\n",
        loss.files, loss.blocks_kept, loss.blocks_lost, loss.names_lost
    );
    fs::write(shadow.join("last-loss"), text)?;
    Ok(loss)
}

/// Lets one file forget, in place. Afterwards both copies are equal.
fn forget(live: &Path, durable: &Path, random: &mut Random, loss: &mut Loss) -> io::Result<()> {
    let both = |path: &Path| OpenOptions::new().read(true).write(true).open(path);
    let (live, durable) = (both(live)?, both(durable)?);
    let (now, synced) = (live.metadata()?.len(), durable.metadata()?.len());
    let block = random.pick(&[512, 4096]);
    let kept_percent = random.pick(&[0, 0, 10, 50, 90, 100]);
    let between = synced.min(now) + random.up_to(now.abs_diff(synced));
    let length = if now >= synced {
        random.pick(&[synced, now, between, between - between % block])
    } else {
        random.pick(&[synced, now])
    }
    .max(synced.min(now));
    let before = *loss;
    let (mut left, mut right) = (vec![0; PIECE], vec![0; PIECE]);
    let mut at = 0;
    while at < length {
        let bytes = PIECE.min((length - at) as usize);
        read_padded(&live, &mut left[..bytes], at)?;
        read_padded(&durable, &mut right[..bytes], at)?;
        for start in (0..bytes).step_by(block as usize) {
            let block = start..(start + block as usize).min(bytes);
            if left[block.clone()] == right[block.clone()] {
                continue;
            }
            let place = at + start as u64;
            if random.percent(kept_percent) {
                durable.write_all_at(&left[block], place)?;
                loss.blocks_kept += 1;
            } else {
                live.write_all_at(&right[block], place)?;
                loss.blocks_lost += 1;
            }
        }
        at += bytes as u64;
    }
    loss.blocks_lost += now.max(synced).saturating_sub(length).div_ceil(block) as usize;
    live.set_len(length)?;
    durable.set_len(length)?;
    if (before.blocks_kept, before.blocks_lost) != (loss.blocks_kept, loss.blocks_lost) {
        loss.files += 1;
    }
    Ok(())
}

/// Reads; what is behind the end is zero.
fn read_padded(file: &File, buffer: &mut [u8], at: u64) -> io::Result<()> {
    let mut filled = 0;
    while filled < buffer.len() {
        match file.read_at(&mut buffer[filled..], at + filled as u64)? {
            0 => break,
            read => filled += read,
        }
    }
    buffer[filled..].fill(0);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{names::Change, shadow::Shadow};

    /// A folder in which `synced` was made durable, and `now` written over it.
    fn folder(synced: &[u8], now: &[u8], seed: u64) -> Vec<u8> {
        let root = tempfile::tempdir().unwrap();
        let (folder, shadow) = (root.path().join("data"), root.path().join("shadow"));
        fs::create_dir(&folder).unwrap();
        fs::write(folder.join("file"), synced).unwrap();
        drop(Shadow::open(&shadow, &folder, 1).unwrap());
        fs::write(folder.join("file"), now).unwrap();
        lose_power(&folder, &shadow, seed).unwrap();
        let found = fs::read(folder.join("file")).unwrap();
        // Power may go again before anything else happens.
        assert_eq!(lose_power(&folder, &shadow, seed + 1).unwrap(), Loss::default());
        assert_eq!(fs::read(folder.join("file")).unwrap(), found);
        found
    }

    #[test]
    fn each_block_is_the_old_or_the_new_one_and_what_was_synced_stays() {
        let (synced, mut now) = (vec![1; 10_000], vec![2; 30_000]);
        now[..8192].fill(1);
        let (mut lengths, mut torn) = (BTreeSet::new(), false);
        for seed in 0..100 {
            let found = folder(&synced, &now, seed);
            lengths.insert(found.len());
            assert!(found.len() >= 10_000 && found[..8192].iter().all(|byte| *byte == 1));
            assert!(found[8192..10_000].iter().all(|byte| [1, 2].contains(byte)));
            assert!(found[10_000..].iter().all(|byte| [0, 2].contains(byte)));
            torn |= found.contains(&0) && found[10_000..].contains(&2);
        }
        assert!(lengths.contains(&10_000) && lengths.contains(&30_000) && lengths.len() > 10, "{lengths:?}");
        assert!(torn, "no hole was ever made");
    }

    #[test]
    fn names_that_were_not_synced_go_and_come_back() {
        let root = tempfile::tempdir().unwrap();
        let (folder, path) = (root.path().join("data"), root.path().join("shadow"));
        fs::create_dir(&folder).unwrap();
        fs::write(folder.join("gone"), "old").unwrap();
        let shadow = Shadow::open(&path, &folder, 1).unwrap();
        fs::remove_file(folder.join("gone")).unwrap();
        shadow.journal().note(Change::Remove("gone".to_owned())).unwrap();
        let seed = (0..)
            .find(|seed| {
                let journal = fs::read_to_string(path.join("names")).unwrap();
                Names::replay(&journal).unwrap().lose(&mut Random(*seed)).1 == 1
            })
            .unwrap();
        drop(shadow);
        lose_power(&folder, &path, seed).unwrap();
        assert_eq!(fs::read_to_string(folder.join("gone")).unwrap(), "old");
    }
}
