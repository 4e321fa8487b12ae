//! The segment over the lives of the processes that share it.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use kvtide_segment::{
    HugePages, RowGeometry, SegmentError, SegmentOptions, ShardStatus, SharedSegment,
};

fn geometry(rows: usize) -> RowGeometry {
    RowGeometry::fit(2, 4, 1024, 8192 + rows * (8192 + 32)).expect("geometry")
}

fn options(directory: &Path, instance: &str) -> SegmentOptions {
    SegmentOptions {
        directory: directory.to_owned(),
        instance: instance.to_owned(),
        huge_pages: HugePages::Off,
        holders: 100,
        available_bytes: u64::MAX,
    }
}

fn open(directory: &Path, instance: &str) -> SharedSegment {
    SharedSegment::create_or_attach(&options(directory, instance), geometry(8)).expect("segment")
}

fn files(directory: &Path) -> Vec<String> {
    let entries = fs::read_dir(directory).expect("directory");
    entries
        .map(|e| e.expect("entry").file_name().to_string_lossy().into_owned())
        .collect()
}

#[test]
fn the_first_creates_it_the_others_attach_and_all_see_the_same_shards() {
    let directory = tempfile::tempdir().expect("directory");
    let (first, second) = (open(directory.path(), "e"), open(directory.path(), "e"));
    assert!(first.created() && !second.created());
    assert!(first.begin_shard(3, 1, 7));
    assert_eq!(
        second.shard_state(3, 1).map(|s| s.status),
        Some(ShardStatus::Filling)
    );
    let checksum = first.compute_checksum(3, 1).expect("in range");
    assert!(first.seal_shard(3, 1, 7, checksum));
    let state = second.shard_state(3, 1).expect("in range");
    assert_eq!(
        (state.generation, state.status, state.checksum),
        (7, ShardStatus::Sealed, checksum)
    );
    assert_eq!(second.compute_checksum(3, 1), Some(checksum));
    assert!(second.shard_state(8, 0).is_none() && second.compute_checksum(0, 2).is_none());
}

#[test]
fn processes_that_start_together_make_one_segment() {
    let directory = tempfile::tempdir().expect("directory");
    let created = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        let opened: Vec<_> = (0..8)
            .map(|_| scope.spawn(|| open(directory.path(), "e")))
            .map(|thread| thread.join().expect("opened"))
            .inspect(|segment| {
                created.fetch_add(usize::from(segment.created()), Ordering::SeqCst);
            })
            .collect();
        assert_eq!(created.load(Ordering::SeqCst), 1);
        assert_eq!(files(directory.path()), ["kvtide-e"]);
        drop(opened);
    });
    assert!(files(directory.path()).is_empty());
}

#[test]
fn the_last_to_leave_removes_the_file() {
    let directory = tempfile::tempdir().expect("directory");
    let (first, second) = (open(directory.path(), "e"), open(directory.path(), "e"));
    drop(first);
    assert_eq!(files(directory.path()), ["kvtide-e"]);
    drop(second);
    assert!(files(directory.path()).is_empty());
}

#[test]
fn once_all_have_it_the_name_goes_and_the_memory_stays() {
    let directory = tempfile::tempdir().expect("directory");
    let pair = SegmentOptions {
        holders: 2,
        ..options(directory.path(), "e")
    };
    let open = || SharedSegment::create_or_attach(&pair, geometry(8)).expect("segment");
    let first = open();
    assert_eq!(files(directory.path()), ["kvtide-e"]);
    let second = open();
    assert!(files(directory.path()).is_empty());
    assert!(first.begin_shard(1, 0, 5) && first.seal_shard(1, 0, 5, 6));
    assert_eq!(second.shard_state(1, 0).map(|s| s.checksum), Some(6));

    // A later engine of the same name has its own, which is not touched when these leave.
    let later = open();
    assert!(later.created());
    drop((first, second));
    assert_eq!(files(directory.path()), ["kvtide-e"]);
}

#[test]
fn whoever_comes_second_takes_the_size_that_is_there() {
    let directory = tempfile::tempdir().expect("directory");
    let first = open(directory.path(), "e");
    // A default capacity follows from free memory, of which there is less now.
    let second = SharedSegment::create_or_attach(
        &SegmentOptions {
            available_bytes: 1,
            ..options(directory.path(), "e")
        },
        geometry(3),
    )
    .expect("attached");
    assert_eq!(second.geometry(), first.geometry());
}

#[test]
fn more_memory_than_there_is_is_refused_before_it_is_taken() {
    let directory = tempfile::tempdir().expect("directory");
    let options = SegmentOptions {
        available_bytes: 1000,
        ..options(directory.path(), "e")
    };
    let error = SharedSegment::create_or_attach(&options, geometry(8)).unwrap_err();
    assert!(
        matches!(
            error,
            SegmentError::NoMemory {
                available_bytes: 1000,
                ..
            }
        ),
        "{error}"
    );
    assert!(
        error.to_string().starts_with("host_capacity_gb: "),
        "{error}"
    );
}

/// Not a test of its own: the process that the next test kills.
#[test]
#[ignore = "run by a_killed_process_leaves_nothing_that_the_next_does_not_remove"]
fn hold_a_segment_until_killed() {
    if let Ok(directory) = std::env::var("SEGMENT_TEST_DIRECTORY") {
        let _held = open(Path::new(&directory), "killed");
        std::thread::sleep(Duration::from_secs(60));
    }
}

#[test]
fn a_killed_process_leaves_nothing_that_the_next_does_not_remove() {
    let directory = tempfile::tempdir().expect("directory");
    let mut child = Command::new(std::env::current_exe().expect("own path"))
        .args(["--ignored", "--exact", "hold_a_segment_until_killed"])
        .env("SEGMENT_TEST_DIRECTORY", directory.path())
        .stdout(Stdio::null())
        .spawn()
        .expect("child");
    let deadline = Instant::now() + Duration::from_secs(20);
    while SharedSegment::create_or_attach(&options(directory.path(), "killed"), geometry(8))
        .map_or(true, |segment| segment.created())
    {
        assert!(Instant::now() < deadline, "the child made no segment");
        std::thread::sleep(Duration::from_millis(20));
    }
    let other = open(directory.path(), "alive");
    child.kill().expect("kill");
    child.wait().expect("wait");
    let next = open(directory.path(), "next");
    assert_eq!(next.reclaimed(), [directory.path().join("kvtide-killed")]);
    assert!(
        directory.path().join("kvtide-alive").exists(),
        "what is in use stays"
    );
    drop((other, next));
    assert!(files(directory.path()).is_empty());
}

#[test]
fn files_of_others_are_left_alone() {
    let directory = tempfile::tempdir().expect("directory");
    fs::write(directory.path().join("somebody-else"), b"x").expect("write");
    let segment = open(directory.path(), "e");
    assert!(segment.reclaimed().is_empty());
    drop(segment);
    assert_eq!(files(directory.path()), ["somebody-else"]);
}

#[test]
fn an_engine_of_another_geometry_is_told_so() {
    let directory = tempfile::tempdir().expect("directory");
    let _held = open(directory.path(), "e");
    let other = RowGeometry::fit(2, 4, 512, 40_000).expect("geometry");
    let error =
        SharedSegment::create_or_attach(&options(directory.path(), "e"), other).unwrap_err();
    assert!(matches!(error, SegmentError::Mismatch { .. }), "{error}");
}

#[test]
fn a_mount_that_is_too_small_is_named_with_what_is_missing() {
    let directory = tempfile::tempdir().expect("directory");
    let huge = RowGeometry::fit(1, 1, 1 << 20, 1 << 50).expect("geometry");
    let error = SharedSegment::create_or_attach(&options(directory.path(), "e"), huge).unwrap_err();
    let text = error.to_string();
    assert!(matches!(error, SegmentError::NoSpace { .. }), "{text}");
    assert!(
        text.contains("host_capacity_gb") && text.contains("--shm-size"),
        "{text}"
    );
    assert!(
        files(directory.path()).is_empty(),
        "nothing is left of a failed creation"
    );
}

#[test]
fn required_huge_pages_that_are_missing_are_an_error_with_the_fix() {
    let directory = tempfile::tempdir().expect("directory");
    let huge = RowGeometry::fit(1, 1, 1 << 20, 1 << 45).expect("geometry");
    let options = SegmentOptions {
        huge_pages: HugePages::Require,
        ..options(directory.path(), "e")
    };
    let text = SharedSegment::create_or_attach(&options, huge)
        .unwrap_err()
        .to_string();
    assert!(
        text.contains("huge_pages") && text.contains("vm.nr_hugepages"),
        "{text}"
    );
}

#[test]
fn granted_huge_pages_are_used_and_shared() {
    let directory = tempfile::tempdir().expect("directory");
    let options = SegmentOptions {
        huge_pages: HugePages::Require,
        ..options(directory.path(), "huge-test")
    };
    let first = match SharedSegment::create_or_attach(&options, geometry(8)) {
        Ok(segment) => segment,
        Err(SegmentError::NoHugePages { .. }) => {
            println!(
                "SKIPPED granted_huge_pages_are_used_and_shared: no hugetlbfs mount has free 2 MiB pages"
            );
            return;
        }
        Err(error) => panic!("{error}"),
    };
    first.populate(&|_, _| {}).expect("populate");
    let second = SharedSegment::create_or_attach(&options, geometry(8)).expect("attach");
    assert!(first.on_huge_pages() && second.on_huge_pages() && !second.created());
    assert!(first.begin_shard(2, 1, 3) && first.seal_shard(2, 1, 3, 4));
    assert_eq!(second.shard_state(2, 1).map(|s| s.checksum), Some(4));
    let path = first.path().to_owned();
    drop((first, second));
    assert!(!path.exists());
}

#[test]
fn populating_reaches_the_end_and_says_so() {
    let directory = tempfile::tempdir().expect("directory");
    let segment = Arc::new(open(directory.path(), "e"));
    let furthest = AtomicUsize::new(0);
    segment
        .populate(&|done, total| {
            furthest.fetch_max(done, Ordering::SeqCst);
            assert!(done <= total);
        })
        .expect("populate");
    assert_eq!(
        furthest.load(Ordering::SeqCst),
        segment.geometry().total_bytes()
    );
}
