//! What a node needs of its disk, and nothing more: three ordered tables, and a few files.
//!
//! [`crate::OnDisk`] is the disk of this machine: RocksDB and plain files. A simulation brings a disk of its own, which can lose
//! what wasn't synced, fail, or be full.
//!
//! The state of the machines stands apart from the other tables: it has no log of its own, because the Raft log is one.
//!
//! What whoever implements it promises:
//! - A batch is written whole or not at all, whatever happens. It is one of the state alone, or one of the other tables alone.
//! - What is written can be read at once. Of `Log` and `Meta` only what a sync followed is sure to be there after a loss of power;
//!   of the batches since then an unbroken run from the first may be.
//! - Of `State` only what [`Tables::make_state_durable`] followed is sure to be there, and not only after a loss of power, but
//!   also when the process was killed; of the batches since then an unbroken run from the first may be.
//! - The two promise nothing about each other: the state may be found to go further than the log, or less far.
//! - After an error of a write or a sync nothing is promised: whoever gets one stops the node.

use std::{
    fmt, io,
    path::{Path, PathBuf},
    sync::Arc,
};

use bytes::Bytes;
use futures::future::BoxFuture;

use crate::api::HostError;

/// The tables of a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Table {
    /// The entries of all groups' logs.
    Log,
    /// Small values that are always synced: votes, identities, what counts.
    Meta,
    /// The state machines' state.
    State,
}

impl Table {
    /// All tables.
    pub const ALL: [Table; 3] = [Table::Log, Table::Meta, Table::State];

    /// Whether it is the one that is made durable by [`Tables::make_state_durable`], and not by [`Tables::sync`].
    pub fn is_state(self) -> bool {
        match self {
            Table::State => true,
            Table::Log | Table::Meta => false,
        }
    }
}

/// Where a cursor starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    /// At the first pair of the range.
    First,
    /// At the last pair of the range.
    Last,
}

/// Reads of the tables.
pub trait Reads {
    /// The value of a key.
    fn get(&self, table: Table, key: &[u8]) -> io::Result<Option<Bytes>>;

    /// Goes through the pairs from `from` (included) to `to` (excluded; None: the table's end), in the order of the keys, as
    /// they are when the cursor is made.
    fn cursor<'a>(
        &'a self,
        table: Table,
        from: &[u8],
        to: Option<&[u8]>,
        start: Start,
    ) -> Box<dyn Cursor + 'a>;
}

/// A place in a range of a table.
pub trait Cursor {
    /// The pair at the place; None: the range ends here, or reading failed ([`Cursor::status`] tells).
    fn item(&self) -> Option<(&[u8], &[u8])>;

    /// Goes one pair on.
    fn next(&mut self);

    /// Goes one pair back.
    fn prev(&mut self);

    /// Whether reading has failed.
    fn status(&self) -> io::Result<()>;
}

/// The tables of a node, open.
pub trait Tables: Reads + Send + Sync {
    /// An empty batch.
    fn batch(&self) -> Box<dyn Batch>;

    /// Makes everything durable that was written to `Log` and `Meta` before the call.
    fn sync(&self) -> io::Result<()>;

    /// Makes everything durable that was written to `State` before the call. It may take as long as writing some ten megabytes.
    fn make_state_durable(&self) -> io::Result<()>;

    /// The same, for the log writer, which can wait for a disk whose time is simulated.
    fn sync_in_time(&self) -> BoxFuture<'_, io::Result<()>> {
        Box::pin(std::future::ready(self.sync()))
    }

    /// All tables as they are now, whatever is written later. `State` may be that of a moment later than the others.
    fn view(&self) -> Box<dyn Reads + '_>;
}

/// Changes that are written together: of `State` alone, or of other tables alone. To mix them is a bug.
pub trait Batch: Send {
    /// Sets a value.
    fn put(&mut self, table: Table, key: &[u8], value: &[u8]);

    /// Removes a key, if it is there.
    fn delete(&mut self, table: Table, key: &[u8]);

    /// Removes all keys from `from` (included) to `to` (excluded).
    fn delete_range(&mut self, table: Table, from: &[u8], to: &[u8]);

    /// How much is in it, roughly.
    fn bytes(&self) -> usize;

    /// Writes all changes in one atomic step, without sync.
    fn write(self: Box<Self>) -> io::Result<()>;
}

/// How a file is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Open {
    /// It must be there.
    Existing,
    /// It is made if it isn't there.
    OrCreate,
    /// It is made, or emptied.
    Empty,
}

/// An open file.
pub trait File: fmt::Debug + Send + Sync {
    /// Its length.
    fn bytes(&self) -> io::Result<u64>;

    /// Fills `buffer` with what stands at `offset`; an error if the file ends before.
    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()>;

    /// Writes at `offset`, without sync. After a loss of power any part of it may be there.
    fn write_all_at(&self, bytes: &[u8], offset: u64) -> io::Result<()>;

    /// Makes contents and length durable.
    fn sync(&self) -> io::Result<()>;
}

/// The disk of a node.
pub trait Storage: fmt::Debug + Send + Sync + 'static {
    /// Opens the tables below `folder`, or makes them there.
    fn open_tables(&self, folder: &Path, cache_bytes: usize) -> Result<Box<dyn Tables>, HostError>;

    /// Makes a folder, and those above it. Durable on return.
    fn create_folder(&self, folder: &Path) -> io::Result<()>;

    /// The files of a folder, in the order of their names.
    fn list(&self, folder: &Path) -> io::Result<Vec<PathBuf>>;

    /// Opens a file.
    fn open(&self, path: &Path, how: Open) -> io::Result<Arc<dyn File>>;

    /// Removes a file. Whoever has it open can read it still.
    fn remove(&self, path: &Path) -> io::Result<()>;

    /// Whether calls may make a thread wait: then long ones are kept away from the threads that run tasks, and the log
    /// writer has a thread of its own. If not, all of it is done in place, in the order of the tasks.
    fn waits(&self) -> bool {
        true
    }
}
