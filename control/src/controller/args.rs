//! The command line of `kvtide-control controller`.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::Args as ClapArgs;
use kvtide_control_core::recovery::Backoff;
use kvtide_control_reconcile::Settings;

/// Arguments of `kvtide-control controller`.
#[derive(Clone, Debug, ClapArgs)]
pub struct Args {
    /// Look at this namespace alone; all of them by default
    #[arg(long, env = "KVTIDE_NAMESPACE")]
    pub namespace: Option<String>,
    /// Where /healthz, /readyz and /metrics are served
    #[arg(long, default_value = "0.0.0.0:8080", env = "KVTIDE_LISTEN")]
    pub listen: SocketAddr,
    /// Lead only while holding the lease
    #[arg(long, default_value_t = true, action = clap::ArgAction::Set)]
    pub leader_elect: bool,
    /// Namespace of the lease
    #[arg(long, default_value = "kvtide-system", env = "POD_NAMESPACE")]
    pub lease_namespace: String,
    /// Name of the lease
    #[arg(long, default_value = "kvtide-control")]
    pub lease_name: String,
    /// How long a lease lasts that is not renewed, in seconds
    #[arg(long, default_value_t = 15, value_parser = clap::value_parser!(u16).range(3..=300))]
    pub lease_seconds: u16,
    /// The scheduler that runs the coscheduling plugin: named in pods of a coscheduling PodGroup
    /// whose template names no scheduler
    #[arg(long)]
    pub coscheduling_scheduler_name: Option<String>,
    /// Pause after a PodSet's first recovery, in seconds; doubles from there
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..))]
    pub recovery_backoff_seconds: u32,
    /// Longest pause between recoveries, in seconds; after it, recovery is given up
    #[arg(long, default_value_t = 300, value_parser = clap::value_parser!(u32).range(1..))]
    pub recovery_backoff_max_seconds: u32,
    /// How long a node may be not ready before pods of PodSets on it count as lost, in seconds
    #[arg(long, default_value_t = 60)]
    pub node_lost_seconds: u32,
    /// Serve the admission webhook here; not served by default
    #[arg(long)]
    pub webhook_listen: Option<SocketAddr>,
    /// Certificate and key of the webhook (tls.crt and tls.key), as a Secret is mounted; by default
    /// the controller makes its own and keeps them in a Secret
    #[arg(long, requires = "webhook_listen")]
    pub webhook_cert_dir: Option<PathBuf>,
    /// The ValidatingWebhookConfiguration that is given the CA of the controller's own certificate
    #[arg(long, default_value = "kvtide-control")]
    pub webhook_configuration: String,
    /// Names in the webhook's own certificate
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "kvtide-control-webhook.kvtide-system.svc"
    )]
    pub webhook_names: Vec<String>,
}

impl Args {
    /// What the reconcilers go by.
    #[must_use]
    pub fn settings(&self) -> Settings {
        let seconds = |seconds: u32| Duration::from_secs(seconds.into());
        Settings {
            coscheduling_scheduler_name: self.coscheduling_scheduler_name.clone(),
            backoff: Backoff {
                first: seconds(self.recovery_backoff_seconds),
                longest: seconds(
                    self.recovery_backoff_max_seconds
                        .max(self.recovery_backoff_seconds),
                ),
            },
            node_lost_after: seconds(self.node_lost_seconds),
        }
    }
}
