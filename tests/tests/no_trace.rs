//! All operations of a batch take effect, or none does: a rejection on one shard leaves nothing on any other.

use std::time::Duration;

use verdict_proto::v1::{self, AbortReason, require::Condition, value};
use verdict_tests::{
    api::{
        add, add_within, assert_aborted, balance, batch, commit, delete, history, insert, kind_of, put, read,
        record, require, row, settle, shard_of, stamp_of,
    },
    cluster::{Cluster, replicas_of},
};

/// After this time nothing of a decided batch may be left anywhere.
const SETTLED_WITHIN: Duration = Duration::from_secs(15);

/// Rows on each of the three shards.
fn rows(cluster: &Cluster, tag: &str, name: &str) -> Vec<v1::Row> {
    cluster.partitions(tag).iter().map(|partition| row(partition, name)).collect()
}

/// Asserts that nobody has ever written these rows.
async fn assert_untouched(cluster: &Cluster, rows: &[v1::Row]) {
    for node in cluster.nodes() {
        for value in read(&cluster.settlement(node), rows).await.values {
            assert_eq!(kind_of(&value), value::Kind::Absent(true), "{value:?}");
            assert_eq!(value.version, 0, "{value:?}");
        }
    }
    for row in rows {
        let (_, entries) = history(&cluster.settlement(1), row).await;
        assert!(entries.is_empty(), "{row:?} has a history: {entries:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_short_of_funds_on_one_shard_leaves_nothing_on_any_other() {
    let cluster = Cluster::start().await;
    let client = cluster.settlement(1);
    let accounts = rows(&cluster, "funds", "USD");
    // Whichever shard it is that refuses.
    for short in 0..3 {
        let payer = row(&format!("{}-payer", accounts[short].partition), "USD");
        let payer = rows(&cluster, &payer.partition, "USD").swap_remove(short);
        let funded = commit(&client, vec![add(&payer, 99)]).await;
        let others: Vec<&v1::Row> =
            (0..3).filter(|other| *other != short).map(|other| &accounts[other]).collect();
        let trade = row(&others[0].partition, "trade");
        let broken =
            batch(vec![add(others[0], 60), insert(&trade, "a trade"), add(&payer, -100), add(others[1], 40)]);
        let outcome = settle(&client, &broken).await;
        assert_aborted(&outcome, AbortReason::ShortOfFunds, Some(2), Some(balance(99)));
        for node in cluster.nodes() {
            assert_eq!(
                settle(&cluster.settlement(node), &broken).await,
                outcome,
                "asked again at node {node}"
            );
        }
        assert_untouched(&cluster, &[others[0].clone(), others[1].clone(), trade]).await;
        let held = read(&client, std::slice::from_ref(&payer)).await;
        assert_eq!((kind_of(&held.values[0]), held.values[0].version), (balance(99), funded));
        assert_eq!(
            history(&client, &payer).await.1.len(),
            1,
            "the payer's history shows more than the funding"
        );
    }
    // No lock either: nothing is held, and the same rows can be written at once.
    cluster.wait_quiet(SETTLED_WITHIN).await;
    let first = commit(&client, accounts.iter().map(|account| add(account, 1)).collect()).await;
    for value in read(&client, &accounts).await.values {
        assert_eq!((kind_of(&value), value.version), (balance(1), first));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn conditions_on_one_shard_gate_effects_on_another() {
    let cluster = Cluster::start().await;
    let client = cluster.settlement(2);
    let [limit, note, effect] = ["limit", "note", "effect"].map(|tag| tag.to_owned());
    let limit = row(&cluster.partitions(&limit)[0], "USD");
    let note = row(&cluster.partitions(&note)[1], "note");
    let effect = row(&cluster.partitions(&effect)[2], "USD");
    let gate =
        async |condition: v1::Operation| settle(&client, &batch(vec![add(&effect, 1), condition])).await;
    let not_met = AbortReason::ConditionNotMet;
    let absent = || Some(value::Kind::Absent(true));

    // Nothing is there yet.
    let outcome = gate(require(&note, Condition::Exists(true))).await;
    assert_aborted(&outcome, not_met, Some(1), absent());
    let outcome = gate(require(&note, Condition::Value("yes".into()))).await;
    assert_aborted(&outcome, not_met, Some(1), absent());
    let outcome = gate(require(&limit, Condition::BalanceAtLeast("1".to_owned()))).await;
    assert_aborted(&outcome, not_met, Some(1), absent());
    assert_untouched(&cluster, std::slice::from_ref(&effect)).await;
    let mut effects = 0;
    let mut passes = async |condition: v1::Operation| {
        stamp_of(&gate(condition).await);
        effects += 1;
        let held = read(&client, std::slice::from_ref(&effect)).await;
        assert_eq!(kind_of(&held.values[0]), balance(effects), "the condition held, so the effect is there");
    };
    passes(require(&note, Condition::Exists(false))).await;
    passes(require(&note, Condition::Version(0))).await;
    passes(require(&limit, Condition::BalanceAtMost("0".to_owned()))).await;

    let written = commit(&client, vec![put(&note, "yes"), add(&limit, 50)]).await;
    passes(require(&note, Condition::Exists(true))).await;
    passes(require(&note, Condition::Value("yes".into()))).await;
    passes(require(&note, Condition::Version(written))).await;
    passes(require(&limit, Condition::Version(written))).await;
    passes(require(&limit, Condition::BalanceAtLeast("50".to_owned()))).await;
    passes(require(&limit, Condition::BalanceEquals("50".to_owned()))).await;
    let version = Some(value::Kind::Version(written));
    let refused = [
        (require(&note, Condition::Exists(false)), Some(record("yes"))),
        (require(&note, Condition::Value("no".into())), Some(record("yes"))),
        (require(&note, Condition::Version(written - 1)), version.clone()),
        (require(&note, Condition::Version(0)), version),
        (require(&limit, Condition::BalanceAtLeast("51".to_owned())), Some(balance(50))),
        (require(&limit, Condition::BalanceAtMost("49".to_owned())), Some(balance(50))),
        (require(&limit, Condition::BalanceEquals("-50".to_owned())), Some(balance(50))),
    ];
    for (condition, met) in refused {
        assert_aborted(&gate(condition).await, not_met, Some(1), met);
    }
    let held = read(&client, std::slice::from_ref(&effect)).await;
    assert_eq!(kind_of(&held.values[0]), balance(effects), "a refused batch had an effect");
    assert_eq!(history(&client, &effect).await.1.len(), effects as usize);
    cluster.wait_quiet(SETTLED_WITHIN).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn rejections_tell_reason_operation_and_value_and_change_nothing() {
    let cluster = Cluster::start().await;
    let client = cluster.settlement(3);
    let [trades, notes, money] = ["trade", "note", "USD"].map(|name| rows(&cluster, "rejections", name));
    commit(&client, vec![insert(&trades[0], "first"), put(&notes[1], "n"), add(&money[2], 10)]).await;
    let before = read(&client, &[trades[0].clone(), notes[1].clone(), money[2].clone()]).await.values;

    let refused = async |operation: v1::Operation, reason, met| {
        let bystanders = vec![add(&money[0], 1), operation, insert(&trades[1], "x")];
        assert_aborted(&settle(&client, &batch(bystanders)).await, reason, Some(1), Some(met));
    };
    refused(insert(&trades[0], "second"), AbortReason::RowExists, record("first")).await;
    refused(insert(&money[2], "x"), AbortReason::RowExists, balance(10)).await;
    refused(put(&money[2], "x"), AbortReason::WrongKind, balance(10)).await;
    refused(delete(&money[2]), AbortReason::WrongKind, balance(10)).await;
    refused(add(&notes[1], 1), AbortReason::WrongKind, record("n")).await;
    let at_least = require(&notes[1], Condition::BalanceAtLeast("0".to_owned()));
    refused(at_least, AbortReason::WrongKind, record("n")).await;
    refused(add(&money[2], -11), AbortReason::ShortOfFunds, balance(10)).await;
    let floor = add_within(&money[2], "-1", Some("10"), None);
    refused(floor, AbortReason::ShortOfFunds, balance(10)).await;
    let ceiling = add_within(&money[2], "1", None, Some("10"));
    refused(ceiling, AbortReason::AboveCeiling, balance(10)).await;

    assert_untouched(&cluster, &[money[0].clone(), trades[1].clone()]).await;
    let after = read(&client, &[trades[0].clone(), notes[1].clone(), money[2].clone()]).await.values;
    assert_eq!(before, after, "a rejection changed what it met");
    // What stands at the edge is allowed, an overdraft if it is asked for.
    commit(&client, vec![add_within(&money[2], "-30", Some("-20"), None)]).await;
    commit(&client, vec![delete(&trades[0]), delete(&trades[2])]).await;
    commit(&client, vec![insert(&trades[0], "again")]).await;
    let held = read(&client, &[money[2].clone(), trades[0].clone()]).await;
    assert_eq!(held.values.iter().map(kind_of).collect::<Vec<_>>(), [balance(-20), record("again")]);
    let (_, entries) = history(&client, &trades[0]).await;
    let changes: Vec<_> = entries.into_iter().filter_map(|entry| entry.change).collect();
    use v1::history_entry::Change;
    let expected = [Change::Value("first".into()), Change::Deleted(true), Change::Value("again".into())];
    assert_eq!(changes, expected);
    cluster.wait_quiet(SETTLED_WITHIN).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_tests_know_on_which_shard_a_partition_lies() {
    let cluster = Cluster::start().await;
    let client = cluster.settlement(1);
    let mut expected = std::collections::BTreeMap::new();
    for number in 0..20 {
        let partition = format!("somewhere:{number}");
        let touch = batch(vec![add(&row(&partition, "USD"), 1)]);
        stamp_of(&settle(&client, &touch).await);
        expected.insert(touch.id, vec![shard_of(&partition, cluster.shards())]);
    }
    // What a shard has committed by itself is recorded in passing, a moment after it was answered.
    let all_are_told = || async {
        let request = v1::ListDecisionsRequest { from: 0, limit: 1000 };
        let listed = cluster.admin(2).list_decisions(request).await.map_err(|status| status.to_string())?;
        let decisions = listed.into_inner().decisions.into_iter();
        let told: std::collections::BTreeMap<String, Vec<u32>> = decisions
            .map(|decision| (decision.outcome.expect("a decision has an outcome").batch_id, decision.shards))
            .collect();
        if told == expected { Ok(()) } else { Err(format!("{told:?}, not {expected:?}")) }
    };
    let bound = Duration::from_secs(10);
    verdict_tests::wait::eventually("all decisions are listed with their shards", bound, all_are_told).await;
    let status = cluster.status().await.expect("a status");
    assert_eq!(replicas_of(&status, 0).len(), 3);
}
