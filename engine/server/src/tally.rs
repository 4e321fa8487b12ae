//! What the shell counts itself.

use std::sync::atomic::{AtomicU64, Ordering};

/// Why a connection is not served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turned {
    /// The allow-list does not name the peer.
    NotAllowed,
    /// What it sent is not the protocol.
    Malformed,
    /// It was silent.
    Silent,
    /// Too many operators at once.
    Full,
}

impl Turned {
    /// All reasons.
    pub const ALL: [Self; 4] = [Self::NotAllowed, Self::Malformed, Self::Silent, Self::Full];

    /// As metrics name it.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Self::NotAllowed => "not_allowed",
            Self::Malformed => "malformed",
            Self::Silent => "silent",
            Self::Full => "full",
        }
    }
}

/// Counts since the start.
#[derive(Debug, Default)]
pub struct Tally {
    connections: AtomicU64,
    turned: [AtomicU64; Turned::ALL.len()],
    asks: AtomicU64,
}

impl Tally {
    /// A connection was taken.
    pub fn connection(&self) {
        self.connections.fetch_add(1, Ordering::Relaxed);
    }

    /// A connection was turned away.
    pub fn turn(&self, why: Turned) {
        self.turned[why as usize].fetch_add(1, Ordering::Relaxed);
    }

    /// An operator asked something.
    pub fn ask(&self) {
        self.asks.fetch_add(1, Ordering::Relaxed);
    }

    /// Connections taken.
    #[must_use]
    pub fn connections(&self) -> u64 {
        self.connections.load(Ordering::Relaxed)
    }

    /// Connections turned away.
    #[must_use]
    pub fn turned(&self, why: Turned) -> u64 {
        self.turned[why as usize].load(Ordering::Relaxed)
    }

    /// Questions of operators.
    #[must_use]
    pub fn asks(&self) -> u64 {
        self.asks.load(Ordering::Relaxed)
    }
}
