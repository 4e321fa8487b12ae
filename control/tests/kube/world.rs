//! One test's world: namespaces of its own, a controller process that looks at them alone, a fake
//! kubelet, and questions to ask.

use std::panic::{AssertUnwindSafe, resume_unwind};
use std::path::PathBuf;
use std::process::Child;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use futures::FutureExt;
use k8s_openapi::api::core::v1::{Namespace, Pod};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::api::{Api, DynamicObject, ListParams, ObjectMeta, Patch, PatchParams, PostParams};
use kube::core::ApiResource;
use kube::{Client, Resource, ResourceExt};
use kvtide_control_api::{PodSet, RoleSet, StormService, find_condition};
use serde_json::{Value, json};
use tokio::sync::{RwLock, RwLockReadGuard, RwLockWriteGuard};

use crate::cluster::{Cluster, free_port, spawn};
use crate::kubelet::{Kubelet, Running};

/// Things take milliseconds; a test that waits this long hangs.
const WAIT_MAX: Duration = Duration::from_secs(90);

/// Most tests share the API server; one that restarts it, or that runs a controller of all
/// namespaces, has it alone.
static SHARED: RwLock<()> = RwLock::const_new(());

enum Share {
    Shared {
        _guard: RwLockReadGuard<'static, ()>,
    },
    Alone {
        _guard: RwLockWriteGuard<'static, ()>,
    },
}

pub(crate) struct World {
    _share: Option<Share>,
    pub(crate) cluster: &'static Cluster,
    pub(crate) client: Client,
    pub(crate) namespace: String,
    _kubelet: Running,
}

/// A controller process; killed with the test.
pub(crate) struct Controller {
    child: Option<Child>,
    pub(crate) port: u16,
    log: PathBuf,
}

impl World {
    /// A new namespace with a fake kubelet.
    pub(crate) async fn new(cluster: &'static Cluster, name: &str) -> Self {
        let share = Share::Shared {
            _guard: SHARED.read().await,
        };
        Self::with(cluster, name, Some(share)).await
    }

    /// The same, while no other test runs.
    pub(crate) async fn alone(cluster: &'static Cluster, name: &str) -> Self {
        let share = Share::Alone {
            _guard: SHARED.write().await,
        };
        Self::with(cluster, name, Some(share)).await
    }

    /// Another namespace of the same test.
    pub(crate) async fn beside(&self) -> Self {
        Self::with(self.cluster, "beside", None).await
    }

    async fn with(cluster: &'static Cluster, name: &str, share: Option<Share>) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let namespace = format!("{name}-{}", NEXT.fetch_add(1, Ordering::Relaxed));
        let client = cluster.client().await;
        let object = Namespace {
            metadata: ObjectMeta {
                name: Some(namespace.clone()),
                ..ObjectMeta::default()
            },
            ..Namespace::default()
        };
        Api::all(client.clone())
            .create(&PostParams::default(), &object)
            .await
            .unwrap();
        let kubelet = Kubelet {
            namespace: Some(namespace.clone()),
            ..Kubelet::default()
        };
        let kubelet = kubelet.start(&client);
        Self {
            _share: share,
            cluster,
            client,
            namespace,
            _kubelet: kubelet,
        }
    }

    /// A controller of this namespace alone.
    pub(crate) fn controller(&self) -> Controller {
        self.controller_with(&["--leader-elect=false"])
    }

    pub(crate) fn controller_with(&self, extra: &[&str]) -> Controller {
        Controller::start(self.cluster, Some(&self.namespace), extra)
    }

    pub(crate) fn services(&self) -> Api<StormService> {
        Api::namespaced(self.client.clone(), &self.namespace)
    }

    pub(crate) fn role_sets(&self) -> Api<RoleSet> {
        Api::namespaced(self.client.clone(), &self.namespace)
    }

    pub(crate) fn pod_sets(&self) -> Api<PodSet> {
        Api::namespaced(self.client.clone(), &self.namespace)
    }

    pub(crate) fn pods(&self) -> Api<Pod> {
        Api::namespaced(self.client.clone(), &self.namespace)
    }

    pub(crate) async fn all<K>(&self, api: &Api<K>) -> Vec<K>
    where
        K: Resource + Clone + serde::de::DeserializeOwned + std::fmt::Debug,
    {
        api.list(&ListParams::default()).await.unwrap().items
    }

    /// Creates or changes an object, as `kubectl apply --server-side` does.
    pub(crate) async fn apply(&self, object: Value) {
        let (name, resource) = identify(&object);
        let api: Api<DynamicObject> =
            Api::namespaced_with(self.client.clone(), &self.namespace, &resource);
        let params = PatchParams::apply("test").force();
        api.patch(&name, &params, &Patch::Apply(&object))
            .await
            .unwrap();
    }

    /// A quota that no pod fits into; returns once the API server goes by it. No controller of quotas
    /// runs here, so its status is written by hand.
    pub(crate) async fn forbid_pods(&self) {
        let none = json!({"pods": "0"});
        let quota = json!({"apiVersion": "v1", "kind": "ResourceQuota",
            "metadata": {"name": "none"}, "spec": {"hard": none}});
        self.apply(quota).await;
        let status = json!({"status": {"hard": none, "used": none}}).to_string();
        let patch = ["--subresource=status", "--type=merge", "-p", &status];
        self.kubectl(&[&["patch", "resourcequota", "none"][..], &patch[..]].concat());
        let namespace = ["-n", &self.namespace];
        let pod = ["run", "probe", "--image=i", "--dry-run=server"];
        self.until("the API server knows the quota", || async {
            let refused = self
                .cluster
                .kubectl_refused(&[&namespace[..], &pod[..]].concat())?;
            refused.contains("exceeded quota").then_some(())
        })
        .await;
    }

    /// Merges a change into a StormService.
    pub(crate) async fn change(&self, name: &str, patch: Value) {
        let params = PatchParams::default();
        self.services()
            .patch(name, &params, &Patch::Merge(&patch))
            .await
            .unwrap();
    }

    /// Runs kubectl in the namespace.
    pub(crate) fn kubectl(&self, arguments: &[&str]) -> String {
        let mut all = vec!["-n", self.namespace.as_str()];
        all.extend(arguments);
        self.cluster.kubectl(&all)
    }

    /// Events about an object: reasons and notes.
    pub(crate) fn events(&self, kind: &str, name: &str) -> Vec<(String, String)> {
        let all = self.kubectl(&["get", "events", "-o", "json"]);
        let all: Value = serde_json::from_str(&all).unwrap();
        let about = |event: &&Value| {
            let object = &event["involvedObject"];
            object["kind"] == kind && object["name"] == name
        };
        let text =
            |event: &Value, field: &str| event[field].as_str().unwrap_or_default().to_owned();
        let events = all["items"].as_array().unwrap().iter().filter(about);
        events
            .map(|event| (text(event, "reason"), text(event, "message")))
            .collect()
    }

    /// The reason and message of a StormService's condition.
    pub(crate) async fn told(&self, name: &str, kind: &str) -> Option<(String, String)> {
        let status = self.services().get_opt(name).await.ok()??.status?;
        let condition = find_condition(&status.conditions, kind)?;
        Some((condition.reason.clone(), condition.message.clone()))
    }

    /// Waits until a question has an answer.
    pub(crate) async fn until<T, F>(&self, what: &str, mut ask: impl FnMut() -> F) -> T
    where
        F: Future<Output = Option<T>>,
    {
        let began = Instant::now();
        loop {
            if let Some(answer) = ask().await {
                return answer;
            }
            if began.elapsed() > WAIT_MAX {
                // Also where the kinds are not there: what was waited for must be told.
                let look = |kinds: &str, form: &str| {
                    let arguments = ["-n", &self.namespace, "get", kinds, "-o", form];
                    let seen = self.cluster.try_kubectl(&arguments);
                    seen.unwrap_or_else(|error| error)
                };
                let state = look("stsvc,rolesets,podsets,pods", "wide");
                let stored = look("stsvc,rolesets", "yaml");
                panic!(
                    "waited in vain until {what}\n{state}\n{}",
                    tail(&stored, 200)
                );
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// Waits until a StormService is ready for its present generation.
    pub(crate) async fn until_ready(&self, name: &str) -> StormService {
        self.until(&format!("{name} is ready"), || async {
            let service = self.services().get_opt(name).await.ok()??;
            let status = service.status.clone()?;
            let observed = status.observed_generation == service.metadata.generation;
            let ready = condition(&status.conditions, "Ready");
            (observed && ready == Some(true)).then_some(service)
        })
        .await
    }

    /// Waits until nothing has changed for a while: the versions of all objects stand.
    pub(crate) async fn until_quiet(&self) {
        let began = Instant::now();
        let mut before = self.versions().await;
        let mut since = Instant::now();
        while since.elapsed() < Duration::from_millis(1500) {
            assert!(began.elapsed() < WAIT_MAX, "objects change and change");
            tokio::time::sleep(Duration::from_millis(200)).await;
            let now = self.versions().await;
            if now != before {
                before = now;
                since = Instant::now();
            }
        }
    }

    /// Waits until a controller that was just started has looked at a RoleSet, and for what it did then.
    pub(crate) async fn until_looked_at_by(&self, controller: &Controller) {
        self.until("the controller has looked at a RoleSet", || async {
            let page = controller.page("/metrics").await?;
            page.lines()
                .find(|line| {
                    line.starts_with("kvtide_control_reconciles_total")
                        && line.contains("kind=\"RoleSet\"")
                        && line.contains("result=\"success\"")
                })
                .map(|_| ())
        })
        .await;
        self.until_quiet().await;
    }

    async fn versions(&self) -> String {
        let mut versions = Vec::new();
        fn note<K: ResourceExt>(objects: Vec<K>, versions: &mut Vec<String>) {
            for object in objects {
                versions.push(format!(
                    "{:?}/{:?}",
                    object.uid(),
                    object.resource_version()
                ));
            }
        }
        note(self.all(&self.services()).await, &mut versions);
        note(self.all(&self.role_sets()).await, &mut versions);
        note(self.all(&self.pod_sets()).await, &mut versions);
        note(self.all(&self.pods()).await, &mut versions);
        versions.sort();
        versions.join(" ")
    }

    /// Requests of controllers about this namespace so far that write, by the API server's audit log.
    pub(crate) fn writes(&self) -> Vec<String> {
        let audit = std::fs::read_to_string(self.cluster.home().join("audit.log")).unwrap();
        let here = format!("\"namespace\":\"{}\"", self.namespace);
        let by_us =
            |line: &&str| line.contains(&here) && line.contains("kvtide-system:kvtide-control");
        let request = |line: &str| {
            let line: Value = serde_json::from_str(line).ok()?;
            let verb = line["verb"].as_str()?;
            let write = !["get", "list", "watch"].contains(&verb);
            write.then(|| format!("{verb} {}", line["requestURI"].as_str().unwrap_or_default()))
        };
        audit.lines().filter(by_us).filter_map(request).collect()
    }

    /// Pods of a role that are not going.
    pub(crate) async fn pods_of(&self, role: &str) -> Vec<Pod> {
        let labelled = ListParams::default().labels(&format!("role-name={role}"));
        let pods = self.pods().list(&labelled).await.unwrap().items;
        pods.into_iter()
            .filter(|pod| pod.metadata.deletion_timestamp.is_none())
            .collect()
    }
}

impl Drop for World {
    /// A test that has the API server alone may take from it what all others need. Where such a test
    /// fails, this puts it back before the next one begins, so that one failure stays one.
    fn drop(&mut self) {
        let alone = matches!(self._share, Some(Share::Alone { .. }));
        if !alone || !std::thread::panicking() {
            return;
        }
        if let Err(error) = self.cluster.put_back() {
            eprintln!("what others need could not be put back, and they may fail for it: {error}");
        }
    }
}

fn tail(text: &str, lines: usize) -> String {
    let all: Vec<&str> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}

fn identify(object: &Value) -> (String, ApiResource) {
    let api_version = object["apiVersion"].as_str().unwrap();
    let (group, version) = api_version.split_once('/').unwrap_or(("", api_version));
    let kind = object["kind"].as_str().unwrap();
    let gvk = kube::core::GroupVersionKind::gvk(group, version, kind);
    (
        object["metadata"]["name"].as_str().unwrap().to_owned(),
        ApiResource::from_gvk(&gvk),
    )
}

/// Whether a condition holds; none where it is not there.
pub(crate) fn condition(conditions: &[kvtide_control_api::Condition], kind: &str) -> Option<bool> {
    let found = conditions.iter().find(|condition| condition.kind == kind)?;
    Some(found.status == kvtide_control_api::ConditionStatus::True)
}

/// Uids, sorted: the same before and after means that nothing was replaced.
pub(crate) fn uids<K: ResourceExt>(objects: &[K]) -> Vec<String> {
    let mut uids: Vec<String> = objects.iter().filter_map(ResourceExt::uid).collect();
    uids.sort();
    uids
}

/// Images of pods, sorted.
pub(crate) fn images(pods: &[Pod]) -> Vec<String> {
    let image = |pod: &Pod| pod.spec.as_ref()?.containers[0].image.clone();
    let mut images: Vec<String> = pods.iter().filter_map(image).collect();
    images.sort();
    images
}

impl Controller {
    pub(crate) fn start(
        cluster: &'static Cluster,
        namespace: Option<&str>,
        extra: &[&str],
    ) -> Self {
        let port = free_port();
        let mut arguments = vec![
            "controller".to_owned(),
            format!("--listen=127.0.0.1:{port}"),
        ];
        arguments.extend(namespace.map(|namespace| format!("--namespace={namespace}")));
        arguments.extend(extra.iter().map(ToString::to_string));
        let log = cluster.home().join(format!("controller-{port}.log"));
        let env = vec![
            (
                "KUBECONFIG",
                cluster.limited_kubeconfig.display().to_string(),
            ),
            ("KVTIDE_LOG", "info,kvtide_control=debug".to_owned()),
        ];
        let (done, started) = mpsc::channel();
        let to = log.clone();
        // A child dies with the thread that started it, and tests hop between threads.
        std::thread::spawn(move || {
            let program = PathBuf::from(env!("CARGO_BIN_EXE_kvtide-control"));
            done.send(spawn(&program, &arguments, &to, &env)).unwrap();
            loop {
                std::thread::park();
            }
        });
        Self {
            child: Some(started.recv().unwrap()),
            port,
            log,
        }
    }

    /// Kills it where it stands.
    pub(crate) fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }

    /// Asks it to stop, and waits for it.
    pub(crate) fn terminate(&mut self) -> std::process::ExitStatus {
        let pid = self.pid().to_string();
        let mut child = self.child.take().unwrap();
        std::process::Command::new("kill")
            .args(["-TERM", &pid])
            .status()
            .unwrap();
        child.wait().unwrap()
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.as_ref().unwrap().id()
    }

    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// One of its own pages.
    pub(crate) async fn page(&self, path: &str) -> Option<String> {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        let mut stream = tokio::net::TcpStream::connect(("127.0.0.1", self.port))
            .await
            .ok()?;
        let request = format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.ok()?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.ok()?;
        Some(answer)
    }
}

impl Drop for Controller {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("controller log:\n{}", tail(&self.log(), 60));
        }
        self.kill();
    }
}

/// Runs `work` while other definitions of our kinds are installed: ours, changed by `change`. The
/// world must have the API server alone.
pub(crate) async fn with_definitions<T>(
    world: &World,
    change: impl Fn(&mut CustomResourceDefinition),
    work: impl AsyncFnOnce() -> T,
) -> T {
    let install = async |change: &dyn Fn(&mut CustomResourceDefinition)| {
        let api: Api<CustomResourceDefinition> = Api::all(world.client.clone());
        for mut definition in kvtide_control_api::crds::definitions().unwrap() {
            change(&mut definition);
            let name = definition.name_any();
            let stored = api.get(&name).await.unwrap();
            definition.metadata.resource_version = stored.resource_version();
            api.replace(&name, &PostParams::default(), &definition)
                .await
                .unwrap();
        }
        // The API server takes a new schema into use a little later, and says so by nothing.
        tokio::time::sleep(Duration::from_secs(2)).await;
    };
    install(&change).await;
    // Others need ours, also where the work fails.
    let outcome = AssertUnwindSafe(work()).catch_unwind().await;
    install(&|_| {}).await;
    outcome.unwrap_or_else(|panic| resume_unwind(panic))
}

/// A StormService; `roles` as in a manifest.
pub(crate) fn service(name: &str, replicas: i32, roles: Value) -> Value {
    json!({
        "apiVersion": "orchestration.aibrix.ai/v1alpha1",
        "kind": "StormService",
        "metadata": {"name": name},
        "spec": {
            "replicas": replicas,
            "selector": {"matchLabels": {"app": name}},
            "template": {
                "metadata": {"labels": {"app": name}},
                "spec": {"roles": roles},
            },
        },
    })
}

/// A role of pods with this image.
pub(crate) fn role(name: &str, replicas: i32, image: &str) -> Value {
    json!({
        "name": name,
        "replicas": replicas,
        "template": {"spec": {
            "terminationGracePeriodSeconds": 1,
            "containers": [{"name": "c", "image": image}],
        }},
    })
}

/// A role with more fields.
pub(crate) fn role_with(name: &str, replicas: i32, image: &str, fields: Value) -> Value {
    let mut role = role(name, replicas, image);
    for (key, value) in fields.as_object().unwrap() {
        role[key] = value.clone();
    }
    role
}

/// A kind PodGroup that takes anything.
pub(crate) fn pod_group_crd(group: &str, version: &str) -> Value {
    json!({
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {
            "name": format!("podgroups.{group}"),
            "annotations": {"api-approved.kubernetes.io": "unapproved, for tests"},
        },
        "spec": {
            "group": group,
            "names": {"kind": "PodGroup", "plural": "podgroups", "singular": "podgroup"},
            "scope": "Namespaced",
            "versions": [{
                "name": version, "served": true, "storage": true,
                "schema": {"openAPIV3Schema": {
                    "type": "object", "x-kubernetes-preserve-unknown-fields": true,
                }},
            }],
        },
    })
}
