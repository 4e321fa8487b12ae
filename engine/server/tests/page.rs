//! The questions and answers that `docs/serve.md` shows are those of the code.
#![allow(clippy::unwrap_used, reason = "a failed step fails the test")]

use std::fs;

use kvtide_server::ask::{Answer, Ask};
use serde_json::Value;

/// The lines of the page's blocks of JSON.
fn blocks() -> Vec<Vec<Value>> {
    let page = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/serve.md");
    let page = fs::read_to_string(page).unwrap();
    let blocks = page.split("```json\n").skip(1);
    let lines = blocks.map(|block| block.split("```").next().unwrap().lines());
    let parsed = lines.map(|lines| {
        lines
            .map(|line| serde_json::from_str(line).unwrap())
            .collect()
    });
    parsed.collect()
}

#[test]
fn the_questions_of_the_page_are_those_that_are_asked() {
    for question in &blocks()[0] {
        let ask: Ask = serde_json::from_value(question.clone()).unwrap();
        assert_eq!(serde_json::to_value(ask).unwrap(), *question);
    }
}

#[test]
fn the_answers_of_the_page_are_those_that_are_given() {
    for shown in &blocks()[1] {
        let answer: Answer = serde_json::from_value(shown.clone()).unwrap();
        assert_eq!(serde_json::to_value(answer).unwrap(), *shown);
    }
}
