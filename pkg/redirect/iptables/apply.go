package iptables

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/sluicemesh/sluice/pkg/redirect"
	"github.com/sluicemesh/sluice/pkg/redirect/netns"
)

// The variants of iptables: its own kernel interface, or that of nftables.
const (
	VariantNFT    = "nft"
	VariantLegacy = "legacy"
)

// localTimeout bounds the wait for the local route of a new address, which comes
// within some 100 us; localPoll is how often to look.
const (
	localTimeout = 10 * time.Second
	localPoll    = 50 * time.Microsecond
)

// A tool is iptables-restore and iptables-save of one variant and family.
type tool struct {
	variant       string
	v4            bool
	restore, save string
	// lock replaces the lock file that all users of legacy on the machine
	// share: what they do in other namespaces is no reason to wait. Empty leaves
	// it in place, for the namespace that they work in.
	lock string
	// noCgroups is why rules cannot match a path of cgroup v2; nil if they can.
	noCgroups error
}

// familyName is what the family's programs are called.
func familyName(v4 bool) string {
	if v4 {
		return "iptables"
	}
	return "ip6tables"
}

// findTool looks for the programs of a variant with look, which is lookPath
// but in tests.
func findTool(look func(string) (string, error), variant string, v4 bool, lock string) (tool, error) {
	name := familyName(v4) + "-" + variant
	restore, err := look(name + "-restore")
	if err != nil {
		return tool{}, fmt.Errorf("find program %s-restore: %w", name, redirect.ErrNotSupported)
	}
	save, err := look(name + "-save")
	if err != nil {
		return tool{}, fmt.Errorf("find program %s-save: %w", name, redirect.ErrNotSupported)
	}
	return tool{variant: variant, v4: v4, restore: restore, save: save, lock: lock}, nil
}

// lookPath is exec.LookPath that also finds what only root has in PATH.
func lookPath(name string) (string, error) {
	if p, err := exec.LookPath(name); err == nil {
		return p, nil
	}
	return exec.LookPath(filepath.Join("/usr/sbin", name))
}

// probe applies the rules of a pod in a namespace that lives only as long as
// iptables-restore, because only that shows that the kernel has all of it.
func (t tool) probe(ctx context.Context, proxyCgroup string) error {
	addr := netip.MustParseAddr("192.0.2.1")
	if !t.v4 {
		addr = netip.MustParseAddr("2001:db8::1")
	}
	w := redirect.Workload{Addrs: []netip.Addr{addr}, Interfaces: []string{"eth0"}, Policy: redirect.DefaultPolicy(), ProxyCgroup: proxyCgroup}
	cmd := t.restoreCommand(ctx, installText(tables(w, addr, netip.Addr{}), nil))
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET}
	if _, err := run(cmd); err != nil {
		return fmt.Errorf("try rules with %s %s: %w: %w", familyName(t.v4), t.variant, redirect.ErrNotSupported, err)
	}
	return nil
}

// probeCgroups is probe for rules that tell the proxy by its cgroup. This
// process' own is there for sure, whatever its cgroup namespace.
func (t tool) probeCgroups(ctx context.Context) error {
	b, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return fmt.Errorf("find own cgroup: %w", err)
	}
	for line := range strings.Lines(string(b)) {
		if path, ok := strings.CutPrefix(strings.TrimSuffix(line, "\n"), "0::"); ok {
			return t.probe(ctx, path)
		}
	}
	return fmt.Errorf("this process is in no cgroup of v2: %w", redirect.ErrNotSupported)
}

// read returns what is in the namespace that the calling thread is in.
func (t tool) read(ctx context.Context) (s saved, foreign bool, err error) {
	if t.variant == VariantLegacy && !legacyTables(t.v4) {
		return nil, false, nil
	}
	out, err := run(t.command(ctx, t.save, "--counters"))
	if err != nil {
		return nil, false, fmt.Errorf("read rules: %w", err)
	}
	return parseSaved(out)
}

// legacyTables says whether there may be legacy tables in the namespace that the
// calling thread is in: a file tells it without a program.
func legacyTables(v4 bool) bool {
	path := "/proc/thread-self/net/ip_tables_names"
	if !v4 {
		path = "/proc/thread-self/net/ip6_tables_names"
	}
	b, err := os.ReadFile(path)
	switch {
	case errors.Is(err, os.ErrNotExist):
		return false // the kernel has not loaded them
	case errors.Is(err, os.ErrPermission):
		// The file belongs to the root of the pod's own user namespace, and who
		// may not read it can neither have made tables there, nor does his program.
		return false
	}
	return err != nil || len(b) > 0
}

// apply runs text in the namespace that the calling thread is in. Each table
// of it changes in one step or not at all.
func (t tool) apply(ctx context.Context, text string) error {
	if _, err := run(t.restoreCommand(ctx, text)); err != nil {
		return fmt.Errorf("apply rules: %w", err)
	}
	return nil
}

func (t tool) restoreCommand(ctx context.Context, text string) *exec.Cmd {
	args := []string{"--noflush", "--counters"}
	if t.variant == VariantLegacy {
		args = append(args, "--wait") // for the lock, as long as ctx allows
	}
	cmd := t.command(ctx, t.restore, args...)
	cmd.Stdin = strings.NewReader(text)
	return cmd
}

func (t tool) command(ctx context.Context, name string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Env = append(os.Environ(), "LC_ALL=C")
	if t.lock != "" {
		cmd.Env = append(cmd.Env, "XTABLES_LOCKFILE="+t.lock)
	}
	return cmd
}

// run returns what cmd prints. A child takes the namespace of the thread that
// starts it.
func run(cmd *exec.Cmd) (string, error) {
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		if msg := strings.Join(strings.Fields(stderr.String()), " "); msg != "" {
			err = fmt.Errorf("%w: %s", err, msg)
		}
		return "", fmt.Errorf("run %s: %w", filepath.Base(cmd.Path), err)
	}
	return stdout.String(), nil
}

// draining says whether connections of a family that were led to the proxy live
// on in the namespace of the calling thread.
func draining(v4 bool) (bool, error) {
	// The list below takes milliseconds even where it is short: the kernel looks
	// for the namespace's sockets among those of the whole machine.
	if any, err := netns.HasTCP(v4); err != nil || !any {
		return false, err
	}
	path := "/proc/thread-self/net/tcp"
	if !v4 {
		path += "6"
	}
	b, err := os.ReadFile(path)
	if errors.Is(err, os.ErrNotExist) {
		return false, nil // no IPv6 here
	}
	if err != nil {
		return false, fmt.Errorf("list connections: %w", err)
	}
	// REDIRECT leads what the pod dials to loopback. A connection to 15001 of
	// another address came there without it: of the backend that took over.
	loopback := hexWords(netip.MustParseAddr("127.0.0.1"))
	if !v4 {
		loopback = hexWords(netip.IPv6Loopback())
	}
	out, in := fmt.Sprintf("%s:%04X", loopback, redirect.OutboundPort), fmt.Sprintf(":%04X", redirect.InboundPort)
	for line := range strings.Lines(string(b)) {
		// number, local address, remote address, state
		f := strings.Fields(line)
		if len(f) < 4 || f[1] != out && !strings.HasSuffix(f[1], in) {
			continue
		}
		const timeWait, closed, listen = "06", "07", "0A"
		if f[3] != timeWait && f[3] != closed && f[3] != listen {
			return true, nil
		}
	}
	return false, nil
}

// hexWords returns an address as the kernel prints it: words of 32 bits in the
// host's byte order.
func hexWords(a netip.Addr) string {
	var s strings.Builder
	for word := range slices.Chunk(a.AsSlice(), 4) {
		fmt.Fprintf(&s, "%08X", binary.NativeEndian.Uint32(word))
	}
	return s.String()
}

// proxySource is the address from which Envoy hands IPv6 connections to the
// app. Of IPv4's loopback range every address is there without further ado.
func proxySource() *netlink.Addr {
	addr := netip.MustParseAddr("::6")
	return &netlink.Addr{
		IPNet: &net.IPNet{IP: addr.AsSlice(), Mask: bytes.Repeat([]byte{0xff}, 16)},
		Flags: unix.IFA_F_NODAD,
	}
}

// leadsTo says whether what the namespace of the calling thread sends to addr
// leaves by one of the interfaces.
func leadsTo(addr netip.Addr, interfaces []string) (bool, error) {
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return false, fmt.Errorf("open rtnetlink: %w", err)
	}
	defer h.Close()
	routes, err := h.RouteGet(addr.AsSlice())
	if err != nil || len(routes) == 0 {
		return false, nil //nolint:nilerr // there is no route
	}
	link, err := h.LinkByIndex(routes[0].LinkIndex)
	if err != nil {
		return false, fmt.Errorf("find interface of the route to %s: %w", addr, err)
	}
	return slices.Contains(interfaces, link.Attrs().Name), nil
}

// haveInterfaces returns an error that names the first interface that is not in
// the namespace of the calling thread: rules that go by its name match nothing.
func haveInterfaces(names []string) error {
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return fmt.Errorf("open rtnetlink: %w", err)
	}
	defer h.Close()
	for _, name := range names {
		if _, err := h.LinkByName(name); err != nil {
			return fmt.Errorf("find interface %s: %w", name, err)
		}
	}
	return nil
}

// onLoopback runs fn with lo of the namespace at path.
func onLoopback(path string, fn func(*netlink.Handle, netlink.Link) error) error {
	return netns.Do(path, func() error {
		h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
		if err != nil {
			return fmt.Errorf("open rtnetlink: %w", err)
		}
		defer h.Close()
		lo, err := h.LinkByName("lo")
		if err != nil {
			return fmt.Errorf("find link lo: %w", err)
		}
		return fn(h, lo)
	})
}

// addProxySource makes sure that lo has the address.
func addProxySource(ctx context.Context, path string) error {
	return onLoopback(path, func(h *netlink.Handle, lo netlink.Link) error {
		err := h.AddrAdd(lo, proxySource())
		if errors.Is(err, unix.EEXIST) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("add address ::6 to lo: %w", err)
		}
		return waitLocal(ctx, h)
	})
}

// waitLocal waits until the kernel delivers to ::6. The local route comes from
// a work queue after the address; a connection in between would stall until
// its SYN is sent again, a second later.
func waitLocal(ctx context.Context, h *netlink.Handle) error {
	ctx, cancel := context.WithTimeout(ctx, localTimeout)
	defer cancel()
	tick := time.NewTicker(localPoll)
	defer tick.Stop()
	local := &netlink.Route{Table: unix.RT_TABLE_LOCAL, Dst: proxySource().IPNet}
	for {
		routes, err := h.RouteListFiltered(unix.AF_INET6, local, netlink.RT_FILTER_TABLE|netlink.RT_FILTER_DST)
		if err != nil {
			return fmt.Errorf("list local routes: %w", err)
		}
		if len(routes) > 0 {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("wait for local route to ::6: %w", ctx.Err())
		case <-tick.C:
		}
	}
}

func removeProxySource(path string) error {
	return onLoopback(path, func(h *netlink.Handle, lo netlink.Link) error {
		if err := h.AddrDel(lo, proxySource()); err != nil && !errors.Is(err, unix.EADDRNOTAVAIL) {
			return fmt.Errorf("remove address ::6 from lo: %w", err)
		}
		return nil
	})
}

func hasProxySource(path string) (has bool, err error) {
	err = onLoopback(path, func(h *netlink.Handle, lo netlink.Link) error {
		addrs, err := h.AddrList(lo, unix.AF_INET6)
		if err != nil {
			return fmt.Errorf("list addresses of lo: %w", err)
		}
		for _, a := range addrs {
			has = has || a.IP.Equal(proxySource().IP)
		}
		return nil
	})
	return has, err
}
