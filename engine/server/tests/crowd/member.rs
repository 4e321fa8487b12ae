//! One engine of the crowd, in a process of its own. It comes, looks blocks up, loads and compares them,
//! saves what is missing, goes, and comes again; and it may be killed or stopped at any instant.

use std::io::{Read as _, Write as _};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::sleep;
use std::time::{Duration, Instant};

use kvtide_engine::{AttachError, Readiness, SaveJob};
use kvtide_model::BlockKey;

use super::common::engine::{Engine, LIMIT, Shape, keys};
use super::common::random::Random;
use super::tally::Tally;

/// Two models that share the memory.
const SHAPES: [Shape; 2] = [
    Shape {
        model: "chat",
        layers: 4,
        layer_bytes: 32 << 10,
        blocks: 16,
    },
    Shape {
        model: "code",
        layers: 3,
        layer_bytes: 10_000,
        blocks: 16,
    },
];
/// Chains in families that have their first half in common: more than there is memory for.
const FAMILIES: usize = 20;
const CHAINS: usize = 4;
/// What a member is told when there is no place for it.
const FULL: &str = "engines already; stop one, or raise its limits.sessions";

/// Works until the standard input ends.
pub(crate) fn run(socket: &Path, number: usize, seed: u64) {
    let mut member = Member {
        name: format!("m{number}-{}", std::process::id()),
        random: Random::new(seed),
        tally: Tally::default(),
        is_over: until_input_ends(),
    };
    let shape = SHAPES[number % SHAPES.len()];
    let mut visits = 0;
    // Who has been kept out so far gets in when others leave.
    while visits == 0 || !member.is_over.load(Ordering::Relaxed) {
        visits += 1;
        let name = format!("{}-{visits}", member.name);
        let engine = member.come(socket, &name, shape);
        member.stay(engine);
    }
}

/// See [`run`].
struct Member {
    name: String,
    random: Random,
    tally: Tally,
    is_over: Arc<AtomicBool>,
}

impl Member {
    /// Attaches, as soon as there is a place.
    fn come(&mut self, socket: &Path, name: &str, shape: Shape) -> Engine {
        let begun = Instant::now();
        loop {
            match Engine::attach(socket, name, shape, Duration::from_secs(1)) {
                Ok(engine) => {
                    self.tally.attached += 1;
                    return engine;
                }
                Err(AttachError::Refused { message, .. }) if message.contains(FULL) => {
                    self.tally.full += 1;
                    self.say();
                }
                // The daemon is just being started anew.
                Err(AttachError::Unreachable { .. } | AttachError::Busy { .. }) => {}
                Err(error) => panic!("{name} is not let in: {error}"),
            }
            let is_late = self.is_over.load(Ordering::Relaxed) && begun.elapsed() > 6 * LIMIT;
            assert!(!is_late, "{name} never gets in");
            sleep(self.random.ms(50..200));
        }
    }

    /// Uses the pool for a while.
    fn stay(&mut self, mut engine: Engine) {
        let mut left = self.random.within(10..80);
        let mut lost: Option<Instant> = None;
        // Who has lost the daemon waits until it is back.
        while left > 0 || lost.is_some() {
            left = left.saturating_sub(1);
            self.act(&mut engine);
            let _ = engine.session.poll();
            for notice in engine.session.take_notices() {
                assert!(!notice.contains("other memory"), "{notice}");
                if notice.contains("is lost") {
                    lost = lost.or_else(|| Some(Instant::now()));
                } else if notice.contains("attached to the daemon again") {
                    self.tally.again += 1;
                    lost = None;
                } else {
                    println!("{notice}");
                }
            }
            let waited = lost.map_or(Duration::ZERO, |since| since.elapsed());
            assert!(waited < LIMIT, "it is not attached again");
            if lost.is_some() {
                sleep(Duration::from_millis(20));
            } else if self.is_over.load(Ordering::Relaxed) {
                break;
            }
            self.say();
        }
    }

    fn say(&self) {
        println!("{}", self.tally);
        std::io::stdout().flush().unwrap();
    }

    /// Looks a chain up, does something with what is found, and saves what is not.
    fn act(&mut self, engine: &mut Engine) {
        let (family, chain) = (
            self.random.within(0..FAMILIES),
            self.random.within(0..CHAINS),
        );
        let first = u32::try_from(family * 1000).unwrap();
        let own = first + 100 + u32::try_from(chain * 10).unwrap();
        let chain = [keys(first..first + 4), keys(own..own + 4)].concat();
        let found = engine.session.lookup(&chain);
        self.tally.looked += 1;
        let begun = Instant::now();
        while matches!(found.lease.readiness(0), Readiness::Arriving(_))
            && begun.elapsed() < Duration::from_millis(40)
        {
            sleep(Duration::from_millis(2));
        }
        if self.random.percent(15) {
            // A request that waits and is given up.
            sleep(self.random.ms(1..60));
        } else if found.lease.readiness(0) == Readiness::Ready {
            let loaded = engine.load_leased(&found.lease, &chain);
            assert_eq!(loaded.wrong, 0, "wrong bytes in {chain:?}");
            // It was complete and stays so while it is pinned: bytes that do not have their checksum were
            // written by somebody whose time was over.
            assert_eq!(loaded.failed, 0, "damaged bytes in {chain:?}");
            self.tally.loaded += loaded.right;
            engine.session.mark_used(&found.lease);
        }
        let from = found.lease.len();
        drop(found);
        if from < chain.len() {
            self.save(engine, &chain, from);
        } else if self.random.percent(2) {
            let _ = engine.session.clear();
        } else {
            engine.session.settle(&chain);
        }
    }

    fn save(&mut self, engine: &mut Engine, chain: &[BlockKey], from: usize) {
        let blocks = engine.compute(chain);
        let plan = engine.session.begin_save(chain, from, &blocks[from..]);
        if plan.job == 0 {
            return;
        }
        if self.random.percent(2) {
            return; // Nobody ever begins it.
        }
        let saved = plan.moves.len();
        let (job, moves) = (plan.job, plan.moves);
        let jobs = vec![SaveJob { job, moves }];
        if self.random.percent(40) {
            engine.worker.save_now(jobs);
        } else {
            // As a step computes it, layer by layer.
            engine.worker.begin_step(jobs);
            for layer in 0..engine.shape.layers as usize {
                sleep(self.random.ms(0..12));
                engine.worker.layer_computed(layer);
            }
            engine.worker.end_step();
        }
        if self.random.percent(60) {
            engine.worker.finish_saves(&[job]).unwrap();
            self.tally.saved += saved;
        }
    }
}

/// Becomes true when the standard input ends: whoever has started this process wants it to end, or has
/// ended itself.
fn until_input_ends() -> Arc<AtomicBool> {
    let is_over = Arc::new(AtomicBool::new(false));
    let told = Arc::clone(&is_over);
    std::thread::spawn(move || {
        let _ = std::io::stdin().read_to_end(&mut Vec::new());
        told.store(true, Ordering::Relaxed);
    });
    is_over
}
