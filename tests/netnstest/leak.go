package netnstest

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// leakDeadline is how long things may take to go after the last test: the
// kernel frees namespaces and sockets in the background.
const leakDeadline = 5 * time.Second

// VerifyNoLeaks runs the tests and returns the exit code for TestMain. It is 1
// if they leave a namespace, a child process, an open descriptor, a link or
// routing rule of the machine, or a mount. Temporary files of the tests are in
// a directory of this process, which goes with it. When the process is
// interrupted, it removes what the tests have made before it ends.
func VerifyNoLeaks(m *testing.M) int {
	temp := os.TempDir()
	own := tempDir(temp, os.Getpid())
	err := sweep(temp)
	if err == nil {
		// Envoy's user needs to get through it.
		err = errors.Join(os.Mkdir(own, 0o755), os.Setenv("TMPDIR", own))
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "before the tests:", err)
		return 1
	}
	defer func() {
		if err := removeTemp(own); err != nil {
			fmt.Fprintln(os.Stderr, "remove temporary files:", err)
		}
	}()
	interrupted := make(chan os.Signal, 1)
	signal.Notify(interrupted, os.Interrupt, unix.SIGTERM, unix.SIGHUP)
	go func() { // until the process ends
		<-interrupted
		err := errors.Join(endProcesses(isChild), discard(temp, os.Getpid()))
		fmt.Fprintln(os.Stderr, "interrupted; what the tests have made was removed, errors:", err)
		os.Exit(1)
	}()
	before, err := processState(own)
	if err != nil {
		fmt.Fprintln(os.Stderr, "read state before the tests:", err)
		return 1
	}
	code := m.Run()
	var diff string
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for deadline := time.Now().Add(leakDeadline); ; <-tick.C {
		runtime.GC() // closes what only a finalizer closes
		after, err := processState(own)
		if err != nil {
			fmt.Fprintln(os.Stderr, "read state after the tests:", err)
			return 1
		}
		// What goes during the tests was another process's; what comes is a leak.
		after = slices.DeleteFunc(after, func(s string) bool { return slices.Contains(before, s) })
		diff = strings.Join(after, "\n")
		if diff == "" {
			return code
		}
		if time.Now().After(deadline) {
			break
		}
	}
	fmt.Fprintln(os.Stderr, "the tests leave behind:\n"+diff)
	return 1
}

func processState(temp string) ([]string, error) {
	state, err := linkState()
	if err != nil {
		return nil, err
	}
	own, err := filepath.Glob(filepath.Join(runDir, prefix(os.Getpid())+"*"))
	if err != nil {
		return nil, err
	}
	for _, p := range own {
		state = append(state, "namespace "+p)
	}
	points, err := mounts(temp)
	if err != nil {
		return nil, err
	}
	for _, point := range points {
		state = append(state, "mount "+point)
	}
	pids, err := children()
	if err != nil {
		return nil, err
	}
	for _, pid := range pids {
		state = append(state, "child process "+pid)
	}
	fds, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return nil, err
	}
	for _, fd := range fds {
		target, err := os.Readlink(filepath.Join("/proc/self/fd", fd.Name()))
		// Go's poller and the directory that is just being read are no leaks.
		if err != nil || strings.HasPrefix(target, "anon_inode:[event") || strings.HasPrefix(target, "anon_inode:[pidfd]") || strings.HasPrefix(target, "/proc/") {
			continue
		}
		state = append(state, fmt.Sprintf("descriptor %s: %s", fd.Name(), target))
	}
	return state, nil
}

// children lists the processes that this one has started.
func children() ([]string, error) {
	files, err := filepath.Glob("/proc/self/task/*/children")
	if err != nil {
		return nil, err
	}
	var pids []string
	for _, f := range files {
		b, err := os.ReadFile(f)
		if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ESRCH) {
			continue // a thread that has just ended
		}
		if err != nil {
			return nil, err
		}
		pids = append(pids, strings.Fields(string(b))...)
	}
	return pids, nil
}

func isChild(pid string) bool {
	pids, err := children()
	return err == nil && slices.Contains(pids, pid)
}

// linkState lists links and routing rules of the current namespace.
func linkState() ([]string, error) {
	var state []string
	links, err := netlink.LinkList()
	if err != nil {
		return nil, fmt.Errorf("list links: %w", err)
	}
	for _, l := range links {
		state = append(state, "link "+l.Attrs().Name)
	}
	for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
		rules, err := netlink.RuleList(family)
		if err != nil {
			return nil, fmt.Errorf("list routing rules: %w", err)
		}
		for _, r := range rules {
			state = append(state, fmt.Sprintf("rule of family %d: %s", family, r))
		}
	}
	return state, nil
}

// A State is what redirection may change in a namespace, one thing a line,
// sorted.
type State []string

// State reads the namespace's links, addresses, routes, routing rules, qdiscs,
// packet filter rules of both iptables variants, and listening sockets. Empty
// built-in chains do not count: they change nothing, and taking the last one of
// a table away would end the NAT of established connections.
func (ns Namespace) State(tb testing.TB) State {
	tb.Helper()
	var s State
	err := ns.Do(func() error {
		h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
		if err != nil {
			return fmt.Errorf("open rtnetlink: %w", err)
		}
		defer h.Close()
		links, err := h.LinkList()
		if err != nil {
			return fmt.Errorf("list links: %w", err)
		}
		for _, l := range links {
			s = append(s, "link "+l.Attrs().Name)
			qdiscs, err := h.QdiscList(l)
			if err != nil {
				return fmt.Errorf("list qdiscs: %w", err)
			}
			for _, q := range qdiscs {
				s = append(s, fmt.Sprintf("qdisc %s on %s", q.Type(), l.Attrs().Name))
			}
		}
		for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
			addrs, err := h.AddrList(nil, family)
			if err != nil {
				return fmt.Errorf("list addresses: %w", err)
			}
			for _, a := range addrs {
				if !a.IP.IsLinkLocalUnicast() {
					s = append(s, "address "+a.IPNet.String())
				}
			}
			routes, err := h.RouteListFiltered(family, &netlink.Route{}, netlink.RT_FILTER_TABLE)
			if err != nil {
				return fmt.Errorf("list routes: %w", err)
			}
			for _, r := range routes {
				if r.Dst == nil || !r.Dst.IP.IsLinkLocalUnicast() && !r.Dst.IP.IsMulticast() {
					s = append(s, fmt.Sprintf("route table %d: %s", r.Table, r))
				}
			}
			rules, err := h.RuleList(family)
			if err != nil {
				return fmt.Errorf("list routing rules: %w", err)
			}
			for _, r := range rules {
				s = append(s, fmt.Sprintf("routing rule %s", r))
			}
		}
		listeners, err := listening()
		if err != nil {
			return err
		}
		s = append(s, listeners...)
		return nil
	})
	if err != nil {
		tb.Fatalf("read state of %s: %v", ns.Name, err)
	}
	for _, tool := range []string{"iptables-nft-save", "ip6tables-nft-save", "iptables-legacy-save", "ip6tables-legacy-save"} {
		s = append(s, ns.rules(tb, tool)...)
	}
	slices.Sort(s)
	return s
}

func (ns Namespace) rules(tb testing.TB, tool string) []string {
	tb.Helper()
	path, err := exec.LookPath(tool)
	if err != nil {
		return nil // without the tool the test cannot have made such rules
	}
	out, err := ns.Command(tb, 0, path).CombinedOutput()
	if err != nil {
		tb.Fatalf("run %s in %s: %v\n%s", tool, ns.Name, err, out)
	}
	var rules []string
	for line := range strings.Lines(string(out)) {
		line = strings.TrimSpace(line)
		builtin := strings.HasPrefix(line, ":") && !strings.Contains(line, " - [")
		if strings.HasPrefix(line, "-A") || strings.HasPrefix(line, ":") && !builtin {
			line, _, _ = strings.Cut(line, " [")
			rules = append(rules, tool+" "+line)
		}
	}
	return rules
}

// listening lists TCP listeners and unix sockets with a name.
func listening() ([]string, error) {
	var s []string
	for _, file := range []string{"tcp", "tcp6"} {
		b, err := os.ReadFile("/proc/thread-self/net/" + file)
		if err != nil {
			return nil, err
		}
		for line := range strings.Lines(string(b)) {
			if f := strings.Fields(line); len(f) > 3 && f[3] == "0A" {
				s = append(s, "listener "+file+" "+f[1])
			}
		}
	}
	b, err := os.ReadFile("/proc/thread-self/net/unix")
	if err != nil {
		return nil, err
	}
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); len(f) == 8 && f[0] != "Num" {
			s = append(s, "unix socket "+f[7])
		}
	}
	return s, nil
}

// Diff returns how b differs from a, "" if it does not.
func (s State) Diff(b State) string { return cmp.Diff(s, b) }
