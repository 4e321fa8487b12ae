//! `?after=…&limit=…&order=…`.

use std::collections::HashMap;
use std::convert::Infallible;

use axum::extract::{FromRequestParts, Query};
use axum::http::request::Parts;

use crate::http::ApiError;
use crate::store::Page;

/// How many items a page may have.
pub(super) struct Limits {
    pub(super) most: u32,
    pub(super) unless_said: u32,
}

/// The query of a list.
pub(super) struct Listing(HashMap<String, String>);

impl<S: Send + Sync> FromRequestParts<S> for Listing {
    type Rejection = Infallible;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Listing, Infallible> {
        let query = Query::try_from_uri(&parts.uri);
        // A query that is none has no parameters.
        Ok(Listing(query.map(|Query(map)| map).unwrap_or_default()))
    }
}

impl Listing {
    pub(super) fn get(&self, name: &str) -> Option<&str> {
        self.0.get(name).map(String::as_str)
    }

    pub(super) fn page(&self, limits: &Limits) -> Result<Page, ApiError> {
        let limit = match self.get("limit").map(str::parse::<u32>) {
            None => limits.unless_said,
            Some(Ok(limit)) if (1..=limits.most).contains(&limit) => limit,
            Some(_) => {
                let message = format!("'limit' must be an integer from 1 to {}.", limits.most);
                return Err(ApiError::invalid("limit", "invalid_value", message));
            }
        };
        let ascending = match self.get("order") {
            None | Some("desc") => false,
            Some("asc") => true,
            Some(_) => {
                let message = "'order' must be 'asc' or 'desc'.";
                return Err(ApiError::invalid("order", "invalid_value", message));
            }
        };
        Ok(Page {
            after: self.get("after").map(str::to_owned),
            limit,
            ascending,
        })
    }

    /// The item after which the page should begin does not exist.
    pub(super) fn unknown_after(&self) -> ApiError {
        let after = self.get("after").unwrap_or_default();
        ApiError::invalid(
            "after",
            "invalid_value",
            format!("'after': no such object: {after}"),
        )
    }
}
