package kube

import (
	"fmt"
	"strconv"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
)

// onNode runs a shell script as root on a node.
func (s *suite) onNode(node, script string) (string, error) {
	return command(s.ctx, script, s.lab, "exec", node, "/bin/sh", "-s")
}

func (s *suite) mustOnNode(t *testing.T, node, script string) string {
	t.Helper()
	out, err := s.onNode(node, script)
	if err != nil {
		t.Fatalf("on %s: %v", node, err)
	}
	return out
}

// labDo does what the lab can do to a node other than exec.
func (s *suite) labDo(t *testing.T, verb, node string, args ...string) {
	t.Helper()
	if _, err := command(s.ctx, "", s.lab, append([]string{verb, node}, args...)...); err != nil {
		t.Fatal(err)
	}
}

// snapshotScript prints, line by line, what of a node Sluice could have changed.
// Names of pods' interfaces, namespaces and cgroups are not among it: pods come
// and go. What is inside the pods' network namespaces is.
const snapshotScript = `
find /etc/cni/net.d /opt/cni/bin -printf 'file %p %M %u %g\n'
find /etc/cni/net.d /opt/cni/bin -type f -exec sha256sum {} + | sed 's/^/sum /'
find /sys/fs/bpf -mindepth 1 -printf 'pin %p\n'
# The kubelet made /run/sluice itself, as a volume, and keeps it.
ls -d /run/sluice?* /run/sluice/* /var/lib/sluice* /etc/sluice* 2>/dev/null | sed 's/^/path /'
awk '$5 !~ /^\/tmp\// && (/sluice/ || / - bpf /) {print "mount", $5, $(NF-2), $(NF-1)}' /proc/self/mountinfo
# The network's bridge comes with a node's first pod.
ip -o link | awk -F': ' '{print $2}' | sed 's/@.*//' | grep -v -e ^veth -e '^cni0$' | sed 's/^/link /'
ip rule | sed 's/^/rule /'
ip route show table all | grep -v -e veth -e 'dev cni0' | sed 's/^/route /'
for save in iptables-save ip6tables-save; do $save 2>/dev/null | grep -i sluice | sed "s/^/$save /"; done
nft list ruleset 2>/dev/null | grep -i sluice | sed 's/^/nft /'
tc filter show 2>/dev/null | grep -i sl_ | sed 's/^/tc /'
for d in $(ls /sys/class/net); do tc filter show dev $d ingress 2>/dev/null | grep -i sl_ | sed "s/^/tc $d /"; done
for p in /proc/[0-9]*; do readlink $p/exe; done 2>/dev/null | grep -i sluice | sed 's/^/process /'
find /sys/fs/cgroup -type d -iname '*sluice*' | sed 's/^/cgroup /'
for n in /run/netns/*; do
	[ -e "$n" ] || continue
	nsenter --net=$n sh -c '
		iptables-save 2>/dev/null; ip6tables-save 2>/dev/null; nft list ruleset 2>/dev/null
		ip -6 -o addr show dev lo | grep " ::6/"
		grep @sluice /proc/self/net/unix
		tc filter show dev eth0 ingress 2>/dev/null' | grep -i -e sluice -e ' ::6/' -e sl_ | sed "s|^|in a pod: |"
done
true
`

// snapshots of all nodes; nil without a lab.
func (s *suite) snapshots(t *testing.T) map[string][]string {
	t.Helper()
	if s.lab == "" {
		return nil
	}
	return map[string][]string{s.a: s.snapshot(t, s.a), s.b: s.snapshot(t, s.b)}
}

func (s *suite) snapshot(t *testing.T, node string) []string {
	t.Helper()
	lines := strings.Split(strings.TrimSpace(s.mustOnNode(t, node, snapshotScript)), "\n")
	if s.snapshotter == "" {
		return lines
	}
	// eBPF programs of cgroups and of the pods' namespaces, which no tool shows.
	out, err := command(s.ctx, "", s.lab, "exec", node, s.snapshotter)
	if err != nil {
		t.Fatalf("on %s: %v", node, err)
	}
	for line := range strings.Lines(out) {
		if line = strings.TrimSpace(line); strings.Contains(line, "sl_") || strings.Contains(line, "0x51ce") {
			lines = append(lines, "program "+line)
		}
	}
	return lines
}

// eventuallyOr calls f until it is true or limit is over.
func (s *suite) eventuallyOr(limit time.Duration, f func() bool) bool {
	for deadline := time.Now().Add(limit); ; {
		if f() {
			return true
		}
		if time.Now().After(deadline) {
			return false
		}
		select {
		case <-time.After(500 * time.Millisecond):
		case <-s.ctx.Done():
			return false
		}
	}
}

// processes are the process IDs on a node whose executable has that name; with a
// pod, only those of the pod.
func (s *suite) processes(t *testing.T, node, executable string, pod *corev1.Pod) []int {
	t.Helper()
	uid := ""
	if pod != nil {
		uid = string(pod.UID)
	}
	out := s.mustOnNode(t, node, fmt.Sprintf(`
for p in /proc/[0-9]*; do
	case $(readlink $p/exe) in */%s) ;; *) continue ;; esac
	case $(cat $p/cgroup) in *'%s'*) echo ${p#/proc/} ;; esac
done 2>/dev/null
true
`, executable, uid))
	var pids []int
	for _, f := range strings.Fields(out) {
		pid, err := strconv.Atoi(f)
		if err != nil {
			t.Fatal(err)
		}
		pids = append(pids, pid)
	}
	return pids
}

// kill ends processes on a node at once.
func (s *suite) kill(t *testing.T, node string, pids []int) {
	t.Helper()
	if len(pids) == 0 {
		t.Fatalf("nothing to kill on %s", node)
	}
	script := "kill -9"
	for _, pid := range pids {
		script += " " + strconv.Itoa(pid)
	}
	s.mustOnNode(t, node, script)
}

// inPod runs a script in the network namespace of a pod, as root of the node.
func (s *suite) inPod(t *testing.T, p *corev1.Pod, script string) string {
	t.Helper()
	return s.mustOnNode(t, p.Spec.NodeName, fmt.Sprintf(`
for p in /proc/[0-9]*; do
	case $(cat $p/cgroup 2>/dev/null) in *%s*) exec nsenter -t ${p#/proc/} -n sh -c '%s' ;; esac
done
echo "no process of the pod" >&2
exit 1
`, p.UID, strings.ReplaceAll(script, "'", `'\''`)))
}
