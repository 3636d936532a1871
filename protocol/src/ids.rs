//! The newtypes that keep numbers of different meaning apart.

use std::fmt;

use serde::{Deserialize, Serialize};

macro_rules! number_type {
    ($(#[$doc:meta])* $name:ident, $inner:ty) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        pub struct $name(pub $inner);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}", self.0)
            }
        }
    };
}

number_type!(
    /// A process with a disk of its own. Never used again after its disk is lost.
    NodeId,
    u64
);
number_type!(
    /// A Raft group: 0 is the coordinator group, N is shard N.
    GroupId,
    u32
);
number_type!(
    /// A shard, from 1. Its Raft group has the same number.
    ShardId,
    u32
);
number_type!(
    /// One uninterrupted leadership of the coordinator group: the log index of the entry with which it opened.
    Epoch,
    u64
);
number_type!(
    /// The position of a batch in the order of all batches; 0 is before all of them. Not a time.
    Stamp,
    u64
);
number_type!(
    /// Milliseconds since 1970 as somebody's clock had them. Stamped into entries by who proposes them; no promise
    /// depends on it.
    Millis,
    u64
);

impl GroupId {
    /// The coordinator group.
    pub const COORDINATOR: GroupId = GroupId(0);
}

impl ShardId {
    /// The Raft group that is this shard.
    pub fn group(self) -> GroupId {
        GroupId(self.0)
    }
}

/// The number of a prepare: unique, and the order in which every shard gets them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Number {
    /// The leadership that gave it.
    pub epoch: Epoch,
    /// Its place within the epoch, from 1.
    pub sequence: u64,
}

impl fmt::Display for Number {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.epoch, self.sequence)
    }
}

/// The id of a batch: the 16 bytes of a UUIDv7. Its first 48 bits are the time of its making.
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct BatchId(pub [u8; 16]);

impl BatchId {
    /// The time that the id carries.
    pub fn time(&self) -> Millis {
        let mut bytes = [0; 8];
        bytes[2..].copy_from_slice(&self.0[..6]);
        Millis(u64::from_be_bytes(bytes))
    }

    /// The least id, of any version, whose time is later.
    pub fn after(time: Millis) -> BatchId {
        let mut bytes = [0; 16];
        bytes[..6].copy_from_slice(&time.0.saturating_add(1).min((1 << 48) - 1).to_be_bytes()[2..]);
        BatchId(bytes)
    }

    /// Whether the version and variant bits are those of a UUIDv7 (RFC 9562, section 5.7).
    pub fn is_v7(&self) -> bool {
        self.0[6] >> 4 == 7 && self.0[8] >> 6 == 0b10
    }

    /// An id with the given time and 74 bits taken from `tail`, for tests and for ids that are derived from something.
    pub fn from_parts(time: Millis, tail: [u8; 10]) -> BatchId {
        let mut bytes = [0; 16];
        bytes[..6].copy_from_slice(&time.0.to_be_bytes()[2..]);
        bytes[6..].copy_from_slice(&tail);
        bytes[6] = 0x70 | (bytes[6] & 0x0f);
        bytes[8] = 0x80 | (bytes[8] & 0x3f);
        BatchId(bytes)
    }
}

impl fmt::Display for BatchId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // In one piece: each answer to a caller has one.
        let mut text = [b'-'; 36];
        let mut at = 0;
        for (place, byte) in self.0.iter().enumerate() {
            at += usize::from(matches!(place, 4 | 6 | 8 | 10));
            for digit in [byte >> 4, byte & 0x0f] {
                text[at] = b"0123456789abcdef"[usize::from(digit)];
                at += 1;
            }
        }
        f.write_str(std::str::from_utf8(&text).expect("hex digits are ASCII"))
    }
}

impl fmt::Debug for BatchId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Hash of the contents of a whole batch (BLAKE3): the same id with another hash is another batch.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ContentHash(pub [u8; 32]);

impl fmt::Debug for ContentHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for byte in &self.0[..6] {
            write!(f, "{byte:02x}")?;
        }
        f.write_str("…")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_carries_its_time_and_version() {
        let id = BatchId::from_parts(Millis(1_700_000_000_123), [0xff; 10]);
        assert_eq!(id.time(), Millis(1_700_000_000_123));
        assert!(id.is_v7());
        assert_eq!(id.to_string(), "018bcfe5-687b-7fff-bfff-ffffffffffff");
        assert!(!BatchId([0; 16]).is_v7());
    }
}
