//! Users of AIBrix's metadata API.

use async_trait::async_trait;
use serde::{Deserialize, Serialize};

use crate::error::Failure;

/// A user of AIBrix's metadata API: limits for the router.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct User {
    /// Its name.
    pub name: String,
    /// Requests a minute.
    #[serde(default)]
    pub rpm: u64,
    /// Tokens a minute.
    #[serde(default)]
    pub tpm: u64,
}

/// Users. See [`Metadata`](super::Metadata).
#[async_trait]
pub trait Users: Send + Sync {
    /// Adds a user; false if the name is taken.
    async fn create_user(&self, user: &User) -> Result<bool, Failure>;
    /// A user.
    async fn user(&self, name: &str) -> Result<Option<User>, Failure>;
    /// Changes a user; false if there is none of this name.
    async fn update_user(&self, user: &User) -> Result<bool, Failure>;
    /// Removes a user and gives what it was.
    async fn delete_user(&self, name: &str) -> Result<Option<User>, Failure>;
}
