//! Writes a frame: its header, and its payload field by field.

use super::{Header, Kind, LONGEST_FRAME, Tag, WireError};
use crate::{BlockKey, SlotRef};

/// A frame at the end of a buffer that is being written.
#[derive(Debug)]
pub(crate) struct PayloadWriter<'a> {
    kind: Kind,
    out: &'a mut Vec<u8>,
    /// Where the payload begins in `out`.
    start: usize,
}

/// Appends a frame whose payload `write` writes. Where that fails, nothing is appended.
pub(crate) fn append_frame(
    out: &mut Vec<u8>,
    kind: Kind,
    tag: Option<Tag>,
    write: impl FnOnce(&mut PayloadWriter<'_>) -> Result<(), WireError>,
) -> Result<(), WireError> {
    let before = out.len();
    out.extend_from_slice(&[0; Header::BYTES]);
    let start = out.len();
    let mut writer = PayloadWriter { kind, out, start };
    let written = write(&mut writer).and_then(|()| writer.room(0));
    match written {
        Ok(payload_bytes) => {
            let header = Header {
                kind,
                tag: tag.map_or(0, Tag::number),
                payload_bytes,
            };
            out[before..start].copy_from_slice(&header.encode());
            Ok(())
        }
        Err(error) => {
            out.truncate(before);
            Err(error)
        }
    }
}

impl PayloadWriter<'_> {
    pub(crate) fn bytes(&mut self, bytes: &[u8]) {
        self.out.extend_from_slice(bytes);
    }

    pub(crate) fn u8(&mut self, value: u8) {
        self.out.push(value);
    }

    pub(crate) fn u16(&mut self, value: u16) {
        self.bytes(&value.to_le_bytes());
    }

    pub(crate) fn u32(&mut self, value: u32) {
        self.bytes(&value.to_le_bytes());
    }

    pub(crate) fn u64(&mut self, value: u64) {
        self.bytes(&value.to_le_bytes());
    }

    pub(crate) fn flag(&mut self, value: bool) {
        self.u8(u8::from(value));
    }

    /// A text of at most `longest` bytes.
    pub(crate) fn text(
        &mut self,
        field: &'static str,
        longest: usize,
        text: &str,
    ) -> Result<(), WireError> {
        let too_long = || WireError::TextTooLong {
            kind: self.kind,
            at: self.out.len() - self.start,
            field,
            bytes: text.len(),
            longest,
        };
        if text.len() > longest {
            return Err(too_long());
        }
        self.u16(u16::try_from(text.len()).map_err(|_| too_long())?);
        self.bytes(text.as_bytes());
        Ok(())
    }

    /// A text without its length: it fills what is left of the frame.
    pub(crate) fn rest_as_text(&mut self, text: &str) -> Result<(), WireError> {
        self.room(text.len())?;
        self.bytes(text.as_bytes());
        Ok(())
    }

    pub(crate) fn keys(&mut self, keys: &[BlockKey]) -> Result<(), WireError> {
        self.elements(keys, |key| *key.as_bytes())
    }

    pub(crate) fn slots(&mut self, slots: &[SlotRef]) -> Result<(), WireError> {
        self.elements(slots, |slot| slot_bytes(*slot))
    }

    /// A list of elements of one length. Room is made for all of them at once.
    pub(crate) fn elements<T, const N: usize>(
        &mut self,
        elements: &[T],
        encode: impl Fn(&T) -> [u8; N],
    ) -> Result<(), WireError> {
        self.count(elements.len(), N)?;
        let start = self.out.len();
        self.out.resize(start + elements.len() * N, 0);
        let (places, _) = self.out[start..].as_chunks_mut();
        for (place, element) in places.iter_mut().zip(elements) {
            *place = encode(element);
        }
        Ok(())
    }

    /// A list whose elements `write` writes, each of at least `least_bytes` bytes.
    pub(crate) fn list<T>(
        &mut self,
        elements: &[T],
        least_bytes: usize,
        mut write: impl FnMut(&mut Self, &T) -> Result<(), WireError>,
    ) -> Result<(), WireError> {
        self.count(elements.len(), least_bytes)?;
        elements.iter().try_for_each(|element| write(self, element))
    }

    fn count(&mut self, count: usize, least_bytes: usize) -> Result<(), WireError> {
        self.room(count.saturating_mul(least_bytes))?;
        let too_long = WireError::MessageTooLong { kind: self.kind };
        self.u32(u32::try_from(count).map_err(|_| too_long)?);
        Ok(())
    }

    /// The payload's bytes with `more`, if a frame has room for them.
    fn room(&self, more: usize) -> Result<u32, WireError> {
        let bytes = (self.out.len() - self.start).saturating_add(more);
        match u32::try_from(bytes) {
            Ok(bytes) if bytes <= LONGEST_FRAME - Header::COUNTED_BYTES => Ok(bytes),
            _ => Err(WireError::MessageTooLong { kind: self.kind }),
        }
    }
}

/// A slot as it is sent.
pub(crate) fn slot_bytes(slot: SlotRef) -> [u8; 8] {
    let [a, b, c, d] = slot.slot.to_le_bytes();
    let [w, x, y, z] = slot.generation.to_le_bytes();
    [a, b, c, d, w, x, y, z]
}
