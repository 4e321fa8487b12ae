//! The daemon takes an engine.

use std::num::NonZeroU64;

use super::Message;
use crate::wire::payload_reader::PayloadReader;
use crate::wire::payload_writer::PayloadWriter;
use crate::wire::{Kind, SessionToken, WireError};

/// The answer to a [`Hello`](super::Hello) that the daemon accepts.
///
/// Three file descriptors come with its bytes, in this order: the memory, the directory of the
/// pool, and the board of the session.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Welcome {
    /// The minor version that is spoken from now on.
    pub minor: u16,
    /// Program and version of the daemon.
    pub server: String,
    /// Drawn anew whenever a daemon starts.
    pub boot: [u8; 16],
    /// Nonce of the memory: another one means other bytes.
    pub memory: NonZeroU64,
    /// Takes this session up again.
    pub token: SessionToken,
    /// The session's number: the engine's bitmap among the holders of slots.
    pub session: u8,
    /// Whether this is the session that the engine's token named; otherwise it is a new one.
    pub resumed: bool,
    /// Bytes of one extent.
    pub extent_bytes: u64,
    /// Extents in the memory, one behind the other.
    pub extents: u32,
    /// Where the first extent begins in the memory.
    pub data_offset: u64,
    /// Rows in an extent.
    pub rows_per_extent: u32,
    /// Buckets of the pool's directory.
    pub buckets: u32,
    /// Keys that one frame may have.
    pub max_keys: u32,
}

impl Welcome {
    /// Longest [`Welcome::server`], in bytes.
    pub const LONGEST_SERVER: usize = 64;
    /// Sessions that a daemon may have at once: the bitmaps of holders.
    pub const MAX_SESSIONS: u8 = 64;
}

impl Message for Welcome {
    const KIND: Kind = Kind::WELCOME;

    fn write(&self, writer: &mut PayloadWriter<'_>) -> Result<(), WireError> {
        writer.u16(self.minor);
        writer.text("server", Self::LONGEST_SERVER, &self.server)?;
        writer.bytes(&self.boot);
        writer.u64(self.memory.get());
        writer.bytes(self.token.as_bytes());
        writer.u8(self.session);
        writer.flag(self.resumed);
        writer.u64(self.extent_bytes);
        writer.u32(self.extents);
        writer.u64(self.data_offset);
        writer.u32(self.rows_per_extent);
        writer.u32(self.buckets);
        writer.u32(self.max_keys);
        Ok(())
    }

    fn read(reader: &mut PayloadReader<'_>) -> Result<Self, WireError> {
        Ok(Self {
            minor: reader.u16("minor")?,
            server: reader.text("server", Self::LONGEST_SERVER)?,
            boot: reader.array("boot")?,
            memory: reader.checked("memory", "above 0", PayloadReader::u64, NonZeroU64::new)?,
            token: reader.token("token")?,
            session: reader.checked("session", "below 64", PayloadReader::u8, |session| {
                (session < Self::MAX_SESSIONS).then_some(session)
            })?,
            resumed: reader.flag("resumed")?,
            extent_bytes: reader.u64("extent_bytes")?,
            extents: reader.u32("extents")?,
            data_offset: reader.u64("data_offset")?,
            rows_per_extent: reader.u32("rows_per_extent")?,
            buckets: reader.u32("buckets")?,
            max_keys: reader.u32("max_keys")?,
        })
    }
}
