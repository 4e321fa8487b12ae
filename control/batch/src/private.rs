//! What this server keeps is its tenants': nobody else on the machine reads it.

use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use rustix::fs::Mode;
use rustix::process::umask;

/// What is in the data directory.
const KEPT: [&str; 7] = [
    "batch.sqlite",
    "batch.sqlite-wal",
    "batch.sqlite-shm",
    "lock",
    "files",
    "parts",
    "scratch",
];

/// From now on, files that this process makes are its user's alone.
pub(super) fn keep_new_files_private() {
    umask(Mode::RWXG | Mode::RWXO);
}

/// Takes others' access away from what an earlier version has left in `data`. The directory itself is
/// the operator's, unless this server makes it.
pub(super) fn keep_old_files_private(data: &Path) -> io::Result<()> {
    for name in KEPT {
        let path = data.join(name);
        let mode = match fs::metadata(&path) {
            Ok(metadata) => metadata.permissions().mode(),
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(error),
        };
        if mode & 0o077 != 0 {
            fs::set_permissions(&path, Permissions::from_mode(mode & 0o700))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_left_for_others_to_read_is_closed_and_can_still_be_used() {
        let data = tempfile::tempdir().unwrap();
        fs::create_dir(data.path().join("parts")).unwrap();
        fs::write(data.path().join("batch.sqlite"), b"x").unwrap();
        fs::write(data.path().join("unrelated"), b"x").unwrap();
        let mode = |name: &str| {
            let metadata = fs::metadata(data.path().join(name)).unwrap();
            metadata.permissions().mode() & 0o777
        };
        for name in ["parts", "batch.sqlite", "unrelated"] {
            let open = Permissions::from_mode(0o755);
            fs::set_permissions(data.path().join(name), open).unwrap();
        }
        keep_old_files_private(data.path()).unwrap();
        assert_eq!([mode("parts"), mode("batch.sqlite")], [0o700, 0o700]);
        assert_eq!(mode("unrelated"), 0o755);
    }
}
