//! Tables that several threads fill: every different value gets a small number (interning), every computed answer is kept.

use std::{
    collections::HashMap,
    hash::{BuildHasher, BuildHasherDefault, DefaultHasher, Hash, Hasher},
    sync::{Arc, OnceLock, RwLock},
};

const PIECES: usize = 64;
/// The first block of an [`Interner`] holds this many values, each later one twice as many as the one before.
const FIRST_BLOCK: usize = 1 << 10;
const BLOCKS: usize = 22;

fn piece_of(key: &impl Hash) -> usize {
    (BuildHasherDefault::<DefaultHasher>::default().hash_one(key) >> 58) as usize % PIECES
}

/// A map that several threads fill.
pub struct Memo<K, V> {
    pieces: Vec<RwLock<HashMap<K, V>>>,
}

impl<K, V> Default for Memo<K, V> {
    fn default() -> Self {
        Memo { pieces: (0..PIECES).map(|_| RwLock::default()).collect() }
    }
}

impl<K: Hash + Eq, V: Clone> Memo<K, V> {
    /// The answer for `key`, computed unless it is known. Two threads may compute it at a time; both get the same.
    pub fn get_or(&self, key: K, compute: impl FnOnce() -> V) -> V {
        let piece = &self.pieces[piece_of(&key)];
        if let Some(value) = piece.read().expect("no thread panics in here").get(&key) {
            return value.clone();
        }
        let value = compute();
        piece.write().expect("no thread panics in here").entry(key).or_insert(value).clone()
    }

    /// How many answers are kept.
    pub fn len(&self) -> usize {
        self.pieces.iter().map(|piece| piece.read().expect("no thread panics in here").len()).sum()
    }

    /// Whether none is kept.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Cells that are written once each.
type Block<T> = Box<[OnceLock<Arc<T>>]>;

/// Gives every different value a number, and the value back for the number. Values are compared, not only their hashes.
pub struct Interner<T> {
    numbers: Vec<RwLock<HashMap<Arc<T>, u32>>>,
    next: RwLock<u32>,
    /// Reading needs no lock: blocks never move, and a cell is written once.
    blocks: [OnceLock<Block<T>>; BLOCKS],
}

impl<T> Default for Interner<T> {
    fn default() -> Self {
        Interner {
            numbers: (0..PIECES).map(|_| RwLock::default()).collect(),
            next: RwLock::default(),
            blocks: [const { OnceLock::new() }; BLOCKS],
        }
    }
}

impl<T: Hash + Eq> Interner<T> {
    /// The number of a value.
    pub fn number(&self, value: T) -> u32 {
        let piece = &self.numbers[piece_of(&value)];
        if let Some(number) = piece.read().expect("no thread panics in here").get(&value) {
            return *number;
        }
        let mut piece = piece.write().expect("no thread panics in here");
        if let Some(number) = piece.get(&value) {
            return *number;
        }
        let value = Arc::new(value);
        let number = {
            let mut next = self.next.write().expect("no thread panics in here");
            *next += 1;
            *next - 1
        };
        let (block, place) = cell_of(number);
        let cells =
            self.blocks[block].get_or_init(|| (0..FIRST_BLOCK << block).map(|_| OnceLock::new()).collect());
        assert!(cells[place].set(value.clone()).is_ok(), "a number is given once");
        piece.insert(value, number);
        number
    }

    /// The value of a number.
    pub fn get(&self, number: u32) -> &T {
        let (block, place) = cell_of(number);
        let cells = self.blocks[block].get().expect("the number was given");
        cells[place].get().expect("the number was given")
    }

    /// How many values there are.
    pub fn len(&self) -> usize {
        *self.next.read().expect("no thread panics in here") as usize
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

fn cell_of(number: u32) -> (usize, usize) {
    let shifted = number as usize + FIRST_BLOCK;
    let block = (shifted / FIRST_BLOCK).ilog2() as usize;
    (block, shifted - (FIRST_BLOCK << block))
}

/// 128 bits of BLAKE3: two different states share them with a probability that nobody will ever meet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fingerprint(pub [u64; 2]);

impl Hash for Fingerprint {
    fn hash<H: Hasher>(&self, state: &mut H) {
        state.write_u64(self.0[0]);
    }
}

impl Fingerprint {
    /// The fingerprint of some words.
    pub fn of(words: &[u32]) -> Fingerprint {
        let mut bytes = [0_u8; 1024];
        let mut hasher = blake3::Hasher::new();
        for part in words.chunks(bytes.len() / 4) {
            for (word, place) in part.iter().zip(bytes.chunks_exact_mut(4)) {
                place.copy_from_slice(&word.to_le_bytes());
            }
            hasher.update(&bytes[..part.len() * 4]);
        }
        let hash = hasher.finalize();
        let half =
            |from: usize| u64::from_le_bytes(hash.as_bytes()[from..from + 8].try_into().expect("eight"));
        Fingerprint([half(0), half(8)])
    }
}

/// Fingerprints are evenly spread already.
#[derive(Default)]
pub struct NoHash(u64);

impl Hasher for NoHash {
    fn write(&mut self, _: &[u8]) {
        unreachable!("only fingerprints are hashed by this");
    }

    fn write_u64(&mut self, word: u64) {
        self.0 = word;
    }

    fn finish(&self) -> u64 {
        self.0
    }
}

/// A map from fingerprints that several threads fill.
pub struct Prints<V> {
    pieces: Vec<RwLock<HashMap<Fingerprint, V, BuildHasherDefault<NoHash>>>>,
}

impl<V> Default for Prints<V> {
    fn default() -> Self {
        Prints { pieces: (0..PIECES).map(|_| RwLock::default()).collect() }
    }
}

impl<V: Copy> Prints<V> {
    fn piece(&self, print: Fingerprint) -> &RwLock<HashMap<Fingerprint, V, BuildHasherDefault<NoHash>>> {
        &self.pieces[print.0[1] as usize % PIECES]
    }

    /// Puts it in, unless it is there; whether it was new.
    pub fn insert(&self, print: Fingerprint, value: V) -> bool {
        let mut piece = self.piece(print).write().expect("no thread panics in here");
        match piece.entry(print) {
            std::collections::hash_map::Entry::Occupied(_) => false,
            std::collections::hash_map::Entry::Vacant(place) => {
                place.insert(value);
                true
            }
        }
    }

    /// All that was put in, by the first half of the fingerprints.
    pub fn by_half(&self) -> HashMap<u64, V> {
        let pieces = self.pieces.iter().map(|piece| piece.read().expect("no thread panics in here"));
        pieces
            .flat_map(|piece| piece.iter().map(|(print, value)| (print.0[0], *value)).collect::<Vec<_>>())
            .collect()
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.pieces.iter().map(|piece| piece.read().expect("no thread panics in here").len()).sum()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}
