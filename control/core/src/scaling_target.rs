//! Which pod stands for its RoleSet where an autoscaler counts pods.
//!
//! `replicas` of a StormService's scale subresource counts RoleSets, and a `HorizontalPodAutoscaler`
//! multiplies by the number of pods that the subresource's selector finds. So that finds one of each.

use std::cmp::Reverse;

/// A pod that may stand for its RoleSet.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Candidate {
    /// The place of its role: pods of the first role that has any are chosen from, so that what is
    /// measured is the same everywhere.
    pub rank: usize,
    /// Whether it is ready.
    pub ready: bool,
    /// Whether it stands for the RoleSet now.
    pub marked: bool,
    /// The slot of its replica, and its place in the group.
    pub index: (Option<i32>, Option<i32>),
    /// When it was created, in seconds.
    pub created_s: i64,
    /// Its name.
    pub name: String,
}

/// The position of the pod that is to stand for the RoleSet: the one that does, unless another is ready
/// and it is not.
#[must_use]
pub fn choose(candidates: &[Candidate]) -> Option<usize> {
    (0..candidates.len()).min_by_key(|&at| {
        let pod = &candidates[at];
        let standing = (Reverse(pod.ready), Reverse(pod.marked));
        (pod.rank, standing, pod.index, pod.created_s, &pod.name)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A pod of the role at `rank`; `r`eady, `m`arked.
    fn pod(rank: usize, name: &str, flags: &str) -> Candidate {
        Candidate {
            rank,
            ready: flags.contains('r'),
            marked: flags.contains('m'),
            name: name.to_owned(),
            ..Candidate::default()
        }
    }

    #[test]
    fn one_stands_for_all_and_stays_while_it_can() {
        let table = [
            ("nobody is there", vec![], None),
            (
                "the first by name",
                vec![pod(0, "b", ""), pod(0, "a", "")],
                Some(1),
            ),
            (
                "a ready one",
                vec![pod(0, "a", ""), pod(0, "b", "r")],
                Some(1),
            ),
            (
                "it stays",
                vec![pod(0, "a", "r"), pod(0, "b", "rm")],
                Some(1),
            ),
            (
                "it waits alone",
                vec![pod(0, "a", ""), pod(0, "b", "m")],
                Some(1),
            ),
            (
                "it waits among ready ones",
                vec![pod(0, "a", "m"), pod(0, "b", "r")],
                Some(1),
            ),
            (
                "of the first role",
                vec![pod(1, "a", "rm"), pod(0, "b", "")],
                Some(1),
            ),
            (
                "that has any",
                vec![pod(2, "a", "r"), pod(1, "b", "")],
                Some(1),
            ),
        ];
        for (name, candidates, expected) in table {
            assert_eq!(choose(&candidates), expected, "{name}");
        }
    }

    #[test]
    fn the_first_of_a_group_stands_for_it() {
        let at = |slot: i32, place: i32| Candidate {
            index: (Some(slot), Some(place)),
            ..pod(0, "a", "r")
        };
        assert_eq!(choose(&[at(1, 0), at(0, 1), at(0, 0)]), Some(2));
    }
}
