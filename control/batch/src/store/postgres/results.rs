//! [`Results`].

use async_trait::async_trait;

use super::rows::column;
use super::{Postgres, sql};
use crate::error::Failure;
use crate::store::results::PartRow;
use crate::store::{Part, Results};

#[async_trait]
impl Results for Postgres {
    async fn parts(&self, batch: &str) -> Result<Vec<Part>, Failure> {
        let rows = self.rows(sql::PARTS, &[&batch]).await?;
        rows.iter()
            .map(|row| {
                Part::try_from(PartRow {
                    stream: column(row, 0)?,
                    key: column(row, 1)?,
                    start: column(row, 2)?,
                    bytes: column(row, 3)?,
                    lines: column(row, 4)?,
                })
            })
            .collect()
    }

    async fn batches_with_parts_to_drop(
        &self,
        after: &str,
        limit: u32,
    ) -> Result<Vec<String>, Failure> {
        let sql = "SELECT id FROM kvtide_batches WHERE has_parts AND NOT live AND id > $1
             ORDER BY id LIMIT $2";
        self.texts(sql, &[&after, &i64::from(limit)]).await
    }

    async fn needs_parts(&self, batch: &str) -> Result<bool, Failure> {
        self.exists(sql::NEEDS_PARTS, &[&batch]).await
    }

    async fn drop_parts(&self, batch: &str) -> Result<(), Failure> {
        self.execute(sql::DELETE_PARTS, &[&batch]).await?;
        self.execute(sql::HAS_NO_PARTS, &[&batch]).await.map(drop)
    }
}
