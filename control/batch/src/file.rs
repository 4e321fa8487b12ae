//! Files: what clients upload and what batches leave behind.

use serde::{Deserialize, Serialize};

use crate::clock::Seconds;

/// How long a file for batches is kept unless its owner says otherwise: as OpenAI does.
pub const BATCH_FILE_KEPT_S: Seconds = 30 * 86_400;
/// The shortest time that a file may be asked to be kept.
pub const KEPT_MIN_S: Seconds = 3_600;
/// The longest.
pub const KEPT_MAX_S: Seconds = 30 * 86_400;

/// What a file is for, in OpenAI's words.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Purpose {
    /// Input of a batch.
    Batch,
    /// Output or error file of a batch.
    BatchOutput,
    /// Kept for its owner; nothing here reads it.
    UserData,
    /// The same.
    Assistants,
    /// The same.
    Vision,
    /// The same.
    #[serde(rename = "fine-tune")]
    FineTune,
    /// The same.
    Evals,
}

impl Purpose {
    /// Those that a client may upload with.
    pub const UPLOADABLE: [Purpose; 6] = [
        Purpose::Batch,
        Purpose::UserData,
        Purpose::Assistants,
        Purpose::Vision,
        Purpose::FineTune,
        Purpose::Evals,
    ];

    /// As on the wire.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Purpose::Batch => "batch",
            Purpose::BatchOutput => "batch_output",
            Purpose::UserData => "user_data",
            Purpose::Assistants => "assistants",
            Purpose::Vision => "vision",
            Purpose::FineTune => "fine-tune",
            Purpose::Evals => "evals",
        }
    }

    /// What a client may upload with this name.
    #[must_use]
    pub fn uploadable(name: &str) -> Option<Purpose> {
        Purpose::UPLOADABLE
            .into_iter()
            .find(|purpose| purpose.as_str() == name)
    }
}

/// A file's metadata; its bytes are the blob [`File::blob_key`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct File {
    /// `file-…`.
    pub id: String,
    /// Whose it is.
    pub tenant: String,
    /// What it is for.
    pub purpose: Purpose,
    /// The name it was uploaded under.
    pub filename: String,
    /// Its size.
    pub bytes: u64,
    /// When it was created.
    pub created_at: Seconds,
    /// When it expires, if ever.
    pub expires_at: Option<Seconds>,
    /// The media type that it was uploaded with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub media_type: Option<String>,
}

impl File {
    /// Where its bytes are.
    #[must_use]
    pub fn blob_key(&self) -> String {
        blob_key(&self.id)
    }

    /// Its media type.
    #[must_use]
    pub fn content_type(&self) -> &str {
        match (&self.media_type, self.purpose) {
            (Some(said), _) => said,
            (None, Purpose::Batch | Purpose::BatchOutput) => "application/jsonl",
            (None, _) => "application/octet-stream",
        }
    }

    /// Tells its bytes from those of any other file. They never change.
    #[must_use]
    pub fn etag(&self) -> String {
        format!("\"{}\"", self.id)
    }

    /// Whether its time has come.
    #[must_use]
    pub fn has_expired(&self, now: Seconds) -> bool {
        self.expires_at.is_some_and(|at| at <= now)
    }
}

/// Where the bytes of the file `id` are.
#[must_use]
pub fn blob_key(id: &str) -> String {
    format!("files/{id}")
}
