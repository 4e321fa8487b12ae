//! Engines and daemons of versions that are one apart: what a recorded engine says is answered by the
//! present daemon as it was then, and what a recorded daemon says is understood by the present engine.
#![allow(clippy::unwrap_used, reason = "a failed step fails the test")]

#[path = "../common/mod.rs"]
mod common;
mod recording;
mod stand_in;
mod stream;

use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::mpsc::channel;
use std::thread;
use std::time::{Duration, Instant};

use common::engine::{Engine, LIMIT, SMALL, keys, namespace};
use common::place::Place;
use kvtide_engine::{AttachError, SaveJob};
use kvtide_model::SlotRef;
use kvtide_model::wire::{
    BeginSaves, ChainToSave, Header, Hello, Kind, RefusalCode, Role, Tag, ToDaemon, ToEngine,
    Versions, Welcome,
};
use recording::Line;
use stand_in::{StandIn, role};

/// A conversation of version 1.0. It stays as it is when there is a newer one, which gets its own.
const RECORDED: &str = include_str!("1.0.txt");

/// What an engine does, so that it says everything that it can say. The slots that it was given; `None`
/// if an answer was late, as it may be on a loaded machine, and something else was said therefore.
fn converse(engine: &mut Engine) -> Option<Vec<SlotRef>> {
    let chain = keys(0..5);
    let blocks = engine.compute(&chain);
    let mut slots = Vec::new();
    for (from, end) in [(0, 3), (3, 5)] {
        let plan = engine
            .session
            .begin_save(&chain[..end], from, &blocks[from..end]);
        if plan.covered != end - from {
            return None;
        }
        slots.extend(plan.moves.iter().map(|each| each.slot));
        let (job, moves) = (plan.job, plan.moves);
        engine.worker.save_now(vec![SaveJob { job, moves }]);
        engine.worker.finish_saves(&[job]).unwrap();
    }
    let damaged = SlotRef {
        slot: slots[4].slot,
        generation: slots[4].generation + 1,
    };
    let found = engine.session.lookup(&chain[..3]);
    engine.session.mark_used(&found.lease);
    drop(found);
    engine.session.settle(&chain);
    // Nobody has that generation: it is said, and nothing happens.
    engine.session.drop_damaged(&[damaged]);
    assert!(engine.session.clear());
    let begun = Instant::now();
    // Nothing is found before the daemon has done it.
    while engine.session.holds(chain[0], false) || engine.session.poll() > 0 {
        assert!(begun.elapsed() < LIMIT);
        thread::sleep(Duration::from_millis(1));
    }
    Some(slots)
}

fn slots_of(lines: &[Line]) -> Vec<SlotRef> {
    let mut slots = Vec::new();
    for line in lines {
        if let Ok(Some(ToEngine::SavesBegun(begun))) = ToEngine::decode(line.frame()) {
            let places = begun.chains.iter().flat_map(|chain| &chain.places);
            slots.extend(places.map(|place| place.slot));
        }
    }
    slots
}

/// The next frame that answers something.
fn answer(connection: &UnixStream) -> Line {
    answer_with_files(connection).0
}

/// The same, and the files that came with it: an engine is there for as long as it has its own.
fn answer_with_files(connection: &UnixStream) -> (Line, Vec<OwnedFd>) {
    loop {
        let (bytes, files) = stream::receive(connection).expect("an answer");
        let line = Line {
            connection: 0,
            from_engine: false,
            bytes,
        };
        assert_eq!(
            files.len(),
            if line.kind() == Kind::WELCOME { 3 } else { 0 }
        );
        if !line.is_unasked() {
            return (line, files);
        }
    }
}

fn welcome(line: &Line) -> Welcome {
    match ToEngine::decode(line.frame()) {
        Ok(Some(ToEngine::Welcome(welcome))) => welcome,
        other => panic!("{other:?}"),
    }
}

#[test]
fn what_a_recorded_engine_says_the_present_daemon_answers_as_it_was_answered_then() {
    let place = Place::new();
    let _daemon = place.start();
    let (mut connections, mut held) = (Vec::new(), Vec::new());
    let recorded = recording::read(RECORDED);
    for line in recorded.iter().filter(|line| !line.is_unasked()) {
        if line.kind() == Kind::HELLO {
            connections.push(UnixStream::connect(place.socket()).unwrap());
        }
        let connection = &connections[line.connection];
        if line.from_engine {
            stream::send(connection, &line.bytes, &[]);
            continue;
        }
        let (answer, files) = answer_with_files(connection);
        held.extend(files);
        if line.kind() != Kind::WELCOME {
            assert_eq!(answer.bytes, line.bytes, "{}", line.kind());
            continue;
        }
        let (now, then) = (welcome(&answer), welcome(line));
        let is_drawn_anew = Welcome {
            server: now.server.clone(),
            boot: now.boot,
            memory: now.memory,
            token: now.token,
            ..then
        };
        assert_eq!(now, is_drawn_anew);
    }
    let kinds: Vec<Kind> = recorded.iter().map(Line::kind).collect();
    for (kind, _) in Kind::ALL {
        let is_asked = [Kind::ASK, Kind::ANSWER, Kind::REFUSED].contains(&kind);
        let comes = [Kind::COUNTS, Kind::EVENTS].contains(&kind);
        assert!(
            is_asked || comes || kinds.contains(&kind),
            "{kind} is missing"
        );
    }
    // It is an engine with all that belongs to one, and goes as one.
    place.until(|status| status.namespaces[0].held_blocks == 0);
    drop((connections, held));
    place.until(|status| status.sessions.is_empty());
}

/// The present engine with a stand-in: what it was given, and what it said.
fn with_stand_in(lines: &[Line], change: stand_in::Change) -> (Vec<SlotRef>, Vec<Line>) {
    for _ in 0..20 {
        let stand_in = StandIn::start(lines, change);
        let mut engine = Engine::start(&stand_in.socket(), "recorded", SMALL);
        let given = converse(&mut engine);
        drop(engine);
        if let Some(slots) = given {
            let begun = Instant::now();
            while stand_in.heard().last().unwrap().kind() != Kind::BYE {
                assert!(begun.elapsed() < LIMIT);
                thread::sleep(Duration::from_millis(1));
            }
            return (slots, stand_in.heard());
        }
    }
    panic!("the stand-in never answers in time");
}

#[test]
fn what_a_recorded_daemon_says_the_present_engine_understands() {
    let recorded = recording::read(RECORDED);
    let (slots, heard) = with_stand_in(&recorded, |bytes| bytes);
    assert_eq!(slots, slots_of(&recorded));
    let of = |lines: &[Line]| -> Vec<(Kind, Option<Role>)> {
        let lines = lines.iter().filter(|line| line.from_engine);
        lines.map(|line| (line.kind(), role(line))).collect()
    };
    assert_eq!(
        of(&heard),
        of(&recorded),
        "it says the same in the same order"
    );
    let begins = |lines: &[Line]| -> Vec<Vec<u8>> {
        let lines = lines.iter().filter(|line| line.kind() == Kind::BEGIN_SAVES);
        lines.map(|line| line.frame().payload.to_vec()).collect()
    };
    assert_eq!(begins(&heard), begins(&recorded));
}

/// A frame with more at its end than we know.
fn with_more(mut bytes: Vec<u8>) -> Vec<u8> {
    let more = [0xa5; 7];
    bytes.extend(more);
    let length = u32::try_from(bytes.len() - 4).unwrap();
    bytes[..4].copy_from_slice(&length.to_le_bytes());
    bytes
}

/// A frame of a kind that we do not know and may skip.
fn unknown() -> Vec<u8> {
    let header = Header {
        kind: Kind::from_number(0x4abc),
        tag: 0,
        payload_bytes: 3,
    };
    [&header.encode()[..], b"new"].concat()
}

#[test]
fn what_a_newer_daemon_adds_the_present_engine_skips() {
    let recorded = recording::read(RECORDED);
    let (slots, _) = with_stand_in(&recorded, |bytes| {
        let is_first = bytes[4..6] == Kind::WELCOME.number().to_le_bytes();
        let before = if is_first { Vec::new() } else { unknown() };
        [before, with_more(bytes)].concat()
    });
    assert_eq!(slots, slots_of(&recorded));
}

fn hello(versions: Versions) -> Vec<u8> {
    let hello = Hello {
        versions,
        role: Role::Scheduler,
        engine_id: "another".into(),
        client: "kvtide another".into(),
        token: None,
        memory: None,
        namespace: namespace("m"),
        model: "m".into(),
        tenant: String::new(),
        geometry: SMALL.geometry(),
        group: 0,
        events: false,
    };
    let mut bytes = Vec::new();
    ToDaemon::Hello(hello).encode(&mut bytes).unwrap();
    bytes
}

fn ours() -> (u16, u16, u16) {
    let ours = Versions::OURS;
    (ours.major(), ours.lowest(), ours.highest())
}

#[test]
fn an_engine_one_minor_version_newer_is_served_in_the_present_one() {
    let place = Place::new();
    let _daemon = place.start();
    let (major, lowest, highest) = ours();
    let newer = Versions::new(major, lowest, highest + 1).unwrap();
    let connection = UnixStream::connect(place.socket()).unwrap();
    stream::send(&connection, &with_more(hello(newer)), &[]);
    assert_eq!(welcome(&answer(&connection)).minor, highest);
    stream::send(&connection, &unknown(), &[]);
    let mut question = Vec::new();
    let tag = Tag::new(7).unwrap();
    let chains = vec![ChainToSave {
        earlier: vec![].into(),
        keys: keys(0..2).into(),
    }];
    let asked = ToDaemon::BeginSaves(BeginSaves { tag, chains });
    asked.encode(&mut question).unwrap();
    stream::send(&connection, &with_more(question), &[]);
    let begun = answer(&connection);
    assert_eq!(begun.frame().header.tag, 7);
    assert_eq!(slots_of(&[begun]).len(), 2);
}

/// What a daemon says to an engine of these versions.
fn refusal(versions: Versions) -> (RefusalCode, String) {
    let place = Place::new();
    let _daemon = place.start();
    let connection = UnixStream::connect(place.socket()).unwrap();
    stream::send(&connection, &hello(versions), &[]);
    match ToEngine::decode(answer(&connection).frame()) {
        Ok(Some(ToEngine::Refused(refused))) => (refused.code, refused.message),
        other => panic!("{other:?}"),
    }
}

#[test]
fn an_engine_that_speaks_newer_versions_alone_is_told_to_have_the_daemon_upgraded() {
    let (major, _, highest) = ours();
    for newer in [(major, highest + 1), (major + 1, 0)] {
        let versions = Versions::new(newer.0, newer.1, newer.1).unwrap();
        let (code, message) = refusal(versions);
        assert_eq!(code, RefusalCode::VERSION);
        assert!(
            message.contains("the daemon is too old, upgrade kvtide there"),
            "{message}"
        );
    }
}

#[test]
fn an_engine_one_version_older_is_served_or_told_to_upgrade() {
    let (major, lowest, highest) = ours();
    if let Some(older) = highest.checked_sub(1).filter(|&older| older >= lowest) {
        let place = Place::new();
        let _daemon = place.start();
        let connection = UnixStream::connect(place.socket()).unwrap();
        let versions = Versions::new(major, older, older).unwrap();
        stream::send(&connection, &hello(versions), &[]);
        assert_eq!(welcome(&answer(&connection)).minor, older);
    }
    // Of another major version: nothing but the numbers is read.
    let (code, message) = refusal(Versions::new(major - 1, 0, 9).unwrap());
    assert_eq!(code, RefusalCode::VERSION);
    assert!(
        message.contains("the engine is too old, upgrade kvtide there"),
        "{message}"
    );
}

#[test]
fn a_daemon_that_has_no_version_in_common_is_quoted() {
    let place = Place::new();
    let listener = UnixListener::bind(place.socket()).unwrap();
    let said = "the engine speaks version 1.0 of the protocol and the daemon 1.4: the engine is too \
                old, upgrade kvtide there";
    let telling = thread::spawn(move || {
        let (connection, _) = listener.accept().unwrap();
        let mut bytes = Vec::new();
        let refused = kvtide_model::wire::Refused::new(RefusalCode::VERSION, said);
        ToEngine::Refused(refused).encode(&mut bytes).unwrap();
        let _ = stream::receive(&connection);
        stream::send(&connection, &bytes, &[]);
    });
    let error = Engine::attach(&place.socket(), "a", SMALL, LIMIT)
        .err()
        .unwrap();
    assert!(matches!(error, AttachError::Refused { .. }), "{error:?}");
    assert!(error.to_string().contains(said), "{error}");
    telling.join().unwrap();
}

/// Writes the conversation of the present version down:
/// `cargo test -p kvtide-server --test versions -- --ignored record_a_conversation`.
#[test]
#[ignore = "writes a file of the repository"]
fn record_a_conversation() {
    let (major, _, highest) = ours();
    let name = format!("tests/versions/{major}.{highest}.txt");
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(name);
    for _ in 0..20 {
        let place = Place::new();
        let _daemon = place.start();
        let listener = UnixListener::bind(place.path("between.sock")).unwrap();
        let (said, lines) = channel();
        let behind = place.socket();
        thread::spawn(move || {
            for (connection, engine) in listener.incoming().enumerate() {
                let engine = engine.unwrap();
                let daemon = UnixStream::connect(&behind).unwrap();
                let [a, b] = [&engine, &daemon].map(|end| end.try_clone().unwrap());
                for (from, to, from_engine) in [(engine, daemon, true), (b, a, false)] {
                    let said = said.clone();
                    thread::spawn(move || {
                        while let Some((bytes, files)) = stream::receive(&from) {
                            let line = Line {
                                connection,
                                from_engine,
                                bytes,
                            };
                            // Written down before anybody can answer.
                            let _ = said.send(line.clone());
                            stream::send(&to, &line.bytes, &files);
                        }
                        let _ = to.shutdown(std::net::Shutdown::Both);
                    });
                }
            }
        });
        let mut engine = Engine::start(&place.path("between.sock"), "recorded", SMALL);
        let given = converse(&mut engine);
        drop(engine);
        if given.is_some() {
            let lines = lines.iter();
            let mut all = Vec::new();
            for line in lines {
                let is_last = line.kind() == Kind::BYE;
                all.push(line);
                if is_last {
                    break;
                }
            }
            let head = "# A conversation of an engine and a daemon, as it went over their sockets; see \
                        recording.rs.\n\n";
            fs::write(path, format!("{head}{}", recording::write(&all))).unwrap();
            return;
        }
    }
    panic!("the daemon never answers in time");
}

/// Frames of the file are frames.
#[test]
fn what_was_recorded_is_read_as_it_was_written() {
    let lines = recording::read(RECORDED);
    let text: String = RECORDED
        .lines()
        .skip(2)
        .map(|line| format!("{line}\n"))
        .collect();
    assert_eq!(recording::write(&lines), text);
}
