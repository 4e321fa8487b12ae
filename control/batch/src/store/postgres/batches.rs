//! [`Batches`].

use async_trait::async_trait;
use deadpool_postgres::Transaction;

use super::rows::{Values, column, document, execute, failed, first, one_at_a_time, only, within};
use super::{FREE, Postgres, sql};
use crate::clock::Seconds;
use crate::error::Failure;
use crate::state::{Batch, Change};
use crate::store::batches::Columns;
use crate::store::values::{integer, natural, stored};
use crate::store::{Batches, Create, Listed, Page, Places, Queue};

/// Writes down what a batch has become.
pub(super) async fn store(transaction: &Transaction<'_>, batch: &Batch) -> Result<(), Failure> {
    let columns = Columns::of(batch);
    execute(
        transaction,
        sql::STORE_BATCH,
        &[
            &stored(batch)?,
            &columns.live,
            &columns.validated,
            &columns.model,
            &integer(columns.due_at),
            &batch.id,
        ],
    )
    .await
}

async fn insert(
    transaction: &Transaction<'_>,
    batch: &Batch,
    create: &Create,
) -> Result<(), Failure> {
    execute(
        transaction,
        sql::INSERT_BATCH,
        &[
            &batch.id,
            &batch.tenant,
            &integer(batch.created_at),
            &batch.order.input_file_id,
            &create.digest,
            &integer(Columns::of(batch).due_at),
            &stored(batch)?,
        ],
    )
    .await
}

/// The batch that an earlier attempt at the same create has added.
async fn same(
    transaction: &Transaction<'_>,
    batch: &Batch,
    create: &Create,
) -> Result<Option<Batch>, Failure> {
    let Some(since) = create.repeats_since(batch.created_at) else {
        return Ok(None);
    };
    let values: Values<'_> = &[&batch.tenant, &create.digest, &since];
    let found = first(transaction, sql::SAME_BATCH, values).await?;
    found.as_ref().map(document).transpose()
}

#[async_trait]
impl Batches for Postgres {
    async fn add_batch(
        &self,
        batch: Batch,
        create: Create,
        places: Places,
    ) -> Result<Batch, Failure> {
        within(async move {
            let mut connection = self.connection().await?;
            let transaction = connection.transaction().await.map_err(failed)?;
            one_at_a_time(&transaction, &batch.tenant).await?;
            if let Some(same) = same(&transaction, &batch, &create).await? {
                return Ok(same);
            }
            let sql = "SELECT count(*), count(*) FILTER (WHERE tenant = $1)
                 FROM kvtide_batches WHERE live";
            let row = only(&transaction, sql, &[&batch.tenant]).await?;
            // Creates of one tenant pass one at a time. Those of different tenants may exceed the bound of
            // all by a few.
            places.check(natural(column(&row, 0)?), natural(column(&row, 1)?))?;
            insert(&transaction, &batch, &create).await?;
            transaction.commit().await.map_err(failed)?;
            Ok(batch)
        })
        .await
    }

    async fn batch(&self, tenant: &str, id: &str) -> Result<Option<Batch>, Failure> {
        let sql = "SELECT doc FROM kvtide_batches WHERE tenant = $1 AND id = $2";
        self.one(sql, &[&tenant, &id]).await
    }

    async fn batches(&self, tenant: &str, page: Page) -> Result<Option<Listed<Batch>>, Failure> {
        self.page("batches", "true", tenant, &[], &page).await
    }

    async fn cancel(&self, tenant: &str, id: &str, now: Seconds) -> Result<Option<Batch>, Failure> {
        within(async move {
            let mut connection = self.connection().await?;
            let transaction = connection.transaction().await.map_err(failed)?;
            let sql = "SELECT doc FROM kvtide_batches WHERE tenant = $1 AND id = $2 FOR UPDATE";
            let Some(row) = first(&transaction, sql, &[&tenant, &id]).await? else {
                return Ok(None);
            };
            let mut batch: Batch = document(&row)?;
            batch.apply(Change::Cancel, now)?;
            store(&transaction, &batch).await?;
            transaction.commit().await.map_err(failed)?;
            Ok(Some(batch))
        })
        .await
    }

    async fn queue(&self) -> Result<Queue, Failure> {
        let sql = format!(
            "SELECT count(*), count(*) FILTER (WHERE {FREE}), min(created_at) FILTER (WHERE {FREE})
             FROM kvtide_batches WHERE live"
        );
        let (seqs, beats) = self.run_out().await?;
        let rows = self.rows(&sql, &[&seqs, &beats]).await?;
        let Some(row) = rows.first() else {
            return Ok(Queue::default());
        };
        Ok(Queue::of(column(row, 0)?, column(row, 1)?, column(row, 2)?))
    }
}
