//! Taking over what AIBrix v0.5.0 made without touching a pod.
//!
//! Its `role-template-hash` is a hash over Go's memory, which nobody else can compute. So a RoleSet
//! of its making is given an annotation that says which of its hashes stands for which template of
//! ours. From then on such replicas count as updated for as long as the template is the same.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// A foreign hash that stands for a template.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Adopted {
    /// What the replicas' label says.
    pub hash: String,
    /// Our hash of the template that it stands for.
    pub of: String,
}

/// By role.
pub type AdoptedHashes = BTreeMap<String, Adopted>;

/// The hash that replicas of a role carry when they are up to date.
#[must_use]
pub fn effective_hash(adopted: &AdoptedHashes, role: &str, computed: &str) -> String {
    match adopted.get(role) {
        Some(adopted) if adopted.of == computed => adopted.hash.clone(),
        _ => computed.to_owned(),
    }
}

/// What the annotation says; none where it is absent or not readable, which is the same as a RoleSet
/// that was never adopted.
#[must_use]
pub fn read(annotation: Option<&str>) -> Option<AdoptedHashes> {
    serde_json::from_str(annotation?).ok()
}

/// What the annotation is to say.
#[must_use]
pub fn write(adopted: &AdoptedHashes) -> String {
    serde_json::to_string(adopted).unwrap_or_else(|_| "{}".to_owned())
}

/// The foreign hash that stands for a role's present template: the one that as many replicas carry
/// as AIBrix counted as updated; where that leaves a choice, the newest.
#[must_use]
pub fn choose(replicas: &[(String, i64)], counted_as_updated: Option<i32>) -> Option<String> {
    let mut found: BTreeMap<&str, (i32, i64)> = BTreeMap::new();
    for (hash, created_s) in replicas {
        let entry = found.entry(hash).or_insert((0, i64::MIN));
        entry.0 += 1;
        entry.1 = entry.1.max(*created_s);
    }
    found
        .into_iter()
        .max_by_key(|(_, (count, newest))| (Some(*count) == counted_as_updated, *newest))
        .map(|(hash, _)| hash.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_foreign_hash_stands_for_its_template_only() {
        let adopted = BTreeMap::from([(
            "prefill".to_owned(),
            Adopted {
                hash: "5d4f8c7b9".into(),
                of: "ours".into(),
            },
        )]);
        assert_eq!(effective_hash(&adopted, "prefill", "ours"), "5d4f8c7b9");
        assert_eq!(effective_hash(&adopted, "prefill", "changed"), "changed");
        assert_eq!(effective_hash(&adopted, "decode", "ours"), "ours");
        assert_eq!(read(Some(&write(&adopted))), Some(adopted));
        assert_eq!(read(Some("{}")), Some(AdoptedHashes::new()));
        assert_eq!(read(None), None);
    }

    #[test]
    fn the_hash_that_aibrix_counted_is_chosen() {
        let pod = |hash: &str, created_s| (hash.to_owned(), created_s);
        assert_eq!(choose(&[], Some(0)), None);
        assert_eq!(
            choose(&[pod("a", 1), pod("a", 2)], Some(2)),
            Some("a".into())
        );
        let rolling = [pod("old", 1), pod("old", 2), pod("new", 3)];
        assert_eq!(choose(&rolling, Some(1)), Some("new".into()));
        assert_eq!(
            choose(&rolling, Some(2)),
            Some("old".into()),
            "newest is not always newest"
        );
        assert_eq!(choose(&rolling, None), Some("new".into()));
    }
}
