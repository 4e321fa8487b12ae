//! What seeds a chain of block keys.

use crate::encode;

/// Everything about the serving process that changes the bytes of a block.
///
/// Processes whose namespaces differ in any field never share a block.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Namespace {
    /// The model's name or path.
    pub model: String,
    /// The revision of its weights: a commit, or whatever the operator set after an update.
    pub weights_revision: String,
    /// The type in which the model computes, such as `bfloat16`.
    pub compute_dtype: String,
    /// The type of the KV cache, such as `auto` or `fp8`.
    pub kv_dtype: String,
    /// How the bytes of a block lie in memory: shapes and strides of every layer.
    pub layout: String,
    /// Tokens in a block.
    pub block_tokens: u32,
    /// Ranks over which a block is sharded.
    pub ranks: u32,
    /// Bytes of one rank's shard of a block.
    pub shard_bytes: u64,
}

/// Everything about a request, besides its tokens, that changes bytes or who may see them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Scope {
    /// The tenant on whose behalf the engine runs.
    pub tenant: Option<String>,
    /// The request's `cache_salt`.
    pub cache_salt: Option<String>,
    /// The LoRA adapter.
    pub lora: Option<Lora>,
}

/// A LoRA adapter's identity. An adapter can be replaced under its name, and two can have one path.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Lora {
    /// The name under which requests ask for it.
    pub name: String,
    /// Where it was loaded from.
    pub path: String,
}

/// Which namespace a block belongs to, for whoever accounts for it or drops it: the digest of all of a
/// [`Namespace`]'s fields.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NamespaceId([u8; 16]);

impl NamespaceId {
    /// Wraps 16 bytes that [`Namespace::id`] made, for instance in another process.
    #[must_use]
    pub const fn from_bytes(bytes: [u8; 16]) -> Self {
        Self(bytes)
    }

    /// What one tenant has of this namespace, for whoever accounts for tenants one by one: another
    /// identity for each name. Without a name it is the namespace itself.
    #[must_use]
    pub fn of_tenant(self, tenant: &str) -> Self {
        if tenant.is_empty() {
            return self;
        }
        let mut encoded = Vec::with_capacity(128);
        encode::field(&mut encoded, "namespace", &self.0);
        encode::field(&mut encoded, "tenant", tenant.as_bytes());
        Self::derived("kvtide tenant's namespace identity, format 1", &encoded)
    }

    fn derived(context: &str, encoded: &[u8]) -> Self {
        let digest = blake3::derive_key(context, encoded);
        let mut id = [0; 16];
        id.copy_from_slice(&digest[..16]);
        Self(id)
    }

    /// The identity's bytes, in the order in which they are sent.
    #[must_use]
    pub const fn as_bytes(&self) -> &[u8; 16] {
        &self.0
    }
}

impl std::fmt::Display for NamespaceId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// The state from which the first block of a chain is hashed.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct ChainRoot(pub(crate) [u8; 32]);

impl std::fmt::Debug for ChainRoot {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ChainRoot(..)") // A root admits to its namespace: it stays out of logs.
    }
}

impl Namespace {
    /// The namespace's identity, from which no block key can be computed.
    #[must_use]
    pub fn id(&self) -> NamespaceId {
        NamespaceId::derived("kvtide namespace identity, format 1", &self.encode())
    }

    /// The root of every chain in this namespace and `scope`.
    ///
    /// Computed with BLAKE3 in `derive_key` mode, whose context string is the domain separator
    /// (BLAKE3 specification, section 2.3), then keyed with the encoded scope.
    #[must_use]
    pub fn root(&self, scope: &Scope) -> ChainRoot {
        let namespace_key = blake3::derive_key("kvtide block identity, format 1", &self.encode());
        let mut encoded = Vec::with_capacity(256);
        encode::optional(&mut encoded, "tenant", scope.tenant.as_deref());
        encode::optional(&mut encoded, "cache_salt", scope.cache_salt.as_deref());
        match &scope.lora {
            None => encode::optional(&mut encoded, "lora", None),
            Some(Lora { name, path }) => {
                encode::field(&mut encoded, "lora name", name.as_bytes());
                encode::field(&mut encoded, "lora path", path.as_bytes());
            }
        }
        ChainRoot(*blake3::keyed_hash(&namespace_key, &encoded).as_bytes())
    }

    fn encode(&self) -> Vec<u8> {
        let mut encoded = Vec::with_capacity(256);
        encode::field(&mut encoded, "model", self.model.as_bytes());
        encode::field(
            &mut encoded,
            "weights_revision",
            self.weights_revision.as_bytes(),
        );
        encode::field(&mut encoded, "compute_dtype", self.compute_dtype.as_bytes());
        encode::field(&mut encoded, "kv_dtype", self.kv_dtype.as_bytes());
        encode::field(&mut encoded, "layout", self.layout.as_bytes());
        encode::field(
            &mut encoded,
            "block_tokens",
            &self.block_tokens.to_le_bytes(),
        );
        encode::field(&mut encoded, "ranks", &self.ranks.to_le_bytes());
        encode::field(&mut encoded, "shard_bytes", &self.shard_bytes.to_le_bytes());
        encoded
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lora(name: &str, path: &str) -> Lora {
        Lora {
            name: name.into(),
            path: path.into(),
        }
    }

    #[test]
    fn every_field_changes_the_root() {
        let base = Namespace {
            model: "m".into(),
            block_tokens: 16,
            ranks: 1,
            ..Namespace::default()
        };
        let open = Scope::default();
        let variants = [
            Namespace {
                model: "n".into(),
                ..base.clone()
            },
            Namespace {
                weights_revision: "r".into(),
                ..base.clone()
            },
            Namespace {
                compute_dtype: "float16".into(),
                ..base.clone()
            },
            Namespace {
                kv_dtype: "fp8".into(),
                ..base.clone()
            },
            Namespace {
                layout: "HND".into(),
                ..base.clone()
            },
            Namespace {
                block_tokens: 32,
                ..base.clone()
            },
            Namespace {
                ranks: 2,
                ..base.clone()
            },
            Namespace {
                shard_bytes: 1,
                ..base.clone()
            },
        ];
        for variant in variants {
            assert_ne!(variant.root(&open), base.root(&open), "{variant:?}");
            assert_ne!(variant.id(), base.id(), "{variant:?}");
        }
        let scopes = [
            Scope {
                tenant: Some("t".into()),
                ..Scope::default()
            },
            Scope {
                cache_salt: Some("t".into()),
                ..Scope::default()
            },
            Scope {
                lora: Some(lora("t", "")),
                ..Scope::default()
            },
            Scope {
                lora: Some(lora("", "t")),
                ..Scope::default()
            },
            // Line ends may stand in either.
            Scope {
                lora: Some(lora("a\nb", "c")),
                ..Scope::default()
            },
            Scope {
                lora: Some(lora("a", "b\nc")),
                ..Scope::default()
            },
            Scope {
                tenant: Some(String::new()),
                ..Scope::default()
            },
        ];
        for (i, scope) in scopes.iter().enumerate() {
            assert_ne!(base.root(scope), base.root(&open), "{scope:?}");
            for other in &scopes[i + 1..] {
                assert_ne!(base.root(scope), base.root(other), "{scope:?} {other:?}");
            }
        }
    }

    #[test]
    fn every_tenant_has_an_identity_of_its_own_in_every_namespace() {
        let [one, two] = [1, 2].map(|byte| NamespaceId::from_bytes([byte; 16]));
        assert_eq!(one.of_tenant(""), one);
        let ids = [
            one,
            two,
            one.of_tenant("a"),
            one.of_tenant("b"),
            two.of_tenant("a"),
            one.of_tenant("a").of_tenant("b"),
        ];
        let distinct: std::collections::HashSet<_> = ids.iter().collect();
        assert_eq!(distinct.len(), ids.len());
    }

    #[test]
    fn moving_bytes_between_fields_changes_the_root() {
        let one = Namespace {
            model: "ab".into(),
            weights_revision: "c".into(),
            ..Namespace::default()
        };
        let two = Namespace {
            model: "a".into(),
            weights_revision: "bc".into(),
            ..Namespace::default()
        };
        assert_ne!(one.root(&Scope::default()), two.root(&Scope::default()));
    }
}
