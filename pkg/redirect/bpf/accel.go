package bpf

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"

	"github.com/sluicemesh/sluice/pkg/redirect"
)

// drainDeadline bounds the wait for what is on the short way when
// acceleration is removed: readers that do not read would keep it for ever.
const drainDeadline = time.Second

// acceleration is what this process has of it; the zero value is none.
type acceleration struct {
	node     redirect.Accelerate
	results  []redirect.Acceleration
	programs accelPrograms
}

var _ redirect.Accelerator = (*Redirector)(nil)

// Accelerations implements redirect.Accelerator.
func (r *Redirector) Accelerations() []redirect.Acceleration { return r.accel.results }

// accelBudget is what one direction of a pair may hold that its reader has not
// taken, in bytes.
const accelBudget uint32 = 512 << 10

// decide finds out what of the node's setting this kernel can do.
func (r *Redirector) decide(o Options) error {
	r.accel.node = o.Accelerate
	if o.Accelerate == "" || o.Accelerate == redirect.AccelerateOff {
		return nil
	}
	results, err := decideAcceleration(context.Background(), o)
	if err != nil {
		if o.Accelerate == redirect.AccelerateOn {
			return err
		}
		for _, place := range []redirect.Place{redirect.PlacePeer, redirect.PlaceLoopback} {
			results = append(results, redirect.Acceleration{Place: place, Reason: err.Error()})
		}
	}
	r.accel.results = results
	for _, a := range results {
		r.log.Info("acceleration", "place", a.Place, "on", a.In(o.Accelerate, ""), "reason", a.Reason)
		if o.Accelerate == redirect.AccelerateOn && a.Place == redirect.PlacePeer && !a.Right {
			return fmt.Errorf("accelerate %s: connections between proxies cannot be accelerated on this node: %s", o.Accelerate, a.Reason)
		}
	}
	return nil
}

// possible says whether some pod may be accelerated.
func (a *acceleration) possible() bool {
	for _, p := range a.results {
		if p.In(a.node, redirect.AccelerateOn) {
			return true
		}
	}
	return false
}

// places returns where a pod with this setting is accelerated.
func (a *acceleration) places(pod redirect.Accelerate) (flags redirectSlPlace) {
	for _, p := range a.results {
		if !p.In(a.node, pod) {
			continue
		}
		switch p.Place {
		case redirect.PlacePeer:
			flags |= redirectSlPlaceSL_PEER
		case redirect.PlaceLoopback:
			flags |= redirectSlPlaceSL_LOOPBACK
		}
	}
	return flags
}

// accelerate makes new connections of a pod accelerated, or not.
func (r *Redirector) accelerate(cookie uint64, pod redirect.Accelerate) error {
	flags := r.accel.places(pod)
	if flags == 0 {
		return deleteKey(r.store.AccelPods, cookie)
	}
	return write(r.store.AccelPods, redirectMapAccelPods, cookie, flags, ebpf.UpdateAny)
}

// loadAccelPrograms loads the programs of acceleration for the given maps.
func loadAccelPrograms(m *redirectMaps) (p accelPrograms, err error) {
	spec, err := loadAccel()
	if err != nil {
		return p, fmt.Errorf("read eBPF object: %w", err)
	}
	if err := spec.Variables[accelVarSlAccelBudget].Set(accelBudget); err != nil {
		return p, fmt.Errorf("set up eBPF object: %w", err)
	}
	maps := map[string]*ebpf.Map{
		accelMapAccelEnds: m.AccelEnds, accelMapAccelEvents: m.AccelEvents, accelMapAccelPairs: m.AccelPairs,
		accelMapAccelSocks: m.AccelSocks, accelMapAccelSwitch: m.AccelSwitch,
	}
	for name, m := range maps {
		spec.Maps[name].MaxEntries = m.MaxEntries()
	}
	if err := spec.LoadAndAssign(&p, &ebpf.CollectionOptions{MapReplacements: maps}); err != nil {
		return p, fmt.Errorf("load programs of acceleration: %w", err)
	}
	return p, nil
}

// attachRedirect makes sockets that are put into a map from now on run sl_msg.
func attachRedirect(m *redirectMaps, p accelPrograms) error {
	err := link.RawAttachProgram(link.RawAttachProgramOptions{
		Target: m.AccelSocks.FD(), Program: p.SlMsg, Attach: ebpf.AttachSkMsgVerdict,
	})
	if err != nil {
		return fmt.Errorf("attach sk_msg to map %s: %w", redirectMapAccelSocks, err)
	}
	return nil
}

// A counter is a program that counts at a tracepoint of all sockets.
type counter struct {
	name string
	prog *ebpf.Program
}

func (p *accelPrograms) counters() []counter {
	return []counter{{"sent", p.SlSent}, {"received", p.SlReceived}}
}

func (c counter) attach() (link.Link, error) {
	l, err := link.AttachTracing(link.TracingOptions{Program: c.prog})
	if err != nil {
		return nil, fmt.Errorf("attach program %s to its tracepoint: %w", c.name, err)
	}
	return l, nil
}

func (r *Redirector) accelDir() string { return filepath.Join(r.dir, "accel") }

// startAcceleration attaches what the pairs of sockets need, or ends
// acceleration where this process is not to have any.
func (r *Redirector) startAcceleration() error {
	if !r.accel.possible() {
		return r.stopAcceleration(false)
	}
	var err error
	if r.accel.programs, err = loadAccelPrograms(&r.store.redirectMaps); err != nil {
		return err
	}
	if err := attachRedirect(&r.store.redirectMaps, r.accel.programs); err != nil {
		return err
	}
	if err := os.MkdirAll(r.accelDir(), 0o700); err != nil {
		return fmt.Errorf("make pin directory: %w", err)
	}
	for _, c := range r.accel.programs.counters() {
		if err := c.pin(filepath.Join(r.accelDir(), c.name)); err != nil {
			return err
		}
	}
	return r.switchAcceleration(true)
}

// pin keeps the pinned link if it runs the same program. Else the old one goes
// first: what is not counted in between keeps its pairs on TCP, but what were
// counted twice would let data overtake.
func (c counter) pin(path string) error {
	same, err := runs(path, c.prog)
	if err != nil || same {
		return err
	}
	if err := unpinCounter(path); err != nil {
		return err
	}
	l, err := c.attach()
	if err != nil {
		return err
	}
	defer func() { _ = l.Close() }()
	if err := l.Pin(path); err != nil {
		return fmt.Errorf("pin link %s: %w", path, err)
	}
	return nil
}

// runs says whether the link that is pinned at path runs a program like prog.
func runs(path string, prog *ebpf.Program) (bool, error) {
	l, err := link.LoadPinnedLink(path, nil)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("open pinned link %s: %w", path, err)
	}
	defer func() { _ = l.Close() }()
	info, err := l.Info()
	if err != nil {
		return false, fmt.Errorf("read link %s: %w", path, err)
	}
	old, err := ebpf.NewProgramFromID(info.Program)
	if err != nil {
		return false, fmt.Errorf("open program of link %s: %w", path, err)
	}
	defer func() { _ = old.Close() }()
	was, err := old.Info()
	if err != nil {
		return false, fmt.Errorf("read program of link %s: %w", path, err)
	}
	is, err := prog.Info()
	if err != nil {
		return false, fmt.Errorf("read program: %w", err)
	}
	return was.Tag == is.Tag, nil
}

// unpinCounter ends the link that is pinned at path. Its last handle is
// closed here, so that it has ended when this returns; such links cannot be
// detached.
func unpinCounter(path string) error {
	l, err := link.LoadPinnedLink(path, nil)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("open pinned link %s: %w", path, err)
	}
	return errors.Join(l.Unpin(), l.Close())
}

func (r *Redirector) switchAcceleration(on bool) error {
	value := uint32(0)
	if on {
		value = 1
	}
	return write(r.store.AccelSwitch, redirectMapAccelSwitch, uint32(0), value, ebpf.UpdateAny)
}

// stopAcceleration ends it for all connections: they go by TCP from their next
// byte on. With drain it waits, not for ever, until all is read that came the
// short way, for that would go with the map.
func (r *Redirector) stopAcceleration(drain bool) error {
	if err := r.switchAcceleration(false); err != nil {
		return err
	}
	if err := r.clearAccelPods(); err != nil {
		return err
	}
	for deadline := time.Now().Add(drainDeadline); drain && time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
		busy, err := r.busyPairs()
		if err != nil {
			return err
		}
		if !busy {
			break
		}
	}
	// Nobody deletes the pairs any more when sockops does not know of them.
	if err := r.clearPairs(); err != nil {
		return err
	}
	var p accelPrograms
	for _, c := range p.counters() {
		if err := unpinCounter(filepath.Join(r.accelDir(), c.name)); err != nil {
			return err
		}
	}
	// Builds without acceleration refuse what they do not know.
	if err := os.Remove(r.accelDir()); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove pin directory: %w", err)
	}
	return nil
}

// busyPairs says whether something is on its way in a pair.
func (r *Redirector) busyPairs() (bool, error) {
	var id uint64
	var pair redirectSlPair
	it := r.store.AccelPairs.Iterate()
	for it.Next(&id, &pair) {
		if pair.Sent != pair.Taken {
			return true, nil
		}
	}
	if err := it.Err(); err != nil && !errors.Is(err, ebpf.ErrIterationAborted) {
		return false, fmt.Errorf("read map %s: %w", redirectMapAccelPairs, err)
	}
	return false, nil
}

func (r *Redirector) clearPairs() error {
	for range int(r.store.AccelPairs.MaxEntries()) {
		var id uint64
		if err := r.store.AccelPairs.NextKey(nil, &id); errors.Is(err, ebpf.ErrKeyNotExist) {
			return nil
		} else if err != nil {
			return fmt.Errorf("read map %s: %w", redirectMapAccelPairs, err)
		}
		if err := deleteKey(r.store.AccelPairs, id); err != nil {
			return err
		}
	}
	return nil
}

func (r *Redirector) clearAccelPods() error {
	for range int(r.store.AccelPods.MaxEntries()) {
		var cookie uint64
		if err := r.store.AccelPods.NextKey(nil, &cookie); errors.Is(err, ebpf.ErrKeyNotExist) {
			return nil
		} else if err != nil {
			return fmt.Errorf("read map %s: %w", redirectMapAccelPods, err)
		}
		if err := deleteKey(r.store.AccelPods, cookie); err != nil {
			return err
		}
	}
	return nil
}

// accelEvents names what enum sl_accel_event counts.
func accelEvents() [accelSlAccelEventSL_ACCEL_EVENTS]string {
	return [...]string{
		accelSlAccelEventSL_ACCEL_JOINED: "joined",
		accelSlAccelEventSL_ACCEL_FULL:   "full",
		accelSlAccelEventSL_ACCEL_EARLY:  "early",
		accelSlAccelEventSL_ACCEL_BEHIND: "behind",
		accelSlAccelEventSL_ACCEL_CAUGHT: "caught_up",
		accelSlAccelEventSL_ACCEL_GONE:   "gone",
		accelSlAccelEventSL_ACCEL_STUCK:  "stuck",
	}
}

// AccelerationEvents implements redirect.Accelerator.
func (r *Redirector) AccelerationEvents() (map[string]uint64, error) {
	return readEvents(&r.store.redirectMaps)
}

func readEvents(m *redirectMaps) (map[string]uint64, error) {
	events := make(map[string]uint64)
	for i, name := range accelEvents() {
		var perCPU []uint64
		if err := m.AccelEvents.Lookup(uint32(i), &perCPU); err != nil {
			return nil, fmt.Errorf("read map %s: %w", redirectMapAccelEvents, err)
		}
		for _, n := range perCPU {
			events[name] += n
		}
	}
	return events, nil
}

// endAcceleration is stopAcceleration for Uninstall, which has no maps open. It
// is for maps that this build can read; others go without it.
func endAcceleration(dir string) error {
	spec, err := loadRedirect()
	if err != nil {
		return fmt.Errorf("read eBPF object: %w", err)
	}
	r := &Redirector{dir: dir}
	hashes, err := readLayouts(spec, r.mapDir())
	if err != nil {
		return err
	}
	for name, m := range map[string]**ebpf.Map{
		redirectMapAccelSwitch: &r.store.AccelSwitch, redirectMapAccelPods: &r.store.AccelPods, redirectMapAccelPairs: &r.store.AccelPairs,
	} {
		*m, err = openMap(spec.Maps[name], r.mapDir(), hashes)
		if errors.Is(err, fs.ErrNotExist) {
			return nil // of a build that does not have it
		}
		if err != nil {
			return err
		}
		defer func() { _ = (*m).Close() }()
	}
	return r.stopAcceleration(true)
}
