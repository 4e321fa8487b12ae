//! `POST /v1/files`: a multipart form, whose file goes to the blob store while it arrives.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use axum::Json;
use axum::body::{Body, BodyDataStream};
use axum::extract::{Extension, Request, State};
use axum::http::{HeaderMap, header};
use bytes::Bytes;
use futures_util::{Stream, StreamExt};
use multer::{Field, Multipart};
use serde_json::Value;

use crate::batch::blobs::BlobWriter;
use crate::batch::clock::{self, Seconds};
use crate::batch::error::Failure;
use crate::batch::file::{self, BATCH_FILE_KEPT_S, File, KEPT_MAX_S, KEPT_MIN_S, Purpose};
use crate::batch::http::auth::Caller;
use crate::batch::http::{ApiError, App, is_retry, objects};
use crate::batch::id;
use crate::batch::input::FILE_BYTES_MAX;
use crate::batch::store::Create;

/// Bytes of one field of the form that is not the file.
const FIELD_BYTES_MAX: usize = 4 << 10;
/// Fields of one form; OpenAI's clients send four.
const FIELDS_MAX: usize = 32;
/// Bytes of a file's name.
const FILENAME_BYTES_MAX: usize = 512;
/// What is read of an upload after it was refused, so that the client reads the answer instead of
/// failing at writing.
const DRAINED_BYTES_MAX: usize = 256 << 20;
/// How long that may take.
const DRAINED_WITHIN: Duration = Duration::from_secs(20);
/// A client that sends nothing for so long is gone.
const SILENCE: Duration = Duration::from_secs(60);

#[derive(Default)]
struct Form {
    purpose: Option<String>,
    anchor: Option<String>,
    seconds: Option<String>,
    file: Option<Stored>,
}

/// A file whose bytes have been written, and that nobody can see yet.
struct Stored {
    id: String,
    filename: String,
    bytes: u64,
    digest: blake3::Hash,
    writer: Box<dyn BlobWriter>,
}

pub(super) async fn create(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    request: Request,
) -> Result<Json<Value>, ApiError> {
    let headers = request.headers().clone();
    let boundary = headers
        .get(header::CONTENT_TYPE)
        .and_then(|value| value.to_str().ok())
        .and_then(|value| multer::parse_boundary(value).ok());
    let arriving = Arriving::new(request.into_body());
    let outcome = match boundary {
        Some(boundary) => receive(&app, &caller, &headers, &arriving, boundary).await,
        None => Err(ApiError::request(
            "The request must be multipart/form-data, with the fields 'purpose' and 'file'.",
        )),
    };
    if outcome.is_err() {
        arriving.drain().await;
    }
    outcome.map(|file| Json(objects::file(&file)))
}

/// The body of a request; what is left of it can be read after the form was given up.
#[derive(Clone)]
struct Arriving(Arc<Mutex<BodyDataStream>>);

impl Arriving {
    fn new(body: Body) -> Arriving {
        Arriving(Arc::new(Mutex::new(body.into_data_stream())))
    }

    fn stream(&self) -> impl Stream<Item = Result<Bytes, axum::Error>> + Send + use<> {
        let body = Arc::clone(&self.0);
        futures_util::stream::poll_fn(move |context| {
            // Only one of form and drain reads, and neither panics while it does.
            let mut body = body.lock().unwrap_or_else(PoisonError::into_inner);
            body.poll_next_unpin(context)
        })
    }

    async fn drain(self) {
        let mut bytes = 0;
        let mut rest = Box::pin(self.stream());
        let reading = async {
            while let Some(Ok(chunk)) = rest.next().await {
                bytes += chunk.len();
                if bytes > DRAINED_BYTES_MAX {
                    break;
                }
            }
        };
        // A client that is slower than this sees a closed connection.
        tokio::time::timeout(DRAINED_WITHIN, reading).await.ok();
    }
}

async fn receive(
    app: &App,
    caller: &Caller,
    headers: &HeaderMap,
    arriving: &Arriving,
    boundary: String,
) -> Result<File, ApiError> {
    let mut form = Multipart::new(arriving.stream(), boundary);
    let mut fields = Form::default();
    match read_form(app, caller, &mut form, &mut fields).await {
        Ok(()) => finish(app, caller, headers, fields).await,
        Err(error) => {
            if let Some(stored) = fields.file {
                stored.writer.abandon().await;
            }
            Err(error)
        }
    }
}

async fn read_form(
    app: &App,
    caller: &Caller,
    form: &mut Multipart<'_>,
    fields: &mut Form,
) -> Result<(), ApiError> {
    for _ in 0..FIELDS_MAX {
        let Some(mut field) = patiently(form.next_field()).await? else {
            return Ok(());
        };
        let target = match field.name() {
            Some("file") => {
                if fields.file.is_some() {
                    let message = "The form has several files: send one at a time.";
                    return Err(ApiError::invalid("file", "invalid_value", message));
                }
                let limit = byte_limit(app, caller, fields.purpose.as_deref()).await?;
                fields.file = Some(store(app, field, limit).await?);
                continue;
            }
            Some("purpose") => &mut fields.purpose,
            Some("expires_after[anchor]") => &mut fields.anchor,
            Some("expires_after[seconds]") => &mut fields.seconds,
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

/// Waits for the client to send something, though not for ever.
async fn patiently<T>(reading: impl Future<Output = multer::Result<T>>) -> Result<T, ApiError> {
    match tokio::time::timeout(SILENCE, reading).await {
        Ok(Ok(read)) => Ok(read),
        Ok(Err(error)) => Err(ApiError::request(format!(
            "The multipart form cannot be read: {error}."
        ))),
        Err(_) => Err(ApiError::request("The upload has stopped.")),
    }
}

async fn text(field: &mut Field<'_>) -> Result<String, ApiError> {
    let name = field.name().unwrap_or_default().to_owned();
    let mut bytes = Vec::new();
    while let Some(chunk) = patiently(field.chunk()).await? {
        bytes.extend_from_slice(&chunk);
        if bytes.len() > FIELD_BYTES_MAX {
            let message = format!("'{name}' is too long.");
            return Err(ApiError::invalid(&name, "invalid_value", message));
        }
    }
    String::from_utf8(bytes)
        .map_err(|_| ApiError::invalid(&name, "invalid_value", format!("'{name}' is not UTF-8.")))
}

/// Bytes that this file may have, and what the client is told beyond them.
struct ByteLimit {
    bytes: u64,
    by_quota: Option<u64>,
}

async fn byte_limit(
    app: &App,
    caller: &Caller,
    purpose: Option<&str>,
) -> Result<ByteLimit, ApiError> {
    // OpenAI's clients send the purpose first. Where it comes later, it is looked at again then.
    let bytes = match purpose {
        Some("batch") | None => FILE_BYTES_MAX,
        Some(_) => app.limits.file_bytes_max,
    };
    let Some(quota) = app.quota_bytes(caller) else {
        return Ok(ByteLimit {
            bytes,
            by_quota: None,
        });
    };
    let left = quota.saturating_sub(app.metadata.stored_bytes(&caller.tenant).await?);
    Ok(ByteLimit {
        bytes: bytes.min(left),
        by_quota: (left < bytes).then_some(quota),
    })
}

async fn store(app: &App, mut field: Field<'_>, limit: ByteLimit) -> Result<Stored, ApiError> {
    let filename = field.file_name().unwrap_or("upload").to_owned();
    if filename.len() > FILENAME_BYTES_MAX {
        let message = format!("The file's name may have at most {FILENAME_BYTES_MAX} bytes.");
        return Err(ApiError::invalid("file", "invalid_value", message));
    }
    let id = id::fresh("file-")?;
    let mut writer = app.blobs.create(&file::blob_key(&id)).await?;
    let mut hasher = blake3::Hasher::new();
    let mut bytes = 0u64;
    loop {
        let chunk = match patiently(field.chunk()).await {
            Ok(Some(chunk)) => chunk,
            Ok(None) => break,
            Err(error) => {
                writer.abandon().await;
                return Err(error);
            }
        };
        bytes = bytes.saturating_add(chunk.len() as u64);
        if bytes > limit.bytes {
            writer.abandon().await;
            return Err(match limit.by_quota {
                Some(quota_bytes) => Failure::Quota { quota_bytes }.into(),
                None => ApiError::too_large(
                    "file",
                    format!("The file may have at most {} bytes.", limit.bytes),
                ),
            });
        }
        hasher.update(&chunk);
        if let Err(failure) = writer.write(chunk).await {
            writer.abandon().await;
            return Err(failure.into());
        }
    }
    Ok(Stored {
        id,
        filename,
        bytes,
        digest: hasher.finalize(),
        writer,
    })
}

async fn finish(
    app: &App,
    caller: &Caller,
    headers: &HeaderMap,
    form: Form,
) -> Result<File, ApiError> {
    let Form {
        purpose,
        anchor,
        seconds,
        file,
    } = form;
    let Some(stored) = file else {
        return Err(ApiError::missing("file"));
    };
    let checked = purpose_of(purpose.as_deref(), stored.bytes).and_then(|purpose| {
        Ok((
            purpose,
            kept_s(anchor.as_deref(), seconds.as_deref(), purpose)?,
        ))
    });
    let (purpose, kept_s) = match checked {
        Ok(checked) => checked,
        Err(error) => {
            stored.writer.abandon().await;
            return Err(error);
        }
    };
    stored.writer.finish().await?;
    let now = clock::now();
    let file = File {
        id: stored.id,
        tenant: caller.tenant.clone(),
        purpose,
        filename: stored.filename,
        bytes: stored.bytes,
        created_at: now,
        expires_at: kept_s.map(|kept| now.saturating_add(kept)),
    };
    let digest = format!(
        "{} {} {kept_s:?} {}",
        stored.digest.to_hex(),
        purpose.as_str(),
        file.filename
    );
    let create = Create {
        digest,
        is_retry: is_retry(headers),
    };
    let key = file.blob_key();
    let added = app
        .metadata
        .add_file(file, create, app.quota_bytes(caller))
        .await;
    // After any other failure the file may exist all the same, if only the answer was lost; the sweep
    // for litter sees whether it does.
    let superfluous = is_superfluous(&added, &key);
    if superfluous && let Err(error) = app.blobs.delete(&key).await {
        tracing::warn!(key, %error, "an upload was left for the next sweep");
    }
    Ok(added?)
}

/// Whether it is sure that nothing names these bytes: the same file was there already, or it was
/// refused after all.
fn is_superfluous(added: &Result<File, Failure>, key: &str) -> bool {
    match added {
        Ok(added) => added.blob_key() != key,
        Err(Failure::Quota { .. }) => true,
        Err(_) => false,
    }
}

fn purpose_of(purpose: Option<&str>, bytes: u64) -> Result<Purpose, ApiError> {
    let Some(name) = purpose else {
        return Err(ApiError::missing("purpose"));
    };
    let Some(purpose) = Purpose::uploadable(name) else {
        let known: Vec<&str> = Purpose::UPLOADABLE.map(Purpose::as_str).into();
        let message = format!("'{name}' is not one of {known:?}.");
        return Err(ApiError::invalid("purpose", "invalid_value", message));
    };
    if purpose == Purpose::Batch && bytes > FILE_BYTES_MAX {
        let message = format!("A file for a batch may have at most {FILE_BYTES_MAX} bytes.");
        return Err(ApiError::too_large("file", message));
    }
    Ok(purpose)
}

/// How long the file is kept.
fn kept_s(
    anchor: Option<&str>,
    seconds: Option<&str>,
    purpose: Purpose,
) -> Result<Option<Seconds>, ApiError> {
    let (anchor, seconds) = match (anchor, seconds) {
        (None, None) => return Ok((purpose == Purpose::Batch).then_some(BATCH_FILE_KEPT_S)),
        (None, Some(_)) => return Err(ApiError::missing("expires_after[anchor]")),
        (Some(_), None) => return Err(ApiError::missing("expires_after[seconds]")),
        (Some(anchor), Some(seconds)) => (anchor, seconds),
    };
    if anchor != "created_at" {
        let message = "'expires_after[anchor]' must be 'created_at'.";
        return Err(ApiError::invalid(
            "expires_after[anchor]",
            "invalid_value",
            message,
        ));
    }
    match seconds.parse::<Seconds>() {
        Ok(seconds) if (KEPT_MIN_S..=KEPT_MAX_S).contains(&seconds) => Ok(Some(seconds)),
        _ => Err(ApiError::invalid(
            "expires_after[seconds]",
            "invalid_value",
            format!("'expires_after[seconds]' must be between {KEPT_MIN_S} and {KEPT_MAX_S}."),
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_kept_unless_it_is_sure_that_no_file_names_them() {
        let file = File {
            id: "file-1".into(),
            tenant: "a".into(),
            purpose: Purpose::Batch,
            filename: "in.jsonl".into(),
            bytes: 1,
            created_at: 1,
            expires_at: None,
        };
        let key = file.blob_key();
        let lost = Failure::internal("a database query", "the connection is gone");
        assert!(!is_superfluous(&Err(lost), &key));
        assert!(!is_superfluous(&Ok(file.clone()), &key));
        assert!(is_superfluous(&Ok(file), &file::blob_key("file-2")));
        let quota = Failure::Quota { quota_bytes: 1 };
        assert!(is_superfluous(&Err(quota), &key));
    }
}
