package bpf

import (
	"context"
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/features"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/sluicemesh/sluice/pkg/redirect/redirecttest"
	"github.com/sluicemesh/sluice/tests/netnstest"
)

// A foreign is a program of somebody else that writes down what it has seen.
type foreign struct {
	prog *ebpf.Program
	seen *ebpf.Map
}

// newForeign loads a program of a type that stores what the load instruction
// leaves in R3 and returns verdict.
func newForeign(t *testing.T, spec *ebpf.ProgramSpec, load asm.Instructions, verdict int32) foreign {
	t.Helper()
	seen, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.Array, KeySize: 4, ValueSize: 4, MaxEntries: 1})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = seen.Close() })
	spec.License = "GPL"
	spec.Instructions = append(load,
		asm.LoadMapValue(asm.R2, seen.FD(), 0),
		asm.StoreMem(asm.R2, 0, asm.R3, asm.Word),
		asm.Mov.Imm(asm.R0, verdict),
		asm.Return())
	prog, err := ebpf.NewProgram(spec)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = prog.Close() })
	return foreign{prog, seen}
}

// connectWatcher sees the port that a connection goes to, when its turn comes.
func connectWatcher(t *testing.T, verdict int32) foreign {
	const userPort = 24 // in struct bpf_sock_addr
	return newForeign(t, &ebpf.ProgramSpec{Type: ebpf.CGroupSockAddr, AttachType: ebpf.AttachCGroupInet4Connect},
		asm.Instructions{asm.LoadMem(asm.R3, asm.R1, userPort, asm.Word)}, verdict)
}

// packetWatcher sees that a packet comes by.
func packetWatcher(t *testing.T, verdict int32) foreign {
	return newForeign(t, &ebpf.ProgramSpec{Type: ebpf.SchedCLS}, asm.Instructions{asm.Mov.Imm(asm.R3, 1)}, verdict)
}

// take returns what was seen last, and forgets it.
func (f foreign) take(t *testing.T) uint32 {
	t.Helper()
	var v uint32
	if err := errors.Join(f.seen.Lookup(uint32(0), &v), f.seen.Put(uint32(0), uint32(0))); err != nil {
		t.Fatal(err)
	}
	return v
}

func bigEndianPort(v uint32) uint16 { return uint16(v)<<8 | uint16(v)>>8 }

// TestOthersOnCgroupHook: programs of others on the same hook of the same
// cgroup run as well, in the order in which they came, and keep their say.
func TestOthersOnCgroupHook(t *testing.T) {
	o := newOptions(t)
	o.Cgroup = netnstest.NewCgroup(t)
	pods := filepath.Join(o.Cgroup, "kubepods")
	node := netnstest.NewNode(t)
	pod, peer := node.Pod(t, "pod"), node.Pod(t, "peer")
	app := redirecttest.StartDialer(t, pod.Namespace, filepath.Join(pods, "pod1"))
	proxy(t, pod)
	to := netip.AddrPortFrom(peer.Addr4, 80)
	attach := func(f foreign) link.Link {
		t.Helper()
		l, err := link.AttachCgroup(link.CgroupOptions{Path: pods, Attach: ebpf.AttachCGroupInet4Connect, Program: f.prog})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = l.Close() })
		return l
	}
	before, after := connectWatcher(t, 1), connectWatcher(t, 1)
	attach(before)
	r := open(t, o)
	defer func() { _ = r.Close() }()
	mustAdd(t, r, workload(t, pod))
	attach(after)
	for _, when := range []string{"attached", "taken over"} {
		if got, err := app.Ask(to); err != nil || got != "proxy" {
			t.Fatalf("%s: %q answers, %v; want the proxy", when, got, err)
		}
		if got := bigEndianPort(before.take(t)); got != to.Port() {
			t.Errorf("%s: who came first sees port %d, want %d", when, got, to.Port())
		}
		if got := bigEndianPort(after.take(t)); got != 15001 {
			t.Errorf("%s: who came last sees port %d, want 15001", when, got)
		}
		if err := r.Close(); err != nil {
			t.Fatal(err)
		}
		r = open(t, o)
	}
	deny := attach(connectWatcher(t, 0))
	if got, err := app.Ask(to); err == nil || !strings.Contains(err.Error(), "operation not permitted") {
		t.Errorf("who denies is not heard: %q answers, %v", got, err)
	}
	if err := deny.Close(); err != nil {
		t.Fatal(err)
	}
	if n, err := count(t.Context(), r.store.Handover); err != nil || n != 0 {
		t.Errorf("%d handover entries are left, %v", n, err)
	}
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	if err := Uninstall(t.Context(), o); err != nil {
		t.Fatal(err)
	}
	if got, err := app.Ask(to); err == nil {
		t.Errorf("%q answers where nobody listens", got)
	}
	if got := [2]uint16{bigEndianPort(before.take(t)), bigEndianPort(after.take(t))}; got != [2]uint16{to.Port(), to.Port()} {
		t.Errorf("after uninstall the others see ports %v", got)
	}
}

// TestExclusiveCgroupHook: beside who admits nobody Sluice cannot be; it says
// so and leaves him alone.
func TestExclusiveCgroupHook(t *testing.T) {
	o := newOptions(t)
	o.Cgroup = netnstest.NewCgroup(t)
	f := connectWatcher(t, 1)
	dir, err := os.Open(o.Cgroup)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = dir.Close() }()
	at := link.RawAttachProgramOptions{Target: int(dir.Fd()), Program: f.prog, Attach: ebpf.AttachCGroupInet4Connect}
	if err := link.RawAttachProgram(at); err != nil {
		t.Fatal(err)
	}
	_, err = New(o)
	if err == nil || !strings.Contains(err.Error(), "connect4 to cgroup "+o.Cgroup+": another program is there") {
		t.Errorf("New() = %v, want an error that names hook, cgroup and cause", err)
	}
	if err := link.RawDetachProgram(link.RawDetachProgramOptions{Target: at.Target, Program: f.prog, Attach: at.Attach}); err != nil {
		t.Fatalf("the other's program: %v", err)
	}
	if err := open(t, o).Close(); err != nil {
		t.Error(err)
	}
}

// TestOthersOnInterface: filters of others on the pod's interface, of any kind
// and priority, and tcx programs before and after, see what they saw without
// Sluice, and stay when it goes.
func TestOthersOnInterface(t *testing.T) {
	tcx, err := features.LinuxVersionCode()
	if err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		name  string
		qdisc netlink.Qdisc
		// others come before Sluice where early is set, else after it.
		filter func(ifindex int, f foreign) netlink.Filter
		tcx    bool
		early  bool
		// blind means that Sluice's filter has decided nothing that others must see.
		blind bool
	}{
		{name: "bpf filter first", early: true, filter: bpfFilter(1, 1)},
		{name: "bpf filter behind, same priority", filter: bpfFilter(1, filterHandle+1)},
		{name: "bpf filter behind", filter: bpfFilter(7, 1)},
		{name: "filter of another kind, same priority", early: true, blind: true, filter: u32Filter(1)},
		{name: "ingress qdisc", early: true, qdisc: &netlink.Ingress{}, filter: bpfFilter(3, 1)},
		{name: "tcx first", early: true, tcx: true},
		{name: "tcx behind", tcx: true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if tc.tcx && tcx < 6<<16|6<<8 {
				t.Logf("this kernel has no tcx")
				return
			}
			o := newOptions(t)
			pod, peer := newPair(t)
			f := packetWatcher(t, unspecified)
			install := func() {
				t.Helper()
				err := within(pod.Netns, func(h inside) error {
					eth0, err := h.LinkByName("eth0")
					if err != nil {
						return err
					}
					index := eth0.Attrs().Index
					if tc.tcx {
						l, err := link.AttachTCX(link.TCXOptions{Interface: index, Program: f.prog, Attach: ebpf.AttachTCXIngress})
						if err == nil {
							t.Cleanup(func() { _ = l.Close() })
						}
						return err
					}
					qdisc := netlink.Qdisc(clsact(index))
					if tc.qdisc != nil {
						qdisc = tc.qdisc
						*qdisc.Attrs() = netlink.QdiscAttrs{LinkIndex: index, Parent: netlink.HANDLE_INGRESS, Handle: netlink.MakeHandle(0xffff, 0)}
					}
					if err := h.QdiscAdd(qdisc); err != nil && !errors.Is(err, unix.EEXIST) {
						return err
					}
					return h.FilterAdd(tc.filter(index, f))
				})
				if err != nil {
					t.Fatal(err)
				}
			}
			var state netnstest.State
			if tc.early {
				install()
				state = pod.State(t)
			}
			r := open(t, o)
			defer func() { _ = r.Close() }()
			w := workload(t, pod)
			mustAdd(t, r, w)
			if !tc.early {
				install()
			}
			for _, when := range []string{"added", "taken over", "removed"} {
				want := "proxy"
				switch when {
				case "taken over":
					if err := r.Close(); err != nil {
						t.Fatal(err)
					}
					r = open(t, o)
					if list, err := r.List(t.Context()); err != nil || len(list) != 1 || list[0].Problem != nil {
						t.Errorf("%s: List() = %v, %v", when, list, err)
					}
				case "removed":
					if err := r.Remove(t.Context(), w.ID); err != nil {
						t.Fatal(err)
					}
					want = "app"
				}
				wantName(t, peer.Namespace, app(pod), want)
				if got := f.take(t); got != 1 && !tc.blind {
					t.Errorf("%s: the other's program sees nothing", when)
				}
			}
			err := within(pod.Netns, func(h inside) error {
				eth0, err := h.LinkByName("eth0")
				if err != nil {
					return err
				}
				own, others, err := h.filters(eth0)
				if len(own) != 0 || others == 0 && !tc.tcx {
					t.Errorf("after Remove %d filters of Sluice and %d others are left", len(own), others)
				}
				return err
			})
			if err != nil {
				t.Fatal(err)
			}
			if tc.early {
				if diff := state.Diff(pod.State(t)); diff != "" {
					t.Errorf("the namespace is not as before:\n%s", diff)
				}
			}
		})
	}
}

// TestPassedByOthers: where a tcx program of somebody else has the last word, so
// that Sluice's filter sees nothing, nobody gets past the proxy all the same.
func TestPassedByOthers(t *testing.T) {
	version, err := features.LinuxVersionCode()
	if err != nil {
		t.Fatal(err)
	}
	if version < 6<<16|6<<8 {
		t.Log("this kernel has no tcx")
		return
	}
	o := newOptions(t)
	pod, peer := newPair(t)
	r := open(t, o)
	defer func() { _ = r.Close() }()
	mustAdd(t, r, workload(t, pod))
	const pass = 0 // TCX_PASS
	var other link.Link
	err = within(pod.Netns, func(h inside) error {
		eth0, err := h.LinkByName("eth0")
		if err == nil {
			other, err = link.AttachTCX(link.TCXOptions{
				Interface: eth0.Attrs().Index, Program: packetWatcher(t, pass).prog, Attach: ebpf.AttachTCXIngress,
			})
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 1500*time.Millisecond)
	defer cancel()
	if a, err := peer.Ask(ctx, app(pod)); err == nil {
		t.Errorf("%q answers before the proxy was seen to listen", a.Name)
	}
	if err := other.Close(); err != nil {
		t.Fatal(err)
	}
	wantName(t, peer.Namespace, app(pod), "proxy")
}

// unspecified lets a packet go on to the next program (TC_ACT_UNSPEC).
const unspecified = -1

func bpfFilter(priority uint16, handle uint32) func(int, foreign) netlink.Filter {
	return func(ifindex int, f foreign) netlink.Filter {
		return &netlink.BpfFilter{FilterAttrs: netlink.FilterAttrs{
			LinkIndex: ifindex, Parent: netlink.HANDLE_MIN_INGRESS, Handle: handle, Priority: priority, Protocol: unix.ETH_P_ALL,
		}, Fd: f.prog.FD(), Name: "other", DirectAction: true}
	}
}

// u32Filter is of a kind of its own; it matches nothing here.
func u32Filter(priority uint16) func(int, foreign) netlink.Filter {
	return func(ifindex int, _ foreign) netlink.Filter {
		const source = 12 // in an IPv4 header
		return &netlink.U32{FilterAttrs: netlink.FilterAttrs{
			LinkIndex: ifindex, Parent: netlink.HANDLE_MIN_INGRESS, Priority: priority, Protocol: unix.ETH_P_ALL,
		}, ClassId: 1, Sel: &netlink.TcU32Sel{
			Flags: netlink.TC_U32_TERMINAL, Nkeys: 1, Keys: []netlink.TcU32Key{{Mask: 0xffffffff, Val: 0xcb007101, Off: source}},
		}}
	}
}
