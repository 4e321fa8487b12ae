//! The node until the real one has been opened, which takes as long as its memory takes to reserve.
//!
//! It holds nothing and says so. Operators and probes hear what goes on; engines are told to come again.

use std::io::Write as _;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use kvtide_model::wire::{RefusalCode, Refused, ToEngine};

use crate::node::{
    Closed, Connection, Inspect, Inspection, Node, Pinned, Purge, Purged, Refusal, Unpinned,
};
use crate::status::{Readiness, Status};

const REASON: &str = "opening the pool";

/// See the module's documentation.
#[derive(Debug)]
pub(crate) struct Opening {
    started_unix_s: u64,
}

impl Opening {
    /// From now on.
    #[must_use]
    pub(crate) fn now() -> Self {
        let since = SystemTime::now().duration_since(UNIX_EPOCH);
        Self {
            started_unix_s: since.unwrap_or_default().as_secs(),
        }
    }
}

fn not_yet() -> Refusal {
    Refusal {
        problem: "the daemon is still opening its pool".into(),
        fix: "ask again when kvtide status says that it is ready".into(),
    }
}

impl Node for Opening {
    fn readiness(&self) -> Readiness {
        Readiness {
            ready: false,
            reasons: vec![REASON.to_owned()],
        }
    }

    fn status(&self) -> Status {
        Status {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            started_unix_s: self.started_unix_s,
            readiness: self.readiness(),
            ..Status::default()
        }
    }

    fn inspect(&self, _: &Inspect) -> Result<Inspection, Refusal> {
        Err(not_yet())
    }

    fn purge(&self, _: &Purge) -> Result<Purged, Refusal> {
        Err(not_yet())
    }

    fn pin(&self, _: &str, _: Duration) -> Result<Pinned, Refusal> {
        Err(not_yet())
    }

    fn unpin(&self, _: &str) -> Result<Unpinned, Refusal> {
        Err(not_yet())
    }

    fn attach(&self, mut connection: Connection) {
        let message = "the daemon is still opening its pool; connect again in a second";
        let mut frame = Vec::new();
        let refused = ToEngine::Refused(Refused::new(RefusalCode::CLOSING, message));
        let sent = refused
            .encode(&mut frame)
            .map_err(std::io::Error::other)
            .and_then(|()| connection.stream.write_all(&frame));
        if let Err(error) = sent {
            tracing::debug!(%error, "an engine did not wait to be refused");
        }
    }

    fn close(&self, _: Instant) -> Closed {
        Closed::default()
    }
}
