//! Where an answer goes.

use tokio::sync::{mpsc, oneshot};

/// Somebody who waits for one answer. Whoever has hung up gets none; nothing else changes by it.
#[derive(Debug)]
pub(crate) enum Caller<T> {
    /// Waits for this one.
    Once(oneshot::Sender<T>),
    /// Waits for many, and tells them apart by their tags. Has room for all that it waits for.
    Many {
        /// Comes back with the answer.
        tag: u64,
        /// Takes the answers.
        sender: mpsc::Sender<(u64, T)>,
    },
}

impl<T> Caller<T> {
    /// A caller, and where it waits.
    pub(crate) fn once() -> (Caller<T>, oneshot::Receiver<T>) {
        let (sender, receiver) = oneshot::channel();
        (Caller::Once(sender), receiver)
    }

    /// Hands the answer over, without waiting.
    pub(crate) fn answer(self, answer: T) {
        match self {
            Caller::Once(sender) => {
                // The receiver is gone if the caller has hung up.
                let _ = sender.send(answer);
            }
            Caller::Many { tag, sender } => {
                if let Err(mpsc::error::TrySendError::Full(_)) = sender.try_send((tag, answer)) {
                    tracing::error!(tag, "a caller had no room for an answer that it waits for");
                }
            }
        }
    }
}
