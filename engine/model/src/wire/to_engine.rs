//! What a daemon may send.

use super::message::{Answer, Cleared, Counts, Events, Message, Refused, SavesBegun, Welcome};
use super::{Frame, Kind, Side, WireError};

/// A message of the daemon to an engine, or to an operator.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ToEngine<'a> {
    /// The engine is taken.
    Welcome(Welcome),
    /// Where blocks go that are to be saved.
    SavesBegun(SavesBegun),
    /// No lookup finds what was to be dropped.
    Cleared(Cleared),
    /// What became of blocks.
    Events(Events<'a>),
    /// The daemon's counters.
    Counts(Counts<'a>),
    /// What an operator asked for.
    Answer(Answer<'a>),
    /// The connection ends.
    Refused(Refused),
}

impl ToEngine<'_> {
    /// Appends the message's frame to `out`, or nothing where that fails.
    ///
    /// # Errors
    /// A text is longer than its field may be, or the message than a frame.
    pub fn encode(&self, out: &mut Vec<u8>) -> Result<(), WireError> {
        match self {
            Self::Welcome(message) => message.append_to(out),
            Self::SavesBegun(message) => message.append_to(out),
            Self::Cleared(message) => message.append_to(out),
            Self::Events(message) => message.append_to(out),
            Self::Counts(message) => message.append_to(out),
            Self::Answer(message) => message.append_to(out),
            Self::Refused(message) => message.append_to(out),
        }
    }
}

impl ToEngine<'static> {
    /// Decodes a frame of a daemon; `None` if it is of an optional kind that is to be skipped.
    ///
    /// # Errors
    /// It is no message that an engine takes.
    pub fn decode(frame: Frame<'_>) -> Result<Option<Self>, WireError> {
        Ok(Some(match frame.header.kind {
            Kind::WELCOME => Self::Welcome(Welcome::from_frame(frame)?),
            Kind::SAVES_BEGUN => Self::SavesBegun(SavesBegun::from_frame(frame)?),
            Kind::CLEARED => Self::Cleared(Cleared::from_frame(frame)?),
            Kind::EVENTS => Self::Events(Events::from_frame(frame)?),
            Kind::COUNTS => Self::Counts(Counts::from_frame(frame)?),
            Kind::ANSWER => Self::Answer(Answer::from_frame(frame)?),
            Kind::REFUSED => Self::Refused(Refused::from_frame(frame)?),
            kind if kind.is_optional() => return Ok(None),
            kind => {
                let receiver = Side::Engine;
                return Err(WireError::UnknownKind { receiver, kind });
            }
        }))
    }
}
