//! The command `kvtide-control`.

use clap::{Parser, Subcommand};
use kvtide_control::{controller, crds};

#[derive(Debug, Parser)]
#[command(
    name = "kvtide-control",
    version,
    about = "kvtide's Kubernetes control plane"
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the controllers of StormService, RoleSet and PodSet
    Controller(Box<controller::Args>),
    /// Print the CustomResourceDefinitions, for `kubectl apply -f -`
    Crds(crds::Args),
}

fn main() -> anyhow::Result<()> {
    match Cli::parse().command {
        Command::Controller(args) => controller::run(*args),
        Command::Crds(args) => crds::run(args),
    }
}
