//! Prometheus' page, made of the daemon's status at the moment of the scrape.
//!
//! A page of its own each time: what is gone (a session, a namespace) is gone from the page as well.

use metrics::with_local_recorder;
use metrics_exporter_prometheus::PrometheusBuilder;

use crate::status::{Namespace, Session, Status, Tier, Totals};
use crate::tally::{Tally, Turned};

/// The page.
#[must_use]
pub fn render(status: &Status, tally: &Tally) -> String {
    let recorder = PrometheusBuilder::new().build_recorder();
    let page = recorder.handle();
    with_local_recorder(&recorder, || {
        of_the_daemon(status, tally);
        status.tiers.iter().for_each(of_a_tier);
        status.namespaces.iter().for_each(of_a_namespace);
        status.sessions.iter().for_each(of_a_session);
    });
    page.render()
}

fn of_the_daemon(status: &Status, tally: &Tally) {
    let version = status.version.clone();
    metrics::gauge!("kvtide_serve_info", "version" => version, "boot" => status.boot.clone())
        .set(1);
    metrics::gauge!("kvtide_serve_ready").set(u8::from(status.readiness.ready));
    metrics::gauge!("kvtide_serve_start_time_seconds").set(exact(status.started_unix_s));
    metrics::gauge!("kvtide_serve_sessions").set(exact(status.sessions.len() as u64));
    metrics::counter!("kvtide_serve_connections_total").absolute(tally.connections());
    metrics::counter!("kvtide_serve_asks_total").absolute(tally.asks());
    for why in Turned::ALL {
        metrics::counter!("kvtide_serve_refused_connections_total", "reason" => why.label())
            .absolute(tally.turned(why));
    }
}

fn of_a_tier(tier: &Tier) {
    let of = || [("tier", tier.tier.clone())];
    metrics::gauge!("kvtide_serve_capacity_bytes", &of()).set(exact(tier.capacity_bytes));
    metrics::gauge!("kvtide_serve_used_bytes", &of()).set(exact(tier.used_bytes));
    metrics::gauge!("kvtide_serve_free_bytes", &of()).set(exact(tier.free_bytes));
    metrics::gauge!("kvtide_serve_index_bytes", &of()).set(exact(tier.index_bytes));
}

fn of_a_namespace(namespace: &Namespace) {
    let of = || {
        [
            ("namespace", namespace.namespace.clone()),
            ("model", namespace.model.clone()),
        ]
    };
    metrics::gauge!("kvtide_serve_namespace_rows", &of()).set(exact(namespace.rows));
    metrics::gauge!("kvtide_serve_namespace_free_rows", &of()).set(exact(namespace.free_rows));
    metrics::gauge!("kvtide_serve_namespace_bytes", &of()).set(exact(namespace.bytes));
    metrics::gauge!("kvtide_serve_namespace_minimum_bytes", &of())
        .set(exact(namespace.minimum_bytes));
    metrics::gauge!("kvtide_serve_namespace_held_blocks", &of()).set(exact(namespace.held_blocks));
    metrics::gauge!("kvtide_serve_namespace_saving_blocks", &of())
        .set(exact(namespace.saving_blocks));
    metrics::gauge!("kvtide_serve_namespace_pinned_blocks", &of())
        .set(exact(namespace.pinned_blocks));
    let is_pinned = u8::from(namespace.pinned_until_unix_s.is_some());
    metrics::gauge!("kvtide_serve_namespace_pinned", &of()).set(is_pinned);
    let Totals {
        hit_blocks,
        saved_blocks,
        failed_blocks,
        throttled_blocks,
        evicted_blocks,
        damaged_blocks,
        scrubbed_blocks,
    } = namespace.totals;
    metrics::counter!("kvtide_serve_hit_blocks_total", &of()).absolute(hit_blocks);
    metrics::counter!("kvtide_serve_saved_blocks_total", &of()).absolute(saved_blocks);
    metrics::counter!("kvtide_serve_failed_blocks_total", &of()).absolute(failed_blocks);
    metrics::counter!("kvtide_serve_throttled_blocks_total", &of()).absolute(throttled_blocks);
    metrics::counter!("kvtide_serve_evicted_blocks_total", &of()).absolute(evicted_blocks);
    metrics::counter!("kvtide_serve_damaged_blocks_total", &of()).absolute(damaged_blocks);
    metrics::counter!("kvtide_serve_scrubbed_blocks_total", &of()).absolute(scrubbed_blocks);
}

fn of_a_session(session: &Session) {
    let of = || {
        [
            ("session", session.session.to_string()),
            ("engine_id", session.engine_id.clone()),
            ("model", session.model.clone()),
            ("tenant", session.tenant.clone()),
        ]
    };
    metrics::gauge!("kvtide_serve_session_processes", &of())
        .set(exact(session.processes.len() as u64));
    metrics::gauge!("kvtide_serve_session_pinned_blocks", &of()).set(exact(session.pinned_blocks));
    metrics::gauge!("kvtide_serve_session_saving_blocks", &of()).set(exact(session.saving_blocks));
}

/// Prometheus counts in floating point: beyond 2^53, to the nearest that there is.
#[expect(
    clippy::cast_precision_loss,
    reason = "no count and no number of bytes comes near 2^53"
)]
fn exact(number: u64) -> f64 {
    number as f64
}
