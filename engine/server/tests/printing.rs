//! What people read, to the letter.

mod common;

use common::{LLAMA, STARTED, block, busy};
use kvtide_server::node::{Inspection, Pinned, Purged, Unpinned};
use kvtide_server::print;
use kvtide_server::status::{Readiness, Status};

#[test]
fn the_status_of_a_busy_daemon() {
    let text = print::status(&busy(), STARTED + 11_525);
    let expected = "\
kvtide 0.1.0, ready, up 3 h 12 min, boot feedfacecafe
host: 32.2 GiB of 64.0 GiB in use, 31.7 GiB free, in extents of 256.0 MiB; tables 3.0 MiB

NAMESPACE     MODEL                    TENANT       SIZE  MINIMUM   ROWS   HELD  SAVING  READ    HITS  EVICTED  DAMAGED  PINNED FOR
8f3a11c0d4e5  meta-llama/Llama-3.1-8B  team-a   32.0 GiB  4.0 GiB  16384  16000       3    12  123456     4000        0  1 h
0c0ffee0d4e5  Qwen?[2J                 -       256.0 MiB      0 B      0      0       0     0       0        0        0  -

TENANT       SIZE     QUOTA   HELD  DENIED: QUOTA  DENIED: CAPACITY
-       256.0 MiB         -      0              0                 0
team-a   32.0 GiB  32.0 GiB  16000              7                 0

SESSION  ENGINE    MODEL                    TENANT  STATE     SINCE       READING  SAVING  PROCESSES
      0  engine-a  meta-llama/Llama-3.1-8B  team-a  attached  3 h 11 min       12       3  scheduler (pid 4711, uid 1000), worker 0 (pid 4712, uid 1000)
      1  engine-b  Qwen?[2J                 -       joining   5 s               0       0  worker 0 (pid hidden, uid 1000)
";
    assert_eq!(text, expected);
}

#[test]
fn the_status_of_a_daemon_that_is_starting() {
    let status = Status {
        version: "0.1.0".to_owned(),
        started_unix_s: STARTED,
        readiness: Readiness {
            ready: false,
            reasons: vec!["reserving memory: 12 of 64 GiB".to_owned()],
        },
        ..Status::default()
    };
    assert_eq!(
        print::status(&status, STARTED + 5),
        "kvtide 0.1.0, not ready, up 5 s\n  reserving memory: 12 of 64 GiB\n"
    );
}

#[test]
fn blocks_are_listed_and_the_rest_is_counted() {
    let inspection = Inspection {
        blocks: vec![block(7), block(4711)],
        more: 3,
    };
    let expected = "\
KEY                               NAMESPACE     TIER  STATE  SLOT  GENERATION  READERS     SIZE
00000000000000000000000000000007  8f3a11c0d4e5  host  held      7           2        1  2.0 MiB
00000000000000000000000000001267  8f3a11c0d4e5  host  held   4711           2        1  2.0 MiB
and 3 more; --limit shows up to 10000
";
    assert_eq!(print::inspection(&inspection), expected);
    assert_eq!(
        print::inspection(&Inspection::default()),
        "no such blocks\n"
    );
}

#[test]
fn what_was_changed_is_told_in_a_sentence() {
    let purged = Purged {
        blocks: 16_000,
        bytes: 4 << 30,
        later_blocks: 0,
    };
    assert_eq!(print::purged(&purged), "purged 16000 blocks, 4.0 GiB\n");
    let purged = Purged {
        later_blocks: 12,
        ..purged
    };
    assert_eq!(
        print::purged(&purged),
        "purged 16000 blocks, 4.0 GiB\n12 of them are being read or saved; nobody finds them any more, \
         and their memory is free when that has ended\n"
    );
    let pinned = Pinned {
        namespace: LLAMA.to_owned(),
        blocks: 16_000,
        bytes: 4 << 30,
        until_unix_s: STARTED + 5400,
    };
    assert_eq!(
        print::pinned(&pinned, STARTED),
        "pinned 8f3a11c0d4e5 for 1 h 30 min: 16000 blocks, 4.0 GiB\n"
    );
    let unpinned = |was_pinned| Unpinned {
        namespace: LLAMA.to_owned(),
        was_pinned,
    };
    assert_eq!(print::unpinned(&unpinned(true)), "unpinned 8f3a11c0d4e5\n");
    assert_eq!(
        print::unpinned(&unpinned(false)),
        "8f3a11c0d4e5 was not pinned\n"
    );
}
