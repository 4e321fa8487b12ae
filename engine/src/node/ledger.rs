//! What a node writes down so that its next life finds its memory again: which extents belong to
//! which model, and which engines there were.
//!
//! It is a small file beside the memory, replaced whole before what it says is acted upon. Its first line
//! is the digest of the rest: a torn or foreign one is no ledger, and the memory begins anew.

use std::fs;
use std::io;
use std::path::Path;

use kvtide_model::NamespaceId;
use kvtide_model::wire::Geometry;
use serde::{Deserialize, Serialize};

/// Of the ledger, the tables and the rows. Another number is another life without anything in common.
pub(super) const FORMAT: u32 = 3;

/// Why there is no ledger.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Unread {
    Missing,
    /// Not what a daemon has written.
    Damaged,
    /// What a daemon of another version has written.
    Format(u32),
}

/// What every version writes.
#[derive(Deserialize)]
struct AnyFormat {
    format: u32,
}

/// See the module's documentation.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Ledger {
    format: u32,
    /// Which memory it is; drawn when it is made.
    pub(super) nonce: u64,
    /// How many daemons have had it.
    pub(super) life: u64,
    pub(super) extent_bytes: usize,
    pub(super) extents: u32,
    pub(super) pools: Vec<PoolEntry>,
    pub(super) engines: Vec<EngineEntry>,
}

/// The pool of one model, for one tenant.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct PoolEntry {
    /// What the tenant has of the engines' namespace.
    pub(super) namespace: [u8; 16],
    pub(super) model: String,
    pub(super) tenant: String,
    pub(super) group: u16,
    pub(super) ranks: u32,
    pub(super) layers: u32,
    pub(super) layer_bytes: u64,
    pub(super) block_tokens: u32,
    /// Extents that are its own.
    pub(super) extents: Vec<u32>,
    /// Until when an operator keeps it from eviction, in seconds of Unix time.
    pub(super) pinned_until_unix_s: u64,
}

/// One engine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct EngineEntry {
    /// The number of its bit.
    pub(super) number: u8,
    pub(super) token: [u8; 16],
    pub(super) engine_id: String,
    pub(super) client: String,
    pub(super) tenant: String,
    pub(super) namespace: [u8; 16],
    pub(super) events: bool,
    pub(super) since_unix_s: u64,
}

impl PoolEntry {
    pub(super) fn namespace(&self) -> NamespaceId {
        NamespaceId::from_bytes(self.namespace)
    }

    pub(super) fn geometry(&self) -> Geometry {
        Geometry {
            ranks: self.ranks,
            layers: self.layers,
            layer_bytes: self.layer_bytes,
            block_tokens: self.block_tokens,
        }
    }
}

impl Ledger {
    /// Of memory that was just made.
    pub(super) fn new(nonce: u64, extent_bytes: usize, extents: u32) -> Self {
        Self {
            format: FORMAT,
            nonce,
            life: 0,
            extent_bytes,
            extents,
            pools: Vec::new(),
            engines: Vec::new(),
        }
    }

    /// What an earlier life wrote at `path`.
    pub(super) fn read(path: &Path) -> Result<Self, Unread> {
        let text = fs::read_to_string(path).map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => Unread::Missing,
            _ => Unread::Damaged,
        })?;
        let (digest, body) = text.split_once('\n').ok_or(Unread::Damaged)?;
        if digest != digest_of(body) {
            return Err(Unread::Damaged);
        }
        let any: AnyFormat = serde_json::from_str(body).map_err(|_| Unread::Damaged)?;
        if any.format != FORMAT {
            return Err(Unread::Format(any.format));
        }
        let ledger: Self = serde_json::from_str(body).map_err(|_| Unread::Damaged)?;
        let mut taken = vec![false; ledger.extents as usize];
        let mut extents = ledger.pools.iter().flat_map(|pool| &pool.extents);
        // An extent that two models have would be two things at once.
        let distinct = extents.all(|&extent| {
            let place = taken.get_mut(extent as usize);
            place.is_some_and(|taken| !std::mem::replace(taken, true))
        });
        if distinct {
            Ok(ledger)
        } else {
            Err(Unread::Damaged)
        }
    }

    /// Replaces what is at `path`.
    ///
    /// # Errors
    /// When the operating system refuses.
    pub(super) fn write(&self, path: &Path) -> io::Result<()> {
        let body = serde_json::to_string(self)?;
        let new = path.with_extension("new");
        fs::write(&new, format!("{}\n{body}", digest_of(&body)))?;
        fs::rename(&new, path)
    }
}

fn digest_of(body: &str) -> String {
    blake3::hash(body.as_bytes()).to_hex().to_string()
}

#[cfg(test)]
#[cfg(not(loom))]
mod tests {
    use super::*;

    fn ledger() -> Ledger {
        let mut ledger = Ledger::new(7, 1 << 20, 4);
        ledger.pools.push(PoolEntry {
            namespace: [1; 16],
            model: "m".into(),
            tenant: "t".into(),
            group: 0,
            ranks: 1,
            layers: 2,
            layer_bytes: 4096,
            block_tokens: 16,
            extents: vec![2, 0],
            pinned_until_unix_s: 9,
        });
        ledger
    }

    #[test]
    fn what_was_written_is_read() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("ledger");
        assert_eq!(Ledger::read(&path), Err(Unread::Missing));
        ledger().write(&path).unwrap();
        assert_eq!(Ledger::read(&path), Ok(ledger()));
    }

    #[test]
    fn the_ledger_of_another_version_is_told_from_a_damaged_one() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("ledger");
        let other = r#"{"format":1,"what":"it had"}"#;
        fs::write(&path, format!("{}\n{other}", digest_of(other))).unwrap();
        assert_eq!(Ledger::read(&path), Err(Unread::Format(1)));
    }

    #[test]
    fn a_ledger_with_a_changed_byte_or_one_extent_twice_is_none() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("ledger");
        ledger().write(&path).unwrap();
        let good = fs::read(&path).unwrap();
        for at in 0..good.len() {
            let mut bad = good.clone();
            bad[at] ^= 1;
            fs::write(&path, &bad).unwrap();
            assert_eq!(Ledger::read(&path), Err(Unread::Damaged), "byte {at}");
        }
        let mut twice = ledger();
        twice.pools[0].extents.push(2);
        twice.write(&path).unwrap();
        assert_eq!(Ledger::read(&path), Err(Unread::Damaged));
    }
}
