//! Batches, files and lists as OpenAI's clients expect them, field for field.

use serde_json::{Value, json};

use crate::error::Failure;
use crate::file::File;
use crate::state::Batch;
use crate::store::Listed;

/// A file object. AIBrix's clients expect another `status`.
pub(super) fn file(file: &File, aibrix: bool) -> Value {
    json!({
        "id": file.id,
        "object": "file",
        "bytes": file.bytes,
        "created_at": file.created_at,
        "expires_at": file.expires_at,
        "filename": file.filename,
        "purpose": file.purpose.as_str(),
        // The bytes are there as soon as the object is.
        "status": file_status(aibrix),
        "status_details": null,
    })
}

/// What a file's status is called. The field is deprecated: there is only one.
pub(super) fn file_status(aibrix: bool) -> &'static str {
    if aibrix { "uploaded" } else { "processed" }
}

/// A file object with what AIBrix tells of a single file.
pub(super) fn file_of_aibrix(file: &File) -> Value {
    let mut object = self::file(file, true);
    object["content_type"] = json!(file.content_type());
    object["etag"] = json!(file.etag());
    object["last_modified"] = json!(file.created_at);
    object
}

/// A batch object.
pub(super) fn batch(batch: &Batch) -> Value {
    let (times, counts, usage) = (batch.times(), batch.counts(), batch.usage());
    let errors =
        (!batch.errors().is_empty()).then(|| json!({"object": "list", "data": batch.errors()}));
    let mut object = json!({
        "id": batch.id,
        "object": "batch",
        "endpoint": batch.order.endpoint,
        "model": batch.model,
        "errors": errors,
        "input_file_id": batch.order.input_file_id,
        "completion_window": batch.order.completion_window,
        "status": batch.status(),
        "output_file_id": batch.output_file_id(),
        "error_file_id": batch.error_file_id(),
        "created_at": batch.created_at,
        "in_progress_at": times.in_progress_at,
        "expires_at": batch.expires_at,
        "finalizing_at": times.finalizing_at,
        "completed_at": times.completed_at,
        "failed_at": times.failed_at,
        "expired_at": times.expired_at,
        "cancelling_at": times.cancelling_at,
        "cancelled_at": times.cancelled_at,
        "request_counts": {
            "total": counts.total,
            "completed": counts.completed,
            "failed": counts.failed,
        },
        "usage": {
            "input_tokens": usage.input_tokens,
            "input_tokens_details": {"cached_tokens": usage.cached_tokens},
            "output_tokens": usage.output_tokens,
            "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
            "total_tokens": usage.total_tokens,
        },
        "metadata": batch.order.metadata,
    });
    if let Some(aibrix) = &batch.order.aibrix {
        object["aibrix"] = aibrix.clone();
    }
    object
}

/// A page of a list, as it is sent: made item by item, as there may be thousands.
pub(super) fn list<T>(
    listed: &Listed<T>,
    object: impl Fn(&T) -> Value,
) -> Result<Vec<u8>, Failure> {
    const WHAT: &str = "writing a list";
    let mut text = b"{\"object\":\"list\",\"data\":[".to_vec();
    let (mut first, mut last) = (Value::Null, Value::Null);
    for item in &listed.items {
        let mut item = object(item);
        if !first.is_null() {
            text.push(b',');
        }
        serde_json::to_writer(&mut text, &item).map_err(Failure::when(WHAT))?;
        last = item["id"].take();
        if first.is_null() {
            first.clone_from(&last);
        }
    }
    let end = json!({"first_id": first, "last_id": last, "has_more": listed.has_more}).to_string();
    text.extend_from_slice(b"],");
    text.extend_from_slice(&end.as_bytes()[1..]);
    Ok(text)
}
