//! A cache of one kind, fed by a watch, with an index by owner.
//!
//! One watch serves every controller that looks at the kind. An object that cannot be decoded is
//! kept as its metadata (`DeserializeGuard` in the type), so that it never stops the watch.

use std::collections::{BTreeSet, HashMap};
use std::fmt::Debug;
use std::hash::Hash;
use std::sync::{Arc, PoisonError, RwLock};

use futures::{Stream, StreamExt};
use kube::Resource;
use kube::runtime::reflector::{self, ObjectRef, Store, store::Writer};
use kube::runtime::watcher::{self, Event};
use kvtide_control_api::meta::{Key, key_of, owner_key, owner_uid, version_of};

use crate::error::said;
use crate::ledger::Ledger;
use crate::trigger::Trigger;

/// Which object to reconcile when one changed: told the object as it was and as it is.
pub type Route<K> = Box<dyn Fn(Option<&K>, &K) -> Option<Key> + Send + Sync>;

/// A cache of one kind.
#[derive(Debug)]
pub struct Informer<K: Resource<DynamicType = ()> + 'static> {
    store: Store<K>,
    owners: Arc<RwLock<HashMap<String, BTreeSet<Key>>>>,
}

impl<K: Resource<DynamicType = ()> + 'static> Clone for Informer<K> {
    fn clone(&self) -> Self {
        Self {
            store: self.store.clone(),
            owners: self.owners.clone(),
        }
    }
}

/// A route to the object itself, for changes that somebody asked for: not for a new status.
#[must_use]
pub fn route_self<K: Resource + 'static>() -> Route<K> {
    Box::new(|old, new| {
        let meta = new.meta();
        let same = old.is_some_and(|old| {
            let old = old.meta();
            old.uid == meta.uid
                && old.generation == meta.generation
                && old.deletion_timestamp == meta.deletion_timestamp
                && old.labels == meta.labels
                && old.annotations == meta.annotations
                && old.finalizers == meta.finalizers
        });
        (!same).then(|| key_of(new))
    })
}

/// A route to the controller of an object, where that is of `kind`.
#[must_use]
pub fn route_owner<K: Resource + 'static>(kind: &'static str) -> Route<K> {
    Box::new(move |_, new| owner_key(new.meta(), kind))
}

impl<K> Informer<K>
where
    K: Resource<DynamicType = ()> + Clone + Debug + Send + Sync + 'static,
    K::DynamicType: Hash + Eq + Clone,
{
    /// An empty cache and the future that feeds it for as long as it is polled.
    pub fn new(
        events: impl Stream<Item = watcher::Result<Event<K>>> + Send + 'static,
        routes: Vec<(Route<K>, Trigger)>,
        ledger: Arc<Ledger>,
    ) -> (Self, impl Future<Output = ()> + Send + 'static) {
        let (store, writer) = reflector::store();
        let informer = Self {
            store,
            owners: Arc::default(),
        };
        let feed = informer.clone().feed(events, writer, routes, ledger);
        (informer, feed)
    }

    async fn feed(
        self,
        events: impl Stream<Item = watcher::Result<Event<K>>> + Send + 'static,
        mut writer: Writer<K>,
        routes: Vec<(Route<K>, Trigger)>,
        ledger: Arc<Ledger>,
    ) {
        let fire = |old: Option<&K>, new: &K| {
            for (route, trigger) in &routes {
                if let Some(key) = route(old, new) {
                    trigger.fire(key);
                }
            }
        };
        let mut events = Box::pin(events);
        while let Some(event) = events.next().await {
            let event = match event {
                Ok(event) => event,
                Err(error) => {
                    // The watcher starts again by itself, after a pause.
                    tracing::warn!(kind = %K::kind(&()), error = said(&error), "watch interrupted");
                    continue;
                }
            };
            match &event {
                Event::Apply(object) => {
                    let old = self.get(&key_of(object));
                    self.index(object);
                    writer.apply_watcher_event(&event);
                    if let Some(old) = &old
                        && owner_uid(old.meta()) != owner_uid(object.meta())
                    {
                        self.unindex(old);
                    }
                    note_seen(object, &ledger);
                    fire(old.as_deref(), object);
                }
                Event::Delete(object) => {
                    writer.apply_watcher_event(&event);
                    self.unindex(object);
                    if let Some(uid) = object.meta().uid.as_deref() {
                        ledger.gone(owner_uid(object.meta()), uid);
                    }
                    fire(None, object);
                }
                Event::Init => writer.apply_watcher_event(&event),
                Event::InitApply(object) => {
                    // Before it is in the store: the index never lacks what the store has.
                    self.index(object);
                    writer.apply_watcher_event(&event);
                }
                Event::InitDone => {
                    let before = self.store.state();
                    writer.apply_watcher_event(&event);
                    self.relisted(&before, &ledger, &fire);
                }
            }
        }
    }

    /// After a new list: the index is built anew, and everything is looked at once. Reconciles go
    /// on meanwhile, so the new index takes the old one's place as a whole.
    fn relisted(&self, before: &[Arc<K>], ledger: &Ledger, fire: &dyn Fn(Option<&K>, &K)) {
        let now = self.store.state();
        let kept: BTreeSet<Key> = now.iter().map(|object| key_of(object.as_ref())).collect();
        let mut owners: HashMap<String, BTreeSet<Key>> = HashMap::new();
        for object in &now {
            if let Some(owner) = owner_uid(object.as_ref().meta()) {
                let keys = owners.entry(owner.to_owned()).or_default();
                keys.insert(key_of(object.as_ref()));
            }
            note_seen(object.as_ref(), ledger);
        }
        *self.owners.write().unwrap_or_else(PoisonError::into_inner) = owners;
        for object in &now {
            fire(None, object);
        }
        for object in before
            .iter()
            .filter(|object| !kept.contains(&key_of(object.as_ref())))
        {
            if let Some(uid) = object.meta().uid.as_deref() {
                ledger.gone(owner_uid(object.meta()), uid);
            }
            fire(None, object);
        }
    }

    fn index(&self, object: &K) {
        if let Some(owner) = owner_uid(object.meta()) {
            let mut owners = self.owners.write().unwrap_or_else(PoisonError::into_inner);
            owners
                .entry(owner.to_owned())
                .or_default()
                .insert(key_of(object));
        }
    }

    fn unindex(&self, object: &K) {
        let Some(owner) = owner_uid(object.meta()) else {
            return;
        };
        let mut owners = self.owners.write().unwrap_or_else(PoisonError::into_inner);
        if let Some(keys) = owners.get_mut(owner) {
            keys.remove(&key_of(object));
            if keys.is_empty() {
                owners.remove(owner);
            }
        }
    }

    /// An object.
    #[must_use]
    pub fn get(&self, key: &Key) -> Option<Arc<K>> {
        let mut reference = ObjectRef::new(&key.name);
        if !key.namespace.is_empty() {
            reference = reference.within(&key.namespace);
        }
        self.store.get(&reference)
    }

    /// Objects whose controller has this uid.
    #[must_use]
    pub fn owned_by(&self, uid: &str) -> Vec<Arc<K>> {
        let keys: Vec<Key> = {
            let owners = self.owners.read().unwrap_or_else(PoisonError::into_inner);
            owners.get(uid).into_iter().flatten().cloned().collect()
        };
        let objects = keys.iter().filter_map(|key| self.get(key));
        // The index is by key: an object made anew under a name may have another owner.
        objects
            .filter(|object| owner_uid(object.as_ref().meta()) == Some(uid))
            .collect()
    }

    /// Everything.
    #[must_use]
    pub fn all(&self) -> Vec<Arc<K>> {
        self.store.state()
    }

    /// The store, for a controller of this kind.
    #[must_use]
    pub fn store(&self) -> Store<K> {
        self.store.clone()
    }

    /// Waits for the first list.
    pub async fn ready(&self) {
        if self.store.wait_until_ready().await.is_err() {
            tracing::debug!(kind = %K::kind(&()), "the watch ended before its first list");
        }
    }
}

fn note_seen<K: Resource>(object: &K, ledger: &Ledger) {
    let meta = object.meta();
    if let Some(uid) = meta.uid.as_deref() {
        let generation = meta.generation.unwrap_or(0);
        ledger.seen(owner_uid(meta), uid, generation, version_of(meta));
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use futures::stream;
    use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference};

    use super::*;
    use kvtide_control_api::observed::ObservedPod;

    fn pod(nth: usize) -> ObservedPod {
        let owner = OwnerReference {
            controller: Some(true),
            uid: "owner".into(),
            ..OwnerReference::default()
        };
        ObservedPod {
            metadata: ObjectMeta {
                name: Some(format!("pod-{nth}")),
                namespace: Some("n".into()),
                uid: Some(format!("uid-{nth}")),
                owner_references: Some(vec![owner]),
                ..ObjectMeta::default()
            },
            ..ObservedPod::default()
        }
    }

    #[test]
    fn owned_objects_never_go_missing_during_a_relist() {
        const PODS: usize = 200;
        let list = || {
            let pods = (0..PODS).map(|nth| Ok(Event::InitApply(pod(nth))));
            let begin = std::iter::once(Ok(Event::Init));
            begin
                .chain(pods)
                .chain(std::iter::once(Ok(Event::InitDone)))
        };
        let (listed, first_list) = std::sync::mpsc::channel();
        let relists = list()
            .map(Some)
            .chain(std::iter::once(None))
            .chain((0..200).flat_map(move |_| list().map(Some)));
        let events = stream::iter(relists).filter_map(move |event| {
            if event.is_none() {
                listed.send(()).unwrap();
            }
            std::future::ready(event)
        });
        let (informer, feed) = Informer::new(events, Vec::new(), Arc::default());
        let over = AtomicBool::new(false);
        let (reading, stop) = (&informer, &over);
        let fewest = std::thread::scope(|scope| {
            let reader = scope.spawn(move || {
                first_list.recv().unwrap();
                let mut fewest = reading.owned_by("owner").len();
                while !stop.load(Ordering::Relaxed) {
                    fewest = fewest.min(reading.owned_by("owner").len());
                }
                fewest
            });
            futures::executor::block_on(feed);
            over.store(true, Ordering::Relaxed);
            reader.join().unwrap()
        });
        assert_eq!(fewest, PODS);
        assert_eq!(informer.owners.read().unwrap().len(), 1);
    }

    #[test]
    fn a_released_object_leaves_nothing_under_the_owner_it_had() {
        let mut released = pod(0);
        released.metadata.owner_references = None;
        let events = [
            Event::Init,
            Event::InitApply(pod(0)),
            Event::InitDone,
            Event::Apply(released),
        ];
        let (informer, feed) =
            Informer::new(stream::iter(events.map(Ok)), Vec::new(), Arc::default());
        futures::executor::block_on(feed);
        assert_eq!(informer.all().len(), 1);
        assert!(informer.owners.read().unwrap().is_empty());
    }
}
