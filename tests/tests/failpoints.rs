//! A process is killed once at every failpoint, under load, and every promise is checked. `make failpoints` does it many times, in every
//! role.

use std::time::{Duration, Instant};

use verdict_failpoints::FAILPOINTS;
use verdict_tests::{cluster::run_to_end, failpoints::Harness, random::Random};

#[tokio::test(flavor = "multi_thread")]
async fn every_failpoint_is_reached_and_survived() {
    let began = Instant::now();
    let mut harness = Harness::start(Random::announced()).await;
    let mut missed = Vec::new();
    for point in FAILPOINTS {
        match harness.kill(point, point.roles[0]).await {
            Ok(kill) => println!(
                "{:5.1} s  {:24} {:20} without commits {:4} ms, resolved after {:4} ms",
                began.elapsed().as_secs_f64(),
                point.name,
                point.roles[0].name(),
                kill.without_commits.as_millis(),
                kill.resolved.as_millis(),
            ),
            Err(why) => missed.push(format!("{}: {why}", point.name)),
        }
    }
    let findings = harness.end().await;
    println!("{:5.1} s  {findings:?}", began.elapsed().as_secs_f64());
    findings.assert_kept();
    assert!(findings.committed > 1000, "there was hardly any load: {findings:?}");
    assert!(missed.is_empty(), "a failpoint that nobody came to proves nothing: {missed:#?}");
}

#[test]
fn a_build_with_failpoints_says_so_and_refuses_orders_that_it_does_not_understand() {
    let output = run_to_end(&["--version"], Duration::from_secs(10));
    let version = String::from_utf8_lossy(&output.stdout).into_owned();
    assert_eq!(version.contains("with failpoints"), verdict_failpoints::ENABLED, "{version}");
}
