package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluicemesh/sluice/tests/kernels/wire"
)

// oneThread has qemu emulate all processors in one thread. With a thread for each,
// one of them may still run the breakpoint that the kernel put into its own code
// while another has taken it out again ("Oops: int3" of 6.12 in __dev_queue_xmit,
// seen here), or be stuck (6.1, in ksoftirqd).
const oneThread = "tcg,thread=single"

// A machine is one that qemu emulates: no disk, no network, an initramfs.
type machine struct {
	qemu string
	// accel is qemu's: oneThread, which needs nothing of this machine, or kvm.
	accel     string
	image     string
	initramfs string
	// console is the file for what the kernel prints.
	console string
	cpus    int
	memory  int // MiB
}

// run boots the machine and calls on for each event until it ends. It is an
// error if the machine did not do its job to the end.
func (m machine) run(ctx context.Context, on func(wire.Event)) error {
	cmd := exec.CommandContext(ctx, m.qemu, m.args()...)
	results, err := cmd.StdoutPipe()
	if err != nil {
		return fmt.Errorf("make pipe: %w", err)
	}
	var stderr strings.Builder
	cmd.Stderr = &stderr
	// Its own group: an interrupt at the terminal is for this program, which then
	// ends it. It ends as well when this program is killed, or rather the thread
	// that has started it.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: unix.SIGKILL}
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start qemu: %w", err)
	}
	done, failed := false, ""
	read := readEvents(results, func(e wire.Event) {
		done = done || e.Done
		if e.Failed != "" {
			failed = e.Failed
		}
		on(e)
	})
	err = cmd.Wait()
	switch {
	case ctx.Err() != nil:
		return fmt.Errorf("run machine: %w (%s)", context.Cause(ctx), m.lastWords())
	case err != nil:
		return fmt.Errorf("run qemu: %w: %s", err, strings.TrimSpace(stderr.String()))
	case failed != "":
		return fmt.Errorf("the machine could not do its job: %s", failed)
	case read != nil:
		return read
	case !done:
		return fmt.Errorf("the machine ended before its job was done (%s)", m.lastWords())
	}
	return nil
}

func (m machine) args() []string {
	return []string{
		"-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
		"-accel", m.accel, "-cpu", "max", "-smp", strconv.Itoa(m.cpus), "-m", strconv.Itoa(m.memory),
		"-kernel", m.image, "-initrd", m.initramfs,
		// A CPU that is stuck for a minute ends the machine, with a trace on the
		// console; the default of 20 s is too little where this machine is busy.
		"-append", "console=ttyS0 quiet loglevel=4 panic=-1 oops=panic softlockup_panic=1 watchdog_thresh=30",
		"-chardev", "file,id=console,path=" + m.console, "-serial", "chardev:console",
		"-chardev", "stdio,id=results,signal=off", "-serial", "chardev:results",
	}
}

// lastWords is the end of what the kernel has printed.
func (m machine) lastWords() string {
	const size = 2000
	b, err := os.ReadFile(m.console)
	if err != nil || len(b) == 0 {
		return "its console, " + filepath.Base(m.console) + ", is empty"
	}
	return "its console ends with:\n" + string(b[max(0, len(b)-size):])
}

// readEvents calls on for each event until all writers have closed r.
func readEvents(r io.Reader, on func(wire.Event)) error {
	lines := bufio.NewReader(r)
	for {
		line, err := lines.ReadBytes('\n')
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("read results: %w", err)
		}
		var e wire.Event
		if err := json.Unmarshal(line, &e); err != nil {
			// All must be read, or the machine could not write it.
			_, _ = io.Copy(io.Discard, r)
			return fmt.Errorf("read results: %w: %.200q", err, line)
		}
		on(e)
	}
}

// bootTimeout bounds what is no step of its own: the boot, the modules, the end.
const bootTimeout = 3 * time.Minute
