//! The small cases hold. `make check` runs them with their figures, and the full ones on demand.

use verdict_check::{
    case::Size,
    cases,
    explore::{Settings, explore},
    parts::quiet_panics,
};

#[test]
fn every_small_case_holds_in_every_state() {
    quiet_panics();
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let settings = Settings { threads, states_max: usize::MAX, progress: false };
    let mut states = 0;
    for case in cases::all().into_iter().filter(|case| case.size == Size::Small) {
        let report = explore(&case, &settings);
        if let Some(violation) = report.violation {
            panic!("case {}:\n{violation}", case.name);
        }
        assert!(report.healed > 0, "case {} was healed from no state", case.name);
        println!("{}: {} states in {:?}", case.name, report.states, report.took);
        states += report.states;
    }
    assert!(states > 300_000, "only {states} states: the cases have shrunk");
}
