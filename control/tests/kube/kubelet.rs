//! A scheduler and kubelet in one small task: binds pods of a namespace to a node, says that they
//! run, and confirms their deletion. What a pod does is said by its image:
//!
//! | image | behaviour |
//! |---|---|
//! | `never-ready` | runs, never ready |
//! | `crash` | CrashLoopBackOff |
//! | `ends` | ends at once |
//! | `after-N` | runs, and becomes ready after N ms |
//! | `on-lost-node` | runs on [`LOST_NODE`], which never confirms a deletion |
//! | anything else | runs and becomes ready |

use std::time::Duration;

use futures::StreamExt;
use k8s_openapi::api::core::v1::Pod;
use kube::api::{Api, DeleteParams, Patch, PatchParams, Preconditions, Request};
use kube::runtime::WatchStreamExt;
use kube::runtime::watcher::{self, watcher};
use kube::{Client, ResourceExt};
use serde_json::{Value, json};
use tokio::task::JoinHandle;

/// The node that pods are bound to.
const NODE: &str = "node-a";
/// The node of pods with the image `on-lost-node`.
pub(crate) const LOST_NODE: &str = "lost-node";

/// How a fake kubelet behaves.
#[derive(Clone, Debug, Default)]
pub(crate) struct Kubelet {
    /// Between a change and what the kubelet does about it.
    pub(crate) latency: Duration,
    /// All namespaces where none is given.
    pub(crate) namespace: Option<String>,
}

/// Stops with the test.
pub(crate) struct Running(JoinHandle<()>);

impl Drop for Running {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Kubelet {
    pub(crate) fn start(self, client: &Client) -> Running {
        let client = client.clone();
        Running(tokio::spawn(async move {
            let api: Api<Pod> = match &self.namespace {
                Some(namespace) => Api::namespaced(client.clone(), namespace),
                None => Api::all(client.clone()),
            };
            let pods = watcher(api, watcher::Config::default())
                .default_backoff()
                .touched_objects();
            pods.for_each_concurrent(64, |pod| {
                let (client, latency) = (client.clone(), self.latency);
                async move {
                    let Ok(pod) = pod else { return };
                    tokio::time::sleep(latency).await;
                    // A lost race shows the pod again.
                    if let Err(error) = step(&client, &pod).await
                        && !is_lost_race(&error)
                    {
                        eprintln!("fake kubelet: {error}");
                    }
                }
            })
            .await;
        }))
    }
}

fn is_lost_race(error: &kube::Error) -> bool {
    matches!(error, kube::Error::Api(status) if [404, 409].contains(&status.code))
}

async fn step(client: &Client, pod: &Pod) -> kube::Result<()> {
    let namespace = pod.namespace().unwrap_or_default();
    let name = pod.name_any();
    let api: Api<Pod> = Api::namespaced(client.clone(), &namespace);
    let node = pod.spec.as_ref().and_then(|spec| spec.node_name.as_deref());
    if pod.metadata.deletion_timestamp.is_some() {
        // A lost node confirms nothing.
        if node != Some(LOST_NODE) {
            // Not a later pod of the same name.
            let confirmed = DeleteParams {
                preconditions: Some(Preconditions {
                    uid: pod.uid(),
                    resource_version: None,
                }),
                ..DeleteParams::default().grace_period(0)
            };
            api.delete(&name, &confirmed).await?;
        }
        return Ok(());
    }
    let image = pod
        .spec
        .as_ref()
        .and_then(|spec| spec.containers[0].image.clone());
    if node.is_none() {
        let node = if image.as_deref() == Some("on-lost-node") {
            LOST_NODE
        } else {
            NODE
        };
        let request = Request::new(format!("/api/v1/namespaces/{namespace}/pods"));
        let body = json!({
            "apiVersion": "v1", "kind": "Binding", "metadata": {"name": name},
            "target": {"apiVersion": "v1", "kind": "Node", "name": node},
        });
        let body = serde_json::to_vec(&body).unwrap();
        let bind = request.create_subresource("binding", &name, &Default::default(), body);
        client.request::<Value>(bind.unwrap()).await?;
        return Ok(());
    }
    let phase = pod
        .status
        .as_ref()
        .and_then(|status| status.phase.as_deref());
    if phase != Some("Pending") {
        return Ok(());
    }
    if let Some(latency_ms) = image
        .as_deref()
        .and_then(|image| image.strip_prefix("after-"))
    {
        let running = status(false, &json!({"running": {}}), 0);
        tell_of(client, pod, &running).await?;
        tokio::time::sleep(Duration::from_millis(latency_ms.parse().unwrap())).await;
    }
    let status = match image.as_deref() {
        Some("ends") => json!({"phase": "Failed"}),
        Some("never-ready") => status(false, &json!({"running": {}}), 0),
        Some("crash") => status(
            false,
            &json!({"waiting": {"reason": "CrashLoopBackOff"}}),
            3,
        ),
        _ => status(true, &json!({"running": {}}), 0),
    };
    tell_of(client, pod, &status).await
}

/// Of this pod, and not of a later one of the same name.
async fn tell_of(client: &Client, pod: &Pod, status: &Value) -> kube::Result<()> {
    let api: Api<Pod> = Api::namespaced(client.clone(), &pod.namespace().unwrap_or_default());
    let patch = json!({"metadata": {"uid": pod.uid()}, "status": status});
    api.patch_status(
        &pod.name_any(),
        &PatchParams::default(),
        &Patch::Merge(&patch),
    )
    .await?;
    Ok(())
}

/// A status of a pod with one container.
pub(crate) fn status(ready: bool, state: &Value, restarts: i32) -> Value {
    let ready_text = if ready { "True" } else { "False" };
    json!({
        "phase": "Running",
        "conditions": [{"type": "Ready", "status": ready_text}],
        "containerStatuses": [{
            "name": "c", "image": "i", "imageID": "i", "ready": ready,
            "restartCount": restarts, "state": state,
        }],
    })
}

pub(crate) async fn set_status(
    client: &Client,
    namespace: &str,
    name: &str,
    status: &Value,
) -> kube::Result<()> {
    let api: Api<Pod> = Api::namespaced(client.clone(), namespace);
    let patch = json!({"status": status});
    api.patch_status(name, &PatchParams::default(), &Patch::Merge(&patch))
        .await?;
    Ok(())
}
