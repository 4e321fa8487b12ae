//! The form of an upload: which fields it may have, and what they may say.

use multer::{Field, Multipart};

use super::arriving::{Arriving, OUTSIDE_BYTES_MAX, arrived};
use super::stored::{Stored, store};
use crate::clock::Seconds;
use crate::file::{BATCH_FILE_KEPT_S, KEPT_MAX_S, KEPT_MIN_S, Purpose};
use crate::http::auth::Caller;
use crate::http::{ApiError, App};
use crate::input::FILE_BYTES_MAX;

/// Bytes of one field of the form that is not the file.
const FIELD_BYTES_MAX: usize = 4 << 10;
/// Fields of one form; OpenAI's clients send four.
const FIELDS_MAX: usize = 32;
const ANCHOR: &str = "expires_after[anchor]";
const SECONDS: &str = "expires_after[seconds]";

/// What a form has said so far.
#[derive(Default)]
pub(super) struct Form {
    purpose: Option<String>,
    anchor: Option<String>,
    seconds: Option<String>,
    pub(super) file: Option<Stored>,
}

/// Reads a form to its end, its file into the blob store.
pub(super) async fn read_form(
    app: &App,
    caller: &Caller,
    arriving: &Arriving,
    form: &mut Multipart<'_>,
    fields: &mut Form,
) -> Result<(), ApiError> {
    for _ in 0..FIELDS_MAX {
        arriving.allow(OUTSIDE_BYTES_MAX);
        let Some(mut field) = arrived(form.next_field().await)? else {
            return Ok(());
        };
        arriving.allow(usize::MAX);
        let target = match field.name() {
            Some("file") => {
                if fields.file.is_some() {
                    let message = "The form has several files: send one at a time.";
                    return Err(ApiError::invalid("file", "invalid_value", message));
                }
                let bytes_max = bytes_max(app, fields.purpose.as_deref());
                fields.file = Some(store(app, caller, field, bytes_max).await?);
                continue;
            }
            Some("purpose") => &mut fields.purpose,
            Some(ANCHOR) => &mut fields.anchor,
            Some(SECONDS) => &mut fields.seconds,
            other => {
                let param = other.unwrap_or_default();
                let message = format!("Unknown parameter: '{param}'.");
                return Err(ApiError::invalid(param, "unknown_parameter", message));
            }
        };
        *target = Some(text(&mut field).await?);
    }
    Err(ApiError::request("The form has too many fields."))
}

async fn text(field: &mut Field<'_>) -> Result<String, ApiError> {
    let name = field.name().unwrap_or_default().to_owned();
    let mut bytes = Vec::new();
    while let Some(chunk) = arrived(field.chunk().await)? {
        bytes.extend_from_slice(&chunk);
        if bytes.len() > FIELD_BYTES_MAX {
            let message = format!("'{name}' is too long.");
            return Err(ApiError::invalid(&name, "invalid_value", message));
        }
    }
    String::from_utf8(bytes)
        .map_err(|_| ApiError::invalid(&name, "invalid_value", format!("'{name}' is not UTF-8.")))
}

/// Bytes that a file for this may have. OpenAI's clients say what it is for first; where that comes
/// later, the file is looked at again then.
fn bytes_max(app: &App, purpose: Option<&str>) -> u64 {
    let others = app.limits.file_bytes_max;
    match purpose {
        Some("batch") => FILE_BYTES_MAX,
        Some(_) => others,
        None => FILE_BYTES_MAX.max(others),
    }
}

impl Form {
    /// What the file is for, and how long it is kept.
    pub(super) fn check(
        &self,
        app: &App,
        bytes: u64,
    ) -> Result<(Purpose, Option<Seconds>), ApiError> {
        let purpose = self.checked_purpose(app, bytes)?;
        Ok((purpose, self.kept_s(purpose)?))
    }

    fn checked_purpose(&self, app: &App, bytes: u64) -> Result<Purpose, ApiError> {
        let Some(name) = &self.purpose else {
            return Err(ApiError::missing("purpose"));
        };
        let Some(purpose) = Purpose::uploadable(name) else {
            let known: Vec<&str> = Purpose::UPLOADABLE.map(Purpose::as_str).into();
            let message = format!("'{name}' is not one of {known:?}.");
            return Err(ApiError::invalid("purpose", "invalid_value", message));
        };
        let most = bytes_max(app, Some(name));
        if bytes > most {
            let message = format!("A file for '{name}' may have at most {most} bytes.");
            return Err(ApiError::too_large("file", message));
        }
        Ok(purpose)
    }

    fn kept_s(&self, purpose: Purpose) -> Result<Option<Seconds>, ApiError> {
        let wrong = |field, message| Err(ApiError::invalid(field, "invalid_value", message));
        let (anchor, seconds) = match (&self.anchor, &self.seconds) {
            (None, None) => return Ok((purpose == Purpose::Batch).then_some(BATCH_FILE_KEPT_S)),
            (None, Some(_)) => return Err(ApiError::missing(ANCHOR)),
            (Some(_), None) => return Err(ApiError::missing(SECONDS)),
            (Some(anchor), Some(seconds)) => (anchor, seconds),
        };
        if anchor != "created_at" {
            return wrong(ANCHOR, format!("'{ANCHOR}' must be 'created_at'."));
        }
        match seconds.parse::<Seconds>() {
            Ok(seconds) if (KEPT_MIN_S..=KEPT_MAX_S).contains(&seconds) => Ok(Some(seconds)),
            _ => wrong(
                SECONDS,
                format!("'{SECONDS}' must be between {KEPT_MIN_S} and {KEPT_MAX_S}."),
            ),
        }
    }
}
