//! What belongs to one engine of those that use a pool: what it has pinned, its saves, what it is told
//! of the pool, and its right to clear it.
//!
//! A pool outlives its engines. When a session is dropped, however its engine ended, nothing of it is
//! left: what it was filling is condemned, so that nobody waits for bytes that will not come, and a
//! writer that still runs is fenced by the generations of the shards' headers. Its bytes are not, so
//! where engines in several processes share a pool, a session is closed only when its engine's processes
//! are gone (`crate::node`). What it has saved stays.

mod saves;

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use kvtide_model::{BlockKey, BlockMove, SlotRef};
#[cfg(not(loom))]
use kvtide_segment::SharedSegment;

use crate::access::{Access, LocalAccess, Wanted};
#[cfg(not(loom))]
use crate::access::{AttachOptions, Attachment, SocketAccess};
use crate::pool::pins::Pins;
use crate::pool::{Begun, Lease, Pool, PoolCounters, PoolEvent, PoolGauges};
use crate::sync::{Mutex, lock};
use saves::InFlightSaves;

/// Tells the sessions of one pool apart; never given twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct SessionId(u64);

impl SessionId {
    pub(crate) fn new(number: u64) -> Self {
        Self(number)
    }
}

/// Why a session cannot be opened.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum SessionError {
    /// As many are open as a pool serves.
    #[error("the pool serves {max} engines already; stop one of them")]
    TooMany {
        /// How many it serves.
        max: usize,
    },
}

/// How a session behaves.
#[derive(Clone, Copy, Debug)]
pub struct SessionOptions {
    /// Whether it is told what becomes of the pool's blocks, whoever saved them.
    pub events: bool,
    /// How long a match is held for a request that is not scheduled.
    pub lease_ttl: Duration,
}

/// A run of matched blocks.
#[derive(Debug)]
pub struct Match {
    /// Pins on them.
    pub lease: Lease,
    /// Whether all of them are complete; otherwise some are still being saved.
    pub complete: bool,
    /// Leading blocks that are complete.
    pub(crate) certain: usize,
}

/// What an engine wants to save of one request.
#[derive(Clone, Copy, Debug)]
pub struct Save<'a> {
    /// Keys from the beginning of the chain.
    pub chain: &'a [BlockKey],
    /// The first block to save.
    pub from: usize,
    /// The engine's blocks that hold it and those that follow.
    pub blocks: &'a [u32],
}

/// A save that workers are to carry out.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SavePlan {
    /// The job's id; 0 when there is nothing to do.
    pub job: u64,
    /// What to copy.
    pub moves: Vec<BlockMove>,
    /// Leading blocks that the pool holds or is now saving; the rest was not accepted, because too
    /// much is in flight or pinned.
    pub covered: usize,
}

/// See the module's documentation.
#[derive(Debug)]
pub struct Session {
    access: Box<dyn Access>,
    /// In the memory that is in use, if there is any yet.
    pins: Mutex<Option<Arc<Pins>>>,
    /// Whether the engine's workers have that memory, too.
    admitted: AtomicBool,
    saves: Mutex<InFlightSaves>,
    verified_blocks: AtomicU64,
    /// How often the pool was cleared by this session: what was matched before is not loaded any more.
    clears: AtomicU64,
    lease_ttl: Duration,
}

impl Session {
    /// A session of an engine with a pool in this process.
    ///
    /// # Errors
    /// [`SessionError`] when the pool serves too many engines.
    pub fn open(pool: &Arc<Pool>, options: SessionOptions) -> Result<Self, SessionError> {
        let (access, holder) = LocalAccess::open(pool, options.events)?;
        let pins = Pins::new(Arc::clone(pool.catalogue()), holder);
        Ok(Self::new(Box::new(access), Some(pins), options.lease_ttl))
    }

    /// A session of an engine with a pool in another process, whose workers have it, too.
    #[cfg(not(loom))]
    #[must_use]
    pub fn attached(attachment: Attachment, lease_ttl: Duration) -> Self {
        let (access, pins) = SocketAccess::attached(attachment);
        Self::new(Box::new(access), Some(pins), lease_ttl)
    }

    /// A session of an engine whose pool will be in another process that is not there yet: nothing is
    /// found or saved before [`Session::change_memory`].
    #[cfg(not(loom))]
    #[must_use]
    pub fn waiting(options: AttachOptions, lease_ttl: Duration) -> Self {
        Self::new(Box::new(SocketAccess::waiting(options)), None, lease_ttl)
    }

    fn new(access: Box<dyn Access>, pins: Option<Pins>, lease_ttl: Duration) -> Self {
        Self {
            access,
            admitted: AtomicBool::new(pins.is_some()),
            pins: Mutex::new(pins.map(Arc::new)),
            saves: Mutex::default(),
            verified_blocks: AtomicU64::new(0),
            clears: AtomicU64::new(0),
            lease_ttl,
        }
    }

    /// Whether its pool has other memory than this session: that of another daemon, or of the first.
    #[must_use]
    pub fn has_new_memory(&self) -> bool {
        self.access.has_new_memory()
    }

    /// Goes over to that memory, if nothing of the last one is in use: no save is in flight, and no lease
    /// is held. What of the last one is matched and not loaded is forgotten at the next question. The
    /// workers do not have it yet, so nothing is found or saved before [`Session::admit`].
    #[cfg(not(loom))]
    #[must_use]
    pub fn change_memory(&self) -> Option<Arc<SharedSegment>> {
        if !self.has_new_memory() {
            return None;
        }
        self.clears.fetch_add(1, Ordering::AcqRel);
        let mut pins = lock(&self.pins);
        if let Some(last) = &*pins {
            let mut saves = lock(&self.saves);
            saves.collect(last.catalogue());
            // A lease has one each.
            if saves.blocks() > 0 || Arc::strong_count(last) > 1 {
                return None;
            }
        }
        let new = self.access.take_new_memory()?;
        self.admit(false);
        let segment = Arc::clone(&new.catalogue().segment);
        let last = pins.replace(Arc::new(new));
        // A large map takes its time to be taken down. Without a thread, this one does it.
        let _ = std::thread::Builder::new().spawn(move || drop(last));
        Some(segment)
    }

    /// Whether the engine's workers have the memory that this session has.
    pub fn admit(&self, admitted: bool) {
        self.admitted.store(admitted, Ordering::Release);
    }

    /// The pins in the memory in use, if what is there may be used.
    fn readable_pins(&self) -> Option<Arc<Pins>> {
        let may = self.admitted.load(Ordering::Acquire) && self.access.is_readable();
        may.then(|| lock(&self.pins).clone()).flatten()
    }

    /// Whether blocks can be found and saved now.
    #[must_use]
    pub fn is_usable(&self) -> bool {
        self.readable_pins().is_some()
    }

    /// Pins the longest run of `keys`, from the first on, that the pool holds or is saving.
    ///
    /// The run ends at the first block that is missing, because what follows cannot be used
    /// without it. A lookup does not count as a use of the blocks, a load does
    /// ([`Session::mark_used`]): many a lookup is put off or asked again.
    #[must_use]
    pub fn lookup(&self, keys: &[BlockKey]) -> Match {
        let Some(pins) = self.readable_pins() else {
            return Match {
                lease: Lease::empty(),
                complete: true,
                certain: 0,
            };
        };
        let (slots, certain) = pins.pin_run(keys);
        let lease = Lease::new(pins, slots, self.lease_ttl);
        Match {
            complete: certain == lease.len(),
            certain,
            lease,
        }
    }

    /// Whether the pool holds `key` or, unless it has to be `complete`, is saving it.
    #[must_use]
    pub fn holds(&self, key: BlockKey, complete: bool) -> bool {
        let pins = self.readable_pins();
        pins.is_some_and(|pins| pins.catalogue().holds(key, complete))
    }

    /// Marks leased blocks as used, so that they are given up later.
    pub fn mark_used(&self, lease: &Lease) {
        self.access.mark_used(lease.slots());
    }

    /// The first of `places` in `lease` whose block does not have its checksum.
    ///
    /// The block is dropped, unless a match that vLLM was told of holds it as well and cannot be
    /// taken back.
    #[must_use]
    pub fn first_damaged(&self, lease: &Lease, places: Range<usize>) -> Option<usize> {
        let catalogue = lease.catalogue()?;
        let unverified = lease.slots().get(places.clone()).unwrap_or_default();
        let intact = unverified
            .iter()
            .take_while(|&&slot| catalogue.bytes_match(slot))
            .count();
        let damaged = unverified.get(intact).copied();
        let compared = intact as u64 + u64::from(damaged.is_some());
        self.verified_blocks.fetch_add(compared, Ordering::Relaxed);
        let slot = damaged?;
        if lease.is_only_pin(slot) {
            self.access.drop_damaged(&[slot]);
        }
        Some(places.start + intact)
    }

    /// Plans the save of `chain`'s blocks from `from` on, which lie in the engine's `blocks`, as far
    /// as the pool does not hold them already; those that it holds are marked as used.
    #[must_use]
    pub fn begin_save(&self, chain: &[BlockKey], from: usize, blocks: &[u32]) -> SavePlan {
        let save = Save {
            chain,
            from,
            blocks,
        };
        let plans = self.begin_saves(&[save]);
        plans.into_iter().next().unwrap_or_default()
    }

    /// The same for all saves of a step; one plan for each.
    #[must_use]
    pub fn begin_saves(&self, saves: &[Save<'_>]) -> Vec<SavePlan> {
        if !self.admitted.load(Ordering::Acquire) {
            return vec![SavePlan::default(); saves.len()];
        }
        let wanted = saves.iter().map(|save| Wanted {
            chain: save.chain,
            from: save.from,
            blocks: save.blocks.len(),
        });
        let wanted: Vec<_> = wanted.collect();
        let mut in_flight = lock(&self.saves);
        let plan = |(save, begun): (&Save<'_>, Begun)| {
            let block = |at: usize| save.blocks.get(at.checked_sub(save.from)?).copied();
            let moves = begun.filling.iter().filter_map(|each| {
                let (slot, block) = (each.slot, block(each.at)?);
                Some(BlockMove { slot, block })
            });
            let moves: Vec<BlockMove> = moves.collect();
            SavePlan {
                job: if moves.is_empty() {
                    0
                } else {
                    in_flight.begin(&moves)
                },
                moves,
                covered: begun.covered,
            }
        };
        let begun = self.access.begin_saves(&wanted);
        saves.iter().zip(begun).map(plan).collect()
    }

    /// Nothing follows in `chain` for now: its tail goes before its head, although the head was
    /// saved first.
    pub fn settle(&self, chain: &[BlockKey]) {
        self.access.settle(chain);
    }

    /// Jobs of this engine that still read one of its `blocks` and must end before it is overwritten.
    #[must_use]
    pub fn saves_reading(&self, blocks: &[u32]) -> Vec<u64> {
        lock(&self.saves).reading(blocks)
    }

    /// Takes note of the saves that workers have finished since the last call. Returns this engine's
    /// blocks that are still in flight.
    #[must_use]
    pub fn poll(&self) -> usize {
        self.access.poll();
        let pins = lock(&self.pins);
        let mut saves = lock(&self.saves);
        if let Some(pins) = &*pins {
            saves.collect(pins.catalogue());
        }
        saves.blocks()
    }

    /// Waits until no save of this engine is in flight, at most for `limit`; returns whether that was
    /// reached.
    #[must_use]
    pub fn drain(&self, limit: Duration) -> bool {
        let deadline = Instant::now() + limit;
        while self.poll() > 0 {
            if Instant::now() >= deadline {
                return false;
            }
            std::thread::sleep(Duration::from_micros(200));
        }
        true
    }

    /// Drops blocks whose bytes were found damaged. Stale references are ignored.
    ///
    /// Requests that hold such a block already find the damage when they load it.
    pub fn drop_damaged(&self, damaged: &[SlotRef]) {
        self.access.drop_damaged(damaged);
    }

    /// Drops every block of this engine's namespace, also those that others saved. Blocks that are
    /// pinned or being saved go as soon as they no longer are. This engine finds none of them any more;
    /// whether its pool knows, too: a daemon that is gone hears of it when this engine is attached again.
    pub fn clear(&self) -> bool {
        self.clears.fetch_add(1, Ordering::AcqRel);
        self.access.clear()
    }

    /// Another number than before means that what was matched before is to be forgotten.
    pub(crate) fn clears(&self) -> u64 {
        self.clears.load(Ordering::Acquire)
    }

    /// What is to be said in the engine's log since the last call, one sentence each.
    #[must_use]
    pub fn take_notices(&self) -> Vec<String> {
        self.access.take_notices()
    }

    /// What happened in this engine's namespace since the last call, oldest first.
    #[must_use]
    pub fn take_events(&self) -> Vec<PoolEvent> {
        self.access.take_events()
    }

    /// Totals since the pool was made; those that this session counts, since it was opened.
    #[must_use]
    pub fn counters(&self) -> PoolCounters {
        PoolCounters {
            verified_blocks: self.verified_blocks.load(Ordering::Relaxed),
            ..self.access.counters()
        }
    }

    /// What the pool holds now.
    #[must_use]
    pub fn gauges(&self) -> PoolGauges {
        self.access.gauges()
    }
}
