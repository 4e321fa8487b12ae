//! What a frame is for.

use std::fmt;

/// The number that says what a frame's payload is.
///
/// A number and not an enum: a frame may come from a newer peer, and one of an optional kind is
/// skipped unread.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Kind(u16);

impl Kind {
    /// First frame of an engine: who it is and what it wants.
    pub const HELLO: Self = Self(0x0001);
    /// Chains whose blocks are to be saved.
    pub const BEGIN_SAVES: Self = Self(0x0002);
    /// Slots that were loaded.
    pub const USED: Self = Self(0x0003);
    /// A chain that nothing follows for now.
    pub const SETTLE: Self = Self(0x0004);
    /// Slots whose bytes did not have their checksum.
    pub const DAMAGED: Self = Self(0x0005);
    /// Every block of the namespace is to be dropped.
    pub const CLEAR: Self = Self(0x0006);
    /// The engine reads and writes no rows any more.
    pub const BYE: Self = Self(0x0007);
    /// A request of an operator.
    pub const ASK: Self = Self(0x0010);
    /// The daemon takes the engine: its session and where its memory is.
    pub const WELCOME: Self = Self(0x0081);
    /// Where the blocks of [`Kind::BEGIN_SAVES`] go.
    pub const SAVES_BEGUN: Self = Self(0x0082);
    /// [`Kind::CLEAR`] is done.
    pub const CLEARED: Self = Self(0x0086);
    /// What became of blocks of the namespace.
    pub const EVENTS: Self = Self(0x0090);
    /// The daemon's counters.
    pub const COUNTS: Self = Self(0x0091);
    /// The answer to [`Kind::ASK`].
    pub const ANSWER: Self = Self(0x0092);
    /// The daemon ends the connection, and says why.
    pub const REFUSED: Self = Self(0x00ff);

    /// The kinds of this version, each with its name.
    pub const ALL: [(Self, &'static str); 15] = [
        (Self::HELLO, "Hello"),
        (Self::BEGIN_SAVES, "BeginSaves"),
        (Self::USED, "Used"),
        (Self::SETTLE, "Settle"),
        (Self::DAMAGED, "Damaged"),
        (Self::CLEAR, "Clear"),
        (Self::BYE, "Bye"),
        (Self::ASK, "Ask"),
        (Self::WELCOME, "Welcome"),
        (Self::SAVES_BEGUN, "SavesBegun"),
        (Self::CLEARED, "Cleared"),
        (Self::EVENTS, "Events"),
        (Self::COUNTS, "Counts"),
        (Self::ANSWER, "Answer"),
        (Self::REFUSED, "Refused"),
    ];

    const OPTIONAL: u16 = 0x4000;

    /// The kind of this number, which need not be one that we know.
    #[must_use]
    pub const fn from_number(number: u16) -> Self {
        Self(number)
    }

    /// Its number.
    #[must_use]
    pub const fn number(self) -> u16 {
        self.0
    }

    /// Its name, if this version knows it.
    #[must_use]
    pub fn name(self) -> Option<&'static str> {
        let mut all = Self::ALL.iter();
        all.find(|(kind, _)| *kind == self).map(|(_, name)| *name)
    }

    /// Whether a reader that does not know it skips the frame. Any other unknown kind ends the
    /// connection.
    #[must_use]
    pub const fn is_optional(self) -> bool {
        self.0 & Self::OPTIONAL != 0
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.name() {
            Some(name) => f.write_str(name),
            None => write!(f, "kind 0x{:04x}", self.0),
        }
    }
}

impl fmt::Debug for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Kind({self})")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_and_names_are_given_once() {
        for (i, (kind, name)) in Kind::ALL.iter().enumerate() {
            assert!(!kind.is_optional(), "{kind}: a known kind is never skipped");
            for (other, other_name) in &Kind::ALL[i + 1..] {
                assert!(kind != other && name != other_name, "{kind} {other}");
            }
        }
    }

    #[test]
    fn an_unknown_kind_is_shown_by_its_number() {
        assert_eq!(Kind::from_number(0x4123).to_string(), "kind 0x4123");
        assert!(Kind::from_number(0x4123).is_optional());
        assert!(!Kind::from_number(0x0123).is_optional());
    }
}
