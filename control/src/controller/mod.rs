//! `kvtide-control controller`: the process around the reconcilers.
//!
//! One replica of several leads; the others wait, ready to. Only the leader keeps caches. A leader
//! that loses its lease exits, so that two never write at once for longer than a request takes.

mod args;
mod caches;
mod crd_gap;
mod wiring;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::{Context as _, bail};
use kube::Client;
use kvtide_control_base::health::{self, Health};
use kvtide_control_base::telemetry;
use kvtide_control_kube::error::explained;
use kvtide_control_kube::lease::{Lease, LeaseSettings};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

pub use args::Args;

use crate::webhook::{self, Source};

/// How long running reconciles may take to end at shutdown.
const DRAIN_MAX: Duration = Duration::from_secs(20);

/// After the webhook's certificate could not be made; doubles up to
/// [`WEBHOOK_RETRY_LONGEST`].
const WEBHOOK_RETRY_FIRST: Duration = Duration::from_secs(1);
/// Longest pause between tries to install the webhook.
const WEBHOOK_RETRY_LONGEST: Duration = Duration::from_secs(60);

/// Runs until a signal comes or the lease is lost.
///
/// # Errors
///
/// When the API server cannot be reached at start, a port is taken, or the lease is lost.
pub fn run(args: Args) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .thread_name("control")
        .enable_all()
        .build()
        .context("starting the runtime")?;
    runtime.block_on(serve(args))
}

async fn serve(args: Args) -> anyhow::Result<()> {
    let metrics = telemetry::init_metrics()?;
    let config = kube::Config::infer().await.context("finding the cluster")?;
    let client = Client::try_from(config).context("connecting to the cluster")?;
    let version = client
        .apiserver_version()
        .await
        .context("asking the API server its version")?;
    tracing::info!(api_server = %version.git_version, version = env!("CARGO_PKG_VERSION"), "starting");
    // Told from the start: an alert on 0 sees nothing where there is nothing.
    metrics::gauge!("kvtide_control_leader").set(0.0);
    let health = Arc::new(Health::default());
    let (stop, stopped) = watch::channel(false);
    let mut server = tokio::spawn(health::serve(
        args.listen,
        health.clone(),
        metrics,
        stopped.clone(),
    ));
    let webhook = webhook(args.clone(), client.clone());
    let work = lead(args, client, health, stopped);
    tokio::pin!(work, webhook);
    let outcome = tokio::select! {
        outcome = &mut work => outcome,
        served = &mut server => {
            served.context("the HTTP server")??;
            bail!("the HTTP server ended");
        }
        served = &mut webhook => {
            served?;
            bail!("the webhook ended");
        }
        signal = stop_signal() => {
            tracing::info!(signal = signal?, "stopping");
            stop.send_replace(true);
            tokio::time::timeout(DRAIN_MAX, &mut work)
                .await
                .unwrap_or_else(|_| bail!("reconciles did not end in {DRAIN_MAX:?}"))
        }
    };
    stop.send_replace(true);
    outcome
}

/// Serves the webhook for as long as it is polled, on every replica; never returns without one.
async fn webhook(args: Args, client: Client) -> anyhow::Result<()> {
    let Some(address) = args.webhook_listen else {
        return std::future::pending().await;
    };
    if let Some(directory) = args.webhook_cert_dir {
        return webhook::serve(address, Source::Mounted(directory), client).await;
    }
    let mut pause = WEBHOOK_RETRY_FIRST;
    let own = loop {
        match webhook::own(&client, &args.lease_namespace, &args.webhook_names).await {
            Ok(own) => break own,
            // All else works without it.
            Err(error) => {
                let error = explained(&error);
                tracing::warn!(?pause, error, "the webhook is not served yet");
            }
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(WEBHOOK_RETRY_LONGEST);
    };
    let (configuration, authority) = (&args.webhook_configuration, &own.authority);
    let trusted = webhook::keep_trusted(client.clone(), configuration, authority);
    tokio::select! {
        served = webhook::serve(address, own.source, client) => served,
        () = trusted => bail!("the watch of the webhook configuration ended"),
    }
}

async fn stop_signal() -> std::io::Result<&'static str> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    tokio::select! {
        _ = terminate.recv() => Ok("SIGTERM"),
        _ = interrupt.recv() => Ok("SIGINT"),
    }
}

/// Waits to lead, then runs the controllers.
async fn lead(
    args: Args,
    client: Client,
    health: Arc<Health>,
    mut stopped: watch::Receiver<bool>,
) -> anyhow::Result<()> {
    if !args.leader_elect {
        health.leads.store(true, Ordering::Relaxed);
        metrics::gauge!("kvtide_control_leader").set(1.0);
        return wiring::run(&args, client, health, stopped).await;
    }
    let settings = LeaseSettings {
        namespace: args.lease_namespace.clone(),
        name: args.lease_name.clone(),
        duration: Duration::from_secs(args.lease_seconds.into()),
    };
    let lease = Lease::new(client.clone(), settings);
    // Waiting to lead is what a second replica is for.
    health.ready.store(true, Ordering::Relaxed);
    tracing::info!(identity = lease.identity(), "waiting to lead");
    let held_since = tokio::select! {
        since = lease.acquire() => since,
        _ = stopped.wait_for(|stopped| *stopped) => return Ok(()),
    };
    health.ready.store(false, Ordering::Relaxed);
    health.leads.store(true, Ordering::Relaxed);
    metrics::gauge!("kvtide_control_leader").set(1.0);
    tracing::info!(identity = lease.identity(), "leading");
    let work = wiring::run(&args, client, health, stopped);
    let outcome = tokio::select! {
        outcome = work => outcome,
        () = lease.keep(held_since) => bail!("lost the lease; exiting so that the new leader is alone"),
    };
    lease.release().await;
    outcome
}
