//! The HTTP side: OpenAI's `/v1/files`, `/v1/batches`, `/v1/models`, AIBrix's users, health, metrics.

mod admission;
mod auth;
mod batches;
mod connections;
mod error;
mod extract;
mod files;
mod health;
mod holding;
mod listen;
mod models;
mod objects;
mod origin;
mod page;
mod progress;
mod range;
mod refusals;
mod reserve;
mod shares;
mod upload;
mod users;

use std::sync::Arc;

use axum::Router;
use axum::http::{HeaderMap, Method, Uri};
use axum::middleware;
use axum::routing::{get, post};
pub use kvtide_control_base::openai::ApiError;
use metrics_exporter_prometheus::PrometheusHandle;
use tokio_util::sync::CancellationToken;

use crate::blobs::Blobs;
use crate::run::{Bell, Upstream, View};
use crate::store::{Metadata, Places};

pub use admission::{Admission, Bounds};
pub use auth::{Access, ONLY_TENANT};
pub use listen::{CONNECTION_BYTES, listen};
pub use refusals::Refusals;
pub use reserve::Reservations;

/// Bounds that an operator can set.
#[derive(Clone, Copy, Debug)]
pub struct HttpLimits {
    /// Bytes of one file that is not for a batch.
    pub file_bytes_max: u64,
    /// Bytes of all files of a tenant whose key names no other quota; none is no limit.
    pub storage_bytes: Option<u64>,
    /// Batches that have not ended.
    pub places: Places,
}

/// What the handlers work with.
pub struct App {
    /// Files and batches.
    pub metadata: Arc<dyn Metadata>,
    /// Their bytes.
    pub blobs: Arc<dyn Blobs>,
    /// Who may call.
    pub access: Access,
    /// Whose models are listed.
    pub upstream: Arc<Upstream>,
    /// Tells the runner what has happened.
    pub bell: Arc<Bell>,
    /// How the runner's requests fare.
    pub view: View,
    /// Bounds.
    pub limits: HttpLimits,
    /// Creates that were refused.
    pub refusals: Refusals,
    /// Of uploads that are under way.
    pub reservations: Reservations,
    /// How much is done at once.
    pub admission: Admission,
    /// Whether files are described as AIBrix v0.5.0 describes them.
    pub aibrix: bool,
    /// The server is about to stop: others should be asked.
    pub leaving: CancellationToken,
    /// What `/metrics` shows.
    pub metrics: PrometheusHandle,
}

impl App {
    fn quota_bytes(&self, caller: &auth::Caller) -> Option<u64> {
        caller.storage_bytes.or(self.limits.storage_bytes)
    }
}

/// All routes.
pub fn router(app: Arc<App>) -> Router {
    let files = || post(upload::create).get(files::list);
    let batches = || post(batches::create).get(batches::list);
    let file = get(files::retrieve).head(files::head).delete(files::delete);
    let api = Router::new()
        // AIBrix's clients call the collections with a slash at the end.
        .route("/v1/files", files())
        .route("/v1/files/", files())
        .route("/v1/files/{id}", file)
        .route("/v1/files/{id}/content", get(files::content))
        .route("/v1/batches", batches())
        .route("/v1/batches/", batches())
        .route("/v1/batches/{id}", get(batches::retrieve))
        .route("/v1/batches/{id}/cancel", post(batches::cancel))
        .route("/v1/models", get(models::list))
        .route("/v1/models/", get(models::list))
        .route("/v1/models/{*id}", get(models::retrieve))
        .route("/{action}", post(users::manage))
        .route_layer(middleware::from_fn_with_state(
            Arc::clone(&app),
            admission::admit,
        ))
        .route_layer(middleware::from_fn_with_state(
            Arc::clone(&app),
            auth::authenticate,
        ));
    Router::new()
        .route("/healthz", get(health::alive))
        .route("/readyz", get(health::ready))
        .route("/status", get(health::status))
        .route("/metrics", get(health::metrics))
        .merge(api)
        .fallback(no_route)
        .method_not_allowed_fallback(no_method)
        .layer(middleware::from_fn_with_state(
            Arc::clone(&app),
            auth::frame,
        ))
        .with_state(app)
}

async fn no_route(method: Method, uri: Uri) -> ApiError {
    ApiError::no_route(method.as_str(), uri.path())
}

async fn no_method(method: Method, uri: Uri) -> ApiError {
    ApiError::method(method.as_str(), uri.path())
}

/// Whether the client says that it has sent this before and got no answer.
fn is_retry(headers: &HeaderMap) -> bool {
    headers
        .get("x-stainless-retry-count")
        .and_then(|value| value.to_str().ok())
        .and_then(|value| value.parse::<u32>().ok())
        .is_some_and(|count| count >= 1)
}
