package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/sluicemesh/sluice/pkg/redirect/netns"
)

// runHost is the part of the demo that stays in the machine's own namespace: it
// makes the node, runs the rest in it, and whatever becomes of that, cleans up
// and compares the machine before and after.
func runHost(ctx context.Context, o options) (err error) {
	if err := o.check(); err != nil {
		return err
	}
	out := newPrinter(os.Stdout)
	lock, err := os.OpenFile(lockFile, os.O_CREATE|os.O_RDWR|syscall.O_CLOEXEC, 0o600)
	if err != nil {
		return fmt.Errorf("open lock: %w", err)
	}
	defer func() { err = errors.Join(err, removeLock(), lock.Close()) }()
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return errors.New("another demo is running")
	}
	if _, err := os.Stat(keptFile); err == nil {
		return errors.New("a demo that was to be kept is still running; make demo-clean ends it")
	}
	if left := leftovers(); len(left) > 0 {
		out.note("an earlier demo left %s: removing it", strings.Join(left, ", "))
		if err := clean(o); err != nil {
			return err
		}
	}
	before, err := snapshot()
	if err != nil {
		return err
	}
	for _, dir := range []string{stateDir, filepath.Join(stateDir, "log"), filepath.Join(stateDir, "bpf")} {
		if err := os.Mkdir(dir, 0o755); err != nil {
			return fmt.Errorf("make state directory: %w", err)
		}
	}
	kept := false
	defer func() {
		if kept {
			return
		}
		if err != nil && ctx.Err() == nil {
			err = errors.Join(err, showLogs(out))
		}
		err = errors.Join(err, clean(o))
		after, snapErr := snapshot()
		if err = errors.Join(err, snapErr); snapErr == nil {
			err = errors.Join(err, out.compare("the machine", before, after))
		}
		if err == nil {
			out.done("done: everything above was as it should be")
		}
	}()
	if err := unix.Mount("sluice-demo", filepath.Join(stateDir, "bpf"), "bpf", 0, "mode=0700"); err != nil {
		return fmt.Errorf("mount a bpffs on %s/bpf: %w", stateDir, err)
	}
	if err := newNetns(nodeName); err != nil {
		return err
	}
	// From here on the demo is inside the node; a signal reaches it too, and
	// this process waits until it has put its things in order.
	var cmd *exec.Cmd
	err = netns.Do(netnsPath(nodeName), func() error {
		args := []string{"node", "--backend=" + o.backend}
		if o.keep {
			args = append(args, "--keep")
		}
		cmd = exec.CommandContext(ctx, o.self, args...)
		cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
		cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
		cmd.WaitDelay = time.Minute
		return cmd.Start()
	})
	if err != nil {
		return fmt.Errorf("start inside the node: %w", err)
	}
	if err := cmd.Wait(); err != nil {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		return errors.New("the demo did not run to its end (see above)")
	}
	if kept = o.keep; kept {
		if err := os.WriteFile(keptFile, nil, 0o644); err != nil {
			return fmt.Errorf("note that the demo is kept: %w", err)
		}
	}
	return nil
}

// showLogs prints the end of every log, before cleaning up removes them.
func showLogs(out *printer) error {
	files, err := filepath.Glob(filepath.Join(stateDir, "log", "*"))
	if err != nil {
		return err
	}
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil {
			return fmt.Errorf("read log: %w", err)
		}
		lines := slices.DeleteFunc(strings.Split(strings.TrimSpace(string(b)), "\n"), func(l string) bool {
			return l == "" || l[0] == '{' // an entry of an access log
		})
		if len(lines) == 0 {
			continue
		}
		out.note("end of %s:", f)
		for _, l := range lines[max(0, len(lines)-15):] {
			out.line("    %.400s", l)
		}
	}
	return nil
}

// lockFile keeps a second demo away. It outlives one that is killed.
const lockFile = "/run/sluice-demo.lock"

func removeLock() error {
	if err := os.Remove(lockFile); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}

// keptFile tells a demo that was to be kept from one that was killed.
const keptFile = stateDir + "/kept"

func netnsPath(name string) string { return filepath.Join(netnsDir, name) }

// newNetns makes a network namespace with a name, as "ip netns add" does.
func newNetns(name string) error {
	if err := os.MkdirAll(netnsDir, 0o755); err != nil {
		return fmt.Errorf("make %s: %w", netnsDir, err)
	}
	f, err := os.OpenFile(netnsPath(name), os.O_CREATE|os.O_EXCL|os.O_RDONLY, 0)
	if err != nil {
		return fmt.Errorf("make network namespace %s: %w", name, err)
	}
	if err := f.Close(); err != nil {
		return fmt.Errorf("make network namespace %s: %w", name, err)
	}
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends with its namespace
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			done <- fmt.Errorf("make network namespace %s: %w", name, err)
			return
		}
		own := fmt.Sprintf("/proc/self/task/%d/ns/net", unix.Gettid())
		if err := unix.Mount(own, netnsPath(name), "", unix.MS_BIND, ""); err != nil {
			done <- fmt.Errorf("name network namespace %s: %w", name, err)
			return
		}
		done <- nil
	}()
	return <-done
}

func removeNetns(path string) error {
	if err := unix.Unmount(path, unix.MNT_DETACH); err != nil && !errors.Is(err, unix.EINVAL) {
		return fmt.Errorf("unmount %s: %w", path, err)
	}
	return os.Remove(path)
}

// leftovers names what an earlier demo left on the machine.
func leftovers() []string {
	var left []string
	if _, err := os.Stat(stateDir); err == nil {
		left = append(left, stateDir)
	}
	for _, path := range demoNetns() {
		left = append(left, "network namespace "+filepath.Base(path))
	}
	if dir, err := cgroupDir(); err == nil {
		if _, err := os.Stat(dir); err == nil {
			left = append(left, "cgroup "+dir)
		}
	}
	return left
}

func demoNetns() []string {
	paths, _ := filepath.Glob(netnsPath(prefix + "*")) // the only error is a bad pattern
	return paths
}

// clean removes all that a demo made: processes, redirection, namespaces,
// mounts, files.
func clean(o options) error {
	var errs []error
	errs = append(errs, killAll())
	if _, err := os.Stat(netnsPath(nodeName)); err == nil {
		if _, err := os.Stat(o.bin + "/sluice-agent"); err == nil {
			errs = append(errs, uninstall(context.Background(), o))
		}
	}
	for _, path := range demoNetns() {
		errs = append(errs, removeNetns(path))
	}
	if err := unix.Unmount(filepath.Join(stateDir, "bpf"), unix.MNT_DETACH); err != nil &&
		!errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
		errs = append(errs, fmt.Errorf("unmount bpffs: %w", err))
	}
	errs = append(errs, os.RemoveAll(stateDir))
	dir, err := cgroupDir()
	if err != nil {
		return errors.Join(append(errs, err)...)
	}
	if err := removeCgroup(dir); err != nil {
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// uninstall has the agent take its redirection away.
func uninstall(ctx context.Context, o options) error {
	return netns.Do(netnsPath(nodeName), func() error {
		cmd := exec.CommandContext(ctx, o.bin+"/sluice-agent", append([]string{"uninstall"}, kernelFlags()...)...)
		if b, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("sluice-agent uninstall: %w: %s", err, bytes.TrimSpace(b))
		}
		return nil
	})
}

// killAll ends every process that is in a namespace of the demo, and waits
// until they have ended.
func killAll() error {
	deadline := time.Now().Add(10 * time.Second)
	for {
		pids := demoProcesses()
		if len(pids) == 0 {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("end processes %v of the demo: they are still there", pids)
		}
		for _, pid := range pids {
			if err := unix.Kill(pid, unix.SIGKILL); err != nil && !errors.Is(err, unix.ESRCH) {
				return fmt.Errorf("end process %d: %w", pid, err)
			}
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// demoProcesses are the processes in the demo's network namespaces, this one excepted.
func demoProcesses() []int {
	ours := map[uint64]bool{}
	for _, path := range demoNetns() {
		if inode, err := netns.Inode(path); err == nil {
			ours[inode] = true
		}
	}
	var pids []int
	entries, _ := filepath.Glob("/proc/[0-9]*") // the only error is a bad pattern
	for _, e := range entries {
		pid, err := strconv.Atoi(filepath.Base(e))
		if err != nil || pid == os.Getpid() {
			continue
		}
		var st unix.Stat_t
		if unix.Stat(e+"/ns/net", &st) == nil && ours[st.Ino] {
			pids = append(pids, pid)
		}
	}
	return pids
}

// A state is what can be compared before and after, by kind.
type state map[string][]string

// snapshot notes what of the calling thread's network namespace and of the
// machine the demo could have changed. Of what other software may make in the
// meantime, without the demo's doing, it notes what has the demo's name.
func snapshot() (state, error) {
	s := state{}
	links, err := netlink.LinkList()
	if err != nil {
		return nil, fmt.Errorf("list links: %w", err)
	}
	for _, l := range links {
		s["links"] = append(s["links"], l.Attrs().Name)
	}
	routes, err := netlink.RouteList(nil, netlink.FAMILY_ALL)
	if err != nil {
		return nil, fmt.Errorf("list routes: %w", err)
	}
	for _, r := range routes {
		s["routes"] = append(s["routes"], r.String())
	}
	rules, err := netlink.RuleList(netlink.FAMILY_ALL)
	if err != nil {
		return nil, fmt.Errorf("list policy rules: %w", err)
	}
	for _, r := range rules {
		s["policy rules"] = append(s["policy rules"], r.String())
	}
	counters := regexp.MustCompile(`\[\d+:\d+\]`)
	for _, tool := range []string{"iptables-save", "ip6tables-save"} {
		path, err := exec.LookPath(tool)
		if err != nil {
			continue // without the program nobody makes such rules here
		}
		b, err := exec.Command(path).Output()
		if err != nil {
			return nil, fmt.Errorf("list rules with %s: %w", tool, err)
		}
		for _, line := range strings.Split(string(b), "\n") {
			if line != "" && line[0] != '#' {
				s["iptables rules"] = append(s["iptables rules"], tool+": "+counters.ReplaceAllString(line, ""))
			}
		}
	}
	s["network namespaces of the demo"] = demoNetns()
	s["processes of the demo"] = nil
	for _, pid := range demoProcesses() {
		s["processes of the demo"] = append(s["processes of the demo"], strconv.Itoa(pid))
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, fmt.Errorf("list mounts: %w", err)
	}
	s["mounts of the demo"] = nil
	for _, line := range strings.Split(strings.TrimSpace(string(mounts)), "\n") {
		if at := strings.Fields(line)[4]; strings.Contains(at, "sluice-demo") {
			s["mounts of the demo"] = append(s["mounts of the demo"], at)
		}
	}
	dirs := []string{stateDir, "/sys/fs/bpf/sluice-demo"}
	if dir, err := cgroupDir(); err == nil {
		dirs = append(dirs, dir)
	}
	s["files of the demo"] = nil
	for _, path := range dirs {
		if _, err := os.Stat(path); err == nil {
			s["files of the demo"] = append(s["files of the demo"], path)
		}
	}
	for kind := range s {
		slices.Sort(s[kind])
	}
	return s, nil
}
