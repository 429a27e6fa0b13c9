package podwatch

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/fsnotify/fsnotify"
	"github.com/google/go-cmp/cmp"
)

// A watching is a running Files on a directory of its own.
type watching struct {
	t        *testing.T
	dir      string
	store    *Store
	files    *Files
	problems chan []Problem
}

// start runs a Files on a new directory with these files.
func start(t *testing.T, files map[string]string, change ...func(*FilesOptions)) *watching {
	t.Helper()
	w := &watching{t: t, dir: filepath.Join(t.TempDir(), "source"), store: NewStore(StoreOptions{}), problems: make(chan []Problem, 100)}
	if err := os.Mkdir(w.dir, 0o755); err != nil {
		t.Fatal(err)
	}
	for name, text := range files {
		w.write(name, text)
	}
	o := FilesOptions{Dir: w.dir, Store: w.store, Node: "this", Report: func(p []Problem) { w.problems <- p }}
	for _, c := range change {
		c(&o)
	}
	var err error
	if w.files, err = NewFiles(o); err != nil {
		t.Fatal(err)
	}
	w.run()
	return w
}

// run runs w.files until the test ends, and returns when it is synced.
func (w *watching) run() {
	w.t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- w.files.Run(ctx) }()
	w.t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			w.t.Errorf("Run: %v", err)
		}
	})
	select {
	case <-w.store.Synced():
	case <-time.After(10 * time.Second):
		w.t.Fatal("not synced after 10s")
	}
}

func (w *watching) path(name string) string { return filepath.Join(w.dir, name) }

func (w *watching) must(err error) {
	w.t.Helper()
	if err != nil {
		w.t.Fatal(err)
	}
}

// write replaces a file the way careful writers do: aside, then renamed.
func (w *watching) write(name, text string) {
	w.t.Helper()
	w.must(os.WriteFile(w.path(name+".tmp"), []byte(text), 0o644))
	w.must(os.Rename(w.path(name+".tmp"), w.path(name)))
}

// wait waits until the services are those that are wanted, each written
// "name=port".
func (w *watching) wait(want ...string) {
	w.t.Helper()
	w.eventually(func() string { return cmp.Diff(append([]string{}, want...), w.services()) })
}

func (w *watching) services() []string {
	got := []string{}
	for _, s := range w.store.Services() {
		got = append(got, fmt.Sprintf("%s=%d", s.Name, s.Ports[0].Port))
	}
	return got
}

// eventually waits, change by change, until check returns no difference.
func (w *watching) eventually(check func() string) {
	w.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	for {
		diff := check()
		if diff == "" {
			return
		}
		if _, err := w.store.Wait(ctx); err != nil {
			if diff = check(); diff != "" {
				w.t.Fatalf("after 10s (-want +got):\n%s", diff)
			}
			return
		}
	}
}

// waitProblems waits until the problems are those that are wanted.
func (w *watching) waitProblems(want ...string) {
	w.t.Helper()
	deadline := time.After(10 * time.Second)
	for {
		diff := cmp.Diff(append([]string{}, want...), texts(w.files.Problems()))
		if diff == "" {
			return
		}
		select {
		case <-w.problems:
		case <-deadline:
			w.t.Fatalf("problems after 10s (-want +got):\n%s", diff)
		}
	}
}

func texts(problems []Problem) []string {
	list := []string{}
	for _, p := range problems {
		list = append(list, p.String())
	}
	return list
}

func service(name string, port int) string {
	return fmt.Sprintf("---\napiVersion: v1\nkind: Service\nmetadata: {name: %s, namespace: shop}\nspec:\n  selector: {app: %s}\n  ports: [{port: %d}]\n", name, name, port)
}

func pod(name, app, more string) string {
	return fmt.Sprintf("---\napiVersion: v1\nkind: Pod\nmetadata: {name: %s, namespace: shop, labels: {app: %s}}\nspec: {containers: [{name: app}]}\n%s\n", name, app, more)
}

func TestFilesFollow(t *testing.T) {
	w := start(t, map[string]string{
		"a.yaml": service("a", 1) + service("b", 2), "b.yml": service("c", 3), "c.txt": service("no", 1), ".d.yaml": service("no", 1),
	})
	w.wait("a=1", "b=2", "c=3")

	w.write("a.yaml", service("a", 10)+service("b", 2))
	w.wait("a=10", "b=2", "c=3")
	w.write("new.json", `{"apiVersion": "v1", "kind": "Service", "metadata": {"name": "j"}, "spec": {"ports": [{"port": 5}]}}`)
	w.wait("j=5", "a=10", "b=2", "c=3")
	w.must(os.Remove(w.path("new.json")))
	w.wait("a=10", "b=2", "c=3")
	w.write("a.yaml", service("a", 10))
	w.wait("a=10", "c=3")
	// Moved within, out of, and into the directory.
	w.must(os.Rename(w.path("b.yml"), w.path("e.yaml")))
	w.write("a.yaml", service("a", 11))
	w.wait("a=11", "c=3")
	aside := filepath.Join(t.TempDir(), "aside")
	w.must(os.Rename(w.path("e.yaml"), aside))
	w.wait("a=11")
	w.must(os.Rename(aside, w.path("f.yaml")))
	w.wait("a=11", "c=3")
	// Written in place.
	w.must(os.WriteFile(w.path("f.yaml"), []byte(service("c", 4)), 0o644))
	w.wait("a=11", "c=4")
	w.must(os.Mkdir(w.path("dir.yaml"), 0o755))
	w.write("f.yaml", "# nothing any more\n")
	w.wait("a=11")
	w.waitProblems()
}

// TestFilesSwap swaps a directory the way kubelet does with ConfigMaps.
func TestFilesSwap(t *testing.T) {
	w := start(t, nil)
	for i, dir := range []string{"..1", "..2", "..3"} {
		w.must(os.Mkdir(w.path(dir), 0o755))
		w.must(os.WriteFile(filepath.Join(w.dir, dir, "a.yaml"), []byte(service("a", i+1)), 0o644))
		w.must(os.Symlink(dir, w.path("..data_tmp")))
		w.must(os.Rename(w.path("..data_tmp"), w.path("..data")))
		if i == 0 {
			w.must(os.Symlink("..data/a.yaml", w.path("a.yaml")))
		}
		w.wait(fmt.Sprintf("a=%d", i+1))
	}
}

func TestLastGoodStays(t *testing.T) {
	broken := strings.Replace(service("b", 2), "port: 2", "port: x", 1)
	const brokenText = `spec.ports[0].port: must be an integer, is the string "x"`
	for name, tc := range map[string]struct {
		first, then string
		want        []string
		problems    []string
	}{
		"document is broken": {
			service("a", 1) + service("b", 2), service("a", 3) + broken,
			[]string{"a=3", "b=2"},
			[]string{"f.yaml:14: Service shop/b: " + brokenText},
		},
		"document is broken, another one removed": {
			service("a", 1) + service("b", 2) + service("c", 3), service("a", 3) + broken,
			[]string{"a=3", "b=2"},
			[]string{"f.yaml:14: Service shop/b: " + brokenText},
		},
		"document is broken from the start": {
			service("a", 1), service("a", 3) + broken,
			[]string{"a=3"},
			[]string{"f.yaml:14: Service shop/b: " + brokenText},
		},
		"one document does not parse": {
			service("a", 1) + service("b", 2), "---\nkind: [\n" + service("b", 4),
			[]string{"a=1", "b=4"},
			[]string{"f.yaml:2: not YAML: did not find expected node content"},
		},
		"nothing parses": {
			service("a", 1) + service("b", 2), "\tx",
			[]string{"a=1", "b=2"},
			[]string{"f.yaml:1: not YAML: found character that cannot start any token"},
		},
		"truncated to nothing": {
			service("a", 1) + service("b", 2), "",
			[]string{"a=1", "b=2"},
			[]string{"f.yaml:1: is empty: its objects stay until it has content or is deleted"},
		},
		"kind is misspelt": {
			service("a", 1) + service("b", 2), service("a", 3) + strings.Replace(service("b", 4), "Service", "Servce", 1),
			[]string{"a=3", "b=2"},
			[]string{"f.yaml:10: Servce shop/b: unknown kind Servce of v1, ignored"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			w := start(t, map[string]string{"f.yaml": tc.first})
			w.write("f.yaml", tc.then)
			w.waitProblems(tc.problems...)
			w.wait(tc.want...)
			// It stays so, however often the broken file is written.
			w.write("f.yaml", "# again\n"+tc.then)
			if tc.then != "" {
				w.waitProblems(w.moved(tc.problems)...)
				w.wait(tc.want...)
			}
			w.write("f.yaml", service("b", 5))
			w.wait("b=5")
			w.waitProblems()
		})
	}
}

// moved adds one to the lines of problems of f.yaml.
func (w *watching) moved(problems []string) []string {
	var out []string
	for _, p := range problems {
		var line int
		if _, err := fmt.Sscanf(p, "f.yaml:%d:", &line); err != nil {
			w.t.Fatal(err)
		}
		out = append(out, strings.Replace(p, fmt.Sprint(line), fmt.Sprint(line+1), 1))
	}
	return out
}

// TestUnknownKind: a kind that Sluice does not know is a problem but does
// not keep objects of the same name alive.
func TestUnknownKind(t *testing.T) {
	deployment := "---\napiVersion: apps/v1\nkind: Deployment\nmetadata: {name: a, namespace: shop}\n"
	w := start(t, map[string]string{"f.yaml": deployment + service("a", 1)})
	w.waitProblems("f.yaml:3: Deployment shop/a: unknown kind Deployment of apps/v1, ignored")
	w.wait("a=1")
	w.write("f.yaml", deployment+service("b", 1))
	w.wait("b=1")
}

func TestDuplicates(t *testing.T) {
	w := start(t, map[string]string{"a.yaml": service("x", 1), "b.yaml": service("x", 2), "c.yaml": service("x", 3) + service("x", 4)})
	w.wait("x=1")
	w.waitProblems(
		"b.yaml:2: Service shop/x: is also in a.yaml:2, which is used",
		"c.yaml:2: Service shop/x: is also in a.yaml:2, which is used",
		"c.yaml:9: Service shop/x: is also in a.yaml:2, which is used",
	)
	// The first one is broken: still nothing changes.
	w.write("a.yaml", strings.Replace(service("x", 1), "port: 1", "port: 0", 1))
	w.waitProblems(
		"a.yaml:7: Service shop/x: spec.ports[0].port: Invalid value: 0: must be between 1 and 65535, inclusive",
		"b.yaml:2: Service shop/x: is also in a.yaml:2, which is used",
		"c.yaml:2: Service shop/x: is also in a.yaml:2, which is used",
		"c.yaml:9: Service shop/x: is also in a.yaml:2, which is used",
	)
	w.wait("x=1")
	w.must(os.Remove(w.path("a.yaml")))
	w.must(os.Remove(w.path("b.yaml")))
	w.wait("x=3")
	w.waitProblems("c.yaml:9: Service shop/x: is also in c.yaml:2, which is used")
}

func TestSharedClusterIP(t *testing.T) {
	withIP := func(name, ip string) string {
		return strings.Replace(service(name, 80), "spec:\n", "spec:\n  clusterIP: "+ip+"\n", 1)
	}
	w := start(t, map[string]string{"a.yaml": withIP("b", "10.96.0.1"), "b.yaml": withIP("a", "10.96.0.1"), "c.yaml": withIP("c", "10.96.0.2")})
	w.waitProblems("a.yaml:2: Service shop/b: spec.clusterIPs: 10.96.0.1 is also that of Service shop/a")
	w.write("b.yaml", withIP("a", "10.96.0.2"))
	w.waitProblems("c.yaml:2: Service shop/c: spec.clusterIPs: 10.96.0.2 is also that of Service shop/a")
	w.must(os.Remove(w.path("b.yaml")))
	w.waitProblems()
}

// TestBrokenElsewhere moves a document to another file and breaks it on the way.
func TestBrokenElsewhere(t *testing.T) {
	w := start(t, map[string]string{"a.yaml": service("x", 1), "b.yaml": service("y", 1)})
	w.wait("x=1", "y=1")
	w.write("b.yaml", service("y", 2)+strings.Replace(service("x", 1), "port: 1", "port: 0", 1))
	w.wait("x=1", "y=2")
	w.must(os.Remove(w.path("a.yaml")))
	w.write("c.yaml", service("z", 1))
	w.wait("x=1", "y=2", "z=1")
	w.write("b.yaml", service("x", 3))
	w.wait("x=3", "z=1")
	w.waitProblems()
}

func TestPodAddrs(t *testing.T) {
	w := start(t, map[string]string{"svc.yaml": service("web", 80)})
	one := addr("10.1.0.1")
	endpoints := func(want ...string) {
		t.Helper()
		w.eventually(func() string {
			return cmp.Diff(append([]string{}, want...), lines(w.store.SlicesOf("shop", "web")))
		})
	}
	// Before the YAML is there, and mapped into IPv6.
	w.files.SetPodAddrs("shop", "a", []netip.Addr{addr("::ffff:10.1.0.1"), addr("fd00::1")})
	w.write("a.yaml", pod("a", "web", ""))
	endpoints("web-derived-v4 =80 [10.1.0.1] a@this ready serving", "web-derived-v6 =80 [fd00::1] a@this ready serving")
	w.files.SetPodAddrs("shop", "a", []netip.Addr{one})
	endpoints("web-derived-v4 =80 [10.1.0.1] a@this ready serving")
	w.write("a.yaml", pod("a", "web", `status: {conditions: [{type: Ready, status: "False"}]}`))
	endpoints("web-derived-v4 =80 [10.1.0.1] a@this")
	w.write("a.yaml", pod("a", "web", `status: {podIP: 10.1.0.2, conditions: [{type: Ready, status: "True"}]}`))
	endpoints("web-derived-v4 =80 [10.1.0.2] a@this ready serving")
	w.write("a.yaml", strings.Replace(pod("a", "web", ""), "name: a,", "name: a, deletionTimestamp: 2026-01-01T00:00:00Z,", 1))
	endpoints("web-derived-v4 =80 [10.1.0.1] a@this serving terminating")
	w.files.SetPodAddrs("shop", "a", nil)
	endpoints()
	p, err := w.store.WaitPod(t.Context(), "shop", "a", "")
	if err != nil || !p.Terminating || p.Ready || p.Node != "this" {
		t.Errorf("WaitPod = %+v, %v", p, err)
	}
}

func TestDirectoryGoesAndComes(t *testing.T) {
	w := start(t, map[string]string{"a.yaml": service("a", 1)}, func(o *FilesOptions) { o.Rescan = 10 * time.Millisecond })
	w.must(os.RemoveAll(w.dir))
	w.waitProblems(w.dir + ": stat " + w.dir + ": no such file or directory; the last state stays")
	w.wait("a=1")
	w.must(os.Mkdir(w.dir, 0o755))
	w.write("a.yaml", service("a", 2))
	w.wait("a=2")
	w.waitProblems()
	// The new directory is watched.
	w.write("a.yaml", service("a", 3))
	w.wait("a=3")
}

// TestReplacedDirectory renames another directory over the watched one's place.
func TestReplacedDirectory(t *testing.T) {
	w := start(t, map[string]string{"a.yaml": service("a", 1)}, func(o *FilesOptions) { o.Rescan = time.Hour })
	other := w.dir + "-new"
	w.must(os.Mkdir(other, 0o755))
	w.must(os.WriteFile(filepath.Join(other, "b.yaml"), []byte(service("b", 2)), 0o644))
	w.must(os.Rename(w.dir, w.dir+"-old"))
	w.must(os.Rename(other, w.dir))
	w.wait("b=2")
	w.write("b.yaml", service("b", 3))
	w.wait("b=3")
}

// TestInotifyLimits: without inotify the directory is still followed, and the
// limit is named.
func TestInotifyLimits(t *testing.T) {
	for _, tc := range []struct {
		err  error
		want string
	}{
		{syscall.EMFILE, "fs.inotify.max_user_instances"},
		{syscall.ENOSPC, "fs.inotify.max_user_watches"},
	} {
		w := &watching{t: t, dir: t.TempDir(), store: NewStore(StoreOptions{}), problems: make(chan []Problem, 100)}
		files, err := newFiles(FilesOptions{Dir: w.dir, Store: w.store, Rescan: 10 * time.Millisecond, Report: func(p []Problem) { w.problems <- p }},
			func() (*fsnotify.Watcher, error) { return nil, fmt.Errorf("no inotify: %w", tc.err) })
		w.must(err)
		w.files = files
		w.run()
		problems := texts(w.files.Problems())
		if len(problems) != 1 || !strings.Contains(problems[0], tc.want) || !strings.HasPrefix(problems[0], w.dir+": cannot be watched, is read every 10ms") {
			t.Errorf("problems %q, want one that names %s", problems, tc.want)
		}
		w.write("a.yaml", service("a", 1))
		w.wait("a=1")
	}
}

// TestOverflow loses the events of a change, as the kernel does when its queue
// is full, and then gets the notice of that.
func TestOverflow(t *testing.T) {
	w := &watching{t: t, dir: t.TempDir(), store: NewStore(StoreOptions{}), problems: make(chan []Problem, 100)}
	var inotify *fsnotify.Watcher
	files, err := newFiles(FilesOptions{Dir: w.dir, Store: w.store, Rescan: time.Hour},
		func() (*fsnotify.Watcher, error) {
			var err error
			inotify, err = fsnotify.NewWatcher()
			return inotify, err
		})
	w.must(err)
	w.files = files
	w.run()
	w.must(inotify.Remove(w.dir))
	w.write("a.yaml", service("a", 1))
	inotify.Errors <- fsnotify.ErrEventOverflow
	w.wait("a=1")
}

func TestUnreadableFiles(t *testing.T) {
	w := start(t, map[string]string{"a.yaml": service("a", 1)}, func(o *FilesOptions) { o.Rescan = 10 * time.Millisecond })
	w.must(os.Remove(w.path("a.yaml")))
	w.must(syscall.Mkfifo(w.path("fifo.yaml"), 0o644))
	w.must(os.Symlink("loop.yaml", w.path("loop.yaml")))
	w.must(os.Symlink("nowhere", w.path("dangling.yaml")))
	w.waitProblems("fifo.yaml:1: is no regular file", "loop.yaml:1: stat "+w.path("loop.yaml")+": too many levels of symbolic links")
	w.wait()
}

func TestNewFilesErrors(t *testing.T) {
	missing := filepath.Join(t.TempDir(), "none")
	if _, err := NewFiles(FilesOptions{Dir: missing, Store: NewStore(StoreOptions{})}); err == nil || !strings.Contains(err.Error(), missing) {
		t.Errorf("NewFiles of a missing directory: %v, want an error that names it", err)
	}
	if _, err := NewFiles(FilesOptions{Dir: t.TempDir()}); err == nil {
		t.Error("NewFiles without a store: no error")
	}
}

// TestWithinASecond measures a change from the file to the consumer of the Store.
func TestWithinASecond(t *testing.T) {
	w := start(t, map[string]string{"a.yaml": service("a", 1)})
	w.wait("a=1")
	var took []time.Duration
	for i := range 20 {
		began := time.Now()
		w.write("a.yaml", service("a", i+2))
		w.wait(fmt.Sprintf("a=%d", i+2))
		took = append(took, time.Since(began))
	}
	slices.Sort(took)
	t.Logf("median %v, longest %v", took[len(took)/2], took[len(took)-1])
	if took[len(took)/2] > 500*time.Millisecond {
		t.Errorf("median %v", took[len(took)/2])
	}
}
