//! What members count, and how they tell it: in a line, of which the last one counts.

use std::fmt;
use std::ops::AddAssign;

/// See the module's documentation.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Tally {
    /// How often a member was let in, and how often there was no place for it.
    pub(crate) attached: usize,
    pub(crate) full: usize,
    /// How often it attached to another daemon without having gone.
    pub(crate) again: usize,
    /// Chains that were looked up.
    pub(crate) looked: usize,
    /// Blocks.
    pub(crate) loaded: usize,
    pub(crate) saved: usize,
}

const BEGIN: &str = "tally";

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            attached,
            full,
            again,
            looked,
            loaded,
            saved,
        } = self;
        write!(
            f,
            "{BEGIN} {attached} {full} {again} {looked} {loaded} {saved}"
        )
    }
}

impl Tally {
    /// The last one in what a member has said. A line that a kill has cut off is none.
    pub(crate) fn last_of(said: &str) -> Self {
        let whole = said.rsplit_once('\n').map_or("", |(whole, _)| whole);
        let mut lines = whole.lines().rev();
        let numbers = lines.find_map(|line| {
            let mut words = line.split(' ');
            (words.next() == Some(BEGIN)).then(|| {
                words
                    .map(|word| word.parse().unwrap_or(0))
                    .collect::<Vec<_>>()
            })
        });
        match numbers.as_deref() {
            Some(&[attached, full, again, looked, loaded, saved]) => Self {
                attached,
                full,
                again,
                looked,
                loaded,
                saved,
            },
            _ => Self::default(),
        }
    }
}

impl AddAssign for Tally {
    fn add_assign(&mut self, other: Self) {
        self.attached += other.attached;
        self.full += other.full;
        self.again += other.again;
        self.looked += other.looked;
        self.loaded += other.loaded;
        self.saved += other.saved;
    }
}
