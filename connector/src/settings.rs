//! The configuration.

use std::collections::BTreeMap;

use kvtide_engine::{Config, LoadMode, available_memory_bytes};
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
