//! Batches, files and lists as OpenAI's clients expect them, field for field.

use serde_json::{Value, json};

use crate::batch::file::File;
use crate::batch::state::Batch;
use crate::batch::store::Listed;

/// A file object.
pub(super) fn file(file: &File) -> Value {
    json!({
        "id": file.id,
        "object": "file",
        "bytes": file.bytes,
        "created_at": file.created_at,
        "expires_at": file.expires_at,
        "filename": file.filename,
        "purpose": file.purpose.as_str(),
        // The bytes are there as soon as the object is.
        "status": "processed",
        "status_details": null,
    })
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

/// A page of a list.
pub(super) fn list<T>(listed: &Listed<T>, object: impl Fn(&T) -> Value) -> Value {
    let data: Vec<Value> = listed.items.iter().map(object).collect();
    let id = |item: Option<&Value>| item.map(|item| item["id"].clone());
    json!({
        "object": "list",
        "first_id": id(data.first()),
        "last_id": id(data.last()),
        "has_more": listed.has_more,
        "data": data,
    })
}
