//! A reader that passes on what a JSON parser needs to find its way, and little of what the parser would
//! hold in memory while it does: long strings are cut short, and deep nesting is refused. The text is
//! also checked for being UTF-8, since the parser does not look into strings that it skips.

use std::io::{self, Read};

/// Lists and objects within each other. The parser keeps a byte for each.
const DEPTH_MAX: usize = 16 << 10;

/// See the module's documentation.
pub(super) struct Structure<R> {
    source: R,
    utf8: Utf8,
    string_bytes_max: usize,
    depth: usize,
    place: Place,
    /// Bytes of the string so far.
    string_bytes: usize,
    /// Whether the character, or what a backslash begins, is passed on.
    keeping: bool,
    /// The number that the hexadecimal digits so far make.
    unit: u32,
    /// Whether that which has just ended is the first half of a character in UTF-16 (`\ud83d`).
    half: bool,
}

/// Where in the text the next byte is.
#[derive(Clone, Copy)]
enum Place {
    Outside,
    String,
    /// Behind a backslash in a string.
    Escape,
    /// Before so many hexadecimal digits.
    Digits(u8),
}

impl<R> Structure<R> {
    /// Reads `source`. Of its strings about so many bytes are passed on; what is cut off is not checked.
    pub(super) fn new(source: R, string_bytes_max: usize) -> Structure<R> {
        Structure {
            source,
            utf8: Utf8::default(),
            string_bytes_max,
            depth: 0,
            place: Place::Outside,
            string_bytes: 0,
            keeping: true,
            unit: 0,
            half: false,
        }
    }

    /// Whether a byte is passed on.
    fn keeps(&mut self, byte: u8) -> io::Result<bool> {
        let before = self.string_bytes;
        self.string_bytes = before.saturating_add(1);
        self.place = match (self.place, byte) {
            (Place::Outside, b'"') => {
                self.string_bytes = 0;
                self.half = false;
                Place::String
            }
            (Place::Outside, _) => {
                self.nest(byte)?;
                Place::Outside
            }
            (Place::String, b'"') => {
                self.keeping = true;
                Place::Outside
            }
            (Place::String, _) => {
                let begins = !(0x80..0xc0).contains(&byte);
                if begins {
                    // To a parser, half a character is an error.
                    let other_half = std::mem::take(&mut self.half) && byte == b'\\';
                    self.keeping = before < self.string_bytes_max || (self.keeping && other_half);
                }
                if byte == b'\\' {
                    Place::Escape
                } else {
                    Place::String
                }
            }
            (Place::Escape, b'u') => {
                self.unit = 0;
                Place::Digits(4)
            }
            (Place::Escape, _) => Place::String,
            (Place::Digits(left), _) => {
                let digit = char::from(byte).to_digit(16).unwrap_or(0);
                self.unit = self.unit << 4 | digit;
                if left > 1 {
                    Place::Digits(left - 1)
                } else {
                    self.half = (0xd800..0xdc00).contains(&self.unit);
                    Place::String
                }
            }
        };
        Ok(self.keeping)
    }

    fn nest(&mut self, byte: u8) -> io::Result<()> {
        match byte {
            b'[' | b'{' => self.depth += 1,
            b']' | b'}' => self.depth = self.depth.saturating_sub(1),
            _ => {}
        }
        if self.depth > DEPTH_MAX {
            return Err(io::Error::other("it is nested too deeply"));
        }
        Ok(())
    }
}

impl<R: Read> Read for Structure<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            let read = self.source.read(buffer)?;
            self.utf8
                .check(&buffer[..read], read == 0 && !buffer.is_empty())?;
            let mut kept = 0;
            for at in 0..read {
                let byte = buffer[at];
                if self.keeps(byte)? {
                    buffer[kept] = byte;
                    kept += 1;
                }
            }
            // Nothing kept of what was read is not the end.
            if kept > 0 || read == 0 {
                return Ok(kept);
            }
        }
    }
}

/// Whether bytes that come piece by piece are UTF-8.
#[derive(Default)]
struct Utf8 {
    /// The beginning of a character whose end has not come yet.
    tail: Vec<u8>,
}

impl Utf8 {
    fn check(&mut self, bytes: &[u8], is_end: bool) -> io::Result<()> {
        let mut pending = std::mem::take(&mut self.tail);
        pending.extend_from_slice(bytes);
        match str::from_utf8(&pending) {
            Ok(_) => Ok(()),
            Err(error) if error.error_len().is_none() && !is_end => {
                self.tail = pending.split_off(error.valid_up_to());
                Ok(())
            }
            Err(_) => Err(io::Error::other("it is not UTF-8")),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;

    struct Slow<'a>(&'a [u8], usize);
    impl Read for Slow<'_> {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            let count = self.0.len().min(self.1).min(buffer.len());
            buffer[..count].copy_from_slice(&self.0[..count]);
            self.0 = &self.0[count..];
            Ok(count)
        }
    }

    fn passed(bytes: &[u8], step: usize, string_bytes_max: usize) -> io::Result<Vec<u8>> {
        let mut out = Vec::new();
        Structure::new(Slow(bytes, step), string_bytes_max).read_to_end(&mut out)?;
        Ok(out)
    }

    #[test]
    fn characters_may_be_cut_anywhere_but_must_be_characters() {
        let read = |bytes: &[u8]| passed(bytes, 1, usize::MAX);
        assert_eq!(read("aé€😀".as_bytes()).unwrap(), "aé€😀".as_bytes());
        assert!(read(b"a\xffb").is_err());
        assert!(read(&"€".as_bytes()[..2]).is_err(), "cut off at the end");
    }

    #[test]
    fn strings_are_cut_short_and_nothing_else_is() {
        for step in [1, 7, 1000] {
            for (text, expected) in [
                (
                    r#"{"abcdef": [12345678, "abc", true]}"#,
                    r#"{"abc": [12345678, "abc", true]}"#,
                ),
                (r#"["a\"b\"c", "\\\\\\"]"#, r#"["a\"", "\\\\"]"#),
                (r#"["ab\u20acd"]"#, r#"["ab\u20ac"]"#),
                // A character in two halves is one character.
                (r#"["a\ud83d\ude00b"]"#, r#"["a\ud83d\ude00"]"#),
                (r#"["ab\uD83D\uDE00"]"#, r#"["ab\uD83D\uDE00"]"#),
                (r#"["abc\ud83d\ude00"]"#, r#"["abc"]"#),
                (r#"["ab\ud83d", "\n\n\n"]"#, r#"["ab\ud83d", "\n\n"]"#),
                (r#"["ab\ud83d€\n"]"#, r#"["ab\ud83d"]"#),
                (r#"["ab€d"]"#, r#"["ab€"]"#),
                (r#"["a[[["]"#, r#"["a[["]"#),
            ] {
                let out = passed(text.as_bytes(), step, 3).unwrap();
                assert_eq!(str::from_utf8(&out).unwrap(), expected);
            }
        }
    }

    #[test]
    fn a_string_however_long_takes_no_memory() {
        let text = json!({"a": "x".repeat(3_000_000), "b": 7}).to_string();
        let out = passed(text.as_bytes(), 4096, 100).unwrap();
        assert_eq!(out.len(), text.len() - 3_000_000 + 100);
    }

    #[test]
    fn what_is_nested_too_deeply_is_refused() {
        let deep = |depth: usize| "[".repeat(depth) + &"]".repeat(depth);
        assert!(passed(deep(DEPTH_MAX).as_bytes(), 4096, 9).is_ok());
        assert!(passed(deep(DEPTH_MAX + 1).as_bytes(), 4096, 9).is_err());
        let broad = "[]".repeat(DEPTH_MAX + 1);
        assert!(passed(broad.as_bytes(), 4096, 9).is_ok());
    }

    fn any_json() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<i64>().prop_map(Value::from),
            "\\PC{0,9}".prop_map(Value::from),
            r#"[\\"\[{a]{0,9}"#.prop_map(Value::from),
        ];
        leaf.prop_recursive(4, 32, 5, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..5).prop_map(Value::from),
                prop::collection::vec(("\\PC{0,9}", inner), 0..5)
                    .prop_map(|pairs| Value::Object(pairs.into_iter().collect())),
            ]
        })
    }

    /// As text, with nothing in its strings.
    fn emptied(value: &Value) -> String {
        match value {
            Value::String(_) => "\"\"".to_owned(),
            Value::Array(items) => {
                let items: Vec<String> = items.iter().map(emptied).collect();
                format!("[{}]", items.join(","))
            }
            Value::Object(fields) => {
                let field = |value| format!("\"\":{}", emptied(value));
                let fields: Vec<String> = fields.values().map(field).collect();
                format!("{{{}}}", fields.join(","))
            }
            other => other.to_string(),
        }
    }

    proptest! {
        #[test]
        fn what_is_short_enough_is_passed_on_as_it_is(value in any_json(), step in 1usize..40) {
            let text = value.to_string();
            let out = passed(text.as_bytes(), step, usize::MAX).unwrap();
            prop_assert_eq!(out, text.as_bytes());
        }

        #[test]
        fn strings_whatever_is_in_them_end_where_they_end(value in any_json(), step in 1usize..40) {
            let out = passed(value.to_string().as_bytes(), step, 0).unwrap();
            prop_assert_eq!(String::from_utf8(out).unwrap(), emptied(&value));
        }
    }
}
