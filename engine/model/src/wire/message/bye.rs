//! An engine leaves.

use super::Message;
use crate::wire::payload_reader::PayloadReader;
use crate::wire::payload_writer::PayloadWriter;
use crate::wire::{Kind, WireError};

/// Says that nothing of the sender's process reads or writes rows any more, so that the daemon
/// need not wait for the process to end.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Bye;

impl Message for Bye {
    const KIND: Kind = Kind::BYE;

    fn write(&self, _: &mut PayloadWriter<'_>) -> Result<(), WireError> {
        Ok(())
    }

    fn read(_: &mut PayloadReader<'_>) -> Result<Self, WireError> {
        Ok(Self)
    }
}
