//! The segment over the lives of the processes that share it.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use kvtide_segment::{
    Holder, HugePages, RowGeometry, SegmentError, SegmentOptions, ShardStatus, SharedSegment,
};

fn geometry(rows: u32) -> RowGeometry {
    let many = RowGeometry::fit(2, 4, 1024, 1 << 24).expect("geometry");
    many.with_rows(rows).expect("so many rows")
}

fn options(directory: &Path, instance: &str, holder: Holder) -> SegmentOptions {
    SegmentOptions {
        directory: directory.to_owned(),
        instance: instance.to_owned(),
        holder,
        huge_pages: HugePages::Off,
        available_bytes: u64::MAX,
    }
}

fn make(options: &SegmentOptions, geometry: RowGeometry) -> Result<SharedSegment, SegmentError> {
    SharedSegment::create_or_attach(options, geometry, &|_, _| {})
}

fn try_open(
    directory: &Path,
    instance: &str,
    holder: Holder,
) -> Result<SharedSegment, SegmentError> {
    make(&options(directory, instance, holder), geometry(8))
}

fn open(directory: &Path, instance: &str, rank: u32) -> SharedSegment {
    try_open(directory, instance, Holder::Worker(rank)).expect("segment")
}

fn shared_memory() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm").expect("a directory on shared memory")
}

fn files(directory: &Path) -> Vec<String> {
    let entries = fs::read_dir(directory).expect("directory");
    entries
        .map(|e| e.expect("entry").file_name().to_string_lossy().into_owned())
        .collect()
}

#[test]
fn the_first_creates_it_the_others_attach_and_all_see_the_same_shards() {
    let directory = shared_memory();
    let (first, second) = (
        open(directory.path(), "e", 0),
        open(directory.path(), "e", 1),
    );
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
    let directory = shared_memory();
    let geometry = RowGeometry::fit(8, 4, 1024, 1 << 20).expect("geometry");
    let created = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..8)
            .map(|rank| options(directory.path(), "e", Holder::Worker(rank)))
            .map(|options| scope.spawn(move || make(&options, geometry).expect("segment")))
            .collect();
        let opened: Vec<_> = threads
            .into_iter()
            .map(|thread| thread.join().expect("opened"))
            .inspect(|segment| {
                created.fetch_add(usize::from(segment.created()), Ordering::SeqCst);
            })
            .collect();
        assert_eq!(created.load(Ordering::SeqCst), 1);
        assert!(opened.iter().all(|s| s.nonce() == opened[0].nonce()));
        assert_eq!(files(directory.path()), ["kvtide-e"]);
        drop(opened);
    });
    assert!(files(directory.path()).is_empty());
}

#[test]
fn the_last_to_leave_removes_the_file() {
    let directory = shared_memory();
    let (first, second) = (
        open(directory.path(), "e", 0),
        open(directory.path(), "e", 1),
    );
    drop(first);
    assert_eq!(files(directory.path()), ["kvtide-e"]);
    drop(second);
    assert!(files(directory.path()).is_empty());
}

#[test]
fn once_the_scheduler_has_it_the_name_goes_and_the_memory_stays() {
    let directory = shared_memory();
    let (first, second) = (
        open(directory.path(), "e", 0),
        open(directory.path(), "e", 1),
    );
    assert_eq!(files(directory.path()), ["kvtide-e"]);
    let scheduler = try_open(directory.path(), "e", Holder::Scheduler).expect("segment");
    assert!(files(directory.path()).is_empty());
    assert!(first.begin_shard(1, 0, 5) && first.seal_shard(1, 0, 5, 6));
    assert_eq!(scheduler.shard_state(1, 0).map(|s| s.checksum), Some(6));

    // A later engine of the same name has its own, which is not touched when these leave.
    let later = open(directory.path(), "e", 0);
    assert!(later.created() && later.nonce() != scheduler.nonce());
    drop((first, second, scheduler));
    assert_eq!(files(directory.path()), ["kvtide-e"]);
}

fn assert_names_the_id(error: &SegmentError) {
    let text = error.to_string();
    assert!(
        text.starts_with("engine_id: ") && text.contains("kvtide-e"),
        "{text}"
    );
}

#[test]
fn a_second_worker_of_a_rank_is_refused_and_harms_nobody() {
    let directory = shared_memory();
    let first = open(directory.path(), "e", 0);
    let error = try_open(directory.path(), "e", Holder::Worker(0)).unwrap_err();
    assert!(matches!(error, SegmentError::Taken { .. }), "{error}");
    assert_names_the_id(&error);
    let second = open(directory.path(), "e", 1);
    let scheduler = try_open(directory.path(), "e", Holder::Scheduler).expect("segment");
    assert_eq!(first.nonce(), second.nonce());
    assert_eq!(first.nonce(), scheduler.nonce());
}

#[test]
fn of_two_engines_with_one_id_at_most_one_has_all_of_its_workers() {
    // Both have two ranks; every order in which their workers can come.
    for order in [[0, 0, 1, 1], [0, 1, 0, 1], [0, 1, 1, 0], [1, 0, 0, 1]] {
        let directory = shared_memory();
        let mut ranks = [0, 0];
        let mut held: [Vec<SharedSegment>; 2] = [Vec::new(), Vec::new()];
        for engine in order {
            let rank = Holder::Worker(ranks[engine]);
            ranks[engine] += 1;
            held[engine].extend(try_open(directory.path(), "e", rank));
        }
        let whole = held.iter().filter(|workers| workers.len() == 2).count();
        assert!(whole <= 1, "{order:?}");
    }
}

#[test]
fn a_scheduler_without_its_workers_is_refused_and_makes_nothing() {
    let directory = shared_memory();
    let error = try_open(directory.path(), "e", Holder::Scheduler).unwrap_err();
    assert!(matches!(error, SegmentError::NoWorkers { .. }), "{error}");
    assert_names_the_id(&error);
    assert!(files(directory.path()).is_empty());
    let _one_of_two = open(directory.path(), "e", 0);
    let error = try_open(directory.path(), "e", Holder::Scheduler).unwrap_err();
    assert!(matches!(error, SegmentError::NoWorkers { .. }), "{error}");
    assert_eq!(
        files(directory.path()),
        ["kvtide-e"],
        "a worker may still come"
    );
}

#[test]
fn a_lock_on_the_directory_holds_nobody_up() {
    let directory = shared_memory();
    let handle = fs::File::open(directory.path()).expect("directory");
    handle.lock().expect("any user can lock it");
    let locked = directory.path().to_owned();
    let (done, opened) = std::sync::mpsc::channel();
    std::thread::spawn(move || done.send(try_open(&locked, "e", Holder::Worker(0)).is_ok()));
    assert_eq!(opened.recv_timeout(Duration::from_secs(60)), Ok(true));
}

#[test]
fn a_directory_on_a_disk_is_refused_with_its_kind() {
    for (directory, kind) in [("/proc", "proc"), ("/sys", "0x62656572")] {
        let error = try_open(Path::new(directory), "e", Holder::Worker(0)).unwrap_err();
        assert!(matches!(error, SegmentError::NotInMemory { .. }), "{error}");
        let text = error.to_string();
        assert!(text.starts_with("segment_directory: "), "{text}");
        assert!(text.contains(directory) && text.contains(kind), "{text}");
    }
}

#[test]
fn a_file_of_another_user_is_named_with_its_owner_and_the_fix() {
    let directory = shared_memory();
    fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o777)).expect("rights");
    let path = directory.path().join("kvtide-foreign");
    fs::write(&path, b"").expect("file");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).expect("rights");
    let output = Command::new(std::env::current_exe().expect("own path"))
        .args(["--ignored", "--exact", "open_as_nobody", "--nocapture"])
        .env("SEGMENT_TEST_DIRECTORY", directory.path())
        .uid(NOBODY)
        .output();
    let Ok(output) = output else {
        println!("SKIPPED a_file_of_another_user_…: this user cannot start a process of another");
        return;
    };
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(text.contains("engine_id: "), "{text} {output:?}");
    assert!(
        text.contains("kvtide-foreign belongs to the user with id "),
        "{text}"
    );
    assert!(text.contains("remove the file"), "{text}");
}

const NOBODY: u32 = 65534;

/// Not a test of its own: what the test before runs as another user.
#[test]
#[ignore = "run by a_file_of_another_user_is_named_with_its_owner_and_the_fix"]
fn open_as_nobody() {
    if let Ok(directory) = std::env::var("SEGMENT_TEST_DIRECTORY") {
        let error = try_open(Path::new(&directory), "foreign", Holder::Worker(0)).unwrap_err();
        println!("{error}");
    }
}

#[test]
fn whoever_comes_second_takes_the_size_that_is_there() {
    let directory = shared_memory();
    let first = open(directory.path(), "e", 0);
    // A default capacity follows from free memory, of which there is less now.
    let second = make(
        &SegmentOptions {
            available_bytes: 1,
            ..options(directory.path(), "e", Holder::Worker(1))
        },
        geometry(3),
    )
    .expect("attached");
    assert_eq!(second.geometry(), first.geometry());
}

#[test]
fn more_memory_than_there_is_is_refused_before_it_is_taken() {
    let directory = shared_memory();
    let options = SegmentOptions {
        available_bytes: 1000,
        ..options(directory.path(), "e", Holder::Worker(0))
    };
    let error = make(&options, geometry(8)).unwrap_err();
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
        let _held = open(Path::new(&directory), "killed", 0);
        std::thread::sleep(Duration::from_secs(60));
    }
}

#[test]
fn a_killed_process_leaves_nothing_that_the_next_does_not_remove() {
    let directory = shared_memory();
    let mut child = Command::new(std::env::current_exe().expect("own path"))
        .args(["--ignored", "--exact", "hold_a_segment_until_killed"])
        .env("SEGMENT_TEST_DIRECTORY", directory.path())
        .stdout(Stdio::null())
        .spawn()
        .expect("child");
    let deadline = Instant::now() + Duration::from_secs(20);
    // Once it has the segment, the other rank finds that, or that it has been there before.
    while try_open(directory.path(), "killed", Holder::Worker(1))
        .is_ok_and(|segment| segment.created())
    {
        assert!(Instant::now() < deadline, "the child made no segment");
        std::thread::sleep(Duration::from_millis(20));
    }
    let other = open(directory.path(), "alive", 0);
    child.kill().expect("kill");
    child.wait().expect("wait");
    let next = open(directory.path(), "next", 0);
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
    let directory = shared_memory();
    fs::write(directory.path().join("somebody-else"), b"x").expect("write");
    let segment = open(directory.path(), "e", 0);
    assert!(segment.reclaimed().is_empty());
    drop(segment);
    assert_eq!(files(directory.path()), ["somebody-else"]);
}

#[test]
fn an_engine_of_another_geometry_is_told_so() {
    let directory = shared_memory();
    let _held = open(directory.path(), "e", 0);
    let other = RowGeometry::fit(2, 4, 512, 40_000).expect("geometry");
    let error = make(&options(directory.path(), "e", Holder::Worker(0)), other).unwrap_err();
    assert!(matches!(error, SegmentError::Mismatch { .. }), "{error}");
}

#[test]
fn a_mount_that_is_too_small_is_named_with_what_is_missing() {
    let directory = shared_memory();
    let huge = RowGeometry::fit(1, 1, 1 << 20, 1 << 50).expect("geometry");
    let error = make(&options(directory.path(), "e", Holder::Worker(0)), huge).unwrap_err();
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
    let directory = shared_memory();
    let huge = RowGeometry::fit(1, 1, 1 << 20, 1 << 45).expect("geometry");
    let options = SegmentOptions {
        huge_pages: HugePages::Require,
        ..options(directory.path(), "e", Holder::Worker(0))
    };
    let text = make(&options, huge).unwrap_err().to_string();
    assert!(
        text.contains("huge_pages") && text.contains("vm.nr_hugepages"),
        "{text}"
    );
}

#[test]
fn granted_huge_pages_are_used_and_shared() {
    let directory = shared_memory();
    let options = SegmentOptions {
        huge_pages: HugePages::Require,
        ..options(directory.path(), "huge-test", Holder::Worker(0))
    };
    let first = match make(&options, geometry(8)) {
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
    let second = make(
        &SegmentOptions {
            holder: Holder::Worker(1),
            ..options
        },
        geometry(8),
    )
    .expect("attach");
    assert!(first.on_huge_pages() && second.on_huge_pages() && !second.created());
    assert!(first.begin_shard(2, 1, 3) && first.seal_shard(2, 1, 3, 4));
    assert_eq!(second.shard_state(2, 1).map(|s| s.checksum), Some(4));
    let path = first.path().to_owned();
    drop((first, second));
    assert!(!path.exists());
}

#[test]
fn populating_reaches_the_end_and_says_so() {
    let directory = shared_memory();
    let segment = Arc::new(open(directory.path(), "e", 0));
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
