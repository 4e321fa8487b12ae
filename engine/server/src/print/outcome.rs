//! What commands that change something have done.

use super::status::short;
use super::units::{size, time};
use crate::node::{Pinned, Purged, Unpinned};

/// `kvtide purge`.
#[must_use]
pub fn purged(purged: &Purged) -> String {
    let Purged {
        blocks,
        bytes,
        later_blocks,
    } = *purged;
    let text = format!("purged {blocks} blocks, {}\n", size(bytes));
    if later_blocks == 0 {
        return text;
    }
    format!(
        "{text}{later_blocks} of them are being read or saved; nobody finds them any more, and their \
         memory is free when that has ended\n"
    )
}

/// `kvtide pin`.
#[must_use]
pub fn pinned(pinned: &Pinned, now_unix_s: u64) -> String {
    format!(
        "pinned {} for {}: {} blocks, {}\n",
        short(&pinned.namespace),
        time(pinned.until_unix_s.saturating_sub(now_unix_s)),
        pinned.blocks,
        size(pinned.bytes)
    )
}

/// `kvtide unpin`.
#[must_use]
pub fn unpinned(unpinned: &Unpinned) -> String {
    let namespace = short(&unpinned.namespace);
    if unpinned.was_pinned {
        format!("unpinned {namespace}\n")
    } else {
        format!("{namespace} was not pinned\n")
    }
}
