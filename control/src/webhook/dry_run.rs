//! Has the API server try, without storing anything, what the controllers would create for a spec: a
//! template that is no pod is refused when it is written, not when it has cost a replica.
//!
//! What the API server's own validation refuses is refused. What may be otherwise tomorrow (a quota, a
//! pod security level, somebody else's webhook, an API server that is slow) is a warning: it must not
//! keep users from repairing things.

use std::time::Duration;

use futures::{StreamExt, stream};
use k8s_openapi::api::core::v1::{Pod, Service};
use kube::api::{Api, DynamicObject, PostParams};
use kube::core::admission::{AdmissionRequest, Operation};
use kube::{Client, Resource};
use kvtide_control_api::{RoleSpec, keys};
use kvtide_control_core::pod::{Marks, Place};
use kvtide_control_core::validate::Violation;
use kvtide_control_core::{names, revision};
use kvtide_control_kube::error::said;
use kvtide_control_kube::writer::resource;
use serde_json::{Value, json};
use tokio::sync::Semaphore;

use super::review::{Verdict, Written, written};

/// All tries of one request together; well below the 5 s that the API server waits for the webhook.
const TRIES_MAX: Duration = Duration::from_secs(2);
/// Tries in flight for one request: of its at most 32 roles.
const AT_ONCE: usize = 8;
/// Tries in flight in this process: few enough to leave the API server's queues to the controllers.
const AT_ONCE_IN_ALL: usize = 16;

/// What the API server's own validation says between an object's name and what is wrong with it.
const INVALID: &str = " is invalid: ";

/// What would be created, and which field it is made from.
#[derive(Clone, Debug, PartialEq)]
struct Candidate {
    path: String,
    kind: Kind,
    object: Value,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Pod,
    Service,
}

/// Tries out what requests ask for.
pub(super) struct DryRuns {
    client: Client,
    permits: Semaphore,
}

impl DryRuns {
    pub(super) fn new(client: Client) -> Self {
        Self {
            client,
            permits: Semaphore::new(AT_ONCE_IN_ALL),
        }
    }

    /// What the API server says to what the controllers would create.
    pub(super) async fn try_out(&self, request: &AdmissionRequest<DynamicObject>) -> Verdict {
        let candidates = candidates(request);
        let namespace = request.namespace.as_deref().unwrap_or_default();
        let (count, mut tried, mut verdict) = (candidates.len(), 0, Verdict::default());
        let mut answers = stream::iter(candidates)
            .map(|candidate| async move {
                let outcome = self.create(namespace, &candidate).await;
                outcome.err().map(|error| judge(&candidate, &error))
            })
            .buffer_unordered(AT_ONCE)
            .take_until(Box::pin(tokio::time::sleep(TRIES_MAX)));
        while let Some(answer) = answers.next().await {
            tried += 1;
            verdict.join(answer.unwrap_or_default());
        }
        if tried < count {
            verdict.warnings.push(format!(
                "{} of {count} pod templates were not checked: the API server took longer than \
                 {TRIES_MAX:?}",
                count - tried
            ));
        }
        verdict
            .violations
            .sort_by(|left, right| left.path.cmp(&right.path));
        verdict
    }

    async fn create(&self, namespace: &str, candidate: &Candidate) -> kube::Result<()> {
        // The semaphore is never closed; without a permit the try would only be unbounded.
        let _permit = self.permits.acquire().await.ok();
        let kind = match candidate.kind {
            Kind::Pod => resource::<Pod>(),
            Kind::Service => resource::<Service>(),
        };
        let object: DynamicObject =
            serde_json::from_value(candidate.object.clone()).map_err(kube::Error::SerdeError)?;
        let api: Api<DynamicObject> = Api::namespaced_with(self.client.clone(), namespace, &kind);
        let params = PostParams {
            dry_run: true,
            ..PostParams::default()
        };
        api.create(&params, &object).await.map(|_| ())
    }
}

/// What a request's spec adds to what is made already.
fn candidates(request: &AdmissionRequest<DynamicObject>) -> Vec<Candidate> {
    let name = request.name.as_str();
    match written(request) {
        Ok(Some(Written::StormService(spec, old))) => {
            let new = spec.template.spec.unwrap_or_default().roles;
            let old = old.and_then(|old| old.template.spec);
            let old = old.map(|spec| spec.roles).unwrap_or_default();
            let set = names::role_set(name, "", 0, 0);
            let pods = pods("spec.template.spec", (name, &set), &new, &old);
            let is_new = request.operation == Operation::Create && !name.is_empty();
            is_new
                .then(|| headless(name))
                .into_iter()
                .chain(pods)
                .collect()
        }
        // One that a StormService made was checked there.
        Ok(Some(Written::RoleSet(spec, old))) if !is_owned(request) => {
            let old = old.map(|spec| spec.roles).unwrap_or_default();
            pods("spec", ("", name), &spec.roles, &old).collect()
        }
        _ => Vec::new(),
    }
}

fn is_owned(request: &AdmissionRequest<DynamicObject>) -> bool {
    let meta = request.object.as_ref().map(Resource::meta);
    let owners = meta.and_then(|meta| meta.owner_references.as_deref());
    let mut owners = owners.unwrap_or_default().iter();
    owners.any(|owner| owner.controller == Some(true))
}

/// One pod for each role whose template is another than before.
fn pods<'a>(
    path: &'a str,
    (service, set): (&'a str, &'a str),
    new: &'a [RoleSpec],
    old: &'a [RoleSpec],
) -> impl Iterator<Item = Candidate> + 'a {
    let is_known = |role: &RoleSpec| {
        let mut old = old.iter();
        old.any(|old| old.name == role.name && old.template == role.template)
    };
    let changed = new.iter().enumerate();
    let changed = changed.filter(move |(_, role)| !is_known(role));
    changed.map(move |(at, role)| {
        let hash = revision::role_hash(role);
        let place = Place {
            service,
            role_set: set,
            role_set_index: Some("0"),
            role: &role.name,
            hash: &hash,
            index: None,
            gang: None,
        };
        // No real pod has this name: its RoleSet's uid goes into it.
        let name = names::plain_pod(set, "", &role.name, &hash, 0);
        let mut pod = place.pod(&name, &role.template, &Value::Null, &Marks::default());
        pod["metadata"]["ownerReferences"] = json!([]);
        Candidate {
            path: format!("{path}.roles[{at}].template"),
            kind: Kind::Pod,
            object: pod,
        }
    })
}

/// The Service that gives pods names; some API servers want more of its name than of a StormService's.
fn headless(name: &str) -> Candidate {
    Candidate {
        path: "metadata.name".into(),
        kind: Kind::Service,
        object: json!({
            "apiVersion": "v1", "kind": "Service", "metadata": {"name": name},
            "spec": {"clusterIP": "None", "selector": {keys::STORM_SERVICE_NAME: name}},
        }),
    }
}

/// What the API server's refusal means for what was written.
fn judge(candidate: &Candidate, error: &kube::Error) -> Verdict {
    let Candidate { path, kind, .. } = candidate;
    let message = said(error);
    let code = match error {
        kube::Error::Api(status) => status.code,
        _ => 0,
    };
    // A ValidatingAdmissionPolicy says 422 too, but not that the object is invalid.
    let is_invalid = code != 422 || message.contains(INVALID);
    let by_itself = is_invalid && !message.starts_with("admission webhook");
    let warning = |text: String| Verdict {
        warnings: vec![text],
        ..Verdict::default()
    };
    match (code, kind) {
        (400 | 422, _) if by_itself => {
            let what = match kind {
                Kind::Pod => "no pod can be made from it",
                Kind::Service => {
                    "the Service of this name, by which pods are found, cannot be made"
                }
            };
            let message = format!("{what}: {}", without_name(&message));
            let violation = Violation {
                path: path.clone(),
                message,
            };
            Verdict {
                violations: vec![violation],
                ..Verdict::default()
            }
        }
        (409, Kind::Service) => warning(format!(
            "{path}: there is a Service of this name; unless it is one that a StormService of this name \
             left behind, rename one of the two"
        )),
        (409, Kind::Pod) => Verdict::default(),
        (0 | 429 | 500.., _) => warning(format!("{path}: could not be checked: {message}")),
        _ => warning(format!("{path}: would be refused now: {message}")),
    }
}

/// The message less the name that was made up for the try.
fn without_name(message: &str) -> &str {
    message
        .find(INVALID)
        .map_or(message, |at| &message[at + INVALID.len()..])
}

#[cfg(test)]
mod tests {
    use kube::core::Status;

    use super::super::review::tests::request;
    use super::*;

    fn service(roles: Value) -> Value {
        json!({"apiVersion": "orchestration.aibrix.ai/v1alpha1", "kind": "StormService",
            "metadata": {"name": "llm"},
            "spec": {"selector": {}, "template": {"spec": {"roles": roles}}}})
    }

    fn role(name: &str, image: &str, replicas: i32) -> Value {
        json!({"name": name, "replicas": replicas,
            "template": {"spec": {"containers": [{"name": "c", "image": image}]}}})
    }

    fn paths(operation: &str, object: Value, old: Value) -> Vec<String> {
        let all = candidates(&request(operation, object, old));
        all.into_iter().map(|candidate| candidate.path).collect()
    }

    #[test]
    fn only_templates_that_are_new_are_tried() {
        let two = || service(json!([role("a", "i", 1), role("b", "i", 1)]));
        let (a, b) = (
            "spec.template.spec.roles[0].template",
            "spec.template.spec.roles[1].template",
        );
        assert_eq!(paths("CREATE", two(), Value::Null), ["metadata.name", a, b]);
        let scaled = service(json!([role("a", "i", 5), role("b", "i", 1)]));
        assert_eq!(paths("UPDATE", scaled, two()), [""; 0]);
        let changed = service(json!([role("a", "i", 1), role("b", "j", 1)]));
        assert_eq!(paths("UPDATE", changed, two()), [b]);
        let swapped = service(json!([role("b", "i", 1), role("c", "i", 1)]));
        assert_eq!(paths("UPDATE", swapped, two()), [b]);
    }

    #[test]
    fn a_role_set_is_tried_unless_a_service_made_it() {
        let set = |owners: Value| {
            json!({"apiVersion": "orchestration.aibrix.ai/v1alpha1", "kind": "RoleSet",
                "metadata": {"name": "r", "ownerReferences": owners},
                "spec": {"roles": [role("a", "i", 1)]}})
        };
        let of = |owners: Value| paths("CREATE", set(owners), Value::Null).len();
        assert_eq!(of(json!([])), 1);
        let owner = json!([{"apiVersion": "v1", "kind": "X", "name": "x", "uid": "u",
            "controller": true}]);
        assert_eq!(of(owner), 0);
    }

    #[test]
    fn a_tried_pod_is_the_one_that_would_be_made_less_its_owner() {
        let object = service(json!([role("a", "i", 1)]));
        let pod = candidates(&request("CREATE", object, Value::Null))
            .remove(1)
            .object;
        assert_eq!(pod["spec"]["subdomain"], "llm");
        assert_eq!(pod["spec"]["hostname"], pod["metadata"]["name"]);
        assert_eq!(pod["metadata"]["labels"]["role-name"], "a");
        assert_eq!(pod["metadata"]["ownerReferences"], json!([]));
        assert_eq!(pod["spec"]["containers"][0]["image"], "i");
    }

    #[test]
    fn only_what_can_never_be_made_is_refused() {
        let refusal = |code: u16, message: &str| {
            let status = Status::failure(message, "No").with_code(code);
            kube::Error::Api(status.boxed())
        };
        let pod = Candidate {
            path: "p".into(),
            kind: Kind::Pod,
            object: Value::Null,
        };
        let service = headless("7b");
        // What was tried, the answer, and how many violations and warnings it makes.
        let table = [
            (
                &pod,
                refusal(422, "Pod \"a\" is invalid: spec.x: no"),
                (1, 0),
            ),
            (&pod, refusal(400, "json: cannot unmarshal"), (1, 0)),
            (&pod, refusal(422, "admission webhook \"w\" denied"), (0, 1)),
            (
                &pod,
                refusal(
                    422,
                    "pods \"a\" is forbidden: ValidatingAdmissionPolicy 'p' with binding 'b' denied \
                     request: no",
                ),
                (0, 1),
            ),
            (&pod, refusal(403, "exceeded quota"), (0, 1)),
            (&pod, refusal(409, "exists"), (0, 0)),
            (&pod, refusal(429, "busy"), (0, 1)),
            (&pod, refusal(500, "broken"), (0, 1)),
            (&pod, refusal(504, "late"), (0, 1)),
            (
                &service,
                refusal(422, "Service \"7b\" is invalid: metadata.name: no"),
                (1, 0),
            ),
            (&service, refusal(409, "exists"), (0, 1)),
        ];
        for (candidate, error, expected) in table {
            let verdict = judge(candidate, &error);
            let got = (verdict.violations.len(), verdict.warnings.len());
            assert_eq!(got, expected, "{error}");
        }
        let refused = judge(&pod, &refusal(422, "Pod \"a\" is invalid: spec.x: no"));
        let text = refused.violations[0].to_string();
        assert_eq!(text, "p: no pod can be made from it: spec.x: no");
    }
}
