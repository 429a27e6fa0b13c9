package redirecttest

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"strconv"
	"testing"
	"time"

	"github.com/cilium/ebpf"

	"github.com/sluicemesh/sluice/pkg/redirect"
	"github.com/sluicemesh/sluice/tests/need"
	"github.com/sluicemesh/sluice/tests/netnstest"
)

// churnEnv holds the churning of the process that is to be killed.
const churnEnv = "SLUICE_TEST_CHURN"

// A churning is what a process does until it is killed.
type churning struct {
	Dir       string
	HostNetns string
	Workloads []redirect.Workload
	Seed      uint64
}

// churn brings the node to what it should be, as an agent does that starts, says
// so, and then changes it in any way there is.
func churn(config string) error {
	var c churning
	if err := json.Unmarshal([]byte(config), &c); err != nil {
		return err
	}
	ctx, random := context.Background(), rand.New(rand.NewPCG(c.Seed, 0))
	r, err := redirect.Choose(bothIn(c.Dir, c.HostNetns))
	if err != nil {
		return err
	}
	installed, err := r.List(ctx)
	if err == nil {
		err = redirect.Reconcile(ctx, r, installed, c.Workloads, nil)
	}
	if err == nil {
		installed, err = r.List(ctx)
	}
	if err != nil {
		return err
	}
	for _, i := range installed {
		if i.Problem != nil {
			return fmt.Errorf("after a restart %s is not whole: %w", i.Pod, i.Problem)
		}
	}
	if len(installed) != len(c.Workloads) {
		return fmt.Errorf("after a restart there is %v", installed)
	}
	if _, err := fmt.Println("whole"); err != nil {
		return err
	}
	for {
		w := c.Workloads[random.IntN(len(c.Workloads))]
		w.Policy.Backend = []redirect.Backend{redirect.BackendEBPF, redirect.BackendIPTables}[random.IntN(2)]
		w.Policy.Outbound.ExcludePorts.List = []uint16{uint16(1 + random.IntN(1000))}
		w.Policy.Outbound.ExcludeCIDRs.List = documentation()
		switch random.IntN(4) {
		case 0:
			err = r.Remove(ctx, w.ID)
		case 1:
			_, err = r.List(ctx)
		default:
			err = r.Add(ctx, w)
		}
		if err != nil {
			return err
		}
	}
}

// TestKilledAnywhere kills an agent's process again and again, whatever it is
// at. The next one mends what that left, and in the end nothing is left at all.
func TestKilledAnywhere(t *testing.T) {
	need.EBPF(t)
	need.Tool(t, "iptables-restore")
	seed := rand.Uint64()
	if s, ok := os.LookupEnv("TEST_SEED"); ok {
		var err error
		if seed, err = strconv.ParseUint(s, 10, 64); err != nil {
			t.Fatalf("TEST_SEED: %v", err)
		}
	}
	t.Logf("TEST_SEED=%d", seed)
	random := rand.New(rand.NewPCG(seed, 1))
	node := netnstest.NewNode(t)
	startHostPod(t, node)
	c := churning{Dir: stateDir(t, node.Netns), HostNetns: node.Netns}
	nodeRules := rules(node.State(t))
	pods, before := make([]*netnstest.Pod, 2), make([]netnstest.State, 2)
	for i := range pods {
		pods[i] = node.Pod(t, "pod")
		before[i] = pods[i].State(t)
		c.Workloads = append(c.Workloads, workload(t, pods[i]))
	}
	for i := range 15 {
		c.Seed = seed + uint64(i)
		config, err := json.Marshal(c)
		if err != nil {
			t.Fatal(err)
		}
		// Every third one is killed while it starts.
		killed(t, string(config), i%3 != 0, time.Duration(random.IntN(300))*time.Millisecond)
	}
	r := choose(t, bothIn(c.Dir, c.HostNetns))
	for i, w := range c.Workloads {
		if err := r.Remove(t.Context(), w.ID); err != nil {
			t.Error(err)
		}
		if diff := before[i].Diff(pods[i].State(t)); diff != "" {
			t.Errorf("namespace of pod %d is not as before:\n%s", i, diff)
		}
	}
	if left, err := r.List(t.Context()); err != nil || len(left) > 0 {
		t.Errorf("List() = %v, %v", left, err)
	}
	if diff := nodeRules.Diff(rules(node.State(t))); diff != "" {
		t.Errorf("the node is not as before:\n%s", diff)
	}
	usage, err := r.MapUsage(t.Context())
	if err != nil || len(usage) == 0 {
		t.Fatalf("MapUsage() = %v, %v", usage, err)
	}
	for _, u := range usage {
		if u.Entries != 0 {
			t.Errorf("%d entries are left in map %s", u.Entries, u.Name)
		}
	}
	m, err := ebpf.LoadPinnedMap(pinDir(c.Dir)+"/maps/pod_meta", nil)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = m.Close() }()
	if err := m.NextKey(nil, make([]byte, m.KeySize())); !errors.Is(err, ebpf.ErrKeyNotExist) {
		t.Errorf("a pod is left in map pod_meta, or %v", err)
	}
}

// killed starts a process that churns, and kills it after a while, which begins
// once the node is whole if ready is set.
func killed(t *testing.T, config string, ready bool, after time.Duration) {
	t.Helper()
	r, w := pipe(t)
	var stderr bytes.Buffer
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	cmd := exec.CommandContext(ctx, "/proc/self/exe") // Cancel is SIGKILL
	cmd.Env = append(os.Environ(), churnEnv+"="+config)
	cmd.Stdout, cmd.Stderr = w, &stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	_ = w.Close()
	if ready {
		if err := r.SetReadDeadline(time.Now().Add(20 * time.Second)); err != nil {
			t.Error(err)
		}
		if _, err := r.Read(make([]byte, 8)); err != nil {
			t.Errorf("wait for the process: %v", err)
		}
	}
	time.AfterFunc(after, cancel)
	_ = cmd.Wait() // "signal: killed" is what was asked for
	if stderr.Len() > 0 {
		t.Fatalf("%s", stderr.String())
	}
}
