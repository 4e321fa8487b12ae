//! A tenant's quota while an upload arrives.

use crate::error::Failure;
use crate::http::App;
use crate::http::auth::Caller;
use crate::http::reserve::Reservation;

/// Bytes of an upload after which the quota is looked up again: others are entered meanwhile.
const CHECKED_EVERY: u64 = 1 << 20;

/// What is left of the caller's quota for files that are under way.
pub(super) struct Quota<'a> {
    app: &'a App,
    caller: &'a Caller,
    bytes: u64,
    /// What the database knew when it was last asked.
    stored: u64,
    /// Bytes that may arrive before it is asked again.
    good_for: u64,
    pub(super) reservation: Reservation,
}

impl<'a> Quota<'a> {
    /// None where the caller may store as much as there is room for.
    pub(super) async fn of(app: &'a App, caller: &'a Caller) -> Result<Option<Quota<'a>>, Failure> {
        let Some(bytes) = app.quota_bytes(caller) else {
            return Ok(None);
        };
        let mut quota = Quota {
            app,
            caller,
            bytes,
            stored: 0,
            good_for: 0,
            reservation: app.reservations.begin(&caller.tenant),
        };
        quota.look().await?;
        Ok(Some(quota))
    }

    async fn look(&mut self) -> Result<(), Failure> {
        self.stored = self.app.metadata.stored_bytes(&self.caller.tenant).await?;
        self.good_for = CHECKED_EVERY;
        Ok(())
    }

    /// So many bytes have arrived.
    pub(super) async fn take(&mut self, bytes: u64) -> Result<(), Failure> {
        let mut fresh = self.good_for < bytes;
        if fresh {
            self.look().await?;
        }
        loop {
            let left = self.bytes.saturating_sub(self.stored);
            if self.reservation.grow(bytes, left) {
                self.good_for = self.good_for.saturating_sub(bytes);
                return Ok(());
            }
            if fresh {
                return Err(Failure::Quota {
                    quota_bytes: self.bytes,
                });
            }
            self.look().await?;
            fresh = true;
        }
    }
}
