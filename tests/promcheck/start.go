package promcheck

import (
	"bytes"
	"context"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/sluicemesh/sluice/tests/need"
	"github.com/sluicemesh/sluice/tests/netnstest"
)

const addr = "127.0.0.1:9090"

// Tool demands a program of Prometheus' package, prometheus or promtool, and
// returns its path.
func Tool(tb testing.TB, name string) string {
	tb.Helper()
	path := filepath.Join(need.Repo(tb), ".tools", "prometheus", name)
	if _, err := os.Stat(path); err != nil {
		need.Missing(tb, path+", see tests/setup/setup.sh prometheus")
	}
	return path
}

// Start runs a Prometheus inside ns with a configuration, YAML, and returns once
// it answers. It listens there on loopback and ends with the test.
func Start(tb testing.TB, ns netnstest.Namespace, config string) Prometheus {
	tb.Helper()
	program := Tool(tb, "prometheus")
	dir := tb.TempDir()
	file := filepath.Join(dir, "prometheus.yml")
	if err := os.WriteFile(file, []byte(config), 0o600); err != nil {
		tb.Fatal(err)
	}
	var log bytes.Buffer
	cmd := exec.Command(program, "--config.file="+file, "--storage.tsdb.path="+filepath.Join(dir, "data"),
		"--web.listen-address="+addr, "--log.level=warn")
	cmd.Stdout, cmd.Stderr = &log, &log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := ns.Do(cmd.Start); err != nil {
		tb.Fatalf("start Prometheus: %v", err)
	}
	exited := make(chan struct{})
	go func() {
		defer close(exited)
		_ = cmd.Wait() // however it ends, the log says why
	}()
	p := Prometheus{URL: "http://" + addr, Client: &http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
			return ns.Dial(ctx, network, addr)
		},
	}}}
	tb.Cleanup(func() {
		_ = cmd.Process.Kill()
		<-exited
		if tb.Failed() {
			tb.Logf("Prometheus logged:\n%s", log.String())
		}
	})
	ctx, cancel := context.WithTimeout(tb.Context(), 30*time.Second)
	defer cancel()
	err := Poll(ctx, func() error {
		_, err := p.Query(ctx, "vector(1)")
		return err
	})
	if err != nil {
		tb.Fatalf("wait for Prometheus: %v", err)
	}
	return p
}
