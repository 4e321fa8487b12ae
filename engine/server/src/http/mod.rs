//! Health, readiness and metrics, over HTTP.
//!
//! Whoever can reach the port may ask, so all is bounded: connections at once, the time that one may
//! take, the head of a request. A connection carries one request.

mod metrics;

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::State;
use axum::http::StatusCode;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};

use crate::node::Node;
use crate::tally::Tally;

pub use metrics::render;

/// Scrapers and probes at once: a few of each, with room for those that hang.
const CONNECTIONS: usize = 32;
/// What a connection may take from its beginning to its end.
const PATIENCE: Duration = Duration::from_secs(10);
/// The head of a request. hyper takes no less.
const HEAD_BYTES: usize = 8192;
/// Before another connection is taken after one could not be: descriptors come back meanwhile.
const PAUSE: Duration = Duration::from_millis(100);

/// What is served.
#[derive(Clone)]
pub struct App {
    /// The inside of the daemon; another one once it has been opened.
    pub node: watch::Receiver<Arc<dyn Node>>,
    /// What the shell counts.
    pub tally: Arc<Tally>,
}

/// The pages.
pub fn router(app: App) -> Router {
    Router::new()
        .route("/livez", get(async || "ok\n"))
        .route("/readyz", get(ready))
        .route("/metrics", get(page_of_metrics))
        .with_state(app)
}

/// Where it is served, and what serves until it is dropped.
///
/// # Errors
/// When the address cannot be listened on.
pub async fn serve(
    address: SocketAddr,
    app: App,
) -> io::Result<(SocketAddr, impl Future<Output = ()> + use<>)> {
    let listener = TcpListener::bind(address).await?;
    let address = listener.local_addr()?;
    tracing::info!(%address, "serving health and metrics");
    Ok((address, accept(listener, router(app))))
}

async fn accept(listener: TcpListener, router: Router) {
    let places = Arc::new(Semaphore::new(CONNECTIONS));
    // The semaphore is never closed.
    while let Ok(place) = Arc::clone(&places).acquire_owned().await {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(%error, "a connection for health or metrics cannot be taken");
                tokio::time::sleep(PAUSE).await;
                continue;
            }
        };
        let router = router.clone();
        tokio::spawn(async move {
            let _place = place;
            let served = tokio::time::timeout(PATIENCE, answer(stream, router)).await;
            match served {
                Ok(Ok(())) => {}
                Ok(Err(error)) => tracing::debug!(%error, "a request has ended early"),
                Err(_) => tracing::debug!("a request took too long and is cut off"),
            }
        });
    }
}

async fn answer(stream: TcpStream, router: Router) -> hyper::Result<()> {
    http1::Builder::new()
        .timer(TokioTimer::new())
        .keep_alive(false)
        .max_buf_size(HEAD_BYTES)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(router))
        .await
}

/// Whether engines are served, with the reasons why not.
async fn ready(State(app): State<App>) -> Response {
    let node = Arc::clone(&app.node.borrow());
    let Ok(readiness) = tokio::task::spawn_blocking(move || node.readiness()).await else {
        return broken();
    };
    let lines: String = readiness
        .reasons
        .iter()
        .map(|reason| format!("{reason}\n"))
        .collect();
    if readiness.ready {
        (StatusCode::OK, format!("ready\n{lines}")).into_response()
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, lines).into_response()
    }
}

async fn page_of_metrics(State(app): State<App>) -> Response {
    let node = Arc::clone(&app.node.borrow());
    let rendered = tokio::task::spawn_blocking(move || render(&node.status(), &app.tally));
    match rendered.await {
        Ok(page) => ([(CONTENT_TYPE, "text/plain; version=0.0.4")], page).into_response(),
        Err(_) => broken(),
    }
}

/// A thread that answers has panicked, which the log tells.
fn broken() -> Response {
    let message = "kvtide is broken; see its log\n";
    (StatusCode::INTERNAL_SERVER_ERROR, message).into_response()
}
