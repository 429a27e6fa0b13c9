package faultpoint

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"syscall"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

// A Call is one that is about to happen.
type Call struct {
	// Index counts the calls of a run from 0.
	Index int
	// Name is the system call and what is known of its purpose.
	Name string
	// Helper says that a program makes it which the process has started.
	Helper bool
	// Netns is the inode number of the network namespace of who makes it.
	Netns uint64
}

// An Action says what becomes of the process before a call.
type Action int

const (
	// Go lets the call happen.
	Go Action = iota
	// Kill ends the process, with SIGKILL; programs that it has started go on.
	Kill
	// KillAll ends those as well, as the end of a container does.
	KillAll
)

// notification is struct seccomp_notif.
type notification struct {
	id         uint64
	pid, flags uint32
	nr         int32
	arch       uint32
	ip         uint64
	args       [6]uint64
}

// response is struct seccomp_notif_resp.
type response struct {
	id    uint64
	val   int64
	err   int32
	flags uint32
}

// Watch starts cmd, which calls Arm, and asks at before each of its calls. It
// returns when cmd and all that it has started have ended, with the calls that
// were made or prevented. cmd is killed when tb ends at the latest.
func Watch(tb testing.TB, cmd *exec.Cmd, at func(Call) Action) []Call {
	tb.Helper()
	calls, err := watch(tb, cmd, at)
	if err != nil {
		tb.Fatalf("watch %s: %v", cmd.Path, err)
	}
	return calls
}

func watch(tb testing.TB, cmd *exec.Cmd, at func(Call) Action) (calls []Call, err error) {
	sayR, sayW, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer func() { _ = sayR.Close(); _ = sayW.Close() }()
	waitR, waitW, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer func() { _ = waitR.Close(); _ = waitW.Close() }()
	cmd.ExtraFiles = []*os.File{sayW, waitR} // sayFD, waitFD
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{}
	}
	cmd.SysProcAttr.Setpgid = true
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	pid := cmd.Process.Pid
	killAll := func() { _ = unix.Kill(-pid, unix.SIGKILL) } // an error means that they have ended
	tb.Cleanup(killAll)
	defer func() { killAll(); _ = cmd.Wait() }() // how it ended is in its ProcessState
	_ = sayW.Close()
	var b [4]byte
	if _, err := sayR.Read(b[:]); err != nil {
		return nil, fmt.Errorf("it does not say where it reports its calls: %w", err)
	}
	listener, err := take(pid, int(binary.NativeEndian.Uint32(b[:])))
	if err != nil {
		return nil, err
	}
	defer func() { _ = unix.Close(listener) }()
	if _, err := waitW.Write(b[:1]); err != nil {
		return nil, err
	}
	killed := Go
	for {
		n, ok, err := receive(listener)
		if err != nil || !ok {
			return calls, err
		}
		name, err := describe(n)
		if err != nil {
			if alive(int(n.pid)) {
				return calls, err
			}
			continue // killed meanwhile
		}
		helper := group(int(n.pid)) != pid
		if name != "" && killed == Go {
			c := Call{Index: len(calls), Name: name, Helper: helper, Netns: namespace(int(n.pid))}
			calls = append(calls, c)
			killed = at(c)
			switch killed {
			case Kill:
				if err := unix.Kill(pid, unix.SIGKILL); err != nil {
					return calls, err
				}
			case KillAll:
				killAll()
			}
		}
		if killed == KillAll || killed == Kill && !helper {
			continue // an answer might come before the signal
		}
		if err := respond(listener, n.id); err != nil && !errors.Is(err, unix.ENOENT) {
			return calls, err
		}
	}
}

// take returns a descriptor of another process as one of this.
func take(pid, fd int) (int, error) {
	p, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return -1, fmt.Errorf("open process: %w", err)
	}
	defer func() { _ = unix.Close(p) }()
	own, err := unix.PidfdGetfd(p, fd, 0)
	if err != nil {
		return -1, fmt.Errorf("take descriptor %d: %w", fd, err)
	}
	return own, nil
}

// receive returns the next call; ok is false when nobody is left to make one.
func receive(listener int) (n notification, ok bool, err error) {
	for {
		fds := []unix.PollFd{{Fd: int32(listener), Events: unix.POLLIN}}
		if _, err := unix.Poll(fds, -1); err != nil {
			if errors.Is(err, unix.EINTR) {
				continue
			}
			return n, false, fmt.Errorf("wait for a call: %w", err)
		}
		if fds[0].Revents&unix.POLLIN == 0 {
			return n, false, nil
		}
		n = notification{} // the kernel wants zeros
		err := ioctl(listener, unix.SECCOMP_IOCTL_NOTIF_RECV, unsafe.Pointer(&n))
		switch {
		case err == nil:
			return n, true, nil
		case errors.Is(err, unix.EINTR), errors.Is(err, unix.ENOENT): // ENOENT: killed meanwhile
		default:
			return n, false, fmt.Errorf("receive a call: %w", err)
		}
	}
}

// respond lets a call happen.
func respond(listener int, id uint64) error {
	r := response{id: id, flags: unix.SECCOMP_USER_NOTIF_FLAG_CONTINUE}
	return ioctl(listener, unix.SECCOMP_IOCTL_NOTIF_SEND, unsafe.Pointer(&r))
}

func ioctl(fd int, request uintptr, p unsafe.Pointer) error {
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), request, uintptr(p)); errno != 0 {
		return errno
	}
	return nil
}

func alive(pid int) bool {
	_, err := os.Stat(fmt.Sprintf("/proc/%d", pid))
	return err == nil
}

// namespace returns the network namespace of a thread; 0 if that has ended.
func namespace(tid int) uint64 {
	var st unix.Stat_t
	if unix.Stat(fmt.Sprintf("/proc/%d/ns/net", tid), &st) != nil {
		return 0
	}
	return st.Ino
}

// group returns the process that a thread belongs to; 0 if it has ended.
func group(tid int) int {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", tid))
	if err != nil {
		return 0
	}
	return statusField(string(b), "Tgid:")
}
