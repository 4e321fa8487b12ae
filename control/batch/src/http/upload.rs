//! `POST /v1/files`: a multipart form, whose file goes to the blob store while it arrives.

mod arriving;
mod form;
mod quota;
mod stored;

use std::sync::Arc;

use axum::Json;
use axum::extract::{Extension, Request, State};
use axum::http::{HeaderMap, header};
use multer::Multipart;
use serde_json::Value;

use crate::clock::{self, Seconds};
use crate::error::Failure;
use crate::file::{File, Purpose};
use crate::http::auth::Caller;
use crate::http::{ApiError, App, is_retry, objects};
use crate::store::Create;

use arriving::Arriving;
use form::{Form, read_form};
use stored::Stored;

/// Memory of an upload: what its form's reader has taken in, what is hashed, what is written.
const UPLOAD_BYTES: u64 = 96 << 10;

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
    outcome.map(|file| Json(objects::file(&file, app.aibrix)))
}

async fn receive(
    app: &App,
    caller: &Caller,
    headers: &HeaderMap,
    arriving: &Arriving,
    boundary: String,
) -> Result<File, ApiError> {
    let _memory = app.admission.body(caller, UPLOAD_BYTES).await?;
    let mut reader = Multipart::new(arriving.stream(), boundary);
    let mut form = Form::default();
    let read = read_form(app, caller, arriving, &mut reader, &mut form).await;
    let Some(stored) = form.file.take() else {
        read?;
        return Err(ApiError::missing("file"));
    };
    let checked = read.and_then(|()| form.check(app, stored.bytes));
    match checked {
        Ok((purpose, kept_s)) => {
            let kept = Kept { purpose, kept_s };
            finish(app, caller, stored, kept, is_retry(headers)).await
        }
        Err(error) => {
            stored.writer.abandon().await;
            Err(error)
        }
    }
}

/// What a form says of its file.
struct Kept {
    purpose: Purpose,
    kept_s: Option<Seconds>,
}

async fn finish(
    app: &App,
    caller: &Caller,
    stored: Stored,
    Kept { purpose, kept_s }: Kept,
    is_retry: bool,
) -> Result<File, ApiError> {
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
        media_type: stored.media_type,
    };
    let digest = format!(
        "{} {} {kept_s:?} {}",
        stored.digest.to_hex(),
        purpose.as_str(),
        file.filename
    );
    let create = Create { digest, is_retry };
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::file::blob_key;

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
            media_type: None,
        };
        let key = file.blob_key();
        let lost = Failure::internal("a database query", "the connection is gone");
        assert!(!is_superfluous(&Err(lost), &key));
        assert!(!is_superfluous(&Ok(file.clone()), &key));
        assert!(is_superfluous(&Ok(file), &blob_key("file-2")));
        let quota = Failure::Quota { quota_bytes: 1 };
        assert!(is_superfluous(&Err(quota), &key));
    }
}
