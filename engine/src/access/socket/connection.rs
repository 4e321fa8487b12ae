//! The engine's end of a connection: what is sent, what was asked, what came.

use std::collections::VecDeque;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use kvtide_model::SlotRef;
use kvtide_model::wire::{
    ChainSaves, Event, FrameReader, SavesBegun, Tag, ToDaemon, ToEngine, WireError,
};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{RecvFlags, SendFlags, recv, send};

use crate::pool::{PoolCounters, PoolEvent, PoolGauges};

/// What may wait to be sent to a daemon that does not read.
const PENDING_MAX: usize = 16 << 20;
/// Events kept for a scheduler that does not take them.
const EVENTS_MAX: usize = 1 << 18;

/// See the module's documentation.
#[derive(Debug)]
pub(super) struct Connection {
    stream: UnixStream,
    reader: FrameReader,
    pending: Vec<u8>,
    tag: Tag,
    /// Answers that are owed and that nobody waits for any more.
    owed: VecDeque<Tag>,
    /// The answer to a clear that is owed.
    clearing: Option<Tag>,
    /// Whether the pool is full, so that it has to know what a save continues.
    pub(super) pressure: bool,
    pub(super) inbox: Inbox,
}

/// What came without being waited for.
#[derive(Debug, Default)]
pub(super) struct Inbox {
    pub(super) events: Vec<PoolEvent>,
    /// What was counted while this engine was attached, whichever daemons it was attached to.
    pub(super) counters: PoolCounters,
    /// What the present daemon said last, which counts from its own start.
    last: Option<PoolCounters>,
    pub(super) gauges: PoolGauges,
    /// Slots that were given too late: nobody fills them.
    pub(super) unwanted: Vec<SlotRef>,
}

impl Connection {
    /// A connection with a daemon, which may be another one than the one that filled `inbox`.
    pub(super) fn new(stream: UnixStream, reader: FrameReader, mut inbox: Inbox) -> Self {
        inbox.last = None;
        Self {
            stream,
            reader,
            pending: Vec::new(),
            tag: Tag::FIRST,
            owed: VecDeque::new(),
            clearing: None,
            pressure: false,
            inbox,
        }
    }

    /// Whether the daemon owes an answer for which the time is over.
    pub(super) fn is_behind(&self) -> bool {
        !self.owed.is_empty()
    }

    /// Whether blocks may be looked up: none is there that was to be dropped.
    pub(super) fn is_clear(&self) -> bool {
        self.clearing.is_none()
    }

    pub(super) fn take_tag(&mut self) -> Tag {
        self.tag = self.tag.next();
        self.tag
    }

    pub(super) fn expect_clear(&mut self, tag: Tag) {
        self.clearing = Some(tag);
    }

    /// Sends, now or with what is sent next.
    pub(super) fn send(&mut self, message: &ToDaemon<'_>) -> io::Result<()> {
        message
            .encode(&mut self.pending)
            .map_err(io::Error::other)?;
        self.flush()
    }

    /// Sends what waits, as far as it is taken.
    pub(super) fn flush(&mut self) -> io::Result<()> {
        while !self.pending.is_empty() {
            let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
            match send(&self.stream, &self.pending, flags) {
                Ok(sent) => drop(self.pending.drain(..sent)),
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::WOULDBLOCK) if self.pending.len() <= PENDING_MAX => {
                    return Ok(());
                }
                Err(errno) => return Err(errno.into()),
            }
        }
        Ok(())
    }

    /// The answer to the saves that were asked for with `tag`, if it comes within `patience`.
    pub(super) fn await_saves(
        &mut self,
        tag: Tag,
        patience: Duration,
    ) -> io::Result<Option<Vec<ChainSaves>>> {
        let deadline = Instant::now() + patience;
        loop {
            self.flush()?;
            if let Some(begun) = self.receive(Some(tag))? {
                return Ok(Some(begun.chains));
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                self.owed.push_back(tag);
                return Ok(None);
            }
            let mut flags = PollFlags::IN;
            if !self.pending.is_empty() {
                flags |= PollFlags::OUT;
            }
            let timeout = Timespec {
                tv_sec: 0,
                tv_nsec: left.subsec_nanos().into(),
            };
            let mut watched = [PollFd::new(&self.stream, flags)];
            match poll(&mut watched, Some(&timeout)) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    /// Reads what has come; the answer with the `wanted` tag, if it has.
    pub(super) fn receive(&mut self, wanted: Option<Tag>) -> io::Result<Option<SavesBegun>> {
        let mut buffer = [0; 64 << 10];
        let mut answer = None;
        loop {
            let read = match recv(self.stream.as_fd(), &mut buffer[..], RecvFlags::DONTWAIT) {
                Ok((_, 0)) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok((_, read)) => read,
                Err(rustix::io::Errno::INTR) => continue,
                Err(rustix::io::Errno::WOULDBLOCK) => return Ok(answer),
                Err(errno) => return Err(errno.into()),
            };
            let mut bytes = &buffer[..read];
            let mut messages = Vec::new();
            while let Some(frame) = self.reader.next_frame(&mut bytes).map_err(other)? {
                messages.extend(ToEngine::decode(frame).map_err(other)?);
            }
            for message in messages {
                match message {
                    ToEngine::SavesBegun(begun) if Some(begun.tag) == wanted => {
                        self.pressure = begun.pressure;
                        answer = Some(begun);
                    }
                    ToEngine::SavesBegun(late) => {
                        self.owed.retain(|&tag| tag != late.tag);
                        let places = late.chains.iter().flat_map(|chain| &chain.places);
                        self.inbox.unwanted.extend(places.map(|place| place.slot));
                    }
                    ToEngine::Cleared(cleared) => {
                        self.clearing.take_if(|tag| *tag == cleared.tag);
                    }
                    other => self.inbox.take(other)?,
                }
            }
            if answer.is_some() {
                return Ok(answer);
            }
        }
    }
}

impl Inbox {
    fn take(&mut self, message: ToEngine<'_>) -> io::Result<()> {
        match message {
            ToEngine::Events(events) => {
                let events = events.events.iter().filter_map(event);
                self.events.extend(events);
                if self.events.len() > EVENTS_MAX {
                    // The consumer has lost track of the pool; tell it so, once.
                    self.events = vec![PoolEvent::Cleared];
                }
            }
            ToEngine::Counts(counts) => {
                let mut now = PoolCounters::default();
                for count in &counts.counts {
                    // One that this version does not know is left out.
                    let _ = now.set(&count.name, count.value)
                        || self.gauges.set(&count.name, count.value);
                }
                if let Some(last) = self.last.replace(now) {
                    self.counters.add_growth(&last, &now);
                }
            }
            ToEngine::Refused(refused) => return Err(io::Error::other(refused.message)),
            _ => {}
        }
        Ok(())
    }
}

fn event(event: &Event) -> Option<PoolEvent> {
    match *event {
        Event::Stored(key) => Some(PoolEvent::Stored(key)),
        Event::Removed(key) => Some(PoolEvent::Removed(key)),
        Event::Cleared => Some(PoolEvent::Cleared),
        _ => None,
    }
}

fn other(error: WireError) -> io::Error {
    io::Error::other(error)
}
