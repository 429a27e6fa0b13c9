package bpf

import (
	"context"
	"errors"
	"fmt"

	"github.com/cilium/ebpf"

	"github.com/sluicemesh/sluice/pkg/redirect"
)

// Verdicts of a counter.
const (
	redirected = "redirected"
	bypassed   = "bypassed"
	denied     = "denied"
)

// A reason is the name of one counter.
type reason struct {
	direction redirect.Direction
	verdict   string
	name      string
}

// reasons names what enum sl_reason counts. Outbound connections are counted
// when it is known how they end, inbound ones once for each SYN; what could not
// be exempt for want of room is counted as captured and as probes_full.
func reasons() [redirectSlReasonSL_REASONS]reason {
	return [...]reason{
		redirectSlReasonSL_OUT_CAPTURED:           {redirect.Outbound, redirected, "captured"},
		redirectSlReasonSL_OUT_SELF_CALL:          {redirect.Outbound, redirected, "self_call"},
		redirectSlReasonSL_OUT_PROXY:              {redirect.Outbound, bypassed, "proxy"},
		redirectSlReasonSL_OUT_LOOPBACK:           {redirect.Outbound, bypassed, "loopback"},
		redirectSlReasonSL_OUT_OWN_ADDRESS:        {redirect.Outbound, bypassed, "own_address"},
		redirectSlReasonSL_OUT_NO_ADDRESS:         {redirect.Outbound, bypassed, "no_address_of_family"},
		redirectSlReasonSL_OUT_EXCLUDED_INTERFACE: {redirect.Outbound, bypassed, "excluded_interface"},
		redirectSlReasonSL_OUT_EXCLUDED_PORT:      {redirect.Outbound, bypassed, "excluded_port"},
		redirectSlReasonSL_OUT_EXCLUDED_CIDR:      {redirect.Outbound, bypassed, "excluded_cidr"},
		redirectSlReasonSL_OUT_NOT_INCLUDED:       {redirect.Outbound, bypassed, "not_included"},
		redirectSlReasonSL_OUT_ADMIN_PORT:         {redirect.Outbound, denied, "admin_port"},
		redirectSlReasonSL_OUT_NO_MEMORY:          {redirect.Outbound, denied, "no_memory"},
		redirectSlReasonSL_OUT_HANDOVER_FULL:      {redirect.Outbound, denied, "handover_full"},
		redirectSlReasonSL_OUT_PROXY_DOWN:         {redirect.Outbound, denied, "proxy_down"},
		redirectSlReasonSL_IN_CAPTURED:            {redirect.Inbound, redirected, "captured"},
		redirectSlReasonSL_IN_SELF:                {redirect.Inbound, bypassed, "self"},
		redirectSlReasonSL_IN_PROXY_PORT:          {redirect.Inbound, bypassed, "proxy_port"},
		redirectSlReasonSL_IN_HEALTH_PORT:         {redirect.Inbound, bypassed, "health_port"},
		redirectSlReasonSL_IN_EXCLUDED_INTERFACE:  {redirect.Inbound, bypassed, "excluded_interface"},
		redirectSlReasonSL_IN_EXCLUDED_PORT:       {redirect.Inbound, bypassed, "excluded_port"},
		redirectSlReasonSL_IN_NOT_INCLUDED:        {redirect.Inbound, bypassed, "not_included"},
		redirectSlReasonSL_IN_PROXY_DOWN:          {redirect.Inbound, denied, "proxy_down"},
		redirectSlReasonSL_IN_LISTENER_REFUSED:    {redirect.Inbound, denied, "listener_refused"},
		redirectSlReasonSL_IN_LISTENER_MISSING:    {redirect.Inbound, denied, "listener_missing"},
		redirectSlReasonSL_IN_ASSIGN_FAILED:       {redirect.Inbound, denied, "assign_failed"},
		redirectSlReasonSL_IN_HOST_PROBE:          {redirect.Inbound, bypassed, "host_probe"},
		redirectSlReasonSL_IN_PROBES_FULL:         {redirect.Inbound, redirected, "probes_full"},
	}
}

// Counters implements redirect.Meter. Counters that are zero are left out.
func (r *Redirector) Counters(ctx context.Context) ([]redirect.Counter, error) {
	names := reasons()
	var counters []redirect.Counter
	err := r.store.each(func(cookie uint64, meta *redirectSlMeta) error {
		var perCPU []redirectSlStats
		err := r.store.Stats.Lookup(cookie, &perCPU)
		if errors.Is(err, ebpf.ErrKeyNotExist) {
			return nil // being added or removed
		}
		if err != nil {
			return fmt.Errorf("read counters of pod %s: %w", text(meta.Pod[:]), err)
		}
		for i, name := range names {
			var sum uint64
			for _, s := range perCPU {
				sum += s.Count[i]
			}
			if sum == 0 {
				continue
			}
			counters = append(counters, redirect.Counter{
				ID: meta.id(), Pod: text(meta.Pod[:]),
				Direction: name.direction, Verdict: name.verdict, Reason: name.name, Value: sum,
			})
		}
		return ctx.Err()
	})
	return counters, err
}

// MapUsage implements redirect.Meter. A map that changes while it is counted
// is counted roughly.
func (r *Redirector) MapUsage(ctx context.Context) ([]redirect.MapUsage, error) {
	s := &r.store
	var usage []redirect.MapUsage
	for _, m := range []struct {
		name string
		m    *ebpf.Map
	}{
		{redirectMapPods, s.Pods},
		{redirectMapPodIps, s.PodIps},
		{redirectMapPorts, s.Ports},
		{redirectMapCidrs, s.Cidrs},
		{redirectMapHandover, s.Handover},
		{redirectMapListeners, s.Listeners},
		{redirectMapProbes, s.Probes},
		{redirectMapProxyCgroups, s.ProxyCgroups},
	} {
		n, err := count(ctx, m.m)
		if err != nil {
			return nil, fmt.Errorf("count entries of map %s: %w", m.name, err)
		}
		usage = append(usage, redirect.MapUsage{Name: m.name, Entries: n, Capacity: int(m.m.MaxEntries())})
	}
	return usage, nil
}

func count(ctx context.Context, m *ebpf.Map) (int, error) {
	var key []byte
	// A key that vanishes in between makes the kernel start anew: hence the end.
	for n := 0; n < int(m.MaxEntries()); n++ {
		var err error
		if key == nil {
			key, err = m.NextKeyBytes(nil)
		} else {
			key, err = m.NextKeyBytes(key)
		}
		if err != nil {
			return n, err
		}
		if key == nil {
			return n, ctx.Err()
		}
	}
	return int(m.MaxEntries()), nil
}
