//! The memory of a pool is damaged at random places between two lives of the daemon: nothing wrong is
//! served, what was not touched is, and all places can be saved to again.
#![allow(clippy::unwrap_used, reason = "a failed step fails the test")]
#![allow(
    clippy::print_stdout,
    reason = "a failed round is told how to have it again"
)]

mod common;

use std::collections::BTreeSet;
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use common::engine::{Engine, SMALL, Shape, keys, namespace};
use common::place::Place;
use common::random::Random;
use kvtide_model::BlockKey;

const SEED: &str = "KVTIDE_DAMAGE_SEED";
/// Keys that an engine saves at once, and of which chains there are so many.
const CHAIN: u32 = 32;
const CHAINS: u32 = 6;
/// Of 8 MiB in rows of 8 KiB, so that every place is used once.
const FILLING: u32 = 40;

/// What is damaged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Part {
    /// The bytes of blocks.
    Rows,
    /// What the tables say of slots: states, keys, generations, times, checksums.
    Records,
    /// The buckets of the index, and who has pinned what.
    Buckets,
    Ledger,
}

/// One pool that has been saved to.
struct Saved {
    place: Place,
    /// In the order of their keys: the slots of all chains.
    slots: Vec<u32>,
    rows: kvtide_segment::RowGeometry,
    rows_per_extent: u32,
}

fn chain(number: u32) -> Vec<BlockKey> {
    keys(number * 100..number * 100 + CHAIN)
}

impl Saved {
    fn new(is_killed: bool) -> Self {
        let place = Place::with("8MiB", "2MiB");
        let daemon = place.start();
        let engine = Engine::start(&place.socket(), "a", SMALL);
        let mut slots = Vec::new();
        for number in 0..CHAINS {
            engine.save(&chain(number));
            let found = engine.session.lookup(&chain(number));
            slots.extend(found.lease.slots().iter().map(|slot| slot.slot));
        }
        assert_eq!(slots.len(), (CHAINS * CHAIN) as usize);
        let rows = *engine.segment.geometry();
        drop(engine);
        place.until(|status| status.sessions.is_empty());
        if is_killed {
            daemon.kill();
        } else {
            daemon.stop();
        }
        Self {
            place,
            slots,
            rows_per_extent: rows.rows_within(0..2 << 20).end,
            rows,
        }
    }

    /// Where a slot has its parts in the file with the tables.
    fn records(&self, slot: u32) -> [Range<usize>; 2] {
        let [_, record, headers] = self.rows.tables_file_ranges(&(slot..slot + 1));
        [record, headers]
    }

    /// Flips a bit somewhere; the slot that it belongs to, if it is one's.
    fn damage(&self, part: Part, random: &mut Random) -> Option<u32> {
        let tables = self
            .place
            .memory(&namespace(SMALL.model).of_tenant("team-a").to_string());
        match part {
            Part::Rows => {
                let slot = self.slots[random.within(0..self.slots.len())];
                let start = self.rows.shard_offset(slot, 0).unwrap();
                let at = start + random.within(0..self.rows.row_bytes());
                flip(&self.place.memory("memory"), at, random);
                Some(slot)
            }
            Part::Records => {
                // Also of places that were never used.
                let slot = random.within(0..self.rows_per_extent as usize);
                let slot = u32::try_from(slot).unwrap();
                let which = random.within(0..2);
                let at = random.within(self.records(slot)[which].clone());
                flip(&tables, at, random);
                Some(slot)
            }
            Part::Buckets => {
                let [fixed, ..] = self.rows.tables_file_ranges(&(0..0));
                flip(&tables, random.within(fixed), random);
                None
            }
            Part::Ledger => {
                let ledger = self.place.memory("ledger");
                let bytes = std::fs::metadata(&ledger).unwrap().len();
                flip(&ledger, random.within(0..bytes.try_into().unwrap()), random);
                None
            }
        }
    }
}

fn flip(path: &Path, at: usize, random: &mut Random) {
    let file = File::options().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at as u64).unwrap();
    byte[0] ^= 1 << random.within(0..8);
    file.write_all_at(&byte, at as u64).unwrap();
}

fn round(part: Part, random: &mut Random) {
    let saved = Saved::new(random.percent(50));
    let flips = [1, 3, 40, 400][random.within(0..4)];
    let touched: BTreeSet<u32> = (0..flips)
        .filter_map(|_| saved.damage(part, random))
        .collect();
    let daemon = saved.place.start();
    let mut engine = Engine::start(&saved.place.socket(), "b", SMALL);
    for (number, &slot) in (0..).zip(&saved.slots) {
        let key = chain(number / CHAIN)[(number % CHAIN) as usize];
        let loaded = engine.load(&[key]);
        assert_eq!(loaded.wrong, 0, "block {number} in slot {slot}");
        if part != Part::Ledger && !touched.contains(&slot) {
            assert_eq!(
                loaded.right, 1,
                "block {number} in slot {slot} was not touched"
            );
        }
    }
    // No place is lost for ever, and none spoils the saves that it is a part of.
    for number in 0..FILLING {
        let chain = chain(number);
        engine.save(&chain);
        assert!(engine.loads(&chain), "chain {number} was saved again");
    }
    // Nor are times that cannot be: by them a model gives up memory for another.
    let model = "another";
    let other = Engine::start(&saved.place.socket(), "c", Shape { model, ..SMALL });
    let mut other = other;
    other.save(&keys(0..4));
    assert!(other.loads(&keys(0..4)));
    drop((engine, other));
    let status = saved.place.until(|status| status.sessions.is_empty());
    for each in &status.namespaces {
        assert_eq!(each.free_rows + each.held_blocks, each.rows, "{each:#?}");
        assert_eq!(each.pinned_blocks, 0, "{each:#?}");
    }
    let (status, log) = daemon.stop();
    assert!(
        status.success() && !log.contains("panicked"),
        "{status:?}: {log}"
    );
}

/// Rounds of a part, each of which says how to have it again.
fn rounds(part: Part) {
    let rounds = std::env::var("KVTIDE_DAMAGE_ROUNDS").ok();
    let rounds: u64 = rounds.map_or(4, |text| text.parse().expect("a number"));
    let seed = Random::seed_of(SEED);
    for number in 0..rounds {
        let seed = seed.wrapping_add(number);
        println!("{SEED}={seed} KVTIDE_DAMAGE_ROUNDS=1, {part:?}");
        round(part, &mut Random::new(seed));
    }
}

#[test]
fn damaged_rows_are_refused_one_by_one() {
    rounds(Part::Rows);
}

#[test]
fn damaged_records_lose_their_own_rows_at_most() {
    rounds(Part::Records);
}

#[test]
fn a_damaged_index_is_made_anew_and_nobody_holds_what_nobody_has_pinned() {
    rounds(Part::Buckets);
}

#[test]
fn a_damaged_ledger_begins_anew() {
    rounds(Part::Ledger);
}
