use std::path::Path;
use std::time::Instant;

use kvtide_control_base::tls::Trust;

use super::*;
use crate::blobs::Local;
use crate::clock;
use crate::endpoint::Endpoint;
use crate::state::{Order, Status};
use crate::store::{Create, Places, Sqlite};

const LINES: &str = r#"{"custom_id":"a","method":"POST","url":"/v1/completions","body":{"model":"m"}}
{"custom_id":"b","method":"POST","url":"/v1/completions","body":{"model":"m"}}"#;

fn options() -> RunOptions {
    RunOptions {
        jobs: 1,
        job: JobOptions {
            requests_at_once: 1,
            mixed_models: false,
            line_order: LineOrder::Answers,
            cancel_grace: Duration::ZERO,
            drain: Duration::ZERO,
        },
        pace: PaceOptions {
            initial: 1,
            most: 1,
            latency_tolerance: 2.0,
            refused_for: Duration::ZERO,
        },
        retry: RetryPolicy {
            attempts_max: 1,
            backoff: Duration::ZERO,
        },
        request_timeout: Duration::from_secs(1),
        priority: None,
        memory_bytes: 64 << 20,
        lease: Duration::from_secs(60),
    }
}

/// A runner whose files are in `directory`, with a batch whose window has ended.
async fn late_batch(directory: &Path) -> Arc<Runner> {
    let metadata: Arc<dyn Metadata> = Arc::new(Sqlite::open(&directory.join("db")).unwrap());
    let blobs: Arc<dyn Blobs> = Arc::new(Local::open(directory).unwrap());
    std::fs::write(directory.join("files/file-in"), LINES).unwrap();
    let order = Order {
        endpoint: Endpoint::Completions,
        input_file_id: "file-in".into(),
        completion_window: "1h".into(),
        window_s: 3600,
        metadata: None,
        output_expires_after_s: None,
        aibrix: None,
    };
    let batch = Batch::new("batch_1".into(), "a".into(), order, clock::now() - 3601);
    let create = Create {
        digest: String::new(),
        is_retry: false,
    };
    let places = Places { all: 9, tenant: 9 };
    metadata.add_batch(batch, create, places).await.unwrap();
    rustls::crypto::ring::default_provider()
        .install_default()
        .ok();
    let trust = Trust::open(None).unwrap();
    Arc::new(Runner::new(
        metadata,
        blobs,
        Arc::new(Upstream::new("http://127.0.0.1:9", None, &trust).unwrap()),
        Arc::default(),
        options(),
        "server".into(),
        CancellationToken::new(),
    ))
}

#[tokio::test]
async fn a_batch_whose_end_cannot_be_written_rests_and_is_then_taken_again() {
    let directory = tempfile::tempdir().unwrap();
    let runner = late_batch(directory.path()).await;
    let status = async || {
        let batch = runner.metadata.batch("a", "batch_1").await.unwrap();
        batch.unwrap().status()
    };
    // Without it no file can be begun.
    let scratch = directory.path().join("scratch");
    std::fs::remove_dir(&scratch).unwrap();
    let mut working = JoinSet::new();
    let began = Instant::now();
    runner.take(Stage::End, &mut working).await;
    working.join_next().await.unwrap().unwrap();
    assert_eq!(
        status().await,
        Status::Finalizing,
        "its results are recorded"
    );
    runner.take(Stage::End, &mut working).await;
    let rested = working.is_empty() || began.elapsed() >= REST;
    assert!(rested, "it was taken again at once");
    std::fs::create_dir(&scratch).unwrap();
    let ended = async {
        while status().await != Status::Expired {
            while let Some(worked) = working.join_next().await {
                worked.unwrap();
            }
            tokio::time::sleep(LOOK_AGAIN / 10).await;
            runner.take(Stage::End, &mut working).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), ended)
        .await
        .expect("it is taken again");
    let batch = runner.metadata.batch("a", "batch_1").await.unwrap();
    let counts = batch.unwrap().counts();
    assert_eq!((counts.total, counts.failed), (2, 2));
}
