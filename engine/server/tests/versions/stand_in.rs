//! A daemon that says what another one has said: to the same questions, the same bytes. The memory that
//! it hands out is that of a real one.

use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::thread;

use kvtide_model::wire::{Kind, Role, ToDaemon};

use super::common::place::{Daemon, Place};
use super::recording::Line;
use super::stream::{receive, send};

/// What becomes of a frame before it is sent, so that it is a newer daemon's.
pub(crate) type Change = fn(Vec<u8>) -> Vec<u8>;

/// See the module's documentation.
pub(crate) struct StandIn {
    place: Place,
    _real: Daemon,
    /// What engines have said, with the number of their connection.
    heard: Arc<Mutex<Vec<Line>>>,
}

impl StandIn {
    /// One that says what is in `lines`.
    pub(crate) fn start(lines: &[Line], change: Change) -> Self {
        let place = Place::new();
        let real = place.start();
        let heard = Arc::new(Mutex::new(Vec::new()));
        let listener = UnixListener::bind(place.path("stand-in.sock")).unwrap();
        let (script, told, behind) = (lines.to_vec(), Arc::clone(&heard), place.socket());
        thread::spawn(move || {
            for (connection, stream) in listener.incoming().enumerate() {
                let script = script.iter().filter(|line| line.connection == connection);
                let script: Vec<Line> = script.cloned().collect();
                let (told, behind) = (Arc::clone(&told), behind.clone());
                let stream = stream.unwrap();
                thread::spawn(move || speak(&stream, connection, &script, &behind, change, &told));
            }
        });
        Self {
            place,
            _real: real,
            heard,
        }
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.place.path("stand-in.sock")
    }

    pub(crate) fn heard(&self) -> Vec<Line> {
        self.heard.lock().unwrap().clone()
    }
}

/// Serves one connection.
fn speak(
    stream: &UnixStream,
    connection: usize,
    script: &[Line],
    behind: &Path,
    change: Change,
    heard: &Mutex<Vec<Line>>,
) {
    // Held for as long as the engine is there: the real daemon keeps its files until then.
    let mut real = None;
    while let Some((bytes, _)) = receive(stream) {
        let said = Line {
            connection,
            from_engine: true,
            bytes,
        };
        let frame = said.frame();
        heard.lock().unwrap().push(said.clone());
        // The same question, and what was said until the next one.
        let same = |line: &&Line| {
            line.from_engine
                && line.kind() == frame.header.kind
                && (line.kind() == Kind::HELLO || line.frame().payload == frame.payload)
        };
        let asked = script.iter().position(|line| same(&line));
        let answers = asked.map_or(&[][..], |at| &script[at + 1..]);
        for answer in answers.iter().take_while(|line| !line.from_engine) {
            let mut files = Vec::new();
            if answer.kind() == Kind::WELCOME {
                let connected = UnixStream::connect(behind).unwrap();
                send(&connected, &said.bytes, &[]);
                files = receive(&connected).unwrap().1;
                real = Some(connected);
            }
            let mut bytes = answer.bytes.clone();
            if !answer.is_unasked() && answer.kind() != Kind::WELCOME {
                bytes[8..12].copy_from_slice(&said.bytes[8..12]); // The tag.
            }
            send(stream, &change(bytes), &files);
        }
    }
    drop(real);
}

/// The role in a Hello.
pub(crate) fn role(line: &Line) -> Option<Role> {
    match ToDaemon::decode(line.frame()) {
        Ok(Some(ToDaemon::Hello(hello))) => Some(hello.role),
        _ => None,
    }
}
