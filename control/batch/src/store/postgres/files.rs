//! [`Files`].

use async_trait::async_trait;
use deadpool_postgres::Transaction;

use super::rows::{Values, column, document, execute, failed, first, one_at_a_time, only, within};
use super::{Postgres, sql};
use crate::clock::{self, Seconds};
use crate::error::Failure;
use crate::file::{File, Purpose};
use crate::store::files::check_quota;
use crate::store::values::{integer, natural, stored};
use crate::store::{Create, Deletion, Files, Listed, Page};

const STORED_BYTES: &str = "SELECT coalesce(sum(bytes), 0)::bigint FROM kvtide_files
     WHERE tenant = $1 AND gone_at IS NULL";

/// Adds a file that nobody has added before.
pub(super) async fn insert(
    transaction: &Transaction<'_>,
    file: &File,
    digest: Option<&str>,
) -> Result<(), Failure> {
    execute(
        transaction,
        sql::INSERT_FILE,
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
}

/// The file that an earlier attempt at the same create has added.
async fn same(
    transaction: &Transaction<'_>,
    file: &File,
    create: &Create,
) -> Result<Option<File>, Failure> {
    let Some(since) = create.repeats_since(file.created_at) else {
        return Ok(None);
    };
    let sql = "SELECT doc FROM kvtide_files_there
         WHERE tenant = $1 AND digest = $2 AND created_at >= $3 ORDER BY seq DESC LIMIT 1";
    let found = first(transaction, sql, &[&file.tenant, &create.digest, &since]).await?;
    found.as_ref().map(document).transpose()
}

#[async_trait]
impl Files for Postgres {
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
            if let Some(same) = same(&transaction, &file, &create).await? {
                return Ok(same);
            }
            if let Some(quota_bytes) = quota_bytes {
                let row = only(&transaction, STORED_BYTES, &[&file.tenant]).await?;
                check_quota(natural(column(&row, 0)?), &file, quota_bytes)?;
            }
            insert(&transaction, &file, Some(&create.digest)).await?;
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
        let condition = "NOT deleted AND (expires_at IS NULL OR expires_at > $4)
             AND ($5::text IS NULL OR purpose = $5)";
        let (now, purpose) = (integer(clock::now()), purpose.map(Purpose::as_str));
        self.page("files", condition, tenant, &[&now, &purpose], &page)
            .await
    }

    async fn stored_bytes(&self, tenant: &str) -> Result<u64, Failure> {
        let rows = self.rows(STORED_BYTES, &[&tenant]).await?;
        let sum = rows.first().map_or(Ok(0), |row| column(row, 0));
        sum.map(natural)
    }

    async fn delete_file(&self, tenant: &str, id: &str) -> Result<Deletion, Failure> {
        let sql = "UPDATE kvtide_files SET deleted = true
             WHERE tenant = $1 AND id = $2 AND NOT deleted
             RETURNING EXISTS (SELECT 1 FROM kvtide_batches WHERE live AND input_file_id = $2)";
        let rows = self.rows(sql, &[&tenant, &id]).await?;
        let in_use = rows.first().map(|row| column(row, 0)).transpose()?;
        Ok(in_use.map_or(Deletion::Unknown, Deletion::of))
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
        self.texts(sql, &[&after, &i64::from(limit)]).await
    }

    async fn forget_file(&self, id: &str, now: Seconds) -> Result<(), Failure> {
        let values: Values<'_> = &[&integer(now), &id];
        self.execute(sql::FORGET_FILE, values).await.map(drop)
    }

    async fn purge_files(&self, before: Seconds) -> Result<(), Failure> {
        let before = integer(before);
        self.execute(sql::PURGE_FILES, &[&before]).await.map(drop)
    }

    async fn knows_file(&self, id: &str) -> Result<bool, Failure> {
        self.exists(sql::KNOWS_FILE, &[&id]).await
    }
}
