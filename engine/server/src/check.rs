//! `kvtide serve --check`: what of this machine would keep the daemon from starting.
//!
//! Nothing is changed, and a daemon that runs is not disturbed: the check is for the moment before a
//! restart.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use kvtide_engine::{NodeOptions, Outlook};
use kvtide_segment::{HugePages, MappedFile, MountHugePages, Numa, SegmentError, mount_huge_pages};
use rustix::fs::{Access, access, statvfs};

use crate::config::{Config, Memory, Socket};
use crate::pooled::node_options;
use crate::print::size;
use crate::socket::{group_id, holder, user_id};

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// What.
    pub subject: &'static str,
    /// How it is, or what is wrong and what to do.
    pub result: Result<String, String>,
}

/// What works, and may not be meant.
#[must_use]
pub fn notes(config: &Config) -> Vec<String> {
    let shown = config.memory.directory.display();
    match Outlook::of(&node_options(config)) {
        Ok(Outlook::Anew { why }) => vec![format!(
            "the memory in {shown} would begin anew, empty: {why}; engines that are attached to it would \
             have to be started anew"
        )],
        Ok(Outlook::New | Outlook::Kept { .. }) => Vec::new(),
        Err(error) => vec![format!(
            "whether the memory in {shown} would be kept cannot be seen: {error}; check as the daemon's \
             user"
        )],
    }
}

/// Looks at everything.
#[must_use]
pub fn findings(config: &Config) -> Vec<Finding> {
    let finding = |subject, result| Finding { subject, result };
    let mut found = vec![
        finding("memory directory", is_on_tmpfs(&config.memory.directory)),
        finding("room", has_room(&config.memory)),
        finding("huge pages", has_huge_pages(&config.memory)),
        finding("numa", can_place(config.memory.numa)),
        finding("socket directory", can_hold_a_socket(&config.socket)),
        finding("socket owner", owner_is_known(&config.socket)),
    ];
    if let Some(pid) = holder(&config.socket.path) {
        let note = format!("process {pid} serves it now; it has to stop before this one starts");
        found.push(finding("socket", Ok(note)));
    }
    found
}

fn is_on_tmpfs(directory: &Path) -> Result<String, String> {
    let shown = directory.display();
    let why = match kvtide_segment::require_memory(directory) {
        Ok(()) => return Ok(format!("{shown} is on tmpfs")),
        Err(SegmentError::NotInMemory { file_system, .. }) => {
            format!("{shown} is on a file system of type {file_system}, which is not memory")
        }
        Err(error) => error.to_string(),
    };
    Err(format!(
        "{why}; set memory.directory to a directory on tmpfs, such as /dev/shm"
    ))
}

/// What the pool's file has already counts as room: the next daemon takes it over.
fn has_room(memory: &Memory) -> Result<String, String> {
    let directory = &memory.directory;
    let status = statvfs(directory).map_err(|errno| {
        let directory = directory.display();
        format!("{directory}: {errno}; set memory.directory to an existing directory")
    })?;
    let needed = memory.capacity_bytes;
    // A tmpfs without a size limit reports no blocks at all.
    if status.f_blocks == 0 {
        return Ok(format!("{} has no limit", directory.display()));
    }
    let free = status
        .f_bavail
        .saturating_mul(status.f_frsize)
        .saturating_add(held_bytes(memory));
    let sizes = format!("{} of {} are free", size(free), directory.display());
    if free >= needed {
        return Ok(format!("{sizes}, {} are needed", size(needed)));
    }
    Err(format!(
        "{sizes}, {} are needed; lower memory.capacity, or enlarge it (mount -o remount,size=…; in \
         Kubernetes the sizeLimit of its emptyDir)",
        size(needed)
    ))
}

fn has_huge_pages(memory: &Memory) -> Result<String, String> {
    let shown = memory.directory.display();
    let mount = mount_huge_pages(&memory.directory).unwrap_or(MountHugePages::Never);
    match (memory.huge_pages, mount) {
        (HugePages::Off, _) => Ok("none are asked for".into()),
        (_, MountHugePages::Advise | MountHugePages::Always) => {
            Ok(format!("{shown} is mounted with them"))
        }
        (HugePages::Auto, _) => Ok(format!(
            "{shown} is mounted without them; mount -o remount,huge=within_size gives some"
        )),
        (HugePages::Require, _) => Err(format!(
            "{shown} is mounted without them; mount it with them (mount -o remount,huge=within_size), or \
             set memory.huge_pages to \"auto\""
        )),
    }
}

/// Tries it on a page of its own.
fn can_place(numa: Numa) -> Result<String, String> {
    const PAGE_BYTES: usize = 4096;
    let page = MappedFile::private(PAGE_BYTES).map_err(|error| error.to_string())?;
    match (page.place(numa), numa) {
        (Ok(()), Numa::AsTold) => Ok("memory lies where this process is told to take it".into()),
        (Ok(()), Numa::Interleave) => Ok("memory is spread over all nodes".into()),
        (Ok(()), Numa::Local) => Ok("memory lies on the node of the thread that takes it".into()),
        (Err(error), _) => Err(format!(
            "the kernel does not let this process place memory (mbind: {error}); allow the call, which \
             profiles of seccomp may forbid, or set memory.numa to \"none\""
        )),
    }
}

/// Bytes that the pool's memory has now.
#[must_use]
pub fn held_bytes(memory: &Memory) -> u64 {
    let path = NodeOptions::memory_file(&memory.directory, &memory.name);
    let found = fs::symlink_metadata(path);
    found.map_or(0, |file| file.blocks().saturating_mul(512))
}

fn can_hold_a_socket(socket: &Socket) -> Result<String, String> {
    let directory = socket.path.parent().unwrap_or(Path::new("/"));
    let shown = directory.display();
    if !directory.is_dir() {
        return Err(format!(
            "{shown} is no directory; create it, let systemd do so with RuntimeDirectory=, or set \
             socket.path to another path"
        ));
    }
    match access(directory, Access::WRITE_OK | Access::EXEC_OK) {
        Ok(()) => Ok(format!("{shown} can be written")),
        Err(errno) => Err(format!(
            "{shown} cannot be written by user {} ({errno}); give it to the daemon's user",
            rustix::process::geteuid().as_raw()
        )),
    }
}

fn owner_is_known(socket: &Socket) -> Result<String, String> {
    let user = socket.owner.as_deref().map(user_id).transpose();
    let group = socket.group.as_deref().map(group_id).transpose();
    let id = |id: Option<u32>| id.map_or("the daemon's own".to_owned(), |id| id.to_string());
    let user = user.map_err(|error| error.to_string())?;
    let group = group.map_err(|error| error.to_string())?;
    Ok(format!(
        "user {}, group {}, mode {:04o}",
        id(user),
        id(group),
        socket.mode
    ))
}
