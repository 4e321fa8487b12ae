//! An unambiguous byte encoding of named fields, for hashing.

/// Appends `name` and `value`, each behind its length, so that no two lists of fields encode alike.
pub(crate) fn field(out: &mut Vec<u8>, name: &str, value: &[u8]) {
    for part in [name.as_bytes(), value] {
        out.extend_from_slice(&(part.len() as u64).to_le_bytes());
        out.extend_from_slice(part);
    }
}

/// As [`field`], for a value that may be absent: absent and empty encode differently.
pub(crate) fn optional(out: &mut Vec<u8>, name: &str, value: Option<&str>) {
    match value {
        Some(value) => field(out, name, value.as_bytes()),
        None => field(out, &format!("no {name}"), b""),
    }
}
