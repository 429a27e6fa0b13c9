package netnstest

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"sync"
	"syscall"
	"testing"
)

// A Cmd is a program inside a namespace. Of the methods of exec.Cmd use only
// those of Cmd; fields may be set before Start.
type Cmd struct {
	*exec.Cmd
	ns     Namespace
	tb     testing.TB
	cgroup string
	done   chan struct{}
	err    error
	kill   sync.Once
}

// Command prepares a program that runs inside the namespace as user and group
// uid. What still runs when the test ends is killed.
func (ns Namespace) Command(tb testing.TB, uid uint32, name string, args ...string) *Cmd {
	c := exec.Command(name, args...)
	c.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}}
	return &Cmd{Cmd: c, ns: ns, tb: tb, done: make(chan struct{})}
}

// In makes the program start in the cgroup at dir.
func (c *Cmd) In(dir string) { c.cgroup = dir }

// Start starts the program.
func (c *Cmd) Start() error {
	if c.cgroup != "" {
		dir, err := os.Open(c.cgroup)
		if err != nil {
			return fmt.Errorf("open cgroup: %w", err)
		}
		defer func() { _ = dir.Close() }()
		c.SysProcAttr.UseCgroupFD, c.SysProcAttr.CgroupFD = true, int(dir.Fd())
	}
	// A child takes the namespace of the thread that forks it.
	if err := c.ns.Do(c.Cmd.Start); err != nil {
		return fmt.Errorf("start %s in %s: %w", c.Path, c.ns.Name, err)
	}
	go func() {
		c.err = c.Cmd.Wait()
		close(c.done)
	}()
	c.tb.Cleanup(c.Kill)
	return nil
}

// Wait waits until the program has ended, and may be called more than once.
func (c *Cmd) Wait() error {
	<-c.done
	return c.err
}

// Kill ends the program with SIGKILL and waits for it.
func (c *Cmd) Kill() {
	c.kill.Do(func() { _ = c.Process.Kill() }) // an error means that it has ended
	<-c.done
}

// CombinedOutput runs the program and returns what it wrote.
func (c *Cmd) CombinedOutput() ([]byte, error) {
	var b bytes.Buffer
	c.Stdout, c.Stderr = &b, &b
	if err := c.Start(); err != nil {
		return nil, err
	}
	err := c.Wait()
	return b.Bytes(), err
}
