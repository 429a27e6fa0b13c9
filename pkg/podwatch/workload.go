package podwatch

import (
	"strings"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// A Workload is what a pod belongs to in the eyes of who deployed it. It is zero
// for a pod that nobody controls.
type Workload struct{ Kind, Name string }

// workloadOf is the pod's controller. A ReplicaSet made by a Deployment stands
// for the Deployment: its name is that of the Deployment and the hash that the
// pod has as a label. For a Job of a CronJob it is the Job: its name does not
// tell whether a CronJob made it.
func workloadOf(in *corev1.Pod) Workload {
	owner := metav1.GetControllerOf(in)
	if owner == nil {
		return Workload{}
	}
	w := Workload{Kind: owner.Kind, Name: owner.Name}
	if hash := in.Labels["pod-template-hash"]; hash != "" && owner.Kind == "ReplicaSet" {
		if name, ok := strings.CutSuffix(owner.Name, "-"+hash); ok && name != "" {
			w = Workload{Kind: "Deployment", Name: name}
		}
	}
	return w
}
