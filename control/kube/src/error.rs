//! What can go wrong in a reconciler.

use thiserror::Error;

/// A failed step. The object is tried again, later each time.
#[derive(Debug, Error)]
pub enum Error {
    /// The API server refused or did not answer.
    #[error("could not {} {kind} {name}: {}", words_of(.action), said(.source.as_ref()))]
    Api {
        /// What was tried.
        action: &'static str,
        /// On what kind.
        kind: String,
        /// On which object.
        name: String,
        /// What it said.
        source: Box<kube::Error>,
    },
    /// A name that is needed belongs to an object of somebody else.
    #[error("{kind} {name} exists and belongs to somebody else; rename or remove it")]
    NameTaken {
        /// Of what kind.
        kind: String,
        /// The name.
        name: String,
    },
    /// A stored revision cannot be read.
    #[error("ControllerRevision {name} does not hold a template: {source}")]
    Revision {
        /// Its name.
        name: String,
        /// Why not.
        source: serde_json::Error,
    },
    /// An object that was built is not one.
    #[error("building {kind}: {source}")]
    Build {
        /// Of what kind.
        kind: &'static str,
        /// Why not.
        source: serde_json::Error,
    },
}

impl Error {
    /// In one word, for events.
    #[must_use]
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Api { action, .. } => match *action {
                "create" => "FailedCreate",
                "delete" => "FailedDelete",
                _ => "FailedUpdate",
            },
            Self::NameTaken { .. } => "NameTaken",
            Self::Revision { .. } | Self::Build { .. } => "Failed",
        }
    }

    /// For metrics and for how loud to be.
    #[must_use]
    pub fn category(&self) -> &'static str {
        match self {
            Self::Api { source, .. } => match source.as_ref() {
                kube::Error::Api(status) if status.code == 409 => "conflict",
                kube::Error::Api(status) if status.code == 403 => "forbidden",
                kube::Error::Api(status) if status.code == 422 => "rejected",
                kube::Error::Api(_) => "api",
                _ => "transport",
            },
            Self::NameTaken { .. } => "name-taken",
            Self::Revision { .. } => "revision",
            Self::Build { .. } => "build",
        }
    }

    /// Whether the API server could not take the request, whatever it was.
    fn is_about_the_server(&self) -> bool {
        let Self::Api { source, .. } = self else {
            return false;
        };
        match source.as_ref() {
            kube::Error::Api(status) => matches!(status.code, 429 | 503 | 504),
            _ => true,
        }
    }

    /// Whether another writer was faster; the next look settles it.
    #[must_use]
    pub fn is_conflict(&self) -> bool {
        self.category() == "conflict"
    }
}

fn words_of(action: &'static str) -> &'static str {
    match action {
        "status" => "write the status of",
        other => other,
    }
}

/// What the API server said to a request, in its own words; of any other error, what it says itself.
/// `kube::Error` would add the whole answer once more, as a Rust structure.
#[must_use]
pub fn said(error: &(dyn std::error::Error + 'static)) -> String {
    let mut cause = Some(error);
    while let Some(error) = cause {
        let boxed = error.downcast_ref::<Box<kube::Error>>().map(Box::as_ref);
        if let Some(kube::Error::Api(status)) = error.downcast_ref().or(boxed) {
            return if status.message.is_empty() {
                format!("{} (code {})", status.reason, status.code)
            } else {
                status.message.clone()
            };
        }
        cause = error.source();
    }
    error.to_string()
}

/// An error with what caused it, in one line: of the API server its own words alone.
#[must_use]
pub fn explained(error: &anyhow::Error) -> String {
    let (outer, inner) = (error.to_string(), said(error.as_ref()));
    match error.chain().count() {
        1 => inner,
        _ if inner == outer => format!("{error:#}"),
        _ => format!("{outer}: {inner}"),
    }
}

/// The failure that a status tells of, if there is one. A lost race is none, nor is an API server that
/// is away or has too much to do: that is over within moments, and a condition for it would come and
/// go with every one, at the worst time for another write.
#[must_use]
pub fn failure<T>(outcome: &Result<T, Error>) -> Option<&Error> {
    let passes = |error: &Error| error.is_conflict() || error.is_about_the_server();
    outcome.as_ref().err().filter(|error| !passes(error))
}

/// Whether the API server says that the object is not there.
#[must_use]
pub fn is_not_found(error: &kube::Error) -> bool {
    matches!(error, kube::Error::Api(status) if status.code == 404)
}

/// Whether the API server says that the name is taken.
#[must_use]
pub fn is_already_exists(error: &kube::Error) -> bool {
    matches!(error, kube::Error::Api(status) if status.code == 409 && status.reason == "AlreadyExists")
}

#[cfg(test)]
mod tests {
    use kube::core::Status;

    use super::*;

    #[test]
    fn a_refusal_is_one_sentence_in_the_words_of_the_api_server() {
        let refused = |action, message| {
            let status = Status::failure(message, "Forbidden").with_code(403);
            Error::Api {
                action,
                kind: "Pod".into(),
                name: "a".into(),
                source: Box::new(kube::Error::Api(status.boxed())),
            }
        };
        let said = "pods \"a\" is forbidden: exceeded quota";
        let table = [
            ("create", said, format!("could not create Pod a: {said}")),
            (
                "status",
                "",
                "could not write the status of Pod a: Forbidden (code 403)".to_owned(),
            ),
        ];
        for (action, message, expected) in table {
            assert_eq!(refused(action, message).to_string(), expected);
        }
    }

    #[test]
    fn what_wraps_a_refusal_says_the_same() {
        let status = Status::failure("no such kind", "NotFound").with_code(404);
        let error = kube::Error::Api(status.boxed());
        let wrapped = kube::runtime::watcher::Error::InitialListFailed(error);
        assert_eq!(said(&wrapped), "no such kind");
    }

    #[test]
    fn what_passes_by_itself_is_no_failure_to_tell_of() {
        let refused = |code: u16| -> Result<(), Error> {
            let status = Status::failure("no", "No").with_code(code);
            Err(Error::Api {
                action: "update",
                kind: "RoleSet".into(),
                name: "r".into(),
                source: Box::new(kube::Error::Api(status.boxed())),
            })
        };
        for code in [409, 429, 503, 504] {
            assert!(failure(&refused(code)).is_none(), "{code}");
        }
        // What a webhook that is away makes of every write.
        assert!(failure(&refused(500)).is_some());
        assert!(failure(&refused(403)).is_some());
        assert!(failure(&refused(422)).is_some());
        assert!(failure(&Ok(())).is_none());
    }
}
