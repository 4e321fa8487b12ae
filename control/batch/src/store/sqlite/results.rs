//! [`Results`].

use async_trait::async_trait;

use super::rows::{execute, exists, many};
use super::{Sqlite, sql};
use crate::error::Failure;
use crate::store::results::PartRow;
use crate::store::{Part, Results};

#[async_trait]
impl Results for Sqlite {
    async fn parts(&self, batch: &str) -> Result<Vec<Part>, Failure> {
        let batch = batch.to_owned();
        let rows = self.read(move |db| {
            many(db, sql::PARTS, &[&batch], |row| {
                Ok(PartRow {
                    stream: row.get(0)?,
                    key: row.get(1)?,
                    start: row.get(2)?,
                    bytes: row.get(3)?,
                    lines: row.get(4)?,
                })
            })
        });
        rows.await?.into_iter().map(Part::try_from).collect()
    }

    async fn batches_with_parts_to_drop(
        &self,
        after: &str,
        limit: u32,
    ) -> Result<Vec<String>, Failure> {
        let after = after.to_owned();
        let sql = "SELECT id FROM batches WHERE has_parts = 1 AND live = 0 AND id > ?
             ORDER BY id LIMIT ?";
        self.read(move |db| many(db, sql, &[&after, &limit], |row| row.get(0)))
            .await
    }

    async fn needs_parts(&self, batch: &str) -> Result<bool, Failure> {
        let batch = batch.to_owned();
        // By the writer: whoever asks is about to remove what is not needed.
        self.write(move |db| exists(db, sql::NEEDS_PARTS, &[&batch]))
            .await
    }

    async fn drop_parts(&self, batch: &str) -> Result<(), Failure> {
        let batch = batch.to_owned();
        self.write(move |db| {
            execute(db, sql::DELETE_PARTS, &[&batch])?;
            execute(db, sql::HAS_NO_PARTS, &[&batch]).map(drop)
        })
        .await
    }
}
