//! How a process of an engine comes into a daemon's pool.

use std::fs::File;
use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::pool::catalogue::Catalogue;
use crate::pool::holders::SlotHolder;
use crate::pool::pins::{HolderGuard, Pins};
use kvtide_model::NamespaceId;
use kvtide_model::wire::{
    Frame, FrameReader, Geometry, Hello, LONGEST_FRAME, RefusalCode, Refused, Role, SessionToken,
    ToDaemon, ToEngine, Versions, Welcome, WireError,
};
use kvtide_segment::{
    GeometryError, Holder, MappedFile, RowGeometry, SegmentError, SegmentParts, SharedSegment,
};

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};

/// What a daemon that listens may take to answer one hello.
pub(super) const GREETING: Duration = Duration::from_secs(5);

/// Who attaches, and for which blocks.
#[derive(Clone, Debug)]
pub struct AttachOptions {
    /// The daemon's socket.
    pub socket: PathBuf,
    /// Tells engines of one node apart; the same for all processes of an engine.
    pub engine_id: String,
    /// Program and version, such as `kvtide 0.1.0`.
    pub client: String,
    /// Whose blocks they are.
    pub namespace: NamespaceId,
    /// The model's name, for people.
    pub model: String,
    /// On whose behalf the engine runs; empty for nobody in particular.
    pub tenant: String,
    /// What a block is.
    pub geometry: Geometry,
    /// Whether the scheduler is told what becomes of blocks.
    pub events: bool,
    /// How long to wait for a daemon where none listens.
    pub timeout: Duration,
}

/// Why a daemon's pool cannot be had.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AttachError {
    /// Nobody listens, or nobody answers.
    #[error(
        "pool: no daemon answers at {}: {source}; start kvtide serve, set pool to its socket, or set \
         it to \"embedded\"",
        path.display()
    )]
    Unreachable {
        /// The socket.
        path: PathBuf,
        /// What was tried last.
        source: io::Error,
    },
    /// This user may not connect.
    #[error(
        "pool: this user may not connect to {}: run the engine as a member of the socket's group, or \
         change `socket.mode` or `socket.group` of the daemon",
        path.display()
    )]
    NotAllowed {
        /// The socket.
        path: PathBuf,
    },
    /// The daemon is about to be ready, or to end, and was so until the time was over.
    #[error("pool: the daemon at {} takes no engines at the moment: {message}", path.display())]
    Busy {
        /// The socket.
        path: PathBuf,
        /// Its words.
        message: String,
    },
    /// The daemon does not take this engine.
    #[error("pool: the daemon at {} refuses: {message}", path.display())]
    Refused {
        /// The socket.
        path: PathBuf,
        /// Its words.
        message: String,
    },
    /// It is no daemon of this protocol.
    #[error("pool: what listens at {} is no kvtide daemon: {source}", path.display())]
    Protocol {
        /// The socket.
        path: PathBuf,
        /// What is wrong.
        source: WireError,
    },
    /// Its memory cannot be used.
    #[error(transparent)]
    Memory(#[from] SegmentError),
    /// The engine's blocks cannot lie in its memory.
    #[error("pool: {0}")]
    Geometry(#[from] GeometryError),
}

/// A connection on which the daemon has said welcome, and what came with it.
#[derive(Debug)]
pub(super) struct Attached {
    pub(super) stream: UnixStream,
    pub(super) reader: FrameReader,
    pub(super) welcome: Welcome,
    /// The memory, the pool's tables, and what the engine has for itself.
    pub(super) files: [File; 3],
}

/// The part of a daemon's pool that one process of an engine has.
#[derive(Debug)]
pub struct Attachment {
    pub(super) options: AttachOptions,
    pub(super) attached: Attached,
    pub(super) segment: Arc<SharedSegment>,
}

impl Attachment {
    /// Attaches as the engine's worker of a rank, or as its scheduler, and takes its place.
    ///
    /// # Errors
    /// [`AttachError`] when there is no daemon, it refuses, or another process of an engine of that id
    /// is there already.
    pub fn new(options: AttachOptions, holder: Holder) -> Result<Self, AttachError> {
        let attachment = Self::without_place(options, holder)?;
        attachment.segment.take_place(holder)?;
        Ok(attachment)
    }

    /// The same for one who takes its place later ([`SharedSegment::take_place`]), when it is ready.
    ///
    /// # Errors
    /// As there.
    pub fn without_place(options: AttachOptions, holder: Holder) -> Result<Self, AttachError> {
        let role = match holder {
            Holder::Worker(rank) => Role::Worker { rank },
            Holder::Scheduler => Role::Scheduler,
        };
        let deadline = Instant::now() + options.timeout;
        let attached = loop {
            match greet(
                &options,
                role,
                None,
                deadline.max(Instant::now() + GREETING),
            ) {
                // A daemon that starts needs a moment, and so does one that is just replaced.
                Err(error) if error.may_pass() && Instant::now() < deadline => {
                    std::thread::sleep(Duration::from_millis(100));
                }
                other => break other?,
            }
        };
        let segment = Arc::new(map(&options, &attached)?);
        Ok(Self {
            options,
            attached,
            segment,
        })
    }

    /// The memory.
    #[must_use]
    pub fn segment(&self) -> &Arc<SharedSegment> {
        &self.segment
    }
}

impl AttachError {
    /// Whether a daemon may answer otherwise in a moment, without anybody changing a setting.
    #[must_use]
    pub fn may_pass(&self) -> bool {
        matches!(self, Self::Unreachable { .. } | Self::Busy { .. })
    }
}

/// What a scheduler looks up in the memory of a daemon that has said `welcome`, and its pins there.
pub(super) fn read_pool(welcome: &Welcome, segment: &Arc<SharedSegment>) -> (Arc<Catalogue>, Pins) {
    let catalogue = Arc::new(Catalogue::new(Arc::clone(segment)));
    // The reader of the frame takes no other number.
    let holder = SlotHolder::of_session(welcome.session.into()).unwrap_or(SlotHolder::SCRUB);
    let guard = HolderGuard {
        holder,
        given: None,
    };
    let pins = Pins::new(Arc::clone(&catalogue), guard);
    (catalogue, pins)
}

/// Says hello, and waits for the answer.
pub(super) fn greet(
    options: &AttachOptions,
    role: Role,
    token: Option<SessionToken>,
    deadline: Instant,
) -> Result<Attached, AttachError> {
    let path = &options.socket;
    let unreachable = |source: io::Error| AttachError::Unreachable {
        path: path.clone(),
        source,
    };
    let protocol = |source: WireError| AttachError::Protocol {
        path: path.clone(),
        source,
    };
    let hello = Hello {
        versions: Versions::OURS,
        role,
        engine_id: options.engine_id.clone(),
        client: options.client.clone(),
        token,
        memory: None,
        namespace: options.namespace,
        model: kvtide_model::wire::shortened(&options.model, Hello::LONGEST_MODEL).to_owned(),
        tenant: options.tenant.clone(),
        geometry: options.geometry,
        group: 0,
        events: options.events,
    };
    let mut frame = Vec::new();
    ToDaemon::Hello(hello)
        .encode(&mut frame)
        .map_err(protocol)?;
    let mut stream = UnixStream::connect(path).map_err(|error| match error.kind() {
        io::ErrorKind::PermissionDenied => AttachError::NotAllowed { path: path.clone() },
        _ => unreachable(error),
    })?;
    let left = deadline.saturating_duration_since(Instant::now());
    let left = left.max(Duration::from_millis(1));
    stream.set_write_timeout(Some(left)).map_err(unreachable)?;
    stream.set_read_timeout(Some(left)).map_err(unreachable)?;
    io::Write::write_all(&mut stream, &frame).map_err(unreachable)?;

    let mut reader = FrameReader::new(LONGEST_FRAME);
    let mut files = Vec::new();
    loop {
        let mut buffer = [0; 4096];
        let read = receive(&stream, &mut buffer, &mut files).map_err(unreachable)?;
        if read == 0 {
            return Err(unreachable(io::ErrorKind::UnexpectedEof.into()));
        }
        let mut bytes = &buffer[..read];
        let Some(frame) = reader.next_frame(&mut bytes).map_err(protocol)? else {
            continue;
        };
        let welcome = answer(path, frame)?;
        // What follows at once is of no use yet: it is said again.
        while reader.next_frame(&mut bytes).map_err(protocol)?.is_some() {}
        let files = <[File; 3]>::try_from(files).map_err(|_| {
            unreachable(io::Error::other(
                "it sent no memory; is it on another host?",
            ))
        })?;
        return Ok(Attached {
            stream,
            reader,
            welcome,
            files,
        });
    }
}

fn answer(path: &Path, frame: Frame<'_>) -> Result<Welcome, AttachError> {
    let path = path.to_owned();
    match ToEngine::decode(frame) {
        Ok(Some(ToEngine::Welcome(welcome))) => Ok(welcome),
        Ok(Some(ToEngine::Refused(Refused { code, message }))) => Err(match code {
            RefusalCode::CLOSING => AttachError::Busy { path, message },
            _ => AttachError::Refused { path, message },
        }),
        Ok(_) => Err(AttachError::Refused {
            path,
            message: "it answers with something else than a welcome".into(),
        }),
        Err(source) => Err(AttachError::Protocol { path, source }),
    }
}

/// Reads bytes, and the descriptors that come with them.
fn receive(stream: &UnixStream, buffer: &mut [u8], files: &mut Vec<File>) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(3))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut parts = [IoSliceMut::new(buffer)];
    let flags = RecvFlags::CMSG_CLOEXEC;
    let received = recvmsg(stream.as_fd(), &mut parts, &mut ancillary, flags)?;
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(descriptors) = message {
            files.extend(descriptors.map(File::from));
        }
    }
    Ok(received.bytes)
}

/// Maps what came with a welcome.
pub(super) fn map(
    options: &AttachOptions,
    attached: &Attached,
) -> Result<SharedSegment, AttachError> {
    let Welcome {
        extent_bytes,
        extents,
        data_offset,
        buckets,
        ..
    } = attached.welcome;
    let size = |bytes: u64| usize::try_from(bytes).unwrap_or(usize::MAX);
    let Geometry {
        ranks,
        layers,
        layer_bytes,
        ..
    } = options.geometry;
    let area = size(extent_bytes).saturating_mul(extents as usize);
    let rows = RowGeometry::over(ranks, layers, size(layer_bytes), area)?;
    if rows.buckets() != buckets {
        return Err(AttachError::Refused {
            path: options.socket.clone(),
            message:
                "it lays rows out in another way: engine and daemon are of versions that do not \
                      go together"
                    .into(),
        });
    }
    let [memory, tables, own] = &attached.files;
    let path = &options.socket;
    let parts = SegmentParts {
        memory: MappedFile::of(memory, path)?,
        data_offset: size(data_offset),
        tables: MappedFile::of(tables, path)?,
        own: MappedFile::of(own, path)?,
    };
    let segment = SharedSegment::of_parts(&parts, rows, path)?;
    if !segment.has_its_header() {
        // Of a daemon whose tables are laid out in another way.
        let path = path.display().to_string();
        return Err(SegmentError::Mismatch { path }.into());
    }
    Ok(segment)
}
