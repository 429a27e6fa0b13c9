package redirecttest

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/sluicemesh/sluice/pkg/redirect"
	"github.com/sluicemesh/sluice/pkg/redirect/bpf"
	"github.com/sluicemesh/sluice/pkg/redirect/cgroup"
	"github.com/sluicemesh/sluice/pkg/redirect/iptables"
	"github.com/sluicemesh/sluice/pkg/redirect/netns"
	"github.com/sluicemesh/sluice/tests/faultpoint"
	"github.com/sluicemesh/sluice/tests/need"
	"github.com/sluicemesh/sluice/tests/netnstest"
)

// victimEnv holds the order of the process that is to be killed.
const victimEnv = "SLUICE_TEST_VICTIM"

// An errand is what such a process does, once.
type errand struct {
	Verb      string // start, add, remove, uninstall
	Node      redirect.Backend
	Left      bool // look at the other backend, too
	Dir       string
	HostNetns string
	Workload  redirect.Workload
}

// run does the errand; calls count from where it begins to change something.
func (e errand) run() error {
	ctx := context.Background()
	o := nftIn(e.Dir, e.HostNetns)
	o.Node, o.Left = e.Node, func(redirect.Backend) bool { return e.Left }
	arm := faultpoint.Arm
	if e.Verb == "start" || e.Verb == "uninstall" {
		if err := arm(); err != nil {
			return err
		}
	}
	if e.Verb == "uninstall" {
		return uninstallBoth(ctx, e.Dir, e.HostNetns)
	}
	c, err := redirect.Choose(o)
	if err != nil || e.Verb == "start" {
		return err
	}
	if err := arm(); err != nil {
		return err
	}
	if e.Verb == "remove" {
		return c.Remove(ctx, e.Workload.ID)
	}
	return c.Add(ctx, e.Workload)
}

func runErrand(config string) error {
	var e errand
	if err := json.Unmarshal([]byte(config), &e); err != nil {
		return err
	}
	return e.run()
}

// nftIn is bothIn with one variant of iptables: to try both at each start would
// take most of the time.
func nftIn(dir, hostNetns string) redirect.Options {
	o := bothIn(dir, hostNetns)
	o.NewIPTables = func() (redirect.Redirector, error) {
		rules := rulesOptions(dir, hostNetns)
		rules.Variant = iptables.VariantNFT
		return iptables.New(rules)
	}
	return o
}

func uninstallBoth(ctx context.Context, dir, hostNetns string) error {
	return errors.Join(
		bpf.Uninstall(ctx, bpf.Options{PinDir: pinDir(dir)}),
		iptables.Uninstall(ctx, rulesOptions(dir, hostNetns)))
}

// A danger is an operation that is cut short everywhere.
type danger struct {
	name string
	node redirect.Backend
	verb string
	// before is the pod's policy, wants what the operation is to make of it, and
	// after what the next start is told; nil: it is not redirected.
	before, wants, after *redirect.Policy
	// fresh and gone say that there is no agent's data plane before or after it.
	fresh, gone bool
	// held means that every connection is captured, whenever the end comes.
	held bool
}

func dangers() []danger {
	var all []danger
	for _, b := range []redirect.Backend{redirect.BackendEBPF, redirect.BackendIPTables} {
		plain := redirect.DefaultPolicy()
		plain.Backend = b
		changed := plain
		changed.Outbound.ExcludePorts.List, changed.Inbound.ExcludePorts.List = []uint16{25}, []uint16{26}
		changed.Outbound.ExcludeCIDRs.List = documentation()
		other := plain
		other.Backend = redirect.BackendEBPF
		if b == redirect.BackendEBPF {
			other.Backend = redirect.BackendIPTables
		}
		all = append(all,
			danger{name: "add", node: b, verb: "add", wants: &changed, after: &changed},
			danger{name: "add in vain", node: b, verb: "add", wants: &changed},
			danger{name: "change", node: b, verb: "add", before: &plain, wants: &changed, after: &changed, held: true},
			danger{name: "move away", node: b, verb: "add", before: &changed, wants: &other, after: &other, held: true},
			danger{name: "remove", node: b, verb: "remove", before: &changed},
			danger{name: "start", node: b, verb: "start", fresh: true},
			danger{name: "start again", node: b, verb: "start", before: &changed, wants: &changed, after: &changed, held: true},
			danger{name: "uninstall", node: b, verb: "uninstall", before: &changed, gone: true},
		)
	}
	return all
}

// TestKilledBeforeEachCall kills the agent's process before every single call by
// which an operation changes the kernel or the disk, each time from the same
// state. What is left by then captures connections rightly or not at all; who
// was captured before stays so; the next start heals to exactly what a process
// that nobody kills leaves; pods that are not Sluice's lose not one packet.
func TestKilledBeforeEachCall(t *testing.T) {
	need.EBPF(t)
	need.Tool(t, "iptables-restore")
	need.Tool(t, "ip6tables-restore")
	// One for all scenes: the node's rules name the cgroups of pods on the machine.
	startHostPod(t, netnstest.NewNode(t))
	for _, d := range dangers() {
		t.Run(string(d.node)+"/"+d.name, func(t *testing.T) {
			t.Parallel()
			newScene(t, d).play()
		})
	}
}

// A scene is the node on which one danger is played again and again.
type scene struct {
	*testing.T
	danger
	n         *netnstest.Node
	dir       string
	pod, peer *netnstest.Pod
	w         redirect.Workload
}

func newScene(t *testing.T, d danger) *scene {
	s := &scene{T: t, danger: d, n: netnstest.NewNode(t)}
	s.dir = stateDir(t, s.n.Netns)
	s.peer = s.n.Pod(t, "peer")
	s.setPod(s.n.Pod(t, "pod"))
	both := netip.AddrPortFrom(netip.IPv6Unspecified(), appPort)
	s.pod.Serve(t, both, "app")
	s.peer.Serve(t, both, "peer")
	startProxy(t, s.pod.Namespace, s.w.Policy.ProxyUID, tell)
	return s
}

func (s *scene) setPod(pod *netnstest.Pod) { s.pod, s.w = pod, workload(s.T, pod) }

// play cuts the operation short before its first call, then before its second,
// until it comes to its end.
func (s *scene) play() {
	by := watchBystanders(s.T, s.n)
	s.bring(s.before, !s.fresh)
	calls, out := s.act(func(int, faultpoint.Call) faultpoint.Action { return faultpoint.Go })
	if out != "" {
		s.Fatalf("with nobody in its way: %s", out)
	}
	s.bring(s.after, !s.gone)
	after := s.state()
	s.Logf("%d calls", calls)
	if none := s.node == redirect.BackendIPTables && s.name == "start again"; none != (calls == 0) {
		s.Errorf("%d calls were seen", calls)
	}
	tried := 0
	for end, over := 0, false; !over; end++ {
		for _, kill := range []faultpoint.Action{faultpoint.KillAll, faultpoint.Kill} {
			if s.before != s.after || s.fresh || s.gone {
				s.bring(s.before, !s.fresh)
			}
			var last faultpoint.Call
			seen, out := s.act(func(i int, c faultpoint.Call) faultpoint.Action {
				if i < end {
					return faultpoint.Go
				}
				last = c
				return kill
			})
			if over = seen <= end; over {
				if out != "" {
					s.Errorf("with nobody in its way: %s", out)
				}
				break
			}
			tried++
			where := fmt.Sprintf("killed before call %d, %s", end, last.Name)
			s.traffic(where)
			s.bring(s.after, !s.gone)
			if diff := after.Diff(s.state()); diff != "" {
				s.Errorf("%s: what the next start makes of it (-want +got):\n%s", where, diff)
			}
			if s.Failed() {
				return
			}
			if !last.Helper {
				break // nobody is left who could go on
			}
		}
	}
	if tried < calls-2 {
		s.Errorf("the process was killed %d times on %d calls", tried, calls)
	}
	by.finish(s.T)
}

// act runs the operation in a process of its own and returns how many calls it
// has made and what it complained of. Calls in namespaces of its own, in which it
// tries what the kernel can do, do not count: they end with it.
func (s *scene) act(at func(i int, c faultpoint.Call) faultpoint.Action) (calls int, out string) {
	e := errand{Verb: s.verb, Node: s.node, Left: s.name == "move away", Dir: s.dir, HostNetns: s.n.Netns, Workload: s.w}
	if s.wants != nil {
		e.Workload.Policy = *s.wants
	}
	config, err := json.Marshal(e)
	if err != nil {
		s.Fatal(err)
	}
	// Not self: other goroutines may have its thread elsewhere.
	here, err := netns.Inode("/proc/thread-self/ns/net")
	if err != nil {
		s.Fatal(err)
	}
	namespaces := []uint64{here, s.n.Inode(s), s.pod.Inode(s)}
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), victimEnv+"="+string(config))
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	faultpoint.Watch(s.T, cmd, func(c faultpoint.Call) faultpoint.Action {
		if !slices.Contains(namespaces, c.Netns) {
			return faultpoint.Go
		}
		calls++
		return at(calls-1, c)
	})
	return calls, stderr.String()
}

// bring makes a new start and has it bring the node to where the pod has a
// policy, or none; with installed unset to where there was no agent. Where the
// cgroups of other tests come and go meanwhile, iptables does without the node's
// rules until the next look, which is then taken.
func (s *scene) bring(policy *redirect.Policy, installed bool) {
	s.Helper()
	const tries = 10
	for try := range tries {
		before := s.podCgroups()
		complaint := s.start(policy, installed)
		if same := slices.Equal(before, s.podCgroups()); !same && try < tries-1 {
			continue
		}
		if complaint != "" {
			s.Error(complaint)
		}
		return
	}
}

func (s *scene) podCgroups() []cgroup.Cgroup {
	s.Helper()
	root, err := cgroup.Root()
	if err != nil {
		s.Fatal(err)
	}
	found, err := cgroup.Pods(root)
	if err != nil {
		s.Fatal(err)
	}
	return found
}

// start says what is not as it should be after it.
func (s *scene) start(policy *redirect.Policy, installed bool) (complaint string) {
	s.Helper()
	ctx := s.Context()
	if !installed {
		if err := uninstallBoth(ctx, s.dir, s.n.Netns); err != nil {
			s.Fatalf("uninstall: %v", err)
		}
		return ""
	}
	o := nftIn(s.dir, s.n.Netns)
	o.Node = s.node
	c, err := redirect.Choose(o)
	if err != nil {
		s.Fatalf("start: %v", err)
	}
	defer func() {
		if err := c.Close(); err != nil {
			s.Errorf("close: %v", err)
		}
	}()
	have, err := c.List(ctx)
	if err != nil {
		s.Fatalf("list: %v", err)
	}
	var want []redirect.Workload
	if policy != nil {
		w := s.w
		w.Policy = *policy
		want = append(want, w)
	}
	if err := redirect.Reconcile(ctx, c, have, want, nil); err != nil {
		s.Fatalf("reconcile: %v", err)
	}
	have, err = c.List(ctx)
	if err != nil {
		s.Fatalf("list: %v", err)
	}
	if len(have) != len(want) || len(want) > 0 && !have[0].Whole(want[0]) {
		return fmt.Sprintf("after a start List() = %+v, want %v", have, want)
	}
	return ""
}

// state is all that Sluice may change.
func (s *scene) state() netnstest.State { return append(s.pod.State(s), s.around()...) }

// around is what it may change outside of the pod: rules of the node, pins,
// files, and how many entries the maps have.
func (s *scene) around() netnstest.State {
	s.Helper()
	state := rules(s.n.State(s))
	err := filepath.WalkDir(s.dir, func(path string, _ fs.DirEntry, err error) error {
		if !strings.HasSuffix(path, "xtables.lock") {
			state = append(state, strings.TrimPrefix(path, s.dir))
		}
		return err
	})
	if err != nil {
		s.Fatal(err)
	}
	for _, name := range []string{"pods", "pod_ips", "pod_meta", "ports", "cidrs", "stats", "layouts"} {
		if n, ok := entries(s.T, filepath.Join(pinDir(s.dir), "maps", name)); ok {
			state = append(state, fmt.Sprintf("map %s: %d entries", name, n))
		}
	}
	for i, line := range state {
		// It names the cgroups of pods, of which other tests may make some.
		if before, _, ok := strings.Cut(line, "-A SLUICE_EXEMPT"); ok {
			state[i] = before + "-A SLUICE_EXEMPT"
		}
	}
	slices.Sort(state)
	return state
}

// traffic connects both ways in both families while no agent runs.
func (s *scene) traffic(where string) {
	s.Helper()
	for _, v4 := range []bool{true, false} {
		e := &env{T: s.T, v4: v4, pod: s.pod, peer: s.peer}
		out, outBy := s.who(e, where, s.pod, e.peerPort(appPort), redirect.OutboundPort, "peer")
		in, inBy := s.who(e, where, s.peer, e.podPort(appPort), redirect.InboundPort, "app")
		if s.held && !(out && in) {
			s.Errorf("%s: got past the proxy: %s, %s", where, outBy, inBy)
		}
		if out != in && s.verb != "uninstall" {
			s.Errorf("%s: captured one way only: %s, %s", where, outBy, inBy)
		}
	}
}

// who says whether the proxy answers a connection, rightly.
func (s *scene) who(e *env, where string, from *netnstest.Pod, to netip.AddrPort, port uint16, bare string) (captured bool, text string) {
	s.Helper()
	c, err := e.dial(from.Namespace, to, askTimeout)
	if err != nil {
		s.Errorf("%s: connect to %s: %v", where, to, err)
		return false, ""
	}
	defer func() { _ = c.Close() }()
	ctx, cancel := context.WithTimeout(s.Context(), askTimeout)
	defer cancel()
	a, err := readAnswer(ctx, c)
	text = fmt.Sprintf("connection to %s reached %q on port %d, original destination %s %s", to, a.Name, a.Port, a.Orig, a.OrigErr)
	switch {
	case err != nil:
		s.Errorf("%s: connection to %s: %v", where, to, err)
	case a.Name == "proxy" && a.Port == port && a.Orig == to && a.OrigErr == "":
		return true, text
	case a.Name != bare:
		s.Errorf("%s: %s", where, text)
	}
	return false, text
}
