//! [`Metadata`] in PostgreSQL, for several servers that share the work.
//!
//! No wall clock says whether a lease has run out: each server watches the others' beats by a clock that
//! nobody can set ([`watch`]). The database's clock says only whether a batch's window has ended. A
//! change locks the batch's row and compares the epoch, so that of two servers that both believe to
//! have the lease only one can write.

mod batches;
mod files;
mod leases;
mod results;
mod rows;
mod schema;
mod users;
mod watch;

/// Statements that SQLite understands too.
mod sql {
    statements!("kvtide_");
}

use std::sync::Mutex;
use std::time::Duration;

use async_trait::async_trait;
use deadpool_postgres::{Hook, HookError, Manager, ManagerConfig, Object, Pool};
use deadpool_postgres::{RecyclingMethod, Runtime, Timeouts};
use kvtide_control_base::tls::Trust;
use tokio_postgres::Config;
use tokio_postgres::config::SslMode;
use tokio_postgres_rustls::MakeRustlsConnect;

use crate::error::Failure;
use crate::store::Metadata;
use rows::failed;
use watch::Watch;

/// Connections of one server. Each job needs one now and then, each HTTP request for a moment.
const CONNECTIONS_MAX: usize = 8;
/// How long to wait for a connection, be it made or given back.
const CONNECTION_WITHIN: Duration = Duration::from_secs(10);
/// How long a connection that was used before may take to show that it still works.
const RECYCLE_WITHIN: Duration = Duration::from_secs(2);
/// What the database itself gives up: a statement that waits for a lock too long, a transaction of a
/// server that is gone.
const SETTINGS: &str =
    "SET statement_timeout = '10s'; SET idle_in_transaction_session_timeout = '30s'";
/// A connection on which nothing comes back for so long is closed.
const SILENT_MAX: Duration = Duration::from_secs(15);
/// Now, in milliseconds since 1970, by the database's clock.
const NOW_MS: &str = "(extract(epoch FROM clock_timestamp()) * 1000)::bigint";
/// Whether nobody works on a batch, and it does not rest; of the leases that have run out, `$1` and `$2`
/// are [`Postgres::run_out`].
const FREE: &str = "(lease_ms = 0
    OR (seq, lease_beat) IN (SELECT * FROM unnest($1::bigint[], $2::bigint[])))";

/// See the module's documentation.
pub struct Postgres {
    pool: Pool,
    watch: Mutex<Watch>,
}

impl Postgres {
    /// Connects to the database at `url` and makes the tables if they are not there. Over TLS, its
    /// certificate and its name are always checked.
    ///
    /// # Errors
    /// When the database cannot be reached, or its tables are of a later version.
    pub async fn open(url: &str, trust: &Trust) -> Result<Postgres, Failure> {
        const WHAT: &str = "opening the database";
        let mut config = parse(url)?;
        if config.get_ssl_mode() == SslMode::Require && trust.is_empty() {
            let message = "TLS is required and no authority is trusted: give --ca-file";
            return Err(Failure::internal(WHAT, message));
        }
        config
            .connect_timeout(CONNECTION_WITHIN)
            .keepalives(true)
            .keepalives_idle(SILENT_MAX / 3)
            .keepalives_interval(SILENT_MAX / 3)
            .keepalives_retries(2)
            .tcp_user_timeout(SILENT_MAX);
        let manager = Manager::from_config(
            config,
            MakeRustlsConnect::new(trust.client_config()),
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
        let postgres = Postgres {
            pool,
            watch: Mutex::default(),
        };
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
}

/// Reads the database's URL. What other clients of PostgreSQL call `verify-full` is done here wherever
/// TLS is used.
fn parse(url: &str) -> Result<Config, Failure> {
    const WHAT: &str = "reading --database";
    // As in the library, what is before the first @ is user and password, whatever is in them.
    let host = url.find('@').map_or(0, |at| at + 1);
    let query = url[host..].find('?').map(|at| host + at);
    let (address, query) = match query {
        Some(at) => (&url[..at], &url[at + 1..]),
        None => (url, ""),
    };
    let mut options = Vec::new();
    let mut required = false;
    for option in query.split('&').filter(|option| !option.is_empty()) {
        match option.split_once('=') {
            Some(("sslmode", "verify-ca" | "verify-full")) => options.push("sslmode=require"),
            // Those that the system trusts are trusted here anyway; elsewhere it also means verify-full.
            Some(("sslrootcert", "system")) => required = true,
            Some(("sslrootcert", _)) => {
                let message = "sslrootcert is not known here: give the file with --ca-file";
                return Err(Failure::internal(WHAT, message));
            }
            _ => options.push(option),
        }
    }
    if required {
        // The last one counts.
        options.push("sslmode=require");
    }
    let url = match options.as_slice() {
        [] => address.to_owned(),
        options => format!("{address}?{}", options.join("&")),
    };
    url.parse().map_err(Failure::when(WHAT))
}

#[async_trait]
impl Metadata for Postgres {
    async fn ping(&self) -> Result<(), Failure> {
        self.rows("SELECT 1", &[]).await.map(drop)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_verifies_elsewhere_is_required_here_and_what_is_not_known_is_said() {
        let mode = |query: &str| {
            let config = parse(&format!("postgres://u:p%40w@db:5433/name{query}")).unwrap();
            assert_eq!(config.get_password(), Some(&b"p@w"[..]));
            assert_eq!(config.get_dbname(), Some("name"));
            config.get_ssl_mode()
        };
        assert_eq!(mode(""), SslMode::Prefer);
        assert_eq!(mode("?sslmode=disable"), SslMode::Disable);
        for name in ["require", "verify-ca", "verify-full"] {
            let query = format!("?application_name=a%20b&sslmode={name}");
            assert_eq!(mode(&query), SslMode::Require);
        }
        for query in [
            "?sslrootcert=system",
            "?sslrootcert=system&sslmode=verify-full",
            "?sslrootcert=system&sslmode=disable",
            "?sslmode=verify-full&application_name=a@b",
        ] {
            assert_eq!(mode(query), SslMode::Require, "{query}");
        }
        let odd = parse("postgres://u:p?w@db/name?sslmode=verify-full").unwrap();
        assert_eq!(odd.get_password(), Some(&b"p?w"[..]));
        assert_eq!(odd.get_ssl_mode(), SslMode::Require);
        for (query, said) in [
            ("sslrootcert=/ca.pem", "--ca-file"),
            ("sslmode=maybe", "sslmode"),
            ("colour=red", "colour"),
        ] {
            let error = parse(&format!("postgres://db/name?{query}")).unwrap_err();
            assert!(error.to_string().contains(said), "{error}");
        }
    }
}
