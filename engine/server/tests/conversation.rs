//! What happens on a connection: operators are answered, engines handed over, others turned away.
#![allow(clippy::unwrap_used, reason = "a failed step fails the test")]

mod common;

use std::io::{ErrorKind, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use common::{Idle, LLAMA};
use kvtide_model::NamespaceId;
use kvtide_model::wire::{
    Frame, Geometry, Header, Hello, RefusalCode, Refused, Role, ToDaemon, ToEngine, Versions,
};
use kvtide_server::ask::Ask;
use kvtide_server::connection::{Door, accept};
use kvtide_server::node::{Inspect, Inspection, Node, Pinned, Purge, Purged, Unpinned};
use kvtide_server::operator::{Operator, OperatorError};
use kvtide_server::socket::Allowed;
use kvtide_server::status::Status;
use kvtide_server::tally::{Tally, Turned};
use tempfile::TempDir;
use tokio::net::UnixListener;
use tokio::runtime::Runtime;
use tokio::sync::watch;

/// A daemon's door, and what is behind it.
struct Served {
    node: Arc<Idle>,
    tally: Arc<Tally>,
    socket: PathBuf,
    _directory: TempDir,
    _runtime: Runtime,
    _nodes: watch::Sender<Arc<dyn Node>>,
}

impl Served {
    fn new() -> Self {
        let own_uid = rustix::process::geteuid().as_raw();
        Self::with(Allowed {
            own_uid,
            uids: Vec::new(),
            gids: Vec::new(),
        })
    }

    fn with(allowed: Allowed) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("kvtide.sock");
        let node = Arc::new(Idle::busy());
        let tally = Arc::new(Tally::default());
        let inside: Arc<dyn Node> = node.clone();
        let (nodes, seen) = watch::channel(inside);
        let runtime = Runtime::new().unwrap();
        let door = Door {
            node: seen,
            allowed,
            tally: Arc::clone(&tally),
        };
        let entered = runtime.enter();
        let listener = UnixListener::bind(&socket).unwrap();
        runtime.spawn(accept(listener, Arc::new(door)));
        drop(entered);
        Self {
            node,
            tally,
            socket,
            _directory: directory,
            _runtime: runtime,
            _nodes: nodes,
        }
    }

    fn operator(&self) -> Operator {
        Operator::connect(&self.socket).unwrap()
    }

    fn connect(&self) -> UnixStream {
        let stream = UnixStream::connect(&self.socket).unwrap();
        stream
            .set_read_timeout(Some(Duration::from_secs(20)))
            .unwrap();
        stream
    }
}

fn hello(engine_id: &str) -> Hello {
    Hello {
        versions: Versions::OURS,
        role: Role::Scheduler,
        engine_id: engine_id.to_owned(),
        client: "kvtide 0.1.0".to_owned(),
        token: None,
        memory: None,
        namespace: NamespaceId::from_bytes([7; 16]),
        model: "Llama".to_owned(),
        tenant: String::new(),
        geometry: Geometry::default(),
        group: 0,
        events: false,
    }
}

fn frame(message: &ToDaemon<'_>) -> Vec<u8> {
    let mut frame = Vec::new();
    message.encode(&mut frame).unwrap();
    frame
}

/// Why a connection was ended.
fn refusal(stream: &mut UnixStream) -> Refused {
    let mut bytes = Vec::new();
    // What was sent and not read resets the connection, behind the refusal.
    if let Err(error) = stream.read_to_end(&mut bytes) {
        assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    }
    let (head, payload) = bytes.split_first_chunk().unwrap();
    let header = Header::decode(*head, u32::MAX).unwrap();
    match ToEngine::decode(Frame { header, payload }).unwrap() {
        Some(ToEngine::Refused(refused)) => refused,
        other => panic!("{other:?}"),
    }
}

#[test]
fn an_operator_is_answered_as_often_as_it_asks() {
    let served = Served::new();
    let mut operator = served.operator();
    let status: Status = operator.ask(&Ask::Status {}).unwrap();
    assert_eq!(status, served.node.status);
    let pin = Ask::Pin {
        namespace: "8f3a".to_owned(),
        ttl_s: 60,
    };
    let pinned: Pinned = operator.ask(&pin).unwrap();
    assert_eq!(pinned.namespace, LLAMA);
    let unpin = Ask::Unpin {
        namespace: "meta-llama/Llama-3.1-8B".to_owned(),
    };
    let _: Unpinned = operator.ask(&unpin).unwrap();
    let purge = |what| Ask::Purge { what };
    let _: Purged = operator
        .ask(&purge(Purge::Namespace("8F3A11".to_owned())))
        .unwrap();
    let _: Purged = operator
        .ask(&purge(Purge::Tenant("team-a".to_owned())))
        .unwrap();
    let _: Purged = operator.ask(&purge(Purge::All)).unwrap();
    assert_eq!(
        served.node.told(),
        [
            format!("pin {LLAMA} 60"),
            format!("unpin {LLAMA}"),
            format!("purge Namespace({LLAMA:?})"),
            "purge Tenant(\"team-a\")".to_owned(),
            "purge All".to_owned(),
        ]
    );
    assert_eq!(served.tally.asks(), 6);
}

#[test]
fn blocks_are_asked_for_by_the_namespaces_id_and_never_too_many() {
    let served = Served::new();
    let query = Inspect {
        namespace: Some("8f3a".to_owned()),
        limit: u32::MAX,
        ..Inspect::default()
    };
    let blocks: Inspection = served.operator().ask(&Ask::Inspect { query }).unwrap();
    assert_eq!((blocks.blocks.len(), blocks.more), (2, 3));
    let [told] = &served.node.told()[..] else {
        panic!("one");
    };
    assert!(
        told.contains(LLAMA) && told.contains("limit: 10000"),
        "{told}"
    );
}

#[test]
fn what_is_not_done_is_told_with_what_to_do() {
    let served = Served::new();
    let purge = Ask::Purge {
        what: Purge::Namespace("nobody".to_owned()),
    };
    let refused = served
        .operator()
        .ask::<Purged>(&purge)
        .unwrap_err()
        .to_string();
    assert!(
        refused.starts_with("there is no namespace \"nobody\"; name one of 8f3a11c0"),
        "{refused}"
    );
    assert!(served.node.told().is_empty());
}

#[test]
fn a_question_with_a_field_that_is_not_known_does_nothing() {
    let served = Served::new();
    for json in [
        r#"{"ask": "purge", "what": "all", "older_than_s": 3600}"#,
        r#"{"ask": "purge", "what": {"namespace": "b", "tenant": "a"}}"#,
        r#"{"ask": "inspect", "query": {"limit": 1, "colour": "blue"}}"#,
        r#"{"ask": "status", "of": "everything"}"#,
        r#"{"ask": "resize"}"#,
        "[]",
    ] {
        let answer = kvtide_server::ask::answer(&*served.node, json.as_bytes());
        let kvtide_server::ask::Answer::Refused(refusal) = answer else {
            panic!("{json}");
        };
        assert!(
            refusal.problem.starts_with("the question cannot be read: "),
            "{refusal}"
        );
    }
    assert!(served.node.told().is_empty());
}

#[test]
fn an_answer_that_fits_into_no_frame_is_told_to_be_too_long() {
    let served = Served::new();
    let query = Inspect {
        key: Some("long".to_owned()),
        limit: 1,
        ..Inspect::default()
    };
    let mut operator = served.operator();
    let refused = operator
        .ask::<Inspection>(&Ask::Inspect { query })
        .unwrap_err();
    assert!(
        refused
            .to_string()
            .starts_with("the answer does not fit into a frame")
    );
    let _: Status = operator
        .ask(&Ask::Status {})
        .expect("the connection goes on");
}

#[test]
fn an_engine_goes_to_the_node_with_its_hello_and_all_bytes_behind_it() {
    let served = Served::new();
    let mut stream = served.connect();
    let mut bytes = frame(&ToDaemon::Hello(hello("engine-a")));
    bytes.extend_from_slice(b"more");
    stream.write_all(&bytes).unwrap();
    let begun = Instant::now();
    while served.node.engines.lock().unwrap().is_empty() {
        assert!(begun.elapsed() < Duration::from_secs(10));
        thread::sleep(Duration::from_millis(5));
    }
    let mut engine = served.node.engines.lock().unwrap().remove(0);
    assert_eq!(engine.hello, hello("engine-a"));
    assert_eq!(engine.peer.pid, std::process::id());
    let mut more = [0; 4];
    engine.stream.read_exact(&mut more).unwrap();
    assert_eq!(&more, b"more");
}

#[test]
fn a_user_who_is_not_on_the_list_hears_why_before_anything_is_read() {
    let served = Served::with(Allowed {
        own_uid: u32::MAX,
        uids: vec![u32::MAX - 1],
        gids: Vec::new(),
    });
    let refused = refusal(&mut served.connect());
    assert_eq!(refused.code, RefusalCode::NOT_ALLOWED);
    assert!(
        refused.message.contains("socket.allow_uids"),
        "{}",
        refused.message
    );
    assert_eq!(served.tally.turned(Turned::NotAllowed), 1);
    let error = Operator::connect(&served.socket)
        .and_then(|mut operator| operator.ask::<Status>(&Ask::Status {}))
        .unwrap_err();
    assert!(
        matches!(error, OperatorError::Refused(_) | OperatorError::Gone(_)),
        "{error}"
    );
}

#[test]
fn what_is_no_hello_ends_the_connection_and_says_so() {
    let served = Served::new();
    let too_long = Header {
        kind: kvtide_model::wire::Kind::HELLO,
        tag: 0,
        payload_bytes: 1 << 20,
    };
    for bytes in [
        &b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"[..],
        &[8, 0, 0, 0, 7, 0, 0, 0, 0, 0, 0, 0],
        &too_long.encode(),
    ] {
        let mut stream = served.connect();
        stream.write_all(bytes).unwrap();
        let refused = refusal(&mut stream);
        assert_eq!(refused.code, RefusalCode::MALFORMED, "{}", refused.message);
    }
    assert_eq!(served.tally.turned(Turned::Malformed), 3);
}

#[test]
fn who_is_silent_does_not_stay() {
    let served = Served::new();
    let refused = refusal(&mut served.connect());
    assert_eq!(refused.message, "it was silent for too long");
    assert_eq!(served.tally.turned(Turned::Silent), 1);
}

#[test]
fn operators_are_as_many_as_there_are_places() {
    let served = Served::new();
    let mut here: Vec<Operator> = (0..16).map(|_| served.operator()).collect();
    for operator in &mut here {
        let _: Status = operator.ask(&Ask::Status {}).unwrap();
    }
    let mut stream = served.connect();
    let hello = Hello {
        role: Role::Operator,
        ..hello("")
    };
    stream.write_all(&frame(&ToDaemon::Hello(hello))).unwrap();
    assert_eq!(refusal(&mut stream).code, RefusalCode::FULL);
    drop(here);
    let begun = Instant::now();
    while served.operator().ask::<Status>(&Ask::Status {}).is_err() {
        assert!(begun.elapsed() < Duration::from_secs(10));
    }
}

#[test]
fn a_daemon_that_is_not_there_is_told_with_its_path() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("kvtide.sock");
    let error = Operator::connect(&path).unwrap_err().to_string();
    assert!(error.contains("no kvtide serve listens there"), "{error}");
    assert!(error.starts_with(&path.display().to_string()), "{error}");
}
