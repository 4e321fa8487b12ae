//! How rows are read and written, whatever is in them.

use rusqlite::{Connection, OptionalExtension, Row, ToSql};
use serde::de::DeserializeOwned;

use crate::error::Failure;
use crate::store::values::loaded;
use crate::store::{Listed, Page};

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

/// Items of a list. `condition` restricts it with `values`, its parameters from `?4` on. Its
/// `page.after` may have been deleted since it was listed.
///
/// Few statements are kept prepared, so their texts have to be few: neither a table nor a condition can
/// be made of what is only known when it is asked.
pub(super) fn page<T: DeserializeOwned>(
    db: &Connection,
    table: &'static str,
    condition: &'static str,
    tenant: &str,
    values: Values<'_>,
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
         AND (?2 IS NULL OR seq {before} ?2) ORDER BY seq {order} LIMIT ?3"
    );
    let fetched = page.fetched();
    let own: Values<'_> = &[&tenant, &after, &fetched];
    let documents = many(db, &sql, &[own, values].concat(), |row| {
        row.get::<_, String>(0)
    })?;
    let items = documents
        .iter()
        .map(|document| loaded(document))
        .collect::<Result<_, _>>()?;
    Ok(Some(Listed::of(items, page)))
}
