package bpf

import (
	"encoding/binary"
	"math/rand/v2"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/sluicemesh/sluice/pkg/redirect"
	"github.com/sluicemesh/sluice/tests/need"
)

// TestReasons holds the enum in C and its names together.
func TestReasons(t *testing.T) {
	seen := make(map[reason]bool)
	for i, r := range reasons() {
		if r.name == "" || seen[r] {
			t.Errorf("reason %d has no name of its own: %+v", i, r)
		}
		seen[r] = true
	}
}

// TestVerdict compares the verdict of the programs with the meaning of Policy,
// written down once more in want.
func TestVerdict(t *testing.T) {
	need.EBPF(t)
	seed := uint64(time.Now().UnixNano())
	if s := os.Getenv("TEST_SEED"); s != "" {
		var err error
		if seed, err = strconv.ParseUint(s, 10, 64); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("TEST_SEED=%d", seed)
	rnd := rand.New(rand.NewPCG(seed, 0))

	s, prog := loadVerdictProgram(t)
	seen := make(map[redirectSlReason]int)

	// Other pods' policies in the same maps must not matter.
	if _, err := s.writePolicy(compile(randomPolicy(rnd, 500, 200), nil)); err != nil {
		t.Fatal(err)
	}
	for range 150 {
		w := redirect.Workload{Addrs: randomAddrs(rnd), Policy: randomPolicy(rnd, 12, 8)}
		routes := randomRoutes(rnd)
		table := compile(w.Policy, routes)
		policy, err := s.writePolicy(table)
		if err != nil {
			t.Fatal(err)
		}
		pod := redirectSlPod{
			Policy: policy, ProxyUid: w.Policy.ProxyUID,
			OutPort: table.outPort, OutAddr4: table.outAddr4, OutAddr6: table.outAddr6, InPort: table.inPort,
		}
		pod.ExcludedIf[0], pod.ExcludedIf[1] = 7, 9
		for _, a := range w.Addrs {
			pod.setAddr(a)
		}
		cookie := rnd.Uint64()
		if err := s.Pods.Put(cookie, &pod); err != nil {
			t.Fatal(err)
		}
		for range 150 {
			d := randomDial(rnd, w)
			got, err := prog.SlVerdict.Run(&ebpf.RunOptions{Data: d.question(t, cookie)})
			if err != nil {
				t.Fatal(err)
			}
			seen[redirectSlReason(got)]++
			if want := d.want(w, routes); redirectSlReason(got) != want {
				t.Fatalf("policy %+v\nroutes %+v\naddrs %v\ndial %+v:\ngot %+v, want %+v",
					w.Policy, routes, w.Addrs, d, reasons()[got], reasons()[want])
			}
		}
		if err := s.Pods.Delete(cookie); err != nil {
			t.Fatal(err)
		}
		if err := s.deletePolicy(policy, table.entries()); err != nil {
			t.Fatal(err)
		}
	}
	if len(seen) != 16 {
		t.Errorf("the random connections met %d of 16 reasons: %v", len(seen), seen)
	}
	if err := s.purge(); err != nil {
		t.Fatal(err)
	}
	for _, m := range []*ebpf.Map{s.Ports, s.Cidrs} {
		if n, err := count(t.Context(), m); err != nil || n != 0 {
			t.Errorf("after purge %s has %d entries, %v", m, n, err)
		}
	}
}

// loadVerdictProgram loads maps, and the program that asks the policy in them.
func loadVerdictProgram(tb testing.TB) (*store, *verdictPrograms) {
	tb.Helper()
	spec, err := prepare(0)
	if err != nil {
		tb.Fatal(err)
	}
	s, prog := new(store), new(verdictPrograms)
	if err := spec.LoadAndAssign(&s.redirectMaps, nil); err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { _ = s.Close() })
	verdict, err := loadVerdict()
	if err != nil {
		tb.Fatal(err)
	}
	replace := map[string]*ebpf.Map{
		redirectMapPods: s.Pods, redirectMapPorts: s.Ports, redirectMapCidrs: s.Cidrs,
	}
	if err := verdict.LoadAndAssign(prog, &ebpf.CollectionOptions{MapReplacements: replace}); err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { _ = prog.Close() })
	return s, prog
}

// BenchmarkVerdict shows what a policy's size costs an outbound connection.
func BenchmarkVerdict(b *testing.B) {
	need.EBPF(b)
	large := redirect.DefaultPolicy()
	for i := range 500 {
		p := netip.PrefixFrom(netip.AddrFrom4([4]byte{10, byte(i), byte(i >> 4), 0}), 24)
		large.Outbound.ExcludeCIDRs.List = append(large.Outbound.ExcludeCIDRs.List, p)
	}
	for port := range uint16(200) {
		large.Outbound.ExcludePorts.List = append(large.Outbound.ExcludePorts.List, 1000+port)
	}
	for _, bm := range []struct {
		name   string
		policy redirect.Policy
	}{{"default", redirect.DefaultPolicy()}, {"500CIDRs200ports", large}} {
		b.Run(bm.name, func(b *testing.B) {
			s, prog := loadVerdictProgram(b)
			table := compile(bm.policy, nil)
			policy, err := s.writePolicy(table)
			if err != nil {
				b.Fatal(err)
			}
			pod := redirectSlPod{Policy: policy, ProxyUid: bm.policy.ProxyUID, OutAddr4: table.outAddr4}
			pod.setAddr(netip.MustParseAddr("192.0.2.1"))
			if err := s.Pods.Put(uint64(1), &pod); err != nil {
				b.Fatal(err)
			}
			d := dial{dst: netip.MustParseAddr("10.9.255.1"), src: netip.IPv6Unspecified(), port: 80}
			got, perRun, err := prog.SlVerdict.Benchmark(d.question(b, 1), b.N, b.ResetTimer)
			if err != nil || redirectSlReason(got) != redirectSlReasonSL_OUT_CAPTURED {
				b.Fatalf("got %d, %v", got, err)
			}
			b.ReportMetric(float64(perRun.Nanoseconds()), "ns/verdict")
		})
	}
}

// A dial is a connection that the policy is asked about.
type dial struct {
	direction redirectSlDirection
	dst, src  netip.Addr
	port      uint16
	uid, mark uint32
	boundIf   uint32
	outsider  bool
}

// question is what the verdict program takes for d.
func (d dial) question(tb testing.TB, cookie uint64) []byte {
	tb.Helper()
	q := verdictSlQuestion{Netns: cookie, Direction: uint32(d.direction)}
	q.Dial.Dst.Byte, q.Dial.Src.Byte = d.dst.As16(), d.src.As16()
	q.Dial.Uid, q.Dial.Mark, q.Dial.BoundIf, q.Dial.Port = d.uid, d.mark, d.boundIf, d.port
	if d.outsider {
		q.Dial.Outsider = 1
	}
	b, err := binary.Append(nil, binary.NativeEndian, &q)
	if err != nil {
		tb.Fatal(err)
	}
	return b
}

// want says what the comments of redirect.Policy mean for d.
func (d dial) want(w redirect.Workload, routes []route) redirectSlReason {
	has := func(p redirect.Ports, port uint16) bool { return p.All || slices.Contains(p.List, port) }
	holds := func(c redirect.CIDRs) bool {
		return c.All || slices.ContainsFunc(c.List, func(p netip.Prefix) bool { return p.Contains(d.dst) })
	}
	inbound := func() redirectSlReason {
		switch {
		case d.port == redirect.InboundPort, d.port == redirect.OutboundPort:
			return redirectSlReasonSL_IN_PROXY_PORT
		case d.port == redirect.HealthPort:
			return redirectSlReasonSL_IN_HEALTH_PORT
		case has(w.Policy.Inbound.ExcludePorts, d.port):
			return redirectSlReasonSL_IN_EXCLUDED_PORT
		case has(w.Policy.Inbound.IncludePorts, d.port):
			return redirectSlReasonSL_IN_CAPTURED
		}
		return redirectSlReasonSL_IN_NOT_INCLUDED
	}
	if d.direction == redirectSlDirectionSL_INBOUND {
		return inbound()
	}
	proxy := d.uid == w.Policy.ProxyUID && !d.outsider
	own := slices.Contains(w.Addrs, d.dst)
	loopback := d.dst.IsLoopback() || d.dst.IsUnspecified() || d.dst == netip.MustParseAddr("::6")
	if (own || loopback) && d.port == redirect.AdminPort && !proxy && d.mark != AgentMark {
		return redirectSlReasonSL_OUT_ADMIN_PORT
	}
	if loopback {
		return redirectSlReasonSL_OUT_LOOPBACK
	}
	if proxy {
		fromProxy := d.src == netip.MustParseAddr("127.0.0.6") || d.src == netip.MustParseAddr("::6")
		if own && !fromProxy && d.port != redirect.AdminPort && inbound() == redirectSlReasonSL_IN_CAPTURED {
			return redirectSlReasonSL_OUT_SELF_CALL
		}
		return redirectSlReasonSL_OUT_PROXY
	}
	if own {
		return redirectSlReasonSL_OUT_OWN_ADDRESS
	}
	if !slices.ContainsFunc(w.Addrs, func(a netip.Addr) bool { return a.Is4() == d.dst.Is4() }) {
		return redirectSlReasonSL_OUT_NO_ADDRESS
	}
	best, out := -1, false
	for _, r := range routes {
		if r.to.Contains(d.dst) && r.to.Bits() > best {
			best, out = r.to.Bits(), r.excluded
		}
	}
	o := w.Policy.Outbound
	switch {
	case d.boundIf == 7, d.boundIf == 9:
		return redirectSlReasonSL_OUT_EXCLUDED_INTERFACE
	case has(o.ExcludePorts, d.port):
		return redirectSlReasonSL_OUT_EXCLUDED_PORT
	case holds(o.ExcludeCIDRs), out:
		return redirectSlReasonSL_OUT_EXCLUDED_CIDR
	case has(o.IncludePorts, d.port), holds(o.IncludeCIDRs):
		return redirectSlReasonSL_OUT_CAPTURED
	}
	return redirectSlReasonSL_OUT_NOT_INCLUDED
}

// The random values come from small sets, so that they meet.

func randomAddr(rnd *rand.Rand) netip.Addr {
	if rnd.IntN(2) == 0 {
		return netip.AddrFrom4([4]byte{10, byte(rnd.IntN(2)), byte(rnd.IntN(3)), byte(rnd.IntN(3))})
	}
	a := netip.MustParseAddr("fd00::").As16()
	a[1], a[8], a[15] = byte(rnd.IntN(2)), byte(rnd.IntN(2)), byte(rnd.IntN(3))
	return netip.AddrFrom16(a)
}

func randomAddrs(rnd *rand.Rand) []netip.Addr {
	all := []netip.Addr{netip.MustParseAddr("10.1.2.2"), netip.MustParseAddr("fd01::1:0:0:2")}
	return [][]netip.Addr{all, all[:1], all[1:]}[rnd.IntN(3)]
}

func randomPort(rnd *rand.Rand) uint16 {
	special := []uint16{80, 443, 8080, redirect.AdminPort, redirect.OutboundPort, redirect.InboundPort, redirect.HealthPort}
	if rnd.IntN(2) == 0 {
		return special[rnd.IntN(len(special))]
	}
	return uint16(1 + rnd.IntN(12))
}

func randomPrefix(rnd *rand.Rand) netip.Prefix {
	a := randomAddr(rnd)
	bits := []int{0, 8, 15, 16, 23, 24, 31, 32}
	if a.Is6() {
		bits = []int{0, 8, 16, 64, 65, 72, 96, 127, 128}
	}
	return netip.PrefixFrom(a, bits[rnd.IntN(len(bits))]).Masked()
}

func randomPorts(rnd *rand.Rand, n int) (p redirect.Ports) {
	if rnd.IntN(6) == 0 {
		return redirect.Ports{All: true}
	}
	for range rnd.IntN(n) {
		p.List = append(p.List, randomPort(rnd))
	}
	return p
}

func randomCIDRs(rnd *rand.Rand, n, all int) (c redirect.CIDRs) {
	if rnd.IntN(all) == 0 {
		return redirect.CIDRs{All: true}
	}
	for range rnd.IntN(n) {
		c.List = append(c.List, randomPrefix(rnd))
	}
	return c
}

func randomPolicy(rnd *rand.Rand, cidrs, ports int) redirect.Policy {
	return redirect.Policy{
		ProxyUID: redirect.DefaultProxyUID,
		Outbound: redirect.OutboundPolicy{
			IncludePorts: randomPorts(rnd, ports), ExcludePorts: randomPorts(rnd, ports),
			IncludeCIDRs: randomCIDRs(rnd, cidrs, 2), ExcludeCIDRs: randomCIDRs(rnd, cidrs, 12),
		},
		Inbound: redirect.InboundPolicy{IncludePorts: randomPorts(rnd, ports), ExcludePorts: randomPorts(rnd, ports)},
	}
}

func randomRoutes(rnd *rand.Rand) []route {
	if rnd.IntN(2) == 0 {
		return nil
	}
	var routes []route
	for range rnd.IntN(6) {
		r := route{to: randomPrefix(rnd), excluded: rnd.IntN(3) == 0}
		if !slices.ContainsFunc(routes, func(have route) bool { return have.to == r.to }) {
			routes = append(routes, r)
		}
	}
	return routes
}

func randomDial(rnd *rand.Rand, w redirect.Workload) dial {
	pick := func(all ...netip.Addr) netip.Addr { return all[rnd.IntN(len(all))] }
	d := dial{
		direction: []redirectSlDirection{redirectSlDirectionSL_OUTBOUND, redirectSlDirectionSL_INBOUND}[rnd.IntN(2)],
		dst:       randomAddr(rnd), src: netip.IPv6Unspecified(), port: randomPort(rnd),
		uid:      []uint32{0, 1000, redirect.DefaultProxyUID}[rnd.IntN(3)],
		outsider: rnd.IntN(4) == 0,
	}
	switch rnd.IntN(6) {
	case 0:
		d.dst = pick(w.Addrs...)
	case 1:
		d.dst = pick(netip.MustParseAddr("127.0.0.1"), netip.MustParseAddr("127.9.9.9"), netip.IPv4Unspecified(),
			netip.IPv6Unspecified(), netip.IPv6Loopback(), netip.MustParseAddr("::6"))
	}
	switch rnd.IntN(4) {
	case 0:
		d.src = pick(netip.MustParseAddr("127.0.0.6"), netip.MustParseAddr("::6"))
	case 1:
		d.src = pick(w.Addrs...)
	}
	if rnd.IntN(3) == 0 {
		d.mark = AgentMark
	}
	d.boundIf = []uint32{0, 0, 0, 2, 7, 9}[rnd.IntN(6)]
	return d
}

// TestCIDRKey shows that IPv4 and IPv6 prefixes do not meet.
func TestCIDRKey(t *testing.T) {
	for prefix, want := range map[string]redirectSlCidrKey{
		"10.0.0.0/8": {Prefixlen: 200, Family: unix.AF_INET, Policy: 5},
		"0.0.0.0/0":  {Prefixlen: 192, Family: unix.AF_INET, Policy: 5},
		"::/0":       {Prefixlen: 96, Family: unix.AF_INET6, Policy: 5},
		"fd00::/128": {Prefixlen: 224, Family: unix.AF_INET6, Policy: 5},
	} {
		p := netip.MustParsePrefix(prefix)
		want.Addr.Byte = p.Addr().As16()
		if got := *cidrKey(5, p); got != want {
			t.Errorf("%s: got %+v, want %+v", prefix, got, want)
		}
	}
}
