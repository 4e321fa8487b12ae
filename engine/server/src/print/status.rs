//! `kvtide status`.

use std::fmt::Write as _;

use super::table::table;
use super::units::{plain, size, time};
use crate::status::{Namespace, Process, Session, SessionState, Status, Tenant, Tier};

/// Digits of an id that people see; commands take as many.
const ID_DIGITS: usize = 12;

/// Everything, at `now`.
#[must_use]
pub fn status(status: &Status, now_unix_s: u64) -> String {
    let mut text = head(status, now_unix_s);
    for tier in &status.tiers {
        text.push_str(&of_a_tier(tier));
    }
    if !status.namespaces.is_empty() {
        text.push('\n');
        text.push_str(&namespaces(&status.namespaces, now_unix_s));
    }
    if !status.tenants.is_empty() {
        text.push('\n');
        text.push_str(&tenants(&status.tenants));
    }
    if !status.sessions.is_empty() {
        text.push('\n');
        text.push_str(&sessions(&status.sessions, now_unix_s));
    }
    text
}

fn head(status: &Status, now_unix_s: u64) -> String {
    let readiness = &status.readiness;
    let up = time(now_unix_s.saturating_sub(status.started_unix_s));
    let ready = if readiness.ready {
        "ready"
    } else {
        "not ready"
    };
    let version = plain(&status.version);
    let mut text = format!("kvtide {version}, {ready}, up {up}");
    // Writing to a String does not fail.
    if !status.boot.is_empty() {
        let _ = write!(text, ", boot {}", short(&status.boot));
    }
    text.push('\n');
    for reason in &readiness.reasons {
        let _ = writeln!(text, "  {}", plain(reason));
    }
    text
}

fn of_a_tier(tier: &Tier) -> String {
    format!(
        "{}: {} of {} in use, {} free, in extents of {}; tables {}\n",
        plain(&tier.tier),
        size(tier.used_bytes),
        size(tier.capacity_bytes),
        size(tier.free_bytes),
        size(tier.extent_bytes),
        size(tier.index_bytes),
    )
}

fn namespaces(namespaces: &[Namespace], now_unix_s: u64) -> String {
    let row = |namespace: &Namespace| {
        let until = namespace.pinned_until_unix_s;
        let pin = until.map(|until| time(until.saturating_sub(now_unix_s)));
        vec![
            short(&namespace.namespace),
            plain(&namespace.model),
            plain(&namespace.tenant),
            size(namespace.bytes).to_string(),
            size(namespace.minimum_bytes).to_string(),
            namespace.rows.to_string(),
            namespace.held_blocks.to_string(),
            namespace.saving_blocks.to_string(),
            namespace.pinned_blocks.to_string(),
            namespace.totals.hit_blocks.to_string(),
            namespace.totals.evicted_blocks.to_string(),
            namespace.totals.damaged_blocks.to_string(),
            pin.unwrap_or_else(|| "-".to_owned()),
        ]
    };
    let head = [
        "NAMESPACE",
        "MODEL",
        "TENANT",
        "SIZE",
        "MINIMUM",
        "ROWS",
        "HELD",
        "SAVING",
        "READ",
        "HITS",
        "EVICTED",
        "DAMAGED",
        "PINNED FOR",
    ];
    let rows: Vec<_> = namespaces.iter().map(row).collect();
    table(&head, &head[3..12], &rows)
}

fn tenants(tenants: &[Tenant]) -> String {
    let row = |tenant: &Tenant| {
        let quota = tenant.quota_bytes.map(|quota| size(quota).to_string());
        vec![
            plain(&tenant.tenant),
            size(tenant.bytes).to_string(),
            quota.unwrap_or_else(|| "-".to_owned()),
            tenant.held_blocks.to_string(),
            tenant.denied_by_quota.to_string(),
            tenant.denied_by_capacity.to_string(),
        ]
    };
    let head = [
        "TENANT",
        "SIZE",
        "QUOTA",
        "HELD",
        "DENIED: QUOTA",
        "DENIED: CAPACITY",
    ];
    let rows: Vec<_> = tenants.iter().map(row).collect();
    table(&head, &head[1..], &rows)
}

fn sessions(sessions: &[Session], now_unix_s: u64) -> String {
    let row = |session: &Session| {
        vec![
            session.session.to_string(),
            plain(&session.engine_id),
            plain(&session.model),
            plain(&session.tenant),
            state(session.state).to_owned(),
            time(now_unix_s.saturating_sub(session.since_unix_s)),
            session.pinned_blocks.to_string(),
            session.saving_blocks.to_string(),
            processes(&session.processes),
        ]
    };
    let head = [
        "SESSION",
        "ENGINE",
        "MODEL",
        "TENANT",
        "STATE",
        "SINCE",
        "READING",
        "SAVING",
        "PROCESSES",
    ];
    let right = ["SESSION", "READING", "SAVING"];
    let rows: Vec<_> = sessions.iter().map(row).collect();
    table(&head, &right, &rows)
}

const fn state(state: SessionState) -> &'static str {
    match state {
        SessionState::Joining => "joining",
        SessionState::Attached => "attached",
        SessionState::Detached => "detached",
        SessionState::Unknown => "unknown",
    }
}

fn processes(processes: &[Process]) -> String {
    let one = |process: &Process| {
        let rank = process.rank.map(|rank| format!(" {rank}"));
        // The kernel has no number for a process of another container.
        let pid = match process.pid {
            0 => "pid hidden".to_owned(),
            pid => format!("pid {pid}"),
        };
        let (role, rank) = (plain(&process.role), rank.unwrap_or_default());
        format!("{role}{rank} ({pid}, uid {})", process.uid)
    };
    if processes.is_empty() {
        return "-".to_owned();
    }
    processes.iter().map(one).collect::<Vec<_>>().join(", ")
}

/// The beginning of an id.
pub(super) fn short(id: &str) -> String {
    plain(&id.chars().take(ID_DIGITS).collect::<String>())
}
