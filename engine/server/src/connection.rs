//! Takes connections: who is let in, who they are, and who serves them from then on.
//!
//! Engines go to the node with their first frame; operators are answered here. Until a process has said
//! who it is, and while an operator asks, all is bounded: connections, frames, and the time they take.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use kvtide_model::wire::{
    self, Frame, Header, Hello, RefusalCode, Refused, Role, Tag, ToDaemon, ToEngine, WireError,
};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Semaphore, watch};
use tokio::time::{error::Elapsed, timeout};

use crate::ask::{Answer, answer};
use crate::node::{Connection, Node, Refusal};
use crate::socket::{Allowed, NotAllowed, Peer};
use crate::tally::{Tally, Turned};

/// Processes that may be saying who they are, at once: more wait in the socket's backlog.
const GREETINGS: usize = 64;
/// Operators at once: people, and scripts that watch.
const OPERATORS: usize = 16;
/// How long a process may take to say who it is.
const GREETING: Duration = Duration::from_secs(5);
/// How long an operator's connection may be silent, and how long it may take to read an answer.
const IDLE: Duration = Duration::from_secs(60);
/// What the first frame may have: all of its texts, and what later versions add.
const LONGEST_HELLO: u32 = 4096;
/// What a question may have.
const LONGEST_ASK: u32 = 64 << 10;
/// Before another connection is taken after one could not be: descriptors come back meanwhile.
const PAUSE: Duration = Duration::from_millis(100);

/// What connections need.
pub struct Door {
    /// The inside of the daemon; another one once it has been opened.
    pub node: watch::Receiver<Arc<dyn Node>>,
    /// Who is let in.
    pub allowed: Allowed,
    /// Counts.
    pub tally: Arc<Tally>,
}

/// Why a connection ends.
#[derive(Debug, thiserror::Error)]
enum Ended {
    #[error(transparent)]
    NotAllowed(#[from] NotAllowed),
    #[error("it is no engine of this version: {0}")]
    Malformed(#[from] WireError),
    #[error("{0}")]
    Unexpected(&'static str),
    #[error("it was silent for too long")]
    Silent(#[from] Elapsed),
    #[error("{OPERATORS} operators are connected already; wait until one has gone")]
    Full,
    #[error(transparent)]
    Gone(#[from] io::Error),
}

impl Ended {
    /// What the peer is told, and what is counted; nothing for one that is gone.
    fn refusal(&self) -> Option<(RefusalCode, Turned)> {
        match self {
            Self::NotAllowed(_) => Some((RefusalCode::NOT_ALLOWED, Turned::NotAllowed)),
            Self::Malformed(error) => Some((error.code(), Turned::Malformed)),
            Self::Unexpected(_) => Some((RefusalCode::MALFORMED, Turned::Malformed)),
            Self::Silent(_) => Some((RefusalCode::MALFORMED, Turned::Silent)),
            Self::Full => Some((RefusalCode::FULL, Turned::Full)),
            Self::Gone(_) => None,
        }
    }
}

/// Takes connections until the task is dropped.
pub async fn accept(listener: UnixListener, door: Arc<Door>) {
    let greetings = Arc::new(Semaphore::new(GREETINGS));
    let operators = Arc::new(Semaphore::new(OPERATORS));
    // The semaphores are never closed.
    while let Ok(greeting) = Arc::clone(&greetings).acquire_owned().await {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(%error, "a connection cannot be taken");
                tokio::time::sleep(PAUSE).await;
                continue;
            }
        };
        door.tally.connection();
        let (door, operators) = (Arc::clone(&door), Arc::clone(&operators));
        tokio::spawn(async move {
            let mut stream = stream;
            let met = meet(&mut stream, &door.allowed).await;
            drop(greeting);
            let served = match met {
                Ok((peer, hello)) if hello.role == Role::Operator => {
                    tracing::debug!(?peer, "an operator has connected");
                    converse(&mut stream, &door, &operators).await
                }
                Ok((peer, hello)) => {
                    tracing::debug!(?peer, role = ?hello.role, engine = hello.engine_id, "hello");
                    return hand_over(stream, peer, hello, &door).await;
                }
                Err(ended) => Err(ended),
            };
            if let Err(ended) = served {
                turn_away(stream, &ended, &door.tally).await;
            }
        });
    }
}

/// Finds out who has connected.
async fn meet(stream: &mut UnixStream, allowed: &Allowed) -> Result<(Peer, Hello), Ended> {
    let peer = Peer::of(stream)?;
    allowed.check(&peer)?;
    let message = timeout(GREETING, read_message(stream, LONGEST_HELLO)).await??;
    match message {
        Some(ToDaemon::Hello(hello)) => Ok((peer, hello)),
        _ => Err(Ended::Unexpected("the first frame is not Hello")),
    }
}

/// One message, of which no byte too many is read: what follows is for somebody else.
async fn read_message(
    stream: &mut UnixStream,
    longest: u32,
) -> Result<Option<ToDaemon<'static>>, Ended> {
    let mut head = [0; Header::BYTES];
    stream.read_exact(&mut head).await?;
    let header = Header::decode(head, longest)?;
    let mut payload = vec![0; header.payload_bytes as usize];
    stream.read_exact(&mut payload).await?;
    let frame = Frame {
        header,
        payload: &payload,
    };
    Ok(ToDaemon::decode(frame)?)
}

/// An engine's connection goes to the node.
async fn hand_over(stream: UnixStream, peer: Peer, hello: Hello, door: &Door) {
    let node = Arc::clone(&door.node.borrow());
    let handed = stream.into_std().and_then(|stream| {
        stream.set_nonblocking(false)?;
        Ok(Connection {
            stream,
            peer,
            hello,
        })
    });
    match handed {
        Ok(connection) => {
            // A node that panics has said so.
            let _ = tokio::task::spawn_blocking(move || node.attach(connection)).await;
        }
        Err(error) => tracing::warn!(%error, "an engine's connection is lost"),
    }
}

/// Answers an operator until it goes.
async fn converse(
    stream: &mut UnixStream,
    door: &Door,
    operators: &Semaphore,
) -> Result<(), Ended> {
    let _place = operators.try_acquire().map_err(|_| Ended::Full)?;
    loop {
        let asked = match timeout(IDLE, read_message(stream, LONGEST_ASK)).await? {
            Ok(Some(ToDaemon::Ask(asked))) => asked,
            Ok(Some(ToDaemon::Bye(_))) => return Ok(()),
            Ok(None) => continue, // A newer command's, which it can do without.
            Ok(Some(_)) => return Err(Ended::Unexpected("an operator sends nothing but Ask")),
            // It has heard what it wanted.
            Err(Ended::Gone(error)) if error.kind() == io::ErrorKind::UnexpectedEof => {
                return Ok(());
            }
            Err(ended) => return Err(ended),
        };
        door.tally.ask();
        let node = Arc::clone(&door.node.borrow());
        let json = asked.json.into_owned();
        let answered = tokio::task::spawn_blocking(move || answer(&*node, json.as_bytes())).await;
        let answered = answered.unwrap_or_else(|_| {
            Answer::Refused(Refusal {
                problem: "the daemon is broken".into(),
                fix: "look into its log, and restart it".into(),
            })
        });
        let frame = frame_of(asked.tag, &answered)?;
        timeout(IDLE, stream.write_all(&frame)).await??;
    }
}

/// An answer's frame. One that is too long is refused in its place.
fn frame_of(tag: Tag, answered: &Answer) -> Result<Vec<u8>, Ended> {
    let encode = |answer: &Answer| -> Result<Vec<u8>, Ended> {
        let json = serde_json::to_string(answer).map_err(io::Error::from)?;
        let mut frame = Vec::new();
        let json = json.into();
        ToEngine::Answer(wire::Answer { tag, json }).encode(&mut frame)?;
        Ok(frame)
    };
    match encode(answered) {
        Err(Ended::Malformed(WireError::MessageTooLong { .. })) => {
            encode(&Answer::Refused(Refusal {
                problem: "the answer does not fit into a frame".into(),
                fix: "ask for less, with --namespace or --limit".into(),
            }))
        }
        other => other,
    }
}

/// Says why, if the peer is still there.
async fn turn_away(mut stream: UnixStream, ended: &Ended, tally: &Tally) {
    let peer = Peer::of(&stream).ok();
    let Some((code, turned)) = ended.refusal() else {
        tracing::debug!(?peer, reason = %ended, "a connection has ended");
        return;
    };
    tally.turn(turned);
    tracing::warn!(?peer, reason = %ended, "a connection is refused");
    let mut frame = Vec::new();
    let refused = ToEngine::Refused(Refused::new(code, &ended.to_string()));
    let said = async {
        refused.encode(&mut frame).map_err(io::Error::other)?;
        stream.write_all(&frame).await?;
        stream.shutdown().await
    };
    if !matches!(timeout(GREETING, said).await, Ok(Ok(()))) {
        tracing::debug!(?peer, "it did not wait to hear why");
    }
}
