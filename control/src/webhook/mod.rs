//! The validating webhook: says no, with the field's path, to what neither schema nor CEL can see.
//!
//! Every replica serves it. It keeps no state, so it cannot be behind: `review` decides from the request
//! alone, and `dry_run` has the API server try what the controllers would create. What would be refused
//! although it is stored already is let through unchanged: a finalizer must be removable from anything.

mod authority;
mod certificate;
mod dry_run;
mod review;

use std::net::SocketAddr;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use anyhow::Context;
use axum::extract::State;
use axum::routing::post;
use axum::{Json, Router};
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use hyper_util::service::TowerToHyperService;
use kube::Client;
use kube::core::DynamicObject;
use kube::core::admission::{AdmissionRequest, AdmissionResponse, AdmissionReview};
use kvtide_control_core::validate;
use rustls::ServerConfig;
use serde_json::Value;
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio_rustls::TlsAcceptor;

use dry_run::DryRuns;
use review::Verdict;

pub use authority::keep_trusted;
pub(crate) use certificate::SECRET;
pub use certificate::{Own, Source, own};

/// Connections at once. The API server keeps a few and reuses them.
const CONNECTIONS_MAX: usize = 64;
/// How often a mounted certificate is read again.
const RELOAD_EVERY: Duration = Duration::from_secs(60);
/// A handshake that takes longer is dropped.
const HANDSHAKE_MAX: Duration = Duration::from_secs(5);

/// Serves the webhook until the process ends.
///
/// # Errors
///
/// When the port is taken or the certificate cannot be read.
pub async fn serve(address: SocketAddr, source: Source, client: Client) -> anyhow::Result<()> {
    let tls = Arc::new(RwLock::new(source.load()?));
    let reloaded = tls.clone();
    let reload = async move {
        loop {
            tokio::time::sleep(RELOAD_EVERY).await;
            match source.load() {
                Ok(config) => *reloaded.write().unwrap_or_else(PoisonError::into_inner) = config,
                Err(error) => tracing::warn!(%error, "the webhook keeps its old certificate"),
            }
        }
    };
    let listener = TcpListener::bind(address)
        .await
        .with_context(|| format!("the webhook: listening on {address}"))?;
    tracing::info!(%address, "serving the webhook");
    tokio::select! {
        () = reload => Ok(()),
        outcome = accept(listener, tls, client) => outcome,
    }
}

async fn accept(
    listener: TcpListener,
    tls: Arc<RwLock<Arc<ServerConfig>>>,
    client: Client,
) -> anyhow::Result<()> {
    let routes = Router::new()
        .route("/validate", post(review))
        .with_state(Arc::new(DryRuns::new(client)));
    let permits = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        let permit = permits
            .clone()
            .acquire_owned()
            .await
            .context("the webhook's connections")?;
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(%error, "the webhook could not accept a connection");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let config = tls.read().unwrap_or_else(PoisonError::into_inner).clone();
        let routes = routes.clone();
        tokio::spawn(async move {
            let _permit = permit;
            let handshake = TlsAcceptor::from(config).accept(stream);
            let Ok(Ok(stream)) = tokio::time::timeout(HANDSHAKE_MAX, handshake).await else {
                tracing::debug!("a TLS handshake with the webhook failed");
                return;
            };
            let service = TowerToHyperService::new(routes);
            let server = auto::Builder::new(TokioExecutor::new());
            if let Err(error) = server.serve_connection(TokioIo::new(stream), service).await {
                tracing::debug!(%error, "a connection to the webhook broke");
            }
        });
    }
}

async fn review(
    State(dry_runs): State<Arc<DryRuns>>,
    Json(review): Json<AdmissionReview<DynamicObject>>,
) -> Json<Value> {
    let response = match TryInto::<AdmissionRequest<DynamicObject>>::try_into(review) {
        Ok(request) => {
            let mut verdict = review::look_at(&request);
            if verdict.violations.is_empty() {
                verdict.join(dry_runs.try_out(&request).await);
            }
            answer(&request, verdict)
        }
        Err(error) => AdmissionResponse::invalid(error.to_string()),
    };
    metrics::counter!(
        "kvtide_control_reviews_total", "allowed" => response.allowed.to_string()
    )
    .increment(1);
    Json(serde_json::to_value(response.into_review()).unwrap_or_default())
}

/// Yes, or no and why.
fn answer(request: &AdmissionRequest<DynamicObject>, verdict: Verdict) -> AdmissionResponse {
    let mut response = AdmissionResponse::from(request);
    response.warnings = (!verdict.warnings.is_empty()).then_some(verdict.warnings);
    if verdict.violations.is_empty() {
        response
    } else {
        response.deny(validate::describe(&verdict.violations))
    }
}
