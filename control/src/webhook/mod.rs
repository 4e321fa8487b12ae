//! The validating webhook: says no, with the field's path, to what neither schema nor CEL can see.
//!
//! Every replica serves it. It keeps no state and asks the API server nothing, so it cannot be
//! behind. What it would refuse although it is stored already is let through unchanged: a finalizer
//! must be removable from anything.

mod certificate;

use std::net::SocketAddr;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use anyhow::Context;
use axum::routing::post;
use axum::{Json, Router};
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use hyper_util::service::TowerToHyperService;
use kube::core::DynamicObject;
use kube::core::admission::{AdmissionRequest, AdmissionResponse, AdmissionReview, Operation};
use rustls::ServerConfig;
use serde_json::Value;
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio_rustls::TlsAcceptor;

use crate::api::{RoleSetSpec, StormServiceSpec};
use crate::core::validate::{self, Violation};

pub use certificate::{Source, install};

/// Connections at once. The API server keeps a few and reuses them.
const CONNECTIONS_MAX: usize = 64;
/// How often a mounted certificate is read again.
const RELOAD_EVERY: Duration = Duration::from_secs(60);
/// A handshake that takes longer is dropped.
const HANDSHAKE_MAX: Duration = Duration::from_secs(5);

/// Serves the webhook until the process ends.
///
/// # Errors
///
/// When the port is taken or the certificate cannot be read.
pub async fn serve(address: SocketAddr, source: Source) -> anyhow::Result<()> {
    let tls = Arc::new(RwLock::new(source.load()?));
    let reloaded = tls.clone();
    let reload = async move {
        loop {
            tokio::time::sleep(RELOAD_EVERY).await;
            match source.load() {
                Ok(config) => *reloaded.write().unwrap_or_else(PoisonError::into_inner) = config,
                Err(error) => tracing::warn!(%error, "the webhook keeps its old certificate"),
            }
        }
    };
    let listener = TcpListener::bind(address)
        .await
        .with_context(|| format!("the webhook: listening on {address}"))?;
    tracing::info!(%address, "serving the webhook");
    tokio::select! {
        () = reload => Ok(()),
        outcome = accept(listener, tls) => outcome,
    }
}

async fn accept(listener: TcpListener, tls: Arc<RwLock<Arc<ServerConfig>>>) -> anyhow::Result<()> {
    let routes = Router::new().route("/validate", post(review));
    let permits = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        let permit = permits
            .clone()
            .acquire_owned()
            .await
            .context("the webhook's connections")?;
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(%error, "the webhook could not accept a connection");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let config = tls.read().unwrap_or_else(PoisonError::into_inner).clone();
        let routes = routes.clone();
        tokio::spawn(async move {
            let _permit = permit;
            let handshake = TlsAcceptor::from(config).accept(stream);
            let Ok(Ok(stream)) = tokio::time::timeout(HANDSHAKE_MAX, handshake).await else {
                tracing::debug!("a TLS handshake with the webhook failed");
                return;
            };
            let service = TowerToHyperService::new(routes);
            let server = auto::Builder::new(TokioExecutor::new());
            if let Err(error) = server.serve_connection(TokioIo::new(stream), service).await {
                tracing::debug!(%error, "a connection to the webhook broke");
            }
        });
    }
}

async fn review(Json(review): Json<AdmissionReview<DynamicObject>>) -> Json<Value> {
    let response = match TryInto::<AdmissionRequest<DynamicObject>>::try_into(review) {
        Ok(request) => answer(&request),
        Err(error) => AdmissionResponse::invalid(error.to_string()),
    };
    metrics::counter!(
        "kvtide_control_reviews_total", "allowed" => response.allowed.to_string()
    )
    .increment(1);
    Json(serde_json::to_value(response.into_review()).unwrap_or_default())
}

/// Yes, or no and why.
fn answer(request: &AdmissionRequest<DynamicObject>) -> AdmissionResponse {
    let response = AdmissionResponse::from(request);
    let Some(object) = &request.object else {
        return response;
    };
    let spec = object.data.get("spec").cloned().unwrap_or_default();
    let unchanged = request.operation == Operation::Update
        && request
            .old_object
            .as_ref()
            .and_then(|old| old.data.get("spec"))
            == Some(&spec);
    if unchanged || object.metadata.deletion_timestamp.is_some() {
        return response;
    }
    let old = request.old_object.as_ref();
    let old = old.and_then(|old| old.data.get("spec")).cloned();
    let violations = violations(&request.kind.kind, &request.name, spec, old);
    if violations.is_empty() {
        response
    } else {
        response.deny(validate::describe(&violations))
    }
}

/// What is wrong with `spec`; `old` is what it was before a change.
fn violations(kind: &str, name: &str, spec: Value, old: Option<Value>) -> Vec<Violation> {
    let unreadable = |error: serde_json::Error| {
        vec![Violation {
            path: "spec".into(),
            message: error.to_string(),
        }]
    };
    match kind {
        "StormService" => match serde_json::from_value::<StormServiceSpec>(spec) {
            Ok(spec) => {
                let old = old.and_then(|old| serde_json::from_value(old).ok());
                let mut violations = validate::stormservice(name, &spec);
                violations.extend(validate::group_names(name, &spec, old.as_ref()));
                violations
            }
            Err(error) => unreadable(error),
        },
        "RoleSet" => serde_json::from_value::<RoleSetSpec>(spec)
            .map_or_else(unreadable, |spec| validate::role_set(&spec)),
        _ => Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn request(operation: &str, object: Value, old: Value) -> AdmissionRequest<DynamicObject> {
        let resource = json!({"group": "orchestration.aibrix.ai", "version": "v1alpha1"});
        let mut kind = resource.clone();
        kind["kind"] = json!("StormService");
        let mut plural = resource;
        plural["resource"] = json!("stormservices");
        let review = json!({"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview",
            "request": {"uid": "u", "kind": kind, "resource": plural, "operation": operation,
            "name": "llm", "namespace": "n", "userInfo": {}, "object": object, "oldObject": old}});
        let review: AdmissionReview<DynamicObject> = serde_json::from_value(review).unwrap();
        review.try_into().unwrap()
    }

    fn cyclic() -> Value {
        json!({"apiVersion": "orchestration.aibrix.ai/v1alpha1", "kind": "StormService",
            "metadata": {"name": "llm"}, "spec": {"selector": {},
            "template": {"spec": {"roles": [{"name": "a", "dependencies": ["b"]},
                {"name": "b", "dependencies": ["a"]}]}}}})
    }

    #[test]
    fn a_cycle_is_refused_with_its_path() {
        let denied = answer(&request("CREATE", cyclic(), Value::Null));
        assert!(!denied.allowed);
        let message = denied.result.message;
        assert!(
            message.contains("spec.template.spec.roles: dependencies form a cycle"),
            "{message}"
        );
    }

    #[test]
    fn a_long_name_is_refused_unless_it_was_there_before() {
        let with = |roles: &[(&str, i32)]| {
            let roles: Vec<Value> = roles
                .iter()
                .map(|(name, size)| json!({"name": name, "podGroupSize": size, "replicas": 1}))
                .collect();
            json!({"apiVersion": "orchestration.aibrix.ai/v1alpha1", "kind": "StormService",
                "metadata": {"name": "llm"}, "spec": {"selector": {},
                "template": {"metadata": {"labels": {"a": "b"}}, "spec": {"roles": roles}}}})
        };
        let long = "r".repeat(25);
        let (group, single) = (with(&[(&long, 2)]), with(&[(&long, 1)]));
        let more = with(&[(&long, 3), ("other", 1)]);
        let two = with(&[(&long, 2), (&"o".repeat(25), 2)]);
        let table = [
            ("CREATE", &group, &Value::Null, false),
            ("CREATE", &single, &Value::Null, true),
            ("UPDATE", &more, &group, true),
            ("UPDATE", &group, &single, false),
            ("UPDATE", &two, &group, false),
        ];
        for (operation, new, old, allowed) in table {
            let said = answer(&request(operation, new.clone(), old.clone()));
            assert_eq!(said.allowed, allowed, "{operation} {new} after {old}");
        }
    }

    #[test]
    fn what_is_stored_already_can_still_be_finalized() {
        assert!(answer(&request("UPDATE", cyclic(), cyclic())).allowed);
        let mut going = cyclic();
        going["metadata"]["deletionTimestamp"] = json!("2030-01-01T00:00:00Z");
        assert!(answer(&request("UPDATE", going, Value::Null)).allowed);
    }
}
