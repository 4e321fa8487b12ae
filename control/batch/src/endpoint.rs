//! The endpoints that a batch may name, and its completion windows.

use serde::{Deserialize, Serialize};

use crate::clock::Seconds;

/// Where the requests of a batch go. The names are OpenAI's, and `/v1/rerank`, which vLLM serves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Endpoint {
    /// Chat.
    #[serde(rename = "/v1/chat/completions")]
    ChatCompletions,
    /// Text.
    #[serde(rename = "/v1/completions")]
    Completions,
    /// Vectors.
    #[serde(rename = "/v1/embeddings")]
    Embeddings,
    /// Responses.
    #[serde(rename = "/v1/responses")]
    Responses,
    /// Moderation.
    #[serde(rename = "/v1/moderations")]
    Moderations,
    /// Images from text.
    #[serde(rename = "/v1/images/generations")]
    ImagesGenerations,
    /// Images from images.
    #[serde(rename = "/v1/images/edits")]
    ImagesEdits,
    /// Videos.
    #[serde(rename = "/v1/videos")]
    Videos,
    /// Ranking of documents.
    #[serde(rename = "/v1/rerank")]
    Rerank,
}

impl Endpoint {
    /// All of them.
    pub const ALL: [Endpoint; 9] = [
        Endpoint::ChatCompletions,
        Endpoint::Completions,
        Endpoint::Embeddings,
        Endpoint::Responses,
        Endpoint::Moderations,
        Endpoint::ImagesGenerations,
        Endpoint::ImagesEdits,
        Endpoint::Videos,
        Endpoint::Rerank,
    ];

    /// The path, as in a request's `url`.
    #[must_use]
    pub fn path(self) -> &'static str {
        match self {
            Endpoint::ChatCompletions => "/v1/chat/completions",
            Endpoint::Completions => "/v1/completions",
            Endpoint::Embeddings => "/v1/embeddings",
            Endpoint::Responses => "/v1/responses",
            Endpoint::Moderations => "/v1/moderations",
            Endpoint::ImagesGenerations => "/v1/images/generations",
            Endpoint::ImagesEdits => "/v1/images/edits",
            Endpoint::Videos => "/v1/videos",
            Endpoint::Rerank => "/v1/rerank",
        }
    }

    /// The endpoint of a path.
    #[must_use]
    pub fn from_path(path: &str) -> Option<Endpoint> {
        Endpoint::ALL.into_iter().find(|known| known.path() == path)
    }
}

/// Reads a completion window: whole hours, `1h` to `24h`.
#[must_use]
pub fn window_s(text: &str) -> Option<Seconds> {
    let hours: Seconds = text.strip_suffix('h')?.parse().ok()?;
    // `parse` takes "+1" and "01", which OpenAI's API would not.
    let canonical = format!("{hours}h") == text;
    (canonical && (1..=24).contains(&hours)).then_some(hours * 3600)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_endpoint_is_found_by_its_path_and_serialises_as_it() {
        for endpoint in Endpoint::ALL {
            assert_eq!(Endpoint::from_path(endpoint.path()), Some(endpoint));
            let json = serde_json::to_string(&endpoint).unwrap();
            assert_eq!(json, format!("\"{}\"", endpoint.path()));
        }
        assert_eq!(Endpoint::from_path("/v1/files"), None);
    }

    #[test]
    fn windows_are_whole_hours_up_to_a_day() {
        assert_eq!(window_s("24h"), Some(86_400));
        assert_eq!(window_s("1h"), Some(3_600));
        for wrong in [
            "0h", "25h", "24", "1d", "-1h", "+1h", "01h", "", "h", "1.5h",
        ] {
            assert_eq!(window_s(wrong), None, "{wrong}");
        }
    }
}
