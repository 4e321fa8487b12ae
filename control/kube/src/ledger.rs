//! What this process wrote and its caches may not show yet.
//!
//! Names are fixed and deletions carry a uid, so a stale cache never does harm; the ledger keeps it
//! from costing requests and from choosing a second victim. It is bounded: an entry is dropped when
//! its object is seen, or after `FORGET_AFTER`.

use std::borrow::Cow;
use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::Resource;
use kube::core::object::HasStatus;
use kvtide_control_api::meta::version_of;
use serde::de::DeserializeOwned;
use serde_json::Value;

/// Longer than a watch that works is ever behind. An entry that outlives it belongs to an object
/// that came and went unseen.
const FORGET_AFTER: Duration = Duration::from_secs(30);

#[derive(Debug)]
struct Created {
    kind: &'static str,
    meta: Box<ObjectMeta>,
    since: Instant,
}

#[derive(Debug, Default)]
struct Entries {
    /// By parent's uid, then by child's uid.
    created: HashMap<String, HashMap<String, Created>>,
    /// Uids of objects that were asked to go.
    deleted: HashMap<String, Instant>,
    /// By uid: the generation that was written.
    generations: HashMap<String, (i64, Instant)>,
    /// By uid: resource version and status that were written.
    statuses: HashMap<String, (u64, Value, Instant)>,
    /// By parent's uid and purpose: hash of what was last applied.
    applied: HashMap<(String, &'static str), String>,
    /// By uid, reason and note of an event: when it was last told.
    told: HashMap<(String, String, String), Instant>,
}

/// See the module.
#[derive(Debug, Default)]
pub struct Ledger {
    entries: Mutex<Entries>,
}

/// An event is not told again for this long.
const TELL_AGAIN_AFTER: Duration = Duration::from_secs(600);
/// Events remembered; beyond it the old ones are dropped.
const TOLD_MAX: usize = 4096;

impl Ledger {
    fn lock(&self) -> MutexGuard<'_, Entries> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A child was created, or was found although no watch has shown it.
    pub fn created(&self, parent: &str, kind: &'static str, mut meta: ObjectMeta) {
        meta.managed_fields = None;
        let uid = meta.uid.clone().unwrap_or_default();
        let created = Created {
            kind,
            meta: Box::new(meta),
            since: Instant::now(),
        };
        self.lock()
            .created
            .entry(parent.to_owned())
            .or_default()
            .insert(uid, created);
    }

    /// Children of a kind that were created and are not in the cache, as the API server answered;
    /// `cached` tells whether it holds a uid.
    pub fn unseen(
        &self,
        parent: &str,
        kind: &str,
        cached: impl Fn(&str) -> bool,
    ) -> Vec<ObjectMeta> {
        let mut entries = self.lock();
        let Some(children) = entries.created.get_mut(parent) else {
            return Vec::new();
        };
        children.retain(|uid, child| {
            child.since.elapsed() < FORGET_AFTER && !(child.kind == kind && cached(uid))
        });
        let unseen = children.values().filter(|child| child.kind == kind);
        let unseen = unseen.map(|child| child.meta.as_ref().clone()).collect();
        if children.is_empty() {
            entries.created.remove(parent);
        }
        unseen
    }

    /// An object was asked to go.
    pub fn deleted(&self, uid: &str) {
        self.lock().deleted.insert(uid.to_owned(), Instant::now());
    }

    /// Whether an object was asked to go.
    #[must_use]
    pub fn is_deleted(&self, uid: &str) -> bool {
        let entries = self.lock();
        entries
            .deleted
            .get(uid)
            .is_some_and(|since| since.elapsed() < FORGET_AFTER)
    }

    /// An object's spec was written.
    pub fn updated(&self, uid: &str, generation: i64) {
        self.lock()
            .generations
            .insert(uid.to_owned(), (generation, Instant::now()));
    }

    /// The generation that an object has at least.
    #[must_use]
    pub fn generation(&self, uid: &str, cached: i64) -> i64 {
        let entries = self.lock();
        entries
            .generations
            .get(uid)
            .map_or(cached, |(generation, _)| cached.max(*generation))
    }

    /// A status was written.
    pub fn wrote_status(&self, uid: &str, resource_version: u64, status: Value) {
        let entry = (resource_version, status, Instant::now());
        self.lock().statuses.insert(uid.to_owned(), entry);
    }

    /// The status that was written, where the cache is older than it.
    #[must_use]
    pub fn newer_status(&self, uid: &str, cached_version: u64) -> Option<Value> {
        let entries = self.lock();
        let (version, status, _) = entries.statuses.get(uid)?;
        (cached_version < *version).then(|| status.clone())
    }

    /// An object as the cache has it, with the status that was written since, if there is one: a
    /// count or a time that is based on an older one would go back.
    pub fn with_newest_status<'a, K>(&self, object: &'a K) -> Cow<'a, K>
    where
        K: Resource + HasStatus + Clone,
        K::Status: DeserializeOwned,
    {
        let meta = object.meta();
        let uid = meta.uid.as_deref().unwrap_or_default();
        let newer = self.newer_status(uid, version_of(meta));
        // It was made from the same type.
        match newer.and_then(|status| serde_json::from_value(status).ok()) {
            Some(status) => {
                let mut object = object.clone();
                *object.status_mut() = Some(status);
                Cow::Owned(object)
            }
            None => Cow::Borrowed(object),
        }
    }

    /// Something of a parent's was applied.
    pub fn applied(&self, parent: &str, purpose: &'static str, hash: String) {
        self.lock()
            .applied
            .insert((parent.to_owned(), purpose), hash);
    }

    /// It is gone: what was applied has to be applied anew.
    pub fn forget_applied(&self, parent: &str, purpose: &'static str) {
        self.lock().applied.remove(&(parent.to_owned(), purpose));
    }

    /// The same, of everything for a purpose.
    pub fn forget_all_applied(&self, purpose: &'static str) {
        self.lock()
            .applied
            .retain(|(_, applied), _| *applied != purpose);
    }

    /// Whether the same was applied before.
    #[must_use]
    pub fn is_applied(&self, parent: &str, purpose: &'static str, hash: &str) -> bool {
        let entries = self.lock();
        entries
            .applied
            .get(&(parent.to_owned(), purpose))
            .is_some_and(|applied| applied == hash)
    }

    /// Whether an event is worth telling: not the same one a short while ago.
    pub fn tell(&self, uid: &str, reason: &str, note: &str) -> bool {
        let mut entries = self.lock();
        if entries.told.len() >= TOLD_MAX {
            entries
                .told
                .retain(|_, since| since.elapsed() < TELL_AGAIN_AFTER / 2);
            if entries.told.len() >= TOLD_MAX {
                entries.told.clear();
            }
        }
        let key = (uid.to_owned(), reason.to_owned(), note.to_owned());
        let known = entries
            .told
            .get(&key)
            .is_some_and(|since| since.elapsed() < TELL_AGAIN_AFTER);
        if !known {
            entries.told.insert(key, Instant::now());
        }
        !known
    }

    /// A watch showed an object as being there.
    pub fn seen(&self, parent: Option<&str>, uid: &str, generation: i64, version: u64) {
        let mut entries = self.lock();
        if let Some(children) = parent.and_then(|parent| entries.created.get_mut(parent)) {
            children.remove(uid);
        }
        if entries
            .generations
            .get(uid)
            .is_some_and(|(written, _)| *written <= generation)
        {
            entries.generations.remove(uid);
        }
        if entries
            .statuses
            .get(uid)
            .is_some_and(|(written, _, _)| *written <= version)
        {
            entries.statuses.remove(uid);
        }
    }

    /// A watch showed that an object is gone.
    pub fn gone(&self, parent: Option<&str>, uid: &str) {
        let mut entries = self.lock();
        if let Some(children) = parent.and_then(|parent| entries.created.get_mut(parent)) {
            children.remove(uid);
        }
        entries.created.remove(uid);
        entries.deleted.remove(uid);
        entries.generations.remove(uid);
        entries.statuses.remove(uid);
        entries.applied.retain(|(parent, _), _| parent != uid);
        let now = Instant::now();
        // What was written after its object went is dropped with time.
        let fresh = |since: &Instant| now.duration_since(*since) < FORGET_AFTER;
        if entries.deleted.len() > TOLD_MAX {
            entries.deleted.retain(|_, since| fresh(since));
        }
        if entries.generations.len() > TOLD_MAX {
            entries.generations.retain(|_, (_, since)| fresh(since));
        }
        if entries.statuses.len() > TOLD_MAX {
            entries.statuses.retain(|_, (_, _, since)| fresh(since));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvtide_control_api::{PodSet, PodSetStatus};

    #[test]
    fn what_was_created_counts_until_it_is_seen() {
        let ledger = Ledger::default();
        let child = || ObjectMeta {
            name: Some("a".into()),
            uid: Some("uid-a".into()),
            labels: Some([("role-name".to_owned(), "r".to_owned())].into()),
            ..ObjectMeta::default()
        };
        let unseen = |kind: &str| ledger.unseen("parent", kind, |_| false);
        ledger.created("parent", "Pod", child());
        assert_eq!(unseen("Pod"), [child()], "with all that says what it is");
        assert_eq!(unseen("PodSet"), []);
        ledger.seen(Some("parent"), "uid-a", 1, 1);
        assert_eq!(unseen("Pod"), []);
        ledger.created("parent", "Pod", child());
        let cached = |uid: &str| uid == "uid-a";
        assert_eq!(ledger.unseen("parent", "Pod", cached), []);
    }

    #[test]
    fn a_status_that_was_written_stands_until_the_cache_has_it() {
        let ledger = Ledger::default();
        ledger.wrote_status("u", 7, Value::Bool(true));
        assert_eq!(ledger.newer_status("u", 6), Some(Value::Bool(true)));
        assert_eq!(ledger.newer_status("u", 7), None);
        ledger.seen(None, "u", 1, 7);
        assert_eq!(ledger.newer_status("u", 6), None);
    }

    #[test]
    fn decisions_are_based_on_the_status_that_was_written_last() {
        let status = |total_pods: i32| PodSetStatus {
            total_pods,
            ..PodSetStatus::default()
        };
        let spec = serde_json::json!({"podGroupSize": 2, "template": {}});
        let mut set = PodSet::new("p", serde_json::from_value(spec).unwrap());
        set.metadata.uid = Some("u".into());
        set.metadata.resource_version = Some("6".into());
        set.status = Some(status(1));
        let ledger = Ledger::default();
        let total = |set: &PodSet| {
            let newest = ledger.with_newest_status(set);
            newest.status.as_ref().map(|status| status.total_pods)
        };
        assert_eq!(total(&set), Some(1));
        ledger.wrote_status("u", 7, serde_json::to_value(status(2)).unwrap());
        assert_eq!(total(&set), Some(2), "the cache is behind");
        set.metadata.resource_version = Some("8".into());
        assert_eq!(total(&set), Some(1), "somebody else wrote since");
    }

    #[test]
    fn an_event_is_told_once() {
        let ledger = Ledger::default();
        assert!(ledger.tell("u", "Scaling", "a"));
        assert!(!ledger.tell("u", "Scaling", "a"));
        assert!(ledger.tell("u", "Scaling", "b"));
    }
}
