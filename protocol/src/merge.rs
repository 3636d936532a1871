//! Makes one message of many, so that one entry holds all that has arrived.

use std::collections::BTreeMap;

use crate::{
    ids::{Epoch, GroupId},
    messages::ToShard,
};

/// One message for each coordinator group and epoch, older epochs first.
///
/// What is applied is as if the messages had come in another order, which messages always may: outcomes go before prepares, so
/// that rows are freed before they are asked for, and prepares in the order of their numbers, so that a resend that comes behind
/// higher numbers doesn't conflict with them. Marks, of numbers and of the history, are true for ever, so the highest stands for all.
pub fn merge(messages: impl IntoIterator<Item = ToShard>) -> Vec<ToShard> {
    let mut merged: BTreeMap<(GroupId, Epoch), ToShard> = BTreeMap::new();
    for message in messages {
        let key = (message.coordinator, message.epoch);
        let Some(one) = merged.get_mut(&key) else {
            merged.insert(key, message);
            continue;
        };
        one.mark = one.mark.max(message.mark);
        one.history = one.history.max(message.history);
        one.greet |= message.greet;
        one.outcomes.extend(message.outcomes);
        one.prepares.extend(message.prepares);
    }
    for message in merged.values_mut() {
        // Stable; the same number always has the same contents.
        message.prepares.sort_by_key(|prepare| prepare.number);
        message.prepares.dedup_by_key(|prepare| prepare.number);
    }
    merged.into_values().collect()
}

#[cfg(test)]
mod tests {
    use crate::{
        ids::{BatchId, ContentHash, Number, Stamp},
        messages::{PartOutcome, Prepare},
        wire::EncodedPart,
    };

    use super::*;

    fn number(sequence: u64) -> Number {
        Number { epoch: Epoch(1), sequence }
    }

    fn message(epoch: u64, mark: u64, prepares: &[u64], outcomes: &[u64]) -> ToShard {
        let prepare = |sequence: &u64| Prepare {
            number: number(*sequence),
            id: BatchId([0; 16]),
            hash: ContentHash([0; 32]),
            shards: vec![],
            gives_up: vec![],
            sole: None,
            part: EncodedPart::default(),
        };
        let outcome = |sequence: &u64| PartOutcome {
            id: BatchId([0; 16]),
            number: number(*sequence),
            commit: None,
            gives_up: vec![],
        };
        ToShard {
            coordinator: GroupId(0),
            placement: crate::batch::Placement { shards: 1 },
            epoch: Epoch(epoch),
            mark: number(mark),
            history: Stamp(10 * mark),
            greet: false,
            outcomes: outcomes.iter().map(outcome).collect(),
            prepares: prepares.iter().map(prepare).collect(),
        }
    }

    #[test]
    fn messages_of_one_epoch_become_one() {
        let greeting = ToShard { greet: true, ..message(1, 1, &[4], &[2]) };
        let merged = merge([message(1, 3, &[5, 6], &[3]), greeting, message(1, 2, &[5], &[])]);
        assert_eq!(merged, [ToShard { greet: true, ..message(1, 3, &[4, 5, 6], &[3, 2]) }]);
    }

    #[test]
    fn epochs_and_coordinators_stay_apart() {
        let other = ToShard { coordinator: GroupId(7), ..message(1, 1, &[1], &[]) };
        let merged = merge([message(2, 1, &[9], &[]), other.clone(), message(1, 1, &[8], &[])]);
        assert_eq!(merged, [message(1, 1, &[8], &[]), message(2, 1, &[9], &[]), other]);
    }
}
