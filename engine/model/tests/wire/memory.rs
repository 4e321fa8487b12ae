//! What bytes can make a reader allocate.

use kvtide_model::BlockKey;
use kvtide_model::wire::{
    BeginSaves, ChainToSave, Frame, FrameReader, Header, Kind, LONGEST_FRAME, Tag, ToDaemon,
    ToEngine, WireError,
};
use proptest::collection::vec;
use proptest::prelude::*;

use crate::any_message::{to_daemon, to_engine};
use crate::counting_allocator::allocated_by;
use crate::frames::{encoded, frame_of};

/// Decoding asks for at most so many bytes for each of the payload. The most takes a list of chains:
/// room for as many as their 8 bytes each allow, at two lists of 24 bytes, and then the keys of one
/// that leaves no bytes for the others.
const DECODED: usize = 7;

/// A reader that grows its buffer asks for at most so many bytes for each that it was fed.
const READ: usize = 4;

fn check(frame: Frame<'_>) -> Result<(), TestCaseError> {
    let (bytes, _to_daemon) = allocated_by(|| ToDaemon::decode(frame));
    prop_assert!(bytes <= DECODED * frame.payload.len(), "{frame:?}: {bytes}");
    let (bytes, _to_engine) = allocated_by(|| ToEngine::decode(frame));
    prop_assert!(bytes <= DECODED * frame.payload.len(), "{frame:?}: {bytes}");
    Ok(())
}

proptest! {
    #[test]
    fn messages_and_damaged_messages_take_a_small_multiple_of_their_bytes(
        mut bytes in prop_oneof![
            to_daemon().prop_map(|message| encoded(|out| message.encode(out))),
            to_engine().prop_map(|message| encoded(|out| message.encode(out))),
        ],
        damage in vec((any::<prop::sample::Index>(), any::<u8>()), 0..5),
    ) {
        let payload = &mut bytes[Header::BYTES..];
        for (at, value) in damage {
            if !payload.is_empty() {
                payload[at.index(payload.len())] = value;
            }
        }
        check(frame_of(&bytes))?;
    }

    #[test]
    fn any_payload_takes_a_small_multiple_of_its_bytes(
        kind in prop::sample::select(&Kind::ALL[..]),
        payload in prop_oneof![vec(any::<u8>(), 0..200), vec(0u8..3, 0..200)],
    ) {
        let payload_bytes = u32::try_from(payload.len()).expect("a short payload");
        let header = Header { kind: kind.0, tag: 1, payload_bytes };
        check(Frame { header, payload: &payload })?;
    }

    #[test]
    fn bytes_of_any_kind_take_a_small_multiple_in_the_reader(
        stream in prop_oneof![vec(any::<u8>(), 0..500), vec(0u8..20, 0..500)],
        piece_bytes in 1usize..100,
    ) {
        let (bytes, _) = allocated_by(|| {
            let mut reader = FrameReader::new(LONGEST_FRAME);
            for mut piece in stream.chunks(piece_bytes) {
                while reader.next_frame(&mut piece)?.is_some() {}
            }
            Ok::<(), WireError>(())
        });
        prop_assert!(bytes <= READ * stream.len() + 64, "{bytes}");
    }
}

#[test]
fn the_worst_list_takes_seven_times_its_bytes() {
    let (chains, keys) = (1001u32, 500u32);
    let counts = [chains, 0, keys].map(u32::to_le_bytes).concat();
    let payload = [&counts[..], &[7; 16 * 500]].concat();
    let header = Header {
        kind: Kind::BEGIN_SAVES,
        tag: 1,
        payload_bytes: 12 + 16 * keys,
    };
    let frame = Frame {
        header,
        payload: &payload,
    };
    let (bytes, message) = allocated_by(|| ToDaemon::decode(frame));
    assert!(
        matches!(message, Err(WireError::Short { left: 0, .. })),
        "{message:?}"
    );
    assert!(bytes > (DECODED - 1) * payload.len());
    assert!(bytes <= DECODED * payload.len());
}

#[test]
fn a_count_that_lies_makes_no_room() {
    for (kind, count_at) in [
        (Kind::BEGIN_SAVES, 0),
        (Kind::USED, 0),
        (Kind::SETTLE, 0),
        (Kind::DAMAGED, 0),
        (Kind::SAVES_BEGUN, 1),
        (Kind::EVENTS, 0),
        (Kind::COUNTS, 0),
    ] {
        let mut payload = [0; 100];
        payload[count_at..][..4].copy_from_slice(&u32::MAX.to_le_bytes());
        let header = Header {
            kind,
            tag: 1,
            payload_bytes: 100,
        };
        let frame = Frame {
            header,
            payload: &payload,
        };
        let (bytes, results) = allocated_by(|| {
            [
                ToDaemon::decode(frame).map(|_| ()),
                ToEngine::decode(frame).map(|_| ()),
            ]
        });
        assert_eq!(bytes, 0, "{kind}");
        let refused =
            |result: &Result<(), WireError>| matches!(result, Err(WireError::Count { .. }));
        assert!(results.iter().any(refused), "{kind}: {results:?}");
    }
}

#[test]
fn keys_are_encoded_with_room_for_all_of_them_made_once() {
    let keys = vec![BlockKey::from_bytes([7; 16]); 8192];
    let message = ToDaemon::BeginSaves(BeginSaves {
        tag: Tag::FIRST,
        chains: vec![ChainToSave {
            earlier: [][..].into(),
            keys: keys[..].into(),
        }],
    });
    let mut out = Vec::with_capacity(64);
    let (bytes, done) = allocated_by(|| message.encode(&mut out));
    assert_eq!(done, Ok(()));
    assert!(bytes <= out.len() + 64, "{bytes} for {}", out.len());
    out.clear();
    let (bytes, _) = allocated_by(|| message.encode(&mut out));
    assert_eq!(bytes, 0, "a buffer that is used again needs no room");
}
