//! How much memory this process may use.

use std::fs;

/// Memory that can be taken without swapping: the kernel's `MemAvailable`, or what the control group
/// (a container's limit) leaves, whichever is less. `u64::MAX` where neither can be read.
#[must_use]
pub fn available_memory_bytes() -> u64 {
    let meminfo = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let host = mem_available(&meminfo).unwrap_or(u64::MAX);
    host.min(control_group_room().unwrap_or(u64::MAX))
}

fn mem_available(meminfo: &str) -> Option<u64> {
    let line = meminfo
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

/// Control groups version 2, as seen from inside a container.
fn control_group_room() -> Option<u64> {
    let number = |name: &str| -> Option<u64> {
        fs::read_to_string(format!("/sys/fs/cgroup/{name}"))
            .ok()?
            .trim()
            .parse()
            .ok()
    };
    let used = number("memory.current")?;
    // Pages of files that were read, such as the model's weights, are given back on demand.
    let stat = fs::read_to_string("/sys/fs/cgroup/memory.stat").unwrap_or_default();
    let cached = stat
        .lines()
        .find_map(|line| line.strip_prefix("inactive_file "));
    let cached: u64 = cached
        .and_then(|value| value.trim().parse().ok())
        .unwrap_or(0);
    number("memory.max")?.checked_sub(used.saturating_sub(cached))
}

#[cfg(test)]
#[cfg(not(loom))]
mod tests {
    use super::*;

    #[test]
    fn available_memory_is_read_from_meminfo() {
        let text = "MemTotal:       24000000 kB\nMemAvailable:   23000000 kB\n";
        assert_eq!(mem_available(text), Some(23_000_000 * 1024));
        assert_eq!(mem_available(""), None);
        assert!(available_memory_bytes() > 1 << 20);
    }
}
