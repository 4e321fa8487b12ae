use super::*;
use crate::clock;
use crate::endpoint::Endpoint;
use crate::file::{File, Purpose};
use crate::state::{Batch, Change, Order, Status, Usage};
use crate::store::{
    Batches, Create, Fence, Files, Leases, Part, Places, RETRY_WINDOW_S, Results, Share, Stage,
    Stream, User, Users,
};

const PLACES: Places = Places {
    all: 100,
    tenant: 10,
};
const LEASE_MS: i64 = 60_000;

fn batch(id: &str, tenant: &str) -> Batch {
    let order = Order {
        endpoint: Endpoint::Completions,
        input_file_id: "file-1".into(),
        completion_window: "24h".into(),
        window_s: 86_400,
        metadata: None,
        output_expires_after_s: None,
        aibrix: None,
    };
    Batch::new(id.into(), tenant.into(), order, clock::now())
}

fn create() -> Create {
    Create {
        digest: "d".into(),
        is_retry: false,
    }
}

fn validated() -> Change {
    Change::Validated {
        model: None,
        total: 2,
    }
}

fn record() -> Change {
    Change::Record {
        completed: 2,
        failed: 0,
        usage: Usage::default(),
        expired: false,
    }
}

fn part(key: &str) -> Part {
    Part {
        stream: Stream::Output,
        key: key.into(),
        offset: 0,
        bytes: 7,
        lines: vec![1, 70_000],
    }
}

async fn take(db: &Sqlite, stage: Stage) -> Vec<Fence> {
    let taken = db
        .acquire("server", stage, &[], LEASE_MS, 10)
        .await
        .unwrap();
    taken.into_iter().map(|(_, fence)| fence).collect()
}

#[tokio::test]
async fn who_has_lost_the_lease_writes_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let db = Sqlite::open(&directory.path().join("db")).unwrap();
    db.add_batch(batch("batch_1", "a"), create(), PLACES)
        .await
        .unwrap();
    let old = take(&db, Stage::Validate).await.pop().unwrap();
    assert!(take(&db, Stage::Validate).await.is_empty(), "it is taken");
    db.release(&old, 0).await.unwrap();
    let new = take(&db, Stage::Validate).await.pop().unwrap();
    let late = db.change(&old, validated(), vec![], vec![]).await;
    assert!(matches!(late, Err(Failure::Fenced { .. })));
    assert!(matches!(
        db.renew(&old, LEASE_MS).await,
        Err(Failure::Fenced { .. })
    ));
    // Giving back what is not one's own any more changes nothing either.
    db.release(&old, 0).await.unwrap();
    db.change(&new, validated(), vec![], vec![]).await.unwrap();
}

#[tokio::test]
async fn recording_the_same_part_twice_counts_once() {
    let directory = tempfile::tempdir().unwrap();
    let db = Sqlite::open(&directory.path().join("db")).unwrap();
    db.add_batch(batch("batch_1", "a"), create(), PLACES)
        .await
        .unwrap();
    let fence = take(&db, Stage::Validate).await.pop().unwrap();
    db.change(&fence, validated(), vec![], vec![])
        .await
        .unwrap();
    for _ in 0..2 {
        let changed = db.change(&fence, record(), vec![part("p")], vec![]).await;
        assert_eq!(changed.unwrap().counts().completed, 2);
    }
    assert_eq!(db.parts("batch_1").await.unwrap(), [part("p")]);
}

#[tokio::test]
async fn a_change_that_fails_half_way_leaves_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let db = Sqlite::open(&directory.path().join("db")).unwrap();
    db.add_batch(batch("batch_1", "a"), create(), PLACES)
        .await
        .unwrap();
    let fence = take(&db, Stage::Validate).await.pop().unwrap();
    db.change(&fence, validated(), vec![], vec![])
        .await
        .unwrap();
    // The second of two parts in the same place cannot be entered.
    let twice = vec![part("p"), part("p")];
    db.change(&fence, record(), twice, vec![])
        .await
        .unwrap_err();
    assert!(db.parts("batch_1").await.unwrap().is_empty());
    let batch = db.batch("a", "batch_1").await.unwrap().unwrap();
    assert_eq!(batch.counts().completed, 0);
    assert_eq!(batch.status(), Status::InProgress);
}

#[tokio::test]
async fn a_tenant_with_many_batches_does_not_keep_others_waiting() {
    let directory = tempfile::tempdir().unwrap();
    let db = Sqlite::open(&directory.path().join("db")).unwrap();
    for n in 0..5 {
        let id = format!("batch_a{n}");
        db.add_batch(batch(&id, "a"), create(), PLACES)
            .await
            .unwrap();
    }
    db.add_batch(batch("batch_b", "b"), create(), PLACES)
        .await
        .unwrap();
    let mut order = Vec::new();
    for _ in 0..3 {
        let taken = db
            .acquire("server", Stage::Validate, &[], LEASE_MS, 1)
            .await;
        order.push(taken.unwrap()[0].0.id.clone());
    }
    assert_eq!(order, ["batch_a0", "batch_b", "batch_a1"]);
}

#[tokio::test]
async fn a_server_that_starts_finds_what_the_last_one_had_in_hand() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("db");
    let db = Sqlite::open(&path).unwrap();
    db.add_batch(batch("batch_1", "a"), create(), PLACES)
        .await
        .unwrap();
    let old = take(&db, Stage::Validate).await.pop().unwrap();
    drop(db);
    let db = Sqlite::open(&path).unwrap();
    let new = take(&db, Stage::Validate).await.pop().unwrap();
    assert!(new.epoch > old.epoch);
}

#[tokio::test]
async fn writes_that_come_together_are_all_answered_and_all_there() {
    let directory = tempfile::tempdir().unwrap();
    let db = Arc::new(Sqlite::open(&directory.path().join("db")).unwrap());
    let mut writes = tokio::task::JoinSet::new();
    for n in 0..500 {
        let db = Arc::clone(&db);
        writes.spawn(async move {
            let user = User {
                name: format!("user-{n}"),
                rpm: n,
                tpm: 0,
            };
            assert!(db.create_user(&user).await.unwrap());
        });
    }
    while let Some(written) = writes.join_next().await {
        written.unwrap();
    }
    for n in 0..500 {
        let user = db.user(&format!("user-{n}")).await.unwrap().unwrap();
        assert_eq!(user.rpm, n);
    }
}

#[tokio::test]
async fn leases_survive_a_wall_clock_that_is_set() {
    let directory = tempfile::tempdir().unwrap();
    let db = Sqlite::open(&directory.path().join("db")).unwrap();
    // One that was given back, and one that is held.
    add_validated(&db, "batch_1", "a", "m").await;
    add_validated(&db, "batch_2", "a", "m").await;
    let acquire = async |wall| {
        let now = Now { wall, ..db.now() };
        let taken = db
            .write(move |db| leases::acquire(db, "server", Stage::Run, &[], LEASE_MS, 1, now))
            .await;
        taken.unwrap().pop().map(|(batch, _)| batch.id)
    };
    let back = clock::now() - 3600;
    let on = clock::now() + 3600;
    assert_eq!(acquire(back).await.as_deref(), Some("batch_1"));
    assert_eq!(acquire(on).await.as_deref(), Some("batch_2"));
    for wall in [back, on] {
        assert_eq!(acquire(wall).await, None, "they are held");
    }
}

fn part_of(tenant: &str, model: &str) -> Share {
    Share {
        tenant: tenant.into(),
        model: Some(model.into()),
    }
}

/// A batch that waits to be run.
async fn add_validated(db: &Sqlite, id: &str, tenant: &str, model: &str) {
    db.add_batch(batch(id, tenant), create(), PLACES)
        .await
        .unwrap();
    let fence = take(db, Stage::Validate).await.pop().unwrap();
    let change = Change::Validated {
        model: Some(model.into()),
        total: 2,
    };
    db.change(&fence, change, vec![], vec![]).await.unwrap();
    db.release(&fence, 0).await.unwrap();
}

#[tokio::test]
async fn what_is_cancelled_or_late_is_taken_to_be_ended_and_for_nothing_else() {
    let directory = tempfile::tempdir().unwrap();
    let db = Sqlite::open(&directory.path().join("db")).unwrap();
    add_validated(&db, "batch_1", "a", "m").await;
    let mut late = batch("batch_2", "a");
    late.expires_at = clock::now() - 1;
    db.add_batch(late, create(), PLACES).await.unwrap();
    add_validated(&db, "batch_3", "a", "m").await;
    db.cancel("a", "batch_3", clock::now()).await.unwrap();
    assert!(take(&db, Stage::Validate).await.is_empty());
    let of = |fences: Vec<Fence>| fences.into_iter().map(|fence| fence.batch);
    let ending: Vec<String> = of(take(&db, Stage::End).await).collect();
    assert_eq!(ending, ["batch_2", "batch_3"]);
    let running: Vec<String> = of(take(&db, Stage::Run).await).collect();
    assert_eq!(running, ["batch_1"]);
}

#[tokio::test]
async fn the_model_with_the_fewest_jobs_comes_first_and_the_stalled_one_last() {
    let directory = tempfile::tempdir().unwrap();
    let db = Sqlite::open(&directory.path().join("db")).unwrap();
    for (n, model) in ["m", "m", "m", "n", "o"].into_iter().enumerate() {
        add_validated(&db, &format!("batch_{n}"), "a", model).await;
    }
    let waiting = db.waiting(9).await.unwrap();
    assert_eq!(waiting, ["m", "n", "o"].map(|model| part_of("a", model)));
    let mut order = Vec::new();
    for _ in 0..5 {
        let last = [part_of("a", "n"), part_of("b", "m")];
        let taken = db.acquire("server", Stage::Run, &last, LEASE_MS, 1).await;
        order.push(taken.unwrap().pop().unwrap().0.id);
    }
    let expected = ["batch_0", "batch_4", "batch_1", "batch_2", "batch_3"];
    assert_eq!(order, expected);
    assert!(db.waiting(9).await.unwrap().is_empty());
}

#[tokio::test]
async fn a_tenant_cannot_take_all_places_and_a_repeated_create_needs_none() {
    let directory = tempfile::tempdir().unwrap();
    let db = Sqlite::open(&directory.path().join("db")).unwrap();
    let places = Places { all: 3, tenant: 2 };
    let add = |id: &'static str, tenant: &'static str, is_retry| {
        let create = Create {
            digest: "d".into(),
            is_retry,
        };
        db.add_batch(batch(id, tenant), create, places)
    };
    add("batch_1", "a", false).await.unwrap();
    add("batch_2", "a", false).await.unwrap();
    let crowded = |added| matches!(added, Err(Failure::Crowded { .. }));
    assert!(crowded(add("batch_3", "a", false).await));
    assert_eq!(add("batch_3", "a", true).await.unwrap().id, "batch_2");
    add("batch_4", "b", false).await.unwrap();
    assert!(crowded(add("batch_5", "c", false).await), "none is left");
}

#[tokio::test]
async fn a_create_is_no_repetition_of_one_whose_batch_is_over_or_being_cancelled() {
    let directory = tempfile::tempdir().unwrap();
    let db = Sqlite::open(&directory.path().join("db")).unwrap();
    let again = Create {
        digest: "d".into(),
        is_retry: true,
    };
    let add = async |id: &str| {
        let added = db.add_batch(batch(id, "a"), again.clone(), PLACES).await;
        added.unwrap().id
    };
    assert_eq!(add("batch_1").await, "batch_1");
    assert_eq!(add("batch_2").await, "batch_1");
    db.cancel("a", "batch_1", clock::now()).await.unwrap();
    assert_eq!(add("batch_3").await, "batch_3", "it is being cancelled");
    let fence = take(&db, Stage::Validate).await.pop().unwrap();
    let errors = Vec::new();
    let change = Change::Reject { errors };
    db.change(&fence, change, vec![], vec![]).await.unwrap();
    assert_eq!(add("batch_4").await, "batch_4", "it has failed");
}

#[tokio::test]
async fn a_create_is_a_repetition_only_of_one_that_was_made_a_short_while_ago() {
    let directory = tempfile::tempdir().unwrap();
    let db = Sqlite::open(&directory.path().join("db")).unwrap();
    let first_at = clock::now();
    let again = Create {
        digest: "d".into(),
        is_retry: true,
    };
    let add = |id: &str, at| {
        let mut batch = batch(id, "a");
        batch.created_at = at;
        db.add_batch(batch, again.clone(), PLACES)
    };
    assert_eq!(add("batch_1", first_at).await.unwrap().id, "batch_1");
    let last_at = first_at + RETRY_WINDOW_S;
    assert_eq!(add("batch_2", last_at).await.unwrap().id, "batch_1");
    assert_eq!(add("batch_3", last_at + 1).await.unwrap().id, "batch_3");
    let upload = |id: &str, at| {
        let file = File {
            id: id.into(),
            tenant: "a".into(),
            purpose: Purpose::Batch,
            filename: "in.jsonl".into(),
            bytes: 1,
            created_at: at,
            expires_at: None,
            media_type: None,
        };
        db.add_file(file, again.clone(), None)
    };
    assert_eq!(upload("file-1", first_at).await.unwrap().id, "file-1");
    assert_eq!(upload("file-2", last_at).await.unwrap().id, "file-1");
    assert_eq!(upload("file-3", last_at + 1).await.unwrap().id, "file-3");
}

#[tokio::test]
async fn a_database_of_the_first_version_is_upgraded() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("db");
    let db = Sqlite::open(&path).unwrap();
    add_validated(&db, "batch_1", "a", "m").await;
    add_validated(&db, "batch_2", "a", "m").await;
    db.cancel("a", "batch_2", clock::now()).await.unwrap();
    drop(db);
    // What was there before is what is taken away here.
    let old = Connection::open(&path).unwrap();
    old.execute_batch(
        "DROP INDEX files_gone; DROP INDEX files_stored; DROP INDEX files_deleted;
         ALTER TABLE files DROP COLUMN gone_at;
         CREATE INDEX files_deleted ON files (seq) WHERE deleted = 1;
         ALTER TABLE batches DROP COLUMN model; ALTER TABLE batches DROP COLUMN due_at;
         PRAGMA user_version = 1;",
    )
    .unwrap();
    drop(old);
    let db = Sqlite::open(&path).unwrap();
    assert_eq!(db.waiting(9).await.unwrap(), [part_of("a", "m")]);
    assert_eq!(take(&db, Stage::End).await[0].batch, "batch_2");
    assert_eq!(take(&db, Stage::Run).await[0].batch, "batch_1");
}
