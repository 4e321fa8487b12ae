//! `kvtide._native`: the engine for Python.
//!
//! Only conversion, the fence around the interpreter lock, and the mapping of errors; every decision
//! is made in `kvtide-engine`, every call of vLLM in the `kvtide` package. `python/kvtide/_native.pyi`
//! describes this module and is kept in step with it.

mod cost;
mod fence;
mod plans;
mod pool;
mod sequence;
mod settings;
mod worker;

use pyo3::prelude::*;

/// The module `kvtide._native`.
#[pymodule]
#[pyo3(name = "_native")]
fn native(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("KvtideError", module.py().get_type::<fence::KvtideError>())?;
    module.add("ConfigError", module.py().get_type::<fence::ConfigError>())?;
    module.add("__version__", env!("CARGO_PKG_VERSION"))?;
    module.add("BOARD_CELLS", kvtide_segment::LOAD_PLACES)?;
    module.add_class::<settings::Settings>()?;
    module.add_class::<pool::Segment>()?;
    module.add_class::<pool::Daemon>()?;
    module.add_class::<pool::Pool>()?;
    module.add_class::<sequence::Namespace>()?;
    module.add_class::<sequence::Sequence>()?;
    module.add_class::<plans::Load>()?;
    module.add_class::<cost::CostModel>()?;
    module.add_class::<worker::KvCache>()?;
    module.add_class::<worker::Worker>()?;
    Ok(())
}
