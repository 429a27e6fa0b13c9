package cgroup_test

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/sluicemesh/sluice/pkg/redirect/cgroup"
	"github.com/sluicemesh/sluice/tests/need"
	"github.com/sluicemesh/sluice/tests/netnstest"
)

func TestContainer(t *testing.T) {
	const uid = "0a1b2c3d-0000-4000-8000-0123456789ab"
	id, other := strings.Repeat("ab", 32), strings.Repeat("cd", 32)
	systemd := "kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod" + strings.ReplaceAll(uid, "-", "_") + ".slice"
	for _, tc := range []struct{ name, dir, want string }{
		{"driver cgroupfs", "kubepods/burstable/pod" + uid + "/" + id, "/kubepods/burstable/pod" + uid + "/" + id},
		{"guaranteed", "kubepods/pod" + uid + "/" + id, "/kubepods/pod" + uid + "/" + id},
		{"driver systemd", systemd + "/cri-containerd-" + id + ".scope", "/" + systemd + "/cri-containerd-" + id + ".scope"},
		{"kubelet's own root", "docker/1/kubelet/kubepods/pod" + uid + "/" + id, "/docker/1/kubelet/kubepods/pod" + uid + "/" + id},
		{"another container", "kubepods/pod" + uid + "/" + other, ""},
		{"another pod's", "kubepods/pod" + strings.Replace(uid, "0", "f", 1) + "/" + id, ""},
		// What a container calls a cgroup of its own means nothing.
		{"below another container", "kubepods/pod" + uid + "/" + other + "/" + id, ""},
		{"a pod's name below another", "kubepods/pod" + strings.Replace(uid, "0", "f", 1) + "/pod" + uid + "/" + id, ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			root := tree(t, tc.dir)
			kubepods := filepath.Join(root, tc.dir[:strings.Index(tc.dir, "kubepods")], strings.SplitN(tc.dir[strings.Index(tc.dir, "kubepods"):], "/", 2)[0])
			if err := os.WriteFile(filepath.Join(kubepods, "cgroup.events"), []byte("populated 1\n"), 0o600); err != nil {
				t.Fatal(err)
			}
			got, err := cgroup.Container(root, uid, id)
			if err != nil || got != tc.want {
				t.Errorf("Container() = %q, %v; want %q", got, err, tc.want)
			}
		})
	}
	if _, err := cgroup.Container(tree(t, "system.slice*"), uid, id); !errors.Is(err, cgroup.ErrUnknown) {
		t.Errorf("without cgroups of pods: got %v, want ErrUnknown", err)
	}
}

// TestPeerIn asks of real processes in real cgroups where they are.
func TestPeerIn(t *testing.T) {
	need.Root(t)
	dir := netnstest.NewCgroup(t)
	root, err := cgroup.Root()
	if err != nil {
		t.Fatal(err)
	}
	path := func(name string) string {
		rel, err := filepath.Rel(root, filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		return "/" + rel
	}
	ns := netnstest.New(t, "peer")
	name := fmt.Sprintf("@sluice-test-%d", os.Getpid())
	var l *net.UnixListener
	if err := ns.Do(func() (err error) {
		l, err = net.ListenUnix("unix", &net.UnixAddr{Name: name, Net: "unix"})
		return err
	}); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	if err := l.SetDeadline(time.Now().Add(30 * time.Second)); err != nil {
		t.Fatal(err)
	}
	for where, want := range map[string]bool{"proxy": true, "proxy/below": true, "app": false, "proxy2": false, "app/proxy": false} {
		if err := os.MkdirAll(filepath.Join(dir, where), 0o755); err != nil {
			t.Fatal(err)
		}
		cmd := ns.Command(t, 1337, "/proc/self/exe")
		cmd.Env, cmd.Stderr = []string{peerEnv + "=" + name}, os.Stderr
		cmd.In(filepath.Join(dir, where))
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		c, err := l.AcceptUnix()
		if err != nil {
			t.Fatal(err)
		}
		if got, err := cgroup.PeerIn(c, "/proc", path("proxy")); err != nil || got != want {
			t.Errorf("process in %s: PeerIn() = %v, %v; want %v", where, got, err, want)
		}
		cmd.Kill()
		if got, err := cgroup.PeerIn(c, "/proc", path("proxy")); err != nil || got {
			t.Errorf("process in %s that has ended: PeerIn() = %v, %v", where, got, err)
		}
		_ = c.Close()
	}
}
