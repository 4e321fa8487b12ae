//! Events as Kubernetes stores them. Each is an object of its own: `kube`'s recorder takes two of the same
//! reason for a series, and the note of the second is lost.

use k8s_openapi::api::core::v1::ObjectReference;
use k8s_openapi::api::events::v1::Event;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta};
use k8s_openapi::jiff::Timestamp;
use kube::Resource;
use kube::runtime::events::EventType;
use kvtide_control_api::meta::names_of;

use crate::writer::FIELD_MANAGER;

/// Longest note of an event, in bytes; the API server refuses a longer one.
const NOTE_MAX: usize = 1024;

/// What is told about an object.
pub struct Told<'a> {
    /// Normal or Warning.
    pub type_: EventType,
    /// In one CamelCase word.
    pub reason: &'a str,
    /// For a person.
    pub note: String,
}

impl Told<'_> {
    /// The event. `instance` is the process that tells it.
    #[must_use]
    pub fn about<K: Resource<DynamicType = ()>>(self, meta: &ObjectMeta, instance: &str) -> Event {
        let now = Timestamp::now();
        let (_, name) = names_of(meta);
        let type_ = match self.type_ {
            EventType::Normal => "Normal",
            EventType::Warning => "Warning",
        };
        Event {
            metadata: ObjectMeta {
                namespace: meta.namespace.clone(),
                name: Some(format!("{name}.{:x}", now.as_nanosecond())),
                ..ObjectMeta::default()
            },
            regarding: Some(ObjectReference {
                api_version: Some(K::api_version(&()).into_owned()),
                kind: Some(K::kind(&()).into_owned()),
                name: meta.name.clone(),
                namespace: meta.namespace.clone(),
                uid: meta.uid.clone(),
                ..ObjectReference::default()
            }),
            type_: Some(type_.to_owned()),
            reason: Some(self.reason.to_owned()),
            note: Some(self.note),
            action: Some("Reconcile".into()),
            event_time: Some(MicroTime(now)),
            reporting_controller: Some(FIELD_MANAGER.to_owned()),
            reporting_instance: Some(instance.to_owned()),
            ..Event::default()
        }
    }
}

/// A note that the API server takes. What a pod template has wrong can be a long list.
#[must_use]
pub fn shortened(mut note: String) -> String {
    const MORE: &str = "…";
    if note.len() > NOTE_MAX {
        let mut ends = (0..=NOTE_MAX - MORE.len()).rev();
        let end = ends.find(|at| note.is_char_boundary(*at));
        note.truncate(end.unwrap_or(0));
        note.push_str(MORE);
    }
    note
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_note_is_never_longer_than_the_api_server_takes() {
        let longest = "a".repeat(NOTE_MAX);
        assert_eq!(shortened(longest.clone()), longest);
        for letter in ["a", "é", "語"] {
            let note = shortened(letter.repeat(NOTE_MAX + 1));
            let length = note.len();
            assert!(length <= NOTE_MAX && note.ends_with('…'), "{length}");
        }
    }
}
