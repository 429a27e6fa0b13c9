package chart

import (
	"context"
	"fmt"
	"iter"
	"slices"
	"strings"
	"testing"
)

// background is a test whose context does not end with it, for cleaning up.
type background struct{ testing.TB }

// Context implements testing.TB.
func (background) Context() context.Context { return context.Background() }

// A right is one that the chart gives the agent.
type right struct {
	name string
	take func(pod, container object) // takes it out of the DaemonSet
}

// rights lists the capabilities and mounts of a DaemonSet.
func rights(ds object) []right {
	pod, _ := at(ds, "spec", "template", "spec").(object)
	container, _ := at(pod, "containers", 0).(object)
	var all []right
	capabilities, _ := at(container, "securityContext", "capabilities", "add").([]any)
	for _, c := range capabilities {
		all = append(all, right{str(c), func(_, container object) {
			set, _ := at(container, "securityContext", "capabilities").(object)
			set["add"] = without(set["add"], func(v any) bool { return v == c })
		}})
	}
	volumes, _ := pod["volumes"].([]any)
	for _, v := range volumes {
		name := at(v, "name")
		all = append(all, right{str(at(v, "hostPath", "path")), func(pod, container object) {
			named := func(v any) bool { return at(v, "name") == name }
			pod["volumes"] = without(pod["volumes"], named)
			container["volumeMounts"] = without(container["volumeMounts"], named)
		}})
	}
	return all
}

func without(list any, which func(any) bool) []any {
	l, _ := list.([]any)
	return slices.DeleteFunc(slices.Clone(l), which)
}

// legacy is the backend iptables on a node without nftables.
const legacy = "iptables legacy"

// withoutNFT makes the program of iptables that speaks to nftables one that cannot
// be run.
func withoutNFT(ds object) object {
	pod, _ := at(ds, "spec", "template", "spec").(object)
	container, _ := at(pod, "containers", 0).(object)
	volumes, _ := pod["volumes"].([]any)
	mounts, _ := container["volumeMounts"].([]any)
	pod["volumes"] = append(volumes, object{"name": "nft", "downwardAPI": object{
		"items": []any{object{"path": "nft", "mode": 0o444, "fieldRef": object{"fieldPath": "metadata.name"}}},
	}})
	container["volumeMounts"] = append(mounts, object{"name": "nft", "mountPath": "/usr/sbin/xtables-nft-multi", "subPath": "nft", "readOnly": true})
	return ds
}

// TestRights takes one right after the other from the agent. Each must be missed
// by something, with one backend or the other, or the chart gives too much.
func TestRights(t *testing.T) {
	c := onCluster(t)
	missed := map[string][]string{}
	var order []string
	c.install()
	rounds := []string{"ebpf", "iptables", legacy}
	ran := 0
	for _, backend := range rounds {
		t.Run(backend, func(t *testing.T) {
			for name, err := range (cluster{TB: t, kubectl: c.kubectl, helm: c.helm, args: c.args}).takeEach(backend) {
				if !slices.Contains(order, name) {
					order = append(order, name)
				}
				verdict := "not missed"
				if err != nil {
					missed[name] = append(missed[name], backend)
					verdict = err.Error()
				}
				t.Logf("without %-14s %.400s", name, strings.ReplaceAll(verdict, "\n", " "))
			}
			ran++
		})
	}
	if ran < len(rounds) {
		return // -run named some of them
	}
	for _, name := range order {
		t.Logf("%-14s is missed by %s", name, strings.Join(missed[name], ", "))
		if len(missed[name]) == 0 {
			t.Errorf("nothing misses %s: take it out of the chart", name)
		}
	}
}

// takeEach yields each right with what does not work without it, nil if everything
// works, and makes sure before and after that everything works with all of them.
func (c cluster) takeEach(backend string) iter.Seq2[string, error] {
	daemonSet := func() object {
		ds := c.daemonSet("--set", "backend="+strings.Fields(backend)[0])
		if backend == legacy {
			ds = withoutNFT(ds)
		}
		return ds
	}
	return func(yield func(string, error) bool) {
		if err := c.works(daemonSet(), backend); err != nil {
			c.Fatalf("with all rights: %v", err)
		}
		all := rights(daemonSet())
		if len(all) < 8 {
			c.Fatalf("%d rights found in the DaemonSet", len(all))
		}
		for _, r := range all {
			// The older iptables differs from the newer in this alone.
			if backend == legacy && r.name != "NET_RAW" {
				continue
			}
			ds := daemonSet()
			pod, _ := at(ds, "spec", "template", "spec").(object)
			container, _ := at(pod, "containers", 0).(object)
			r.take(pod, container)
			if !yield(r.name, c.works(ds, backend)) {
				return
			}
		}
		if err := c.works(daemonSet(), backend); err != nil {
			c.Fatalf("with all rights again: %v", err)
		}
	}
}

// works makes a DaemonSet anew on a node that has nothing of Sluice but a pod that
// is older, and returns what does not work.
func (c cluster) works(ds object, backend string) (err error) {
	c.Helper()
	c.must("-n", apps, "delete", "pods", "--all", "--wait=false")
	c.must("-n", namespace, "delete", "daemonset", release+"-agent", "--ignore-not-found", "--cascade=foreground", "--timeout=60s")
	c.sweep()
	c.must("-n", apps, "delete", "pods", "--all", "--timeout=60s")
	if err := c.apply(appPod("older")); err != nil {
		c.Fatal(err)
	}
	// Without an agent its sidecar waits for its configuration.
	if err := eventually(settle, func() error {
		out, err := c.k("-n", apps, "get", "pod", "older", "-o", "jsonpath={.status.podIP} {.status.initContainerStatuses[0].state.running.startedAt}")
		if err == nil && len(strings.Fields(out)) < 2 {
			err = fmt.Errorf("pod older does not run: %q", out)
		}
		return err
	}); err != nil {
		c.Fatal(err)
	}
	if err := c.apply(toYAML(c, ds)); err != nil {
		c.Fatal(err)
	}
	if err := c.ready(); err != nil {
		return err
	}
	if err := c.apply(appPod("newer")); err != nil {
		c.Fatal(err)
	}
	for _, pod := range []string{"newer", "older"} {
		if err := c.podReady(pod); err != nil {
			return err
		}
		if err := c.redirected(pod); err != nil {
			return err
		}
	}
	if err := eventually(settle, func() error { _, err := c.captured("newer"); return err }); err != nil {
		return err
	}
	// What the agent puts into the kernel must outlive its container, or what the
	// pod does meanwhile gets past the proxy.
	agent, err := c.agent()
	if err != nil {
		return err
	}
	c.must("-n", namespace, "delete", "pod", agent, "--timeout=60s")
	if err := c.ready(); err != nil {
		return fmt.Errorf("after a restart: %w", err)
	}
	if err := eventually(settle, func() error {
		made, err := c.dialled("newer")
		if err != nil {
			return err
		}
		captured, err := c.captured("newer")
		if err == nil && captured < made-1 {
			err = fmt.Errorf("after a restart of the agent %v of %v connections of the pod were captured", captured, made)
		}
		return err
	}); err != nil {
		return err
	}
	c.must("-n", apps, "delete", "pod", "newer", "--timeout=60s")
	return nil
}

// sweep removes what an agent without the rights for it has left behind, with one
// that has them: a DaemonSet that comes and goes.
func (c cluster) sweep() {
	c.Helper()
	if err := c.apply(toYAML(c, c.daemonSet())); err != nil {
		c.Fatal(err)
	}
	if err := c.ready(); err != nil {
		c.Fatalf("sweep: %v", err)
	}
	c.must("-n", namespace, "delete", "daemonset", release+"-agent", "--cascade=foreground", "--timeout=60s")
}
