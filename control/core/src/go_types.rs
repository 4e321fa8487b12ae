//! Which fields of a pod template, and of the template around it, Go holds without a pointer: what
//! they hold when empty is the same as their absence, and Go's JSON leaves it out (or writes it
//! although nobody did). Where Go has a pointer, `false`, 0, "" and {} mean something and stay.
//!
//! From the Go types of `k8s.io/api/core/v1` (v0.31 to v0.36) and AIBrix v0.5.0. A field that is not
//! listed is taken for a pointer, as nearly all newer ones are.

use serde_json::Value;

/// Scalars and lists without a pointer.
#[rustfmt::skip]
const SCALARS_AND_LISTS: &[&str] = &[
    "accessModes", "action", "add", "apiVersion", "application", "args", "audience",
    "certificateChainPath", "chapAuthDiscovery", "chapAuthSession", "claimName", "claims", "command",
    "conditionType", "containerName", "containerPort", "containers", "credentialBundlePath",
    "datasetName", "datasetUUID", "dependencies", "devicePath", "directory", "diskName", "diskURI",
    "divisor", "dnsPolicy", "driver", "drop", "effect", "endpoints", "env", "envFrom",
    "ephemeralContainers", "failureThreshold", "fieldPath", "finalizers", "fsType", "gateway",
    "generateName", "group", "host", "hostAliases", "hostIP", "hostIPC", "hostNetwork", "hostPID",
    "hostPort", "hostname", "hostnames", "httpHeaders", "image", "imagePullPolicy",
    "imagePullSecrets", "initContainers", "initialDelaySeconds", "ip", "iqn", "iscsiInterface",
    "items", "key", "keyPath", "keyType", "keyring", "kind", "level", "lun", "matchExpressions",
    "matchFields", "matchLabelKeys", "maxSkew", "medium", "minMember", "mismatchLabelKeys",
    "monitors", "mountPath", "name", "nameservers", "namespace", "namespaces", "nodeName",
    "nodeSelectorTerms", "operator", "options", "ownerReferences", "partition", "path", "pdID",
    "pdName", "periodSeconds", "pool", "port", "portals", "ports",
    "preferredDuringSchedulingIgnoredDuringExecution", "prefix", "priorityClassName",
    "protectionDomain", "protocol", "pullPolicy", "queue", "readOnly", "readinessGates",
    "reference", "registry", "repository", "request",
    "requiredDuringSchedulingIgnoredDuringExecution", "resizePolicy", "resource", "resourceClaims",
    "resourceName", "restartPolicy", "restartPolicyRules", "revision", "role", "roles",
    "schedulerName", "schedulingGates", "scheme", "searches", "seconds", "secretFile", "secretName",
    "server", "serviceAccount", "serviceAccountName", "shareName", "signerName", "sources",
    "sslEnabled", "stateful", "stdin", "stdinOnce", "storageMode", "storagePolicyID",
    "storagePolicyName", "storagePool", "subPath", "subPathExpr", "subdomain", "successThreshold",
    "supplementalGroups", "sysctls", "system", "targetContainerName", "targetPortal",
    "targetWWNs", "tenant", "terminationMessagePath", "terminationMessagePolicy", "timeoutSeconds",
    "tolerations", "topologyKey", "topologySpreadConstraints", "tty", "type", "user", "value",
    "values", "volume", "volumeDevices", "volumeID", "volumeMounts", "volumeName",
    "volumeNamespace", "volumePath", "volumes", "weight", "whenUnsatisfiable", "workingDir", "wwids",
];

/// The same names where Go does have a pointer: the field that holds the object, and the field.
const POINTERS: &[(&str, &str)] = &[
    ("azureDisk", "fsType"),
    ("azureDisk", "kind"),
    ("azureDisk", "readOnly"),
    ("clusterTrustBundle", "name"),
    ("clusterTrustBundle", "signerName"),
    ("csi", "fsType"),
    ("csi", "readOnly"),
    ("dataSourceRef", "namespace"),
    ("fc", "lun"),
    ("options", "value"),
];

/// Objects without a pointer.
const OBJECTS: &[&str] = &[
    "disruptionTolerance",
    "metadata",
    "resources",
    "status",
    "strategy",
    "updateStrategy",
];

/// Maps whose keys are the user's: nothing in them is a field.
const STRING_MAPS: &[&str] = &[
    "annotations",
    "labels",
    "matchLabels",
    "minTaskMember",
    "nodeSelector",
    "options",
    "userAnnotations",
    "volumeAttributes",
];

/// Maps from resource names to quantities.
const QUANTITY_MAPS: &[&str] = &["limits", "minResources", "overhead", "requests"];

/// Quantities by themselves.
const QUANTITIES: &[&str] = &["divisor", "sizeLimit"];

/// What the CRDs fill in because a key of a map list must have a value, or as AIBrix's do because
/// Kubernetes' own schema says so: holder, field and the value that is the same as nothing.
const FILLED_IN: &[(&str, &str, &str)] = &[("ports", "protocol", "TCP"), ("grpc", "service", "")];

/// What a field holds, as far as comparing it needs to know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Holds {
    /// Fields, or a list of objects with fields, or a scalar.
    Fields,
    /// The user's own keys.
    StringMap,
    /// Quantities by name.
    Quantities,
    /// One quantity.
    Quantity,
}

/// What the field `key` holds.
pub(super) fn holds(key: &str, value: &Value) -> Holds {
    if QUANTITY_MAPS.contains(&key) {
        Holds::Quantities
    } else if QUANTITIES.contains(&key) {
        Holds::Quantity
    } else if value.is_object() && STRING_MAPS.contains(&key) {
        Holds::StringMap
    } else {
        Holds::Fields
    }
}

/// Whether the field `key` of an object that the field `holder` holds says nothing with `value`.
pub(super) fn is_absent(holder: &str, key: &str, value: &Value) -> bool {
    let filled_in = |(in_holder, field, default): &(&str, &str, &str)| {
        *in_holder == holder && *field == key && value.as_str() == Some(default)
    };
    if FILLED_IN.iter().any(filled_in) {
        return true;
    }
    let empty = match value {
        Value::Null => return true,
        Value::Object(fields) => {
            let without_pointer = [OBJECTS, STRING_MAPS, QUANTITY_MAPS]
                .iter()
                .any(|list| list.contains(&key));
            return fields.is_empty() && without_pointer;
        }
        Value::Bool(value) => !value,
        Value::Number(value) => value.as_f64() == Some(0.0),
        Value::String(value) => value.is_empty() || key == "divisor" && value == "0n",
        Value::Array(items) => items.is_empty(),
    };
    empty && SCALARS_AND_LISTS.contains(&key) && !POINTERS.contains(&(holder, key))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_lists_are_in_order_and_name_nothing_twice() {
        for list in [SCALARS_AND_LISTS, OBJECTS, STRING_MAPS, QUANTITY_MAPS] {
            assert!(list.is_sorted(), "{list:?}");
            assert!(list.windows(2).all(|pair| pair[0] != pair[1]), "{list:?}");
        }
    }

    #[test]
    fn zero_means_something_exactly_where_go_has_a_pointer() {
        let table = [
            ("volumeMounts", "readOnly", json!(false), true),
            ("csi", "readOnly", json!(false), false),
            ("env", "value", json!(""), true),
            ("containers", "args", json!([]), true),
            ("livenessProbe", "initialDelaySeconds", json!(0), true),
            ("spec", "terminationGracePeriodSeconds", json!(0), false),
            ("spec", "automountServiceAccountToken", json!(false), false),
            ("securityContext", "runAsNonRoot", json!(false), false),
            ("securityContext", "runAsUser", json!(0), false),
            ("configMapKeyRef", "optional", json!(false), false),
            ("roles", "replicas", json!(0), false),
            ("roles", "stateful", json!(false), true),
            ("volumes", "emptyDir", json!({}), false),
            ("volumes", "image", json!({}), false),
            ("containers", "resources", json!({}), true),
            ("podAffinityTerm", "namespaceSelector", json!({}), false),
            ("spec", "nodeSelector", json!({}), true),
            ("ports", "protocol", json!("TCP"), true),
            ("ports", "protocol", json!("UDP"), false),
            ("grpc", "service", json!(""), true),
            ("somewhere", "fieldOfALaterVersion", json!(false), false),
        ];
        for (holder, key, value, expected) in table {
            assert_eq!(is_absent(holder, key, &value), expected, "{holder}.{key}");
        }
    }
}
