//! Where the pages of a file lie, and how large they are.
//!
//! Both are decided when a page is taken. Whoever makes a file therefore says what it wants before
//! it takes memory for it; what is there already stays as it is.

use std::fs;
use std::io;
use std::ops::Range;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use memmap2::Advice;
use rustix::fs::{major, minor};

use crate::mapped::MappedFile;

/// On which NUMA nodes pages are taken.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Numa {
    /// As the process that takes them is told to, by numactl(8) for instance.
    #[default]
    AsTold,
    /// On all nodes by turns.
    Interleave,
    /// On the node on which the thread runs that takes them, as far as it has any.
    Local,
}

/// What a mount of tmpfs says of transparent huge pages, its option `huge=`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MountHugePages {
    /// There are none.
    Never,
    /// Where a map asks for them.
    Advise,
    /// Wherever a file is large enough.
    Always,
}

/// Words of a mask of nodes: as many as the kernel knows (`MAX_NUMNODES` is 1024 at most).
const MASK_WORDS: usize = 16;
const WORD_BITS: usize = 64;

impl MappedFile {
    /// Takes the file's pages on `numa` from now on, whichever process does.
    ///
    /// # Errors
    /// When the kernel knows nothing of nodes (ENOSYS), or the process may not say so (EPERM).
    pub fn place(&self, numa: Numa) -> io::Result<()> {
        let (mode, nodes) = match numa {
            Numa::AsTold => return Ok(()),
            Numa::Interleave => (libc::MPOL_INTERLEAVE, allowed_nodes()?),
            Numa::Local => (libc::MPOL_LOCAL, [0; MASK_WORDS]),
        };
        // The kernel takes one bit less than it is told.
        let bits = MASK_WORDS * WORD_BITS + 1;
        // SAFETY: the range is that of the map, which `self` keeps, and the call changes where
        // pages that are not there yet will lie, and neither the map nor what is in it. The mask is
        // read only, and has as many words as are announced.
        let done = unsafe {
            libc::syscall(
                libc::SYS_mbind,
                self.map.as_mut_ptr(),
                self.map.len(),
                mode,
                nodes.as_ptr(),
                bits,
                0,
            )
        };
        if done == 0 {
            return Ok(());
        }
        Err(io::Error::last_os_error())
    }

    /// Takes the pages of a part of the file through this map, which has asked for huge ones: only
    /// so does a mount with `huge=advise` give them. What is not taken now is when it is used.
    pub fn populate(&self, bytes: Range<usize>) -> io::Result<()> {
        self.map
            .advise_range(Advice::PopulateWrite, bytes.start, bytes.len())
    }
}

/// What the mount says on which `directory` lies.
///
/// # Errors
/// When it cannot be looked at.
pub fn mount_huge_pages(directory: &Path) -> io::Result<MountHugePages> {
    let device = fs::metadata(directory)?.dev();
    let device = format!("{}:{}", major(device), minor(device));
    let mounts = fs::read_to_string("/proc/self/mountinfo")?;
    Ok(option_of(&mounts, &device))
}

/// `36 35 98:0 /root /point rw,noatime master:1 - tmpfs tmpfs rw,huge=advise` (proc(5)).
fn option_of(mounts: &str, device: &str) -> MountHugePages {
    let mut mounts = mounts.lines();
    let mount = mounts.find(|line| line.split(' ').nth(2) == Some(device));
    let options = mount.and_then(|line| line.rsplit_once(' '));
    let mut options = options.map_or("", |(_, options)| options).split(',');
    match options.find_map(|option| option.strip_prefix("huge=")) {
        Some("advise") => MountHugePages::Advise,
        Some("always" | "within_size") => MountHugePages::Always,
        _ => MountHugePages::Never,
    }
}

/// The nodes that have memory which this process may take.
fn allowed_nodes() -> io::Result<[u64; MASK_WORDS]> {
    let with_memory = fs::read_to_string("/sys/devices/system/node/has_memory")?;
    let status = fs::read_to_string("/proc/self/status")?;
    let mut lines = status.lines();
    let allowed = lines.find_map(|line| line.strip_prefix("Mems_allowed_list:"));
    let (with_memory, allowed) = (mask(&with_memory), mask(allowed.unwrap_or("")));
    let mut both = [0; MASK_WORDS];
    for (both, (one, other)) in both.iter_mut().zip(with_memory.iter().zip(allowed)) {
        *both = one & other;
    }
    Ok(both)
}

/// The bits of a list such as `0-3,8`.
fn mask(list: &str) -> [u64; MASK_WORDS] {
    let mut mask = [0; MASK_WORDS];
    for part in list.trim().split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (Ok(first), Ok(last)) = (first.parse::<usize>(), last.parse::<usize>()) else {
            continue;
        };
        for node in first..=last.min(MASK_WORDS * WORD_BITS - 1) {
            mask[node / WORD_BITS] |= 1 << (node % WORD_BITS);
        }
    }
    mask
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{create_unnamed, reserve};

    #[test]
    fn lists_of_nodes_are_read() {
        assert_eq!(mask("0\n")[0], 1);
        assert_eq!(mask("0-3,8")[0], 0x10f);
        assert_eq!(mask("63-64")[..2], [1 << 63, 1]);
        assert_eq!(mask("4000-5000"), [0; MASK_WORDS]);
        assert_eq!(mask(""), [0; MASK_WORDS]);
    }

    #[test]
    fn the_option_of_the_right_mount_is_found() {
        let mounts = "29 22 0:25 / /dev/shm rw,relatime - tmpfs tmpfs rw,size=1k\n\
                      30 22 0:26 / /mnt/a\\040b rw shared:1 - tmpfs none rw,huge=advise,size=1k\n\
                      31 22 0:27 / /mnt/c rw - tmpfs none rw,huge=within_size\n";
        assert_eq!(option_of(mounts, "0:25"), MountHugePages::Never);
        assert_eq!(option_of(mounts, "0:26"), MountHugePages::Advise);
        assert_eq!(option_of(mounts, "0:27"), MountHugePages::Always);
        assert_eq!(option_of(mounts, "0:2"), MountHugePages::Never);
    }

    /// What the kernel says of the maps of a file: its policy, and the pages by node.
    fn kernels_word(name: &str) -> String {
        let maps = fs::read_to_string("/proc/self/numa_maps").unwrap();
        let mut maps = maps.lines().filter(|line| line.contains(name));
        maps.next().unwrap_or_default().to_owned()
    }

    #[test]
    fn a_files_pages_are_taken_as_its_maker_said_by_whoever_maps_it() {
        let directory = tempfile::tempdir_in("/dev/shm").unwrap();
        let path = directory.path().join("placed-memory");
        let file = create_unnamed(directory.path(), 1 << 20).unwrap();
        crate::give_name(&file, &path).unwrap();
        // Under its name, which the kernel then shows.
        let file = fs::File::options()
            .read(true)
            .write(true)
            .open(&path)
            .unwrap();
        let map = MappedFile::of(&file, &path).unwrap();
        if let Err(error) = map.place(Numa::Interleave) {
            eprintln!("SKIPPED: the kernel places no memory here: {error}");
            return;
        }
        reserve(&file, &path, 0..1 << 20).unwrap();
        assert!(kernels_word("placed-memory").contains(" interleave:"));
        drop(map);
        let map = MappedFile::of(&file, &path).unwrap();
        assert!(kernels_word("placed-memory").contains(" interleave:"));
        map.place(Numa::Local).unwrap();
        assert!(kernels_word("placed-memory").contains(" local"));
    }

    /// A tmpfs with `huge=advise` of a test's own; it is gone when this is dropped.
    struct Mount(tempfile::TempDir);

    impl Mount {
        /// `None` where this process may not mount anything.
        fn new() -> Option<Self> {
            let directory = tempfile::tempdir().unwrap();
            let mounted = std::process::Command::new("mount")
                .args(["-t", "tmpfs", "-o", "huge=advise,size=64m", "none"])
                .arg(directory.path())
                .output();
            let mounted = mounted.is_ok_and(|output| output.status.success());
            mounted.then(|| Self(directory))
        }
    }

    impl Drop for Mount {
        fn drop(&mut self) {
            let mut command = std::process::Command::new("umount");
            let _ = command.arg("--lazy").arg(self.0.path()).output();
        }
    }

    #[test]
    fn a_mount_that_is_to_be_asked_gives_huge_pages_through_a_map_and_none_without() {
        let Some(mount) = Mount::new() else {
            eprintln!("SKIPPED: this process may not mount a tmpfs");
            return;
        };
        assert_eq!(
            mount_huge_pages(mount.0.path()).unwrap(),
            MountHugePages::Advise
        );
        const BYTES: usize = 8 << 20;
        let huge = |asks: bool| {
            let path = mount.0.path().join(format!("asks-{asks}"));
            let file = crate::create_sparse(&path, BYTES).unwrap();
            let map = MappedFile::of(&file, &path).unwrap();
            if asks {
                map.populate(0..BYTES).unwrap();
            }
            reserve(&file, &path, 0..BYTES).unwrap();
            // Maps what is there, as it is.
            map.populate(0..BYTES).unwrap();
            let maps = fs::read_to_string("/proc/self/smaps").unwrap();
            let own = maps.split(&path.display().to_string()).nth(1).unwrap();
            let line = own.lines().find(|line| line.starts_with("ShmemPmdMapped:"));
            let kib = line.unwrap().split_whitespace().nth(1).unwrap();
            kib.parse::<usize>().unwrap() << 10
        };
        assert_eq!(huge(false), 0);
        assert!(huge(true) > 0, "or no huge page is free");
    }
}
