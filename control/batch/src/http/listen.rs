//! Takes connections and serves them, within bounds: a caller who connects and says nothing, says it
//! byte by byte, or does not read what he is answered, is not waited for.

use std::convert::Infallible;
use std::net::IpAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::http::{Request, Response};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::Service;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use socket2::SockRef;
use tokio::net::{TcpListener, TcpStream};
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use crate::http::connections::{Busy, Connection, Connections};
use crate::http::holding::Holding;
use crate::http::progress::{Arrives, IsRead};

/// How long a connection may go without a request. Load balancers keep theirs open for a minute
/// (Amazon's) to ten (Google's) and send the next request just when it is closed if that comes first.
const IDLE: Duration = Duration::from_secs(620);
/// Bytes that a connection reads ahead of the request that they belong to, and of an answer that wait
/// to be written. A request's head has to fit in.
const BUFFER_BYTES: usize = 16 << 10;
/// Bytes of an answer that the system takes before they are sent. Whoever does not read would else
/// take megabytes there.
const UNSENT_BYTES: u32 = 128 << 10;
/// Memory of a connection: its buffers, and what it is.
pub const CONNECTION_BYTES: u64 = 2 * BUFFER_BYTES as u64;
/// After a failure to take one, of file descriptors perhaps.
const PAUSE: Duration = Duration::from_millis(200);

/// Whoever has connected.
#[derive(Clone, Copy, Debug)]
pub(super) struct Peer(pub(super) IpAddr);

/// Serves until `closing`, on at most so many connections at once, and then for up to `grace` what has
/// begun.
pub async fn listen(
    listener: TcpListener,
    router: Router,
    connections_max: usize,
    closing: CancellationToken,
    grace: Duration,
) {
    let graceful = GracefulShutdown::new();
    let connections = Connections::new(connections_max);
    loop {
        let taking = async {
            let taken = listener.accept().await;
            connections.room().await;
            taken
        };
        let taken = tokio::select! {
            () = closing.cancelled() => break,
            taken = taking => taken,
        };
        let (stream, peer) = match taken {
            Ok((stream, address)) => (stream, address.ip()),
            Err(error) => {
                tracing::warn!(%error, "a connection could not be taken");
                connections.close_one();
                sleep(PAUSE).await;
                continue;
            }
        };
        let connection = connections.enter(peer);
        if let Err(error) = prepare(&stream) {
            tracing::debug!(%error, "a connection is gone");
            continue;
        }
        let serving = Serving {
            router: TowerToHyperService::new(router.clone()),
            connection: Arc::clone(&connection),
            peer: Peer(peer),
        };
        let served = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(IDLE)
            .max_buf_size(BUFFER_BYTES)
            .serve_connection(TokioIo::new(IsRead::new(stream)), serving);
        let watched = graceful.watch(served);
        tokio::spawn(async move {
            tokio::select! {
                ended = watched => {
                    if let Err(error) = ended {
                        tracing::debug!(%error, "a connection has ended early");
                    }
                }
                () = connection.close.cancelled() => {
                    tracing::debug!(%peer, "an idle connection makes room for another");
                }
            }
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

fn prepare(stream: &TcpStream) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    SockRef::from(stream).set_tcp_notsent_lowat(UNSENT_BYTES)
}

/// Answers the requests of one connection.
struct Serving {
    router: TowerToHyperService<Router>,
    connection: Arc<Connection>,
    peer: Peer,
}

impl Service<Request<Incoming>> for Serving {
    type Response = Response<Holding<Busy>>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Holding<Busy>>, Infallible>> + Send>>;

    fn call(&self, request: Request<Incoming>) -> Self::Future {
        let busy = self.connection.busy();
        let mut request = request.map(Arrives::new);
        request.extensions_mut().insert(self.peer);
        let answer = self.router.call(request);
        Box::pin(async move {
            let answer = answer.await?;
            Ok(answer.map(|body| Holding::new(body, busy)))
        })
    }
}

#[cfg(test)]
mod tests {
    use axum::routing::get;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    struct Running {
        address: std::net::SocketAddr,
        closing: CancellationToken,
        serving: tokio::task::JoinHandle<()>,
    }

    async fn run(connections_max: usize) -> Running {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let closing = CancellationToken::new();
        let router = Router::new().route("/", get(|| async { "here" }));
        let stop = closing.clone();
        let serving = listen(listener, router, connections_max, stop, Duration::ZERO);
        Running {
            address,
            closing,
            serving: tokio::spawn(serving),
        }
    }

    impl Running {
        async fn connect(&self) -> TcpStream {
            TcpStream::connect(self.address).await.unwrap()
        }

        async fn end(self) {
            self.closing.cancel();
            self.serving.await.unwrap();
        }
    }

    async fn ask(stream: &mut TcpStream) -> String {
        let request = b"GET / HTTP/1.1\r\nhost: here\r\n\r\n";
        stream.write_all(request).await.unwrap();
        let mut answer = [0; 4096];
        let read = stream.read(&mut answer).await.unwrap();
        String::from_utf8_lossy(&answer[..read]).into_owned()
    }

    #[tokio::test]
    async fn who_does_not_say_what_he_wants_is_not_waited_for_for_ever() {
        let running = run(8).await;
        let mut silent = running.connect().await;
        let mut slow = running.connect().await;
        slow.write_all(b"GET / HT").await.unwrap();
        // The connections are taken before the clock is moved.
        tokio::time::sleep(Duration::from_millis(200)).await;
        tokio::time::pause();
        tokio::time::advance(IDLE + Duration::from_secs(1)).await;
        tokio::time::resume();
        let mut rest = Vec::new();
        silent.read_to_end(&mut rest).await.unwrap();
        slow.read_to_end(&mut rest).await.unwrap();
        running.end().await;
    }

    #[tokio::test]
    async fn a_connection_is_kept_for_longer_than_load_balancers_keep_theirs() {
        let running = run(8).await;
        let mut kept = running.connect().await;
        assert!(ask(&mut kept).await.ends_with("here"));
        tokio::time::pause();
        // Google's keep them for 600 seconds.
        tokio::time::advance(Duration::from_secs(601)).await;
        tokio::time::resume();
        assert!(ask(&mut kept).await.ends_with("here"));
        running.end().await;
    }

    #[tokio::test]
    async fn connections_on_which_nothing_is_asked_shut_nobody_out() {
        let running = run(8).await;
        let mut silent = Vec::new();
        for _ in 0..40 {
            let mut stream = running.connect().await;
            stream.write_all(b"GET / HTTP/1.1\r\nx: ").await.unwrap();
            silent.push(stream);
        }
        let mut stream = running.connect().await;
        assert!(ask(&mut stream).await.ends_with("here"));
        running.end().await;
    }
}
