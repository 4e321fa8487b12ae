//! Ways from messages to bytes, and from bytes to frames.

use kvtide_model::wire::{Frame, FrameReader, Header, LONGEST_FRAME, WireError};

/// What an encoder writes.
pub(crate) fn encoded(encode: impl FnOnce(&mut Vec<u8>) -> Result<(), WireError>) -> Vec<u8> {
    let mut bytes = Vec::new();
    encode(&mut bytes).expect("a message that fits");
    bytes
}

/// The frame that is all of `bytes`.
pub(crate) fn frame_of(bytes: &[u8]) -> Frame<'_> {
    let (head, payload) = bytes.split_first_chunk().expect("a header");
    let header = Header::decode(*head, LONGEST_FRAME).expect("a frame");
    assert_eq!(header.payload_bytes as usize, payload.len());
    Frame { header, payload }
}

/// The frame with another payload.
pub(crate) fn with_payload<'a>(frame: Frame<'_>, payload: &'a [u8]) -> Frame<'a> {
    let payload_bytes = u32::try_from(payload.len()).expect("a short payload");
    let header = Header {
        payload_bytes,
        ..frame.header
    };
    Frame { header, payload }
}

/// What becomes of the frames of a stream that arrives in pieces.
pub(crate) fn frames_of<T>(
    stream: &[u8],
    piece_bytes: usize,
    mut take: impl FnMut(Frame<'_>) -> T,
) -> Result<Vec<T>, WireError> {
    let mut reader = FrameReader::new(LONGEST_FRAME);
    let mut taken = Vec::new();
    for mut piece in stream.chunks(piece_bytes) {
        while let Some(frame) = reader.next_frame(&mut piece)? {
            taken.push(take(frame));
        }
    }
    Ok(taken)
}
