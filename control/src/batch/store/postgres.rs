//! [`Metadata`] in PostgreSQL, for several servers that share the work.
//!
//! The database's clock alone says whether a lease has run out: servers whose clocks differ agree. A
//! change locks the batch's row and compares the epoch, so that of two servers that both believe to
//! have the lease only one can write.

mod schema;

use std::time::Duration;

use async_trait::async_trait;
use deadpool_postgres::{Hook, HookError, Manager, ManagerConfig, Object, Pool, RecyclingMethod};
use deadpool_postgres::{Runtime, Timeouts, Transaction};
use serde::de::DeserializeOwned;
use tokio::time::timeout;
use tokio_postgres::types::ToSql;
use tokio_postgres::{Config, Row};
use tokio_postgres_rustls::MakeRustlsConnect;

use crate::batch::clock::{self, Seconds};
use crate::batch::error::Failure;
use crate::batch::file::{File, Purpose};
use crate::batch::state::{Batch, Change};
use crate::batch::store::values::{
    fenced_off, integer, leased, loaded, natural, retried_since, stored,
};
use crate::batch::store::{
    Columns, Create, Deletion, Fence, Listed, Metadata, Page, Part, Places, Queue, Share, Stage,
    Stream, User,
};

/// Connections of one server. Each job needs one now and then, each HTTP request for a moment.
const CONNECTIONS_MAX: usize = 8;
/// How long to wait for a connection, be it made or given back.
const CONNECTION_WITHIN: Duration = Duration::from_secs(10);
/// How long a connection that was used before may take to show that it still works.
const RECYCLE_WITHIN: Duration = Duration::from_secs(2);
/// How long to wait for the database: one that is silent for so long has lost the connection.
const ANSWER_WITHIN: Duration = Duration::from_secs(10);
/// What the database itself gives up: a statement that waits for a lock too long, a transaction of a
/// server that is gone.
const SETTINGS: &str =
    "SET statement_timeout = '10s'; SET idle_in_transaction_session_timeout = '30s'";
/// A connection on which nothing comes back for so long is closed.
const SILENT_MAX: Duration = Duration::from_secs(15);
const QUERY: &str = "a database query";
/// Now, in milliseconds since 1970, by the database's clock.
const NOW_MS: &str = "(extract(epoch FROM clock_timestamp()) * 1000)::bigint";

const STORED_BYTES: &str = "SELECT coalesce(sum(bytes), 0)::bigint FROM kvtide_files WHERE tenant = $1 AND gone_at IS NULL";

type Values<'a> = &'a [&'a (dyn ToSql + Sync)];

/// See the module's documentation.
pub struct Postgres {
    pool: Pool,
}

fn failed(error: tokio_postgres::Error) -> Failure {
    Failure::internal(QUERY, error)
}

/// The document in a row's first column.
fn document<T: DeserializeOwned>(row: &Row) -> Result<T, Failure> {
    loaded(row.try_get(0).map_err(failed)?)
}

impl Postgres {
    /// Connects to the database at `url` and makes the tables if they are not there.
    ///
    /// # Errors
    /// When the database cannot be reached, or its tables are of a later version.
    pub async fn open(url: &str) -> Result<Postgres, Failure> {
        const WHAT: &str = "opening the database";
        let mut config: Config = url.parse().map_err(Failure::when(WHAT))?;
        config
            .connect_timeout(CONNECTION_WITHIN)
            .keepalives(true)
            .keepalives_idle(SILENT_MAX / 3)
            .keepalives_interval(SILENT_MAX / 3)
            .keepalives_retries(2)
            .tcp_user_timeout(SILENT_MAX);
        let roots = rustls_native_certs::load_native_certs();
        let mut store = rustls::RootCertStore::empty();
        // Without usable roots, connections with TLS are refused later, and those without work.
        store.add_parsable_certificates(roots.certs);
        let tls = rustls::ClientConfig::builder()
            .with_root_certificates(store)
            .with_no_client_auth();
        let manager = Manager::from_config(
            config,
            MakeRustlsConnect::new(tls),
            ManagerConfig {
                // One that was left in the middle of something, or is dead, is not used again.
                recycling_method: RecyclingMethod::Verified,
            },
        );
        let pool = Pool::builder(manager)
            .max_size(CONNECTIONS_MAX)
            .timeouts(Timeouts {
                wait: Some(CONNECTION_WITHIN),
                create: Some(CONNECTION_WITHIN),
                recycle: Some(RECYCLE_WITHIN),
            })
            .runtime(Runtime::Tokio1)
            .post_create(Hook::async_fn(|client, _| {
                Box::pin(async move {
                    let set = client.batch_execute(SETTINGS).await;
                    set.map_err(HookError::Backend)
                })
            }))
            .build()
            .map_err(Failure::when(WHAT))?;
        let postgres = Postgres { pool };
        let mut connection = postgres.connection().await?;
        let transaction = connection.transaction().await.map_err(failed)?;
        schema::prepare(&transaction).await?;
        transaction.commit().await.map_err(failed)?;
        Ok(postgres)
    }

    async fn connection(&self) -> Result<Object, Failure> {
        self.pool
            .get()
            .await
            .map_err(Failure::when("connecting to the database"))
    }

    async fn rows(&self, sql: &str, values: Values<'_>) -> Result<Vec<Row>, Failure> {
        within(async {
            let connection = self.connection().await?;
            let statement = connection.prepare_cached(sql).await.map_err(failed)?;
            connection.query(&statement, values).await.map_err(failed)
        })
        .await
    }

    async fn execute(&self, sql: &str, values: Values<'_>) -> Result<u64, Failure> {
        within(async {
            let connection = self.connection().await?;
            let statement = connection.prepare_cached(sql).await.map_err(failed)?;
            connection.execute(&statement, values).await.map_err(failed)
        })
        .await
    }

    /// The document that a query for one row finds.
    async fn one<T: DeserializeOwned>(
        &self,
        sql: &str,
        values: Values<'_>,
    ) -> Result<Option<T>, Failure> {
        self.rows(sql, values)
            .await?
            .first()
            .map(document)
            .transpose()
    }

    /// Items of a list. `condition` restricts it with the parameters `$1`, the tenant, and `$2`. Its
    /// `page.after` may have been deleted since it was listed.
    async fn page<T: DeserializeOwned>(
        &self,
        table: &str,
        condition: &str,
        tenant: &str,
        second: Option<&str>,
        page: &Page,
    ) -> Result<Option<Listed<T>>, Failure> {
        let (before, order) = if page.ascending {
            (">", "ASC")
        } else {
            ("<", "DESC")
        };
        let mut after: Option<i64> = None;
        if let Some(id) = &page.after {
            let sql = format!("SELECT seq FROM kvtide_{table} WHERE tenant = $1 AND id = $2");
            let rows = self.rows(&sql, &[&tenant, id]).await?;
            let Some(row) = rows.first() else {
                return Ok(None);
            };
            after = Some(row.try_get(0).map_err(failed)?);
        }
        let sql = format!(
            "SELECT doc FROM kvtide_{table} WHERE tenant = $1 AND {condition}
             AND ($3::bigint IS NULL OR seq {before} $3) ORDER BY seq {order} LIMIT $4"
        );
        let limit = i64::from(page.limit) + 1;
        let rows = self.rows(&sql, &[&tenant, &second, &after, &limit]).await?;
        let items = rows.iter().map(document).collect::<Result<_, _>>()?;
        Ok(Some(Listed::of(items, page.limit)))
    }
}

/// Waits for the database, though not for ever: a connection may go silent without being closed.
async fn within<T>(work: impl Future<Output = Result<T, Failure>>) -> Result<T, Failure> {
    timeout(ANSWER_WITHIN, work)
        .await
        .unwrap_or_else(|_| Err(Failure::internal(QUERY, "the database does not answer")))
}

async fn insert_file(
    transaction: &Transaction<'_>,
    file: &File,
    digest: Option<&str>,
) -> Result<(), Failure> {
    transaction
        .execute(
            "INSERT INTO kvtide_files (id, tenant, purpose, bytes, created_at, expires_at, digest, doc)
             VALUES ($1, $2, $3, $4, $5, $6, $7, $8)",
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
        )
        .await
        .map_err(failed)?;
    Ok(())
}

/// Lets creates of one tenant pass one at a time, so that two repetitions that arrive at two servers
/// together become one, and quotas are kept.
async fn one_at_a_time(transaction: &Transaction<'_>, tenant: &str) -> Result<(), Failure> {
    transaction
        .execute(
            "SELECT pg_advisory_xact_lock(hashtextextended('kvtide ' || $1, 0))",
            &[&tenant],
        )
        .await
        .map_err(failed)?;
    Ok(())
}

async fn same_create<T: DeserializeOwned>(
    transaction: &Transaction<'_>,
    table: &str,
    tenant: &str,
    create: &Create,
    created_at: Seconds,
) -> Result<Option<T>, Failure> {
    if !create.is_retry {
        return Ok(None);
    }
    let since = retried_since(created_at);
    let sql = format!(
        "SELECT doc FROM kvtide_{table} WHERE tenant = $1 AND digest = $2 AND created_at >= $3
         ORDER BY seq DESC LIMIT 1"
    );
    let found = transaction
        .query_opt(&sql, &[&tenant, &create.digest, &since])
        .await
        .map_err(failed)?;
    found.as_ref().map(document).transpose()
}

async fn store_batch(transaction: &Transaction<'_>, batch: &Batch) -> Result<(), Failure> {
    let columns = Columns::of(batch);
    let statement = transaction
        .prepare_cached(
            "UPDATE kvtide_batches SET doc = $1, live = $2, validated = $3, model = $4, due_at = $5
             WHERE id = $6",
        )
        .await
        .map_err(failed)?;
    transaction
        .execute(
            &statement,
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
        .map_err(failed)?;
    Ok(())
}

async fn add_part(transaction: &Transaction<'_>, batch: &str, part: &Part) -> Result<(), Failure> {
    let statement = transaction
        .prepare_cached(
            "INSERT INTO kvtide_parts (batch, stream, key, start, bytes, lines)
             VALUES ($1, $2, $3, $4, $5, $6)",
        )
        .await
        .map_err(failed)?;
    transaction
        .execute(
            &statement,
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
        .map_err(failed)?;
    Ok(())
}

#[async_trait]
impl Metadata for Postgres {
    async fn ping(&self) -> Result<(), Failure> {
        self.rows("SELECT 1", &[]).await.map(drop)
    }

    async fn add_file(
        &self,
        file: File,
        create: Create,
        quota_bytes: Option<u64>,
    ) -> Result<File, Failure> {
        within(async move {
            let mut connection = self.connection().await?;
            let transaction = connection.transaction().await.map_err(failed)?;
            one_at_a_time(&transaction, &file.tenant).await?;
            let table = "files_there";
            let same = same_create(&transaction, table, &file.tenant, &create, file.created_at);
            if let Some(same) = same.await? {
                return Ok(same);
            }
            if let Some(quota_bytes) = quota_bytes {
                let row = transaction
                    .query_one(STORED_BYTES, &[&file.tenant])
                    .await
                    .map_err(failed)?;
                let taken = natural(row.try_get(0).map_err(failed)?);
                if taken.saturating_add(file.bytes) > quota_bytes {
                    return Err(Failure::Quota { quota_bytes });
                }
            }
            insert_file(&transaction, &file, Some(&create.digest)).await?;
            transaction.commit().await.map_err(failed)?;
            Ok(file)
        })
        .await
    }

    async fn file(&self, tenant: &str, id: &str) -> Result<Option<File>, Failure> {
        self.one(
            "SELECT doc FROM kvtide_files_there WHERE tenant = $1 AND id = $2
             AND (expires_at IS NULL OR expires_at > $3)",
            &[&tenant, &id, &integer(clock::now())],
        )
        .await
    }

    async fn files(
        &self,
        tenant: &str,
        purpose: Option<Purpose>,
        page: Page,
    ) -> Result<Option<Listed<File>>, Failure> {
        let condition = format!(
            "NOT deleted AND (expires_at IS NULL OR expires_at > {}) AND ($2::text IS NULL OR purpose = $2)",
            clock::now()
        );
        let purpose = purpose.map(Purpose::as_str);
        self.page("files", &condition, tenant, purpose, &page).await
    }

    async fn stored_bytes(&self, tenant: &str) -> Result<u64, Failure> {
        let rows = self.rows(STORED_BYTES, &[&tenant]).await?;
        let sum = rows.first().map_or(Ok(0), |row| row.try_get(0));
        Ok(natural(sum.map_err(failed)?))
    }

    async fn delete_file(&self, tenant: &str, id: &str) -> Result<Deletion, Failure> {
        let sql = "UPDATE kvtide_files SET deleted = true
             WHERE tenant = $1 AND id = $2 AND NOT deleted
             RETURNING EXISTS (SELECT 1 FROM kvtide_batches WHERE live AND input_file_id = $2)";
        let rows = self.rows(sql, &[&tenant, &id]).await?;
        let Some(row) = rows.first() else {
            return Ok(Deletion::Unknown);
        };
        Ok(if row.try_get(0).map_err(failed)? {
            Deletion::InUse
        } else {
            Deletion::Unused
        })
    }

    async fn expire_files(&self, now: Seconds) -> Result<u64, Failure> {
        let sql = "UPDATE kvtide_files SET deleted = true WHERE NOT deleted AND expires_at <= $1";
        self.execute(sql, &[&integer(now)]).await
    }

    async fn unused_files(&self, after: &str, limit: u32) -> Result<Vec<String>, Failure> {
        let sql = "SELECT id FROM kvtide_files WHERE deleted AND gone_at IS NULL AND id > $1
             AND NOT EXISTS
                 (SELECT 1 FROM kvtide_batches WHERE live AND input_file_id = kvtide_files.id)
             ORDER BY id LIMIT $2";
        let rows = self.rows(sql, &[&after, &i64::from(limit)]).await?;
        rows.iter()
            .map(|row| row.try_get(0).map_err(failed))
            .collect()
    }

    async fn forget_file(&self, id: &str, now: Seconds) -> Result<(), Failure> {
        let sql = "UPDATE kvtide_files SET gone_at = $1 WHERE id = $2 AND deleted";
        self.execute(sql, &[&integer(now), &id]).await.map(drop)
    }

    async fn purge_files(&self, before: Seconds) -> Result<(), Failure> {
        let sql = "DELETE FROM kvtide_files WHERE gone_at < $1";
        self.execute(sql, &[&integer(before)]).await.map(drop)
    }

    async fn knows_file(&self, id: &str) -> Result<bool, Failure> {
        let sql = "SELECT 1 FROM kvtide_files WHERE id = $1 AND gone_at IS NULL";
        Ok(!self.rows(sql, &[&id]).await?.is_empty())
    }

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
        let (tenant, created_at) = (&batch.tenant, batch.created_at);
        let same = same_create(&transaction, "batches", tenant, &create, created_at).await?;
        if let Some(same) = same {
            return Ok(same);
        }
        let row = transaction
            .query_one(
                "SELECT count(*), count(*) FILTER (WHERE tenant = $1) FROM kvtide_batches WHERE live",
                &[&batch.tenant],
            )
            .await
            .map_err(failed)?;
        // Creates of one tenant pass one at a time. Those of different tenants may exceed the bound of
        // all by a few.
        places.check(
            natural(row.try_get(0).map_err(failed)?),
            natural(row.try_get(1).map_err(failed)?),
        )?;
        transaction
            .execute(
                "INSERT INTO kvtide_batches
                     (id, tenant, created_at, input_file_id, digest, due_at, doc)
                 VALUES ($1, $2, $3, $4, $5, $6, $7)",
                &[
                    &batch.id,
                    &batch.tenant,
                    &integer(batch.created_at),
                    &batch.order.input_file_id,
                    &create.digest,
                    &integer(Columns::of(&batch).due_at),
                    &stored(&batch)?,
                ],
            )
            .await
            .map_err(failed)?;
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
        self.page("batches", "$2::text IS NULL", tenant, None, &page)
            .await
    }

    async fn cancel(&self, tenant: &str, id: &str, now: Seconds) -> Result<Option<Batch>, Failure> {
        within(async move {
            let mut connection = self.connection().await?;
            let transaction = connection.transaction().await.map_err(failed)?;
            let found = transaction
                .query_opt(
                    "SELECT doc FROM kvtide_batches WHERE tenant = $1 AND id = $2 FOR UPDATE",
                    &[&tenant, &id],
                )
                .await
                .map_err(failed)?;
            let Some(row) = found else {
                return Ok(None);
            };
            let mut batch: Batch = document(&row)?;
            batch.apply(Change::Cancel, now)?;
            store_batch(&transaction, &batch).await?;
            transaction.commit().await.map_err(failed)?;
            Ok(Some(batch))
        })
        .await
    }

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
                 SELECT tenant, model FROM kvtide_batches WHERE live AND lease_until > {NOW_MS}),
             chosen AS MATERIALIZED (
                 SELECT mine.seq FROM kvtide_batches AS mine
                 WHERE mine.live AND mine.lease_until <= {NOW_MS} AND CASE WHEN $5
                     THEN mine.due_at * 1000 <= {NOW_MS}
                     ELSE mine.due_at * 1000 > {NOW_MS} AND mine.validated = $3 END
                 ORDER BY
                     mine.tenant || chr(10) || coalesce(mine.model, '') = ANY($6::text[]),
                     (SELECT count(*) FROM busy WHERE busy.tenant = mine.tenant),
                     (SELECT count(*) FROM busy WHERE busy.model IS NOT DISTINCT FROM mine.model),
                     mine.seq
                 LIMIT $4 FOR UPDATE OF mine SKIP LOCKED)
             UPDATE kvtide_batches SET lease_server = $1, lease_until = {NOW_MS} + $2,
                 lease_epoch = lease_epoch + 1
             WHERE seq IN (SELECT seq FROM chosen)
             RETURNING doc, lease_epoch"
        );
        let (run, end) = (stage == Stage::Run, stage == Stage::End);
        let last: Vec<String> = last.iter().map(Share::key).collect();
        let rows = self
            .rows(
                &sql,
                &[&server, &lease_ms, &run, &i64::from(limit), &end, &last],
            )
            .await?;
        rows.iter()
            .map(|row| {
                let epoch = row.try_get(1).map_err(failed)?;
                leased(row.try_get(0).map_err(failed)?, epoch)
            })
            .collect()
    }

    async fn waiting(&self, limit: u32) -> Result<Vec<Share>, Failure> {
        let sql = format!(
            "SELECT tenant, model FROM kvtide_batches
             WHERE live AND validated AND lease_until <= {NOW_MS} AND due_at * 1000 > {NOW_MS}
             GROUP BY tenant, model ORDER BY min(seq) LIMIT $1"
        );
        let rows = self.rows(&sql, &[&i64::from(limit)]).await?;
        rows.iter()
            .map(|row| {
                Ok(Share {
                    tenant: row.try_get(0).map_err(failed)?,
                    model: row.try_get(1).map_err(failed)?,
                })
            })
            .collect()
    }

    async fn renew(&self, fence: &Fence, lease_ms: i64) -> Result<Batch, Failure> {
        let sql = format!(
            "UPDATE kvtide_batches SET lease_until = {NOW_MS} + $1
             WHERE id = $2 AND lease_epoch = $3 RETURNING doc"
        );
        let renewed = self
            .one(&sql, &[&lease_ms, &fence.batch, &fence.epoch])
            .await?;
        renewed.ok_or_else(|| fenced_off(fence))
    }

    async fn release(&self, fence: &Fence, pause_ms: i64) -> Result<(), Failure> {
        let sql = format!(
            "UPDATE kvtide_batches SET lease_until = {NOW_MS} + $1, lease_server = NULL,
                 lease_epoch = lease_epoch + 1
             WHERE id = $2 AND lease_epoch = $3"
        );
        self.execute(&sql, &[&pause_ms, &fence.batch, &fence.epoch])
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
            let statement = transaction
                .prepare_cached(
                    "SELECT doc FROM kvtide_batches WHERE id = $1 AND lease_epoch = $2 FOR UPDATE",
                )
                .await
                .map_err(failed)?;
            let found = transaction
                .query_opt(&statement, &[&fence.batch, &fence.epoch])
                .await
                .map_err(failed)?;
            let row = found.ok_or_else(|| fenced_off(fence))?;
            let mut batch: Batch = document(&row)?;
            if let Some(first) = parts.first() {
                let known = transaction
                    .query_opt(
                        "SELECT 1 FROM kvtide_parts WHERE key = $1 AND start = $2",
                        &[&first.key, &integer(first.offset)],
                    )
                    .await
                    .map_err(failed)?;
                if known.is_some() {
                    return Ok(batch);
                }
                transaction
                .execute(
                    "UPDATE kvtide_batches SET has_parts = true WHERE id = $1 AND NOT has_parts",
                    &[&fence.batch],
                )
                .await
                .map_err(failed)?;
            }
            batch.apply(change, clock::now())?;
            store_batch(&transaction, &batch).await?;
            for part in &parts {
                add_part(&transaction, &fence.batch, part).await?;
            }
            for file in &files {
                insert_file(&transaction, file, None).await?;
            }
            transaction.commit().await.map_err(failed)?;
            Ok(batch)
        })
        .await
    }

    async fn parts(&self, batch: &str) -> Result<Vec<Part>, Failure> {
        let sql = "SELECT stream, key, start, bytes, lines FROM kvtide_parts WHERE batch = $1 ORDER BY seq";
        let rows = self.rows(sql, &[&batch]).await?;
        rows.iter()
            .map(|row| {
                Ok(Part {
                    stream: Stream::from_str(row.try_get(0).map_err(failed)?)?,
                    key: row.try_get(1).map_err(failed)?,
                    offset: natural(row.try_get(2).map_err(failed)?),
                    bytes: natural(row.try_get(3).map_err(failed)?),
                    lines: Part::unpacked_lines(row.try_get(4).map_err(failed)?),
                })
            })
            .collect()
    }

    async fn needs_parts(&self, batch: &str) -> Result<bool, Failure> {
        let sql = "SELECT 1 FROM kvtide_batches WHERE id = $1 AND (live OR has_parts)";
        Ok(!self.rows(sql, &[&batch]).await?.is_empty())
    }

    async fn batches_with_parts_to_drop(
        &self,
        after: &str,
        limit: u32,
    ) -> Result<Vec<String>, Failure> {
        let sql = "SELECT id FROM kvtide_batches WHERE has_parts AND NOT live AND id > $1
             ORDER BY id LIMIT $2";
        let rows = self.rows(sql, &[&after, &i64::from(limit)]).await?;
        rows.iter()
            .map(|row| row.try_get(0).map_err(failed))
            .collect()
    }

    async fn drop_parts(&self, batch: &str) -> Result<(), Failure> {
        self.execute("DELETE FROM kvtide_parts WHERE batch = $1", &[&batch])
            .await?;
        let sql = "UPDATE kvtide_batches SET has_parts = false WHERE id = $1";
        self.execute(sql, &[&batch]).await.map(drop)
    }

    async fn queue(&self) -> Result<Queue, Failure> {
        let sql = format!(
            "SELECT count(*), count(*) FILTER (WHERE lease_until <= {NOW_MS}),
             min(created_at) FILTER (WHERE lease_until <= {NOW_MS})
             FROM kvtide_batches WHERE live"
        );
        let rows = self.rows(&sql, &[]).await?;
        let Some(row) = rows.first() else {
            return Ok(Queue::default());
        };
        let oldest: Option<i64> = row.try_get(2).map_err(failed)?;
        Ok(Queue {
            live: natural(row.try_get(0).map_err(failed)?),
            waiting: natural(row.try_get(1).map_err(failed)?),
            oldest_waiting_at: oldest.map(natural),
        })
    }

    async fn create_user(&self, user: &User) -> Result<bool, Failure> {
        let sql = "INSERT INTO kvtide_users (name, doc) VALUES ($1, $2) ON CONFLICT DO NOTHING";
        Ok(self.execute(sql, &[&user.name, &stored(user)?]).await? > 0)
    }

    async fn user(&self, name: &str) -> Result<Option<User>, Failure> {
        let sql = "SELECT doc FROM kvtide_users WHERE name = $1";
        self.one(sql, &[&name]).await
    }

    async fn update_user(&self, user: &User) -> Result<bool, Failure> {
        let sql = "UPDATE kvtide_users SET doc = $1 WHERE name = $2";
        Ok(self.execute(sql, &[&stored(user)?, &user.name]).await? > 0)
    }

    async fn delete_user(&self, name: &str) -> Result<Option<User>, Failure> {
        let sql = "DELETE FROM kvtide_users WHERE name = $1 RETURNING doc";
        self.one(sql, &[&name]).await
    }
}
