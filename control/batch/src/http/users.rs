//! Users of AIBrix's metadata API: names and the limits that the router keeps for them. Behind an
//! admin's key.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Extension, State};
use kvtide_control_base::api_keys::is_tenant_name;
use serde_json::{Value, json};

use crate::http::auth::Caller;
use crate::http::extract::{Id, Whole};
use crate::http::{ApiError, App};
use crate::store::User;

/// `POST /CreateUser`, `/ReadUser`, `/UpdateUser`, `/DeleteUser`.
pub(super) async fn manage(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    Id(action): Id,
    body: Whole,
) -> Result<Json<Value>, ApiError> {
    let Some(action) = action.strip_suffix("User") else {
        return Err(ApiError::no_route("POST", &format!("/{action}")));
    };
    if !caller.admin {
        return Err(ApiError::forbidden(
            "Users are managed with a key that has \"admin\": true in the file of keys.",
        ));
    }
    let user: User = serde_json::from_slice(&body.bytes).map_err(|error| {
        ApiError::request(format!(
            "The body must be {{\"name\", \"rpm\", \"tpm\"}}: {error}."
        ))
    })?;
    if !is_tenant_name(&user.name) {
        let message = "'name' must be 1 to 128 letters, digits, '-', '_', '.' or '@'.";
        return Err(ApiError::invalid("name", "invalid_value", message));
    }
    let missing = || ApiError::not_found("name", format!("No such user: {}", user.name));
    let (message, user) = match action {
        "Create" => {
            if app.metadata.create_user(&user).await? {
                ("created", user)
            } else {
                // As in AIBrix: whoever makes sure that a user exists may do so again. The limits stay.
                let found = app.metadata.user(&user.name).await?;
                ("exists", found.ok_or_else(missing)?)
            }
        }
        "Read" => {
            let found = app.metadata.user(&user.name).await?;
            ("found", found.ok_or_else(missing)?)
        }
        "Update" => {
            if !app.metadata.update_user(&user).await? {
                return Err(missing());
            }
            ("updated", user)
        }
        "Delete" => {
            let deleted = app.metadata.delete_user(&user.name).await?;
            ("deleted", deleted.ok_or_else(missing)?)
        }
        other => return Err(ApiError::no_route("POST", &format!("/{other}User"))),
    };
    let message = format!("User {} {message}", user.name);
    Ok(Json(json!({"message": message, "user": user})))
}
