//! What every server of the control plane shares. Knows neither Kubernetes nor what is served.
#![forbid(unsafe_code)]

pub mod api_keys;
pub mod health;
pub mod openai;
pub mod telemetry;
pub mod tls;
