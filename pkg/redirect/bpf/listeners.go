package bpf

import (
	"errors"
	"fmt"
	"io"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/sluicemesh/sluice/pkg/redirect/netns"
)

// haveTCRegister returns an error that wraps ebpf.ErrNotSupported where the kernel
// lets no tc program put a socket into a sockhash: since Linux 7.3.
func haveTCRegister() error {
	listeners, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.SockHash, KeySize: 8, ValueSize: 8, MaxEntries: 1})
	if err != nil {
		return fmt.Errorf("make sockhash: %w", err)
	}
	defer func() { _ = listeners.Close() }()
	// Looks for a socket, with zeros for its addresses and for the map's key.
	const tuple, tupleSize, currentNetns = -16, 12, -1
	p, err := ebpf.NewProgram(&ebpf.ProgramSpec{Type: ebpf.SchedCLS, License: "GPL", Instructions: asm.Instructions{
		asm.Mov.Imm(asm.R2, 0),
		asm.StoreMem(asm.RFP, tuple, asm.R2, asm.DWord),
		asm.StoreMem(asm.RFP, tuple+8, asm.R2, asm.DWord),
		asm.Mov.Reg(asm.R2, asm.RFP),
		asm.Add.Imm(asm.R2, tuple),
		asm.Mov.Imm(asm.R3, tupleSize),
		asm.Mov.Imm(asm.R4, currentNetns),
		asm.Mov.Imm(asm.R5, 0),
		asm.FnSkcLookupTcp.Call(),
		asm.JEq.Imm(asm.R0, 0, "none"),
		asm.Mov.Reg(asm.R6, asm.R0),
		asm.LoadMapPtr(asm.R1, listeners.FD()),
		asm.Mov.Reg(asm.R2, asm.RFP),
		asm.Add.Imm(asm.R2, tuple),
		asm.Mov.Reg(asm.R3, asm.R6),
		asm.Mov.Imm(asm.R4, 0),
		asm.FnMapUpdateElem.Call(),
		asm.Mov.Reg(asm.R1, asm.R6),
		asm.FnSkRelease.Call(),
		asm.Mov.Imm(asm.R0, 0).WithSymbol("none"),
		asm.Return(),
	}})
	if errors.Is(err, unix.EINVAL) {
		return fmt.Errorf("%w: %w", ebpf.ErrNotSupported, err)
	}
	if err != nil {
		return fmt.Errorf("load program: %w", err)
	}
	return p.Close()
}

// A finder makes listeners known that were there before their pod was
// redirected, where tc programs may not. The zero value does nothing.
type finder struct {
	programs listeningPrograms
	iter     *link.Iter
}

// loadFinder loads the finder for the given maps if spec, the object that uses
// them, needs it.
func loadFinder(spec *ebpf.CollectionSpec, m *redirectMaps) (f finder, err error) {
	var tc uint8
	if err := spec.Variables[redirectVarSlTcMayRegister].Get(&tc); err != nil {
		return f, fmt.Errorf("read eBPF object: %w", err)
	}
	if tc != 0 {
		return f, nil
	}
	object, err := loadListening()
	if err != nil {
		return f, fmt.Errorf("read eBPF object: %w", err)
	}
	maps := map[string]*ebpf.Map{listeningMapPods: m.Pods, listeningMapListeners: m.Listeners}
	for name, m := range maps {
		object.Maps[name].MaxEntries = m.MaxEntries()
	}
	if err := object.LoadAndAssign(&f.programs, &ebpf.CollectionOptions{MapReplacements: maps}); err != nil {
		return f, fmt.Errorf("load program that finds listeners: %w", err)
	}
	if f.iter, err = link.AttachIter(link.IterOptions{Program: f.programs.SlListening}); err != nil {
		return f, errors.Join(fmt.Errorf("attach program that finds listeners: %w", err), f.Close())
	}
	return f, nil
}

func (f *finder) Close() error {
	if f.iter == nil {
		return f.programs.Close()
	}
	return errors.Join(f.iter.Close(), f.programs.Close())
}

// findListeners makes the listeners of the proxy known in whose namespace the
// thread is, those that nobody has seen begin to listen.
func (r *Redirector) findListeners(cookie uint64, pod *redirectSlPod) error {
	if r.finder.iter == nil {
		return nil
	}
	// The kernel looks for the namespace's sockets among those of the whole
	// machine, which takes a while. In a new pod there are none.
	if known, err := r.store.hasListeners(cookie, pod); err != nil || known {
		return err
	}
	for _, v4 := range []bool{true, false} {
		any, err := netns.HasTCP(v4)
		if err != nil {
			return err
		}
		if any {
			return r.finder.run()
		}
	}
	return nil
}

// run has the program see every socket of the namespace that the thread is in.
func (f *finder) run() error {
	sockets, err := f.iter.Open()
	if err != nil {
		return fmt.Errorf("list sockets: %w", err)
	}
	defer func() { _ = sockets.Close() }()
	if _, err := io.Copy(io.Discard, sockets); err != nil {
		return fmt.Errorf("list sockets: %w", err)
	}
	return nil
}

// hasListeners reports whether a listener is known for each of the pod's
// families. One for both is known as one of IPv6 alone.
func (s *store) hasListeners(cookie uint64, pod *redirectSlPod) (bool, error) {
	families := []uint32{unix.AF_INET}
	if pod.has6() {
		families = append(families, unix.AF_INET6)
	}
	for _, family := range families {
		var socket uint64
		err := s.Listeners.Lookup(&redirectSlListenerKey{Netns: cookie, Family: family}, &socket)
		if errors.Is(err, ebpf.ErrKeyNotExist) {
			return false, nil
		}
		if err != nil {
			return false, fmt.Errorf("read map %s: %w", redirectMapListeners, err)
		}
	}
	return true, nil
}
