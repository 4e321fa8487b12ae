//! An operator's connection to the daemon, from the commands' side.

use std::io::{self, Read, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use kvtide_model::NamespaceId;
use kvtide_model::wire::{
    self, Frame, Geometry, Header, Hello, LONGEST_FRAME, Role, Tag, ToDaemon, ToEngine, Versions,
    WireError,
};
use serde::de::DeserializeOwned;

use crate::ask::{Answer, AnswerError, Ask};

/// How long a daemon may take to answer. It answers at once, unless its machine is in trouble.
const PATIENCE: Duration = Duration::from_secs(30);

/// Why a daemon cannot be asked.
#[derive(Debug, thiserror::Error)]
pub enum OperatorError {
    /// Nobody listens.
    #[error(
        "{path}: no kvtide serve listens there ({source}); start it, or name its socket with --socket"
    )]
    NotThere {
        /// The socket.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// The file's mode keeps this user out.
    #[error(
        "{path}: this user may not connect; run as the daemon's user or as a member of the socket's \
         group (socket.mode, socket.group)"
    )]
    NotPermitted {
        /// The socket.
        path: PathBuf,
    },
    /// It does not answer.
    #[error("the daemon has not answered within {} s; look into its log", PATIENCE.as_secs())]
    Silent,
    /// It has ended the connection.
    #[error("the daemon has ended the connection without an answer ({0}); look into its log")]
    Gone(io::Error),
    /// It says no.
    #[error("the daemon refuses: {0}")]
    Refused(String),
    /// It speaks another protocol.
    #[error("the daemon's frame cannot be read ({0}); is it another version of kvtide?")]
    Unreadable(#[from] WireError),
    /// It has answered.
    #[error(transparent)]
    Answer(#[from] AnswerError),
}

impl From<io::Error> for OperatorError {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => Self::Silent,
            _ => Self::Gone(error),
        }
    }
}

/// A connection.
#[derive(Debug)]
pub struct Operator {
    stream: UnixStream,
    next: Tag,
}

impl Operator {
    /// Connects to the daemon at `path`.
    ///
    /// # Errors
    /// [`OperatorError`] when there is none, or it does not listen.
    pub fn connect(path: &Path) -> Result<Self, OperatorError> {
        let stream = UnixStream::connect(path).map_err(|source| {
            let path = path.to_owned();
            match source.kind() {
                io::ErrorKind::PermissionDenied => OperatorError::NotPermitted { path },
                _ => OperatorError::NotThere { path, source },
            }
        })?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        let mut operator = Self {
            stream,
            next: Tag::FIRST,
        };
        operator.send(&ToDaemon::Hello(hello()))?;
        Ok(operator)
    }

    /// Asks, and waits for the answer.
    ///
    /// # Errors
    /// [`OperatorError`] when there is none, or it is a refusal.
    pub fn ask<T: DeserializeOwned>(&mut self, ask: &Ask) -> Result<T, OperatorError> {
        let json = serde_json::to_string(ask).map_err(AnswerError::Unreadable)?;
        let tag = self.next;
        self.next = tag.next();
        let json = json.into();
        self.send(&ToDaemon::Ask(wire::Ask { tag, json }))?;
        loop {
            match self.receive()? {
                Some(ToEngine::Answer(answer)) if answer.tag == tag => {
                    return Ok(Answer::read(answer.json.as_bytes())?);
                }
                Some(ToEngine::Refused(refused)) => {
                    return Err(OperatorError::Refused(refused.message));
                }
                // What a newer daemon tells everybody.
                _ => {}
            }
        }
    }

    fn send(&mut self, message: &ToDaemon<'_>) -> Result<(), OperatorError> {
        let mut frame = Vec::new();
        message.encode(&mut frame)?;
        match self.stream.write_all(&frame) {
            Ok(()) => Ok(()),
            // It may have said why before it ended the connection.
            Err(error) => match self.receive() {
                Ok(Some(ToEngine::Refused(refused))) => {
                    Err(OperatorError::Refused(refused.message))
                }
                _ => Err(error.into()),
            },
        }
    }

    fn receive(&mut self) -> Result<Option<ToEngine<'static>>, OperatorError> {
        let mut head = [0; Header::BYTES];
        self.stream.read_exact(&mut head)?;
        let header = Header::decode(head, LONGEST_FRAME)?;
        let mut payload = Vec::new();
        let announced = u64::from(header.payload_bytes);
        let read = Read::by_ref(&mut self.stream)
            .take(announced)
            .read_to_end(&mut payload)?;
        if (read as u64) < announced {
            return Err(OperatorError::Gone(io::ErrorKind::UnexpectedEof.into()));
        }
        let payload = payload.as_slice();
        Ok(ToEngine::decode(Frame { header, payload })?)
    }
}

/// An operator has no engine, no model and no blocks.
fn hello() -> Hello {
    Hello {
        versions: Versions::OURS,
        role: Role::Operator,
        engine_id: String::new(),
        client: concat!("kvtide ", env!("CARGO_PKG_VERSION")).to_owned(),
        token: None,
        memory: None,
        namespace: NamespaceId::from_bytes([0; 16]),
        model: String::new(),
        tenant: String::new(),
        geometry: Geometry::default(),
        group: 0,
        events: false,
    }
}
