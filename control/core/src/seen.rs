//! An object as a cache shows it.

/// With what this process knows besides.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seen<T> {
    /// The object.
    pub object: T,
    /// Whether it is going: it says so, or was asked to just now.
    pub going: bool,
}
