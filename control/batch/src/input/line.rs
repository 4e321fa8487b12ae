//! One line of an input file: `{"custom_id", "method", "url", "body"}`. Pure, and borrowing: the body
//! is looked at and never copied.

use std::borrow::Cow;

use serde::Deserialize;
use serde_json::error::Category;
use serde_json::value::RawValue;

use crate::endpoint::Endpoint;
use crate::input::object::Object;
use crate::input::prefix::Prefix;
use crate::input::{CUSTOM_ID_BYTES_MAX, LINE_BYTES_MAX, MODEL_BYTES_MAX};

/// Characters of a client's text that a message quotes: messages are kept with the batch.
const QUOTED_CHARS_MAX: usize = 100;

/// What lines are checked against.
#[derive(Clone, Copy, Debug)]
pub struct Rules {
    /// The batch's endpoint.
    pub endpoint: Endpoint,
    /// Whether one batch may name several models.
    pub mixed_models: bool,
}

/// What a checked line says.
#[derive(Debug)]
pub(super) struct Checked<'a> {
    pub(super) custom_id: Cow<'a, str>,
    pub(super) model: Cow<'a, str>,
    pub(super) prefix: Prefix,
    /// Inputs of an embedding request; 1 elsewhere.
    pub(super) inputs: u64,
}

/// What is wrong with a line.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Wrong {
    pub(super) code: &'static str,
    pub(super) param: Option<&'static str>,
    pub(super) message: String,
}

impl Wrong {
    pub(super) fn new(
        code: &'static str,
        param: Option<&'static str>,
        message: impl Into<String>,
    ) -> Wrong {
        Wrong {
            code,
            param,
            message: message.into(),
        }
    }
}

/// A request as it is sent: read again from a line that was found good.
#[derive(Debug, Deserialize)]
pub struct Request<'a> {
    /// The client's name for it.
    #[serde(borrow)]
    pub custom_id: Cow<'a, str>,
    /// The JSON object to send, byte for byte.
    #[serde(borrow)]
    pub body: &'a RawValue,
}

#[derive(Deserialize)]
struct Line<'a> {
    #[serde(borrow)]
    custom_id: Option<Cow<'a, str>>,
    #[serde(borrow)]
    method: Option<Cow<'a, str>>,
    #[serde(borrow)]
    url: Option<Cow<'a, str>>,
    #[serde(borrow)]
    body: Option<Object<Body<'a>>>,
}

/// The fields of all endpoints' bodies that matter here.
#[derive(Deserialize)]
struct Body<'a> {
    #[serde(borrow)]
    model: Option<Cow<'a, str>>,
    stream: Option<bool>,
    #[serde(borrow)]
    tools: Option<&'a RawValue>,
    #[serde(borrow)]
    instructions: Option<&'a RawValue>,
    #[serde(borrow)]
    messages: Option<&'a RawValue>,
    #[serde(borrow)]
    prompt: Option<&'a RawValue>,
    #[serde(borrow)]
    input: Option<&'a RawValue>,
}

/// The same line, where only its form as JSON is known: to say which field is wrong.
#[derive(Deserialize)]
struct Fields<'a> {
    #[serde(borrow)]
    custom_id: Option<&'a RawValue>,
    #[serde(borrow)]
    method: Option<&'a RawValue>,
    #[serde(borrow)]
    url: Option<&'a RawValue>,
    #[serde(borrow)]
    body: Option<&'a RawValue>,
}

/// Checks one line, which is not blank, all but what other lines decide.
pub(super) fn check<'a>(line: &'a [u8], rules: &Rules) -> Result<Checked<'a>, Wrong> {
    if line.len() > LINE_BYTES_MAX {
        return Err(too_long());
    }
    let text = str::from_utf8(line).map_err(|error| {
        let byte = error.valid_up_to() + 1;
        not_json(&format!("byte {byte} is not UTF-8"))
    })?;
    let Object(parsed): Object<Line<'a>> =
        serde_json::from_str(text).map_err(|error| explain(text, &error))?;
    let custom_id = parsed.custom_id.ok_or_else(|| missing("custom_id"))?;
    if custom_id.is_empty() || custom_id.len() > CUSTOM_ID_BYTES_MAX {
        let message = format!("custom_id must have 1 to {CUSTOM_ID_BYTES_MAX} bytes.");
        return Err(Wrong::new("invalid_custom_id", Some("custom_id"), message));
    }
    let method = parsed.method.ok_or_else(|| missing("method"))?;
    if method != "POST" {
        let message = format!("method must be \"POST\", not {}.", quoted(&method));
        return Err(Wrong::new("invalid_method", Some("method"), message));
    }
    let url = parsed.url.ok_or_else(|| missing("url"))?;
    if url != rules.endpoint.path() {
        let expected = rules.endpoint.path();
        let message = format!(
            "url must be the batch's endpoint {expected:?}, not {}.",
            quoted(&url)
        );
        return Err(Wrong::new("invalid_url", Some("url"), message));
    }
    let Object(body) = parsed.body.ok_or_else(|| missing("body"))?;
    check_body(custom_id, body, rules.endpoint)
}

fn check_body<'a>(
    custom_id: Cow<'a, str>,
    body: Body<'a>,
    endpoint: Endpoint,
) -> Result<Checked<'a>, Wrong> {
    if body.stream == Some(true) {
        let message = "Answers in a batch cannot be streamed: leave out \"stream\".";
        return Err(Wrong::new(
            "unsupported_parameter",
            Some("body.stream"),
            message,
        ));
    }
    let model = match body.model {
        Some(model) if !model.is_empty() => model,
        // OpenAI has a default model for moderation, and for nothing else.
        None if endpoint == Endpoint::Moderations => Cow::Borrowed(""),
        _ => return Err(missing("body.model")),
    };
    if model.len() > MODEL_BYTES_MAX {
        let message = format!("A model's name may have at most {MODEL_BYTES_MAX} bytes.");
        return Err(Wrong::new("invalid_body", Some("body.model"), message));
    }
    let inputs = match (endpoint, body.input) {
        (Endpoint::Embeddings, None) => return Err(missing("body.input")),
        (Endpoint::Embeddings, Some(input)) => count_inputs(input),
        _ => 1,
    };
    let content = body.messages.or(body.prompt).or(body.input);
    Ok(Checked {
        custom_id,
        model,
        prefix: Prefix::of(&[body.tools, body.instructions, content]),
        inputs,
    })
}

/// How many texts an embedding request has: a string, or a list of tokens, is one.
fn count_inputs(input: &RawValue) -> u64 {
    let Ok(items) = serde_json::from_str::<Vec<&RawValue>>(input.get()) else {
        return 1;
    };
    let is_token = |item: &&RawValue| item.get().starts_with(|c: char| c.is_ascii_digit());
    match items.first() {
        Some(first) if !is_token(first) => items.len() as u64,
        _ => 1,
    }
}

/// A client's text in quotation marks, cut where it is long.
pub(super) fn quoted(text: &str) -> String {
    let short = shortened(text);
    let more = if short.len() < text.len() { "…" } else { "" };
    format!("{short:?}{more}")
}

fn shortened(text: &str) -> &str {
    let cut = text.char_indices().nth(QUOTED_CHARS_MAX);
    cut.map_or(text, |(end, _)| &text[..end])
}

pub(super) fn too_long() -> Wrong {
    let message = format!("A line may have at most {LINE_BYTES_MAX} bytes.");
    Wrong::new("line_too_long", None, message)
}

fn missing(field: &'static str) -> Wrong {
    let message = format!("{field} is missing or null.");
    Wrong::new("missing_required_parameter", Some(field), message)
}

fn not_json(reason: &str) -> Wrong {
    let message = format!("The line is not a valid JSON object: {reason}.");
    Wrong::new("invalid_json_line", None, message)
}

fn malformed(error: &serde_json::Error) -> Wrong {
    not_json(&format!("{} at column {}", reason(error), error.column()))
}

/// What a parser says, without the place: every line is one line to it.
fn reason(error: &serde_json::Error) -> String {
    let text = error.to_string();
    let reason = text.split(" at line ").next().unwrap_or_default();
    // It may quote what it does not like.
    shortened(reason).to_owned()
}

/// Which field it was that has the wrong type.
fn explain(text: &str, error: &serde_json::Error) -> Wrong {
    if error.classify() != Category::Data || !text.trim_start().starts_with('{') {
        return malformed(error);
    }
    let fields = match serde_json::from_str::<Fields<'_>>(text) {
        Ok(fields) => fields,
        // It ends badly, or names a field twice.
        Err(error) => return malformed(&error),
    };
    let strings = [
        ("custom_id", "invalid_custom_id", fields.custom_id),
        ("method", "invalid_method", fields.method),
        ("url", "invalid_url", fields.url),
    ];
    for (name, code, value) in strings {
        if value.is_some_and(|value| !value.get().starts_with('"') && value.get() != "null") {
            return Wrong::new(code, Some(name), format!("{name} must be a string."));
        }
    }
    match fields.body {
        Some(body) if !body.get().starts_with('{') => {
            Wrong::new("invalid_body", Some("body"), "body must be a JSON object.")
        }
        _ => {
            let message = format!("A field of body cannot be used: {}.", reason(error));
            Wrong::new("invalid_body", Some("body"), message)
        }
    }
}

#[cfg(test)]
mod tests;
