//! What the installed CRDs keep of what this version writes. They may be other ones of the same names,
//! AIBrix's for instance, and may be replaced while the controller runs.

use crate::{Condition, find_condition, set_condition};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

use crate::conditions::OBSERVED;

/// Fields that are dropped.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Gap {
    /// Which, in words; none if nothing is.
    pub lost: Option<String>,
    /// Whether `observedGeneration` of RoleSets is among them.
    pub role_set_generation: bool,
    /// Whether `observedGeneration` of PodSets is.
    pub pod_set_generation: bool,
    /// Whether PodSets are refused that say FullRecreate; AIBrix's own spelling is Recreate.
    pub full_recreate: bool,
}

/// Puts the generation that a status is about into its field, or into a condition where the field
/// would be dropped: a field that never arrives would be written again and again.
pub fn note_generation(
    field: &mut Option<i64>,
    conditions: &mut Vec<Condition>,
    generation: Option<i64>,
    is_dropped: bool,
    now: &Time,
) {
    if is_dropped {
        *field = None;
        let reason = reason(generation.unwrap_or(0));
        set_condition(conditions, OBSERVED, true, &reason, "", now);
    } else {
        *field = generation;
        conditions.retain(|condition| condition.kind != OBSERVED);
    }
}

/// Whether a status is about `generation`.
#[must_use]
pub fn is_observed(field: Option<i64>, conditions: &[Condition], generation: i64) -> bool {
    let noted = || {
        let condition = find_condition(conditions, OBSERVED)?;
        Some(condition.reason == reason(generation))
    };
    field.map_or_else(|| noted().unwrap_or(false), |field| field == generation)
}

fn reason(generation: i64) -> String {
    format!("Generation{generation}")
}

#[cfg(test)]
mod tests {
    use k8s_openapi::jiff::Timestamp;

    use super::*;

    #[test]
    fn a_generation_is_known_with_and_without_its_field() {
        let at = |second| Time(Timestamp::from_second(second).unwrap());
        for is_dropped in [false, true] {
            let (mut field, mut conditions) = (Some(1), Vec::new());
            note_generation(&mut field, &mut conditions, Some(7), is_dropped, &at(1));
            assert!(is_observed(field, &conditions, 7), "{is_dropped}");
            assert!(!is_observed(field, &conditions, 8), "{is_dropped}");
            let before = (field, conditions.clone());
            note_generation(&mut field, &mut conditions, Some(7), is_dropped, &at(2));
            assert_eq!((field, conditions), before, "nothing to write");
        }
        let (mut field, mut conditions) = (None, Vec::new());
        note_generation(&mut field, &mut conditions, Some(7), true, &at(1));
        note_generation(&mut field, &mut conditions, Some(8), false, &at(2));
        assert_eq!(
            (field, conditions),
            (Some(8), Vec::new()),
            "the field came back"
        );
        assert!(!is_observed(None, &[], 1));
    }
}
