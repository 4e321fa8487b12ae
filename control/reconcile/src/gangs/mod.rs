//! PodGroups: whether their kind is installed, and applying them when they changed.

mod ganging;
mod kind;
mod pod_groups;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use kube::Client;
use kvtide_control_api::meta::owner_uid;
use kvtide_control_api::target::Target;
use kvtide_control_api::{Scheduler, SchedulingStrategy, keys};
use kvtide_control_core::canonical::hash_name;
use kvtide_control_core::pod_group::{self, Asks};
use kvtide_control_kube::error::{Error, is_not_found};
use kvtide_control_kube::ledger::Ledger;
use kvtide_control_kube::writer::{Creation, Doomed, Writer};
use serde_json::json;

use pod_groups::Known;

pub(crate) use ganging::Ganging;
use kind::{PURPOSE, resource};
pub use pod_groups::PodGroups;

/// How long an answer about an installed kind is believed.
const BELIEVE_PRESENT: Duration = Duration::from_secs(60);
/// And about one that is not: somebody may be installing it.
const BELIEVE_ABSENT: Duration = Duration::from_secs(10);

/// See the module.
#[derive(Debug, Default)]
pub struct Gangs {
    /// Those that are there.
    pub groups: Arc<PodGroups>,
    installed: Mutex<HashMap<Scheduler, (bool, Instant)>>,
}

/// A PodGroup that is wanted.
#[derive(Clone, Copy, Debug)]
pub struct Wanted<'a> {
    /// The RoleSet or PodSet. The PodGroup has its name.
    pub target: &'a Target,
    /// The label by which the PodGroup is found; its value is the name.
    pub label: &'a str,
    /// What the user gave.
    pub strategy: &'a SchedulingStrategy,
    /// What to ask for.
    pub asks: Asks,
}

impl Gangs {
    /// Whether a scheduler's PodGroup kind is installed.
    ///
    /// # Errors
    ///
    /// When the API server does not answer.
    pub async fn is_installed(&self, client: &Client, scheduler: Scheduler) -> Result<bool, Error> {
        {
            let installed = self
                .installed
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            if let Some((present, since)) = installed.get(&scheduler) {
                let believe = if *present {
                    BELIEVE_PRESENT
                } else {
                    BELIEVE_ABSENT
                };
                if since.elapsed() < believe {
                    return Ok(*present);
                }
            }
        }
        let (group, version) = scheduler.api_version();
        let listed = client
            .list_api_group_resources(&format!("{group}/{version}"))
            .await;
        let present = match listed {
            Ok(list) => list
                .resources
                .iter()
                .any(|resource| resource.kind == "PodGroup"),
            Err(error) if is_not_found(&error) => false,
            Err(source) => {
                return Err(Error::Api {
                    action: "discover",
                    kind: "PodGroup".into(),
                    name: group.into(),
                    source: Box::new(source),
                });
            }
        };
        let mut installed = self
            .installed
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        installed.insert(scheduler, (present, Instant::now()));
        Ok(present)
    }

    /// Makes a PodGroup, or brings it to what is wanted. Returns whether anything was written.
    ///
    /// # Errors
    ///
    /// When the API server refuses, or the name is somebody else's.
    pub async fn ensure(
        &self,
        writer: &Writer,
        ledger: &Ledger,
        wanted: Wanted<'_>,
    ) -> Result<bool, Error> {
        let (namespace, name) = wanted.target.names();
        let parent = wanted.target.uid.as_str();
        let group = pod_group::build(
            wanted.strategy,
            wanted.asks,
            name,
            (wanted.label, name),
            &wanted.target.owner_ref,
        );
        let (Some(mut group), Some(scheduler)) = (group, wanted.strategy.scheduler()) else {
            return Ok(false);
        };
        let hash = hash_name(&group, 16);
        group["metadata"]["annotations"] = json!({keys::APPLIED_HASH: hash});
        let mut known = self.groups.get(scheduler, &wanted.target.key()).await;
        let is_ours = |known: &Known| known.owner.as_deref() == Some(parent);
        if known.as_ref().is_some_and(|known| !is_ours(known)) {
            return Err(Error::NameTaken {
                kind: PURPOSE.into(),
                name: name.to_owned(),
            });
        }
        if ledger.is_applied(parent, PURPOSE, &hash) {
            return Ok(false);
        }
        let resource = resource(scheduler);
        if known.is_none() {
            // A POST first: applying would take over a PodGroup of somebody else's.
            let made = writer
                .create(parent, PURPOSE, &resource, namespace, group.clone())
                .await?;
            match made {
                Creation::Made => {
                    ledger.applied(parent, PURPOSE, hash);
                    return Ok(true);
                }
                Creation::Waiting => return Ok(false),
                Creation::Found(meta) => known = Some(Known::of(&meta)),
            }
        }
        let known = known.filter(|known| known.applied.as_ref() != Some(&hash));
        if let Some(known) = &known {
            // With the uid: if it is another's by now, the API server says so.
            let uid = &known.uid;
            writer
                .replace_spec(&resource, namespace, name, uid, &group["spec"])
                .await?;
            group["metadata"]["uid"] = json!(uid);
            writer.apply(&resource, namespace, name, &group).await?;
        }
        ledger.applied(parent, PURPOSE, hash);
        Ok(known.is_some())
    }

    /// Deletes the PodGroup of a parent, if it is there and the parent's.
    ///
    /// # Errors
    ///
    /// When the API server refuses.
    pub async fn remove(
        &self,
        client: &Client,
        writer: &Writer,
        target: &Target,
        scheduler: Scheduler,
    ) -> Result<(), Error> {
        let (namespace, name) = target.names();
        if !self.is_installed(client, scheduler).await? {
            return Ok(());
        }
        let resource = resource(scheduler);
        let api = kube::Api::<kube::api::DynamicObject>::namespaced_with(
            client.clone(),
            namespace,
            &resource,
        );
        let found = api
            .get_metadata_opt(name)
            .await
            .map_err(|source| Error::Api {
                action: "get",
                kind: resource.kind.clone(),
                name: name.to_owned(),
                source: Box::new(source),
            })?;
        match found {
            Some(found) if owner_uid(&found.metadata) == Some(target.uid.as_str()) => {
                writer
                    .delete(&resource, namespace, &Doomed::of(&found.metadata), false)
                    .await
            }
            _ => Ok(()),
        }
    }
}
