//! Statements that both databases understand word for word; only the prefix of the tables' names
//! differs. SQLite numbers `$1` and the like in the order in which they first appear, so they appear
//! in that order.

/// Defines the statements as constants, for tables with this prefix.
macro_rules! statements {
    ($prefix:literal) => {
        pub(super) const INSERT_FILE: &str = concat!(
            "INSERT INTO ",
            $prefix,
            "files (id, tenant, purpose, bytes, created_at, expires_at, digest, doc)
             VALUES ($1, $2, $3, $4, $5, $6, $7, $8)"
        );
        pub(super) const FORGET_FILE: &str = concat!(
            "UPDATE ",
            $prefix,
            "files SET gone_at = $1 WHERE id = $2 AND deleted"
        );
        pub(super) const PURGE_FILES: &str =
            concat!("DELETE FROM ", $prefix, "files WHERE gone_at < $1");
        pub(super) const KNOWS_FILE: &str = concat!(
            "SELECT 1 FROM ",
            $prefix,
            "files WHERE id = $1 AND gone_at IS NULL"
        );

        // One that is over, or being cancelled, is nobody's answer.
        pub(super) const SAME_BATCH: &str = concat!(
            "SELECT doc FROM ",
            $prefix,
            "batches WHERE tenant = $1 AND digest = $2 AND created_at >= $3
             AND live AND due_at <> 0 ORDER BY seq DESC LIMIT 1"
        );
        pub(super) const INSERT_BATCH: &str = concat!(
            "INSERT INTO ",
            $prefix,
            "batches (id, tenant, created_at, input_file_id, digest, due_at, doc)
             VALUES ($1, $2, $3, $4, $5, $6, $7)"
        );
        pub(super) const STORE_BATCH: &str = concat!(
            "UPDATE ",
            $prefix,
            "batches SET doc = $1, live = $2, validated = $3, model = $4, due_at = $5
             WHERE id = $6"
        );

        pub(super) const PARTS: &str = concat!(
            "SELECT stream, key, start, bytes, lines FROM ",
            $prefix,
            "parts WHERE batch = $1 ORDER BY seq"
        );
        pub(super) const KNOWS_PART: &str = concat!(
            "SELECT 1 FROM ",
            $prefix,
            "parts WHERE key = $1 AND start = $2"
        );
        pub(super) const INSERT_PART: &str = concat!(
            "INSERT INTO ",
            $prefix,
            "parts (batch, stream, key, start, bytes, lines) VALUES ($1, $2, $3, $4, $5, $6)"
        );
        pub(super) const DELETE_PARTS: &str =
            concat!("DELETE FROM ", $prefix, "parts WHERE batch = $1");
        pub(super) const HAS_PARTS: &str = concat!(
            "UPDATE ",
            $prefix,
            "batches SET has_parts = true WHERE id = $1 AND NOT has_parts"
        );
        pub(super) const HAS_NO_PARTS: &str = concat!(
            "UPDATE ",
            $prefix,
            "batches SET has_parts = false WHERE id = $1"
        );
        pub(super) const NEEDS_PARTS: &str = concat!(
            "SELECT 1 FROM ",
            $prefix,
            "batches WHERE id = $1 AND (live OR has_parts)"
        );

        pub(super) const INSERT_USER: &str = concat!(
            "INSERT INTO ",
            $prefix,
            "users (name, doc) VALUES ($1, $2) ON CONFLICT DO NOTHING"
        );
        pub(super) const USER: &str = concat!("SELECT doc FROM ", $prefix, "users WHERE name = $1");
        pub(super) const UPDATE_USER: &str =
            concat!("UPDATE ", $prefix, "users SET doc = $1 WHERE name = $2");
        pub(super) const DELETE_USER: &str = concat!(
            "DELETE FROM ",
            $prefix,
            "users WHERE name = $1 RETURNING doc"
        );
    };
}
