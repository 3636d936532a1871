//! Judges a record: the figures of the report, and a verdict on each promise. Pure: all that it knows is the record.

use std::collections::{BTreeMap, BTreeSet};

use verdict_client::AbortReason;

use super::{
    record::{Attempt, Doubt, Event, EventKind, Kind, Record, Said},
    report::{Check, EventReport, LoadReport, Outcomes, Promise, Report, Series},
};
use crate::settle::reason_name;

/// "Within seconds": so long after a majority is back everything must be resolved, and commits go on.
pub const RESOLVED_WITHIN_SECONDS: f64 = 10.0;
/// A participant that is away for at least so long must not stop the others.
const AWAY_MIN_SECONDS: f64 = 1.0;
/// A stretch without commits that is shorter is none, nor is one that is not longer than so many usual ones.
const PAUSE_MIN_SECONDS: f64 = 0.1;
const PAUSE_MIN_USUAL: f64 = 3.0;
/// A stretch without commits that begins so long after an event, or later, doesn't come from it.
const BEGINS_WITHIN_SECONDS: f64 = 3.0;
/// What a node said is forgotten after so long: it may be dead.
const SAMPLE_SECONDS: f64 = 1.0;
/// The plots have about so many steps.
const STEPS: f64 = 160.0;
/// The shortest step, in seconds.
const STEP_MIN_SECONDS: f64 = 0.1;

/// Fills in all that follows from the record.
pub fn evaluate(record: &Record, report: Report) -> Report {
    let promises = vec![
        atomic(record),
        decided_once(record),
        exactly_once(record),
        durable(record),
        isolated(record),
        honest(record),
        never_short(record),
        not_blocked(record),
        bounded(record),
        deterministic(record),
    ];
    let held = promises.iter().all(|promise| promise.checks.iter().all(|check| check.wrong == 0));
    let events = record.events.iter().enumerate().map(|(place, _)| event_report(record, place)).collect();
    let load = load_report(record, report.load);
    Report { held, load, events, promises, series: series(record), ..report }
}

// --- Figures ---

fn load_report(record: &Record, given: LoadReport) -> LoadReport {
    let outcomes = outcomes(record.batches.iter());
    let latencies = latencies(record.batches.iter());
    LoadReport {
        seconds: record.load_seconds,
        rate: record.rate,
        window: record.window,
        batches: record.batches.len() as u64,
        per_second: outcomes.committed as f64 / record.load_seconds.max(1e-9),
        outcomes,
        p50_ms: quantile(&latencies, 0.5).unwrap_or_default(),
        p99_ms: quantile(&latencies, 0.99).unwrap_or_default(),
        max_ms: latencies.last().copied().unwrap_or_default(),
        reads: record.reads.len() as u64,
        reads_unanswered: record.reads_unanswered,
        memory_max: record.samples.iter().filter_map(|sample| sample.memory).max(),
        quiet_seconds: record.audit.quiet_seconds,
        ..given
    }
}

fn outcomes<'a>(batches: impl Iterator<Item = &'a Attempt>) -> Outcomes {
    let mut outcomes = Outcomes::default();
    for batch in batches {
        let end = batch.end().map(|end| &end.said);
        match end {
            Some(Said::Committed(_)) => outcomes.committed += 1,
            Some(Said::Aborted(reason)) => {
                *outcomes.aborted.entry(reason_name(*reason).to_owned()).or_default() += 1;
            }
            Some(_) | None => outcomes.unresolved += 1,
        }
        for answer in &batch.answers {
            outcomes.answers_lost += u64::from(answer.lost);
            outcomes.refused += u64::from(answer.said == Said::Refused);
        }
        if batch.was_unknown() {
            outcomes.unknown += 1;
            outcomes.unknown_committed += u64::from(matches!(end, Some(Said::Committed(_))));
            outcomes.unknown_aborted += u64::from(matches!(end, Some(Said::Aborted(_))));
            let never_seen = batch.answers.iter().any(|answer| answer.said == Said::NotSeen);
            outcomes.unknown_never_seen += u64::from(never_seen);
        }
    }
    outcomes
}

/// From when a batch was due to its definite answer, in milliseconds, in order.
fn latencies<'a>(batches: impl Iterator<Item = &'a Attempt>) -> Vec<f64> {
    let mut latencies: Vec<f64> =
        batches.filter_map(|batch| Some((batch.end()?.at - batch.due) * 1000.0)).collect();
    latencies.sort_by(f64::total_cmp);
    latencies
}

/// A quantile of what is in order: the smallest that at least this share doesn't exceed.
fn quantile(ordered: &[f64], share: f64) -> Option<f64> {
    let place = (ordered.len() as f64 * share).ceil() as usize;
    ordered.get(place.max(1) - 1).copied()
}

fn series(record: &Record) -> Series {
    let span = record.load_seconds.max(1.0);
    let step = ((span / STEPS / STEP_MIN_SECONDS).ceil() * STEP_MIN_SECONDS).max(STEP_MIN_SECONDS);
    let count = (span / step).ceil() as usize;
    let place = |at: f64| Some((at.max(0.0) / step) as usize).filter(|place| *place < count);
    let mut series = Series {
        step_seconds: step,
        committed: vec![0; count],
        aborted: vec![0; count],
        unknown: vec![0; count],
        p50_ms: Vec::new(),
        p99_ms: Vec::new(),
        parts: vec![None; count],
    };
    let mut by_step: Vec<Vec<&Attempt>> = vec![Vec::new(); count];
    for batch in &record.batches {
        if let Some(end) = batch.end()
            && let Some(place) = place(end.at)
        {
            by_step[place].push(batch);
            let counts = if batch.stamp().is_some() { &mut series.committed } else { &mut series.aborted };
            counts[place] += 1;
        }
        for answer in batch.answers.iter().filter(|answer| answer.said == Said::Unknown) {
            if let Some(place) = place(answer.at) {
                series.unknown[place] += 1;
            }
        }
    }
    for batches in by_step {
        let latencies = latencies(batches.into_iter());
        series.p50_ms.push(quantile(&latencies, 0.5));
        series.p99_ms.push(quantile(&latencies, 0.99));
    }
    // Each node tells of what it leads; one step may hold several samples of each.
    let mut latest: BTreeMap<u64, (f64, u32)> = BTreeMap::new();
    let mut samples: Vec<_> = record.samples.iter().collect();
    samples.sort_by(|one, other| one.at.total_cmp(&other.at));
    for sample in samples {
        latest.insert(sample.node, (sample.at, sample.in_doubt + sample.waiting));
        if let Some(place) = place(sample.at) {
            let told = latest.values().filter(|(at, _)| sample.at - at <= SAMPLE_SECONDS);
            let sum = told.map(|(_, parts)| parts).sum();
            series.parts[place] = Some(series.parts[place].unwrap_or_default().max(sum));
        }
    }
    series
}

fn event_report(record: &Record, place: usize) -> EventReport {
    let event = &record.events[place];
    let until = next_event(record, place).map_or(f64::INFINITY, |next| next.at);
    let begins_until = until.min(event.done + BEGINS_WITHIN_SECONDS);
    let pause = longest_pause(&commit_times(record), event.at, begins_until, record.load_seconds);
    let resolved = resolved_at(record, event, &pause);
    let majority = majority_at(record, place);
    let ended = record
        .batches
        .iter()
        .filter(|batch| batch.end().is_some_and(|end| (event.at..until).contains(&end.at)));
    EventReport {
        at: event.at,
        done_at: event.done,
        step: event.step.clone(),
        what: event.what.clone(),
        kind: match event.kind {
            EventKind::Fault { .. } => "fault",
            EventKind::Repair => "repair",
            EventKind::Wait => "wait",
        }
        .to_owned(),
        impaired: event.impaired.iter().copied().collect(),
        without_majority: without_majority(record, place),
        without_commits_seconds: pause.seconds,
        commits_again_at: pause.end,
        resolved_seconds: resolved.map(|at| at - event.at),
        resolved_after_majority_seconds: resolved
            .zip(majority)
            .map(|(resolved, majority)| (resolved - majority.max(event.at)).max(0.0)),
        outcomes: outcomes(ended),
    }
}

/// The next event that does something.
fn next_event(record: &Record, place: usize) -> Option<&Event> {
    record.events[place + 1..].iter().find(|event| event.kind != EventKind::Wait)
}

fn commit_times(record: &Record) -> Vec<f64> {
    let committed = record.batches.iter().filter(|batch| batch.stamp().is_some());
    let mut times: Vec<f64> = committed.filter_map(|batch| Some(batch.end()?.at)).collect();
    times.sort_by(f64::total_cmp);
    times
}

/// A stretch without commits.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Pause {
    seconds: f64,
    /// None: there was none after it while the load ran.
    end: Option<f64>,
}

/// The longest stretch between two commits that touches the time `from..until`, counted from `from` on. After the load there is
/// none to tell of.
fn longest_pause(commits: &[f64], from: f64, until: f64, load_end: f64) -> Pause {
    if from >= load_end {
        return Pause { seconds: 0.0, end: None };
    }
    let first_after = commits.partition_point(|at| *at <= from);
    let mut longest = Pause { seconds: 0.0, end: Some(from) };
    let mut begin = from;
    for at in &commits[first_after..] {
        if begin >= until {
            return longest;
        }
        if at - begin > longest.seconds {
            longest = Pause { seconds: at - begin, end: Some(*at) };
        }
        begin = *at;
    }
    if begin < until && load_end - begin > longest.seconds {
        longest = Pause { seconds: load_end - begin, end: None };
    }
    longest
}

/// When nothing was in doubt any more that was so before commits went on.
fn resolved_at(record: &Record, event: &Event, pause: &Pause) -> Option<f64> {
    let usual = record.load_seconds / commit_times(record).len().max(1) as f64;
    let cutoff = match pause.end {
        Some(end) if pause.seconds >= PAUSE_MIN_SECONDS.max(PAUSE_MIN_USUAL * usual) => end,
        Some(_) => event.at,
        None => return None,
    };
    let clear = |doubt: &&Doubt| doubt.complete && doubt.since.iter().all(|since| *since > cutoff);
    record.doubts.iter().filter(|doubt| doubt.at >= cutoff).find(clear).map(|doubt| doubt.at)
}

/// The groups that have no majority after an event.
fn without_majority(record: &Record, place: usize) -> Vec<u32> {
    let done = &record.events[..=place];
    let replaced: BTreeMap<u64, u64> = done.iter().filter_map(|event| event.replaced).collect();
    // A new node may have been replaced in its turn.
    let now = |node: &u64| std::iter::successors(Some(*node), |node| replaced.get(node).copied()).last();
    let lost = record.replicas.iter().filter(|(_, nodes)| {
        let up = nodes.iter().filter_map(now).filter(|node| !done[place].impaired.contains(node)).count();
        2 * up <= nodes.len()
    });
    lost.map(|(group, _)| *group).collect()
}

/// When, after an event, every group had a majority (again).
fn majority_at(record: &Record, place: usize) -> Option<f64> {
    let has_majority = |place: usize| without_majority(record, place).is_empty();
    // A repair takes nothing away: a majority that was there before it is there while it is done.
    let event = &record.events[place];
    let was_there = place.checked_sub(1).is_none_or(has_majority);
    if event.kind == EventKind::Repair && was_there && has_majority(place) {
        return Some(event.at);
    }
    (place..record.events.len()).find(|place| has_majority(*place)).map(|place| record.events[place].done)
}

// --- Promises ---

fn atomic(record: &Record) -> Promise {
    let audit = &record.audit;
    let mut records = Check::new("each committed batch has left its record, and no aborted one has");
    for (batch, exists) in record.batches.iter().zip(&audit.records) {
        if batch.end().is_some() {
            let committed = batch.stamp().is_some();
            records.see(committed == *exists, || {
                format!("{} is {}, its record {}", batch.id, word(committed), exists_word(*exists))
            });
        }
    }
    let mut expected = record.initial.clone();
    for batch in record.batches.iter().filter(|batch| batch.stamp().is_some()) {
        for (account, delta) in &batch.deltas {
            expected[*account] += delta;
        }
    }
    let mut balances = Check::new("each balance is what the committed batches come to, to the last unit");
    let rows = record.accounts.iter().zip(&expected).zip(&audit.balances);
    for ((row, expected), found) in rows {
        balances.see(expected == found, || {
            format!("{}#{} should be {expected} and is {found}", row.partition, row.name)
        });
    }
    let mut sums = Check::new("no unit of any asset was made or lost");
    let (before, after) = (sums_of(record, &record.initial), sums_of(record, &audit.balances));
    for (asset, sum) in &before {
        let now = after.get(asset).copied().unwrap_or_default();
        sums.see(now == *sum, || format!("{asset}: {sum} before, {now} after"));
    }
    let says = "Every operation of a batch takes effect, or none does.";
    Promise::new("G1", "Atomic", says, vec![records, balances, sums], Vec::new())
}

fn decided_once(record: &Record) -> Promise {
    let mut asked =
        Check::new("each node, asked for each id afterwards, tells the outcome that was answered");
    for (node, number, said) in record.audit.asked.iter().filter(|(_, _, said)| said.is_answer()) {
        compare(&mut asked, record, *number, said, &format!("node {node}"));
    }
    let mut log = Check::new("the log holds one decision for each answered id, the one that was answered");
    let mut decided: BTreeMap<usize, u64> = BTreeMap::new();
    for (number, said) in &record.audit.decisions {
        *decided.entry(*number).or_default() += 1;
        compare(&mut log, record, *number, said, "the log");
    }
    let answered = record.batches.iter().enumerate().filter(|(_, batch)| batch.end().is_some());
    for (number, batch) in answered.filter(|_| record.audit.decisions_complete) {
        let count = decided.get(&number).copied().unwrap_or_default();
        if count != 1 {
            log.see(false, || format!("{} has {count} decisions in the log", batch.id));
        }
    }
    let mut notes = Vec::new();
    if !record.audit.decisions_complete {
        notes.push("the log holds too many decisions to look at all of them".to_owned());
    }
    let says = "The decision of an id never changes.";
    Promise::new("G2", "Decided once", says, vec![asked, log], notes)
}

fn exactly_once(record: &Record) -> Promise {
    let audit = &record.audit;
    let mut during = Check::new("submitted again under the same id while the load ran: the same answer");
    for repeat in record.repeats.iter().filter(|repeat| repeat.said.is_answer()) {
        compare(&mut during, record, repeat.number, &repeat.said, "submitted again");
    }
    let mut after = Check::new("submitted again under the same id afterwards: the same answer");
    for (number, said) in audit.again.iter().filter(|(_, said)| said.is_answer()) {
        compare(&mut after, record, *number, said, "submitted again");
    }
    let mut history = Check::new("the fee account's history has each committed trade once, and nothing else");
    let fee_of = |batch: &Attempt| batch.deltas.last().map(|(_, delta)| *delta);
    let mut expected: BTreeMap<_, _> = record
        .batches
        .iter()
        .filter(|batch| batch.stamp().is_some())
        .filter_map(|batch| Some((batch.id, fee_of(batch).filter(|fee| *fee != 0)?)))
        .collect();
    for (id, amount) in audit.fees.iter().flatten() {
        let met = expected.remove(id);
        history.see(met == Some(*amount), || match met {
            Some(fee) => format!("{id} paid {amount} instead of {fee}"),
            None => format!("{id} stands there again, or without having been committed"),
        });
    }
    for (id, fee) in expected.into_iter().filter(|_| audit.fees.is_some()) {
        history.see(false, || format!("{id} is committed, and its fee of {fee} isn't there"));
    }
    let mut other = Check::new("a known id with other contents is refused");
    for said in audit.other_contents.iter().filter(|said| said.is_answer()) {
        other.see(matches!(said, Said::Denied(error) if error.contains("other contents")), || {
            format!("{said:?}")
        });
    }
    let mut old = Check::new("an id from before the horizon is refused");
    for said in audit.too_old.iter().filter(|said| said.is_answer()) {
        old.see(matches!(said, Said::Denied(error) if error.contains("too old")), || format!("{said:?}"));
    }
    let mut notes = Vec::new();
    if audit.too_old.is_none() {
        notes.push("ids that are too old: the cluster is young and remembers all".to_owned());
    }
    let says = "An id takes effect at most once, however often and wherever it is submitted.";
    Promise::new("G3", "Exactly once", says, vec![during, after, history, other, old], notes)
}

fn durable(record: &Record) -> Promise {
    let deaths: Vec<&Event> =
        record.events.iter().filter(|event| event.kind == (EventKind::Fault { kills: true })).collect();
    let last = deaths.iter().map(|event| event.at).fold(f64::NEG_INFINITY, f64::max);
    let mut stands =
        Check::new("outcomes that were answered before a process died stand afterwards, at each node");
    for (node, number, said) in record.audit.asked.iter().filter(|(_, _, said)| said.is_answer()) {
        let before = record.batches[*number].end().is_some_and(|end| end.at <= last);
        if before {
            compare(&mut stands, record, *number, said, &format!("node {node}"));
        }
    }
    let disks_lost = record.events.iter().filter(|event| event.replaced.is_some()).count();
    let disks = match disks_lost {
        0 => "no disk was lost".to_owned(),
        1 => "one disk was lost for good".to_owned(),
        count => format!("{count} disks were lost for good"),
    };
    let mut notes = Vec::new();
    match deaths.is_empty() {
        true => notes.push("no process died in this scenario".to_owned()),
        false => notes.push(format!(
            "processes died; power was not cut, so what the system had taken it kept, and {disks}"
        )),
    }
    let says = "What was answered survives the loss of power of all, and of a minority for good.";
    Promise::new("G4", "Durable", says, vec![stands], notes)
}

fn isolated(record: &Record) -> Promise {
    let mut whole =
        Check::new("each read of all balances is the state at its position: whole batches, in one order");
    let mut sums = Check::new("each read adds up");
    let mut fresh = Check::new("no read is older than what was answered before it was asked");
    let total = sums_of(record, &record.initial);
    let mut committed: Vec<(u64, &Attempt)> =
        record.batches.iter().filter_map(|batch| Some((batch.stamp()?, batch))).collect();
    committed.sort_by_key(|(stamp, _)| *stamp);
    let mut reads: Vec<_> = record.reads.iter().collect();
    reads.sort_by_key(|read| read.position);
    let mut state = record.initial.clone();
    let mut applied = 0;
    for read in reads {
        while applied < committed.len() && committed[applied].0 <= read.position {
            for (account, delta) in &committed[applied].1.deltas {
                state[*account] += delta;
            }
            applied += 1;
        }
        whole.see(state == read.balances, || {
            let differ = state.iter().zip(&read.balances).position(|(one, other)| one != other);
            let place = differ.unwrap_or_default();
            format!(
                "at position {} {}#{} should be {} and was read as {}",
                read.position,
                record.accounts[place].partition,
                record.accounts[place].name,
                state[place],
                read.balances[place]
            )
        });
        sums.see(sums_of(record, &read.balances) == total, || {
            format!("at position {}: {:?}", read.position, sums_of(record, &read.balances))
        });
        fresh.see(read.position >= read.answered, || {
            format!("position {} though {} had been answered before", read.position, read.answered)
        });
    }
    let mut order = Check::new("a batch that was sent after another was answered has a greater stamp");
    let mut by_end: Vec<(f64, u64)> =
        committed.iter().filter_map(|(stamp, batch)| Some((batch.end()?.at, *stamp))).collect();
    by_end.sort_by(|one, other| one.0.total_cmp(&other.0));
    let mut by_sent = committed.clone();
    by_sent.sort_by(|one, other| one.1.sent.total_cmp(&other.1.sent));
    let (mut place, mut greatest) = (0, 0);
    for (stamp, batch) in by_sent {
        while place < by_end.len() && by_end[place].0 < batch.sent {
            greatest = greatest.max(by_end[place].1);
            place += 1;
        }
        order.see(stamp > greatest, || {
            format!("{} has stamp {stamp}, and {greatest} was answered before", batch.id)
        });
    }
    let mut unique = Check::new("no two batches have the same stamp");
    for pair in committed.windows(2) {
        let same = pair[0].0 == pair[1].0;
        unique.see(!same, || format!("{} and {} have stamp {}", pair[0].1.id, pair[1].1.id, pair[0].0));
    }
    let says = "Batches and reads are strictly serializable, across shards.";
    Promise::new("G5", "Isolated", says, vec![whole, sums, fresh, order, unique], Vec::new())
}

fn honest(record: &Record) -> Promise {
    let mut resolved = Check::new("each UNKNOWN answer was resolved by its id");
    for batch in record.batches.iter().filter(|batch| batch.was_unknown()) {
        resolved.see(batch.end().is_some(), || format!("{} is still unknown", batch.id));
    }
    let mut definite = Check::new("each batch came to a definite outcome");
    let mut rejections = Check::new("no trade was rejected for want of funds: each had them in any order");
    let mut overdrafts = Check::new("each overdraft was refused");
    for batch in &record.batches {
        let end = batch.end().map(|end| &end.said);
        definite.see(end.is_some(), || format!("{}: {:?}", batch.id, batch.answers.last()));
        match (batch.kind, end) {
            (Kind::Trade, Some(Said::Aborted(reason))) => {
                rejections
                    .see(!is_about_values(*reason), || format!("{}: {}", batch.id, reason_name(*reason)));
            }
            (Kind::Trade, _) => rejections.see(true, String::new),
            (Kind::Overdraft, Some(said)) => {
                overdrafts.see(matches!(said, Said::Aborted(_)), || format!("{} is committed", batch.id));
            }
            (Kind::Overdraft, None) => {}
        }
    }
    let mut notes = Vec::new();
    if resolved.checked == 0 {
        notes.push("no answer was UNKNOWN in this run".to_owned());
    }
    let says = "COMMITTED, ABORTED and UNKNOWN are told truly; a rejection rests on nothing undecided.";
    Promise::new("G6", "Honest", says, vec![definite, resolved, rejections, overdrafts], notes)
}

fn never_short(record: &Record) -> Promise {
    let mut last = Check::new("no balance is below 0 in the end");
    let mut during = Check::new("no balance was below 0 in any read");
    let names =
        |place: usize| format!("{}#{}", record.accounts[place].partition, record.accounts[place].name);
    for (place, balance) in bounded_balances(record, &record.audit.balances) {
        last.see(balance >= 0, || format!("{} is {balance}", names(place)));
    }
    for read in &record.reads {
        for (place, balance) in bounded_balances(record, &read.balances) {
            during
                .see(balance >= 0, || format!("{} is {balance} at position {}", names(place), read.position));
        }
    }
    let says = "A balance with a floor never goes below it.";
    Promise::new("G7", "Never short", says, vec![last, during], Vec::new())
}

fn not_blocked(record: &Record) -> Promise {
    let within = RESOLVED_WITHIN_SECONDS;
    let mut again =
        Check::new(format!("with a majority of each group up, no {within:.0} s pass without a commit"));
    let mut resolved =
        Check::new(format!("what was in doubt is resolved within {within:.0} s of a majority being up"));
    let (mut notes, commits) = (Vec::new(), commit_times(record));
    for (place, event) in record.events.iter().enumerate().filter(|(_, event)| event.kind != EventKind::Wait)
    {
        let Some(majority) = majority_at(record, place) else { continue };
        if majority >= record.load_seconds {
            notes.push(format!(
                "not judged: {:?} at {:.1} s, with a majority from {majority:.1} s on; the load had ended at {:.1} s",
                event.step, event.at, record.load_seconds
            ));
            continue;
        }
        let report = event_report(record, place);
        let until = next_event(record, place).map_or(f64::INFINITY, |next| next.at);
        let pause = longest_pause(&commits, majority, until, record.load_seconds);
        // Nothing is known of a time after the load.
        if pause.end.is_none() && pause.seconds < within {
            notes.push(format!("the load ended too soon after {:?} to tell", event.step));
            continue;
        }
        again.see(pause.seconds <= within, || {
            format!("{}: {:.1} s without commits", event.what, pause.seconds)
        });
        let after = report.resolved_after_majority_seconds;
        resolved.see(after.is_some_and(|seconds| seconds <= within), || match after {
            Some(seconds) => format!("{}: after {seconds:.1} s", event.what),
            None => format!("{}: never seen", event.what),
        });
    }
    let mut able = Check::new("no node ended by itself, all took part again, and all answered afterwards");
    let unanswered = unanswered(record);
    let troubles = record.events.iter().flat_map(|event| &event.troubles);
    let troubles = troubles.chain(&record.audit.troubles).chain(&unanswered);
    for trouble in troubles {
        able.see(false, || trouble.clone());
    }
    able.checked = able.checked.max(record.events.len() as u64);
    let mut quiet = Check::new("in the end nothing is in doubt, no row is held, every decision is confirmed");
    quiet.see(record.audit.not_quiet.is_none(), || record.audit.not_quiet.clone().unwrap_or_default());
    let says = "With a majority of each group up, all that is in doubt is resolved within seconds.";
    Promise::new("G8", "Not blocked", says, vec![again, resolved, able, quiet], notes)
}

fn bounded(record: &Record) -> Promise {
    let parts_max = record.window as u64 * record.replicas.len().max(1) as u64;
    let mut parts =
        Check::new(format!("shards held no more parts than batches were in flight ({parts_max})"));
    for sample in &record.samples {
        let held = u64::from(sample.in_doubt) + u64::from(sample.waiting);
        parts.see(held <= parts_max, || format!("node {} held {held} at {:.1} s", sample.node, sample.at));
    }
    let mut others = Check::new("while a shard was away, batches that don't touch it were committed");
    for (from, until, shard) in shards_away(record) {
        let (mut sent, mut commits) = (0, 0);
        let within = |at: f64| (from..until).contains(&at);
        for batch in record.batches.iter().filter(|batch| !batch.shards.contains(&shard)) {
            sent += u64::from(within(batch.sent));
            commits += u64::from(batch.stamp().is_some() && batch.end().is_some_and(|end| within(end.at)));
        }
        // Where each batch touches that shard, nothing can go on.
        if sent > 0 {
            others.see(commits > 0, || {
                format!("none of {sent} in {:.1} s without shard {shard}", until - from)
            });
        }
    }
    let mut notes = Vec::new();
    if others.checked == 0 {
        notes.push("others go on: no shard that some batches don't touch was without a majority, while the coordinator had one".to_owned());
    }
    if let Some(memory) = record.samples.iter().filter_map(|sample| sample.memory).max() {
        notes.push(format!("the largest process took {} MiB", memory >> 20));
    }
    let says = "Memory, queues and tables are bounded; one participant that is down stops no others.";
    Promise::new("G9", "Bounded", says, vec![parts, others], notes)
}

fn deterministic(record: &Record) -> Promise {
    let mut equal = Check::new("replicas that showed a hash at the same index showed the same one");
    for ((group, index), shown) in &record.hashes {
        let nodes: BTreeSet<u64> = shown.values().flatten().copied().collect();
        if nodes.len() > 1 || shown.len() > 1 {
            equal.see(shown.len() == 1, || format!("group {group} at {index}: {shown:?}"));
        }
    }
    let mut last = Check::new("in the end all replicas of each group are equal at the same index");
    let mut notes = Vec::new();
    match record.audit.equal {
        Some(equal) => last.see(equal, || "they differ: see verdict ctl status".to_owned()),
        None => notes.push("in the end the replicas were not at one index".to_owned()),
    }
    let says = "Two replicas that have applied the same index hold the same state.";
    Promise::new("G10", "Deterministic", says, vec![equal, last], notes)
}

/// The stretches in which one shard had no majority while the coordinator and another shard had: from, until, shard.
fn shards_away(record: &Record) -> Vec<(f64, f64, u32)> {
    let mut away = Vec::new();
    for (place, event) in record.events.iter().enumerate() {
        let lost = without_majority(record, place);
        let until = record.events[place + 1..].first().map_or(record.load_seconds, |next| next.at);
        let others_go_on = !lost.contains(&0) && lost.len() + 1 < record.replicas.len();
        if others_go_on && until - event.done >= AWAY_MIN_SECONDS {
            away.extend(lost.into_iter().map(|shard| (event.done, until, shard)));
        }
    }
    away
}

/// What had no answer afterwards, a line for each that was asked. That breaks no promise about an id.
fn unanswered(record: &Record) -> Vec<String> {
    let audit = &record.audit;
    let asked = audit.asked.iter().map(|(node, _, said)| (Some(*node), said));
    let again = audit.again.iter().map(|(_, said)| (None, said));
    let wrong = audit.other_contents.iter().chain(&audit.too_old).map(|said| (None, said));
    let mut missing: BTreeMap<Option<u64>, Vec<&Said>> = BTreeMap::new();
    for (node, said) in asked.chain(again).chain(wrong).filter(|(_, said)| !said.is_answer()) {
        missing.entry(node).or_default().push(said);
    }
    let lines = missing.into_iter().map(|(node, said)| {
        let what = match node {
            Some(node) => format!("ids that node {node} was asked for"),
            None => "submits afterwards".to_owned(),
        };
        format!("{} {what} had no answer, though tried again: {:?}", said.len(), said[0])
    });
    lines.collect()
}

/// Compares what is said about a batch with its answer. One that has no definite answer can't be contradicted.
fn compare(check: &mut Check, record: &Record, number: usize, said: &Said, who: &str) {
    let Some(batch) = record.batches.get(number) else { return };
    if let Some(end) = batch.end() {
        check.see(end.said == *said, || format!("{} was {:?}; {who} says {said:?}", batch.id, end.said));
    }
}

fn bounded_balances<'a>(record: &'a Record, balances: &'a [i128]) -> impl Iterator<Item = (usize, i128)> {
    let places = balances.iter().copied().enumerate();
    places.filter(|(place, _)| !record.unbounded.contains(place))
}

/// The sum of each asset.
fn sums_of(record: &Record, balances: &[i128]) -> BTreeMap<String, i128> {
    let mut sums: BTreeMap<String, i128> = BTreeMap::new();
    for (row, balance) in record.accounts.iter().zip(balances) {
        let asset = row.name.split('/').next().unwrap_or_default();
        *sums.entry(asset.to_owned()).or_default() += balance;
    }
    sums
}

/// Whether an abort says something about what the batch met. A trade that has funds and a record of its own meets nothing.
fn is_about_values(reason: AbortReason) -> bool {
    match reason {
        AbortReason::ShortOfFunds
        | AbortReason::AboveCeiling
        | AbortReason::Overflow
        | AbortReason::ConditionNotMet
        | AbortReason::RowExists
        | AbortReason::WrongKind
        | AbortReason::Unspecified => true,
        AbortReason::Contention
        | AbortReason::ParticipantUnavailable
        | AbortReason::Interrupted
        | AbortReason::Cancelled => false,
    }
}

fn word(committed: bool) -> &'static str {
    if committed { "committed" } else { "aborted" }
}

fn exists_word(exists: bool) -> &'static str {
    if exists { "exists" } else { "doesn't exist" }
}

#[cfg(test)]
pub(crate) mod tests {
    use uuid::Uuid;
    use verdict_client::row;

    use super::*;
    use crate::drill::{
        record::{Answer, Asked, Audit, Read, Repeat, Sample},
        report::Verdict,
    };

    fn answer(at: f64, said: Said) -> Answer {
        Answer { at, asked: Asked::Submit, said, lost: 0 }
    }

    /// Ten seconds: 100 trades from a to b with a fee of 1, one overdraft; node 1 of 3 is killed at 4 s, and commits pause until
    /// 5 s. Batch 40 was UNKNOWN at first.
    pub fn example() -> Record {
        let accounts = vec![row("a", "X"), row("b", "X"), row("fees", "X"), row("treasury", "X")];
        let initial = vec![1000, 0, 0, -1000];
        let mut batches = Vec::new();
        for number in 0..100_u64 {
            let due = number as f64 / 10.0;
            let sent = if (4.0..5.0).contains(&due) { 5.0 } else { due };
            let mut answers = vec![answer(sent + 0.05, Said::Committed(number + 1))];
            if number == 40 {
                let resolved = Answer { asked: Asked::GetBatch, ..answers[0].clone() };
                answers = vec![answer(5.02, Said::Unknown), resolved];
            }
            let deltas = vec![(0, -5), (1, 4), (2, 1)];
            let shards = [1 + number as u32 % 2].into();
            let id = Uuid::from_u128(u128::from(number) + 1);
            batches.push(Attempt { id, kind: Kind::Trade, deltas, shards, due, sent, answers });
        }
        batches.push(Attempt {
            id: Uuid::from_u128(1000),
            kind: Kind::Overdraft,
            deltas: vec![(0, -99_999), (1, 99_998), (2, 1)],
            answers: vec![answer(9.99, Said::Aborted(AbortReason::ShortOfFunds))],
            ..batches[99].clone()
        });
        let said: Vec<(usize, Said)> = batches
            .iter()
            .enumerate()
            .map(|(number, batch)| (number, batch.end().unwrap().said.clone()))
            .collect();
        let read = |position: u64, at: f64| {
            let moved = position as i128;
            let balances = vec![1000 - 5 * moved, 4 * moved, moved, -1000];
            Read { from: at, to: at + 0.01, answered: position, position, balances }
        };
        let event = |at, what: &str, kind, impaired: &[u64]| Event {
            at,
            done: at,
            step: what.to_owned(),
            what: what.to_owned(),
            kind,
            impaired: impaired.iter().copied().collect(),
            replaced: None,
            troubles: Vec::new(),
        };
        let doubt = |at, since: &[f64]| Doubt { at, since: since.to_vec(), complete: true };
        let hash =
            |text: &str, nodes: &[u64]| BTreeMap::from([(text.to_owned(), nodes.iter().copied().collect())]);
        Record {
            load_seconds: 10.0,
            window: 16,
            rate: 10,
            unbounded: [3].into(),
            accounts,
            initial,
            repeats: vec![Repeat { number: 7, at: 1.0, said: Said::Committed(8) }],
            reads: vec![read(20, 2.2), read(60, 6.2)],
            reads_unanswered: 1,
            events: vec![
                event(
                    4.0,
                    "kill -9: node 1, which leads coordinator",
                    EventKind::Fault { kills: true },
                    &[1],
                ),
                event(7.0, "start: node 1", EventKind::Repair, &[]),
            ],
            replicas: BTreeMap::from([(0, vec![1, 2, 3]), (1, vec![1, 2, 3]), (2, vec![1, 2, 3])]),
            samples: vec![Sample { at: 3.0, node: 1, in_doubt: 3, ..Sample::default() }],
            doubts: vec![doubt(4.5, &[3.9]), doubt(5.1, &[3.9]), doubt(5.6, &[5.5]), doubt(7.1, &[])],
            hashes: BTreeMap::from([((1, 9), hash("aa", &[1, 2])), ((1, 10), hash("bb", &[3]))]),
            audit: Audit {
                balances: vec![500, 400, 100, -1000],
                asked: (1..=3)
                    .flat_map(|node| said.iter().map(move |(n, said)| (node, *n, said.clone())))
                    .collect(),
                again: said.clone(),
                records: batches.iter().map(|batch| batch.stamp().is_some()).collect(),
                decisions: said,
                decisions_complete: true,
                fees: Some(batches[..100].iter().map(|batch| (batch.id, 1)).collect()),
                other_contents: vec![Said::Denied("the id is known with other contents: no".into())],
                too_old: Some(Said::Denied("too old: it is".into())),
                equal: Some(true),
                ..Audit::default()
            },
            batches,
        }
    }

    pub fn given() -> Report {
        let (title, cluster) = ("The leader is killed".into(), "3 local processes".into());
        Report { scenario: "example".into(), title, cluster, shards: 2, ..Report::default() }
    }

    fn violated(record: &Record) -> Vec<String> {
        let report = evaluate(record, given());
        let violated = report.promises.iter().filter(|promise| promise.verdict == Verdict::Violated);
        let violated: Vec<String> = violated.map(|promise| promise.id.clone()).collect();
        assert_eq!(report.held, violated.is_empty());
        violated
    }

    fn after(tamper: impl FnOnce(&mut Record)) -> Vec<String> {
        let mut record = example();
        tamper(&mut record);
        violated(&record)
    }

    #[test]
    fn a_good_record_keeps_all_promises_and_its_figures_are_right() {
        assert_eq!(violated(&example()), [] as [&str; 0]);
        let report = evaluate(&example(), given());
        let (kill, start) = (&report.events[0], &report.events[1]);
        // The last commit before was at 3.95 s, the next one at 5.05 s.
        assert!((kill.without_commits_seconds - 1.05).abs() < 1e-9, "{kill:?}");
        assert!((kill.resolved_seconds.unwrap() - 1.6).abs() < 1e-9, "{kill:?}");
        assert!(start.without_commits_seconds < 0.11, "{start:?}");
        assert!((start.resolved_seconds.unwrap() - 0.1).abs() < 1e-9, "{start:?}");
        assert_eq!((kill.outcomes.committed, kill.outcomes.unknown), (30, 1));
        let outcomes = &report.load.outcomes;
        assert_eq!(
            (outcomes.committed, outcomes.aborted["SHORT_OF_FUNDS"], outcomes.unknown_committed),
            (100, 1, 1)
        );
        assert_eq!(report.series.committed.iter().sum::<u32>(), 100);
        assert!((report.load.p50_ms - 50.0).abs() < 0.01 && (report.load.max_ms - 1050.0).abs() < 0.01);
        let g9 = &report.promises[8];
        assert!(g9.notes.iter().any(|note| note.contains("others go on")), "{g9:?}");
    }

    #[test]
    fn each_violated_promise_is_found() {
        let committed = |stamp| Said::Committed(stamp);
        let aborted = || Said::Aborted(AbortReason::Interrupted);
        assert_eq!(after(|record| record.audit.records[3] = false), ["G1"]);
        assert_eq!(after(|record| record.audit.records[100] = true), ["G1"]);
        assert_eq!(after(|record| record.audit.balances[1] += 1), ["G1"]);
        // The last outcome was answered after the kill: nobody's death lost it.
        assert_eq!(after(|record| record.audit.asked[99].2 = aborted()), ["G2"]);
        assert_eq!(after(|record| record.audit.asked[5].2 = Said::NotSeen), ["G2", "G4"]);
        assert_eq!(after(|record| record.audit.decisions[5].1 = aborted()), ["G2"]);
        assert_eq!(after(|record| drop(record.audit.decisions.pop())), ["G2"]);
        assert_eq!(after(|record| record.audit.decisions.push((5, committed(6)))), ["G2"]);
        assert_eq!(after(|record| record.repeats[0].said = committed(99)), ["G3"]);
        assert_eq!(after(|record| record.audit.again[8].1 = aborted()), ["G3"]);
        let fees = |record: &mut Record| record.audit.fees.take().unwrap();
        assert_eq!(after(|record| record.audit.fees = Some(fees(record)[..99].to_vec())), ["G3"]);
        let twice = |record: &mut Record| [fees(record), vec![(Uuid::from_u128(5), 1)]].concat();
        assert_eq!(after(|record| record.audit.fees = Some(twice(record))), ["G3"]);
        assert_eq!(after(|record| record.audit.other_contents[0] = committed(8)), ["G3"]);
        assert_eq!(after(|record| record.audit.too_old = Some(aborted())), ["G3"]);
        assert_eq!(after(|record| record.reads[0].position += 1), ["G5"]);
        assert_eq!(after(|record| record.reads[1].answered = 61), ["G5"]);
        assert_eq!(
            after(|record| {
                record.reads[0].balances[0] -= 1;
                record.reads[0].balances[1] += 1;
            }),
            ["G5"]
        );
        assert_eq!(after(|record| record.audit.not_quiet = Some("1 in doubt".into())), ["G8"]);
        assert_eq!(after(|record| record.audit.troubles.push("no answer".into())), ["G8"]);
        assert_eq!(after(|record| record.events[1].troubles.push("not whole".into())), ["G8"]);
        assert_eq!(after(|record| record.audit.equal = Some(false)), ["G10"]);
        assert_eq!(after(|record| record.samples[0].waiting = 999), ["G9"]);
        assert_eq!(
            after(|record| {
                let shown = record.hashes.get_mut(&(1, 10)).unwrap();
                shown.insert("cc".into(), [2].into());
            }),
            ["G10"]
        );
    }

    #[test]
    fn no_answer_contradicts_nothing_and_is_told_where_liveness_is_judged() {
        for said in [Said::Unknown, Said::Refused, Said::Failed("out of order".into())] {
            assert_eq!(after(|record| record.audit.asked[5].2 = said.clone()), ["G8"]);
            assert_eq!(after(|record| record.audit.again[5].1 = said.clone()), ["G8"]);
            assert_eq!(after(|record| record.audit.other_contents[0] = said.clone()), ["G8"]);
            assert_eq!(after(|record| record.audit.too_old = Some(said.clone())), ["G8"]);
            // While the load runs answers get lost.
            assert_eq!(after(|record| record.repeats[0].said = said.clone()), [] as [&str; 0]);
        }
        let mut record = example();
        record.audit.asked[5].2 = Said::Unknown;
        record.audit.asked[6].2 = Said::Refused;
        let report = evaluate(&record, given());
        let told = &report.promises[7].checks[2].examples;
        assert_eq!(*told, ["2 ids that node 1 was asked for had no answer, though tried again: Unknown"]);
        let unread = |record: &mut Record| {
            record.audit.fees = None;
            record.audit.troubles.push("read the history of the fee account: no".into());
        };
        assert_eq!(after(unread), ["G8"]);
        // What is said of the id itself is an answer.
        let denied = || Said::Denied("the id is known with other contents: no".into());
        assert_eq!(after(|record| record.audit.asked[5].2 = denied()), ["G2", "G4"]);
        assert_eq!(after(|record| record.audit.again[5].1 = denied()), ["G3"]);
        assert_eq!(after(|record| record.audit.again[5].1 = Said::NotSeen), ["G3"]);
        assert_eq!(after(|record| record.repeats[0].said = denied()), ["G3"]);
    }

    #[test]
    fn lies_about_one_batch_are_found() {
        // Two batches change their stamps: the later one was sent after the earlier one was answered.
        let swapped = after(|record| {
            let (one, other) =
                (record.batches[10].answers[0].said.clone(), record.batches[50].answers[0].said.clone());
            record.batches[10].answers[0].said = other;
            record.batches[50].answers[0].said = one;
        });
        assert!(swapped.contains(&"G5".to_owned()), "{swapped:?}");
        // A trade that had its funds is told to be short of them, and truly had no effect.
        let short =
            after(|record| record.batches[90].answers[0].said = Said::Aborted(AbortReason::ShortOfFunds));
        assert!(short.contains(&"G6".to_owned()), "{short:?}");
        let unresolved = after(|record| drop(record.batches[40].answers.pop()));
        assert!(unresolved.contains(&"G6".to_owned()), "{unresolved:?}");
        let overdraft = after(|record| record.batches[100].answers[0].said = Said::Committed(200));
        assert!(["G1", "G6"].iter().all(|id| overdraft.contains(&(*id).to_owned())), "{overdraft:?}");
        // A balance was below 0 for a while, though everything adds up.
        let negative = after(|record| record.reads[0].balances[0] = -1);
        assert!(negative.contains(&"G7".to_owned()), "{negative:?}");
    }

    #[test]
    fn slowness_is_found_only_if_there_was_a_majority() {
        // In doubt until after the limit.
        let stuck = |record: &mut Record| {
            record.load_seconds = 30.0;
            record.doubts = vec![Doubt { at: 15.0, since: vec![3.9], complete: true }];
        };
        assert_eq!(after(stuck), ["G8"]);
        // Nobody can be blamed while all nodes are dead.
        let dead = |record: &mut Record| {
            record.load_seconds = 30.0;
            record.events[0].impaired = [1, 2, 3].into();
            record.events[1].at = 20.0;
            record.events[1].done = 20.0;
            for (number, batch) in record.batches.iter_mut().enumerate().filter(|(number, _)| *number >= 40) {
                for answer in &mut batch.answers {
                    answer.at = 21.0 + number as f64 / 100.0;
                }
            }
            record.doubts = vec![Doubt { at: 22.5, since: vec![22.4], complete: true }];
        };
        let mut record = example();
        dead(&mut record);
        assert_eq!(violated(&record), [] as [&str; 0]);
        let report = evaluate(&record, given());
        assert_eq!(report.events[0].without_majority, [0, 1, 2]);
        assert!(report.events[0].without_commits_seconds > 17.0, "{:?}", report.events[0]);
        assert!(report.events[0].resolved_after_majority_seconds.unwrap() < 3.0, "{:?}", report.events[0]);
    }

    #[test]
    fn what_was_done_after_the_load_is_not_judged_and_the_report_says_so() {
        let mut record = example();
        let kill = Event { at: 12.0, done: 12.0, ..record.events[0].clone() };
        let start = Event { at: 25.0, done: 25.0, ..record.events[1].clone() };
        record.events.extend([kill, start]);
        assert_eq!(violated(&record), [] as [&str; 0]);
        let report = evaluate(&record, given());
        let g8 = &report.promises[7];
        let unjudged = g8.notes.iter().filter(|note| note.starts_with("not judged: ")).count();
        assert_eq!((unjudged, g8.checks[0].checked, g8.checks[1].checked), (2, 2, 2), "{g8:?}");
        for event in &report.events[2..] {
            assert_eq!((event.commits_again_at, event.resolved_seconds), (None, None), "{event:?}");
        }
        // A majority that came back too late is nobody's fault either.
        let mut record = example();
        record.events[0].impaired = [1, 2].into();
        (record.events[0].at, record.events[0].done) = (9.0, 9.0);
        (record.events[1].at, record.events[1].done) = (30.0, 30.0);
        assert_eq!(violated(&record), [] as [&str; 0]);
        assert!(
            evaluate(&record, given()).promises[7].notes.iter().any(|note| note.starts_with("not judged"))
        );
    }

    #[test]
    fn a_node_that_has_taken_the_place_of_another_counts_for_the_majority() {
        let mut record = example();
        record.load_seconds = 30.0;
        record.events[1].done = 28.0;
        record.events[1].replaced = Some((1, 4));
        // While it caught up nothing was committed, though two of three were there.
        for batch in record.batches.iter_mut().filter(|batch| batch.sent > 7.5) {
            batch.answers[0].at = 20.0;
        }
        assert_eq!(violated(&record), ["G8"]);
        let mut record = example();
        record.events[1].replaced = Some((1, 4));
        let kill = Event { at: 8.0, done: 8.0, impaired: [2, 4].into(), ..record.events[0].clone() };
        record.events.push(kill);
        let report = evaluate(&record, given());
        assert_eq!(report.events[1].without_majority, [] as [u32; 0]);
        assert_eq!(report.events[2].without_majority, [0, 1, 2], "node 4 counts instead of node 1");
        assert!(report.promises[3].notes[0].contains("one disk was lost for good"), "{report:?}");
    }

    #[test]
    fn a_shard_that_is_away_must_not_stop_the_others() {
        let away = |record: &mut Record| {
            record.replicas.insert(1, vec![4, 5, 6]);
            record.events[0].impaired = [4, 5, 6].into();
        };
        let mut record = example();
        away(&mut record);
        let report = evaluate(&record, given());
        let others = &report.promises[8].checks[1];
        assert_eq!((others.checked, others.wrong), (1, 0), "{others:?}");
        // All touched that shard, so to say: nothing else was committed.
        let stopped = after(|record| {
            away(record);
            for batch in record.batches.iter_mut().filter(|batch| (4.0..7.1).contains(&batch.sent)) {
                batch.answers[0].at = 7.2;
            }
        });
        assert!(stopped.contains(&"G9".to_owned()), "{stopped:?}");
    }
}
