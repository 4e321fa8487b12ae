//! The commands of operators: each asks the daemon, and prints its answer.

use std::env;
use std::io::{self, IsTerminal as _, Write as _};
use std::thread::sleep;
use std::time::{SystemTime, UNIX_EPOCH};

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::{
    Asking, Failure, InspectArgs, PinArgs, PurgeArgs, SOCKET_VARIABLE, StatusArgs, UnpinArgs, What,
    socket_path,
};
use crate::ask::Ask;
use crate::node::{Inspect, Inspection, Pinned, Purge, Purged, Unpinned};
use crate::operator::Operator;
use crate::print;
use crate::status::Status;

/// Makes a terminal empty, and begins at its top.
const CLEAR: &str = "\x1b[H\x1b[2J";

fn now_unix_s() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.unwrap_or_default().as_secs()
}

/// Asks, and prints what `shown` makes of the answer, or JSON.
fn ask<T>(asking: Asking, ask: &Ask, shown: impl FnOnce(&T) -> String) -> Result<(), Failure>
where
    T: Serialize + DeserializeOwned,
{
    let path = socket_path(asking.socket, env::var_os(SOCKET_VARIABLE));
    let mut operator = Operator::connect(&path).map_err(Failure::failed)?;
    let answer: T = operator.ask(ask).map_err(Failure::failed)?;
    let text = if asking.json {
        format!("{:#}\n", json(&answer)?)
    } else {
        shown(&answer)
    };
    Ok(io::stdout().write_all(text.as_bytes())?)
}

fn json(answer: &impl Serialize) -> Result<serde_json::Value, Failure> {
    serde_json::to_value(answer).map_err(Failure::failed)
}

pub(super) fn status(args: &StatusArgs) -> Result<(), Failure> {
    let question = Ask::Status {};
    let shown = |status: &Status| print::status(status, now_unix_s());
    let Some(interval) = args.watch else {
        return ask(args.asking.clone(), &question, shown);
    };
    let path = socket_path(args.asking.socket.clone(), env::var_os(SOCKET_VARIABLE));
    let mut output = io::stdout();
    loop {
        // A connection each time: a daemon that is restarted meanwhile is found again.
        let answer = Operator::connect(&path).and_then(|mut daemon| daemon.ask(&question));
        let text = match answer {
            Ok(status) if args.asking.json => format!("{}\n", json(&status)?),
            Ok(status) => shown(&status),
            Err(error) if output.is_terminal() => format!("{error}\n"),
            Err(error) => return Err(Failure::failed(error)),
        };
        if output.is_terminal() && !args.asking.json {
            output.write_all(CLEAR.as_bytes())?;
        }
        output.write_all(text.as_bytes())?;
        output.flush()?;
        sleep(interval);
    }
}

pub(super) fn inspect(args: InspectArgs) -> Result<(), Failure> {
    let query = Inspect {
        namespace: args.namespace,
        key: args.key,
        limit: args.limit,
    };
    ask(
        args.asking,
        &Ask::Inspect { query },
        |blocks: &Inspection| print::inspection(blocks),
    )
}

pub(super) fn purge(args: PurgeArgs) -> Result<(), Failure> {
    let what = match args.what {
        What {
            namespace: Some(namespace),
            ..
        } => Purge::Namespace(namespace),
        What {
            tenant: Some(tenant),
            ..
        } => Purge::Tenant(tenant),
        What { .. } => Purge::All,
    };
    if !args.yes && !is_confirmed(&what)? {
        return Err(Failure::Failed("nothing was purged".into()));
    }
    ask(args.asking, &Ask::Purge { what }, |purged: &Purged| {
        print::purged(purged)
    })
}

/// Asks the person at the terminal. Where there is none, the command line has to say it.
fn is_confirmed(what: &Purge) -> Result<bool, Failure> {
    if !io::stdin().is_terminal() {
        let text = "nobody can be asked here whether blocks may be dropped; add --yes";
        return Err(Failure::Usage(text.into()));
    }
    let what = match what {
        Purge::Namespace(namespace) => format!("all blocks of namespace {namespace}"),
        Purge::Tenant(tenant) if tenant.is_empty() => {
            "all blocks of engines without a tenant".to_owned()
        }
        Purge::Tenant(tenant) => format!("all blocks of tenant {tenant}"),
        Purge::All => "all blocks of all namespaces".to_owned(),
    };
    let mut errors = io::stderr();
    write!(errors, "Drop {what}? [y/N] ")?;
    errors.flush()?;
    let mut answer = String::new();
    io::stdin().read_line(&mut answer)?;
    Ok(matches!(answer.trim(), "y" | "Y" | "yes"))
}

pub(super) fn pin(args: PinArgs) -> Result<(), Failure> {
    let question = Ask::Pin {
        namespace: args.namespace,
        // Rounded up: a pin that ends too early is worse than one that ends too late.
        ttl_s: args
            .ttl
            .as_millis()
            .div_ceil(1000)
            .try_into()
            .unwrap_or(u64::MAX),
    };
    ask(args.asking, &question, |pinned: &Pinned| {
        print::pinned(pinned, now_unix_s())
    })
}

pub(super) fn unpin(args: UnpinArgs) -> Result<(), Failure> {
    let question = Ask::Unpin {
        namespace: args.namespace,
    };
    ask(args.asking, &question, |unpinned: &Unpinned| {
        print::unpinned(unpinned)
    })
}
