//! What operators ask the daemon, and what it answers: JSON in the protocol's Ask and Answer frames.
//!
//! A question with a field that the daemon does not know is refused: a newer command that narrows down
//! what is to be purged must not purge everything at an older daemon. An answer may have fields that the
//! command does not know.

use std::time::Duration;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::node::{Inspect, Node, Purge, Refusal};
use crate::selection::namespace_of;

/// Blocks in one answer: with less than 500 bytes each, they fit into a frame.
pub const MOST_BLOCKS: u32 = 10_000;

/// A question.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "ask", rename_all = "snake_case", deny_unknown_fields)]
pub enum Ask {
    /// How everything stands.
    Status {},
    /// Blocks.
    Inspect {
        /// Which.
        query: Inspect,
    },
    /// Drop blocks.
    Purge {
        /// Which.
        what: Purge,
    },
    /// Keep a namespace from eviction.
    Pin {
        /// Its id, the beginning of it, or its model.
        namespace: String,
        /// For so long.
        ttl_s: u64,
    },
    /// End that.
    Unpin {
        /// Its id, the beginning of it, or its model.
        namespace: String,
    },
}

/// An answer: what was asked for, or why not.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer {
    /// It is done, or known.
    Done(Value),
    /// It is not.
    Refused(Refusal),
}

/// An answer that an operator's command cannot use.
#[derive(Debug, thiserror::Error)]
pub enum AnswerError {
    /// It was refused.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// It is not what was asked for.
    #[error("the daemon's answer cannot be read ({0}); is it another version of kvtide?")]
    Unreadable(#[from] serde_json::Error),
}

impl Answer {
    /// An answer in its frame.
    ///
    /// # Errors
    /// [`AnswerError`] when it is a refusal, or not a `T`.
    pub fn read<T: DeserializeOwned>(payload: &[u8]) -> Result<T, AnswerError> {
        match serde_json::from_slice(payload)? {
            Self::Done(value) => Ok(serde_json::from_value(value)?),
            Self::Refused(refusal) => Err(refusal.into()),
        }
    }
}

/// Answers the question in `payload`. Blocks for as long as `node` does.
#[must_use]
pub fn answer(node: &dyn Node, payload: &[u8]) -> Answer {
    let answered = serde_json::from_slice(payload)
        .map_err(|error| Refusal {
            problem: format!("the question cannot be read: {error}"),
            fix: "use a kvtide of the daemon's version".into(),
        })
        .and_then(|ask| answer_to(node, ask));
    answered.map_or_else(Answer::Refused, Answer::Done)
}

fn answer_to(node: &dyn Node, ask: Ask) -> Result<Value, Refusal> {
    match ask {
        Ask::Status {} => json(&node.status()),
        Ask::Inspect { mut query } => {
            query.limit = query.limit.min(MOST_BLOCKS);
            if let Some(named) = query.namespace {
                query.namespace = Some(namespace_of(&node.status(), &named)?);
            }
            json(&node.inspect(&query)?)
        }
        Ask::Purge { what } => {
            let what = match what {
                Purge::Namespace(named) => Purge::Namespace(namespace_of(&node.status(), &named)?),
                others => others,
            };
            let purged = node.purge(&what)?;
            tracing::info!(?what, ?purged, "an operator has purged blocks");
            json(&purged)
        }
        Ask::Pin { namespace, ttl_s } => {
            let namespace = namespace_of(&node.status(), &namespace)?;
            let pinned = node.pin(&namespace, Duration::from_secs(ttl_s))?;
            tracing::info!(namespace, ttl_s, "an operator has pinned a namespace");
            json(&pinned)
        }
        Ask::Unpin { namespace } => {
            let namespace = namespace_of(&node.status(), &namespace)?;
            let unpinned = node.unpin(&namespace)?;
            tracing::info!(namespace, "an operator has unpinned a namespace");
            json(&unpinned)
        }
    }
}

fn json(answer: &impl Serialize) -> Result<Value, Refusal> {
    serde_json::to_value(answer).map_err(|error| Refusal {
        problem: format!("the answer cannot be written: {error}"),
        fix: "report this as a fault of kvtide".into(),
    })
}
