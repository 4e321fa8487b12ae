//! Where the bytes of a block are that the index knows.

/// See the module's documentation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Location {
    /// In the block's row of host memory.
    Memory,
    /// On their way there.
    Arriving(Arriving),
    /// Nowhere: they never came, or are gone.
    Lost,
}

/// What is still to come into host memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Arriving {
    /// From where.
    pub source: Source,
    /// How many bytes, as far as is known: whole rows count.
    pub bytes: u64,
}

/// Who fills rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Source {
    /// An engine, which has computed the block or is about to.
    Engine,
}

impl Location {
    pub(crate) fn is_memory(self) -> bool {
        self == Self::Memory
    }

    pub(crate) fn is_arriving(self) -> bool {
        matches!(self, Self::Arriving(_))
    }
}
