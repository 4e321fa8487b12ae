//! The command line's side of the API: `submit`, `status`, `watch`, `fetch`, `cancel`. Speaks to any
//! server that has OpenAI's batch API.

mod api;
mod input;
mod sending;

use std::io::{self, IsTerminal, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use kvtide_control_base::tls::TrustError;
use serde_json::Value;

use api::Api;
use input::Input;

/// How often a batch is looked at while it is watched.
const LOOK_EVERY: Duration = Duration::from_millis(500);
/// How long that may fail: a server that restarts is back by then.
const LOST: Duration = Duration::from_secs(60);
/// Exit status of a command whose batch did not complete.
const NOT_COMPLETED: u8 = 2;

/// Where the server is, and who calls.
#[derive(Debug, clap::Args)]
pub struct ClientArgs {
    /// The server's URL, with or without /v1.
    #[arg(
        long,
        env = "OPENAI_BASE_URL",
        default_value = "http://127.0.0.1:8090/v1",
        hide_env_values = true
    )]
    url: String,
    /// The API key.
    #[arg(long, env = "OPENAI_API_KEY", hide_env_values = true)]
    api_key: Option<String>,
    /// PEM file with certificates of authorities to trust, beside those that the system trusts.
    #[arg(long, env = "KVTIDE_BATCH_CA_FILE")]
    ca_file: Option<PathBuf>,
}

/// `submit`
#[derive(Debug, clap::Args)]
pub struct Submit {
    /// A file, or a pipe, with one request a line.
    file: PathBuf,
    /// Where the requests go; if not said, what the first line says.
    #[arg(long)]
    endpoint: Option<String>,
    /// How long the batch may take.
    #[arg(long, default_value = "24h")]
    window: String,
    /// KEY=VALUE to keep with the batch.
    #[arg(long, value_name = "KEY=VALUE")]
    metadata: Vec<String>,
    /// Watch the batch to its end.
    #[arg(long)]
    watch: bool,
    #[command(flatten)]
    client: ClientArgs,
}

/// A command about one batch.
#[derive(Debug, clap::Args)]
pub struct Named {
    /// The batch's id.
    batch: String,
    #[command(flatten)]
    client: ClientArgs,
}

/// `fetch`
#[derive(Debug, clap::Args)]
pub struct Fetch {
    /// The batch's id.
    batch: String,
    /// Where the files go (it is made if need be); their names are BATCH_output.jsonl and BATCH_error.jsonl.
    #[arg(long, default_value = ".")]
    directory: PathBuf,
    #[command(flatten)]
    client: ClientArgs,
}

/// Why a command has failed.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The server says no.
    #[error("{message} (HTTP {status}{})", param.as_ref().map(|p| format!(", parameter {p}")).unwrap_or_default())]
    Refused {
        /// HTTP status.
        status: u16,
        /// The server's words.
        message: String,
        /// What they are about.
        param: Option<String>,
    },
    /// The server cannot be reached.
    #[error("{url} cannot be reached: {reason}; is the server running, and is --url right?")]
    Unreachable {
        /// The server.
        url: String,
        /// Why.
        reason: String,
    },
    /// The server was reached and says nothing.
    #[error("{url} was reached, but does not answer: is the server stopped, or very busy?")]
    Silent {
        /// The server.
        url: String,
    },
    /// A file here cannot be read or written.
    #[error("{path}: {source}")]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Something on the command line.
    #[error("{0}")]
    Wrong(String),
    /// The answer is not what it should be.
    #[error("the server's answer cannot be read: {0}")]
    Json(serde_json::Error),
    /// Nobody can be trusted as asked for.
    #[error(transparent)]
    Trust(#[from] TrustError),
    /// No key could be made.
    #[error(transparent)]
    Keys(#[from] kvtide_control_base::api_keys::KeysError),
}

type Done = Result<ExitCode, ClientError>;

/// Uploads and creates.
pub async fn submit(args: Submit) -> Done {
    let api = Api::new(&args.client)?;
    let mut input = Input::open(&args.file)?;
    let endpoint = match &args.endpoint {
        Some(endpoint) => endpoint.clone(),
        None => input.endpoint()?,
    };
    let mut metadata = serde_json::Map::new();
    for pair in &args.metadata {
        let Some((key, value)) = pair.split_once('=') else {
            let message = format!("--metadata must be KEY=VALUE, not {pair:?}");
            return Err(ClientError::Wrong(message));
        };
        metadata.insert(key.to_owned(), Value::from(value));
    }
    let file = api.upload(input).await?;
    let batch = api.create(&file, &endpoint, &args.window, metadata).await?;
    say(text(&batch["id"]))?;
    if args.watch {
        return follow(&api, text(&batch["id"])).await;
    }
    Ok(ExitCode::SUCCESS)
}

/// Shows.
pub async fn status(args: Named) -> Done {
    let batch = Api::new(&args.client)?.batch(&args.batch).await?;
    show(&batch)
}

/// Follows.
pub async fn watch(args: Named) -> Done {
    follow(&Api::new(&args.client)?, &args.batch).await
}

/// Cancels.
pub async fn cancel(args: Named) -> Done {
    let batch = Api::new(&args.client)?.cancel(&args.batch).await?;
    say(text(&batch["status"]))?;
    Ok(ExitCode::SUCCESS)
}

/// Downloads.
pub async fn fetch(args: Fetch) -> Done {
    let api = Api::new(&args.client)?;
    let batch = api.batch(&args.batch).await?;
    let mut found = false;
    for (field, name) in [("output_file_id", "output"), ("error_file_id", "error")] {
        let Some(id) = batch[field].as_str() else {
            continue;
        };
        if !found {
            std::fs::create_dir_all(&args.directory).map_err(|source| ClientError::File {
                path: args.directory.clone(),
                source,
            })?;
        }
        found = true;
        let path = args.directory.join(format!("{}_{name}.jsonl", args.batch));
        api.download(id, &path).await?;
        say(&path.display().to_string())?;
    }
    if !found {
        complain(&format!(
            "The batch has no files; its status is '{}'.",
            text(&batch["status"])
        ));
        return Ok(ExitCode::from(NOT_COMPLETED));
    }
    Ok(ExitCode::SUCCESS)
}

async fn follow(api: &Api, id: &str) -> Done {
    let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
    let style = "{msg:12} [{bar:40}] {pos}/{len}  {per_sec}  {eta} left";
    if let Ok(style) = ProgressStyle::with_template(style) {
        bar.set_style(style.progress_chars("=> "));
    }
    let mut seen = Instant::now();
    let mut told = String::new();
    let batch = loop {
        match api.batch(id).await {
            Ok(batch) => {
                seen = Instant::now();
                let status = text(&batch["status"]).to_owned();
                let count = |name: &str| batch["request_counts"][name].as_u64().unwrap_or(0);
                bar.set_length(count("total"));
                bar.set_position(count("completed") + count("failed"));
                // Without a terminal there is no bar: say what changes.
                if told != status && !io::stderr().is_terminal() {
                    complain(&status);
                    told.clone_from(&status);
                }
                bar.set_message(status);
                if is_ended(&batch) {
                    break batch;
                }
            }
            Err(error @ (ClientError::Unreachable { .. } | ClientError::Silent { .. })) => {
                if seen.elapsed() >= LOST {
                    return Err(error);
                }
            }
            Err(error) => return Err(error),
        }
        tokio::time::sleep(LOOK_EVERY).await;
    };
    bar.abandon();
    show(&batch)
}

fn is_ended(batch: &Value) -> bool {
    matches!(
        batch["status"].as_str(),
        Some("completed" | "failed" | "expired" | "cancelled")
    )
}

/// Prints a batch, and says with the exit status whether all is well.
fn show(batch: &Value) -> Done {
    say(&serde_json::to_string_pretty(batch).map_err(ClientError::Json)?)?;
    let bad = matches!(
        batch["status"].as_str(),
        Some("failed" | "expired" | "cancelled")
    );
    Ok(if bad {
        ExitCode::from(NOT_COMPLETED)
    } else {
        ExitCode::SUCCESS
    })
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}

/// Prints what the command was asked for.
pub(super) fn say(line: &str) -> Result<(), ClientError> {
    writeln!(io::stdout(), "{line}").map_err(|source| ClientError::File {
        path: "standard output".into(),
        source,
    })
}

/// Tells something beside that.
pub(super) fn complain(line: &str) {
    // There is nobody left to tell if this fails.
    writeln!(io::stderr(), "{line}").ok();
}
