//! Who is calling, and the frame around every request: whether it comes from another site's page, its
//! id, its metrics, its log line.

use std::sync::Arc;
use std::time::Instant;

use axum::body::HttpBody;
use axum::extract::{MatchedPath, Request, State};
use axum::http::{HeaderMap, HeaderValue, Method, Uri, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use kvtide_control_base::api_keys::Keys;

use crate::http::origin::{self, Names};
use crate::http::{ApiError, App};
use crate::id;

/// The tenant of whoever calls a server that has no keys.
pub const ONLY_TENANT: &str = "default";

/// How callers are told apart.
#[derive(Clone, Debug)]
pub enum Access {
    /// By their API keys.
    Keys(Arc<Keys>),
    /// Not at all: whoever is on this machine may do everything.
    Local,
    /// Not at all: whoever can connect may do everything but manage users.
    Anonymous,
}

/// Whoever calls.
#[derive(Clone, Debug)]
pub(super) struct Caller {
    pub(super) tenant: String,
    pub(super) storage_bytes: Option<u64>,
    pub(super) admin: bool,
}

impl Access {
    /// Whether there are several tenants.
    #[must_use]
    pub fn has_tenants(&self) -> bool {
        matches!(self, Access::Keys(_))
    }

    /// Whether the caller may see what concerns all tenants: anybody where there is only one, else an
    /// admin.
    pub(super) fn may_see_all(&self, headers: &HeaderMap) -> bool {
        !self.has_tenants() || self.caller(headers).is_ok_and(|caller| caller.admin)
    }

    /// Refuses what another site's page sends, where no key says who it is from.
    fn check_origin(&self, headers: &HeaderMap, uri: &Uri) -> Result<(), ApiError> {
        let names = match self {
            Access::Keys(_) => return Ok(()),
            Access::Local => Names::Local,
            Access::Anonymous => Names::Any,
        };
        origin::check(headers, uri, names).map_err(|error| ApiError::forbidden(&error.to_string()))
    }

    fn caller(&self, headers: &HeaderMap) -> Result<Caller, ApiError> {
        let keys = match self {
            Access::Keys(keys) => keys,
            Access::Local | Access::Anonymous => {
                return Ok(Caller {
                    tenant: ONLY_TENANT.to_owned(),
                    storage_bytes: None,
                    admin: matches!(self, Access::Local),
                });
            }
        };
        let key = headers
            .get(header::AUTHORIZATION)
            .and_then(|value| value.to_str().ok())
            .and_then(|value| value.split_once(' '))
            .filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer"))
            .map(|(_, key)| key.trim())
            .ok_or_else(|| {
                ApiError::unauthorised(
                    "You did not provide an API key: send it as 'Authorization: Bearer <key>'.",
                )
            })?;
        let key = keys
            .find(key)
            .ok_or_else(|| ApiError::unauthorised("Incorrect API key provided."))?;
        Ok(Caller {
            tenant: key.tenant,
            storage_bytes: key.storage_bytes,
            admin: key.admin,
        })
    }
}

/// Lets only known callers through, and says who they are.
pub(super) async fn authenticate(
    State(app): State<Arc<App>>,
    mut request: Request,
    next: Next,
) -> Response {
    match app.access.caller(request.headers()) {
        Ok(caller) => {
            request.extensions_mut().insert(caller);
            next.run(request).await
        }
        Err(error) => error.into_response(),
    }
}

/// The method as a label: any token can be one, and each label is kept for ever.
fn known_method(method: &Method) -> &'static str {
    match *method {
        Method::GET => "GET",
        Method::HEAD => "HEAD",
        Method::POST => "POST",
        Method::PUT => "PUT",
        Method::PATCH => "PATCH",
        Method::DELETE => "DELETE",
        Method::OPTIONS => "OPTIONS",
        _ => "other",
    }
}

/// Gives every request an id and counts it.
pub(super) async fn frame(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    let began = Instant::now();
    let method = known_method(request.method());
    let route = request
        .extensions()
        .get::<MatchedPath>()
        .map_or("", MatchedPath::as_str)
        .to_owned();
    let has_body = !request.body().is_end_stream();
    let mut response = match app.access.check_origin(request.headers(), request.uri()) {
        Ok(()) => next.run(request).await,
        Err(error) => error.into_response(),
    };
    // A body that is not read, as it was not wanted, ends its connection.
    let is_unread = has_body && (method != "POST" || !response.status().is_success());
    // Whoever calls next should ask another server, over a connection of its own.
    if is_unread || app.leaving.is_cancelled() {
        let close = HeaderValue::from_static("close");
        response.headers_mut().insert(header::CONNECTION, close);
    }
    let status = response.status();
    let request_id = id::fresh("req_").unwrap_or_default();
    tracing::debug!(
        method,
        route,
        status = status.as_u16(),
        request_id,
        "answered"
    );
    metrics::counter!(
        "kvtide_batch_http_requests_total",
        "route" => route,
        "method" => method,
        "status" => status.as_u16().to_string()
    )
    .increment(1);
    metrics::histogram!("kvtide_batch_http_seconds").record(began.elapsed().as_secs_f64());
    if let Ok(value) = HeaderValue::from_str(&request_id) {
        response.headers_mut().insert("x-request-id", value);
    }
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn methods_that_callers_invent_have_one_label() {
        assert_eq!(known_method(&Method::DELETE), "DELETE");
        for invented in ["GETX", "get", "CONNECT"] {
            let method = Method::from_bytes(invented.as_bytes()).unwrap();
            assert_eq!(known_method(&method), "other");
        }
    }
}
