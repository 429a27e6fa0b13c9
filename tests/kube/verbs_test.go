package kube

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
)

// A cachedAttachment is what libcni, and so containerd, remembers of an ADD.
type cachedAttachment struct {
	ContainerID, IfName, NetNS string
	CniArgs                    [][2]string
	Result                     json.RawMessage
}

func (a cachedAttachment) arg(name string) string {
	for _, kv := range a.CniArgs {
		if kv[0] == name {
			return kv[1]
		}
	}
	return ""
}

// A cniNode asks the plugin of a node in the runtime's place: containerd 2.4 calls
// neither CHECK nor GC. CRI-O calls GC.
type cniNode struct {
	*suite
	node string
	// conf is the plugin's configuration, as libcni makes it of the conflist.
	conf map[string]any
}

func (s *suite) newCNINode(t *testing.T, node string) cniNode {
	t.Helper()
	var list struct {
		CNIVersion, Name string
		Plugins          []map[string]any
	}
	if err := json.Unmarshal([]byte(s.mustOnNode(t, node, "cat /etc/cni/net.d/*.conflist")), &list); err != nil {
		t.Fatalf("conflist of %s: %v", node, err)
	}
	for _, p := range list.Plugins {
		if p["type"] == "sluice-cni" {
			conf := maps.Clone(p)
			conf["cniVersion"], conf["name"] = list.CNIVersion, list.Name
			return cniNode{s, node, conf}
		}
	}
	t.Fatalf("conflist of %s has no sluice-cni", node)
	return cniNode{}
}

// attachments are those of pods that run, as containerd remembers them.
func (n cniNode) attachments(t *testing.T) []cachedAttachment {
	t.Helper()
	var all []cachedAttachment
	out := n.mustOnNode(t, n.node, "for f in /var/lib/cni/results/*; do tr -d '\\n' <$f; echo; done")
	for line := range strings.Lines(out) {
		var a cachedAttachment
		if err := json.Unmarshal([]byte(line), &a); err != nil {
			t.Fatalf("cached result: %v: %.200s", err, line)
		}
		all = append(all, a)
	}
	return all
}

// ask calls the plugin; the error has what it printed.
func (n cniNode) ask(t *testing.T, verb string, a cachedAttachment, more map[string]any) error {
	t.Helper()
	conf := maps.Clone(n.conf)
	maps.Copy(conf, more)
	stdin, err := json.Marshal(conf)
	if err != nil {
		t.Fatal(err)
	}
	args := ""
	for _, kv := range a.CniArgs {
		args += ";" + kv[0] + "=" + kv[1]
	}
	out, err := n.onNode(n.node, fmt.Sprintf(
		"CNI_COMMAND=%s CNI_CONTAINERID='%s' CNI_NETNS='%s' CNI_IFNAME='%s' CNI_PATH=/opt/cni/bin CNI_ARGS='%s' /opt/cni/bin/sluice-cni <<'CONF'\n%s\nCONF\n",
		verb, a.ContainerID, a.NetNS, a.IfName, strings.TrimPrefix(args, ";"), stdin))
	if err != nil {
		return fmt.Errorf("%s: %w: %s", verb, err, strings.TrimSpace(out))
	}
	return nil
}

func (n cniNode) check(t *testing.T, a cachedAttachment) error {
	t.Helper()
	return n.ask(t, "CHECK", a, map[string]any{"prevResult": a.Result})
}

// cniVerbs: CHECK, GC and STATUS of sandboxes that containerd made.
func (s *suite) cniVerbs(t *testing.T) {
	s.oneOff(t, "shared-pid.yaml", func(p corev1.Pod) {
		checks := 0
		for _, node := range []string{s.a, s.b} {
			n := s.newCNINode(t, node)
			for _, a := range n.attachments(t) {
				if err := n.check(t, a); err != nil {
					t.Errorf("%s of %s: %v", a.arg("K8S_POD_NAME"), node, err)
				}
				checks++
			}
		}
		if checks < 10 {
			t.Errorf("%d sandboxes were checked", checks)
		}
		n := s.newCNINode(t, p.Spec.NodeName)
		all := n.attachments(t)
		i := slices.IndexFunc(all, func(a cachedAttachment) bool { return a.arg("K8S_POD_UID") == string(p.UID) })
		if i < 0 {
			t.Fatalf("containerd remembers no sandbox of %s", p.Name)
		}
		mine := all[i]
		whole := func(what string) {
			s.eventually(t, time.Minute, what, func() error { return n.check(t, mine) })
			s.worksAsAny(t, p)
		}

		// What somebody breaks is said, and then mended.
		s.inPod(t, &p, map[string]string{"ebpf": "tc filter del dev eth0 ingress", "iptables": "iptables -t nat -F SLUICE_OUTPUT"}[s.backend])
		if err := n.check(t, mine); err == nil || !strings.Contains(err.Error(), p.Name) {
			t.Errorf("redirection of %s is broken, and CHECK says: %v", p.Name, err)
		}
		whole("CHECK succeeds again")

		// The verbs of version 1.1 are for nodes whose network has that.
		if n.conf["cniVersion"] != "1.1.0" {
			s.note("%d sandboxes checked; the network of %s has version %s: no GC, no STATUS", checks, n.node, n.conf["cniVersion"])
			return
		}
		if err := n.ask(t, "STATUS", cachedAttachment{}, nil); err != nil {
			t.Error(err)
		}
		valid := func(but string) []map[string]string {
			var out []map[string]string
			for _, a := range all {
				if a.ContainerID != but {
					out = append(out, map[string]string{"containerID": a.ContainerID, "ifname": a.IfName})
				}
			}
			return out
		}
		const key = "cni.dev/valid-attachments"
		if err := n.ask(t, "GC", cachedAttachment{}, map[string]any{key: valid("")}); err != nil {
			t.Error(err)
		}
		if err := n.check(t, mine); err != nil {
			t.Errorf("after a GC for which all is valid: %v", err)
		}
		if err := n.ask(t, "GC", cachedAttachment{}, map[string]any{key: valid(mine.ContainerID)}); err != nil {
			t.Error(err)
		}
		if err := n.check(t, mine); err == nil {
			t.Error("a GC for which the sandbox is not valid changes nothing")
		}
		for _, a := range all {
			if a.ContainerID == mine.ContainerID {
				continue
			}
			if err := n.check(t, a); err != nil {
				t.Error(errors.Join(errors.New("a GC harmed another sandbox"), err))
			}
		}
		// It runs all the same: a pod that is there and is not known is adopted.
		whole("the pod is found again")
		s.note("%d sandboxes checked, one broken and mended, one collected and found again", checks)
	})
}
