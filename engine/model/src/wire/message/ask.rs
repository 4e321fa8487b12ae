//! What operators ask the daemon.

use std::borrow::Cow;

use super::Message;
use crate::wire::payload_reader::PayloadReader;
use crate::wire::payload_writer::PayloadWriter;
use crate::wire::{Kind, Tag, WireError};

/// A request of an operator. Answered by [`Answer`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ask<'a> {
    /// The question's number.
    pub tag: Tag,
    /// The request, which is the whole payload. That it is JSON is not checked here.
    pub json: Cow<'a, str>,
}

/// The answer to [`Ask`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer<'a> {
    /// The question's number.
    pub tag: Tag,
    /// The answer, which is the whole payload. That it is JSON is not checked here.
    pub json: Cow<'a, str>,
}

impl Message for Ask<'_> {
    const KIND: Kind = Kind::ASK;

    fn tag(&self) -> Option<Tag> {
        Some(self.tag)
    }

    fn write(&self, writer: &mut PayloadWriter<'_>) -> Result<(), WireError> {
        writer.rest_as_text(&self.json)
    }

    fn read(reader: &mut PayloadReader<'_>) -> Result<Self, WireError> {
        Ok(Self {
            tag: reader.tag()?,
            json: reader.rest_as_text("json")?.to_owned().into(),
        })
    }
}

impl Message for Answer<'_> {
    const KIND: Kind = Kind::ANSWER;

    fn tag(&self) -> Option<Tag> {
        Some(self.tag)
    }

    fn write(&self, writer: &mut PayloadWriter<'_>) -> Result<(), WireError> {
        writer.rest_as_text(&self.json)
    }

    fn read(reader: &mut PayloadReader<'_>) -> Result<Self, WireError> {
        Ok(Self {
            tag: reader.tag()?,
            json: reader.rest_as_text("json")?.to_owned().into(),
        })
    }
}
