//! `kvtide-control check` and `kvtide-control uninstall`: what an administrator runs beside
//! `kubectl apply -k control/deploy`, with the rights of the own kubeconfig.

pub mod check;
mod heartbeat;
mod manifests;
mod objects;
pub mod uninstall;

use std::fmt;
use std::io::Write;
use std::time::Duration;

use anyhow::Context;
use kube::Client;
use kvtide_control_kube::error::explained;

/// Between two looks at what is waited for.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// Prints a line. A closed output is no reason to stop halfway.
fn say(line: fmt::Arguments<'_>) {
    if let Err(error) = writeln!(std::io::stdout().lock(), "{line}") {
        tracing::debug!(%error, "nobody reads the output");
    }
}

/// Runs a command against the cluster of the kubeconfig.
///
/// # Errors
///
/// What the command says, in one line.
fn run<T>(command: impl AsyncFnOnce(Client) -> anyhow::Result<T>) -> anyhow::Result<T> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("starting the runtime")?;
    let outcome = runtime.block_on(async {
        let config = kube::Config::infer().await.context("finding the cluster")?;
        let client = Client::try_from(config).context("connecting to the cluster")?;
        command(client).await
    });
    outcome.map_err(|error| anyhow::anyhow!(explained(&error)))
}
