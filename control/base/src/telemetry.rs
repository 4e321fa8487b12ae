//! Logs and metrics, the same for every command.

use std::io;
use std::time::Duration;

use clap::{Args, ValueEnum};
use metrics_exporter_prometheus::{BuildError, Matcher, PrometheusBuilder, PrometheusHandle};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::ParseError;

/// How often what was observed is folded into the histograms, which bounds its memory.
const UPKEEP: Duration = Duration::from_secs(5);
/// Upper bounds of the buckets of all times, in seconds.
const SECONDS: [f64; 14] = [
    0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 1.5, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0,
];

/// How log lines look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

/// What every command takes for its logs.
#[derive(Clone, Debug, Args)]
pub struct LogArgs {
    /// How log lines look.
    #[arg(
        long,
        global = true,
        value_enum,
        default_value_t,
        env = "KVTIDE_LOG_FORMAT"
    )]
    pub log_format: LogFormat,
    /// What is logged: a level, or a list such as `info,kvtide_control_batch=debug`.
    #[arg(long, global = true, default_value = "info", env = "KVTIDE_LOG")]
    pub log: String,
}

/// `--log` is not a filter.
#[derive(Debug, thiserror::Error)]
#[error("--log {filter:?}: {source}")]
pub struct FilterError {
    filter: String,
    source: ParseError,
}

/// Sets up logs, on stderr.
///
/// # Errors
/// [`FilterError`] when the filter cannot be read.
pub fn init_logs(args: &LogArgs) -> Result<(), FilterError> {
    let filter = EnvFilter::try_new(&args.log).map_err(|source| FilterError {
        filter: args.log.clone(),
        source,
    })?;
    let logs = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(io::stderr);
    match args.log_format {
        LogFormat::Text => logs.with_ansi(false).init(),
        LogFormat::Json => logs.json().init(),
    }
    Ok(())
}

/// Starts collecting metrics; the handle renders Prometheus' page. Call it within a tokio runtime.
///
/// # Errors
/// When metrics are collected already.
pub fn init_metrics() -> Result<PrometheusHandle, BuildError> {
    let handle = PrometheusBuilder::new()
        .set_buckets_for_metric(Matcher::Suffix("seconds".to_owned()), &SECONDS)?
        .install_recorder()?;
    let upkept = handle.clone();
    tokio::spawn(async move {
        loop {
            tokio::time::sleep(UPKEEP).await;
            upkept.run_upkeep();
        }
    });
    Ok(handle)
}
