//! What a scheduler asks of the daemon, and how it comes back after a loss.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use kvtide_model::wire::{
    BeginSaves, Bye, ChainSaves, ChainToSave, Clear, Damaged, Role, Settle, ToDaemon, Used, Welcome,
};
use kvtide_model::{BlockKey, SlotRef};

use super::attach::{AttachError, AttachOptions, Attached, greet};
use super::connection::{Connection, Inbox};
use crate::access::{Access, Notice, Wanted};
use crate::pool::catalogue::Catalogue;
use crate::pool::{Begun, Filling, PoolCounters, PoolEvent, PoolGauges};
use crate::sync::{Mutex, lock};

/// How long a scheduler waits for where its blocks go. A step takes some milliseconds.
const PATIENCE: Duration = Duration::from_millis(5);
/// Between two tries to attach again, at first and at most.
const RETRY: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(2));
/// What a daemon may take to answer one such try.
const GREETING: Duration = Duration::from_secs(5);
/// What is sent of a chain that a save continues, while the pool has room. Behind the block before it
/// goes the next.
const EARLIER: usize = 1;
/// Sentences kept for a log that nobody writes.
const NOTICES_MAX: usize = 16;

/// A pool in another process, as one session reaches it.
#[derive(Debug)]
pub(crate) struct SocketAccess(Arc<Client>);

#[derive(Debug)]
struct Client {
    options: AttachOptions,
    /// What the daemon said at the beginning.
    welcome: Welcome,
    catalogue: Arc<Catalogue>,
    state: Mutex<State>,
    /// Whether what is found in the pool's memory may be used.
    readable: AtomicBool,
    notices: Mutex<Vec<Notice>>,
}

#[derive(Debug)]
struct State {
    connection: Option<Connection>,
    /// What the last connection had, while there is none.
    inbox: Inbox,
    /// Whether blocks are to be dropped before any is looked up again.
    must_clear: bool,
}

impl SocketAccess {
    pub(super) fn new(
        options: AttachOptions,
        attached: Attached,
        catalogue: Arc<Catalogue>,
    ) -> Self {
        let Attached {
            stream,
            reader,
            welcome,
            ..
        } = attached;
        let connection = Connection::new(stream, reader, Inbox::default());
        Self(Arc::new(Client {
            options,
            welcome,
            catalogue,
            state: Mutex::new(State {
                connection: Some(connection),
                inbox: Inbox::default(),
                must_clear: false,
            }),
            readable: AtomicBool::new(true),
            notices: Mutex::default(),
        }))
    }

    /// Does something with the connection, if there is one. One that fails is given up.
    fn with<T: Default>(&self, act: impl FnOnce(&mut Connection) -> io::Result<T>) -> T {
        let client = &self.0;
        let mut state = lock(&client.state);
        let Some(connection) = &mut state.connection else {
            return T::default();
        };
        match act(connection) {
            Ok(done) => {
                client.condemn_unwanted(connection);
                let readable = connection.is_clear();
                client.readable.store(readable, Ordering::Release);
                done
            }
            Err(error) => {
                client.readable.store(false, Ordering::Release);
                state.detach();
                client.notice(format!(
                    "the connection with the daemon is lost ({error}): nothing is loaded or saved \
                     until there is one again"
                ));
                Client::attach_again(client);
                T::default()
            }
        }
    }

    /// Sends and forgets.
    fn send(&self, message: &ToDaemon<'_>) {
        self.with(|connection| connection.send(message));
    }
}

impl State {
    fn detach(&mut self) {
        if let Some(connection) = self.connection.take() {
            self.must_clear |= !connection.is_clear();
            self.inbox = connection.inbox;
        }
    }
}

impl Client {
    /// Something for the engine's log, which is vLLM's.
    fn notice(&self, text: impl Into<Notice>) {
        let mut notices = lock(&self.notices);
        let text = text.into();
        if notices.len() < NOTICES_MAX {
            notices.push(text);
        }
    }

    /// Slots that came too late to be filled: their shards are condemned, and the pool frees them.
    fn condemn_unwanted(&self, connection: &mut Connection) {
        let ranks = self.catalogue.segment.geometry().ranks();
        for slot in connection.inbox.unwanted.drain(..) {
            for rank in 0..ranks {
                let segment = &self.catalogue.segment;
                segment.condemn_shard(slot.slot, rank, slot.generation);
            }
        }
    }

    /// Tries on another thread until there is a daemon, or this engine has ended.
    fn attach_again(client: &Arc<Self>) {
        let weak = Arc::downgrade(client);
        let thread = std::thread::Builder::new().name("kvtide-attach".into());
        if let Err(error) = thread.spawn(move || Self::try_until_attached(&weak)) {
            client.notice(format!(
                "no thread to attach to a daemon again ({error}): nothing is loaded or saved any more"
            ));
        }
    }

    fn try_until_attached(weak: &Weak<Self>) {
        let (mut wait, longest) = RETRY;
        // A daemon that refuses, refuses often, and is quoted once.
        let mut refusal = String::new();
        loop {
            std::thread::sleep(wait);
            wait = (wait * 2).min(longest);
            let Some(client) = weak.upgrade() else { return };
            let token = Some(client.welcome.token);
            let deadline = Instant::now() + GREETING;
            match greet(&client.options, Role::Scheduler, token, deadline) {
                Ok(attached) if client.is_same(&attached.welcome) => {
                    client.resume(attached);
                    return;
                }
                Ok(_) => {
                    client.notice(
                        "the daemon has other memory now: nothing is loaded or saved any more. \
                         Restart this engine to use it",
                    );
                    return;
                }
                Err(AttachError::Unreachable { .. } | AttachError::Busy { .. }) => {}
                Err(error) => {
                    let said = std::mem::replace(&mut refusal, error.to_string());
                    if said != refusal {
                        client.notice(refusal.clone());
                    }
                }
            }
        }
    }

    /// Whether a daemon has the memory that is mapped here, and knows this session.
    fn is_same(&self, welcome: &Welcome) -> bool {
        let last = &self.welcome;
        welcome.memory == last.memory
            && welcome.session == last.session
            && welcome.token == last.token
    }

    fn resume(&self, attached: Attached) {
        let mut state = lock(&self.state);
        let inbox = std::mem::take(&mut state.inbox);
        let mut connection = Connection::new(attached.stream, attached.reader, inbox);
        if state.must_clear {
            let tag = connection.take_tag();
            connection.expect_clear(tag);
            if connection.send(&ToDaemon::Clear(Clear { tag })).is_err() {
                // The next call finds it broken.
                self.notice("lost again at once");
            }
        }
        state.must_clear = false;
        // What happened meanwhile nobody has told.
        connection.inbox.events.push(PoolEvent::Cleared);
        let readable = connection.is_clear();
        state.connection = Some(connection);
        self.readable.store(readable, Ordering::Release);
        self.notice("attached to the daemon again");
    }
}

impl Access for SocketAccess {
    fn is_readable(&self) -> bool {
        self.0.readable.load(Ordering::Acquire)
    }

    fn begin_saves(&self, wanted: &[Wanted<'_>]) -> Vec<Begun> {
        let most = usize::try_from(self.0.welcome.max_keys).unwrap_or(usize::MAX);
        let answered = self.with(|connection| {
            connection.receive(None)?;
            // Or the daemon would say that it is filling them.
            self.0.condemn_unwanted(connection);
            if connection.is_behind() || wanted.is_empty() {
                return Ok(Vec::new());
            }
            let tag = connection.take_tag();
            let whole = connection.pressure;
            let mut left = most;
            let chains = wanted.iter().map(|save| chain(save, whole, &mut left));
            let asked = BeginSaves {
                tag,
                chains: chains.collect(),
            };
            connection.send(&ToDaemon::BeginSaves(asked))?;
            let begun = connection.await_saves(tag, PATIENCE)?;
            Ok(begun.unwrap_or_default())
        });
        let mut answered = answered.into_iter();
        let begun = |save: &Wanted<'_>| begun(save, answered.next().unwrap_or_default());
        wanted.iter().map(begun).collect()
    }

    fn mark_used(&self, used: &[SlotRef]) {
        let slots = used.into();
        self.send(&ToDaemon::Used(Used { slots }));
    }

    fn settle(&self, chain: &[BlockKey]) {
        let most = usize::try_from(self.0.welcome.max_keys).unwrap_or(usize::MAX);
        let keys = chain[..chain.len().min(most)].into();
        self.send(&ToDaemon::Settle(Settle { keys }));
    }

    fn drop_damaged(&self, damaged: &[SlotRef]) {
        let slots = damaged.into();
        self.send(&ToDaemon::Damaged(Damaged { slots }));
    }

    fn clear(&self) -> bool {
        // Whatever becomes of the connection, nothing is found before the daemon has done it.
        lock(&self.0.state).must_clear = true;
        self.0.readable.store(false, Ordering::Release);
        self.with(|connection| {
            let tag = connection.take_tag();
            connection.expect_clear(tag);
            connection.send(&ToDaemon::Clear(Clear { tag }))
        });
        let mut state = lock(&self.0.state);
        // The connection remembers it, or else the next one will.
        state.must_clear = state.connection.is_none();
        !state.must_clear
    }

    fn poll(&self) {
        self.with(|connection| {
            connection.flush()?;
            connection.receive(None).map(drop)
        });
    }

    fn take_events(&self) -> Vec<PoolEvent> {
        self.poll();
        let mut state = lock(&self.0.state);
        std::mem::take(&mut state.inbox().events)
    }

    fn counters(&self) -> PoolCounters {
        lock(&self.0.state).inbox().counters
    }

    fn gauges(&self) -> PoolGauges {
        lock(&self.0.state).inbox().gauges
    }

    fn take_notices(&self) -> Vec<Notice> {
        std::mem::take(&mut lock(&self.0.notices))
    }
}

impl State {
    fn inbox(&mut self) -> &mut Inbox {
        match &mut self.connection {
            Some(connection) => &mut connection.inbox,
            None => &mut self.inbox,
        }
    }
}

impl Drop for SocketAccess {
    fn drop(&mut self) {
        self.send(&ToDaemon::Bye(Bye));
    }
}

/// The part of a save that fits into a frame with the others.
fn chain<'a>(save: &Wanted<'a>, whole: bool, left: &mut usize) -> ChainToSave<'a> {
    let from = save.from.min(save.chain.len());
    let (earlier, rest) = save.chain.split_at(from);
    let earlier = match whole {
        true => earlier,
        false => &earlier[earlier.len().saturating_sub(EARLIER)..],
    };
    let earlier = &earlier[earlier.len().saturating_sub(*left)..];
    *left -= earlier.len();
    let keys = &rest[..rest.len().min(save.blocks).min(*left)];
    *left -= keys.len();
    ChainToSave {
        earlier: earlier.into(),
        keys: keys.into(),
    }
}

/// What becomes of a save, in places of its chain.
fn begun(save: &Wanted<'_>, answer: ChainSaves) -> Begun {
    let place = |number: u32| usize::try_from(number).unwrap_or(usize::MAX);
    let filling = answer.places.iter().map(|given| Filling {
        at: save.from.saturating_add(place(given.at)),
        slot: given.slot,
    });
    Begun {
        filling: filling.collect(),
        covered: place(answer.covered),
    }
}
