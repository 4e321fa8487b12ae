//! The configuration.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::PathBuf;

use kvtide_engine::{Config, LoadMode, PoolPlace, Verify, available_memory_bytes};
use kvtide_kernels::Codec;
use pyo3::prelude::*;

use crate::fence::{ConfigError, config_error};

/// The settings of one engine, read and checked.
#[pyclass(frozen, module = "kvtide._native")]
pub(crate) struct Settings {
    pub(crate) config: Config,
    notices: Vec<String>,
}

#[pymethods]
impl Settings {
    /// Reads settings of an engine of so many ranks from a JSON object and an environment.
    #[new]
    #[pyo3(signature = (extra_json, environment, ranks=1))]
    fn new(
        extra_json: &str,
        environment: BTreeMap<OsString, OsString>,
        ranks: u32,
    ) -> PyResult<Self> {
        let extra = serde_json::from_str(extra_json).map_err(|error| {
            ConfigError::new_err(format!(
                "kv_connector_extra_config: {error}; give a JSON object"
            ))
        })?;
        let read = Config::read(&extra, &environment, ranks, available_memory_bytes())
            .map_err(config_error)?;
        Ok(Self {
            config: read.config,
            notices: read.notices,
        })
    }

    /// What the user should know of how settings came about, one sentence each.
    #[getter]
    fn notices(&self) -> Vec<String> {
        self.notices.clone()
    }

    /// How long an async load may take, in seconds.
    #[getter]
    fn load_timeout_s(&self) -> f64 {
        self.config.engine.load_timeout.as_secs_f64()
    }

    /// "auto", "layered", "async" or "sync".
    #[getter]
    fn load(&self) -> &'static str {
        match self.config.engine.load_mode {
            LoadMode::Auto => "auto",
            LoadMode::Layered => "layered",
            LoadMode::Async => "async",
            LoadMode::Sync => "sync",
        }
    }

    /// The socket of the daemon whose pool is used; None where the pool is the engine's own.
    #[getter]
    fn pool_socket(&self) -> Option<PathBuf> {
        match &self.config.pool.place {
            PoolPlace::Embedded => None,
            PoolPlace::Socket(path) => Some(path.clone()),
        }
    }

    /// Whether the engine does not start without that daemon.
    #[getter]
    fn pool_required(&self) -> bool {
        self.config.pool.required
    }

    /// "load" or "always".
    #[getter]
    fn verify(&self) -> &'static str {
        match self.config.engine.verify {
            Verify::Load => "load",
            Verify::Always => "always",
        }
    }

    /// "none" or "fp8".
    #[getter]
    fn codec(&self) -> &'static str {
        match self.config.engine.codec {
            Codec::None => "none",
            Codec::Fp8 => "fp8",
        }
    }

    /// Bytes of a block in one layer of a row, where it has `layer_bytes` in the paged KV cache and
    /// `scales` heads, keys and values counted apart.
    fn row_layer_bytes(&self, layer_bytes: usize, scales: usize) -> usize {
        self.config
            .engine
            .codec
            .row_layer_bytes(layer_bytes, scales)
    }

    #[getter]
    fn save_generated(&self) -> bool {
        self.config.engine.save_generated
    }

    #[getter]
    fn tenant(&self) -> Option<&str> {
        self.config.engine.tenant.as_deref()
    }

    #[getter]
    fn weights_revision(&self) -> Option<&str> {
        self.config.engine.weights_revision.as_deref()
    }

    fn __repr__(&self) -> String {
        format!("{:?}", self.config)
    }
}
