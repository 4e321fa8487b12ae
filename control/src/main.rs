//! `kvtide-control`: parses the command line and starts what it names.

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use kvtide_control::{batch, controller, crds, install};
use kvtide_control_base::telemetry::{self, LogArgs};

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
    /// Check that an installation works: CRDs, rights, leader, webhook.
    Check(install::check::Args),
    /// Run the controllers of StormService, RoleSet and PodSet.
    Controller(Box<controller::Args>),
    /// Print the CustomResourceDefinitions, for `kubectl apply -f -`.
    Crds(crds::Args),
    /// Remove what control/deploy installed, in a safe order.
    Uninstall(install::uninstall::Args),
}

fn main() -> anyhow::Result<ExitCode> {
    let cli = Cli::parse();
    telemetry::init_logs(&cli.logs)?;
    let outcome = match cli.command {
        Command::Batch(args) => return Ok(batch::main(*args)),
        Command::Check(args) => install::check::run(&args),
        Command::Controller(args) => controller::run(*args),
        Command::Crds(args) => crds::run(args),
        Command::Uninstall(args) => install::uninstall::run(&args),
    };
    Ok(match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {}", controller::explained(&error));
            ExitCode::FAILURE
        }
    })
}
