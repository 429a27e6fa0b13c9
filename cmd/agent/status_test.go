package main

import (
	"encoding/json"
	"errors"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/sluicemesh/sluice/pkg/redirect"
	"github.com/sluicemesh/sluice/pkg/xds/server"
)

// TestStatus asks an agent as a user does.
func TestStatus(t *testing.T) {
	web, plain := newPod("shop", "web"), newPod("shop", "plain", "sluice.dev/redirect", "disabled")
	n := readyNode(t, shop(), web, plain)
	mustCall(t, n, func() { n.backend = ebpfBackend{} })
	mustAdd(t, n, attach(web))
	mustAdd(t, n, attach(plain))
	mustCall(t, n, func() { n.problem("pod shop/web", errors.New("bad\nannotation")) })
	notReady := check{name: "source"}
	checks := func() []check { return []check{notReady, {name: "pods", detail: "1 redirected"}} }
	peer := func(redirect.Accelerate) []redirect.Place { return []redirect.Place{redirect.PlacePeer} }
	s := httptest.NewServer(n.statusHandler("node-a", checks, peer))
	defer s.Close()
	addr := strings.TrimPrefix(s.URL, "http://")

	code, stdout, stderr := runMain(t, []string{"SLUICE_HTTP_ADDR=" + addr}, "status")
	for _, want := range []string{
		"node node-a, sluice-agent dev\n[+]source ok\n[+]pods ok (1 redirected)\n\n",
		"NAMESPACE   POD     REDIRECTED   ACCELERATED   SIDECAR         PROBLEM\n",
		"shop        plain   no           -             -               -\n",
		"shop        web     ebpf         peer          not connected   bad; annotation\n",
	} {
		if !strings.Contains(stdout, want) {
			t.Errorf("%q is missing in\n%s", want, stdout)
		}
	}
	if code != 0 || stderr != "" {
		t.Errorf("exit code %d, %s", code, stderr)
	}

	notReady.err = errors.New("not read")
	code, stdout, stderr = runMain(t, nil, "status", "--http-addr", addr, "--output", "json")
	var got nodeStatus
	if err := json.Unmarshal([]byte(stdout), &got); err != nil {
		t.Fatal(err)
	}
	if code != 1 || got.Ready || got.Checks[0].Mark != "-" || !strings.Contains(stderr, "not ready") {
		t.Errorf("an agent that is not ready: exit code %d, %s\n%s", code, stderr, stdout)
	}
	if len(got.Pods) != 2 || got.Pods[1].UID != web.UID || got.Pods[1].Backend != redirect.BackendEBPF {
		t.Errorf("pods: %+v", got.Pods)
	}

	s.Close()
	if code, _, stderr = runMain(t, nil, "status", "--http-addr", addr); code != 1 || !strings.Contains(stderr, "--http-addr") {
		t.Errorf("no agent: exit code %d, %s", code, stderr)
	}
	if code, _, stderr = runMain(t, nil, "status", "--output", "yaml"); code != 2 || !strings.Contains(stderr, `--output "yaml"`) {
		t.Errorf("wrong output: exit code %d, %s", code, stderr)
	}
}

// An ebpfBackend is a node that has what it asked for.
type ebpfBackend struct{ fakeBackend }

func (ebpfBackend) BackendOf(redirect.ID) redirect.Backend { return redirect.BackendEBPF }

func TestSidecarState(t *testing.T) {
	done, behind := server.TypeStatus{Synced: true}, server.TypeStatus{}
	for want, s := range map[string]server.PodStatus{
		"not connected": {},
		"synced":        {Streams: 1, Types: []server.TypeStatus{done, done}},
		"behind":        {Streams: 1, Types: []server.TypeStatus{done, behind}},
		"rejects 1":     {Streams: 1, Types: []server.TypeStatus{done}, Rejected: []server.Rejection{{Name: "x"}}},
	} {
		if diff := cmp.Diff(want, sidecarState(s)); diff != "" {
			t.Error(diff)
		}
	}
}
