package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/sluicemesh/sluice/pkg/podwatch"
	"github.com/sluicemesh/sluice/pkg/podwatch/cniapi"
	"github.com/sluicemesh/sluice/pkg/redirect"
	"github.com/sluicemesh/sluice/pkg/redirect/netns"
	"github.com/sluicemesh/sluice/pkg/xds"
	"github.com/sluicemesh/sluice/pkg/xds/server"
)

// ownNetns stands for the network namespace of every sandbox: the agent looks
// at its inode only.
const ownNetns = "/proc/self/ns/net"

// A journal is what the agent did to the fakes, in order, and what that left.
type journal struct {
	mu      sync.Mutex
	entries []string
	grown   chan struct{} // closed at the next entry

	installed  map[redirect.ID]redirect.Installed
	configured map[string]bool          // pods whose sidecar has a configuration
	open       map[string]bool          // pods with an xDS socket
	addrs      map[string][]netip.Addr  // told to the source
	addErr     error                    // of redirection
	removeErr  error                    // of its end
	slow       *slowness                // of List, unless nil
	held       map[string]chan struct{} // entries whose call does not return before the channel is closed
	reports    []string                 // what was told to people
}

// A slowness tells of each List that begins, and lets none end before end is
// closed.
type slowness struct{ lists, end chan struct{} }

// note does what an entry is about, with the journal locked.
func (j *journal) note(entry string, do func()) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.entries = append(j.entries, entry)
	do()
	close(j.grown)
	j.grown = make(chan struct{})
}

// hold keeps the call of an entry from returning until let go.
func (j *journal) hold(entry string) (letGo func()) {
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.held == nil {
		j.held = map[string]chan struct{}{}
	}
	end := make(chan struct{})
	j.held[entry] = end
	return func() { close(end) }
}

// holding waits as long as entry is held.
func (j *journal) holding(entry string) {
	j.mu.Lock()
	end := j.held[entry]
	j.mu.Unlock()
	if end != nil {
		<-end
	}
}

func (j *journal) fail(err error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.addErr = err
}

// reset empties the list of entries.
func (j *journal) reset() {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.entries = nil
}

// since returns the entries since reset that begin with one of prefixes.
func (j *journal) since(prefixes ...string) []string {
	j.mu.Lock()
	defer j.mu.Unlock()
	var found []string
	for _, e := range j.entries {
		if slices.ContainsFunc(prefixes, func(p string) bool { return strings.HasPrefix(e, p) }) {
			found = append(found, e)
		}
	}
	return found
}

// await returns once there is an entry.
func (j *journal) await(t *testing.T, entry string) {
	t.Helper()
	deadline := time.After(20 * time.Second)
	for {
		j.mu.Lock()
		found, grown, entries := slices.Contains(j.entries, entry), j.grown, slices.Clone(j.entries)
		j.mu.Unlock()
		if found {
			return
		}
		select {
		case <-grown:
		case <-deadline:
			t.Fatalf("no %q in time, only %q", entry, entries)
		}
	}
}

// A fakeRedirector redirects nothing.
type fakeRedirector struct{ *journal }

func (f fakeRedirector) Add(_ context.Context, w redirect.Workload) (err error) {
	f.note("redirect "+w.ID.PodUID, func() {
		if err = f.addErr; err == nil {
			f.installed[w.ID] = redirect.Installed{ID: w.ID, Pod: w.Pod, Netns: w.Netns, Digest: w.Digest()}
		}
	})
	f.holding("redirect " + w.ID.PodUID)
	return err
}

func (f fakeRedirector) Remove(_ context.Context, id redirect.ID) error {
	f.note("release "+id.PodUID, func() { delete(f.installed, id) })
	f.holding("release " + id.PodUID)
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.removeErr
}

func (f fakeRedirector) List(ctx context.Context) ([]redirect.Installed, error) {
	f.mu.Lock()
	slow := f.slow
	f.mu.Unlock()
	if slow != nil {
		slow.lists <- struct{}{}
		select {
		case <-slow.end:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	var list []redirect.Installed
	for _, i := range f.installed {
		list = append(list, i)
	}
	slices.SortFunc(list, func(a, b redirect.Installed) int { return strings.Compare(a.ID.String(), b.ID.String()) })
	return list, nil
}

func (f fakeRedirector) Close() error { return nil }

// A fakeTranslator makes no resources.
type fakeTranslator struct{ *journal }

func (f fakeTranslator) Base(xds.OutboundPolicy) ([]xds.Resource, error) { return nil, nil }

func (f fakeTranslator) Service(s xds.Service) ([]xds.Resource, error) {
	f.note("translate service "+s.Namespace+"/"+s.Name, func() {})
	return nil, nil
}

func (f fakeTranslator) Pod(p xds.Pod) ([]xds.Resource, error) {
	f.note("translate pod "+p.Namespace+"/"+p.Name, func() {})
	return nil, nil
}

// A fakeSidecars serves nobody. Pods are keyed by "uid@inode" as with the real
// one, and noted by their UID.
type fakeSidecars struct{ *journal }

func uidOf(id string) string { uid, _, _ := strings.Cut(id, "@"); return uid }

func (f fakeSidecars) SetShared(owner string, _ []xds.Resource, _ time.Time) {
	f.note("share "+owner, func() {})
}

func (f fakeSidecars) SetPod(p server.Pod, _ []xds.Resource, _ time.Time) {
	f.note("configure "+uidOf(p.UID), func() { f.configured[p.UID] = true })
}

func (f fakeSidecars) RemovePod(uid string) {
	f.note("unconfigure "+uidOf(uid), func() { delete(f.configured, uid) })
}

func (f fakeSidecars) Open(uid, _ string, _ uint32) error {
	f.note("open "+uidOf(uid), func() { f.open[uid] = true })
	return nil
}

func (f fakeSidecars) ClosePod(uid string) error {
	f.note("close "+uidOf(uid), func() { delete(f.open, uid) })
	return nil
}

func (f fakeSidecars) SetReady()                  { f.note("ready", func() {}) }
func (f fakeSidecars) Status() []server.PodStatus { return nil }

// A testNode is an agent that runs, between a real store and fakes.
type testNode struct {
	*agent
	j     *journal
	store *podwatch.Store
	dir   string // of the sandboxes
	// silent means that the API server answers nobody.
	silent *atomic.Bool
}

// newNode starts an agent whose source has not been read yet.
func newNode(t *testing.T) *testNode {
	t.Helper()
	j := &journal{
		grown: make(chan struct{}), installed: map[redirect.ID]redirect.Installed{},
		configured: map[string]bool{}, open: map[string]bool{}, addrs: map[string][]netip.Addr{},
	}
	store := podwatch.NewStore(podwatch.StoreOptions{Quiet: time.Millisecond})
	dir := filepath.Join(t.TempDir(), "sandboxes")
	boxes, err := loadSandboxes(dir)
	if err != nil {
		t.Fatal(err)
	}
	silent := &atomic.Bool{}
	n := &testNode{j: j, store: store, dir: dir, silent: silent, agent: &agent{
		log:   slog.New(slog.DiscardHandler),
		store: store,
		planner: planner{
			node: "node-a", outboundPolicy: xds.OutboundPassthrough,
			redirectDefault: redirect.DefaultPolicy(), excluded: []string{"kube-system"},
		},
		redirector: fakeRedirector{j}, translator: fakeTranslator{j}, sidecars: fakeSidecars{j},
		reporter: fakeReporter{j}, backend: fakeBackend{},
		setPodAddrs: func(namespace, name string, addrs []netip.Addr) {
			j.note("addresses "+namespace+"/"+name, func() {
				delete(j.addrs, namespace+"/"+name)
				if len(addrs) > 0 {
					j.addrs[namespace+"/"+name] = addrs
				}
			})
		},
		cutOff: silent.Load,
		lock:   make(chan struct{}, 1), adding: make(chan struct{}, installers()), removing: make(chan struct{}, removers()),
		started: make(chan struct{}), failing: make(chan struct{}, 1), boxes: boxes, pods: map[string]*podState{},
		fed: map[podwatch.Key][]podwatch.Key{}, awaiting: map[string]bool{}, problems: map[string]string{},
		proxyCgroups: map[string]string{},
	}}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- n.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
		n.background.Wait()
	})
	return n
}

// readyNode starts an agent whose source has objects.
func readyNode(t *testing.T, objects ...podwatch.Object) *testNode {
	t.Helper()
	n := newNode(t)
	n.update(objects...)
	n.store.SetSynced()
	n.settle(t, "ready")
	// The first batch is what start has done already. Let it pass.
	n.change(t, "share service/test/first", &podwatch.Service{Meta: podwatch.Meta{Namespace: "test", Name: "first"}})
	n.j.reset()
	return n
}

func (n *testNode) update(objects ...podwatch.Object) {
	var changes []podwatch.Change
	for _, o := range objects {
		changes = append(changes, podwatch.Change{Key: o.Key(), Object: o})
	}
	n.store.Update(changes)
}

// change brings objects into the source and returns once the agent has acted
// on all of them; until is an entry that one of them leads to.
func (n *testNode) change(t *testing.T, until string, objects ...podwatch.Object) {
	t.Helper()
	n.j.reset()
	n.update(objects...)
	n.settle(t, until)
}

// settle waits for an entry and for the end of the operation that it is part of.
func (n *testNode) settle(t *testing.T, until string) {
	t.Helper()
	n.j.await(t, until)
	var boxes []sandbox
	awaiting := 1
	deadline := time.Now().Add(20 * time.Second)
	for ; awaiting > 0; time.Sleep(time.Millisecond) {
		if err := n.call(t.Context(), func() error { boxes, awaiting = n.boxes.all(), len(n.awaiting); return nil }); err != nil {
			t.Fatal(err)
		}
		if time.Now().After(deadline) {
			t.Fatalf("%d pods still await their turn", awaiting)
		}
	}
	for _, box := range boxes {
		if err := n.inTurn(t.Context(), box.ContainerID, func() error { return nil }); err != nil {
			t.Fatal(err)
		}
	}
}

// A left is all that there is of pods.
type left struct {
	Installed, Configured, Open, Addrs []string
	Files                              int
}

// left returns what there is. UIDs stand for pods.
func (n *testNode) left(t *testing.T) left {
	t.Helper()
	files, err := os.ReadDir(n.dir)
	if err != nil {
		t.Fatal(err)
	}
	n.j.mu.Lock()
	defer n.j.mu.Unlock()
	l := left{Files: len(files)}
	for id := range n.j.installed {
		l.Installed = append(l.Installed, id.PodUID)
	}
	for id := range n.j.configured {
		l.Configured = append(l.Configured, uidOf(id))
	}
	for id := range n.j.open {
		l.Open = append(l.Open, uidOf(id))
	}
	for pod := range n.j.addrs {
		l.Addrs = append(l.Addrs, pod)
	}
	for _, s := range [][]string{l.Installed, l.Configured, l.Open, l.Addrs} {
		slices.Sort(s)
	}
	return l
}

// whole is what there must be of the one redirected pod shop/web.
func whole() left {
	return left{Installed: []string{"uid-web"}, Configured: []string{"uid-web"}, Open: []string{"uid-web"}, Addrs: []string{"shop/web"}, Files: 1}
}

func (n *testNode) wantLeft(t *testing.T, want left) {
	t.Helper()
	if diff := cmp.Diff(want, n.left(t)); diff != "" {
		t.Errorf("what there is of pods, -want +got:\n%s", diff)
	}
}

// shop is a namespace whose pods are redirected.
func shop() *podwatch.Namespace {
	return &podwatch.Namespace{Meta: podwatch.Meta{Name: "shop", Labels: map[string]string{redirect.RedirectKey: redirect.RedirectEnabled}}}
}

// newPod returns a pod with annotations, given as key, value, key, ...
func newPod(namespace, name string, annotations ...string) *podwatch.Pod {
	p := &podwatch.Pod{Meta: podwatch.Meta{
		Namespace: namespace, Name: name, UID: "uid-" + name,
		Labels: map[string]string{"app": name}, Annotations: map[string]string{},
	}}
	for pair := range slices.Chunk(annotations, 2) {
		p.Annotations[pair[0]] = pair[1]
	}
	return p
}

func newService(name string, port uint16) *podwatch.Service {
	return &podwatch.Service{
		Meta:     podwatch.Meta{Namespace: "shop", Name: name},
		Selector: map[string]string{"app": name},
		Ports:    []podwatch.ServicePort{{Name: "http", Port: port, TargetPort: 8080}},
	}
}

// attach is what the plugin says of a pod's eth0.
func attach(p *podwatch.Pod) cniapi.Attachment {
	return cniapi.Attachment{
		AttachmentID: cniapi.AttachmentID{ContainerID: "box-" + p.Name, IfName: "eth0"},
		Network:      "pods", Netns: ownNetns, PodNamespace: p.Namespace, PodName: p.Name, PodUID: p.UID,
		Interfaces: []cniapi.Interface{{Name: "eth0", Addrs: []netip.Addr{netip.MustParseAddr("10.1.0.5")}}},
	}
}

func mustAdd(t *testing.T, n *testNode, at cniapi.Attachment) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	if err := n.Add(ctx, at); err != nil {
		t.Fatalf("Add: %v", err)
	}
}

// wantError fails unless err's text has every part.
func wantError(t *testing.T, err error, parts ...string) {
	t.Helper()
	if err == nil {
		t.Fatalf("no error, want one with %q", parts)
	}
	for _, p := range parts {
		if !strings.Contains(err.Error(), p) {
			t.Errorf("error %q lacks %q", err, p)
		}
	}
}

// Traffic is led to the sidecar only when that can get its configuration.
func TestAddRedirects(t *testing.T) {
	web := newPod("shop", "web")
	n := readyNode(t, shop(), web)
	mustAdd(t, n, attach(web))
	want := []string{"translate pod shop/web", "configure uid-web", "open uid-web", "redirect uid-web", "addresses shop/web"}
	got := n.j.since("translate", "configure", "open", "redirect", "addresses", "release", "close")
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("order, -want +got:\n%s", diff)
	}
	n.wantLeft(t, whole())
	inode, err := netns.Inode(ownNetns)
	if err != nil {
		t.Fatal(err)
	}
	installed, err := n.redirector.List(t.Context())
	if err != nil || len(installed) != 1 {
		t.Fatalf("installed %v, %v", installed, err)
	}
	if w := installed[0]; w.ID != (redirect.ID{PodUID: "uid-web", NetnsInode: inode}) || w.Netns != ownNetns || w.Pod != "shop/web" {
		t.Errorf("installed %+v", w)
	}
	// The runtime may repeat itself.
	mustAdd(t, n, attach(web))
	n.wantLeft(t, whole())
}

// A runtime that does not tell the pod's UID leaves that to the source.
func TestAddWithoutUID(t *testing.T) {
	web := newPod("shop", "web")
	n := readyNode(t, shop(), web)
	at := attach(web)
	at.PodUID = ""
	mustAdd(t, n, at)
	n.wantLeft(t, whole())
}

func TestAddDoesNotRedirect(t *testing.T) {
	off, host := newPod("shop", "off"), newPod("shop", "host")
	off.Labels[redirect.RedirectKey] = redirect.RedirectDisabled
	host.HostNetwork = true
	for _, p := range []*podwatch.Pod{off, host, newPod("other", "plain")} {
		t.Run(p.Name, func(t *testing.T) {
			n := readyNode(t, shop(), p)
			mustAdd(t, n, attach(p))
			// Known all the same: it may be redirected later.
			n.wantLeft(t, left{Addrs: []string{p.Namespace + "/" + p.Name}, Files: 1})
			if err := n.Check(t.Context(), attach(p)); err != nil {
				t.Errorf("Check: %v", err)
			}
		})
	}
}

// Pods of excluded namespaces start also while the source is not read, and
// without being in it.
func TestExcludedNamespace(t *testing.T) {
	n := newNode(t)
	at := attach(newPod("kube-system", "dns"))
	mustAdd(t, n, at)
	if err := n.Check(t.Context(), at); err != nil {
		t.Errorf("Check: %v", err)
	}
	if err := n.Del(t.Context(), at); err != nil {
		t.Errorf("Del: %v", err)
	}
	n.wantLeft(t, left{})
}

func TestAddOfUnknownPod(t *testing.T) {
	n := readyNode(t, shop())
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	err := n.Add(ctx, attach(newPod("shop", "web")))
	wantError(t, err, "shop/web", "not known to the source")
	if !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("error %v does not say that time is up", err)
	}
	n.wantLeft(t, left{})
}

// The runtime may be faster than the source.
func TestAddWaitsForThePod(t *testing.T) {
	web := newPod("shop", "web")
	n := readyNode(t, shop())
	added := make(chan error, 1)
	go func() { added <- n.Add(t.Context(), attach(web)) }()
	n.update(web)
	if err := <-added; err != nil {
		t.Fatalf("Add: %v", err)
	}
	n.wantLeft(t, whole())
}

// So it may be with the Namespace, which may ask for redirection on the pod's
// behalf: in a cluster there is one.
func TestAddWaitsForTheNamespace(t *testing.T) {
	web := newPod("shop", "web")
	delete(web.Labels, redirect.RedirectKey)
	n := readyNode(t, web)
	mustCall(t, n, func() { n.planner.namespaces = true })
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	wantError(t, n.Add(ctx, attach(web)), "shop/web", "namespace shop", "not known to the source")
	n.wantLeft(t, left{})

	added := make(chan error, 1)
	go func() { added <- n.Add(t.Context(), attach(web)) }()
	n.update(shop())
	if err := <-added; err != nil {
		t.Fatalf("Add: %v", err)
	}
	n.wantLeft(t, whole())

	// It may be gone before the last of its pods: those stay as they are.
	n.store.Update([]podwatch.Change{{Key: shop().Key()}})
	n.change(t, "share service/shop/a", newService("a", 80))
	n.wantLeft(t, whole())
}

// Endpoints reach the sidecars while the kernel works for a pod, and a pod whose
// turn is another operation's is seen to afterwards.
func TestEndpointsDoNotWaitForPods(t *testing.T) {
	web, busy := newPod("shop", "web"), newPod("shop", "busy")
	n := readyNode(t, shop(), web, busy)
	mustAdd(t, n, attach(web))
	mustAdd(t, n, attach(busy))
	const port = "sluice.dev/exclude-outbound-ports"
	letGo := n.j.hold("redirect uid-busy")
	n.j.reset()
	n.update(newPod("shop", "busy", port, "1"))
	n.j.await(t, "redirect uid-busy") // it is in the kernel
	n.update(newPod("shop", "busy", port, "2"), newPod("shop", "web", port, "2"), newService("late", 80))
	n.j.await(t, "share service/shop/late")
	n.j.await(t, "redirect uid-web")
	letGo()
	n.settle(t, "redirect uid-busy")
	mustCall(t, n, func() {
		if got := n.pods["box-busy"].workload.Policy.Outbound.ExcludePorts.List; !slices.Equal(got, []uint16{2}) {
			t.Errorf("excluded ports of the busy pod: %v", got)
		}
	})
}

// mustCall runs f under the agent's lock.
func mustCall(t *testing.T, n *testNode, f func()) {
	t.Helper()
	if err := n.call(t.Context(), func() error { f(); return nil }); err != nil {
		t.Fatal(err)
	}
}

func TestAddFails(t *testing.T) {
	plain := attach(newPod("shop", "web"))
	noNetns, noAddrs := plain, plain
	noNetns.Netns = filepath.Join(t.TempDir(), "none")
	noAddrs.Interfaces = []cniapi.Interface{{Name: "eth0"}}
	for name, test := range map[string]struct {
		pod    *podwatch.Pod
		at     cniapi.Attachment
		addErr error
		want   []string
	}{
		"bad annotation": {
			newPod("shop", "web", "sluice.dev/exclude-outbound-ports", "80,httpp"), plain, nil,
			[]string{"shop/web", "sluice.dev/exclude-outbound-ports", "httpp"},
		},
		"bad outbound policy": {
			newPod("shop", "web", outboundPolicyAnnotation, "deny"), plain, nil,
			[]string{"shop/web", outboundPolicyAnnotation, "deny"},
		},
		"bad value of redirect": {
			newPod("shop", "web", redirect.RedirectKey, "on"), plain, nil,
			[]string{"shop/web", redirect.RedirectKey, "on"},
		},
		"redirection": {newPod("shop", "web"), plain, errors.New("map is full"), []string{"redirect pod shop/web", "map is full"}},
		"no netns":    {newPod("shop", "web"), noNetns, nil, []string{"box-web", "shop/web", noNetns.Netns}},
		"no address":  {newPod("shop", "web"), noAddrs, nil, []string{"shop/web", "names no address"}},
	} {
		t.Run(name, func(t *testing.T) {
			n := readyNode(t, shop(), test.pod)
			n.j.fail(test.addErr)
			wantError(t, n.Add(t.Context(), test.at), test.want...)
			n.wantLeft(t, left{})
			if counts, problems := n.report(); counts != (podCounts{}) || len(problems) != 0 {
				t.Errorf("left behind: counts %+v, problems %v", counts, problems)
			}
			// Once mended, the runtime's next try succeeds.
			n.j.fail(nil)
			n.change(t, "share service/shop/mark", newPod("shop", "web"), newService("mark", 80))
			mustAdd(t, n, plain)
			n.wantLeft(t, whole())
		})
	}
}

func TestDel(t *testing.T) {
	web := newPod("shop", "web")
	n := readyNode(t, shop(), web)
	mustAdd(t, n, attach(web))
	n.j.reset()
	// All that a late DEL knows.
	late := cniapi.Attachment{AttachmentID: attach(web).AttachmentID, PodNamespace: "shop", PodName: "web"}
	for _, when := range []string{"", " again"} {
		if err := n.Del(t.Context(), late); err != nil {
			t.Errorf("Del%s: %v", when, err)
		}
		n.wantLeft(t, left{})
	}
	want := []string{"release uid-web", "close uid-web", "unconfigure uid-web", "addresses shop/web"}
	if diff := cmp.Diff(want, n.j.since("")); diff != "" {
		t.Errorf("order, -want +got:\n%s", diff)
	}
}

// A socket that stayed open would keep the namespace from going.
func TestDelThatCannotRelease(t *testing.T) {
	web := newPod("shop", "web")
	n := readyNode(t, shop(), web)
	mustAdd(t, n, attach(web))
	n.j.mu.Lock()
	n.j.removeErr = errors.New("the kernel is busy")
	n.j.mu.Unlock()
	if err := n.Del(t.Context(), attach(web)); err != nil {
		t.Error(err)
	}
	n.wantLeft(t, left{})
}

func TestDelOfUnknown(t *testing.T) {
	web := newPod("shop", "web")
	n := readyNode(t, shop(), web)
	mustAdd(t, n, attach(web))
	if err := n.Del(t.Context(), attach(newPod("shop", "stranger"))); err != nil {
		t.Errorf("Del: %v", err)
	}
	other := attach(web) // an interface that was never added
	other.IfName = "net7"
	if err := n.Del(t.Context(), other); err != nil {
		t.Errorf("Del of another interface: %v", err)
	}
	n.wantLeft(t, whole())
}

func TestCheck(t *testing.T) {
	inode, err := netns.Inode(ownNetns)
	if err != nil {
		t.Fatal(err)
	}
	id := redirect.ID{PodUID: "uid-web", NetnsInode: inode}
	for name, test := range map[string]struct {
		kernel func(map[redirect.ID]redirect.Installed)
		want   []string // nil: whole
	}{
		"whole":   {func(map[redirect.ID]redirect.Installed) {}, nil},
		"missing": {func(m map[redirect.ID]redirect.Installed) { delete(m, id) }, []string{"shop/web", "is not redirected", "box-web"}},
		"problem": {func(m map[redirect.ID]redirect.Installed) {
			i := m[id]
			i.Problem = errors.New("the filter on eth0 is gone")
			m[id] = i
		}, []string{"shop/web", "is not whole", "the filter on eth0 is gone"}},
		"another digest": {func(m map[redirect.ID]redirect.Installed) {
			i := m[id]
			i.Digest++
			m[id] = i
		}, []string{"shop/web", "is not what its annotations ask for"}},
	} {
		t.Run(name, func(t *testing.T) {
			web := newPod("shop", "web")
			n := readyNode(t, shop(), web)
			mustAdd(t, n, attach(web))
			n.j.note("meddle", func() { test.kernel(n.j.installed) })
			err := n.Check(t.Context(), attach(web))
			if test.want != nil {
				wantError(t, err, test.want...)
			} else if err != nil {
				t.Errorf("Check: %v", err)
			}
		})
	}
}

func TestCheckOfUnknown(t *testing.T) {
	older := newPod("shop", "older", redirect.RedirectKey, redirect.RedirectDisabled)
	wanted := newPod("shop", "wanted")
	n := readyNode(t, shop(), older, wanted)
	for _, p := range []*podwatch.Pod{newPod("shop", "web"), wanted} {
		wantError(t, n.Check(t.Context(), attach(p)), "box-"+p.Name, "shop/"+p.Name, "not known to the agent")
	}
	if err := n.Check(t.Context(), attach(older)); err != nil {
		t.Errorf("Check of a pod that is not to be redirected: %v", err)
	}
}

// A pod that should be redirected and is not, because of what it asks for, does
// not pass for one that should not be.
func TestCheckSaysWhyNot(t *testing.T) {
	web := newPod("shop", "web", redirect.RedirectKey, redirect.RedirectDisabled)
	n := readyNode(t, shop(), web)
	mustAdd(t, n, attach(web))
	n.change(t, "share service/shop/mark", newPod("shop", "web", "sluice.dev/backend", "ebfp"), newService("mark", 80))
	wantError(t, n.Check(t.Context(), attach(web)), "shop/web", "sluice.dev/backend", "ebfp")
}

// GC speaks of one network: what others gave stays.
func TestGC(t *testing.T) {
	web, two := newPod("shop", "web"), newPod("shop", "two")
	n := readyNode(t, shop(), web, two)
	storage := func(p *podwatch.Pod) cniapi.Attachment {
		at := attach(p)
		at.IfName, at.Network = "net1", "storage"
		at.Interfaces = []cniapi.Interface{{Name: "net1", Addrs: []netip.Addr{netip.MustParseAddr("192.0.2.5")}}}
		return at
	}
	for _, at := range []cniapi.Attachment{attach(web), storage(web), attach(two), storage(two)} {
		mustAdd(t, n, at)
	}
	for _, step := range []struct {
		network string
		valid   []cniapi.AttachmentID
		want    []string // attachments that there still are
	}{
		{"unheard-of", nil, []string{"box-two eth0", "box-two net1", "box-web eth0", "box-web net1"}},
		{"storage", []cniapi.AttachmentID{storage(web).AttachmentID}, []string{"box-two eth0", "box-web eth0", "box-web net1"}},
		{"storage", nil, []string{"box-two eth0", "box-web eth0"}},
		{"pods", []cniapi.AttachmentID{attach(web).AttachmentID, {ContainerID: "unheard-of", IfName: "eth0"}}, []string{"box-web eth0"}},
		{"pods", []cniapi.AttachmentID{{ContainerID: "box-web", IfName: "net1"}}, nil},
	} {
		if err := n.GC(t.Context(), step.network, step.valid); err != nil {
			t.Errorf("GC of %s: %v", step.network, err)
		}
		// From disk, as the next agent would know them.
		kept, err := loadSandboxes(n.dir)
		if err != nil {
			t.Fatal(err)
		}
		var got, redirected []string
		for _, box := range kept.all() {
			redirected = append(redirected, box.PodUID)
			for name := range box.Attachments {
				got = append(got, box.ContainerID+" "+name)
			}
		}
		slices.Sort(got)
		slices.Sort(redirected)
		if diff := cmp.Diff(step.want, got); diff != "" {
			t.Errorf("GC of %s but %v: attachments, -want +got:\n%s", step.network, step.valid, diff)
		}
		if diff := cmp.Diff(redirected, n.left(t).Installed); diff != "" {
			t.Errorf("GC of %s but %v: redirected, -want +got:\n%s", step.network, step.valid, diff)
		}
	}
	n.wantLeft(t, left{})
}

func TestBeforeTheSourceIsRead(t *testing.T) {
	const reason = "has not read its source yet"
	web := newPod("shop", "web")
	n := newNode(t)
	n.update(shop(), web)
	wantError(t, n.Status(t.Context()), reason)
	wantError(t, n.Check(t.Context(), attach(web)), reason)
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	wantError(t, n.Add(ctx, attach(web)), reason)
	n.wantLeft(t, left{})

	// No API server is no reason to take the node out of service. A pod waits.
	n.silent.Store(true)
	if err := n.Status(t.Context()); err != nil {
		t.Errorf("Status while the API server answers nobody: %v", err)
	}
	wantError(t, n.Check(t.Context(), attach(web)), reason)
	wantError(t, n.Add(ctx, attach(web)), reason)
	n.silent.Store(false)
	wantError(t, n.Status(t.Context()), reason)

	n.store.SetSynced()
	n.settle(t, "ready")
	if err := n.Status(t.Context()); err != nil {
		t.Errorf("Status of an agent that is ready: %v", err)
	}
	mustAdd(t, n, attach(web))
	n.wantLeft(t, whole())
}

// TestAddDoesNotWaitForAList: to list what is installed takes long with many
// pods. Neither that nor CHECK keeps pods from starting.
func TestAddDoesNotWaitForAList(t *testing.T) {
	web, next := newPod("shop", "web"), newPod("shop", "next")
	n := readyNode(t, shop(), web, next)
	mustAdd(t, n, attach(web))
	slow := &slowness{make(chan struct{}), make(chan struct{})}
	n.j.note("slow", func() { n.j.slow = slow })
	surveyed, checked := make(chan survey, 1), make(chan error, 1)
	go func() { surveyed <- n.survey(t.Context()) }()
	go func() { checked <- n.Check(t.Context(), attach(web)) }()
	<-slow.lists
	<-slow.lists
	n.j.note("fast again", func() { n.j.slow = nil })
	mustAdd(t, n, attach(next))
	close(slow.end)
	if err := <-checked; err != nil {
		t.Errorf("Check: %v", err)
	}
	// What the survey, which is older than this ADD, does not know stays, and
	// what it has found whole is not touched.
	s := <-surveyed
	s.installed = slices.DeleteFunc(s.installed, func(i redirect.Installed) bool { return i.ID.PodUID == next.UID })
	n.j.reset()
	if err := n.call(t.Context(), func() error { n.heal(t.Context(), s); return nil }); err != nil {
		t.Fatal(err)
	}
	if got := n.j.since("redirect uid-web", "release"); got != nil {
		t.Errorf("with an old survey the agent did %q", got)
	}
	if got := n.left(t).Installed; !slices.Equal(got, []string{"uid-next", "uid-web"}) {
		t.Errorf("installed: %q", got)
	}
}

// TestHealAfterAListThatFailed: what could be listed is mended, and what could
// not is reported.
func TestHealAfterAListThatFailed(t *testing.T) {
	web := newPod("shop", "web")
	n := readyNode(t, shop(), web)
	mustAdd(t, n, attach(web))
	stray := redirect.Installed{ID: redirect.ID{PodUID: "uid-gone"}, Pod: "shop/gone"}
	n.j.note("break", func() {
		clear(n.j.installed)
		n.j.installed[stray.ID] = stray
	})
	s := survey{installed: []redirect.Installed{stray}, err: errors.New("read record x: unexpected end")}
	if err := n.call(t.Context(), func() error { n.heal(t.Context(), s); return nil }); err != nil {
		t.Fatal(err)
	}
	n.wantLeft(t, whole())
	if _, problems := n.report(); !strings.Contains(problems["redirection"], "record x") {
		t.Errorf("problems %q do not name the record", problems)
	}
}

// TestFailureIsTriedAgainSoon: what the kernel or a program refused is tried again
// long before the next check.
func TestFailureIsTriedAgainSoon(t *testing.T) {
	web := newPod("shop", "web")
	n := readyNode(t, shop(), web)
	mustAdd(t, n, attach(web))
	n.j.fail(errors.New("no memory"))
	web = newPod("shop", "web", "sluice.dev/exclude-outbound-ports", "3306")
	n.change(t, "redirect uid-web", web)
	n.j.reset()
	n.j.await(t, "redirect uid-web")
	if _, problems := n.report(); !strings.Contains(problems["pod shop/web"], "no memory") {
		t.Errorf("problems %q do not name the cause", problems)
	}
	n.j.fail(nil)
	n.j.reset()
	n.settle(t, "redirect uid-web")
	if _, problems := n.report(); problems["pod shop/web"] != "" {
		t.Errorf("still a problem: %q", problems)
	}
}

// TestRestartWithABadAnnotation: what an earlier agent installed for a pod stays
// while its annotations cannot be read, and what nobody asks for goes.
func TestRestartWithABadAnnotation(t *testing.T) {
	inode, err := netns.Inode(ownNetns)
	if err != nil {
		t.Fatal(err)
	}
	n := newNode(t)
	kept := redirect.Installed{ID: redirect.ID{PodUID: "uid-web", NetnsInode: inode}, Pod: "shop/web"}
	stray := redirect.Installed{ID: redirect.ID{PodUID: "uid-gone", NetnsInode: inode}, Pod: "shop/gone"}
	n.j.note("an earlier agent", func() {
		n.j.installed[kept.ID], n.j.installed[stray.ID] = kept, stray
	})
	err = n.call(t.Context(), func() error {
		return n.boxes.put(sandbox{
			ContainerID: "c-web", Namespace: "shop", Name: "web", PodUID: "uid-web", Netns: ownNetns, NetnsInode: inode,
			Attachments: map[string]attachment{"eth0": {Interfaces: []cniapi.Interface{{Name: "eth0", Addrs: []netip.Addr{netip.MustParseAddr("10.0.0.1")}}}}},
		})
	})
	if err != nil {
		t.Fatal(err)
	}
	n.update(shop(), newPod("shop", "web", "sluice.dev/exclude-outbound-ports", "9o90"))
	n.store.SetSynced()
	n.settle(t, "ready")
	installed, err := n.redirector.List(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]redirect.Installed{kept}, installed); diff != "" {
		t.Errorf("installed after the restart, -want +got:\n%s", diff)
	}
}

// A mistake in an annotation does not take a running pod's redirection away.
// TestLostSandboxRecords: what is installed for a pod that lives stays although
// its record is lost, and is named; what is of a namespace that has gone goes.
func TestLostSandboxRecords(t *testing.T) {
	inode, err := netns.Inode(ownNetns)
	if err != nil {
		t.Fatal(err)
	}
	n := newNode(t)
	lives := redirect.Installed{ID: redirect.ID{PodUID: "uid-web", NetnsInode: inode}, Pod: "shop/web", Netns: ownNetns}
	replaced := redirect.Installed{ID: redirect.ID{PodUID: "uid-old", NetnsInode: inode + 1}, Pod: "shop/old", Netns: ownNetns}
	n.j.note("an earlier agent", func() {
		n.j.installed[lives.ID], n.j.installed[replaced.ID] = lives, replaced
	})
	n.store.SetSynced()
	n.settle(t, "ready")
	installed, err := n.redirector.List(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]redirect.Installed{lives}, installed); diff != "" {
		t.Errorf("installed, -want +got:\n%s", diff)
	}
	if _, problems := n.report(); !strings.Contains(problems["sandboxes"], "shop/web") || strings.Contains(problems["sandboxes"], "shop/old") {
		t.Errorf("problems %q, want one that names shop/web alone", problems)
	}
}

func TestBadAnnotationOnARunningPod(t *testing.T) {
	web := newPod("shop", "web", "sluice.dev/exclude-outbound-ports", "9090")
	n := readyNode(t, shop(), web)
	mustAdd(t, n, attach(web))
	before, err := n.redirector.List(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	const object = "pod shop/web"
	n.change(t, "share service/shop/mark", newPod("shop", "web", "sluice.dev/exclude-outbound-ports", "9o90"), newService("mark", 80))
	if got := n.j.since("redirect", "release", "configure", "unconfigure", "open", "close"); got != nil {
		t.Errorf("the agent did %q", got)
	}
	after, err := n.redirector.List(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(before, after); diff != "" {
		t.Errorf("redirection, -before +after:\n%s", diff)
	}
	counts, problems := n.report()
	if counts != (podCounts{failed: 1}) || !strings.Contains(problems[object], "sluice.dev/exclude-outbound-ports") || !strings.Contains(problems[object], "9o90") {
		t.Errorf("counts %+v, problems %v", counts, problems)
	}

	n.change(t, "redirect uid-web", newPod("shop", "web", "sluice.dev/exclude-outbound-ports", "9091"))
	if counts, problems := n.report(); counts != (podCounts{redirected: 1}) || len(problems) != 0 {
		t.Errorf("once mended: counts %+v, problems %v", counts, problems)
	}
	mended, err := n.redirector.List(t.Context())
	if err != nil || len(mended) != 1 || mended[0].Digest == before[0].Digest {
		t.Errorf("once mended: installed %v (before %v), %v", mended, before, err)
	}
}

// Redirection of a running pod ends and begins with the label.
func TestRedirectionIsSwitchedLive(t *testing.T) {
	web := newPod("shop", "web")
	n := readyNode(t, shop(), web)
	mustAdd(t, n, attach(web))
	off := newPod("shop", "web")
	off.Labels[redirect.RedirectKey] = redirect.RedirectDisabled
	n.change(t, "unconfigure uid-web", off)
	if diff := cmp.Diff([]string{"release uid-web", "close uid-web", "unconfigure uid-web"}, n.j.since("")); diff != "" {
		t.Errorf("pod is released, -want +got:\n%s", diff)
	}
	n.wantLeft(t, left{Addrs: []string{"shop/web"}, Files: 1})
	if counts, _ := n.report(); counts != (podCounts{untouched: 1}) {
		t.Errorf("counts %+v", counts)
	}
	n.change(t, "redirect uid-web", newPod("shop", "web"))
	n.wantLeft(t, whole())

	// The namespace decides for pods that do not.
	n.change(t, "unconfigure uid-web", &podwatch.Namespace{Meta: podwatch.Meta{Name: "shop"}})
	n.wantLeft(t, left{Addrs: []string{"shop/web"}, Files: 1})
}

// What one change costs does not depend on how much else there is.
func TestOnlyAffectedServicesAreTranslated(t *testing.T) {
	web, cart := newPod("shop", "web"), newPod("shop", "cart")
	objects := []podwatch.Object{shop(), web, cart, newService("web", 80), newService("cart", 80)}
	for i := range 50 {
		objects = append(objects, newService(fmt.Sprintf("other-%d", i), 80))
	}
	route := &podwatch.HTTPRoute{
		Meta:    podwatch.Meta{Namespace: "shop", Name: "canary"},
		Parents: []podwatch.RouteParent{{Namespace: "shop", Name: "web"}},
		Rules:   []podwatch.HTTPRouteRule{{Backends: []podwatch.HTTPBackend{{Kind: "Service", Namespace: "shop", Name: "cart", Port: 80, Weight: 1}}}},
	}
	n := readyNode(t, objects...)
	mustAdd(t, n, attach(web))
	mustAdd(t, n, attach(cart))
	want := func(what string, want ...string) {
		t.Helper()
		got := n.j.since("translate")
		slices.Sort(got) // services in one batch have no order
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%s: translated, -want +got:\n%s", what, diff)
		}
	}
	// cart's own pod too: the service says which protocol its port speaks.
	n.change(t, "share service/shop/cart", newService("cart", 81))
	want("a service changes", "translate pod shop/cart", "translate service shop/cart")

	n.change(t, "share service/shop/web", route)
	want("a route comes", "translate service shop/web")

	// web's route leads to it.
	n.change(t, "share service/shop/cart", newService("cart", 82))
	want("a service changes that a route leads to",
		"translate pod shop/cart", "translate service shop/cart", "translate service shop/web")

	n.change(t, "share service/shop/cart", &podwatch.EndpointSlice{
		Meta: podwatch.Meta{Namespace: "shop", Name: "cart-1"}, Service: "cart",
		Ports:     []podwatch.EndpointPort{{Name: "http", Port: 8080}},
		Endpoints: []podwatch.Endpoint{{Addrs: []netip.Addr{netip.MustParseAddr("10.1.0.7")}, Ready: true}},
	})
	want("endpoints change", "translate service shop/cart")

	n.j.reset()
	n.store.Update([]podwatch.Change{{Key: newService("other-7", 80).Key()}})
	n.settle(t, "share service/shop/other-7")
	want("a service goes") // it is taken away, and nothing is translated
}

// Uninstall takes the socket away that agents leave in place.
func TestRemoveSocket(t *testing.T) {
	path := filepath.Join(t.TempDir(), "cni.sock")
	ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	ln.SetUnlinkOnClose(false)
	if err := ln.Close(); err != nil {
		t.Fatal(err)
	}
	for _, when := range []string{"", " again"} {
		if err := removeSocket(path); err != nil {
			t.Errorf("remove%s: %v", when, err)
		}
		if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("remove%s: still there: %v", when, err)
		}
	}
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	wantError(t, removeSocket(path), path, "no socket")
	if _, err := os.Lstat(path); err != nil {
		t.Errorf("a file that is no socket: %v", err)
	}
}
