//! [`Leases`].

use async_trait::async_trait;
use rusqlite::Connection;

use super::rows::{Values, execute, exists, many, one};
use super::{Now, Sqlite, batches, files, sql};
use crate::clock;
use crate::error::Failure;
use crate::file::File;
use crate::state::{Batch, Change};
use crate::store::values::{fenced_off, integer, leased, stored};
use crate::store::{Fence, Leases, Part, Share, Stage};

pub(super) fn acquire(
    db: &Connection,
    server: &str,
    stage: Stage,
    last: &[Share],
    lease_ms: i64,
    limit: u32,
    now: Now,
) -> Result<Vec<(Batch, Fence)>, Failure> {
    let last: Vec<String> = last.iter().map(Share::key).collect();
    let rows = many(
        db,
        "WITH busy AS MATERIALIZED (
             SELECT tenant, model FROM batches WHERE live = 1 AND lease_until > ?3)
         UPDATE batches SET lease_server = ?1, lease_until = ?2, lease_epoch = lease_epoch + 1
         WHERE seq IN (
             SELECT mine.seq FROM batches AS mine
             WHERE mine.live = 1 AND mine.lease_until <= ?3 AND CASE WHEN ?5
                 THEN mine.due_at <= ?8
                 ELSE mine.due_at > ?8 AND mine.validated = ?6 END
             ORDER BY
                 mine.tenant || char(10) || coalesce(mine.model, '')
                     IN (SELECT value FROM json_each(?7)),
                 (SELECT count(*) FROM busy WHERE busy.tenant = mine.tenant),
                 (SELECT count(*) FROM busy WHERE busy.model IS mine.model),
                 mine.seq
             LIMIT ?4)
         RETURNING doc, lease_epoch",
        &[
            &server,
            &now.steady_ms.saturating_add(lease_ms),
            &now.steady_ms,
            &limit,
            &(stage == Stage::End),
            &(stage == Stage::Run),
            &stored(&last)?,
            &integer(now.wall),
        ],
        |row| Ok((row.get::<_, String>(0)?, row.get::<_, i64>(1)?)),
    )?;
    rows.into_iter()
        .map(|(document, epoch)| leased(&document, epoch))
        .collect()
}

/// The batch, if the lease is still that of `fence`.
fn fenced(db: &Connection, fence: &Fence) -> Result<Batch, Failure> {
    one(
        db,
        "SELECT doc FROM batches WHERE id = ? AND lease_epoch = ?",
        &[&fence.batch, &fence.epoch],
    )?
    .ok_or_else(|| fenced_off(fence))
}

fn renew(db: &Connection, fence: &Fence, lease_ms: i64, now: Now) -> Result<Batch, Failure> {
    let batch = fenced(db, fence)?;
    execute(
        db,
        "UPDATE batches SET lease_until = ? WHERE id = ?",
        &[&now.steady_ms.saturating_add(lease_ms), &fence.batch],
    )?;
    Ok(batch)
}

fn release(db: &Connection, fence: &Fence, pause_ms: i64, now: Now) -> Result<(), Failure> {
    execute(
        db,
        "UPDATE batches SET lease_until = ?, lease_server = NULL, lease_epoch = lease_epoch + 1
         WHERE id = ? AND lease_epoch = ?",
        &[
            &now.steady_ms.saturating_add(pause_ms),
            &fence.batch,
            &fence.epoch,
        ],
    )?;
    Ok(())
}

fn change(
    db: &Connection,
    fence: &Fence,
    change: Change,
    parts: &[Part],
    files: &[File],
) -> Result<Batch, Failure> {
    let mut batch = fenced(db, fence)?;
    if let Some(first) = parts.first() {
        let place: Values<'_> = &[&first.key, &integer(first.offset)];
        if exists(db, sql::KNOWS_PART, place)? {
            return Ok(batch);
        }
        execute(db, sql::HAS_PARTS, &[&fence.batch])?;
    }
    batch.apply(change, clock::now())?;
    batches::store(db, &batch)?;
    for part in parts {
        insert_part(db, &fence.batch, part)?;
    }
    for file in files {
        files::insert(db, file, None)?;
    }
    Ok(batch)
}

fn insert_part(db: &Connection, batch: &str, part: &Part) -> Result<(), Failure> {
    execute(
        db,
        sql::INSERT_PART,
        &[
            &batch,
            &part.stream.as_str(),
            &part.key,
            &integer(part.offset),
            &integer(part.bytes),
            &part.packed_lines(),
        ],
    )?;
    Ok(())
}

#[async_trait]
impl Leases for Sqlite {
    async fn acquire(
        &self,
        server: &str,
        stage: Stage,
        last: &[Share],
        lease_ms: i64,
        limit: u32,
    ) -> Result<Vec<(Batch, Fence)>, Failure> {
        let (server, last, now) = (server.to_owned(), last.to_vec(), self.now());
        self.write(move |db| acquire(db, &server, stage, &last, lease_ms, limit, now))
            .await
    }

    async fn waiting(&self, limit: u32) -> Result<Vec<Share>, Failure> {
        let sql = "SELECT tenant, model FROM batches
             WHERE live = 1 AND validated = 1 AND lease_until <= ?1 AND due_at > ?2
             GROUP BY tenant, model ORDER BY min(seq) LIMIT ?3";
        let now = self.now();
        self.read(move |db| {
            let values: Values<'_> = &[&now.steady_ms, &integer(now.wall), &limit];
            many(db, sql, values, |row| {
                Ok(Share {
                    tenant: row.get(0)?,
                    model: row.get(1)?,
                })
            })
        })
        .await
    }

    async fn renew(&self, fence: &Fence, lease_ms: i64) -> Result<Batch, Failure> {
        let (fence, now) = (fence.clone(), self.now());
        self.write(move |db| renew(db, &fence, lease_ms, now)).await
    }

    async fn release(&self, fence: &Fence, pause_ms: i64) -> Result<(), Failure> {
        let (fence, now) = (fence.clone(), self.now());
        self.write(move |db| release(db, &fence, pause_ms, now))
            .await
    }

    async fn change(
        &self,
        fence: &Fence,
        step: Change,
        parts: Vec<Part>,
        files: Vec<File>,
    ) -> Result<Batch, Failure> {
        let fence = fence.clone();
        self.write(move |db| change(db, &fence, step, &parts, &files))
            .await
    }
}
