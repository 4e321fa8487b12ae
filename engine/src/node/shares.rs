//! Who gets the next extent: decided from numbers alone.
//!
//! What nobody has goes to whoever asks first. Then an extent is taken from the pool whose extent
//! was longest out of use, if that is longer than what the asking pool would have to give up of its
//! own: as if all pools had one queue, in pieces of an extent. Four things come before that order:
//!
//! * A tenant at its quota gets extents of its own pools alone.
//! * What a group of pools has for its minimum is not taken from it; below its minimum, it gets what is
//!   longest out of use, however long that is.
//! * A tenant that has more than its quota, which was lowered since, gives first.
//! * A pool without any extent gets one from a pool that has more than one.

/// So many seconds longer out of use than what the asking pool has itself, or it is not taken: what two
/// pools use alike would go back and forth.
const LONGER_S: u64 = 10;

/// What one pool has. Tenants and groups are numbered.
#[derive(Clone, Copy, Debug)]
pub(super) struct Share {
    pub(super) tenant: usize,
    /// Pools that have a minimum together.
    pub(super) group: usize,
    pub(super) extents: u32,
}

/// An extent that its pool could give up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Candidate {
    /// Number of the pool.
    pub(super) share: usize,
    pub(super) extent: u32,
    /// When its blocks were last used, on average and in seconds of Unix time.
    pub(super) last_use: u64,
}

/// What all pools have.
#[derive(Clone, Debug)]
pub(super) struct Shares {
    /// Seconds of Unix time.
    pub(super) now: u64,
    /// Extents that no pool has.
    pub(super) free: u32,
    pub(super) pools: Vec<Share>,
    /// Extents that each tenant may have.
    pub(super) quotas: Vec<Option<u32>>,
    /// Extents that are not taken from each group.
    pub(super) minimums: Vec<u32>,
}

/// Where the next extent of a pool comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// Nobody has it.
    Free,
    /// One of these, the first that its pool gives up. There is one at least.
    Taken(Vec<Candidate>),
    /// There is none for it.
    Denied(Denied),
}

/// Why a pool gets no extent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Denied {
    /// Its tenant has what it may have, and the tenant's other pools need what they have more.
    Quota,
    /// Nobody has one that is needed less.
    Capacity,
}

impl Shares {
    /// Where the next extent of pool `asking` comes from.
    pub(super) fn next(&self, asking: usize, candidates: &[Candidate]) -> Next {
        let Some(&own) = self.pools.get(asking) else {
            return Next::Denied(Denied::Capacity);
        };
        let at_quota = self
            .quota_of(own)
            .is_some_and(|quota| self.of_tenant(own.tenant) >= quota);
        if !at_quota && self.free > 0 {
            return Next::Free;
        }
        let mine = candidates.iter().filter(|each| each.share == asking);
        let oldest = mine.map(|each| each.last_use).min();
        // Where all of its own is in use just now, it is compared with what was used just now.
        let oldest = oldest.unwrap_or(self.now);
        let is_short = self.of_group(own.group) < self.minimum_of(own);
        let mut taken: Vec<(bool, Candidate)> = Vec::new();
        for &candidate in candidates {
            let Some(&giver) = self.pools.get(candidate.share) else {
                continue;
            };
            let same_tenant = giver.tenant == own.tenant;
            if candidate.share == asking || at_quota && !same_tenant || !self.may_give(giver, own) {
                continue;
            }
            let is_over = !same_tenant && self.is_over(giver);
            // Within a group, its minimum decides nothing.
            let is_short = is_short && giver.group != own.group;
            let is_first = own.extents == 0 && giver.extents > 1;
            let is_older = candidate.last_use.saturating_add(LONGER_S) < oldest;
            if is_over || is_short || is_first || is_older {
                taken.push((!is_over, candidate));
            }
        }
        taken.sort_unstable_by_key(|&(not_over, each)| (not_over, each.last_use, each.extent));
        match (taken.is_empty(), at_quota) {
            (false, _) => Next::Taken(taken.into_iter().map(|(_, each)| each).collect()),
            (true, true) => Next::Denied(Denied::Quota),
            (true, false) => Next::Denied(Denied::Capacity),
        }
    }

    /// What is to be given up because a tenant has more than its quota: the first that its pool
    /// gives up.
    pub(super) fn excess(&self, candidates: &[Candidate]) -> Vec<Candidate> {
        let is_over = |candidate: &&Candidate| {
            let giver = self.pools.get(candidate.share);
            giver.is_some_and(|&giver| self.is_over(giver) && self.is_above_minimum(giver))
        };
        let mut excess: Vec<Candidate> = candidates.iter().filter(is_over).copied().collect();
        excess.sort_unstable_by_key(|each| (each.last_use, each.extent));
        excess
    }

    /// Whether a tenant has more than its quota.
    pub(super) fn any_is_over(&self) -> bool {
        self.pools.iter().any(|&pool| self.is_over(pool))
    }

    fn may_give(&self, giver: Share, taker: Share) -> bool {
        // Within a group, nothing is taken from the group.
        giver.extents > 0 && (giver.group == taker.group || self.is_above_minimum(giver))
    }

    fn is_above_minimum(&self, giver: Share) -> bool {
        self.of_group(giver.group) > self.minimum_of(giver)
    }

    fn is_over(&self, pool: Share) -> bool {
        let quota = self.quota_of(pool);
        quota.is_some_and(|quota| self.of_tenant(pool.tenant) > quota)
    }

    fn quota_of(&self, pool: Share) -> Option<u32> {
        self.quotas.get(pool.tenant).copied().flatten()
    }

    fn minimum_of(&self, pool: Share) -> u32 {
        self.minimums.get(pool.group).copied().unwrap_or(0)
    }

    fn of_tenant(&self, tenant: usize) -> u32 {
        let pools = self.pools.iter().filter(|pool| pool.tenant == tenant);
        pools.map(|pool| pool.extents).sum()
    }

    fn of_group(&self, group: usize) -> u32 {
        let pools = self.pools.iter().filter(|pool| pool.group == group);
        pools.map(|pool| pool.extents).sum()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const NOW: u64 = 1_000;

    fn share(tenant: usize, group: usize, extents: u32) -> Share {
        Share {
            tenant,
            group,
            extents,
        }
    }

    /// Tenants and groups without limits, and one pool for each of `pools`.
    fn shares(free: u32, pools: &[Share]) -> Shares {
        Shares {
            now: NOW,
            free,
            pools: pools.to_vec(),
            quotas: vec![None; 4],
            minimums: vec![0; 8],
        }
    }

    /// Extents of every pool, used at these times.
    fn candidates(used: &[&[u64]]) -> Vec<Candidate> {
        let mut all = Vec::new();
        for (share, used) in used.iter().enumerate() {
            for &last_use in *used {
                all.push(Candidate {
                    share,
                    extent: u32::try_from(all.len()).unwrap(),
                    last_use,
                });
            }
        }
        all
    }

    fn taken(next: &Next) -> Vec<u32> {
        match next {
            Next::Taken(candidates) => candidates.iter().map(|each| each.extent).collect(),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn what_nobody_has_goes_to_whoever_asks_below_its_quota() {
        let mut shares = shares(1, &[share(0, 0, 1)]);
        assert_eq!(shares.next(0, &[]), Next::Free);
        shares.quotas[0] = Some(1);
        assert_eq!(shares.next(0, &[]), Next::Denied(Denied::Quota));
        shares.quotas[0] = Some(2);
        assert_eq!(shares.next(0, &[]), Next::Free);
    }

    #[test]
    fn the_extent_that_was_longest_out_of_use_is_taken_unless_the_own_ones_are_older() {
        let shares = shares(0, &[share(0, 0, 1), share(0, 1, 2), share(0, 2, 1)]);
        let next = shares.next(0, &candidates(&[&[500], &[600, 480], &[400]]));
        assert_eq!(taken(&next), [3, 2]);
        let next = shares.next(0, &candidates(&[&[300], &[600, 480], &[400]]));
        assert_eq!(next, Next::Denied(Denied::Capacity));
        let next = shares.next(0, &candidates(&[&[500], &[495, 495], &[495]]));
        assert_eq!(next, Next::Denied(Denied::Capacity), "used alike");
    }

    #[test]
    fn a_tenant_at_its_quota_takes_from_its_own_pools_alone() {
        let mut shares = shares(3, &[share(0, 0, 1), share(0, 1, 1), share(1, 2, 1)]);
        shares.quotas[0] = Some(2);
        let next = shares.next(0, &candidates(&[&[900], &[500], &[100]]));
        assert_eq!(taken(&next), [1]);
        let next = shares.next(0, &candidates(&[&[500], &[500], &[100]]));
        assert_eq!(next, Next::Denied(Denied::Quota));
    }

    #[test]
    fn a_minimum_is_kept_by_its_group_and_reached_by_whoever_is_below_it() {
        let mut shares = shares(0, &[share(0, 0, 0), share(0, 1, 1), share(0, 1, 1)]);
        shares.minimums[1] = 2;
        let old = candidates(&[&[], &[1], &[2]]);
        assert_eq!(shares.next(0, &old), Next::Denied(Denied::Capacity));
        // Within the group it goes round.
        let next = shares.next(2, &candidates(&[&[], &[1], &[500]]));
        assert_eq!(taken(&next), [0]);
        shares.pools[0].extents = 2;
        shares.minimums[1] = 3;
        let next = shares.next(1, &candidates(&[&[NOW, NOW], &[1], &[1]]));
        assert_eq!(taken(&next), [0, 1]);
    }

    #[test]
    fn a_pool_without_anything_gets_one_of_many_however_much_they_are_used() {
        let mut shares = shares(0, &[share(0, 0, 0), share(0, 1, 2)]);
        let used = candidates(&[&[], &[NOW, NOW]]);
        assert_eq!(taken(&shares.next(0, &used)), [0, 1]);
        shares.pools[1].extents = 1;
        let used = candidates(&[&[], &[NOW]]);
        assert_eq!(shares.next(0, &used), Next::Denied(Denied::Capacity));
        let unused = candidates(&[&[], &[NOW - 11]]);
        assert_eq!(taken(&shares.next(0, &unused)), [0]);
    }

    #[test]
    fn a_tenant_with_more_than_its_quota_gives_first() {
        let mut shares = shares(0, &[share(0, 0, 1), share(1, 1, 2), share(2, 2, 1)]);
        shares.quotas[1] = Some(1);
        let used = candidates(&[&[500], &[NOW, NOW - 1], &[1]]);
        assert_eq!(taken(&shares.next(0, &used)), [2, 1, 3]);
        assert!(shares.any_is_over());
        let excess: Vec<u32> = shares
            .excess(&used)
            .iter()
            .map(|each| each.extent)
            .collect();
        assert_eq!(excess, [2, 1]);
        shares.minimums[1] = 2;
        assert_eq!(shares.excess(&used), []);
    }

    /// Who asks, when each extent was last used, and whether it can be given up.
    type Question = (usize, Vec<(u64, bool)>);

    /// Pools that share a capacity, and what they ask for.
    fn histories() -> impl Strategy<Value = (Shares, u32, Vec<Question>)> {
        let pools = prop::collection::vec((0..3usize, 0..5usize), 1..6);
        let quotas = prop::collection::vec(prop::option::of(1..8u32), 3);
        let minimums = prop::collection::vec(0..4u32, 5);
        let ages = prop::collection::vec((900..=NOW, prop::bool::weighted(0.8)), 16);
        let asked = prop::collection::vec((0..6usize, ages), 1..60);
        (pools, quotas, minimums, 1..16u32, asked).prop_map(
            |(pools, quotas, mut minimums, capacity, asked)| {
                let mut left = capacity;
                for minimum in &mut minimums {
                    *minimum = (*minimum).min(left);
                    left -= *minimum;
                }
                let pools = pools.iter().map(|&(tenant, group)| share(tenant, group, 0));
                let shares = Shares {
                    now: NOW,
                    free: capacity,
                    pools: pools.collect(),
                    quotas,
                    minimums,
                };
                (shares, capacity, asked)
            },
        )
    }

    proptest! {
        #[test]
        fn quotas_and_minimums_hold_and_nobody_starves((mut shares, capacity, asked) in histories()) {
            let mut owners: Vec<Option<usize>> = vec![None; capacity as usize];
            for (asking, ages) in asked {
                let asking = asking % shares.pools.len();
                let candidates: Vec<Candidate> = owners
                    .iter()
                    .zip(0..)
                    .zip(&ages)
                    .filter(|&(_, &(_, can_go))| can_go)
                    .filter_map(|((&owner, extent), &(last_use, _))| {
                        let share = owner?;
                        Some(Candidate { share, extent, last_use })
                    })
                    .collect();
                let before = shares.clone();
                let own = before.pools[asking];
                let next = shares.next(asking, &candidates);
                let extent = match &next {
                    Next::Free => owners.iter().position(Option::is_none).unwrap(),
                    Next::Taken(candidates) => candidates[0].extent as usize,
                    Next::Denied(why) => {
                        let at_quota = before
                            .quota_of(own)
                            .is_some_and(|quota| before.of_tenant(own.tenant) >= quota);
                        prop_assert_eq!(*why == Denied::Quota, at_quota);
                        prop_assert!(at_quota || before.free == 0);
                        let short = before.of_group(own.group) < before.minimum_of(own);
                        for each in candidates.iter().filter(|each| each.share != asking) {
                            let giver = before.pools[each.share];
                            if at_quota && giver.tenant != own.tenant {
                                continue;
                            }
                            let spare = before.of_group(giver.group) > before.minimum_of(giver);
                            prop_assert!(!spare || !short, "its minimum is not reached");
                            prop_assert!(!spare || own.extents > 0 || giver.extents == 1);
                        }
                        continue;
                    }
                };
                match owners[extent].replace(asking) {
                    Some(giver) => {
                        prop_assert!(giver != asking);
                        shares.pools[giver].extents -= 1;
                    }
                    None => shares.free -= 1,
                }
                shares.pools[asking].extents += 1;
                for (tenant, quota) in shares.quotas.iter().enumerate() {
                    prop_assert!(quota.is_none_or(|quota| shares.of_tenant(tenant) <= quota));
                }
                for (group, &minimum) in shares.minimums.iter().enumerate() {
                    let (had, has) = (before.of_group(group), shares.of_group(group));
                    prop_assert!(has >= had || has >= minimum, "its minimum is undercut");
                }
                let owned: u32 = shares.pools.iter().map(|pool| pool.extents).sum();
                prop_assert_eq!(owned + shares.free, capacity);
            }
        }
    }
}
