//! The calls.

use std::fs::File;
use std::io::{self, BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::time::Duration;

use futures_util::TryStreamExt;
use reqwest::multipart::{Form, Part};
use reqwest::{Certificate, Client, RequestBuilder, Response};
use serde::Deserialize;
use serde_json::{Map, Value, json};
use tokio::io::AsyncWriteExt;
use tokio_util::io::ReaderStream;

use crate::batch::client::{ClientArgs, ClientError};
use crate::batch::tls::Trust;

const CONNECT_WITHIN: Duration = Duration::from_secs(10);
/// Bytes of the first line that are read to find its endpoint.
const FIRST_LINE_MAX: u64 = 8 << 20;

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
        let base = args.url.trim_end_matches('/');
        let base = base.strip_suffix("/v1").unwrap_or(base).to_owned();
        let unreachable = |source| ClientError::Unreachable {
            url: base.clone(),
            source,
        };
        let mut builder = Client::builder().connect_timeout(CONNECT_WITHIN);
        if let Some(path) = &args.ca_file {
            for added in Trust::open(Some(path))?.added() {
                let certificate = Certificate::from_der(added).map_err(unreachable)?;
                builder = builder.add_root_certificate(certificate);
            }
        }
        let client = builder.build().map_err(unreachable)?;
        Ok(Api {
            client,
            base,
            // Servers without keys want none, and mind none.
            key: args.api_key.clone().unwrap_or_else(|| "none".to_owned()),
        })
    }

    pub(super) async fn upload(&self, path: &Path) -> Result<String, ClientError> {
        let failed = |source| ClientError::File {
            path: path.to_owned(),
            source,
        };
        let file = tokio::fs::File::open(path).await.map_err(failed)?;
        let bytes = file.metadata().await.map_err(failed)?.len();
        let name = path.file_name().unwrap_or(path.as_os_str());
        let body = reqwest::Body::wrap_stream(ReaderStream::with_capacity(file, 256 << 10));
        let part =
            Part::stream_with_length(body, bytes).file_name(name.to_string_lossy().into_owned());
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
        self.json(self.client.post(self.url("/batches")).json(&order))
            .await
    }

    pub(super) async fn batch(&self, id: &str) -> Result<Value, ClientError> {
        self.json(self.client.get(self.url(&format!("/batches/{id}"))))
            .await
    }

    pub(super) async fn cancel(&self, id: &str) -> Result<Value, ClientError> {
        let url = self.url(&format!("/batches/{id}/cancel"));
        self.json(self.client.post(url)).await
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
        ClientError::Unreachable {
            url: self.base.clone(),
            source,
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

/// The endpoint that the first request of a file names.
pub(super) fn endpoint_of(path: &Path) -> Result<String, ClientError> {
    #[derive(Deserialize)]
    struct Line {
        url: String,
    }
    let failed = |source| ClientError::File {
        path: path.to_owned(),
        source,
    };
    let file = File::open(path).map_err(failed)?;
    let first = BufReader::new(io::Read::take(file, FIRST_LINE_MAX))
        .lines()
        .find(|line| !matches!(line, Ok(line) if line.trim().is_empty()))
        .transpose()
        .map_err(failed)?;
    let line: Option<Line> = first.and_then(|line| serde_json::from_str(&line).ok());
    line.map(|line| line.url).ok_or_else(|| {
        ClientError::Wrong(format!(
            "the first line of {} is no request with a \"url\": mend it, or say --endpoint",
            path.display()
        ))
    })
}
