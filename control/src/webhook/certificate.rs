//! The webhook's certificate: mounted from a Secret, or made and kept by the controller itself.
//!
//! One made here is valid for ten years, signed by a CA of its own whose key is thrown away. All
//! replicas share it through a Secret; whoever is first makes it.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, bail};
use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::Secret;
use k8s_openapi::jiff::{Timestamp, tz::TimeZone};
use kube::Client;
use kube::api::{Api, ObjectMeta, PostParams};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair, KeyUsagePurpose};
use rustls::ServerConfig;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};

/// Name of the Secret; `control/deploy` grants access to this one alone.
pub(crate) const SECRET: &str = "kvtide-control-webhook";
const VALID_YEARS: i32 = 10;
/// Keys of the Secret, as `kubernetes.io/tls` has them.
const CERTIFICATE: &str = "tls.crt";
const KEY: &str = "tls.key";
const AUTHORITY: &str = "ca.crt";

/// Where certificate and key come from.
#[derive(Clone, Debug)]
pub enum Source {
    /// Files that somebody else keeps.
    Mounted(PathBuf),
    /// Made here.
    Own {
        /// Certificates, as PEM.
        certificate: Vec<u8>,
        /// Its key, as PEM.
        key: Vec<u8>,
    },
}

impl Source {
    /// Reads certificate and key.
    ///
    /// # Errors
    ///
    /// When they are not there or not a pair.
    pub fn load(&self) -> anyhow::Result<Arc<ServerConfig>> {
        let (certificate, key) = match self {
            Self::Mounted(directory) => (read(directory, CERTIFICATE)?, read(directory, KEY)?),
            Self::Own { certificate, key } => (certificate.clone(), key.clone()),
        };
        let chain = CertificateDer::pem_slice_iter(&certificate)
            .collect::<Result<Vec<_>, _>>()
            .context("the webhook's certificate is not PEM")?;
        let key = PrivateKeyDer::from_pem_slice(&key).context("the webhook's key is not PEM")?;
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .context("TLS versions")?
            .with_no_client_auth()
            .with_single_cert(chain, key)
            .context("the webhook's certificate and key do not go together")?;
        Ok(Arc::new(config))
    }
}

fn read(directory: &Path, name: &str) -> anyhow::Result<Vec<u8>> {
    let path = directory.join(name);
    std::fs::read(&path).with_context(|| format!("reading {}", path.display()))
}

/// The controller's own certificate.
#[derive(Clone, Debug)]
pub struct Own {
    /// What to serve with.
    pub source: Source,
    /// The CA that signed it, as PEM.
    pub authority: Vec<u8>,
}

/// Makes or finds the certificate that replicas share.
///
/// # Errors
///
/// When the Secret cannot be read or written, or does not hold one.
pub async fn own(client: &Client, namespace: &str, names: &[String]) -> anyhow::Result<Own> {
    let secrets: Api<Secret> = Api::namespaced(client.clone(), namespace);
    let secret = match secrets
        .get_opt(SECRET)
        .await
        .context("reading the webhook's Secret")?
    {
        Some(secret) => secret,
        None => {
            let made = secrets.create(&PostParams::default(), &make(names)?).await;
            match made {
                Ok(secret) => secret,
                // Another replica was faster.
                Err(kube::Error::Api(status)) if status.code == 409 => secrets
                    .get(SECRET)
                    .await
                    .context("reading the webhook's Secret")?,
                Err(error) => return Err(error).context("keeping the webhook's certificate"),
            }
        }
    };
    let data = secret.data.unwrap_or_default();
    let part = |key: &str| {
        data.get(key)
            .map(|bytes| bytes.0.clone())
            .unwrap_or_default()
    };
    let authority = part(AUTHORITY);
    if authority.is_empty() {
        bail!("the Secret {namespace}/{SECRET} lacks {AUTHORITY}; delete it to have it made anew");
    }
    let source = Source::Own {
        certificate: part(CERTIFICATE),
        key: part(KEY),
    };
    // One that cannot be served is said now, while it can be made anew.
    source.load()?;
    Ok(Own { source, authority })
}

fn make(names: &[String]) -> anyhow::Result<Secret> {
    let year = Timestamp::now().to_zoned(TimeZone::UTC).year();
    let until = rcgen::date_time_ymd(i32::from(year) + VALID_YEARS, 1, 1);
    let authority_key = KeyPair::generate().context("making a key")?;
    let mut authority = CertificateParams::default();
    authority
        .distinguished_name
        .push(rcgen::DnType::CommonName, "kvtide-control webhook CA");
    authority.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    authority.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    authority.not_after = until;
    let authority_pem = authority
        .self_signed(&authority_key)
        .context("signing the CA")?
        .pem();
    let issuer = Issuer::new(authority, authority_key);
    let key = KeyPair::generate().context("making a key")?;
    let mut leaf = CertificateParams::new(names.to_vec()).context("--webhook-names")?;
    leaf.not_after = until;
    let leaf = leaf
        .signed_by(&key, &issuer)
        .context("signing the certificate")?;
    let parts = [
        (CERTIFICATE, leaf.pem()),
        (KEY, key.serialize_pem()),
        (AUTHORITY, authority_pem),
    ];
    Ok(Secret {
        metadata: ObjectMeta {
            name: Some(SECRET.into()),
            ..ObjectMeta::default()
        },
        type_: Some("kubernetes.io/tls".into()),
        data: Some(
            parts
                .into_iter()
                .map(|(name, text)| (name.to_owned(), ByteString(text.into_bytes())))
                .collect(),
        ),
        ..Secret::default()
    })
}
