//! [`Leases`].

use std::sync::PoisonError;
use std::time::Instant;

use async_trait::async_trait;
use deadpool_postgres::Transaction;

use super::rows::{Values, column, document, execute, failed, first, within};
use super::watch::Leased;
use super::{FREE, NOW_MS, Postgres, batches, files, sql};
use crate::clock;
use crate::error::Failure;
use crate::file::File;
use crate::state::{Batch, Change};
use crate::store::values::{fenced_off, integer, leased};
use crate::store::{Fence, Leases, Part, Share, Stage};

/// The batch, if the lease is still that of `fence`; nobody else changes it meanwhile.
async fn fenced(transaction: &Transaction<'_>, fence: &Fence) -> Result<Batch, Failure> {
    let sql = "SELECT doc FROM kvtide_batches WHERE id = $1 AND lease_epoch = $2 FOR UPDATE";
    let found = first(transaction, sql, &[&fence.batch, &fence.epoch]).await?;
    document(&found.ok_or_else(|| fenced_off(fence))?)
}

async fn insert_part(
    transaction: &Transaction<'_>,
    batch: &str,
    part: &Part,
) -> Result<(), Failure> {
    execute(
        transaction,
        sql::INSERT_PART,
        &[
            &batch,
            &part.stream.as_str(),
            &part.key,
            &integer(part.offset),
            &integer(part.bytes),
            &part.packed_lines(),
        ],
    )
    .await
}

impl Postgres {
    /// The leases that have run out: their batches' numbers, and their beats, with which alone they are
    /// taken.
    pub(super) async fn run_out(&self) -> Result<(Vec<i64>, Vec<i64>), Failure> {
        let sql = "SELECT seq, lease_beat, lease_ms FROM kvtide_batches
             WHERE live AND lease_ms > 0";
        let rows = self.rows(sql, &[]).await?;
        let now = Instant::now();
        let leased: Vec<Leased> = rows
            .iter()
            .map(|row| {
                Ok(Leased {
                    seq: column(row, 0)?,
                    beat: column(row, 1)?,
                    lease_ms: column(row, 2)?,
                })
            })
            .collect::<Result<_, Failure>>()?;
        let mut watch = self.watch.lock().unwrap_or_else(PoisonError::into_inner);
        let run_out = watch.look(&leased, now);
        Ok(run_out
            .into_iter()
            .map(|lease| (lease.seq, lease.beat))
            .unzip())
    }
}

#[async_trait]
impl Leases for Postgres {
    async fn acquire(
        &self,
        server: &str,
        stage: Stage,
        last: &[Share],
        lease_ms: i64,
        limit: u32,
    ) -> Result<Vec<(Batch, Fence)>, Failure> {
        let sql = format!(
            "WITH busy AS MATERIALIZED (
                 SELECT tenant, model FROM kvtide_batches
                 WHERE live AND lease_server IS NOT NULL AND NOT {FREE}),
             chosen AS MATERIALIZED (
                 SELECT mine.seq FROM kvtide_batches AS mine
                 WHERE mine.live AND {FREE} AND CASE WHEN $7
                     THEN mine.due_at * 1000 <= {NOW_MS}
                     ELSE mine.due_at * 1000 > {NOW_MS} AND mine.validated = $5 END
                 ORDER BY
                     mine.tenant || chr(10) || coalesce(mine.model, '') = ANY($8::text[]),
                     (SELECT count(*) FROM busy WHERE busy.tenant = mine.tenant),
                     (SELECT count(*) FROM busy WHERE busy.model IS NOT DISTINCT FROM mine.model),
                     mine.seq
                 LIMIT $6 FOR UPDATE OF mine SKIP LOCKED)
             UPDATE kvtide_batches SET lease_server = $3, lease_ms = $4,
                 lease_beat = lease_beat + 1, lease_epoch = lease_epoch + 1
             WHERE seq IN (SELECT seq FROM chosen)
             RETURNING doc, lease_epoch"
        );
        let (run, end) = (stage == Stage::Run, stage == Stage::End);
        let last: Vec<String> = last.iter().map(Share::key).collect();
        let (seqs, beats) = self.run_out().await?;
        let limit = i64::from(limit);
        let values: Values<'_> = &[&seqs, &beats, &server, &lease_ms, &run, &limit, &end, &last];
        let rows = self.rows(&sql, values).await?;
        rows.iter()
            .map(|row| leased(&column::<String>(row, 0)?, column(row, 1)?))
            .collect()
    }

    async fn waiting(&self, limit: u32) -> Result<Vec<Share>, Failure> {
        let sql = format!(
            "SELECT tenant, model FROM kvtide_batches
             WHERE live AND validated AND {FREE} AND due_at * 1000 > {NOW_MS}
             GROUP BY tenant, model ORDER BY min(seq) LIMIT $3"
        );
        let (seqs, beats) = self.run_out().await?;
        let values: Values<'_> = &[&seqs, &beats, &i64::from(limit)];
        let rows = self.rows(&sql, values).await?;
        rows.iter()
            .map(|row| {
                Ok(Share {
                    tenant: column(row, 0)?,
                    model: column(row, 1)?,
                })
            })
            .collect()
    }

    async fn renew(&self, fence: &Fence, lease_ms: i64) -> Result<Batch, Failure> {
        let sql = "UPDATE kvtide_batches SET lease_ms = $1, lease_beat = lease_beat + 1
             WHERE id = $2 AND lease_epoch = $3 RETURNING doc";
        let renewed = self
            .one(sql, &[&lease_ms, &fence.batch, &fence.epoch])
            .await?;
        renewed.ok_or_else(|| fenced_off(fence))
    }

    async fn release(&self, fence: &Fence, pause_ms: i64) -> Result<(), Failure> {
        let sql = "UPDATE kvtide_batches SET lease_ms = $1, lease_server = NULL,
                 lease_beat = lease_beat + 1, lease_epoch = lease_epoch + 1
             WHERE id = $2 AND lease_epoch = $3";
        self.execute(sql, &[&pause_ms, &fence.batch, &fence.epoch])
            .await
            .map(drop)
    }

    async fn change(
        &self,
        fence: &Fence,
        change: Change,
        parts: Vec<Part>,
        files: Vec<File>,
    ) -> Result<Batch, Failure> {
        within(async move {
            let mut connection = self.connection().await?;
            let transaction = connection.transaction().await.map_err(failed)?;
            let mut batch = fenced(&transaction, fence).await?;
            if let Some(part) = parts.first() {
                let place: Values<'_> = &[&part.key, &integer(part.offset)];
                if first(&transaction, sql::KNOWS_PART, place).await?.is_some() {
                    return Ok(batch);
                }
                execute(&transaction, sql::HAS_PARTS, &[&fence.batch]).await?;
            }
            batch.apply(change, clock::now())?;
            batches::store(&transaction, &batch).await?;
            for part in &parts {
                insert_part(&transaction, &fence.batch, part).await?;
            }
            for file in &files {
                files::insert(&transaction, file, None).await?;
            }
            transaction.commit().await.map_err(failed)?;
            Ok(batch)
        })
        .await
    }
}
