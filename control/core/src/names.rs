//! Names of what the controllers create. They are functions of what is wanted and never random, so
//! that a controller with a stale view asks for an object that already exists, not for a second one.

use super::canonical::hash_text;

/// A label's value and a host name have at most this many characters.
pub const NAME_LENGTH_MAX: usize = 63;
/// What is kept free for `-<index>` behind a PodSet's name: its pods have indices up to 99.
const POD_INDEX_LENGTH: usize = 3;

/// The name as it is, or shortened with a hash of the whole where it is too long.
#[must_use]
pub fn shortened(name: &str, length_max: usize) -> String {
    const HASH_LENGTH: usize = 6;
    if name.len() <= length_max {
        return name.to_owned();
    }
    let kept: String = name
        .chars()
        .take(length_max.saturating_sub(HASH_LENGTH + 1))
        .collect::<String>();
    format!(
        "{}-{}",
        kept.trim_end_matches(['-', '.']),
        hash_text(name, HASH_LENGTH)
    )
}

/// A hash, or for the `nth` candidate after the first another one.
fn salted(hash: &str, nth: u32) -> String {
    if nth == 0 {
        hash.to_owned()
    } else {
        hash_text(&format!("{hash}/{nth}"), hash.len())
    }
}

/// The `nth` candidate for a RoleSet at an index: what was orphaned may carry the name of the first. The
/// owner's uid keeps a StormService that was deleted and made again from meeting objects of its
/// predecessor; the index is there as it is, so that no two are alike.
#[must_use]
pub fn role_set(service: &str, service_uid: &str, index: i32, nth: u32) -> String {
    let uid = salted(&hash_text(service_uid, 5), nth);
    let suffix = format!("-roleset-{uid}-{index}");
    let prefix = shortened(service, NAME_LENGTH_MAX - suffix.len());
    format!("{prefix}{suffix}")
}

/// The `nth` candidate for a replica with a fixed index: a stateful pod. One that was released keeps
/// the name of the first.
#[must_use]
pub fn indexed_pod(role_set: &str, role: &str, hash: &str, index: i32, nth: u32) -> String {
    let hash = salted(hash, nth);
    shortened(
        &format!("{role_set}-{role}-{hash}-{index}"),
        NAME_LENGTH_MAX,
    )
}

/// The `nth` candidate for a PodSet, with room for its pods' indices.
#[must_use]
pub fn pod_set(role_set: &str, role: &str, hash: &str, index: i32, nth: u32) -> String {
    let hash = salted(hash, nth);
    shortened(
        &format!("{role_set}-{role}-{hash}-{index}"),
        NAME_LENGTH_MAX - POD_INDEX_LENGTH,
    )
}

/// The `nth` candidate for a replica without an index.
#[must_use]
pub fn plain_pod(role_set: &str, role_set_uid: &str, role: &str, hash: &str, nth: u32) -> String {
    let suffix = hash_text(&format!("{role_set_uid}/{role}/{hash}/{nth}"), 5);
    let prefix = shortened(
        &format!("{role_set}-{role}"),
        NAME_LENGTH_MAX - 1 - suffix.len(),
    );
    format!("{prefix}-{suffix}")
}

/// A pod of a PodSet.
#[must_use]
pub fn pod_set_pod(pod_set: &str, index: i32) -> String {
    let suffix = format!("-{index}");
    format!(
        "{}{suffix}",
        shortened(pod_set, NAME_LENGTH_MAX - suffix.len())
    )
}

/// A ControllerRevision.
#[must_use]
pub fn revision(service: &str, hash: &str) -> String {
    format!(
        "{}-{hash}",
        shortened(service, NAME_LENGTH_MAX - 1 - hash.len())
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_repeatable_and_fit_into_a_label() {
        let service = "a".repeat(63);
        let set = role_set(&service, "uid", 17, 0);
        assert_eq!(set, role_set(&service, "uid", 17, 0));
        assert_ne!(set, role_set(&service, "uid", 18, 0));
        assert_ne!(set, role_set(&service, "other", 17, 0));
        let next = role_set(&service, "uid", 17, 1);
        assert_eq!((set == next, set.len()), (false, next.len()));
        let role = "r".repeat(63);
        let group = pod_set(&set, &role, "hash2345", 999, 0);
        assert_ne!(group, pod_set(&set, &role, "hash2345", 999, 1));
        for name in [
            set.clone(),
            indexed_pod(&set, &role, "hash2345", 12, 0),
            plain_pod(&set, "uid", &role, "hash2345", 3),
            pod_set_pod(&group, 99),
            revision(&service, "hash2345"),
        ] {
            assert!(name.len() <= 63, "{name}");
            assert!(
                name.ends_with(|c: char| c.is_ascii_alphanumeric()),
                "{name}"
            );
        }
        assert_eq!(
            pod_set_pod(&group, 7),
            format!("{group}-7"),
            "room was kept for the index"
        );
    }

    #[test]
    fn no_two_role_sets_have_the_same_name() {
        let service = "a".repeat(63);
        for name in ["llm", &service] {
            let all = (0..20_000).map(|index| role_set(name, "uid", index, 0));
            let names: std::collections::BTreeSet<String> = all.collect();
            assert_eq!(names.len(), 20_000);
        }
    }

    #[test]
    fn short_names_are_readable() {
        let set = role_set("llm", "uid", 12, 0);
        assert!(
            set.starts_with("llm-roleset-") && set.ends_with("-12"),
            "{set}"
        );
        assert_eq!(
            indexed_pod("llm-roleset-x", "prefill", "h", 1, 0),
            "llm-roleset-x-prefill-h-1"
        );
    }
}
