package main

import (
	"errors"
	"log/slog"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/sluicemesh/sluice/pkg/redirect"
)

type accelerator struct {
	places []redirect.Acceleration
	events map[string]uint64
	err    error
}

func (a accelerator) Accelerations() []redirect.Acceleration { return a.places }

func (a accelerator) AccelerationEvents() (map[string]uint64, error) { return a.events, a.err }

func places() []redirect.Acceleration {
	return []redirect.Acceleration{
		{Place: redirect.PlacePeer, Right: true, Reason: "times as fast: stream_64k 0.90"},
		{Place: redirect.PlaceLoopback, Reason: "check unread (ipv4 client): wrong"},
	}
}

func TestAccelChecks(t *testing.T) {
	for node, want := range map[redirect.Accelerate]string{
		redirect.AccelerateAuto: "off but for pods that ask for it (auto), times as fast: stream_64k 0.90",
		redirect.AccelerateOn:   "on (on), times as fast: stream_64k 0.90",
	} {
		checks := accelChecks(accelerator{places: places()}, node)
		if len(checks) != 2 || checks[0].name != "acceleration of peer" || checks[0].detail != want || checks[0].err != nil {
			t.Errorf("%s: %+v", node, checks)
		}
		if checks[1].name != "acceleration of loopback" || !strings.HasPrefix(checks[1].detail, "off (") || checks[1].problem {
			t.Errorf("%s: %+v", node, checks)
		}
	}
	if checks := accelChecks(accelerator{}, redirect.AccelerateOff); len(checks) != 0 {
		t.Errorf("%+v", checks)
	}
}

func TestAccelMetrics(t *testing.T) {
	gather := func(a accelerator, node redirect.Accelerate, want string) {
		t.Helper()
		r := prometheus.NewPedanticRegistry()
		r.MustRegister(newAccelMetrics(a, node, slog.New(slog.DiscardHandler)))
		if err := testutil.GatherAndCompare(r, strings.NewReader(want)); err != nil {
			t.Error(err)
		}
		problems, err := testutil.GatherAndLint(r)
		if err != nil || len(problems) > 0 {
			t.Error(problems, err)
		}
	}
	const info = `# HELP sluice_acceleration_info 1 for each place (peer, loopback) where connections could be accelerated: whether pods without an annotation are, and why or what was measured.
# TYPE sluice_acceleration_info gauge
sluice_acceleration_info{place="loopback",reason="check unread (ipv4 client): wrong",state="off"} 1
sluice_acceleration_info{place="peer",reason="times as fast: stream_64k 0.90",state="on"} 1
`
	gather(accelerator{places: places(), err: errors.New("gone")}, redirect.AccelerateOn, info)
	gather(accelerator{places: places(), events: map[string]uint64{"joined": 3}}, redirect.AccelerateOn,
		`# HELP sluice_acceleration_events_total What happened to accelerated connections: joined (both ends are), full (no room in a map); of their directions: early (began by TCP), behind (changed to TCP, the reader being too far behind), caught_up (changed back), gone (the other end had closed), stuck (stay with TCP: streams of much data, or several threads sent at once).
# TYPE sluice_acceleration_events_total counter
sluice_acceleration_events_total{event="joined"} 3
`+info)
	gather(accelerator{}, redirect.AccelerateOff, "")
}
