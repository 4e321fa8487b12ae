//! Lanes before an upstream that is played, in time that passes by itself.

use std::collections::HashMap;

use proptest::prelude::*;
use tokio::task::JoinSet;

use super::*;
use crate::endpoint::Endpoint;
use crate::input::{Rules, Scan, scan};
use crate::run::pace::{Absence, PaceOptions, Paces};

const SECOND: Duration = Duration::from_secs(1);
const ATTEMPTS: u32 = 5;
const NOBODY: Verdict = Verdict::Absent(Absence::Unavailable);
const REFUSED: Verdict = Verdict::Absent(Absence::Refused);
const REFUSED_FOR: Duration = Duration::from_secs(900);

fn paces() -> Paces {
    paces_up_to(256)
}

fn paces_up_to(most: usize) -> Paces {
    let options = PaceOptions {
        initial: 4,
        most,
        latency_tolerance: 1.07,
        refused_for: REFUSED_FOR,
    };
    Paces::new(options, 1024)
}

/// So many requests, numbered from 1.
fn entries(count: usize) -> Vec<Entry> {
    let lines: String = (0..count)
        .map(|n| {
            format!(
                "{{\"custom_id\":\"{n}\",\"method\":\"POST\",\"url\":\"/v1/completions\",\
                 \"body\":{{\"model\":\"m\"}}}}\n"
            )
        })
        .collect();
    let rules = Rules {
        endpoint: Endpoint::Completions,
        mixed_models: false,
    };
    match scan(lines.as_bytes(), rules, || true).unwrap() {
        Scan::Good(index) => index.entries,
        Scan::Bad(errors) => panic!("{errors:?}"),
    }
}

/// How the upstream takes a request of this number, so long after the beginning.
type Play = fn(u32, Duration) -> (Duration, Verdict);

#[derive(Debug, Default)]
struct Log {
    /// Results: how each request ended, and when.
    results: HashMap<u32, (Verdict, Duration)>,
    attempts: HashMap<u32, usize>,
}

impl Log {
    fn attempts(&self) -> usize {
        self.attempts.values().sum()
    }

    /// When the last of those that ended like this had its result.
    fn last(&self, verdict: Verdict) -> Option<Duration> {
        let of_these = self.results.values().filter(|(how, _)| *how == verdict);
        of_these.map(|(_, at)| *at).max()
    }

    fn count(&self, verdict: Verdict) -> usize {
        let of_these = self.results.values().filter(|(how, _)| *how == verdict);
        of_these.count()
    }
}

/// Lets a tenant's batch run for as long as it takes, or for so long.
async fn fly(paces: &Paces, tenant: &str, count: usize, play: Play, at_most: Duration) -> Log {
    let failed = HashMap::new();
    fly_on(paces, tenant, count, failed, play, at_most).await.0
}

/// The same for one of which some requests have failed before; tells those that then have.
async fn fly_on(
    paces: &Paces,
    tenant: &str,
    count: usize,
    failed: HashMap<u32, Failures>,
    play: Play,
    at_most: Duration,
) -> (Log, HashMap<u32, Failures>) {
    let policy = RetryPolicy {
        attempts_max: ATTEMPTS,
        backoff: Duration::from_millis(500),
    };
    let pace = paces.of("m", tenant);
    let lane = Arc::new(Lane::new(pace, entries(count), failed, policy));
    let log = Arc::new(Mutex::new(Log::default()));
    let began = Instant::now();
    let flying = async {
        let mut sent = JoinSet::new();
        while lane.has_more().await {
            let Some((sending, turn)) = lane.take().await else {
                continue;
            };
            let (lane, log) = (Arc::clone(&lane), Arc::clone(&log));
            sent.spawn(async move {
                let line = sending.entry.line;
                let (takes, verdict) = play(line, began.elapsed());
                tokio::time::sleep(takes).await;
                let report = Report {
                    verdict,
                    asked: None,
                    usage: Usage::default(),
                };
                let step = lane.end(&sending, turn, &report, 128, String::new);
                let mut log = log.lock().unwrap();
                *log.attempts.entry(line).or_default() += 1;
                if step == Step::Result {
                    let ended = (verdict, began.elapsed());
                    assert!(log.results.insert(line, ended).is_none(), "one result");
                }
            });
        }
        while let Some(ended) = sent.join_next().await {
            ended.unwrap();
        }
    };
    tokio::time::timeout(at_most, flying).await.ok();
    let log = std::mem::take(&mut *log.lock().unwrap());
    (log, lane.failures())
}

/// Time that passes by itself.
fn in_virtual_time<T>(test: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build();
    runtime.unwrap().block_on(test)
}

const DAY: Duration = Duration::from_secs(86_400);
const QUICK: Duration = Duration::from_millis(10);

#[test]
fn one_request_that_is_never_answered_ends_after_its_attempts() {
    for play in [
        (|line, _| (QUICK, if line == 7 { NOBODY } else { Verdict::Success })) as Play,
        // A gateway that waits a minute before it gives up.
        |line, _| match line {
            7 => (60 * SECOND, NOBODY),
            _ => (QUICK, Verdict::Success),
        },
    ] {
        let log = in_virtual_time(fly(&paces(), "a", 501, play, DAY));
        assert_eq!((log.count(Verdict::Success), log.count(NOBODY)), (500, 1));
        assert_eq!(log.attempts[&7], ATTEMPTS as usize);
        assert!(log.last(Verdict::Success).unwrap() < 10 * SECOND);
        assert!(log.last(NOBODY).unwrap() < 330 * SECOND);
        assert!(
            log.attempts() <= 501 + 2 * ATTEMPTS as usize,
            "few are asked twice"
        );
    }
}

#[test]
fn many_that_are_never_answered_hold_up_nothing_wherever_they_stand() {
    for play in [
        (|line, _| (QUICK, if line <= 30 { NOBODY } else { Verdict::Success })) as Play,
        |line, _| {
            (
                QUICK,
                if line % 8 == 0 {
                    NOBODY
                } else {
                    Verdict::Success
                },
            )
        },
        |line, _| (QUICK, if line > 210 { NOBODY } else { Verdict::Success }),
    ] {
        let log = in_virtual_time(fly(&paces(), "a", 240, play, DAY));
        assert_eq!(log.results.len(), 240);
        assert!(log.last(Verdict::Success).unwrap() < 15 * SECOND, "{log:?}");
        assert!(log.last(NOBODY).unwrap() < 40 * SECOND, "{log:?}");
    }
}

#[test]
fn a_model_that_is_down_costs_no_attempts_and_its_batch_waits() {
    for verdict in [NOBODY, Verdict::Overloaded] {
        let play = match verdict {
            NOBODY => |_, _| (QUICK, NOBODY),
            _ => (|_, _| (QUICK, Verdict::Overloaded)) as Play,
        };
        let log = in_virtual_time(fly(&paces(), "a", 100, play, DAY / 2));
        assert!(log.results.is_empty());
        assert!(log.attempts() < 6000, "{}", log.attempts());
    }
}

#[test]
fn a_model_that_is_away_for_a_while_costs_no_request_its_result() {
    // In the beginning, in the middle, and when only a few are left.
    for count in [3, 50, 400, 3000] {
        let play: Play = |_, at| match at {
            at if at > SECOND / 2 && at < 1800 * SECOND => (QUICK, NOBODY),
            _ => (SECOND, Verdict::Success),
        };
        let log = in_virtual_time(fly(&paces(), "a", count, play, DAY));
        assert_eq!(log.count(Verdict::Success), count);
        let play: Play = |_, at| match at {
            at if at > 20 * SECOND && at < 1800 * SECOND => (QUICK, NOBODY),
            _ => (SECOND, Verdict::Success),
        };
        let log = in_virtual_time(fly(&paces(), "a", count, play, DAY));
        assert_eq!(log.count(Verdict::Success), count);
    }
}

#[test]
fn the_last_requests_of_a_batch_outlast_an_upstream_that_goes_away_and_comes_back() {
    // All but ten are answered when it goes.
    let play: Play = |line, at| match at {
        at if at > 8 * SECOND && at < 3600 * SECOND => (QUICK, NOBODY),
        _ if line > 190 && at < 4000 * SECOND => (SECOND, Verdict::Transient),
        _ => (SECOND, Verdict::Success),
    };
    let log = in_virtual_time(fly(&paces(), "a", 200, play, DAY));
    assert_eq!(log.results.len(), 200);
    let early = log
        .results
        .values()
        .filter(|(how, at)| *how != Verdict::Success && *at < 3600 * SECOND);
    assert_eq!(early.count(), 0, "{log:?}");
}

#[test]
fn a_batch_that_is_stopped_again_and_again_ends_all_the_same() {
    let play: Play = |line, _| (QUICK, if line == 7 { NOBODY } else { Verdict::Success });
    in_virtual_time(async {
        let paces = paces();
        let mut failed = HashMap::new();
        for stint in 0.. {
            assert!(stint < 10, "it begins anew each time");
            let fly = fly_on(&paces, "a", 20, failed, play, 3 * SECOND);
            let (log, left) = fly.await;
            failed = left;
            if log.count(NOBODY) == 1 {
                break;
            }
        }
    });
}

#[test]
fn a_wrong_key_is_waited_for_and_mended_in_time_costs_nothing() {
    let mended: Play = |_, at| match at {
        at if at < 600 * SECOND => (QUICK, REFUSED),
        _ => (QUICK, Verdict::Success),
    };
    let log = in_virtual_time(fly(&paces(), "a", 300, mended, DAY));
    assert_eq!(log.count(Verdict::Success), 300);
    assert!(log.attempts() < 500);
    let never: Play = |_, _| (QUICK, REFUSED);
    let log = in_virtual_time(fly(&paces(), "a", 300, never, DAY));
    assert_eq!(log.count(REFUSED), 300);
    let ends: Vec<Duration> = log.results.values().map(|(_, at)| *at).collect();
    assert!(*ends.iter().min().unwrap() >= REFUSED_FOR);
    assert!(*ends.iter().max().unwrap() < REFUSED_FOR + 60 * SECOND);
}

#[test]
fn an_outage_after_a_refusal_is_waited_for_as_any_other() {
    // The key is changed, then the gateway goes, and comes back before the key is known everywhere.
    let play: Play = |_, at| match at {
        at if at < QUICK => (QUICK, REFUSED),
        at if at < 1200 * SECOND => (QUICK, NOBODY),
        at if at < 1220 * SECOND => (QUICK, REFUSED),
        _ => (QUICK, Verdict::Success),
    };
    let log = in_virtual_time(fly(&paces(), "a", 100, play, DAY));
    assert_eq!(log.count(Verdict::Success), 100);
    assert!(log.attempts() < 500, "{}", log.attempts());
}

#[test]
fn an_outage_after_a_key_was_given_up_is_waited_for() {
    let play: Play = |_, at| match at {
        at if at < REFUSED_FOR + 10 * SECOND => (SECOND, REFUSED),
        at if at < 3600 * SECOND => (QUICK, NOBODY),
        _ => (QUICK, Verdict::Success),
    };
    let log = in_virtual_time(fly(&paces(), "a", 100, play, DAY));
    assert!(log.count(Verdict::Success) > 50, "{log:?}");
    assert_eq!(log.count(Verdict::Success) + log.count(REFUSED), 100);
    assert!(log.attempts() < 1000, "{}", log.attempts());
}

#[test]
fn one_request_that_always_gets_429_slows_its_tenant_s_other_batches_only_at_first() {
    let well: Play = |_, _| (SECOND, Verdict::Success);
    let sick: Play = |_, _| (QUICK, Verdict::Overloaded);
    let usual = in_virtual_time(fly(&paces_up_to(8), "a", 200, well, DAY));
    let (beside, one) = in_virtual_time(async {
        let paces = paces_up_to(8);
        tokio::join!(
            fly(&paces, "a", 200, well, DAY),
            fly(&paces, "a", 1, sick, 600 * SECOND)
        )
    });
    let (usual, beside) = (usual.last(Verdict::Success), beside.last(Verdict::Success));
    assert!(
        beside.unwrap() < usual.unwrap() * 3 / 2,
        "{beside:?}, {usual:?}"
    );
    assert!(
        one.results.is_empty(),
        "it is sent again until its window ends"
    );
    assert!(one.attempts() < 60, "ever less often: {}", one.attempts());
}

#[test]
fn a_model_that_answers_429_to_all_but_for_a_while_is_asked_ever_less_often_in_between() {
    let play: Play = |_, at| match at.as_secs() % 600 {
        0..60 => (SECOND, Verdict::Success),
        _ => (QUICK, Verdict::Overloaded),
    };
    let log = in_virtual_time(fly(&paces_up_to(8), "a", 2000, play, DAY));
    assert_eq!(log.count(Verdict::Success), 2000);
    let windows = log.last(Verdict::Success).unwrap().as_secs() / 600 + 1;
    let in_vain = log.attempts() as u64 - 2000;
    assert!(in_vain < windows * 60, "{in_vain} in {windows} windows");
}

#[test]
fn one_request_that_is_refused_among_others_that_are_answered_ends_after_its_attempts() {
    let play: Play = |line, _| (QUICK, if line == 7 { REFUSED } else { Verdict::Success });
    let log = in_virtual_time(fly(&paces(), "a", 100, play, DAY));
    assert_eq!((log.count(Verdict::Success), log.count(REFUSED)), (99, 1));
    assert!(log.last(REFUSED).unwrap() < 20 * SECOND);
}

#[test]
fn a_tenant_s_sick_requests_hold_up_no_other_tenant() {
    let sick: Play = |_, _| (QUICK, NOBODY);
    let well: Play = |_, _| (QUICK, Verdict::Success);
    in_virtual_time(async {
        let paces = paces();
        let (a, b) = tokio::join!(fly(&paces, "a", 20, sick, 600 * SECOND), async {
            tokio::time::sleep(SECOND).await;
            fly(&paces, "b", 200, well, DAY).await
        });
        assert_eq!(b.count(Verdict::Success), 200);
        assert!(b.last(Verdict::Success).unwrap() < 2 * SECOND, "{b:?}");
        assert!(a.results.len() <= 20);
    });
}

#[test]
fn a_request_that_is_alone_with_its_tenant_ends_once_others_of_the_model_are_answered() {
    let sick: Play = |_, _| (QUICK, NOBODY);
    let well: Play = |_, _| (SECOND, Verdict::Success);
    in_virtual_time(async {
        let paces = paces();
        let (a, _) = tokio::join!(
            fly(&paces, "a", 1, sick, DAY),
            fly(&paces, "b", 5000, well, DAY)
        );
        assert!(a.last(NOBODY).unwrap() < 60 * SECOND, "{a:?}");
        assert!(a.attempts() >= ATTEMPTS as usize, "{a:?}");
    });
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whichever requests are sick: all others are answered soon, and all have one result in the end.
    #[test]
    fn whoever_is_sick_all_others_are_answered(
        sick in proptest::collection::hash_set(1u32..300, 0..150),
        takes_ms in 1u64..2000,
    ) {
        thread_local! {
            static SICK: std::cell::RefCell<(std::collections::HashSet<u32>, u64)> =
                std::cell::RefCell::default();
        }
        let count = 300;
        let expected = sick.len();
        SICK.set((sick, takes_ms));
        let play: Play = |line, _| SICK.with_borrow(|(sick, takes_ms)| {
            let takes = Duration::from_millis(*takes_ms);
            (takes, if sick.contains(&line) { NOBODY } else { Verdict::Success })
        });
        let log = in_virtual_time(fly(&paces(), "a", count, play, DAY));
        prop_assert_eq!(log.count(NOBODY), expected);
        prop_assert_eq!(log.count(Verdict::Success), count - expected);
        let bound = 60 * SECOND + Duration::from_millis(takes_ms) * 300;
        prop_assert!(log.last(Verdict::Success) < Some(bound), "{:?}", log.last(Verdict::Success));
    }
}
