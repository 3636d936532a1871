//! `verdict bench` on real processes: that its figures mean what they say. How large they are says nothing here.

use std::{fs, process::Output, time::Duration};

use serde_json::Value as Json;
use verdict_tests::cluster::run_to_end;

/// A bench of these sizes ends so soon, even on a loaded machine.
const BENCH_WITHIN: Duration = Duration::from_secs(240);

fn told(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
}

fn number(json: &Json, name: &str) -> f64 {
    json[name].as_f64().unwrap_or_else(|| panic!("{name} is no number in {json}"))
}

fn case<'a>(report: &'a Json, name: &str) -> &'a Json {
    let cases = report["cases"].as_array().expect("cases");
    cases.iter().find(|case| case["case"] == name).unwrap_or_else(|| panic!("no case {name}"))
}

#[test]
fn a_quick_bench_counts_what_was_committed_and_what_it_took() {
    let folder = tempfile::tempdir().expect("make a folder");
    let path = |name: &str| folder.path().join(name).to_string_lossy().into_owned();
    let (json, html) = (path("report.json"), path("report.html"));
    let names =
        ["unary-3", "stream-1", "hot-stream", "one-shard", "independent", "skewed", "open-100", "shards-4"];
    let cases = names.join(",");
    let settings = ["--quick", "--seconds", "0.6", "--repeat", "2", "--accounts", "400", "--window", "32"];
    let output = run_to_end(
        &[&["bench", "--case", &cases, "--json", &json, "--html", &html], &settings[..]].concat(),
        BENCH_WITHIN,
    );
    println!("{}", told(&output));
    assert_eq!(output.status.code(), Some(0), "the bench failed");

    let report: Json =
        serde_json::from_str(&fs::read_to_string(&json).expect("a JSON report")).expect("JSON");
    assert_eq!((report["format"].as_u64(), report["is_debug_build"].as_bool()), (Some(2), Some(true)));
    assert!(told(&output).contains("DEBUG BUILD"), "a debug build must say that its figures mean nothing");
    let floor = &report["floor"];
    let parts = 2.0 * number(floor, "fdatasync_p50_ms") + 4.0 * number(floor, "round_trip_p50_ms");
    assert!((number(floor, "floor_ms") - parts).abs() < 1e-9 && parts > 0.0, "{floor}");

    let order: Vec<&str> =
        report["cases"].as_array().expect("cases").iter().filter_map(|case| case["case"].as_str()).collect();
    assert_eq!(order, names, "in the order in which they were named");
    for name in names {
        let case = case(&report, name);
        let rate = &case["trades_per_second"];
        assert!(number(rate, "min") > 0.0 && number(rate, "min") <= number(rate, "median"), "{name}: {rate}");
        assert!(number(rate, "median") <= number(rate, "max"), "{name}: {rate}");
        let quantiles = ["p50_ms", "p99_ms", "p999_ms", "max_ms"].map(|quantile| number(case, quantile));
        assert!(quantiles[0] > 0.0 && quantiles.is_sorted(), "{name}: {quantiles:?}");
        // The histogram keeps three digits.
        let least = number(floor, "fdatasync_p50_ms") / 10.0;
        assert!(quantiles[0] > least, "{name}: nothing is committed sooner than synced");
        for cost in ["cpu_us_per_trade", "syncs_per_trade", "bytes_written_per_trade", "messages_per_trade"] {
            assert!(number(case, cost) > 0.0, "{name}: {cost}");
        }
        // Three nodes, none of them for nothing.
        let by_node = case["cpu_us_per_trade_by_node"].as_object().expect("figures by node");
        assert_eq!(by_node.len(), 3, "{name}");
        let rounds = case["rounds"].as_array().expect("rounds");
        assert_eq!(rounds.len(), 2);
        for round in rounds {
            let per_second = number(round, "trades") / number(round, "seconds");
            assert!((per_second - number(round, "trades_per_second")).abs() < 1e-6 * per_second, "{round}");
        }
        // Nothing is refused for good, nothing aborted, nothing lost; and what was measured was answered.
        let answers = &case["answers"];
        let others = answers["others"].as_object().expect("other answers");
        assert!(others.is_empty(), "{name}: {answers}");
        assert_eq!((answers["given_up"].as_u64(), answers["lost"].as_u64()), (Some(0), Some(0)), "{name}");
        let measured: u64 = rounds.iter().filter_map(|round| round["trades"].as_u64()).sum();
        assert!(answers["committed"].as_u64().is_some_and(|committed| committed >= measured), "{name}");
    }
    // An open loop sends no more than it was told to, whatever the cluster could do.
    let open = number(&case(&report, "open-100")["trades_per_second"], "max");
    assert!(open < 200.0, "{open} of 100 trades a second");

    let clusters = report["clusters"].as_array().expect("clusters");
    let shards: Vec<u64> = clusters.iter().filter_map(|cluster| cluster["shards"].as_u64()).collect();
    assert_eq!(shards, [2, 4]);
    for cluster in clusters {
        let books = &cluster["books"];
        assert_eq!(
            (books["balances"].as_u64(), books["is_all"].as_bool()),
            (Some(400), Some(true)),
            "{books}"
        );
        assert_eq!(books["doubtful"].as_u64(), Some(0), "{books}");
        assert!(books["records"].as_u64().is_some_and(|records| records > 10), "{books}");
        assert_eq!(books["wrong_count"].as_u64(), Some(0), "{books}");
    }
    let page = fs::read_to_string(&html).expect("an HTML report");
    assert!(page.contains("hot-stream") && page.contains("<svg") && !page.contains("http"));
}

#[test]
fn an_overload_and_lost_followers_leave_the_books_right() {
    let folder = tempfile::tempdir().expect("make a folder");
    let json = folder.path().join("report.json").to_string_lossy().into_owned();
    let cases = "overload,follower-dead,follower-paused";
    let sizes = ["--overload-seconds", "3", "--accounts", "400", "--window", "64", "--seconds", "2"];
    let start = ["bench", "--quick", "--case", cases, "--json", &json];
    let output = run_to_end(&[&start[..], &sizes[..]].concat(), BENCH_WITHIN);
    println!("{}", told(&output));
    assert_eq!(output.status.code(), Some(0), "the bench failed");
    let report: Json =
        serde_json::from_str(&fs::read_to_string(&json).expect("a JSON report")).expect("JSON");

    let overloaded = case(&report, "overload");
    let overload = &overloaded["overload"];
    // One round: the median is the figure.
    let figure = |name: &str| number(&overload[name], "median");
    let (peak, offered) = (figure("peak_per_second"), figure("offered_per_second"));
    assert!(peak > 0.0 && (offered / peak - 3.0).abs() < 1e-9, "{overload}");
    let goodput = figure("goodput_by_peak");
    assert!(goodput > 0.0 && (goodput - figure("goodput_per_second") / peak).abs() < 1e-9, "{overload}");
    let recovery = &overload["recovery_seconds"];
    assert!(recovery["median"].is_number() || recovery.is_null(), "{overload}");

    for name in ["follower-dead", "follower-paused"] {
        let follower = &case(&report, name)["follower"];
        assert!(number(&follower["throughput_by_whole"], "median") > 0.0, "{name}: {follower}");
    }
    let books = &report["clusters"][0]["books"];
    let looked_at = ["balances", "doubtful"].map(|name| books[name].as_u64().expect("a count"));
    assert_eq!((books["wrong_count"].as_u64(), looked_at.iter().sum::<u64>()), (Some(0), 400), "{books}");
    assert!(books["records"].as_u64().is_some_and(|records| records > 10), "{books}");
}

#[test]
fn what_can_t_be_measured_is_told_and_exit_status_2() {
    let cases: [(&[&str], &str); 5] = [
        (&["--case", "unary-1,nonsense"], "there is no case \"nonsense\""),
        (&["--case", "stream-x"], "\"x\" is no number"),
        (&["--case", "shards-4", "--connect", "127.0.0.1:1"], "needs a cluster of its own"),
        (
            &["--connect", "127.0.0.1:1", "--case", "unary-1"],
            "no connection to 127.0.0.1:1 (nobody listens there)",
        ),
        (
            &["--accounts", "200", "--shards", "64", "--case", "unary-1"],
            "200 accounts are too few for 64 shards",
        ),
    ];
    for (arguments, expected) in cases {
        let output = run_to_end(&[&["bench"], arguments].concat(), BENCH_WITHIN);
        let told = told(&output);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {told}");
        assert!(told.contains(expected), "{arguments:?}: {told}");
    }
    let output = run_to_end(&["bench", "--list"], BENCH_WITHIN);
    assert_eq!(output.status.code(), Some(0));
    assert!(told(&output).contains("follower-paused"));
}
