package redirect

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
)

// Options say how to choose a backend. The constructors are handed in, so that
// this package depends on no backend.
type Options struct {
	// Node is what pods get that ask for nothing else; empty means BackendAuto.
	Node Backend
	// NewEBPF and NewIPTables open a backend; required. An error that wraps
	// ErrNotSupported makes BackendAuto take iptables.
	NewEBPF     func() (Redirector, error)
	NewIPTables func() (Redirector, error)
	// Left says whether an earlier agent may have left workloads with a
	// backend; nil means with none. Such a backend is opened so that they can
	// be listed, moved and removed.
	Left func(Backend) bool
	// Log is told of a fallback, once; nil discards.
	Log *slog.Logger
}

// Chosen is a Redirector and Meter over both backends: each workload goes to
// the one that its policy asks for, else to the node's.
type Chosen struct {
	node   Backend
	reason string
	open   map[Backend]func() (Redirector, error)
	left   func(Backend) bool

	mu       sync.Mutex
	backends map[Backend]Redirector // those that are open
	failed   map[Backend]error      // what is not supported: asked once
	where    map[ID]Backend         // what has a workload, as far as this process knows
}

var (
	_ Redirector  = (*Chosen)(nil)
	_ Meter       = (*Chosen)(nil)
	_ Accelerator = (*Chosen)(nil)
)

// Choose opens the node's backend. With BackendAuto that is eBPF; where eBPF is
// not supported it is iptables, and Reason says why. All other errors, and all
// errors of a backend asked for by name, are returned. The other backend is
// opened when a pod asks for it or an earlier agent left workloads with it.
func Choose(o Options) (*Chosen, error) {
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	if o.Left == nil {
		o.Left = func(Backend) bool { return false }
	}
	c := &Chosen{
		left:     o.Left,
		node:     cmp.Or(o.Node, BackendAuto),
		open:     map[Backend]func() (Redirector, error){BackendEBPF: o.NewEBPF, BackendIPTables: o.NewIPTables},
		backends: map[Backend]Redirector{},
		failed:   map[Backend]error{},
		where:    map[ID]Backend{},
	}
	auto := c.node == BackendAuto
	if auto {
		c.node = BackendEBPF
	}
	_, err := c.backend(c.node)
	if auto && errors.Is(err, ErrNotSupported) {
		c.node, c.reason = BackendIPTables, err.Error()
		o.Log.Warn("falling back to iptables", "backend", c.node, "reason", c.reason)
		_, err = c.backend(c.node)
	}
	if err != nil {
		return nil, err
	}
	return c, nil
}

// Backend returns the node's backend, BackendEBPF or BackendIPTables.
func (c *Chosen) Backend() Backend { return c.node }

// Reason says why BackendAuto did not take eBPF; empty if it did, and if the
// backend was asked for by name.
func (c *Chosen) Reason() string { return c.reason }

// backend returns a backend, opened if need be.
func (c *Chosen) backend(name Backend) (Redirector, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if r := c.backends[name]; r != nil {
		return r, nil
	}
	if err := c.failed[name]; err != nil {
		return nil, err
	}
	r, err := c.open[name]()
	if err != nil {
		if errors.Is(err, ErrNotSupported) { // else it may go better next time
			c.failed[name] = err
		}
		return nil, err
	}
	c.backends[name] = r
	return r, nil
}

// each calls f for every backend that may have workloads.
func (c *Chosen) each(f func(Backend, Redirector) error) error {
	var errs []error
	for _, name := range []Backend{BackendEBPF, BackendIPTables} {
		c.mu.Lock()
		isOpen := c.backends[name] != nil
		c.mu.Unlock()
		if !isOpen && !c.left(name) {
			continue
		}
		r, err := c.backend(name)
		if err == nil {
			err = f(name, r)
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("backend %s: %w", name, err))
		}
	}
	return errors.Join(errs...)
}

// Add implements Redirector. A workload that another backend has moves: the
// new backend takes it before the old one lets go, so that no connection is
// missed in between. An error that wraps ErrNotSupported means that the node
// cannot have the backend that the pod asks for.
func (c *Chosen) Add(ctx context.Context, w Workload) error {
	name := w.Policy.Backend
	if name == "" || name == BackendAuto {
		name = c.node
	}
	r, err := c.backend(name)
	if err != nil {
		return fmt.Errorf("open backend %s: %w", name, err)
	}
	if err := r.Add(ctx, w); err != nil {
		return err
	}
	if c.BackendOf(w.ID) == name {
		return nil
	}
	// Unknown counts as elsewhere: an earlier agent may have ended amid a move.
	err = c.each(func(other Backend, r Redirector) error {
		if other == name {
			return nil
		}
		if y, ok := r.(Yielder); ok {
			return y.Yield(ctx, w.ID)
		}
		return r.Remove(ctx, w.ID)
	})
	if err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.where[w.ID] = name
	return nil
}

// BackendOf returns the backend that has a workload, "" if that is not known.
func (c *Chosen) BackendOf(id ID) Backend {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.where[id]
}

// Remove implements Redirector.
func (c *Chosen) Remove(ctx context.Context, id ID) error {
	c.mu.Lock()
	delete(c.where, id)
	c.mu.Unlock()
	return c.each(func(_ Backend, r Redirector) error { return r.Remove(ctx, id) })
}

// List implements Redirector. A workload that both backends have, because an
// agent ended while it moved it, is listed once, with that as its Problem.
func (c *Chosen) List(ctx context.Context) ([]Installed, error) {
	var all []Installed
	err := c.each(func(_ Backend, r Redirector) error {
		l, err := r.List(ctx)
		all = append(all, l...)
		return err
	})
	slices.SortStableFunc(all, func(a, b Installed) int {
		return cmp.Or(cmp.Compare(a.ID.PodUID, b.ID.PodUID), cmp.Compare(a.ID.NetnsInode, b.ID.NetnsInode))
	})
	for i := len(all) - 1; i > 0; i-- {
		if all[i].ID == all[i-1].ID {
			c.mu.Lock()
			delete(c.where, all[i].ID) // so that Add removes one of them
			c.mu.Unlock()
			all[i-1].Problem = errors.Join(all[i-1].Problem, errors.New("both backends redirect the pod"))
			all = slices.Delete(all, i, i+1)
		}
	}
	return all, err
}

// Close implements Redirector.
func (c *Chosen) Close() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	var errs []error
	for _, r := range c.backends {
		errs = append(errs, r.Close())
	}
	clear(c.backends)
	return errors.Join(errs...)
}

// Counters implements Meter.
func (c *Chosen) Counters(ctx context.Context) ([]Counter, error) {
	var all []Counter
	err := c.meters(func(m Meter) error {
		l, err := m.Counters(ctx)
		all = append(all, l...)
		return err
	})
	return all, err
}

// MapUsage implements Meter.
func (c *Chosen) MapUsage(ctx context.Context) ([]MapUsage, error) {
	var all []MapUsage
	err := c.meters(func(m Meter) error {
		l, err := m.MapUsage(ctx)
		all = append(all, l...)
		return err
	})
	return all, err
}

func (c *Chosen) meters(f func(Meter) error) error {
	return c.each(func(_ Backend, r Redirector) error {
		m, ok := r.(Meter)
		if !ok {
			return nil
		}
		return f(m)
	})
}

// Accelerations implements Accelerator: of the backend that can, if it is open.
func (c *Chosen) Accelerations() []Acceleration {
	if a := c.accelerator(); a != nil {
		return a.Accelerations()
	}
	return nil
}

// AccelerationEvents implements Accelerator.
func (c *Chosen) AccelerationEvents() (map[string]uint64, error) {
	if a := c.accelerator(); a != nil {
		return a.AccelerationEvents()
	}
	return nil, nil
}

func (c *Chosen) accelerator() Accelerator {
	c.mu.Lock()
	defer c.mu.Unlock()
	a, _ := c.backends[BackendEBPF].(Accelerator)
	return a
}
