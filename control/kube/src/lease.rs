//! Leader election by a Lease, as Kubernetes' own components do it.
//!
//! Clocks of different machines are never compared: a lease is expired when it was not seen to
//! change for its whole duration. The holder gives up well before others may take over.

use std::sync::Mutex;
use std::sync::PoisonError;
use std::time::{Duration, Instant};

use k8s_openapi::api::coordination::v1::{Lease as LeaseObject, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta};
use k8s_openapi::jiff::Timestamp;
use kube::api::{Api, PostParams};
use kube::{Client, ResourceExt};

use crate::error::said;

/// Which lease, and for how long.
#[derive(Clone, Debug)]
pub struct LeaseSettings {
    /// Where it is.
    pub namespace: String,
    /// What it is called.
    pub name: String,
    /// How long it lasts without being renewed.
    pub duration: Duration,
}

/// A lease that this process may hold.
pub struct Lease {
    api: Api<LeaseObject>,
    settings: LeaseSettings,
    identity: String,
    /// Version that was seen last, and since when it stands.
    seen: Mutex<Option<(String, Instant)>>,
}

impl Lease {
    /// A lease that nobody holds yet, as far as this process knows.
    #[must_use]
    pub fn new(client: Client, settings: LeaseSettings) -> Self {
        let host = std::env::var("HOSTNAME").unwrap_or_else(|_| "kvtide-control".into());
        let started = Timestamp::now().as_nanosecond();
        let identity = format!("{host}-{}-{started:x}", std::process::id());
        let api = Api::namespaced(client, &settings.namespace);
        Self {
            api,
            settings,
            identity,
            seen: Mutex::default(),
        }
    }

    /// How the lease names this process while it holds it.
    #[must_use]
    pub fn identity(&self) -> &str {
        &self.identity
    }

    fn retry(&self) -> Duration {
        self.settings.duration / 7
    }

    /// How long this process trusts its lease, from before it asked. Two thirds of the duration:
    /// others wait for all of it, from when they saw it, which is later.
    fn trusted(&self) -> Duration {
        self.settings.duration * 2 / 3
    }

    /// Returns once this process holds the lease, with the time from which that counts.
    pub async fn acquire(&self) -> Instant {
        loop {
            let asked = Instant::now();
            // A lease that is answered for later than this would be over at once.
            match tokio::time::timeout(self.trusted(), self.try_hold()).await {
                Ok(Ok(true)) => return asked,
                Ok(Ok(false)) => {}
                Ok(Err(error)) => {
                    tracing::warn!(error = said(&error), "the lease could not be asked for")
                }
                Err(_) => tracing::warn!("no answer about the lease"),
            }
            tokio::time::sleep(self.retry()).await;
        }
    }

    /// Renews the lease that counts from `held_since`; returns once it is lost.
    pub async fn keep(&self, held_since: Instant) {
        let give_up = self.trusted();
        let mut renewed = held_since;
        loop {
            let left = give_up.saturating_sub(renewed.elapsed());
            tokio::time::sleep(self.retry().min(left)).await;
            let asked = Instant::now();
            let left = give_up.saturating_sub(renewed.elapsed());
            match tokio::time::timeout(left, self.try_hold()).await {
                Ok(Ok(true)) => renewed = asked,
                Ok(Ok(false)) => return,
                Ok(Err(error)) => {
                    tracing::warn!(error = said(&error), "the lease could not be renewed")
                }
                Err(_) => return,
            }
            if renewed.elapsed() >= give_up {
                return;
            }
        }
    }

    /// Lets others lead at once.
    pub async fn release(&self) {
        let released = async {
            let mut lease = self.api.get(&self.settings.name).await?;
            let spec = lease.spec.get_or_insert_default();
            if spec.holder_identity.as_deref() == Some(&self.identity) {
                spec.holder_identity = None;
                spec.lease_duration_seconds = Some(1);
                self.api
                    .replace(&self.settings.name, &PostParams::default(), &lease)
                    .await?;
            }
            Ok::<(), kube::Error>(())
        };
        if let Err(error) = released.await {
            tracing::warn!(
                error = said(&error),
                "the lease could not be released; others wait for it to expire"
            );
        }
    }

    /// Takes or renews the lease. False where another holds it.
    async fn try_hold(&self) -> Result<bool, kube::Error> {
        let Some(mut lease) = self.api.get_opt(&self.settings.name).await? else {
            let lease = self.first();
            return match self.api.create(&PostParams::default(), &lease).await {
                Ok(_) => Ok(true),
                Err(error) if is_conflict(&error) => Ok(false),
                Err(error) => Err(error),
            };
        };
        let held = lease.spec.clone().unwrap_or_default();
        let holder = held.holder_identity.clone().unwrap_or_default();
        let is_ours = holder == self.identity;
        if !is_ours && !holder.is_empty() && !self.is_expired(&lease, &held) {
            return Ok(false);
        }
        let now = MicroTime(Timestamp::now());
        let spec = lease.spec.get_or_insert_default();
        spec.renew_time = Some(now.clone());
        spec.lease_duration_seconds = Some(self.duration_seconds());
        if !is_ours {
            spec.holder_identity = Some(self.identity.clone());
            spec.acquire_time = Some(now);
            spec.lease_transitions = Some(held.lease_transitions.unwrap_or(0).saturating_add(1));
        }
        // With the version that was read: of two that try, one fails.
        match self
            .api
            .replace(&self.settings.name, &PostParams::default(), &lease)
            .await
        {
            Ok(_) => Ok(true),
            Err(error) if is_conflict(&error) => Ok(false),
            Err(error) => Err(error),
        }
    }

    fn duration_seconds(&self) -> i32 {
        i32::try_from(self.settings.duration.as_secs()).unwrap_or(i32::MAX)
    }

    fn first(&self) -> LeaseObject {
        let now = MicroTime(Timestamp::now());
        LeaseObject {
            metadata: ObjectMeta {
                name: Some(self.settings.name.clone()),
                ..ObjectMeta::default()
            },
            spec: Some(LeaseSpec {
                holder_identity: Some(self.identity.clone()),
                lease_duration_seconds: Some(self.duration_seconds()),
                acquire_time: Some(now.clone()),
                renew_time: Some(now),
                ..LeaseSpec::default()
            }),
        }
    }

    /// Whether another's lease stood unchanged for its whole duration, by our own clock.
    fn is_expired(&self, lease: &LeaseObject, held: &LeaseSpec) -> bool {
        let version = lease.resource_version().unwrap_or_default();
        let seconds = held.lease_duration_seconds.unwrap_or(1).max(1);
        let duration = Duration::from_secs(seconds.unsigned_abs().into());
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        match seen.as_ref() {
            Some((known, since)) if *known == version => since.elapsed() >= duration,
            _ => {
                *seen = Some((version, Instant::now()));
                false
            }
        }
    }
}

fn is_conflict(error: &kube::Error) -> bool {
    matches!(error, kube::Error::Api(status) if status.code == 409)
}
