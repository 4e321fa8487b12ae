//! Health, readiness and metrics, as probes and scrapers see them.
#![allow(clippy::unwrap_used, reason = "a failed step fails the test")]

mod common;

use std::sync::Arc;
use std::time::Duration;

use common::Idle;
use kvtide_server::http::{App, serve};
use kvtide_server::node::Node;
use kvtide_server::status::{Readiness, Status};
use kvtide_server::tally::{Tally, Turned};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::sync::watch;

struct Served {
    address: std::net::SocketAddr,
    tally: Arc<Tally>,
    nodes: watch::Sender<Arc<dyn Node>>,
}

impl Served {
    async fn new(status: Status) -> Self {
        let node: Arc<dyn Node> = Arc::new(Idle {
            status,
            ..Idle::default()
        });
        let (nodes, node) = watch::channel(node);
        let tally = Arc::new(Tally::default());
        let app = App {
            node,
            tally: Arc::clone(&tally),
        };
        let (address, serving) = serve(([127, 0, 0, 1], 0).into(), app).await.unwrap();
        tokio::spawn(serving);
        Self {
            address,
            tally,
            nodes,
        }
    }

    /// Status line, head and body.
    async fn get(&self, path: &str) -> (u16, String, String) {
        let mut stream = TcpStream::connect(self.address).await.unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nHost: kvtide\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        let code = head.split(' ').nth(1).unwrap().parse().unwrap();
        (code, head.to_owned(), body.to_owned())
    }
}

fn with(ready: bool, reasons: &[&str]) -> Status {
    Status {
        readiness: Readiness {
            ready,
            reasons: reasons.iter().map(|&reason| reason.to_owned()).collect(),
        },
        ..Status::default()
    }
}

#[tokio::test]
async fn a_daemon_is_alive_whether_it_is_ready_or_not() {
    let served = Served::new(with(false, &["reserving memory: 12 of 64 GiB"])).await;
    let (code, _, body) = served.get("/livez").await;
    assert_eq!((code, body.as_str()), (200, "ok\n"));
}

#[tokio::test]
async fn readiness_says_what_it_waits_for_and_follows_the_node() {
    let served = Served::new(with(false, &["reserving memory: 12 of 64 GiB"])).await;
    let (code, _, body) = served.get("/readyz").await;
    assert_eq!(
        (code, body.as_str()),
        (503, "reserving memory: 12 of 64 GiB\n")
    );
    served.nodes.send_replace(Arc::new(Idle {
        status: with(true, &["verifying rows of the last start"]),
        ..Idle::default()
    }));
    let (code, _, body) = served.get("/readyz").await;
    assert_eq!(
        (code, body.as_str()),
        (200, "ready\nverifying rows of the last start\n")
    );
}

#[tokio::test]
async fn metrics_are_those_of_the_status_at_the_moment() {
    let served = Served::new(common::busy()).await;
    served.tally.connection();
    served.tally.turn(Turned::NotAllowed);
    let (code, head, page) = served.get("/metrics").await;
    assert_eq!(code, 200);
    assert!(
        head.to_lowercase()
            .contains("content-type: text/plain; version=0.0.4"),
        "{head}"
    );
    for line in [
        "kvtide_serve_ready 1",
        "kvtide_serve_sessions 2",
        "kvtide_serve_connections_total 1",
        "kvtide_serve_refused_connections_total{reason=\"not_allowed\"} 1",
        "kvtide_serve_refused_connections_total{reason=\"silent\"} 0",
        "kvtide_serve_capacity_bytes{tier=\"host\"} 68719476736",
        "kvtide_serve_engines{state=\"attached\"} 1",
        "kvtide_serve_engines{state=\"joining\"} 1",
        "kvtide_serve_engines{state=\"detached\"} 0",
        "kvtide_serve_namespace_held_blocks{namespace=\"8f3a11c0d4e5f60718293a4b5c6d7e8f\",model=\"meta-llama/Llama-3.1-8B\",tenant=\"team-a\"} 16000",
        "kvtide_serve_hit_blocks_total{namespace=\"8f3a11c0d4e5f60718293a4b5c6d7e8f\",model=\"meta-llama/Llama-3.1-8B\",tenant=\"team-a\"} 123456",
        "kvtide_serve_tenant_bytes{tenant=\"\"} 268435456",
        "kvtide_serve_tenant_quota_bytes{tenant=\"team-a\"} 34359738368",
        "kvtide_serve_tenant_held_blocks{tenant=\"team-a\"} 16000",
        "kvtide_serve_denied_growth_total{tenant=\"team-a\",reason=\"quota\"} 7",
        "kvtide_serve_denied_growth_total{tenant=\"team-a\",reason=\"capacity\"} 0",
        "kvtide_serve_session_pinned_blocks{session=\"0\",engine_id=\"engine-a\",model=\"meta-llama/Llama-3.1-8B\",tenant=\"team-a\"} 12",
        "# TYPE kvtide_serve_hit_blocks_total counter",
        "# TYPE kvtide_serve_ready gauge",
    ] {
        assert!(page.lines().any(|each| each == line), "{line}\n{page}");
    }
    served.nodes.send_replace(Arc::new(Idle::default()));
    let (_, _, page) = served.get("/metrics").await;
    assert!(
        !page.contains("engine-a"),
        "who has gone is gone from the page"
    );
}

#[tokio::test]
async fn a_connection_carries_one_request_and_other_paths_are_not_found() {
    let served = Served::new(Status::default()).await;
    let (code, head, _) = served.get("/").await;
    assert_eq!(code, 404);
    assert!(head.to_lowercase().contains("connection: close"), "{head}");
}

#[tokio::test]
async fn a_head_that_does_not_end_is_refused() {
    let served = Served::new(Status::default()).await;
    let mut stream = TcpStream::connect(served.address).await.unwrap();
    let long = format!("GET /livez HTTP/1.1\r\nX: {}", "x".repeat(1 << 20));
    // It may be refused before all has been sent.
    let _ = stream.write_all(long.as_bytes()).await;
    let mut answer = Vec::new();
    let read = tokio::time::timeout(Duration::from_secs(5), stream.read_to_end(&mut answer));
    let _ = read.await.expect("the connection ends");
    assert!(!answer.starts_with(b"HTTP/1.1 200"));
}

#[tokio::test(start_paused = true)]
async fn those_who_hang_keep_nobody_out_for_long() {
    let served = Served::new(Status::default()).await;
    let mut hanging = Vec::new();
    for _ in 0..40 {
        hanging.push(TcpStream::connect(served.address).await.unwrap());
    }
    let (code, _, _) = served.get("/livez").await;
    assert_eq!(code, 200);
}

#[tokio::test]
async fn an_address_that_is_taken_is_an_error() {
    let served = Served::new(Status::default()).await;
    let app = App {
        node: served.nodes.subscribe(),
        tally: Arc::default(),
    };
    let error = serve(served.address, app).await.map(|_| ()).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::AddrInUse);
}
