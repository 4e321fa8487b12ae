//! The statements. Those that write run on the thread `batch-db`, within a savepoint.

use std::path::Path;
use std::time::Duration;

use rusqlite::{Connection, OptionalExtension, Row, ToSql, params};
use serde::de::DeserializeOwned;

use crate::batch::clock::{self, Seconds};
use crate::batch::error::Failure;
use crate::batch::file::{File, Purpose};
use crate::batch::state::{Batch, Change};
use crate::batch::store::values::{
    fenced_off, integer, leased, loaded, natural, retried_since, stored,
};
use crate::batch::store::{
    Columns, Create, Deletion, Fence, Listed, Page, Part, Places, Queue, Share, Stage, Stream, User,
};

/// Version of the schema below, kept in `user_version`.
const VERSION: i64 = 2;
const SCHEMA: &str = "
CREATE TABLE files (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    tenant TEXT NOT NULL,
    purpose TEXT NOT NULL,
    bytes INTEGER NOT NULL,
    created_at INTEGER NOT NULL,
    expires_at INTEGER,
    digest TEXT,
    deleted INTEGER NOT NULL DEFAULT 0,
    gone_at INTEGER,
    doc TEXT NOT NULL
) STRICT;
CREATE INDEX files_of_tenant ON files (tenant, seq) WHERE deleted = 0;
CREATE INDEX files_deleted ON files (id) WHERE deleted = 1 AND gone_at IS NULL;
CREATE INDEX files_gone ON files (gone_at) WHERE gone_at IS NOT NULL;
CREATE INDEX files_stored ON files (tenant) WHERE gone_at IS NULL;
CREATE INDEX files_expiring ON files (expires_at) WHERE deleted = 0;
CREATE TABLE batches (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    tenant TEXT NOT NULL,
    created_at INTEGER NOT NULL,
    input_file_id TEXT NOT NULL,
    digest TEXT NOT NULL,
    live INTEGER NOT NULL DEFAULT 1,
    validated INTEGER NOT NULL DEFAULT 0,
    model TEXT,
    due_at INTEGER NOT NULL,
    has_parts INTEGER NOT NULL DEFAULT 0,
    lease_epoch INTEGER NOT NULL DEFAULT 0,
    lease_server TEXT,
    lease_until INTEGER NOT NULL DEFAULT 0,
    doc TEXT NOT NULL
) STRICT;
CREATE INDEX batches_of_tenant ON batches (tenant, seq);
CREATE INDEX batches_live ON batches (seq) WHERE live = 1;
CREATE INDEX batches_with_parts ON batches (id) WHERE has_parts = 1;
CREATE TABLE parts (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    batch TEXT NOT NULL,
    stream TEXT NOT NULL,
    key TEXT NOT NULL,
    start INTEGER NOT NULL,
    bytes INTEGER NOT NULL,
    lines BLOB NOT NULL
) STRICT;
CREATE INDEX parts_of_batch ON parts (batch, seq);
CREATE UNIQUE INDEX parts_by_place ON parts (key, start);
CREATE TABLE users (
    name TEXT NOT NULL PRIMARY KEY,
    doc TEXT NOT NULL
) STRICT;
";
/// What makes version 2 of version 1.
const UPGRADE: &str = "
ALTER TABLE files ADD COLUMN gone_at INTEGER;
DROP INDEX files_deleted;
CREATE INDEX files_deleted ON files (id) WHERE deleted = 1 AND gone_at IS NULL;
CREATE INDEX files_gone ON files (gone_at) WHERE gone_at IS NOT NULL;
CREATE INDEX files_stored ON files (tenant) WHERE gone_at IS NULL;
ALTER TABLE batches ADD COLUMN model TEXT;
ALTER TABLE batches ADD COLUMN due_at INTEGER NOT NULL DEFAULT 0;
DROP INDEX batches_with_parts;
CREATE INDEX batches_with_parts ON batches (id) WHERE has_parts = 1;
UPDATE batches SET model = json_extract(doc, '$.model'), due_at =
    CASE json_extract(doc, '$.status') WHEN 'cancelling' THEN 0
    ELSE json_extract(doc, '$.expires_at') END;
";
/// Another process that looks at the file, a backup for instance, may hold it for a moment.
const BUSY: Duration = Duration::from_secs(5);
const QUERY: &str = "a database query";

fn failed(error: rusqlite::Error) -> Failure {
    Failure::internal(QUERY, error)
}

pub(super) fn connect(path: &Path) -> Result<Connection, Failure> {
    let db = Connection::open(path).map_err(Failure::when("opening the database"))?;
    db.busy_timeout(BUSY).map_err(failed)?;
    // FULL: what was answered is on the disk, also after a loss of power.
    db.execute_batch("PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL;")
        .map_err(failed)?;
    Ok(db)
}

pub(super) fn prepare(db: &Connection) -> Result<(), Failure> {
    let version: i64 = db
        .query_row("PRAGMA user_version", [], |row| row.get(0))
        .map_err(failed)?;
    match version {
        0 => make(db, SCHEMA)?,
        1 => make(db, UPGRADE)?,
        VERSION => {}
        later => {
            let message = format!(
                "the database has version {later} and this program knows {VERSION}: run the \
                 program that wrote it"
            );
            return Err(Failure::internal("opening the database", message));
        }
    }
    db.execute("UPDATE batches SET lease_until = 0 WHERE live = 1", [])
        .map_err(failed)?;
    Ok(())
}

fn make(db: &Connection, statements: &str) -> Result<(), Failure> {
    db.execute_batch(&format!(
        "BEGIN; {statements} PRAGMA user_version = {VERSION}; COMMIT;"
    ))
    .map_err(failed)
}

/// The document that a query for one row finds.
fn one<T: DeserializeOwned>(
    db: &Connection,
    sql: &str,
    values: &[&dyn ToSql],
) -> Result<Option<T>, Failure> {
    db.prepare_cached(sql)
        .map_err(failed)?
        .query_row(values, |row| row.get::<_, String>(0))
        .optional()
        .map_err(failed)?
        .map(|document| loaded(&document))
        .transpose()
}

fn many<T>(
    db: &Connection,
    sql: &str,
    values: &[&dyn ToSql],
    item: impl Fn(&Row<'_>) -> rusqlite::Result<T>,
) -> Result<Vec<T>, Failure> {
    let mut statement = db.prepare_cached(sql).map_err(failed)?;
    let rows = statement.query_map(values, item).map_err(failed)?;
    rows.collect::<Result<_, _>>().map_err(failed)
}

fn execute(db: &Connection, sql: &str, values: &[&dyn ToSql]) -> Result<usize, Failure> {
    db.prepare_cached(sql)
        .map_err(failed)?
        .execute(values)
        .map_err(failed)
}

/// Items of a list. `condition` restricts it with the parameters `?1`, the tenant, and `?2`.
fn page<T: DeserializeOwned>(
    db: &Connection,
    table: &str,
    condition: &str,
    tenant: &str,
    second: &dyn ToSql,
    page: &Page,
) -> Result<Option<Listed<T>>, Failure> {
    let (before, order) = if page.ascending {
        (">", "ASC")
    } else {
        ("<", "DESC")
    };
    let mut after = None;
    if let Some(id) = &page.after {
        let sql = format!("SELECT seq FROM {table} WHERE tenant = ? AND id = ?");
        let found: Option<i64> = db
            .query_row(&sql, params![tenant, id], |row| row.get(0))
            .optional()
            .map_err(failed)?;
        let Some(seq) = found else {
            return Ok(None);
        };
        after = Some(seq);
    }
    let sql = format!(
        "SELECT doc FROM {table} WHERE tenant = ?1 AND {condition}
         AND (?3 IS NULL OR seq {before} ?3) ORDER BY seq {order} LIMIT ?4"
    );
    let documents = many(
        db,
        &sql,
        &[&tenant, second, &after, &(i64::from(page.limit) + 1)],
        |row| row.get::<_, String>(0),
    )?;
    let items = documents
        .iter()
        .map(|document| loaded(document))
        .collect::<Result<_, _>>()?;
    Ok(Some(Listed::of(items, page.limit)))
}

fn insert_file(db: &Connection, file: &File, digest: Option<&str>) -> Result<(), Failure> {
    execute(
        db,
        "INSERT INTO files (id, tenant, purpose, bytes, created_at, expires_at, digest, doc)
         VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
        &[
            &file.id,
            &file.tenant,
            &file.purpose.as_str(),
            &integer(file.bytes),
            &integer(file.created_at),
            &file.expires_at.map(integer),
            &digest,
            &stored(file)?,
        ],
    )?;
    Ok(())
}

pub(super) fn add_file(
    db: &Connection,
    file: File,
    create: &Create,
    quota_bytes: Option<u64>,
) -> Result<File, Failure> {
    if create.is_retry {
        let since = retried_since(file.created_at);
        let same = one(
            db,
            "SELECT doc FROM files WHERE tenant = ? AND digest = ? AND created_at >= ?
             AND deleted = 0 ORDER BY seq DESC LIMIT 1",
            &[&file.tenant, &create.digest, &since],
        )?;
        if let Some(same) = same {
            return Ok(same);
        }
    }
    if let Some(quota_bytes) = quota_bytes
        && stored_bytes(db, &file.tenant)?.saturating_add(file.bytes) > quota_bytes
    {
        return Err(Failure::Quota { quota_bytes });
    }
    insert_file(db, &file, Some(&create.digest))?;
    Ok(file)
}

pub(super) fn file(db: &Connection, tenant: &str, id: &str) -> Result<Option<File>, Failure> {
    one(
        db,
        "SELECT doc FROM files WHERE tenant = ? AND id = ? AND deleted = 0
         AND (expires_at IS NULL OR expires_at > ?)",
        &[&tenant, &id, &integer(clock::now())],
    )
}

pub(super) fn files(
    db: &Connection,
    tenant: &str,
    purpose: Option<Purpose>,
    wanted: &Page,
) -> Result<Option<Listed<File>>, Failure> {
    let now = clock::now();
    let condition = format!(
        "deleted = 0 AND (expires_at IS NULL OR expires_at > {now})
         AND (?2 IS NULL OR purpose = ?2)"
    );
    let purpose = purpose.map(Purpose::as_str);
    page(db, "files", &condition, tenant, &purpose, wanted)
}

pub(super) fn stored_bytes(db: &Connection, tenant: &str) -> Result<u64, Failure> {
    let sum: i64 = db
        .prepare_cached(
            "SELECT coalesce(sum(bytes), 0) FROM files WHERE tenant = ? AND gone_at IS NULL",
        )
        .map_err(failed)?
        .query_row([tenant], |row| row.get(0))
        .map_err(failed)?;
    Ok(natural(sum))
}

pub(super) fn delete_file(db: &Connection, tenant: &str, id: &str) -> Result<Deletion, Failure> {
    let changed = execute(
        db,
        "UPDATE files SET deleted = 1 WHERE tenant = ? AND id = ? AND deleted = 0",
        &[&tenant, &id],
    )?;
    if changed == 0 {
        return Ok(Deletion::Unknown);
    }
    let in_use = db
        .prepare_cached("SELECT 1 FROM batches WHERE live = 1 AND input_file_id = ?")
        .map_err(failed)?
        .exists([id])
        .map_err(failed)?;
    Ok(if in_use {
        Deletion::InUse
    } else {
        Deletion::Unused
    })
}

pub(super) fn expire_files(db: &Connection, now: Seconds) -> Result<u64, Failure> {
    let changed = execute(
        db,
        "UPDATE files SET deleted = 1 WHERE deleted = 0 AND expires_at <= ?",
        &[&integer(now)],
    )?;
    Ok(changed as u64)
}

pub(super) fn unused_files(
    db: &Connection,
    after: &str,
    limit: u32,
) -> Result<Vec<String>, Failure> {
    many(
        db,
        "SELECT id FROM files WHERE deleted = 1 AND gone_at IS NULL AND id > ? AND NOT EXISTS
         (SELECT 1 FROM batches WHERE live = 1 AND input_file_id = files.id) ORDER BY id LIMIT ?",
        &[&after, &limit],
        |row| row.get(0),
    )
}

pub(super) fn forget_file(db: &Connection, id: &str, now: Seconds) -> Result<(), Failure> {
    execute(
        db,
        "UPDATE files SET gone_at = ? WHERE id = ? AND deleted = 1",
        &[&integer(now), &id],
    )?;
    Ok(())
}

pub(super) fn purge_files(db: &Connection, before: Seconds) -> Result<(), Failure> {
    execute(
        db,
        "DELETE FROM files WHERE gone_at < ?",
        &[&integer(before)],
    )?;
    Ok(())
}

pub(super) fn knows_file(db: &Connection, id: &str) -> Result<bool, Failure> {
    db.prepare_cached("SELECT 1 FROM files WHERE id = ? AND gone_at IS NULL")
        .map_err(failed)?
        .exists([id])
        .map_err(failed)
}

pub(super) fn add_batch(
    db: &Connection,
    batch: Batch,
    create: &Create,
    places: Places,
) -> Result<Batch, Failure> {
    if create.is_retry {
        let since = retried_since(batch.created_at);
        let same = one(
            db,
            "SELECT doc FROM batches WHERE tenant = ? AND digest = ? AND created_at >= ?
             ORDER BY seq DESC LIMIT 1",
            &[&batch.tenant, &create.digest, &since],
        )?;
        if let Some(same) = same {
            return Ok(same);
        }
    }
    let (all, tenant) = db
        .prepare_cached(
            "SELECT count(*), count(*) FILTER (WHERE tenant = ?) FROM batches WHERE live = 1",
        )
        .map_err(failed)?
        .query_row([&batch.tenant], |row| Ok((row.get(0)?, row.get(1)?)))
        .map_err(failed)?;
    places.check(natural(all), natural(tenant))?;
    execute(
        db,
        "INSERT INTO batches (id, tenant, created_at, input_file_id, digest, due_at, doc)
         VALUES (?, ?, ?, ?, ?, ?, ?)",
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

pub(super) fn batch(db: &Connection, tenant: &str, id: &str) -> Result<Option<Batch>, Failure> {
    one(
        db,
        "SELECT doc FROM batches WHERE tenant = ? AND id = ?",
        &[&tenant, &id],
    )
}

pub(super) fn batches(
    db: &Connection,
    tenant: &str,
    wanted: &Page,
) -> Result<Option<Listed<Batch>>, Failure> {
    page(db, "batches", "?2 IS NULL", tenant, &None::<i64>, wanted)
}

fn store_batch(db: &Connection, batch: &Batch) -> Result<(), Failure> {
    let columns = Columns::of(batch);
    execute(
        db,
        "UPDATE batches SET doc = ?, live = ?, validated = ?, model = ?, due_at = ? WHERE id = ?",
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

pub(super) fn cancel(
    db: &Connection,
    tenant: &str,
    id: &str,
    now: Seconds,
) -> Result<Option<Batch>, Failure> {
    let Some(mut batch) = batch(db, tenant, id)? else {
        return Ok(None);
    };
    batch.apply(Change::Cancel, now)?;
    store_batch(db, &batch)?;
    Ok(Some(batch))
}

pub(super) fn acquire(
    db: &Connection,
    server: &str,
    stage: Stage,
    last: &[Share],
    now_ms: i64,
    lease_ms: i64,
    limit: u32,
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
                 THEN mine.due_at * 1000 <= ?3
                 ELSE mine.due_at * 1000 > ?3 AND mine.validated = ?6 END
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
            &now_ms.saturating_add(lease_ms),
            &now_ms,
            &limit,
            &(stage == Stage::End),
            &(stage == Stage::Run),
            &stored(&last)?,
        ],
        |row| Ok((row.get::<_, String>(0)?, row.get::<_, i64>(1)?)),
    )?;
    rows.into_iter()
        .map(|(document, epoch)| leased(&document, epoch))
        .collect()
}

pub(super) fn waiting(db: &Connection, now_ms: i64, limit: u32) -> Result<Vec<Share>, Failure> {
    many(
        db,
        "SELECT tenant, model FROM batches
         WHERE live = 1 AND validated = 1 AND lease_until <= ?1 AND due_at * 1000 > ?1
         GROUP BY tenant, model ORDER BY min(seq) LIMIT ?2",
        &[&now_ms, &limit],
        |row| {
            Ok(Share {
                tenant: row.get(0)?,
                model: row.get(1)?,
            })
        },
    )
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

pub(super) fn renew(db: &Connection, fence: &Fence, until_ms: i64) -> Result<Batch, Failure> {
    let batch = fenced(db, fence)?;
    execute(
        db,
        "UPDATE batches SET lease_until = ? WHERE id = ?",
        &[&until_ms, &fence.batch],
    )?;
    Ok(batch)
}

pub(super) fn release(db: &Connection, fence: &Fence, until_ms: i64) -> Result<(), Failure> {
    execute(
        db,
        "UPDATE batches SET lease_until = ?, lease_server = NULL, lease_epoch = lease_epoch + 1
         WHERE id = ? AND lease_epoch = ?",
        &[&until_ms, &fence.batch, &fence.epoch],
    )?;
    Ok(())
}

pub(super) fn change(
    db: &Connection,
    fence: &Fence,
    change: Change,
    parts: &[Part],
    files: &[File],
) -> Result<Batch, Failure> {
    let mut batch = fenced(db, fence)?;
    if let Some(first) = parts.first()
        && knows_part(db, first)?
    {
        return Ok(batch);
    }
    batch.apply(change, clock::now())?;
    store_batch(db, &batch)?;
    for part in parts {
        execute(
            db,
            "INSERT INTO parts (batch, stream, key, start, bytes, lines) VALUES (?, ?, ?, ?, ?, ?)",
            &[
                &fence.batch,
                &part.stream.as_str(),
                &part.key,
                &integer(part.offset),
                &integer(part.bytes),
                &part.packed_lines(),
            ],
        )?;
    }
    if !parts.is_empty() {
        execute(
            db,
            "UPDATE batches SET has_parts = 1 WHERE id = ?",
            &[&fence.batch],
        )?;
    }
    for file in files {
        insert_file(db, file, None)?;
    }
    Ok(batch)
}

fn knows_part(db: &Connection, part: &Part) -> Result<bool, Failure> {
    db.prepare_cached("SELECT 1 FROM parts WHERE key = ? AND start = ?")
        .map_err(failed)?
        .exists(params![part.key, integer(part.offset)])
        .map_err(failed)
}

pub(super) fn parts(db: &Connection, batch: &str) -> Result<Vec<Part>, Failure> {
    let rows = many(
        db,
        "SELECT stream, key, start, bytes, lines FROM parts WHERE batch = ? ORDER BY seq",
        &[&batch],
        |row| {
            let stream: String = row.get(0)?;
            let part = Part {
                stream: Stream::Output,
                key: row.get(1)?,
                offset: natural(row.get(2)?),
                bytes: natural(row.get(3)?),
                lines: Part::unpacked_lines(&row.get::<_, Vec<u8>>(4)?),
            };
            Ok((stream, part))
        },
    )?;
    rows.into_iter()
        .map(|(stream, part)| {
            Ok(Part {
                stream: Stream::from_str(&stream)?,
                ..part
            })
        })
        .collect()
}

pub(super) fn batches_with_parts_to_drop(
    db: &Connection,
    after: &str,
    limit: u32,
) -> Result<Vec<String>, Failure> {
    many(
        db,
        "SELECT id FROM batches WHERE has_parts = 1 AND live = 0 AND id > ? ORDER BY id LIMIT ?",
        &[&after, &limit],
        |row| row.get(0),
    )
}

pub(super) fn needs_parts(db: &Connection, batch: &str) -> Result<bool, Failure> {
    db.prepare_cached("SELECT 1 FROM batches WHERE id = ? AND (live = 1 OR has_parts = 1)")
        .map_err(failed)?
        .exists([batch])
        .map_err(failed)
}

pub(super) fn drop_parts(db: &Connection, batch: &str) -> Result<(), Failure> {
    execute(db, "DELETE FROM parts WHERE batch = ?", &[&batch])?;
    execute(
        db,
        "UPDATE batches SET has_parts = 0 WHERE id = ?",
        &[&batch],
    )?;
    Ok(())
}

pub(super) fn queue(db: &Connection, now_ms: i64) -> Result<Queue, Failure> {
    db.prepare_cached(
        "SELECT count(*), count(*) FILTER (WHERE lease_until <= ?1),
         min(created_at) FILTER (WHERE lease_until <= ?1) FROM batches WHERE live = 1",
    )
    .map_err(failed)?
    .query_row([now_ms], |row| {
        Ok(Queue {
            live: natural(row.get(0)?),
            waiting: natural(row.get(1)?),
            oldest_waiting_at: row.get::<_, Option<i64>>(2)?.map(natural),
        })
    })
    .map_err(failed)
}

pub(super) fn create_user(db: &Connection, user: &User) -> Result<bool, Failure> {
    let changed = execute(
        db,
        "INSERT INTO users (name, doc) VALUES (?, ?) ON CONFLICT DO NOTHING",
        &[&user.name, &stored(user)?],
    )?;
    Ok(changed > 0)
}

pub(super) fn user(db: &Connection, name: &str) -> Result<Option<User>, Failure> {
    one(db, "SELECT doc FROM users WHERE name = ?", &[&name])
}

pub(super) fn update_user(db: &Connection, user: &User) -> Result<bool, Failure> {
    let changed = execute(
        db,
        "UPDATE users SET doc = ? WHERE name = ?",
        &[&stored(user)?, &user.name],
    )?;
    Ok(changed > 0)
}

pub(super) fn delete_user(db: &Connection, name: &str) -> Result<Option<User>, Failure> {
    one(
        db,
        "DELETE FROM users WHERE name = ? RETURNING doc",
        &[&name],
    )
}
