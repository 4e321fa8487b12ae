//! `maxSurge` and `maxUnavailable` as numbers.

use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use kvtide_control_api::RolloutBudget;
use thiserror::Error;

/// Children that one look at an object asks for at most; the rest follow at the next look. It bounds
/// memory and the time of a look whatever number was written, also one written by mistake.
pub const CREATIONS_MAX: i32 = 500;

/// How many may be missing and how many may be too many while something rolls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Budget {
    /// Beyond the wanted number.
    pub surge: i32,
    /// Below the wanted number.
    pub unavailable: i32,
}

/// What of a number of replicas is there. A place is what one replica takes: where replicas have slots,
/// several may be in one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Presence {
    /// Places that are taken.
    pub places: i32,
    /// Those of them where something is ready.
    pub ready: i32,
    /// Those where nothing is ready, and nothing outdated may become so.
    pub starting: i32,
}

/// What may still be taken away within the budget, counted as Deployments do: what stays is the wanted
/// number less those that may be missing, beside those that are starting. One that is not ready costs
/// nothing now, and is missed when it would have come back: it goes within the same allowance.
#[derive(Clone, Copy, Debug)]
pub struct Allowance {
    places: i32,
    ready: i32,
}

impl Allowance {
    /// Takes one place away, unless that leaves the budget. Those that are not ready are asked for
    /// before those that are.
    pub fn take(&mut self, ready: bool) -> bool {
        let allowed = self.places > 0 && (!ready || self.ready > 0);
        if allowed {
            self.places -= 1;
            self.ready -= i32::from(ready);
        }
        allowed
    }
}

/// A value that is neither a number nor a percentage.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("{field} is {value:?}; give a whole number of at least 0 or a percentage such as \"25%\"")]
pub struct BudgetError {
    /// `maxSurge` or `maxUnavailable`.
    pub field: &'static str,
    /// What was written.
    pub value: String,
}

impl Budget {
    /// The budget for `replicas`: surge rounds up, unavailable rounds down, and where both come to
    /// nothing one may be unavailable, or else nothing could ever roll.
    ///
    /// # Errors
    ///
    /// For a value that is neither a number nor a percentage.
    pub fn resolve(written: &RolloutBudget, replicas: i32) -> Result<Self, BudgetError> {
        let surge = scaled("maxSurge", written.max_surge.as_ref(), replicas, true)?;
        let unavailable = scaled(
            "maxUnavailable",
            written.max_unavailable.as_ref(),
            replicas,
            false,
        )?;
        let unavailable = if surge == 0 && unavailable == 0 {
            1
        } else {
            unavailable
        };
        Ok(Self {
            surge,
            unavailable: unavailable.min(replicas.max(0)),
        })
    }

    /// What may be taken away where `replicas` are wanted and `present` are there.
    #[must_use]
    pub fn allowance(self, replicas: i32, present: Presence) -> Allowance {
        let floor = replicas.saturating_sub(self.unavailable);
        let beyond = present.places.saturating_sub(floor);
        Allowance {
            places: beyond.saturating_sub(present.starting),
            ready: present.ready.saturating_sub(floor),
        }
    }
}

fn scaled(
    field: &'static str,
    value: Option<&IntOrString>,
    replicas: i32,
    up: bool,
) -> Result<i32, BudgetError> {
    let error = |value: String| BudgetError { field, value };
    match value {
        None => Ok(0),
        Some(IntOrString::Int(number)) if *number >= 0 => Ok(*number),
        Some(IntOrString::Int(number)) => Err(error(number.to_string())),
        Some(IntOrString::String(text)) => {
            if let Ok(number) = text.parse::<i32>() {
                return if number >= 0 {
                    Ok(number)
                } else {
                    Err(error(text.clone()))
                };
            }
            let percent: i64 = text
                .strip_suffix('%')
                .and_then(|number| number.parse::<u16>().ok())
                .map(i64::from)
                .ok_or_else(|| error(text.clone()))?;
            let product = percent * i64::from(replicas.max(0));
            let rounded = if up {
                (product + 99) / 100
            } else {
                product / 100
            };
            i32::try_from(rounded).map_err(|_| error(text.clone()))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(surge: Option<IntOrString>, unavailable: Option<IntOrString>) -> RolloutBudget {
        RolloutBudget {
            max_surge: surge,
            max_unavailable: unavailable,
        }
    }

    #[test]
    fn rounds_as_deployments_do_and_never_stalls() {
        let percent = |text: &str| Some(IntOrString::String(text.to_owned()));
        let number = |number: i32| Some(IntOrString::Int(number));
        // (maxSurge, maxUnavailable, replicas) -> (surge, unavailable)
        let table = [
            (None, None, 3, (0, 1)),
            (number(1), None, 3, (1, 0)),
            (number(0), number(0), 3, (0, 1)),
            (percent("25%"), percent("25%"), 3, (1, 0)),
            (None, percent("25%"), 3, (0, 1)),
            (percent("50%"), percent("50%"), 3, (2, 1)),
            (None, number(9), 3, (0, 3)),
            (None, None, 0, (0, 0)),
        ];
        for (surge, unavailable, replicas, (expected_surge, expected_unavailable)) in table {
            let resolved =
                Budget::resolve(&written(surge.clone(), unavailable.clone()), replicas).unwrap();
            let expected = Budget {
                surge: expected_surge,
                unavailable: expected_unavailable,
            };
            assert_eq!(
                resolved, expected,
                "{surge:?} {unavailable:?} of {replicas}"
            );
        }
    }

    #[test]
    fn a_wrong_value_is_named() {
        let wrong = written(Some(IntOrString::String("some".into())), None);
        let error = Budget::resolve(&wrong, 3).unwrap_err();
        assert_eq!(error.field, "maxSurge");
        assert!(Budget::resolve(&written(None, Some(IntOrString::Int(-1))), 3).is_err());
    }
}
