//! Where segment files live, and how the directory is kept free of dead ones.
//!
//! One rule makes removal safe without a lock on the directory: a file's name is removed only by who
//! holds its exclusive lock, and so knows that nobody uses it, or by the engine that uses it. While
//! somebody holds the exclusive lock of a file and has seen it under its name, the name stays.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::fs::{Access, FlockOperation, flock, fstat};

use crate::error::{SegmentError, io_error};

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

/// The file system that keeps a segment in memory (statfs(2)): tmpfs. Memory cannot be reserved on ramfs,
/// and huge pages have a setting of their own.
const TMPFS: u32 = 0x0102_1994;
/// Others that a container may have at a path of its own.
const KINDS: [(u32, &str); 13] = [
    (0x8584_58f6, "ramfs"),
    (0x9584_58f6, "hugetlbfs"),
    (0xef53, "ext4"),
    (0x5846_5342, "xfs"),
    (0x9123_683e, "btrfs"),
    (0x2fc1_2fc1, "zfs"),
    (0xf2f5_2010, "f2fs"),
    (0x794c_7630, "overlayfs"),
    (0x6573_5546, "fuse"),
    (0x6969, "nfs"),
    (0xff53_4d42, "cifs"),
    (0x0102_1997, "9p"),
    (0x9fa0, "proc"),
];

/// Refuses a directory that is not on tmpfs: to a disk the kernel would write the pool all the time.
///
/// # Errors
/// [`SegmentError`] when it is elsewhere, or cannot be looked at.
pub fn require_memory(directory: &Path) -> Result<(), SegmentError> {
    let status =
        rustix::fs::statfs(directory).map_err(|errno| io_error("stat", directory)(errno.into()))?;
    // The kernel's word for it is wider, and signed on some platforms.
    let kind = u32::try_from(i128::from(status.f_type) & 0xffff_ffff).unwrap_or(0);
    if kind == TMPFS {
        return Ok(());
    }
    let known = KINDS.iter().find(|(magic, _)| *magic == kind);
    Err(SegmentError::NotInMemory {
        directory: directory.display().to_string(),
        file_system: known.map_or_else(|| format!("{kind:#x}"), |(_, name)| (*name).to_owned()),
    })
}

/// Opens a file that exists; `None` if it does not, any more.
pub(crate) fn open_existing(path: &Path) -> Result<Option<File>, SegmentError> {
    match File::options().read(true).write(true).open(path) {
        Ok(file) => Ok(Some(file)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            let own = rustix::process::geteuid().as_raw();
            match fs::symlink_metadata(path).map(|status| status.uid()) {
                Ok(owner) if owner != own => Err(SegmentError::OtherUser {
                    path: path.display().to_string(),
                    owner,
                }),
                _ => Err(io_error("open", path)(error)),
            }
        }
        Err(error) => Err(io_error("open", path)(error)),
    }
}

/// Removes the files of kvtide in `directory` that no process holds.
///
/// Returns the segments among the removed files. A file of another user is left alone, and so is one
/// that vanishes meanwhile.
pub(crate) fn reclaim(directory: &Path) -> io::Result<Vec<PathBuf>> {
    let mut removed = Vec::new();
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if !name.starts_with(PREFIX) {
            continue;
        }
        let segment = !name.contains('@');
        // Not ours to open, or gone: nothing to reclaim.
        let Ok(file) = File::options().read(true).write(true).open(&path) else {
            continue;
        };
        if remove_unused(&file, &path) && segment {
            removed.push(path);
        }
    }
    Ok(removed)
}

/// Removes the name `path` of `file` if nobody else holds the file; whether it did.
pub(crate) fn remove_unused(file: &File, path: &Path) -> bool {
    is_unused(file) && is_at(file, path) && fs::remove_file(path).is_ok()
}

/// Whether no other open of `file` holds it. If so, this one does, exclusively.
pub(crate) fn is_unused(file: &File) -> bool {
    flock(file, FlockOperation::NonBlockingLockExclusive).is_ok()
}

/// Whether `path` is a name of `file`: another file may bear it by now.
pub(crate) fn is_at(file: &File, path: &Path) -> bool {
    let (Ok(own), Ok(named)) = (fstat(file), rustix::fs::lstat(path)) else {
        return false;
    };
    (own.st_dev, own.st_ino) == (named.st_dev, named.st_ino)
}

/// The hugetlbfs mount to use for `bytes`, if there is one with enough free pages that this user may
/// write.
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
    // One that this user may not enter or write is none.
    let usable = Access::READ_OK | Access::WRITE_OK | Access::EXEC_OK;
    rustix::fs::access(&mount, usable).ok()?;
    (free >= bytes.div_ceil(HUGE_PAGE_BYTES)).then_some(mount)
}

/// `bytes` rounded up to what a file on hugetlbfs may have.
pub(crate) fn huge_page_round(bytes: usize) -> usize {
    bytes.next_multiple_of(HUGE_PAGE_BYTES)
}
