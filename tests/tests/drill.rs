//! `verdict drill` on real processes: what it reports, and that nothing is left behind when it is killed.

use std::{
    fs,
    path::Path,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use serde_json::Value as Json;
use verdict_tests::cluster::{program, run_to_end};

/// A drill ends so soon, even on a loaded machine.
const DRILL_WITHIN: Duration = Duration::from_secs(240);

#[test]
fn a_drill_kills_the_coordinators_leader_and_reports_in_json_and_html() {
    let folder = tempfile::tempdir().expect("make a folder");
    let path = |name: &str| folder.path().join(name).to_string_lossy().into_owned();
    let (html, json) = (path("report.html"), path("report.json"));
    let arguments = ["drill", "kill-coordinator", "--rate", "100", "--out", &html, "--json", &json];
    let output = run_to_end(&arguments, DRILL_WITHIN);
    let text = String::from_utf8_lossy(&output.stdout);
    println!("{text}\n{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(output.status.code(), Some(0), "the drill failed");
    for line in text.lines().filter(|line| !line.starts_with("written:")) {
        assert!(line.chars().count() <= 80, "{line:?} doesn't fit a terminal");
    }

    let report: Json =
        serde_json::from_str(&fs::read_to_string(&json).expect("a JSON report")).expect("JSON");
    assert_eq!((report["format"].as_u64(), report["held"].as_bool()), (Some(1), Some(true)));
    let committed = report["load"]["outcomes"]["committed"].as_u64().expect("a count");
    assert!(committed > 700, "15 s at 100/s, and only {committed} are committed");
    let kill = &report["events"][0];
    assert!(kill["what"].as_str().is_some_and(|what| what.starts_with("kill -9: node ")), "{kill}");
    assert_eq!(kill["impaired"].as_array().map(Vec::len), Some(1));
    let (pause, resolved) = (&kill["without_commits_seconds"], &kill["resolved_seconds"]);
    assert!(pause.as_f64().is_some_and(|pause| pause > 0.0 && pause < 10.0), "{kill}");
    assert!(resolved.as_f64().is_some_and(|resolved| resolved < 10.0), "{kill}");
    let promises = report["promises"].as_array().expect("promises");
    for promise in promises {
        let checks = promise["checks"].as_array().expect("checks");
        let checked: u64 = checks.iter().filter_map(|check| check["checked"].as_u64()).sum();
        println!("{} {}: {checked} checks", promise["id"], promise["verdict"]);
        assert!(promise["verdict"] == "held" && checked > 0, "{promise}");
    }
    assert_eq!(promises.len(), 10);
    let steps = report["series"]["committed"].as_array().expect("a series");
    let shown: u64 = steps.iter().filter_map(Json::as_u64).sum();
    // Some end after the load.
    assert!(shown <= committed && shown > committed / 2, "{shown} of {committed} in the curve");

    let page = fs::read_to_string(&html).expect("an HTML report");
    assert_eq!((page.matches("<svg").count(), page.matches("<details").count()), (3, 10));
    assert!(page.contains("All promises held") && page.contains("kill -9: node "));
    assert!(!page.contains("http"), "the page loads something");
}

#[test]
fn a_node_that_is_lost_in_a_drill_is_replaced_and_the_new_one_is_asked_too() {
    let folder = tempfile::tempdir().expect("make a folder");
    let path = |name: &str| folder.path().join(name).to_string_lossy().into_owned();
    let (scenario, json, data) = (path("replace.drill"), path("report.json"), path("data"));
    let text = "seconds 6\nshards 2\nat 1s replace leader of coordinator\nat 4s kill it\nat 5s start it\nthen wait until whole";
    fs::write(&scenario, text).expect("write a scenario");
    let arguments = ["drill", &scenario, "--rate", "50", "--json", &json, "--data", &data];
    let output = run_to_end(&arguments, DRILL_WITHIN);
    println!("{}\n{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert_eq!(output.status.code(), Some(0), "the drill failed");

    let report: Json =
        serde_json::from_str(&fs::read_to_string(&json).expect("a JSON report")).expect("JSON");
    let said = |place: usize| report["events"][place]["what"].as_str().unwrap_or_default().to_owned();
    assert!(said(0).starts_with("kill -9 for good: node "), "{report}");
    let old: u64 = said(0)["kill -9 for good: node ".len()..][..1].parse().expect("a node");
    let taken = format!("node 4 takes the place of node {old}, whose disk is lost: it votes in 3 groups");
    assert!(said(1).starts_with(&taken), "{}", said(1));
    assert_eq!((said(2).as_str(), said(3).as_str()), ("kill -9: node 4", "start: node 4"));
    let exists = |node: u64| Path::new(&data).join(format!("node-{node}")).exists();
    assert!(!exists(old) && exists(4), "the disk of node {old} is lost, and node 4 has one");
    let asked = report["promises"][1]["checks"][0]["checked"].as_u64().expect("a count");
    let batches = report["load"]["batches"].as_u64().expect("a count");
    assert_eq!(
        asked,
        3 * batches,
        "each of the three nodes that are members in the end is asked for each batch"
    );
}

#[test]
fn steps_pass_over_nodes_that_are_so_already_and_a_paused_one_can_be_restarted() {
    let folder = tempfile::tempdir().expect("make a folder");
    let path = |name: &str| folder.path().join(name).to_string_lossy().into_owned();
    let (scenario, json) = (path("again.drill"), path("report.json"));
    let text = "seconds 8\nshards 1\nat 1s pause node 3\nthen pause it\nafter 500ms restart it\nthen wait until whole\n\
                then kill node 1\nthen kill all\nthen stop it\nthen pause it\nthen start node 2\nthen start all\n\
                then wait until whole";
    fs::write(&scenario, text).expect("write a scenario");
    let output = run_to_end(&["drill", &scenario, "--rate", "50", "--json", &json], DRILL_WITHIN);
    println!("{}\n{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert_eq!(output.status.code(), Some(0), "the drill failed");
    let report: Json =
        serde_json::from_str(&fs::read_to_string(&json).expect("a JSON report")).expect("JSON");
    let events = report["events"].as_array().expect("events");
    let said: Vec<&str> = events.iter().filter_map(|event| event["what"].as_str()).collect();
    let expected = [
        "pause: node 3",
        "pause: nothing to do (already paused or down: node 3)",
        "stop in order and start again: node 3",
        "all replicas take part",
        "kill -9: node 1",
        "kill -9: all 3 nodes (already down: node 1)",
        "stop in order: nothing to do (already down: nodes 1, 2, 3)",
        "pause: nothing to do (already paused or down: nodes 1, 2, 3)",
        "start: node 2",
        "start: all 3 nodes (already up: node 2)",
        "all replicas take part",
    ];
    assert_eq!(said[..expected.len()], expected);
    // Once it runs again it counts as whole.
    assert_eq!(events[2]["impaired"].as_array().map(Vec::len), Some(0), "{}", events[2]);
}

#[test]
fn what_can_t_run_is_told_with_line_and_expectation_and_exit_status_2() {
    let folder = tempfile::tempdir().expect("make a folder");
    let file = folder.path().join("mine.drill");
    fs::write(&file, "seconds 5\nat 1s kil node 1\n").expect("write a scenario");
    let output = run_to_end(&["drill", &file.to_string_lossy()], DRILL_WITHIN);
    let told = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{told}");
    assert!(told.contains("line 2") && told.contains("did you mean \"kill\"?"), "{told}");
    let output = run_to_end(&["drill", "no-such-thing"], DRILL_WITHIN);
    assert_eq!(output.status.code(), Some(2));
    // Before anything is started.
    let page = folder.path().join("nowhere/report.html");
    let output = run_to_end(&["drill", "kill-coordinator", "--out", &page.to_string_lossy()], DRILL_WITHIN);
    let told = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{told}");
    assert!(told.contains("nowhere/report.html: No such file") && !told.contains("are up after"), "{told}");
    let output = run_to_end(&["drill", "list", "--rate", "fast"], DRILL_WITHIN);
    assert_eq!(output.status.code(), Some(3));
}

#[test]
fn a_closed_pipe_ends_the_list_quietly() {
    let mut child = Command::new(program())
        .args(["drill", "list"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("start the program");
    drop(child.stdout.take());
    let output = child.wait_with_output().expect("wait for its end");
    assert_eq!(String::from_utf8_lossy(&output.stderr), "");
}

#[test]
fn a_drill_that_is_killed_leaves_no_process_even_a_paused_one() {
    let folder = tempfile::tempdir().expect("make a folder");
    let data = folder.path().join("data");
    let scenario = folder.path().join("pause.drill");
    fs::write(&scenario, "seconds 120\nat 1s pause node 3\n").expect("write a scenario");
    let mut child = Command::new(program())
        .args(["drill", &scenario.to_string_lossy(), "--data", &data.to_string_lossy(), "--rate", "20"])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("start the program");
    wait("three processes, one of them paused", || {
        let states = states_of_nodes(&data);
        states.len() == 3 && states.contains(&'T')
    });
    child.kill().expect("kill what was started here");
    child.wait().expect("wait for its end");
    wait("no process", || states_of_nodes(&data).is_empty());
}

/// The states (as `ps` tells them) of all processes that were started with a configuration in this folder.
fn states_of_nodes(folder: &Path) -> Vec<char> {
    let folder = folder.to_string_lossy().into_owned();
    let processes = fs::read_dir("/proc").expect("this test needs Linux");
    let of_folder = processes.filter_map(|entry| {
        let path = entry.ok()?.path();
        let command = fs::read(path.join("cmdline")).ok()?;
        let command = String::from_utf8_lossy(&command).into_owned();
        if !command.contains("--config") || !command.contains(&folder) {
            return None;
        }
        let stat = fs::read_to_string(path.join("stat")).ok()?;
        stat.rsplit_once(") ")?.1.chars().next()
    });
    of_folder.collect()
}

fn wait(what: &str, mut holds: impl FnMut() -> bool) {
    let began = Instant::now();
    while !holds() {
        assert!(began.elapsed() < Duration::from_secs(90), "waited in vain: {what}");
        std::thread::sleep(Duration::from_millis(50));
    }
}
