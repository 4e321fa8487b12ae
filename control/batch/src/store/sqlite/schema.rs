//! The tables, and how the file is opened.

use std::path::Path;
use std::time::Duration;

use rusqlite::Connection;

use super::rows::failed;
use crate::error::Failure;

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
