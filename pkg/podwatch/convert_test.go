package podwatch

import (
	"testing"

	corev1 "k8s.io/api/core/v1"
)

// TestContainerUser: a container's own user counts before the pod's.
func TestContainerUser(t *testing.T) {
	user := func(n int64) *corev1.SecurityContext { return &corev1.SecurityContext{RunAsUser: &n} }
	always, common := corev1.ContainerRestartPolicyAlways, int64(1000)
	in := &corev1.Pod{Spec: corev1.PodSpec{
		SecurityContext: &corev1.PodSecurityContext{RunAsUser: &common},
		InitContainers:  []corev1.Container{{Name: "sluice-proxy", RestartPolicy: &always, SecurityContext: user(2337)}},
		Containers: []corev1.Container{
			{Name: "common"}, {Name: "empty", SecurityContext: &corev1.SecurityContext{}}, {Name: "root", SecurityContext: user(0)},
		},
	}}
	want := map[string]int64{"sluice-proxy": 2337, "common": 1000, "empty": 1000, "root": 0}
	for _, c := range convertPod(in).Containers {
		if c.User != want[c.Name] {
			t.Errorf("%s runs as %d, want %d", c.Name, c.User, want[c.Name])
		}
	}
	in.Spec.SecurityContext = nil
	if got := convertPod(in).Containers[1].User; got != 0 {
		t.Errorf("without any word container runs as %d", got)
	}
}

// TestContainerRuntimeID: what does not run has none, of what runs the scheme of
// the runtime is left out.
func TestContainerRuntimeID(t *testing.T) {
	always := corev1.ContainerRestartPolicyAlways
	running := corev1.ContainerState{Running: &corev1.ContainerStateRunning{}}
	in := &corev1.Pod{
		Spec: corev1.PodSpec{
			InitContainers: []corev1.Container{{Name: "once"}, {Name: "sluice-proxy", RestartPolicy: &always}},
			Containers:     []corev1.Container{{Name: "app"}, {Name: "new"}},
		},
		Status: corev1.PodStatus{
			InitContainerStatuses: []corev1.ContainerStatus{
				{Name: "once", ContainerID: "containerd://once", State: running},
				{Name: "sluice-proxy", ContainerID: "containerd://proxy", State: running},
			},
			ContainerStatuses: []corev1.ContainerStatus{{Name: "app", ContainerID: "containerd://ended"}},
		},
	}
	want := map[string]string{"sluice-proxy": "proxy", "app": "", "new": ""}
	for _, c := range convertPod(in).Containers {
		if id, known := want[c.Name]; !known || c.RuntimeID != id {
			t.Errorf("%s has ID %q, want %q", c.Name, c.RuntimeID, id)
		}
	}
}
