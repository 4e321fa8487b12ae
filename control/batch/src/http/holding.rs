//! Answers that hold on to something while they are written: a place, or memory.

use std::pin::Pin;
use std::task::{Context, Poll};

use axum::body::Body;
use axum::http::{HeaderValue, header};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use hyper::body::{Body as HttpBody, Frame, SizeHint};

/// A body that holds something until it has ended. What the connection has taken of it by then, and
/// not yet written, is within the connection's own buffer.
#[derive(Debug)]
pub(super) struct Holding<T> {
    body: Body,
    _held: T,
}

impl<T> Holding<T> {
    pub(super) fn new(body: Body, held: T) -> Holding<T> {
        Holding { body, _held: held }
    }
}

impl<T: Unpin> HttpBody for Holding<T> {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.body).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

struct Held<T> {
    text: Vec<u8>,
    _held: T,
}

impl<T> AsRef<[u8]> for Held<T> {
    fn as_ref(&self) -> &[u8] {
        &self.text
    }
}

/// An answer of these bytes, which hold something until they are written: the connection takes them
/// all at once, however long they are.
pub(super) fn whole<T: Send + 'static>(text: Vec<u8>, kind: &'static str, held: T) -> Response {
    let bytes = Bytes::from_owner(Held { text, _held: held });
    let mut response = Body::from(bytes).into_response();
    let kind = HeaderValue::from_static(kind);
    response.headers_mut().insert(header::CONTENT_TYPE, kind);
    response
}

#[cfg(test)]
mod tests {
    use http_body_util::BodyExt;
    use std::sync::Arc;

    use super::*;

    #[tokio::test]
    async fn what_is_held_is_let_go_with_the_last_byte_and_not_before() {
        let held = Arc::new(());
        let response = whole(b"text".to_vec(), "text/plain", Arc::clone(&held));
        let mut body = response.into_body();
        let frame = body.frame().await.unwrap().unwrap();
        drop(body);
        assert_eq!(Arc::strong_count(&held), 2);
        drop(frame);
        assert_eq!(Arc::strong_count(&held), 1);
    }
}
