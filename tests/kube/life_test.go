package kube

import (
	"fmt"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
)

const lifeNamespace = "sluice-e2e-life"

// oneOff makes the pod of a file, waits until it is ready, does f, and deletes it
// in the end.
func (s *suite) oneOff(t *testing.T, file string, f func(p corev1.Pod)) {
	t.Helper()
	m := s.manifest(t, file, nil)
	s.apply(t, m)
	t.Cleanup(func() { s.kubectl(t, m, "delete", "-f", "-", "--ignore-not-found", "--wait=false") })
	name := strings.TrimSuffix(file, ".yaml")
	s.allReady(t, 90*time.Second, lifeNamespace, "app="+name, 1)
	p := s.pods(t, lifeNamespace, "app="+name)[0]
	s.redirected(t, p)
	f(p)
}

// worksAsAny calls a pod and makes it call, through its sidecar both times.
func (s *suite) worksAsAny(t *testing.T, p corev1.Pod) {
	t.Helper()
	s.rising(t, []stat{captured(p, "inbound", 5), captured(p, "outbound", 5), served(p, 5)}, func() {
		r := s.call(t, outside, "plain-a", 5, "http://"+p.Status.PodIP+":9080/", "new-connections=true")
		behindProxies(t, *r.Last)
		r = s.call(t, p.Namespace, p.Name, 5, "http://details.bookshop.svc.cluster.local:9080/", "new-connections=true")
		behindProxies(t, *r.Last)
	})
}

// job completes although its sidecar would run for ever, and its request is captured.
func (s *suite) job(t *testing.T) {
	m := s.manifest(t, "job.yaml", nil)
	s.apply(t, m)
	t.Cleanup(func() { s.kubectl(t, m, "delete", "-f", "-", "--ignore-not-found", "--wait=false") })
	s.eventually(t, 2*time.Minute, "the Job completes", func() error {
		var j struct {
			Status struct{ Succeeded, Failed int }
		}
		if err := s.get("/apis/batch/v1/namespaces/"+lifeNamespace+"/jobs/job", &j); err != nil {
			return err
		}
		if j.Status.Succeeded != 1 {
			return fmt.Errorf("%+v", j.Status)
		}
		return nil
	})
	p := s.pods(t, lifeNamespace, "batch.kubernetes.io/job-name=job")[0]
	if len(p.Spec.InitContainers) == 0 {
		t.Error("the Job's pod has no sidecar")
	}
	log := s.kubectl(t, "", "-n", lifeNamespace, "logs", p.Name, "-c", "client")
	if !strings.Contains(log, `"failed":0`) || !strings.Contains(log, appPeer) {
		t.Errorf("the Job's report: %s", log)
	}
	s.current.requests += 20
}

// sharedPID: all containers of the pod see each other's processes.
func (s *suite) sharedPID(t *testing.T) {
	s.oneOff(t, "shared-pid.yaml", func(p corev1.Pod) { s.worksAsAny(t, p) })
}

// userNamespace: the pod's users are not the node's, the proxy's least of all. Such
// a pod is redirected by eBPF whatever the node's backend is.
func (s *suite) userNamespace(t *testing.T) {
	m := s.manifest(t, "userns.yaml", nil)
	if s.lab != "" {
		s.labDo(t, "unmask", s.b)
		t.Cleanup(func() { s.labDo(t, "mask", s.b) })
	}
	s.apply(t, m)
	cannot := ""
	s.eventually(t, time.Minute, "the pod starts or cannot", func() error {
		p := s.pod(t, lifeNamespace, "userns")
		if podReady(&p) {
			return nil
		}
		for _, e := range s.events(t, lifeNamespace, "userns") {
			for _, text := range []string{"user namespaces", "userns", "idmap", "operation not permitted"} {
				if strings.Contains(e.Message, text) && e.Source.Component == "kubelet" && !strings.Contains(e.Message, "redirect pod") {
					cannot = e.Message
					return nil
				}
			}
		}
		return fmt.Errorf("phase %s", p.Status.Phase)
	})
	if cannot != "" {
		s.kubectl(t, m, "delete", "-f", "-", "--wait=false")
		s.note("this runtime cannot: %.120s", cannot)
		if s.lab != "" {
			t.Fatalf("the lab's runtime can: %s", cannot)
		}
		t.Skip(cannot)
	}
	s.oneOff(t, "userns.yaml", func(p corev1.Pod) {
		s.worksAsAny(t, p)
		if s.lab == "" {
			return
		}
		pids := s.processes(t, p.Spec.NodeName, "envoy", &p)
		if len(pids) != 1 {
			t.Fatalf("%d processes of Envoy", len(pids))
		}
		uid := strings.TrimSpace(s.mustOnNode(t, p.Spec.NodeName, fmt.Sprintf("stat -c %%u /proc/%d", pids[0])))
		if uid == "1337" {
			t.Error("Envoy is user 1337 of the node: the pod has no user namespace")
		}
		s.note("Envoy is user %s of the node", uid)
	})
}

// ownCgroup: a pod that makes cgroups of its own below its container's.
func (s *suite) ownCgroup(t *testing.T) {
	s.oneOff(t, "own-cgroup.yaml", func(p corev1.Pod) {
		pids := s.processes(t, p.Spec.NodeName, "bookshop", &p)
		if len(pids) != 1 {
			t.Fatalf("%d processes of the application", len(pids))
		}
		s.mustOnNode(t, p.Spec.NodeName, fmt.Sprintf(`
set -e
at=/sys/fs/cgroup$(sed -n 's/^0:://p' /proc/%[1]d/cgroup)
mkdir "$at/own" "$at/own/deeper"
echo %[1]d >"$at/own/deeper/cgroup.procs"
grep -q own/deeper /proc/%[1]d/cgroup
`, pids[0]))
		s.worksAsAny(t, p)
	})
}

// otherBackend: a pod that asks for the backend that its node does not use.
func (s *suite) otherBackend(t *testing.T) {
	other := map[string]string{"ebpf": "iptables", "iptables": "ebpf"}[s.backend]
	m := strings.ReplaceAll(s.manifest(t, "shared-pid.yaml", nil), "annotations: {}", "annotations: {sluice.dev/backend: "+other+"}")
	s.apply(t, m)
	t.Cleanup(func() { s.deleteAll(t, m) })
	s.allReady(t, 90*time.Second, lifeNamespace, "app=shared-pid", 1)
	p := s.pod(t, lifeNamespace, "shared-pid")
	s.redirected(t, p)
	s.worksAsAny(t, p)
	if s.lab != "" {
		rules := strings.Contains(s.inPod(t, &p, "iptables-save"), "SLUICE_OUTPUT")
		if rules != (other == "iptables") {
			t.Errorf("rules in the pod: %t", rules)
		}
	}
	s.note("%s on a node of %s", other, s.backend)
}

// badAnnotation: the pod does not start, says why, and starts once it is mended.
func (s *suite) badAnnotation(t *testing.T) {
	m := strings.ReplaceAll(s.manifest(t, "shared-pid.yaml", nil), "annotations: {}", `annotations: {sluice.dev/exclude-outbound-ports: "http"}`)
	s.apply(t, m)
	t.Cleanup(func() { s.deleteAll(t, m) })
	s.eventually(t, time.Minute, "an event names the annotation", func() error {
		var seen []string
		for _, e := range s.events(t, lifeNamespace, "shared-pid") {
			if e.Reason == "BadAnnotation" && strings.Contains(e.Message, "sluice.dev/exclude-outbound-ports") {
				s.note("event: %s", e.Message)
				return nil
			}
			seen = append(seen, e.Reason+": "+e.Message)
		}
		return fmt.Errorf("events: %q", seen)
	})
	p := s.pod(t, lifeNamespace, "shared-pid")
	for _, c := range slices.Concat(p.Status.InitContainerStatuses, p.Status.ContainerStatuses) {
		if c.State.Running != nil {
			t.Errorf("container %s runs", c.Name)
		}
	}
	s.kubectl(t, "", "-n", lifeNamespace, "annotate", "pod", "shared-pid", "sluice.dev/exclude-outbound-ports-")
	s.allReady(t, 2*time.Minute, lifeNamespace, "app=shared-pid", 1)
	s.worksAsAny(t, s.pod(t, lifeNamespace, "shared-pid"))
}

// events of a pod, not of an earlier one of its name.
func (s *suite) events(t *testing.T, namespace, pod string) []corev1.Event {
	t.Helper()
	var list corev1.EventList
	uid := string(s.pod(t, namespace, pod).UID)
	if err := s.get("/api/v1/namespaces/"+namespace+"/events?fieldSelector="+url.QueryEscape("involvedObject.uid="+uid), &list); err != nil {
		t.Fatal(err)
	}
	return list.Items
}

// probes of all four kinds are answered by the application: those of a port that
// is open succeed, those of a port that is closed fail although the proxy would
// accept the connection.
func (s *suite) probes(t *testing.T) {
	m := s.manifest(t, "probes.yaml", nil)
	s.apply(t, m)
	t.Cleanup(func() { s.kubectl(t, m, "delete", "-f", "-", "--ignore-not-found", "--wait=false") })
	s.allReady(t, 2*time.Minute, lifeNamespace, "probe=open", 4)
	for _, p := range s.pods(t, lifeNamespace, "probe=open") {
		s.redirected(t, p)
		if p.Name == "open-exec" {
			continue // nobody dials
		}
		if n := captured(p, "inbound", 0).value(s, t); n > 0 {
			t.Errorf("%s: %g probes of the kubelet went to the proxy", p.Name, n)
		}
		exempt := stat{pod: p, name: "sluice_connections_total", labels: []string{"reason=host_probe"}}
		s.eventually(t, 30*time.Second, "a probe of "+p.Name+" is counted as exempt", func() error {
			if exempt.value(s, t) == 0 {
				return fmt.Errorf("none is")
			}
			return nil
		})
	}
	// Started is set by the startup probe, Ready must never have been true, and
	// the liveness probe has the container restarted.
	s.eventually(t, time.Minute, "liveness probes of closed ports fail", func() error {
		for _, p := range s.pods(t, lifeNamespace, "probe=dead") {
			if p.Status.ContainerStatuses[0].RestartCount == 0 {
				return fmt.Errorf("%s was not restarted", p.Name)
			}
		}
		return nil
	})
	closed := s.pods(t, lifeNamespace, "probe=closed")
	if len(closed) != 4 {
		t.Errorf("%d pods with closed ports, want 4", len(closed))
	}
	for _, p := range closed {
		unhealthy := false
		s.eventually(t, time.Minute, "probe of "+p.Name+" fails", func() error {
			for _, e := range s.events(t, lifeNamespace, p.Name) {
				unhealthy = unhealthy || e.Reason == "Unhealthy" && strings.Contains(e.InvolvedObject.FieldPath, "{app}")
			}
			if !unhealthy {
				return fmt.Errorf("no event")
			}
			return nil
		})
		now := s.pod(t, p.Namespace, p.Name)
		for _, c := range now.Status.ContainerStatuses {
			if c.Ready {
				t.Errorf("%s is ready although nobody listens", p.Name)
			}
		}
	}
	// Only the kubelet's own probes pass the proxy by: see doors for the same port
	// dialled from the node's network.
	s.note("httpGet, tcpSocket, grpc, exec")
}
