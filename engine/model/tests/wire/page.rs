//! What `docs/wire.md` says of the format is so.

use kvtide_model::wire::{Count, Hello, Kind, LONGEST_FRAME, RefusalCode, Refused, Welcome};

use crate::recorded::recorded;

const PAGE: &str = include_str!("../../../../docs/wire.md");

/// Longest text of every field that has one, by message and field.
const LONGEST: [(&str, &str, usize); 7] = [
    ("Hello", "engine_id", Hello::LONGEST_ENGINE_ID),
    ("Hello", "client", Hello::LONGEST_CLIENT),
    ("Hello", "model", Hello::LONGEST_MODEL),
    ("Hello", "tenant", Hello::LONGEST_TENANT),
    ("Welcome", "server", Welcome::LONGEST_SERVER),
    ("Counts", "name", Count::LONGEST_NAME),
    ("Refused", "message", Refused::LONGEST_MESSAGE),
];

/// Heading and text of every section of a kind: ``### `0x0001` Hello``.
fn sections() -> Vec<(&'static str, &'static str, &'static str)> {
    let sections = PAGE.split("\n### `0x").skip(1);
    let parts = sections.map(|section| {
        let (number, rest) = section.split_once("` ").expect("a number and a name");
        let (name, text) = rest.split_once('\n').expect("a heading and a text");
        let text = text.split("\n## ").next().unwrap_or(text);
        (number, name, text)
    });
    parts.collect()
}

/// Cells of the tables' rows, without their heads.
fn rows(text: &'static str) -> Vec<Vec<&'static str>> {
    let lines = text.lines().filter(|line| line.starts_with('|'));
    let rows = lines.map(|line| line.split('|').map(str::trim).collect::<Vec<_>>());
    rows.map(|cells| cells[1..cells.len() - 1].to_vec())
        .skip_while(|cells| !cells[0].starts_with("---"))
        .skip(1)
        .collect()
}

#[test]
fn every_kind_has_a_section_with_its_number() {
    let said: Vec<(String, &str)> = sections()
        .into_iter()
        .map(|(number, name, _)| (number.to_owned(), name))
        .collect();
    let known: Vec<(String, &str)> = Kind::ALL
        .iter()
        .map(|(kind, name)| (format!("{:04x}", kind.number()), *name))
        .collect();
    assert_eq!(said, known);
}

#[test]
fn tables_have_the_fields_in_the_order_and_length_in_which_they_are_sent() {
    for (frame, (_, name, text)) in recorded().iter().zip(sections()) {
        assert_eq!(frame.name, name);
        let mut said: Vec<(&str, &str)> = Vec::new();
        for row in rows(text) {
            let field = row[0].trim_matches('`');
            if !said.contains(&(field, row[1])) {
                said.push((field, row[1]));
            }
        }
        let mut sent: Vec<&str> = Vec::new();
        for (field, bytes) in &frame.fields[4..] {
            if !sent.contains(field) {
                sent.push(field);
            }
            let Some((_, length)) = said.iter().find(|(other, _)| other == field) else {
                panic!("{name}: the page does not say what {field} is");
            };
            if let Ok(fixed) = length.parse::<usize>() {
                assert_eq!(fixed, bytes.len(), "{name}: {field}");
            } else if *length != "the rest" {
                let longest = LONGEST
                    .iter()
                    .find(|(of, text, _)| of == &name && text == field);
                let (_, _, longest) = longest.expect("a text with a bound");
                assert_eq!(*length, format!("2 + at most {longest}"), "{name}: {field}");
            }
        }
        let said: Vec<&str> = said.iter().map(|(field, _)| *field).collect();
        assert_eq!(said, sent, "{name}");
    }
}

#[test]
fn every_code_of_a_refusal_has_a_row() {
    let table = PAGE.split("| Code |").nth(1).expect("a table of codes");
    let table = table.split("\n\n").next().expect("its end");
    let said: Vec<(&str, &str)> = rows(table).iter().map(|row| (row[0], row[1])).collect();
    let known: Vec<(String, String)> = RefusalCode::ALL
        .iter()
        .map(|(code, name)| (code.number().to_string(), format!("`{name}`")))
        .collect();
    let known: Vec<(&str, &str)> = known.iter().map(|(a, b)| (&a[..], &b[..])).collect();
    assert_eq!(said, known);
}

#[test]
fn examples_are_the_recorded_frames() {
    let blocks: Vec<&str> = PAGE.split("```text\n").skip(1).collect();
    let recorded = recorded();
    let mut examples = 0;
    for block in blocks {
        let (text, _) = block.split_once("```").expect("the end of a block");
        let name = text.lines().next().unwrap_or("");
        if let Some(frame) = recorded.iter().find(|frame| frame.name == name) {
            assert_eq!(text, frame.text);
            examples += 1;
        }
    }
    assert!(examples > 0, "the page has no example");
}

#[test]
fn the_longest_frame_is_stated() {
    assert_eq!(LONGEST_FRAME, 8_388_608);
    assert!(PAGE.contains("8,388,608"));
}
