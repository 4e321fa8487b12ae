//! Columns that are as wide as what is in them.

const GAP: &str = "  ";

/// Lines of a table. Columns named in `right` are numbers, and end at one place.
pub(super) fn table(head: &[&str], right: &[&str], rows: &[Vec<String>]) -> String {
    let width = |column: usize| {
        let cells = rows.iter().map(|row| row[column].chars().count());
        cells.chain([head[column].len()]).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..head.len()).map(width).collect();
    let line = |cells: &mut dyn Iterator<Item = &str>| {
        let padded = cells.zip(head).zip(&widths).map(|((cell, name), &width)| {
            if right.contains(name) {
                format!("{cell:>width$}")
            } else {
                format!("{cell:<width$}")
            }
        });
        let joined = padded.collect::<Vec<_>>().join(GAP);
        format!("{}\n", joined.trim_end())
    };
    let mut text = line(&mut head.iter().copied());
    for row in rows {
        text.push_str(&line(&mut row.iter().map(String::as_str)));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_begin_and_numbers_end_at_one_place() {
        let rows = [
            vec!["a".to_owned(), "1".to_owned(), "x".to_owned()],
            vec!["long one".to_owned(), "1000".to_owned(), String::new()],
        ];
        assert_eq!(
            table(&["NAME", "SIZE", "END"], &["SIZE"], &rows),
            "NAME      SIZE  END\na            1  x\nlong one  1000\n"
        );
    }
}
