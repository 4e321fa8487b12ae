//! Requests.

use std::time::Instant;

use kvtide_model::{Lora, MediaItem, Scope};
use pyo3::prelude::*;
use pyo3::types::PyBytes;

use crate::fence::enter;
use crate::plans::Load;
use crate::pool::Pool;

/// What all requests of one engine have in common.
#[pyclass(frozen, module = "kvtide._native")]
pub(crate) struct Namespace(kvtide_model::Namespace);

#[pymethods]
impl Namespace {
    #[new]
    #[pyo3(signature = (*, model, weights_revision, compute_dtype, kv_dtype, layout, block_tokens, ranks, shard_bytes))]
    #[expect(clippy::too_many_arguments, reason = "keyword-only in Python")]
    fn new(
        model: String,
        weights_revision: String,
        compute_dtype: String,
        kv_dtype: String,
        layout: String,
        block_tokens: u32,
        ranks: u32,
        shard_bytes: u64,
    ) -> Self {
        Self(kvtide_model::Namespace {
            model,
            weights_revision,
            compute_dtype,
            kv_dtype,
            layout,
            block_tokens,
            ranks,
            shard_bytes,
        })
    }

    /// An empty sequence. `lora` is (name, path); `media` are (identifier, offset in tokens, length in
    /// tokens).
    fn sequence(
        &self,
        tenant: Option<String>,
        cache_salt: Option<String>,
        lora: Option<(String, String)>,
        media: Vec<(String, usize, usize)>,
    ) -> Sequence {
        let root = self.0.root(&Scope {
            tenant,
            cache_salt,
            lora: lora.map(|(name, path)| Lora { name, path }),
        });
        let media = media
            .into_iter()
            .map(|(identifier, offset_tokens, length_tokens)| MediaItem {
                identifier,
                offset_tokens,
                length_tokens,
            });
        let sequence = kvtide_engine::Sequence::new(root, self.0.block_tokens, media.collect());
        Sequence(sequence)
    }
}

/// One request's tokens and what it holds of the pool.
#[pyclass(module = "kvtide._native")]
pub(crate) struct Sequence(pub(crate) kvtide_engine::Sequence);

#[pymethods]
impl Sequence {
    /// Appends tokens.
    fn extend(&mut self, py: Python<'_>, tokens: Vec<u32>) {
        enter(py, || self.0.extend(&tokens));
    }

    /// Tokens so far.
    #[getter]
    fn tokens(&self) -> usize {
        self.0.tokens()
    }

    /// Keys of the blocks from `start` up to `end`.
    fn keys<'py>(&self, py: Python<'py>, start: usize, end: usize) -> Vec<Bound<'py, PyBytes>> {
        let keys = self.0.keys().get(start..end).unwrap_or_default();
        keys.iter()
            .map(|key| PyBytes::new(py, key.as_bytes()))
            .collect()
    }

    /// Whether the pool has the block `index`, and complete if it is `certain` that it must load.
    fn is_held(&self, py: Python<'_>, pool: &Pool, index: usize, certain: bool) -> bool {
        enter(py, || self.0.is_held(&pool.session, index, certain))
    }

    /// Pins what the pool has of the blocks from `start` up to `end`: (blocks, whether complete).
    /// If it is `certain` that what is matched must load, only complete blocks are matched.
    fn match_blocks(
        &mut self,
        py: Python<'_>,
        pool: &Pool,
        start: usize,
        end: usize,
        certain: bool,
    ) -> (usize, bool) {
        let matched = enter(py, || {
            self.0.match_blocks(&pool.session, start, end, certain)
        });
        (matched.blocks, matched.complete)
    }

    /// Compares the first `blocks` of the match with their checksums, unless that was done before;
    /// how many of them are whole. The match ends before one that is not.
    fn verify(&mut self, py: Python<'_>, pool: &Pool, blocks: usize) -> usize {
        enter(py, || self.0.verify(&pool.session, blocks))
    }

    /// Turns the last match into a load into the engine's `blocks`.
    fn begin_load(
        &mut self,
        py: Python<'_>,
        pool: &Pool,
        start: usize,
        blocks: Vec<u32>,
    ) -> Option<Load> {
        enter(py, || self.0.begin_load(&pool.session, start, blocks)).map(Load)
    }

    /// Lets go of the last match.
    fn release(&mut self) {
        self.0.release();
    }

    /// Lets go of a match whose deadline has passed.
    fn expire(&mut self) -> bool {
        self.0.expire(Instant::now())
    }

    /// The request has ended: the pool gives up its last blocks before its first.
    fn settle(&self, py: Python<'_>, pool: &Pool) {
        enter(py, || self.0.settle(&pool.session));
    }
}
