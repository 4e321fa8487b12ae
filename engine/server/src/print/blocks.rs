//! `kvtide inspect`.

use std::fmt::Write as _;

use super::status::short;
use super::table::table;
use super::units::{plain, size};
use crate::ask::MOST_BLOCKS;
use crate::node::{Block, Inspection};

/// Blocks.
#[must_use]
pub fn inspection(inspection: &Inspection) -> String {
    let row = |block: &Block| {
        vec![
            plain(&block.key),
            short(&block.namespace),
            plain(&block.tier),
            plain(&block.state),
            block.slot.to_string(),
            block.generation.to_string(),
            block.pins.to_string(),
            size(block.bytes).to_string(),
        ]
    };
    if inspection.blocks.is_empty() {
        return "no such blocks\n".to_owned();
    }
    let head = [
        "KEY",
        "NAMESPACE",
        "TIER",
        "STATE",
        "SLOT",
        "GENERATION",
        "READERS",
        "SIZE",
    ];
    let rows: Vec<_> = inspection.blocks.iter().map(row).collect();
    let mut text = table(&head, &head[4..], &rows);
    if inspection.more > 0 {
        let more = inspection.more;
        // Writing to a String does not fail.
        let _ = writeln!(text, "and {more} more; --limit shows up to {MOST_BLOCKS}");
    }
    text
}
