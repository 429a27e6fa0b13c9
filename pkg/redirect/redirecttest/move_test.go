package redirecttest

import (
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/sluicemesh/sluice/pkg/redirect"
	"github.com/sluicemesh/sluice/pkg/redirect/bpf"
	"github.com/sluicemesh/sluice/pkg/redirect/iptables"
	"github.com/sluicemesh/sluice/tests/need"
	"github.com/sluicemesh/sluice/tests/netnstest"
)

func TestMain(m *testing.M) {
	if config, ok := os.LookupEnv(churnEnv); ok {
		fmt.Fprintln(os.Stderr, "churn:", churn(config))
		os.Exit(1)
	}
	if config, ok := os.LookupEnv(victimEnv); ok {
		if err := runErrand(config); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(Main(m))
}

// both returns options for a Chosen over both real backends, which keep what
// they install until the test ends.
func both(t *testing.T, node *netnstest.Node) redirect.Options {
	t.Helper()
	need.EBPF(t)
	need.Tool(t, "iptables-restore")
	need.Tool(t, "ip6tables-restore")
	return bothIn(stateDir(t, node.Netns), node.Netns)
}

// stateDir returns where backends may keep what they install until the test ends.
func stateDir(t *testing.T, hostNetns string) string {
	t.Helper()
	dir := t.TempDir()
	if err := os.Mkdir(filepath.Dir(pinDir(dir)), 0o700); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx := context.Background()
		if err := bpf.Uninstall(ctx, bpf.Options{PinDir: pinDir(dir)}); err != nil {
			t.Errorf("uninstall: %v", err)
		}
		if err := iptables.Uninstall(ctx, rulesOptions(dir, hostNetns)); err != nil {
			t.Errorf("uninstall: %v", err)
		}
	})
	return dir
}

func pinDir(dir string) string { return filepath.Join(dir, "bpf", "sluice") }

func rulesOptions(dir, hostNetns string) iptables.Options {
	return iptables.Options{StateDir: filepath.Join(dir, "iptables"), HostNetns: hostNetns}
}

func bothIn(dir, hostNetns string) redirect.Options {
	return redirect.Options{
		NewEBPF: func() (redirect.Redirector, error) {
			return bpf.New(bpf.Options{PinDir: pinDir(dir), HostNetns: hostNetns})
		},
		NewIPTables: func() (redirect.Redirector, error) {
			return iptables.New(rulesOptions(dir, hostNetns))
		},
		Left: func(redirect.Backend) bool { return true },
	}
}

// choose opens the backend that o asks for.
func choose(t *testing.T, o redirect.Options) *redirect.Chosen {
	t.Helper()
	c, err := redirect.Choose(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
	})
	return c
}

// TestNodesBackendChanges restarts with another backend for the node, and back.
// Pods that ask for none move, with their connections.
func TestNodesBackendChanges(t *testing.T) {
	node := netnstest.NewNode(t)
	startHostPod(t, node)
	o := both(t, node)
	restarts := testCase{name: "restarts", byHand: true, run: func(e *env) {
		clean := e.pod.State(e)
		e.startProxy(tell)
		var open []net.Conn
		for _, o.Node = range []redirect.Backend{redirect.BackendEBPF, redirect.BackendIPTables, redirect.BackendEBPF} {
			e.r = choose(t, o)
			before, installed := e.installed(e.r)
			if installed && before.Problem != nil {
				e.Errorf("%s finds a problem: %v", o.Node, before.Problem)
			}
			e.add(nil)
			e.wantWhole(e.r)
			e.wantAlive(open...)
			if byRules := slices.ContainsFunc(e.pod.State(e), func(s string) bool { return strings.Contains(s, "SLUICE_OUTPUT") }); byRules != (o.Node == redirect.BackendIPTables) {
				e.Errorf("%s: the pod has rules: %v", o.Node, byRules)
			}
			out, a := e.connect(e.pod.Namespace, e.peerPort(appPort))
			e.wantOutbound(out, a, e.peerPort(appPort))
			in, a := e.connect(e.peer.Namespace, e.podPort(appPort))
			e.wantInbound(a, e.podPort(appPort), e.peerAddr())
			open = append(open, out, in)
		}
		for _, c := range open {
			_ = c.Close()
		}
		if err := e.r.Remove(e.Context(), e.w.ID); err != nil {
			e.Fatalf("remove: %v", err)
		}
		e.proxy.stop()
		e.wantClean(clean)
	}}
	for name, v4 := range map[string]bool{"v4": true, "v6": false} {
		t.Run(name, func(t *testing.T) {
			runCase(t, restarts, &env{T: t, r: choose(t, o), v4: v4, node: node})
		})
	}
}

// TestMove moves a pod between the real backends and back. Connections of every
// stage live on, new ones are always captured.
func TestMove(t *testing.T) {
	node := netnstest.NewNode(t)
	hostPod := startHostPod(t, node)
	c := choose(t, both(t, node))
	if c.Backend() != redirect.BackendEBPF {
		t.Fatalf("needs eBPF: %s", c.Reason())
	}
	moves := testCase{name: "moves", byHand: true, run: func(e *env) {
		clean := e.pod.State(e)
		e.add(nil)
		e.startProxy(tell)
		out, a := e.connect(e.pod.Namespace, e.peerPort(appPort))
		e.wantProxy(a, redirect.OutboundPort, e.peerPort(appPort))
		in, a := e.connect(e.peer.Namespace, e.podPort(appPort))
		e.wantInbound(a, e.podPort(appPort), e.peerAddr())
		open := []net.Conn{out, in}
		for _, b := range []redirect.Backend{redirect.BackendIPTables, redirect.BackendEBPF, redirect.BackendIPTables, redirect.BackendAuto} {
			e.add(func(p *redirect.Policy) { p.Backend = b })
			e.wantWhole(e.r)
			e.wantAlive(open...)
			o, a := e.connect(e.pod.Namespace, e.peerPort(appPort))
			e.wantOutbound(o, a, e.peerPort(appPort))
			i, a := e.connect(e.peer.Namespace, e.podPort(appPort))
			e.wantInbound(a, e.podPort(appPort), e.peerAddr())
			open = append(open, o, i)
			e.wantBare(e.ask(e.node.Namespace, e.podPort(appPort)), "app")
			e.wantFromHostPod()
		}
		e.wantAlive(open...)
		for _, c := range open {
			_ = c.Close()
		}
		if err := e.r.Remove(e.Context(), e.w.ID); err != nil {
			e.Fatalf("remove: %v", err)
		}
		e.proxy.stop()
		e.wantClean(clean)
	}}
	// The proxy's own connections to the app need ::6, which either backend
	// puts there and only the last one may take away.
	toApp := testCase{name: "to the app", byHand: true, run: func(e *env) {
		clean := e.pod.State(e)
		e.add(nil)
		e.startProxy(onward)
		for _, b := range []redirect.Backend{redirect.BackendIPTables, redirect.BackendEBPF, redirect.BackendIPTables, redirect.BackendEBPF} {
			in, a := e.connect(e.peer.Namespace, e.podPort(appPort))
			e.wantBare(a, "app")
			e.add(func(p *redirect.Policy) { p.Backend = b })
			e.wantAlive(in)
			next, a := e.connect(e.peer.Namespace, e.podPort(appPort))
			if a.Peer.Addr() != loopSource(e.podAddr()) {
				e.Errorf("with %s the app sees client %s, want the proxy's %s", b, a.Peer, loopSource(e.podAddr()))
			}
			_, _ = in.Close(), next.Close()
			// What the old backend left for their sake goes.
			e.wantWhole(e.r)
			if i, ok := e.installed(e.r); !ok || i.Problem != nil {
				e.Errorf("with %s: List() = %+v, %v", b, i, ok)
			}
		}
		if err := e.r.Remove(e.Context(), e.w.ID); err != nil {
			e.Fatalf("remove: %v", err)
		}
		e.proxy.stop()
		e.wantClean(clean)
	}}
	// What iptables leaves for the connections that it has redirected goes with
	// them, although the pod has connections all the time.
	drains := testCase{name: "drains", byHand: true, run: func(e *env) {
		e.add(func(p *redirect.Policy) { p.Backend = redirect.BackendIPTables })
		e.startProxy(tell)
		old, a := e.connect(e.pod.Namespace, e.peerPort(appPort))
		e.wantProxy(a, redirect.OutboundPort, e.peerPort(appPort))
		e.add(func(p *redirect.Policy) { p.Backend = redirect.BackendEBPF })
		out, _ := e.connect(e.pod.Namespace, e.peerPort(appPort))
		in, _ := e.connect(e.peer.Namespace, e.podPort(appPort))
		rules := func() bool {
			e.installed(e.r)
			return slices.ContainsFunc(e.pod.State(e), func(s string) bool { return strings.Contains(s, "SLUICE_") })
		}
		if !rules() {
			e.Error("nothing is left for a connection that needs the kernel's NAT")
		}
		e.wantAlive(old, out, in)
		_ = old.Close()
		for deadline := time.Now().Add(askTimeout); rules(); {
			if time.Now().After(deadline) {
				e.Fatal("rules are left that no connection needs")
			}
		}
		e.wantAlive(out, in)
	}}
	for name, v4 := range map[string]bool{"v4": true, "v6": false} {
		t.Run(name, func(t *testing.T) {
			for _, tc := range []testCase{moves, toApp, drains} {
				t.Run(tc.name, func(t *testing.T) {
					runCase(t, tc, &env{T: t, r: c, v4: v4, node: node, hostPod: hostPod})
				})
			}
		})
	}
}
