//! What it costs to apply a part of a trade to a shard: its prepare and its outcome, three rows in the mean, on one core and without a
//! disk. `cargo run --release -p verdict-protocol --example apply -- [PARTS_PER_ENTRY]`

#![expect(clippy::disallowed_types, reason = "it measures time, the protocol reads none")]

use std::time::{Duration, Instant};

use bytes::Bytes;
use verdict_protocol::{
    batch::{Operation, OperationKind, Placement, RowKey},
    ids::{BatchId, ContentHash, Epoch, GroupId, Millis, Number, ShardId, Stamp},
    machine::{self, Machine, encode},
    messages::{PartOutcome, Prepare, ToShard},
    shard::{SWEEP_INTERVAL, Shard, ShardConfig, ShardEntry},
    store::MemoryStore,
    wire::EncodedPart,
};

const PARTS: usize = 400_000;
const ACCOUNTS: u64 = 100_000;
/// Parts between two flushes.
const FLUSH_AFTER: usize = 8_000;
const KEEP_BYTES: usize = 256 << 20;
const PLACEMENT: Placement = Placement { shards: 1 };

/// A buyer's or seller's part, every other time with the record of the trade.
fn part(sequence: u64, user: u64) -> EncodedPart {
    let user = format!("user:{user}");
    let add = |asset: &str, delta| Operation {
        row: RowKey::new(&user, asset).expect("a good name"),
        kind: OperationKind::Add { delta, floor: Some(-1_000_000), ceiling: None },
    };
    let mut part = vec![(0, add("USDT", 5)), (1, add("BTC", -5))];
    if sequence.is_multiple_of(2) {
        let row = RowKey::new(&format!("trade:BTC-USDT:{sequence}"), "record").expect("a good name");
        part.push((
            4,
            Operation { row, kind: OperationKind::Insert(Bytes::from_static(b"0.0123 at 12345.67")) },
        ));
    }
    EncodedPart::new(part.iter().map(|(place, operation)| (*place, operation)))
}

fn message() -> ToShard {
    let (coordinator, epoch) = (GroupId::COORDINATOR, Epoch(1));
    ToShard { coordinator, placement: PLACEMENT, epoch, ..ToShard::default() }
}

fn entry(message: ToShard) -> Vec<u8> {
    encode(&ShardEntry { now: Millis(1), parts_max: 100_000, messages: vec![message] })
}

/// Entries of so many prepares each, with the outcomes of those before.
fn entries(per_entry: usize) -> Vec<Vec<u8>> {
    let mut entries = vec![entry(ToShard { greet: true, ..message() })];
    let (mut seed, mut sequence, mut outcomes) = (1_u64, 0, Vec::new());
    for _ in 0..PARTS / per_entry {
        let mut message = ToShard { outcomes: std::mem::take(&mut outcomes), ..message() };
        for _ in 0..per_entry {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            sequence += 1;
            let number = Number { epoch: Epoch(1), sequence };
            let mut tail = [0; 10];
            tail[..8].copy_from_slice(&seed.to_be_bytes());
            let id = BatchId::from_parts(Millis(1_700_000_000_000 + sequence / 10), tail);
            message.prepares.push(Prepare {
                number,
                id,
                hash: ContentHash([7; 32]),
                shards: vec![ShardId(1), ShardId(2)],
                gives_up: vec![],
                sole: None,
                part: part(sequence, (seed >> 33) % ACCOUNTS),
            });
            outcomes.push(PartOutcome { id, number, commit: Some(Stamp(sequence)), gives_up: vec![] });
        }
        message.mark.epoch = Epoch(1);
        message.mark.sequence = sequence.saturating_sub(2 * per_entry as u64);
        entries.push(entry(message));
    }
    entries
}

fn main() {
    let per_entry =
        std::env::args().nth(1).map_or(32, |count| count.parse().expect("parts per entry: a number"));
    let entries = entries(per_entry);
    let bytes: usize = entries.iter().map(Vec::len).sum();
    let config = ShardConfig { shard: ShardId(1), placement: PLACEMENT, sweep_interval: SWEEP_INTERVAL };
    let mut store = MemoryStore::default();
    let mut shard = Shard::open(&config, &store).expect("memory doesn't fail");
    let (begun, mut flushing) = (Instant::now(), Duration::ZERO);
    for (place, entry) in entries.iter().enumerate() {
        machine::apply(&mut shard, &mut store, place as u64 + 1, entry).expect("memory doesn't fail");
        if (place * per_entry) % FLUSH_AFTER < per_entry {
            let begun = Instant::now();
            shard.flush(&mut store).expect("memory doesn't fail");
            shard.trim(KEEP_BYTES);
            flushing += begun.elapsed();
        }
    }
    let each = |time: Duration| time.as_secs_f64() * 1e6 / PARTS as f64;
    println!(
        "{PARTS} parts, {per_entry} an entry of {} bytes: {:.2} us a part to apply, {:.2} us to bring to a map in memory",
        bytes / entries.len(),
        each(begun.elapsed() - flushing),
        each(flushing)
    );
}
