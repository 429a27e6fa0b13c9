package redirecttest

import (
	"context"
	"testing"

	"github.com/sluicemesh/sluice/pkg/redirect"
	"github.com/sluicemesh/sluice/tests/need"
	"github.com/sluicemesh/sluice/tests/netnstest"
)

// A testCase is one line of the table. It runs for IPv4 and for IPv6 with a
// pod whose app has a server "app" on appPort, and a server "peer" on the same
// port of another pod.
type testCase struct {
	name string
	// policy changes the default policy. The workload is added with it before
	// run, unless byHand is set.
	policy func(*env, *redirect.Policy)
	byHand bool
	// proxy is the mode of the proxy; "" leaves it to run to start one.
	proxy string
	// v4only marks cases that exist for IPv4 alone.
	v4only bool
	// skip names, by backend, why a case does not hold there: these are the
	// differences between the backends.
	skip map[redirect.Backend]string
	run  func(*env)
}

// An Open opens a backend on the node whose network namespace is at hostNetns.
type Open func(tb testing.TB, hostNetns string) redirect.Redirector

// Run runs the suite against the backend that open opens. Each call of open
// finds what the Redirectors that earlier calls opened have installed. The
// suite closes what it opens. TestMain must call Main.
func Run(t *testing.T, backend redirect.Backend, open Open) {
	need.Root(t)
	node := netnstest.NewNode(t)
	hostPod := startHostPod(t, node)
	r := open(t, node.Netns)
	defer func() {
		if err := r.Close(); err != nil {
			t.Errorf("close redirector: %v", err)
		}
	}()
	for _, tc := range cases() {
		for _, v4 := range []bool{true, false} {
			if tc.v4only && !v4 {
				continue
			}
			name := tc.name + "/v6"
			if v4 {
				name = tc.name + "/v4"
			}
			t.Run(name, func(t *testing.T) {
				if why := tc.skip[backend]; why != "" {
					t.Logf("differs with %s: %s", backend, why)
					return
				}
				runCase(t, tc, &env{T: t, open: open, r: r, v4: v4, node: node, hostPod: hostPod})
			})
		}
	}
	if left, err := r.List(t.Context()); err != nil || len(left) > 0 {
		t.Errorf("after all cases are removed: List() = %v, %v", left, err)
	}
}

func runCase(t *testing.T, tc testCase, e *env) {
	e.pod, e.peer = e.node.Pod(t, "pod"), e.node.Pod(t, "peer")
	e.w = workload(t, e.pod)
	t.Cleanup(func() { remove(e, e.w.ID) })
	e.serve(e.pod.Namespace, appPort, "app")
	e.serve(e.peer.Namespace, appPort, "peer")
	if tc.policy != nil {
		tc.policy(e, &e.w.Policy)
	}
	if !tc.byHand {
		e.add(nil)
	}
	if tc.proxy != "" {
		e.startProxy(tc.proxy)
	}
	tc.run(e)
}

// remove ends the redirection of a workload after the test.
func remove(e *env, id redirect.ID) {
	e.Helper()
	// The context of a test has ended when its Cleanups run.
	if err := e.r.Remove(context.WithoutCancel(e.Context()), id); err != nil {
		e.Errorf("remove workload: %v", err)
	}
}
