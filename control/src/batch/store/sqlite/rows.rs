//! How rows are read and written, whatever is in them.

use rusqlite::{Connection, OptionalExtension, Row, ToSql};
use serde::de::DeserializeOwned;

use crate::batch::error::Failure;
use crate::batch::store::values::loaded;
use crate::batch::store::{Listed, Page};

const QUERY: &str = "a database query";

/// Values for a statement's parameters.
pub(super) type Values<'a> = &'a [&'a dyn ToSql];

pub(super) fn failed(error: rusqlite::Error) -> Failure {
    Failure::internal(QUERY, error)
}

/// The document that a query for one row finds.
pub(super) fn one<T: DeserializeOwned>(
    db: &Connection,
    sql: &str,
    values: Values<'_>,
) -> Result<Option<T>, Failure> {
    db.prepare_cached(sql)
        .map_err(failed)?
        .query_row(values, |row| row.get::<_, String>(0))
        .optional()
        .map_err(failed)?
        .map(|document| loaded(&document))
        .transpose()
}

/// The only row of a query that always has one.
pub(super) fn only<T>(
    db: &Connection,
    sql: &str,
    values: Values<'_>,
    item: impl FnOnce(&Row<'_>) -> rusqlite::Result<T>,
) -> Result<T, Failure> {
    db.prepare_cached(sql)
        .map_err(failed)?
        .query_row(values, item)
        .map_err(failed)
}

pub(super) fn many<T>(
    db: &Connection,
    sql: &str,
    values: Values<'_>,
    item: impl Fn(&Row<'_>) -> rusqlite::Result<T>,
) -> Result<Vec<T>, Failure> {
    let mut statement = db.prepare_cached(sql).map_err(failed)?;
    let rows = statement.query_map(values, item).map_err(failed)?;
    rows.collect::<Result<_, _>>().map_err(failed)
}

pub(super) fn exists(db: &Connection, sql: &str, values: Values<'_>) -> Result<bool, Failure> {
    db.prepare_cached(sql)
        .map_err(failed)?
        .exists(values)
        .map_err(failed)
}

/// How many rows were changed.
pub(super) fn execute(db: &Connection, sql: &str, values: Values<'_>) -> Result<usize, Failure> {
    db.prepare_cached(sql)
        .map_err(failed)?
        .execute(values)
        .map_err(failed)
}

/// Items of a list. `condition` restricts it with the parameters `?1`, the tenant, and `?2`. Its
/// `page.after` may have been deleted since it was listed.
pub(super) fn page<T: DeserializeOwned>(
    db: &Connection,
    table: &str,
    condition: &str,
    tenant: &str,
    second: &dyn ToSql,
    page: &Page,
) -> Result<Option<Listed<T>>, Failure> {
    let mut after = None;
    if let Some(id) = &page.after {
        let sql = format!("SELECT seq FROM {table} WHERE tenant = ? AND id = ?");
        let found: Vec<i64> = many(db, &sql, &[&tenant, id], |row| row.get(0))?;
        let Some(seq) = found.first() else {
            return Ok(None);
        };
        after = Some(*seq);
    }
    let (before, order) = page.order();
    let sql = format!(
        "SELECT doc FROM {table} WHERE tenant = ?1 AND {condition}
         AND (?3 IS NULL OR seq {before} ?3) ORDER BY seq {order} LIMIT ?4"
    );
    let values: Values<'_> = &[&tenant, second, &after, &page.fetched()];
    let documents = many(db, &sql, values, |row| row.get::<_, String>(0))?;
    let items = documents
        .iter()
        .map(|document| loaded(document))
        .collect::<Result<_, _>>()?;
    Ok(Some(Listed::of(items, page)))
}
