//! An upstream for tests and benchmarks of the batch API: answers as OpenAI's servers do, at once or
//! after a while, and badly where a prompt asks for it.
//!
//! The last message (or prompt, or input) of a request may begin with a command in brackets:
//!
//! ```text
//! [status 503 2]        answers 503 twice, then well         [status 400 -1]   always
//! [retry 429 1 0.5]     answers 429 with Retry-After: 0.5 once, then well
//! [reset 2]             breaks the connection twice, in the middle of the answer
//! [slow 300]            takes 300 ms
//! [huge 1000000]        answers with so many bytes
//! [html 502 1]          answers 502 with a page instead of JSON, once
//! [broken 1]            answers 200 with half a JSON object, once
//! [error 1]             answers 200 with an error, once
//! ```
//!
//! With `--step-us` it takes its time as an engine with continuous batching does ([`engine`]): a prompt
//! has a token for each four bytes of the request's body, the answer `max_tokens` of them; with
//! `"stream": true` they arrive one by one.
//!
//! Attempts are told apart by `x-request-id`. `GET /seen` tells what was received, in order.

mod engine;

use std::collections::{HashMap, VecDeque};
use std::io::Write;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::extract::{DefaultBodyLimit, State};
use axum::http::{HeaderMap, StatusCode, Uri, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use clap::Parser;
use futures_util::StreamExt;
use serde::Deserialize;
use serde_json::value::RawValue;
use serde_json::{Value, json};
use tokio::sync::{mpsc, oneshot};

use engine::{Capacity, Engine};

/// Requests remembered for `/seen`.
const SEEN_MAX: usize = 100_000;

#[derive(Debug, Parser)]
struct Cli {
    /// Where to listen; the address is printed.
    #[arg(long, default_value = "127.0.0.1:0")]
    listen: SocketAddr,
    /// Milliseconds that every answer takes once it has begun.
    #[arg(long, default_value_t = 0)]
    service_ms: u64,
    /// Requests answered at once; others wait, those of lower "priority" first served. 0 is no limit.
    #[arg(long, default_value_t = 0)]
    capacity: usize,
    /// Waiting requests beyond which 429 is answered. 0 is no limit.
    #[arg(long, default_value_t = 0)]
    queue: usize,
    /// The key that must be sent.
    #[arg(long)]
    key: Option<String>,
    /// Remember nothing of what was received.
    #[arg(long)]
    forget: bool,
    #[command(flatten)]
    engine: Capacity,
}

struct Mock {
    cli: Cli,
    attempts: Mutex<HashMap<String, u64>>,
    seen: Mutex<VecDeque<Value>>,
    places: Mutex<Places>,
    engine: Option<Arc<Engine>>,
}

/// Places, and who waits for one: by priority, then by arrival.
#[derive(Default)]
struct Places {
    running: usize,
    most_running: usize,
    waiting: Vec<(i64, u64, oneshot::Sender<()>)>,
    arrived: u64,
}

#[derive(Deserialize)]
struct Asked<'a> {
    model: Option<&'a str>,
    priority: Option<i64>,
    max_tokens: Option<usize>,
    #[serde(default)]
    stream: bool,
    #[serde(borrow)]
    messages: Option<Vec<Message<'a>>>,
    #[serde(borrow)]
    prompt: Option<&'a RawValue>,
    #[serde(borrow)]
    input: Option<&'a RawValue>,
}

#[derive(Deserialize)]
struct Message<'a> {
    #[serde(borrow)]
    content: Option<&'a RawValue>,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[tokio::main]
async fn main() -> std::io::Result<()> {
    let cli = Cli::parse();
    let listener = tokio::net::TcpListener::bind(cli.listen).await?;
    writeln!(std::io::stdout(), "{}", listener.local_addr()?)?;
    let engine = match cli.engine.step_us {
        0 => None,
        _ => Some(Engine::start(cli.engine.clone())?),
    };
    let mock = Arc::new(Mock {
        cli,
        attempts: Mutex::default(),
        seen: Mutex::default(),
        places: Mutex::default(),
        engine,
    });
    let routes = Router::new()
        .route("/v1/models", get(models))
        .route("/seen", get(seen))
        .route("/v1/{*endpoint}", post(answer))
        .layer(DefaultBodyLimit::disable())
        .with_state(mock);
    axum::serve(listener, routes).await
}

async fn models() -> Json<Value> {
    let model = |id| json!({"id": id, "object": "model", "created": 0, "owned_by": "mock"});
    Json(json!({"object": "list", "data": [model("mock"), model("org/mock-2")]}))
}

async fn seen(State(mock): State<Arc<Mock>>) -> Json<Value> {
    let most_at_once = locked(&mock.places).most_running;
    Json(json!({"requests": *locked(&mock.seen), "most_at_once": most_at_once}))
}

/// A place in the engine, given to whoever is first when it is free again.
struct Place(Arc<Mock>);

impl Drop for Place {
    fn drop(&mut self) {
        let mut places = locked(&self.0.places);
        places.running -= 1;
        while !places.waiting.is_empty() {
            let first = places
                .waiting
                .iter()
                .enumerate()
                .min_by_key(|(_, (priority, arrived, _))| (*priority, *arrived))
                .map_or(0, |(position, _)| position);
            let (_, _, turn) = places.waiting.swap_remove(first);
            // Those who gave up are passed over.
            if turn.send(()).is_ok() {
                places.running += 1;
                break;
            }
        }
    }
}

async fn place(mock: &Arc<Mock>, priority: i64) -> Option<Place> {
    let turn = {
        let mut places = locked(&mock.places);
        let capacity = mock.cli.capacity;
        if capacity == 0 || places.running < capacity {
            places.running += 1;
            places.most_running = places.most_running.max(places.running);
            return Some(Place(Arc::clone(mock)));
        }
        if mock.cli.queue > 0 && places.waiting.len() >= mock.cli.queue {
            return None;
        }
        places.arrived += 1;
        let (give, turn) = oneshot::channel();
        let arrived = places.arrived;
        places.waiting.push((priority, arrived, give));
        turn
    };
    turn.await.ok().map(|()| Place(Arc::clone(mock)))
}

fn refuse(status: StatusCode, message: &str) -> Response {
    let error = json!({"error": {"message": message, "type": "mock", "param": null, "code": null}});
    (status, Json(error)).into_response()
}

async fn answer(
    State(mock): State<Arc<Mock>>,
    uri: Uri,
    headers: HeaderMap,
    body: Bytes,
) -> Response {
    let text = |name: &str| {
        let value = headers.get(name).and_then(|value| value.to_str().ok());
        value.unwrap_or_default().to_owned()
    };
    if let Some(key) = &mock.cli.key
        && text("authorization") != format!("Bearer {key}")
    {
        return refuse(StatusCode::UNAUTHORIZED, "wrong key");
    }
    let Ok(asked) = serde_json::from_slice::<Asked<'_>>(&body) else {
        return refuse(StatusCode::BAD_REQUEST, "not JSON");
    };
    let Some(_place) = place(&mock, asked.priority.unwrap_or(0)).await else {
        return refuse(StatusCode::TOO_MANY_REQUESTS, "the queue is full");
    };
    let content = match &asked.messages {
        Some(messages) => messages.last().and_then(|message| message.content),
        None => asked.prompt.or(asked.input),
    };
    let content: String = content
        .and_then(|content| serde_json::from_str(content.get()).ok())
        .unwrap_or_default();
    let id = text("x-request-id");
    if !mock.cli.forget {
        let mut seen = locked(&mock.seen);
        seen.push_back(json!({"id": id, "user": text("user"), "path": uri.path(),
            "authorization": text("authorization"),
            "model": asked.model, "priority": asked.priority, "content": content}));
        if seen.len() > SEEN_MAX {
            seen.pop_front();
        }
    }
    if mock.cli.service_ms > 0 {
        tokio::time::sleep(Duration::from_millis(mock.cli.service_ms)).await;
    }
    let command = content
        .strip_prefix('[')
        .and_then(|rest| rest.split_once(']'))
        .map(|(command, _)| command);
    if let Some(command) = command {
        let words: Vec<&str> = command.split(' ').collect();
        if let Some(response) = misbehave(&mock, &id, &words).await {
            return response;
        }
    }
    let model = asked.model.unwrap_or_default();
    let Some(engine) = &mock.engine else {
        return well(uri.path(), model, &content, (5, 7));
    };
    let (prompt, output) = (body.len().div_ceil(4), asked.max_tokens.unwrap_or(16));
    let mut tokens = engine.ask(asked.priority.unwrap_or(0), prompt, output);
    if asked.stream {
        return stream(tokens);
    }
    while tokens.recv().await.is_some() {}
    well(uri.path(), model, &content, (prompt, output))
}

/// The tokens as they come, as server-sent events.
fn stream(tokens: mpsc::Receiver<()>) -> Response {
    const TOKEN: &str = "data: {\"choices\":[{\"index\":0,\"delta\":{\"content\":\"x\"}}]}\n\n";
    let events = futures_util::stream::unfold(tokens, |mut tokens| async {
        tokens.recv().await.map(|()| (TOKEN, tokens))
    });
    let done = futures_util::stream::once(async { "data: [DONE]\n\n" });
    let events = events.chain(done).map(Ok::<_, std::convert::Infallible>);
    let headers = [(header::CONTENT_TYPE, "text/event-stream")];
    (headers, Body::from_stream(events)).into_response()
}

/// What the command asks for; none if the request is to be answered well.
async fn misbehave(mock: &Mock, id: &str, words: &[&str]) -> Option<Response> {
    let number = |position: usize| {
        let word: Option<&&str> = words.get(position);
        word.and_then(|word| word.parse::<i64>().ok()).unwrap_or(0)
    };
    let within = |times: i64| {
        let mut attempts = locked(&mock.attempts);
        let attempt = attempts.entry(id.to_owned()).or_default();
        *attempt += 1;
        times < 0 || i64::try_from(*attempt).is_ok_and(|attempt| attempt <= times)
    };
    let status = |position| {
        let code = u16::try_from(number(position)).unwrap_or(500);
        StatusCode::from_u16(code).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR)
    };
    match *words.first()? {
        "status" if within(number(2)) => Some(refuse(status(1), "as you wish")),
        "retry" if within(number(2)) => {
            let mut response = refuse(status(1), "slow down");
            let after = words.get(3)?.parse().ok()?;
            response.headers_mut().insert(header::RETRY_AFTER, after);
            Some(response)
        }
        "reset" if within(number(1)) => {
            let torn = [Ok(Bytes::from_static(b"{\"id\"")), Err("torn")];
            let torn = futures_util::stream::iter(torn);
            Some(Body::from_stream(torn).into_response())
        }
        "html" if within(number(2)) => {
            Some((status(1), "<html>bad\ngateway</html>").into_response())
        }
        "broken" if within(number(1)) => Some("{\"id\": ".into_response()),
        "error" if within(number(1)) => {
            let error = json!({"message": "as you wish", "type": "mock", "code": null});
            Some(Json(json!({"error": error})).into_response())
        }
        "slow" => {
            let pause = u64::try_from(number(1)).unwrap_or(0);
            tokio::time::sleep(Duration::from_millis(pause)).await;
            None
        }
        "huge" => {
            let size = usize::try_from(number(1)).unwrap_or(0);
            let text = "x".repeat(size);
            Some(Json(json!({"object": "chat.completion", "text": text})).into_response())
        }
        _ => None,
    }
}

/// An answer, and the tokens of prompt and answer.
fn well(path: &str, model: &str, content: &str, (prompt, output): (usize, usize)) -> Response {
    let total = prompt + output;
    let answer = match path {
        "/v1/chat/completions" => json!({
            "id": "chatcmpl-1", "object": "chat.completion", "created": 0, "model": model,
            "choices": [{"index": 0, "finish_reason": "stop",
                "message": {"role": "assistant", "content": content}}],
            "usage": {"prompt_tokens": prompt, "completion_tokens": output, "total_tokens": total,
                "prompt_tokens_details": {"cached_tokens": 4}},
        }),
        "/v1/embeddings" => json!({
            "object": "list", "model": model,
            "data": [{"object": "embedding", "index": 0, "embedding": [0.5, 0.25]}],
            "usage": {"prompt_tokens": prompt, "total_tokens": prompt},
        }),
        "/v1/responses" => json!({
            "id": "resp_1", "object": "response", "model": model,
            "output": [{"type": "message", "content": [{"type": "output_text", "text": content}]}],
            "usage": {"input_tokens": prompt, "output_tokens": output, "total_tokens": total},
        }),
        path => json!({
            "id": "cmpl-1", "object": path, "model": model,
            "choices": [{"index": 0, "finish_reason": "stop", "text": content}],
            "usage": {"prompt_tokens": prompt, "completion_tokens": output, "total_tokens": total},
        }),
    };
    Json(answer).into_response()
}
