//! What an answer's body says that matters here: what was used, and whether it is an error.

use std::fs::File;
use std::io::{BufReader, Seek, SeekFrom};

use serde::Deserialize;
use serde::de::{DeserializeOwned, IgnoredAny, MapAccess};

use super::MEMORY_BYTES;
use super::structure::Structure;
use crate::input::Object;
use crate::run::lenient::{Lenient, Value, fields};
use crate::state::Usage;

/// Bytes of a string beyond which it is none of those that matter: names of fields and an error's code.
const STRING_BYTES_MAX: usize = 1 << 10;

/// What matters in an answer's body.
#[derive(Default)]
pub(super) struct Seen {
    pub(super) usage: Usage,
    /// The error that it tells of instead of a result.
    pub(super) fault: Option<Fault>,
}

/// An error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fault {
    /// No tokens are left to be bought.
    QuotaEnded,
    /// One with an HTTP status of its own, from 400 to 599.
    Status(u16),
    /// Any other.
    Other,
}

/// The parts of a body that are read, whichever endpoint it is from. Whatever else is there, and
/// however much, is passed over.
#[derive(Deserialize)]
struct Root {
    #[serde(default)]
    usage: Lenient<Counts>,
    #[serde(default)]
    error: Lenient<Problem>,
    /// The other form that errors have: {"object": "error", "message": …, "code": …}.
    #[serde(default)]
    object: Lenient<IsError>,
    #[serde(default)]
    code: Lenient<Code>,
}

#[derive(Default, Deserialize)]
struct Counts {
    #[serde(default)]
    prompt_tokens: Lenient<u64>,
    #[serde(default)]
    input_tokens: Lenient<u64>,
    #[serde(default)]
    completion_tokens: Lenient<u64>,
    #[serde(default)]
    output_tokens: Lenient<u64>,
    #[serde(default)]
    total_tokens: Lenient<u64>,
    #[serde(default)]
    prompt_tokens_details: Lenient<Details>,
    #[serde(default)]
    input_tokens_details: Lenient<Details>,
    #[serde(default)]
    completion_tokens_details: Lenient<Details>,
    #[serde(default)]
    output_tokens_details: Lenient<Details>,
}

#[derive(Default, Deserialize)]
struct Details {
    #[serde(default)]
    cached_tokens: Lenient<u64>,
    #[serde(default)]
    reasoning_tokens: Lenient<u64>,
}

/// `error`, be it an object with one of these or a text.
#[derive(Default, Deserialize)]
struct Problem {
    #[serde(default)]
    code: Lenient<Code>,
    #[serde(default)]
    message: Lenient<Said>,
    #[serde(default, rename = "type")]
    kind: Lenient<Said>,
}

/// What an error's code is.
#[derive(Clone, Copy)]
struct Code(Fault);

/// Whether something is said.
struct Said;

/// Whether an object calls itself an error.
struct IsError;

impl Value for Code {
    fn number(code: u64) -> Option<Code> {
        Some(Code(match u16::try_from(code) {
            Ok(status @ 400..=599) => Fault::Status(status),
            _ => Fault::Other,
        }))
    }

    fn text(code: &str) -> Option<Code> {
        match code {
            "" => None,
            "insufficient_quota" => Some(Code(Fault::QuotaEnded)),
            _ => Code::number(code.parse().unwrap_or(0)),
        }
    }
}

impl Value for Said {
    fn text(text: &str) -> Option<Said> {
        (!text.is_empty()).then_some(Said)
    }
}

impl Value for IsError {
    fn text(object: &str) -> Option<IsError> {
        (object == "error").then_some(IsError)
    }
}

impl Problem {
    fn fault(&self) -> Option<Fault> {
        let is_told = self.message.0.is_some() || self.kind.0.is_some();
        let code = self.code.0.map(|code| code.0);
        code.or(is_told.then_some(Fault::Other))
    }
}

impl Value for Counts {
    fn object<'de, A: MapAccess<'de>>(map: A) -> Result<Option<Counts>, A::Error> {
        fields(map)
    }
}

impl Value for Details {
    fn object<'de, A: MapAccess<'de>>(map: A) -> Result<Option<Details>, A::Error> {
        fields(map)
    }
}

impl Value for Problem {
    fn text(message: &str) -> Option<Problem> {
        Said::text(message).map(|said| Problem {
            message: Lenient(Some(said)),
            ..Problem::default()
        })
    }

    fn object<'de, A: MapAccess<'de>>(map: A) -> Result<Option<Problem>, A::Error> {
        fields(map)
    }
}

impl Root {
    fn seen(self) -> Seen {
        let counts = self.usage.0.unwrap_or_default();
        let input = counts.prompt_tokens.0.or(counts.input_tokens.0);
        let output = counts.completion_tokens.0.or(counts.output_tokens.0);
        let (input, output) = (input.unwrap_or(0), output.unwrap_or(0));
        let code = self.code.0.map_or(Fault::Other, |code| code.0);
        let fault = self.object.0.map(|IsError| code);
        let prompt = counts.prompt_tokens_details.0.unwrap_or_default();
        let prompt = prompt.or(counts.input_tokens_details.0);
        let completion = counts.completion_tokens_details.0.unwrap_or_default();
        let completion = completion.or(counts.output_tokens_details.0);
        Seen {
            usage: Usage {
                input_tokens: input,
                cached_tokens: prompt.cached_tokens.0.unwrap_or(0),
                output_tokens: output,
                reasoning_tokens: completion.reasoning_tokens.0.unwrap_or(0),
                total_tokens: counts
                    .total_tokens
                    .0
                    .unwrap_or(input.saturating_add(output)),
            },
            fault: fault.or_else(|| self.error.0.and_then(|error| error.fault())),
        }
    }
}

impl Details {
    fn or(self, other: Option<Details>) -> Details {
        let other = other.unwrap_or_default();
        Details {
            cached_tokens: Lenient(self.cached_tokens.0.or(other.cached_tokens.0)),
            reasoning_tokens: Lenient(self.reasoning_tokens.0.or(other.reasoning_tokens.0)),
        }
    }
}

pub(super) fn look(body: &[u8]) -> Result<Seen, String> {
    let text = str::from_utf8(body).map_err(|error| error.to_string())?;
    match serde_json::from_str::<Object<Root>>(text) {
        Ok(Object(root)) => Ok(root.seen()),
        // JSON, perhaps, but no object: there is nothing in it to look at.
        Err(error) if error.is_data() => serde_json::from_str::<IgnoredAny>(text)
            .map(|_| Seen::default())
            .map_err(|error| error.to_string()),
        Err(error) => Err(error.to_string()),
    }
}

/// The same for a file, in two passes that hold no more of it than a buffer. The first only sees whether
/// it is JSON. In the second, strings that are longer than any that matters are cut short.
pub(super) fn look_at_file(file: &File) -> Result<Seen, String> {
    if let Err(error) = read_file::<IgnoredAny>(file, usize::MAX)? {
        return Err(error.to_string());
    }
    Ok(match read_file::<Object<Root>>(file, STRING_BYTES_MAX)? {
        Ok(Object(root)) => root.seen(),
        // No object: there is nothing in it to look at.
        Err(_) => Seen::default(),
    })
}

fn read_file<T: DeserializeOwned>(
    mut file: &File,
    string_bytes_max: usize,
) -> Result<serde_json::Result<T>, String> {
    file.seek(SeekFrom::Start(0)).map_err(|e| e.to_string())?;
    let structure = Structure::new(file, string_bytes_max);
    let reader = BufReader::with_capacity(MEMORY_BYTES, structure);
    Ok(serde_json::from_reader(reader))
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn file(body: &[u8]) -> File {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(body).unwrap();
        file
    }

    #[test]
    fn usage_is_read_in_both_of_openai_s_spellings() {
        let chat = br#"{"usage": {"prompt_tokens": 5, "completion_tokens": 7, "total_tokens": 12,
            "prompt_tokens_details": {"cached_tokens": 4},
            "completion_tokens_details": {"reasoning_tokens": 3}}}"#;
        let responses = br#"{"usage": {"input_tokens": 5, "output_tokens": 7,
            "input_tokens_details": {"cached_tokens": 4},
            "output_tokens_details": {"reasoning_tokens": 3}}}"#;
        let expected = Usage {
            input_tokens: 5,
            cached_tokens: 4,
            output_tokens: 7,
            reasoning_tokens: 3,
            total_tokens: 12,
        };
        for body in [&chat[..], responses] {
            assert_eq!(look(body).unwrap().usage, expected);
            assert_eq!(look_at_file(&file(body)).unwrap().usage, expected);
        }
        for odd in [
            &b"[1]"[..],
            b"[1, 2, 3]",
            b"[{}, {\"code\": \"insufficient_quota\"}]",
            b"[]",
            b"{}",
            b"{\"error\": 1, \"error\": 2}",
            b"{\"error\": null, \"object\": \"response\", \"code\": 500}",
            b"{\"error\": {}}",
            b"{\"error\": \"\"}",
            b"{\"usage\": null}",
            b"{\"usage\": {\"prompt_tokens\": -1.5}}",
            b"\"text\"",
        ] {
            for seen in [look(odd), look_at_file(&file(odd))] {
                let seen = seen.unwrap();
                assert_eq!(seen.usage, Usage::default());
                assert_eq!(seen.fault, None);
            }
        }
        for broken in [
            &b""[..],
            b"{",
            b"<html>",
            b"[1",
            b"[\"\xff\"]",
            b"{\"a\": \"\xff\"}",
        ] {
            assert!(look(broken).is_err());
            assert!(look_at_file(&file(broken)).is_err());
        }
    }

    #[test]
    fn a_quota_that_has_ended_is_told_from_one_that_comes_back() {
        let ended = br#"{"error": {"code": "insufficient_quota"}}"#;
        assert_eq!(look(ended).unwrap().fault, Some(Fault::QuotaEnded));
        let slow = br#"{"error": {"code": "rate_limit_exceeded"}}"#;
        assert_eq!(look(slow).unwrap().fault, Some(Fault::Other));
    }

    #[test]
    fn an_error_is_recognised_in_all_its_forms() {
        for (body, fault) in [
            (
                r#"{"error": {"message": "m", "type": "t", "code": null}}"#,
                Fault::Other,
            ),
            (
                r#"{"error": {"message": "m", "code": 400}}"#,
                Fault::Status(400),
            ),
            (r#"{"error": {"code": "429"}}"#, Fault::Status(429)),
            (r#"{"error": {"type": "t", "code": 7}}"#, Fault::Other),
            (r#"{"error": "out of memory"}"#, Fault::Other),
            (
                r#"{"object": "error", "message": "m", "code": 503}"#,
                Fault::Status(503),
            ),
            (r#"{"object": "error", "message": "m"}"#, Fault::Other),
        ] {
            assert_eq!(look(body.as_bytes()).unwrap().fault, Some(fault), "{body}");
            let seen = look_at_file(&file(body.as_bytes())).unwrap();
            assert_eq!(seen.fault, Some(fault), "{body}");
        }
    }

    #[test]
    fn what_is_too_long_for_its_place_is_passed_over_and_the_rest_is_read() {
        let long = "x".repeat(5_000_000);
        for body in [
            format!(r#"{{"usage": {{"prompt_tokens": "{long}", "output_tokens": 7}}}}"#),
            format!(r#"{{"usage": {{"{long}": 1, "output_tokens": 7}}}}"#),
            format!(r#"{{"{long}": 1, "usage": {{"output_tokens": 7}}}}"#),
            format!(r#"{{"text": "{long}", "usage": {{"output_tokens": 7}}, "error": "{long}"}}"#),
            format!(r#"{{"error": {{"code": "{long}"}}, "usage": {{"output_tokens": 7}}}}"#),
        ] {
            let seen = look_at_file(&file(body.as_bytes())).unwrap();
            assert_eq!(seen.usage.output_tokens, 7);
            assert_ne!(seen.fault, Some(Fault::QuotaEnded));
        }
    }

    #[test]
    fn what_is_cut_short_between_the_halves_of_a_character_is_read_all_the_same() {
        for before in STRING_BYTES_MAX - 13..STRING_BYTES_MAX + 2 {
            let long = "x".repeat(before) + r"\ud83d\ude00" + &"x".repeat(99);
            for body in [
                format!(r#"{{"{long}": 1, "usage": {{"output_tokens": 7}}}}"#),
                format!(r#"{{"error": {{"code": "{long}"}}, "usage": {{"output_tokens": 7}}}}"#),
            ] {
                let seen = look_at_file(&file(body.as_bytes())).unwrap();
                assert_eq!(seen.usage.output_tokens, 7, "{before}");
            }
        }
    }

    #[test]
    fn what_is_cut_short_must_be_json_all_the_same() {
        let long = "x".repeat(1_000_000);
        for broken in [
            format!(r#"{{"usage": "{long}\q"}}"#),
            format!("{{\"usage\": \"{long}\u{1}\"}}"),
            format!(r#"{{"usage": "{long}"#),
            format!(r#"{{"usage": "{long}"}}}}"#),
            "[".repeat(1_000_000) + &"]".repeat(1_000_000),
        ] {
            assert!(look_at_file(&file(broken.as_bytes())).is_err());
        }
    }
}
