//! Labels, annotations, environment variables and finalizers that this API puts on objects. The
//! strings are AIBrix v0.5.0's: routers, dashboards and users' manifests select by them.

/// Label: the StormService an object belongs to.
pub const STORM_SERVICE_NAME: &str = "storm-service-name";
/// Label of a RoleSet: the name of the ControllerRevision that it was made from.
pub const STORM_SERVICE_REVISION: &str = "storm-service-revision";
/// Label: the RoleSet an object belongs to.
pub const ROLE_SET_NAME: &str = "roleset-name";
/// Label: the role an object belongs to.
pub const ROLE_NAME: &str = "role-name";
/// Label: the hash of the role's template that a pod or PodSet was made from.
pub const ROLE_TEMPLATE_HASH: &str = "role-template-hash";
/// Label and annotation: a replica's index within its role, where replicas have one.
pub const ROLE_REPLICA_INDEX: &str = "stormservice.orchestration.aibrix.ai/role-replica-index";
/// Label: the PodSet a pod belongs to.
pub const POD_SET_NAME: &str = "stormservice.orchestration.aibrix.ai/podset-name";
/// Label: a pod's index within its PodSet.
pub const POD_GROUP_INDEX: &str = "stormservice.orchestration.aibrix.ai/pod-group-index";
/// Annotation: a RoleSet's index within its StormService.
pub const ROLE_SET_INDEX: &str = "stormservice.orchestration.aibrix.ai/roleset-index";
/// Annotation: as [`STORM_SERVICE_REVISION`].
pub const ROLE_SET_REVISION: &str = "stormservice.orchestration.aibrix.ai/revision";

/// Annotation of a StormService by which AIBrix puts its runtime sidecar into the pods; its presence is
/// enough. Not done here, and said so.
pub const SIDECAR_INJECTION: &str = "model.aibrix.ai/sidecar-injection";

/// Annotation of a RoleSet, ours: which foreign `role-template-hash` stands for which template of
/// ours, as JSON. Every RoleSet that kvtide made or adopted carries it.
pub const ADOPTED_HASHES: &str = "control.kvtide.io/adopted-template-hashes";
/// Annotation of a PodGroup: a hash of what was last applied to it.
pub const APPLIED_HASH: &str = "control.kvtide.io/applied-hash";
/// Annotation of a PodSet that recreates all: how often its pods had restarted when it began to.
pub const RESTARTS_BEFORE: &str = "control.kvtide.io/restarts-before";
/// Label of a pod, ours: it stands for its RoleSet in the selector of the StormService's scale subresource.
pub const SCALING_TARGET: &str = "control.kvtide.io/scaling-target";
/// Annotation of a StormService, ours: the role of which a pod stands for each RoleSet; the first where it
/// names none.
pub const SCALING_ROLE: &str = "control.kvtide.io/scaling-role";
/// Annotation of a ControllerRevision, ours: the numbers of replicas that its roles had when it became the
/// present one, as JSON, less those that were scaled since. Without it, those in its data.
pub const ROLE_REPLICAS: &str = "control.kvtide.io/role-replicas";
/// Annotation of a RoleSet, ours: the roles that were created once, comma-separated. Only where
/// roles depend on each other: dependencies gate a role's first creation alone.
pub const STARTED_ROLES: &str = "control.kvtide.io/started-roles";
/// Annotation of a RoleSet, ours: the roles that began to roll and have not been completely updated and
/// ready since, comma-separated. Only where roles wait for each other.
pub const ROLLING_ROLES: &str = "control.kvtide.io/rolling-roles";
/// Annotation of a RoleSet, ours: how often pods of its roles ended soon after they were made, as JSON.
pub const EARLY_ENDS: &str = "control.kvtide.io/early-ends";
/// Annotation of a pod template, ours: `"true"` lets the controller delete pods by force once they
/// outstayed their grace period, wherever they are.
pub const FORCE_DELETE: &str = "control.kvtide.io/force-delete-stuck-pods";

/// Label by which coscheduling finds a pod's PodGroup.
pub const COSCHEDULING_POD_GROUP: &str = "scheduling.x-k8s.io/pod-group";
/// Label and annotation by which Gödel finds a pod's PodGroup.
pub const GODEL_POD_GROUP: &str = "godel.bytedance.com/pod-group-name";
/// Annotation by which Volcano finds a pod's PodGroup.
pub const VOLCANO_POD_GROUP: &str = "scheduling.k8s.io/group-name";
/// Annotation by which Volcano knows a pod's task, for `minTaskMember`.
pub const VOLCANO_TASK: &str = "volcano.sh/task-spec";

/// Finalizer of a StormService.
pub const STORM_SERVICE_FINALIZER: &str = "orchestration.aibrix.ai/stormservice-finalizer";
/// Finalizer of a RoleSet.
pub const ROLE_SET_FINALIZER: &str = "orchestration.aibrix.ai/roleset-finalizer";
/// Finalizer of a PodSet.
pub const POD_SET_FINALIZER: &str = "orchestration.aibrix.ai/podset-finalizer";

/// Environment: name of the StormService.
pub const ENV_STORM_SERVICE_NAME: &str = "STORM_SERVICE_NAME";
/// Environment: name of the RoleSet.
pub const ENV_ROLE_SET_NAME: &str = "ROLESET_NAME";
/// Environment: index of the RoleSet.
pub const ENV_ROLE_SET_INDEX: &str = "ROLESET_INDEX";
/// Environment: name of the role.
pub const ENV_ROLE_NAME: &str = "ROLE_NAME";
/// Environment: index of the replica within its role, where it has one.
pub const ENV_ROLE_REPLICA_INDEX: &str = "ROLE_REPLICA_INDEX";
/// Environment: hash of the role's template.
pub const ENV_ROLE_TEMPLATE_HASH: &str = "ROLE_TEMPLATE_HASH";
/// Environment: name of the PodSet.
pub const ENV_POD_SET_NAME: &str = "PODSET_NAME";
/// Environment: index of the pod within its PodSet.
pub const ENV_POD_GROUP_INDEX: &str = "POD_GROUP_INDEX";
/// Environment: how many pods the PodSet has.
pub const ENV_POD_GROUP_SIZE: &str = "POD_GROUP_SIZE";
