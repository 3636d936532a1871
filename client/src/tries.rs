//! What is known of one batch from try to try: the place where "nothing was proposed" and "not known" are told apart.

use std::time::Duration;

use verdict_proto::v1::{self, UndecidedState};

use crate::{ClientError, Outcome, failure::Failure, retry};

/// The tries of one batch under one id. Invariant: once a try may have been proposed, nothing but a server's definite word
/// about this id (or that the id belongs to other contents) ends in anything but UNKNOWN.
#[derive(Debug, Default)]
pub(crate) struct Tries {
    /// Failed tries.
    count: u32,
    /// Tries that may have been proposed and were not answered definitely.
    lost: u32,
    /// What was said about the last of them.
    doubt: Option<(UndecidedState, String)>,
    /// The last refusal.
    refusal: Option<ClientError>,
}

/// What to do after a try.
#[derive(Debug)]
pub(crate) enum Next {
    /// It is over.
    Answer(Result<Outcome, ClientError>),
    /// Try again under the same id.
    Again {
        /// After this pause.
        pause: Duration,
        /// Where.
        place: Place,
    },
}

/// Which node to ask next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// The same one.
    Same,
    /// Any other one.
    Other,
    /// The leader, as a node named it.
    Leader(String),
}

impl Tries {
    /// Takes in the end of a try.
    pub(crate) fn after(&mut self, id: &str, end: Result<Option<v1::Outcome>, Failure>) -> Next {
        let failure = match end.map(|outcome| Outcome::from_wire(id, outcome)) {
            Ok(Ok(Outcome::Unknown { state, message })) => return self.undecided(state, message),
            Ok(Ok(definite)) => return Next::Answer(Ok(definite)),
            Ok(Err(nonsense)) => Failure::Lost(nonsense),
            Err(failure) => failure,
        };
        match failure {
            Failure::Final(error) => Next::Answer(self.refuse(error)),
            Failure::Refused { error, retry_after, leader } => {
                let overloaded = matches!(error, ClientError::Overloaded { .. });
                self.refusal = Some(error);
                let place = match leader {
                    Some(leader) => Place::Leader(leader),
                    None if overloaded => Place::Same,
                    None => Place::Other,
                };
                self.again(retry_after, place)
            }
            Failure::Unreached(_) => self.again(None, Place::Other),
            Failure::Lost(message) => {
                self.note_loss(UndecidedState::Unknown, message);
                self.again(None, Place::Other)
            }
        }
    }

    /// Notes that a try may have been proposed and will not be answered.
    pub(crate) fn note_loss(&mut self, state: UndecidedState, message: String) {
        self.lost += 1;
        self.doubt = Some((state, message));
    }

    /// Notes why a try was not proposed.
    pub(crate) fn note_refusal(&mut self, error: ClientError) {
        self.refusal = Some(error);
    }

    /// How many tries were lost, or answered without an answer.
    pub(crate) fn lost(&self) -> u32 {
        self.lost
    }

    /// The answer when the caller's time has run out; `nobody` is the error if no node was reached.
    pub(crate) fn give_up(&mut self, nobody: impl FnOnce() -> ClientError) -> Result<Outcome, ClientError> {
        match (self.doubt.take(), self.refusal.take()) {
            (Some((state, message)), _) => Ok(Outcome::Unknown { state, message }),
            (None, Some(error)) => Err(error),
            (None, None) => Err(nobody()),
        }
    }

    fn undecided(&mut self, state: UndecidedState, message: String) -> Next {
        let place = match state {
            UndecidedState::InProgress | UndecidedState::NotSeen => Place::Same,
            UndecidedState::Unknown | UndecidedState::Unspecified => Place::Other,
        };
        self.note_loss(state, message);
        self.again(None, place)
    }

    fn refuse(&mut self, error: ClientError) -> Result<Outcome, ClientError> {
        match (self.doubt.take(), error) {
            (_, error @ ClientError::DifferentContents { .. }) => Err(error),
            (None, error) => Err(error),
            (Some((_, before)), error) => {
                Ok(Outcome::unknown(format!("{error}; an earlier try may have been proposed ({before})")))
            }
        }
    }

    fn again(&mut self, advice: Option<Duration>, place: Place) -> Next {
        let pause = retry::pause(self.count, advice);
        self.count = self.count.saturating_add(1);
        Next::Again { pause, place }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nobody() -> ClientError {
        ClientError::Unavailable { message: "no connection to n:1 (nobody listens there)".into() }
    }

    fn lost() -> Result<Option<v1::Outcome>, Failure> {
        Err(Failure::Lost("the connection broke".into()))
    }

    fn refused() -> Result<Option<v1::Outcome>, Failure> {
        let error = ClientError::Unavailable { message: "no leader".into() };
        Err(Failure::Refused { error, retry_after: None, leader: Some("n:2".into()) })
    }

    #[test]
    fn refusals_alone_end_in_an_error() {
        let mut tries = Tries::default();
        let Next::Again { place, .. } = tries.after("a", refused()) else { panic!("there is time left") };
        assert_eq!(place, Place::Leader("n:2".into()));
        assert!(matches!(tries.after("a", Err(Failure::Unreached("away".into()))), Next::Again { .. }));
        let said = ClientError::Unavailable { message: "no leader".into() };
        assert_eq!(tries.give_up(nobody), Err(said), "what a node said tells more");
        assert_eq!(Tries::default().give_up(nobody), Err(nobody()));
    }

    #[test]
    fn one_lost_try_makes_everything_after_it_unknown() {
        let mut tries = Tries::default();
        assert!(matches!(tries.after("a", lost()), Next::Again { .. }));
        assert!(matches!(tries.after("a", refused()), Next::Again { .. }));
        assert!(matches!(tries.give_up(nobody), Ok(Outcome::Unknown { .. })));

        let mut tries = Tries::default();
        tries.after("a", lost());
        let too_old = Err(Failure::Final(ClientError::TooOld { message: "horizon".into() }));
        assert!(matches!(tries.after("a", too_old), Next::Answer(Ok(Outcome::Unknown { .. }))));
    }

    #[test]
    fn other_contents_under_the_id_mean_that_this_batch_never_took_effect() {
        let mut tries = Tries::default();
        tries.after("a", lost());
        let other = Err(Failure::Final(ClientError::DifferentContents { message: "hash".into() }));
        assert!(matches!(tries.after("a", other), Next::Answer(Err(ClientError::DifferentContents { .. }))));
    }
}
