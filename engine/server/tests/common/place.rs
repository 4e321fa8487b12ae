//! The real program, and the place where one has its memory after the other.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::sleep;
use std::time::{Duration, Instant};

use kvtide_server::ask::Ask;
use kvtide_server::operator::{Operator, OperatorError};
use kvtide_server::status::{Namespace, Status};
use rustix::process::{Pid, Signal, kill_process};
use serde::de::DeserializeOwned;
use tempfile::TempDir;

use super::engine::LIMIT;

pub(crate) const KVTIDE: &str = env!("CARGO_BIN_EXE_kvtide");

/// Directories for memory, socket, configuration and logs, and the daemons that have them one after the
/// other.
pub(crate) struct Place {
    memory: PathBuf,
    own: TempDir,
    /// Removed with this, if it is this one's.
    _memory: Option<TempDir>,
    logs: AtomicUsize,
}

impl Place {
    pub(crate) fn new() -> Self {
        Self::with("16MiB", "2MiB")
    }

    pub(crate) fn with(capacity: &str, extent: &str) -> Self {
        let memory = tempfile::tempdir_in("/dev/shm").unwrap();
        let mut place = Self::over(memory.path(), capacity, extent);
        place._memory = Some(memory);
        place
    }

    /// With memory in a directory of somebody else.
    pub(crate) fn over(memory: &Path, capacity: &str, extent: &str) -> Self {
        let place = Self {
            memory: memory.to_owned(),
            own: tempfile::tempdir().unwrap(),
            _memory: None,
            logs: AtomicUsize::new(0),
        };
        let (memory, own) = (place.memory.display(), place.own.path().display());
        let text = format!(
            "[memory]\ncapacity = \"{capacity}\"\nextent = \"{extent}\"\ndirectory = \"{memory}\"\n\
             [socket]\npath = \"{own}/kvtide.sock\"\n[http]\nlisten = \"none\"\n\
             [shutdown]\ngrace = \"500ms\"\n"
        );
        fs::write(place.path("kvtide.toml"), text).unwrap();
        place
    }

    /// A file beside the socket.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.own.path().join(name)
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.path("kvtide.sock")
    }

    /// Where the pool has its directory.
    pub(crate) fn directory(&self) -> &Path {
        &self.memory
    }

    /// A file of the pool.
    pub(crate) fn memory(&self, name: &str) -> PathBuf {
        self.memory.join("kvtide-pool-pool").join(name)
    }

    pub(crate) fn start(&self) -> Daemon {
        self.start_with(&[])
    }

    pub(crate) fn start_with(&self, settings: &[(&str, &str)]) -> Daemon {
        let mut command = self.command_of(Path::new(KVTIDE));
        command.envs(settings.iter().copied());
        self.spawn(command)
    }

    /// `kvtide serve`, as `program` is it.
    pub(crate) fn command_of(&self, program: &Path) -> Command {
        let mut command = Command::new(program);
        command.args(["serve", "--config"]);
        command.arg(self.path("kvtide.toml"));
        command
    }

    /// Runs a daemon, and waits until it serves.
    pub(crate) fn spawn(&self, command: Command) -> Daemon {
        let daemon = self.spawn_at_once(command);
        super::until_ready(&self.socket());
        daemon
    }

    /// Runs a daemon.
    pub(crate) fn spawn_at_once(&self, mut command: Command) -> Daemon {
        let number = self.logs.fetch_add(1, Ordering::Relaxed);
        // A pipe that nobody reads would hold it up.
        let log = self.path(&format!("log-{number}"));
        let file = File::create(&log).unwrap();
        let child = command.stdin(Stdio::null()).stderr(file).spawn();
        Daemon {
            child: child.unwrap(),
            log,
        }
    }

    pub(crate) fn command(&self, arguments: &[&str]) -> Output {
        Command::new(KVTIDE)
            .args(arguments)
            .arg("--socket")
            .arg(self.socket())
            .output()
            .unwrap()
    }

    /// What a command prints for programs.
    pub(crate) fn ask<T: DeserializeOwned>(&self, arguments: &[&str]) -> T {
        let output = self.command(&[arguments, &["--json"]].concat());
        let told = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{told}");
        serde_json::from_slice(&output.stdout).unwrap()
    }

    /// What `kvtide status` asks for.
    pub(crate) fn try_status(&self) -> Result<Status, OperatorError> {
        Operator::connect(&self.socket())?.ask(&Ask::Status {})
    }

    pub(crate) fn status(&self) -> Status {
        self.try_status().unwrap()
    }

    /// The status, as soon as it is as it should be.
    pub(crate) fn until(&self, is_so: impl Fn(&Status) -> bool) -> Status {
        let begun = Instant::now();
        loop {
            let status = self.status();
            if is_so(&status) {
                return status;
            }
            assert!(begun.elapsed() < LIMIT, "{status:#?}");
            sleep(Duration::from_millis(10));
        }
    }
}

/// The program. A test that fails leaves none behind.
pub(crate) struct Daemon {
    child: Child,
    log: PathBuf,
}

impl Daemon {
    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    /// How it ended, and what it had logged.
    pub(crate) fn ended(mut self) -> (ExitStatus, String) {
        let status = self.child.wait().unwrap();
        (status, fs::read_to_string(&self.log).unwrap())
    }

    pub(crate) fn stop(self) -> (ExitStatus, String) {
        self.signal(Signal::TERM);
        self.ended()
    }

    pub(crate) fn kill(self) {
        self.signal(Signal::KILL);
        self.ended();
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Blocks that all models hold completely.
pub(crate) fn held(status: &Status) -> u64 {
    let whole = |each: &Namespace| each.held_blocks - each.saving_blocks;
    status.namespaces.iter().map(whole).sum()
}
