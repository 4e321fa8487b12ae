//! The tables.

use deadpool_postgres::Transaction;

use crate::error::Failure;

/// Version of the tables, kept in `kvtide_batch_schema`.
const VERSION: i64 = 3;
const SCHEMA: &str = "
CREATE TABLE kvtide_files (
    seq bigserial PRIMARY KEY,
    id text NOT NULL UNIQUE,
    tenant text NOT NULL,
    purpose text NOT NULL,
    bytes bigint NOT NULL,
    created_at bigint NOT NULL,
    expires_at bigint,
    digest text,
    deleted boolean NOT NULL DEFAULT false,
    gone_at bigint,
    doc text NOT NULL
);
CREATE INDEX kvtide_files_of_tenant ON kvtide_files (tenant, seq) WHERE NOT deleted;
CREATE INDEX kvtide_files_deleted ON kvtide_files (id) WHERE deleted AND gone_at IS NULL;
CREATE INDEX kvtide_files_gone ON kvtide_files (gone_at) WHERE gone_at IS NOT NULL;
CREATE INDEX kvtide_files_stored ON kvtide_files (tenant) WHERE gone_at IS NULL;
CREATE INDEX kvtide_files_expiring ON kvtide_files (expires_at) WHERE NOT deleted;
CREATE VIEW kvtide_files_there AS SELECT * FROM kvtide_files WHERE NOT deleted;
CREATE TABLE kvtide_batches (
    seq bigserial PRIMARY KEY,
    id text NOT NULL UNIQUE,
    tenant text NOT NULL,
    created_at bigint NOT NULL,
    input_file_id text NOT NULL,
    digest text NOT NULL,
    live boolean NOT NULL DEFAULT true,
    validated boolean NOT NULL DEFAULT false,
    model text,
    due_at bigint NOT NULL,
    has_parts boolean NOT NULL DEFAULT false,
    lease_epoch bigint NOT NULL DEFAULT 0,
    lease_server text,
    lease_beat bigint NOT NULL DEFAULT 0,
    lease_ms bigint NOT NULL DEFAULT 0,
    doc text NOT NULL
);
CREATE INDEX kvtide_batches_of_tenant ON kvtide_batches (tenant, seq);
CREATE INDEX kvtide_batches_live ON kvtide_batches (seq) WHERE live;
CREATE INDEX kvtide_batches_with_parts ON kvtide_batches (id) WHERE has_parts;
CREATE TABLE kvtide_parts (
    seq bigserial PRIMARY KEY,
    batch text NOT NULL,
    stream text NOT NULL,
    key text NOT NULL,
    start bigint NOT NULL,
    bytes bigint NOT NULL,
    lines bytea NOT NULL,
    UNIQUE (key, start)
);
CREATE INDEX kvtide_parts_of_batch ON kvtide_parts (batch, seq);
CREATE TABLE kvtide_users (
    name text NOT NULL PRIMARY KEY,
    doc text NOT NULL
);
";

/// What makes version 2 of version 1.
const UPGRADE_1: &str = "
ALTER TABLE kvtide_files ADD COLUMN gone_at bigint;
DROP INDEX kvtide_files_deleted;
CREATE INDEX kvtide_files_deleted ON kvtide_files (id) WHERE deleted AND gone_at IS NULL;
CREATE INDEX kvtide_files_gone ON kvtide_files (gone_at) WHERE gone_at IS NOT NULL;
CREATE INDEX kvtide_files_stored ON kvtide_files (tenant) WHERE gone_at IS NULL;
ALTER TABLE kvtide_batches ADD COLUMN model text;
ALTER TABLE kvtide_batches ADD COLUMN due_at bigint NOT NULL DEFAULT 0;
ALTER TABLE kvtide_batches ALTER COLUMN due_at DROP DEFAULT;
DROP INDEX kvtide_batches_with_parts;
CREATE INDEX kvtide_batches_with_parts ON kvtide_batches (id) WHERE has_parts;
UPDATE kvtide_batches SET model = doc::json->>'model', due_at =
    CASE doc::json->>'status' WHEN 'cancelling' THEN 0 ELSE (doc::json->>'expires_at')::bigint END;
UPDATE kvtide_batch_schema SET version = 2;
";
/// What makes version 3 of version 2. Whoever has a lease keeps it only until another takes the batch.
const UPGRADE_2: &str = "
ALTER TABLE kvtide_batches ADD COLUMN lease_beat bigint NOT NULL DEFAULT 0;
ALTER TABLE kvtide_batches ADD COLUMN lease_ms bigint NOT NULL DEFAULT 0;
ALTER TABLE kvtide_batches DROP COLUMN lease_until;
UPDATE kvtide_batches SET lease_server = NULL WHERE live;
UPDATE kvtide_batch_schema SET version = 3;
";

const WHAT: &str = "preparing the database";

/// Makes the tables, unless they are there. Of several servers that start together, one does it.
pub(super) async fn prepare(transaction: &Transaction<'_>) -> Result<(), Failure> {
    transaction
        .batch_execute(
            "SET LOCAL statement_timeout = 0;
             SELECT pg_advisory_xact_lock(hashtextextended('kvtide schema', 0));
             CREATE TABLE IF NOT EXISTS kvtide_batch_schema (version bigint NOT NULL);",
        )
        .await
        .map_err(Failure::when(WHAT))?;
    let found = transaction
        .query_opt("SELECT version FROM kvtide_batch_schema", &[])
        .await
        .map_err(Failure::when(WHAT))?;
    let Some(row) = found else {
        transaction
            .batch_execute(&format!(
                "{SCHEMA} INSERT INTO kvtide_batch_schema VALUES ({VERSION});"
            ))
            .await
            .map_err(Failure::when(WHAT))?;
        return Ok(());
    };
    let version: i64 = row.try_get(0).map_err(Failure::when(WHAT))?;
    let upgrades: &[&str] = match version {
        1 => &[UPGRADE_1, UPGRADE_2],
        2 => &[UPGRADE_2],
        VERSION => &[],
        _ => return Err(too_late(version)),
    };
    for upgrade in upgrades {
        let upgraded = transaction.batch_execute(upgrade).await;
        upgraded.map_err(Failure::when(WHAT))?;
    }
    Ok(())
}

fn too_late(version: i64) -> Failure {
    let message = format!(
        "the tables have version {version} and this program knows {VERSION}: run the program that \
         wrote them"
    );
    Failure::internal(WHAT, message)
}
