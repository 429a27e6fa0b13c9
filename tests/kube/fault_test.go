package kube

import (
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
)

// agentKilled: kill -9 on both nodes whenever there is an agent.
func (s *suite) agentKilled(t *testing.T) {
	kills := 0
	s.underLoad(t, all, func() {
		s.during(t, 30*time.Second, 3*time.Second, func() {
			for _, node := range []string{s.a, s.b} {
				if pids := s.processes(t, node, "sluice-agent", nil); len(pids) > 0 {
					s.kill(t, node, pids)
					kills++
				}
			}
		})
		s.note("%d kills", kills)
		s.freshAgents(t)
	})
}

// freshAgents replaces agents whose kubelet waits before it starts them again.
func (s *suite) freshAgents(t *testing.T) {
	t.Helper()
	s.kubectl(t, "", "-n", system, "delete", "pods", "-l", agentSelector, "--wait", "--timeout=60s")
	s.agentsReady(t)
}

// agentUpgraded: another image on all nodes, one after the other.
func (s *suite) agentUpgraded(t *testing.T) {
	image := s.agent2
	if image == "" {
		image = s.agent
		s.note("same image, other annotation")
	}
	s.underLoad(t, all, func() {
		began := time.Now()
		args := append([]string{"upgrade", "sluice", chart, "--wait", "--timeout", "150s"}, s.helmArgs(image, "--set", "podAnnotations.upgraded="+s.backend)...)
		if _, err := command(s.ctx, "", s.helm, args...); err != nil {
			t.Fatal(err)
		}
		s.kubectl(t, "", "-n", system, "rollout", "status", "daemonset/"+daemonSet, "--timeout=120s")
		s.note("rolled out in %.0f s", time.Since(began).Seconds())
		s.agentsReady(t)
	})
	for _, p := range s.pods(t, system, agentSelector) {
		if p.Spec.Containers[0].Image != image {
			t.Errorf("%s runs %s, want %s", p.Name, p.Spec.Containers[0].Image, image)
		}
	}
}

const awayNamespace = "sluice-e2e-life"

// agentAway: no agent on any node for a minute, and pods are made meanwhile.
func (s *suite) agentAway(t *testing.T) {
	selector := func(value string) {
		s.kubectl(t, "", "-n", system, "patch", "daemonset", daemonSet, "--type=merge", "-p",
			`{"spec":{"template":{"spec":{"nodeSelector":{"sluice.dev/e2e-away":`+value+`}}}}}`)
	}
	s.underLoad(t, all, func() {
		selector(`"true"`)
		defer selector("null")
		s.eventually(t, time.Minute, "agents are gone", func() error {
			if n := len(s.pods(t, system, agentSelector)); n > 0 {
				return fmt.Errorf("%d are there", n)
			}
			return nil
		})
		gone := time.Now()
		s.apply(t, s.manifest(t, "waiting.yaml", nil))
		nodes := map[string]time.Duration{s.a: 0, s.b: 0}
		worst := 0
		last := time.Now()
		s.during(t, time.Minute, time.Second, func() {
			for _, p := range s.pods(t, awayNamespace, "app=waiting") {
				for _, c := range slices.Concat(p.Status.InitContainerStatuses, p.Status.ContainerStatuses) {
					if c.State.Running != nil || c.State.Terminated != nil {
						t.Errorf("container %s of %s runs without an agent", c.Name, p.Name)
					}
				}
			}
			since := time.Since(last)
			last = time.Now()
			for node := range nodes {
				if !s.isNodeReady(node) {
					nodes[node] += since
				}
			}
			unready := 0
			for _, ns := range []string{loadNamespace, "bookshop"} {
				for _, p := range s.pods(t, ns, "") {
					if !podReady(&p) {
						unready++
					}
				}
			}
			worst = max(worst, unready)
		})
		for _, node := range slices.Sorted(maps.Keys(nodes)) {
			s.note("%s not Ready for %.0f of %.0f s", node, nodes[node].Seconds(), time.Since(gone).Seconds())
		}
		s.note("at worst %d running pods were not Ready", worst)
		selector("null")
		s.agentsReady(t)
		back := time.Now()
		s.allReady(t, 2*time.Minute, awayNamespace, "app=waiting", 6)
		s.note("6 waiting pods started within %.0f s", time.Since(back).Seconds())
	})
	for _, p := range s.pods(t, awayNamespace, "app=waiting") {
		s.redirected(t, p)
		r := s.call(t, outside, "plain-a", 3, "http://"+p.Status.PodIP+":9080/", "new-connections=true")
		behindProxies(t, *r.Last)
	}
	s.deleteAll(t, s.manifest(t, "waiting.yaml", nil))
}

// of says whether a load is about neither end on that pod or node letter.
func without(letter string) func(load string) bool {
	return func(load string) bool {
		pod, name, _ := strings.Cut(load, "/")
		name, _, _ = strings.Cut(name, "@")
		return !strings.HasSuffix(pod, "-"+letter) && !strings.HasSuffix(name, "-"+letter)
	}
}

// notTo says whether a load does not lead to a server.
func notTo(letter string) func(load string) bool {
	return func(load string) bool {
		name, _, _ := strings.Cut(load, "@")
		return !strings.HasSuffix(name, "-"+letter)
	}
}

// envoyKilled: the sidecar of one server dies three times. Nobody else notices,
// nobody gets past it, and it serves again.
func (s *suite) envoyKilled(t *testing.T) {
	p := s.pod(t, loadNamespace, "echo-b")
	restarts := sidecarRestarts(&p)
	s.underLoad(t, notTo("b"), func() {
		for i := range int32(3) {
			s.eventually(t, time.Minute, "Envoy of echo-b runs", func() error {
				if len(s.processes(t, p.Spec.NodeName, "envoy", &p)) == 0 {
					return fmt.Errorf("no process")
				}
				return nil
			})
			s.kill(t, p.Spec.NodeName, s.processes(t, p.Spec.NodeName, "envoy", &p))
			s.eventually(t, 2*time.Minute, "the kubelet starts it again", func() error {
				now := s.pod(t, loadNamespace, "echo-b")
				if n := sidecarRestarts(&now); n != restarts+i+1 {
					return fmt.Errorf("%d restarts", n)
				}
				return nil
			})
		}
		s.allReady(t, 2*time.Minute, loadNamespace, "app=echo-b", 1)
		s.recovered(t)
	})
	now := s.pod(t, loadNamespace, "echo-b")
	for _, c := range now.Status.ContainerStatuses {
		if c.RestartCount > 0 {
			t.Errorf("container %s was restarted too", c.Name)
		}
	}
}

func sidecarRestarts(p *corev1.Pod) int32 {
	for _, c := range p.Status.InitContainerStatuses {
		if c.Name == "sluice-proxy" {
			return c.RestartCount
		}
	}
	return -1
}

// recovered waits until every load works, and has for a while.
func (s *suite) recovered(t *testing.T) {
	t.Helper()
	s.eventually(t, 2*time.Minute, "every load works again", func() error {
		for name, c := range s.reports(t) {
			if c.Done == 0 || time.Since(c.LastError) < 3*time.Second {
				return fmt.Errorf("%s: %d done, errors %v", name, c.Done, c.Errors)
			}
		}
		return nil
	})
}

// apiAway: no API server for a minute. Half way the agent of b is killed, and
// starts without one.
func (s *suite) apiAway(t *testing.T) {
	readyz := fmt.Sprintf("curl -s -m 5 -w '%%{http_code}\\n' http://127.0.0.1:%d/readyz", metricsPort)
	s.underLoad(t, all, func() {
		// A controller manager ends when it cannot renew its lease. That of the lab
		// has none; living on it would find all nodes silent for a minute, and take
		// every pod out of its Services before the kubelets can say anything.
		const controllers = "kube-controller-manager"
		s.labDo(t, "service", s.a, "stop", controllers)
		s.labDo(t, "service", s.a, "stop", "kube-apiserver")
		stopped := true
		start := func() {
			if stopped {
				stopped = false
				s.labDo(t, "service", s.a, "start", "kube-apiserver")
				s.labDo(t, "service", s.a, "start", controllers)
			}
		}
		defer start()
		s.during(t, 25*time.Second, time.Second, func() {
			if out := s.mustOnNode(t, s.a, readyz); !strings.HasSuffix(strings.TrimSpace(out), "200") {
				t.Errorf("agent of %s is not ready without the API server: %s", s.a, out)
			}
		})
		out := s.mustOnNode(t, s.a, fmt.Sprintf("curl -s -m 5 http://127.0.0.1:%d/metrics", metricsPort))
		if m, err := parseSamples(out); err != nil || m.sum("sluice_source_age_seconds", "kind=Pod") < 15 {
			t.Errorf("after 25 s without the API server sluice_source_age_seconds of pods is %g, %v", m.sum("sluice_source_age_seconds", "kind=Pod"), err)
		}
		s.kill(t, s.b, s.processes(t, s.b, "sluice-agent", nil))
		said := ""
		s.during(t, 35*time.Second, time.Second, func() {
			if out, err := s.onNode(s.b, readyz); err == nil && strings.HasSuffix(strings.TrimSpace(out), "503") {
				said = out
			}
		})
		if !strings.Contains(said, "[-]source not read completely yet: ") {
			t.Errorf("agent of %s, started without an API server, never said why it is not ready: %q", s.b, said)
		}
		start()
		s.eventually(t, time.Minute, "the API server is back", func() error {
			_, err := s.request(http.MethodGet, "/readyz", "", nil)
			return err
		})
		// The way to it is a Service of kube-proxy's, which would look for it again
		// within a minute, and started anew does so at once. Where it is no daemon,
		// this takes that minute.
		for _, node := range []string{s.a, s.b} {
			if _, err := command(s.ctx, "", s.lab, "service", node, "restart", "kube-proxy"); err != nil {
				t.Log(err)
			}
		}
		back := time.Now()
		s.eventually(t, 3*time.Minute, "nodes are Ready", func() error {
			if !s.isNodeReady(s.a) || !s.isNodeReady(s.b) {
				return fmt.Errorf("not yet")
			}
			return nil
		})
		s.agentsReady(t)
		s.note("agents ready %.0f s after the API server", time.Since(back).Seconds())
	})
}

// daemonsRestarted: containerd and the kubelet of both nodes.
func (s *suite) daemonsRestarted(t *testing.T) {
	s.underLoad(t, all, func() {
		for _, node := range []string{s.a, s.b} {
			for _, daemon := range []string{"containerd", "kubelet"} {
				s.labDo(t, "service", node, "restart", daemon)
			}
		}
		for _, node := range []string{s.a, s.b} {
			s.eventually(t, 2*time.Minute, node+" is Ready", func() error {
				if !s.isNodeReady(node) {
					return fmt.Errorf("not yet")
				}
				return nil
			})
		}
		s.agentsReady(t)
		s.apply(t, s.manifest(t, "waiting.yaml", nil))
		s.allReady(t, 2*time.Minute, awayNamespace, "app=waiting", 6)
	})
	s.deleteAll(t, s.manifest(t, "waiting.yaml", nil))
}

// fallback: on a node without a file system for eBPF the backend auto is iptables,
// and pods there say why; the other node changes to eBPF, and both change back. On a
// node of eBPF there is nothing to take away: its pods hang on that file system.
func (s *suite) fallback(t *testing.T) {
	if s.backend != "iptables" {
		s.note("part of the run with iptables")
		t.Skip("part of the run with iptables")
	}
	upgrade := func(backend string) {
		args := append([]string{"upgrade", "sluice", chart, "--wait", "--timeout", "150s"}, s.helmArgs(s.agent, "--set", "backend="+backend)...)
		if _, err := command(s.ctx, "", s.helm, args...); err != nil {
			t.Fatal(err)
		}
		s.agentsReady(t)
	}
	isNow := func(node, want string) {
		if got := s.metrics(t, node).labels("sluice_backend_info", "backend"); !slices.Equal(got, []string{want}) {
			t.Errorf("agent of %s: backend %v, want %s", node, got, want)
		}
	}
	s.underLoad(t, all, func() {
		s.mustOnNode(t, s.b, "umount /sys/fs/bpf")
		t.Cleanup(func() { s.mustOnNode(t, s.b, "mountpoint -q /sys/fs/bpf || mount -t bpf bpf /sys/fs/bpf") })
		upgrade("auto")
		isNow(s.a, "ebpf")
		isNow(s.b, "iptables")
		s.oneOff(t, "shared-pid.yaml", func(p corev1.Pod) {
			s.worksAsAny(t, p)
			s.eventually(t, 30*time.Second, "an event says why it is iptables", func() error {
				for _, e := range s.events(t, p.Namespace, p.Name) {
					if e.Reason == "BackendFallback" && strings.Contains(e.Message, "redirected by iptables: ") {
						s.note("event: %s", e.Message)
						return nil
					}
				}
				return fmt.Errorf("no event")
			})
		})
		s.mustOnNode(t, s.b, "mount -t bpf bpf /sys/fs/bpf")
		upgrade(s.backend)
		isNow(s.a, s.backend)
		isNow(s.b, s.backend)
	})
}

// rolling: all pods of a Deployment are replaced twice, under load of its own.
func (s *suite) rolling(t *testing.T) {
	m := s.manifest(t, "rolling.yaml", nil)
	s.apply(t, m)
	s.allReady(t, 2*time.Minute, loadNamespace, "app=rolling", 3)
	s.apply(t, s.manifest(t, "rolling-load.yaml", nil))
	s.allReady(t, 2*time.Minute, loadNamespace, "app=rolling-load", 2)
	s.extra = []string{"rolling-a", "rolling-b"}
	t.Cleanup(func() { // after the dump
		s.extra = nil
		s.deleteAll(t, s.manifest(t, "rolling-load.yaml", nil))
		s.deleteAll(t, m)
	})
	s.recovered(t)
	s.underLoad(t, all, func() {
		for i := range 2 {
			began := time.Now()
			s.kubectl(t, "", "-n", loadNamespace, "rollout", "restart", "deployment/rolling")
			s.kubectl(t, "", "-n", loadNamespace, "rollout", "status", "deployment/rolling", "--timeout=170s")
			s.note("rollout %d: %.0f s", i+1, time.Since(began).Seconds())
		}
		// The old ones end while nobody knows of them any more.
		s.allReady(t, 2*time.Minute, loadNamespace, "app=rolling", 3)
	})
}

// bursts: a hundred pods come and go three times, and leave nothing.
func (s *suite) bursts(t *testing.T) {
	s.apply(t, s.manifest(t, "burst.yaml", nil))
	measure := func() map[string]float64 {
		out := map[string]float64{}
		for _, node := range []string{s.a, s.b} {
			m := s.metrics(t, node)
			for _, name := range m.labels("sluice_map_entries", "map") {
				switch name {
				case "handover", "targets", "listeners":
					// As many as there are connections and proxies.
				default:
					out[node+" map "+name] = m.sum("sluice_map_entries", "map="+name)
				}
			}
			out[node+" goroutines"] = m.sum("go_goroutines")
			out[node+" fds"] = m.sum("process_open_fds")
			out[node+" redirected"] = m.sum("sluice_pods", "state=redirected")
			if s.lab != "" {
				for name, script := range map[string]string{
					"netns":     "ls /run/netns | wc -l",
					"pins":      "find /sys/fs/bpf -mindepth 1 | wc -l",
					"records":   "find /run/sluice -type f | wc -l",
					"veths":     "ls /sys/class/net | grep -c veth",
					"xds inode": "cat /proc/net/unix | grep -c sluice",
					"rules":     "(iptables-save; ip6tables-save) | grep -c SLUICE",
				} {
					var n float64
					if _, err := fmt.Sscan(s.mustOnNode(t, node, script+"; true"), &n); err != nil {
						t.Fatal(err)
					}
					out[node+" "+name] = n
				}
			}
		}
		return out
	}
	before := measure()
	s.underLoad(t, all, func() {
		for i := range 3 {
			began := time.Now()
			s.kubectl(t, "", "-n", "sluice-e2e-burst", "scale", "deployment/burst", "--replicas=100")
			s.eventually(t, 4*time.Minute, "100 pods are there", func() error {
				// The Deployment's status may still be that of the burst before.
				pods, err := s.listPods("sluice-e2e-burst", "")
				ready := 0
				for _, p := range pods {
					if podReady(&p) && p.DeletionTimestamp == nil {
						ready++
					}
				}
				if err == nil && ready != 100 {
					err = fmt.Errorf("%d are", ready)
				}
				return err
			})
			up := time.Since(began)
			if i == 0 {
				most := 0.0
				for _, node := range []string{s.a, s.b} {
					most += s.metrics(t, node).sum("sluice_pods", "state=redirected")
				}
				if most < 100 {
					t.Errorf("%g pods are redirected, want 100 and more", most)
				}
			}
			began = time.Now()
			s.kubectl(t, "", "-n", "sluice-e2e-burst", "scale", "deployment/burst", "--replicas=0")
			s.eventually(t, 4*time.Minute, "100 pods are gone", func() error {
				pods, err := s.listPods("sluice-e2e-burst", "")
				if err == nil && len(pods) > 0 {
					err = fmt.Errorf("%d are left", len(pods))
				}
				return err
			})
			s.note("%.0f s up, %.0f s down", up.Seconds(), time.Since(began).Seconds())
		}
	})
	for _, node := range []string{s.a, s.b} {
		m := s.metrics(t, node)
		s.note("ADD in the agent of %s: p50 %s, p99 %s", node,
			m.quantile("sluice_cni_request_duration_seconds", 0.5, "verb=add"), m.quantile("sluice_cni_request_duration_seconds", 0.99, "verb=add"))
	}
	var leaked []string
	ok := s.eventuallyOr(time.Minute, func() bool {
		leaked = nil
		for name, n := range measure() {
			limit := before[name]
			if strings.HasSuffix(name, "goroutines") || strings.HasSuffix(name, "fds") {
				limit += 8 // what is under way
			}
			if n > limit {
				leaked = append(leaked, fmt.Sprintf("%s: %g before, %g after", name, before[name], n))
			}
		}
		return len(leaked) == 0
	})
	if !ok {
		slices.Sort(leaked)
		t.Errorf("left over:\n%s", strings.Join(leaked, "\n"))
	}
}

// nodeDown: the power of b fails. What is on a alone does not notice; what was
// on b comes back by itself, captured from its first connection on.
func (s *suite) nodeDown(t *testing.T) {
	s.underLoad(t, without("b"), func() {
		began := time.Now()
		s.labDo(t, "off", s.b)
		on := false
		start := func() {
			if !on {
				on = true
				s.labDo(t, "on", s.b)
			}
		}
		defer start()
		s.during(t, 5*time.Second, time.Second, func() {})
		start()
		s.eventually(t, 3*time.Minute, s.b+" is back", func() error {
			for _, p := range s.pods(t, "", "") {
				if p.Spec.NodeName != s.b || p.DeletionTimestamp != nil {
					continue
				}
				// The API server knows the state from before until the kubelet is there.
				for _, c := range p.Status.ContainerStatuses {
					if c.State.Running == nil || c.State.Running.StartedAt.Time.Before(began) {
						return fmt.Errorf("%s of %s/%s has not started again", c.Name, p.Namespace, p.Name)
					}
				}
				if !podReady(&p) {
					return fmt.Errorf("%s/%s is not ready", p.Namespace, p.Name)
				}
			}
			if !s.isNodeReady(s.b) {
				return fmt.Errorf("node is not Ready")
			}
			return nil
		})
		s.note("all pods of %s ready %.0f s after the cut", s.b, time.Since(began).Seconds())
		s.agentsReady(t)
		s.recovered(t)
	})
}

// reinstalled: Sluice goes and comes under load, and the proxies' pods are adopted.
// With eBPF connections through the proxies live on, but for one that is just being
// made while redirection goes. With iptables they end: the kernel translates no
// address in a pod whose last rule has gone.
func (s *suite) reinstalled(t *testing.T) {
	s.bypass = true
	unharmed := func(load string) bool { return s.backend == "ebpf" && !strings.Contains(load, "/fresh-") }
	s.underLoad(t, unharmed, func() {
		s.helmUninstall(t)
		if s.lab != "" {
			for _, node := range []string{s.a, s.b} {
				for _, line := range s.snapshot(t, node) {
					if strings.HasPrefix(line, "in a pod:") || strings.HasPrefix(line, "pin /sys/fs/bpf/sluice") || strings.HasPrefix(line, "path ") {
						t.Errorf("%s, after helm uninstall: %s", node, line)
					}
				}
			}
		}
		s.helmInstall(t)
		s.injectionWorks(t)
		s.recovered(t)
	})
	s.bypass = false
	for _, name := range []string{"echo-a", "echo-b", "load-a", "load-b"} {
		p := s.pod(t, loadNamespace, name)
		s.redirected(t, p)
		s.rising(t, []stat{captured(p, "inbound", 3)}, func() {
			r := s.call(t, outside, "plain-a", 3, "http://"+p.Status.PodIP+":9080/", "new-connections=true")
			behindProxies(t, *r.Last)
		})
	}
	s.note("adopted %g", s.metrics(t, s.a).sum("sluice_pods_adopted_total")+s.metrics(t, s.b).sum("sluice_pods_adopted_total"))
}
