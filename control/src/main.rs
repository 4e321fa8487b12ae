//! `kvtide-control`: parses the command line and starts what it names.

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use kvtide_control::telemetry::{self, LogArgs};
use kvtide_control::{batch, controller, crds};

/// kvtide's control plane.
#[derive(Debug, Parser)]
#[command(name = "kvtide-control", version)]
struct Cli {
    #[command(flatten)]
    logs: LogArgs,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// The batch API: serve it, or use it from the command line.
    Batch(Box<batch::Args>),
    /// Run the controllers of StormService, RoleSet and PodSet.
    Controller(Box<controller::Args>),
    /// Print the CustomResourceDefinitions, for `kubectl apply -f -`.
    Crds(crds::Args),
}

fn main() -> anyhow::Result<ExitCode> {
    let cli = Cli::parse();
    telemetry::init_logs(&cli.logs)?;
    match cli.command {
        Command::Batch(args) => return Ok(batch::main(*args)),
        Command::Controller(args) => controller::run(*args)?,
        Command::Crds(args) => crds::run(args)?,
    }
    Ok(ExitCode::SUCCESS)
}
