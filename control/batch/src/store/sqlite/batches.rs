//! [`Batches`].

use async_trait::async_trait;
use rusqlite::Connection;

use super::rows::{Values, execute, one, only, page};
use super::{Sqlite, sql};
use crate::clock::Seconds;
use crate::error::Failure;
use crate::state::{Batch, Change};
use crate::store::batches::Columns;
use crate::store::values::{integer, natural, stored};
use crate::store::{Batches, Create, Listed, Page, Places, Queue};

fn add(db: &Connection, batch: Batch, create: &Create, places: Places) -> Result<Batch, Failure> {
    if let Some(since) = create.repeats_since(batch.created_at) {
        let values: Values<'_> = &[&batch.tenant, &create.digest, &since];
        if let Some(same) = one(db, sql::SAME_BATCH, values)? {
            return Ok(same);
        }
    }
    let (all, tenant) = only(
        db,
        "SELECT count(*), count(*) FILTER (WHERE tenant = ?) FROM batches WHERE live = 1",
        &[&batch.tenant],
        |row| Ok((row.get(0)?, row.get(1)?)),
    )?;
    places.check(natural(all), natural(tenant))?;
    execute(
        db,
        sql::INSERT_BATCH,
        &[
            &batch.id,
            &batch.tenant,
            &integer(batch.created_at),
            &batch.order.input_file_id,
            &create.digest,
            &integer(Columns::of(&batch).due_at),
            &stored(&batch)?,
        ],
    )?;
    Ok(batch)
}

fn find(db: &Connection, tenant: &str, id: &str) -> Result<Option<Batch>, Failure> {
    one(
        db,
        "SELECT doc FROM batches WHERE tenant = ? AND id = ?",
        &[&tenant, &id],
    )
}

/// Writes down what a batch has become.
pub(super) fn store(db: &Connection, batch: &Batch) -> Result<(), Failure> {
    let columns = Columns::of(batch);
    execute(
        db,
        sql::STORE_BATCH,
        &[
            &stored(batch)?,
            &columns.live,
            &columns.validated,
            &columns.model,
            &integer(columns.due_at),
            &batch.id,
        ],
    )?;
    Ok(())
}

fn cancel(db: &Connection, tenant: &str, id: &str, now: Seconds) -> Result<Option<Batch>, Failure> {
    let Some(mut batch) = find(db, tenant, id)? else {
        return Ok(None);
    };
    batch.apply(Change::Cancel, now)?;
    store(db, &batch)?;
    Ok(Some(batch))
}

#[async_trait]
impl Batches for Sqlite {
    async fn add_batch(
        &self,
        batch: Batch,
        create: Create,
        places: Places,
    ) -> Result<Batch, Failure> {
        self.write(move |db| add(db, batch, &create, places)).await
    }

    async fn batch(&self, tenant: &str, id: &str) -> Result<Option<Batch>, Failure> {
        let (tenant, id) = (tenant.to_owned(), id.to_owned());
        self.read(move |db| find(db, &tenant, &id)).await
    }

    async fn batches(&self, tenant: &str, wanted: Page) -> Result<Option<Listed<Batch>>, Failure> {
        let tenant = tenant.to_owned();
        self.read(move |db| page(db, "batches", "true", &tenant, &[], &wanted))
            .await
    }

    async fn cancel(&self, tenant: &str, id: &str, now: Seconds) -> Result<Option<Batch>, Failure> {
        let (tenant, id) = (tenant.to_owned(), id.to_owned());
        self.write(move |db| cancel(db, &tenant, &id, now)).await
    }

    async fn queue(&self) -> Result<Queue, Failure> {
        let sql = "SELECT count(*), count(*) FILTER (WHERE lease_until <= ?1),
             min(created_at) FILTER (WHERE lease_until <= ?1) FROM batches WHERE live = 1";
        let now = self.now();
        self.read(move |db| {
            only(db, sql, &[&now.steady_ms], |row| {
                Ok(Queue::of(row.get(0)?, row.get(1)?, row.get(2)?))
            })
        })
        .await
    }
}
