//! Whom this server believes over TLS, whoever it connects to: the authorities that the system trusts,
//! and those of `--ca-file`.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::{self, PemObject};
use rustls::{ClientConfig, RootCertStore};

/// Why certificates cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TrustError {
    /// The file is not there, or closed.
    #[error("--ca-file {path}: {source}")]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// It is no PEM.
    #[error("--ca-file {path} has no certificates in PEM form: {source}")]
    Pem {
        /// The file.
        path: PathBuf,
        /// Why.
        source: pem::Error,
    },
    /// It has nothing in it.
    #[error("--ca-file {path} has no certificates in PEM form")]
    Empty {
        /// The file.
        path: PathBuf,
    },
    /// What is in it is no certificate.
    #[error("--ca-file {path} has a certificate that cannot be used: {source}")]
    Certificate {
        /// The file.
        path: PathBuf,
        /// Why.
        source: rustls::Error,
    },
}

/// See the module's documentation.
#[derive(Clone, Debug)]
pub struct Trust {
    roots: Arc<RootCertStore>,
    added: Vec<CertificateDer<'static>>,
}

impl Trust {
    /// The system's authorities, and those in the PEM file `ca_file`.
    ///
    /// # Errors
    /// When the file cannot be used. That the system has none is found out by whoever needs one.
    pub fn open(ca_file: Option<&Path>) -> Result<Trust, TrustError> {
        let mut roots = RootCertStore::empty();
        let native = rustls_native_certs::load_native_certs();
        for error in &native.errors {
            tracing::warn!(%error, "certificates of the system are passed over");
        }
        roots.add_parsable_certificates(native.certs);
        let mut added = Vec::new();
        if let Some(path) = ca_file {
            added = read(path)?;
            for certificate in &added {
                let checked = roots.add(certificate.clone());
                checked.map_err(|source| TrustError::Certificate {
                    path: path.to_owned(),
                    source,
                })?;
            }
        }
        Ok(Trust {
            roots: Arc::new(roots),
            added,
        })
    }

    /// Whether nobody is believed: no connection with TLS can then be made.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.roots.is_empty()
    }

    /// For a client that is nobody in particular itself.
    #[must_use]
    pub fn client_config(&self) -> ClientConfig {
        ClientConfig::builder()
            .with_root_certificates(Arc::clone(&self.roots))
            .with_no_client_auth()
    }

    /// The certificates of the file, for a library that knows the system's by itself.
    #[must_use]
    pub fn added(&self) -> &[CertificateDer<'static>] {
        &self.added
    }
}

fn read(path: &Path) -> Result<Vec<CertificateDer<'static>>, TrustError> {
    let named = || path.to_owned();
    let text = fs::read(path).map_err(|source| TrustError::File {
        path: named(),
        source,
    })?;
    let found: Vec<_> = CertificateDer::pem_slice_iter(&text)
        .collect::<Result<_, _>>()
        .map_err(|source| TrustError::Pem {
            path: named(),
            source,
        })?;
    if found.is_empty() {
        return Err(TrustError::Empty { path: named() });
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn opened(content: &[u8]) -> Result<Trust, TrustError> {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(content).unwrap();
        Trust::open(Some(file.path()))
    }

    #[test]
    fn authorities_of_the_file_are_believed_beside_the_system_s() {
        let made = rcgen::generate_simple_self_signed(["upstream".to_owned()]).unwrap();
        let system = Trust::open(None).unwrap();
        let trust = opened(made.cert.pem().repeat(2).as_bytes()).unwrap();
        assert_eq!(trust.added().len(), 2);
        assert_eq!(trust.roots.len(), system.roots.len() + 2);
    }

    #[test]
    fn a_file_that_cannot_be_used_is_refused_with_its_name() {
        let missing = Trust::open(Some(Path::new("/nonexistent/ca.pem")));
        let nonsense = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
        for error in [
            missing.unwrap_err(),
            opened(b"").unwrap_err(),
            opened(b"no certificate").unwrap_err(),
            opened(&nonsense.as_bytes()[..40]).unwrap_err(),
            opened(nonsense.as_bytes()).unwrap_err(),
        ] {
            assert!(error.to_string().starts_with("--ca-file /"), "{error}");
        }
    }
}
