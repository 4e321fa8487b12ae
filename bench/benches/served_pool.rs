//! What `kvtide serve` costs as a process of its own with a million rows, how soon it is ready again, and
//! what an engine waits for it. The program is that of the release build, or the one that
//! `KVTIDE_BINARY` names; `KVTIDE_BENCH_OUTPUT` names a file for the raw numbers.
//!
//! It needs 10 GiB of `/dev/shm`. Criterion, which measures the rest, tells no percentiles.

#![allow(clippy::expect_used, clippy::print_stdout, reason = "a benchmark")]

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use kvtide_bench::{BLOCK_TOKENS, Engine, prompt, sequence};
use kvtide_engine::{Sequence, Session};
use rustix::process::{Pid, Signal, kill_process};
use rustix::time::{ClockId, clock_gettime};
use tempfile::TempDir;

const ROWS: usize = 1_000_000;
const ROW_BYTES: u64 = 4096;
const TOKENS: u32 = 131_072;
const BLOCKS: usize = (TOKENS / BLOCK_TOKENS) as usize;
/// Of a prompt, what an engine beside looks up at once.
const BESIDE_TOKENS: u32 = 2_048;
const RESTARTS: usize = 5;
const LOOKUPS: usize = 3_000;

/// A daemon's directory, and the daemons that have it one after the other.
struct Place {
    directory: TempDir,
    http: std::net::SocketAddr,
    capacity: String,
}

struct Daemon(Child);

impl Place {
    fn new(capacity: &str) -> Self {
        // Free a moment ago, and for nobody else to take.
        let free = TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr());
        Self {
            directory: tempfile::tempdir_in("/dev/shm").expect("a directory on shared memory"),
            http: free.expect("a port"),
            capacity: capacity.to_owned(),
        }
    }

    fn socket(&self) -> PathBuf {
        self.directory.path().join("kvtide.sock")
    }

    /// A daemon that serves, and how long it took from the start of its process.
    fn start(&self, scrub_rate: &str) -> (Daemon, Duration) {
        let begun = Instant::now();
        let child = Command::new(program())
            .arg("serve")
            .env("KVTIDE_SERVE_MEMORY_CAPACITY", &self.capacity)
            .env("KVTIDE_SERVE_MEMORY_DIRECTORY", self.directory.path())
            .env("KVTIDE_SERVE_SOCKET_PATH", self.socket())
            .env("KVTIDE_SERVE_HTTP_LISTEN", self.http.to_string())
            .env("KVTIDE_SERVE_SCRUB_RATE", scrub_rate)
            .env("KVTIDE_SERVE_LOG_LEVEL", "error")
            .stdin(Stdio::null())
            .spawn();
        let mut daemon = Daemon(child.expect("kvtide: cargo build --release -p kvtide-server"));
        while !self.is_ready() {
            let ended = daemon.0.try_wait().expect("a child");
            assert!(ended.is_none(), "the daemon has ended: {ended:?}");
            std::thread::sleep(Duration::from_millis(1));
        }
        (daemon, begun.elapsed())
    }

    fn is_ready(&self) -> bool {
        let ask = || -> std::io::Result<String> {
            let mut stream = TcpStream::connect(self.http)?;
            let line = "GET /readyz HTTP/1.1\r\nHost: bench\r\nConnection: close\r\n\r\n";
            stream.write_all(line.as_bytes())?;
            let mut answer = String::new();
            stream.read_to_string(&mut answer)?;
            Ok(answer)
        };
        ask().is_ok_and(|answer| answer.starts_with("HTTP/1.1 200"))
    }

    /// Bytes of all files but the rows.
    fn table_bytes(&self) -> u64 {
        let pool = self.directory.path().join("kvtide-pool-pool");
        let entries = fs::read_dir(pool).expect("the pool's directory");
        let entries = entries.map(|entry| entry.expect("a file"));
        entries
            .filter(|entry| entry.file_name() != "memory")
            .map(|entry| entry.metadata().map_or(0, |status| status.blocks() * 512))
            .sum()
    }
}

impl Daemon {
    fn end(mut self, signal: Signal) {
        kill_process(Pid::from_child(&self.0), signal).expect("it runs");
        self.0.wait().expect("it ends");
    }

    /// Bytes of memory that are the process's own; what it shares lies in files.
    fn own_bytes(&self) -> u64 {
        let path = format!("/proc/{}/status", self.0.id());
        let status = fs::read_to_string(path).expect("it runs");
        let value = |name: &str| -> u64 {
            let line = status.lines().find(|line| line.starts_with(name));
            let number = line.and_then(|line| line.split_whitespace().nth(1));
            number.map_or(0, |number| number.parse::<u64>().expect("a number") * 1024)
        };
        value("RssAnon:") + value("RssFile:")
    }

    /// Time on a core that all of its threads have had.
    fn cpu(&self) -> Duration {
        let path = format!("/proc/{}/stat", self.0.id());
        let stat = fs::read_to_string(path).expect("it runs");
        // Behind the name, which may have anything in it.
        let (_, fields) = stat.rsplit_once(')').expect("a name");
        let ticks = fields.split_whitespace().skip(11).take(2);
        let ticks: u64 = ticks.map(|word| word.parse::<u64>().expect("ticks")).sum();
        Duration::from_millis(ticks * 1000 / rustix::param::clock_ticks_per_second())
    }

    /// Share of a core in per cent, over thirty seconds: a tick is a hundredth of one.
    fn idle_percent(&self) -> f64 {
        // What has just ended has done so.
        std::thread::sleep(Duration::from_secs(2));
        let (begun, before) = (Instant::now(), self.cpu());
        std::thread::sleep(Duration::from_secs(30));
        let used = self.cpu().saturating_sub(before);
        used.as_secs_f64() / begun.elapsed().as_secs_f64() * 100.0
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn program() -> PathBuf {
    if let Some(path) = std::env::var_os("KVTIDE_BINARY") {
        return path.into();
    }
    // target/release/deps/served_pool-…
    let own = std::env::current_exe().expect("this program");
    own.ancestors()
        .nth(2)
        .unwrap_or(Path::new(""))
        .join("kvtide")
}

/// What was measured: a name, a value, a unit.
struct Found(Vec<(String, f64, &'static str)>);

impl Found {
    fn note(&mut self, name: impl Into<String>, value: f64, unit: &'static str) {
        let name = name.into();
        println!("{name}: {value:.4} {unit}");
        self.0.push((name, value, unit));
    }

    /// Percentiles of times in `unit`, of which there are so many in a second.
    fn note_times(&mut self, name: &str, mut times: Vec<Duration>, unit: (&'static str, f64)) {
        times.sort_unstable();
        let last = times.len().saturating_sub(1);
        let all = [("median", 50), ("p99", 99), ("greatest", 100)];
        // Of few, there is nothing between.
        for (which, percent) in all.into_iter().filter(|&(_, p)| p != 99 || last >= 100) {
            let time = times.get(last * percent / 100).copied().unwrap_or_default();
            self.note(
                format!("{name}, {which}"),
                time.as_secs_f64() * unit.1,
                unit.0,
            );
        }
    }

    fn write(&self) {
        let Some(path) = std::env::var_os("KVTIDE_BENCH_OUTPUT") else {
            return;
        };
        let values: serde_json::Map<_, _> = self
            .0
            .iter()
            .map(|(name, value, unit)| (name.clone(), serde_json::json!([value, unit])))
            .collect();
        let text = serde_json::to_string_pretty(&values).expect("numbers");
        fs::write(path, text + "\n").expect("a file that can be written");
    }
}

const MS: (&str, f64) = ("ms", 1e3);
const US: (&str, f64) = ("µs", 1e6);

/// Time on a core that this thread has had.
fn thread_time() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    let part = |number: i64| u64::try_from(number).expect("a time that has passed");
    Duration::from_secs(part(time.tv_sec)) + Duration::from_nanos(part(time.tv_nsec))
}

fn look_up(session: &Session, hashed: &mut Sequence, blocks: usize) {
    hashed.release(); // Or what was matched before would be kept.
    let matched = hashed.match_blocks(session, 0, blocks, false);
    assert_eq!(matched.blocks, blocks);
}

/// A million rows: their cost at rest, and how soon they are there again.
fn rows(found: &mut Found) {
    let place = Place::new("4GiB");
    let (daemon, _) = place.start("0B");
    let engine = Engine::attach(&place.socket(), "first", ROW_BYTES);
    for seed in 0..u32::try_from(ROWS.div_ceil(BLOCKS)).expect("few") {
        engine.save(sequence(&prompt(seed, TOKENS)).keys());
    }
    let beside = daemon.own_bytes() + place.table_bytes();
    found.note(
        "bytes a row beside the rows",
        beside as f64 / ROWS as f64,
        "bytes",
    );
    found.note(
        "of them the process's own",
        daemon.own_bytes() as f64 / ROWS as f64,
        "bytes",
    );
    found.note(
        "idle, an engine attached, no scrub",
        daemon.idle_percent(),
        "% of a core",
    );
    drop(engine);
    let mut daemon = daemon;
    for (name, signal) in [("SIGTERM", Signal::TERM), ("kill -9", Signal::KILL)] {
        let mut times = Vec::new();
        for _ in 0..RESTARTS {
            daemon.end(signal);
            let (next, took) = place.start("0B");
            times.push(took);
            daemon = next;
        }
        found.note_times(&format!("ready again after {name}"), times, MS);
    }
    daemon.end(Signal::TERM);
    let (daemon, _) = place.start("32MiB");
    let engine = Engine::attach(&place.socket(), "first", ROW_BYTES);
    found.note(
        "idle, an engine attached, scrub as by default",
        daemon.idle_percent(),
        "% of a core",
    );
    lookups(found, &place, &engine);
}

/// A warm prompt of the greatest length, beside eight engines that take half a core in all.
fn lookups(found: &mut Found, place: &Place, engine: &Engine) {
    let mut hashed = sequence(&prompt(3, TOKENS));
    let mut measure = |engine: &Engine, name: &str| {
        let (mut times, mut own) = (Vec::new(), Vec::new());
        for _ in 0..LOOKUPS {
            let (began, before) = (Instant::now(), thread_time());
            look_up(&engine.session, &mut hashed, BLOCKS);
            own.push(thread_time().saturating_sub(before));
            times.push(began.elapsed());
        }
        hashed.release();
        found.note_times(name, times, US);
        // What is left when others have work for the same cores.
        found.note_times(&format!("{name}, on a core"), own, US);
    };
    measure(engine, "lookup and pin of 131,072 tokens, alone");
    let attach = |n: u32| Engine::attach(&place.socket(), &format!("other{n}"), ROW_BYTES);
    let others: Vec<Engine> = (0..8).map(attach).collect();
    let (done, asked) = (AtomicBool::new(false), AtomicU64::new(0));
    let begun = Instant::now();
    std::thread::scope(|scope| {
        for (seed, other) in (0..).zip(&others) {
            let (done, asked) = (&done, &asked);
            scope.spawn(move || {
                let mut hashed = sequence(&prompt(seed, BESIDE_TOKENS));
                while !done.load(Ordering::Relaxed) {
                    let began = Instant::now();
                    look_up(&other.session, &mut hashed, 128);
                    asked.fetch_add(1, Ordering::Relaxed);
                    // A sixteenth of a core each.
                    std::thread::sleep(began.elapsed() * 15);
                }
            });
        }
        measure(engine, "lookup and pin of 131,072 tokens, beside 8 engines");
        done.store(true, Ordering::Relaxed);
    });
    let rate = asked.into_inner() as f64 / begun.elapsed().as_secs_f64();
    found.note("lookups of 128 blocks of those 8 together", rate, "1/s");
    let counted = AtomicU64::new(0);
    let begun = Instant::now();
    std::thread::scope(|scope| {
        for (seed, other) in (0..2).zip(&others) {
            let counted = &counted;
            scope.spawn(move || {
                let mut hashed = sequence(&prompt(seed, BESIDE_TOKENS));
                while begun.elapsed() < Duration::from_secs(3) {
                    look_up(&other.session, &mut hashed, 128);
                    counted.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
    });
    let rate = counted.into_inner() as f64 / begun.elapsed().as_secs_f64();
    found.note("lookups of 128 blocks on two cores", rate, "1/s");
}

/// What an engine waits for 10 GiB, in rows of the size that an 8B model has.
fn attaching(found: &mut Found) {
    let place = Place::new("10GiB");
    let (_daemon, took) = place.start("0B");
    found.note(
        "ready with 10 GiB that nobody had before",
        took.as_secs_f64(),
        "s",
    );
    let mut times = Vec::new();
    for n in 0..RESTARTS {
        let begun = Instant::now();
        let engine = Engine::attach(&place.socket(), &format!("engine{n}"), 2 << 20);
        times.push(begun.elapsed());
        drop(engine);
    }
    found.note_times("an engine attaches to 10 GiB", times, MS);
}

fn main() {
    let load = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    println!("load average at the beginning: {}", load.trim());
    let mut found = Found(Vec::new());
    rows(&mut found);
    attaching(&mut found);
    found.write();
}
