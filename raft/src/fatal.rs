//! The one place that knows whether this node must stop.

use std::{io, sync::Arc};

use tokio::sync::watch;

/// Set once, by the first error after which nothing may be acknowledged any more.
#[derive(Clone, Debug)]
pub(crate) struct Fatal {
    message: Arc<watch::Sender<Option<String>>>,
}

impl Fatal {
    pub(crate) fn new() -> Fatal {
        Fatal { message: Arc::new(watch::Sender::new(None)) }
    }

    /// Stops the node. The first message stays.
    pub(crate) fn raise(&self, message: &str) {
        let first = self.message.send_if_modified(|current| {
            let first = current.is_none();
            if first {
                *current = Some(message.to_owned());
            }
            first
        });
        if first {
            tracing::error!(message, "the node must stop");
        }
    }

    pub(crate) fn subscribe(&self) -> watch::Receiver<Option<String>> {
        self.message.subscribe()
    }

    /// The message, if the node must stop.
    pub(crate) fn get(&self) -> Option<String> {
        self.message.borrow().clone()
    }

    /// An error, if the node must stop.
    pub(crate) fn check(&self) -> io::Result<()> {
        match self.get() {
            None => Ok(()),
            Some(message) => Err(io::Error::other(format!("the node has stopped: {message}"))),
        }
    }
}
