//! `kvtide-control check`: whether an installation works, one line for each thing that must hold.

mod rights;
mod webhook;

use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use clap::Args as ClapArgs;
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::api::{Api, ListParams};
use kube::{Client, ResourceExt};
use kvtide_control_api::crds::definitions;
use kvtide_control_api::{ConditionStatus, StormService, conditions, find_condition};
use kvtide_control_kube::crd_gap::installed_gap;
use kvtide_control_kube::error::explained;

use super::heartbeat::{Heartbeat, Pulse};
use super::{LOOK_EVERY, say};

/// The CRDs need `optionalOldSelf` and ratcheting.
const MINOR_MIN: u32 = 30;
/// StormServices that are named as not ready; of more, only the number is told.
const NAMES_MAX: usize = 5;

/// Arguments of `kvtide-control check`.
#[derive(Clone, Debug, ClapArgs)]
pub struct Args {
    /// Namespace that the controller is installed in
    #[arg(long, default_value = "kvtide-system")]
    pub namespace: String,
    /// Name of the controllers' lease
    #[arg(long, default_value = "kvtide-control")]
    pub lease_name: String,
    /// How long to wait for what does not hold yet, in seconds: after an installation, images are pulled
    #[arg(long, default_value_t = 60)]
    pub wait_seconds: u64,
}

/// Checks everything, and prints what it finds.
///
/// # Errors
///
/// When something does not hold, or the cluster cannot be reached.
pub fn run(args: &Args) -> anyhow::Result<()> {
    super::run(async |client| {
        let until = Instant::now() + Duration::from_secs(args.wait_seconds);
        let (namespace, lease) = (&args.namespace, &args.lease_name);
        let mut report = Report { until, faults: 0 };
        report
            .line("API server", async || version(&client).await)
            .await;
        report.line("CRDs", async || crds(&client).await).await;
        report
            .line("rights", async || rights::check(&client, namespace).await)
            .await;
        report
            .line("leader", async || leader(&client, namespace, lease).await)
            .await;
        report
            .line("webhook", async || webhook::check(&client, namespace).await)
            .await;
        if let Ok(services) = services(&client).await {
            say(format_args!("      {:<11} {services}", "services"));
        }
        match report.faults {
            0 => Ok(()),
            faults => bail!("{faults} of 5 checks failed"),
        }
    })
}

struct Report {
    until: Instant,
    faults: u32,
}

impl Report {
    /// Tries until it holds or time is up. Everything is tried once.
    async fn line(&mut self, what: &str, check: impl AsyncFn() -> anyhow::Result<String>) {
        let outcome = loop {
            match check().await {
                Err(_) if Instant::now() < self.until => tokio::time::sleep(LOOK_EVERY).await,
                outcome => break outcome,
            }
        };
        match outcome {
            Ok(found) => say(format_args!("ok    {what:<11} {found}")),
            Err(error) => {
                self.faults += 1;
                say(format_args!("FAIL  {what:<11} {}", explained(&error)));
            }
        }
    }
}

async fn version(client: &Client) -> anyhow::Result<String> {
    let version = client
        .apiserver_version()
        .await
        .context("asking for its version")?;
    let minor: String = version
        .minor
        .chars()
        .take_while(char::is_ascii_digit)
        .collect();
    if version.major == "1" && minor.parse::<u32>().is_ok_and(|minor| minor < MINOR_MIN) {
        bail!(
            "is {}; Kubernetes 1.{MINOR_MIN} or later is needed",
            version.git_version
        );
    }
    Ok(version.git_version)
}

async fn crds(client: &Client) -> anyhow::Result<String> {
    let gap = installed_gap(client).await?;
    let api: Api<CustomResourceDefinition> = Api::all(client.clone());
    for definition in definitions()? {
        let name = definition.name_any();
        let found = api.get(&name).await.context("looking at the CRDs")?;
        if found.metadata.deletion_timestamp.is_some() {
            bail!(
                "{name} is being deleted with all its objects; `kvtide-control uninstall` finishes it"
            );
        }
        let conditions = found.status.and_then(|status| status.conditions);
        let mut conditions = conditions.iter().flatten();
        if !conditions.any(|holds| holds.type_ == "Established" && holds.status == "True") {
            bail!("{name} is not established yet");
        }
    }
    match gap.lost {
        Some(lost) => bail!("{lost}"),
        None => Ok("installed, of this version".to_owned()),
    }
}

/// Looks for as long as a lease lasts: a controller that died a moment ago left one that looks well.
async fn leader(client: &Client, namespace: &str, name: &str) -> anyhow::Result<String> {
    let mut heartbeat = Heartbeat::of(client.clone(), namespace, name);
    loop {
        match heartbeat.look().await.context("looking at the lease")? {
            Pulse::Beats(holder) => return Ok(format!("{holder} leads")),
            Pulse::Unknown => tokio::time::sleep(LOOK_EVERY).await,
            Pulse::None => bail!(
                "no controller renews the lease {namespace}/{name}; look at \
                 `kubectl -n {namespace} get pods` and their logs"
            ),
        }
    }
}

/// How many StormServices there are and which are not ready: told, and no fault of the installation.
async fn services(client: &Client) -> anyhow::Result<String> {
    let api: Api<StormService> = Api::all(client.clone());
    let all = api.list(&ListParams::default()).await?.items;
    let is_ready = |service: &StormService| {
        let conditions = service.status.as_ref().map(|status| &status.conditions);
        conditions
            .and_then(|all| find_condition(all, conditions::READY))
            .is_some_and(|ready| ready.status == ConditionStatus::True)
    };
    let waiting: Vec<String> = all
        .iter()
        .filter(|service| !is_ready(service))
        .map(|service| {
            format!(
                "{}/{}",
                service.namespace().unwrap_or_default(),
                service.name_any()
            )
        })
        .collect();
    let ready = all.len() - waiting.len();
    let names = waiting.iter().take(NAMES_MAX).cloned().collect::<Vec<_>>();
    let more = match waiting.len() {
        0 => String::new(),
        few if few <= NAMES_MAX => format!("; not ready: {}", names.join(", ")),
        many => format!(
            "; not ready: {}, {} more",
            names.join(", "),
            many - NAMES_MAX
        ),
    };
    Ok(format!(
        "{ready} of {} StormServices are ready{more}",
        all.len()
    ))
}
