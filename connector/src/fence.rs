//! The one way from Python into the engine, and the way of errors back.

use pyo3::create_exception;
use pyo3::exceptions::{PyException, PyValueError};
use pyo3::prelude::*;

create_exception!(
    kvtide,
    KvtideError,
    PyException,
    "The pool cannot be set up or used."
);
create_exception!(
    kvtide,
    ConfigError,
    PyValueError,
    "A setting that cannot be used; names key and fix."
);

/// Runs `work` without the interpreter lock.
pub(crate) fn enter<T: Send>(py: Python<'_>, work: impl FnOnce() -> T + Send) -> T {
    py.detach(work)
}

/// An error of the engine as Python sees it.
pub(crate) fn kvtide_error(error: impl std::error::Error) -> PyErr {
    KvtideError::new_err(error.to_string())
}

/// An error that a setting can mend.
pub(crate) fn config_error(error: impl std::error::Error) -> PyErr {
    ConfigError::new_err(error.to_string())
}
