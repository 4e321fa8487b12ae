//! How much memory this process may use.

use std::fs;
use std::path::{Path, PathBuf};

/// Memory that can be taken without swapping: the kernel's `MemAvailable`, or what the limits of this
/// process's control groups (a container's, a pod's) leave, whichever is less. `u64::MAX` where
/// nothing can be read.
#[must_use]
pub fn available_memory_bytes() -> u64 {
    available_under(Path::new("/"))
}

/// As [`available_memory_bytes`], in a file system whose root is `root`.
fn available_under(root: &Path) -> u64 {
    let meminfo = fs::read_to_string(root.join("proc/meminfo")).unwrap_or_default();
    let groups = fs::read_to_string(root.join("proc/self/cgroup")).unwrap_or_default();
    let mounts = root.join("sys/fs/cgroup");
    let limits = groups.lines().filter_map(|line| room(line, &mounts));
    limits
        .chain(mem_available(&meminfo))
        .min()
        .unwrap_or(u64::MAX)
}

fn mem_available(meminfo: &str) -> Option<u64> {
    let line = meminfo
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

/// The names that a version of control groups has for what is asked of it.
struct Version {
    limit: &'static str,
    used: &'static str,
    /// In `memory.stat`: pages of files that were read, such as the model's weights, are given back
    /// on demand.
    cached: &'static str,
}

const V1: Version = Version {
    limit: "memory.limit_in_bytes",
    used: "memory.usage_in_bytes",
    cached: "total_inactive_file ",
};
const V2: Version = Version {
    limit: "memory.max",
    used: "memory.current",
    cached: "inactive_file ",
};

/// What the limits leave of the group that a line of `/proc/self/cgroup` names, and of all groups
/// around it. `mounts` is where control groups are mounted.
fn room(line: &str, mounts: &Path) -> Option<u64> {
    let mut fields = line.splitn(3, ':');
    let (_, controllers, path) = (fields.next()?, fields.next()?, fields.next()?);
    let (version, hierarchies): (_, &[&str]) = if controllers.is_empty() {
        (V2, &["", "unified"]) // The latter beside version 1.
    } else if controllers.split(',').any(|name| name == "memory") {
        (V1, &["memory"])
    } else {
        return None;
    };
    let group = path.trim_start_matches('/');
    let groups = hierarchies.iter().flat_map(|hierarchy| {
        let top = mounts.join(hierarchy);
        // In a container the path may be the host's, and the container's own group at the top.
        let inside: Vec<PathBuf> = Path::new(group).ancestors().map(|g| top.join(g)).collect();
        inside
    });
    groups.filter_map(|group| version.room(&group)).min()
}

impl Version {
    /// What the limit of one group leaves, if it has one.
    fn room(&self, group: &Path) -> Option<u64> {
        let number = |name: &str| -> Option<u64> {
            let text = fs::read_to_string(group.join(name)).ok()?;
            text.trim().parse().ok()
        };
        let (limit, used) = (number(self.limit)?, number(self.used)?);
        let stat = fs::read_to_string(group.join("memory.stat")).unwrap_or_default();
        let cached = stat.lines().find_map(|line| line.strip_prefix(self.cached));
        let cached: u64 = cached.and_then(|n| n.trim().parse().ok()).unwrap_or(0);
        Some(limit.saturating_sub(used.saturating_sub(cached)))
    }
}

#[cfg(test)]
#[cfg(not(loom))]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    /// A file system with 64 GiB available, in which this process is in `groups`.
    struct Host(tempfile::TempDir);

    impl Host {
        fn new(groups: &str) -> Self {
            let host = Self(tempfile::tempdir().unwrap());
            host.write(
                "proc/meminfo",
                &format!("MemAvailable: {} kB\n", 64 * GIB / 1024),
            );
            host.write("proc/self/cgroup", groups);
            host
        }

        fn write(&self, path: &str, text: &str) {
            let path = self.0.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }

        fn group(&self, version: &Version, group: &str, limit: &str, used: u64, cached: u64) {
            let file = |name: &str| format!("sys/fs/cgroup/{group}/{name}");
            self.write(&file(version.limit), &format!("{limit}\n"));
            self.write(&file(version.used), &format!("{used}\n"));
            let stat = format!("cache 7\n{}{cached}\n", version.cached);
            self.write(&file("memory.stat"), &stat);
        }

        fn available(&self) -> u64 {
            available_under(self.0.path())
        }
    }

    const UNLIMITED_V1: &str = "9223372036854771712";

    fn gib(count: u64) -> String {
        (count * GIB).to_string()
    }

    #[test]
    fn available_memory_is_read_from_meminfo() {
        let text = "MemTotal:       24000000 kB\nMemAvailable:   23000000 kB\n";
        assert_eq!(mem_available(text), Some(23_000_000 * 1024));
        assert_eq!(mem_available(""), None);
        assert!(available_memory_bytes() > 1 << 20);
        assert_eq!(available_under(Path::new("/no/such/place")), u64::MAX);
    }

    #[test]
    fn without_limits_the_host_counts() {
        let host = Host::new("0::/\n");
        host.group(&V2, "", "max", 3 * GIB, 0);
        assert_eq!(host.available(), 64 * GIB);
        let host = Host::new("5:memory:/\n1:cpu,cpuacct:/\n");
        host.group(&V1, "memory", UNLIMITED_V1, 3 * GIB, 0);
        assert_eq!(host.available(), 64 * GIB);
    }

    #[test]
    fn the_limit_of_a_container_counts_in_both_versions() {
        let host = Host::new("0::/\n");
        host.group(&V2, "", &gib(8), 3 * GIB, GIB);
        assert_eq!(host.available(), 6 * GIB);
        let host = Host::new("5:cpu,memory:/\n");
        host.group(&V1, "memory", &gib(8), 3 * GIB, GIB);
        assert_eq!(host.available(), 6 * GIB);
    }

    #[test]
    fn a_container_of_version_1_may_see_the_path_that_it_has_on_the_host() {
        let host = Host::new("5:memory:/kubepods/pod1/container2\n0::/kubepods/pod1/container2\n");
        host.group(&V1, "memory", &gib(3), GIB, 0);
        assert_eq!(host.available(), 2 * GIB);
    }

    #[test]
    fn the_lowest_of_nested_limits_counts() {
        let line = "0::/kubepods/pod1/container2\n";
        let limits = [
            ("kubepods", 9),
            ("kubepods/pod1", 5),
            ("kubepods/pod1/container2", 7),
        ];
        let host = Host::new(line);
        for (group, limit) in limits {
            host.group(&V2, group, &gib(limit), GIB, 0);
        }
        assert_eq!(host.available(), 4 * GIB);
        let host = Host::new("9:memory:/kubepods/pod1/container2\n");
        for (group, limit) in limits {
            host.group(&V1, &format!("memory/{group}"), &gib(limit), GIB, 0);
        }
        assert_eq!(host.available(), 4 * GIB);
    }

    #[test]
    fn beside_version_1_that_of_version_2_is_elsewhere() {
        let host = Host::new("5:memory:/a\n0::/a\n");
        host.group(&V1, "memory/a", UNLIMITED_V1, GIB, 0);
        host.group(&V2, "unified/a", &gib(4), GIB, 0);
        assert_eq!(host.available(), 3 * GIB);
    }

    #[test]
    fn a_group_that_is_over_its_limit_leaves_nothing() {
        let host = Host::new("0::/\n");
        host.group(&V2, "", &gib(2), 3 * GIB, 0);
        assert_eq!(host.available(), 0);
    }
}
