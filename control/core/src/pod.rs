//! Builds pods and PodSets of a role. They carry what routers and schedulers select by, and the
//! environment that tells a container where it stands.

use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kvtide_control_api::{PodTemplate, Scheduler, keys};
use serde_json::{Map, Value, json};

/// What a pod or PodSet belongs to; names the environment and labels.
#[derive(Clone, Debug)]
pub struct Place<'a> {
    /// The StormService; empty for a RoleSet of its own.
    pub service: &'a str,
    /// The RoleSet.
    pub role_set: &'a str,
    /// Its index, where it has one.
    pub role_set_index: Option<&'a str>,
    /// The role.
    pub role: &'a str,
    /// Hash of the role's template.
    pub hash: &'a str,
    /// The replica's slot, where it has one.
    pub index: Option<i32>,
    /// The gang it is scheduled with, where there is one.
    pub gang: Option<Gang<'a>>,
}

/// A PodGroup that exists or will.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Gang<'a> {
    /// Whose PodGroup.
    pub scheduler: Scheduler,
    /// Its name.
    pub name: &'a str,
    /// The scheduler to name where the template names none.
    pub scheduler_name: Option<&'a str>,
}

impl Gang<'_> {
    /// Whether a pod, or a PodSet with all its pods, is in the gang.
    #[must_use]
    pub fn includes(&self, meta: &ObjectMeta) -> bool {
        let mut wanted = Marks::default();
        wanted.gang(self, "");
        wanted.annotations.remove(keys::VOLCANO_TASK);
        let has = |all: &Option<BTreeMap<String, String>>, wanted: &BTreeMap<String, String>| {
            let value = |key: &String| all.as_ref().and_then(|all| all.get(key));
            wanted.iter().all(|(key, name)| value(key) == Some(name))
        };
        has(&meta.labels, &wanted.labels) && has(&meta.annotations, &wanted.annotations)
    }
}

/// Labels and annotations.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Marks {
    /// Labels.
    pub labels: BTreeMap<String, String>,
    /// Annotations.
    pub annotations: BTreeMap<String, String>,
}

impl Marks {
    fn label(&mut self, key: &str, value: &str) {
        self.labels.insert(key.to_owned(), value.to_owned());
    }

    fn annotate(&mut self, key: &str, value: &str) {
        self.annotations.insert(key.to_owned(), value.to_owned());
    }

    /// What finds the PodGroup, for each scheduler.
    pub fn gang(&mut self, gang: &Gang<'_>, task: &str) {
        match gang.scheduler {
            Scheduler::Coscheduling => self.label(keys::COSCHEDULING_POD_GROUP, gang.name),
            Scheduler::Godel => {
                self.label(keys::GODEL_POD_GROUP, gang.name);
                self.annotate(keys::GODEL_POD_GROUP, gang.name);
            }
            Scheduler::Volcano => {
                self.annotate(keys::VOLCANO_POD_GROUP, gang.name);
                self.annotate(keys::VOLCANO_TASK, task);
            }
        }
    }

    /// The marks of a template.
    #[must_use]
    pub fn of_template(template: &PodTemplate) -> Self {
        let read = |which: &str| -> BTreeMap<String, String> {
            let map = template
                .0
                .get("metadata")
                .and_then(|metadata| metadata.get(which));
            let entries = map.and_then(Value::as_object).into_iter().flatten();
            entries
                .filter_map(|(key, value)| Some((key.clone(), value.as_str()?.to_owned())))
                .collect()
        };
        Self {
            labels: read("labels"),
            annotations: read("annotations"),
        }
    }
}

impl Place<'_> {
    /// Labels and annotations of every object of the role; those of the template are kept beneath.
    #[must_use]
    pub fn marks(&self, mut marks: Marks) -> Marks {
        if !self.service.is_empty() {
            marks.label(keys::STORM_SERVICE_NAME, self.service);
        }
        marks.label(keys::ROLE_SET_NAME, self.role_set);
        marks.label(keys::ROLE_NAME, self.role);
        marks.label(keys::ROLE_TEMPLATE_HASH, self.hash);
        marks.annotate(
            keys::ROLE_SET_INDEX,
            self.role_set_index.unwrap_or_default(),
        );
        if let Some(index) = self.index {
            let index = index.to_string();
            marks.label(keys::ROLE_REPLICA_INDEX, &index);
            marks.annotate(keys::ROLE_REPLICA_INDEX, &index);
        }
        if let Some(gang) = &self.gang {
            marks.gang(gang, self.role);
        }
        marks
    }

    /// The environment that every container gets.
    #[must_use]
    pub fn environment(&self) -> Vec<(&'static str, String)> {
        let mut environment = vec![
            (keys::ENV_STORM_SERVICE_NAME, self.service.to_owned()),
            (keys::ENV_ROLE_SET_NAME, self.role_set.to_owned()),
            (
                keys::ENV_ROLE_SET_INDEX,
                self.role_set_index.unwrap_or_default().to_owned(),
            ),
            (keys::ENV_ROLE_NAME, self.role.to_owned()),
            (keys::ENV_ROLE_TEMPLATE_HASH, self.hash.to_owned()),
        ];
        if let Some(index) = self.index {
            environment.push((keys::ENV_ROLE_REPLICA_INDEX, index.to_string()));
        }
        environment
    }

    /// The pod spec: environment, the gang's scheduler, nothing else.
    #[must_use]
    pub fn pod_spec(&self, template: &PodTemplate) -> Map<String, Value> {
        let mut spec = template.spec();
        inject_environment(&mut spec, &self.environment());
        if let Some(name) = self.gang.as_ref().and_then(|gang| gang.scheduler_name) {
            let unset = spec
                .get("schedulerName")
                .and_then(Value::as_str)
                .is_none_or(str::is_empty);
            if unset {
                spec.insert("schedulerName".into(), json!(name));
            }
        }
        spec
    }

    /// A pod that is a replica by itself.
    #[must_use]
    pub fn pod(
        &self,
        name: &str,
        template: &PodTemplate,
        owner: &Value,
        inherited: &Marks,
    ) -> Value {
        let mut marks = Marks::of_template(template);
        marks.labels.extend(inherited.labels.clone());
        let marks = self.marks(marks);
        pod(
            name,
            self.service,
            &marks,
            template,
            self.pod_spec(template),
            owner,
        )
    }
}

/// A pod: hostname and subdomain give it a name in DNS under the StormService's headless Service.
#[must_use]
pub fn pod(
    name: &str,
    service: &str,
    marks: &Marks,
    template: &PodTemplate,
    mut spec: Map<String, Value>,
    owner: &Value,
) -> Value {
    spec.insert("hostname".into(), json!(name));
    if !service.is_empty() {
        spec.insert("subdomain".into(), json!(service));
    }
    let mut metadata = json!({
        "name": name,
        "labels": marks.labels,
        "annotations": marks.annotations,
        "ownerReferences": [owner],
    });
    if let Some(finalizers) = template
        .0
        .get("metadata")
        .and_then(|meta| meta.get("finalizers"))
    {
        metadata["finalizers"] = finalizers.clone();
    }
    json!({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec})
}

/// Puts variables before a container's own, so that those may refer to them as `$(NAME)`; a
/// container's own of the same name gives way, as in AIBrix.
pub fn inject_environment(spec: &mut Map<String, Value>, variables: &[(&'static str, String)]) {
    let Some(Value::Array(containers)) = spec.get_mut("containers") else {
        return;
    };
    for container in containers.iter_mut().filter_map(Value::as_object_mut) {
        let own = match container.remove("env") {
            Some(Value::Array(own)) => own,
            _ => Vec::new(),
        };
        let injected = |entry: &Value| {
            variables
                .iter()
                .any(|(name, _)| entry.get("name").and_then(Value::as_str) == Some(name))
        };
        let env = variables
            .iter()
            .map(|(name, value)| json!({"name": name, "value": value}))
            .chain(own.into_iter().filter(|entry| !injected(entry)))
            .collect();
        container.insert("env".into(), Value::Array(env));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn template(spec: Value) -> PodTemplate {
        let template = json!({"metadata": {"labels": {"app": "llm"}, "annotations": {"a": "b"}},
            "spec": spec});
        serde_json::from_value(template).unwrap()
    }

    fn place<'a>(gang: Option<Gang<'a>>) -> Place<'a> {
        Place {
            service: "llm",
            role_set: "llm-roleset-abcde",
            role_set_index: Some("3"),
            role: "prefill",
            hash: "hhhhhhhh",
            index: Some(1),
            gang,
        }
    }

    #[test]
    fn a_pod_says_where_it_stands() {
        let template = template(json!({"containers": [{"name": "c", "image": "i",
            "env": [{"name": "OWN", "value": "$(ROLE_NAME)-x"}, {"name": "ROLE_NAME", "value": "mine"}]}]}));
        let pod = place(None).pod("p-1", &template, &json!({"uid": "u"}), &Marks::default());
        assert_eq!(pod["metadata"]["labels"]["app"], "llm");
        assert_eq!(
            pod["metadata"]["labels"][keys::ROLE_SET_NAME],
            "llm-roleset-abcde"
        );
        assert_eq!(pod["metadata"]["labels"][keys::ROLE_REPLICA_INDEX], "1");
        assert_eq!(pod["metadata"]["annotations"][keys::ROLE_SET_INDEX], "3");
        assert_eq!(pod["spec"]["hostname"], "p-1");
        assert_eq!(pod["spec"]["subdomain"], "llm");
        let env = pod["spec"]["containers"][0]["env"].as_array().unwrap();
        let names: Vec<&str> = env
            .iter()
            .map(|entry| entry["name"].as_str().unwrap())
            .collect();
        assert_eq!(names.last(), Some(&"OWN"), "after what it refers to");
        assert_eq!(names.iter().filter(|name| **name == "ROLE_NAME").count(), 1);
        assert!(env.contains(&json!({"name": "ROLE_NAME", "value": "prefill"})));
    }

    #[test]
    fn each_scheduler_finds_its_group() {
        let table = [
            (
                Scheduler::Coscheduling,
                keys::COSCHEDULING_POD_GROUP,
                "labels",
            ),
            (Scheduler::Godel, keys::GODEL_POD_GROUP, "labels"),
            (Scheduler::Godel, keys::GODEL_POD_GROUP, "annotations"),
            (Scheduler::Volcano, keys::VOLCANO_POD_GROUP, "annotations"),
        ];
        let template = template(json!({"containers": []}));
        for (scheduler, key, kind) in table {
            let gang = Gang {
                scheduler,
                name: "group",
                scheduler_name: Some("theirs"),
            };
            let pod = place(Some(gang)).pod("p", &template, &json!({}), &Marks::default());
            assert_eq!(pod["metadata"][kind][key], "group", "{scheduler:?}");
            let meta: ObjectMeta = serde_json::from_value(pod["metadata"].clone()).unwrap();
            let gang = |name| Gang {
                scheduler,
                name,
                scheduler_name: None,
            };
            assert!(gang("group").includes(&meta), "{scheduler:?}");
            assert!(!gang("other").includes(&meta), "{scheduler:?}");
            assert!(
                !gang("group").includes(&ObjectMeta::default()),
                "{scheduler:?}"
            );
            assert_eq!(pod["spec"]["schedulerName"], "theirs");
        }
    }

    #[test]
    fn a_scheduler_that_the_user_named_is_kept() {
        let template = template(json!({"containers": [], "schedulerName": "mine"}));
        let gang = Gang {
            scheduler: Scheduler::Volcano,
            name: "g",
            scheduler_name: Some("volcano"),
        };
        assert_eq!(
            place(Some(gang)).pod_spec(&template)["schedulerName"],
            "mine"
        );
    }
}
