package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/sluicemesh/sluice/tests/kernels/wire"
)

// searchPath is where programs are in the machine.
const searchPath = "/usr/sbin:/usr/bin"

// workArg is the argument of the process that does the job.
const workArg = "work"

func main() {
	var err error
	switch {
	case os.Getpid() == 1:
		err = superviseWork()
		// The machine is started so that it ends instead.
		err = errors.Join(err, unix.Reboot(unix.LINUX_REBOOT_CMD_RESTART))
	case len(os.Args) == 2 && os.Args[1] == workArg:
		err = work()
	default:
		err = errors.New("this is the first process of a machine that tests/kernels boots, nothing else")
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "guest:", err)
		os.Exit(1)
	}
}

// superviseWork starts the process that does the job and waits for it, and for
// all orphans: they are the first process's to wait for.
func superviseWork() error {
	child, err := syscall.ForkExec(os.Args[0], []string{os.Args[0], workArg}, &syscall.ProcAttr{
		Env: os.Environ(), Files: []uintptr{0, 1, 2},
	})
	if err != nil {
		return fmt.Errorf("start work: %w", err)
	}
	for {
		pid, err := unix.Wait4(-1, nil, 0, nil)
		if err != nil && !errors.Is(err, unix.EINTR) {
			return fmt.Errorf("wait for work: %w", err)
		}
		if pid == child {
			return nil
		}
	}
}

// work does the job and reports it. What it returns could not be reported.
func work() error {
	if err := mountAll(); err != nil {
		return err
	}
	port, err := openPort(wire.ResultDevice)
	if err != nil {
		return err
	}
	r := &reporter{to: json.NewEncoder(port)}
	if err := do(r); err != nil {
		r.report(wire.Event{Failed: err.Error()})
	}
	r.report(wire.Event{Done: true})
	return errors.Join(r.err, drain(port), port.Close())
}

// mountAll gives the machine the file systems that programs expect.
func mountAll() error {
	for _, m := range []struct{ source, on, fstype, options string }{
		{"devtmpfs", "/dev", "devtmpfs", ""},
		{"proc", "/proc", "proc", ""},
		{"sysfs", "/sys", "sysfs", ""},
		{"cgroup2", "/sys/fs/cgroup", "cgroup2", ""},
		{"bpf", "/sys/fs/bpf", "bpf", "mode=0700"},
		{"tmpfs", "/run", "tmpfs", "mode=0755"},
		{"tmpfs", "/tmp", "tmpfs", "mode=1777"},
	} {
		if err := os.MkdirAll(m.on, 0o755); err != nil {
			return fmt.Errorf("make mount point: %w", err)
		}
		if err := unix.Mount(m.source, m.on, m.fstype, 0, m.options); err != nil && !errors.Is(err, unix.EBUSY) {
			return fmt.Errorf("mount %s on %s: %w", m.fstype, m.on, err)
		}
	}
	return nil
}

// openPort opens a serial port that changes none of the bytes.
func openPort(path string) (*os.File, error) {
	// In blocking mode: the runtime cannot poll it.
	fd, err := unix.Open(path, unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", path, err)
	}
	t, err := unix.IoctlGetTermios(fd, unix.TCGETS)
	if err != nil {
		return nil, fmt.Errorf("read settings of %s: %w", path, err)
	}
	t.Iflag, t.Oflag, t.Lflag = 0, 0, 0
	t.Cflag = t.Cflag&^unix.CBAUD | unix.B115200 | unix.CLOCAL
	if err := unix.IoctlSetTermios(fd, unix.TCSETS, t); err != nil {
		return nil, fmt.Errorf("set up %s: %w", path, err)
	}
	return os.NewFile(uintptr(fd), path), nil
}

// drain returns when all that was written has left the machine.
func drain(port *os.File) error {
	const tcsbrkDrain = 1 // tcdrain(3)
	if err := unix.IoctlSetInt(int(port.Fd()), unix.TCSBRK, tcsbrkDrain); err != nil {
		return fmt.Errorf("wait for %s: %w", port.Name(), err)
	}
	return nil
}

// A reporter sends events.
type reporter struct {
	mu  sync.Mutex
	to  *json.Encoder
	err error
}

func (r *reporter) report(e wire.Event) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.err = errors.Join(r.err, r.to.Encode(e))
}

// do prepares the machine and runs the steps.
func do(r *reporter) error {
	var name unix.Utsname
	if err := unix.Uname(&name); err != nil {
		return fmt.Errorf("ask for the kernel's version: %w", err)
	}
	var up unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &up); err != nil {
		return fmt.Errorf("ask for the time since boot: %w", err)
	}
	r.report(wire.Event{Boot: &wire.Boot{
		Release: unix.ByteSliceToString(name.Release[:]), Version: unix.ByteSliceToString(name.Version[:]),
		After: time.Duration(up.Nano()),
	}})
	b, err := os.ReadFile(wire.JobPath)
	if err != nil {
		return fmt.Errorf("read job: %w", err)
	}
	var job wire.Job
	if err := json.Unmarshal(b, &job); err != nil {
		return fmt.Errorf("read job: %w", err)
	}
	for _, name := range job.Modules {
		if err := loadModule(filepath.Join(wire.ModuleDir, name)); err != nil {
			return err
		}
	}
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return fmt.Errorf("find link lo: %w", err)
	}
	if err := netlink.LinkSetUp(lo); err != nil {
		return fmt.Errorf("set up link lo: %w", err)
	}
	// What systemd gives to services.
	files := unix.Rlimit{Cur: 1 << 19, Max: 1 << 19}
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &files); err != nil {
		return fmt.Errorf("allow open files: %w", err)
	}
	if err := os.Setenv("PATH", searchPath); err != nil {
		return err
	}
	for _, step := range job.Steps {
		began := time.Now()
		ended := wire.Ended{Step: step.Name}
		if err := runStep(r, step); err != nil {
			ended.Problem = err.Error()
		}
		ended.Took = time.Since(began)
		r.report(wire.Event{Ended: &ended})
	}
	return nil
}

func loadModule(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("open module: %w", err)
	}
	defer func() { _ = f.Close() }()
	if err := unix.FinitModule(int(f.Fd()), "", 0); err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("load module %s: %w", filepath.Base(path), err)
	}
	return nil
}

func runStep(r *reporter, s wire.Step) error {
	ctx, cancel := context.WithTimeout(context.Background(), s.Timeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, s.Args[0], s.Args[1:]...)
	cmd.Dir = s.Dir
	cmd.Env = append([]string{"PATH=" + searchPath, "HOME=/", "TMPDIR=/tmp"}, s.Env...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error {
		// A test says where it hangs when it gets this signal.
		return unix.Kill(-cmd.Process.Pid, unix.SIGQUIT)
	}
	cmd.WaitDelay = 5 * time.Second
	cmd.Stdout, cmd.Stderr = &output{r: r, step: s.Name}, &output{r: r, step: s.Name, stderr: true}
	err := cmd.Run()
	if cmd.Process != nil {
		_ = unix.Kill(-cmd.Process.Pid, unix.SIGKILL)
	}
	if ctx.Err() != nil {
		return fmt.Errorf("run %s: not done after %v", s.Args[0], s.Timeout)
	}
	if err != nil {
		return fmt.Errorf("run %s: %w", s.Args[0], err)
	}
	return nil
}

// An output reports what is written to it.
type output struct {
	r      *reporter
	step   string
	stderr bool
}

var _ io.Writer = (*output)(nil)

func (o *output) Write(b []byte) (int, error) {
	o.r.report(wire.Event{Output: &wire.Output{Step: o.step, Text: string(b), Error: o.stderr}})
	return len(b), nil
}
