//! The model check of the shipped code: visits every state that a small cluster can reach, and holds each to the promises.
//!
//! What is stepped are the state machines of `verdict-protocol` themselves. What is modelled is only what lies around them:
//!
//! - *The network*: a message on its way may be delivered now, later, or never; some come twice. A lost message is one that is
//!   never delivered, so loss needs no step of its own and has no bound.
//! - *Raft*: a group's log is what it has made of its machine. What a leader proposes is recorded in order, or lost if another
//!   one is elected first; the answer may come after other things. A leader that is deposed lives on, unaware. Whoever is
//!   elected has all that is committed. Of a shard's replicas the one that leads applies an entry and answers at once: that it
//!   is late, or that its leader changes before it answers, looks from outside like a message that is late, lost or repeated.
//! - *Restarts*: every state of a machine is opened again from its store and must be the same ([`rules::reopens`]).
//! - *Clients*: they submit, submit again, seal an id, read, and ask about every id in every state.
//! - *Time*: a leader's clock moves when it does, and not with any other.
//!
//! [`case::Case`] says how large the cluster is and how often each kind of thing may happen. [`explore::explore`] visits all
//! states and checks [`rules`] in each; [`heal`] shows that each comes to rest once faults end.

pub mod case;
pub mod cases;
pub mod explore;
pub mod heal;
pub mod model;
pub mod parts;
pub mod rules;
pub mod tables;
pub mod trace;
