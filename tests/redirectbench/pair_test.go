package redirectbench

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/sluicemesh/sluice/tests/envoytest"
	"github.com/sluicemesh/sluice/tests/netnstest"
	"github.com/sluicemesh/sluice/tests/redirectbench/load"
)

// appUser is whom client and server run as.
const appUser = 1000

// A pair is a client's and a server's pod, each with its sidecar and on a core of
// its own.
type pair struct {
	tb             testing.TB
	host           *netnstest.Node
	client, server *netnstest.Pod
	envoys         [2]*envoytest.Envoy
	pids           []int // of all that traffic passes
	to             io.Writer
	from           *json.Decoder
	cores          string
	descriptors    int // that each process may have
}

func newPair(t *testing.T) *pair {
	t.Helper()
	p := &pair{tb: t}
	p.descriptors = raiseLimit(t)
	p.host = netnstest.NewNode(t)
	p.client, p.server = p.host.Pod(t, "client"), p.host.Pod(t, "server")
	for _, pod := range []*netnstest.Pod{p.client, p.server} {
		// Connections that were closed keep a port for a minute. The ports that
		// somebody listens on are below these.
		pod.Sysctl(t, "net/ipv4/ip_local_port_range", "16384 65535")
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	for i, o := range []envoytest.Options{
		{Name: "client's Envoy", Netns: p.client.Netns, Config: clientConfig(t, p.client.Addr4, p.server.Addr4)},
		{Name: "server's Envoy", Netns: p.server.Netns, Config: serverConfig(t, p.server.Addr4)},
	} {
		p.envoys[i] = envoytest.Start(t, o)
		if err := p.envoys[i].WaitReady(ctx); err != nil {
			t.Fatal(err)
		}
	}
	server := p.start(t, p.server, "serve", p.server.Addr4.String(), strconv.Itoa(appPort))
	if line, err := bufio.NewReader(server.out).ReadString('\n'); line != "ready\n" {
		t.Fatalf("server says %q, %v", line, err)
	}
	client := p.start(t, p.client, "call")
	p.to, p.from = client.in, json.NewDecoder(client.out)
	p.pids = []int{client.Process.Pid, p.envoys[0].PID(), server.Process.Pid, p.envoys[1].PID()}
	p.pin(t)
	return p
}

// raiseLimit lets this process, and so what it starts, have as many descriptors
// as this user may, and returns their number: a connection is two in each Envoy.
func raiseLimit(t *testing.T) int {
	t.Helper()
	var before, limit unix.Rlimit
	err := unix.Getrlimit(unix.RLIMIT_NOFILE, &before)
	if err == nil {
		limit = before
		limit.Cur, limit.Max = max(limit.Max, 1<<17), max(limit.Max, 1<<17)
		err = unix.Setrlimit(unix.RLIMIT_NOFILE, &limit)
	}
	if errors.Is(err, unix.EPERM) {
		limit = unix.Rlimit{Cur: before.Max, Max: before.Max}
		err = unix.Setrlimit(unix.RLIMIT_NOFILE, &limit)
	}
	if err != nil {
		t.Fatalf("raise the limit of descriptors: %v", err)
	}
	return int(min(limit.Cur, 1<<30))
}

type piped struct {
	*netnstest.Cmd
	in  io.Writer
	out io.Reader
}

// start starts one end of the traffic in a pod: this program again, handed over as
// an open file, because its user may not be able to reach the path.
func (p *pair) start(t *testing.T, pod *netnstest.Pod, args ...string) piped {
	t.Helper()
	self, err := os.Open("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = self.Close() }()
	cmd := pod.Command(t, appUser, "/proc/self/fd/3", args...)
	cmd.ExtraFiles = []*os.File{self}
	// One thread at a time: each has but one core.
	cmd.Env = []string{"GOMAXPROCS=1", loadEnv + "=1"}
	cmd.Stderr = os.Stderr
	inR, inW, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	outR, outW, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _, _ = inW.Close(), outR.Close() })
	cmd.Stdin, cmd.Stdout = inR, outW
	err = cmd.Start()
	_, _ = inR.Close(), outW.Close()
	if err != nil {
		t.Fatal(err)
	}
	return piped{cmd, inW, outR}
}

// pin binds each pod's processes to a core.
func (p *pair) pin(t *testing.T) {
	t.Helper()
	var may unix.CPUSet
	if err := unix.SchedGetaffinity(0, &may); err != nil {
		t.Fatalf("read CPU affinity: %v", err)
	}
	var cores []int
	for c := range 1024 {
		if may.IsSet(c) {
			cores = append(cores, c)
		}
	}
	p.cores = "not pinned: there is one core"
	if len(cores) < 2 {
		return
	}
	p.cores = fmt.Sprintf("client's pod on core %d, server's on core %d", cores[0], cores[1])
	for i, pid := range p.pids {
		var set unix.CPUSet
		set.Set(cores[i/2])
		for range 2 { // a thread that came meanwhile has its maker's core
			for _, tid := range threads(t, pid) {
				if err := unix.SchedSetaffinity(tid, &set); err != nil && !errors.Is(err, unix.ESRCH) {
					t.Fatalf("bind to a core: %v", err)
				}
			}
		}
	}
}

func threads(t *testing.T, pid int) []int {
	t.Helper()
	entries, err := os.ReadDir(fmt.Sprintf("/proc/%d/task", pid))
	if err != nil {
		t.Fatalf("list threads: %v", err)
	}
	var tids []int
	for _, e := range entries {
		tid, err := strconv.Atoi(e.Name())
		if err != nil {
			t.Fatal(err)
		}
		tids = append(tids, tid)
	}
	return tids
}

// call has the client do something.
func (p *pair) call(t *testing.T, req load.Request) load.Result {
	t.Helper()
	res, err := p.try(req)
	if err != nil {
		t.Fatal(err)
	}
	return res
}

func (p *pair) try(req load.Request) (load.Result, error) {
	var res load.Result
	b, err := json.Marshal(req)
	if err == nil {
		_, err = p.to.Write(b)
	}
	if err == nil {
		err = p.from.Decode(&res)
	}
	if err == nil && res.Err != "" {
		err = errors.New(res.Err)
	}
	if err != nil {
		return res, fmt.Errorf("client: %w", err)
	}
	return res, nil
}

// cpu is the time that all processes of the pair have had.
func (p *pair) cpu(t *testing.T) (sum time.Duration) {
	t.Helper()
	for _, pid := range p.pids {
		for _, tid := range threads(t, pid) {
			b, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/schedstat", pid, tid))
			var ns int64
			if err == nil {
				_, err = fmt.Sscan(string(b), &ns)
			}
			if err != nil {
				t.Fatalf("read CPU time of a thread: %v", err)
			}
			sum += time.Duration(ns)
		}
	}
	return sum
}

// passed are the connections that the Envoys have made, by cluster.
func (p *pair) passed(t *testing.T) map[string]uint64 {
	t.Helper()
	all := map[string]uint64{}
	for _, e := range p.envoys {
		for name, v := range e.Stats(t.Context(), `^cluster\..*\.upstream_cx_total$`) {
			all[strings.TrimSuffix(strings.TrimPrefix(name, "cluster."), ".upstream_cx_total")] = v
		}
	}
	return all
}

// clusters are what the names of the clusters begin with that a way leads through,
// in the client's Envoy and in the server's.
var clusters = map[way][2]string{
	explicit: {"out/bench/explicit/", "explicit/"},
	same:     {"out/bench/same/", "in/"},
	captured: {"out/bench/bench/", "in/"},
}

// checkWay wants the connections of a mode to have passed its clusters alone, and
// returns how many the client's Envoy has made for it.
func (p *pair) checkWay(t *testing.T, m mode, before, after map[string]uint64) uint64 {
	t.Helper()
	made := func(prefix string) (sum uint64) {
		for name, v := range after {
			if strings.HasPrefix(name, prefix) {
				sum += v - before[name]
			}
		}
		return sum
	}
	for w, prefixes := range clusters {
		for i, prefix := range prefixes {
			own := prefix == clusters[m.way][i]
			if n := made(prefix); own != (n > 0) {
				t.Errorf("%s: %d connections passed clusters %s, want some: %t (way %d)", m.name, n, prefix, own, w)
			}
		}
	}
	if n := made("passthrough"); n > 0 {
		t.Errorf("%s: %d connections were to no service", m.name, n)
	}
	if m.way == direct {
		return 0
	}
	return made(clusters[m.way][0])
}

// disconnect ends the connections that the Envoys keep for HTTP: the next mode's
// have to take its own way. Sluice's Envoys never do that by themselves.
func (p *pair) disconnect(t *testing.T) {
	t.Helper()
	for _, pod := range []*netnstest.Pod{p.client, p.server} {
		err := pod.Do(func() error {
			all, err := netlink.SocketDiagTCP(unix.AF_INET)
			if err != nil {
				return fmt.Errorf("list sockets: %w", err)
			}
			for _, s := range all {
				to := net.TCPAddr{IP: s.ID.Destination, Port: int(s.ID.DestinationPort)}
				if s.State != netlink.TCP_ESTABLISHED || !to.IP.Equal(p.server.Addr4.AsSlice()) {
					continue
				}
				err := netlink.SocketDestroy(&net.TCPAddr{IP: s.ID.Source, Port: int(s.ID.SourcePort)}, &to)
				if err != nil && !errors.Is(err, unix.ENOENT) {
					return fmt.Errorf("end a connection to %s: %w", &to, err)
				}
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
}

// tracked counts the connections that the kernel tracks in the pods.
func (p *pair) tracked(t *testing.T) (sum int) {
	t.Helper()
	for _, pod := range []*netnstest.Pod{p.client, p.server} {
		err := pod.Do(func() error {
			b, err := os.ReadFile("/proc/sys/net/netfilter/nf_conntrack_count")
			if errors.Is(err, os.ErrNotExist) {
				return nil // not even loaded
			}
			if err != nil {
				return err
			}
			n, err := strconv.Atoi(strings.TrimSpace(string(b)))
			sum += n
			return err
		})
		if err != nil {
			t.Fatalf("count tracked connections: %v", err)
		}
	}
	return sum
}

// synsResent is the kernel's count of SYNs and SYN ACKs sent again in both pods.
func (p *pair) synsResent(t *testing.T) (sum int) {
	t.Helper()
	for _, pod := range []*netnstest.Pod{p.client, p.server} {
		err := pod.Do(func() error {
			b, err := os.ReadFile("/proc/thread-self/net/netstat")
			if err != nil {
				return err
			}
			n, err := netstat(string(b), "TCPSynRetrans")
			sum += n
			return err
		})
		if err != nil {
			t.Fatalf("read statistics of TCP: %v", err)
		}
	}
	return sum
}

// netstat finds a value in lines of names, each followed by one of values.
func netstat(text, name string) (int, error) {
	lines := strings.Split(text, "\n")
	for i := 0; i+1 < len(lines); i += 2 {
		names, values := strings.Fields(lines[i]), strings.Fields(lines[i+1])
		for j, n := range names {
			if n == name && j < len(values) {
				return strconv.Atoi(values[j])
			}
		}
	}
	return 0, fmt.Errorf("there is no %s", name)
}
