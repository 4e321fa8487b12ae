//! One frame of each kind, byte by byte, so that the format cannot change unnoticed.

use std::num::NonZeroU64;

use kvtide_model::wire::{
    Answer, Ask, BeginSaves, Bye, ChainSaves, ChainToSave, Clear, Cleared, Count, Counts, Damaged,
    Event, Events, Geometry, Hello, Kind, Place, RefusalCode, Refused, Role, SavesBegun,
    SessionToken, Settle, Tag, ToDaemon, ToEngine, Used, Versions, Welcome,
};
use kvtide_model::{BlockKey, NamespaceId, SlotRef};

use crate::frames::{encoded, frame_of};

/// Its own comment says how it is written.
const FRAMES: &str = include_str!("frames.txt");

/// A frame as the file has it.
pub(crate) struct Recorded {
    /// Name of its kind.
    pub(crate) name: &'static str,
    /// Its lines, without comments between them.
    pub(crate) text: String,
    /// Every field with its bytes.
    pub(crate) fields: Vec<(&'static str, Vec<u8>)>,
}

impl Recorded {
    pub(crate) fn bytes(&self) -> Vec<u8> {
        let mut fields = self.fields.iter();
        fields
            .by_ref()
            .flat_map(|(_, bytes)| bytes.clone())
            .collect()
    }
}

/// All frames of the file.
pub(crate) fn recorded() -> Vec<Recorded> {
    let mut frames: Vec<Recorded> = Vec::new();
    for line in FRAMES.lines() {
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        if !line.starts_with(' ') {
            frames.push(Recorded {
                name: line,
                text: format!("{line}\n"),
                fields: Vec::new(),
            });
            continue;
        }
        let frame = frames.last_mut().expect("a name before the fields");
        let (said, _comment) = line.split_once(';').unwrap_or((line, ""));
        let mut words = said.split_whitespace();
        let field = words.next().expect("a field");
        let byte = |word| u8::from_str_radix(word, 16).expect("a byte in two digits");
        frame.fields.push((field, words.map(byte).collect()));
        frame.text += line;
        frame.text.push('\n');
    }
    frames
}

fn tag(number: u32) -> Tag {
    Tag::new(number).expect("above 0")
}

/// Sixteen bytes that count up.
fn counting(first: u8) -> [u8; 16] {
    std::array::from_fn(|i| first + u8::try_from(i).expect("below 16"))
}

fn key(first: u8) -> BlockKey {
    BlockKey::from_bytes(counting(first))
}

fn slot(slot: u32, generation: u32) -> SlotRef {
    SlotRef { slot, generation }
}

fn token() -> SessionToken {
    SessionToken::from_bytes(counting(0xc0)).expect("not zeros")
}

fn from_engines() -> Vec<ToDaemon<'static>> {
    vec![
        ToDaemon::Hello(Hello {
            versions: Versions::new(1, 0, 2).expect("a range"),
            role: Role::Worker { rank: 3 },
            engine_id: "engine-7".into(),
            client: "kvtide 0.1.0".into(),
            token: Some(token()),
            memory: NonZeroU64::new(0x1122_3344_5566_7788),
            namespace: NamespaceId::from_bytes(counting(0x40)),
            model: "modèle".into(),
            tenant: "acme".into(),
            geometry: Geometry {
                ranks: 8,
                layers: 80,
                layer_bytes: 65_536,
                block_tokens: 16,
            },
            group: 1,
            events: true,
        }),
        ToDaemon::BeginSaves(BeginSaves {
            tag: tag(0x0102),
            chains: vec![
                ChainToSave {
                    earlier: vec![key(0x10)].into(),
                    keys: vec![key(0x20), key(0x30)].into(),
                },
                ChainToSave {
                    earlier: vec![].into(),
                    keys: vec![key(0x50)].into(),
                },
            ],
        }),
        ToDaemon::Used(Used {
            slots: vec![slot(0x0102_0304, 5), slot(6, 7)].into(),
        }),
        ToDaemon::Settle(Settle {
            keys: vec![key(0x10), key(0x20)].into(),
        }),
        ToDaemon::Damaged(Damaged {
            slots: vec![slot(9, 0xffff_ffff)].into(),
        }),
        ToDaemon::Clear(Clear { tag: tag(3) }),
        ToDaemon::Bye(Bye),
        ToDaemon::Ask(Ask {
            tag: tag(4),
            json: "{\"ask\":\"status\"}".into(),
        }),
    ]
}

fn from_the_daemon() -> Vec<ToEngine<'static>> {
    vec![
        ToEngine::Welcome(Welcome {
            minor: 2,
            server: "kvtide 0.1.0".into(),
            boot: counting(0x90),
            memory: NonZeroU64::new(0x1122_3344_5566_7788).expect("above 0"),
            token: token(),
            session: 63,
            resumed: true,
            extent_bytes: 1 << 30,
            extents: 32,
            data_offset: 1 << 21,
            rows_per_extent: 511,
            buckets: 65_536,
            max_keys: 8192,
        }),
        ToEngine::SavesBegun(SavesBegun {
            tag: tag(0x0102),
            pressure: true,
            chains: vec![
                ChainSaves {
                    covered: 2,
                    places: vec![Place {
                        at: 1,
                        slot: slot(0x0102_0304, 5),
                    }],
                },
                ChainSaves {
                    covered: 0,
                    places: vec![],
                },
            ],
        }),
        ToEngine::Cleared(Cleared { tag: tag(3) }),
        ToEngine::Events(Events {
            events: vec![
                Event::Stored(key(0x20)),
                Event::Removed(key(0x10)),
                Event::Cleared,
            ]
            .into(),
        }),
        ToEngine::Counts(Counts {
            counts: vec![Count {
                name: "evicted_blocks".into(),
                value: 0x1234_5678_9abc,
            }],
        }),
        ToEngine::Answer(Answer {
            tag: tag(4),
            json: "{\"sessions\":[]}".into(),
        }),
        ToEngine::Refused(Refused::new(
            RefusalCode::GEOMETRY,
            "layer_bytes is 0: nothing can be saved",
        )),
    ]
}

/// Compares field by field, so that a difference is named.
fn check(frame: &Recorded, bytes: &[u8]) {
    let mut rest = bytes;
    for (field, recorded) in &frame.fields {
        let (now, later) = rest.split_at(recorded.len().min(rest.len()));
        assert_eq!(
            now, recorded,
            "{}: {field} is encoded differently now: that needs a new version of the protocol",
            frame.name
        );
        rest = later;
    }
    assert!(rest.is_empty(), "{}: more is encoded now", frame.name);
}

#[test]
fn every_kind_is_recorded_once_and_in_order() {
    let names: Vec<&str> = recorded().iter().map(|frame| frame.name).collect();
    assert_eq!(names, Kind::ALL.map(|(_, name)| name));
}

#[test]
fn messages_are_encoded_to_the_recorded_bytes() {
    let encode_to_daemon = |message: &ToDaemon<'_>| encoded(|out| message.encode(out));
    let encode_to_engine = |message: &ToEngine<'_>| encoded(|out| message.encode(out));
    let engines = from_engines();
    let now = engines.iter().map(encode_to_daemon);
    let now = now
        .chain(from_the_daemon().iter().map(encode_to_engine))
        .collect::<Vec<_>>();
    let recorded = recorded();
    assert_eq!(now.len(), recorded.len());
    for (frame, bytes) in recorded.iter().zip(now) {
        check(frame, &bytes);
    }
}

#[test]
fn recorded_bytes_are_decoded_to_the_messages() {
    let recorded = recorded();
    let (to_daemon, to_engine) = recorded.split_at(from_engines().len());
    for (frame, message) in to_daemon.iter().zip(from_engines()) {
        assert_eq!(
            ToDaemon::decode(frame_of(&frame.bytes())),
            Ok(Some(message)),
            "{}",
            frame.name
        );
    }
    for (frame, message) in to_engine.iter().zip(from_the_daemon()) {
        assert_eq!(
            ToEngine::decode(frame_of(&frame.bytes())),
            Ok(Some(message)),
            "{}",
            frame.name
        );
    }
}
