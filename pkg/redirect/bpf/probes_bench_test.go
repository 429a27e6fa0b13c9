package bpf

import (
	"encoding/binary"
	"net/netip"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/sluicemesh/sluice/tests/netnstest"
)

// BenchmarkIngress shows what a SYN into a pod costs in tcx: captured, exempt
// as the kubelet's, and not looked at that far. Nobody listens, so a captured
// one ends with the look for the proxy's listener.
func BenchmarkIngress(b *testing.B) {
	o := newOptions(b)
	node := netnstest.NewNode(b)
	r := open(b, o)
	defer func() { _ = r.Close() }()
	pod := node.Pod(b, "pod")
	mustAdd(b, r, workload(b, pod))
	client := netip.MustParseAddrPort("10.88.0.1:40000")
	for _, bench := range []struct {
		name  string
		port  uint16
		probe bool
	}{{"captured", 80, false}, {"exempt", 81, true}, {"health port", 15021, false}} {
		b.Run(bench.name, func(b *testing.B) {
			to := netip.AddrPortFrom(pod.Addr4, bench.port)
			if bench.probe {
				k := redirectSlProbeKey{Client: redirectSlAddr{Byte: client.Addr().As16()}, Pod: redirectSlAddr{Byte: to.Addr().As16()}}
				k.ClientPortBe, k.PodPortBe = swap(client.Port()), swap(to.Port())
				if err := r.store.Probes.Update(&k, uint32(1), ebpf.UpdateAny); err != nil {
					b.Fatal(err)
				}
			}
			verdict, perRun, err := r.programs.SlIngress.Benchmark(synPacket(client, to), b.N, b.ResetTimer)
			if err != nil {
				b.Fatal(err)
			}
			const next, drop = 0xffffffff, 2
			if want := map[bool]uint32{true: drop, false: next}[bench.name == "captured"]; verdict != want {
				b.Fatalf("verdict %d, want %d", verdict, want)
			}
			b.ReportMetric(float64(perRun.Nanoseconds()), "ns/verdict")
			b.ReportMetric(0, "ns/op")
		})
	}
}

func swap(port uint16) uint16 { return port<<8 | port>>8 }

// synPacket returns an Ethernet frame with a SYN.
func synPacket(from, to netip.AddrPort) []byte {
	p := make([]byte, 14+20+20)
	binary.BigEndian.PutUint16(p[12:], unix.ETH_P_IP)
	ip, tcp := p[14:], p[34:]
	ip[0], ip[8], ip[9] = 0x45, 64, unix.IPPROTO_TCP
	binary.BigEndian.PutUint16(ip[2:], 40)
	copy(ip[12:], from.Addr().AsSlice())
	copy(ip[16:], to.Addr().AsSlice())
	binary.BigEndian.PutUint16(tcp, from.Port())
	binary.BigEndian.PutUint16(tcp[2:], to.Port())
	tcp[12], tcp[13] = 5<<4, 2 // no options, SYN
	return p
}

// BenchmarkHostConnect shows what the programs cost a process of the node for
// one connection that is refused, to a pod and elsewhere.
func BenchmarkHostConnect(b *testing.B) {
	o := newOptions(b)
	node := netnstest.NewNode(b)
	o.HostNetns, o.Cgroup = node.Netns, netnstest.NewCgroup(b)
	r := open(b, o)
	defer func() { _ = r.Close() }()
	pod := node.Pod(b, "pod")
	mustAdd(b, r, workload(b, pod))
	startIn(b, node, o.Cgroup, "kubepods/pod1")
	if err := r.knowPods(true); err != nil {
		b.Fatal(err)
	}
	kubelet := startIn(b, node, o.Cgroup, "system.slice/kubelet.service")
	other := node.Pod(b, "other")
	stop, err := ebpf.EnableStats(unix.BPF_STATS_RUN_TIME)
	if err != nil {
		b.Fatal(err)
	}
	defer func() { _ = stop.Close() }()
	for name, to := range map[string]netip.AddrPort{
		"pod": netip.AddrPortFrom(pod.Addr4, 9), "elsewhere": netip.AddrPortFrom(other.Addr4, 9),
	} {
		b.Run(name, func(b *testing.B) {
			before := map[string]time.Duration{}
			programs := map[string]*ebpf.Program{"connect": r.programs.SlHost4, "sockops": r.programs.SlSockops}
			for name, p := range programs {
				before[name] = runtimeOf(b, p)
			}
			if err := kubelet.Abandon(to, b.N); err != nil {
				b.Fatal(err)
			}
			for name, p := range programs {
				b.ReportMetric(float64((runtimeOf(b, p)-before[name]).Nanoseconds())/float64(b.N), name+"-ns/conn")
			}
		})
	}
}

func runtimeOf(b *testing.B, p *ebpf.Program) time.Duration {
	b.Helper()
	s, err := p.Stats()
	if err != nil {
		b.Fatal(err)
	}
	return s.Runtime
}
