package apps

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sluicemesh/sluice/tests/netnstest"
)

// enterEnv carries a container to this program started again, which becomes
// what runs in it.
const enterEnv = "SLUICE_APPS_CONTAINER"

// A container is what a program sees of the machine. Its network is that of the
// pod it is started in.
type container struct {
	// Layers are directories with usr and etc that lie over the machine's, the
	// first on top.
	Layers []string
	// UID is the user and group to run as.
	UID int
	// Dir is the working directory.
	Dir string
	// Env is the whole environment.
	Env []string
	// Script is for the shell, which is process 1.
	Script string
}

// command prepares the container as a program of the pod: everything in it ends
// with it.
func (c container) command(t *testing.T, pod netnstest.Namespace) *netnstest.Cmd {
	t.Helper()
	b, err := json.Marshal(c)
	if err != nil {
		t.Fatal(err)
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := pod.Command(t, 0, self)
	cmd.Env = []string{enterEnv + "=" + string(b)}
	cmd.SysProcAttr.Cloneflags = unix.CLONE_NEWNS | unix.CLONE_NEWPID | unix.CLONE_NEWIPC | unix.CLONE_NEWUTS
	return cmd
}

// enter becomes the script of the container that it was started for, with
// namespaces of its own already. It returns only if that is not possible.
func enter(spec string) error {
	var c container
	if err := json.Unmarshal([]byte(spec), &c); err != nil {
		return fmt.Errorf("parse container: %w", err)
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	for _, dir := range []string{"usr", "etc"} {
		var lower []string
		for _, l := range append(c.Layers, "/") {
			if l = filepath.Join(l, dir); isDir(l) {
				lower = append(lower, strings.NewReplacer(`\`, `\\`, `:`, `\:`, `,`, `\,`).Replace(l))
			}
		}
		// Without an upper layer: nothing can be written.
		if err := unix.Mount("overlay", "/"+dir, "overlay", unix.MS_RDONLY, "lowerdir="+strings.Join(lower, ":")); err != nil {
			return fmt.Errorf("lay packages over /%s: %w", dir, err)
		}
	}
	if err := unix.Mount("tmpfs", "/run", "tmpfs", 0, "mode=0755"); err != nil {
		return fmt.Errorf("mount /run: %w", err)
	}
	if err := os.Mkdir("/run/sshd", 0o755); err != nil { // what its service would make
		return err
	}
	if err := unix.Mount("proc", "/proc", "proc", 0, ""); err != nil {
		return fmt.Errorf("mount /proc: %w", err)
	}
	if err := errors.Join(unix.Sethostname([]byte("pod")), os.Chdir(c.Dir)); err != nil {
		return err
	}
	if err := errors.Join(syscall.Setgroups(nil), syscall.Setgid(c.UID), syscall.Setuid(c.UID)); err != nil {
		return fmt.Errorf("become user %d: %w", c.UID, err)
	}
	return fmt.Errorf("run shell: %w", syscall.Exec("/bin/sh", []string{"sh", "-euc", c.Script}, c.Env))
}

func isDir(path string) bool {
	fi, err := os.Stat(path)
	return err == nil && fi.IsDir()
}
