//! Identifiers as OpenAI's clients know them: a prefix that names the kind, then random hex digits.

use crate::error::Failure;

/// Digits after the prefix: 96 random bits, so that ids of many servers never meet.
const RANDOM_BYTES: usize = 12;

/// A new identifier that begins with `prefix`.
///
/// # Errors
/// When the system gives no random bytes.
pub fn fresh(prefix: &str) -> Result<String, Failure> {
    let mut random = [0u8; RANDOM_BYTES];
    getrandom::fill(&mut random).map_err(|error| Failure::internal("random numbers", error))?;
    Ok(format!("{prefix}{}", hex::encode(random)))
}

/// The id of one request of a batch: the same whenever and wherever it is asked for, so that a
/// request that is sent again after a crash carries the id of the first time.
#[must_use]
pub fn of_request(batch: &str, line: u32) -> String {
    let mut hasher = blake3::Hasher::new();
    hasher.update(batch.as_bytes());
    hasher.update(&line.to_le_bytes());
    let digest = hasher.finalize();
    format!(
        "batch_req_{}",
        hex::encode(&digest.as_bytes()[..RANDOM_BYTES])
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn request_ids_repeat_and_differ_between_lines_and_batches() {
        assert_eq!(of_request("batch_a", 1), of_request("batch_a", 1));
        assert_ne!(of_request("batch_a", 1), of_request("batch_a", 2));
        assert_ne!(of_request("batch_a", 1), of_request("batch_b", 1));
    }

    #[test]
    fn fresh_ids_differ() {
        let (a, b) = (fresh("file-").unwrap(), fresh("file-").unwrap());
        assert!(a.starts_with("file-") && a.len() == "file-".len() + 24);
        assert_ne!(a, b);
    }
}
