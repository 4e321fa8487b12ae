//! Settings of the engine itself, wherever its pool is.

use std::time::Duration;

use kvtide_kernels::Codec;
use kvtide_kernels::copy::{CudaOptions, Route};
use serde_json::Value;

use super::setting::{Setting, boolean, choose, milliseconds};

/// How matched blocks are loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LoadMode {
    /// Layered while no other request would be held up by it, else async.
    Auto,
    /// In the step itself, layer by layer ahead of the computation.
    Layered,
    /// Between steps, while the request waits outside the batch.
    Async,
    /// In the step itself, all layers before the computation and all saves behind it, each waited for
    /// on the thread that runs the model: what layered loads and saves are measured against.
    Sync,
}

/// When rows are compared with their checksums, besides the background scrub.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verify {
    /// On every load; a layered load's result comes too late to be acted upon and is counted.
    Load,
    /// On every load, and when complete blocks are matched, before vLLM is told of them.
    Always,
}

/// What is configured of the engine itself.
#[derive(Clone, Debug, PartialEq)]
pub struct EngineConfig {
    /// How matched blocks are loaded.
    pub load_mode: LoadMode,
    /// What rows hold of blocks.
    pub codec: Codec,
    /// When rows are verified.
    pub verify: Verify,
    /// Whether blocks completed by generated tokens are saved.
    pub save_generated: bool,
    /// How long a match is held for a request that is not scheduled.
    pub lease_ttl: Duration,
    /// How long a request waits for blocks that another request is saving.
    pub join_timeout: Duration,
    /// How long an async load may take, from when workers are given it, before it counts as failed.
    pub load_timeout: Duration,
    /// Seeds the identity of every block.
    pub tenant: Option<String>,
    /// Seeds the identity of every block; to be changed when weights change under the same name.
    pub weights_revision: Option<String>,
    /// Ways of copying to and from a GPU that are not left to measurement.
    pub gpu_routes: CudaOptions,
}

impl EngineConfig {
    /// What holds where nothing is set.
    pub(super) fn defaults() -> Self {
        Self {
            load_mode: LoadMode::Auto,
            codec: Codec::None,
            verify: Verify::Load,
            save_generated: true,
            lease_ttl: Duration::from_secs(10),
            join_timeout: Duration::from_secs(10),
            // All loads in flight have blocks in the engine's KV cache: 100 GB of them take 20 s at
            // 5 GB/s, a slow link. A prompt that has waited longer is computed sooner than loaded.
            load_timeout: Duration::from_secs(30),
            tenant: None,
            weights_revision: None,
            gpu_routes: CudaOptions::default(),
        }
    }
}

/// All of them.
pub(super) const SETTINGS: &[Setting] = &[
    Setting {
        key: "load",
        of_own_pool: false,
        expects: "\"auto\", \"layered\", \"async\" or \"sync\"",
        apply: |config, value| {
            let modes = [
                ("auto", LoadMode::Auto),
                ("layered", LoadMode::Layered),
                ("async", LoadMode::Async),
                ("sync", LoadMode::Sync),
            ];
            config.engine.load_mode = choose(value, &modes)?;
            Some(())
        },
    },
    Setting {
        key: "codec",
        of_own_pool: false,
        expects: "\"none\" or \"fp8\"",
        apply: |config, value| {
            config.engine.codec = choose(value, &[("none", Codec::None), ("fp8", Codec::Fp8)])?;
            Some(())
        },
    },
    Setting {
        key: "verify",
        of_own_pool: false,
        expects: "\"load\" or \"always\"",
        apply: |config, value| {
            config.engine.verify =
                choose(value, &[("load", Verify::Load), ("always", Verify::Always)])?;
            Some(())
        },
    },
    Setting {
        key: "save_generated",
        of_own_pool: false,
        expects: "true or false",
        apply: |config, value| {
            config.engine.save_generated = boolean(value)?;
            Some(())
        },
    },
    Setting {
        key: "lease_ms",
        of_own_pool: false,
        expects: "a whole number of milliseconds above 0",
        apply: |config, value| {
            config.engine.lease_ttl = milliseconds(value)?;
            Some(())
        },
    },
    Setting {
        key: "join_timeout_ms",
        of_own_pool: false,
        expects: "a whole number of milliseconds above 0",
        apply: |config, value| {
            config.engine.join_timeout = milliseconds(value)?;
            Some(())
        },
    },
    Setting {
        key: "load_timeout_ms",
        of_own_pool: false,
        expects: "a whole number of milliseconds above 0",
        apply: |config, value| {
            config.engine.load_timeout = milliseconds(value)?;
            Some(())
        },
    },
    Setting {
        key: "tenant",
        of_own_pool: false,
        expects: "a text",
        apply: |config, value| {
            config.engine.tenant = Some(value.as_str()?.to_owned());
            Some(())
        },
    },
    Setting {
        key: "weights_revision",
        of_own_pool: false,
        expects: "a text",
        apply: |config, value| {
            config.engine.weights_revision = Some(value.as_str()?.to_owned());
            Some(())
        },
    },
    Setting {
        key: "gpu_save_route",
        of_own_pool: false,
        expects: ROUTES,
        apply: |config, value| {
            config.engine.gpu_routes.save = route(value)?;
            Some(())
        },
    },
    Setting {
        key: "gpu_load_route",
        of_own_pool: false,
        expects: ROUTES,
        apply: |config, value| {
            config.engine.gpu_routes.load = route(value)?;
            Some(())
        },
    },
    Setting {
        key: "gpu_layered_route",
        of_own_pool: false,
        expects: ROUTES,
        apply: |config, value| {
            config.engine.gpu_routes.layered = route(value)?;
            Some(())
        },
    },
];

const ROUTES: &str = "\"auto\", \"dma\", \"staged\" or \"kernel\", the latter two with a number of \
                      multiprocessors as in \"kernel:4\"";

/// A way of copying, or none for "auto".
#[expect(
    clippy::option_option,
    reason = "the outer one is for values that mean nothing"
)]
fn route(value: &Value) -> Option<Option<Route>> {
    match value.as_str()?.trim().to_lowercase().as_str() {
        "auto" => Some(None),
        text => text.parse().ok().map(Some),
    }
}
