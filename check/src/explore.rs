//! Visits every state that can be reached, breadth first, so that the first path to a broken rule is a shortest one.

use std::{
    sync::{
        Mutex,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use crate::{
    case::Case,
    heal::{self, Healing},
    model::{Action, Model, State},
    tables::{Fingerprint, Prints},
    trace,
};

/// How many states a thread takes at a time.
const CHUNK: usize = 64;

/// How a case is explored.
#[derive(Clone, Debug)]
pub struct Settings {
    /// How many threads.
    pub threads: usize,
    /// Give up beyond so many states.
    pub states_max: usize,
    /// Tell how far it is, on standard error.
    pub progress: bool,
}

/// What came of it.
#[derive(Clone, Debug)]
pub struct Report {
    /// The name of the case.
    pub name: &'static str,
    /// Different states.
    pub states: usize,
    /// Steps from one to another.
    pub transitions: u64,
    /// The length of the longest of the shortest paths.
    pub depth: usize,
    /// Healings that were run.
    pub healed: usize,
    /// How long it took.
    pub took: Duration,
    /// The first broken rule, with the path to it.
    pub violation: Option<String>,
    /// Whether all states were visited.
    pub complete: bool,
}

/// How a state was first reached: the fingerprint of the one before (half of it), and the action.
type Origin = (u64, u64);

/// What broke, and where.
struct Broken {
    from: Fingerprint,
    action: Option<Action>,
    rule: String,
}

struct Search<'a> {
    case: &'a Case,
    model: &'a Model,
    origins: Prints<Origin>,
    healed: Prints<()>,
    broken: Mutex<Option<Broken>>,
    stop: AtomicBool,
    transitions: AtomicU64,
}

/// Explores a case.
pub fn explore(case: &Case, settings: &Settings) -> Report {
    let began = Instant::now();
    let (model, first) = match Model::new(case) {
        Ok(model) => model,
        Err(rule) => return unfounded(case, rule, began.elapsed()),
    };
    let search = Search {
        case,
        model: &model,
        origins: Prints::default(),
        healed: Prints::default(),
        broken: Mutex::new(None),
        stop: AtomicBool::new(false),
        transitions: AtomicU64::new(0),
    };
    let words = first.encode();
    let print = Fingerprint::of(&words);
    search.origins.insert(print, (0, u64::MAX));
    search.look_at(print, None, &first);
    let mut frontier = vec![words.into_boxed_slice()];
    let (mut depth, mut states, mut complete) = (0, 1, true);
    let mut told = Instant::now();
    while !frontier.is_empty() && !search.stop.load(Ordering::Relaxed) {
        let next = search.level(&frontier, settings.threads);
        if !next.is_empty() {
            depth += 1;
        }
        states += next.len();
        frontier = next;
        if settings.progress && told.elapsed() > Duration::from_secs(2) {
            told = Instant::now();
            eprint!(
                "\r{}: {states} states, depth {depth}, {} to go, {} s  ",
                case.name,
                frontier.len(),
                began.elapsed().as_secs()
            );
        }
        if states > settings.states_max {
            complete = false;
            break;
        }
    }
    if settings.progress {
        eprint!("\r{:78}\r", "");
    }
    let broken = search.broken.into_inner().expect("no thread panics in here");
    let violation = broken.map(|broken| {
        let path = path_to(&search.origins, broken.from, broken.action);
        trace::tell(&model, &first, &path, &broken.rule)
    });
    Report {
        name: case.name,
        states,
        transitions: search.transitions.into_inner(),
        depth,
        healed: search.healed.len(),
        took: began.elapsed(),
        complete: complete && violation.is_none(),
        violation,
    }
}

/// The cluster did not even come to its first state.
fn unfounded(case: &Case, rule: String, took: Duration) -> Report {
    let violation = Some(format!("# broken after 0 steps: {rule}"));
    Report {
        name: case.name,
        states: 0,
        transitions: 0,
        depth: 0,
        healed: 0,
        took,
        violation,
        complete: false,
    }
}

impl Search<'_> {
    /// All states that are one step further.
    fn level(&self, frontier: &[Box<[u32]>], threads: usize) -> Vec<Box<[u32]>> {
        let at = AtomicUsize::new(0);
        if frontier.len() < 4 * CHUNK || threads == 1 {
            return self.work(frontier, &at);
        }
        std::thread::scope(|scope| {
            let workers: Vec<_> = (0..threads).map(|_| scope.spawn(|| self.work(frontier, &at))).collect();
            workers
                .into_iter()
                .flat_map(|worker| worker.join().expect("what panics is guarded, but for defects in here"))
                .collect()
        })
    }

    fn work(&self, frontier: &[Box<[u32]>], at: &AtomicUsize) -> Vec<Box<[u32]>> {
        let mut found = Vec::new();
        let mut transitions = 0;
        loop {
            let from = at.fetch_add(CHUNK, Ordering::Relaxed);
            if from >= frontier.len() || self.stop.load(Ordering::Relaxed) {
                break;
            }
            for words in &frontier[from..frontier.len().min(from + CHUNK)] {
                self.expand(words, &mut found, &mut transitions);
            }
        }
        self.transitions.fetch_add(transitions, Ordering::Relaxed);
        found
    }

    fn expand(&self, words: &[u32], found: &mut Vec<Box<[u32]>>, transitions: &mut u64) {
        let state = State::decode(words, self.case.shards as usize);
        let from = Fingerprint::of(words);
        for action in self.model.actions(&state) {
            let next = match self.model.next(&state, action) {
                Ok(None) => continue,
                Ok(Some(next)) => next,
                Err(rule) => {
                    self.breaks(from, Some(action), rule);
                    continue;
                }
            };
            *transitions += 1;
            let words = next.encode();
            let print = Fingerprint::of(&words);
            if self.origins.insert(print, (from.0[0], action.encode())) {
                self.look_at(from, Some(action), &next);
                found.push(words.into_boxed_slice());
            }
        }
    }

    /// Checks a new state, and that it heals.
    fn look_at(&self, from: Fingerprint, action: Option<Action>, state: &State) {
        if let Err(rule) = self.model.check(state) {
            return self.breaks(from, action, rule);
        }
        for healing in [Healing::NewLeader, Healing::SameLeader] {
            let Some(words) = heal::what_counts(self.model, state, healing) else { continue };
            let print = Fingerprint::of(&words);
            let every = if healing == Healing::SameLeader { u64::from(self.case.heal_every) } else { 1 };
            if !print.0[0].is_multiple_of(every) || !self.healed.insert(print, ()) {
                continue;
            }
            if let Err(rule) = heal::heal(self.model, state, healing) {
                return self.breaks(from, action, rule);
            }
        }
    }

    fn breaks(&self, from: Fingerprint, action: Option<Action>, rule: String) {
        self.stop.store(true, Ordering::Relaxed);
        self.broken.lock().expect("no thread panics in here").get_or_insert(Broken { from, action, rule });
    }
}

/// The actions that lead to a state, and one more.
fn path_to(origins: &Prints<Origin>, state: Fingerprint, last: Option<Action>) -> Vec<Action> {
    let by_half = origins.by_half();
    let mut path: Vec<Action> = last.into_iter().collect();
    let mut half = state.0[0];
    while let Some((before, action)) = by_half.get(&half)
        && *action != u64::MAX
    {
        path.push(Action::decode(*action));
        half = *before;
    }
    path.reverse();
    path
}
