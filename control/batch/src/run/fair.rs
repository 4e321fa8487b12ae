//! Who makes way for whom when all job slots are taken and other batches wait. Pure.
//!
//! A batch may run for a day. Slots are shared out evenly between tenants, and for each tenant
//! between models: whoever has two more than somebody who waits gives one up soon, whoever has one
//! more gives it up after a while, and whose model can only be waited for gives it up at once.

use std::time::Duration;

use crate::store::Share;

/// A slot is held for at least so long before another is given it for the sake of fairness.
const HELD_MIN: Duration = Duration::from_secs(10);
/// A slot that only one more than others have is held for so long: who takes over has to validate the
/// file again.
const HELD_TURN: Duration = Duration::from_secs(300);

/// A batch that has a job slot.
#[derive(Clone, Debug)]
pub(super) struct Holder {
    pub(super) share: Share,
    pub(super) held: Duration,
}

/// Which of `holders` gives up its slot to one of those `waiting`, if any should. Those in `stalled`
/// could do nothing with a slot.
pub(super) fn who_makes_way(
    holders: &[Holder],
    waiting: &[Share],
    stalled: &[Share],
) -> Option<usize> {
    let mut able = waiting
        .iter()
        .filter(|share| !stalled.contains(share))
        .peekable();
    able.peek()?;
    if let Some(position) = holders
        .iter()
        .position(|holder| stalled.contains(&holder.share))
    {
        return Some(position);
    }
    able.find_map(|share| {
        let tenant = |other: &Share| (other.tenant == share.tenant).then_some(());
        let everybody = |other: &Share| Some(other.tenant.clone());
        let own_models = |other: &Share| tenant(other).map(|()| other.model.clone());
        most_over(holders, share, everybody).or_else(|| most_over(holders, share, own_models))
    })
}

/// Of the kind of which there are the most holders, if these are more than those of the kind of
/// `waits`: the one that gives up its slot.
fn most_over<K: PartialEq>(
    holders: &[Holder],
    waits: &Share,
    kind: impl Fn(&Share) -> Option<K>,
) -> Option<usize> {
    let count = |of: &Option<K>| {
        holders
            .iter()
            .filter(|holder| kind(&holder.share) == *of)
            .count()
    };
    let mine = kind(waits);
    let has = count(&mine);
    let (_, most) = holders
        .iter()
        .map(|holder| kind(&holder.share))
        .filter(|kind| kind.is_some() && *kind != mine)
        .map(|kind| (count(&kind), kind))
        .max_by_key(|(count, _)| *count)
        .filter(|(count, _)| *count > has)?;
    let too_many = count(&most) >= has + 2;
    let theirs = holders
        .iter()
        .enumerate()
        .filter(|(_, holder)| kind(&holder.share) == most);
    let (position, holder) = if too_many {
        // The one that has done the least.
        theirs.min_by_key(|(_, holder)| holder.held)?
    } else {
        theirs.max_by_key(|(_, holder)| holder.held)?
    };
    let enough = if too_many { HELD_MIN } else { HELD_TURN };
    (holder.held >= enough).then_some(position)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn share(tenant: &str, model: &str) -> Share {
        Share {
            tenant: tenant.into(),
            model: Some(model.into()),
        }
    }

    fn holders(of: &[(&str, &str, u64)]) -> Vec<Holder> {
        of.iter()
            .map(|(tenant, model, seconds)| Holder {
                share: share(tenant, model),
                held: Duration::from_secs(*seconds),
            })
            .collect()
    }

    #[test]
    fn a_tenant_with_all_slots_gives_one_to_another_that_waits() {
        let all = holders(&[("a", "m", 90), ("a", "m", 20), ("a", "m", 50)]);
        assert_eq!(who_makes_way(&all, &[share("b", "m")], &[]), Some(1));
        assert_eq!(who_makes_way(&all, &[share("a", "m")], &[]), None);
        assert_eq!(who_makes_way(&all, &[], &[]), None);
        let new = holders(&[("a", "m", 1), ("a", "m", 2)]);
        assert_eq!(who_makes_way(&new, &[share("b", "m")], &[]), None, "yet");
    }

    #[test]
    fn who_has_one_more_gives_it_up_after_a_while() {
        let one = |held| holders(&[("a", "m", held)]);
        let waiting = [share("b", "m")];
        assert_eq!(who_makes_way(&one(100), &waiting, &[]), None);
        assert_eq!(who_makes_way(&one(301), &waiting, &[]), Some(0));
        let even = holders(&[("a", "m", 999), ("b", "m", 999)]);
        assert_eq!(who_makes_way(&even, &waiting, &[]), None, "it has its own");
    }

    #[test]
    fn the_models_of_one_tenant_share_its_slots() {
        let all = holders(&[
            ("a", "m", 90),
            ("a", "m", 20),
            ("b", "m", 90),
            ("b", "m", 90),
        ]);
        assert_eq!(who_makes_way(&all, &[share("a", "n")], &[]), Some(1));
    }

    #[test]
    fn whose_model_is_down_makes_way_at_once_but_not_for_his_like() {
        let all = holders(&[("b", "m", 0), ("a", "dead", 0)]);
        let stalled = [share("a", "dead"), share("c", "dead")];
        assert_eq!(
            who_makes_way(&all, &[share("a", "m")], &stalled),
            Some(1),
            "also for the same tenant"
        );
        assert_eq!(who_makes_way(&all, &[share("c", "dead")], &stalled), None);
    }
}
