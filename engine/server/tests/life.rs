//! A daemon from its start to its end. In a process of its own, since one test sends it a signal.
#![allow(clippy::unwrap_used, reason = "a failed step fails the test")]

mod common;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use common::{Idle, config};
use kvtide_engine::NodeError;
use kvtide_server::ask::Ask;
use kvtide_server::config::Config;
use kvtide_server::node::{Node, Purge, Purged};
use kvtide_server::operator::Operator;
use kvtide_server::serve::{ServeError, serve, until_stopped};
use kvtide_server::socket::Listening;
use kvtide_server::status::Status;
use rustix::process::{Signal, getpid, kill_process};
use tempfile::TempDir;
use tokio::sync::oneshot;
use tokio::task::{JoinHandle, spawn_blocking};

fn place() -> (TempDir, PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("kvtide.sock");
    (directory, socket)
}

fn listening(config: &Config) -> Listening {
    Listening::open(&config.socket).unwrap()
}

async fn status(socket: &Path) -> Status {
    let socket = socket.to_owned();
    let asked = spawn_blocking(move || {
        let mut operator = Operator::connect(&socket)?;
        operator.ask(&Ask::Status {})
    });
    asked.await.unwrap().unwrap()
}

type Served = JoinHandle<Result<(), ServeError>>;

/// A daemon with `node` inside, which stops when the sender is used.
fn started(config: Config, node: &Arc<Idle>) -> (Served, oneshot::Sender<()>) {
    let (stop, stopped) = oneshot::channel();
    let listening = listening(&config);
    let node: Arc<dyn Node> = node.clone();
    let stopped = async {
        let _ = stopped.await;
    };
    let served = tokio::spawn(serve(config, listening, |_| Ok(node), stopped));
    (served, stop)
}

#[tokio::test]
async fn a_daemon_that_is_stopped_closes_its_node_and_removes_its_socket() {
    let (_directory, socket) = place();
    let node = Arc::new(Idle::busy());
    let (served, stop) = started(config(&socket, "[shutdown]\ngrace = \"7s\"\n"), &node);
    while !status(&socket).await.readiness.ready {}
    stop.send(()).unwrap();
    served.await.unwrap().unwrap();
    assert_eq!(node.told(), ["close in 7 s"]);
    assert!(!socket.exists());
}

#[tokio::test]
async fn a_node_that_does_not_end_is_not_waited_for_beyond_the_grace() {
    let (_directory, socket) = place();
    let node = Arc::new(Idle {
        closes_for: Duration::from_secs(6),
        ..Idle::busy()
    });
    let (served, stop) = started(config(&socket, "[shutdown]\ngrace = \"0s\"\n"), &node);
    while !status(&socket).await.readiness.ready {}
    let begun = Instant::now();
    stop.send(()).unwrap();
    served.await.unwrap().unwrap();
    assert!(begun.elapsed() < Duration::from_secs(4));
}

#[tokio::test]
async fn while_the_pool_is_opened_operators_are_answered_and_a_stop_is_heard() {
    let (_directory, socket) = place();
    let config = config(&socket, "");
    let listening = listening(&config);
    let (stop, stopped) = oneshot::channel::<()>();
    let (go_on, held) = mpsc::channel::<()>();
    let open = move |_: &Config| {
        let _ = held.recv();
        Ok(Arc::new(Idle::busy()) as Arc<dyn Node>)
    };
    let served = tokio::spawn(serve(config, listening, open, async {
        let _ = stopped.await;
    }));
    let status = status(&socket).await;
    assert_eq!(status.readiness.reasons, ["opening the pool"]);
    let path = socket.clone();
    let purged = spawn_blocking(move || {
        let mut operator = Operator::connect(&path)?;
        operator.ask::<Purged>(&Ask::Purge { what: Purge::All })
    });
    let refused = purged.await.unwrap().unwrap_err().to_string();
    assert!(
        refused.starts_with("the daemon is still opening its pool"),
        "{refused}"
    );
    stop.send(()).unwrap();
    served.await.unwrap().unwrap();
    assert!(!socket.exists());
    drop(go_on);
}

#[tokio::test]
async fn a_pool_that_cannot_be_opened_ends_the_daemon_with_the_reason() {
    let (_directory, socket) = place();
    let config = config(&socket, "");
    let listening = listening(&config);
    let open = |_: &Config| {
        Err(NodeError::TooSmall {
            capacity_bytes: 1,
            extent_bytes: 2,
        })
    };
    let error = serve(config, listening, open, std::future::pending())
        .await
        .unwrap_err();
    assert_eq!(
        error.to_string(),
        "memory.capacity: 1 bytes are less than one extent of 2; raise it, or lower memory.extent"
    );
    assert!(!socket.exists());
}

#[tokio::test]
async fn sigterm_stops_a_daemon() {
    let (_directory, socket) = place();
    let config = config(&socket, "");
    let listening = listening(&config);
    let node = Arc::new(Idle::busy());
    let inside: Arc<dyn Node> = node.clone();
    let stopped = until_stopped().unwrap();
    let served = tokio::spawn(serve(config, listening, |_| Ok(inside), stopped));
    while !status(&socket).await.readiness.ready {}
    kill_process(getpid(), Signal::TERM).unwrap();
    served.await.unwrap().unwrap();
    assert_eq!(node.told(), ["close in 30 s"]);
}
