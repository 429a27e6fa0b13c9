// Command snapshot prints, as sorted lines, what of a node Sluice might change:
// run before an installation and after its removal, on the node, the two outputs
// are the same.
//
// It shows the CNI directories, bpffs, /run, network namespaces with their links,
// addresses, packet filter rules, qdiscs and eBPF programs, the eBPF programs of
// all cgroups, and Sluice's processes. It changes nothing, and shows no counters.
//
// What cannot be looked at ends it with an error: a snapshot that lacks a part
// would hide what is left there.
package main

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

func main() {
	confDir := flag.String("cni-conf-dir", "/etc/cni/net.d", "`directory` of CNI configurations")
	binDir := flag.String("cni-bin-dir", "/opt/cni/bin", "`directory` of CNI plugins")
	cgroup := flag.String("cgroup", "/sys/fs/cgroup", "root of the cgroup v2 hierarchy")
	flag.Parse()
	s := snapshot{}
	err := errors.Join(
		s.tree(*confDir, true), s.tree(*binDir, true), s.tree("/sys/fs/bpf", false),
		s.tree("/run/sluice", false), s.names("/run", "/run/netns"),
		s.cgroups(*cgroup), s.processes(), s.mounts(), s.networks(),
	)
	slices.Sort(s.lines)
	for _, l := range s.lines {
		fmt.Println(l)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "snapshot:", err)
		os.Exit(1)
	}
}

type snapshot struct{ lines []string }

func (s *snapshot) add(format string, a ...any) { s.lines = append(s.lines, fmt.Sprintf(format, a...)) }

// tree adds everything below dir, with what is in the files.
func (s *snapshot) tree(dir string, content bool) error {
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		line := fmt.Sprintf("file %s %v", path, info.Mode())
		if content && info.Mode().IsRegular() {
			b, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			line += fmt.Sprintf(" %x", sha256.Sum256(b))
		}
		s.add("%s", line)
		return nil
	})
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// names adds what is in the directories.
func (s *snapshot) names(dirs ...string) error {
	for _, dir := range dirs {
		entries, err := os.ReadDir(dir)
		if err != nil {
			return err
		}
		for _, e := range entries {
			s.add("name %s", filepath.Join(dir, e.Name()))
		}
	}
	return nil
}

// cgroups adds the programs of each cgroup.
func (s *snapshot) cgroups(root string) error {
	types := []ebpf.AttachType{
		ebpf.AttachCGroupInetIngress, ebpf.AttachCGroupInetEgress, ebpf.AttachCGroupInetSockCreate, ebpf.AttachCGroupSockOps,
		ebpf.AttachCGroupInet4Bind, ebpf.AttachCGroupInet6Bind, ebpf.AttachCGroupInet4Connect, ebpf.AttachCGroupInet6Connect,
		ebpf.AttachCGroupGetsockopt, ebpf.AttachCGroupSetsockopt, ebpf.AttachCgroupInet4GetPeername, ebpf.AttachCgroupInet6GetPeername,
		ebpf.AttachCGroupUDP4Sendmsg, ebpf.AttachCGroupUDP6Sendmsg, ebpf.AttachCgroupInet4GetSockname, ebpf.AttachCgroupInet6GetSockname,
	}
	return filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil // ended meanwhile
		}
		if err != nil || !d.IsDir() {
			return err
		}
		f, err := os.Open(path)
		if err != nil {
			return nil //nolint:nilerr // ended meanwhile
		}
		defer func() { _ = f.Close() }()
		for _, t := range types {
			r, err := link.QueryPrograms(link.QueryOptions{Target: int(f.Fd()), Attach: t})
			if errors.Is(err, unix.EINVAL) || errors.Is(err, ebpf.ErrNotSupported) {
				continue // a type that this kernel does not have
			}
			if err != nil {
				return fmt.Errorf("query %v of cgroup %s: %w", t, path, err)
			}
			if len(r.Programs) > 0 {
				s.add("cgroup %s %v: %s", path, t, programs(r))
			}
		}
		return nil
	})
}

// programs names programs; numbers differ from one time to the next.
func programs(r *link.QueryResult) string {
	var names []string
	for _, p := range r.Programs {
		name := "?"
		if prog, err := ebpf.NewProgramFromID(p.ID); err == nil {
			if info, err := prog.Info(); err == nil {
				name = info.Name
			}
			_ = prog.Close()
		}
		names = append(names, name)
	}
	return strings.Join(names, " ")
}

func (s *snapshot) processes() error {
	all, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		return err
	}
	for _, path := range all {
		b, err := os.ReadFile(path)
		if err != nil {
			continue // ended meanwhile
		}
		if name, _, _ := bytes.Cut(b, []byte{0}); strings.HasPrefix(filepath.Base(string(name)), "sluice") {
			s.add("process %s", bytes.ReplaceAll(bytes.Trim(b, "\x00"), []byte{0}, []byte(" ")))
		}
	}
	return nil
}

func (s *snapshot) mounts() error {
	b, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		return err
	}
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); f[2] == "bpf" || f[2] == "cgroup2" || strings.Contains(f[1], "sluice") {
			s.add("mount %s", strings.TrimSpace(line))
		}
	}
	return nil
}

// networks adds the node's network and those in /run/netns.
func (s *snapshot) networks() error {
	// Threads that were in another namespace are not used again.
	runtime.LockOSThread()
	if err := s.network("node"); err != nil {
		return err
	}
	paths, err := filepath.Glob("/run/netns/*")
	if err != nil {
		return err
	}
	for _, path := range paths {
		f, err := os.Open(path)
		if err != nil {
			continue // ended meanwhile
		}
		err = unix.Setns(int(f.Fd()), unix.CLONE_NEWNET)
		_ = f.Close()
		if errors.Is(err, unix.EINVAL) {
			continue // a file without a namespace
		}
		if err != nil {
			return fmt.Errorf("enter %s: %w", path, err)
		}
		if err := s.network(path); err != nil {
			return fmt.Errorf("network %s: %w", path, err)
		}
	}
	return nil
}

// comments of iptables-save, and the counters of chains.
var volatile = regexp.MustCompile(`(?m)^#.*\n| \[\d+:\d+\]$`)

// network adds what is in the namespace of the calling thread.
func (s *snapshot) network(name string) error {
	if err := s.links(name); err != nil {
		return err
	}
	self, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		return err
	}
	defer func() { _ = self.Close() }()
	r, err := link.QueryPrograms(link.QueryOptions{Target: int(self.Fd()), Attach: ebpf.AttachSkLookup})
	if err != nil {
		return fmt.Errorf("query sk_lookup: %w", err)
	}
	if len(r.Programs) > 0 {
		s.add("net %s sk_lookup: %s", name, programs(r))
	}
	for _, save := range []string{"iptables-legacy-save", "ip6tables-legacy-save"} {
		// An unloaded table has no rules, and asking would load it.
		if b, err := os.ReadFile("/proc/thread-self/net/" + map[bool]string{true: "ip6_tables_names", false: "ip_tables_names"}[save[2] == '6']); err != nil || len(b) == 0 {
			continue
		}
		if err := s.rules(name, save); err != nil {
			return err
		}
	}
	return s.rules(name, "nft", "--stateless", "list", "ruleset")
}

func (s *snapshot) rules(name, program string, args ...string) error {
	out, err := exec.Command(program, args...).Output()
	if err != nil {
		return fmt.Errorf("run %s: %w", program, err)
	}
	// Blocks stay together: their lines mean nothing alone.
	s.add("net %s %s:\n%s", name, program, volatile.ReplaceAllString(string(out), ""))
	return nil
}

func (s *snapshot) links(name string) error {
	all, err := netlink.LinkList()
	if err != nil {
		return err
	}
	for _, l := range all {
		s.add("net %s link %s %s", name, l.Attrs().Name, l.Type())
		addrs, err := netlink.AddrList(l, netlink.FAMILY_ALL)
		if err != nil {
			return err
		}
		for _, a := range addrs {
			s.add("net %s link %s address %s", name, l.Attrs().Name, a.IPNet)
		}
		qdiscs, err := netlink.QdiscList(l)
		if err != nil {
			return err
		}
		for _, q := range qdiscs {
			s.add("net %s link %s qdisc %s", name, l.Attrs().Name, q.Type())
		}
		for _, parent := range []uint32{netlink.HANDLE_MIN_INGRESS, netlink.HANDLE_MIN_EGRESS} {
			filters, err := netlink.FilterList(l, parent)
			if err != nil {
				continue // no clsact
			}
			for _, f := range filters {
				s.add("net %s link %s filter %s %#x", name, l.Attrs().Name, f.Type(), f.Attrs().Handle)
			}
		}
		for _, t := range []ebpf.AttachType{ebpf.AttachTCXIngress, ebpf.AttachTCXEgress} {
			r, err := link.QueryPrograms(link.QueryOptions{Target: l.Attrs().Index, Attach: t})
			if errors.Is(err, unix.EINVAL) || errors.Is(err, ebpf.ErrNotSupported) {
				continue // before Linux 6.6
			}
			if err != nil {
				return fmt.Errorf("query %v of link %s: %w", t, l.Attrs().Name, err)
			}
			if len(r.Programs) > 0 {
				s.add("net %s link %s %v: %s", name, l.Attrs().Name, t, programs(r))
			}
		}
	}
	return nil
}
