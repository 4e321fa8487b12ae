//! A slow background check of all rows against their checksums.
//!
//! Host memory does fail, and other processes can write what they should not; the scrub finds a
//! damaged row before a layered load, which cannot be taken back, has used it.

use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, SyncSender, sync_channel};
use std::thread::JoinHandle;
use std::time::Duration;

use super::Pool;
use super::holders::SlotHolder;

/// The thread that scrubs; it ends when this is dropped.
#[derive(Debug)]
pub struct Scrubber {
    /// Dropped first: that is what stops the thread.
    stop: Option<SyncSender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Scrubber {
    /// Scrubs `pool` at `bytes_per_second`, round and round. `None` if that is zero.
    ///
    /// # Errors
    /// When the operating system refuses another thread.
    pub fn start(pool: &Arc<Pool>, bytes_per_second: u64) -> std::io::Result<Option<Self>> {
        let row_bytes = pool.segment().geometry().row_bytes() as u64;
        let Some(rows_per_second) = bytes_per_second
            .checked_div(row_bytes.max(1))
            .filter(|_| bytes_per_second > 0)
        else {
            return Ok(None);
        };
        // One burst a tick keeps the thread asleep nearly always.
        let (rows, tick) = match rows_per_second {
            0..10 => (
                1,
                Duration::from_secs_f64(row_bytes as f64 / bytes_per_second as f64),
            ),
            _ => (rows_per_second / 10, Duration::from_millis(100)),
        };
        let (stop, stopped) = sync_channel(1);
        let weak = Arc::downgrade(pool);
        let thread = std::thread::Builder::new()
            .name("kvtide-scrub".into())
            .spawn(move || {
                let mut next = 0u32;
                while stopped.recv_timeout(tick) == Err(RecvTimeoutError::Timeout) {
                    let Some(pool) = weak.upgrade() else { return };
                    for _ in 0..rows {
                        let Some(row) = pool.next_row(next) else {
                            break;
                        };
                        scrub_row(&pool, row);
                        next = row + 1;
                    }
                }
            })?;
        Ok(Some(Self {
            stop: Some(stop),
            thread: Some(thread),
        }))
    }
}

impl Drop for Scrubber {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            // A panic of the scrub has been printed already, and nothing depends on the scrub.
            let _ = thread.join();
        }
    }
}

/// Compares a row with its checksums, if it has a block that nobody uses.
pub(crate) fn scrub_row(pool: &Pool, row: u32) {
    let catalogue = pool.catalogue();
    let Some(sealed) = catalogue.slots.evictable(row) else {
        return;
    };
    let Some(slot) = catalogue.slots.hold(row, SlotHolder::SCRUB) else {
        return;
    };
    let intact = slot != sealed.slot_ref() || catalogue.bytes_match(slot);
    if intact {
        catalogue.note_proven(row);
    }
    catalogue.slots.let_go(row, SlotHolder::SCRUB);
    pool.note_scrubbed();
    if !intact {
        pool.drop_if_unused(sealed);
    }
}
