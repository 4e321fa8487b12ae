//! The controllers against a real API server, with the rights that `control/deploy` grants, and
//! real `kubectl`. Nothing here is mocked but scheduler and kubelet (`kubelet.rs`).
//!
//! `make test-kube` provides the API server; without it every test is skipped, by name.

#![expect(clippy::unwrap_used, reason = "a failed step fails the test")]

mod cluster;
mod film;
mod kubelet;
mod world;

mod admission;
mod adoption;
mod alone;
mod examples;
mod faults;
mod gangs;
mod installation;
mod leaving;
mod life;
mod pause;
mod recovery;
mod refused;
mod restarts;
mod rules;
mod scaling;
mod schema;
mod serve;
mod turns;
mod unreadiness;

/// The cluster, or the end of the test.
macro_rules! cluster_or_skip {
    () => {
        match $crate::cluster::cluster() {
            Some(cluster) => cluster,
            None => return,
        }
    };
}
pub(crate) use cluster_or_skip;
