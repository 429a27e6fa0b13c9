package redirecttest

import (
	"net/netip"
	"os"
	"testing"

	"github.com/sluicemesh/sluice/tests/netnstest"
)

// A Dialer is a process of its own that opens connections when told to. Use it
// where it matters in which cgroup the client is.
type Dialer struct{ proxy *proxy }

// StartDialer starts one inside ns, in the cgroup at dir, which is made if
// absent. It ends with tb. TestMain must call Main.
func StartDialer(tb testing.TB, ns netnstest.Namespace, dir string) *Dialer {
	tb.Helper()
	if err := os.MkdirAll(dir, 0o755); err != nil {
		tb.Fatalf("make cgroup: %v", err)
	}
	return &Dialer{startIn(tb, ns, dir, 0, dialer)}
}

// Ask connects and returns the name of who answers.
func (d *Dialer) Ask(to netip.AddrPort) (name string, err error) {
	a, err := d.proxy.dial(to, netip.Addr{})
	return a.Name, err
}

// Begin begins n connections and leaves them as they are.
func (d *Dialer) Begin(to netip.AddrPort, n int) error {
	_, err := d.proxy.order(order{Dial: to, Begin: n, Keep: true})
	return err
}

// Abandon begins n connections and closes each at once.
func (d *Dialer) Abandon(to netip.AddrPort, n int) error {
	_, err := d.proxy.order(order{Dial: to, Begin: n})
	return err
}

// Kill ends the process, and with it its connections.
func (d *Dialer) Kill() { d.proxy.stop() }
