//! What the service manager is told (sd_notify(3)). Without one, nothing.

use std::time::Duration;

use sd_notify::NotifyState;

/// The daemon serves engines.
pub(crate) fn ready(status: &str) {
    tell(&[NotifyState::Ready, NotifyState::Status(status)]);
}

/// What the daemon does at the moment, for `systemctl status`.
pub(crate) fn status(status: &str) {
    tell(&[NotifyState::Status(status)]);
}

/// A start goes on, and may take this long from now: reserving much memory takes minutes.
pub(crate) fn still_starting(status: &str, patience: Duration) {
    tell(&[NotifyState::Status(status), extended(patience)]);
}

/// The daemon stops, which may take this long.
pub(crate) fn stopping(patience: Duration) {
    tell(&[
        NotifyState::Stopping,
        NotifyState::Status("stopping"),
        extended(patience),
    ]);
}

fn extended(patience: Duration) -> NotifyState<'static> {
    let microseconds = u32::try_from(patience.as_micros()).unwrap_or(u32::MAX);
    NotifyState::ExtendTimeoutUsec(microseconds)
}

fn tell(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        tracing::debug!(%error, "the service manager cannot be told");
    }
}
