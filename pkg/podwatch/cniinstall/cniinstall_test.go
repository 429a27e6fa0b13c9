package cniinstall

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/containernetworking/cni/libcni"
	"github.com/fsnotify/fsnotify"
	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/sluicemesh/sluice/tests/need"
	"github.com/sluicemesh/sluice/tests/netnstest"
)

func TestMain(m *testing.M) { os.Exit(netnstest.VerifyNoLeaks(m)) }

// A node is the two directories of CNI, and a plugin to install.
type node struct {
	tb   testing.TB
	opts Options
	logs *logs
}

func newNode(tb testing.TB, files map[string]string) node {
	tb.Helper()
	base := tb.TempDir()
	n := node{tb: tb, logs: &logs{}, opts: Options{
		ConfDir: filepath.Join(base, "net.d"), BinDir: filepath.Join(base, "bin"),
		Plugin: filepath.Join(base, "plugin"),
		Socket: "/run/sluice/cni.sock", ExcludeNamespaces: []string{"kube-system", "sluice-system"},
	}}
	n.opts.Log = slog.New(slog.NewTextHandler(n.logs, &slog.HandlerOptions{Level: slog.LevelDebug}))
	for _, dir := range []string{n.opts.ConfDir, n.opts.BinDir} {
		if err := os.Mkdir(dir, 0o755); err != nil {
			tb.Fatal(err)
		}
	}
	n.writeFile(n.opts.Plugin, "#!/bin/sh\nexit 0\n", 0o700)
	for name, content := range files {
		n.write(name, content)
	}
	return n
}

func (n node) writeFile(path, content string, mode os.FileMode) {
	n.tb.Helper()
	if err := os.WriteFile(path, []byte(content), mode); err != nil {
		n.tb.Fatal(err)
	}
}

// write writes a configuration the way a careful installer does.
func (n node) write(name, content string) {
	n.tb.Helper()
	tmp := filepath.Join(n.opts.ConfDir, name+".rival")
	n.writeFile(tmp, content, 0o644)
	if err := os.Rename(tmp, filepath.Join(n.opts.ConfDir, name)); err != nil {
		n.tb.Fatal(err)
	}
}

func (n node) remove(name string) {
	n.tb.Helper()
	if err := os.Remove(filepath.Join(n.opts.ConfDir, name)); err != nil {
		n.tb.Fatal(err)
	}
}

// files returns everything in the directory of configurations.
func (n node) files() map[string]string {
	n.tb.Helper()
	entries, err := os.ReadDir(n.opts.ConfDir)
	if err != nil {
		n.tb.Fatal(err)
	}
	files := map[string]string{}
	for _, e := range entries {
		b, err := os.ReadFile(filepath.Join(n.opts.ConfDir, e.Name()))
		if errors.Is(err, fs.ErrNotExist) {
			continue // it has become another file meanwhile
		}
		if err != nil {
			n.tb.Fatal(err)
		}
		files[e.Name()] = string(b)
	}
	return files
}

// runtime loads the primary configuration the way containerd does: the first
// file has to be right.
func (n node) runtime() (*libcni.NetworkConfigList, string, error) {
	names, err := libcni.ConfFiles(n.opts.ConfDir, []string{".conf", ".conflist", ".json"})
	if err != nil || len(names) == 0 {
		return nil, "", errors.Join(err, fs.ErrNotExist)
	}
	slices.Sort(names)
	if filepath.Ext(names[0]) == ".conflist" {
		list, err := libcni.ConfListFromFile(names[0])
		return list, names[0], err
	}
	// Runtimes still read single configurations, so they are tested.
	conf, err := libcni.ConfFromFile(names[0]) //nolint:staticcheck // see above
	if err != nil {
		return nil, names[0], err
	}
	list, err := libcni.ConfListFromConf(conf) //nolint:staticcheck // see above
	return list, names[0], err
}

// types are the plugins that the runtime would call.
func (n node) types() []string {
	n.tb.Helper()
	list, _, err := n.runtime()
	if err != nil {
		n.tb.Fatalf("runtime: %v", err)
	}
	var types []string
	for _, p := range list.Plugins {
		types = append(types, p.Network.Type)
	}
	return types
}

// installed says whether the runtime would call the plugin last and once.
func (n node) installed() bool {
	list, _, err := n.runtime()
	if err != nil {
		return false
	}
	count := 0
	for _, p := range list.Plugins {
		if p.Network.Type == PluginType {
			count++
		}
	}
	return count == 1 && list.Plugins[len(list.Plugins)-1].Network.Type == PluginType
}

// start runs an installer until the test ends or stop is called.
func (n node) start(change ...func(*Options)) (i *Installer, stop func()) {
	n.tb.Helper()
	o := n.opts
	for _, c := range change {
		c(&o)
	}
	i, err := New(o)
	if err != nil {
		n.tb.Fatal(err)
	}
	return i, n.run(i)
}

func (n node) run(i *Installer) (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- i.Run(ctx) }()
	stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			n.tb.Errorf("Run: %v", err)
		}
	})
	n.tb.Cleanup(stop)
	return stop
}

// install runs an installer until it has installed.
func (n node) install(change ...func(*Options)) {
	n.tb.Helper()
	i, stop := n.start(change...)
	n.until("installed", func() bool { return i.Status().Installed() })
	stop()
}

func (n node) uninstall() {
	n.tb.Helper()
	if err := Uninstall(context.Background(), n.opts); err != nil {
		n.tb.Fatal(err)
	}
}

// until waits for a condition.
func (n node) until(what string, ok func() bool) time.Duration {
	n.tb.Helper()
	begin := time.Now()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for !ok() {
		if time.Since(begin) > 10*time.Second {
			n.tb.Fatalf("not %s within 10 s; files %v\n%s", what, n.files(), n.logs)
		}
		<-tick.C
	}
	return time.Since(begin)
}

// logs collects what was logged.
type logs struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *logs) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *logs) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

func TestInstallUninstall(t *testing.T) {
	for name, files := range realWorld() {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			n := newNode(t, files)
			was, _, err := n.runtime()
			if err != nil {
				t.Fatal(err)
			}
			types := append(n.types(), PluginType)
			n.install()

			list, _, err := n.runtime()
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(types, n.types()); diff != "" {
				t.Errorf("plugins (-want +got):\n%s", diff)
			}
			if list.Name != was.Name || list.CNIVersion != was.CNIVersion || list.DisableCheck != was.DisableCheck {
				t.Errorf("network is %s %s %t, was %s %s %t", list.Name, list.CNIVersion, list.DisableCheck, was.Name, was.CNIVersion, was.DisableCheck)
			}
			for i, p := range was.Plugins {
				if !bytes.Equal(p.Bytes, list.Plugins[i].Bytes) {
					t.Errorf("plugin %d is\n%s, was\n%s", i, list.Plugins[i].Bytes, p.Bytes)
				}
			}
			var got map[string]any
			if err := json.Unmarshal(list.Plugins[len(list.Plugins)-1].Bytes, &got); err != nil {
				t.Fatal(err)
			}
			want := map[string]any{
				"type": "sluice-cni", "managedBy": "sluice-agent", "socket": "/run/sluice/cni.sock",
				"excludeNamespaces": []any{"kube-system", "sluice-system"},
			}
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("entry (-want +got):\n%s", diff)
			}

			// A second one changes nothing.
			before := n.files()
			n.install()
			if diff := cmp.Diff(before, n.files()); diff != "" {
				t.Errorf("a second installer changed (-before +after):\n%s", diff)
			}

			n.uninstall()
			if diff := cmp.Diff(files, n.files()); diff != "" {
				t.Errorf("after Uninstall (-want +got):\n%s", diff)
			}
			if entries, err := os.ReadDir(n.opts.BinDir); err != nil || len(entries) > 0 {
				t.Errorf("after Uninstall there are plugins %v, %v", entries, err)
			}
			n.uninstall() // nothing to do is fine
		})
	}
}

// TestKilled ends the installer before each of its steps and at each looks what
// a runtime would see.
func TestKilled(t *testing.T) {
	for name, files := range realWorld() {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			n := newNode(t, files)
			was, _, err := n.runtime()
			if err != nil {
				t.Fatal(err)
			}
			n.install()
			installed := n.files()
			n.uninstall()
			// whole says whether a runtime finds the network, with or without us.
			whole := func(at string) {
				list, _, err := n.runtime()
				if err != nil || list.Name != was.Name || len(list.Plugins) < len(was.Plugins) {
					t.Errorf("%s: the runtime finds %v, %v", at, list, err)
				}
				if err == nil && n.installed() {
					if _, err := os.Stat(filepath.Join(n.opts.BinDir, PluginType)); err != nil {
						t.Errorf("%s: there is an entry without its binary", at)
					}
				}
			}
			for _, verb := range []string{"install", "uninstall"} {
				steps := 0
				for done := false; !done; steps++ {
					if verb == "uninstall" {
						n.install()
					}
					step := 0
					done = killedAt(func(name string) {
						whole(verb + " before " + name)
						if step++; step > steps {
							panic(killed{})
						}
					}, func(before func(string)) error {
						if verb == "uninstall" {
							return uninstall(context.Background(), n.opts, before)
						}
						i, err := newInstaller(n.opts, fsnotify.NewWatcher, before)
						if err == nil {
							err = i.ensure()
						}
						return err
					}, t)
					whole("after " + verb)

					n.install()
					if diff := cmp.Diff(installed, n.files()); diff != "" {
						t.Errorf("%s killed at step %d: what the next installer made of it (-want +got):\n%s", verb, steps, diff)
					}
					n.uninstall()
					if diff := cmp.Diff(files, n.files()); diff != "" {
						t.Fatalf("%s killed at step %d, then installed and uninstalled (-want +got):\n%s", verb, steps, diff)
					}
				}
				if steps < 4 {
					t.Errorf("%s has %d steps", verb, steps)
				}
			}
		})
	}
}

type killed struct{}

// killedAt runs f, which before may end as a kill would, and says whether it
// came to its end.
func killedAt(before func(string), f func(before func(string)) error, tb testing.TB) (done bool) {
	defer func() {
		switch r := recover().(type) {
		case nil:
		case killed:
			done = false
		default:
			panic(r)
		}
	}()
	if err := f(before); err != nil {
		tb.Error(err)
	}
	return true
}

func TestPutBackAtOnce(t *testing.T) {
	conf := realWorld()["kindnet"]["10-kindnet.conflist"]
	n := newNode(t, map[string]string{"10-kindnet.conflist": conf})
	i, _ := n.start(func(o *Options) { o.Burst = 1000 })
	n.until("installed", func() bool { return i.Status().Installed() })
	for name, undo := range map[string]func(){
		"renamed into place": func() { n.write("10-kindnet.conflist", conf) },
		"written in place": func() {
			n.writeFile(filepath.Join(n.opts.ConfDir, "10-kindnet.conflist"), conf, 0o644)
		},
		"removed and made anew": func() {
			n.remove("10-kindnet.conflist")
			n.write("10-kindnet.conflist", conf)
		},
		"binary removed": func() {
			if err := os.Remove(filepath.Join(n.opts.BinDir, PluginType)); err != nil {
				t.Fatal(err)
			}
		},
	} {
		before := i.Repairs()
		const times = 5
		best := time.Hour // the machine may be busy
		for k := range uint64(times) {
			undo()
			best = min(best, n.until("put back after "+name, func() bool {
				_, err := os.Stat(filepath.Join(n.opts.BinDir, PluginType))
				return n.installed() && err == nil
			}))
			n.until("counted", func() bool { return i.Repairs() == before+k+1 && i.Err() == nil })
		}
		t.Logf("%s: put back after %v", name, best)
		if best > 100*time.Millisecond {
			t.Errorf("%s: put back after %v", name, best)
		}
	}
}

// TestRival fights another installer for a while.
func TestRival(t *testing.T) {
	conf := realWorld()["kindnet"]["10-kindnet.conflist"]
	n := newNode(t, map[string]string{"10-kindnet.conflist": conf})
	i, _ := n.start(func(o *Options) { o.MaxBackoff = 300 * time.Millisecond })
	n.until("installed", func() bool { return i.Status().Installed() })

	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	fought, undone := false, 0
	for end := time.Now().Add(2 * time.Second); time.Now().Before(end); <-tick.C {
		if n.installed() {
			n.write("10-kindnet.conflist", conf)
			undone++
		}
		s := i.Status()
		fought = fought || s.Fighting && s.Err != nil
		if _, _, err := n.runtime(); err != nil {
			t.Fatalf("the runtime finds a broken configuration: %v", err)
		}
	}
	// 5 at once, and then one each 300 ms.
	if repairs := i.Repairs(); repairs < 6 || repairs > 14 {
		t.Errorf("put back %d times in 2 s", repairs)
	}
	if !fought {
		t.Error("Status never told of the fight")
	}
	if undone < 6 {
		t.Errorf("the rival undid it %d times", undone)
	}
	n.until("put back when the rival is done", func() bool { return i.Status().Installed() && n.installed() })
	if got := strings.Count(n.logs.String(), "another program keeps"); got != 1 {
		t.Errorf("the fight was logged %d times:\n%s", got, n.logs)
	}
	n.until("told that it is over", func() bool {
		return !i.Status().Fighting && strings.Count(n.logs.String(), "is in place") == 1
	})
}

func TestPrimaryMoves(t *testing.T) {
	all := realWorld()
	single := all["a single configuration"]
	for name, first := range map[string]map[string]string{"from a list": all["kindnet"], "from a single one": single} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			n := newNode(t, first)
			i, _ := n.start()
			n.until("installed", func() bool { return i.Status().Installed() })

			n.write("05-cilium.conflist", all["cilium, exclusive"]["05-cilium.conflist"])
			n.until("moved", func() bool {
				return i.Status().Conf == filepath.Join(n.opts.ConfDir, "05-cilium.conflist") && i.Err() == nil
			})
			got := n.files()
			if !strings.Contains(got["05-cilium.conflist"], PluginType) {
				t.Error("no entry in the new configuration")
			}
			delete(got, "05-cilium.conflist")
			if diff := cmp.Diff(first, got); diff != "" {
				t.Errorf("the others (-want +got):\n%s", diff)
			}

			n.remove("05-cilium.conflist")
			n.until("moved back", func() bool { return n.installed() && i.Err() == nil })
		})
	}
}

// TestExclusive is what Cilium does: it puts its own configuration down and
// renames all others.
func TestExclusive(t *testing.T) {
	all := realWorld()
	n := newNode(t, all["kindnet"])
	i, stop := n.start()
	n.until("installed", func() bool { return i.Status().Installed() })
	n.write("05-cilium.conflist", all["cilium, exclusive"]["05-cilium.conflist"])
	old := filepath.Join(n.opts.ConfDir, "10-kindnet.conflist")
	if err := os.Rename(old, old+".cilium_bak"); err != nil {
		t.Fatal(err)
	}
	n.until("moved", func() bool { return n.installed() && i.Err() == nil })
	stop()
	n.uninstall()
	want := map[string]string{
		"05-cilium.conflist":             all["cilium, exclusive"]["05-cilium.conflist"],
		"10-kindnet.conflist.cilium_bak": all["kindnet"]["10-kindnet.conflist"],
	}
	if diff := cmp.Diff(want, n.files()); diff != "" {
		t.Errorf("after Uninstall (-want +got):\n%s", diff)
	}
}

// TestSingleComesBack: an installer that knows of no lists writes its single
// configuration again.
func TestSingleComesBack(t *testing.T) {
	for _, c := range []struct{ set, name, old, new string }{
		{"a single configuration", "10-bridge.conf", "10.200", "10.200"},
		{"a single configuration", "10-bridge.conf", "10.200", "10.201"},
		{"a single configuration, .json", "net.json", "1.50e3", "1.50e3"},
		{"a single configuration, .json", "net.json", "1.50e3", "1.40e3"},
	} {
		t.Run(c.name+" "+c.new, func(t *testing.T) {
			t.Parallel()
			files := realWorld()[c.set]
			n := newNode(t, files)
			i, stop := n.start()
			n.until("installed", func() bool { return i.Status().Installed() })
			next := strings.Replace(files[c.name], c.old, c.new, 1)
			n.write(c.name, next)
			n.until("turned into a list again", func() bool {
				_, there := n.files()[c.name]
				return n.installed() && !there && i.Err() == nil
			})
			stop()
			if got, want := len(n.files()), len(files)+1; got != want {
				t.Errorf("there are %d files, want %d: %v", got, want, n.files())
			}
			if got := n.files()[listNames(c.name)[0]]; !strings.Contains(got, c.new) {
				t.Errorf("the network is %s", got)
			}
			n.uninstall()
			files[c.name] = next
			if diff := cmp.Diff(files, n.files()); diff != "" {
				t.Errorf("after Uninstall (-want +got):\n%s", diff)
			}
		})
	}
}

// TestEditedSince: what others changed after the installation stays.
func TestEditedSince(t *testing.T) {
	for name, c := range map[string]struct{ set, file string }{
		"a list":   {"kindnet", "10-kindnet.conflist"},
		"a single": {"a single configuration", "10-bridge.conflist"},
	} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t, realWorld()[c.set])
			n.install()
			edited := strings.Replace(n.files()[c.file], `"isGateway": true`, `"isGateway": true, "mtu": 1400`, 1)
			edited = strings.Replace(edited, `1500`, `1400`, 1)
			n.write(c.file, edited)
			n.uninstall()
			list, path, err := n.runtime()
			if err != nil {
				t.Fatal(err)
			}
			if s := string(list.Bytes); !strings.Contains(s, "1400") || strings.Contains(s, PluginType) {
				t.Errorf("after Uninstall %s is %s", path, s)
			}
			for name := range n.files() {
				if strings.Contains(name, "sluice") {
					t.Errorf("after Uninstall there is %s", name)
				}
			}
		})
	}
}

func TestEntriesReplaced(t *testing.T) {
	for name, list := range map[string]string{
		"of an older version": `[{"type":"bridge"},{"type":"sluice-cni","socket":"/old.sock","logLevel":"debug"}]`,
		"not last":            `[{"type":"bridge"},{"type":"sluice-cni","managedBy":"sluice-agent","socket":"/run/sluice/cni.sock","excludeNamespaces":["kube-system","sluice-system"]},{"type":"portmap"}]`,
		"first":               `[{"type":"sluice-cni"},{"type":"bridge"}]`,
		"several":             `[{"type":"sluice-cni"}, {"type":"sluice-cni"}, {"type":"bridge"}, {"type":"sluice-cni"}, {"type":"sluice-cni"}]`,
	} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t, map[string]string{"a.conflist": `{"cniVersion":"1.0.0","name":"n","plugins":` + list + `}`})
			n.install()
			if !n.installed() {
				t.Errorf("plugins are %v", n.types())
			}
			n.uninstall()
			if slices.Contains(n.types(), PluginType) {
				t.Errorf("after Uninstall plugins are %v", n.types())
			}
		})
	}
	t.Run("other namespaces", func(t *testing.T) {
		n := newNode(t, realWorld()["flannel"])
		n.install()
		n.install(func(o *Options) { o.ExcludeNamespaces = []string{"kube-system", "dns"} })
		if got := n.files()["10-flannel.conflist"]; !strings.Contains(got, `"dns"`) || strings.Contains(got, "sluice-system") {
			t.Errorf("the configuration is %s", got)
		}
	})
}

// TestNotPossible: each is told and changes nothing.
func TestNotPossible(t *testing.T) {
	for name, c := range map[string]struct {
		files map[string]string
		want  string
	}{
		"no configuration":  {nil, "the cluster's network is not installed yet"},
		"old version":       {map[string]string{"a.conflist": `{"cniVersion":"0.2.0","name":"n","plugins":[{"type":"bridge"}]}`}, `a.conflist: cniVersion is "0.2.0"`},
		"no version":        {map[string]string{"a.conf": `{"name":"n","type":"bridge"}`}, `a.conf: cniVersion is ""`},
		"future version":    {map[string]string{"a.conflist": `{"cniVersion":"2.0.0","name":"n","plugins":[{"type":"bridge"}]}`}, `a.conflist: cniVersion is "2.0.0"`},
		"only our plugin":   {map[string]string{"a.conflist": `{"cniVersion":"1.0.0","name":"n","plugins":[{"type":"sluice-cni"}]}`}, "no plugin but sluice-cni"},
		"plugins elsewhere": {map[string]string{"a.conflist": `{"cniVersion":"1.0.0","name":"n"}`}, `in the directory "n"`},
		"being written":     {map[string]string{"a.conflist": `{"cniVersion":"1.0.0","na`, "b.conflist": `{"cniVersion":"1.0.0","name":"n","plugins":[{"type":"bridge"}]}`}, "in the middle of being written"},
		"names are taken": {map[string]string{
			"a.conf": `{"cniVersion":"1.0.0","name":"n","type":"bridge"}`, "a.conf.conflist": `{"cniVersion":"1.0.0","name":"o","plugins":[{"type":"bridge"}]}`,
		}, "other files stand where that would be"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			n := newNode(t, c.files)
			i, _ := n.start()
			n.until("told", func() bool { return i.Err() != nil && strings.Contains(i.Err().Error(), c.want) })
			if s := i.Status(); s.Installed() || s.Conf != "" || s.Repairs != 0 {
				t.Errorf("status is %+v", s)
			}
			if c.files == nil {
				c.files = map[string]string{}
			}
			if diff := cmp.Diff(c.files, n.files()); diff != "" {
				t.Errorf("files (-want +got):\n%s", diff)
			}
		})
	}
}

func TestBrokenBefore(t *testing.T) {
	n := newNode(t, map[string]string{"a.conflist": `{`, "b.conflist": `{"cniVersion":"1.0.0","name":"n","plugins":[{"type":"bridge"}]}`})
	old := time.Now().Add(-time.Minute)
	if err := os.Chtimes(filepath.Join(n.opts.ConfDir, "a.conflist"), old, old); err != nil {
		t.Fatal(err)
	}
	n.install()
	if got := n.files()["b.conflist"]; !strings.Contains(got, PluginType) {
		t.Errorf("b.conflist is %s", got)
	}
	if !strings.Contains(n.logs.String(), "containerd stops at it") {
		t.Errorf("the broken one is not mentioned:\n%s", n.logs)
	}
}

func TestNetworkComesLater(t *testing.T) {
	n := newNode(t, nil)
	i, _ := n.start()
	n.until("waiting", func() bool { return errors.Is(i.Err(), errNoConf) })
	n.write("10-flannel.conflist", realWorld()["flannel"]["10-flannel.conflist"])
	n.until("installed", n.installed)
}

func TestModeKept(t *testing.T) {
	need.Root(t)
	for _, set := range []string{"kindnet", "a single configuration"} {
		n := newNode(t, realWorld()[set])
		name := "10-kindnet.conflist"
		if set != "kindnet" {
			name = "10-bridge.conf"
		}
		path := filepath.Join(n.opts.ConfDir, name)
		if err := errors.Join(os.Chmod(path, 0o600), os.Chown(path, 1001, 1002)); err != nil {
			t.Fatal(err)
		}
		same := func(when string) {
			_, path, err := n.runtime()
			if err != nil {
				t.Fatal(err)
			}
			info, err := os.Stat(path)
			if err != nil {
				t.Fatal(err)
			}
			st := info.Sys().(*syscall.Stat_t)
			if info.Mode() != 0o600 || st.Uid != 1001 || st.Gid != 1002 {
				t.Errorf("%s: %s has mode %v, owner %d:%d", when, path, info.Mode(), st.Uid, st.Gid)
			}
		}
		n.install()
		same("installed")
		n.uninstall()
		same("uninstalled")
	}
}

func TestReadOnly(t *testing.T) {
	need.Root(t)
	for _, dir := range []string{"net.d", "bin"} {
		t.Run(dir, func(t *testing.T) {
			n := newNode(t, nil)
			path := filepath.Join(filepath.Dir(n.opts.ConfDir), dir)
			if err := unix.Mount("test", path, "tmpfs", 0, "size=1m"); err != nil {
				t.Fatalf("mount: %v", err)
			}
			t.Cleanup(func() {
				if err := unix.Unmount(path, 0); err != nil {
					t.Errorf("unmount: %v", err)
				}
			})
			files := realWorld()["kindnet"]
			n.write("10-kindnet.conflist", files["10-kindnet.conflist"])
			if err := unix.Mount("", path, "", unix.MS_REMOUNT|unix.MS_RDONLY, ""); err != nil {
				t.Fatalf("remount: %v", err)
			}
			i, stop := n.start()
			n.until("told", func() bool {
				return i.Err() != nil && strings.Contains(i.Err().Error(), "mount the directory writable")
			})
			if diff := cmp.Diff(files, n.files()); diff != "" {
				t.Errorf("files (-want +got):\n%s", diff)
			}
			if err := unix.Mount("", path, "", unix.MS_REMOUNT, ""); err != nil {
				t.Fatalf("remount: %v", err)
			}
			n.until("installed", func() bool { return i.Status().Installed() })
			stop()
		})
	}
}

func TestSymbolicLink(t *testing.T) {
	files := realWorld()["kindnet"]
	n := newNode(t, nil)
	target := filepath.Join(t.TempDir(), "elsewhere")
	link := filepath.Join(n.opts.ConfDir, "10-kindnet.conflist")
	if err := os.Symlink(target, link); err != nil {
		t.Fatal(err)
	}
	i, stop := n.start()
	n.until("told", func() bool { return i.Err() != nil && strings.Contains(i.Err().Error(), "symbolic link to "+target) })
	n.writeFile(target, files["10-kindnet.conflist"], 0o644)
	n.until("installed", func() bool { return i.Status().Installed() })
	stop()
	if info, err := os.Lstat(link); err != nil || info.Mode()&os.ModeSymlink == 0 {
		t.Errorf("the link is %v, %v", info, err)
	}
	n.uninstall()
	if diff := cmp.Diff(files, n.files()); diff != "" {
		t.Errorf("after Uninstall (-want +got):\n%s", diff)
	}
}

func TestBlind(t *testing.T) {
	conf := realWorld()["kindnet"]
	n := newNode(t, conf)
	i, err := newInstaller(n.opts, func() (*fsnotify.Watcher, error) { return nil, syscall.EMFILE }, func(string) {})
	if err != nil {
		t.Fatal(err)
	}
	n.run(i)
	n.until("installed", func() bool { return i.Status().Installed() })
	n.write("10-kindnet.conflist", conf["10-kindnet.conflist"])
	n.until("put back", func() bool { return n.installed() })
	if err := i.Status().Blind; err == nil || !strings.Contains(err.Error(), "max_user_instances") {
		t.Errorf("Blind is %v", err)
	}
	if err := i.Err(); err != nil {
		t.Errorf("Err is %v", err)
	}
}

func TestDirectoryGoesAndComes(t *testing.T) {
	conf := realWorld()["kindnet"]
	n := newNode(t, conf)
	i, _ := n.start()
	n.until("installed", func() bool { return i.Status().Installed() })
	if err := os.Rename(n.opts.ConfDir, n.opts.ConfDir+".old"); err != nil {
		t.Fatal(err)
	}
	n.until("told", func() bool { return errors.Is(i.Err(), fs.ErrNotExist) })
	if err := os.Mkdir(n.opts.ConfDir, 0o755); err != nil {
		t.Fatal(err)
	}
	n.write("10-kindnet.conflist", conf["10-kindnet.conflist"])
	n.until("installed in the new one", func() bool { return n.installed() && i.Err() == nil })
	n.write("10-kindnet.conflist", conf["10-kindnet.conflist"])
	// Without a watch it would take until the next poll.
	if took := n.until("put back in the new one", n.installed); took > 5*time.Second {
		t.Errorf("put back after %v", took)
	}
}

// TestDirectoryDeletedUnderMount: a mount keeps a deleted directory open, as an
// open file does.
func TestDirectoryDeletedUnderMount(t *testing.T) {
	n := newNode(t, nil)
	dir, err := os.Open(n.opts.ConfDir)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = dir.Close() }()
	if err := os.Remove(n.opts.ConfDir); err != nil {
		t.Fatal(err)
	}
	n.opts.ConfDir = fmt.Sprintf("/proc/self/fd/%d", dir.Fd())
	i, err := New(n.opts)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	if err := i.Run(ctx); !errors.Is(err, ErrDirGone) {
		t.Errorf("Run: %v", err)
	}
}

// TestPluginReplaced executes the plugin without pause while it is replaced.
func TestPluginReplaced(t *testing.T) {
	n := newNode(t, realWorld()["kindnet"])
	i, _ := n.start(func(o *Options) { o.Poll = 5 * time.Millisecond })
	n.until("installed", func() bool { return i.Status().Installed() })
	target := filepath.Join(n.opts.BinDir, PluginType)
	for version := range 20 {
		script := fmt.Sprintf("#!/bin/sh\necho %d\n", version)
		tmp := n.opts.Plugin + ".new"
		n.writeFile(tmp, script, 0o700)
		if err := os.Rename(tmp, n.opts.Plugin); err != nil {
			t.Fatal(err)
		}
		n.until("replaced", func() bool {
			out, err := exec.Command(target).Output()
			if err != nil {
				t.Fatalf("run plugin: %v", err)
			}
			return strings.TrimSpace(string(out)) == fmt.Sprint(version)
		})
	}
	if info, err := os.Stat(target); err != nil || info.Mode() != 0o755 {
		t.Errorf("plugin: %v, %v", info, err)
	}
	if err := os.Chmod(target, 0o600); err != nil {
		t.Fatal(err)
	}
	n.until("executable again", func() bool {
		info, err := os.Stat(target)
		return err == nil && info.Mode() == 0o755
	})
}

func TestNoPlugin(t *testing.T) {
	files := realWorld()["kindnet"]
	n := newNode(t, files)
	if err := os.Remove(n.opts.Plugin); err != nil {
		t.Fatal(err)
	}
	i, _ := n.start()
	n.until("told", func() bool { return errors.Is(i.Err(), fs.ErrNotExist) })
	if diff := cmp.Diff(files, n.files()); diff != "" {
		t.Errorf("there is an entry without a binary (-want +got):\n%s", diff)
	}
}

func TestLeftOvers(t *testing.T) {
	n := newNode(t, realWorld()["kindnet"])
	n.write(".sluice-cni-123.tmp", "half")
	n.writeFile(filepath.Join(n.opts.BinDir, ".sluice-cni-9.tmp"), "half", 0o755)
	n.install()
	if _, err := os.Stat(filepath.Join(n.opts.BinDir, ".sluice-cni-9.tmp")); err == nil {
		t.Error("half a binary stays")
	}
	if len(n.files()) != 1 {
		t.Errorf("files are %v", n.files())
	}
}

func TestUninstallKeepsBinary(t *testing.T) {
	n := newNode(t, realWorld()["kindnet"])
	n.install()
	// What cannot be read may have an entry.
	if err := os.Mkdir(filepath.Join(n.opts.ConfDir, "x"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mkfifo(filepath.Join(n.opts.ConfDir, "11-x.conflist"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := Uninstall(t.Context(), n.opts); err == nil || !strings.Contains(err.Error(), "11-x.conflist: is no regular file") {
		t.Errorf("Uninstall: %v", err)
	}
	if _, err := os.Stat(filepath.Join(n.opts.BinDir, PluginType)); err != nil {
		t.Error("the binary is gone although a configuration may need it")
	}
	if b, err := os.ReadFile(filepath.Join(n.opts.ConfDir, "10-kindnet.conflist")); err != nil || strings.Contains(string(b), PluginType) {
		t.Errorf("the readable configuration still has the entry: %s, %v", b, err)
	}
}

// TestUninstallWithCRIO: pods that were made with the plugin are ended with it.
func TestUninstallWithCRIO(t *testing.T) {
	for comm, stays := range map[string]bool{"crio\n": true, "containerd\n": false, "crio-x\n": false} {
		n := newNode(t, realWorld()["kindnet"])
		n.install()
		n.opts.Proc = t.TempDir()
		if err := os.Mkdir(filepath.Join(n.opts.Proc, "12"), 0o755); err != nil {
			t.Fatal(err)
		}
		n.writeFile(filepath.Join(n.opts.Proc, "12/comm"), comm, 0o644)
		n.uninstall()
		if diff := cmp.Diff(realWorld()["kindnet"], n.files()); diff != "" {
			t.Errorf("after Uninstall (-want +got):\n%s", diff)
		}
		if _, err := os.Stat(filepath.Join(n.opts.BinDir, PluginType)); (err == nil) != stays {
			t.Errorf("with %q the binary: %v", comm, err)
		}
	}
}

func TestUninstallNowhere(t *testing.T) {
	o := Options{ConfDir: filepath.Join(t.TempDir(), "a"), BinDir: filepath.Join(t.TempDir(), "b")}
	if err := Uninstall(t.Context(), o); err != nil {
		t.Errorf("Uninstall where nothing is: %v", err)
	}
}

func TestBadOptions(t *testing.T) {
	good := Options{ConfDir: "/c", BinDir: "/b", Plugin: "/p"}
	for want, change := range map[string]func(*Options){
		"configurations":  func(o *Options) { o.ConfDir = "c" },
		"plugins":         func(o *Options) { o.BinDir = "" },
		"no plugin given": func(o *Options) { o.Plugin = "" },
		"socket \"x\"":    func(o *Options) { o.Socket = "x" },
		"has no name":     func(o *Options) { o.ExcludeNamespaces = []string{""} },
	} {
		o := good
		change(&o)
		if _, err := New(o); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("New: %v, want %s", err, want)
		}
	}
	if _, err := New(good); err != nil {
		t.Error(err)
	}
}

func TestLimiter(t *testing.T) {
	l := limiter{burst: 3, refill: 10 * time.Second, backoff: 4 * time.Second}
	now := time.Unix(0, 0)
	for _, c := range []struct{ after, want time.Duration }{
		{0, 0},
		{0, 0},
		{0, 0},
		{0, time.Second}, // the bucket is empty
		{500 * time.Millisecond, 500 * time.Millisecond},
		{500 * time.Millisecond, 0}, // one, and the next pause
		{0, 2 * time.Second},
		{2 * time.Second, 0},
		{0, 4 * time.Second},
		{4 * time.Second, 0},
		{0, 4 * time.Second},
		{9 * time.Second, 0},
		{0, 0},
		{0, 0},
		{0, time.Second}, // it was quiet
	} {
		now = now.Add(c.after)
		if got := l.take(now); got != c.want {
			t.Fatalf("at %v: wait %v, want %v", now.Sub(time.Unix(0, 0)), got, c.want)
		}
	}
	slow := limiter{burst: 2, refill: 10 * time.Second, backoff: 30 * time.Second}
	for range 20 {
		now = now.Add(10 * time.Second)
		if wait := slow.take(now); wait != 0 {
			t.Fatalf("one change each 10 s has to wait %v", wait)
		}
	}
}

func FuzzEntry(f *testing.F) {
	for _, files := range realWorld() {
		for _, content := range files {
			f.Add([]byte(content))
		}
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		list, err := load("a.conflist", data)
		if err != nil || hasEntry(data, func(s span) bool { return s.own }) {
			return
		}
		with, err := withEntry(data, entry{Type: PluginType, Socket: "/s"})
		if err != nil {
			t.Fatalf("withEntry: %v", err)
		}
		got, err := load("a.conflist", with)
		if err != nil || len(got.Plugins) != len(list.Plugins)+1 || got.Plugins[len(list.Plugins)].Network.Type != PluginType {
			t.Fatalf("with the entry it is %s: %v", with, err)
		}
		without, err := withoutEntry(with)
		if err != nil || !bytes.Equal(without, data) {
			t.Fatalf("without it again it is %s, was %s: %v", without, data, err)
		}
	})
}
