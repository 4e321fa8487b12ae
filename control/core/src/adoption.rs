//! Taking over what AIBrix v0.5.0 made without touching a pod.
//!
//! Its `role-template-hash` is a hash over Go's memory, which nobody else can compute. So a RoleSet
//! of its making is given an annotation that says which of its hashes stands for which template of
//! ours. From then on such replicas count as updated for as long as the template is the same.

use std::collections::BTreeMap;

use kvtide_control_api::RoleStatus;
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
/// as AIBrix counted as updated; where that leaves a choice, the newest. None where it counted
/// replicas and none of them as updated: then all are of an older template.
///
/// A count can be behind: AIBrix was stopped before the next. It makes replicas of the present template
/// alone, so where it counted another number than there is, what was made last is of that; but where no
/// more are left than it counted as outdated, and all are alike, they are those.
#[must_use]
pub fn choose(replicas: &[(String, i64)], counted: Option<&RoleStatus>) -> Option<String> {
    // A count from before there were replicas says nothing about them.
    let counted = counted.filter(|counted| counted.replicas > 0);
    let mut found: BTreeMap<&str, (i32, i64)> = BTreeMap::new();
    for (hash, created_s) in replicas {
        let entry = found.entry(hash).or_insert((0, i64::MIN));
        entry.0 += 1;
        entry.1 = entry.1.max(*created_s);
    }
    let Some(counted) = counted else {
        return newest(&found);
    };
    let updated = counted.updated_replicas;
    let there = i32::try_from(replicas.len()).unwrap_or(i32::MAX);
    let matching = found.iter().filter(|(_, (count, _))| *count == updated);
    let matching: BTreeMap<_, _> = matching.map(|(hash, seen)| (*hash, *seen)).collect();
    let outdated = counted.replicas - updated;
    let fits = there == counted.replicas;
    if fits && updated == 0 {
        None
    } else if fits && !matching.is_empty() {
        newest(&matching)
    } else if found.len() == 1 && there <= outdated {
        None
    } else {
        newest(&found)
    }
}

/// Of hashes with how many replicas carry them and when the last was made.
fn newest(found: &BTreeMap<&str, (i32, i64)>) -> Option<String> {
    let last = found.iter().max_by_key(|(_, (_, newest))| *newest)?;
    Some((*last.0).to_owned())
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
        let (one, rolling) = (
            [pod("a", 1), pod("a", 2)],
            [pod("old", 1), pod("old", 2), pod("new", 3)],
        );
        // Replicas, AIBrix's count of all and of updated ones, and the hash that is chosen.
        type Row<'a> = (&'a [(String, i64)], Option<(i32, i32)>, Option<&'a str>);
        let table: [Row<'_>; 14] = [
            (&[], Some((0, 0)), None),
            (&one, Some((2, 2)), Some("a")),
            (&rolling, Some((3, 1)), Some("new")),
            // The newest is not always of the newest template.
            (&rolling, Some((3, 2)), Some("old")),
            (&rolling, None, Some("new")),
            // An update that had only begun.
            (&one, Some((2, 0)), None),
            (&rolling, Some((3, 0)), None),
            // Counted before the pods were there.
            (&one, Some((0, 0)), Some("a")),
            // Counted before the new one was made.
            (&rolling, Some((2, 2)), Some("new")),
            (&rolling, Some((2, 0)), Some("new")),
            // Before an outdated one went, and before a new one took its place.
            (&one, Some((3, 0)), None),
            (&one, Some((2, 1)), Some("a")),
            (&one, Some((3, 1)), None),
            // Before somebody deleted one.
            (&one, Some((3, 3)), Some("a")),
        ];
        for (replicas, counted, expected) in table {
            let status = counted.map(|(replicas, updated_replicas)| RoleStatus {
                replicas,
                updated_replicas,
                ..RoleStatus::default()
            });
            let chosen = choose(replicas, status.as_ref());
            assert_eq!(chosen.as_deref(), expected, "{replicas:?} {counted:?}");
        }
    }
}
