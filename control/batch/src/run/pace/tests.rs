use super::*;

const SECOND: Duration = Duration::from_secs(1);
const UNAVAILABLE: Verdict = Verdict::Absent(Absence::Unavailable);
const REFUSED: Verdict = Verdict::Absent(Absence::Refused);
/// Failures in a row after which a model counts as down.
const DOWN_AFTER: usize = 8;

fn paces(initial: usize, most: usize) -> Paces {
    let options = PaceOptions {
        initial,
        most,
        latency_tolerance: 1.3,
        refused_for: 60 * SECOND,
    };
    Paces::new(options, 1024)
}

fn limits(pace: &Pace) -> (usize, usize) {
    (pace.gate.limit(), pace.engine.gate.limit())
}

fn end(turn: Turn, verdict: Verdict, asked: Option<Duration>) -> Option<Duration> {
    turn.end(verdict, Against::Upstream, asked, &Usage::default())
}

async fn window(pace: &Arc<Pace>, count: usize, verdict: Verdict, took: Duration) {
    let mut turns = Vec::new();
    for _ in 0..count {
        turns.push(pace.turn().await);
    }
    tokio::time::advance(took).await;
    for turn in turns {
        end(turn, verdict, None);
    }
}

#[tokio::test(start_paused = true)]
async fn a_pause_is_told_once_when_it_begins() {
    let pace = paces(16, 16).of("m", "a");
    let mut turns = Vec::new();
    for _ in 0..16 {
        turns.push(pace.turn().await);
    }
    tokio::time::advance(SECOND).await;
    let told = turns
        .drain(..)
        .map(|turn| end(turn, UNAVAILABLE, None).is_some());
    let told: Vec<bool> = told.collect();
    assert!(
        (0..16).all(|n| told[n] == (n == DOWN_AFTER - 1)),
        "{told:?}"
    );
    assert!(end(pace.turn().await, UNAVAILABLE, None).is_some());
}

#[tokio::test(start_paused = true)]
async fn while_a_model_is_down_one_at_a_time_asks_and_an_answer_ends_the_pause() {
    let paces = paces(16, 16);
    let pace = paces.of("m", "a");
    window(&pace, DOWN_AFTER, UNAVAILABLE, SECOND).await;
    let probe = pace.turn().await;
    let waiting = tokio::spawn({
        let pace = Arc::clone(&pace);
        async move { drop(pace.turn().await) }
    });
    tokio::time::sleep(100 * SECOND).await;
    assert!(!waiting.is_finished());
    let standing = Standing {
        model: "m".to_owned(),
        condition: Some(Condition::Unavailable),
        tenants: 1,
        in_flight: 1,
        to_repeat: 0,
        paused_for_s: None,
    };
    assert_eq!(paces.standings(), [standing]);
    end(probe, Verdict::Success, None);
    waiting.await.unwrap();
    assert_eq!((pace.is_down(), pace.condition()), (false, None));
    for _ in 0..4 {
        window(&pace, 1, Verdict::Success, SECOND).await;
    }
    assert!(limits(&pace).0 >= 4, "it grows as quickly as at first");
}

#[tokio::test(start_paused = true)]
async fn an_answer_to_what_was_sent_before_ends_the_pause_at_once() {
    let pace = paces(16, 16).of("m", "a");
    let late = pace.turn().await;
    window(&pace, DOWN_AFTER, UNAVAILABLE, SECOND).await;
    let waiting = tokio::spawn({
        let pace = Arc::clone(&pace);
        async move { drop(pace.turn().await) }
    });
    tokio::task::yield_now().await;
    let began = Instant::now();
    end(late, Verdict::Success, None);
    waiting.await.unwrap();
    assert_eq!(began.elapsed(), Duration::ZERO);
}

#[tokio::test(start_paused = true)]
async fn what_goes_wrong_for_one_tenant_holds_up_no_other() {
    for verdict in [
        UNAVAILABLE,
        REFUSED,
        Verdict::Transient,
        Verdict::Overloaded,
    ] {
        let paces = paces(8, 8);
        let (sick, other) = (paces.of("m", "a"), paces.of("m", "b"));
        for _ in 0..40 {
            let turn = sick.turn().await;
            tokio::time::advance(SECOND).await;
            end(turn, verdict, Some(600 * SECOND));
            if sick.paused_for().is_some() {
                break;
            }
        }
        assert!(limits(&sick).0 < 8, "{verdict:?}");
        assert_eq!(limits(&other), (8, 8), "{verdict:?}");
        let began = Instant::now();
        window(&other, 8, Verdict::Success, SECOND).await;
        assert_eq!(began.elapsed(), SECOND, "{verdict:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn what_is_known_to_fail_slows_nobody_down() {
    let pace = paces(8, 8).of("m", "a");
    for verdict in [UNAVAILABLE, REFUSED, Verdict::Transient] {
        for _ in 0..40 {
            let turn = pace.turn().await;
            let ended = turn.end(verdict, Against::Request, Some(SECOND), &Usage::default());
            assert_eq!(ended, None);
        }
    }
    assert_eq!(limits(&pace), (8, 8));
    assert!(pace.paused_for().is_none());
}

#[tokio::test(start_paused = true)]
async fn one_503_that_asks_for_a_long_pause_pauses_nobody() {
    let pace = paces(8, 8).of("m", "a");
    let turn = pace.turn().await;
    let ended = end(turn, UNAVAILABLE, Some(600 * SECOND));
    assert_eq!(ended, None);
    assert!(pace.paused_for().is_none());
}

#[tokio::test(start_paused = true)]
async fn a_steady_429_that_does_not_say_how_long_is_asked_ever_less_often() {
    let pace = paces(8, 8).of("m", "a");
    let began = Instant::now();
    let mut attempts = 0;
    while began.elapsed() < 3600 * SECOND {
        end(pace.turn().await, Verdict::Overloaded, None);
        attempts += 1;
    }
    assert!(attempts < 300, "{attempts}");
    assert_eq!(pace.condition(), Some(Condition::RateLimited));
    end(pace.turn().await, Verdict::Success, None);
    assert_eq!(pace.condition(), None);
    let began = Instant::now();
    end(pace.turn().await, Verdict::Overloaded, None);
    drop(pace.turn().await);
    assert!(began.elapsed() < SECOND, "it begins anew");
}

#[tokio::test(start_paused = true)]
async fn a_repeated_429_after_an_answer_slows_nobody_and_the_next_without_one_does() {
    let pace = paces(8, 8).of("m", "a");
    let repeated = |turn: Turn| {
        turn.end(
            Verdict::Overloaded,
            Against::Request,
            Some(7 * SECOND),
            &Usage::default(),
        )
    };
    for _ in 0..9 {
        end(pace.turn().await, Verdict::Success, None);
        repeated(pace.turn().await);
        assert_eq!((limits(&pace).0, pace.paused_for()), (8, None));
        tokio::time::advance(SECOND).await;
    }
    repeated(pace.turn().await);
    assert_eq!(limits(&pace).0, 4);
    assert_eq!(pace.paused_for(), Some(7 * SECOND));
}

#[tokio::test(start_paused = true)]
async fn a_key_that_is_refused_to_everybody_is_waited_for_and_not_for_ever() {
    let pace = paces(8, 8).of("m", "a");
    let began = Instant::now();
    let mut attempts = 0;
    while !pace.gave_up() {
        assert!(began.elapsed() < 80 * SECOND);
        end(pace.turn().await, REFUSED, None);
        attempts += 1;
    }
    assert!(began.elapsed() >= 60 * SECOND);
    assert!(attempts < 30, "{attempts}");
    assert_eq!(
        end(pace.turn().await, REFUSED, None),
        None,
        "no more pauses"
    );
    end(pace.turn().await, Verdict::Permanent, None);
    assert!(!pace.gave_up(), "the upstream answers again");
}

#[tokio::test(start_paused = true)]
async fn answers_that_take_longer_lower_the_limit_of_the_model_for_all() {
    let paces = paces(8, 8);
    let (one, other) = (paces.of("m", "a"), paces.of("m", "b"));
    for _ in 0..5 {
        window(&one, 4, Verdict::Success, SECOND).await;
    }
    assert_eq!(limits(&other), (8, 8));
    for _ in 0..20 {
        window(&one, 1, Verdict::Success, 2 * SECOND).await;
    }
    assert!(limits(&other).1 < 8);
    assert_eq!(limits(&other).0, 8);
}

#[tokio::test(start_paused = true)]
async fn requests_that_end_together_do_not_start_together_again() {
    let pace = paces(8, 8).of("m", "a");
    for _ in 0..2 {
        window(&pace, 8, Verdict::Success, 8 * SECOND).await;
    }
    let began = Instant::now();
    let mut starts = Vec::new();
    for _ in 0..8 {
        starts.push((pace.turn().await, began.elapsed()));
    }
    let apart = |n: usize| starts[n + 1].1 - starts[n].1;
    assert!((0..7).all(|n| apart(n) > SECOND / 2), "{starts:?}");
    assert!(began.elapsed() < 8 * SECOND, "the limit stays in use");
}

#[tokio::test(start_paused = true)]
async fn what_this_server_has_no_room_for_lowers_the_limit_and_pauses_nobody() {
    let paces = paces(8, 8);
    let pace = paces.of("m", "a");
    let mut turns = Vec::new();
    for _ in 0..8 {
        turns.push(pace.turn().await);
    }
    tokio::time::advance(SECOND).await;
    for turn in &turns {
        turn.could_not_begin();
    }
    assert_eq!(
        limits(&pace),
        (8, 4),
        "those that failed together count once"
    );
    assert!(pace.paused_for().is_none());
    tokio::time::advance(SECOND).await;
    turns[0].begin();
    turns[0].could_not_begin();
    assert_eq!(limits(&pace), (8, 2));
    drop(turns);
    window(&pace, 2, Verdict::Success, SECOND).await;
    assert_eq!(limits(&pace), (8, 3), "it grows again");
}

#[tokio::test(start_paused = true)]
async fn a_429_slows_and_stops_only_the_tenant_whose_it_is() {
    let paces = paces(4, 4);
    let (one, other) = (paces.of("m", "a"), paces.of("m", "b"));
    let began = Instant::now();
    let turn = one.turn().await;
    end(turn, Verdict::Overloaded, Some(7 * SECOND));
    assert_eq!((limits(&one), limits(&other)), ((2, 4), (4, 4)));
    drop(other.turn().await);
    assert!(began.elapsed() < SECOND, "another tenant is not stopped");
    let stalled = paces.stalled();
    assert_eq!(stalled.len(), 1);
    assert_eq!(stalled[0].tenant, "a");
    drop(one.turn().await);
    assert!(began.elapsed() >= 7 * SECOND);
}

#[tokio::test(start_paused = true)]
async fn who_waits_out_a_pause_takes_no_place_of_others() {
    let paces = paces(1, 1);
    let (one, other) = (paces.of("m", "a"), paces.of("m", "b"));
    let turn = one.turn().await;
    end(turn, Verdict::Overloaded, Some(7 * SECOND));
    let waiting = tokio::spawn({
        let one = Arc::clone(&one);
        async move { drop(one.turn().await) }
    });
    tokio::time::sleep(SECOND).await;
    let began = Instant::now();
    drop(other.turn().await);
    assert_eq!(began.elapsed(), Duration::ZERO);
    waiting.await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_model_that_never_answers_is_asked_ever_less_often() {
    let paces = paces(1, 1);
    let pace = paces.of("m", "a");
    for _ in 0..DOWN_AFTER {
        window(&pace, 1, UNAVAILABLE, SECOND).await;
    }
    let began = Instant::now();
    for _ in 0..13 {
        window(&pace, 1, UNAVAILABLE, Duration::ZERO).await;
    }
    assert!(began.elapsed() > 30 * SECOND);
    assert_eq!(pace.answers(), 0);
    assert_eq!(paces.stalled().len(), 1);
    window(&pace, 1, Verdict::Success, SECOND).await;
    assert_eq!(pace.answers(), 1);
    assert!(paces.stalled().is_empty());
}

#[tokio::test(start_paused = true)]
async fn how_long_a_key_was_refused_is_remembered_while_its_batch_makes_way() {
    let paces = paces(8, 8);
    end(paces.of("m", "a").turn().await, REFUSED, None);
    tokio::time::advance(59 * SECOND).await;
    paces.of("n", "a");
    assert!(!paces.of("m", "a").gave_up());
    tokio::time::advance(2 * SECOND).await;
    assert!(paces.of("m", "a").gave_up());
    assert!(paces.standings().is_empty(), "nobody uses it");
    tokio::time::advance(60 * SECOND).await;
    paces.of("o", "a");
    assert!(!paces.of("m", "a").gave_up(), "long ago");
}

#[test]
fn so_many_models_have_labels_of_their_own() {
    let mut known = Known::default();
    assert_eq!(known.label("first"), "first");
    for n in 1..LABELS_MAX {
        assert_eq!(known.label(&n.to_string()), n.to_string());
    }
    assert_eq!(known.label("late"), OTHER);
    assert_eq!(known.label("first"), "first");
}

#[test]
fn models_that_nobody_uses_are_forgotten() {
    let paces = paces(1, 1);
    let kept = paces.of("kept", "a");
    for n in 0..100 {
        drop(paces.of(&n.to_string(), "a"));
    }
    assert!(paces.lock().paces.len() <= 2);
    assert!(paces.lock().engines.len() <= 2);
    assert!(Arc::ptr_eq(&kept, &paces.of("kept", "a")));
    assert_eq!(kept.engine.tenants.load(Ordering::Relaxed), 1);
}
