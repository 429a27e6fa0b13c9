package podwatch

import (
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

func TestWorkload(t *testing.T) {
	yes, no := true, false
	for name, test := range map[string]struct {
		owners []metav1.OwnerReference
		hash   string
		want   Workload
	}{
		"alone":       {nil, "", Workload{}},
		"owned":       {[]metav1.OwnerReference{{Kind: "Node", Name: "n"}, {Kind: "Thing", Name: "t", Controller: &no}}, "", Workload{}},
		"Deployment":  {[]metav1.OwnerReference{{Kind: "ReplicaSet", Name: "web-app-6c8f7d9b5", Controller: &yes}}, "6c8f7d9b5", Workload{"Deployment", "web-app"}},
		"ReplicaSet":  {[]metav1.OwnerReference{{Kind: "ReplicaSet", Name: "web-6c8f7d9b5", Controller: &yes}}, "", Workload{"ReplicaSet", "web-6c8f7d9b5"}},
		"other hash":  {[]metav1.OwnerReference{{Kind: "ReplicaSet", Name: "web-1", Controller: &yes}}, "2", Workload{"ReplicaSet", "web-1"}},
		"only hash":   {[]metav1.OwnerReference{{Kind: "ReplicaSet", Name: "-2", Controller: &yes}}, "2", Workload{"ReplicaSet", "-2"}},
		"StatefulSet": {[]metav1.OwnerReference{{Kind: "Other", Name: "o"}, {Kind: "StatefulSet", Name: "db", Controller: &yes}}, "x", Workload{"StatefulSet", "db"}},
		"Job":         {[]metav1.OwnerReference{{Kind: "Job", Name: "backup-29", Controller: &yes}}, "", Workload{"Job", "backup-29"}},
	} {
		pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: "p", OwnerReferences: test.owners, Labels: map[string]string{"pod-template-hash": test.hash}}}
		if got := convertPod(pod).Workload; got != test.want {
			t.Errorf("%s: %v, want %v", name, got, test.want)
		}
	}
}
