//! Says the same thing to people at most once in a while.

use std::{
    collections::BTreeMap,
    sync::Mutex,
    time::{Duration, Instant},
};

/// How long a text isn't repeated.
const PAUSE: Duration = Duration::from_secs(10);
/// Distinct texts within the pause; more are not said at all.
const TEXTS_MAX: usize = 256;

/// Remembers what was said lately.
#[derive(Debug, Default)]
pub struct Limiter {
    said: Mutex<BTreeMap<String, Instant>>,
}

impl Limiter {
    /// Whether to say the text now.
    pub fn admits(&self, text: &str) -> bool {
        self.admits_at(text, Instant::now())
    }

    fn admits_at(&self, text: &str, now: Instant) -> bool {
        let mut said = self.said.lock().expect("nothing panics while it holds this lock");
        if said.get(text).is_some_and(|at| now < *at + PAUSE) {
            return false;
        }
        if said.len() >= TEXTS_MAX {
            said.retain(|_, at| now < *at + PAUSE);
        }
        if said.len() >= TEXTS_MAX {
            return false;
        }
        said.insert(text.to_owned(), now);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_is_said_once_in_a_while_and_texts_are_bounded() {
        let (limiter, start) = (Limiter::default(), Instant::now());
        assert!(limiter.admits_at("a", start));
        assert!(!limiter.admits_at("a", start + PAUSE / 2));
        assert!(limiter.admits_at("b", start));
        assert!(limiter.admits_at("a", start + PAUSE));
        let said = (0..10_000).filter(|text| limiter.admits_at(&text.to_string(), start + PAUSE)).count();
        assert!(said < TEXTS_MAX, "{said}");
        assert!(limiter.admits_at("c", start + PAUSE * 3));
    }
}
