//! How many requests are answered at once, and in how much memory: for all callers, and for each.

use std::sync::Arc;

use axum::body::Body;
use axum::extract::{Extension, FromRequestParts, Request, State};
use axum::http::Method;
use axum::http::request::Parts;
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};

use crate::http::auth::Caller;
use crate::http::holding::Holding;
use crate::http::listen::Peer;
use crate::http::shares::{Full, Share, Shares, WAIT};
use crate::http::{ApiError, App, is_retry};

/// Unit of memory.
const UNIT_BYTES: u64 = 1 << 10;
/// Probes (`/readyz`, `/status`, `/metrics`) answered at once, beside all requests of tenants.
const PROBES_MAX: u32 = 32;
/// The part of the probes that one address has: who asks for metrics and does not read them shuts
/// nobody out.
const PEERS: u32 = 4;
/// The part of callers' memory that is for bodies: downloads, of which each takes megabytes, would else
/// leave none for the few hundred bytes of a create.
const BODIES_PART: u32 = 8;
/// After how many seconds a caller who was refused may come again.
const RETRY_AFTER_S: u64 = 5;

/// What all requests share.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// Connections at once.
    pub connections: usize,
    /// Memory for what is sent to this server and what it answers.
    pub memory_bytes: u64,
    /// Whether there are several tenants, of whom none may take everything.
    pub tenants: bool,
}

/// See the module's documentation.
#[derive(Debug)]
pub struct Admission {
    requests: Places,
    probes: Places,
    /// For downloads and lists.
    memory: Shares,
    /// For what callers send.
    bodies: Shares,
}

/// Places for what is answered, and for what waits for one of these: else those who wait would be as
/// many as they like.
#[derive(Debug)]
struct Places {
    running: Shares,
    waiting: Shares,
}

impl Places {
    /// So many, of which each caller has one of `parts`.
    fn new(running: u32, waiting: u32, parts: u32) -> Places {
        Places {
            running: Shares::new(running, (running / parts).max(1)),
            waiting: Shares::new(waiting, (waiting / parts).max(1)),
        }
    }

    async fn take(&self, who: &str) -> Result<Share, Full> {
        if let Ok(place) = self.running.try_take(who, 1) {
            return Ok(place);
        }
        let _waiting = self.waiting.try_take(who, 1)?;
        self.running.take(who, 1).await
    }
}

impl Admission {
    /// Within these bounds. Half of the connections may have a request that is answered, a quarter one
    /// that waits, an eighth a probe, a sixteenth one that waits: the rest is for `/healthz`, and for
    /// who has just connected.
    #[must_use]
    pub fn new(bounds: Bounds) -> Admission {
        let connections = u32::try_from(bounds.connections)
            .unwrap_or(u32::MAX)
            .max(16);
        let units = u32::try_from(bounds.memory_bytes / UNIT_BYTES).unwrap_or(u32::MAX);
        let probes = (connections / 8).min(PROBES_MAX);
        let bodies = units / BODIES_PART;
        let memory = units - bodies;
        let (parts, owners) = if bounds.tenants { (4, 2) } else { (1, 1) };
        Admission {
            requests: Places::new(connections / 2, connections / 4, parts),
            probes: Places::new(probes, probes / 2, PEERS),
            memory: Shares::new(memory, memory / owners),
            bodies: Shares::new(bodies, bodies / owners),
        }
    }

    async fn place(&self, tenant: &str) -> Result<Share, ApiError> {
        let place = self.requests.take(tenant).await;
        place.map_err(|full| refusal(full, "requests"))
    }

    /// Memory for so many bytes that are answered.
    pub(super) async fn memory(&self, caller: &Caller, bytes: u64) -> Result<Share, ApiError> {
        let share = self.memory.take(&caller.tenant, units(bytes)).await;
        share.map_err(|full| refusal(full, "downloads and lists"))
    }

    /// Memory for so many bytes that arrive.
    pub(super) async fn body(&self, caller: &Caller, bytes: u64) -> Result<Share, ApiError> {
        let share = self.bodies.take(&caller.tenant, units(bytes)).await;
        share.map_err(|full| refusal(full, "uploads"))
    }

    /// Makes the memory that an answer was thought to take what it takes.
    pub(super) async fn fit(
        &self,
        caller: &Caller,
        share: &mut Share,
        bytes: usize,
    ) -> Result<(), ApiError> {
        let needed = units(bytes as u64).min(self.memory.each());
        share.keep(needed as usize);
        let more = needed.saturating_sub(u32::try_from(share.units()).unwrap_or(u32::MAX));
        if more > 0 {
            share.merge(self.memory(caller, u64::from(more) * UNIT_BYTES).await?);
        }
        Ok(())
    }
}

fn units(bytes: u64) -> u32 {
    u32::try_from(bytes.div_ceil(UNIT_BYTES)).unwrap_or(u32::MAX)
}

fn refusal(full: Full, what: &str) -> ApiError {
    let waited = WAIT.as_secs();
    match full {
        Full::Own => ApiError::busy(format!(
            "You have too many {what} at once (waited {waited} seconds at most for one to end): send \
             fewer at a time."
        )),
        Full::All => ApiError::unavailable(format!(
            "The server has too many {what} at once (waited {waited} seconds at most for one to \
             end): try again later."
        )),
    }
    .retry_after(RETRY_AFTER_S)
}

/// Lets so many requests of a tenant through at once.
pub(super) async fn admit(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    request: Request,
    next: Next,
) -> Response {
    let creates = request.method() == Method::POST
        && request.uri().path().trim_end_matches('/') == "/v1/batches";
    let first = creates && !is_retry(request.headers());
    match app.admission.place(&caller.tenant).await {
        Ok(place) => {
            let answer = next.run(request).await;
            answer.map(|body| Body::new(Holding::new(body, place)))
        }
        Err(error) => {
            if first {
                app.refusals.note_unread(&caller.tenant);
            }
            error.into_response()
        }
    }
}

/// A place for a probe.
pub(super) struct Probe(pub(super) Share);

impl FromRequestParts<Arc<App>> for Probe {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, app: &Arc<App>) -> Result<Probe, ApiError> {
        let peer = parts.extensions.get::<Peer>();
        let peer = peer.map(|peer| peer.0.to_string()).unwrap_or_default();
        let place = app.admission.probes.take(&peer).await;
        place.map(Probe).map_err(|full| refusal(full, "probes"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn caller(tenant: &str) -> Caller {
        Caller {
            tenant: tenant.to_owned(),
            storage_bytes: None,
            admin: false,
        }
    }

    fn admission(tenants: bool) -> Admission {
        Admission::new(Bounds {
            connections: 64,
            memory_bytes: 1 << 20,
            tenants,
        })
    }

    #[tokio::test(start_paused = true)]
    async fn one_tenant_s_requests_leave_places_for_another_s() {
        let admission = admission(true);
        let mut places = Vec::new();
        while let Ok(place) = admission.requests.running.try_take("ann", 1) {
            places.push(place);
        }
        assert_eq!(places.len(), 8);
        let refused = admission.place("ann").await.unwrap_err().into_response();
        assert_eq!(refused.status(), 429);
        assert_eq!(refused.headers()["retry-after"], "5");
        admission.place("bob").await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn where_there_is_one_tenant_he_has_all_places() {
        let admission = admission(false);
        let mut places = Vec::new();
        while let Ok(place) = admission.requests.running.try_take("default", 1) {
            places.push(place);
        }
        assert_eq!(places.len(), 32);
    }

    #[tokio::test(start_paused = true)]
    async fn what_waits_is_bounded_too() {
        let admission = Arc::new(admission(true));
        let _all: Vec<_> = (0..8)
            .map(|_| admission.requests.running.try_take("ann", 1))
            .collect();
        let waiting: Vec<_> = (0..20)
            .map(|_| {
                let admission = Arc::clone(&admission);
                tokio::spawn(async move { admission.place("ann").await.is_ok() })
            })
            .collect();
        tokio::time::sleep(WAIT / 2).await;
        let refused = waiting.iter().filter(|one| one.is_finished()).count();
        assert_eq!(
            refused,
            20 - 4,
            "four wait, the others were refused at once"
        );
    }

    #[tokio::test(start_paused = true)]
    async fn memory_is_refused_when_it_is_taken_and_fits_what_is_answered() {
        let admission = admission(true);
        let ann = caller("ann");
        let mut share = admission.memory(&ann, 400 << 10).await.unwrap();
        assert!(admission.memory(&ann, 100 << 10).await.is_err());
        admission.fit(&ann, &mut share, 1000).await.unwrap();
        assert_eq!(share.units(), 1);
        // An answer that is longer than all that he may have is answered by itself.
        admission.fit(&ann, &mut share, 900 << 10).await.unwrap();
        assert_eq!(share.units(), 448);
        let _bob = admission.memory(&caller("bob"), 448 << 10).await.unwrap();
        let refused = admission.memory(&caller("cyd"), 1).await.unwrap_err();
        assert_eq!(refused.into_response().status(), 503);
    }

    #[tokio::test(start_paused = true)]
    async fn downloads_leave_memory_for_what_is_sent() {
        let admission = admission(true);
        let (ann, bob) = (caller("ann"), caller("bob"));
        let _all = [
            admission.memory(&ann, 1 << 20).await.unwrap(),
            admission.memory(&bob, 1 << 20).await.unwrap(),
        ];
        assert!(admission.memory(&ann, 1).await.is_err());
        let _body = admission.body(&ann, 1 << 20).await.unwrap();
        admission.body(&bob, 300).await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn probes_that_wait_are_bounded_and_leave_connections_for_others() {
        let admission = Arc::new(Admission::new(Bounds {
            connections: 128,
            memory_bytes: 1 << 20,
            tenants: true,
        }));
        let taking: Vec<_> = (0..128)
            .map(|n| {
                let admission = Arc::clone(&admission);
                let peer = (n % 32).to_string();
                tokio::spawn(async move {
                    let _place = admission.probes.take(&peer).await?;
                    std::future::pending::<Result<(), Full>>().await
                })
            })
            .collect();
        tokio::time::sleep(WAIT / 2).await;
        let held = taking.iter().filter(|one| !one.is_finished()).count();
        assert_eq!(held, 16 + 8, "the others were refused at once");
    }
}
