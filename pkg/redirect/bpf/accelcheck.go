package bpf

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"hash/fnv"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/sluicemesh/sluice/pkg/redirect"
	"github.com/sluicemesh/sluice/pkg/redirect/bpf/paircheck"
	"github.com/sluicemesh/sluice/pkg/redirect/cgroup"
)

const (
	// selfTestDeadline bounds all of the self-test, checkLimit what one check
	// waits for. It takes four seconds on a node that is not busy.
	selfTestDeadline = 30 * time.Second
	checkLimit       = 5 * time.Second
	// checkSize is what the largest checks send: several times what the budget
	// and the buffers hold.
	checkSize = 4 << 20

	// gain is what one measure must gain, loss what none may lose. Medians differ
	// by more than that on a busy node; below stall something stands still.
	gain  = 1.05
	loss  = 0.98
	stall = 0.5

	selfTestCgroup = "sluice-paircheck-"
)

// decideAcceleration finds out what this kernel can do, once for each boot and
// build if there is a file to remember it in.
func decideAcceleration(ctx context.Context, o Options) ([]redirect.Acceleration, error) {
	key, err := accelerationKey()
	if err != nil {
		return nil, err
	}
	if known := readDecision(o.AccelerateCache, key); known != nil {
		return known, nil
	}
	ctx, cancel := context.WithTimeout(ctx, selfTestDeadline)
	defer cancel()
	start := time.Now()
	results, err := selfTest(ctx, o)
	if err != nil {
		return nil, fmt.Errorf("try acceleration: %w", err)
	}
	o.Log.Info("acceleration was tried", "took", time.Since(start).Round(time.Millisecond))
	return results, writeDecision(o.AccelerateCache, key, results)
}

// A decision is what is remembered of a self-test.
type decision struct {
	Key     string
	Results []redirect.Acceleration
}

// accelerationKey names this boot, kernel and build.
func accelerationKey() (string, error) {
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "", fmt.Errorf("read boot id: %w", err)
	}
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return "", fmt.Errorf("read kernel's release: %w", err)
	}
	h := fnv.New64a()
	h.Write(_RedirectBytes)
	h.Write(_AccelBytes)
	return fmt.Sprintf("%s %s %016x", strings.TrimSpace(string(boot)), unix.ByteSliceToString(u.Release[:]), h.Sum64()), nil
}

// readDecision returns what was found for this key, nil if nothing was.
func readDecision(path, key string) []redirect.Acceleration {
	var d decision
	b, err := os.ReadFile(path)
	if err != nil || json.Unmarshal(b, &d) != nil || d.Key != key {
		return nil // then it is found out again
	}
	return d.Results
}

func writeDecision(path, key string, results []redirect.Acceleration) error {
	if path == "" {
		return nil
	}
	b, err := json.MarshalIndent(decision{key, results}, "", "\t")
	if err != nil {
		return fmt.Errorf("describe decision on acceleration: %w", err)
	}
	fresh := path + ".new"
	if err := os.WriteFile(fresh, b, 0o600); err != nil {
		return fmt.Errorf("write decision on acceleration: %w", err)
	}
	if err := os.Rename(fresh, path); err != nil {
		return fmt.Errorf("put decision on acceleration in place: %w", err)
	}
	return nil
}

// selfTest tries each place. An error means that it could not be tried.
func selfTest(ctx context.Context, o Options) ([]redirect.Acceleration, error) {
	t, missing, err := newTrial(ctx, o)
	if err != nil {
		return nil, err
	}
	if missing != nil {
		return []redirect.Acceleration{
			{Place: redirect.PlacePeer, Reason: missing.Error()}, {Place: redirect.PlaceLoopback, Reason: missing.Error()},
		}, nil
	}
	results, err := t.run()
	return results, errors.Join(err, t.close())
}

// A trial is maps and programs of its own, attached to a cgroup in which a child
// process makes connections.
type trial struct {
	objects  redirectObjects
	programs accelPrograms
	links    []link.Link
	cgroup   string
	child    *exec.Cmd
	in       io.WriteCloser
	say      *json.Encoder
	hear     *json.Decoder
	log      *slog.Logger
}

// newTrial starts a trial; missing is what the kernel lacks for it.
func newTrial(ctx context.Context, o Options) (t *trial, missing, err error) {
	t = &trial{log: o.Log}
	defer func() {
		if err != nil || missing != nil {
			err = errors.Join(err, t.close())
			t = nil
		}
	}()
	spec, err := prepare(0)
	if err != nil {
		return t, nil, err
	}
	if err := spec.Variables[redirectVarSlAccelerate].Set(uint8(1)); err != nil {
		return t, nil, fmt.Errorf("set up eBPF object: %w", err)
	}
	if err := spec.LoadAndAssign(&t.objects, nil); err != nil {
		return t, fmt.Errorf("sockops with acceleration: %w", err), nil
	}
	if t.programs, err = loadAccelPrograms(&t.objects.redirectMaps); err != nil {
		return t, err, nil
	}
	if err := attachRedirect(&t.objects.redirectMaps, t.programs); err != nil {
		return t, err, nil
	}
	for _, c := range t.programs.counters() {
		l, err := c.attach()
		if err != nil {
			return t, err, nil
		}
		t.links = append(t.links, l)
	}
	if err := t.makeCgroup(o.Cgroup); err != nil {
		return t, nil, err
	}
	sockops, err := link.AttachCgroup(link.CgroupOptions{Path: t.cgroup, Attach: ebpf.AttachCGroupSockOps, Program: t.objects.SlSockops})
	if err != nil {
		return t, nil, fmt.Errorf("attach sockops to cgroup %s: %w", t.cgroup, err)
	}
	t.links = append(t.links, sockops)
	return t, nil, t.start(ctx, o.PairCheck)
}

// makeCgroup makes a cgroup below root, and removes those of processes that
// were killed.
func (t *trial) makeCgroup(root string) (err error) {
	if root == "" {
		if root, err = cgroup.Root(); err != nil {
			return err
		}
	}
	removeTrials(root)
	if t.cgroup, err = os.MkdirTemp(root, selfTestCgroup); err != nil {
		return fmt.Errorf("make cgroup: %w", err)
	}
	return nil
}

// removeTrials removes cgroups of trials that were killed. One that is going on
// may not have its child in there yet: only the old ones go.
func removeTrials(root string) {
	if root == "" {
		var err error
		if root, err = cgroup.Root(); err != nil {
			return // then there are none
		}
	}
	old, _ := filepath.Glob(filepath.Join(root, selfTestCgroup+"*")) // the pattern is right
	for _, dir := range old {
		if st, err := os.Stat(dir); err == nil && time.Since(st.ModTime()) > selfTestDeadline {
			_ = unix.Rmdir(dir) // busy: somebody else's
		}
	}
}

// start starts the child and lets the programs know its namespace.
func (t *trial) start(ctx context.Context, command []string) error {
	dir, err := os.Open(t.cgroup)
	if err != nil {
		return fmt.Errorf("open cgroup: %w", err)
	}
	defer func() { _ = dir.Close() }()
	if len(command) == 0 {
		command = []string{"/proc/self/exe", "paircheck"}
	}
	t.child = exec.CommandContext(ctx, command[0], command[1:]...)
	t.child.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: syscall.CLONE_NEWNET, UseCgroupFD: true, CgroupFD: int(dir.Fd()), Pdeathsig: syscall.SIGKILL,
	}
	t.child.Stderr = os.Stderr
	if t.in, err = t.child.StdinPipe(); err != nil {
		return fmt.Errorf("open pipe: %w", err)
	}
	out, err := t.child.StdoutPipe()
	if err != nil {
		return fmt.Errorf("open pipe: %w", err)
	}
	if err := t.child.Start(); err != nil {
		t.child = nil
		return fmt.Errorf("start %s: %w", command[0], err)
	}
	t.say, t.hear = json.NewEncoder(t.in), json.NewDecoder(out)
	var hello paircheck.Hello
	if err := t.hear.Decode(&hello); err != nil {
		return fmt.Errorf("wait for %s: %w", command[0], err)
	}
	places := redirectSlPlaceSL_LOOPBACK | redirectSlPlaceSL_PEER
	return errors.Join(
		write(t.objects.AccelPods, redirectMapAccelPods, hello.Cookie, places, ebpf.UpdateAny),
		write(t.objects.AccelSwitch, redirectMapAccelSwitch, uint32(0), uint32(1), ebpf.UpdateAny))
}

// ask has the child do something.
func (t *trial) ask(o paircheck.Options) (paircheck.Answer, error) {
	var a paircheck.Answer
	if err := t.say.Encode(o); err != nil {
		return a, fmt.Errorf("tell what to check: %w", err)
	}
	if err := t.hear.Decode(&a); err != nil {
		return a, fmt.Errorf("wait for checks: %w", err)
	}
	for _, r := range a.Results {
		t.log.Debug("check", "check", r.Check, "on", r.On, "plain", o.Plain, "took", r.Took, "err", r.Err)
	}
	if a.Err != "" {
		return a, errors.New(a.Err)
	}
	return a, nil
}

// run tries both places. They differ in who reads: at a peer's end a proxy, on
// loopback an application, which may do anything with its socket.
func (t *trial) run() ([]redirect.Acceleration, error) {
	o := paircheck.Options{Seed: 1, Budget: int(accelBudget), Limit: checkLimit, Size: checkSize, First: true, IPv6: hasIPv6()}
	plain := o
	plain.Plain = true
	a, err := t.ask(plain)
	if err != nil {
		return nil, err
	}
	if failed := firstFailure(a); failed != "" {
		return nil, fmt.Errorf("connections without acceleration: %s", failed)
	}
	peer, loopback := redirect.Acceleration{Place: redirect.PlacePeer}, redirect.Acceleration{Place: redirect.PlaceLoopback}
	proxy := o
	proxy.Proxy = true
	if a, err = t.ask(proxy); err != nil {
		return nil, err
	}
	if peer.Reason = firstFailure(a); peer.Reason == "" {
		if peer.Reason, err = t.idle(); err != nil {
			return nil, err
		}
	}
	if peer.Reason != "" {
		loopback.Reason = peer.Reason
		return []redirect.Acceleration{peer, loopback}, nil
	}
	peer.Right = true
	if a, err = t.ask(o); err != nil {
		return nil, err
	}
	loopback.Reason = firstFailure(a)
	loopback.Right = loopback.Reason == ""
	if a, err = t.ask(paircheck.Options{Measure: true, Limit: selfTestDeadline}); err != nil {
		return nil, err
	}
	peer.Faster, peer.Reason = judge(a.Gains)
	if loopback.Right {
		loopback.Faster, loopback.Reason = peer.Faster, peer.Reason
	}
	return []redirect.Acceleration{peer, loopback}, nil
}

// firstFailure names the first check that failed, "" if all passed.
func firstFailure(a paircheck.Answer) string {
	for _, r := range a.Results {
		if r.Err != "" {
			return fmt.Sprintf("check %s (%s): %s", r.Check, r.On, r.Err)
		}
	}
	return ""
}

// idle names what the checks should have made happen and did not: then they
// have passed without acceleration.
func (t *trial) idle() (string, error) {
	events, err := readEvents(&t.objects.redirectMaps)
	if err != nil {
		return "", err
	}
	for _, name := range []string{"joined", "behind", "caught_up"} {
		if events[name] == 0 {
			return fmt.Sprintf("connections were not accelerated: no event %q", name), nil
		}
	}
	return "", nil
}

// judge says whether something is gained and nothing lost.
func judge(gains []paircheck.Gain) (faster bool, reason string) {
	best, lost := 0.0, false
	var parts []string
	for _, g := range gains {
		part := fmt.Sprintf("%s %.2f", g.Measure, g.Ratio())
		if g.Typical() < stall {
			part += fmt.Sprintf(" (median %.2f)", g.Typical())
		}
		best, lost = max(best, g.Ratio()), lost || g.Ratio() < loss || g.Typical() < stall
		parts = append(parts, part)
	}
	return best >= gain && !lost, "times as fast: " + strings.Join(parts, ", ")
}

// close ends everything.
func (t *trial) close() error {
	var errs []error
	if t.child != nil {
		errs = append(errs, t.in.Close())
		// It ends with its input; where it hangs, the context kills it.
		if err := t.child.Wait(); err != nil {
			errs = append(errs, fmt.Errorf("end of %s: %w", t.child.Path, err))
		}
	}
	for _, l := range t.links {
		errs = append(errs, l.Close())
	}
	if t.cgroup != "" {
		errs = append(errs, removeTrial(t.cgroup))
	}
	errs = append(errs, t.programs.Close(), t.objects.Close())
	return errors.Join(errs...)
}

// removeTrial removes a trial's cgroup. The kernel counts a process that has
// just ended for a moment longer.
func removeTrial(dir string) error {
	for deadline := time.Now().Add(2 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		err := unix.Rmdir(dir)
		if err == nil || errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("remove cgroup %s: %w", dir, err)
		}
	}
}

// hasIPv6 says whether the kernel has IPv6.
func hasIPv6() bool {
	_, err := os.Stat("/proc/net/if_inet6")
	return err == nil
}
