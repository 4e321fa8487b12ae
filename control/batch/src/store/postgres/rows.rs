//! How rows are read and written, whatever is in them.

use std::time::Duration;

use deadpool_postgres::Transaction;
use serde::de::DeserializeOwned;
use tokio::time::timeout;
use tokio_postgres::Row;
use tokio_postgres::types::{FromSqlOwned, ToSql};

use super::Postgres;
use crate::error::Failure;
use crate::store::values::loaded;
use crate::store::{Listed, Page};

/// How long to wait for the database: one that is silent for so long has lost the connection.
const ANSWER_WITHIN: Duration = Duration::from_secs(10);
const QUERY: &str = "a database query";

/// Values for a statement's parameters.
pub(super) type Values<'a> = &'a [&'a (dyn ToSql + Sync)];

pub(super) fn failed(error: tokio_postgres::Error) -> Failure {
    Failure::internal(QUERY, error)
}

/// A column of a row, counted from 0.
pub(super) fn column<T: FromSqlOwned>(row: &Row, position: usize) -> Result<T, Failure> {
    row.try_get(position).map_err(failed)
}

/// The document in a row's first column.
pub(super) fn document<T: DeserializeOwned>(row: &Row) -> Result<T, Failure> {
    loaded(row.try_get(0).map_err(failed)?)
}

/// Waits for the database, though not for ever: a connection may go silent without being closed.
pub(super) async fn within<T>(
    work: impl Future<Output = Result<T, Failure>>,
) -> Result<T, Failure> {
    timeout(ANSWER_WITHIN, work)
        .await
        .unwrap_or_else(|_| Err(Failure::internal(QUERY, "the database does not answer")))
}

/// Runs a statement in a transaction.
pub(super) async fn execute(
    transaction: &Transaction<'_>,
    sql: &str,
    values: Values<'_>,
) -> Result<(), Failure> {
    let statement = transaction.prepare_cached(sql).await.map_err(failed)?;
    let changed = transaction.execute(&statement, values).await;
    changed.map(drop).map_err(failed)
}

/// The row that a query in a transaction finds, of one at most.
pub(super) async fn first(
    transaction: &Transaction<'_>,
    sql: &str,
    values: Values<'_>,
) -> Result<Option<Row>, Failure> {
    let statement = transaction.prepare_cached(sql).await.map_err(failed)?;
    let found = transaction.query_opt(&statement, values).await;
    found.map_err(failed)
}

/// The only row of a query in a transaction that always has one.
pub(super) async fn only(
    transaction: &Transaction<'_>,
    sql: &str,
    values: Values<'_>,
) -> Result<Row, Failure> {
    let statement = transaction.prepare_cached(sql).await.map_err(failed)?;
    let found = transaction.query_one(&statement, values).await;
    found.map_err(failed)
}

/// Lets creates of one tenant pass one at a time, so that two repetitions that arrive at two servers
/// together become one, and quotas are kept.
pub(super) async fn one_at_a_time(
    transaction: &Transaction<'_>,
    tenant: &str,
) -> Result<(), Failure> {
    let sql = "SELECT pg_advisory_xact_lock(hashtextextended('kvtide ' || $1, 0))";
    execute(transaction, sql, &[&tenant]).await
}

/// Queries that are transactions of their own.
impl Postgres {
    pub(super) async fn rows(&self, sql: &str, values: Values<'_>) -> Result<Vec<Row>, Failure> {
        within(async {
            let connection = self.connection().await?;
            let statement = connection.prepare_cached(sql).await.map_err(failed)?;
            connection.query(&statement, values).await.map_err(failed)
        })
        .await
    }

    /// How many rows were changed.
    pub(super) async fn execute(&self, sql: &str, values: Values<'_>) -> Result<u64, Failure> {
        within(async {
            let connection = self.connection().await?;
            let statement = connection.prepare_cached(sql).await.map_err(failed)?;
            connection.execute(&statement, values).await.map_err(failed)
        })
        .await
    }

    /// The document that a query for one row finds.
    pub(super) async fn one<T: DeserializeOwned>(
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

    pub(super) async fn exists(&self, sql: &str, values: Values<'_>) -> Result<bool, Failure> {
        Ok(!self.rows(sql, values).await?.is_empty())
    }

    /// The first columns of all rows.
    pub(super) async fn texts(
        &self,
        sql: &str,
        values: Values<'_>,
    ) -> Result<Vec<String>, Failure> {
        let rows = self.rows(sql, values).await?;
        rows.iter().map(|row| column(row, 0)).collect()
    }

    /// Items of a list. `condition` restricts it with `values`, its parameters from `$4` on. Its
    /// `page.after` may have been deleted since it was listed.
    ///
    /// Statements are kept prepared for as long as their connection lives, so their texts have to be
    /// few: neither a table nor a condition can be made of what is only known when it is asked.
    pub(super) async fn page<T: DeserializeOwned>(
        &self,
        table: &'static str,
        condition: &'static str,
        tenant: &str,
        values: Values<'_>,
        page: &Page,
    ) -> Result<Option<Listed<T>>, Failure> {
        let mut after: Option<i64> = None;
        if let Some(id) = &page.after {
            let sql = format!("SELECT seq FROM kvtide_{table} WHERE tenant = $1 AND id = $2");
            let rows = self.rows(&sql, &[&tenant, id]).await?;
            let Some(row) = rows.first() else {
                return Ok(None);
            };
            after = Some(column(row, 0)?);
        }
        let (before, order) = page.order();
        let sql = format!(
            "SELECT doc FROM kvtide_{table} WHERE tenant = $1 AND {condition}
             AND ($2::bigint IS NULL OR seq {before} $2) ORDER BY seq {order} LIMIT $3"
        );
        let fetched = page.fetched();
        let own: Values<'_> = &[&tenant, &after, &fetched];
        let rows = self.rows(&sql, &[own, values].concat()).await?;
        let items = rows.iter().map(document).collect::<Result<_, _>>()?;
        Ok(Some(Listed::of(items, page)))
    }
}
