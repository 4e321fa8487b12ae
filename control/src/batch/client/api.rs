//! The calls.

use std::error::Error;
use std::path::{Path, PathBuf};
use std::time::Duration;

use futures_util::TryStreamExt;
use reqwest::multipart::{Form, Part};
use reqwest::{Certificate, Client, RequestBuilder, Response};
use serde_json::{Map, Value, json};
use tokio::io::AsyncWriteExt;
use tokio_util::io::ReaderStream;
use url::Url;

use crate::batch::client::input::Input;
use crate::batch::client::{ClientArgs, ClientError};
use crate::batch::credentials;
use crate::batch::tls::Trust;

const CONNECT_WITHIN: Duration = Duration::from_secs(10);
/// How long a server may send nothing. After an upload it may have to pass the file on.
const SILENCE: Duration = Duration::from_secs(60);
/// How long the answer to a question may take.
const ANSWER_WITHIN: Duration = Duration::from_secs(15);

/// A server.
pub(super) struct Api {
    client: Client,
    base: String,
    key: String,
}

impl Api {
    pub(super) fn new(args: &ClientArgs) -> Result<Api, ClientError> {
        // An error would say that a provider is installed already.
        rustls::crypto::ring::default_provider()
            .install_default()
            .ok();
        let base = base_of(&args.url)?;
        let unusable = |source| ClientError::Unreachable {
            url: base.clone(),
            reason: reason_of(&source),
        };
        let mut builder = Client::builder()
            .connect_timeout(CONNECT_WITHIN)
            .read_timeout(SILENCE);
        if let Some(path) = &args.ca_file {
            for added in Trust::open(Some(path))?.added() {
                let certificate = Certificate::from_der(added).map_err(unusable)?;
                builder = builder.add_root_certificate(certificate);
            }
        }
        let client = builder.build().map_err(unusable)?;
        Ok(Api {
            client,
            base,
            // Servers without keys want none, and mind none.
            key: args.api_key.clone().unwrap_or_else(|| "none".to_owned()),
        })
    }

    pub(super) async fn upload(&self, input: Input) -> Result<String, ClientError> {
        let file = tokio::fs::File::from_std(input.file);
        let body = reqwest::Body::wrap_stream(ReaderStream::with_capacity(file, 256 << 10));
        let part = Part::stream_with_length(body, input.bytes).file_name(input.name);
        let form = Form::new().text("purpose", "batch").part("file", part);
        let request = self.client.post(self.url("/files")).multipart(form);
        let file = self.json(request).await?;
        Ok(file["id"].as_str().unwrap_or_default().to_owned())
    }

    pub(super) async fn create(
        &self,
        file: &str,
        endpoint: &str,
        window: &str,
        metadata: Map<String, Value>,
    ) -> Result<Value, ClientError> {
        let mut order = json!({
            "input_file_id": file,
            "endpoint": endpoint,
            "completion_window": window,
        });
        if !metadata.is_empty() {
            order["metadata"] = Value::Object(metadata);
        }
        let request = self.client.post(self.url("/batches")).json(&order);
        self.json(request.timeout(ANSWER_WITHIN)).await
    }

    pub(super) async fn batch(&self, id: &str) -> Result<Value, ClientError> {
        let request = self.client.get(self.url(&format!("/batches/{id}")));
        self.json(request.timeout(ANSWER_WITHIN)).await
    }

    pub(super) async fn cancel(&self, id: &str) -> Result<Value, ClientError> {
        let url = self.url(&format!("/batches/{id}/cancel"));
        let request = self.client.post(url).timeout(ANSWER_WITHIN);
        self.json(request).await
    }

    /// Downloads into a file beside `path`, which takes its place when complete.
    pub(super) async fn download(&self, id: &str, path: &Path) -> Result<(), ClientError> {
        let response = self
            .send(self.client.get(self.url(&format!("/files/{id}/content"))))
            .await?;
        let partial = PathBuf::from(format!("{}.part", path.display()));
        let failed = |source| ClientError::File {
            path: partial.clone(),
            source,
        };
        let mut file = tokio::fs::File::create(&partial).await.map_err(failed)?;
        let mut bytes = response.bytes_stream();
        while let Some(piece) = bytes
            .try_next()
            .await
            .map_err(|source| self.unreachable(source))?
        {
            file.write_all(&piece).await.map_err(failed)?;
        }
        file.flush().await.map_err(failed)?;
        tokio::fs::rename(&partial, path).await.map_err(failed)
    }

    fn url(&self, path: &str) -> String {
        format!("{}/v1{path}", self.base)
    }

    fn unreachable(&self, source: reqwest::Error) -> ClientError {
        let url = self.base.clone();
        if source.is_timeout() && !source.is_connect() {
            return ClientError::Silent { url };
        }
        ClientError::Unreachable {
            url,
            reason: reason_of(&source),
        }
    }

    async fn json(&self, request: RequestBuilder) -> Result<Value, ClientError> {
        let body = self.send(request).await?.bytes().await;
        let body = body.map_err(|source| self.unreachable(source))?;
        serde_json::from_slice(&body).map_err(ClientError::Json)
    }

    async fn send(&self, request: RequestBuilder) -> Result<Response, ClientError> {
        let response = request
            .bearer_auth(&self.key)
            .send()
            .await
            .map_err(|source| self.unreachable(source))?;
        let status = response.status();
        if status.is_success() {
            return Ok(response);
        }
        let body = response.bytes().await.unwrap_or_default();
        let body: Value = serde_json::from_slice(&body).unwrap_or_default();
        let error = &body["error"];
        Err(ClientError::Refused {
            status: status.as_u16(),
            message: match error["message"].as_str() {
                Some(message) => message.to_owned(),
                None => "The server refuses, and does not say why".to_owned(),
            },
            param: error["param"].as_str().map(str::to_owned),
        })
    }
}

/// Where the API is: the URL without `/v1`.
fn base_of(url: &str) -> Result<String, ClientError> {
    let shown = credentials::hidden(url);
    let wrong = |what: &str| {
        ClientError::Wrong(format!(
            "--url (or OPENAI_BASE_URL) must be a URL such as http://127.0.0.1:8090/v1, not \
             {shown:?}: {what}"
        ))
    };
    let parsed = Url::parse(url).map_err(|error| wrong(&error.to_string()))?;
    if !matches!(parsed.scheme(), "http" | "https") || !parsed.has_host() {
        return Err(wrong("it has to begin with http:// or https://"));
    }
    if !parsed.username().is_empty() || parsed.password().is_some() {
        return Err(wrong("a key goes into --api-key (or OPENAI_API_KEY)"));
    }
    let base = url.trim_end_matches('/');
    Ok(base.strip_suffix("/v1").unwrap_or(base).to_owned())
}

/// What reqwest's errors say is in the cause of the cause.
fn reason_of(error: &reqwest::Error) -> String {
    let mut cause: &dyn Error = error;
    while let Some(next) = cause.source() {
        cause = next;
    }
    cause.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_url_that_is_none_is_told_with_one_that_is() {
        for good in [
            "http://h:1",
            "http://h:1/",
            "http://h:1/v1",
            "http://h:1/v1/",
        ] {
            assert_eq!(base_of(good).unwrap(), "http://h:1");
        }
        assert_eq!(base_of("https://h/prefix/v1").unwrap(), "https://h/prefix");
        for wrong in [
            "127.0.0.1:8090",
            "localhost:8090/v1",
            "ftp://h",
            "",
            "http://",
        ] {
            let error = base_of(wrong).unwrap_err().to_string();
            assert!(error.contains("http://127.0.0.1:8090/v1"), "{error}");
        }
        let error = base_of("http://u:secret@h").unwrap_err().to_string();
        assert!(
            error.contains("--api-key") && !error.contains("secret"),
            "{error}"
        );
    }
}
