//! `/v1/files`, but for the upload.

use std::sync::Arc;

use axum::Json;
use axum::body::Body;
use axum::extract::{Extension, Path, State};
use axum::http::{HeaderValue, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use crate::batch::file::{File, Purpose};
use crate::batch::http::auth::Caller;
use crate::batch::http::page::{Limits, Listing};
use crate::batch::http::{ApiError, App, objects};
use crate::batch::run::remove_file;
use crate::batch::store::Deletion;

/// OpenAI's limits.
const LIMITS: Limits = Limits {
    most: 10_000,
    unless_said: 10_000,
};

pub(super) async fn list(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    listing: Listing,
) -> Result<Json<Value>, ApiError> {
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
    let listed = app.metadata.files(&caller.tenant, purpose, page).await?;
    let listed = listed.ok_or_else(|| listing.unknown_after())?;
    Ok(Json(objects::list(&listed, objects::file)))
}

pub(super) async fn retrieve(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    Path(id): Path<String>,
) -> Result<Json<Value>, ApiError> {
    Ok(Json(objects::file(&find(&app, &caller, &id).await?)))
}

pub(super) async fn content(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    Path(id): Path<String>,
) -> Result<Response, ApiError> {
    let file = find(&app, &caller, &id).await?;
    let bytes = app.blobs.read(&file.blob_key(), 0..file.bytes).await?;
    let mut response = Body::from_stream(bytes).into_response();
    let headers = response.headers_mut();
    headers.insert(
        header::CONTENT_TYPE,
        HeaderValue::from_static("application/octet-stream"),
    );
    headers.insert(header::CONTENT_LENGTH, HeaderValue::from(file.bytes));
    // The client's own name for the file may be anything; the id is safe in a header.
    if let Ok(value) = HeaderValue::from_str(&format!("attachment; filename=\"{}.jsonl\"", file.id))
    {
        headers.insert(header::CONTENT_DISPOSITION, value);
    }
    Ok(response)
}

pub(super) async fn delete(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    Path(id): Path<String>,
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
