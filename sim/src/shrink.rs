//! Makes a failing plan smaller: leaves out faults, clients and steps, and shortens, as long as the same promise is still broken.

use crate::{plan::Plan, run::run, trace::Trace};

/// How many plans are tried at most.
const TRIES_MAX: u32 = 3_000;

struct Shrinker {
    plan: Plan,
    invariant: String,
    tries: u32,
}

impl Shrinker {
    /// Takes a smaller plan if it fails in the same way.
    fn take(&mut self, smaller: Plan) -> bool {
        if self.tries == 0 {
            return false;
        }
        self.tries -= 1;
        let violation = run(&smaller, Trace::silent()).violation;
        let fails = violation.is_some_and(|violation| violation.invariant == self.invariant);
        if fails {
            self.plan = smaller;
        }
        fails
    }

    /// Leaves out pieces of a list, large ones first.
    fn thin(&mut self, len: impl Fn(&Plan) -> usize, cut: impl Fn(&mut Plan, std::ops::Range<usize>)) {
        let mut size = len(&self.plan).div_ceil(2).max(1);
        loop {
            let mut start = 0;
            while start < len(&self.plan) {
                let end = (start + size).min(len(&self.plan));
                let mut smaller = self.plan.clone();
                cut(&mut smaller, start..end);
                if !self.take(smaller) {
                    start = end;
                }
            }
            if size == 1 {
                return;
            }
            size = size.div_ceil(2);
        }
    }
}

/// The smallest plan found that breaks the same promise, and how many were tried. The plan itself if it breaks none.
pub fn shrink(plan: &Plan) -> (Plan, u32) {
    let Some(violation) = run(plan, Trace::silent()).violation else { return (plan.clone(), 1) };
    let mut shrinker = Shrinker { plan: plan.clone(), invariant: violation.invariant, tries: TRIES_MAX };
    let mut fewer = plan.clone();
    fewer.faults_min = 0;
    shrinker.take(fewer);
    for _ in 0..2 {
        let before = shrinker.tries;
        shrinker.thin(|plan| plan.faults.len(), |plan, cut| drop(plan.faults.drain(cut)));
        shrinker.thin(|plan| plan.clients.len(), |plan, cut| drop(plan.clients.drain(cut)));
        for client in 0..shrinker.plan.clients.len() {
            shrinker
                .thin(|plan| plan.clients[client].len(), |plan, cut| drop(plan.clients[client].drain(cut)));
        }
        let mut shorter = shrinker.plan.clone();
        shorter.faults_ms =
            shorter.faults.iter().map(|fault| fault.at_ms + fault.for_ms).max().unwrap_or(100);
        if shorter.faults_ms < shrinker.plan.faults_ms {
            shrinker.take(shorter);
        }
        if shrinker.tries + 20 > before || shrinker.tries == 0 {
            break;
        }
    }
    (shrinker.plan, TRIES_MAX - shrinker.tries)
}
