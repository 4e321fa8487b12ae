//! Whether a controller leads: its Lease changes. Clocks of different machines are not compared.

use std::time::{Duration, Instant};

use k8s_openapi::api::coordination::v1::Lease;
use kube::api::Api;
use kube::{Client, ResourceExt};

/// How long a lease lasts that does not say it.
const DURATION_DEFAULT: Duration = Duration::from_secs(15);

/// A Lease that is looked at now and then.
pub(super) struct Heartbeat {
    api: Api<Lease>,
    name: String,
    /// Version that was seen last, and since when it stands.
    seen: Option<(String, Instant)>,
}

/// What a look tells.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Pulse {
    /// This one renewed its lease between two looks.
    Beats(String),
    /// Nobody knows yet.
    Unknown,
    /// Nobody holds the lease, or did not renew it for as long as it lasts.
    None,
}

impl Heartbeat {
    pub(super) fn of(client: Client, namespace: &str, name: &str) -> Self {
        Self {
            api: Api::namespaced(client, namespace),
            name: name.to_owned(),
            seen: None,
        }
    }

    /// Looks once.
    ///
    /// # Errors
    ///
    /// When the API server refuses.
    pub(super) async fn look(&mut self) -> kube::Result<Pulse> {
        let lease = self.api.get_opt(&self.name).await?;
        let version = lease.as_ref().and_then(ResourceExt::resource_version);
        let version = version.unwrap_or_default();
        let spec = lease.and_then(|lease| lease.spec).unwrap_or_default();
        let Some(holder) = spec.holder_identity.filter(|holder| !holder.is_empty()) else {
            return Ok(Pulse::None);
        };
        let lasts = spec
            .lease_duration_seconds
            .and_then(|seconds| u64::try_from(seconds).ok());
        let lasts = lasts.map_or(DURATION_DEFAULT, Duration::from_secs);
        Ok(match &self.seen {
            Some((known, _)) if *known != version => {
                self.seen = Some((version, Instant::now()));
                Pulse::Beats(holder)
            }
            Some((_, since)) if since.elapsed() > lasts => Pulse::None,
            Some(_) => Pulse::Unknown,
            None => {
                self.seen = Some((version, Instant::now()));
                Pulse::Unknown
            }
        })
    }
}
