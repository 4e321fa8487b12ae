//! `/v1/batches`.

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::Json;
use axum::extract::{Extension, State};
use axum::http::HeaderMap;
use axum::response::Response;
use serde_json::{Map, Value};

use crate::clock::{self, Seconds};
use crate::endpoint::{Endpoint, window_s};
use crate::file::{KEPT_MAX_S, KEPT_MIN_S, Purpose};
use crate::http::auth::Caller;
use crate::http::extract::{Id, Whole};
use crate::http::holding::whole;
use crate::http::page::{Limits, Listing};
use crate::http::{ApiError, App, files, is_retry, objects};
use crate::id;
use crate::state::{Batch, Order};
use crate::store::Create;

/// OpenAI's limits.
const LIMITS: Limits = Limits {
    most: 100,
    unless_said: 20,
};
/// Bytes that a batch takes in a list, about.
const BATCH_BYTES: u64 = 4 << 10;
const METADATA_PAIRS_MAX: usize = 16;
const METADATA_KEY_CHARS_MAX: usize = 64;
const METADATA_VALUE_CHARS_MAX: usize = 512;
/// Bytes of AIBrix's extension, which is kept with the batch and given back with it.
const AIBRIX_BYTES_MAX: usize = 16 << 10;

pub(super) async fn create(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    headers: HeaderMap,
    body: Result<Whole, ApiError>,
) -> Result<Json<Value>, ApiError> {
    let is_retry = is_retry(&headers);
    let body = body.inspect_err(|error| {
        if !is_retry && error.asks_to_come_again() {
            app.refusals.note_unread(&caller.tenant);
        }
    })?;
    let order = read_order(&body.bytes)?;
    let file = files::find(&app, &caller, &order.input_file_id)
        .await
        .map_err(|error| error.about("input_file_id"))?;
    if file.purpose != Purpose::Batch {
        let message = format!(
            "The file {} has the purpose '{}': upload it with the purpose 'batch'.",
            file.id,
            file.purpose.as_str()
        );
        return Err(ApiError::invalid("input_file_id", "invalid_value", message));
    }
    let digest =
        serde_json::to_vec(&order).map_err(crate::error::Failure::when("writing a document"))?;
    let digest = blake3::hash(&digest).to_hex().to_string();
    let batch = Batch::new(id::fresh("batch_")?, caller.tenant, order, clock::now());
    let batch = add(&app, batch, digest, is_retry).await?;
    app.bell.batch_added();
    tracing::info!(batch = batch.id, tenant = batch.tenant, "batch created");
    Ok(Json(objects::batch(&batch)))
}

/// Adds a batch, unless an earlier attempt at the same create has.
async fn add(app: &App, batch: Batch, digest: String, is_retry: bool) -> Result<Batch, ApiError> {
    let (tenant, id) = (batch.tenant.clone(), batch.id.clone());
    let refused = match app.refusals.of(&tenant, &digest) {
        Some(refused) if is_retry => {
            if let Some(there) = app.metadata.batch(&tenant, &refused).await? {
                app.refusals.forget(&tenant, &digest);
                return Ok(there);
            }
            true
        }
        _ => is_retry && app.refusals.take_unread(&tenant),
    };
    let create = Create {
        digest: digest.clone(),
        is_retry: is_retry && !refused,
    };
    let places = app.limits.places;
    let added = app.metadata.add_batch(batch, create, places).await;
    match added {
        Ok(_) => app.refusals.forget(&tenant, &digest),
        Err(_) if !is_retry || refused => app.refusals.note(&tenant, &digest, &id),
        // What it repeats may have been carried out all the same.
        Err(_) => {}
    }
    Ok(added?)
}

pub(super) async fn list(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    listing: Listing,
) -> Result<Response, ApiError> {
    let page = listing.page(&LIMITS)?;
    let expected = u64::from(page.limit) * BATCH_BYTES;
    let mut memory = app.admission.memory(&caller, expected).await?;
    let listed = app.metadata.batches(&caller.tenant, page).await?;
    let listed = listed.ok_or_else(|| listing.unknown_after())?;
    let text = objects::list(&listed, objects::batch)?;
    app.admission.fit(&caller, &mut memory, text.len()).await?;
    Ok(whole(text, "application/json", memory))
}

pub(super) async fn retrieve(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    Id(id): Id,
) -> Result<Json<Value>, ApiError> {
    let batch = app.metadata.batch(&caller.tenant, &id).await?;
    Ok(Json(objects::batch(&batch.ok_or_else(|| no_batch(&id))?)))
}

pub(super) async fn cancel(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    Id(id): Id,
) -> Result<Json<Value>, ApiError> {
    let cancelled = app
        .metadata
        .cancel(&caller.tenant, &id, clock::now())
        .await?;
    let batch = cancelled.ok_or_else(|| no_batch(&id))?;
    app.bell.batch_cancelled(&batch.id);
    tracing::info!(batch = batch.id, tenant = batch.tenant, "cancelling batch");
    Ok(Json(objects::batch(&batch)))
}

fn no_batch(id: &str) -> ApiError {
    ApiError::not_found("id", format!("No such Batch object: {id}"))
}

/// Reads the body of a create. Parameters that do not exist are refused: one that is misspelt would
/// otherwise be ignored.
fn read_order(body: &[u8]) -> Result<Order, ApiError> {
    let body: Map<String, Value> = serde_json::from_slice(body)
        .map_err(|error| ApiError::request(format!("The body is not a JSON object: {error}.")))?;
    const KNOWN: [&str; 6] = [
        "input_file_id",
        "endpoint",
        "completion_window",
        "metadata",
        "output_expires_after",
        "aibrix",
    ];
    if let Some(unknown) = body.keys().find(|key| !KNOWN.contains(&key.as_str())) {
        let message = format!("Unknown parameter: '{unknown}'. Known are {KNOWN:?}.");
        return Err(ApiError::invalid(unknown, "unknown_parameter", message));
    }
    let endpoint = required(&body, "endpoint")?;
    let endpoint = Endpoint::from_path(endpoint).ok_or_else(|| {
        let known: Vec<&str> = Endpoint::ALL.map(Endpoint::path).into();
        let message = format!("Invalid value: '{endpoint}'. Supported values are {known:?}.");
        ApiError::invalid("endpoint", "invalid_value", message)
    })?;
    let completion_window = match body.get("completion_window") {
        // As AIBrix has it.
        None => "24h",
        Some(_) => required(&body, "completion_window")?,
    };
    let window_s = window_s(completion_window).ok_or_else(|| {
        let message = format!(
            "Invalid value: '{completion_window}'. It must be '24h', or another whole number of \
             hours from '1h'."
        );
        ApiError::invalid("completion_window", "invalid_value", message)
    })?;
    Ok(Order {
        endpoint,
        input_file_id: required(&body, "input_file_id")?.to_owned(),
        completion_window: completion_window.to_owned(),
        window_s,
        metadata: metadata(body.get("metadata"))?,
        output_expires_after_s: expires_after(body.get("output_expires_after"))?,
        aibrix: aibrix(body.get("aibrix"))?,
    })
}

fn required<'a>(body: &'a Map<String, Value>, name: &str) -> Result<&'a str, ApiError> {
    match body.get(name) {
        None | Some(Value::Null) => Err(ApiError::missing(name)),
        Some(Value::String(text)) => Ok(text),
        Some(_) => Err(wrong_type(name, "a string")),
    }
}

fn wrong_type(name: &str, expected: &str) -> ApiError {
    let message = format!("Invalid type for '{name}': expected {expected}.");
    ApiError::invalid(name, "invalid_type", message)
}

fn aibrix(value: Option<&Value>) -> Result<Option<Value>, ApiError> {
    match value {
        None | Some(Value::Null) => Ok(None),
        Some(value @ Value::Object(_)) if value.to_string().len() > AIBRIX_BYTES_MAX => {
            let message = format!("'aibrix' may have at most {AIBRIX_BYTES_MAX} bytes.");
            Err(ApiError::invalid("aibrix", "invalid_value", message))
        }
        Some(value @ Value::Object(_)) => Ok(Some(value.clone())),
        Some(_) => Err(wrong_type("aibrix", "an object")),
    }
}

fn metadata(value: Option<&Value>) -> Result<Option<BTreeMap<String, String>>, ApiError> {
    let pairs = match value {
        None | Some(Value::Null) => return Ok(None),
        Some(Value::Object(pairs)) => pairs,
        Some(_) => return Err(wrong_type("metadata", "an object")),
    };
    let invalid = |message| Err(ApiError::invalid("metadata", "invalid_value", message));
    if pairs.len() > METADATA_PAIRS_MAX {
        return invalid(format!(
            "'metadata' may have at most {METADATA_PAIRS_MAX} keys."
        ));
    }
    let mut metadata = BTreeMap::new();
    for (key, value) in pairs {
        let Value::String(value) = value else {
            return Err(wrong_type(&format!("metadata.{key}"), "a string"));
        };
        if key.chars().count() > METADATA_KEY_CHARS_MAX {
            return invalid(format!(
                "A key of 'metadata' may have at most {METADATA_KEY_CHARS_MAX} characters."
            ));
        }
        if value.chars().count() > METADATA_VALUE_CHARS_MAX {
            return invalid(format!(
                "'metadata.{key}' may have at most {METADATA_VALUE_CHARS_MAX} characters."
            ));
        }
        metadata.insert(key.clone(), value.clone());
    }
    Ok(Some(metadata))
}

fn expires_after(value: Option<&Value>) -> Result<Option<Seconds>, ApiError> {
    const NAME: &str = "output_expires_after";
    let fields = match value {
        None | Some(Value::Null) => return Ok(None),
        Some(Value::Object(fields)) => fields,
        Some(_) => return Err(wrong_type(NAME, "an object")),
    };
    match fields.get("anchor") {
        None => return Err(ApiError::missing("output_expires_after.anchor")),
        Some(Value::String(anchor)) if anchor == "created_at" => {}
        Some(_) => {
            let message = "'output_expires_after.anchor' must be 'created_at'.";
            return Err(ApiError::invalid(
                "output_expires_after.anchor",
                "invalid_value",
                message,
            ));
        }
    }
    let Some(seconds) = fields.get("seconds") else {
        return Err(ApiError::missing("output_expires_after.seconds"));
    };
    match seconds.as_u64() {
        Some(seconds) if (KEPT_MIN_S..=KEPT_MAX_S).contains(&seconds) => Ok(Some(seconds)),
        _ => Err(ApiError::invalid(
            "output_expires_after.seconds",
            "invalid_value",
            format!(
                "'output_expires_after.seconds' must be an integer from {KEPT_MIN_S} to {KEPT_MAX_S}."
            ),
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_kept_with_a_batch_for_aibrix_is_bounded() {
        let of = |bytes: usize| serde_json::json!({"x": "y".repeat(bytes)});
        let small = of(AIBRIX_BYTES_MAX - 8);
        assert_eq!(aibrix(Some(&small)).unwrap(), Some(small));
        assert!(aibrix(Some(&of(AIBRIX_BYTES_MAX))).is_err());
    }
}
