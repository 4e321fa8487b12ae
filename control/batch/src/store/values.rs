//! How values are kept, whichever database keeps them.

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::error::Failure;
use crate::state::Batch;
use crate::store::Fence;

/// The databases' integers are signed. Nothing here comes near the end of either range.
pub(super) fn integer(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

/// The reverse of [`integer`].
pub(super) fn natural(value: i64) -> u64 {
    u64::try_from(value).unwrap_or(0)
}

/// A document as it is kept.
pub(super) fn stored(document: &impl Serialize) -> Result<String, Failure> {
    serde_json::to_string(document).map_err(Failure::when("writing a document"))
}

/// The reverse of [`stored`].
pub(super) fn loaded<T: DeserializeOwned>(document: &str) -> Result<T, Failure> {
    serde_json::from_str(document).map_err(Failure::when("reading a document"))
}

/// A batch whose lease was taken.
pub(super) fn leased(document: &str, epoch: i64) -> Result<(Batch, Fence), Failure> {
    let batch: Batch = loaded(document)?;
    let fence = Fence {
        batch: batch.id.clone(),
        epoch,
    };
    Ok((batch, fence))
}

/// Somebody else has the lease.
pub(super) fn fenced_off(fence: &Fence) -> Failure {
    Failure::Fenced {
        batch: fence.batch.clone(),
    }
}
