package apps

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
	"text/tabwriter"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/sluicemesh/sluice/pkg/xds"
	"github.com/sluicemesh/sluice/tests/need"
	"github.com/sluicemesh/sluice/tests/netnstest"
	"github.com/sluicemesh/sluice/tests/sluicetest"
)

func TestMain(m *testing.M) {
	if spec := os.Getenv(enterEnv); spec != "" {
		fmt.Fprintln(os.Stderr, enter(spec))
		os.Exit(1)
	}
	os.Exit(netnstest.VerifyNoLeaks(m))
}

// A row of the table that is printed at the end.
type row struct {
	app, backend, port       string
	direct, through          time.Duration
	clientEnvoy, serverEnvoy uint64
	note                     string
}

// TestApps runs each application directly, and through both sidecars with its
// port declared and undeclared. APPS and BACKEND choose.
func TestApps(t *testing.T) {
	need.Root(t)
	chosen := choose(t)
	m := newMachine(t)
	direct := runDirect(t, m, chosen)
	var rows []row
	sluicetest.EachBackend(t, func(t *testing.T, backend string) {
		p := newPair(t, backend, chosen)
		for i, a := range chosen {
			out, ok := direct[a.name]
			if !ok {
				continue // that has failed, or been skipped, already
			}
			t.Run(a.name, func(t *testing.T) {
				for _, w := range ways(a, i) {
					t.Run(w.name, func(t *testing.T) { rows = append(rows, p.through(t, m, a, w, out)) })
				}
			})
		}
		if p.Accelerated() && p.Metric(t, "sluice_acceleration_events_total", `event="joined"`) == 0 {
			t.Error("no connections between the sidecars were accelerated")
		}
	})
	show(rows)
}

// TestPackages: each application has its packages, and none is there in vain.
func TestPackages(t *testing.T) {
	packages := readPackages(t)
	for _, a := range table {
		if packages[a.name] == "" {
			t.Errorf("packages.txt does not have %s", a.name)
		}
		delete(packages, a.name)
	}
	if len(packages) > 0 {
		t.Errorf("packages.txt has applications that are not in the table: %v", packages)
	}
}

// choose returns the applications that APPS names, or all.
func choose(t *testing.T) []app {
	t.Helper()
	names := strings.FieldsFunc(os.Getenv("APPS"), func(r rune) bool { return r == ',' || r == ' ' })
	if len(names) == 0 {
		return table
	}
	var chosen []app
	for _, name := range names {
		i := slices.IndexFunc(table, func(a app) bool { return a.name == name })
		if i < 0 {
			t.Fatalf("APPS: there is no application %q", name)
		}
		chosen = append(chosen, table[i])
	}
	return chosen
}

// A result is what a client printed, and how long it took.
type result struct {
	out  string
	took time.Duration
}

// runDirect runs the applications between two pods of a node without Sluice.
func runDirect(t *testing.T, m *machine, chosen []app) map[string]result {
	results := map[string]result{}
	t.Run("direct", func(outer *testing.T) {
		node := netnstest.NewNode(outer)
		client, server := node.Pod(outer, "client"), node.Pod(outer, "server")
		for _, a := range chosen {
			outer.Run(a.name, func(inner *testing.T) {
				m.need(inner, a.name)
				m.prepare(inner, t, a, server.Namespace)
				stop := m.serve(inner, a, server.Namespace, a.port)
				out, took := m.client(inner, a, client.Namespace, server.Addr4, a.port)
				stop()
				if !inner.Failed() {
					results[a.name] = result{out, took}
				}
			})
		}
	})
	return results
}

// A pair is a client's and a server's pod with a sidecar each.
type pair struct {
	*sluicetest.Node
	backend        string
	client, server *sluicetest.Pod
}

// A way leads to an application through a Service.
type way struct {
	name, service string
	addr          netip.Addr
	port          int
	portName      string
	known         bool // the sidecars know beforehand what the port speaks
}

// ways returns those of the i-th application.
func ways(a app, i int) []way {
	return []way{
		{
			name: "declared", service: a.name, addr: netip.AddrFrom4([4]byte{10, 96, 8, byte(i + 1)}), port: a.port,
			portName: a.portName, known: xds.DetectProtocol("", a.portName, uint16(a.port)) != xds.ProtocolAuto,
		},
		{
			name: "undeclared", service: a.name + "-undeclared", port: 20000 + i,
			addr: netip.AddrFrom16([16]byte{0: 0xfd, 3: 0x96, 13: 8, 15: byte(i + 1)}),
		},
	}
}

// newPair makes the pods and the services.
func newPair(t *testing.T, backend string, apps []app) *pair {
	t.Helper()
	p := &pair{Node: sluicetest.New(t, backend), backend: backend}
	var yaml strings.Builder
	var all []way
	for i, a := range apps {
		for _, w := range ways(a, i) {
			all = append(all, w)
			family := "IPv4"
			if w.addr.Is6() {
				family = "IPv6"
			}
			name := ""
			if w.portName != "" {
				name = "name: " + w.portName + ", "
			}
			fmt.Fprintf(&yaml, "---\n{apiVersion: v1, kind: Service, metadata: {name: %s, namespace: %s}, spec: {clusterIP: %q, clusterIPs: [%[3]q], "+
				"ipFamilies: [%s], selector: {app: server}, ports: [{%sport: %d}]}}\n", w.service, sluicetest.PodNamespace, w.addr, family, name, w.port)
		}
	}
	p.Apply(t, "services.yaml", yaml.String())
	p.server = p.Pod(t, "server", sluicetest.PodSpec{})
	p.client = p.Pod(t, "client", sluicetest.PodSpec{})
	for _, w := range all {
		p.client.WaitService(t, w.service, w.port, 1)
	}
	return p
}

// through runs an application through both sidecars and compares with its
// direct result.
func (p *pair) through(t *testing.T, m *machine, a app, w way, direct result) row {
	t.Helper()
	stop := m.serve(t, a, p.server.Namespace, w.port)
	before := p.count(t, w)
	out, took := m.client(t, a, p.client.Namespace, w.addr, w.port)
	stop()
	if diff := cmp.Diff(direct.out, out); diff != "" {
		t.Errorf("through the sidecars the client prints something else (- direct, + through):\n%s", diff)
	}
	passed := p.count(t, w).since(before)
	if passed.clientEnvoy < a.connections || passed.serverEnvoy == 0 {
		t.Errorf("%d connections through the client's Envoy, %d through the server's; want at least %d",
			passed.clientEnvoy, passed.serverEnvoy, a.connections)
	}
	// The agent also counts a connection that its client gives up before Envoy has
	// looked at it, and a SYN that is sent again.
	if passed.clientAgent < passed.clientEnvoy || passed.serverAgent < passed.serverEnvoy {
		t.Errorf("the agent counted %d and %d redirected connections at client and server, the Envoys %d and %d",
			passed.clientAgent, passed.serverAgent, passed.clientEnvoy, passed.serverEnvoy)
	}
	return row{
		app: a.name, backend: p.backend, port: w.name, direct: direct.took, through: took,
		clientEnvoy: passed.clientEnvoy, serverEnvoy: passed.serverEnvoy, note: p.taken(t, a, w, passed),
	}
}

// Counts are connections of one way, seen by those who should see them.
type counts struct {
	clientEnvoy, serverEnvoy, clientAgent, serverAgent uint64
}

func (c counts) since(before counts) counts {
	return counts{
		c.clientEnvoy - before.clientEnvoy, c.serverEnvoy - before.serverEnvoy,
		c.clientAgent - before.clientAgent, c.serverAgent - before.serverAgent,
	}
}

func (p *pair) count(t *testing.T, w way) counts {
	t.Helper()
	return counts{
		clientEnvoy: p.client.Stat(t, fmt.Sprintf(`^listener\.out/%s/%s/%d\.downstream_cx_total$`, sluicetest.PodNamespace, w.service, w.port)),
		serverEnvoy: p.server.Stat(t, fmt.Sprintf(`^listener\.in/%d\.downstream_cx_total$`, w.port)),
		clientAgent: uint64(p.Connections(t, `pod="client"`, `direction="outbound"`, `verdict="redirected"`)),
		serverAgent: uint64(p.Connections(t, `pod="server"`, `direction="inbound"`, `verdict="redirected"`)),
	}
}

// taken checks by the access logs what the sidecars took the connections for,
// and says what is worth a note. What speaks HTTP on a port that is looked at may
// be taken for TCP if the client says nothing for 100 ms, though never all of it.
func (p *pair) taken(t *testing.T, a app, w way, passed counts) string {
	t.Helper()
	notes := []string{"all " + a.chain}
	if a.serverFirst && !w.known {
		notes = append(notes, "the server speaks first: each connection waits 2 x 100 ms")
	}
	for _, side := range []struct {
		name, cluster string
		pod           *sluicetest.Pod
		connections   uint64
	}{
		{"client", fmt.Sprintf("out/%s/%s/%d", sluicetest.PodNamespace, w.service, w.port), p.client, passed.clientEnvoy},
		{"server", fmt.Sprintf("in/%d", w.port), p.server, passed.serverEnvoy},
	} {
		chains := map[string]uint64{}
		sluicetest.Eventually(t, func() bool {
			clear(chains)
			for line := range strings.Lines(side.pod.Envoy.AccessLog()) {
				var l struct{ Chain, Cluster string }
				if json.Unmarshal([]byte(line), &l) == nil && l.Cluster == side.cluster { // a line may be half written
					chains[l.Chain]++
				}
			}
			// TCP has a line for each connection, HTTP for each request.
			return chains["http"] > 0 || chains["tcp"] >= side.connections
		}, func() string {
			return fmt.Sprintf("the %s's Envoy has logged %v of %d connections", side.name, chains, side.connections)
		})
		right, all := chains[a.chain], uint64(0)
		for _, n := range chains {
			all += n
		}
		switch {
		case right == all:
		case a.chain == "http" && !w.known && right > 0:
			notes[0] = "http"
			notes = append(notes, fmt.Sprintf("%s's Envoy took %d of %d for TCP", side.name, all-right, all))
		default:
			t.Errorf("the %s's Envoy took %v connections and requests for what they are not, want %s", side.name, chains, a.chain)
		}
	}
	return strings.Join(notes, "; ")
}

// show prints the table; the columns of the Envoys are connections.
func show(rows []row) {
	w := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "\napplication\tbackend\tport\tdirect\tthrough Envoys\tclient's Envoy\tserver's Envoy\tnote")
	for _, r := range rows {
		fmt.Fprintf(w, "%s\t%s\t%s\t%.2f s\t%.2f s\t%d\t%d\t%s\n", r.app, r.backend, r.port,
			r.direct.Seconds(), r.through.Seconds(), r.clientEnvoy, r.serverEnvoy, r.note)
	}
	_ = w.Flush()
}
