//! Where segment files live, and how the directory is kept free of dead ones.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};

/// All segment files begin with this; nothing else in the directory is ever touched.
const PREFIX: &str = "kvtide-";
/// Size of the huge pages that x86-64 and arm64 (4 KiB granule) reserve by default.
const HUGE_PAGE_BYTES: usize = 2 << 20;

/// Whether the segment goes on a hugetlbfs mount.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum HugePages {
    /// Where one is mounted and has enough free pages; else plain shared memory.
    #[default]
    Auto,
    /// Never.
    Off,
    /// Always; it is an error if there are too few.
    Require,
}

/// Name of the segment of `instance` inside a directory.
pub(crate) fn file_name(instance: &str) -> String {
    let safe = |c: char| {
        if c.is_ascii_alphanumeric() || "-_.".contains(c) {
            c
        } else {
            '_'
        }
    };
    format!(
        "{PREFIX}{}",
        instance.chars().map(safe).take(200).collect::<String>()
    )
}

/// Serialises creation and removal of segments in `directory`; held until dropped.
pub(crate) fn lock(directory: &Path) -> io::Result<File> {
    let handle = File::open(directory)?;
    flock(&handle, FlockOperation::LockExclusive)?;
    Ok(handle)
}

/// As [`lock`], for a process that is leaving: it does not wait long for another that is creating
/// its segment.
pub(crate) fn lock_soon(directory: &Path) -> Option<File> {
    const TRIES: u32 = 50;
    let handle = File::open(directory).ok()?;
    for _ in 0..TRIES {
        if flock(&handle, FlockOperation::NonBlockingLockExclusive).is_ok() {
            return Some(handle);
        }
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    None
}

/// Removes the segments in `directory` that no process holds; the caller holds [`lock`].
///
/// Returns the names of removed files. A file of another user is left alone, and so is one that
/// vanishes meanwhile.
pub(crate) fn reclaim(directory: &Path) -> io::Result<Vec<PathBuf>> {
    let mut removed = Vec::new();
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        let ours = path
            .file_name()
            .is_some_and(|n| n.to_string_lossy().starts_with(PREFIX));
        if !ours {
            continue;
        }
        // Not ours to open, or gone: nothing to reclaim.
        let Ok(file) = File::options().read(true).write(true).open(&path) else {
            continue;
        };
        if is_unused(&file) && fs::remove_file(&path).is_ok() {
            removed.push(path);
        }
    }
    Ok(removed)
}

/// Whether no other open of `file` holds it.
pub(crate) fn is_unused(file: &File) -> bool {
    flock(file, FlockOperation::NonBlockingLockExclusive).is_ok()
}

/// The hugetlbfs mount to use for `bytes`, if there is one with enough free pages.
pub(crate) fn huge_page_mount(bytes: usize) -> Option<PathBuf> {
    let mounts = fs::read_to_string("/proc/mounts").ok()?;
    let mount = mounts.lines().find_map(|line| {
        let mut fields = line.split_whitespace();
        let (_, point, kind) = (fields.next()?, fields.next()?, fields.next()?);
        (kind == "hugetlbfs").then(|| PathBuf::from(point))
    })?;
    let status = rustix::fs::statvfs(&mount).ok()?;
    // Pages of another size (1 GiB) would need another rounding; they are not chosen.
    (status.f_bsize == HUGE_PAGE_BYTES as u64).then_some(())?;
    let meminfo = fs::read_to_string("/proc/meminfo").ok()?;
    let free: usize = meminfo
        .lines()
        .find_map(|line| line.strip_prefix("HugePages_Free:"))
        .and_then(|rest| rest.trim().parse().ok())?;
    (free >= bytes.div_ceil(HUGE_PAGE_BYTES)).then_some(mount)
}

/// `bytes` rounded up to what a file on hugetlbfs may have.
pub(crate) fn huge_page_round(bytes: usize) -> usize {
    bytes.next_multiple_of(HUGE_PAGE_BYTES)
}
