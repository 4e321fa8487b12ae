//! The calls.

use std::error::Error;
use std::path::{Path, PathBuf};
use std::time::Duration;

use futures_util::TryStreamExt;
use kvtide_control_base::tls::Trust;
use reqwest::multipart::Form;
use reqwest::{Certificate, Client, ClientBuilder, RequestBuilder, Response};
use serde_json::{Map, Value, json};
use tokio::io::AsyncWriteExt;
use url::Url;

use crate::client::input::Input;
use crate::client::sending::{Patience, Sending};
use crate::client::{ClientArgs, ClientError};
use crate::credentials;

const CONNECT_WITHIN: Duration = Duration::from_secs(10);
/// How long a server may send nothing.
const SILENCE: Duration = Duration::from_secs(60);
/// For how long an upload is waited for. What has left this program may still be on its way, and the
/// server may have to pass it on to its store before it answers.
const UPLOADS: Patience = Patience {
    moving: Duration::from_secs(60),
    answer: Duration::from_secs(600),
};
/// How long the answer to a question may take.
const ANSWER_WITHIN: Duration = Duration::from_secs(15);

/// A server.
pub(super) struct Api {
    client: Client,
    /// Reqwest counts the time in which a body is sent as silence: uploads are watched in another way.
    uploads: Client,
    patience: Patience,
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
        let mut trusted = Vec::new();
        if let Some(path) = &args.ca_file {
            for added in Trust::open(Some(path))?.added() {
                trusted.push(Certificate::from_der(added).map_err(unusable)?);
            }
        }
        let builder = || {
            let builder = Client::builder().connect_timeout(CONNECT_WITHIN);
            let trusted = trusted.iter().cloned();
            trusted.fold(builder, ClientBuilder::add_root_certificate)
        };
        let client = builder().read_timeout(SILENCE).build().map_err(unusable)?;
        let uploads = builder().build().map_err(unusable)?;
        Ok(Api {
            client,
            uploads,
            patience: UPLOADS,
            base,
            // Servers without keys want none, and mind none.
            key: args.api_key.clone().unwrap_or_else(|| "none".to_owned()),
        })
    }

    pub(super) async fn upload(&self, input: Input) -> Result<String, ClientError> {
        let (part, sending) = Sending::begin(input);
        let form = Form::new().text("purpose", "batch").part("file", part);
        let request = self.uploads.post(self.url("/files")).multipart(form);
        let file = tokio::select! {
            file = self.json(request) => file?,
            () = sending.stalled(self.patience) => {
                return Err(ClientError::Silent { url: self.base.clone() });
            }
        };
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
    // Also where a password has a '/': it is then no password to the parser.
    if url.contains('@') {
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
    use std::time::Instant;

    use socket2::SockRef;
    use tokio::io::AsyncReadExt;
    use tokio::net::TcpListener;

    use super::*;

    /// A server that reads an upload piece by piece, each after a pause, up to so many bytes, and answers
    /// what it has read to its end after another pause.
    async fn reads_slowly(pause: Duration, most: usize, thinks: Duration) -> String {
        let listening = TcpListener::bind("127.0.0.1:0").await.unwrap();
        // Else the system takes megabytes before anybody reads.
        let socket = SockRef::from(&listening);
        socket.set_recv_buffer_size(64 << 10).unwrap();
        let url = format!("http://{}", listening.local_addr().unwrap());
        tokio::spawn(async move {
            let (mut stream, _) = listening.accept().await.unwrap();
            let mut piece = vec![0; 64 << 10];
            let (mut read, mut end) = (Vec::new(), None);
            while end.is_none_or(|end| read.len() < end) {
                if read.len() >= most {
                    std::future::pending::<()>().await;
                }
                tokio::time::sleep(pause).await;
                let bytes = stream.read(&mut piece).await.unwrap();
                assert!(bytes > 0, "the client has gone");
                read.extend_from_slice(&piece[..bytes]);
                end = end.or_else(|| end_of(&read));
            }
            tokio::time::sleep(thinks).await;
            let answer = b"HTTP/1.1 200 OK\r\ncontent-length: 15\r\n\r\n{\"id\":\"file-1\"}";
            stream.write_all(answer).await.unwrap();
        });
        url
    }

    /// Where a request ends, once its head is there.
    fn end_of(read: &[u8]) -> Option<usize> {
        let head = read.windows(4).position(|four| four == b"\r\n\r\n")? + 4;
        let text = String::from_utf8_lossy(&read[..head]).to_lowercase();
        let length = text.split("content-length: ").nth(1)?;
        Some(head + length.split("\r\n").next()?.parse::<usize>().ok()?)
    }

    async fn upload_to(url: String, moving: Duration) -> Result<String, ClientError> {
        let mut api = Api::new(&ClientArgs {
            url,
            api_key: None,
            ca_file: None,
        })?;
        api.patience.moving = moving;
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(16 << 20).unwrap();
        api.upload(Input::open(file.path())?).await
    }

    #[tokio::test]
    async fn an_upload_may_take_its_time_as_long_as_it_gets_on() {
        let moving = Duration::from_secs(3);
        let url = reads_slowly(Duration::from_millis(20), usize::MAX, moving * 5 / 4).await;
        let began = Instant::now();
        assert_eq!(upload_to(url, moving).await.unwrap(), "file-1");
        assert!(began.elapsed() > moving * 2, "nothing was slow");
    }

    #[tokio::test]
    async fn an_upload_that_stands_still_is_given_up() {
        let url = reads_slowly(Duration::ZERO, 1 << 20, Duration::ZERO).await;
        let error = upload_to(url, Duration::from_millis(500))
            .await
            .unwrap_err();
        assert!(matches!(error, ClientError::Silent { .. }), "{error}");
    }

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
        for secret in ["http://u:secret@h", "http://u:1/secret@h"] {
            let error = base_of(secret).unwrap_err().to_string();
            assert!(
                error.contains("--api-key") && !error.contains("secret"),
                "{error}"
            );
        }
    }
}
