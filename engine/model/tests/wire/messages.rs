//! Messages survive the wire, and bytes that are no messages do no harm.

use std::borrow::Cow;

use kvtide_model::wire::{
    Ask, Bye, Frame, FrameReader, Geometry, Header, Hello, Kind, LONGEST_FRAME, RefusalCode,
    Refused, Role, Settle, Side, Tag, ToDaemon, ToEngine, Versions, WireError,
};
use kvtide_model::{BlockKey, NamespaceId};
use proptest::collection::vec;
use proptest::prelude::*;

use crate::any_message::{to_daemon, to_engine};
use crate::frames::{encoded, frame_of, frames_of, with_payload};

/// One message's frame, whichever way it goes.
fn any_frame() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        to_daemon().prop_map(|message| encoded(|out| message.encode(out))),
        to_engine().prop_map(|message| encoded(|out| message.encode(out))),
    ]
}

/// What both sides make of a frame, each shown as text.
fn heard(frame: Frame<'_>) -> [Result<String, WireError>; 2] {
    [
        ToDaemon::decode(frame).map(|message| format!("{message:?}")),
        ToEngine::decode(frame).map(|message| format!("{message:?}")),
    ]
}

/// Whether the payload is one text, of any length.
fn fills_its_payload(frame: Frame<'_>) -> bool {
    [Kind::ASK, Kind::ANSWER].contains(&frame.header.kind)
}

fn hello() -> Hello {
    Hello {
        versions: Versions::OURS,
        role: Role::Scheduler,
        engine_id: "e".into(),
        client: "kvtide 0.1.0".into(),
        token: None,
        memory: None,
        namespace: NamespaceId::from_bytes([7; 16]),
        model: "m".into(),
        tenant: String::new(),
        geometry: Geometry::default(),
        group: 0,
        events: false,
    }
}

proptest! {
    #[test]
    fn what_an_engine_says_is_what_the_daemon_hears(message in to_daemon()) {
        let bytes = encoded(|out| message.encode(out));
        prop_assert_eq!(ToDaemon::decode(frame_of(&bytes)), Ok(Some(message)));
    }

    #[test]
    fn what_the_daemon_says_is_what_an_engine_hears(message in to_engine()) {
        let bytes = encoded(|out| message.encode(out));
        prop_assert_eq!(ToEngine::decode(frame_of(&bytes)), Ok(Some(message)));
    }

    #[test]
    fn messages_are_appended_one_behind_the_other(messages in vec(to_daemon(), 0..6)) {
        let stream = encoded(|out| messages.iter().try_for_each(|each| each.encode(out)));
        for piece_bytes in [1, 7, stream.len().max(1)] {
            let heard = frames_of(&stream, piece_bytes, |frame| {
                ToDaemon::decode(frame).expect("a message").expect("of a known kind")
            });
            prop_assert_eq!(&heard, &Ok(messages.clone()));
        }
    }

    #[test]
    fn fields_that_a_newer_version_adds_at_the_end_are_ignored(
        bytes in any_frame(),
        more in vec(any::<u8>(), 1..40),
    ) {
        let frame = frame_of(&bytes);
        if fills_its_payload(frame) {
            return Ok(());
        }
        let longer = [frame.payload, &more].concat();
        prop_assert_eq!(heard(with_payload(frame, &longer)), heard(frame));
    }

    #[test]
    fn a_payload_that_is_cut_off_is_an_error(bytes in any_frame(), cut: prop::sample::Index) {
        let frame = frame_of(&bytes);
        if fills_its_payload(frame) || frame.payload.is_empty() {
            return Ok(());
        }
        let shorter = &frame.payload[..cut.index(frame.payload.len())];
        for result in heard(with_payload(frame, shorter)) {
            prop_assert!(result.is_err(), "{result:?}");
        }
    }

    #[test]
    fn no_message_goes_the_wrong_way(for_daemon in to_daemon(), for_engine in to_engine()) {
        let bytes = encoded(|out| for_daemon.encode(out));
        let (frame, receiver) = (frame_of(&bytes), Side::Engine);
        let error = WireError::UnknownKind { receiver, kind: frame.header.kind };
        prop_assert_eq!(ToEngine::decode(frame), Err(error));

        let bytes = encoded(|out| for_engine.encode(out));
        let (frame, receiver) = (frame_of(&bytes), Side::Daemon);
        let error = WireError::UnknownKind { receiver, kind: frame.header.kind };
        prop_assert_eq!(ToDaemon::decode(frame), Err(error));
    }

    #[test]
    fn damaged_bytes_are_an_error_or_another_message_and_never_a_panic(
        mut bytes in any_frame(),
        damage in vec((any::<prop::sample::Index>(), any::<u8>()), 1..5),
        piece_bytes in 1usize..64,
    ) {
        for (at, value) in damage {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        let errors = frames_of(&bytes, piece_bytes, heard);
        for error in errors.into_iter().flatten().flatten().filter_map(Result::err) {
            prop_assert!(!error.to_string().is_empty());
        }
    }

    #[test]
    fn whatever_decodes_is_encoded_to_what_decodes_alike(
        kind in prop::sample::select(&Kind::ALL[..]),
        tag: u32,
        payload in prop_oneof![vec(any::<u8>(), 0..200), vec(0u8..4, 0..200)],
    ) {
        let payload_bytes = u32::try_from(payload.len()).expect("a short payload");
        let header = Header { kind: kind.0, tag, payload_bytes };
        let frame = Frame { header, payload: &payload };
        if let Ok(Some(message)) = ToDaemon::decode(frame) {
            let bytes = encoded(|out| message.encode(out));
            prop_assert_eq!(ToDaemon::decode(frame_of(&bytes)), Ok(Some(message)));
        }
        if let Ok(Some(message)) = ToEngine::decode(frame) {
            let bytes = encoded(|out| message.encode(out));
            prop_assert_eq!(ToEngine::decode(frame_of(&bytes)), Ok(Some(message)));
        }
    }
}

#[test]
fn unknown_kinds_are_skipped_if_they_are_optional_and_errors_otherwise() {
    let frame = |number| Frame {
        header: Header {
            kind: Kind::from_number(number),
            tag: 0,
            payload_bytes: 3,
        },
        payload: b"???",
    };
    for number in [0x4000, 0x4001, 0x7fff, 0xffff] {
        assert_eq!(ToDaemon::decode(frame(number)), Ok(None));
        assert_eq!(ToEngine::decode(frame(number)), Ok(None));
    }
    for number in [0x0000, 0x0008, 0x0083, 0x8001] {
        let error = ToDaemon::decode(frame(number)).unwrap_err();
        assert_eq!(error.code(), RefusalCode::MALFORMED);
        assert_eq!(
            error.to_string(),
            format!("the daemon takes no frame of kind 0x{number:04x}")
        );
    }
}

#[test]
fn questions_and_answers_have_a_tag() {
    let bytes = encoded(|out| {
        let (tag, json) = (Tag::FIRST, "{}".into());
        ToDaemon::Ask(Ask { tag, json }).encode(out)
    });
    let mut frame = frame_of(&bytes);
    assert_eq!(frame.header.tag, 1);
    frame.header.tag = 0;
    let kind = Kind::ASK;
    assert_eq!(ToDaemon::decode(frame), Err(WireError::NoTag { kind }));
}

#[test]
fn a_tag_where_no_answer_is_expected_means_nothing() {
    let bytes = encoded(|out| ToDaemon::Bye(Bye).encode(out));
    let mut frame = frame_of(&bytes);
    frame.header.tag = 9;
    assert_eq!(ToDaemon::decode(frame), Ok(Some(ToDaemon::Bye(Bye))));
}

#[test]
fn an_engine_of_another_version_is_told_so_whatever_the_rest_of_its_hello_is() {
    let mut strange = hello();
    strange.versions = Versions::new(2, 3, 4).unwrap();
    let bytes = encoded(|out| ToDaemon::Hello(strange.clone()).encode(out));
    let frame = frame_of(&bytes);
    let (known, _) = frame.payload.split_at(14);
    for payload in [known.to_vec(), [known, &[0xff; 50]].concat()] {
        let error = ToDaemon::decode(with_payload(frame, &payload)).unwrap_err();
        assert_eq!(error.code(), RefusalCode::VERSION);
        assert_eq!(
            error.to_string(),
            "the engine speaks version 2.3 to 2.4 of the protocol and the daemon 1.0: the daemon \
             is too old, upgrade kvtide there"
        );
    }
}

#[test]
fn a_peer_of_another_protocol_is_recognised() {
    let mut bytes = &b"GET /metrics HTTP/1.1\r\n\r\n"[..];
    let mut reader = FrameReader::new(LONGEST_FRAME);
    let error = reader.next_frame(&mut bytes);
    let (length, longest) = (u32::from_le_bytes(*b"GET "), LONGEST_FRAME);
    assert_eq!(error, Err(WireError::FrameTooLong { length, longest }));

    let bytes = encoded(|out| ToDaemon::Hello(hello()).encode(out));
    let payload = [b"NOT\nkvtd", &frame_of(&bytes).payload[8..]].concat();
    let error = ToDaemon::decode(with_payload(frame_of(&bytes), &payload)).unwrap_err();
    assert_eq!(
        error.to_string(),
        "Hello begins with \"NOT\\nkvtd\" and not with \"kvtide\\x00\\x01\": its sender is no \
         engine with kvtide"
    );
}

#[test]
fn an_error_says_what_is_wrong_and_where() {
    let bytes = encoded(|out| ToDaemon::Hello(hello()).encode(out));
    let frame = frame_of(&bytes);
    let changed = |at: usize, new: &[u8]| {
        let mut payload = frame.payload.to_vec();
        payload[at..at + new.len()].copy_from_slice(new);
        let error = ToDaemon::decode(with_payload(frame, &payload)).unwrap_err();
        assert_eq!(error.code(), RefusalCode::MALFORMED);
        error.to_string()
    };
    for (at, new, error) in [
        (
            10,
            &[1][..],
            "Hello, byte 12: minor_highest is 0, not minor_lowest or above",
        ),
        (
            14,
            &[3],
            "Hello, byte 14: role is 3, not 0 (scheduler), 1 (worker) or 2 (operator)",
        ),
        (
            19,
            &[1, 1],
            "Hello, byte 19: engine_id has 257 bytes, at most 256 are allowed",
        ),
        (
            19,
            &[200],
            "Hello, byte 21: engine_id needs 200 bytes, 83 are left",
        ),
        (
            21,
            &[0xff],
            "Hello, byte 21: engine_id is not UTF-8 from its byte 0 on",
        ),
        (103, &[2], "Hello, byte 103: events is 2, not 0 or 1"),
    ] {
        assert_eq!(changed(at, new), error);
    }
    let count = 1_000_000u32.to_le_bytes();
    let payload = [&count[..], &[0; 100]].concat();
    let kind = Kind::USED;
    let header = Header {
        kind,
        tag: 0,
        payload_bytes: 104,
    };
    let frame = Frame {
        header,
        payload: &payload,
    };
    assert_eq!(
        ToDaemon::decode(frame).unwrap_err().to_string(),
        "Used, byte 0: slots has 1000000 elements of at least 8 bytes, 100 bytes are left"
    );
}

#[test]
fn what_does_not_fit_is_not_sent_and_leaves_the_buffer_as_it_was() {
    let mut out = b"before".to_vec();
    let mut long = hello();
    long.tenant = "t".repeat(257);
    let error = ToDaemon::Hello(long).encode(&mut out).unwrap_err();
    assert_eq!(
        error.to_string(),
        "Hello, byte 79: tenant has 257 bytes, at most 256 are allowed"
    );

    let fits = (LONGEST_FRAME as usize - 8 - 4) / 16;
    let all = vec![BlockKey::from_bytes([0; 16]); fits + 1];
    let settle = |keys| {
        ToDaemon::Settle(Settle {
            keys: Cow::Borrowed(keys),
        })
    };
    let kind = Kind::SETTLE;
    let error = WireError::MessageTooLong { kind };
    assert_eq!(settle(&all[..]).encode(&mut out), Err(error));
    assert_eq!(out, b"before");
    assert_eq!(settle(&all[1..]).encode(&mut out), Ok(()));
    assert!(out.len() <= b"before".len() + 4 + LONGEST_FRAME as usize);
}

#[test]
fn a_refusal_with_a_long_message_is_shortened_and_sent() {
    let refused = Refused::new(RefusalCode::GEOMETRY, &"ö".repeat(1000));
    assert_eq!(refused.message.len(), Refused::LONGEST_MESSAGE);
    let bytes = encoded(|out| ToEngine::Refused(refused.clone()).encode(out));
    assert_eq!(
        ToEngine::decode(frame_of(&bytes)),
        Ok(Some(ToEngine::Refused(refused)))
    );
}

#[test]
fn a_refusal_for_an_unknown_reason_keeps_its_message() {
    let refused = Refused::new(RefusalCode::from_number(77), "later");
    assert_eq!(refused.code.to_string(), "code 77");
    assert_eq!(RefusalCode::NO_MEMORY.to_string(), "NoMemory");
}
