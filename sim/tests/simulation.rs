//! Some hundred seeds, the plans that once failed, and the proof that the checks can fail.

use std::{fs, path::Path};

use verdict_sim::{
    faults::{KINDS, Tally},
    plan::{FAULTS_MIN, Plan},
    raft::Defect,
    run::{Sum, run},
    shrink::shrink,
    trace::Trace,
    world::Report,
};

fn run_seed(seed: u64) -> Report {
    run(&Plan::of_seed(seed), Trace::silent())
}

#[test]
fn some_hundred_seeds_break_no_promise() {
    let mut sum = Sum::default();
    for seed in 1..=300 {
        let report = run_seed(seed);
        assert_eq!(report.violation, None, "seed {seed}");
        assert!(report.tally.total() >= FAULTS_MIN, "seed {seed} had only {} faults", report.tally.total());
        sum.add(report);
    }
    let Tally(counts) = sum.faults;
    for (count, (_, kind)) in counts.iter().zip(KINDS) {
        assert!(*count > 0, "in 300 seeds there was no {kind}");
    }
}

#[test]
fn the_same_seed_gives_the_same_trace() {
    for seed in 1..=10 {
        let (one, other) = (run_seed(seed), run_seed(seed));
        assert_eq!(one, other);
        assert_ne!(one.hash, run_seed(seed + 100).hash);
    }
}

/// The invariant by which a bug in the model of Raft is found first.
fn found(defect: Defect, seeds: u64) -> String {
    std::panic::set_hook(Box::new(|_| {}));
    let mut broken = (1..=seeds).filter_map(|seed| {
        let mut plan = Plan::of_seed(seed);
        plan.settings.defect = defect;
        run(&plan, Trace::silent()).violation
    });
    broken.next().map_or_else(String::new, |violation| violation.invariant)
}

#[test]
fn bugs_in_the_model_of_raft_are_found() {
    assert_eq!(found(Defect::SyncForgotten, 5), "Raft: log");
    assert_eq!(found(Defect::CommitWithoutQuorum, 5), "Raft: log");
    assert_eq!(found(Defect::VoteForShorterLog, 50), "Raft: log");
    let found = found(Defect::SnapshotForgotten, 100);
    assert!(["replica equality", "assertion"].contains(&found.as_str()), "{found:?}");
}

#[test]
fn a_failing_plan_is_made_smaller_and_still_fails() {
    std::panic::set_hook(Box::new(|_| {}));
    let mut plan = Plan::of_seed(1);
    plan.settings.defect = Defect::CommitWithoutQuorum;
    let before = run(&plan, Trace::silent()).violation.expect("seed 1 shows this bug");
    let (small, _) = shrink(&plan);
    let after = run(&small, Trace::silent()).violation.expect("it still fails");
    assert_eq!(before.invariant, after.invariant);
    assert!(small.faults.len() < plan.faults.len());
    let text = serde_json::to_string(&small).unwrap();
    let read: Plan = serde_json::from_str(&text).unwrap();
    assert_eq!(run(&read, Trace::silent()).violation, Some(after), "a plan survives being written to a file");
}

/// Plans that showed a bug once, made smaller.
#[test]
fn plans_that_failed_once_break_no_promise() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("regressions");
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_none_or(|extension| extension != "json") {
            continue;
        }
        let plan: Plan = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
        assert_eq!(run(&plan, Trace::silent()).violation, None, "{}", path.display());
    }
}
