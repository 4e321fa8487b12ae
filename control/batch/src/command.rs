//! `kvtide-control batch`: without a subcommand it serves the API, with one it uses it.

use std::process::ExitCode;

use clap::Subcommand;
use kvtide_control_base::api_keys;

use crate::client::{self, Fetch, Named, Submit};
use crate::serve::{self, ServeArgs};

/// The batch API.
#[derive(Debug, clap::Args)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub struct Args {
    #[command(subcommand)]
    action: Option<Action>,
    #[command(flatten)]
    serve: ServeArgs,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Upload a file of requests and make a batch of it.
    Submit(Submit),
    /// Show a batch.
    Status(Named),
    /// Follow a batch to its end, with a progress bar.
    Watch(Named),
    /// Download the results of a batch.
    Fetch(Fetch),
    /// Cancel a batch; what is done is kept.
    Cancel(Named),
    /// Make an API key: prints the key, and the entry for the file of keys.
    Key {
        /// Whose key it is.
        tenant: String,
    },
}

/// Runs the command.
pub fn main(args: Args) -> ExitCode {
    let runtime = match tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
    {
        Ok(runtime) => runtime,
        Err(error) => {
            tracing::error!(%error, "the runtime cannot be started");
            return ExitCode::FAILURE;
        }
    };
    let Some(action) = args.action else {
        return match runtime.block_on(serve::serve(args.serve)) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                tracing::error!("{error}");
                ExitCode::FAILURE
            }
        };
    };
    let done = match action {
        Action::Key { tenant } => key(&tenant),
        Action::Submit(submit) => runtime.block_on(client::submit(submit)),
        Action::Status(named) => runtime.block_on(client::status(named)),
        Action::Watch(named) => runtime.block_on(client::watch(named)),
        Action::Fetch(fetch) => runtime.block_on(client::fetch(fetch)),
        Action::Cancel(named) => runtime.block_on(client::cancel(named)),
    };
    match done {
        Ok(code) => code,
        Err(error) => {
            client::complain(&error.to_string());
            ExitCode::FAILURE
        }
    }
}

fn key(tenant: &str) -> Result<ExitCode, client::ClientError> {
    if !api_keys::is_tenant_name(tenant) {
        return Err(client::ClientError::Wrong(
            "the tenant's name must be 1 to 128 letters, digits, '-', '_', '.' or '@'".to_owned(),
        ));
    }
    let (secret, key) = api_keys::generate(tenant)?;
    client::say(&secret)?;
    client::complain(
        "The key above is shown only now. Its entry for the file of keys, {\"keys\": [ENTRY, ...]}:",
    );
    client::complain(&serde_json::to_string(&key).map_err(client::ClientError::Json)?);
    Ok(ExitCode::SUCCESS)
}
