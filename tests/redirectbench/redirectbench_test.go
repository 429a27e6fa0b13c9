package redirectbench

import (
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/sluicemesh/sluice/pkg/redirect/bpf/paircheck"
	"github.com/sluicemesh/sluice/tests/need"
	"github.com/sluicemesh/sluice/tests/netnstest"
	"github.com/sluicemesh/sluice/tests/redirectbench/load"
)

// loadEnv is set in the processes that are the ends of the traffic.
const loadEnv = "REDIRECTBENCH_LOAD"

// TestMain is also the ends of the traffic, and the child that tries acceleration.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == "paircheck" {
		if err := paircheck.Child(os.Stdin, os.Stdout); err != nil {
			fmt.Fprintln(os.Stderr, "paircheck:", err)
			os.Exit(1)
		}
		return
	}
	if os.Getenv(loadEnv) != "" {
		os.Exit(load.Run(os.Args[1:], os.Stdin, os.Stdout))
	}
	os.Exit(netnstest.VerifyNoLeaks(m))
}

var (
	nRounds = flag.Int("rounds", 1, "how often all modes take their turn")
	limit   = flag.Duration("limit", 10*time.Minute, "time after which a part begins no other round")
	scale   = flag.Float64("scale", 0.01, "what is done in a turn, of the usual counts")
	pods    = flag.String("pods", "3", "numbers of redirected pods on the node, rising, separated by commas")
	open    = flag.Int("open", 20, "connections that are open besides, in one part")
	short   = flag.Int("short-connections", 200, "short connections that SYNs sent again are looked for in")
	only    = flag.String("modes", "", "modes to measure, separated by commas; empty: all")
	parts   = flag.String("parts", "all,pods,open,short,programs", "what to measure, separated by commas")
)

// TestRedirect prints the tables.
func TestRedirect(t *testing.T) {
	need.Root(t)
	need.EBPF(t)
	need.Envoy(t)
	need.Tool(t, "iptables-restore")
	n := newNode(t)
	fmt.Printf("\n%s; %s; scale %g\n\n", conditions(t), n.cores, *scale)
	for part := range strings.SplitSeq(*parts, ",") {
		switch part {
		case "all":
			n.turns(t, "2 pods", n.chosen(false), all)
		case "connect": // the finest of the goals: many connections, and nothing else
			n.turns(t, "2 pods, connections alone", n.chosen(false), all[:1])
		case "pods":
			for number := range strings.SplitSeq(*pods, ",") {
				count, err := strconv.Atoi(number)
				if err != nil {
					t.Fatalf("read number of pods: %v", err)
				}
				n.fill(t, count)
				n.turns(t, fmt.Sprintf("%d pods", count), n.chosen(true), brief)
			}
			n.others = nil
		case "open":
			n.openTurns(t)
		case "short":
			n.short(t)
		case "programs":
			n.programs(t)
		default:
			t.Fatalf("there is no part %q", part)
		}
		n.printEvents()
		fmt.Printf("%s: then %s\n\n", part, conditions(t))
		if t.Failed() {
			t.FailNow()
		}
	}
}

// turns has each of the modes measured once in each round.
func (n *node) turns(t *testing.T, title string, modes []mode, measures []measure) {
	t.Helper()
	s, begin, rounds := newSamples(), time.Now(), 0
	for round := range *nRounds {
		if time.Since(begin) > *limit {
			break
		}
		rounds++
		// What comes and goes with a mode makes work for the kernel in the
		// background: what is measured right after which mode is changed.
		order := rand.New(rand.NewPCG(uint64(round), 0))
		for _, i := range order.Perm(len(modes)) {
			m := modes[i]
			n.in(t, m, func() {
				n.warmUp(t, m)
				turn := measures // in the first round as the tables have them
				if round > 0 {
					turn = shuffled(order, measures)
				}
				for _, me := range turn {
					s.add(m.name, me.run(t, n, m.way, count(me.n)))
				}
			})
		}
	}
	s.print(fmt.Sprintf("%s, %d rounds", title, rounds))
}

// shuffled puts measures in another order, but for those that have a place.
func shuffled(order *rand.Rand, measures []measure) []measure {
	all := slices.Clone(measures)
	first, last := 0, len(all)
	for first < last && all[first].placed {
		first++
	}
	for last > first && all[last-1].placed {
		last--
	}
	some := all[first:last]
	order.Shuffle(len(some), func(i, j int) { some[i], some[j] = some[j], some[i] })
	return all
}

func count(n int) int { return max(1, int(float64(n)**scale)) }

// warmUp passes all that a first connection of a mode meets alone.
func (n *node) warmUp(t *testing.T, m mode) {
	t.Helper()
	n.call(t, load.Request{Op: "connect", Addrs: n.addrs(m.way, load.Echo), N: count(1000), Size: 64})
	n.call(t, load.Request{Op: "round", Addrs: n.addrs(m.way, load.Echo), N: count(1000), Size: 64})
	n.call(t, load.Request{Op: "http", Addrs: n.addrs(m.way, load.HTTP), N: 16, Parallel: 16})
}

// openTurns is turns with connections open besides.
func (n *node) openTurns(t *testing.T) {
	t.Helper()
	// Two descriptors each, and some that are Envoy's own.
	number := min(*open, n.descriptors/2-100)
	if number < *open {
		fmt.Printf("%d connections instead of %d: this user may have %d descriptors in a process\n\n", number, *open, n.descriptors)
	}
	hold := measure{n: 1, placed: true, run: func(t *testing.T, n *node, w way, _ int) []figure {
		t.Helper()
		res := n.call(t, load.Request{Op: "hold", Addrs: n.addrs(w, load.Echo), N: number})
		return []figure{{kindTail, fmt.Sprintf("opening %d connections, each", number), "us", false, us(res.Elapsed) / float64(number)}}
	}}
	release := measure{n: 1, placed: true, run: func(t *testing.T, n *node, w way, _ int) []figure {
		t.Helper()
		n.call(t, load.Request{Op: "release", Addrs: n.addrs(w, load.Echo), N: 1})
		return nil
	}}
	n.turns(t, fmt.Sprintf("%d open connections", number), n.chosen(true), slices.Concat([]measure{hold}, brief, []measure{release}))
}

// short makes many connections, to two ports in turn, that the server ends at
// once, and counts what had to be sent twice.
func (n *node) short(t *testing.T) {
	t.Helper()
	rows := [][]string{{fmt.Sprintf("%d short connections", *short), "SYNs sent again, both pods", "segments sent again, client", "took 0.5 s or longer", "p50, us", "p99, us", "all, s"}}
	for _, m := range n.chosen(true) {
		n.in(t, m, func() {
			before := n.synsResent(t)
			res := n.call(t, load.Request{Op: "hello", Addrs: n.addrs(m.way, load.Hello, load.Hello2), N: *short})
			syns := n.synsResent(t) - before
			verdict := ""
			if m.name == modeEBPF {
				verdict = map[bool]string{true: " met", false: " missed"}[syns == 0]
			}
			rows = append(rows, []string{
				m.name, strconv.Itoa(syns) + verdict, strconv.Itoa(res.Resent), strconv.Itoa(res.Slow),
				number(us(res.P50)), number(us(res.P99)), number(res.Elapsed.Seconds()),
			})
		})
	}
	printTable(rows)
}
