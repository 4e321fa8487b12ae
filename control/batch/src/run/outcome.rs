//! One request's result: a line of the output or of the error file, in OpenAI's format.

use bytes::Bytes;
use serde_json::json;

use crate::blobs::Piece;
use crate::run::answer::Answer;
use crate::run::line_ends::escaped;
use crate::run::memory::Memory;
use crate::run::retry::Verdict;
use crate::state::Usage;
use crate::store::Stream;

/// A result that waits to be recorded.
#[derive(Debug)]
pub(super) struct Outcome {
    /// Number of the input line.
    pub(super) line: u32,
    pub(super) stream: Stream,
    pub(super) usage: Usage,
    /// Whether it was not asked for because the window had ended.
    pub(super) expired: bool,
    /// The result's line, with its line feed.
    pub(super) text: Vec<Piece>,
    /// Its share of the memory for requests in flight, given back once it is recorded.
    pub(super) memory: Option<Memory>,
}

/// A result without an answer.
#[derive(Clone, Copy, Debug)]
pub(super) struct Unanswered<'a> {
    pub(super) code: &'a str,
    pub(super) message: &'a str,
}

impl Outcome {
    /// The upstream has answered, well or not.
    pub(super) fn answered(id: &str, custom_id: &str, line: u32, answer: Answer) -> Outcome {
        let request_id = answer.request_id.as_deref().unwrap_or(id);
        let head = escaped(format!(
            r#"{{"id":{},"custom_id":{},"response":{{"status_code":{},"request_id":{},"body":"#,
            json!(id),
            json!(custom_id),
            answer.status,
            json!(request_id),
        ));
        let ok = answer.verdict == Verdict::Success;
        const TAIL: &str = "},\"error\":null}\n";
        let text = match answer.body {
            // One piece is written faster than three.
            Piece::Memory(body) => {
                let mut text = head.into_bytes();
                text.reserve_exact(body.len() + TAIL.len());
                text.extend_from_slice(&body);
                text.extend_from_slice(TAIL.as_bytes());
                vec![Piece::Memory(Bytes::from(text))]
            }
            body => vec![
                Piece::Memory(Bytes::from(head)),
                body,
                Piece::Memory(Bytes::from_static(TAIL.as_bytes())),
            ],
        };
        Outcome {
            line,
            stream: if ok { Stream::Output } else { Stream::Error },
            usage: answer.usage,
            expired: false,
            text,
            memory: None,
        }
    }

    /// There is no answer.
    pub(super) fn unanswered(id: &str, custom_id: &str, line: u32, why: Unanswered<'_>) -> Outcome {
        let text = escaped(format!(
            "{{\"id\":{},\"custom_id\":{},\"response\":null,\"error\":{{\"code\":{},\"message\":{}}}}}\n",
            json!(id),
            json!(custom_id),
            json!(why.code),
            json!(why.message),
        ));
        Outcome {
            line,
            stream: Stream::Error,
            usage: Usage::default(),
            expired: false,
            text: vec![Piece::Memory(Bytes::from(text))],
            memory: None,
        }
    }

    pub(super) fn bytes(&self) -> u64 {
        self.text.iter().map(Piece::len).sum()
    }

    /// Memory that they take: buffers grow by powers of two, and long texts are in files.
    pub(super) fn memory_bytes(&self) -> u64 {
        let in_memory = self
            .text
            .iter()
            .filter(|piece| matches!(piece, Piece::Memory(_)));
        in_memory.map(|piece| 2 * piece.len()).sum()
    }
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;

    fn parsed(outcome: &Outcome) -> Value {
        let [Piece::Memory(text)] = outcome.text.as_slice() else {
            panic!("in memory");
        };
        let text = str::from_utf8(text).unwrap();
        let ends = ['\n', '\r', '\u{85}', '\u{2028}', '\u{2029}'];
        assert_eq!(text.matches(ends).count(), 1);
        serde_json::from_str(text).unwrap()
    }

    fn answer(status: u16) -> Answer {
        Answer {
            status,
            request_id: None,
            body: Piece::Memory(Bytes::from_static(b"{\"x\": 1}")),
            usage: Usage::default(),
            verdict: Verdict::of_status(status, false),
            retry_after: None,
        }
    }

    #[test]
    fn lines_have_openai_s_format_whatever_the_custom_id() {
        let name = "quote \" back \\ line \n end \u{1F600} \u{2028} \u{85}";
        let outcome = Outcome::answered("batch_req_1", name, 1, answer(200));
        assert_eq!(outcome.stream, Stream::Output);
        let expected = json!({"id": "batch_req_1", "custom_id": name, "error": null, "response":
            {"status_code": 200, "request_id": "batch_req_1", "body": {"x": 1}}});
        assert_eq!(parsed(&outcome), expected);
    }

    #[test]
    fn a_refusal_by_the_upstream_goes_to_the_error_file_with_its_response() {
        let outcome = Outcome::answered("batch_req_1", "a", 1, answer(400));
        assert_eq!(outcome.stream, Stream::Error);
        let line = parsed(&outcome);
        assert_eq!(line["error"], Value::Null);
        assert_eq!(line["response"]["status_code"], 400);
    }

    #[test]
    fn without_an_answer_the_response_is_null() {
        let why = Unanswered {
            code: "batch_expired",
            message: "late",
        };
        let line = parsed(&Outcome::unanswered("batch_req_1", "a", 1, why));
        assert_eq!(line["response"], Value::Null);
        assert_eq!(
            line["error"],
            json!({"code": "batch_expired", "message": "late"})
        );
    }
}
