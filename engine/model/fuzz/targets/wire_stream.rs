//! A stream of frames: it is divided alike, in whatever pieces it arrives.
#![no_main]

#[path = "../../tests/wire/counting_allocator.rs"]
mod counting_allocator;

use counting_allocator::allocated_by;
use kvtide_model::wire::{Frame, FrameReader, LONGEST_FRAME, ToDaemon, ToEngine, WireError};
use libfuzzer_sys::fuzz_target;

/// Bytes allocated for each that was fed, at most, besides what a buffer begins with.
const READ: usize = 4;

/// What becomes of the frames of a stream, and of the stream in the end.
fn read(
    stream: &[u8],
    piece_bytes: usize,
    mut take: impl FnMut(Frame<'_>),
) -> (Result<(), WireError>, bool) {
    let mut reader = FrameReader::new(LONGEST_FRAME);
    for mut piece in stream.chunks(piece_bytes) {
        loop {
            match reader.next_frame(&mut piece) {
                Ok(Some(frame)) => take(frame),
                Ok(None) => break,
                Err(error) => return (Err(error), true),
            }
        }
        assert!(piece.is_empty(), "all is taken before more is asked for");
    }
    (Ok(()), reader.is_within_a_frame())
}

fuzz_target!(|bytes: &[u8]| {
    let Some((&piece_bytes, stream)) = bytes.split_first() else {
        return;
    };
    let piece_bytes = usize::from(piece_bytes).max(1);
    let (allocated, end) = allocated_by(|| read(stream, piece_bytes, |_| ()));
    assert!(
        allocated <= READ * stream.len() + 64,
        "{allocated} bytes are allocated"
    );

    let mut frames = Vec::new();
    let end_at_once = read(stream, stream.len().max(1), |frame| {
        frames.push((frame.header, frame.payload.to_vec()));
        // What is said of it is not looked at here; that nothing panics is.
        let _ = (ToDaemon::decode(frame), ToEngine::decode(frame));
    });
    let mut expected = frames.iter();
    let end_in_pieces = read(stream, piece_bytes, |frame| {
        let (header, payload) = expected.next().expect("no more frames than at once");
        assert_eq!((frame.header, frame.payload), (*header, &payload[..]));
    });
    assert!(expected.next().is_none(), "no fewer frames than at once");
    assert_eq!(end_in_pieces, end_at_once);
    assert_eq!(end, end_at_once);
});
