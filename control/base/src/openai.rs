//! Errors as OpenAI's clients read them: `{"error": {"message", "type", "param", "code"}}`.

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::json;

/// What a client is told.
#[derive(Debug)]
pub struct ApiError {
    status: StatusCode,
    kind: &'static str,
    message: String,
    param: Option<String>,
    code: Option<&'static str>,
    /// Whether the client should try again, where the status alone would mislead it.
    retry: Option<bool>,
    /// After how many seconds.
    retry_after_s: Option<u64>,
}

impl ApiError {
    fn new(status: StatusCode, kind: &'static str, message: impl Into<String>) -> ApiError {
        ApiError {
            status,
            kind,
            message: message.into(),
            param: None,
            code: None,
            retry: None,
            retry_after_s: None,
        }
    }

    /// The request is wrong.
    pub fn invalid(param: &str, code: &'static str, message: impl Into<String>) -> ApiError {
        ApiError {
            param: Some(param.to_owned()),
            code: Some(code),
            ..ApiError::request(message)
        }
    }

    /// The request is wrong as a whole.
    pub fn request(message: impl Into<String>) -> ApiError {
        ApiError::new(StatusCode::BAD_REQUEST, "invalid_request_error", message)
    }

    /// A parameter is missing.
    pub fn missing(param: &str) -> ApiError {
        let message = format!("Missing required parameter: '{param}'.");
        ApiError::invalid(param, "missing_required_parameter", message)
    }

    /// There is no such thing, or it belongs to somebody else.
    pub fn not_found(param: &str, message: impl Into<String>) -> ApiError {
        ApiError {
            status: StatusCode::NOT_FOUND,
            ..ApiError::invalid(param, "not_found", message)
        }
    }

    /// The same error, told about another parameter.
    #[must_use]
    pub fn about(mut self, param: &str) -> ApiError {
        if self.param.is_some() {
            self.param = Some(param.to_owned());
        }
        self
    }

    /// There is no such path.
    pub fn no_route(method: &str, path: &str) -> ApiError {
        ApiError {
            status: StatusCode::NOT_FOUND,
            code: Some("unknown_url"),
            ..ApiError::request(format!("Unknown request URL: {method} {path}."))
        }
    }

    /// The path is right and the method is not.
    pub fn method(method: &str, path: &str) -> ApiError {
        ApiError {
            status: StatusCode::METHOD_NOT_ALLOWED,
            code: Some("method_not_supported"),
            ..ApiError::request(format!("{method} is not possible on {path}."))
        }
    }

    /// No key, or a wrong one.
    pub fn unauthorised(message: &str) -> ApiError {
        ApiError {
            code: Some("invalid_api_key"),
            ..ApiError::new(StatusCode::UNAUTHORIZED, "authentication_error", message)
        }
    }

    /// A key that may not do this.
    pub fn forbidden(message: &str) -> ApiError {
        ApiError::new(StatusCode::FORBIDDEN, "permission_error", message)
    }

    /// Too many bytes.
    pub fn too_large(param: &str, message: impl Into<String>) -> ApiError {
        ApiError {
            status: StatusCode::PAYLOAD_TOO_LARGE,
            ..ApiError::invalid(param, "file_too_large", message)
        }
    }

    /// Too many bytes of anything that is no file.
    pub fn body_too_large(message: impl Into<String>) -> ApiError {
        ApiError {
            status: StatusCode::PAYLOAD_TOO_LARGE,
            code: Some("request_too_large"),
            ..ApiError::request(message)
        }
    }

    /// The request did not arrive in time.
    pub fn timed_out(message: impl Into<String>) -> ApiError {
        ApiError {
            status: StatusCode::REQUEST_TIMEOUT,
            code: Some("request_timeout"),
            ..ApiError::request(message)
        }
    }

    /// A range that the file does not have.
    pub fn unsatisfiable(bytes: u64) -> ApiError {
        let message = format!("The file has {bytes} bytes, none of which is in this Range.");
        ApiError {
            status: StatusCode::RANGE_NOT_SATISFIABLE,
            ..ApiError::invalid("range", "invalid_value", message)
        }
    }

    /// The same error, saying when to come again.
    #[must_use]
    pub fn retry_after(mut self, seconds: u64) -> ApiError {
        self.retry_after_s = Some(seconds);
        self
    }

    /// The state of things forbids it; trying again will not help.
    pub fn conflict(message: impl Into<String>) -> ApiError {
        ApiError {
            status: StatusCode::CONFLICT,
            // OpenAI's clients try again on 409 unless told not to.
            retry: Some(false),
            ..ApiError::request(message)
        }
    }

    /// The caller has as much as it may have; some of it has to go first.
    pub fn over_quota(param: &str, message: impl Into<String>) -> ApiError {
        ApiError {
            status: StatusCode::FORBIDDEN,
            ..ApiError::invalid(param, "storage_quota_exceeded", message)
        }
    }

    /// The server failed. The details are the operator's, who finds them in the log.
    #[must_use]
    pub fn internal() -> ApiError {
        let message = "The server had an error while processing your request.";
        ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, "server_error", message)
    }

    /// Too much is waiting already.
    pub fn busy(message: impl Into<String>) -> ApiError {
        ApiError {
            code: Some("rate_limit_exceeded"),
            ..ApiError::new(StatusCode::TOO_MANY_REQUESTS, "rate_limit_error", message)
        }
    }

    /// Whether the caller is told to come again later with the same.
    #[must_use]
    pub fn asks_to_come_again(&self) -> bool {
        self.retry_after_s.is_some()
    }

    /// The upstream cannot be asked.
    pub fn upstream(message: impl Into<String>) -> ApiError {
        ApiError::new(StatusCode::BAD_GATEWAY, "api_error", message)
    }

    /// A part of this server is not there.
    pub fn unavailable(message: impl Into<String>) -> ApiError {
        ApiError::new(
            StatusCode::SERVICE_UNAVAILABLE,
            "service_unavailable",
            message,
        )
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let body = json!({"error": {
            "message": self.message,
            "type": self.kind,
            "param": self.param,
            "code": self.code,
        }});
        let mut response = (self.status, Json(body)).into_response();
        if let Some(retry) = self.retry {
            let value = HeaderValue::from_static(if retry { "true" } else { "false" });
            response.headers_mut().insert("x-should-retry", value);
        }
        if let Some(seconds) = self.retry_after_s {
            let value = HeaderValue::from(seconds);
            response.headers_mut().insert(header::RETRY_AFTER, value);
        }
        response
    }
}
