package sluicetest

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
)

// PinDir is where the agent keeps what is pinned: in a bpffs that it mounts and
// uninstall unmounts.
func PinDir() string { return filepath.Join(os.TempDir(), "bpf", "sluice") }

// binaries builds agent and plugin once a test process and returns their directory.
var binaries = sync.OnceValues(func() (string, error) {
	dir := filepath.Join(os.TempDir(), "bin")
	if err := errors.Join(os.Mkdir(dir, 0o700), os.Mkdir(filepath.Dir(PinDir()), 0o700)); err != nil {
		return "", err
	}
	cmd := exec.Command("go", "build", "-o", dir+"/", "github.com/sluicemesh/sluice/cmd/agent", "github.com/sluicemesh/sluice/cmd/cni")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build: %w\n%s", err, out)
	}
	return dir, errors.Join(
		os.Rename(filepath.Join(dir, "agent"), filepath.Join(dir, "sluice-agent")),
		os.Rename(filepath.Join(dir, "cni"), filepath.Join(dir, "sluice-cni")))
})
