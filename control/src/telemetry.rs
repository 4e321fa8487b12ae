//! Logs and metrics of every command.

use clap::{Args, ValueEnum};
use metrics_exporter_prometheus::{PrometheusBuilder, PrometheusHandle};
use tracing_subscriber::EnvFilter;

/// How logs look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// For a person.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

/// What every command takes for its logs.
#[derive(Clone, Debug, Args)]
pub struct LogArgs {
    /// How logs look
    #[arg(long, value_enum, default_value_t, env = "KVTIDE_LOG_FORMAT")]
    pub log_format: LogFormat,
    /// What is logged: a level, or a list such as `info,kvtide_control=debug`
    #[arg(long, default_value = "info", env = "KVTIDE_LOG")]
    pub log: String,
}

/// Telemetry that could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum TelemetryError {
    /// `--log` is not a filter.
    #[error("--log {filter:?}: {source}")]
    Filter {
        /// What was given.
        filter: String,
        /// Why not.
        source: tracing_subscriber::filter::ParseError,
    },
    /// Metrics can be set up once in a process.
    #[error("setting up metrics: {0}")]
    Metrics(#[from] metrics_exporter_prometheus::BuildError),
}

/// Sets up logs on standard error.
///
/// # Errors
///
/// When the filter cannot be read.
pub fn init_logs(args: &LogArgs) -> Result<(), TelemetryError> {
    let filter = EnvFilter::try_new(&args.log).map_err(|source| TelemetryError::Filter {
        filter: args.log.clone(),
        source,
    })?;
    let logs = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr);
    match args.log_format {
        LogFormat::Text => logs.init(),
        LogFormat::Json => logs.json().init(),
    }
    Ok(())
}

/// Sets up metrics; the handle renders them for `/metrics`.
///
/// # Errors
///
/// When metrics were set up before.
pub fn init_metrics() -> Result<PrometheusHandle, TelemetryError> {
    Ok(PrometheusBuilder::new().install_recorder()?)
}
