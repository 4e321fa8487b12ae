//! What the daemon does where the machine gives it little: too little memory, and no privileges.
#![allow(clippy::unwrap_used, reason = "a failed step fails the test")]
#![allow(clippy::print_stdout, reason = "a test that is skipped says so")]

mod common;

use std::fs::{self, Permissions};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use common::engine::{Engine, SMALL, keys};
use common::place::{KVTIDE, Place, held};
use tempfile::TempDir;

/// The user whom every system has and who owns nothing.
const NOBODY: u32 = 65534;
/// Where the other user's engine finds the daemon.
const SOCKET: &str = "ENGINE_SOCKET";

/// A file system in memory of its own size, for as long as this lives.
struct SmallMemory(TempDir);

impl SmallMemory {
    /// `None`, with a line that says so, where nothing may be mounted.
    fn mount(size: &str) -> Option<Self> {
        let directory = tempfile::tempdir().unwrap();
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", &format!("size={size}"), "kvtide-test"])
            .arg(directory.path())
            .stderr(Stdio::null())
            .status();
        if mounted.is_ok_and(|status| status.success()) {
            return Some(Self(directory));
        }
        println!("SKIPPED: this user may not mount a tmpfs");
        None
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    /// Somebody else takes all but so many bytes.
    fn fill_but(&self, left: u64) -> PathBuf {
        let status = rustix::fs::statvfs(self.path()).unwrap();
        let free = status.f_bavail * status.f_frsize;
        let path = self.path().join("somebody-elses");
        fs::write(&path, vec![1; (free - left).try_into().unwrap()]).unwrap();
        path
    }
}

impl Drop for SmallMemory {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(self.path()).status();
    }
}

#[test]
fn a_capacity_that_does_not_fit_stops_the_start_with_what_to_do_and_leaves_nothing() {
    let Some(memory) = SmallMemory::mount("16M") else {
        return;
    };
    let place = Place::over(memory.path(), "64MiB", "2MiB");
    let daemon = place.spawn_at_once(place.command_of(Path::new(KVTIDE)));
    let (status, log) = daemon.ended();
    assert_eq!(status.code(), Some(1), "{status:?}: {log}");
    assert!(log.contains("memory.capacity: "), "{log}");
    assert!(log.contains("lower it, or enlarge the mount"), "{log}");
    assert!(!place.memory("memory").exists());
    // What it says helps.
    let _daemon = place.start_with(&[("KVTIDE_SERVE_MEMORY_CAPACITY", "8MiB")]);
}

#[test]
fn memory_that_others_fill_later_costs_saves_and_nothing_else() {
    let Some(memory) = SmallMemory::mount("24M") else {
        return;
    };
    let place = Place::over(memory.path(), "16MiB", "2MiB");
    let daemon = place.start();
    let mut engine = Engine::start(&place.socket(), "a", SMALL);
    engine.save(&keys(0..4));
    let others = memory.fill_but(0);
    // The tables of more rows find no room: what there is goes on.
    let found = engine.session.lookup(&keys(0..4));
    for chain in 1..20 {
        let chain = keys(chain * 100..chain * 100 + 32);
        let _ = engine.session.begin_save(&chain, 0, &[0; 32]);
    }
    assert_eq!(engine.load_leased(&found.lease, &keys(0..4)).right, 4);
    let error = Engine::attach(&place.socket(), "b", SMALL, Duration::from_secs(1));
    let error = error.err().unwrap().to_string();
    assert!(error.contains("has 0 MiB free"), "{error}");
    fs::remove_file(others).unwrap();
    let mut late = Engine::start(&place.socket(), "b", SMALL);
    assert!(late.loads(&keys(0..4)));
    drop((engine, late));
    let (status, log) = daemon.stop();
    assert!(
        status.success() && !log.contains("panicked"),
        "{status:?}: {log}"
    );
}

#[test]
fn nobody_in_particular_can_run_it_and_nobody_else_reads_its_memory() {
    if !rustix::process::geteuid().is_root() {
        println!("SKIPPED: this user may not run programs as another");
        return;
    }
    let place = Place::new();
    let program = place.path("kvtide");
    let engine = place.path("engine");
    fs::copy(KVTIDE, &program).unwrap();
    fs::copy(std::env::current_exe().unwrap(), &engine).unwrap();
    for path in [place.directory(), place.socket().parent().unwrap()] {
        chown(path, Some(NOBODY), Some(NOBODY)).unwrap();
    }
    for path in ["kvtide", "engine", "kvtide.toml"] {
        fs::set_permissions(place.path(path), Permissions::from_mode(0o755)).unwrap();
    }
    let mut command = place.command_of(&program);
    command.uid(NOBODY).gid(NOBODY).current_dir("/");
    let _daemon = place.spawn(command);
    let said = Command::new(&engine)
        .args([
            "--exact",
            "an_engine_of_another_user",
            "--ignored",
            "--nocapture",
        ])
        .env(SOCKET, place.socket())
        .uid(NOBODY)
        .gid(NOBODY)
        .current_dir("/")
        .output()
        .unwrap();
    assert!(
        said.status.success(),
        "{}",
        String::from_utf8_lossy(&said.stdout)
    );
    let status = place.until(|status| held(status) == 4);
    assert_eq!(status.namespaces[0].totals.hit_blocks, 0);
    let rights = |path: PathBuf| {
        let found = fs::metadata(&path).unwrap();
        (found.uid(), found.mode() & 0o777)
    };
    assert_eq!(rights(place.socket()), (NOBODY, 0o660));
    assert_eq!(rights(place.memory(".")), (NOBODY, 0o700));
    for entry in fs::read_dir(place.memory(".")).unwrap() {
        let path = entry.unwrap().path();
        let (owner, mode) = rights(path.clone());
        assert_eq!(owner, NOBODY, "{}", path.display());
        // The directory keeps others out; what has rows in it does so by itself.
        let is_secret = path
            .file_name()
            .is_some_and(|name| name != "lock" && name != "ledger");
        assert!(!is_secret || mode == 0o600, "{mode:o} {}", path.display());
    }
}

/// The process that the test above starts.
#[test]
#[ignore = "runs as another user; the test above starts it"]
fn an_engine_of_another_user() {
    let Some(socket) = std::env::var_os(SOCKET) else {
        return;
    };
    assert_eq!(rustix::process::geteuid().as_raw(), NOBODY);
    let mut engine = Engine::start(Path::new(&socket), "theirs", SMALL);
    engine.save(&keys(0..4));
    assert!(engine.loads(&keys(0..4)));
}
