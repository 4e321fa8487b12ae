//! `kvtide-control`: parses the command line and starts what it names.

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use kvtide_control::batch;
use kvtide_control::telemetry::{self, LogFormat};

/// kvtide's control plane.
#[derive(Debug, Parser)]
#[command(version)]
struct Cli {
    /// How log lines look.
    #[arg(long, global = true, value_enum, default_value_t)]
    log_format: LogFormat,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// The batch API: serve it, or use it from the command line.
    Batch(batch::Args),
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    telemetry::log(cli.log_format);
    match cli.command {
        Command::Batch(args) => batch::main(args),
    }
}
