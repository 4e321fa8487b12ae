//! Lists, a page at a time.

/// Which part of a list is wanted.
#[derive(Clone, Debug)]
pub struct Page {
    /// The id after which it begins.
    pub after: Option<String>,
    /// Items at most.
    pub limit: u32,
    /// Oldest first.
    pub ascending: bool,
}

impl Page {
    /// How SQL compares with what comes before the page, and orders it.
    pub(super) fn order(&self) -> (&'static str, &'static str) {
        if self.ascending {
            (">", "ASC")
        } else {
            ("<", "DESC")
        }
    }

    /// One item more than wanted: whether it is there tells whether others follow.
    pub(super) fn fetched(&self) -> i64 {
        i64::from(self.limit) + 1
    }
}

/// Items of a list, and whether there are more.
#[derive(Debug)]
pub struct Listed<T> {
    /// The items.
    pub items: Vec<T>,
    /// Whether others follow.
    pub has_more: bool,
}

impl<T> Listed<T> {
    /// From a query for [`Page::fetched`] items.
    pub(super) fn of(mut items: Vec<T>, page: &Page) -> Listed<T> {
        let has_more = items.len() > page.limit as usize;
        items.truncate(page.limit as usize);
        Listed { items, has_more }
    }
}
