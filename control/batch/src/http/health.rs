//! Is the server alive, can it work, how is it doing.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::http::HeaderMap;
use axum::response::Response;
use serde_json::{Value, json};

use crate::http::admission::Probe;
use crate::http::holding::whole;
use crate::http::{ApiError, App};

/// The process runs.
pub(super) async fn alive() -> Json<Value> {
    Json(json!({"status": "ok"}))
}

/// Database and blob store answer, and the server is not about to stop.
pub(super) async fn ready(
    State(app): State<Arc<App>>,
    _place: Probe,
) -> Result<Json<Value>, ApiError> {
    if app.leaving.is_cancelled() {
        return Err(ApiError::unavailable("the server is about to stop"));
    }
    let (metadata, blobs) = tokio::join!(app.metadata.ping(), app.blobs.ping());
    for (part, answer) in [("the database", metadata), ("the blob store", blobs)] {
        if let Err(error) = answer {
            tracing::warn!(%error, "{part} does not answer");
            return Err(ApiError::unavailable(format!("{part} does not answer")));
        }
    }
    Ok(Json(json!({"status": "ready"})))
}

/// The queue at a glance. Models' names are told to whoever may know all tenants'.
pub(super) async fn status(
    State(app): State<Arc<App>>,
    _place: Probe,
    headers: HeaderMap,
) -> Result<Json<Value>, ApiError> {
    let queue = app.metadata.queue().await?;
    let models = app.view.standings();
    let mut status = json!({
        "status": "ok",
        "version": env!("CARGO_PKG_VERSION"),
        "batches": {"live": queue.live, "waiting": queue.waiting},
        "requests": {
            "in_flight": models.iter().map(|model| model.in_flight).sum::<usize>(),
            "to_repeat": models.iter().map(|model| model.to_repeat).sum::<usize>(),
        },
    });
    if app.access.may_see_all(&headers) {
        status["models"] = json!(models);
    }
    Ok(Json(status))
}

/// Prometheus' page.
pub(super) async fn metrics(State(app): State<Arc<App>>, place: Probe) -> Response {
    let page = app.metrics.render().into_bytes();
    whole(page, "text/plain; version=0.0.4; charset=utf-8", place.0)
}
