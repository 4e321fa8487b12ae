//! `POST /v1/files`: a multipart form, whose file goes to the blob store while it arrives.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::Poll;
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
use crate::batch::http::reserve::Reservation;
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
/// Bytes of a form before its first part and in the head of each, which are kept in memory.
const OUTSIDE_BYTES_MAX: usize = 64 << 10;
/// Bytes given to the form's reader at once: it takes in all that it is given.
const CHUNK_BYTES: usize = 16 << 10;
/// Bytes of an upload after which the quota is looked up again: others are entered meanwhile.
const QUOTA_CHECKED_EVERY: u64 = 1 << 20;
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
    reservation: Option<Reservation>,
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
struct Arriving {
    body: Arc<Mutex<BodyDataStream>>,
    /// Bytes that may still arrive before something has to come of them.
    allowed: Arc<AtomicUsize>,
}

/// Why a form is not read on.
#[derive(Debug, thiserror::Error)]
enum Broken {
    #[error(
        "it has more than {OUTSIDE_BYTES_MAX} bytes before its first part or in the head of one; is \
         its boundary that of the Content-Type?"
    )]
    Outside,
    #[error(transparent)]
    Body(#[from] axum::Error),
}

impl Arriving {
    fn new(body: Body) -> Arriving {
        Arriving {
            body: Arc::new(Mutex::new(body.into_data_stream())),
            allowed: Arc::new(AtomicUsize::new(usize::MAX)),
        }
    }

    /// Only so many bytes are read from now on.
    fn allow(&self, bytes: usize) {
        self.allowed.store(bytes, Ordering::Relaxed);
    }

    /// What arrives, in pieces. Between two of them it says that it has to be waited for: whoever
    /// reads then looks at what he has, instead of taking in ever more.
    fn stream(&self) -> impl Stream<Item = Result<Bytes, Broken>> + Send + use<> {
        let (body, allowed) = (Arc::clone(&self.body), Arc::clone(&self.allowed));
        let mut rest = Bytes::new();
        let mut paused = true;
        futures_util::stream::poll_fn(move |context| {
            paused = !paused;
            if paused {
                context.waker().wake_by_ref();
                return Poll::Pending;
            }
            if rest.is_empty() {
                // Only one of form and drain reads, and neither panics while it does.
                let mut body = body.lock().unwrap_or_else(PoisonError::into_inner);
                let next = body.poll_next_unpin(context);
                rest = match next {
                    Poll::Ready(Some(Ok(chunk))) => chunk,
                    other => {
                        paused = true;
                        return other.map(|end| end.map(|chunk| chunk.map_err(Broken::Body)));
                    }
                };
            }
            let chunk = rest.split_to(rest.len().min(CHUNK_BYTES));
            let left = allowed.load(Ordering::Relaxed).checked_sub(chunk.len());
            Poll::Ready(Some(match left {
                Some(left) => {
                    allowed.store(left, Ordering::Relaxed);
                    Ok(chunk)
                }
                None => Err(Broken::Outside),
            }))
        })
    }

    async fn drain(self) {
        self.allow(DRAINED_BYTES_MAX);
        let mut rest = Box::pin(self.stream());
        let reading = async { while let Some(Ok(_)) = rest.next().await {} };
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
    match read_form(app, caller, arriving, &mut form, &mut fields).await {
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
    arriving: &Arriving,
    form: &mut Multipart<'_>,
    fields: &mut Form,
) -> Result<(), ApiError> {
    for _ in 0..FIELDS_MAX {
        arriving.allow(OUTSIDE_BYTES_MAX);
        let Some(mut field) = patiently(form.next_field()).await? else {
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
        Ok(Err(error)) => {
            // What is wrong with the body is in the cause.
            let reason = match &error {
                multer::Error::StreamReadFailed(cause) => cause.to_string(),
                error => error.to_string(),
            };
            let message = format!("The multipart form cannot be read: {reason}.");
            Err(ApiError::request(message))
        }
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

/// Bytes that this file may have. OpenAI's clients send the purpose first; where it comes later, it is
/// looked at again then.
fn bytes_max(app: &App, purpose: Option<&str>) -> u64 {
    match purpose {
        Some("batch") | None => FILE_BYTES_MAX,
        Some(_) => app.limits.file_bytes_max,
    }
}

/// What is left of the caller's quota for files that are under way.
struct Quota<'a> {
    app: &'a App,
    caller: &'a Caller,
    bytes: u64,
    /// What the database knew when it was last asked.
    stored: u64,
    /// Bytes that may arrive before it is asked again.
    good_for: u64,
    reservation: Reservation,
}

impl<'a> Quota<'a> {
    /// None where the caller may store as much as there is room for.
    async fn of(app: &'a App, caller: &'a Caller) -> Result<Option<Quota<'a>>, Failure> {
        let Some(bytes) = app.quota_bytes(caller) else {
            return Ok(None);
        };
        let mut quota = Quota {
            app,
            caller,
            bytes,
            stored: 0,
            good_for: 0,
            reservation: app.reservations.begin(&caller.tenant),
        };
        quota.look().await?;
        Ok(Some(quota))
    }

    async fn look(&mut self) -> Result<(), Failure> {
        self.stored = self.app.metadata.stored_bytes(&self.caller.tenant).await?;
        self.good_for = QUOTA_CHECKED_EVERY;
        Ok(())
    }

    /// So many bytes have arrived.
    async fn take(&mut self, bytes: u64) -> Result<(), Failure> {
        let mut fresh = self.good_for < bytes;
        if fresh {
            self.look().await?;
        }
        loop {
            let left = self.bytes.saturating_sub(self.stored);
            if self.reservation.grow(bytes, left) {
                self.good_for = self.good_for.saturating_sub(bytes);
                return Ok(());
            }
            if fresh {
                return Err(Failure::Quota {
                    quota_bytes: self.bytes,
                });
            }
            self.look().await?;
            fresh = true;
        }
    }
}

async fn store<'a>(
    app: &'a App,
    caller: &'a Caller,
    mut field: Field<'_>,
    bytes_max: u64,
) -> Result<Stored, ApiError> {
    let filename = field.file_name().unwrap_or("upload").to_owned();
    if filename.len() > FILENAME_BYTES_MAX {
        let message = format!("The file's name may have at most {FILENAME_BYTES_MAX} bytes.");
        return Err(ApiError::invalid("file", "invalid_value", message));
    }
    let mut quota = Quota::of(app, caller).await?;
    let id = id::fresh("file-")?;
    let mut writer = app.blobs.create(&file::blob_key(&id)).await?;
    let mut hasher = blake3::Hasher::new();
    let mut bytes = 0u64;
    let arrived = async {
        while let Some(chunk) = patiently(field.chunk()).await? {
            bytes = bytes.saturating_add(chunk.len() as u64);
            if bytes > bytes_max {
                let message = format!("The file may have at most {bytes_max} bytes.");
                return Err(ApiError::too_large("file", message));
            }
            if let Some(quota) = &mut quota {
                quota.take(chunk.len() as u64).await?;
            }
            hasher.update(&chunk);
            writer.write(chunk).await?;
        }
        Ok(())
    };
    if let Err(error) = arrived.await {
        writer.abandon().await;
        return Err(error);
    }
    Ok(Stored {
        id,
        filename,
        bytes,
        digest: hasher.finalize(),
        writer,
        reservation: quota.map(|quota| quota.reservation),
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
    // From here on the database counts it, and would count it twice.
    drop(stored.reservation);
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

    /// How many bytes a form whose boundary never comes is read for, and the error.
    async fn never_a_boundary(pieces: usize, piece: &'static [u8]) -> (usize, String) {
        let sent = Arc::new(AtomicUsize::new(0));
        let counter = Arc::clone(&sent);
        let body = futures_util::stream::iter(0..pieces).map(move |_| {
            counter.fetch_add(piece.len(), Ordering::Relaxed);
            Ok::<_, std::io::Error>(Bytes::from_static(piece))
        });
        let arriving = Arriving::new(Body::from_stream(body));
        let mut form = Multipart::new(arriving.stream(), "b");
        arriving.allow(OUTSIDE_BYTES_MAX);
        let error = patiently(form.next_field()).await.unwrap_err();
        (sent.load(Ordering::Relaxed), format!("{error:?}"))
    }

    #[tokio::test]
    async fn what_is_outside_of_fields_is_not_read_without_end() {
        for piece in [&[b'x'; 1000][..], &[b'x'; 300_000]] {
            let (read, error) = never_a_boundary(1000, piece).await;
            assert!(read <= OUTSIDE_BYTES_MAX + piece.len(), "{read}");
            assert!(error.contains("more than 65536 bytes before"), "{error}");
        }
    }

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
