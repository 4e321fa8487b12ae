//! Why something inside the batch server failed. What a client did wrong is [`http::ApiError`].
//!
//! [`http::ApiError`]: crate::http::ApiError

use std::error::Error;

/// A failure that is not the caller's: to be logged, and answered with a 500 or tried again.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// The database, the blob store or the system did not do what was asked of it.
    #[error("{what}: {}", whole(.source.as_ref()))]
    Internal {
        /// What was being done.
        what: &'static str,
        /// What went wrong.
        #[source]
        source: Box<dyn Error + Send + Sync>,
    },
    /// Another server has taken the batch over; nothing more may be written for it here.
    #[error("the lease on {batch} is lost")]
    Fenced {
        /// The batch.
        batch: String,
    },
    /// A blob that the metadata names does not exist.
    #[error("blob {key} is missing")]
    Missing {
        /// Its key.
        key: String,
    },
    /// The change is not possible in the batch's state.
    #[error(transparent)]
    Illegal(#[from] crate::state::Illegal),
    /// The owner's storage quota would be exceeded.
    #[error("the storage quota of {quota_bytes} bytes would be exceeded")]
    Quota {
        /// The quota.
        quota_bytes: u64,
    },
    /// There are as many live batches as there may be.
    #[error("{live} {whose} batches are waiting or in progress")]
    Crowded {
        /// How many there are.
        live: u64,
        /// Whose, as a message puts it.
        whose: &'static str,
    },
    /// The task was stopped, because the server shuts down.
    #[error("the server is shutting down")]
    Stopped,
}

/// What an error says, and what its causes add to that: of some libraries' errors, the causes alone
/// tell what has happened.
fn whole(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let more = error.to_string();
        if !text.contains(&more) {
            text.push_str(": ");
            text.push_str(&more);
        }
        cause = error.source();
    }
    text
}

impl Failure {
    /// Wraps an error of a library.
    pub fn internal(
        what: &'static str,
        source: impl Into<Box<dyn Error + Send + Sync>>,
    ) -> Failure {
        Failure::Internal {
            what,
            source: source.into(),
        }
    }

    /// For `map_err`: wraps an error of a library, saying what was being done.
    pub fn when<E: Into<Box<dyn Error + Send + Sync>>>(
        what: &'static str,
    ) -> impl Fn(E) -> Failure {
        move |source| Failure::internal(what, source)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("{0}")]
    struct Told(&'static str, #[source] Option<Box<Told>>);

    #[test]
    fn what_only_the_causes_tell_is_told_once() {
        let cause = Told("UnknownIssuer", None);
        let handshake = Told("handshake: UnknownIssuer", Some(Box::new(cause)));
        let failure = Failure::internal("connecting", Told("no object", Some(Box::new(handshake))));
        let expected = "connecting: no object: handshake: UnknownIssuer";
        assert_eq!(failure.to_string(), expected);
    }
}
