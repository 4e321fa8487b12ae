//! `kvtide-control`: parses the command line and starts what it names.

use std::process::ExitCode;

use clap::{Parser, Subcommand};
#[cfg(feature = "controller")]
use kvtide_control::{controller, crds, install};
use kvtide_control_base::telemetry::{self, LogArgs};
#[cfg(feature = "batch")]
use kvtide_control_batch as batch;

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
    #[cfg(feature = "batch")]
    Batch(Box<batch::Args>),
    /// Check that an installation works: CRDs, rights, leader, webhook.
    #[cfg(feature = "controller")]
    Check(install::check::Args),
    /// Run the controllers of StormService, RoleSet and PodSet.
    #[cfg(feature = "controller")]
    Controller(Box<controller::Args>),
    /// Print the CustomResourceDefinitions, for `kubectl apply -f -`.
    #[cfg(feature = "controller")]
    Crds(crds::Args),
    /// Remove what control/deploy installed, in a safe order.
    #[cfg(feature = "controller")]
    Uninstall(install::uninstall::Args),
}

fn main() -> anyhow::Result<ExitCode> {
    let cli = Cli::parse();
    telemetry::init_logs(&cli.logs)?;
    Ok(match cli.command {
        #[cfg(feature = "batch")]
        Command::Batch(args) => batch::main(*args),
        #[cfg(feature = "controller")]
        Command::Check(args) => told(install::check::run(&args)),
        #[cfg(feature = "controller")]
        Command::Controller(args) => told(controller::run(*args)),
        #[cfg(feature = "controller")]
        Command::Crds(args) => told(crds::run(args)),
        #[cfg(feature = "controller")]
        Command::Uninstall(args) => told(install::uninstall::run(&args)),
    })
}

/// Tells what went wrong, in one line.
#[cfg(feature = "controller")]
fn told(outcome: anyhow::Result<()>) -> ExitCode {
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {}", kvtide_control_kube::error::explained(&error));
            ExitCode::FAILURE
        }
    }
}
