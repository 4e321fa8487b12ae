//! What the daemon does for one process of an engine, from its hello to its end.

use std::io::{self, Read};
use std::num::NonZeroU64;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use kvtide_model::NamespaceId;
use kvtide_model::wire::{
    BeginSaves, ChainSaves, Cleared, FrameReader, Hello, LONGEST_FRAME, Place, RefusalCode,
    Refused, Role, SavesBegun, SessionToken, ToDaemon, ToEngine, Versions, Welcome, WireError,
};

use super::engine::{Engine, Process};
use super::error::{NodeError, Refusal};
use super::ledger::{EngineEntry, PoolEntry};
use super::link::Link;
use super::model_pool::{self, ModelPool};
use super::{Inner, Peer, State, unix_seconds};
use crate::pool::Pool;
use crate::pool::holders::SlotHolder;
use crate::session::SessionId;
use crate::sync::lock;

/// Read from a connection at once.
const READ_BYTES: usize = 256 << 10;
/// Keys that an engine may send in one frame.
const MAX_KEYS: u32 = LONGEST_FRAME / 16 - 1024;

/// An engine's process that was let in.
struct Admitted {
    number: u8,
    connection: u64,
    namespace: NamespaceId,
    session: SessionId,
    pool: Arc<Pool>,
    link: Arc<Link>,
}

impl Inner {
    /// Serves a process until its connection ends.
    pub(super) fn serve(&self, stream: UnixStream, peer: Peer, mut hello: Hello) {
        // Tenants find nothing of each other, and each has its quota: so each has a pool of its own.
        hello.namespace = hello.namespace.of_tenant(&hello.tenant);
        let hello = &hello;
        let Ok(writer) = stream.try_clone() else {
            return; // It sees the end of its connection.
        };
        let link = Arc::new(Link::new(writer));
        let admitted = match self.admit(peer, hello, &link) {
            Ok(admitted) => admitted,
            Err(refusal) => {
                tracing::warn!(
                    engine = hello.engine_id,
                    reason = refusal.message,
                    "refused"
                );
                let refused = Refused::new(refusal.code, &refusal.message);
                // If it does not hear why, it sees that its connection ends.
                let _ = link.send(&ToEngine::Refused(refused));
                return;
            }
        };
        if let Err(error) = self.converse(stream, &admitted) {
            tracing::warn!(engine = hello.engine_id, %error, "a connection ends");
            let code = error.get_ref().and_then(|e| e.downcast_ref::<WireError>());
            if let Some(code) = code.map(WireError::code) {
                let refused = Refused::new(code, &error.to_string());
                let _ = link.send(&ToEngine::Refused(refused));
            }
        }
        link.close();
        self.leave(&admitted);
        tracing::info!(
            engine = hello.engine_id,
            number = admitted.number,
            role = ?hello.role,
            pid = peer.pid,
            "a process of an engine is no longer connected"
        );
    }

    /// Lets a process in, and sends it what it needs.
    fn admit(&self, peer: Peer, hello: &Hello, link: &Arc<Link>) -> Result<Admitted, Refusal> {
        let minor = Versions::agreed(hello.versions, Versions::OURS)
            .map_err(|error| Refusal::new(RefusalCode::VERSION, error.to_string()))?;
        if self.is_closing() {
            return Err(Refusal::new(
                RefusalCode::CLOSING,
                "the daemon is about to end; connect again when it has been started anew",
            ));
        }
        let mut state = lock(&self.state);
        self.open_model(&mut state, hello)?;
        let number = match self.find_engine(&mut state, hello)? {
            Some(number) => number,
            None => self.open_engine(&mut state, hello)?,
        };
        state.connections += 1;
        let connection = state.connections;
        let State {
            engines,
            models,
            ledger,
            ..
        } = &mut *state;
        let found = engines.get_mut(&number).zip(models.get(&hello.namespace));
        let Some((engine, model)) = found else {
            return Err(no_memory("the engine has just gone"));
        };
        let token = SessionToken::from_bytes(engine.entry.token);
        let resumed = hello.token.is_some() && hello.token == token;
        let (Some(token), Some(memory)) = (token, NonZeroU64::new(ledger.nonce)) else {
            return Err(no_memory("the ledger has no numbers"));
        };
        let own = engine.open_own().map_err(no_memory)?;
        let welcome = Welcome {
            minor,
            server: self.options.server.clone(),
            boot: self.boot,
            memory,
            token,
            session: number,
            resumed,
            extent_bytes: self.options.extent_bytes as u64,
            extents: ledger.extents,
            data_offset: 0,
            rows_per_extent: model.rows_of(0).end,
            buckets: model.rows.buckets(),
            max_keys: MAX_KEYS,
        };
        let descriptors = [self.memory.file.as_fd(), model.tables.as_fd(), own.as_fd()];
        let welcome = ToEngine::Welcome(welcome);
        link.welcome(&welcome, &descriptors).map_err(no_memory)?;
        engine.processes.push(Process {
            connection,
            role: hello.role,
            link: Arc::clone(link),
            pid: peer.pid,
            uid: peer.uid,
        });
        if hello.role == Role::Scheduler {
            // It has one connection: an earlier one is its own, and broken.
            if let Some(earlier) = engine.link.replace(Arc::clone(link)) {
                earlier.close();
            }
            engine.abandoned = false;
        }
        tracing::info!(
            engine = hello.engine_id,
            model = hello.model,
            tenant = hello.tenant,
            number,
            role = ?hello.role,
            pid = peer.pid,
            uid = peer.uid,
            resumed,
            "a process of an engine is connected"
        );
        Ok(Admitted {
            number,
            connection,
            namespace: hello.namespace,
            session: engine.session,
            pool: Arc::clone(&model.pool),
            link: Arc::clone(link),
        })
    }

    /// Opens the pool of a model, if it is not open.
    fn open_model(&self, state: &mut State, hello: &Hello) -> Result<(), Refusal> {
        if state.models.contains_key(&hello.namespace) {
            let mut pools = state.ledger.pools.iter();
            let entry = pools.find(|entry| entry.namespace() == hello.namespace);
            if entry.is_some_and(|entry| entry.geometry() == hello.geometry) {
                return Ok(());
            }
            let message = "its blocks are not like those of the other engines of its namespace; all \
                           have to be of one version of kvtide";
            return Err(Refusal::new(RefusalCode::GEOMETRY, message));
        }
        let (extents, bytes) = (state.ledger.extents, self.options.extent_bytes);
        let rows = model_pool::rows(&hello.geometry, extents, bytes).map_err(|error| {
            let fix = "raise the daemon's memory.extent";
            Refusal::new(
                RefusalCode::GEOMETRY,
                format!("a block's row: {error}; {fix}"),
            )
        })?;
        let namespace = hello.namespace;
        let model = ModelPool::open(&self.memory, &self.options, namespace, rows);
        let model = model.map_err(no_memory)?;
        state.ledger.pools.push(PoolEntry {
            namespace: *namespace.as_bytes(),
            model: hello.model.clone(),
            tenant: hello.tenant.clone(),
            group: hello.group,
            ranks: hello.geometry.ranks,
            layers: hello.geometry.layers,
            layer_bytes: hello.geometry.layer_bytes,
            block_tokens: hello.geometry.block_tokens,
            extents: Vec::new(),
            pinned_until_unix_s: 0,
        });
        state.models.insert(namespace, model);
        self.memory.note(&state.ledger).map_err(no_memory)
    }

    /// The engine that a process belongs to, if others of it came before.
    fn find_engine(&self, state: &mut State, hello: &Hello) -> Result<Option<u8>, Refusal> {
        let engines = state.engines.values_mut();
        let mut of_that_id = engines.filter(|engine| engine.entry.engine_id == hello.engine_id);
        let Some(engine) = of_that_id.next() else {
            return Ok(None);
        };
        let number = engine.entry.number;
        if engine.is_long_gone() {
            self.remove_engine(state, number);
            return Ok(None);
        }
        if engine.is_gone() {
            let message = "an engine of that name has just gone; connect again in a second";
            return Err(Refusal::new(RefusalCode::CLOSING, message));
        }
        let token = hello.token.map(|token| *token.as_bytes());
        let same_model = engine.namespace() == hello.namespace;
        let is_back = token == Some(engine.entry.token);
        let is_first = hello.role == Role::Scheduler && engine.link.is_none();
        let is_worker = matches!(hello.role, Role::Worker { .. });
        if same_model && (is_back || is_first || is_worker) {
            return Ok(Some(number));
        }
        Err(Refusal::new(
            RefusalCode::TAKEN,
            format!(
                "engine_id: another engine that is called {:?} is connected; give each engine its \
                 own engine_id or leave it out, and wait until a killed engine has ended",
                hello.engine_id
            ),
        ))
    }

    fn open_engine(&self, state: &mut State, hello: &Hello) -> Result<u8, Refusal> {
        let most = self.options.sessions.min(SlotHolder::SESSIONS);
        let mut numbers = (0..most).filter_map(|number| u8::try_from(number).ok());
        let free = numbers.find(|number| !state.engines.contains_key(number));
        let Some((number, holder)) =
            free.and_then(|number| Some((number, SlotHolder::of_session(number.into())?)))
        else {
            let message = format!(
                "the daemon serves {most} engines already; stop one, or raise its limits.sessions"
            );
            return Err(Refusal::new(RefusalCode::FULL, message));
        };
        let Some(model) = state.models.get(&hello.namespace) else {
            return Err(no_memory("the model has just gone"));
        };
        let mut token = [0; 16];
        getrandom::fill(&mut token).map_err(|error| no_memory(error.to_string()))?;
        let entry = EngineEntry {
            number,
            token,
            engine_id: hello.engine_id.clone(),
            client: hello.client.clone(),
            tenant: hello.tenant.clone(),
            namespace: *hello.namespace.as_bytes(),
            events: hello.events,
            since_unix_s: unix_seconds(),
        };
        let own = self.memory.create_own(number, model.rows.own_bytes());
        let own = own.map_err(no_memory)?;
        model.write_own_header(&own).map_err(no_memory)?;
        let session = model.pool.open_session_as(holder, hello.events);
        let engine = Engine::new(entry.clone(), session, own).map_err(no_memory)?;
        state.engines.insert(number, engine);
        state.ledger.engines.push(entry);
        self.memory.note(&state.ledger).map_err(no_memory)?;
        tracing::info!(
            engine = hello.engine_id,
            client = hello.client,
            model = hello.model,
            tenant = hello.tenant,
            number,
            "an engine has come"
        );
        Ok(number)
    }

    /// A process has gone, or has lost its connection.
    fn leave(&self, admitted: &Admitted) {
        let mut state = lock(&self.state);
        let Some(engine) = state.engines.get_mut(&admitted.number) else {
            return;
        };
        engine
            .processes
            .retain(|p| p.connection != admitted.connection);
        let is_mine = |link: &mut Arc<Link>| Arc::ptr_eq(link, &admitted.link);
        // Whether it is gone, the keeper finds out.
        engine.link.take_if(is_mine);
    }

    /// Answers until the connection ends.
    fn converse(&self, mut stream: UnixStream, admitted: &Admitted) -> io::Result<()> {
        let mut reader = FrameReader::new(LONGEST_FRAME);
        let mut buffer = vec![0; READ_BYTES];
        loop {
            let read = match stream.read(&mut buffer) {
                Ok(0) => return Ok(()),
                Ok(read) => read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                // That is how the connection of a killed process may end.
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Ok(()),
                Err(error) => return Err(error),
            };
            let mut bytes = &buffer[..read];
            while let Some(frame) = reader.next_frame(&mut bytes).map_err(io::Error::other)? {
                let message = ToDaemon::decode(frame).map_err(io::Error::other)?;
                if let Some(message) = message
                    && self.handle(admitted, message)?.is_break()
                {
                    return Ok(());
                }
            }
        }
    }

    fn handle(
        &self,
        admitted: &Admitted,
        message: ToDaemon<'_>,
    ) -> io::Result<std::ops::ControlFlow<()>> {
        let Admitted { pool, link, .. } = admitted;
        match message {
            ToDaemon::BeginSaves(asked) => {
                let begun = self.begin_saves(admitted, &asked);
                link.send(&ToEngine::SavesBegun(begun))?;
            }
            ToDaemon::Used(used) => pool.mark_used(&used.slots),
            ToDaemon::Settle(settled) => pool.settle(&settled.keys),
            ToDaemon::Damaged(damaged) => pool.drop_damaged(&damaged.slots),
            ToDaemon::Clear(asked) => {
                pool.clear();
                link.send(&ToEngine::Cleared(Cleared { tag: asked.tag }))?;
            }
            ToDaemon::Bye(_) => return Ok(std::ops::ControlFlow::Break(())),
            _ => {
                let error = "an engine that was let in sends neither Hello nor Ask";
                let refused = Refused::new(RefusalCode::MALFORMED, error);
                link.send(&ToEngine::Refused(refused))?;
                return Ok(std::ops::ControlFlow::Break(()));
            }
        }
        Ok(std::ops::ControlFlow::Continue(()))
    }

    fn begin_saves(&self, admitted: &Admitted, asked: &BeginSaves<'_>) -> SavesBegun {
        let blocks: usize = asked.chains.iter().map(|chain| chain.keys.len()).sum();
        let mut chains = vec![ChainSaves::default(); asked.chains.len()];
        let mut pressure = false;
        if !self.is_closing() {
            let room = blocks + admitted.pool.spare_rows();
            if admitted.pool.gauges().free < room {
                self.make_room(admitted.namespace, room);
            }
            for (chain, answer) in asked.chains.iter().zip(&mut chains) {
                let whole = [&*chain.earlier, &*chain.keys].concat();
                let from = chain.earlier.len();
                let (session, blocks) = (admitted.session, chain.keys.len());
                let begun = admitted.pool.begin_save(session, &whole, from, blocks);
                let number = |count: usize| u32::try_from(count).unwrap_or(u32::MAX);
                let places = begun.filling.iter().map(|filling| Place {
                    at: number(filling.at.saturating_sub(from)),
                    slot: filling.slot,
                });
                answer.places = places.collect();
                answer.covered = number(begun.covered);
            }
            pressure = admitted.pool.gauges().free <= admitted.pool.spare_rows();
        }
        SavesBegun {
            tag: asked.tag,
            pressure,
            chains,
        }
    }
}

fn no_memory(error: impl ToString) -> Refusal {
    Refusal::new(RefusalCode::NO_MEMORY, error.to_string())
}

impl From<NodeError> for Refusal {
    fn from(error: NodeError) -> Self {
        no_memory(error)
    }
}
