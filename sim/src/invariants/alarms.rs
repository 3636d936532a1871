//! The machines themselves raise an alarm about what must not be. None may.

use super::{Finding, Invariant};
use crate::witness::{Facts, Seen};

/// No machine raises an alarm.
#[derive(Debug, Default)]
pub struct Alarms;

impl Invariant for Alarms {
    fn name(&self) -> &'static str {
        "no alarm"
    }

    fn see(&mut self, seen: &Seen<'_>, _: &Facts) -> Finding {
        match seen {
            Seen::Alarm { group, text } => Err(format!("group {group}: {text}")),
            _ => Ok(()),
        }
    }
}
