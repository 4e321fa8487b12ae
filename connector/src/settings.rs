//! The configuration.

use std::collections::BTreeMap;

use kvtide_engine::{Config, LoadMode, Verify, available_memory_bytes};
use kvtide_kernels::Codec;
use pyo3::prelude::*;

use crate::fence::{ConfigError, config_error};

/// The settings of one engine, read and checked.
#[pyclass(frozen, module = "kvtide._native")]
pub(crate) struct Settings(pub(crate) Config);

#[pymethods]
impl Settings {
    /// Reads settings from a JSON object and an environment.
    #[new]
    fn new(extra_json: &str, environment: BTreeMap<String, String>) -> PyResult<Self> {
        let extra = serde_json::from_str(extra_json).map_err(|error| {
            ConfigError::new_err(format!(
                "kv_connector_extra_config: {error}; give a JSON object"
            ))
        })?;
        Config::read(&extra, &environment, available_memory_bytes())
            .map(Self)
            .map_err(config_error)
    }

    /// "auto", "layered", "async" or "sync".
    #[getter]
    fn load(&self) -> &'static str {
        match self.0.load_mode {
            LoadMode::Auto => "auto",
            LoadMode::Layered => "layered",
            LoadMode::Async => "async",
            LoadMode::Sync => "sync",
        }
    }

    /// "load" or "always".
    #[getter]
    fn verify(&self) -> &'static str {
        match self.0.verify {
            Verify::Load => "load",
            Verify::Always => "always",
        }
    }

    /// "none" or "fp8".
    #[getter]
    fn codec(&self) -> &'static str {
        match self.0.codec {
            Codec::None => "none",
            Codec::Fp8 => "fp8",
        }
    }

    /// Bytes of a block in one layer of a row, where it has `layer_bytes` in the paged KV cache and
    /// `scales` heads, keys and values counted apart.
    fn row_layer_bytes(&self, layer_bytes: usize, scales: usize) -> usize {
        self.0.codec.row_layer_bytes(layer_bytes, scales)
    }

    #[getter]
    fn save_generated(&self) -> bool {
        self.0.save_generated
    }

    #[getter]
    fn tenant(&self) -> Option<&str> {
        self.0.tenant.as_deref()
    }

    #[getter]
    fn weights_revision(&self) -> Option<&str> {
        self.0.weights_revision.as_deref()
    }

    fn __repr__(&self) -> String {
        format!("{:?}", self.0)
    }
}
