//! Takes connections and serves them, within bounds: a caller who connects and says nothing, or says it
//! byte by byte, is not waited for.

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

/// How long the head of a request may take, or a connection go without one.
const HEAD_WITHIN: Duration = Duration::from_secs(30);
/// Connections at once; others wait to be taken.
const CONNECTIONS_MAX: usize = 1024;
/// After a failure to take one, of file descriptors perhaps.
const PAUSE: Duration = Duration::from_millis(200);

/// Serves until `shutdown`, and then for up to `grace` what has begun.
pub async fn listen(
    listener: TcpListener,
    router: Router,
    shutdown: CancellationToken,
    grace: Duration,
) {
    let graceful = GracefulShutdown::new();
    let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        let taking = async {
            let place = Arc::clone(&places).acquire_owned().await.ok();
            (place, listener.accept().await)
        };
        let (place, taken) = tokio::select! {
            () = shutdown.cancelled() => break,
            taken = taking => taken,
        };
        let stream = match taken {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(%error, "a connection could not be taken");
                sleep(PAUSE).await;
                continue;
            }
        };
        if let Err(error) = stream.set_nodelay(true) {
            tracing::debug!(%error, "a connection is gone");
            continue;
        }
        let connection = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(HEAD_WITHIN)
            .serve_connection(
                TokioIo::new(stream),
                TowerToHyperService::new(router.clone()),
            );
        let watched = graceful.watch(connection);
        tokio::spawn(async move {
            if let Err(error) = watched.await {
                tracing::debug!(%error, "a connection has ended early");
            }
            drop(place);
        });
    }
    drop(listener);
    if tokio::time::timeout(grace, graceful.shutdown())
        .await
        .is_err()
    {
        tracing::info!("requests that were still being answered are cut off");
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpStream;

    use super::*;

    #[tokio::test]
    async fn who_does_not_say_what_he_wants_is_not_waited_for() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let shutdown = CancellationToken::new();
        let serving = tokio::spawn(listen(
            listener,
            Router::new(),
            shutdown.clone(),
            Duration::ZERO,
        ));
        let mut silent = TcpStream::connect(address).await.unwrap();
        let mut slow = TcpStream::connect(address).await.unwrap();
        slow.write_all(b"GET / HT").await.unwrap();
        // The connections are taken before the clock is moved.
        tokio::time::sleep(Duration::from_millis(200)).await;
        tokio::time::pause();
        tokio::time::advance(HEAD_WITHIN + Duration::from_secs(1)).await;
        tokio::time::resume();
        let mut rest = Vec::new();
        silent.read_to_end(&mut rest).await.unwrap();
        slow.read_to_end(&mut rest).await.unwrap();
        shutdown.cancel();
        serving.await.unwrap();
    }
}
