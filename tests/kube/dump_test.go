package kube

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// withoutSuccesses drops the lines of access logs that nobody looks for.
func withoutSuccesses(log string) string {
	var b strings.Builder
	for line := range strings.Lines(log) {
		if !strings.Contains(line, `"status":200,`) {
			b.WriteString(line)
		}
	}
	return b.String()
}

// dump writes what a person would look at next into a directory, and names it.
func (s *suite) dump(t *testing.T) {
	t.Helper()
	dir := filepath.Join(s.out, s.backend+"-"+s.current.scenario)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Errorf("make directory for the dump: %v", err)
		return
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(s.ctx), 2*time.Minute)
	defer cancel()
	write := func(name, text string, err error) {
		if err != nil {
			text += fmt.Sprintf("\n%v\n", err)
		}
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			t.Errorf("write dump: %v", err)
		}
	}
	kubectl := func(name string, args ...string) {
		out, err := command(ctx, "", "kubectl", args...)
		write(name, out, err)
	}
	kubectl("pods.txt", "get", "pods", "-A", "-o", "wide")
	kubectl("nodes.txt", "describe", "nodes")
	kubectl("events.txt", "get", "events", "-A", "--sort-by=.lastTimestamp")
	kubectl("slices.txt", "get", "endpointslices", "-A", "-o", "yaml")
	kubectl("describe-agents.txt", "-n", system, "describe", "pods")
	pods, err := s.listPods("", "")
	if err != nil {
		write("error.txt", "", err)
		return
	}
	sidecars := 0
	for _, p := range pods {
		name := p.Namespace + "-" + p.Name
		if p.Namespace == system {
			kubectl("log-"+name+".txt", "-n", system, "logs", p.Name, "--tail=5000")
			kubectl("log-"+name+"-previous.txt", "-n", system, "logs", p.Name, "--previous", "--tail=2000")
			for _, path := range []string{"/readyz", "/metrics", "/metrics/proxies"} {
				b, err := s.proxy(system, p.Name, metricsPort, path)
				write(strings.ReplaceAll(path, "/", "_")+"-"+p.Spec.NodeName+".txt", string(b), err)
			}
			continue
		}
		if !podReady(&p) && p.Namespace != "kube-system" {
			kubectl("describe-"+name+".txt", "-n", p.Namespace, "describe", "pod", p.Name)
		}
		// The sidecars of the load are in the middle of everything.
		if s.lab == "" || (p.Namespace != loadNamespace && podReady(&p)) || len(p.Spec.InitContainers) == 0 || sidecars > 12 {
			continue
		}
		sidecars++
		log, err := command(ctx, "", "kubectl", "-n", p.Namespace, "logs", p.Name, "--all-containers", "--prefix", "--tail=-1")
		write("log-"+name+".txt", withoutSuccesses(log), err)
		out, err := s.onNode(p.Spec.NodeName, fmt.Sprintf(`
for p in /proc/[0-9]*; do
	case $(cat $p/cgroup 2>/dev/null) in *%s*) break ;; esac
done
for path in clusters config_dump stats; do
	echo "== /$path"
	nsenter -t ${p#/proc/} -n setpriv --reuid 1337 --clear-groups curl -s -m 5 http://127.0.0.1:15000/$path
done
`, p.UID))
		write("envoy-"+name+".txt", out, err)
	}
	t.Logf("what there was is in %s", dir)
}
