//! The server that answers the requests: the router, or any other that speaks OpenAI's protocol.

use std::error::Error;
use std::io;
use std::time::Duration;

use axum::http::uri::Authority;
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Response, Uri, header};
use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::{TokioExecutor, TokioTimer};
use kvtide_control_base::tls::Trust;
use rustix::io::Errno;
use serde::Deserialize;
use serde_json::Value;

use crate::credentials;
use crate::endpoint::Endpoint;
use crate::error::Failure;
use crate::run::pace::Absence;
use crate::run::retry::Verdict;

/// How long a connection may take to be made.
const CONNECT_WITHIN: Duration = Duration::from_secs(10);
/// How long an unused connection is kept.
const IDLE: Duration = Duration::from_secs(30);
/// How long, and how large, the list of models may be.
const MODELS_WITHIN: Duration = Duration::from_secs(10);
const MODELS_BYTES_MAX: usize = 4 << 20;

/// What a connection may read ahead of whoever takes it. A response's head has to fit in.
pub(super) const READ_BUFFER_BYTES: usize = 32 << 10;

type HttpClient = Client<HttpsConnector<HttpConnector>, Full<Bytes>>;

/// A client of the upstream.
#[derive(Debug)]
pub struct Upstream {
    client: HttpClient,
    base: String,
    authorization: Option<HeaderValue>,
}

/// Why there was no answer.
#[derive(Debug, thiserror::Error)]
pub enum NoAnswer {
    /// No connection could be made.
    #[error("the upstream cannot be reached: {0}")]
    Unreachable(String),
    /// None could be begun: this server has no file descriptors or memory left for it. Nobody was
    /// asked.
    #[error("this server can make no further connection: {0}")]
    Exhausted(io::Error),
    /// The connection ended before the answer did.
    #[error("the upstream broke the connection: {0}")]
    Broken(String),
    /// Too slow.
    #[error("the upstream did not answer within {0:?}")]
    TimedOut(Duration),
    /// Too long.
    #[error("the answer is longer than {0} bytes")]
    TooLarge(u64),
    /// Something that is no JSON under a status that promises one.
    #[error("the answer is not JSON: {0}")]
    NotJson(String),
    /// The answer could not be kept here.
    #[error(transparent)]
    Local(#[from] Failure),
}

impl NoAnswer {
    pub(super) fn verdict(&self) -> Verdict {
        match self {
            NoAnswer::Unreachable(_) => Verdict::Absent(Absence::Unavailable),
            // Of what is wrong here, nothing is learnt about the upstream.
            NoAnswer::TooLarge(_) | NoAnswer::Exhausted(_) | NoAnswer::Local(_) => {
                Verdict::Permanent
            }
            _ => Verdict::Transient,
        }
    }

    /// The code in the error file.
    pub(super) fn code(&self) -> &'static str {
        match self {
            NoAnswer::Unreachable(_) => "upstream_unreachable",
            NoAnswer::Broken(_) => "upstream_connection_error",
            NoAnswer::TimedOut(_) => "request_timeout",
            NoAnswer::TooLarge(_) => "response_too_large",
            NoAnswer::NotJson(_) => "invalid_response",
            NoAnswer::Exhausted(_) | NoAnswer::Local(_) => "server_error",
        }
    }
}

/// Why an upstream cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum UpstreamError {
    /// The URL is none.
    #[error("--upstream must be a URL like http://router:8000, not {url:?}: {reason}")]
    Url {
        /// What was given.
        url: String,
        /// What is wrong with it.
        reason: String,
    },
    /// There are two ways to say who calls.
    #[error(
        "--upstream has a name and a password, and there is --upstream-key-file: give only one"
    )]
    Both,
    /// The key cannot be sent.
    #[error("the upstream's key has characters that no header can carry")]
    Key,
    /// Nobody's certificate would be believed.
    #[error("--upstream is https:// and no authority is trusted: give --ca-file")]
    Roots,
}

impl Upstream {
    /// A client of the server at `url`, with or without `/v1` at its end, who believes over TLS whom
    /// `trust` believes.
    ///
    /// # Errors
    /// When URL or key cannot be used.
    pub fn new(url: &str, key: Option<&str>, trust: &Trust) -> Result<Upstream, UpstreamError> {
        let wrong = |reason: String| UpstreamError::Url {
            url: credentials::hidden(url),
            reason,
        };
        let (url, login) = credentials::taken_out(url);
        if url.contains('@') {
            return Err(wrong(
                "an '@' is left behind its host; percent-encode '/', '?', '#' and '@' in the password \
                 (%2F, %3F, %23, %40)"
                    .to_owned(),
            ));
        }
        let base = url.trim_end_matches('/');
        let base = base.strip_suffix("/v1").unwrap_or(base);
        let parsed: Uri = base.parse().map_err(|error| wrong(format!("{error}")))?;
        if !matches!(parsed.scheme_str(), Some("http" | "https")) || parsed.host().is_none() {
            return Err(wrong("it needs http:// or https:// and a host".to_owned()));
        }
        if parsed.port_u16().is_none() && parsed.authority().map(Authority::as_str) != parsed.host()
        {
            return Err(wrong("its port is no number".to_owned()));
        }
        if parsed.query().is_some() {
            return Err(wrong("it must have no query".to_owned()));
        }
        if parsed.scheme_str() == Some("https") && trust.is_empty() {
            return Err(UpstreamError::Roots);
        }
        let authorization = match (key, login) {
            (Some(_), Some(_)) => return Err(UpstreamError::Both),
            (Some(key), None) => Some(format!("Bearer {key}")),
            (None, login) => login.map(|login| login.basic()),
        };
        let authorization = authorization
            .map(|authorization| {
                let mut value = HeaderValue::from_str(&authorization)?;
                value.set_sensitive(true);
                Ok(value)
            })
            .transpose()
            .map_err(|_: axum::http::header::InvalidHeaderValue| UpstreamError::Key)?;
        let mut http = HttpConnector::new();
        http.enforce_http(false);
        http.set_nodelay(true);
        http.set_connect_timeout(Some(CONNECT_WITHIN));
        let https = HttpsConnectorBuilder::new()
            .with_tls_config(trust.client_config())
            .https_or_http()
            .enable_http1()
            .wrap_connector(http);
        let client = Client::builder(TokioExecutor::new())
            .pool_idle_timeout(IDLE)
            .pool_timer(TokioTimer::new())
            .http1_max_buf_size(READ_BUFFER_BYTES)
            .build(https);
        Ok(Upstream {
            client,
            base: base.to_owned(),
            authorization,
        })
    }

    /// Where it is, without anything secret.
    #[must_use]
    pub fn shown(&self) -> &str {
        &self.base
    }

    /// Sends one request and gives back the answer's head, its body still to be read.
    pub(super) async fn send(
        &self,
        endpoint: Endpoint,
        id: &str,
        tenant: &str,
        body: Bytes,
    ) -> Result<Response<Incoming>, NoAnswer> {
        let mut request = self.request(Method::POST, endpoint.path(), body)?;
        let headers = request.headers_mut();
        let json = HeaderValue::from_static("application/json");
        headers.insert(header::CONTENT_TYPE, json);
        set(headers, "x-request-id", id);
        // Who the tokens are for: the router limits and accounts by it.
        set(headers, "user", tenant);
        self.client
            .request(request)
            .await
            .map_err(|error| no_answer(&error))
    }

    /// The upstream's models.
    ///
    /// # Errors
    /// When it does not answer, or not with a list of models.
    pub async fn models(&self) -> Result<Vec<Value>, NoAnswer> {
        #[derive(Deserialize)]
        struct Models {
            data: Vec<Value>,
        }
        let fetch = async {
            let request = self.request(Method::GET, "/v1/models", Bytes::new())?;
            let response = self
                .client
                .request(request)
                .await
                .map_err(|error| no_answer(&error))?;
            let body = Limited::new(response.into_body(), MODELS_BYTES_MAX)
                .collect()
                .await
                .map_err(|error| NoAnswer::Broken(error.to_string()))?;
            let models: Models = serde_json::from_slice(&body.to_bytes())
                .map_err(|error| NoAnswer::NotJson(error.to_string()))?;
            Ok(models.data)
        };
        tokio::time::timeout(MODELS_WITHIN, fetch)
            .await
            .unwrap_or(Err(NoAnswer::TimedOut(MODELS_WITHIN)))
    }

    fn request(
        &self,
        method: Method,
        path: &str,
        body: Bytes,
    ) -> Result<Request<Full<Bytes>>, NoAnswer> {
        let mut request = Request::builder()
            .method(method)
            .uri(format!("{}{path}", self.base))
            .body(Full::new(body))
            .map_err(|error| NoAnswer::Unreachable(error.to_string()))?;
        if let Some(authorization) = &self.authorization {
            let value = authorization.clone();
            request.headers_mut().insert(header::AUTHORIZATION, value);
        }
        Ok(request)
    }
}

/// Sets a header whose value this program has made or checked; one that cannot be sent is left out.
fn set(headers: &mut HeaderMap, name: &'static str, value: &str) {
    if let Ok(value) = HeaderValue::from_str(value) {
        headers.insert(HeaderName::from_static(name), value);
    }
}

/// Why a request that was begun, or was to be, has no answer.
fn no_answer(error: &hyper_util::client::legacy::Error) -> NoAnswer {
    let reason = root_cause(error);
    match exhausted(error) {
        Some(errno) if error.is_connect() => NoAnswer::Exhausted(errno.into()),
        _ if error.is_connect() => NoAnswer::Unreachable(reason),
        _ => NoAnswer::Broken(reason),
    }
}

/// Whether it is this system that had nothing left for a connection. Such an error says nothing of
/// whoever was to be reached.
fn exhausted(error: &(dyn Error + 'static)) -> Option<Errno> {
    std::iter::successors(Some(error), |&error| error.source())
        .filter_map(|error| error.downcast_ref::<io::Error>())
        .filter_map(Errno::from_io_error)
        .find(|errno| {
            matches!(
                *errno,
                Errno::MFILE | Errno::NFILE | Errno::NOBUFS | Errno::NOMEM
            )
        })
}

/// What hyper's errors say is in the cause of the cause.
fn root_cause(error: &hyper_util::client::legacy::Error) -> String {
    let mut cause: &dyn Error = error;
    while let Some(next) = cause.source() {
        cause = next;
    }
    cause.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("tcp open error")]
    struct Connecting(#[source] io::Error);

    #[test]
    fn a_password_that_would_end_the_host_is_refused_and_not_shown() {
        let trust = Trust::open(None).unwrap();
        for url in [
            "http://u:se/cret@h",
            "http://u:1/cret@h",
            "http://u:se#cret@h",
        ] {
            let error = Upstream::new(url, None, &trust).unwrap_err().to_string();
            assert!(error.contains("%2F"), "{error}");
            let secret = error.contains("cret") || error.contains("u:");
            assert!(!secret, "{error}");
        }
        let encoded = Upstream::new("http://u:se%2Fcret@h", None, &trust).unwrap();
        assert_eq!(encoded.shown(), "http://h");
    }

    #[test]
    fn what_is_lacking_here_is_told_from_whom_nobody_answers() {
        let of = |errno: Errno| exhausted(&Connecting(errno.into()));
        assert_eq!(of(Errno::MFILE), Some(Errno::MFILE));
        assert_eq!(of(Errno::NOBUFS), Some(Errno::NOBUFS));
        assert_eq!(of(Errno::CONNREFUSED), None);
        assert_eq!(
            exhausted(&io::Error::other(Connecting(Errno::MFILE.into()))),
            Some(Errno::MFILE)
        );
        assert_eq!(exhausted(&io::Error::other("something else")), None);
    }
}
