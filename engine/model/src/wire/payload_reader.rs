//! Reads a payload field by field. Says in every error which field it was, and where.

use super::{Frame, Kind, SessionToken, Tag, WireError};
use crate::{BlockKey, SlotRef};

/// What is left of a payload.
#[derive(Clone, Debug)]
pub(crate) struct PayloadReader<'a> {
    kind: Kind,
    tag: u32,
    all_bytes: usize,
    left: &'a [u8],
}

/// Bytes before the elements of a list.
pub(crate) const COUNT_BYTES: usize = 4;

impl<'a> PayloadReader<'a> {
    pub(crate) fn new(frame: Frame<'a>) -> Self {
        Self {
            kind: frame.header.kind,
            tag: frame.header.tag,
            all_bytes: frame.payload.len(),
            left: frame.payload,
        }
    }

    /// The tag of a frame that is a question or an answer.
    pub(crate) fn tag(&self) -> Result<Tag, WireError> {
        Tag::new(self.tag).ok_or(WireError::NoTag { kind: self.kind })
    }

    /// Everything that is left.
    pub(crate) fn rest(&mut self) -> &'a [u8] {
        std::mem::take(&mut self.left)
    }

    pub(crate) fn array<const N: usize>(
        &mut self,
        field: &'static str,
    ) -> Result<[u8; N], WireError> {
        match self.left.split_first_chunk() {
            Some((bytes, left)) => {
                self.left = left;
                Ok(*bytes)
            }
            None => Err(self.short(field, N)),
        }
    }

    pub(crate) fn u8(&mut self, field: &'static str) -> Result<u8, WireError> {
        self.array(field).map(u8::from_le_bytes)
    }

    pub(crate) fn u16(&mut self, field: &'static str) -> Result<u16, WireError> {
        self.array(field).map(u16::from_le_bytes)
    }

    pub(crate) fn u32(&mut self, field: &'static str) -> Result<u32, WireError> {
        self.array(field).map(u32::from_le_bytes)
    }

    pub(crate) fn u64(&mut self, field: &'static str) -> Result<u64, WireError> {
        self.array(field).map(u64::from_le_bytes)
    }

    pub(crate) fn flag(&mut self, field: &'static str) -> Result<bool, WireError> {
        self.checked(field, "0 or 1", Self::u8, |value| match value {
            0 => Some(false),
            1 => Some(true),
            _ => None,
        })
    }

    /// A field that not every number stands for something in.
    pub(crate) fn checked<N: Copy + Into<u64>, T>(
        &mut self,
        field: &'static str,
        expected: &'static str,
        read: impl FnOnce(&mut Self, &'static str) -> Result<N, WireError>,
        meaning: impl FnOnce(N) -> Option<T>,
    ) -> Result<T, WireError> {
        let at = self.at();
        let value = read(self, field)?;
        meaning(value).ok_or_else(|| WireError::Value {
            kind: self.kind,
            at,
            field,
            value: value.into(),
            expected,
        })
    }

    /// A token that must be one: a session always has one.
    pub(crate) fn token(&mut self, field: &'static str) -> Result<SessionToken, WireError> {
        let at = self.at();
        SessionToken::from_bytes(self.array(field)?).ok_or(WireError::Value {
            kind: self.kind,
            at,
            field,
            value: 0,
            expected: "a session's token",
        })
    }

    /// A text of at most `longest` bytes.
    pub(crate) fn text(
        &mut self,
        field: &'static str,
        longest: usize,
    ) -> Result<String, WireError> {
        let at = self.at();
        let bytes = usize::from(self.u16(field)?);
        if bytes > longest {
            return Err(WireError::TextTooLong {
                kind: self.kind,
                at,
                field,
                bytes,
                longest,
            });
        }
        let at = self.at();
        let Some((text, left)) = self.left.split_at_checked(bytes) else {
            return Err(self.short(field, bytes));
        };
        self.left = left;
        self.utf8(field, at, text).map(str::to_owned)
    }

    /// All that is left, as text.
    pub(crate) fn rest_as_text(&mut self, field: &'static str) -> Result<&'a str, WireError> {
        let at = self.at();
        let bytes = self.rest();
        self.utf8(field, at, bytes)
    }

    pub(crate) fn keys(&mut self, field: &'static str) -> Result<Vec<BlockKey>, WireError> {
        let keys = self.elements::<16>(field)?;
        Ok(keys.iter().map(|key| BlockKey::from_bytes(*key)).collect())
    }

    pub(crate) fn slots(&mut self, field: &'static str) -> Result<Vec<SlotRef>, WireError> {
        let slots = self.elements::<8>(field)?;
        Ok(slots.iter().map(|slot| slot_ref(*slot)).collect())
    }

    /// A list of elements of one length, not yet decoded.
    pub(crate) fn elements<const N: usize>(
        &mut self,
        field: &'static str,
    ) -> Result<&'a [[u8; N]], WireError> {
        let count = self.count(field, N)?;
        let (elements, _) = self.left.as_chunks();
        let (elements, _) = elements.split_at(count);
        self.left = &self.left[elements.as_flattened().len()..];
        Ok(elements)
    }

    /// A list of elements of which each has at least `least_bytes` bytes.
    pub(crate) fn list<T>(
        &mut self,
        field: &'static str,
        least_bytes: usize,
        mut read: impl FnMut(&mut Self) -> Result<T, WireError>,
    ) -> Result<Vec<T>, WireError> {
        let count = self.count(field, least_bytes)?;
        let mut list = Vec::with_capacity(count);
        for _ in 0..count {
            list.push(read(self)?);
        }
        Ok(list)
    }

    /// How many elements a list has: no more than there are bytes for, so that room can be made for
    /// them before they are read.
    fn count(&mut self, field: &'static str, least_bytes: usize) -> Result<usize, WireError> {
        let at = self.at();
        let count = self.u32(field)?;
        match usize::try_from(count) {
            Ok(elements) if elements <= self.left.len() / least_bytes => Ok(elements),
            _ => Err(WireError::Count {
                kind: self.kind,
                at,
                field,
                count,
                least_bytes,
                left: self.left.len(),
            }),
        }
    }

    fn at(&self) -> usize {
        self.all_bytes - self.left.len()
    }

    fn short(&self, field: &'static str, needed: usize) -> WireError {
        WireError::Short {
            kind: self.kind,
            at: self.at(),
            field,
            needed,
            left: self.left.len(),
        }
    }

    fn utf8<'b>(
        &self,
        field: &'static str,
        at: usize,
        bytes: &'b [u8],
    ) -> Result<&'b str, WireError> {
        std::str::from_utf8(bytes).map_err(|error| WireError::NotUtf8 {
            kind: self.kind,
            at,
            field,
            valid: error.valid_up_to(),
        })
    }
}

/// A slot as it is sent.
pub(crate) fn slot_ref(bytes: [u8; 8]) -> SlotRef {
    let [a, b, c, d, w, x, y, z] = bytes;
    SlotRef {
        slot: u32::from_le_bytes([a, b, c, d]),
        generation: u32::from_le_bytes([w, x, y, z]),
    }
}
