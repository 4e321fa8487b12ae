//! What the installed CRDs drop, as it is known at present.

use std::sync::{PoisonError, RwLock};

use kvtide_control_api::crd_gap::Gap;

/// See the module.
#[derive(Debug, Default)]
pub struct Schema(RwLock<Gap>);

impl Schema {
    /// What is dropped at present.
    #[must_use]
    pub fn gap(&self) -> Gap {
        self.0
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Notes what is dropped. Returns whether that is news.
    pub fn note(&self, gap: Gap) -> bool {
        let mut known = self.0.write().unwrap_or_else(PoisonError::into_inner);
        let changed = *known != gap;
        *known = gap;
        changed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_new_gap_is_news() {
        let schema = Schema::default();
        let gap = Gap {
            role_set_generation: true,
            ..Gap::default()
        };
        assert!(!schema.note(Gap::default()));
        assert!(schema.note(gap.clone()));
        assert!(!schema.note(gap));
    }
}
