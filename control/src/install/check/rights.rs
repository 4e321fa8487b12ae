//! Whether the controller may do what `control/deploy/rbac.yaml` grants, as the API server decides it.

use anyhow::{Context, bail};
use futures::{StreamExt, TryStreamExt, stream};
use k8s_openapi::api::authorization::v1::{
    ResourceAttributes, SubjectAccessReview, SubjectAccessReviewSpec,
};
use k8s_openapi::api::rbac::v1::PolicyRule;
use kube::api::{Api, DynamicObject, PostParams};
use kube::{Client, ResourceExt};

use crate::install::manifests;

/// Questions in flight.
const AT_ONCE: usize = 16;
/// The account that the manifests grant rights to.
const ACCOUNT: &str = "kvtide-control";

/// Asks about every rule.
///
/// # Errors
///
/// Which rights are missing.
pub(super) async fn check(client: &Client, namespace: &str) -> anyhow::Result<String> {
    let questions = questions(&manifests::rights()?, namespace)?;
    let count = questions.len();
    let answers = stream::iter(questions).map(|question| ask(client, namespace, question));
    let denied: Vec<Option<String>> = answers.buffered(AT_ONCE).try_collect().await?;
    let denied: Vec<String> = denied.into_iter().flatten().collect();
    match denied.first() {
        None => Ok(format!("{ACCOUNT} has all {count} of them")),
        Some(first) => bail!(
            "{ACCOUNT} may not {first} ({} of {count} are missing); apply control/deploy/rbac.yaml",
            denied.len()
        ),
    }
}

/// Every verb on every resource of every rule.
fn questions(rights: &[DynamicObject], namespace: &str) -> anyhow::Result<Vec<ResourceAttributes>> {
    let mut questions = Vec::new();
    for object in rights {
        let kind = object.types.clone().unwrap_or_default().kind;
        if kind != "ClusterRole" && kind != "Role" {
            continue;
        }
        let place = object.namespace().map(|_| namespace.to_owned());
        let rules = serde_json::from_value(object.data["rules"].clone());
        let rules: Vec<PolicyRule> = rules.context("reading the rules")?;
        for rule in &rules {
            questions.extend(of_rule(rule, place.as_ref()));
        }
    }
    Ok(questions)
}

fn of_rule(rule: &PolicyRule, namespace: Option<&String>) -> Vec<ResourceAttributes> {
    let nameless = [None];
    let names: Vec<Option<&String>> = match rule.resource_names.as_deref().unwrap_or_default() {
        [] => nameless.to_vec(),
        names => names.iter().map(Some).collect(),
    };
    let mut questions = Vec::new();
    for group in rule.api_groups.iter().flatten() {
        for resource in rule.resources.iter().flatten() {
            let (resource, subresource) = match resource.split_once('/') {
                Some((resource, below)) => (resource, Some(below.to_owned())),
                None => (resource.as_str(), None),
            };
            for verb in &rule.verbs {
                questions.extend(names.iter().map(|name| ResourceAttributes {
                    group: Some(group.clone()),
                    resource: Some(resource.to_owned()),
                    subresource: subresource.clone(),
                    verb: Some(verb.clone()),
                    name: name.cloned(),
                    namespace: namespace.cloned(),
                    ..ResourceAttributes::default()
                }));
            }
        }
    }
    questions
}

/// What is asked for, if it is denied.
async fn ask(
    client: &Client,
    namespace: &str,
    question: ResourceAttributes,
) -> anyhow::Result<Option<String>> {
    let part = |part: &Option<String>| part.clone().unwrap_or_default();
    let (verb, resource) = (part(&question.verb), part(&question.resource));
    let of = match part(&question.group) {
        group if group.is_empty() => String::new(),
        group => format!(".{group}"),
    };
    let groups = [
        "system:authenticated".to_owned(),
        "system:serviceaccounts".to_owned(),
        format!("system:serviceaccounts:{namespace}"),
    ];
    let review = SubjectAccessReview {
        spec: SubjectAccessReviewSpec {
            user: Some(format!("system:serviceaccount:{namespace}:{ACCOUNT}")),
            groups: Some(groups.to_vec()),
            resource_attributes: Some(question),
            ..SubjectAccessReviewSpec::default()
        },
        ..SubjectAccessReview::default()
    };
    let api: Api<SubjectAccessReview> = Api::all(client.clone());
    let answer = api.create(&PostParams::default(), &review).await;
    let answer = answer.context("asking for the controller's rights")?;
    let allowed = answer.status.is_some_and(|status| status.allowed);
    Ok((!allowed).then(|| format!("{verb} {resource}{of}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_rule_of_the_manifests_is_asked_about() {
        let questions = questions(&manifests::rights().unwrap(), "elsewhere").unwrap();
        let asked = |verb: &str, resource: &str, below: Option<&str>, name: Option<&str>| {
            questions.iter().any(|question| {
                question.verb.as_deref() == Some(verb)
                    && question.resource.as_deref() == Some(resource)
                    && question.subresource.as_deref() == below
                    && question.name.as_deref() == name
            })
        };
        assert!(asked("create", "pods", None, None));
        assert!(asked("patch", "rolesets", Some("status"), None));
        assert!(asked(
            "get",
            "secrets",
            None,
            Some("kvtide-control-webhook")
        ));
        assert!(!asked("delete", "nodes", None, None));
        let leases = questions
            .iter()
            .filter(|question| question.resource.as_deref() == Some("leases"));
        assert!(leases.clone().count() > 0);
        for lease in leases {
            assert_eq!(lease.namespace.as_deref(), Some("elsewhere"));
        }
    }
}
