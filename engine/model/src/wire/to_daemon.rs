//! What an engine may send.

use super::message::{Ask, BeginSaves, Bye, Clear, Damaged, Hello, Message, Settle, Used};
use super::{Frame, Kind, Side, WireError};

/// A message of an engine, or of an operator, to the daemon.
///
/// Lists are borrowed where a message is made to be sent; a decoded one owns everything.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ToDaemon<'a> {
    /// Who this is; the first message of a connection and no later one.
    Hello(Hello),
    /// Blocks that want a place.
    BeginSaves(BeginSaves<'a>),
    /// Blocks that were loaded.
    Used(Used<'a>),
    /// A chain that nothing follows for now.
    Settle(Settle<'a>),
    /// Rows that are not what was saved.
    Damaged(Damaged<'a>),
    /// Drop every block of the namespace.
    Clear(Clear),
    /// The engine touches no row any more.
    Bye(Bye),
    /// A request of an operator.
    Ask(Ask<'a>),
}

impl ToDaemon<'_> {
    /// Appends the message's frame to `out`, or nothing where that fails.
    ///
    /// # Errors
    /// A text is longer than its field may be, or the message than a frame.
    pub fn encode(&self, out: &mut Vec<u8>) -> Result<(), WireError> {
        match self {
            Self::Hello(message) => message.append_to(out),
            Self::BeginSaves(message) => message.append_to(out),
            Self::Used(message) => message.append_to(out),
            Self::Settle(message) => message.append_to(out),
            Self::Damaged(message) => message.append_to(out),
            Self::Clear(message) => message.append_to(out),
            Self::Bye(message) => message.append_to(out),
            Self::Ask(message) => message.append_to(out),
        }
    }
}

impl ToDaemon<'static> {
    /// Decodes a frame of an engine; `None` if it is of an optional kind that is to be skipped.
    ///
    /// # Errors
    /// It is no message that a daemon takes, or an engine of another version: see
    /// [`WireError::code`].
    pub fn decode(frame: Frame<'_>) -> Result<Option<Self>, WireError> {
        Ok(Some(match frame.header.kind {
            Kind::HELLO => Self::Hello(Hello::from_frame(frame)?),
            Kind::BEGIN_SAVES => Self::BeginSaves(BeginSaves::from_frame(frame)?),
            Kind::USED => Self::Used(Used::from_frame(frame)?),
            Kind::SETTLE => Self::Settle(Settle::from_frame(frame)?),
            Kind::DAMAGED => Self::Damaged(Damaged::from_frame(frame)?),
            Kind::CLEAR => Self::Clear(Clear::from_frame(frame)?),
            Kind::BYE => Self::Bye(Bye::from_frame(frame)?),
            Kind::ASK => Self::Ask(Ask::from_frame(frame)?),
            kind if kind.is_optional() => return Ok(None),
            kind => {
                let receiver = Side::Daemon;
                return Err(WireError::UnknownKind { receiver, kind });
            }
        }))
    }
}
