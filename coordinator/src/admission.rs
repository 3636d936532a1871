//! How many batches a node lets in at once.
//!
//! What waits in queues gets no more done, it only gets old. So the number of batches in flight is held where batches are decided about as
//! soon as they come, by what is seen of that, as TCP Vegas does (Brakmo, O'Malley, Peterson, SIGCOMM 1994): while even the quickest of
//! a tenth of a second takes much longer than the quickest ever did, fewer are let in; else, if somebody had to wait at the door, more.
//! It is the quickest that counts, because one that waits for a lock or for a dead shard says nothing about the others (promise G9).
//!
//! Who finds no room waits at the door, but not for long while others are settled: then it is refused (RESOURCE_EXHAUSTED). A crowd that
//! comes at once is let in bit by bit, so it may wait for [`PATIENCE`]; where the door has had a crowd for [`CROWDED`] intervals, more come
//! than can be settled, and who waits for longer than [`PATIENCE_IN_CROWD`] would only be late (as CoDel tells a standing queue from a
//! burst: Nichols and Jacobson, "Controlling Queue Delay", ACM Queue 10:5, 2012).
//! Streams are read all the same, for what waits unread in a connection waits unseen, and for longer than anybody wants. While nothing
//! is settled, as during an election, all wait.
//!
//! Invariants:
//! - One that was let in and has no answer after [`STUCK`] takes up no room any more: others must not be shut out by it.
//! - At least [`LEAST`] may be in flight.

use std::{
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use tokio::{
    sync::Notify,
    time::{Instant, timeout},
};

/// How often the number is looked at.
const INTERVAL: Duration = Duration::from_millis(100);
/// In intervals: so long in flight is stuck.
const STUCK: usize = 10;
/// How long a batch waits at the door of a node that is busy.
const PATIENCE: Duration = Duration::from_millis(200);
/// The same where somebody has waited in each of the last [`CROWDED`] intervals.
const PATIENCE_IN_CROWD: Duration = Duration::from_millis(100);
const CROWDED: usize = 5;
/// The fewest that may be in flight.
const LEAST: usize = 64;
/// How many may be in flight at first.
const FIRST: usize = 1024;
/// Fewer say nothing about the node.
const SAMPLES_MIN: usize = 4;
/// The quickest of an interval may take this and twice the quickest ever.
const SLACK: Duration = Duration::from_millis(20);
/// By this part the quickest ever is forgotten with each interval in which no fewer could be let in: then it isn't those that wait who make
/// the others slow, but, for example, a longer way to a quorum.
const FORGOTTEN: u32 = 16;

/// The door of a node.
#[derive(Debug)]
pub(crate) struct Admission {
    most: usize,
    in_flight: AtomicUsize,
    limit: AtomicUsize,
    state: Mutex<State>,
    freed: Notify,
}

#[derive(Debug)]
struct State {
    /// The number of the present interval, and when it ends.
    interval: usize,
    ends: Instant,
    /// How many of those that came in each of the latest intervals are in flight.
    came: [usize; STUCK],
    quickest: Option<Duration>,
    samples: usize,
    quickest_ever: Option<Duration>,
    somebody_waited: bool,
    /// In how many intervals in a row before the present one somebody waited while others were settled.
    crowded: usize,
    /// Whether anything was decided in the interval before.
    settled_before: bool,
}

/// The place of one batch. Dropped, it is free again.
#[derive(Debug)]
pub(crate) struct Entrance {
    admission: Arc<Admission>,
    interval: usize,
    came: Instant,
}

impl Admission {
    /// An open door, through which no more than `most` go at once.
    pub(crate) fn new(most: usize) -> Arc<Admission> {
        let state = State {
            interval: 0,
            ends: Instant::now() + INTERVAL,
            came: [0; STUCK],
            quickest: None,
            samples: 0,
            quickest_ever: None,
            somebody_waited: false,
            crowded: 0,
            settled_before: false,
        };
        Arc::new(Admission {
            most,
            in_flight: AtomicUsize::new(0),
            limit: AtomicUsize::new(FIRST.min(most)),
            state: Mutex::new(state),
            freed: Notify::new(),
        })
    }

    /// Whether there is room for one more.
    pub(crate) fn has_room(&self) -> bool {
        self.in_flight.load(Ordering::Relaxed) < self.limit.load(Ordering::Relaxed)
    }

    /// Whether there is room for a single call. Streams have many that wait, and would leave it none.
    pub(crate) fn has_room_for_call(&self) -> bool {
        let limit = self.limit.load(Ordering::Relaxed);
        self.in_flight.load(Ordering::Relaxed) < limit + limit / 8
    }

    /// Waits for room.
    pub(crate) async fn room(&self) {
        self.until(Admission::has_room).await;
    }

    /// Waits for room for a single call.
    pub(crate) async fn room_for_call(&self) {
        self.until(Admission::has_room_for_call).await;
    }

    async fn until(&self, has_room: impl Fn(&Admission) -> bool) {
        while !has_room(self) {
            self.lock().somebody_waited = true;
            // The time limit is for those that are stuck: nothing else tells that they have become so.
            if timeout(INTERVAL, self.freed.notified()).await.is_err() {
                self.lock().advance(self, Instant::now());
            }
        }
    }

    /// How long a batch may wait now, if others are settled.
    pub(crate) fn patience(&self) -> Duration {
        let mut state = self.lock();
        state.advance(self, Instant::now());
        if state.crowded >= CROWDED { PATIENCE_IN_CROWD } else { PATIENCE }
    }

    /// Whether batches are settled now, as far as is known.
    pub(crate) fn settles(&self) -> bool {
        let mut state = self.lock();
        state.advance(self, Instant::now());
        state.settled_before || state.samples > 0
    }

    /// Takes a place, whether there is room or not.
    pub(crate) fn enter(self: &Arc<Admission>) -> Entrance {
        let now = Instant::now();
        let mut state = self.lock();
        state.advance(self, now);
        let interval = state.interval;
        state.came[interval % STUCK] += 1;
        self.in_flight.fetch_add(1, Ordering::Relaxed);
        Entrance { admission: self.clone(), interval, came: now }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("nothing panics while it holds this lock")
    }
}

impl State {
    /// Ends the intervals that are over.
    fn advance(&mut self, door: &Admission, now: Instant) {
        if now < self.ends {
            return;
        }
        let limit = door.limit.load(Ordering::Relaxed);
        let next = self.next_limit(limit).min(door.most);
        door.limit.store(next, Ordering::Relaxed);
        self.settled_before = self.samples > 0;
        let over = now.duration_since(self.ends).as_millis() / INTERVAL.as_millis();
        let over = 1 + usize::try_from(over).unwrap_or(usize::MAX).min(STUCK);
        // One that waits looks in at least once in an interval: where nobody did, nobody was there.
        let is_crowd = self.somebody_waited && self.samples > 0 && over <= 2;
        self.crowded = if is_crowd { self.crowded + 1 } else { 0 };
        (self.quickest, self.samples, self.somebody_waited) = (None, 0, false);
        for _ in 0..over {
            self.interval += 1;
            let stuck = std::mem::take(&mut self.came[self.interval % STUCK]);
            door.in_flight.fetch_sub(stuck, Ordering::Relaxed);
        }
        self.ends = now + INTERVAL;
        door.freed.notify_waiters();
    }

    fn next_limit(&mut self, limit: usize) -> usize {
        let Some(quickest) = self.quickest.filter(|_| self.samples >= SAMPLES_MIN) else { return limit };
        let ever = self.quickest_ever.map_or(quickest, |ever| {
            let forgotten = if limit == LEAST { ever / FORGOTTEN } else { Duration::ZERO };
            quickest.min(ever + forgotten)
        });
        self.quickest_ever = Some(ever);
        if quickest > 2 * ever + SLACK {
            (limit - limit / 8).max(LEAST)
        } else if self.somebody_waited {
            limit + limit / 8
        } else {
            limit
        }
    }
}

impl Entrance {
    /// The batch is decided.
    pub(crate) fn decided(self) {
        let took = self.came.elapsed();
        let mut state = self.admission.lock();
        state.quickest = Some(state.quickest.map_or(took, |quickest| quickest.min(took)));
        state.samples += 1;
    }
}

impl Drop for Entrance {
    fn drop(&mut self) {
        let door = &self.admission;
        let mut state = door.lock();
        state.advance(door, Instant::now());
        if self.interval + STUCK > state.interval {
            state.came[self.interval % STUCK] -= 1;
            door.in_flight.fetch_sub(1, Ordering::Relaxed);
        }
        drop(state);
        if door.has_room_for_call() {
            door.freed.notify_one();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What becomes of a limit over some intervals in which the quickest batch took so long.
    fn after(door: &Admission, limit: usize, intervals: usize, quickest_ms: u64) -> usize {
        let mut state = door.lock();
        (0..intervals).fold(limit, |limit, _| {
            state.quickest = Some(Duration::from_millis(quickest_ms));
            (state.samples, state.somebody_waited) = (SAMPLES_MIN, true);
            state.next_limit(limit).min(door.most)
        })
    }

    #[test]
    fn fewer_come_in_while_all_are_slow_and_more_once_they_are_quick() {
        let door = Admission::new(5000);
        let quick = after(&door, FIRST, 3, 3);
        assert!(quick > FIRST);
        let slow = after(&door, quick, 60, 90);
        assert!((LEAST..quick / 8).contains(&slow), "{slow}");
        assert_eq!(after(&door, slow, 60, 5), 5000);
    }

    #[test]
    fn a_long_way_to_a_quorum_is_no_overload() {
        let door = Admission::new(5000);
        assert_eq!(after(&door, FIRST, 60, 80), 5000);
        // It has become longer: for some seconds that looks like load.
        let longer = after(&door, FIRST, 10, 200);
        assert!(longer < FIRST);
        assert_eq!(after(&door, longer, 100, 200), 5000);
    }

    /// A node that settles 5,000 in a second, and 100,000 who want to be let in, for ten minutes.
    #[test]
    fn the_door_stays_narrow_under_load() {
        let door = Admission::new(100_000);
        let mut limit = after(&door, FIRST, 1, 4);
        for interval in 0..6000 {
            limit = after(&door, limit, 1, 2 + limit as u64 / 5);
            assert!(interval < 60 || (LEAST..=200).contains(&limit), "{limit} after {interval}");
        }
    }

    /// Who comes with many others at once is let in bit by bit; a crowd that doesn't end is more than can be settled.
    #[tokio::test(start_paused = true)]
    async fn a_crowd_that_stays_waits_for_less_than_one_that_comes() {
        let door = Admission::new(1);
        let _one = door.enter();
        let intervals = async |waits: bool, settled: usize, count: usize| {
            for _ in 0..count {
                {
                    let mut state = door.lock();
                    state.somebody_waited |= waits;
                    state.samples += settled;
                }
                tokio::time::advance(INTERVAL).await;
                door.lock().advance(&door, Instant::now());
            }
        };
        assert_eq!(door.patience(), PATIENCE);
        intervals(true, 1, CROWDED - 1).await;
        assert_eq!(door.patience(), PATIENCE);
        intervals(true, 1, 10).await;
        assert_eq!(door.patience(), PATIENCE_IN_CROWD);
        intervals(false, 1, 1).await;
        assert_eq!(door.patience(), PATIENCE, "nobody waits any more");
        intervals(true, 0, 2 * CROWDED).await;
        assert_eq!(door.patience(), PATIENCE, "nothing is settled: they wait for an election");
        intervals(true, 1, 2 * CROWDED).await;
        {
            // The last of it, before nobody comes any more.
            let mut state = door.lock();
            (state.somebody_waited, state.samples) = (true, 1);
        }
        tokio::time::advance(INTERVAL * 30).await;
        assert_eq!(door.patience(), PATIENCE, "nobody was there for seconds");
    }

    #[test]
    fn few_answers_say_nothing() {
        let door = Admission::new(5000);
        let mut state = door.lock();
        (state.quickest, state.samples) = (Some(Duration::from_secs(9)), SAMPLES_MIN - 1);
        assert_eq!(state.next_limit(FIRST), FIRST);
    }

    #[tokio::test(start_paused = true)]
    async fn those_that_are_stuck_shut_nobody_out() {
        let door = Admission::new(10);
        let stuck: Vec<Entrance> = (0..10).map(|_| door.enter()).collect();
        assert!(!door.has_room());
        assert!(timeout(INTERVAL * 5, door.room()).await.is_err(), "they have just come");
        timeout(INTERVAL * 10, door.room()).await.expect("they take up no room any more");
        let one = door.enter();
        drop(stuck);
        assert_eq!(door.in_flight.load(Ordering::Relaxed), 1);
        drop(one);
        assert_eq!(door.in_flight.load(Ordering::Relaxed), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn who_leaves_makes_room() {
        let door = Admission::new(1);
        let one = door.enter();
        let waits = tokio::spawn({
            let door = door.clone();
            async move { door.room().await }
        });
        tokio::task::yield_now().await;
        assert!(!waits.is_finished());
        one.decided();
        timeout(INTERVAL / 2, waits).await.expect("it is woken").unwrap();
    }
}
