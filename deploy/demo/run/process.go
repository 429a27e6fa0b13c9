package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// A process is a program that the demo started. Its output is in a file, so
// that it can outlive the demo.
type process struct {
	name string
	log  string
	cmd  *exec.Cmd
	done chan struct{} // closed when it has ended
	err  error         // how it ended, once done is closed
}

// spawn starts a program in the node's network namespace.
func spawn(name string, argv ...string) (*process, error) {
	p := &process{name: name, log: filepath.Join(stateDir, "log", name+".log"), done: make(chan struct{})}
	f, err := os.OpenFile(p.log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return nil, fmt.Errorf("open log of %s: %w", name, err)
	}
	defer func() { _ = f.Close() }()
	p.cmd = exec.Command(argv[0], argv[1:]...)
	p.cmd.Stdout, p.cmd.Stderr = f, f
	p.cmd.SysProcAttr = awayFromTerminal()
	if err := p.cmd.Start(); err != nil {
		return nil, fmt.Errorf("start %s: %w", name, err)
	}
	go func() {
		p.err = p.cmd.Wait()
		close(p.done)
	}()
	return p, nil
}

// awayFromTerminal keeps the terminal's signals from a child: the demo ends its
// children itself, in order.
func awayFromTerminal() *syscall.SysProcAttr { return &syscall.SysProcAttr{Setsid: true} }

// stop sends sig and waits until the process has ended; after 10 s it kills it.
func (p *process) stop(sig syscall.Signal) error {
	if err := p.cmd.Process.Signal(sig); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("stop %s: %w", p.name, err)
	}
	select {
	case <-p.done:
		return nil
	case <-time.After(10 * time.Second):
	}
	if err := p.cmd.Process.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("kill %s: %w", p.name, err)
	}
	<-p.done
	return fmt.Errorf("stop %s: still there 10 s after signal %s", p.name, sig)
}

// waitFor calls ready until it returns nil, ctx or the process ends, or 20 s
// have passed, and returns ready's last error then. p may be nil.
func waitFor(ctx context.Context, what string, p *process, ready func() error) error {
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	var ended chan struct{}
	if p != nil {
		ended = p.done
	}
	for {
		err := ready()
		if err == nil {
			return nil
		}
		select {
		case <-ended:
			return fmt.Errorf("wait for %s: it has ended (%w); see %s", what, p.err, p.log)
		case <-ctx.Done():
			return fmt.Errorf("wait for %s: %w (%w)", what, err, ctx.Err())
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// logs returns nil once the log of p holds text.
func (p *process) logs(text string) func() error {
	return func() error {
		b, err := os.ReadFile(p.log)
		if err == nil && !strings.Contains(string(b), text) {
			err = fmt.Errorf("its log does not say %q yet", text)
		}
		return err
	}
}

// cgroupDir is the cgroup of the demo's pods, below the mount point of cgroup v2.
func cgroupDir() (string, error) {
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return "", fmt.Errorf("find cgroup v2: %w", err)
	}
	for _, line := range strings.Split(string(b), "\n") {
		if before, after, ok := strings.Cut(line, " - "); ok && strings.HasPrefix(after, "cgroup2 ") {
			return filepath.Join(strings.Fields(before)[4], "sluice-demo"), nil
		}
	}
	return "", errors.New("find cgroup v2: it is not mounted")
}

// removeCgroup removes dir; its last process may need a moment to leave it.
func removeCgroup(dir string) error {
	deadline := time.Now().Add(5 * time.Second)
	for {
		err := os.Remove(dir)
		switch {
		case err == nil || errors.Is(err, os.ErrNotExist):
			return nil
		case time.Now().After(deadline):
			return fmt.Errorf("remove cgroup: %w", err)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// enter becomes a command inside a pod: its network namespace, the cgroup of
// all pods, its host name and its /etc/hosts, which stands in for the cluster's
// DNS. It only returns if that is not possible.
func enter(pod string, uid int, argv []string) error {
	path, err := exec.LookPath(argv[0])
	if err != nil {
		return fmt.Errorf("find program: %w", err)
	}
	cgroup, err := cgroupDir()
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(cgroup, "cgroup.procs"), []byte("0"), 0o644); err != nil {
		return fmt.Errorf("enter cgroup of the pods: %w", err)
	}
	ns, err := os.Open(netnsPath(prefix + pod))
	if err != nil {
		return fmt.Errorf("find pod %s: %w", pod, err)
	}
	runtime.LockOSThread() // until exec makes this thread the process
	if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
		return fmt.Errorf("enter network namespace of pod %s: %w", pod, err)
	}
	if err := unix.Unshare(unix.CLONE_NEWNS | unix.CLONE_NEWUTS); err != nil {
		return fmt.Errorf("make mount namespace: %w", err)
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	if err := unix.Mount(hostsFile, "/etc/hosts", "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("mount /etc/hosts: %w", err)
	}
	if err := unix.Sethostname([]byte(pod)); err != nil {
		return fmt.Errorf("set host name: %w", err)
	}
	if uid != 0 {
		if err := errors.Join(syscall.Setgroups(nil), syscall.Setgid(uid), syscall.Setuid(uid)); err != nil {
			return fmt.Errorf("become user %d: %w", uid, err)
		}
	}
	return fmt.Errorf("run %s: %w", path, syscall.Exec(path, argv, os.Environ()))
}

// command is a command inside a pod whose output is read.
func (n *node) command(ctx context.Context, p *pod, uid int, argv ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, n.o.self, append([]string{"exec", "--uid=" + strconv.Itoa(uid), p.name}, argv...)...)
	cmd.SysProcAttr = awayFromTerminal()
	cmd.Stderr = os.Stderr
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = 20 * time.Second
	return cmd
}

// A report is what "bookshop client" prints; see there.
type report struct {
	Requests, Failed int
	Errors           map[string]int
	By, Hosts        map[string]int
	P50, P99, Max    time.Duration
	Elapsed          time.Duration
	Last             *answer
	Local, Remote    netip.AddrPort
}

// An answer is what a program of the bookshop says of itself and its calls.
type answer struct {
	Service, Version, Host string
	Peer                   netip.AddrPort
	Calls                  []struct {
		URL           string
		Local, Remote netip.AddrPort
		Answer        answer
	}
}

// client runs "bookshop client" in a pod. Failed requests are in the report,
// not in the error.
func (n *node) client(ctx context.Context, p *pod, args ...string) (report, error) {
	cmd := n.command(ctx, p, appUID, append([]string{n.o.bin + "/bookshop", "client"}, args...)...)
	cmd.Stderr = nil
	out, err := cmd.Output()
	var r report
	if len(out) == 0 {
		return r, fmt.Errorf("run client in pod %s: %w", p.name, err)
	}
	if err := json.Unmarshal(out, &r); err != nil {
		return r, fmt.Errorf("parse report of client in pod %s: %w", p.name, err)
	}
	return r, nil
}

// load runs the client until end is called, which returns its report.
func (n *node) load(ctx context.Context, p *pod, args ...string) (end func() (report, error)) {
	ctx, cancel := context.WithCancel(ctx)
	type result struct {
		r   report
		err error
	}
	done := make(chan result, 1)
	go func() {
		r, err := n.client(ctx, p, append([]string{"-n=0"}, args...)...)
		done <- result{r, err}
	}()
	return func() (report, error) {
		cancel()
		res := <-done
		return res.r, res.err
	}
}
