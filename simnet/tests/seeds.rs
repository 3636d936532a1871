//! A few seeds of the real stack in a simulated world, and that a seed is a world.

use std::process::Command;

fn simnet(arguments: &[&str]) -> (bool, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_simnet")).args(arguments).output().unwrap();
    (output.status.success(), String::from_utf8_lossy(&output.stdout).into_owned())
}

#[test]
fn a_seed_gives_the_same_trace_again() {
    let (_, once) = simnet(&["seed", "3", "--json"]);
    let (_, again) = simnet(&["seed", "3", "--json"]);
    assert!(once.contains("\"trace\":\""), "no report: {once}");
    assert_eq!(once, again);
    let (_, other) = simnet(&["seed", "4", "--json"]);
    let trace = |report: &str| report.split("\"trace\":\"").nth(1).unwrap()[..16].to_owned();
    assert_ne!(trace(&once), trace(&other));
}

/// In seed 4 a node whose log was shorter than what it had applied, and whose snapshot was older, once couldn't start again.
#[test]
fn no_promise_is_broken_in_a_few_seeds() {
    let (kept, told) = simnet(&["seeds", "--from", "1", "--count", "6"]);
    assert!(kept, "{told}");
}
