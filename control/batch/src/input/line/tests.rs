use proptest::prelude::*;

use super::*;

const RULES: Rules = Rules {
    endpoint: Endpoint::ChatCompletions,
    mixed_models: false,
};

const GOOD: &str = r#"{"custom_id": "r-1", "method": "POST", "url": "/v1/chat/completions", "body": {"model": "m", "messages": []}}"#;

fn code(line: &str) -> (&'static str, Option<&'static str>) {
    let wrong = check(line.as_bytes(), &RULES).unwrap_err();
    assert!(!wrong.message.is_empty());
    (wrong.code, wrong.param)
}

#[test]
fn a_good_line_gives_its_name_and_model() {
    let checked = check(GOOD.as_bytes(), &RULES).unwrap();
    assert_eq!((&*checked.custom_id, &*checked.model), ("r-1", "m"));
    let request: Request<'_> = serde_json::from_str(GOOD).unwrap();
    assert_eq!(request.body.get(), r#"{"model": "m", "messages": []}"#);
}

#[test]
fn what_is_wrong_is_named_with_openai_s_code_and_the_field() {
    let swap = |from: &str, to: &str| {
        assert!(GOOD.contains(from));
        GOOD.replace(from, to)
    };
    let cases = [
        ("nonsense".to_owned(), "invalid_json_line", None),
        (GOOD[..GOOD.len() - 1].to_owned(), "invalid_json_line", None),
        (format!("{GOOD}{GOOD}"), "invalid_json_line", None),
        (format!("{GOOD},"), "invalid_json_line", None),
        (format!("\u{feff}{GOOD}"), "invalid_json_line", None),
        ("[1]".to_owned(), "invalid_json_line", None),
        ("null".to_owned(), "invalid_json_line", None),
        (
            r#"["a", "POST", "/v1/chat/completions", {"model": "m"}]"#.to_owned(),
            "invalid_json_line",
            None,
        ),
        (swap("\"m\"", "\"\\ud800\""), "invalid_json_line", None),
        (swap("[]", "[}"), "invalid_json_line", None),
        (
            swap("\"custom_id\": \"r-1\", ", ""),
            "missing_required_parameter",
            Some("custom_id"),
        ),
        (
            swap("\"r-1\"", "\"\""),
            "invalid_custom_id",
            Some("custom_id"),
        ),
        (swap("\"r-1\"", "7"), "invalid_custom_id", Some("custom_id")),
        (
            swap("r-1", &"x".repeat(CUSTOM_ID_BYTES_MAX + 1)),
            "invalid_custom_id",
            Some("custom_id"),
        ),
        (
            swap("\"method\": \"POST\", ", ""),
            "missing_required_parameter",
            Some("method"),
        ),
        (swap("POST", "GET"), "invalid_method", Some("method")),
        (swap("\"POST\"", "[]"), "invalid_method", Some("method")),
        (swap("chat/", ""), "invalid_url", Some("url")),
        (
            swap("\"/v1/chat/completions\"", "null"),
            "missing_required_parameter",
            Some("url"),
        ),
        (
            swap("\"model\": \"m\", ", ""),
            "missing_required_parameter",
            Some("body.model"),
        ),
        (
            swap("\"m\"", "\"\""),
            "missing_required_parameter",
            Some("body.model"),
        ),
        (swap("\"m\"", "1"), "invalid_body", Some("body")),
        (
            swap("[]}", "[], \"stream\": true}"),
            "unsupported_parameter",
            Some("body.stream"),
        ),
        (
            swap(r#"{"model": "m", "messages": []}"#, "[]"),
            "invalid_body",
            Some("body"),
        ),
        (
            swap(
                r#"{"model": "m", "messages": []}"#,
                r#"["m", false, null, null, [], null, null]"#,
            ),
            "invalid_body",
            Some("body"),
        ),
        (
            swap(r#"{"model": "m", "messages": []}"#, "null"),
            "missing_required_parameter",
            Some("body"),
        ),
    ];
    for (line, expected, param) in cases {
        assert_eq!(code(&line), (expected, param), "{line}");
    }
}

#[test]
fn a_field_that_is_there_twice_is_called_so_whatever_its_values_are() {
    for first in ["1", "\"/v1/chat/completions\"", "null"] {
        let line = GOOD.replacen('{', &format!("{{\"url\": {first}, "), 1);
        let wrong = check(line.as_bytes(), &RULES).unwrap_err();
        assert_eq!(wrong.code, "invalid_json_line");
        assert!(
            wrong.message.contains("duplicate field `url`"),
            "{}",
            wrong.message
        );
    }
}

#[test]
fn messages_quote_little_of_a_line_however_long_it_is() {
    let long = "é".repeat(1_000_000);
    let swap = |from: &str, to: &str| {
        assert!(GOOD.contains(from));
        GOOD.replace(from, to)
    };
    for (line, param) in [
        (swap("POST", &long), "method"),
        (swap("/v1/chat", &long), "url"),
        (swap("\"m\"", &format!("\"{long}\"")), "body.model"),
        (
            swap("[]}", &format!("[], \"stream\": \"{long}\"}}")),
            "body",
        ),
        (
            swap(r#"{"model": "m", "messages": []}"#, &format!("\"{long}\"")),
            "body",
        ),
    ] {
        let wrong = check(line.as_bytes(), &RULES).unwrap_err();
        assert_eq!(wrong.param, Some(param));
        assert!(wrong.message.len() < 400, "{}", wrong.message.len());
    }
}

#[test]
fn a_wrong_encoding_is_found_also_in_fields_that_nobody_reads() {
    let mut line = GOOD.replace("[]", "[], \"other\": \"?\"").into_bytes();
    let at = line.iter().position(|byte| *byte == b'?').unwrap();
    line[at] = 0xff;
    assert_eq!(check(&line, &RULES).unwrap_err().code, "invalid_json_line");
}

#[test]
fn embedding_inputs_are_counted_as_openai_counts_them() {
    let rules = Rules {
        endpoint: Endpoint::Embeddings,
        ..RULES
    };
    for (input, count) in [
        ("\"a\"", 1),
        ("[1, 2, 3]", 1),
        ("[]", 1),
        ("[\"a\", \"b\"]", 2),
        ("[[1, 2], [3], [4]]", 3),
    ] {
        let line = format!(
            r#"{{"custom_id":"a","method":"POST","url":"/v1/embeddings","body":{{"model":"m","input":{input}}}}}"#
        );
        assert_eq!(
            check(line.as_bytes(), &rules).unwrap().inputs,
            count,
            "{input}"
        );
    }
}

/// What is put in the place of what is cut out.
const SPICE: [&str; 24] = [
    "",
    "{",
    "}",
    "[",
    "]",
    "\"",
    "\\",
    ",",
    ":",
    " ",
    "null",
    "true",
    "7",
    "-",
    "\"\"",
    "{}",
    "[]",
    "\"body\"",
    "\"model\"",
    "\"stream\": true,",
    "\"url\": 1,",
    "\u{0}",
    "é",
    "\n",
];

fn damaged() -> impl Strategy<Value = String> {
    let cut = (
        any::<prop::sample::Index>(),
        0usize..12,
        prop::sample::select(&SPICE[..]),
    );
    prop::collection::vec(cut, 1..5).prop_map(|cuts| {
        let mut line: Vec<char> = GOOD.chars().collect();
        for (at, length, spice) in cuts {
            let begin = at.index(line.len() + 1);
            let end = line.len().min(begin + length);
            line.splice(begin..end, spice.chars());
        }
        line.into_iter().collect()
    })
}

proptest! {
    #[test]
    fn a_damaged_line_is_judged_as_another_parser_of_json_would(line in damaged()) {
        let parsed: Result<serde_json::Value, _> = serde_json::from_str(&line);
        match (check(line.as_bytes(), &RULES), parsed) {
            (Ok(checked), Ok(other)) => {
                prop_assert_eq!(&other["custom_id"], &*checked.custom_id);
                prop_assert_eq!(&other["body"]["model"], &*checked.model);
                prop_assert_eq!(&other["method"], "POST");
                prop_assert_eq!(&other["url"], RULES.endpoint.path());
                prop_assert_ne!(&other["body"]["stream"], true);
            }
            (Ok(_), Err(error)) => prop_assert!(false, "{} was found good: {}", line, error),
            (Err(wrong), Err(_)) => prop_assert_eq!(wrong.code, "invalid_json_line"),
            // What is JSON is called so, unless it is no object or names a field twice.
            (Err(wrong), Ok(other)) => prop_assert!(
                wrong.code != "invalid_json_line"
                    || !other.is_object()
                    || wrong.message.contains("duplicate field"),
                "{}: {}", line, wrong.message
            ),
        }
    }

    #[test]
    fn no_bytes_make_the_parser_fail_otherwise_than_by_an_answer(line in prop::collection::vec(any::<u8>(), 0..300)) {
        if let Err(wrong) = check(&line, &RULES) {
            prop_assert!(!wrong.code.is_empty());
        }
    }

    #[test]
    fn a_good_line_with_one_byte_changed_is_judged_and_what_is_good_can_be_sent(
        at in 0..GOOD.len(), byte in any::<u8>()
    ) {
        let mut line = GOOD.as_bytes().to_vec();
        line[at] = byte;
        if let Ok(checked) = check(&line, &RULES) {
            let request: Request<'_> = serde_json::from_slice(&line).expect("what was found good can be read again");
            let is_object = request.body.get().starts_with('{');
            prop_assert!(is_object);
            prop_assert_eq!(checked.custom_id, request.custom_id);
        }
    }

    #[test]
    fn every_custom_id_is_read_back_as_it_was_written(id in "\\PC{1,60}") {
        let line = serde_json::json!({"custom_id": id, "method": "POST", "url": "/v1/chat/completions",
            "body": {"model": "m"}}).to_string();
        let checked = check(line.as_bytes(), &RULES).unwrap();
        prop_assert_eq!(&*checked.custom_id, id.as_str());
    }
}
