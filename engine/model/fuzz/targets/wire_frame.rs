//! One frame, whose length is always right: what its payload is decoded to.
#![no_main]

#[path = "../../tests/wire/counting_allocator.rs"]
mod counting_allocator;

use counting_allocator::allocated_by;
use kvtide_model::wire::{Frame, Header, Kind, LONGEST_FRAME, ToDaemon, ToEngine};
use libfuzzer_sys::fuzz_target;

/// Bytes allocated for each of the payload, at most; `tests/wire/memory.rs` says why.
const DECODED: usize = 7;

/// The frame of which these bytes are the encoding, apart from the length.
fn frame(bytes: &[u8]) -> Option<Frame<'_>> {
    let (head, payload) = bytes.split_first_chunk()?;
    let [_, _, _, _, k0, k1, _, _, tag @ ..]: [u8; Header::BYTES] = *head;
    let header = Header {
        kind: Kind::from_number(u16::from_le_bytes([k0, k1])),
        tag: u32::from_le_bytes(tag),
        payload_bytes: u32::try_from(payload.len()).ok()?,
    };
    Some(Frame { header, payload })
}

/// The one frame of a stream.
fn whole(bytes: &[u8]) -> Frame<'_> {
    let frame = frame(bytes).expect("a header");
    let [head, ..] = bytes.as_chunks().0 else {
        panic!("a header");
    };
    assert_eq!(Header::decode(*head, LONGEST_FRAME), Ok(frame.header));
    frame
}

fuzz_target!(|bytes: &[u8]| {
    let Some(frame) = frame(bytes) else {
        return;
    };
    let allowed = DECODED * frame.payload.len();
    let mut out = Vec::new();

    let (allocated, message) = allocated_by(|| ToDaemon::decode(frame));
    assert!(allocated <= allowed, "{allocated} bytes are allocated");
    match message {
        Ok(Some(message)) => {
            message.encode(&mut out).expect("what was decoded fits");
            assert_eq!(ToDaemon::decode(whole(&out)), Ok(Some(message)));
        }
        Ok(None) => assert!(frame.header.kind.is_optional()),
        Err(error) => assert!(!error.to_string().is_empty()),
    }

    out.clear();
    let (allocated, message) = allocated_by(|| ToEngine::decode(frame));
    assert!(allocated <= allowed, "{allocated} bytes are allocated");
    match message {
        Ok(Some(message)) => {
            message.encode(&mut out).expect("what was decoded fits");
            assert_eq!(ToEngine::decode(whole(&out)), Ok(Some(message)));
        }
        Ok(None) => assert!(frame.header.kind.is_optional()),
        Err(error) => assert!(!error.to_string().is_empty()),
    }
});
