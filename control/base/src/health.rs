//! Health, readiness and metrics of a process of which one leads.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::Context;
use axum::Router;
use axum::extract::State;
use axum::http::StatusCode;
use axum::routing::get;
use metrics_exporter_prometheus::PrometheusHandle;
use tokio::net::TcpListener;
use tokio::sync::watch;

/// What the health endpoints tell.
#[derive(Debug, Default)]
pub struct Health {
    /// This process does what its place asks for: it leads with full caches, or it waits to.
    pub ready: AtomicBool,
    /// It leads.
    pub leads: AtomicBool,
}

/// Serves `/healthz`, `/readyz` and `/metrics` until `stopped`.
///
/// # Errors
///
/// When the port is taken, or the server breaks.
pub async fn serve(
    address: SocketAddr,
    health: Arc<Health>,
    metrics: PrometheusHandle,
    mut stopped: watch::Receiver<bool>,
) -> anyhow::Result<()> {
    let listener = TcpListener::bind(address)
        .await
        .with_context(|| format!("listening on {address}"))?;
    tracing::info!(address = %listener.local_addr()?, "serving health and metrics");
    let routes = Router::new()
        .route("/healthz", get(|| async { "ok\n" }))
        .route("/readyz", get(ready))
        .with_state(health)
        .route(
            "/metrics",
            get(move || std::future::ready(metrics.render())),
        );
    axum::serve(listener, routes)
        .with_graceful_shutdown(async move {
            // An error means that the sender is gone, and that the process stops.
            if stopped.wait_for(|stopped| *stopped).await.is_err() {
                tracing::debug!("stopping with the process");
            }
        })
        .await
        .context("serving health and metrics")
}

async fn ready(State(health): State<Arc<Health>>) -> (StatusCode, &'static str) {
    let leads = health.leads.load(Ordering::Relaxed);
    match (health.ready.load(Ordering::Relaxed), leads) {
        (true, true) => (StatusCode::OK, "leading\n"),
        (true, false) => (StatusCode::OK, "waiting to lead\n"),
        (false, _) => (StatusCode::SERVICE_UNAVAILABLE, "filling caches\n"),
    }
}
