//! The types with which openraft is used here, under short names.

use std::{any::Any, fmt, sync::Mutex};

use bytes::Bytes;
use openraft::alias;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de, ser};

openraft::declare_raft_types!(
    /// The types of all groups, whatever their machine: commands are bytes, replies are opaque.
    ///
    /// Leader ids are those of the Raft paper: one leader for each term. openraft's default lets a candidate with a greater
    /// node id depose the leader of the same term, which makes a new group change its leader again and again.
    pub(crate) Types:
        D = Command,
        R = Reply,
        NodeId = u64,
        Node = openraft::BasicNode,
        LeaderId = openraft::impls::leader_id_std::LeaderId<u64, u64>,
);

pub(crate) type LogId = alias::LogIdOf<Types>;
pub(crate) type Entry = alias::EntryOf<Types>;
pub(crate) type Vote = alias::VoteOf<Types>;
pub(crate) type StoredMembership = alias::StoredMembershipOf<Types>;
pub(crate) type SnapshotMeta = alias::SnapshotMetaOf<Types>;

/// A command of some machine, as bytes.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Command(pub(crate) Bytes);

impl fmt::Debug for Command {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes", self.0.len())
    }
}

impl fmt::Display for Command {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

/// What applying answered, for whoever proposed on this node. It never leaves the process: openraft asks for the traits of
/// serde, and they only say that.
pub(crate) struct Reply(Mutex<Option<Box<dyn Any + Send>>>);

impl Reply {
    pub(crate) fn none() -> Reply {
        Reply(Mutex::new(None))
    }

    pub(crate) fn some<R: Send + 'static>(reply: R) -> Reply {
        Reply(Mutex::new(Some(Box::new(reply))))
    }

    /// The reply, if there is one of this type.
    pub(crate) fn take<R: 'static>(self) -> Option<R> {
        let reply = self.0.into_inner().ok()??;
        reply.downcast::<R>().ok().map(|reply| *reply)
    }
}

impl fmt::Debug for Reply {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("reply")
    }
}

impl Serialize for Reply {
    fn serialize<S: Serializer>(&self, _: S) -> Result<S::Ok, S::Error> {
        Err(ser::Error::custom("replies are not serialized"))
    }
}

impl<'de> Deserialize<'de> for Reply {
    fn deserialize<D: Deserializer<'de>>(_: D) -> Result<Reply, D::Error> {
        Err(de::Error::custom("replies are not serialized"))
    }
}

/// The first eight bytes of the BLAKE3 hash over all parts: tells damage, not malice.
pub(crate) fn checksum(parts: &[&[u8]]) -> [u8; 8] {
    let mut hasher = blake3::Hasher::new();
    for part in parts {
        hasher.update(part);
    }
    let mut sum = [0; 8];
    sum.copy_from_slice(&hasher.finalize().as_bytes()[..8]);
    sum
}
