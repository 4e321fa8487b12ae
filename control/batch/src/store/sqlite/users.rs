//! [`Users`].

use async_trait::async_trait;

use super::rows::{execute, one};
use super::{Sqlite, sql};
use crate::error::Failure;
use crate::store::values::stored;
use crate::store::{User, Users};

#[async_trait]
impl Users for Sqlite {
    async fn create_user(&self, user: &User) -> Result<bool, Failure> {
        let (name, document) = (user.name.clone(), stored(user)?);
        self.write(move |db| Ok(execute(db, sql::INSERT_USER, &[&name, &document])? > 0))
            .await
    }

    async fn user(&self, name: &str) -> Result<Option<User>, Failure> {
        let name = name.to_owned();
        self.read(move |db| one(db, sql::USER, &[&name])).await
    }

    async fn update_user(&self, user: &User) -> Result<bool, Failure> {
        let (name, document) = (user.name.clone(), stored(user)?);
        self.write(move |db| Ok(execute(db, sql::UPDATE_USER, &[&document, &name])? > 0))
            .await
    }

    async fn delete_user(&self, name: &str) -> Result<Option<User>, Failure> {
        let name = name.to_owned();
        self.write(move |db| one(db, sql::DELETE_USER, &[&name]))
            .await
    }
}
