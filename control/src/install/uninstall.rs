//! `kvtide-control uninstall`: removes what `kubectl apply -k control/deploy` made, in an order that
//! leaves nothing halfway: what the API server asks, StormServices with their pods, the CRDs, and the
//! controller last, because it takes the finalizers off.
//!
//! It may be run again at any time, and finishes what a `kubectl delete` began. Where no controller
//! runs any more, it does that one's part: takes the finalizers off, and deletes what is below.

use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use clap::Args as ClapArgs;
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::Secret;
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::api::{Api, DeleteParams, DynamicObject};
use kube::{Client, ResourceExt};
use kvtide_control_api::crds::definitions;
use kvtide_control_kube::error::said;

use super::heartbeat::{Heartbeat, Pulse};
use super::objects::{self, Found};
use super::{LOOK_EVERY, manifests, say};
use crate::webhook::SECRET;

/// Names in one line; of more, only the number is told.
const NAMES_MAX: usize = 5;

/// Arguments of `kvtide-control uninstall`.
#[derive(Clone, Debug, ClapArgs)]
pub struct Args {
    /// Delete all StormServices, RoleSets and PodSets of the cluster too, with their pods
    #[arg(long, conflicts_with = "keep_crds")]
    pub delete_services: bool,
    /// Remove the controller alone: CRDs, StormServices and pods stay as they are, for another
    /// controller or a later install
    #[arg(long)]
    pub keep_crds: bool,
    /// Namespace that the controller is installed in
    #[arg(long, default_value = "kvtide-system")]
    pub namespace: String,
    /// Name of the controllers' lease
    #[arg(long, default_value = "kvtide-control")]
    pub lease_name: String,
    /// How long pods may take to end, in seconds
    #[arg(long, default_value_t = 300, value_parser = clap::value_parser!(u64).range(1..))]
    pub timeout_seconds: u64,
}

/// Uninstalls.
///
/// # Errors
///
/// When there are StormServices and nothing was said about them, when the API server refuses, or when
/// something does not end in time.
pub fn run(args: &Args) -> anyhow::Result<()> {
    super::run(async |client| uninstall(&client, args).await)
}

async fn uninstall(client: &Client, args: &Args) -> anyhow::Result<()> {
    let until = Instant::now() + Duration::from_secs(args.timeout_seconds);
    if !args.keep_crds {
        refuse_to_lose(&services(client).await?, args)?;
        for object in manifests::protection()? {
            delete(client, &object, &args.namespace).await?;
        }
    }
    for object in manifests::webhook()? {
        delete(client, &object, &args.namespace).await?;
    }
    if args.keep_crds {
        say(format_args!(
            "the CRDs are left, and the policy that keeps them from being deleted"
        ));
    } else {
        delete_services(client, args, until).await?;
        delete_definitions(client, until).await?;
    }
    let (controller, rights) = (manifests::controller()?, manifests::rights()?);
    for object in controller.iter().chain(&rights) {
        delete(client, object, &args.namespace).await?;
    }
    let namespace = &args.namespace;
    let leases: Api<Lease> = Api::namespaced(client.clone(), namespace);
    gone(
        leases
            .delete(&args.lease_name, &DeleteParams::default())
            .await,
    )?;
    let secrets: Api<Secret> = Api::namespaced(client.clone(), namespace);
    gone(secrets.delete(SECRET, &DeleteParams::default()).await)?;
    say(format_args!("kvtide-control is uninstalled"));
    say(format_args!(
        "the namespace is left: kubectl delete namespace {namespace}, if nothing else is in it"
    ));
    Ok(())
}

async fn services(client: &Client) -> anyhow::Result<Vec<Found>> {
    objects::of_ours(client)
        .await
        .context("listing StormServices")
}

/// Says no where StormServices would be lost of which nothing was said.
fn refuse_to_lose(all: &[Found], args: &Args) -> anyhow::Result<()> {
    if !args.delete_services && !all.is_empty() {
        bail!(
            "there are {}: give --delete-services to delete them with their pods, or --keep-crds to \
             leave them, and the CRDs, as they are",
            named(all)
        );
    }
    Ok(())
}

fn named(all: &[Found]) -> String {
    let mut names: Vec<String> = all
        .iter()
        .take(NAMES_MAX)
        .map(ToString::to_string)
        .collect();
    if all.len() > NAMES_MAX {
        names.push(format!("{} more", all.len() - NAMES_MAX));
    }
    names.join(", ")
}

/// Deletes an object of the manifests.
async fn delete(client: &Client, object: &DynamicObject, namespace: &str) -> anyhow::Result<()> {
    let (kind, name) = (
        &object.types.clone().unwrap_or_default().kind,
        object.name_any(),
    );
    let api = manifests::api_of(client, object, namespace);
    let deleted = api.delete(&name, &DeleteParams::background()).await;
    if gone(deleted).with_context(|| format!("deleting {kind} {name}"))? {
        say(format_args!("deleted {kind} {name}"));
    }
    Ok(())
}

/// Whether something was there to delete.
fn gone<T>(deleted: kube::Result<T>) -> kube::Result<bool> {
    match deleted {
        Ok(_) => Ok(true),
        Err(kube::Error::Api(status)) if status.code == 404 => Ok(false),
        Err(error) => Err(error),
    }
}

/// Deletes all StormServices, RoleSets and PodSets and waits until nothing is left of them.
async fn delete_services(client: &Client, args: &Args, until: Instant) -> anyhow::Result<()> {
    let mut heartbeat = Heartbeat::of(client.clone(), &args.namespace, &args.lease_name);
    let mut told = String::new();
    loop {
        let ours = services(client).await?;
        // Also those that were made since the last look.
        refuse_to_lose(&ours, args)?;
        let below = objects::below(client).await.context("listing their pods")?;
        if ours.is_empty() && below.is_empty() {
            return Ok(());
        }
        for object in &ours {
            object
                .delete(client)
                .await
                .with_context(|| format!("deleting {object}"))?;
        }
        let pulse = heartbeat
            .look()
            .await
            .context("looking at the controllers' lease")?;
        if pulse == Pulse::None {
            finish(client, &ours, &below).await;
        }
        let waits = format!("{} objects of ours, {} below them", ours.len(), below.len());
        if waits != told {
            say(format_args!("waiting for {waits}"));
            told = waits;
        }
        if Instant::now() >= until {
            bail!("{}", still_there(ours.iter().chain(&below)));
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

/// What a controller would do for objects that are going. One that is written meanwhile is looked at
/// again.
async fn finish(client: &Client, ours: &[Found], below: &[Found]) {
    for object in ours {
        if let Err(error) = object.release(client).await {
            tracing::debug!(%object, error = said(&error), "its finalizer stays for now");
        }
    }
    for object in below {
        if let Err(error) = object.delete(client).await {
            tracing::debug!(%object, error = said(&error), "it is not deleted for now");
        }
    }
}

fn still_there<'a>(left: impl Iterator<Item = &'a Found>) -> String {
    let left: Vec<String> = left
        .take(NAMES_MAX)
        .map(|found| match found.holders() {
            [] => found.to_string(),
            holders => format!("{found} (held by {})", holders.join(", ")),
        })
        .collect();
    let left = left.join(", ");
    format!("still there: {left}; run it again, with a longer --timeout-seconds if pods need it")
}

/// Deletes the CRDs and waits until they are gone.
async fn delete_definitions(client: &Client, until: Instant) -> anyhow::Result<()> {
    let api: Api<CustomResourceDefinition> = Api::all(client.clone());
    let names: Vec<String> = definitions()?.iter().map(ResourceExt::name_any).collect();
    loop {
        let mut left = Vec::new();
        for name in &names {
            let Some(found) = api.get_opt(name).await.context("looking at the CRDs")? else {
                continue;
            };
            let mut why = String::new();
            if found.metadata.deletion_timestamp.is_none() {
                // Refused for as long as API servers have not seen that the protection is gone.
                match gone(api.delete(name, &DeleteParams::background()).await) {
                    Ok(_) => say(format_args!("deleted CustomResourceDefinition {name}")),
                    Err(error) => why = format!(": {}", said(&error)),
                }
            }
            left.push(format!("{name}{why}"));
        }
        if left.is_empty() {
            return Ok(());
        }
        if Instant::now() >= until {
            bail!("CRDs are still there: {}; run it again", left.join(", "));
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}
