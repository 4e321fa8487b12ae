//! Where each request lies in the input file, and the order in which to send them.

use crate::input::prefix::Prefix;

/// One request. At most 64 bytes, so that the largest batch is indexed in some 2 MB.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Where the line begins in the file.
    pub offset: u64,
    /// Its length, without the line feed.
    pub bytes: u32,
    /// Its number, from 1; blank lines count.
    pub line: u32,
    /// Its model: a position in [`Index::models`].
    pub model: u16,
    /// What its prompt begins with.
    pub(super) prefix: Prefix,
}

const _: () = assert!(
    size_of::<Entry>() <= 64,
    "an index of at most 64 bytes a line"
);

/// The requests of a valid input file.
#[derive(Clone, Debug, Default)]
pub struct Index {
    /// The models named, in the order of their first lines. A request that names none has "".
    pub models: Vec<String>,
    /// The requests, in the file's order.
    pub entries: Vec<Entry>,
}

impl Index {
    /// The model, where all requests name one.
    #[must_use]
    pub fn only_model(&self) -> Option<&str> {
        match self.models.as_slice() {
            [model] if !model.is_empty() => Some(model),
            _ => None,
        }
    }

    /// The requests of each model, those with a common beginning of the prompt next to each other:
    /// whichever cache of prefixes lies behind the upstream then finds the prefix still there.
    #[must_use]
    pub fn by_model_and_prefix(mut self) -> Vec<(String, Vec<Entry>)> {
        self.entries
            .sort_unstable_by_key(|entry| (entry.model, entry.prefix, entry.line));
        let mut groups: Vec<(String, Vec<Entry>)> = self
            .models
            .into_iter()
            .map(|model| (model, Vec::new()))
            .collect();
        for entry in self.entries {
            groups[usize::from(entry.model)].1.push(entry);
        }
        groups
    }
}
