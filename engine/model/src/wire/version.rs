//! Which version of the protocol two sides speak.

use std::fmt;

/// One end of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// A process of vLLM, or an operator's command.
    Engine,
    /// `kvtide serve`.
    Daemon,
}

impl fmt::Display for Side {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Engine => "the engine",
            Self::Daemon => "the daemon",
        })
    }
}

/// The versions that one side speaks: consecutive minor versions of one major version.
///
/// A minor version adds fields at the end of payloads, optional kinds, and values that are sent
/// only to who speaks it. Everything else is a new major version.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Versions {
    major: u16,
    lowest: u16,
    highest: u16,
}

impl Versions {
    /// What this build speaks.
    pub const OURS: Self = Self {
        major: 1,
        lowest: 0,
        highest: 0,
    };

    /// The versions `major.lowest` to `major.highest`; `None` if there are none between them.
    #[must_use]
    pub const fn new(major: u16, lowest: u16, highest: u16) -> Option<Self> {
        if lowest > highest {
            return None;
        }
        Some(Self {
            major,
            lowest,
            highest,
        })
    }

    /// The major version.
    #[must_use]
    pub const fn major(self) -> u16 {
        self.major
    }

    /// The lowest minor version.
    #[must_use]
    pub const fn lowest(self) -> u16 {
        self.lowest
    }

    /// The highest minor version.
    #[must_use]
    pub const fn highest(self) -> u16 {
        self.highest
    }

    /// The minor version that an engine and a daemon speak with each other: the highest that both
    /// know.
    ///
    /// # Errors
    /// There is none; the error says which side is too old.
    pub const fn agreed(engine: Self, daemon: Self) -> Result<u16, VersionError> {
        let older = if engine.major < daemon.major
            || (engine.major == daemon.major && engine.highest < daemon.lowest)
        {
            Side::Engine
        } else if daemon.major < engine.major || daemon.highest < engine.lowest {
            Side::Daemon
        } else if engine.highest < daemon.highest {
            return Ok(engine.highest);
        } else {
            return Ok(daemon.highest);
        };
        Err(VersionError {
            engine,
            daemon,
            older,
        })
    }
}

impl fmt::Display for Versions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.lowest)?;
        if self.lowest == self.highest {
            return Ok(());
        }
        write!(f, " to {}.{}", self.major, self.highest)
    }
}

/// Two sides have no version in common.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "the engine speaks version {engine} of the protocol and the daemon {daemon}: {older} is too \
     old, upgrade kvtide there"
)]
pub struct VersionError {
    /// What the engine speaks.
    pub engine: Versions,
    /// What the daemon speaks.
    pub daemon: Versions,
    /// The side that has to be upgraded.
    pub older: Side,
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn versions(major: u16, lowest: u16, highest: u16) -> Versions {
        Versions::new(major, lowest, highest).unwrap()
    }

    #[test]
    fn the_highest_common_minor_is_spoken() {
        for (engine, daemon, minor) in [
            ((1, 0, 0), (1, 0, 0), 0),
            ((1, 0, 1), (1, 1, 2), 1),
            ((1, 1, 2), (1, 0, 1), 1),
            ((1, 0, 9), (1, 3, 4), 4),
        ] {
            let (a, b, c) = engine;
            let (x, y, z) = daemon;
            let agreed = Versions::agreed(versions(a, b, c), versions(x, y, z));
            assert_eq!(agreed, Ok(minor), "{engine:?} {daemon:?}");
        }
    }

    #[test]
    fn the_older_side_is_named_with_what_to_do() {
        let newer = Versions::agreed(versions(1, 0, 2), versions(1, 4, 6)).unwrap_err();
        assert_eq!(
            newer.to_string(),
            "the engine speaks version 1.0 to 1.2 of the protocol and the daemon 1.4 to 1.6: the \
             engine is too old, upgrade kvtide there"
        );
        let older = Versions::agreed(versions(2, 0, 0), versions(1, 0, 9)).unwrap_err();
        assert_eq!(
            older.to_string(),
            "the engine speaks version 2.0 of the protocol and the daemon 1.0 to 1.9: the daemon \
             is too old, upgrade kvtide there"
        );
    }

    #[test]
    fn versions_from_high_to_low_are_none() {
        assert_eq!(Versions::new(1, 3, 2), None);
        assert_eq!(Versions::new(1, 3, 3).unwrap().to_string(), "1.3");
    }

    fn any_versions() -> impl Strategy<Value = Versions> {
        (1u16..4, 0u16..6, 0u16..6)
            .prop_map(|(major, lowest, more)| versions(major, lowest, lowest + more))
    }

    proptest! {
        #[test]
        fn what_is_agreed_is_spoken_by_both_and_nothing_higher_is(
            engine in any_versions(),
            daemon in any_versions(),
        ) {
            let common = |minor: &u16| {
                engine.major == daemon.major
                    && [engine, daemon].iter().all(|v| (v.lowest..=v.highest).contains(minor))
            };
            let agreed = Versions::agreed(engine, daemon);
            prop_assert_eq!(agreed.ok(), (0..20).filter(common).max());
            if let Err(error) = agreed {
                let (older, newer) = match error.older {
                    Side::Engine => (engine, daemon),
                    Side::Daemon => (daemon, engine),
                };
                prop_assert!((older.major, older.highest) < (newer.major, newer.lowest));
            }
        }
    }
}
