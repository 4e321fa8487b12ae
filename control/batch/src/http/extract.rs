//! What handlers take from a request, with OpenAI's errors where it cannot be had.

use std::error::Error;
use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body, BodyDataStream, HttpBody};
use axum::extract::{FromRequest, FromRequestParts, Path, Request};
use axum::http::request::Parts;
use futures_util::StreamExt;

use crate::http::auth::Caller;
use crate::http::progress::Stalled;
use crate::http::shares::Share;
use crate::http::{ApiError, App};

/// Bytes of a JSON body; a create has a few hundred.
const BODY_BYTES_MAX: usize = 1 << 20;
/// What is read of a body that is refused, so that the client reads the answer instead of failing at
/// writing.
const DRAINED_BYTES_MAX: usize = 64 << 20;
/// How long that may take.
const DRAINED_WITHIN: Duration = Duration::from_secs(20);

/// The name at the end of a path, or within it.
pub(super) struct Id(pub(super) String);

impl<S: Send + Sync> FromRequestParts<S> for Id {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Id, ApiError> {
        match Path::<String>::from_request_parts(parts, state).await {
            Ok(Path(id)) => Ok(Id(id)),
            Err(rejection) => {
                let message = format!("The path cannot be read: {}.", rejection.body_text());
                Err(ApiError::invalid("id", "invalid_value", message))
            }
        }
    }
}

/// A body that is read as a whole, and the memory that it takes.
pub(super) struct Whole {
    pub(super) bytes: Vec<u8>,
    _memory: Share,
}

impl FromRequest<Arc<App>> for Whole {
    type Rejection = ApiError;

    async fn from_request(request: Request, app: &Arc<App>) -> Result<Whole, ApiError> {
        // Whoever routes a request here has let only a known caller through.
        let caller = request.extensions().get::<Caller>().cloned();
        let caller = caller.ok_or_else(|| ApiError::unauthorised("Nobody is known to call."))?;
        let body = request.into_body();
        let expected = body.size_hint().upper().unwrap_or(BODY_BYTES_MAX as u64);
        let expected = expected.min(BODY_BYTES_MAX as u64);
        let memory = app.admission.body(&caller, expected).await?;
        Ok(Whole {
            bytes: read_whole(body).await?,
            _memory: memory,
        })
    }
}

async fn read_whole(body: Body) -> Result<Vec<u8>, ApiError> {
    let mut bytes = Vec::new();
    let mut arriving = body.into_data_stream();
    while let Some(chunk) = arriving.next().await {
        let chunk = chunk.map_err(|error| broken("The body", &error))?;
        if bytes.len() + chunk.len() > BODY_BYTES_MAX {
            drain(arriving).await;
            let message = format!("The body may have at most {BODY_BYTES_MAX} bytes.");
            return Err(ApiError::body_too_large(message));
        }
        bytes.extend_from_slice(&chunk);
    }
    Ok(bytes)
}

async fn drain(mut arriving: BodyDataStream) {
    let mut left = DRAINED_BYTES_MAX;
    let reading = async {
        while let Some(Ok(chunk)) = arriving.next().await
            && left > chunk.len()
        {
            left -= chunk.len();
        }
    };
    // A client that is slower than this sees a closed connection.
    tokio::time::timeout(DRAINED_WITHIN, reading).await.ok();
}

/// Why something that arrives cannot be read.
pub(super) fn broken(what: &str, error: &(dyn Error + 'static)) -> ApiError {
    let causes = std::iter::successors(Some(error), |&error| error.source());
    match causes
        .into_iter()
        .find_map(<dyn Error>::downcast_ref::<Stalled>)
    {
        Some(stalled) => ApiError::timed_out(format!("{what} arrives too slowly: {stalled}.")),
        None => ApiError::request(format!("{what} cannot be read: {error}.")),
    }
}
