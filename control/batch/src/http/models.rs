//! `/v1/models`: the upstream's.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use serde_json::{Value, json};

use crate::http::extract::Id;
use crate::http::{ApiError, App};
use crate::run::NoAnswer;

pub(super) async fn list(State(app): State<Arc<App>>) -> Result<Json<Value>, ApiError> {
    let data = fetch(&app).await?;
    Ok(Json(json!({"object": "list", "data": data})))
}

/// A model's id may hold slashes.
pub(super) async fn retrieve(
    State(app): State<Arc<App>>,
    Id(id): Id,
) -> Result<Json<Value>, ApiError> {
    if id.is_empty() {
        return list(State(app)).await;
    }
    let models = fetch(&app).await?;
    let found = models.into_iter().find(|model| model["id"] == id.as_str());
    found
        .map(Json)
        .ok_or_else(|| ApiError::not_found("model", format!("The model '{id}' does not exist")))
}

async fn fetch(app: &App) -> Result<Vec<Value>, ApiError> {
    let models = app.upstream.models().await.map_err(|error| {
        tracing::warn!(%error, "the upstream's models cannot be listed");
        ApiError::upstream(match error {
            NoAnswer::Exhausted(_) => {
                "The models cannot be listed: this server can make no further connection."
            }
            _ => "The models cannot be listed: the upstream does not answer.",
        })
    })?;
    Ok(models)
}
