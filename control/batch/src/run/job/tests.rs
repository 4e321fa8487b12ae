use std::path::Path;

use kvtide_control_base::tls::Trust;
use tempfile::TempDir;

use super::*;
use crate::blobs::{Local, Piece};
use crate::endpoint::Endpoint;
use crate::run::pace::{PaceOptions, Paces};
use crate::run::remembered::Remembered;
use crate::run::retry::RetryPolicy;
use crate::run::shortage::Shortage;
use crate::run::upstream::Upstream;
use crate::state::{Order, Usage};
use crate::store::{Create, Places, Sqlite};

const LEASE: Duration = Duration::from_secs(60);
const TOTAL: u64 = 2;

fn line(id: &str, model: &str) -> String {
    format!(
        r#"{{"custom_id":"{id}","method":"POST","url":"/v1/completions","body":{{"model":"{model}"}}}}"#
    )
}

/// A batch of two requests, the first of which has its result.
struct World {
    directory: TempDir,
    job: Job,
}

impl World {
    fn path(&self, key: &str) -> std::path::PathBuf {
        Path::new(self.directory.path()).join(key)
    }

    fn write_input(&self, lines: &[String]) {
        std::fs::write(self.path("files/file-in"), lines.join("\n")).unwrap();
    }

    fn batch(&self) -> Batch {
        self.job.lease.batch()
    }

    fn output(&self) -> String {
        let batch = self.batch();
        let id = batch.output_file_id().unwrap();
        std::fs::read_to_string(self.path("files").join(id)).unwrap()
    }
}

async fn world() -> World {
    rustls::crypto::ring::default_provider()
        .install_default()
        .ok();
    let directory = tempfile::tempdir().unwrap();
    let metadata: Arc<dyn Metadata> = Arc::new(Sqlite::open(&directory.path().join("db")).unwrap());
    let blobs: Arc<dyn Blobs> = Arc::new(Local::open(directory.path()).unwrap());
    let order = Order {
        endpoint: Endpoint::Completions,
        input_file_id: "file-in".into(),
        completion_window: "24h".into(),
        window_s: 86_400,
        metadata: None,
        output_expires_after_s: None,
        aibrix: None,
    };
    let places = Places { all: 9, tenant: 9 };
    let create = Create {
        digest: String::new(),
        is_retry: false,
    };
    let batch = Batch::new("batch_1".into(), "a".into(), order, clock::now());
    metadata.add_batch(batch, create, places).await.unwrap();
    let taken = metadata.acquire("s", Stage::Validate, &[], 60_000, 1).await;
    let (batch, fence) = taken.unwrap().pop().unwrap();
    let lease = Lease::new(Arc::clone(&metadata), fence, batch, LEASE, Instant::now());
    let pace = PaceOptions {
        initial: 1,
        most: 1,
        latency_tolerance: 2.0,
        refused_for: Duration::ZERO,
    };
    let trust = Trust::open(None).unwrap();
    let traffic = Traffic {
        // Nobody is there: these batches end without it.
        upstream: Arc::new(Upstream::new("http://127.0.0.1:9", None, &trust).unwrap()),
        blobs: Arc::clone(&blobs),
        paces: Paces::new(pace, 1024),
        shortage: Shortage::default(),
        remembered: Remembered::default(),
        memory: Arc::new(Semaphore::new(1024)),
        retry: RetryPolicy {
            attempts_max: 1,
            backoff: Duration::ZERO,
        },
        timeout: Duration::from_secs(1),
        priority: None,
    };
    let job = Job {
        metadata,
        blobs,
        traffic: Arc::new(traffic),
        lease: Arc::new(lease),
        options: JobOptions {
            requests_at_once: 1,
            mixed_models: false,
            line_order: LineOrder::Answers,
            cancel_grace: Duration::ZERO,
            drain: Duration::ZERO,
        },
        make_way: CancellationToken::new(),
        shutdown: CancellationToken::new(),
        drained: CancellationToken::new(),
    };
    let world = World { directory, job };
    world
        .change(Change::Validated {
            model: None,
            total: TOTAL,
        })
        .await;
    world.record(1, Stream::Output).await;
    world
}

impl World {
    async fn change(&self, change: Change) {
        let lease = &self.job.lease;
        lease.change(change, Vec::new(), Vec::new()).await.unwrap();
    }

    async fn record(&self, line: u32, stream: Stream) {
        let mut writer = self.job.blobs.part_writer(self.job.lease.fence());
        let text = format!("result {line}\n");
        let pieces = vec![Piece::Memory(text.into())];
        let extent = writer.append(stream, Arc::new(pieces)).await;
        let extent = extent.unwrap();
        let part = Part {
            stream,
            key: extent.key,
            offset: extent.offset,
            bytes: extent.bytes,
            lines: vec![line],
        };
        let ok = u64::from(stream == Stream::Output);
        let change = Change::Record {
            completed: ok,
            failed: 1 - ok,
            usage: Usage::default(),
            expired: false,
        };
        let lease = &self.job.lease;
        lease.change(change, vec![part], Vec::new()).await.unwrap();
    }
}

#[tokio::test]
async fn a_batch_whose_input_is_lost_fails_with_the_results_that_it_has() {
    let world = world().await;
    assert!(world.job.validate().await.unwrap().is_none());
    let batch = world.batch();
    assert_eq!(batch.status(), Status::Failed);
    assert_eq!(batch.errors()[0].code, "input_file_unavailable");
    assert_eq!((batch.counts().completed, batch.counts().failed), (1, 1));
    assert_eq!(world.output(), "result 1\n");
}

#[tokio::test]
async fn a_batch_that_is_cancelled_is_cancelled_also_without_its_input() {
    let world = world().await;
    world.change(Change::Cancel).await;
    world.write_input(&["no JSON".to_owned()]);
    assert!(world.job.validate().await.unwrap().is_none());
    assert_eq!(world.batch().status(), Status::Cancelled);
    assert_eq!(world.output(), "result 1\n");
}

#[tokio::test]
async fn models_that_were_allowed_when_a_batch_began_are_allowed_until_it_ends() {
    let world = world().await;
    world.write_input(&[line("a", "m"), line("b", "n")]);
    assert!(world.job.validate().await.unwrap().is_some());
    assert_eq!(world.batch().status(), Status::InProgress);
}

#[tokio::test]
async fn a_batch_that_has_lost_results_fails_with_those_that_are_there() {
    loses_results(|path| std::fs::remove_file(path).unwrap()).await;
}

#[tokio::test]
async fn results_that_are_cut_short_are_lost_and_not_read_for_ever() {
    loses_results(|path| {
        let file = std::fs::File::options().write(true).open(path).unwrap();
        file.set_len(3).unwrap();
    })
    .await;
}

async fn loses_results(lose: impl Fn(&Path)) {
    let world = world().await;
    world.record(2, Stream::Error).await;
    world.write_input(&[line("a", "m"), line("b", "m")]);
    let parts = world.job.metadata.parts("batch_1").await.unwrap();
    lose(&world.path(&parts[0].key));
    let plan = world.job.validate().await.unwrap().unwrap();
    world.job.run(plan, Stage::Run).await.unwrap();
    let batch = world.batch();
    assert_eq!(batch.status(), Status::Failed);
    assert_eq!(batch.errors()[0].code, "results_unavailable");
    assert_eq!(batch.output_file_id(), None);
    assert!(batch.error_file_id().is_some());
}

#[tokio::test]
async fn a_batch_whose_window_has_ended_sends_nothing_and_tells_what_is_left() {
    let world = world().await;
    world.write_input(&[line("a", "m"), line("b", "m")]);
    let plan = world.job.validate().await.unwrap().unwrap();
    world.job.run(plan, Stage::End).await.unwrap();
    let batch = world.batch();
    assert_eq!(batch.status(), Status::Expired);
    assert_eq!((batch.counts().completed, batch.counts().failed), (1, 1));
    let errors = batch.error_file_id().unwrap();
    let errors = std::fs::read_to_string(world.path("files").join(errors)).unwrap();
    assert!(errors.contains("batch_expired"), "{errors}");
}

#[tokio::test]
async fn a_batch_that_makes_way_is_given_back_as_it_is() {
    let world = world().await;
    world.write_input(&[line("a", "m"), line("b", "m")]);
    let plan = world.job.validate().await.unwrap().unwrap();
    world.job.make_way.cancel();
    let ended = world.job.run(plan, Stage::Run).await;
    assert!(matches!(ended, Err(Failure::Stopped)));
    let batch = world.batch();
    assert_eq!(batch.status(), Status::InProgress);
    assert_eq!((batch.counts().completed, batch.counts().failed), (1, 0));
}
