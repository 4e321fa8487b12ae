//! The file of API keys, which the servers of the control plane share.
//!
//! Only hashes are kept: `{"keys": [{"tenant": "search", "sha256": "9f86d0…"}]}`. A key is 256 random
//! bits, so a plain hash of it cannot be turned around by guessing. The file is read again when it
//! changes; a file that cannot be read leaves the keys as they were.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::SystemTime;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

/// What a new key begins with, so that people and scanners of leaked secrets recognise it.
const PREFIX: &str = "sk-kvtide-";

/// A tenant's entry in the file. Several keys may name one tenant, for instance to replace one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Key {
    /// Whose key it is: what files and batches belong to.
    pub tenant: String,
    /// The SHA-256 of the key, in hexadecimal digits.
    pub sha256: String,
    /// Bytes of files that the tenant may keep; none is no limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub storage_bytes: Option<u64>,
    /// Whether the key may also manage users.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub admin: bool,
}

/// Why a file of keys cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum KeysError {
    /// It cannot be read.
    #[error("the file of API keys {path} cannot be read: {source}")]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It does not say what it should.
    #[error("the file of API keys {path} is wrong: {reason}")]
    Wrong {
        /// The file.
        path: PathBuf,
        /// What to mend.
        reason: String,
    },
    /// There are no random numbers.
    #[error("the system gives no random numbers: {0}")]
    Random(getrandom::Error),
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Document {
    keys: Vec<Key>,
}

type Known = HashMap<[u8; 32], Key>;

/// The keys of a file.
#[derive(Debug)]
pub struct Keys {
    path: PathBuf,
    /// The keys, and when the file that they are from was written.
    known: RwLock<(Arc<Known>, Option<SystemTime>)>,
}

impl Keys {
    /// Reads the file.
    ///
    /// # Errors
    /// When it cannot be read or says something wrong.
    pub fn open(path: &Path) -> Result<Keys, KeysError> {
        let written = modified(path);
        let known = Arc::new(read(path)?);
        Ok(Keys {
            path: path.to_owned(),
            known: RwLock::new((known, written)),
        })
    }

    /// The entry of a key.
    #[must_use]
    pub fn find(&self, key: &str) -> Option<Key> {
        // What is compared are hashes: how long it takes tells nothing about the keys.
        self.current().get(&hash(key)).cloned()
    }

    /// How many keys there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.current().len()
    }

    /// Whether there are none, so that nobody can be served.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Reads the file again if it has changed; true if the keys are now others.
    ///
    /// # Errors
    /// When the changed file cannot be used; the keys are then those from before.
    pub fn refresh(&self) -> Result<bool, KeysError> {
        let written = modified(&self.path);
        if self.lock_read().1 == written {
            return Ok(false);
        }
        let known = Arc::new(read(&self.path)?);
        *self.known.write().unwrap_or_else(PoisonError::into_inner) = (known, written);
        Ok(true)
    }

    fn current(&self) -> Arc<Known> {
        Arc::clone(&self.lock_read().0)
    }

    fn lock_read(&self) -> std::sync::RwLockReadGuard<'_, (Arc<Known>, Option<SystemTime>)> {
        self.known.read().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A new key for `tenant`: the secret, and the entry for the file.
///
/// # Errors
/// When the system gives no random numbers.
pub fn generate(tenant: &str) -> Result<(String, Key), KeysError> {
    let mut random = [0u8; 32];
    getrandom::fill(&mut random).map_err(KeysError::Random)?;
    let secret = format!("{PREFIX}{}", hex::encode(random));
    let key = Key {
        tenant: tenant.to_owned(),
        sha256: hex::encode(hash(&secret)),
        storage_bytes: None,
        admin: false,
    };
    Ok((secret, key))
}

/// Whether a tenant's name can be used: it is sent in headers and named in logs.
#[must_use]
pub fn is_tenant_name(name: &str) -> bool {
    let allowed = |c: char| c.is_ascii_alphanumeric() || "-_.@".contains(c);
    (1..=128).contains(&name.len()) && name.chars().all(allowed)
}

fn hash(key: &str) -> [u8; 32] {
    Sha256::digest(key.as_bytes()).into()
}

fn modified(path: &Path) -> Option<SystemTime> {
    // A file that is not there now is read, and complained about, in `read`.
    fs::metadata(path).and_then(|m| m.modified()).ok()
}

fn read(path: &Path) -> Result<Known, KeysError> {
    let text = fs::read_to_string(path).map_err(|source| KeysError::Unreadable {
        path: path.to_owned(),
        source,
    })?;
    let wrong = |reason: String| KeysError::Wrong {
        path: path.to_owned(),
        reason,
    };
    let document: Document = serde_json::from_str(&text).map_err(|error| {
        wrong(format!(
            "{error}; it should look like {{\"keys\": [{{\"tenant\": \"a\", \"sha256\": \"…\"}}]}}"
        ))
    })?;
    let mut known = Known::new();
    for (position, key) in document.keys.into_iter().enumerate() {
        let n = position + 1;
        if !is_tenant_name(&key.tenant) {
            return Err(wrong(format!(
                "keys[{position}].tenant (key {n}) must be 1 to 128 letters, digits, '-', '_', '.' or '@'"
            )));
        }
        let mut digest = [0u8; 32];
        hex::decode_to_slice(&key.sha256, &mut digest).map_err(|_| {
            wrong(format!(
                "keys[{position}].sha256 (key {n}) must be 64 hex digits"
            ))
        })?;
        if known.insert(digest, key).is_some() {
            return Err(wrong(format!("keys[{position}] (key {n}) is there twice")));
        }
    }
    Ok(known)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(text: &str) -> (tempfile::TempDir, PathBuf) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("keys.json");
        fs::write(&path, text).unwrap();
        (directory, path)
    }

    fn document(keys: &[&Key]) -> String {
        serde_json::json!({ "keys": keys }).to_string()
    }

    #[test]
    fn a_generated_key_is_found_and_no_other() {
        let (secret, key) = generate("team-a").unwrap();
        let (_directory, path) = file(&document(&[&key]));
        let keys = Keys::open(&path).unwrap();
        assert_eq!(keys.find(&secret), Some(key));
        assert_eq!(keys.find(&format!("{secret}0")), None);
        assert_eq!(keys.find(""), None);
        let kept = fs::read_to_string(path).unwrap();
        assert!(!kept.contains(&secret), "only the hash is kept");
    }

    #[test]
    fn a_changed_file_is_read_again_and_a_broken_one_changes_nothing() {
        let (secret, key) = generate("a").unwrap();
        let (_directory, path) = file("{\"keys\": []}");
        let keys = Keys::open(&path).unwrap();
        assert!(keys.is_empty());
        let later = |seconds| {
            let file = fs::File::options().write(true).open(&path).unwrap();
            let at = SystemTime::now() + std::time::Duration::from_secs(seconds);
            file.set_modified(at).unwrap();
        };
        fs::write(&path, document(&[&key])).unwrap();
        later(10);
        assert!(keys.refresh().unwrap());
        assert!(!keys.refresh().unwrap());
        fs::write(&path, "{").unwrap();
        later(20);
        assert!(keys.refresh().is_err());
        assert!(keys.find(&secret).is_some());
    }

    #[test]
    fn what_is_wrong_with_a_file_is_said() {
        let (_, key) = generate("a").unwrap();
        let twice = document(&[&key, &key]);
        for (text, expected) in [
            ("[]", "it should look like"),
            (r#"{"keys": [{"tenant": "a"}]}"#, "sha256"),
            (
                r#"{"keys": [{"tenant": "a", "sha256": "12"}]}"#,
                "64 hex digits",
            ),
            (r#"{"keys": [{"tenant": "a b", "sha256": "12"}]}"#, "tenant"),
            (&twice, "twice"),
        ] {
            let (_directory, path) = file(text);
            let error = Keys::open(&path).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
    }
}
