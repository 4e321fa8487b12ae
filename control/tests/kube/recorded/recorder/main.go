// Prints what AIBrix v0.5.0 makes of the StormService on its standard input, as a JSON array in the
// order in which it makes it. The types are declared here after its API, and pods are Kubernetes'
// own of the version that it uses, so that every field passes through the same encoder and the
// hashes are the real ones. See ../README.md.
package main

import (
	"encoding/json"
	"fmt"
	"hash/fnv"
	"io"
	"maps"
	"os"
	"slices"
	"strconv"
	"strings"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/util/dump"
	"k8s.io/apimachinery/pkg/util/intstr"
	"k8s.io/apimachinery/pkg/util/rand"
	"sigs.k8s.io/yaml"
)

const (
	apiVersion = "orchestration.aibrix.ai/v1alpha1"
	domain     = "stormservice.orchestration.aibrix.ai/"
	finalizers = "orchestration.aibrix.ai/"
)

type tolerance struct {
	MaxUnavailable *intstr.IntOrString `json:"maxUnavailable,omitempty"`
}

type budget struct {
	MaxUnavailable *intstr.IntOrString `json:"maxUnavailable,omitempty"`
	MaxSurge       *intstr.IntOrString `json:"maxSurge,omitempty"`
}

type role struct {
	Name                string                 `json:"name,omitempty"`
	Replicas            *int32                 `json:"replicas,omitempty"`
	UpgradeOrder        *int32                 `json:"upgradeOrder,omitempty"`
	PodGroupSize        *int32                 `json:"podGroupSize,omitempty"`
	UpdateStrategy      budget                 `json:"updateStrategy,omitempty"`
	Stateful            bool                   `json:"stateful,omitempty"`
	Template            corev1.PodTemplateSpec `json:"template,omitempty"`
	DisruptionTolerance tolerance              `json:"disruptionTolerance,omitempty"`
}

type roleSetSpec struct {
	Roles          []role `json:"roles,omitempty"`
	UpdateStrategy string `json:"updateStrategy,omitempty"`
}

type roleSetTemplate struct {
	metav1.ObjectMeta `json:"metadata,omitempty"`
	Spec              *roleSetSpec `json:"spec,omitempty"`
}

type stormServiceSpec struct {
	Replicas             *int32                `json:"replicas,omitempty"`
	Selector             *metav1.LabelSelector `json:"selector"`
	Stateful             bool                  `json:"stateful,omitempty"`
	Template             roleSetTemplate       `json:"template"`
	UpdateStrategy       updateStrategy        `json:"updateStrategy,omitempty"`
	RevisionHistoryLimit *int32                `json:"revisionHistoryLimit,omitempty"`
	Paused               bool                  `json:"paused,omitempty"`
	DisruptionTolerance  tolerance             `json:"disruptionTolerance,omitempty"`
}

type updateStrategy struct {
	Type string `json:"type,omitempty"`
	budget
}

type roleStatus struct {
	Name                 string `json:"name,omitempty"`
	Replicas             int32  `json:"replicas"`
	ReadyReplicas        int32  `json:"readyReplicas,omitempty"`
	NotReadyReplicas     int32  `json:"notReadyReplicas,omitempty"`
	UpdatedReplicas      int32  `json:"updatedReplicas,omitempty"`
	UpdatedReadyReplicas int32  `json:"updatedReadyReplicas,omitempty"`
}

type podSetSpec struct {
	PodGroupSize   int32                  `json:"podGroupSize"`
	Template       corev1.PodTemplateSpec `json:"template"`
	Stateful       bool                   `json:"stateful,omitempty"`
	RecoveryPolicy string                 `json:"recoveryPolicy,omitempty"`
}

// object has no apiVersion and kind inside so that every kind of it can have its own.
type object[Spec any] struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`
	Spec              Spec `json:"spec,omitempty"`
	Status            any  `json:"status,omitempty"`
}

func check(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func kind(name string) metav1.TypeMeta { return metav1.TypeMeta{APIVersion: apiVersion, Kind: name} }

// The uid is the test's: it puts it in when it has made the owner.
func owned(by metav1.TypeMeta, name string) []metav1.OwnerReference {
	yes := true
	return []metav1.OwnerReference{{APIVersion: by.APIVersion, Kind: by.Kind, Name: name,
		UID: "to-be-filled-in", Controller: &yes, BlockOwnerDeletion: &yes}}
}

func hashOfTemplate(template corev1.PodTemplateSpec) string {
	hasher := fnv.New32a()
	fmt.Fprintf(hasher, "%v", dump.ForHash(template))
	return rand.SafeEncodeString(fmt.Sprint(hasher.Sum32()))
}

func hashOfRevision(data []byte) string {
	hasher := fnv.New32()
	hasher.Write(data)
	hasher.Write([]byte(strconv.Itoa(0))) // collisions
	return rand.SafeEncodeString(fmt.Sprint(hasher.Sum32()))
}

// What the CRDs fill in.
func fillIn(service *object[stormServiceSpec]) {
	if service.Spec.UpdateStrategy.Type == "" {
		service.Spec.UpdateStrategy.Type = "RollingUpdate"
	}
	sets := service.Spec.Template.Spec
	if sets.UpdateStrategy == "" {
		sets.UpdateStrategy = "Sequential"
	}
	for r := range sets.Roles {
		containers := sets.Roles[r].Template.Spec.Containers
		for c := range containers {
			for p := range containers[c].Ports {
				if containers[c].Ports[p].Protocol == "" {
					containers[c].Ports[p].Protocol = corev1.ProtocolTCP
				}
			}
			for _, probe := range []*corev1.Probe{containers[c].LivenessProbe,
				containers[c].ReadinessProbe, containers[c].StartupProbe} {
				if probe != nil && probe.GRPC != nil && probe.GRPC.Service == nil {
					probe.GRPC.Service = new(string)
				}
			}
		}
	}
}

// Variables by name, as AIBrix v0.5.0 sorts them.
func withVariables(container corev1.Container, variables map[string]string) corev1.Container {
	all := map[string]corev1.EnvVar{}
	for _, own := range container.Env {
		all[own.Name] = own
	}
	for name, value := range variables {
		all[name] = corev1.EnvVar{Name: name, Value: value}
	}
	container.Env = nil
	for _, name := range slices.Sorted(maps.Keys(all)) {
		container.Env = append(container.Env, all[name])
	}
	return container
}

func merged(all ...map[string]string) map[string]string {
	result := map[string]string{}
	for _, one := range all {
		maps.Copy(result, one)
	}
	return result
}

func main() {
	manifest, err := io.ReadAll(os.Stdin)
	check(err)
	var service object[stormServiceSpec]
	check(yaml.UnmarshalStrict(manifest, &service))
	fillIn(&service)
	service.Finalizers = []string{finalizers + "stormservice-finalizer"}

	template, err := runtime.DefaultUnstructuredConverter.ToUnstructured(&service.Spec.Template)
	check(err)
	template["$patch"] = "replace"
	data, err := json.Marshal(map[string]any{"spec": map[string]any{"template": template}})
	check(err)
	hash := hashOfRevision(data)
	revision := service.Name + "-" + hash

	ready := []any{map[string]any{"type": "Ready", "status": "True", "reason": "Ready"}}
	service.Status = map[string]any{
		"replicas": 1, "readyReplicas": 1, "currentReplicas": 1, "updatedReplicas": 1,
		"updatedReadyReplicas": 1, "currentRevision": revision, "updateRevision": revision,
		"collisionCount": 0, "scalingTargetSelector": "storm-service-name=" + service.Name,
		"conditions": ready,
	}
	made := []any{service}
	made = append(made, map[string]any{
		"apiVersion": "apps/v1", "kind": "ControllerRevision", "revision": 1,
		"metadata": metav1.ObjectMeta{Name: revision, OwnerReferences: owned(service.TypeMeta, service.Name),
			Labels: map[string]string{"name": service.Name, "controller.kubernetes.io/hash": hash}},
		"data": json.RawMessage(data),
	})
	made = append(made, corev1.Service{
		TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Service"},
		ObjectMeta: metav1.ObjectMeta{Name: service.Name,
			OwnerReferences: owned(service.TypeMeta, service.Name)},
		Spec: corev1.ServiceSpec{Type: "ClusterIP", ClusterIP: "None", PublishNotReadyAddresses: true,
			Selector: map[string]string{"storm-service-name": service.Name}},
	})

	set := object[roleSetSpec]{TypeMeta: kind("RoleSet"), Spec: *service.Spec.Template.Spec}
	set.Name = service.Name + "-roleset-x7k2p"
	set.OwnerReferences = owned(service.TypeMeta, service.Name)
	set.Finalizers = []string{finalizers + "roleset-finalizer"}
	set.Labels = merged(service.Spec.Template.Labels, map[string]string{
		"storm-service-name": service.Name, "storm-service-revision": revision})
	set.Annotations = merged(service.Spec.Template.Annotations, map[string]string{
		domain + "revision": revision})
	var counts []roleStatus
	for _, role := range set.Spec.Roles {
		counts = append(counts, roleStatus{Name: role.Name, Replicas: *role.Replicas,
			ReadyReplicas: *role.Replicas, UpdatedReplicas: *role.Replicas,
			UpdatedReadyReplicas: *role.Replicas})
	}
	set.Status = map[string]any{"roles": counts, "conditions": ready}
	made = append(made, set)
	for _, role := range set.Spec.Roles {
		made = append(made, replicas(service.Name, set.ObjectMeta, role)...)
	}

	encoder := json.NewEncoder(os.Stdout)
	encoder.SetIndent("", " ")
	encoder.SetEscapeHTML(false)
	check(encoder.Encode(made))
}

// The pods of a role, or its PodSets and their pods.
func replicas(service string, set metav1.ObjectMeta, role role) []any {
	hash := hashOfTemplate(role.Template)
	var made []any
	for index := range int(*role.Replicas) {
		at := strconv.Itoa(index)
		labels := map[string]string{"roleset-name": set.Name, "role-name": role.Name,
			"role-template-hash": hash, "storm-service-name": service}
		annotations := map[string]string{domain + "roleset-index": ""}
		variables := map[string]string{"STORM_SERVICE_NAME": service, "ROLESET_NAME": set.Name,
			"ROLESET_INDEX": "", "ROLE_NAME": role.Name, "ROLE_TEMPLATE_HASH": hash}
		group := role.PodGroupSize != nil && *role.PodGroupSize > 1
		if group || role.Stateful {
			labels[domain+"role-replica-index"] = at
			annotations[domain+"role-replica-index"] = at
			variables["ROLE_REPLICA_INDEX"] = at
		}
		template := *role.Template.DeepCopy()
		for c := range template.Spec.Containers {
			template.Spec.Containers[c] = withVariables(template.Spec.Containers[c], variables)
		}
		name := strings.Join([]string{set.Name, role.Name, hash, at}, "-")
		if !group {
			if !role.Stateful {
				// Its suffix is random.
				name = fmt.Sprintf("%s-%s-4qz8%s", set.Name, role.Name, at)
			}
			owner := owned(kind("RoleSet"), set.Name)
			made = append(made, pod(service, name, owner, labels, annotations, template))
			continue
		}
		one := object[podSetSpec]{TypeMeta: kind("PodSet"), Spec: podSetSpec{
			PodGroupSize: *role.PodGroupSize, Template: template, Stateful: role.Stateful,
			RecoveryPolicy: "ReplaceUnhealthy"}}
		one.Name, one.Labels, one.Annotations = name, labels, annotations
		one.OwnerReferences = owned(kind("RoleSet"), set.Name)
		one.Finalizers = []string{finalizers + "podset-finalizer"}
		one.Status = map[string]any{"readyPods": *role.PodGroupSize,
			"totalPods": *role.PodGroupSize, "phase": "Ready"}
		made = append(made, one)
		for nth := range int(*role.PodGroupSize) {
			at := strconv.Itoa(nth)
			podTemplate := *template.DeepCopy()
			for c := range podTemplate.Spec.Containers {
				env := &podTemplate.Spec.Containers[c].Env
				*env = append(*env, corev1.EnvVar{Name: "PODSET_NAME", Value: name},
					corev1.EnvVar{Name: "POD_GROUP_INDEX", Value: at},
					corev1.EnvVar{Name: "POD_GROUP_SIZE", Value: strconv.Itoa(int(*role.PodGroupSize))})
			}
			labels := merged(labels, map[string]string{
				domain + "podset-name": name, domain + "pod-group-index": at})
			owner := owned(kind("PodSet"), name)
			made = append(made, pod(service, name+"-"+at, owner, labels, annotations, podTemplate))
		}
	}
	return made
}

func pod(service, name string, owner []metav1.OwnerReference, labels, annotations map[string]string,
	template corev1.PodTemplateSpec) corev1.Pod {
	made := corev1.Pod{TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Pod"}, Spec: template.Spec}
	made.Name, made.OwnerReferences = name, owner
	made.Labels = merged(template.Labels, labels)
	made.Annotations = merged(template.Annotations, annotations)
	made.Spec.Hostname, made.Spec.Subdomain = name, service
	return made
}
