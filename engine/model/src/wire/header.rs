//! The twelve bytes before a payload.

use super::{Kind, LONGEST_FRAME, WireError};

/// What is known of a frame before its payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// What the payload is.
    pub kind: Kind,
    /// Number of the question that this is or answers; 0 where there is no answer.
    pub tag: u32,
    /// Bytes of the payload.
    pub payload_bytes: u32,
}

impl Header {
    /// Bytes of an encoded header.
    pub const BYTES: usize = 12;

    /// Bytes of the header that the frame's length counts: all but the length itself.
    pub(crate) const COUNTED_BYTES: u32 = 8;

    /// Encodes it: length, kind, flags, tag. The payload has at most as many bytes as a frame may
    /// have behind its header.
    #[must_use]
    pub fn encode(self) -> [u8; Self::BYTES] {
        let length = self.payload_bytes.saturating_add(Self::COUNTED_BYTES);
        let [l0, l1, l2, l3] = length.to_le_bytes();
        let [k0, k1] = self.kind.number().to_le_bytes();
        let [t0, t1, t2, t3] = self.tag.to_le_bytes();
        [l0, l1, l2, l3, k0, k1, 0, 0, t0, t1, t2, t3]
    }

    /// Decodes what [`Header::encode`] wrote. The flags are for later versions, and not looked at.
    ///
    /// # Errors
    /// The length is less than a header's, or above `longest` or [`LONGEST_FRAME`].
    pub fn decode(bytes: [u8; Self::BYTES], longest: u32) -> Result<Self, WireError> {
        let [l0, l1, l2, l3, k0, k1, _, _, t0, t1, t2, t3] = bytes;
        let length = u32::from_le_bytes([l0, l1, l2, l3]);
        let longest = longest.min(LONGEST_FRAME);
        if length > longest {
            return Err(WireError::FrameTooLong { length, longest });
        }
        let Some(payload_bytes) = length.checked_sub(Self::COUNTED_BYTES) else {
            return Err(WireError::FrameTooShort { length });
        };
        Ok(Self {
            kind: Kind::from_number(u16::from_le_bytes([k0, k1])),
            tag: u32::from_le_bytes([t0, t1, t2, t3]),
            payload_bytes,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn with_length(length: u32) -> [u8; Header::BYTES] {
        let mut bytes = [0; Header::BYTES];
        bytes[..4].copy_from_slice(&length.to_le_bytes());
        bytes
    }

    #[test]
    fn lengths_from_a_header_to_the_longest_frame_are_taken() {
        for (length, payload_bytes) in [(8, 0), (9, 1), (LONGEST_FRAME, LONGEST_FRAME - 8)] {
            let header = Header::decode(with_length(length), LONGEST_FRAME).unwrap();
            assert_eq!(header.payload_bytes, payload_bytes);
        }
        for length in [0, 7] {
            let error = WireError::FrameTooShort { length };
            assert_eq!(Header::decode(with_length(length), u32::MAX), Err(error));
        }
        for (length, allowed, longest) in [
            (LONGEST_FRAME + 1, u32::MAX, LONGEST_FRAME),
            (u32::MAX, LONGEST_FRAME, LONGEST_FRAME),
            (101, 100, 100),
        ] {
            let error = WireError::FrameTooLong { length, longest };
            assert_eq!(Header::decode(with_length(length), allowed), Err(error));
        }
    }

    proptest! {
        #[test]
        fn a_header_survives_encoding_whatever_the_flags(
            kind: u16,
            tag: u32,
            payload_bytes in 0..=LONGEST_FRAME - Header::COUNTED_BYTES,
            flags: [u8; 2],
        ) {
            let header = Header { kind: Kind::from_number(kind), tag, payload_bytes };
            let mut bytes = header.encode();
            bytes[6..8].copy_from_slice(&flags);
            prop_assert_eq!(Header::decode(bytes, LONGEST_FRAME), Ok(header));
        }
    }
}
