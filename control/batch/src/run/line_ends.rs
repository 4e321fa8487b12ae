//! A result is one line to whoever reads it. Line feeds and carriage returns in JSON can only be white
//! space, and become spaces. U+0085, U+2028 and U+2029, at which many readers end a line too
//! (Python's `splitlines`), can only be in strings, and are escaped there. All else stays as it is.

use bytes::BytesMut;

/// The characters, as they stand and as they are escaped.
const CHARACTERS: [(&str, &str); 3] = [
    ("\u{85}", r"\u0085"),
    ("\u{2028}", r"\u2028"),
    ("\u{2029}", r"\u2029"),
];
/// Bytes of the longest.
const CHARACTER_BYTES_MAX: usize = 3;
/// What it grows to, for each of its bytes, if text consists of nothing else.
pub(super) const GROWTH_MAX: usize = 3;

/// Text that comes piece by piece.
#[derive(Debug, Default)]
pub(super) struct LineEnds {
    /// What may be the beginning of one of these characters.
    held: Vec<u8>,
}

impl LineEnds {
    /// The next piece, without line ends. What may be the beginning of one is held back.
    pub(super) fn flatten(&mut self, piece: &[u8], flat: &mut BytesMut) {
        let mut rest = piece;
        while let Some((&byte, after)) = rest.split_first() {
            if self.held.is_empty() {
                let plain = memchr::memchr2(0xc2, 0xe2, rest).unwrap_or(rest.len());
                push_plain(&rest[..plain], flat);
                rest = &rest[plain..];
                if let Some((&first, after)) = rest.split_first() {
                    self.held.push(first);
                    rest = after;
                }
                continue;
            }
            self.held.push(byte);
            let begins = |(text, _): &&(&str, &str)| text.as_bytes().starts_with(&self.held);
            match CHARACTERS.iter().find(begins) {
                Some((text, escaped)) if text.len() == self.held.len() => {
                    flat.extend_from_slice(escaped.as_bytes());
                    self.held.clear();
                    rest = after;
                }
                Some(_) => rest = after,
                // None of these after all; the byte itself may begin one.
                None => {
                    self.held.pop();
                    self.end(flat);
                }
            }
        }
    }

    /// No more comes: what was held back was no such character.
    pub(super) fn end(&mut self, flat: &mut BytesMut) {
        debug_assert!(self.held.len() < CHARACTER_BYTES_MAX);
        push_plain(&self.held, flat);
        self.held.clear();
    }
}

fn push_plain(bytes: &[u8], flat: &mut BytesMut) {
    let before = flat.len();
    flat.extend_from_slice(bytes);
    for byte in &mut flat[before..] {
        if matches!(byte, b'\n' | b'\r') {
            *byte = b' ';
        }
    }
}

/// JSON that was made here, in one line.
pub(super) fn escaped(json: String) -> String {
    CHARACTERS.iter().fold(json, |json, (text, escaped)| {
        if json.contains(text) {
            json.replace(text, escaped)
        } else {
            json
        }
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;

    const LINE_ENDS: [char; 5] = ['\n', '\r', '\u{85}', '\u{2028}', '\u{2029}'];

    fn flattened(text: &[u8], piece_bytes: usize) -> Vec<u8> {
        let (mut ends, mut flat) = (LineEnds::default(), BytesMut::new());
        for piece in text.chunks(piece_bytes.max(1)) {
            ends.flatten(piece, &mut flat);
        }
        ends.end(&mut flat);
        flat.to_vec()
    }

    #[test]
    fn all_else_stays_as_it_is() {
        for (text, flat) in [
            ("{\n\"a\": 1.50}\r\n", "{ \"a\": 1.50}  "),
            ("\u{84}\u{85}\u{86}", "\u{84}\\u0085\u{86}"),
            (
                "\u{2027}\u{2028}\u{2029}\u{202a}",
                "\u{2027}\\u2028\\u2029\u{202a}",
            ),
            ("é… ©\u{2028}\u{2028}", "é… ©\\u2028\\u2028"),
        ] {
            for bytes in 1..9 {
                assert_eq!(flattened(text.as_bytes(), bytes), flat.as_bytes());
            }
        }
        let no_text = b"\xe2\x80\xe2\x80\xa8\xc2\xc2\x85\xe2";
        let expected = b"\xe2\x80\\u2028\xc2\\u0085\xe2";
        for bytes in 1..9 {
            assert_eq!(flattened(no_text, bytes), expected);
        }
    }

    proptest! {
        #[test]
        fn it_is_one_line_and_says_the_same(
            text in "[\u{84}-\u{86}\u{2027}-\u{202a}a\n\\\\\"é]{0,40}",
            piece_bytes in 1usize..20,
        ) {
            let said = json!({"a": text});
            for json in [said.to_string(), serde_json::to_string_pretty(&said).unwrap()] {
                let flat = flattened(json.as_bytes(), piece_bytes);
                prop_assert!(flat.len() <= json.len() * GROWTH_MAX);
                let flat = String::from_utf8(flat).unwrap();
                prop_assert!(!flat.contains(LINE_ENDS));
                prop_assert_eq!(serde_json::from_str::<Value>(&flat).unwrap(), said.clone());
            }
            let ours = escaped(said.to_string());
            prop_assert!(!ours.contains(LINE_ENDS));
            prop_assert_eq!(serde_json::from_str::<Value>(&ours).unwrap(), said);
        }
    }
}
