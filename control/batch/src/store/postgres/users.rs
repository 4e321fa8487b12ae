//! [`Users`].

use async_trait::async_trait;

use super::rows::Values;
use super::{Postgres, sql};
use crate::error::Failure;
use crate::store::values::stored;
use crate::store::{User, Users};

#[async_trait]
impl Users for Postgres {
    async fn create_user(&self, user: &User) -> Result<bool, Failure> {
        let values: Values<'_> = &[&user.name, &stored(user)?];
        Ok(self.execute(sql::INSERT_USER, values).await? > 0)
    }

    async fn user(&self, name: &str) -> Result<Option<User>, Failure> {
        self.one(sql::USER, &[&name]).await
    }

    async fn update_user(&self, user: &User) -> Result<bool, Failure> {
        let values: Values<'_> = &[&stored(user)?, &user.name];
        Ok(self.execute(sql::UPDATE_USER, values).await? > 0)
    }

    async fn delete_user(&self, name: &str) -> Result<Option<User>, Failure> {
        self.one(sql::DELETE_USER, &[&name]).await
    }
}
