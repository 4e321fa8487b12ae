//! `/v1/files`, but for the upload.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use axum::Json;
use axum::body::Body;
use axum::extract::{Extension, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, header};
use axum::response::{IntoResponse, Response};
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use serde_json::{Value, json};

use crate::file::{File, Purpose};
use crate::http::auth::Caller;
use crate::http::extract::Id;
use crate::http::holding::{Holding, whole};
use crate::http::page::{Limits, Listing};
use crate::http::range::{self, Wanted};
use crate::http::{ApiError, App, objects};
use crate::run::remove_file;
use crate::store::Deletion;

/// OpenAI's limits.
const LIMITS: Limits = Limits {
    most: 10_000,
    unless_said: 10_000,
};

/// Bytes that a file takes in a list, about.
const FILE_BYTES: u64 = 256;

pub(super) async fn list(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    listing: Listing,
) -> Result<Response, ApiError> {
    let page = listing.page(&LIMITS)?;
    let purpose = match listing.get("purpose") {
        None => None,
        Some("batch_output") => Some(Purpose::BatchOutput),
        // No file has a purpose that does not exist; OpenAI lists none, too.
        Some(name) => match Purpose::uploadable(name) {
            Some(purpose) => Some(purpose),
            None => {
                return Err(ApiError::invalid(
                    "purpose",
                    "invalid_value",
                    format!("'{name}' is no purpose of a file."),
                ));
            }
        },
    };
    let expected = u64::from(page.limit) * FILE_BYTES;
    let mut memory = app.admission.memory(&caller, expected).await?;
    let listed = app.metadata.files(&caller.tenant, purpose, page).await?;
    let listed = listed.ok_or_else(|| listing.unknown_after())?;
    let text = objects::list(&listed, |file| objects::file(file, app.aibrix))?;
    app.admission.fit(&caller, &mut memory, text.len()).await?;
    Ok(whole(text, "application/json", memory))
}

pub(super) async fn retrieve(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    Id(id): Id,
) -> Result<Json<Value>, ApiError> {
    let file = find(&app, &caller, &id).await?;
    Ok(Json(if app.aibrix {
        objects::file_of_aibrix(&file)
    } else {
        objects::file(&file, false)
    }))
}

/// What AIBrix tells of a file without its bytes.
pub(super) async fn head(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    Id(id): Id,
) -> Result<Response, ApiError> {
    let file = find(&app, &caller, &id).await?;
    let mut headers = described(&file);
    headers.insert(header::CONTENT_LENGTH, HeaderValue::from(file.bytes));
    for (name, value) in [
        ("x-file-id", file.id.as_str()),
        ("x-file-name", &in_header(&file.filename)),
        ("x-file-created-at", &file.created_at.to_string()),
        ("x-file-status", objects::file_status(app.aibrix)),
        ("x-file-purpose", file.purpose.as_str()),
    ] {
        set(&mut headers, HeaderName::from_static(name), value);
    }
    Ok((headers, Body::empty()).into_response())
}

pub(super) async fn content(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    Id(id): Id,
    method: Method,
    asked: HeaderMap,
) -> Result<Response, ApiError> {
    let file = find(&app, &caller, &id).await?;
    let mut headers = described(&file);
    let (status, range) = match part(&file, &asked) {
        Wanted::Whole => (StatusCode::OK, 0..file.bytes),
        Wanted::Part(range) => {
            let (first, last) = (range.start, range.end.saturating_sub(1));
            let text = format!("bytes {first}-{last}/{}", file.bytes);
            set(&mut headers, header::CONTENT_RANGE, &text);
            (StatusCode::PARTIAL_CONTENT, range)
        }
        Wanted::Nothing => return Err(ApiError::unsatisfiable(file.bytes)),
    };
    let length = range.end.saturating_sub(range.start);
    headers.insert(header::CONTENT_LENGTH, HeaderValue::from(length));
    headers.insert(header::ACCEPT_RANGES, HeaderValue::from_static("bytes"));
    let (plain, encoded) = (in_header(&file.filename), in_url(&file.filename));
    // The second form is for names with characters that the first cannot have.
    let disposition = format!("attachment; filename=\"{plain}\"; filename*=UTF-8''{encoded}");
    set(&mut headers, header::CONTENT_DISPOSITION, &disposition);
    let body = if method == Method::HEAD {
        Body::empty()
    } else {
        let bytes = app.blobs.stream_bytes();
        let memory = app.admission.memory(&caller, bytes).await?;
        let stream = app.blobs.read(&file.blob_key(), range).await?;
        Body::new(Holding::new(Body::from_stream(stream), memory))
    };
    Ok((status, headers, body).into_response())
}

/// Which bytes a download asks for. What it has already may be another file's.
fn part(file: &File, asked: &HeaderMap) -> Wanted {
    let text = |name| asked.get(name).and_then(|value| value.to_str().ok());
    let of_this_file = text(header::IF_RANGE).is_none_or(|etag| etag == file.etag());
    match text(header::RANGE) {
        Some(value) if of_this_file => range::wanted(value, file.bytes),
        _ => Wanted::Whole,
    }
}

/// What headers tell of a file's bytes.
fn described(file: &File) -> HeaderMap {
    let mut headers = HeaderMap::new();
    set(&mut headers, header::CONTENT_TYPE, file.content_type());
    set(&mut headers, header::ETAG, &file.etag());
    let written = SystemTime::UNIX_EPOCH + Duration::from_secs(file.created_at);
    let written = httpdate::fmt_http_date(written);
    set(&mut headers, header::LAST_MODIFIED, &written);
    // The bytes are a tenant's: no browser should take them for a page of this server's.
    let nosniff = HeaderValue::from_static("nosniff");
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, nosniff);
    headers
}

/// Sets a header; a value that no header can carry is left out.
fn set(headers: &mut HeaderMap, name: HeaderName, value: &str) {
    if let Ok(value) = HeaderValue::from_str(value) {
        headers.insert(name, value);
    }
}

/// A file's name where it can stand in a header within quotes, or else as in a URL.
fn in_header(name: &str) -> String {
    let plain = |c: char| (' '..='~').contains(&c) && !matches!(c, '"' | '\\');
    if name.chars().all(plain) {
        return name.to_owned();
    }
    in_url(name)
}

fn in_url(name: &str) -> String {
    const SPECIAL: &AsciiSet = &NON_ALPHANUMERIC.remove(b'.').remove(b'-').remove(b'_');
    utf8_percent_encode(name, SPECIAL).to_string()
}

pub(super) async fn delete(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    Id(id): Id,
) -> Result<Json<Value>, ApiError> {
    match app.metadata.delete_file(&caller.tenant, &id).await? {
        Deletion::Unknown => return Err(no_such_file(&id)),
        // It goes when its batch has ended.
        Deletion::InUse => {}
        Deletion::Unused => {
            let removed = remove_file(app.metadata.as_ref(), app.blobs.as_ref(), &id).await;
            if let Err(error) = removed {
                tracing::warn!(file = id, %error, "a deleted file was left for the next sweep");
            }
        }
    }
    Ok(Json(json!({"id": id, "object": "file", "deleted": true})))
}

pub(super) async fn find(app: &App, caller: &Caller, id: &str) -> Result<File, ApiError> {
    let found = app.metadata.file(&caller.tenant, id).await?;
    found.ok_or_else(|| no_such_file(id))
}

fn no_such_file(id: &str) -> ApiError {
    ApiError::not_found("id", format!("No such File object: {id}"))
}
