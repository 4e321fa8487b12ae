//! [`Files`].

use async_trait::async_trait;
use rusqlite::Connection;

use super::rows::{execute, exists, many, one, only, page};
use super::{Sqlite, sql};
use crate::clock::{self, Seconds};
use crate::error::Failure;
use crate::file::{File, Purpose};
use crate::store::files::check_quota;
use crate::store::values::{integer, natural, stored};
use crate::store::{Create, Deletion, Files, Listed, Page};

/// Adds a file that nobody has added before.
pub(super) fn insert(db: &Connection, file: &File, digest: Option<&str>) -> Result<(), Failure> {
    execute(
        db,
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
    )?;
    Ok(())
}

fn add(
    db: &Connection,
    file: File,
    create: &Create,
    quota_bytes: Option<u64>,
) -> Result<File, Failure> {
    if let Some(since) = create.repeats_since(file.created_at) {
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
    if let Some(quota_bytes) = quota_bytes {
        check_quota(stored_bytes(db, &file.tenant)?, &file, quota_bytes)?;
    }
    insert(db, &file, Some(&create.digest))?;
    Ok(file)
}

fn stored_bytes(db: &Connection, tenant: &str) -> Result<u64, Failure> {
    let sql = "SELECT coalesce(sum(bytes), 0) FROM files WHERE tenant = ? AND gone_at IS NULL";
    only(db, sql, &[&tenant], |row| row.get(0)).map(natural)
}

fn delete(db: &Connection, tenant: &str, id: &str) -> Result<Deletion, Failure> {
    let changed = execute(
        db,
        "UPDATE files SET deleted = 1 WHERE tenant = ? AND id = ? AND deleted = 0",
        &[&tenant, &id],
    )?;
    if changed == 0 {
        return Ok(Deletion::Unknown);
    }
    let in_use = exists(
        db,
        "SELECT 1 FROM batches WHERE live = 1 AND input_file_id = ?",
        &[&id],
    )?;
    Ok(Deletion::of(in_use))
}

#[async_trait]
impl Files for Sqlite {
    async fn add_file(
        &self,
        file: File,
        create: Create,
        quota_bytes: Option<u64>,
    ) -> Result<File, Failure> {
        self.write(move |db| add(db, file, &create, quota_bytes))
            .await
    }

    async fn file(&self, tenant: &str, id: &str) -> Result<Option<File>, Failure> {
        let (tenant, id) = (tenant.to_owned(), id.to_owned());
        self.read(move |db| {
            one(
                db,
                "SELECT doc FROM files WHERE tenant = ? AND id = ? AND deleted = 0
                 AND (expires_at IS NULL OR expires_at > ?)",
                &[&tenant, &id, &integer(clock::now())],
            )
        })
        .await
    }

    async fn files(
        &self,
        tenant: &str,
        purpose: Option<Purpose>,
        wanted: Page,
    ) -> Result<Option<Listed<File>>, Failure> {
        let tenant = tenant.to_owned();
        let condition = "deleted = 0 AND (expires_at IS NULL OR expires_at > ?4)
             AND (?5 IS NULL OR purpose = ?5)";
        let (now, purpose) = (integer(clock::now()), purpose.map(Purpose::as_str));
        self.read(move |db| page(db, "files", condition, &tenant, &[&now, &purpose], &wanted))
            .await
    }

    async fn stored_bytes(&self, tenant: &str) -> Result<u64, Failure> {
        let tenant = tenant.to_owned();
        self.read(move |db| stored_bytes(db, &tenant)).await
    }

    async fn delete_file(&self, tenant: &str, id: &str) -> Result<Deletion, Failure> {
        let (tenant, id) = (tenant.to_owned(), id.to_owned());
        self.write(move |db| delete(db, &tenant, &id)).await
    }

    async fn expire_files(&self, now: Seconds) -> Result<u64, Failure> {
        let sql = "UPDATE files SET deleted = 1 WHERE deleted = 0 AND expires_at <= ?";
        self.write(move |db| Ok(execute(db, sql, &[&integer(now)])? as u64))
            .await
    }

    async fn unused_files(&self, after: &str, limit: u32) -> Result<Vec<String>, Failure> {
        let after = after.to_owned();
        let sql = "SELECT id FROM files WHERE deleted = 1 AND gone_at IS NULL AND id > ?
             AND NOT EXISTS (SELECT 1 FROM batches WHERE live = 1 AND input_file_id = files.id)
             ORDER BY id LIMIT ?";
        self.read(move |db| many(db, sql, &[&after, &limit], |row| row.get(0)))
            .await
    }

    async fn forget_file(&self, id: &str, now: Seconds) -> Result<(), Failure> {
        let id = id.to_owned();
        self.write(move |db| execute(db, sql::FORGET_FILE, &[&integer(now), &id]).map(drop))
            .await
    }

    async fn purge_files(&self, before: Seconds) -> Result<(), Failure> {
        self.write(move |db| execute(db, sql::PURGE_FILES, &[&integer(before)]).map(drop))
            .await
    }

    async fn knows_file(&self, id: &str) -> Result<bool, Failure> {
        let id = id.to_owned();
        self.read(move |db| exists(db, sql::KNOWS_FILE, &[&id]))
            .await
    }
}
