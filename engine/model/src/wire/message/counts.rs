//! What the daemon counts.

use std::borrow::Cow;

use super::Message;
use crate::wire::payload_reader::PayloadReader;
use crate::wire::payload_writer::PayloadWriter;
use crate::wire::{Kind, WireError};

/// Counters of the daemon, for the engine's metrics.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counts<'a> {
    /// The counters. An engine leaves out those whose names it does not know.
    pub counts: Vec<Count<'a>>,
}

/// One counter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Count<'a> {
    /// Its name.
    pub name: Cow<'a, str>,
    /// Its value since the daemon started.
    pub value: u64,
}

impl Count<'_> {
    /// Longest [`Count::name`], in bytes.
    pub const LONGEST_NAME: usize = 64;

    const LEAST_BYTES: usize = 10;
}

impl Message for Counts<'_> {
    const KIND: Kind = Kind::COUNTS;

    fn write(&self, writer: &mut PayloadWriter<'_>) -> Result<(), WireError> {
        writer.list(&self.counts, Count::LEAST_BYTES, |writer, count| {
            writer.text("name", Count::LONGEST_NAME, &count.name)?;
            writer.u64(count.value);
            Ok(())
        })
    }

    fn read(reader: &mut PayloadReader<'_>) -> Result<Self, WireError> {
        Ok(Self {
            counts: reader.list("counts", Count::LEAST_BYTES, |reader| {
                Ok(Count {
                    name: reader.text("name", Count::LONGEST_NAME)?.into(),
                    value: reader.u64("value")?,
                })
            })?,
        })
    }
}
