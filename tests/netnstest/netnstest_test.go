package netnstest_test

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/sluicemesh/sluice/tests/need"
	"github.com/sluicemesh/sluice/tests/netnstest"
)

func TestMain(m *testing.M) { os.Exit(netnstest.VerifyNoLeaks(m)) }

func TestEveryoneReachesAPod(t *testing.T) {
	n := netnstest.NewNode(t)
	a, b, r := n.Pod(t, "a"), n.Pod(t, "b"), n.Remote(t, "r")
	net1 := b.Attach(t, "extra")
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()

	b.Serve(t, netip.MustParseAddrPort("[::]:8080"), "six")
	b.Serve(t, netip.MustParseAddrPort("0.0.0.0:8081"), "four")
	for _, tc := range []struct {
		name string
		from netnstest.Namespace
		peer []netip.Addr
	}{
		{"same node", a.Namespace, a.Addrs()},
		{"other network", r.Namespace, r.Addrs()},
		{"node", n.Namespace, []netip.Addr{n.Addr4(), n.Addr6()}},
		{"itself", b.Namespace, b.Addrs()},
	} {
		for i, addr := range []netip.AddrPort{netip.AddrPortFrom(b.Addr4, 8081), netip.AddrPortFrom(b.Addr6, 8080)} {
			got, err := tc.from.Ask(ctx, addr)
			if err != nil {
				t.Errorf("%s to %s: %v", tc.name, addr, err)
				continue
			}
			if got.Name != []string{"four", "six"}[i] || got.Peer.Addr() != tc.peer[i] || got.Local != addr {
				t.Errorf("%s to %s: got %+v", tc.name, addr, got)
			}
		}
	}
	if _, err := r.Ask(ctx, netip.AddrPortFrom(net1.Addr4, 8081)); err != nil {
		t.Errorf("second interface: %v", err)
	}
}

func TestOneFamily(t *testing.T) {
	n := netnstest.NewNode(t)
	four := n.PodWith(t, "four", netnstest.PodOptions{NoIPv6: true})
	six := n.PodWith(t, "six", netnstest.PodOptions{NoIPv4: true})
	if got := four.Addrs(); len(got) != 1 || !got[0].Is4() {
		t.Errorf("IPv4 only: addresses %v", got)
	}
	if got := six.Addrs(); len(got) != 1 || !got[0].Is6() {
		t.Errorf("IPv6 only: addresses %v", got)
	}
}

func TestEchoOnAnOpenConnection(t *testing.T) {
	n := netnstest.NewNode(t)
	a, b := n.Pod(t, "a"), n.Pod(t, "b")
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	s := b.Serve(t, netip.AddrPortFrom(b.Addr4, 0), "b")
	c, err := a.Dial(ctx, "tcp", s.Addr.String())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = c.Close() }()
	if _, err := netnstest.ReadAnswer(ctx, c); err != nil {
		t.Fatal(err)
	}
	if err := netnstest.Echo(ctx, c, "hello"); err != nil {
		t.Fatal(err)
	}
}

func TestCommand(t *testing.T) {
	n := netnstest.NewNode(t)
	out, err := n.Command(t, 1337, need.Tool(t, "id"), "-u").CombinedOutput()
	if err != nil || strings.TrimSpace(string(out)) != "1337" {
		t.Errorf("id -u: %q, %v", out, err)
	}
	inside, err := n.Command(t, 0, need.Tool(t, "readlink"), "/proc/self/ns/net").CombinedOutput()
	if err != nil {
		t.Fatal(err)
	}
	outside, err := os.Readlink("/proc/self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	if strings.TrimSpace(string(inside)) == outside {
		t.Error("the command ran outside the namespace")
	}
	sleep := n.Command(t, 0, need.Tool(t, "sleep"), "3600")
	if err := sleep.Start(); err != nil {
		t.Fatal(err)
	}
	sleep.Kill()
	if err := sleep.Wait(); err == nil {
		t.Error("a killed command ended well")
	}
}

func TestStateShowsAChange(t *testing.T) {
	n := netnstest.NewNode(t)
	p := n.Pod(t, "p")
	before := p.State(t)
	if diff := before.Diff(p.State(t)); diff != "" {
		t.Fatalf("nothing was changed:\n%s", diff)
	}
	p.Serve(t, netip.MustParseAddrPort("127.0.0.1:9"), "nine")
	if before.Diff(p.State(t)) == "" {
		t.Error("a listener was not seen")
	}
	before = p.State(t)
	out, err := p.Command(t, 0, need.Tool(t, "iptables"), "-A", "OUTPUT", "-j", "ACCEPT").CombinedOutput()
	if err != nil {
		t.Fatalf("iptables: %v\n%s", err, out)
	}
	if before.Diff(p.State(t)) == "" {
		t.Error("a packet filter rule was not seen")
	}
}

// TestInterrupted: Cleanup functions do not run then, and nothing stays all the
// same. The test is its own victim, in another process.
func TestInterrupted(t *testing.T) {
	need.Root(t)
	sleep := need.Tool(t, "sleep")
	const env = "SLUICE_TEST_INTERRUPTED"
	if os.Getenv(env) != "" {
		c := netnstest.NewNode(t).Pod(t, "p").Command(t, 0, sleep, "3600")
		if err := c.Start(); err != nil {
			t.Fatal(err)
		}
		fmt.Println("temp", t.TempDir())
		fmt.Println("child", c.Process.Pid)
		<-t.Context().Done()
		return
	}
	for _, sig := range []os.Signal{os.Interrupt, syscall.SIGTERM} {
		victim := exec.CommandContext(t.Context(), os.Args[0], "-test.run", "^TestInterrupted$")
		victim.Env = append(os.Environ(), env+"=1")
		out, err := victim.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := victim.Start(); err != nil {
			t.Fatal(err)
		}
		var temp string
		var child int
		if _, err := fmt.Fscanf(out, "temp %s\nchild %d\n", &temp, &child); err != nil {
			t.Fatalf("the victim does not say what it has made: %v", err)
		}
		if err := victim.Process.Signal(sig); err != nil {
			t.Fatal(err)
		}
		if err := victim.Wait(); err == nil {
			t.Errorf("%v: tests that were interrupted pass", sig)
		}
		left, err := filepath.Glob(fmt.Sprintf("/run/netns/slt%d-*", victim.Process.Pid))
		if err != nil || len(left) > 0 {
			t.Errorf("%v: namespaces left: %v, %v", sig, left, err)
		}
		if _, err := os.Stat(temp); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%v: temporary files are left in %s: %v", sig, temp, err)
		}
		// A zombie has no command line.
		if cmdline, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", child)); err == nil && strings.Contains(string(cmdline), "3600") {
			t.Errorf("%v: process %d is left", sig, child)
		}
	}
}
