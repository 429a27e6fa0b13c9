package cgroup_test

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/sluicemesh/sluice/pkg/redirect/cgroup"
	"github.com/sluicemesh/sluice/tests/need"
	"github.com/sluicemesh/sluice/tests/netnstest"
)

// peerEnv names the socket that the process is to connect to, and no more.
const peerEnv = "SLUICE_TEST_PEER"

func TestMain(m *testing.M) {
	if name := os.Getenv(peerEnv); name != "" {
		c, err := net.Dial("unix", name)
		if err == nil {
			_, err = c.Read(make([]byte, 1)) // until it is killed
		}
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(netnstest.VerifyNoLeaks(m))
}

// tree makes directories; those that end in * have a process in them.
func tree(t *testing.T, dirs ...string) string {
	t.Helper()
	root := t.TempDir()
	for _, dir := range dirs {
		path, inUse := strings.CutSuffix(dir, "*")
		path = filepath.Join(root, path)
		if err := os.MkdirAll(path, 0o755); err != nil {
			t.Fatal(err)
		}
		events := fmt.Sprintf("populated %d\nfrozen 0\n", map[bool]int{true: 1}[inUse])
		if err := os.WriteFile(filepath.Join(path, "cgroup.events"), []byte(events), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return root
}

func TestPods(t *testing.T) {
	var many []string
	for i := range cgroup.MaxPods + 1 {
		many = append(many, fmt.Sprintf("%d/kubepods*", i))
	}
	for _, tc := range []struct {
		name string
		dirs []string
		want []string
		err  string
	}{
		{"systemd driver", []string{"system.slice*", "kubepods.slice*"}, []string{"kubepods.slice"}, ""},
		{"cgroupfs driver", []string{"kubepods*", "kubepods/burstable*"}, []string{"kubepods"}, ""},
		{"root of the kubelet's own", []string{"kubelet.slice/kubelet-kubepods.slice*"}, []string{"kubelet.slice/kubelet-kubepods.slice"}, ""},
		{"node in a container", []string{"docker/1/kubelet/kubepods*"}, []string{"docker/1/kubelet/kubepods"}, ""},
		{"not looked for inside pods", []string{"kubepods/pod1/kubepods*", "kubepods*"}, []string{"kubepods"}, ""},
		{"driver was changed", []string{"kubepods.slice*", "kubepods"}, []string{"kubepods", "kubepods.slice"}, ""},
		{"none", []string{"system.slice*", "mykubepods*"}, nil, "there is no cgroup kubepods"},
		{"too deep", []string{"a/b/c/d/e/f/kubepods*"}, nil, "there is no cgroup kubepods"},
		{"nobody in it", []string{"kubepods.slice"}, nil, "no process is in cgroup"},
		{"too many", many, nil, "there are 33 cgroups"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			root := tree(t, tc.dirs...)
			got, err := cgroup.Pods(root)
			if tc.err != "" {
				if !errors.Is(err, cgroup.ErrUnknown) || !strings.Contains(err.Error(), tc.err) {
					t.Errorf("got %v, want ErrUnknown with %q", err, tc.err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			var paths []string
			for _, c := range got {
				rel, err := filepath.Rel(root, c.Path)
				if err != nil {
					t.Fatal(err)
				}
				paths = append(paths, rel)
				if again, err := cgroup.Get(c.Path); err != nil || again != c {
					t.Errorf("Get(%s) = %v, %v; want %v", c.Path, again, err, c)
				}
			}
			slices.Sort(paths)
			if !slices.Equal(paths, tc.want) {
				t.Errorf("got %v, want %v", paths, tc.want)
			}
		})
	}
}

// TestRoot: the root is the one without cgroup.events, and its cgroups have ids.
func TestRoot(t *testing.T) {
	need.EBPF(t)
	dir := netnstest.NewCgroup(t)
	root, err := cgroup.Root()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(root, "cgroup.events")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("%s is not the root: %v", root, err)
	}
	if c, err := cgroup.Get(dir); err != nil || c.ID == 0 || filepath.Dir(c.Path) != root {
		t.Errorf("Get(%s) = %+v, %v; want a cgroup in %s", dir, c, err, root)
	}
}
