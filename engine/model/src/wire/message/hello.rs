//! An engine presents itself.

use std::num::NonZeroU64;

use super::Message;
use crate::NamespaceId;
use crate::wire::payload_reader::PayloadReader;
use crate::wire::payload_writer::PayloadWriter;
use crate::wire::{Kind, MAGIC, SessionToken, Versions, WireError};

/// The first frame of every connection: who connects, and for which blocks.
///
/// In every version of the protocol it begins with the magic and the versions, so that each side
/// can tell the other what to upgrade.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hello {
    /// What the sender speaks.
    pub versions: Versions,
    /// What the sender is.
    pub role: Role,
    /// Tells engines of one node apart.
    pub engine_id: String,
    /// Program and version of the sender, such as `kvtide 0.1.0`.
    pub client: String,
    /// The session that is to be taken up again; `None` asks for a new one.
    pub token: Option<SessionToken>,
    /// Nonce of the memory that the sender has mapped.
    pub memory: Option<NonZeroU64>,
    /// Whose blocks are saved, looked up and cleared.
    pub namespace: NamespaceId,
    /// The model's name, for people.
    pub model: String,
    /// Whose quota the blocks count towards.
    pub tenant: String,
    /// What a block is.
    pub geometry: Geometry,
    /// Which of the model's groups of layers the blocks belong to.
    pub group: u16,
    /// Whether the sender wants [`Events`](super::Events).
    pub events: bool,
}

/// What connects.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// The process of vLLM's scheduler.
    Scheduler,
    /// A process that copies.
    Worker {
        /// Its rank.
        rank: u32,
    },
    /// A command that asks for a report or a change, and has no blocks.
    Operator,
}

/// How the bytes of a block are divided.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Geometry {
    /// Ranks over which a block is sharded.
    pub ranks: u32,
    /// Layers of the model.
    pub layers: u32,
    /// Bytes of one layer of a block on one rank.
    pub layer_bytes: u64,
    /// Tokens in a block.
    pub block_tokens: u32,
}

impl Hello {
    /// Longest [`Hello::engine_id`], in bytes.
    pub const LONGEST_ENGINE_ID: usize = 256;
    /// Longest [`Hello::client`], in bytes.
    pub const LONGEST_CLIENT: usize = 64;
    /// Longest [`Hello::model`], in bytes.
    pub const LONGEST_MODEL: usize = 512;
    /// Longest [`Hello::tenant`], in bytes.
    pub const LONGEST_TENANT: usize = 256;
}

impl Role {
    const fn code(self) -> (u8, u32) {
        match self {
            Self::Scheduler => (0, 0),
            Self::Worker { rank } => (1, rank),
            Self::Operator => (2, 0),
        }
    }

    fn read(reader: &mut PayloadReader<'_>) -> Result<Self, WireError> {
        let expected = "0 (scheduler), 1 (worker) or 2 (operator)";
        let role = reader.checked("role", expected, PayloadReader::u8, |code| match code {
            0 => Some(Self::Scheduler),
            1 => Some(Self::Worker { rank: 0 }),
            2 => Some(Self::Operator),
            _ => None,
        })?;
        // Sent by all, so that what follows lies at one place.
        let rank = reader.u32("rank")?;
        Ok(match role {
            Self::Worker { .. } => Self::Worker { rank },
            other => other,
        })
    }
}

fn read_versions(reader: &mut PayloadReader<'_>) -> Result<Versions, WireError> {
    let magic = reader.array("magic")?;
    if magic != MAGIC {
        return Err(WireError::Magic { found: magic });
    }
    let major = reader.u16("major")?;
    let lowest = reader.u16("minor_lowest")?;
    let expected = "minor_lowest or above";
    reader.checked("minor_highest", expected, PayloadReader::u16, |highest| {
        Versions::new(major, lowest, highest)
    })
}

impl Message for Hello {
    const KIND: Kind = Kind::HELLO;

    fn write(&self, writer: &mut PayloadWriter<'_>) -> Result<(), WireError> {
        writer.bytes(&MAGIC);
        writer.u16(self.versions.major());
        writer.u16(self.versions.lowest());
        writer.u16(self.versions.highest());
        let (role, rank) = self.role.code();
        writer.u8(role);
        writer.u32(rank);
        writer.text("engine_id", Self::LONGEST_ENGINE_ID, &self.engine_id)?;
        writer.text("client", Self::LONGEST_CLIENT, &self.client)?;
        writer.bytes(&self.token.map_or([0; 16], |token| *token.as_bytes()));
        writer.u64(self.memory.map_or(0, NonZeroU64::get));
        writer.bytes(self.namespace.as_bytes());
        writer.text("model", Self::LONGEST_MODEL, &self.model)?;
        writer.text("tenant", Self::LONGEST_TENANT, &self.tenant)?;
        writer.u32(self.geometry.ranks);
        writer.u32(self.geometry.layers);
        writer.u64(self.geometry.layer_bytes);
        writer.u32(self.geometry.block_tokens);
        writer.u16(self.group);
        writer.flag(self.events);
        Ok(())
    }

    fn read(reader: &mut PayloadReader<'_>) -> Result<Self, WireError> {
        let versions = read_versions(reader)?;
        // What follows may be something else in a version that we do not speak.
        Versions::agreed(versions, Versions::OURS)?;
        Ok(Self {
            versions,
            role: Role::read(reader)?,
            engine_id: reader.text("engine_id", Self::LONGEST_ENGINE_ID)?,
            client: reader.text("client", Self::LONGEST_CLIENT)?,
            token: SessionToken::from_bytes(reader.array("token")?),
            memory: NonZeroU64::new(reader.u64("memory")?),
            namespace: NamespaceId::from_bytes(reader.array("namespace")?),
            model: reader.text("model", Self::LONGEST_MODEL)?,
            tenant: reader.text("tenant", Self::LONGEST_TENANT)?,
            geometry: Geometry {
                ranks: reader.u32("ranks")?,
                layers: reader.u32("layers")?,
                layer_bytes: reader.u64("layer_bytes")?,
                block_tokens: reader.u32("block_tokens")?,
            },
            group: reader.u16("group")?,
            events: reader.flag("events")?,
        })
    }
}
