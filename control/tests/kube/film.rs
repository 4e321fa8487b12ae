//! All that happens to the pods of a world, one scene for each change: what must hold all the time is
//! asked of every scene, not of the end alone.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use futures::StreamExt;
use k8s_openapi::api::core::v1::Pod;
use kube::ResourceExt;
use kube::runtime::WatchStreamExt;
use kube::runtime::watcher::{self, Event, watcher};
use tokio::task::JoinHandle;

use crate::world::World;

/// One pod.
#[derive(Clone, Debug)]
pub(crate) struct Shot {
    pub(crate) role: String,
    pub(crate) role_set: String,
    pub(crate) image: String,
    pub(crate) ready: bool,
    pub(crate) going: bool,
}

/// All pods at one time.
#[derive(Clone, Debug, Default)]
pub(crate) struct Scene(BTreeMap<String, Shot>);

impl Scene {
    pub(crate) fn of<'a>(&'a self, role: &'a str) -> impl Iterator<Item = &'a Shot> {
        self.all().filter(move |pod| pod.role == role)
    }

    pub(crate) fn all(&self) -> impl Iterator<Item = &Shot> {
        self.0.values()
    }
}

/// See the module; ends with the test.
pub(crate) struct Film {
    scenes: Arc<Mutex<Vec<Scene>>>,
    watch: JoinHandle<()>,
}

impl Drop for Film {
    fn drop(&mut self) {
        self.watch.abort();
    }
}

impl Film {
    /// Begins with what is there.
    pub(crate) async fn start(world: &World) -> Self {
        let scenes: Arc<Mutex<Vec<Scene>>> = Arc::default();
        let (pods, taken) = (world.pods(), scenes.clone());
        let (begun, beginning) = tokio::sync::oneshot::channel();
        let watch = tokio::spawn(async move {
            let mut begun = Some(begun);
            let mut scene = Scene::default();
            let events = watcher(pods, watcher::Config::default()).default_backoff();
            let mut events = events.boxed();
            while let Some(event) = events.next().await {
                match event {
                    Ok(Event::InitApply(pod)) => {
                        scene.0.insert(pod.name_any(), shot(&pod));
                        continue;
                    }
                    Ok(Event::Apply(pod)) => drop(scene.0.insert(pod.name_any(), shot(&pod))),
                    Ok(Event::Delete(pod)) => drop(scene.0.remove(&pod.name_any())),
                    Ok(Event::InitDone) => {
                        if let Some(begun) = begun.take() {
                            begun.send(()).unwrap();
                        }
                    }
                    Ok(Event::Init) | Err(_) => continue,
                }
                taken.lock().unwrap().push(scene.clone());
            }
        });
        beginning.await.unwrap();
        Self { scenes, watch }
    }

    /// What was seen so far, at least once.
    pub(crate) fn scenes(&self) -> Vec<Scene> {
        let scenes = self.scenes.lock().unwrap().clone();
        assert!(scenes.len() > 1, "nothing happened");
        scenes
    }
}

fn shot(pod: &Pod) -> Shot {
    let label = |key: &str| pod.labels().get(key).cloned().unwrap_or_default();
    let conditions = pod.status.iter().flat_map(|status| &status.conditions);
    let ready = conditions
        .flatten()
        .any(|condition| condition.type_ == "Ready" && condition.status == "True");
    Shot {
        role: label("role-name"),
        role_set: label("roleset-name"),
        image: pod.spec.as_ref().unwrap().containers[0]
            .image
            .clone()
            .unwrap_or_default(),
        ready,
        going: pod.metadata.deletion_timestamp.is_some(),
    }
}
