use std::fmt::Write as _;

use proptest::prelude::*;

use super::*;
use crate::endpoint::Endpoint;

const RULES: Rules = Rules {
    endpoint: Endpoint::ChatCompletions,
    mixed_models: false,
};

fn request(id: &str, model: &str) -> String {
    format!(
        r#"{{"custom_id":"{id}","method":"POST","url":"/v1/chat/completions","body":{{"model":"{model}","messages":[]}}}}"#
    )
}

/// Gives at most `step` bytes at a time.
struct Slow<'a>(&'a [u8], usize);

impl Read for Slow<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.1.min(buffer.len()).min(self.0.len());
        buffer[..count].copy_from_slice(&self.0[..count]);
        self.0 = &self.0[count..];
        Ok(count)
    }
}

fn scanned(file: &[u8], rules: Rules) -> Scan {
    scan(file, rules, || true).unwrap()
}

fn good(file: &[u8]) -> Index {
    match scanned(file, RULES) {
        Scan::Good(index) => index,
        Scan::Bad(errors) => panic!("{errors:?}"),
    }
}

fn faults(file: &[u8], rules: Rules) -> Vec<(String, Option<u64>)> {
    match scanned(file, rules) {
        Scan::Good(_) => Vec::new(),
        Scan::Bad(errors) => errors.into_iter().map(|e| (e.code, e.line)).collect(),
    }
}

#[test]
fn what_an_editor_writes_before_a_text_is_no_part_of_its_first_line() {
    let a = request("a", "m");
    let file = [BYTE_ORDER_MARK, a.as_bytes(), b"\n"].concat();
    let entry = good(&file).entries[0];
    let begin = usize::try_from(entry.offset).unwrap();
    assert_eq!(&file[begin..begin + entry.bytes as usize], a.as_bytes());
    let later = [
        a.as_bytes(),
        b"\n",
        BYTE_ORDER_MARK,
        request("b", "m").as_bytes(),
    ]
    .concat();
    let expected = [("invalid_json_line".to_owned(), Some(2))];
    assert_eq!(faults(&later, RULES), expected);
    let alone = [("empty_file".to_owned(), None)];
    assert_eq!(faults(BYTE_ORDER_MARK, RULES), alone);
}

#[test]
fn every_line_is_found_where_it_lies_whatever_ends_it() {
    let (a, b, c) = (request("a", "m"), request("b", "m"), request("c", "m"));
    let file = format!("{a}\r\n\n  \n{b}\n{c}");
    let index = good(file.as_bytes());
    let found: Vec<(u32, &str)> = index
        .entries
        .iter()
        .map(|entry| {
            let begin = usize::try_from(entry.offset).unwrap();
            (entry.line, &file[begin..begin + entry.bytes as usize])
        })
        .collect();
    assert_eq!(found, [(1, &*format!("{a}\r")), (4, &*b), (5, &*c)]);
    assert_eq!(index.only_model(), Some("m"));
}

#[test]
fn faults_name_their_lines_at_the_front_in_the_middle_and_at_an_unfinished_end() {
    let good = request("a", "m");
    let file = format!(
        "oops\n{good}\n{}\n{}",
        request("a", "m"),
        &request("z", "m")[..40]
    );
    assert_eq!(
        faults(file.as_bytes(), RULES),
        [
            ("invalid_json_line".to_owned(), Some(1)),
            ("duplicate_custom_id".to_owned(), Some(3)),
            ("invalid_json_line".to_owned(), Some(4)),
        ]
    );
}

#[test]
fn a_second_model_is_refused_with_its_line_unless_models_may_be_mixed() {
    let file = format!("{}\n{}\n", request("a", "m"), request("b", "n"));
    assert_eq!(
        faults(file.as_bytes(), RULES),
        [("mismatched_model".to_owned(), Some(2))]
    );
    let mixed = Rules {
        mixed_models: true,
        ..RULES
    };
    match scanned(file.as_bytes(), mixed) {
        Scan::Good(index) => assert_eq!(index.models, ["m", "n"]),
        Scan::Bad(errors) => panic!("{errors:?}"),
    }
}

#[test]
fn a_file_without_requests_is_empty() {
    for file in ["", "\n", "\n\r\n   \n"] {
        assert_eq!(
            faults(file.as_bytes(), RULES),
            [("empty_file".to_owned(), None)]
        );
    }
}

#[test]
fn one_request_too_many_is_refused_and_the_last_that_is_allowed_is_not() {
    let mut file = String::new();
    for n in 0..REQUESTS_MAX {
        writeln!(file, "{}", request(&n.to_string(), "m")).unwrap();
    }
    assert_eq!(good(file.as_bytes()).entries.len(), REQUESTS_MAX as usize);
    writeln!(file, "{}", request("last", "m")).unwrap();
    assert_eq!(
        faults(file.as_bytes(), RULES),
        [("too_many_requests".to_owned(), None)]
    );
}

#[test]
fn a_line_that_is_too_long_is_named_and_the_lines_after_it_are_still_found() {
    let long = "x".repeat(LINE_BYTES_MAX * 2 + 5);
    let file = format!("{}\n{long}\nbad\n", request("a", "m"));
    let expected = [
        ("line_too_long".to_owned(), Some(2)),
        ("invalid_json_line".to_owned(), Some(3)),
    ];
    assert_eq!(faults(file.as_bytes(), RULES), expected);
}

#[test]
fn a_line_of_the_greatest_length_is_good() {
    let short = request("a", "m");
    let padding = " ".repeat(LINE_BYTES_MAX - short.len());
    let file = format!("{short}{padding}\n{}\n", request("b", "m"));
    assert_eq!(good(file.as_bytes()).entries.len(), 2);
    let file = format!("{short}{padding} \n{}\n", request("b", "m"));
    assert_eq!(
        faults(file.as_bytes(), RULES),
        [("line_too_long".to_owned(), Some(1))]
    );
}

#[test]
fn a_scan_can_be_stopped() {
    let stopped = scan(&b"x"[..], RULES, || false).unwrap_err();
    assert_eq!(stopped.kind(), io::ErrorKind::Interrupted);
}

#[test]
fn requests_are_grouped_by_model_and_by_what_their_prompts_begin_with() {
    let mut file = String::new();
    for n in 0..30 {
        let (model, system) = (
            ["m", "n"][n % 2],
            ["one ", "two ", "six "][n % 3].repeat(200),
        );
        let line = serde_json::json!({"custom_id": n.to_string(), "method": "POST",
            "url": "/v1/chat/completions",
            "body": {"model": model, "messages": [{"role": "system", "content": system},
                {"role": "user", "content": format!("question {n}")}]}});
        writeln!(file, "{line}").unwrap();
    }
    let rules = Rules {
        mixed_models: true,
        ..RULES
    };
    let Scan::Good(index) = scanned(file.as_bytes(), rules) else {
        panic!("a good file");
    };
    let groups = index.by_model_and_prefix();
    assert_eq!(groups.len(), 2);
    for (_, entries) in groups {
        let systems: Vec<u32> = entries.iter().map(|entry| (entry.line - 1) % 3).collect();
        let changes = systems.windows(2).filter(|pair| pair[0] != pair[1]).count();
        assert_eq!(changes, 2, "three prefixes, each in one run: {systems:?}");
    }
}

proptest! {
    #[test]
    fn it_does_not_matter_how_a_file_arrives(
        lines in prop::collection::vec(prop_oneof![
            Just(String::new()),
            "[a-z]{1,4}".prop_map(|id| request(&id, "m")),
            "[{}\"a:]{0,12}",
        ], 0..20),
        step in 1usize..70,
        feed in prop::bool::ANY,
    ) {
        let mut file = lines.join("\n").into_bytes();
        if feed {
            file.push(b'\n');
        }
        let whole = format!("{:?}", scan(&file[..], RULES, || true).unwrap());
        let slow = format!("{:?}", scan(Slow(&file, step), RULES, || true).unwrap());
        prop_assert_eq!(whole, slow);
    }
}
