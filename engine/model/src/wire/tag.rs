//! What pairs an answer with its question.

use std::num::NonZeroU32;

/// The number of a question, which its answer repeats.
///
/// The engine chooses it, and the daemon takes it as it is. It is never 0, which stands in frames
/// that expect no answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Tag(NonZeroU32);

impl Tag {
    /// The tag of a connection's first question.
    pub const FIRST: Self = Self(NonZeroU32::MIN);

    /// The tag of this number; `None` for 0.
    #[must_use]
    pub fn new(number: u32) -> Option<Self> {
        NonZeroU32::new(number).map(Self)
    }

    /// Its number.
    #[must_use]
    pub const fn number(self) -> u32 {
        self.0.get()
    }

    /// The tag of the next question. After the last number comes the first: by then its answer has
    /// long arrived.
    #[must_use]
    pub const fn next(self) -> Self {
        match self.0.checked_add(1) {
            Some(number) => Self(number),
            None => Self::FIRST,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tags_go_around_without_0() {
        let last = Tag::new(u32::MAX).unwrap();
        assert_eq!(last.next(), Tag::FIRST);
        assert_eq!(Tag::FIRST.next().number(), 2);
        assert_eq!(Tag::new(0), None);
    }
}
