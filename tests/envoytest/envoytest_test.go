package envoytest_test

import (
	"bufio"
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluicemesh/sluice/pkg/redirect/netns"
	"github.com/sluicemesh/sluice/tests/envoytest"
	"github.com/sluicemesh/sluice/tests/need"
)

const bootstrap = `
admin: {address: {socket_address: {address: 127.0.0.1, port_value: 15000}}}
static_resources:
  listeners:
  - name: hello
    address: {socket_address: {address: 127.0.0.1, port_value: 8080}}
    filter_chains:
    - filters:
      - name: hello
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.direct_response.v3.Config
          response: {inline_string: "hello from envoy\n"}
    access_log:
    - name: stdout
      typed_config:
        "@type": type.googleapis.com/envoy.extensions.access_loggers.stream.v3.StdoutAccessLog
        log_format: {text_format_source: {inline_string: "%DOWNSTREAM_LOCAL_ADDRESS%\n"}}
`

func TestStart(t *testing.T) {
	need.Root(t)
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	for i := range 2 { // at once, on the same addresses
		ns := newNamespace(t)
		e := envoytest.Start(t, envoytest.Options{Name: fmt.Sprintf("envoy%d", i), Netns: ns, Config: []byte(bootstrap)})
		if err := e.WaitReady(ctx); err != nil {
			t.Fatal(err)
		}
		status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", e.PID()))
		if err != nil {
			t.Fatal(err)
		}
		if !strings.Contains(string(status), "Uid:\t1337\t1337\t1337\t1337") {
			t.Errorf("Envoy does not run as 1337:\n%s", status)
		}
		if got := hello(t, ns); got != "hello from envoy\n" {
			t.Errorf("got %q", got)
		}
		lines := e.WaitAccessLog(ctx, func(l string) bool { return l == "127.0.0.1:8080" })
		if len(lines) != 1 {
			t.Errorf("access log %q, want one line", lines)
		}
		if got := e.Stats(ctx, "^listener.127.0.0.1_8080.downstream_cx_total$")["listener.127.0.0.1_8080.downstream_cx_total"]; got != 1 {
			t.Errorf("%d connections, want 1", got)
		}
		if dump := e.ConfigDump(ctx); !strings.Contains(string(dump), "hello from envoy") {
			t.Errorf("configuration dump without the listener:\n%s", dump)
		}
	}
}

func TestCheck(t *testing.T) {
	envoytest.Validate(t, []byte(bootstrap))
	err := envoytest.Check(t, []byte(strings.Replace(bootstrap, "port_value: 8080", "port_value: 99999", 1)))
	if err == nil || !strings.Contains(err.Error(), "PortValue") {
		t.Errorf("got %v, want Envoy's complaint about the port", err)
	}
}

func hello(t *testing.T, ns string) string {
	t.Helper()
	var line string
	err := netns.Do(ns, func() error {
		conn, err := net.DialTimeout("tcp", "127.0.0.1:8080", 10*time.Second)
		if err != nil {
			return err
		}
		defer func() { _ = conn.Close() }()
		if err := conn.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
			return err
		}
		line, err = bufio.NewReader(conn).ReadString('\n')
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return line
}

// newNamespace returns a path to a namespace with its loopback up.
func newNamespace(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "net")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread dies in its namespace
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			done <- err
			return
		}
		if err := loopbackUp(); err != nil {
			done <- err
			return
		}
		done <- unix.Mount("/proc/thread-self/ns/net", path, "", unix.MS_BIND, "")
	}()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Unmount(path, unix.MNT_DETACH) })
	return path
}

func loopbackUp() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer func() { _ = unix.Close(fd) }()
	req, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	req.SetUint16(unix.IFF_UP)
	return unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, req)
}
