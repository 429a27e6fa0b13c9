package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
	"golang.org/x/sys/unix"
)

const (
	// agentAddr is where the agent tells what it has taken.
	agentAddr = "127.0.0.1:15090"
	// agentDeadline bounds how long that takes: emulated machines are slow.
	agentDeadline = 90 * time.Second
)

// chosen runs an agent with the setting auto, which is the default, and returns
// the backend that it takes and why that is not eBPF, as its metrics say.
func chosen(agent string) (backend, reason string, err error) {
	dir, err := os.MkdirTemp("", "sluice-facts-")
	if err != nil {
		return "", "", err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	source := filepath.Join(dir, "source")
	for _, d := range []string{source, filepath.Join(dir, "bpf")} {
		if err := os.Mkdir(d, 0o700); err != nil {
			return "", "", err
		}
	}
	state := []string{
		"--state-dir=" + filepath.Join(dir, "state"), "--pin-dir=" + filepath.Join(dir, "bpf", "sluice"),
		"--cni-socket=" + filepath.Join(dir, "cni.sock"),
	}
	cmd := exec.Command(agent, append([]string{"run", "--source=files:" + source, "--http-addr=" + agentAddr}, state...)...)
	cmd.Stdout, cmd.Stderr = os.Stderr, os.Stderr
	if err := cmd.Start(); err != nil {
		return "", "", fmt.Errorf("start agent: %w", err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	backend, reason, err = askUntil(ended)
	if errors.Is(err, errEnded) {
		return "", "", err
	}
	err = errors.Join(err, cmd.Process.Signal(unix.SIGTERM), <-ended)
	uninstall := exec.Command(agent, append([]string{"uninstall"}, state...)...)
	if out, uerr := uninstall.CombinedOutput(); uerr != nil {
		err = errors.Join(err, fmt.Errorf("uninstall: %w: %s", uerr, out))
	}
	return backend, reason, err
}

// errEnded means that the agent has ended by itself.
var errEnded = errors.New("the agent has ended")

// askUntil asks the agent until it answers.
func askUntil(ended <-chan error) (backend, reason string, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), agentDeadline)
	defer cancel()
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for {
		backend, reason, err := ask(ctx)
		if err == nil {
			return backend, reason, nil
		}
		select {
		case e := <-ended:
			return "", "", fmt.Errorf("%w: %w", errEnded, e)
		case <-ctx.Done():
			return "", "", fmt.Errorf("ask agent: not answered after %v: %w", agentDeadline, err)
		case <-tick.C:
		}
	}
}

// ask reads the labels of sluice_backend_info.
func ask(ctx context.Context) (backend, reason string, err error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+agentAddr+"/metrics", nil)
	if err != nil {
		return "", "", err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return "", "", err
	}
	defer func() { _ = resp.Body.Close() }()
	if resp.StatusCode != http.StatusOK {
		b, _ := io.ReadAll(io.LimitReader(resp.Body, 1000))
		return "", "", fmt.Errorf("%s: %s", resp.Status, b)
	}
	parser := expfmt.NewTextParser(model.UTF8Validation)
	families, err := parser.TextToMetricFamilies(resp.Body)
	if err != nil {
		return "", "", fmt.Errorf("read metrics: %w", err)
	}
	const name = "sluice_backend_info"
	info := families[name].GetMetric()
	if len(info) != 1 {
		return "", "", fmt.Errorf("read metrics: %d of %s, want 1", len(info), name)
	}
	for _, l := range info[0].GetLabel() {
		switch l.GetName() {
		case "backend":
			backend = l.GetValue()
		case "reason":
			reason = l.GetValue()
		}
	}
	return backend, reason, nil
}
