//! What went over the connections of an engine, a frame a line.
//!
//! ```text
//! 0> Hello 81000000010000…      the engine's first connection, from the engine
//! 0< Welcome 6e000000810000…    the same, from the daemon
//! ```

use std::fmt::Write as _;

use kvtide_model::wire::{Frame, Header, Kind, LONGEST_FRAME};

/// One frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Line {
    /// The engine's connections in the order in which they were made.
    pub(crate) connection: usize,
    pub(crate) from_engine: bool,
    /// The whole frame.
    pub(crate) bytes: Vec<u8>,
}

impl Line {
    pub(crate) fn frame(&self) -> Frame<'_> {
        let (head, payload) = self.bytes.split_first_chunk().unwrap();
        let header = Header::decode(*head, LONGEST_FRAME).unwrap();
        Frame { header, payload }
    }

    pub(crate) fn kind(&self) -> Kind {
        self.frame().header.kind
    }

    /// Whether it comes when it comes, and answers nothing.
    pub(crate) fn is_unasked(&self) -> bool {
        [Kind::COUNTS, Kind::EVENTS].contains(&self.kind())
    }
}

/// All frames of a file.
pub(crate) fn read(text: &str) -> Vec<Line> {
    let lines = text
        .lines()
        .filter(|line| !line.is_empty() && !line.starts_with('#'));
    lines
        .map(|line| {
            let [place, kind, digits] = line.split(' ').collect::<Vec<_>>()[..] else {
                panic!("{line:?}: a place, a kind and bytes");
            };
            let (connection, direction) = place.split_at(place.len() - 1);
            let pairs = digits.as_bytes().chunks(2);
            let byte = |pair| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap();
            let line = Line {
                connection: connection.parse().unwrap(),
                from_engine: direction == ">",
                bytes: pairs.map(byte).collect(),
            };
            assert_eq!(line.kind().to_string(), kind, "of the frame's own kind");
            line
        })
        .collect()
}

/// The opposite.
pub(crate) fn write(lines: &[Line]) -> String {
    let mut text = String::new();
    for line in lines {
        let direction = if line.from_engine { '>' } else { '<' };
        write!(text, "{}{direction} {} ", line.connection, line.kind()).unwrap();
        line.bytes
            .iter()
            .for_each(|byte| write!(text, "{byte:02x}").unwrap());
        text.push('\n');
    }
    text
}
