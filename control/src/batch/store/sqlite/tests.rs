use super::*;
use crate::batch::endpoint::Endpoint;
use crate::batch::state::{Order, Status, Usage};
use crate::batch::store::Stream;

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
    let taken = db.acquire("server", stage, LEASE_MS, 10).await.unwrap();
    taken.into_iter().map(|(_, fence)| fence).collect()
}

#[tokio::test]
async fn who_has_lost_the_lease_writes_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let db = Sqlite::open(&directory.path().join("db")).unwrap();
    db.add_batch(batch("batch_1", "a"), create()).await.unwrap();
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
    db.add_batch(batch("batch_1", "a"), create()).await.unwrap();
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
    db.add_batch(batch("batch_1", "a"), create()).await.unwrap();
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
        db.add_batch(batch(&id, "a"), create()).await.unwrap();
    }
    db.add_batch(batch("batch_b", "b"), create()).await.unwrap();
    let mut order = Vec::new();
    for _ in 0..3 {
        let taken = db.acquire("server", Stage::Validate, LEASE_MS, 1).await;
        order.push(taken.unwrap()[0].0.id.clone());
    }
    assert_eq!(order, ["batch_a0", "batch_b", "batch_a1"]);
}

#[tokio::test]
async fn a_server_that_starts_finds_what_the_last_one_had_in_hand() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("db");
    let db = Sqlite::open(&path).unwrap();
    db.add_batch(batch("batch_1", "a"), create()).await.unwrap();
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
