//! What a tenant may have at most, and what a model keeps, whatever others need.

use std::collections::BTreeMap;

use super::ledger::PoolEntry;

/// Digits of a namespace's id that name it.
const LEAST_DIGITS: usize = 4;

/// See the module's documentation. Sizes are in bytes of rows; a minimum is rounded up to whole
/// extents, a quota down.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// What is not taken from a namespace that `minimums` does not name.
    pub minimum_bytes: u64,
    /// What is not taken from those that are named: by a model, or by the id of a namespace or the
    /// beginning of it. All namespaces of a name have it together.
    pub minimums: BTreeMap<String, u64>,
    /// What a tenant may have that `quotas` does not name; `None` if that is as much as there is.
    /// All engines without a tenant are one, whose name is empty.
    pub quota_bytes: Option<u64>,
    /// What the tenants may have that are named.
    pub quotas: BTreeMap<String, u64>,
}

impl Limits {
    /// What a tenant may have; `None` if that is as much as there is.
    #[must_use]
    pub fn quota_of(&self, tenant: &str) -> Option<u64> {
        self.quotas.get(tenant).copied().or(self.quota_bytes)
    }

    /// Extents that a tenant may have.
    pub(super) fn quota_extents(&self, tenant: &str, extent_bytes: usize) -> Option<u32> {
        let extents = self.quota_of(tenant)? / extent_bytes.max(1) as u64;
        Some(u32::try_from(extents).unwrap_or(u32::MAX))
    }

    /// What is not taken from a pool, and the name that it shares this with.
    pub(super) fn minimum_of(&self, pool: &PoolEntry) -> (u64, Option<&str>) {
        let id = pool.namespace().to_string();
        // A model may be named in hexadecimal digits, so that its name goes first.
        let named = self.minimums.get_key_value(&pool.model).or_else(|| {
            let is_beginning = |name: &str| name.len() >= LEAST_DIGITS && id.starts_with(name);
            let mut names = self.minimums.iter();
            names.find(|(name, _)| is_beginning(&name.to_lowercase()))
        });
        match named {
            Some((name, &bytes)) => (bytes, Some(name)),
            None => (self.minimum_bytes, None),
        }
    }

    /// Extents that hold so many bytes.
    #[must_use]
    pub fn extents_for(bytes: u64, extent_bytes: usize) -> u32 {
        u32::try_from(bytes.div_ceil(extent_bytes.max(1) as u64)).unwrap_or(u32::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pool(model: &str, first: u8) -> PoolEntry {
        PoolEntry {
            namespace: [first; 16],
            model: model.into(),
            ..PoolEntry::default()
        }
    }

    #[test]
    fn a_tenant_has_its_own_quota_or_that_of_all_others() {
        let mut limits = Limits {
            quotas: BTreeMap::from([("acme".into(), 7 << 20)]),
            ..Limits::default()
        };
        assert_eq!(limits.quota_extents("acme", 2 << 20), Some(3));
        assert_eq!(limits.quota_extents("other", 2 << 20), None);
        limits.quota_bytes = Some(2 << 20);
        assert_eq!(limits.quota_extents("other", 2 << 20), Some(1));
        assert_eq!(limits.quota_extents("", 2 << 20), Some(1));
    }

    #[test]
    fn a_minimum_is_named_by_a_model_or_by_the_id_of_a_namespace() {
        let named = ["m", "ABab", "cdc"];
        let limits = Limits {
            minimum_bytes: 1,
            minimums: named.map(|name| (name.to_owned(), 9)).into(),
            ..Limits::default()
        };
        assert_eq!(limits.minimum_of(&pool("m", 0)), (9, Some("m")));
        assert_eq!(limits.minimum_of(&pool("n", 0xab)), (9, Some("ABab")));
        assert_eq!(limits.minimum_of(&pool("n", 0xcd)), (1, None), "too short");
        assert_eq!(limits.minimum_of(&pool("n", 0)), (1, None));
    }
}
