//! A batch and its life: which states follow each other, and what is written down on the way. Pure:
//! the stores load a batch, [`Batch::apply`] a [`Change`] and store the result in one transaction.
//!
//! ```text
//! validating ─▶ in_progress ─▶ finalizing ─▶ completed
//!     │  │           │             │  └────▶ expired
//!     │  └───────────┴──┬──────────┘
//!     ▼                 ▼
//!   failed          cancelling ─▶ cancelled
//! ```
//!
//! A batch whose input file or results are lost on the way fails, or expires, from any state.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::clock::Seconds;
use crate::endpoint::Endpoint;

/// Line errors kept and shown for a rejected input file. One fault often repeats on every line.
pub const ERRORS_KEPT: usize = 100;

/// What a client sees as `status`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Status {
    /// The input file is being checked, or waits to be.
    Validating,
    /// Requests are being sent.
    InProgress,
    /// Every request has its result; the files are being put together.
    Finalizing,
    /// Done.
    Completed,
    /// The input file was rejected, or lost on the way.
    Failed,
    /// The window ended first; what was done is in the output file.
    Expired,
    /// A cancellation was asked for; requests in flight are ending.
    Cancelling,
    /// Cancelled; what was done is in the output file.
    Cancelled,
}

impl Status {
    /// Whether nothing will change any more.
    #[must_use]
    pub fn is_terminal(self) -> bool {
        matches!(
            self,
            Status::Completed | Status::Failed | Status::Expired | Status::Cancelled
        )
    }

    /// As on the wire.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Status::Validating => "validating",
            Status::InProgress => "in_progress",
            Status::Finalizing => "finalizing",
            Status::Completed => "completed",
            Status::Failed => "failed",
            Status::Expired => "expired",
            Status::Cancelling => "cancelling",
            Status::Cancelled => "cancelled",
        }
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// What is wrong with an input file, and where.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LineError {
    /// OpenAI's code.
    pub code: String,
    /// For a person: what is wrong, and how to mend it.
    pub message: String,
    /// The field, if it is one.
    pub param: Option<String>,
    /// Line number, from 1; none for the file as a whole.
    pub line: Option<u64>,
}

/// How many requests there are, and how they ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counts {
    /// Requests in the input file; 0 until it is validated.
    pub total: u64,
    /// Requests with a line in the output file.
    pub completed: u64,
    /// Requests with a line in the error file.
    pub failed: u64,
}

/// Tokens, as the upstream counted them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usage {
    /// Prompt tokens.
    pub input_tokens: u64,
    /// Prompt tokens that were found in a cache.
    pub cached_tokens: u64,
    /// Generated tokens.
    pub output_tokens: u64,
    /// Generated tokens that were spent on reasoning.
    pub reasoning_tokens: u64,
    /// Both.
    pub total_tokens: u64,
}

impl Usage {
    /// Adds what another answer used.
    pub fn add(&mut self, other: &Usage) {
        self.input_tokens = self.input_tokens.saturating_add(other.input_tokens);
        self.cached_tokens = self.cached_tokens.saturating_add(other.cached_tokens);
        self.output_tokens = self.output_tokens.saturating_add(other.output_tokens);
        self.reasoning_tokens = self.reasoning_tokens.saturating_add(other.reasoning_tokens);
        self.total_tokens = self.total_tokens.saturating_add(other.total_tokens);
    }
}

/// When each state was entered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Times {
    /// Validated.
    pub in_progress_at: Option<Seconds>,
    /// All requests have results.
    pub finalizing_at: Option<Seconds>,
    /// Completed.
    pub completed_at: Option<Seconds>,
    /// Rejected.
    pub failed_at: Option<Seconds>,
    /// Expired.
    pub expired_at: Option<Seconds>,
    /// Cancellation asked for.
    pub cancelling_at: Option<Seconds>,
    /// Cancelled.
    pub cancelled_at: Option<Seconds>,
}

/// What the client asked for when it created the batch.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Order {
    /// Where every request goes.
    pub endpoint: Endpoint,
    /// The file of requests.
    pub input_file_id: String,
    /// `24h` and the like, as it was given.
    pub completion_window: String,
    /// The same in seconds.
    pub window_s: Seconds,
    /// The client's own keys and values.
    pub metadata: Option<BTreeMap<String, String>>,
    /// How long output and error file are kept, from their creation.
    pub output_expires_after_s: Option<Seconds>,
    /// AIBrix's extension of the request; kept and given back.
    pub aibrix: Option<Value>,
}

/// A batch.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Batch {
    /// `batch_…`.
    pub id: String,
    /// Whose it is.
    pub tenant: String,
    /// What was asked for.
    pub order: Order,
    /// When it was created.
    pub created_at: Seconds,
    /// When it expires.
    pub expires_at: Seconds,
    /// The model of all its requests; none where they name several.
    pub model: Option<String>,
    status: Status,
    times: Times,
    counts: Counts,
    usage: Usage,
    errors: Vec<LineError>,
    /// Whether the window ended before every request was asked for.
    ran_out: bool,
    output_file_id: Option<String>,
    error_file_id: Option<String>,
}

/// One step in a batch's life.
#[derive(Clone, Debug)]
pub enum Change {
    /// The input file is good.
    Validated {
        /// The model of all requests, if it is one.
        model: Option<String>,
        /// How many requests there are.
        total: u64,
    },
    /// The input file is not.
    Reject {
        /// Why; the first [`ERRORS_KEPT`] are kept.
        errors: Vec<LineError>,
    },
    /// Results were recorded.
    Record {
        /// Lines for the output file.
        completed: u64,
        /// Lines for the error file.
        failed: u64,
        /// What they used.
        usage: Usage,
        /// Whether some were not asked for because the window had ended.
        expired: bool,
    },
    /// Every request has a result.
    Finalize,
    /// The files are there.
    Finish {
        /// The output file, if it has lines.
        output_file_id: Option<String>,
        /// The error file, if it has lines.
        error_file_id: Option<String>,
    },
    /// What it needs is lost: no further request can be sent, or not every result is there any more.
    /// What has no result counts as failed.
    GiveUp {
        /// What is lost.
        errors: Vec<LineError>,
        /// The output file, if it has lines.
        output_file_id: Option<String>,
        /// The error file, if it has lines.
        error_file_id: Option<String>,
    },
    /// A client wants it to end.
    Cancel,
}

/// A change that the state does not allow.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{change} is not possible: the batch's status is '{status}'")]
pub struct Illegal {
    /// What was tried.
    pub change: &'static str,
    /// The status that forbids it.
    pub status: Status,
}

impl Batch {
    /// A batch that was just created.
    #[must_use]
    pub fn new(id: String, tenant: String, order: Order, now: Seconds) -> Batch {
        Batch {
            id,
            tenant,
            created_at: now,
            expires_at: now.saturating_add(order.window_s),
            order,
            model: None,
            status: Status::Validating,
            times: Times::default(),
            counts: Counts::default(),
            usage: Usage::default(),
            errors: Vec::new(),
            ran_out: false,
            output_file_id: None,
            error_file_id: None,
        }
    }

    /// The state.
    #[must_use]
    pub fn status(&self) -> Status {
        self.status
    }

    /// When the states were entered.
    #[must_use]
    pub fn times(&self) -> &Times {
        &self.times
    }

    /// How many requests there are and ended.
    #[must_use]
    pub fn counts(&self) -> Counts {
        self.counts
    }

    /// Tokens used so far.
    #[must_use]
    pub fn usage(&self) -> &Usage {
        &self.usage
    }

    /// Why the input file was rejected, or what was lost.
    #[must_use]
    pub fn errors(&self) -> &[LineError] {
        &self.errors
    }

    /// The output file.
    #[must_use]
    pub fn output_file_id(&self) -> Option<&str> {
        self.output_file_id.as_deref()
    }

    /// The error file.
    #[must_use]
    pub fn error_file_id(&self) -> Option<&str> {
        self.error_file_id.as_deref()
    }

    /// Takes one step.
    ///
    /// # Errors
    /// When the state does not allow it; the batch is then unchanged.
    pub fn apply(&mut self, change: Change, now: Seconds) -> Result<(), Illegal> {
        use Status::{Cancelled, Cancelling, Completed, Expired, Failed};
        use Status::{Finalizing, InProgress, Validating};
        let status = self.status;
        let illegal = |change| Err(Illegal { change, status });
        match change {
            Change::Validated { model, total } => {
                match status {
                    Validating => {
                        self.status = InProgress;
                        self.times.in_progress_at = Some(now);
                    }
                    // The lines that will not be asked for are still counted.
                    Cancelling => {}
                    _ => return illegal("validation"),
                }
                self.model = model;
                self.counts.total = total;
            }
            Change::Reject { mut errors } => match status {
                Validating => {
                    errors.truncate(ERRORS_KEPT);
                    self.errors = errors;
                    self.status = Failed;
                    self.times.failed_at = Some(now);
                }
                Cancelling => self.cancelled(now),
                _ => return illegal("rejection"),
            },
            Change::Record {
                completed,
                failed,
                usage,
                expired,
            } => {
                if !matches!(status, InProgress | Cancelling) {
                    return illegal("a result");
                }
                self.counts.completed = self.counts.completed.saturating_add(completed);
                self.counts.failed = self.counts.failed.saturating_add(failed);
                self.usage.add(&usage);
                self.ran_out |= expired;
            }
            Change::Finalize => match status {
                InProgress => {
                    self.status = Finalizing;
                    self.times.finalizing_at = Some(now);
                }
                // After a restart, or a cancelled batch: its status already says what will come.
                Finalizing | Cancelling => {}
                _ => return illegal("finalizing"),
            },
            Change::Finish {
                output_file_id,
                error_file_id,
            } => {
                match status {
                    Finalizing if self.ran_out => {
                        self.status = Expired;
                        self.times.expired_at = Some(now);
                    }
                    Finalizing => {
                        self.status = Completed;
                        self.times.completed_at = Some(now);
                    }
                    Cancelling => self.cancelled(now),
                    _ => return illegal("finishing"),
                }
                self.output_file_id = output_file_id;
                self.error_file_id = error_file_id;
            }
            Change::GiveUp {
                mut errors,
                output_file_id,
                error_file_id,
            } => {
                match status {
                    Cancelling => self.cancelled(now),
                    InProgress | Finalizing if self.ran_out || now >= self.expires_at => {
                        self.status = Expired;
                        self.times.expired_at = Some(now);
                    }
                    InProgress | Finalizing => {
                        self.status = Failed;
                        self.times.failed_at = Some(now);
                    }
                    _ => return illegal("giving up"),
                }
                errors.truncate(ERRORS_KEPT);
                self.errors = errors;
                self.counts.failed = self.counts.total.saturating_sub(self.counts.completed);
                self.output_file_id = output_file_id;
                self.error_file_id = error_file_id;
            }
            Change::Cancel => match status {
                Validating | InProgress | Finalizing => {
                    self.status = Cancelling;
                    self.times.cancelling_at = Some(now);
                }
                // Asked for twice, for instance by a client whose first answer was lost.
                Cancelling | Cancelled => {}
                Completed | Failed | Expired => return illegal("cancelling"),
            },
        }
        Ok(())
    }

    fn cancelled(&mut self, now: Seconds) {
        self.status = Status::Cancelled;
        self.times.cancelled_at = Some(now);
    }
}

#[cfg(test)]
mod tests;
