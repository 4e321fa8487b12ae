//! Serves the batch API: reads the options, opens the stores, starts the parts, and takes them down in
//! order.

use std::error::Error;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use kvtide_control_base::api_keys::Keys;
use kvtide_control_base::telemetry;
use kvtide_control_base::tls::Trust;
use rustix::fs::{FlockOperation, flock};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::task::{JoinError, JoinSet};
use tokio_util::sync::CancellationToken;
use url::Url;

use crate::address::ListenAddress;
use crate::blobs::{Blobs, Local, Objects};
use crate::budget::Budget;
use crate::http::{
    Access, Admission, App, Bounds, HttpLimits, ONLY_TENANT, Refusals, Reservations, listen, router,
};
use crate::id;
use crate::private::{keep_new_files_private, keep_old_files_private};
use crate::run::{
    Bell, JobOptions, LineOrder, PaceOptions, RetryPolicy, RunOptions, Runner, Upstream,
    sweep_for_ever,
};
use crate::store::{Metadata, Places, Postgres, Sqlite};
use crate::variables;

/// How often the file of keys is looked at.
const KEYS_REFRESHED_EVERY: Duration = Duration::from_secs(2);
/// What requests that are still being answered get after the rest has ended.
const HTTP_GRACE: Duration = Duration::from_secs(5);

type AnyError = Box<dyn Error + Send + Sync>;

/// Options of the server. Each can also be set by an environment variable.
#[derive(Clone, Debug, clap::Args)]
pub struct ServeArgs {
    /// Address, or name, and port to listen on.
    #[arg(long, env = "KVTIDE_BATCH_LISTEN", default_value = "127.0.0.1:8090")]
    pub listen: ListenAddress,
    /// The OpenAI server that answers the requests: the router, an engine, or any other. A name and a
    /// password in the URL are sent to it as basic authentication.
    #[arg(
        long,
        env = "KVTIDE_BATCH_UPSTREAM",
        default_value = "http://127.0.0.1:8000",
        hide_env_values = true
    )]
    pub upstream: String,
    /// File with the API key that is sent to the upstream.
    #[arg(long, env = "KVTIDE_BATCH_UPSTREAM_KEY_FILE")]
    pub upstream_key_file: Option<PathBuf>,
    /// Directory for the database, the files and scratch space.
    #[arg(long, env = "KVTIDE_BATCH_DATA", default_value = "kvtide-batch")]
    pub data: PathBuf,
    /// postgres://user@host/name instead of SQLite; several servers can then share the work. With
    /// ?sslmode=require only over TLS.
    #[arg(
        long,
        env = "KVTIDE_BATCH_DATABASE",
        requires = "blobs",
        hide_env_values = true
    )]
    pub database: Option<String>,
    /// s3://bucket/prefix (with the usual AWS_… variables), or file:///directory that all servers
    /// share, instead of the data directory.
    #[arg(long, env = "KVTIDE_BATCH_BLOBS", hide_env_values = true)]
    pub blobs: Option<Url>,
    /// PEM file with certificates of authorities to trust, beside those that the system trusts: for an
    /// https:// upstream, for PostgreSQL and for the object store.
    #[arg(long, env = "KVTIDE_BATCH_CA_FILE")]
    pub ca_file: Option<PathBuf>,
    /// File of API keys, see `kvtide-control batch key`. If not given, the file that KVTIDE_API_KEYS
    /// names.
    #[arg(long, env = "KVTIDE_BATCH_KEYS")]
    pub keys: Option<PathBuf>,
    /// The file of API keys of all servers of the control plane.
    #[arg(long, env = "KVTIDE_API_KEYS", hide = true)]
    pub api_keys: Option<PathBuf>,
    /// Serve without API keys beyond loopback too. User management is off there.
    #[arg(long, env = "KVTIDE_BATCH_ANONYMOUS", conflicts_with_all = ["keys", "api_keys"])]
    pub anonymous: bool,

    /// Batches worked on at once.
    #[arg(long, env = "KVTIDE_BATCH_JOBS", default_value_t = 4, value_parser = count())]
    pub jobs: u32,
    /// Requests in flight for each batch.
    #[arg(long, env = "KVTIDE_BATCH_REQUESTS_PER_JOB", default_value_t = 256, value_parser = count())]
    pub requests_per_job: u32,
    /// Requests in flight for each model, at most; how many there really are follows the upstream.
    #[arg(long, env = "KVTIDE_BATCH_REQUESTS_PER_MODEL", default_value_t = 256, value_parser = count())]
    pub requests_per_model: u32,
    /// Requests in flight when a model is first used.
    #[arg(long, env = "KVTIDE_BATCH_REQUESTS_AT_FIRST", default_value_t = 4, value_parser = count())]
    pub requests_at_first: u32,
    /// Send fewer requests at once when answers take this many times as long as the best seen (1.07 = 7 %
    /// longer). More gets batches done sooner, at the expense of whoever else uses the engine.
    #[arg(long, env = "KVTIDE_BATCH_LATENCY_TOLERANCE", default_value_t = 1.07)]
    pub latency_tolerance: f64,
    /// Attempts for one request.
    #[arg(long, env = "KVTIDE_BATCH_ATTEMPTS", default_value_t = 5, value_parser = count())]
    pub attempts: u32,
    /// Milliseconds between the first failed attempt and the second; doubles from there.
    #[arg(long, env = "KVTIDE_BATCH_BACKOFF_MS", default_value_t = 500)]
    pub backoff_ms: u64,
    /// Seconds that one attempt may take.
    #[arg(long, env = "KVTIDE_BATCH_REQUEST_TIMEOUT_S", default_value_t = 600, value_parser = count())]
    pub request_timeout_s: u32,
    /// Seconds to wait for an upstream that refuses the key (401, 403) whatever it is asked; after that,
    /// its answers are the results.
    #[arg(long, env = "KVTIDE_BATCH_REFUSED_FOR_S", default_value_t = 900)]
    pub refused_for_s: u64,
    /// A "priority" to put into every request, for engines that schedule by it (vLLM: higher waits).
    #[arg(long, env = "KVTIDE_BATCH_PRIORITY", allow_negative_numbers = true)]
    pub priority: Option<i64>,
    /// Let one batch name several models.
    #[arg(long, env = "KVTIDE_BATCH_MIXED_MODELS")]
    pub mixed_models: bool,
    /// Let the lines of output and error files stand in the order of the input; takes scratch space for
    /// all of them when a batch ends.
    #[arg(long, env = "KVTIDE_BATCH_ORDERED_OUTPUT")]
    pub ordered_output: bool,
    /// Seconds that requests in flight may go on after a cancellation.
    #[arg(long, env = "KVTIDE_BATCH_CANCEL_GRACE_S", default_value_t = 30, value_parser = clap::value_parser!(u64).range(0..=600))]
    pub cancel_grace_s: u64,
    /// Seconds that requests in flight may go on after SIGTERM.
    #[arg(long, env = "KVTIDE_BATCH_DRAIN_S", default_value_t = 10)]
    pub drain_s: u64,
    /// Seconds after SIGTERM in which connections are still taken while /readyz says 503, so that load
    /// balancers look elsewhere first.
    #[arg(long, env = "KVTIDE_BATCH_UNREADY_S", default_value_t = 5, value_parser = clap::value_parser!(u64).range(0..=600))]
    pub unready_s: u64,
    /// Milliseconds after which the work of a server that is silent goes to another.
    #[arg(long, env = "KVTIDE_BATCH_LEASE_MS", default_value_t = 15_000, value_parser = clap::value_parser!(u64).range(500..=600_000))]
    pub lease_ms: u64,

    /// MiB of memory for requests, answers, uploads, downloads and connections.
    #[arg(long, env = "KVTIDE_BATCH_MEMORY_MIB", default_value_t = 128, value_parser = clap::value_parser!(u32).range(32..=65_536))]
    pub memory_mib: u32,
    /// Batches of all tenants that may wait or be in progress.
    #[arg(long, env = "KVTIDE_BATCH_BATCHES", default_value_t = 10_000)]
    pub batches: u64,
    /// Maximum waiting or running batches per tenant.
    #[arg(long, env = "KVTIDE_BATCH_BATCHES_PER_TENANT", default_value_t = 2_000)]
    pub batches_per_tenant: u64,
    /// MiB of files for each tenant whose key names no other quota.
    #[arg(long, env = "KVTIDE_BATCH_STORAGE_MIB")]
    pub storage_mib: Option<u64>,
    /// MiB of one file that is not for a batch.
    #[arg(long, env = "KVTIDE_BATCH_FILE_MIB", default_value_t = 512)]
    pub file_mib: u64,
    /// Describe files as AIBrix v0.5.0 does: their status is "uploaded", not "processed", and a single
    /// file has content_type, etag and last_modified.
    #[arg(long, env = "KVTIDE_BATCH_AIBRIX")]
    pub aibrix: bool,
}

fn count() -> clap::builder::RangedI64ValueParser<u32> {
    clap::value_parser!(u32).range(1..=1_000_000)
}

/// Why the server cannot start.
#[derive(Debug, thiserror::Error)]
enum Refusal {
    #[error(
        "without API keys, whoever reaches {0} can read all files: give --keys FILE, listen on \
         127.0.0.1, or say --anonymous"
    )]
    Open(String),
    #[error("the file of API keys has no keys: nobody could be served")]
    NoKeys,
    #[error("another server works in {0}; give each its own --data")]
    Taken(PathBuf),
    #[error("--database must begin with postgres:// or postgresql://; without it, SQLite is used")]
    Database,
    #[error("--latency-tolerance must be more than 1")]
    Tolerance,
}

impl ServeArgs {
    fn run_options(&self, memory_bytes: u64) -> RunOptions {
        RunOptions {
            jobs: self.jobs as usize,
            job: JobOptions {
                requests_at_once: self.requests_per_job as usize,
                mixed_models: self.mixed_models,
                line_order: if self.ordered_output {
                    LineOrder::Input
                } else {
                    LineOrder::Answers
                },
                cancel_grace: Duration::from_secs(self.cancel_grace_s),
                drain: Duration::from_secs(self.drain_s),
            },
            pace: PaceOptions {
                initial: self.requests_at_first as usize,
                most: self.requests_per_model as usize,
                latency_tolerance: self.latency_tolerance,
                refused_for: Duration::from_secs(self.refused_for_s),
            },
            retry: RetryPolicy {
                attempts_max: self.attempts,
                backoff: Duration::from_millis(self.backoff_ms),
            },
            request_timeout: Duration::from_secs(self.request_timeout_s.into()),
            priority: self.priority,
            memory_bytes,
            lease: Duration::from_millis(self.lease_ms),
        }
    }

    fn budget(&self, descriptors: u64) -> Budget {
        let memory_bytes = u64::from(self.memory_mib) << 20;
        Budget::of(memory_bytes, descriptors, self.blobs.is_some())
    }

    fn http_limits(&self) -> HttpLimits {
        HttpLimits {
            file_bytes_max: self.file_mib.saturating_mul(1 << 20),
            storage_bytes: self.storage_mib.map(|mib| mib.saturating_mul(1 << 20)),
            places: Places {
                all: self.batches,
                tenant: self.batches_per_tenant,
            },
        }
    }

    fn access(&self) -> Result<Access, AnyError> {
        let Some(path) = self.keys.as_ref().or(self.api_keys.as_ref()) else {
            // Whoever can reach loopback is on this machine already.
            return match (self.anonymous, self.listen.address().ip().is_loopback()) {
                (true, _) => Ok(Access::Anonymous),
                (false, true) => Ok(Access::Local),
                (false, false) => Err(Refusal::Open(self.listen.to_string()).into()),
            };
        };
        let keys = Keys::open(path)?;
        if keys.is_empty() {
            return Err(Refusal::NoKeys.into());
        }
        Ok(Access::Keys(Arc::new(keys)))
    }

    fn upstream(&self, trust: &Trust) -> Result<Upstream, AnyError> {
        let key = match &self.upstream_key_file {
            None => None,
            Some(path) => Some(
                fs::read_to_string(path)
                    .map_err(|error| format!("--upstream-key-file {}: {error}", path.display()))?,
            ),
        };
        Ok(Upstream::new(
            &self.upstream,
            key.as_deref().map(str::trim),
            trust,
        )?)
    }

    async fn metadata(&self, trust: &Trust) -> Result<Arc<dyn Metadata>, AnyError> {
        let Some(url) = &self.database else {
            return Ok(Arc::new(Sqlite::open(&self.data.join("batch.sqlite"))?));
        };
        if !url.starts_with("postgres://") && !url.starts_with("postgresql://") {
            return Err(Refusal::Database.into());
        }
        Ok(Arc::new(Postgres::open(url, trust).await?))
    }

    fn blob_store(&self, trust: &Trust, transfers: usize) -> Result<Arc<dyn Blobs>, AnyError> {
        Ok(match &self.blobs {
            Some(url) => Arc::new(Objects::open(
                url,
                &self.data.join("scratch"),
                trust,
                transfers,
            )?),
            None => Arc::new(Local::open(&self.data)?),
        })
    }
}

/// Serves until SIGTERM or SIGINT.
pub(super) async fn serve(args: ServeArgs) -> Result<(), AnyError> {
    // Several libraries bring TLS along; all take the one that is installed here. An error would
    // say that one is installed already.
    rustls::crypto::ring::default_provider()
        .install_default()
        .ok();
    if args.latency_tolerance.is_nan() || args.latency_tolerance <= 1.0 {
        return Err(Refusal::Tolerance.into());
    }
    let descriptors = raise_file_limit();
    keep_new_files_private();
    tell_what_is_ignored();
    let access = args.access()?;
    let trust = Trust::open(args.ca_file.as_deref())?;
    let upstream = Arc::new(args.upstream(&trust)?);
    let _lock = lock(&args.data)?;
    let budget = args.budget(descriptors);
    let blobs = args.blob_store(&trust, budget.transfers)?;
    let metadata = args.metadata(&trust).await?;
    let metrics = telemetry::init_metrics()?;
    let bell = Arc::new(Bell::default());
    let shutdown = CancellationToken::new();
    let (leaving, closing) = (shutdown.clone(), CancellationToken::new());
    let listener = TcpListener::bind(args.listen.address())
        .await
        .map_err(|error| format!("--listen {}: {error}", args.listen))?;
    let address = listener.local_addr()?;

    let mut parts = JoinSet::new();
    let runner = Arc::new(Runner::new(
        Arc::clone(&metadata),
        Arc::clone(&blobs),
        Arc::clone(&upstream),
        Arc::clone(&bell),
        args.run_options(budget.upstream_bytes),
        id::fresh("server_")?,
        shutdown.clone(),
    ));
    let view = runner.view();
    parts.spawn(runner.run());
    parts.spawn(sweep_for_ever(
        Arc::clone(&metadata),
        Arc::clone(&blobs),
        shutdown.clone(),
    ));
    if let Access::Keys(keys) = &access {
        parts.spawn(refresh_keys(Arc::clone(keys), shutdown.clone()));
    }
    tell_who_is_served(&access, &args.listen);
    let bounds = Bounds {
        connections: budget.connections,
        memory_bytes: budget.callers_bytes,
        tenants: access.has_tenants(),
    };
    let app = Arc::new(App {
        metadata,
        blobs,
        access,
        upstream: Arc::clone(&upstream),
        bell,
        view,
        limits: args.http_limits(),
        refusals: Refusals::default(),
        reservations: Reservations::default(),
        admission: Admission::new(bounds),
        aibrix: args.aibrix,
        leaving,
        metrics,
    });
    tracing::info!(%address, upstream = upstream.shown(), "the batch API is served");
    let mut serving = tokio::spawn(listen(
        listener,
        router(app),
        budget.connections,
        closing.clone(),
        HTTP_GRACE,
    ));
    let (mut failed, unready) = tokio::select! {
        signal = wait_for_signal() => {
            let signal = signal?;
            tracing::info!(?signal, "shutting down");
            (None, signal.unready(args.unready_s))
        }
        ended = &mut serving => return Ok(ended?),
        error = first_end(&mut parts) => (Some(error), Duration::ZERO),
    };
    shutdown.cancel();
    tokio::spawn(close_after(unready, closing));
    while let Some(ended) = parts.join_next().await {
        if ended.is_err() {
            failed.get_or_insert(too_early(ended));
        }
    }
    serving.await?;
    failed.map_or(Ok(()), Err)
}

/// Lets load balancers hear that this server is about to end before it takes no more connections.
async fn close_after(unready: Duration, closing: CancellationToken) {
    // Whoever does not want to wait says so again.
    tokio::time::timeout(unready, wait_for_signal()).await.ok();
    closing.cancel();
}

/// Waits for a part of the server to end before it was told to: without it the server would take
/// batches and never do them.
async fn first_end(parts: &mut JoinSet<()>) -> AnyError {
    match parts.join_next().await {
        Some(ended) => too_early(ended),
        None => std::future::pending().await,
    }
}

fn too_early(ended: Result<(), JoinError>) -> AnyError {
    match ended {
        Ok(()) => "a part of the server has ended by itself".into(),
        Err(error) => format!("a part of the server has failed: {error}").into(),
    }
}

/// Takes all the file descriptors that the system lets this process have: each request in flight needs
/// one or two, and many systems begin with 1024.
fn raise_file_limit() -> u64 {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    let limit = Rlimit {
        current: maximum,
        maximum,
    };
    if let Err(error) = setrlimit(Resource::Nofile, limit) {
        tracing::warn!(%error, "the limit of open files stays as it is");
        return current.unwrap_or(u64::MAX);
    }
    maximum.unwrap_or(u64::MAX)
}

/// Who has misspelt a variable should hear of it.
fn tell_what_is_ignored() {
    let set = std::env::vars_os().filter_map(|(name, _)| name.into_string().ok());
    for name in variables::unknown(set) {
        tracing::warn!("{name} is set and no setting of this server: see batch --help");
    }
}

/// An open server says so: nobody should find out later that nobody was asked for a key.
fn tell_who_is_served(access: &Access, listen: &ListenAddress) {
    match access {
        Access::Keys(keys) => tracing::info!(keys = keys.len(), "callers need an API key"),
        Access::Local => tracing::warn!(
            "NO API KEYS: everybody on this machine who connects to {listen} is the tenant \
             '{ONLY_TENANT}' and an admin; give --keys FILE (KVTIDE_BATCH_KEYS) to ask for keys"
        ),
        Access::Anonymous => tracing::warn!(
            "NO API KEYS, --anonymous: everybody who can connect to {listen} is the tenant \
             '{ONLY_TENANT}' and can read and delete all files"
        ),
    }
}

/// Makes the data directory this server's own, for as long as the file is open.
fn lock(data: &Path) -> Result<File, AnyError> {
    fs::create_dir_all(data).map_err(|error| format!("--data {}: {error}", data.display()))?;
    keep_old_files_private(data)
        .map_err(|error| format!("the access rights in --data {}: {error}", data.display()))?;
    let path = data.join("lock");
    let file = File::create(&path).map_err(|error| format!("{}: {error}", path.display()))?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file),
        Err(rustix::io::Errno::WOULDBLOCK) => Err(Refusal::Taken(data.to_owned()).into()),
        Err(error) => Err(error.into()),
    }
}

async fn refresh_keys(keys: Arc<Keys>, shutdown: CancellationToken) {
    loop {
        tokio::select! {
            () = shutdown.cancelled() => return,
            () = tokio::time::sleep(KEYS_REFRESHED_EVERY) => {}
        }
        match keys.refresh() {
            Ok(false) => {}
            Ok(true) => tracing::info!(keys = keys.len(), "the file of API keys was read again"),
            Err(error) => tracing::error!("{error}; the keys stay as they were"),
        }
    }
}

/// How the server was told to end.
#[derive(Clone, Copy, Debug)]
enum Signal {
    Terminate,
    Interrupt,
}

impl Signal {
    /// How long others need to hear of it. Whoever sits at the terminal has heard already.
    fn unready(self, seconds: u64) -> Duration {
        match self {
            Signal::Terminate => Duration::from_secs(seconds),
            Signal::Interrupt => Duration::ZERO,
        }
    }
}

async fn wait_for_signal() -> std::io::Result<Signal> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    Ok(tokio::select! {
        _ = terminate.recv() => Signal::Terminate,
        _ = interrupt.recv() => Signal::Interrupt,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_part_that_panics_is_noticed_while_the_others_go_on() {
        let mut parts = JoinSet::new();
        parts.spawn(std::future::pending());
        parts.spawn(async { panic!("out of order") });
        let error = first_end(&mut parts).await;
        assert!(error.to_string().contains("has failed"), "{error}");
    }
}
