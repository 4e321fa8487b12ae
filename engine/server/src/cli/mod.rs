//! The command line, and how its commands end.

mod operate;

use std::collections::BTreeMap;
use std::env;
use std::ffi::OsString;
use std::fmt::Display;
use std::io::{self, Write as _};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};

use crate::DEFAULT_SOCKET;
use crate::config::quantity;
use crate::serve::{self, ServeArgs};

/// The variable that names the socket, for the daemon and for commands.
pub(crate) const SOCKET_VARIABLE: &str = "KVTIDE_SERVE_SOCKET_PATH";
const EXIT_STATUS: &str = "Exit status: 0 if it worked, 1 if it failed, 2 if the command line or the \
                           configuration is wrong, so that trying again would not help.";

/// kvtide's cache server of a node: one pool of KV cache in host memory for all vLLM engines of the
/// machine.
#[derive(Debug, Parser)]
#[command(name = "kvtide", version, after_help = EXIT_STATUS)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the cache server.
    #[command(after_help = EXIT_STATUS)]
    Serve(ServeArgs),
    /// Show what the server holds, and for whom.
    #[command(after_help = EXIT_STATUS)]
    Status(StatusArgs),
    /// List blocks, to find out what became of one.
    #[command(after_help = EXIT_STATUS)]
    Inspect(InspectArgs),
    /// Drop blocks; engines go on, and compute them when they are asked for.
    #[command(after_help = EXIT_STATUS)]
    Purge(PurgeArgs),
    /// Keep the blocks of a namespace from eviction for a while.
    #[command(after_help = EXIT_STATUS)]
    Pin(PinArgs),
    /// End a pin before its time.
    #[command(after_help = EXIT_STATUS)]
    Unpin(UnpinArgs),
}

/// What every operator's command takes.
#[derive(Clone, Debug, Args)]
struct Asking {
    /// Socket of the server [default: $KVTIDE_SERVE_SOCKET_PATH, or /run/kvtide/kvtide.sock].
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,
    /// Print JSON, for programs.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
struct StatusArgs {
    #[command(flatten)]
    asking: Asking,
    /// Show it again and again, every 2 s or as given; with --json, one line each time.
    #[arg(long, value_name = "TIME", num_args = 0..=1, default_missing_value = "2s",
          require_equals = true, value_parser = interval)]
    watch: Option<Duration>,
}

#[derive(Debug, Args)]
struct InspectArgs {
    #[command(flatten)]
    asking: Asking,
    /// Of this namespace: its id, the beginning of it, or its model.
    #[arg(long, value_name = "NAMESPACE")]
    namespace: Option<String>,
    /// The one with this key, in hexadecimal digits.
    #[arg(long, value_name = "KEY")]
    key: Option<String>,
    /// How many to list.
    #[arg(long, value_name = "COUNT", default_value_t = 100,
          value_parser = clap::value_parser!(u32).range(1..=10_000))]
    limit: u32,
}

#[derive(Debug, Args)]
struct PurgeArgs {
    #[command(flatten)]
    asking: Asking,
    #[command(flatten)]
    what: What,
    /// Do it without asking.
    #[arg(long)]
    yes: bool,
}

#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
struct What {
    /// The blocks of a namespace: its id, the beginning of it, or its model.
    #[arg(long, value_name = "NAMESPACE")]
    namespace: Option<String>,
    /// The blocks of a tenant; "" for those of engines that have none.
    #[arg(long, value_name = "TENANT")]
    tenant: Option<String>,
    /// All blocks.
    #[arg(long)]
    all: bool,
}

#[derive(Debug, Args)]
struct PinArgs {
    #[command(flatten)]
    asking: Asking,
    /// The namespace: its id, the beginning of it, or its model.
    #[arg(long, value_name = "NAMESPACE")]
    namespace: String,
    /// For how long, such as 1h: at most 30 days. A pin that exists is replaced.
    #[arg(long, value_name = "TIME", value_parser = ttl)]
    ttl: Duration,
}

#[derive(Debug, Args)]
struct UnpinArgs {
    #[command(flatten)]
    asking: Asking,
    /// The namespace: its id, the beginning of it, or its model.
    #[arg(long, value_name = "NAMESPACE")]
    namespace: String,
}

/// How a command that did not work ends.
#[derive(Debug)]
pub(crate) enum Failure {
    /// Trying again may help.
    Failed(String),
    /// It will not.
    Usage(String),
    /// It failed, and the log says why.
    Logged,
    /// Whoever reads the output has gone, which is their right.
    ReaderGone,
}

impl Failure {
    pub(crate) fn failed(error: impl Display) -> Self {
        Self::Failed(error.to_string())
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::BrokenPipe => Self::ReaderGone,
            _ => Self::Failed(format!("the output cannot be written: {error}")),
        }
    }
}

/// Does what the command line says.
#[must_use]
pub fn run(cli: Cli) -> ExitCode {
    let done = match cli.command {
        Command::Serve(args) => serve::main(&args),
        Command::Status(args) => operate::status(&args),
        Command::Inspect(args) => operate::inspect(args),
        Command::Purge(args) => operate::purge(args),
        Command::Pin(args) => operate::pin(args),
        Command::Unpin(args) => operate::unpin(args),
    };
    let (text, code) = match done {
        Ok(()) | Err(Failure::ReaderGone) => return ExitCode::SUCCESS,
        Err(Failure::Logged) => return ExitCode::FAILURE,
        Err(Failure::Failed(text)) => (text, 1),
        Err(Failure::Usage(text)) => (text, 2),
    };
    let lines: String = text
        .lines()
        .map(|line| format!("error: {line}\n"))
        .collect();
    // Where not even this can be written, the exit status says it.
    let _ = io::stderr().write_all(lines.as_bytes());
    ExitCode::from(code)
}

/// All environment variables.
pub(crate) fn environment() -> BTreeMap<OsString, OsString> {
    env::vars_os().collect()
}

/// Where to look for the daemon: the option, the variable, the default. An empty variable is as none.
fn socket_path(option: Option<PathBuf>, variable: Option<OsString>) -> PathBuf {
    let variable = variable.filter(|path| !path.is_empty()).map(PathBuf::from);
    option.or(variable).unwrap_or_else(|| DEFAULT_SOCKET.into())
}

pub(crate) fn time(text: &str) -> Result<Duration, String> {
    let wrong = || "expected a time such as 500ms, 30s or 1.5h".to_owned();
    quantity::duration(text).ok_or_else(wrong)
}

/// Rarer than 10 times a second, so that watching costs nothing.
fn interval(text: &str) -> Result<Duration, String> {
    let least = Duration::from_millis(100);
    let is_long_enough = |interval: &Duration| *interval >= least;
    time(text).and_then(|interval| {
        let enough = Some(interval).filter(is_long_enough);
        enough.ok_or_else(|| "expected at least 100ms".to_owned())
    })
}

fn ttl(text: &str) -> Result<Duration, String> {
    let range = Duration::from_secs(1)..=Duration::from_secs(30 * 86_400);
    let ttl = time(text)?;
    if range.contains(&ttl) {
        return Ok(ttl);
    }
    Err("expected a time from 1s to 30d".to_owned())
}

#[cfg(test)]
mod tests;
