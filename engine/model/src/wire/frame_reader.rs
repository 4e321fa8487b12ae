//! From a stream of bytes to whole frames.

use super::{Header, WireError};

/// A whole frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Frame<'a> {
    /// What is known of it without the payload.
    pub header: Header,
    /// The bytes behind the header.
    pub payload: &'a [u8],
}

/// Puts frames together from bytes as they arrive, in pieces of any length.
///
/// It holds at most one frame, and no more of that than has arrived: a length that is only
/// announced reserves nothing. A frame that arrives in one piece is not copied.
#[derive(Debug)]
pub struct FrameReader {
    longest: u32,
    held: Vec<u8>,
    /// Whether `held` is a frame that was given out.
    given: bool,
}

/// What is kept of the buffer for the next frame: most frames are shorter, and connections that
/// once had a longer one do not add up.
const KEPT_BYTES: usize = 256 << 10;

impl FrameReader {
    /// A reader at the begin of a stream, which takes frames whose length is at most `longest` (and
    /// at most [`LONGEST_FRAME`](super::LONGEST_FRAME)).
    #[must_use]
    pub fn new(longest: u32) -> Self {
        Self {
            longest,
            held: Vec::new(),
            given: false,
        }
    }

    /// Takes from the front of `bytes` what belongs to the current frame, and returns the frame once
    /// it is whole. `None` means that all of `bytes` was taken and more is needed; until then, there
    /// may be another frame in what is left of `bytes`.
    ///
    /// # Errors
    /// The frame's length cannot be. Where the next frame begins is not known then, so that every
    /// further call returns the same error.
    pub fn next_frame<'a, 'b: 'a>(
        &'a mut self,
        bytes: &mut &'b [u8],
    ) -> Result<Option<Frame<'a>>, WireError> {
        if self.given {
            self.given = false;
            self.held.clear();
            self.held.shrink_to(KEPT_BYTES);
        }
        if self.held.is_empty()
            && let Some((head, rest)) = bytes.split_first_chunk()
            && let Ok(header) = Header::decode(*head, self.longest)
            && let Some((payload, rest)) = rest.split_at_checked(header.payload_bytes as usize)
        {
            *bytes = rest;
            return Ok(Some(Frame { header, payload }));
        }
        self.fill(Header::BYTES, bytes);
        let Some(head) = self.held.first_chunk() else {
            return Ok(None);
        };
        let header = Header::decode(*head, self.longest)?;
        let whole = Header::BYTES + header.payload_bytes as usize;
        self.fill(whole, bytes);
        if self.held.len() < whole {
            return Ok(None);
        }
        self.given = true;
        let payload = &self.held[Header::BYTES..];
        Ok(Some(Frame { header, payload }))
    }

    /// Whether a stream that ends here ends within a frame.
    #[must_use]
    pub fn is_within_a_frame(&self) -> bool {
        !self.given && !self.held.is_empty()
    }

    /// Moves bytes over until `length` are held.
    fn fill(&mut self, length: usize, bytes: &mut &[u8]) {
        let missing = length.saturating_sub(self.held.len());
        let (now, later) = bytes.split_at(missing.min(bytes.len()));
        self.held.extend_from_slice(now);
        *bytes = later;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::{Kind, LONGEST_FRAME};
    use proptest::prelude::*;

    fn frame(tag: u32, payload: &[u8]) -> Vec<u8> {
        let header = Header {
            kind: Kind::ASK,
            tag,
            payload_bytes: u32::try_from(payload.len()).unwrap(),
        };
        [&header.encode(), payload].concat()
    }

    /// Tag and payload of every frame in pieces of a stream.
    fn frames<'a>(
        reader: &mut FrameReader,
        pieces: impl IntoIterator<Item = &'a [u8]>,
    ) -> Result<Vec<(u32, Vec<u8>)>, WireError> {
        let mut found = Vec::new();
        for mut piece in pieces {
            while let Some(frame) = reader.next_frame(&mut piece)? {
                found.push((frame.header.tag, frame.payload.to_vec()));
            }
            assert!(piece.is_empty());
        }
        Ok(found)
    }

    #[test]
    fn an_announced_length_reserves_nothing() {
        let mut reader = FrameReader::new(LONGEST_FRAME);
        let header = Header {
            kind: Kind::ASK,
            tag: 1,
            payload_bytes: LONGEST_FRAME - 8,
        };
        let mut bytes = &header.encode()[..];
        assert_eq!(reader.next_frame(&mut bytes), Ok(None));
        assert!(reader.held.capacity() < 64);
        assert!(reader.is_within_a_frame());
    }

    #[test]
    fn the_buffer_of_a_long_frame_is_not_kept() {
        let long = frame(1, &vec![0; 1 << 20]);
        let mut reader = FrameReader::new(LONGEST_FRAME);
        assert_eq!(frames(&mut reader, long.chunks(1 << 18)).unwrap().len(), 1);
        assert!(reader.held.capacity() <= KEPT_BYTES);
        assert!(!reader.is_within_a_frame());
    }

    #[test]
    fn a_frame_in_one_piece_is_not_copied() {
        let bytes = frame(1, b"hello");
        let mut reader = FrameReader::new(LONGEST_FRAME);
        let found = reader.next_frame(&mut &bytes[..]).unwrap().unwrap();
        assert_eq!(found.payload.as_ptr(), bytes[Header::BYTES..].as_ptr());
    }

    #[test]
    fn nothing_is_read_behind_a_length_that_cannot_be() {
        let long = frame(1, &[0; 100]);
        for piece_bytes in [1, 5, 200] {
            let mut reader = FrameReader::new(50);
            let error = Err(WireError::FrameTooLong {
                length: 108,
                longest: 50,
            });
            assert_eq!(frames(&mut reader, long.chunks(piece_bytes)), error);
            let good = frame(2, b"");
            assert_eq!(frames(&mut reader, [&good[..]]), error);
        }
    }

    proptest! {
        #[test]
        fn frames_in_pieces_are_those_of_the_whole(
            payloads in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..40), 0..8),
            cuts in prop::collection::vec(0usize..400, 0..10),
        ) {
            let sent: Vec<(u32, Vec<u8>)> = (1..).zip(payloads).collect();
            let stream: Vec<u8> =
                sent.iter().flat_map(|(tag, payload)| frame(*tag, payload)).collect();
            let mut cuts: Vec<usize> = cuts.into_iter().map(|cut| cut.min(stream.len())).collect();
            cuts.extend([0, stream.len()]);
            cuts.sort_unstable();
            let pieces = cuts.windows(2).map(|ends| &stream[ends[0]..ends[1]]);
            for found in [
                frames(&mut FrameReader::new(LONGEST_FRAME), [&stream[..]]),
                frames(&mut FrameReader::new(LONGEST_FRAME), stream.chunks(1)),
                frames(&mut FrameReader::new(LONGEST_FRAME), pieces),
            ] {
                prop_assert_eq!(found, Ok(sent.clone()));
            }
        }

        #[test]
        fn a_stream_that_is_torn_ends_within_a_frame(cut in 1usize..20) {
            let stream = frame(1, &[7; 8]);
            let mut reader = FrameReader::new(LONGEST_FRAME);
            let found = frames(&mut reader, [&stream[..cut]]).unwrap();
            prop_assert_eq!(reader.is_within_a_frame(), found.is_empty());
            prop_assert_eq!(found.is_empty(), cut < stream.len());
        }
    }
}
