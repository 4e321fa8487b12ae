//! `kvtide serve`: reads the configuration, listens, opens the node, and takes everything down in order.

use std::fmt::Write as _;
use std::fs;
use std::io::{self, Write as _};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::Args;
use kvtide_engine::{NodeError, available_memory_bytes};
use tokio::net::UnixListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet};

use crate::check::{self, Finding};
use crate::cli::{self, Failure};
use crate::config::quantity::exact_duration;
use crate::config::{Config, Settings, Sources};
use crate::connection::{self, Door};
use crate::http;
use crate::logs;
use crate::node::{Closed, Node};
use crate::opening::Opening;
use crate::pooled::Pooled;
use crate::socket::{Allowed, Listening, SocketError, from_service_manager};
use crate::systemd;
use crate::tally::Tally;

/// How often the service manager hears how a start goes, and how long it is asked to wait from then.
const ANNOUNCED_EVERY: Duration = Duration::from_secs(1);
const START_PATIENCE: Duration = Duration::from_secs(30);
/// The shell answers people and probes: it needs to be there, and not to be fast.
const THREADS: usize = 2;
/// What a node gets beyond the grace, before the process ends without it.
const OVERTIME: Duration = Duration::from_secs(2);

/// Options of the daemon. All else is in the file, or in the environment as
/// `KVTIDE_SERVE_<SECTION>_<KEY>`.
#[derive(Clone, Debug, Default, Args)]
pub struct ServeArgs {
    /// TOML file; without one, defaults and the environment. Every setting is in docs/serve.md.
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Print the configuration and where each value comes from, look whether this machine can do it,
    /// and end.
    #[arg(long)]
    pub check: bool,
    /// Where to listen, instead of socket.path.
    #[arg(long, value_name = "PATH")]
    pub socket: Option<PathBuf>,
    /// How long saves in flight are waited for after SIGTERM, instead of shutdown.grace.
    #[arg(long, value_name = "TIME", value_parser = cli::time)]
    pub grace: Option<Duration>,
}

/// Why a daemon does not start.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// There is no place to listen.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// The socket cannot be used.
    #[error("the socket cannot be used: {0}; look at the limits of this process")]
    Listener(io::Error),
    /// There is no place for health and metrics.
    #[error("http.listen: {address} cannot be listened on: {source}; set it to another address")]
    Http {
        /// The address.
        address: std::net::SocketAddr,
        /// Why not.
        source: io::Error,
    },
    /// Threads cannot be started.
    #[error("threads cannot be started: {0}; look at the limits of this process")]
    Runtime(io::Error),
    /// Signals cannot be waited for.
    #[error("signals cannot be waited for: {0}; look at the limits of this process")]
    Signals(io::Error),
    /// The pool cannot be opened.
    #[error(transparent)]
    Open(#[from] NodeError),
    /// Opening the pool has ended in a panic, which the log tells.
    #[error("opening the pool has failed; this is a fault of kvtide, please report the log")]
    Panicked,
}

/// The inside of the daemon: reserves or takes over its memory. Blocks for as long as that takes.
fn open_node(config: &Config) -> Result<Arc<dyn Node>, NodeError> {
    Ok(Arc::new(Pooled::open(config)?))
}

/// Runs the command.
pub(crate) fn main(args: &ServeArgs) -> Result<(), Failure> {
    let settings = read(args)?;
    if args.check {
        return report(&settings);
    }
    let config = settings.config;
    logs::init(&config.log.level, config.log.format).map_err(Failure::failed)?;
    for notice in &settings.notices {
        tracing::warn!("{notice}");
    }
    run(config).map_err(|error| {
        tracing::error!("{error}");
        systemd::status(&error.to_string());
        Failure::Logged
    })
}

fn run(config: Config) -> Result<(), ServeError> {
    // Before other threads run: it takes variables out of the environment.
    let listening = match from_service_manager(&config.socket.path)? {
        Some(listening) => {
            tracing::info!(path = %listening.path().display(), "systemd has opened the socket");
            listening
        }
        None => Listening::open(&config.socket)?,
    };
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(THREADS)
        .thread_name("kvtide-serve")
        .enable_all()
        .build()
        .map_err(ServeError::Runtime)?;
    let served = runtime.block_on(async {
        let stopped = until_stopped().map_err(ServeError::Signals)?;
        serve(config, listening, open_node, stopped).await
    });
    // What still runs in threads of its own would be waited for.
    runtime.shutdown_background();
    served
}

fn read(args: &ServeArgs) -> Result<Settings, Failure> {
    let text = args.config.as_ref().map(|path| {
        fs::read_to_string(path).map_err(|error| {
            let path = path.display();
            Failure::Usage(format!(
                "{path}: cannot be read: {error}; name a file with --config"
            ))
        })
    });
    let text = text.transpose()?;
    let mut arguments = Vec::new();
    if let Some(path) = &args.socket {
        arguments.push(("--socket", "socket.path", path.display().to_string()));
    }
    if let Some(grace) = args.grace {
        arguments.push(("--grace", "shutdown.grace", exact_duration(grace)));
    }
    let environment = cli::environment();
    let file = args.config.as_deref().zip(text.as_deref());
    let read_with = |available_bytes| {
        Settings::read(&Sources {
            file,
            environment: &environment,
            arguments: &arguments,
            available_bytes,
        })
        .map_err(|errors| Failure::Usage(errors.to_string()))
    };
    // What the pool's file has already can be taken as well: the next daemon takes it over. Where it
    // lies is known when the settings have been read once.
    let where_it_lies = read_with(Some(u64::MAX))?.config.memory;
    let available = Some(available_memory_bytes()).filter(|bytes| *bytes != u64::MAX);
    let held = check::held_bytes(&where_it_lies);
    read_with(available.map(|bytes| bytes.saturating_add(held)))
}

/// `--check`: the configuration, then what of the machine fits to it.
fn report(settings: &Settings) -> Result<(), Failure> {
    let findings = check::findings(&settings.config);
    let mut text = settings.as_toml();
    text.push('\n');
    // Writing to a String does not fail.
    for Finding { subject, result } in &findings {
        let _ = match result {
            Ok(how) => writeln!(text, "# ok    {subject:<17} {how}"),
            Err(wrong) => writeln!(text, "# FAIL  {subject:<17} {wrong}"),
        };
    }
    let notes = check::notes(&settings.config);
    for note in settings.notices.iter().chain(&notes) {
        let _ = writeln!(text, "# note  {note}");
    }
    io::stdout().write_all(text.as_bytes())?;
    let failed = findings.iter().filter(|finding| finding.result.is_err());
    match failed.count() {
        0 => Ok(()),
        count => Err(Failure::Failed(format!("{count} checks have failed"))),
    }
}

/// Ends at the first SIGTERM or SIGINT. The second ends the process: somebody does not want to wait.
///
/// # Errors
/// When signals cannot be waited for.
pub fn until_stopped() -> io::Result<impl Future<Output = ()> + Send + 'static> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    Ok(async move {
        let first = tokio::select! {
            _ = terminate.recv() => "SIGTERM",
            _ = interrupt.recv() => "SIGINT",
        };
        tracing::info!("{first}: stopping");
        tokio::spawn(async move {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            tracing::warn!("a second signal: ending at once");
            std::process::exit(1);
        });
    })
}

/// Serves until `stopped`, and then for as long as the grace allows.
///
/// # Errors
/// [`ServeError`] when the daemon cannot start.
pub async fn serve<Open, Stopped>(
    config: Config,
    listening: Listening,
    open: Open,
    stopped: Stopped,
) -> Result<(), ServeError>
where
    Open: FnOnce(&Config) -> Result<Arc<dyn Node>, NodeError> + Send + 'static,
    Stopped: Future<Output = ()>,
{
    let tally = Arc::new(Tally::default());
    let opening: Arc<dyn Node> = Arc::new(Opening::now());
    let (nodes, node) = watch::channel(opening);
    let mut tasks = JoinSet::new();
    if let Some(address) = config.http_listen {
        let (node, tally) = (node.clone(), Arc::clone(&tally));
        let serving = http::serve(address, http::App { node, tally }).await;
        let (_, serving) = serving.map_err(|source| ServeError::Http { address, source })?;
        tasks.spawn(serving);
    }
    let door = Arc::new(Door {
        node: node.clone(),
        allowed: Allowed::new(&config.socket),
        tally,
    });
    tasks.spawn(connection::accept(listener(&listening)?, door));
    tracing::info!(path = %listening.path().display(), "listening");

    let grace = config.grace;
    let announced = tokio::spawn(announce(node));
    let mut opened = tokio::task::spawn_blocking(move || open(&config));
    tokio::pin!(stopped);
    let node = tokio::select! {
        opened = &mut opened => opened.map_err(|_| ServeError::Panicked)??,
        // What has been reserved so far has no name yet, and goes with the process.
        () = &mut stopped => return Ok(()),
    };
    nodes.send_replace(Arc::clone(&node));
    stopped.await;
    close(node, grace, announced).await;
    // Until now engines that came were told why they are not served, and probes how it goes.
    tasks.shutdown().await;
    Ok(())
}

fn listener(listening: &Listening) -> Result<UnixListener, ServeError> {
    let listener = listening
        .listener
        .try_clone()
        .map_err(ServeError::Listener)?;
    listener
        .set_nonblocking(true)
        .map_err(ServeError::Listener)?;
    UnixListener::from_std(listener).map_err(ServeError::Listener)
}

/// Tells the service manager how a start goes, and once that engines are served.
async fn announce(node: watch::Receiver<Arc<dyn Node>>) {
    loop {
        let asked = Arc::clone(&node.borrow());
        let Ok(readiness) = tokio::task::spawn_blocking(move || asked.readiness()).await else {
            return; // It has panicked, and said so.
        };
        let reasons = readiness.reasons.join("; ");
        if readiness.ready {
            tracing::info!("ready");
            systemd::ready(if reasons.is_empty() {
                "serving"
            } else {
                &reasons
            });
            return;
        }
        systemd::still_starting(&reasons, START_PATIENCE);
        tokio::time::sleep(ANNOUNCED_EVERY).await;
    }
}

async fn close(node: Arc<dyn Node>, grace: Duration, announced: JoinHandle<()>) {
    announced.abort();
    systemd::stopping(grace + OVERTIME);
    let begun = Instant::now();
    let closing = tokio::task::spawn_blocking(move || node.close(begun + grace));
    let took = |begun: Instant| begun.elapsed().as_secs_f64();
    match tokio::time::timeout(grace + OVERTIME, closing).await {
        Ok(Ok(Closed { cut_off_saves: 0 })) => {
            tracing::info!(seconds = took(begun), "stopped");
            systemd::status("stopped");
        }
        Ok(Ok(Closed { cut_off_saves })) => {
            tracing::warn!(
                seconds = took(begun),
                blocks = cut_off_saves,
                "stopped with saves in flight; the next start does not have these blocks"
            );
            systemd::status("stopped");
        }
        Ok(Err(_)) => tracing::error!("stopping has failed; the next start finds what was saved"),
        Err(_) => tracing::warn!(
            seconds = took(begun),
            "stopped without waiting for the end of everything; the next start finds what was saved"
        ),
    }
}
