//! PodGroups: whether their kind is installed, and applying them when they changed.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use kube::Client;
use kube::api::ApiResource;
use serde_json::Value;

use super::apply::{Doomed, Writer};
use super::error::Error;
use super::informer::owner_uid;
use super::ledger::Ledger;
use crate::api::{Scheduler, SchedulingStrategy};
use crate::core::canonical::hash_name;
use crate::core::pod_group;

/// How long an answer about an installed kind is believed.
const BELIEVE_PRESENT: Duration = Duration::from_secs(60);
/// And about one that is not: somebody may be installing it.
const BELIEVE_ABSENT: Duration = Duration::from_secs(10);

/// See the module.
#[derive(Debug, Default)]
pub struct Gangs {
    installed: Mutex<HashMap<Scheduler, (bool, Instant)>>,
}

/// The kind of a scheduler's PodGroup.
#[must_use]
pub fn resource(scheduler: Scheduler) -> ApiResource {
    let (group, version) = scheduler.api_version();
    ApiResource {
        group: group.into(),
        version: version.into(),
        api_version: format!("{group}/{version}"),
        kind: "PodGroup".into(),
        plural: "podgroups".into(),
    }
}

/// The scheduler to name in pods that name none.
#[must_use]
pub fn scheduler_name(scheduler: Scheduler, coscheduling: Option<&str>) -> Option<&str> {
    match scheduler {
        Scheduler::Volcano => Some("volcano"),
        Scheduler::Godel => Some("godel-scheduler"),
        Scheduler::Coscheduling => coscheduling,
    }
}

/// A PodGroup that is wanted.
#[derive(Clone, Copy, Debug)]
pub struct Wanted<'a> {
    /// Uid of the RoleSet or PodSet.
    pub parent: &'a str,
    /// Where.
    pub namespace: &'a str,
    /// Its name, the same as the parent's.
    pub name: &'a str,
    /// The label by which it is found.
    pub label: (&'a str, &'a str),
    /// The reference to the parent.
    pub owner: &'a Value,
    /// What the user gave.
    pub strategy: &'a SchedulingStrategy,
    /// What to ask for where the user gives no number.
    pub members: i32,
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
            Err(error) if super::error::is_not_found(&error) => false,
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

    /// Applies a PodGroup unless the same was applied before. Returns whether it was.
    ///
    /// # Errors
    ///
    /// When the API server refuses.
    pub async fn ensure(
        &self,
        writer: &Writer,
        ledger: &Ledger,
        wanted: Wanted<'_>,
    ) -> Result<bool, Error> {
        const PURPOSE: &str = "PodGroup";
        let group = pod_group::build(
            wanted.strategy,
            wanted.members,
            wanted.name,
            wanted.label,
            wanted.owner,
        );
        let (Some(group), Some(scheduler)) = (group, wanted.strategy.scheduler()) else {
            return Ok(false);
        };
        let hash = hash_name(&group, 16);
        if ledger.is_applied(wanted.parent, PURPOSE, &hash) {
            return Ok(false);
        }
        writer
            .apply(&resource(scheduler), wanted.namespace, wanted.name, &group)
            .await?;
        ledger.applied(wanted.parent, PURPOSE, hash);
        Ok(true)
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
        (namespace, name): (&str, &str),
        parent: &str,
        scheduler: Scheduler,
    ) -> Result<(), Error> {
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
            Some(found) if owner_uid(&found.metadata) == Some(parent) => {
                writer
                    .delete(&resource, namespace, &Doomed::of(&found.metadata), false)
                    .await
            }
            _ => Ok(()),
        }
    }
}
