//! Remembers, outside of the database, how far the logs went when somebody was last told so.
//!
//! A database whose write-ahead log was cut opens without complaint, shorter. This file tells: it is written after each sync,
//! without a sync of its own, so after a loss of power it may lag, but it never leads. Before a log becomes shorter on
//! purpose the lower mark is written and synced.

use std::{collections::BTreeMap, io, path::Path, sync::Arc};

use serde::{Deserialize, Serialize};

use crate::{
    storage::{File, Open, Storage},
    types::checksum,
};

const SLOT_BYTES: usize = 4096;
const HEADER_BYTES: usize = 12;

/// What was acknowledged of one group.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Mark {
    /// The index of the last entry; 0 may also mean none.
    pub(crate) last_index: u64,
    /// The term of the vote.
    pub(crate) vote_term: u64,
}

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct Contents {
    counter: u64,
    groups: BTreeMap<u32, Mark>,
}

/// The file.
pub(crate) struct Acknowledged {
    file: Arc<dyn File>,
    contents: Contents,
}

impl Acknowledged {
    pub(crate) fn open(storage: &dyn Storage, directory: &Path) -> io::Result<Acknowledged> {
        let file = storage.open(&directory.join("acknowledged"), Open::OrCreate)?;
        let slots = [0, 1].map(|slot| read(&*file, slot));
        let newest = slots.into_iter().flatten().max_by_key(|contents| contents.counter);
        Ok(Acknowledged { file, contents: newest.unwrap_or_default() })
    }

    /// What was acknowledged of each group.
    pub(crate) fn marks(&self) -> BTreeMap<u32, Mark> {
        self.contents.groups.clone()
    }

    /// Writes new marks, if they differ. With `lower`, only those that get lower, and synced.
    pub(crate) fn update(&mut self, marks: &[(u32, Mark)], lower: bool) -> io::Result<()> {
        let mut changed = false;
        for (group, mark) in marks {
            let before = self.contents.groups.entry(*group).or_default();
            if *before != *mark && (!lower || mark.last_index < before.last_index) {
                let vote_term = if lower { before.vote_term } else { mark.vote_term };
                *before = Mark { last_index: mark.last_index, vote_term };
                changed = true;
            }
        }
        if !changed {
            return Ok(());
        }
        self.contents.counter += 1;
        self.write()?;
        if lower { self.file.sync() } else { Ok(()) }
    }

    fn write(&self) -> io::Result<()> {
        let encoded = postcard::to_stdvec(&self.contents).expect("encoding into memory can't fail");
        if HEADER_BYTES + encoded.len() > SLOT_BYTES {
            return Err(io::Error::other("too many groups on one node"));
        }
        let mut slot = Vec::with_capacity(HEADER_BYTES + encoded.len());
        slot.extend_from_slice(&checksum(&[&encoded]));
        slot.extend_from_slice(&(encoded.len() as u32).to_be_bytes());
        slot.extend_from_slice(&encoded);
        self.file.write_all_at(&slot, (self.contents.counter % 2) * SLOT_BYTES as u64)
    }
}

fn read(file: &dyn File, slot: u64) -> Option<Contents> {
    let mut header = [0; HEADER_BYTES];
    file.read_exact_at(&mut header, slot * SLOT_BYTES as u64).ok()?;
    let length = u32::from_be_bytes(header[8..].try_into().ok()?) as usize;
    if length > SLOT_BYTES - HEADER_BYTES {
        return None;
    }
    let mut encoded = vec![0; length];
    file.read_exact_at(&mut encoded, slot * SLOT_BYTES as u64 + HEADER_BYTES as u64).ok()?;
    (checksum(&[&encoded]) == header[..8]).then(|| postcard::from_bytes(&encoded).ok())?
}
