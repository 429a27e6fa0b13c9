package bpf

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/btf"
	"github.com/cilium/ebpf/link"
	"github.com/google/go-cmp/cmp"

	"github.com/sluicemesh/sluice/pkg/redirect"
	"github.com/sluicemesh/sluice/tests/netnstest"
)

// build returns another build's object: change has had its way with this one's.
func build(t *testing.T, change func(*ebpf.CollectionSpec)) func() (*ebpf.CollectionSpec, error) {
	return func() (*ebpf.CollectionSpec, error) {
		spec, err := loadForKernel()
		if err == nil {
			change(spec)
		}
		return spec, err
	}
}

// otherPrograms have one more instruction each, behind the first.
func otherPrograms(spec *ebpf.CollectionSpec) {
	for _, p := range spec.Programs {
		p.Instructions = append(asm.Instructions{p.Instructions[0], asm.Mov.Imm(asm.R0, 1)}, p.Instructions[1:]...)
	}
}

// largerValue gives the values of map pods one more field.
func largerValue(spec *ebpf.CollectionSpec) {
	pods := spec.Maps[redirectMapPods]
	s := btf.Copy(pods.Value).(*btf.Struct)
	s.Members = append(s.Members, btf.Member{
		Name: "later", Type: &btf.Int{Name: "u64", Size: 8}, Offset: btf.Bits(8 * s.Size),
	})
	s.Size += 8
	pods.Value, pods.ValueSize = s, s.Size
}

// otherFields swaps the names of two fields of map pods, which changes no size.
func otherFields(spec *ebpf.CollectionSpec) {
	pods := spec.Maps[redirectMapPods]
	s := btf.Copy(pods.Value).(*btf.Struct)
	s.Members[0].Name, s.Members[1].Name = s.Members[1].Name, s.Members[0].Name
	pods.Value = s
}

// otherKind makes map handover another type of map.
func otherKind(spec *ebpf.CollectionSpec) {
	spec.Maps[redirectMapHandover].Type = ebpf.LRUHash
	spec.Maps[redirectMapHandover].Flags = 0
}

// oneMapMore adds a map that this build does not know.
func oneMapMore(spec *ebpf.CollectionSpec) {
	m := spec.Maps[redirectMapPodIps].Copy()
	m.Name = "later"
	spec.Maps["later"] = m
}

// programTags returns by pin what the hooks run.
func programTags(t *testing.T, o Options) map[string]string {
	t.Helper()
	tags := make(map[string]string)
	err := filepath.WalkDir(o.PinDir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || filepath.Dir(path) == filepath.Join(o.PinDir, "maps") {
			return err
		}
		info, err := pinnedInfo(path)
		if err != nil {
			return err
		}
		p, err := ebpf.NewProgramFromID(info.Program)
		if err != nil {
			return err
		}
		defer func() { _ = p.Close() }()
		i, err := p.Info()
		if err == nil {
			tags[strings.TrimPrefix(path, o.PinDir)] = i.Tag
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return tags
}

// TestUpgrade replaces a build by another and back, under load both ways: other
// programs take over from one connection to the next; where maps have another
// layout the new process refuses, names the map and changes nothing.
func TestUpgrade(t *testing.T) {
	o := newOptions(t)
	pod, peer := newPair(t)
	r := open(t, o)
	w := workload(t, pod)
	mustAdd(t, r, w)
	load := startLoad(t, pod, peer)
	more := func() {
		t.Helper()
		load.more(t, 30, func() { wantName(t, pod.Namespace, app(peer), "proxy") })
	}
	old := programTags(t, o)
	for _, step := range []struct {
		name   string
		object func() (*ebpf.CollectionSpec, error)
		same   bool
	}{
		{"upgrade", build(t, otherPrograms), false},
		{"upgrade with one map more", build(t, func(s *ebpf.CollectionSpec) { otherPrograms(s); oneMapMore(s) }), false},
		{"downgrade", loadRedirect, true},
	} {
		if err := r.Close(); err != nil {
			t.Fatal(err)
		}
		next, err := newFrom(o, step.object)
		if err != nil {
			t.Fatalf("%s: %v", step.name, err)
		}
		r = next
		more()
		tags := programTags(t, o)
		if len(tags) != len(old) {
			t.Errorf("%s: hooks are %v, before %v", step.name, tags, old)
		}
		for pin, tag := range tags {
			if (tag == old[pin]) != step.same {
				t.Errorf("%s: %s runs program %s, at first it ran %s", step.name, pin, tag, old[pin])
			}
		}
		if list, err := r.List(t.Context()); err != nil || len(list) != 1 || !list[0].Whole(w) {
			t.Errorf("%s: List() = %v, %v", step.name, list, err)
		}
	}
	before := objects(t, o.PinDir)
	for name, tc := range map[string]struct {
		change func(*ebpf.CollectionSpec)
		names  string
	}{
		"values have one field more": {largerValue, `"pods"`},
		"fields of the same size":    {otherFields, `"pods"`},
		"another type of map":        {otherKind, `"handover"`},
	} {
		_, err := newFrom(o, build(t, tc.change))
		if !errors.Is(err, ErrIncompatible) || !strings.Contains(err.Error(), tc.names) || !strings.Contains(err.Error(), "uninstall") {
			t.Errorf("%s: got %v, want ErrIncompatible that names map %s", name, err, tc.names)
		}
		more()
		if diff := cmp.Diff(before, objects(t, o.PinDir), cmp.AllowUnexported(object{})); diff != "" {
			t.Errorf("%s: what is pinned has changed (-before +after):\n%s", name, diff)
		}
	}
	load.end()
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
}

// TestDowngrade meets what a later build has pinned: a map of another layout,
// or pins that this build does not know. It says which, and touches nothing.
func TestDowngrade(t *testing.T) {
	someLink := func(t *testing.T, r *Redirector, path string, h func(hook) bool) {
		t.Helper()
		hooks, err := r.hooks()
		if err != nil {
			t.Fatal(err)
		}
		for _, have := range hooks {
			if !h(have) {
				continue
			}
			l, err := link.AttachCgroup(link.CgroupOptions{Path: have.cgroup, Attach: have.attach, Program: have.prog})
			if err != nil {
				t.Fatal(err)
			}
			if err := errors.Join(l.Pin(path), l.Close()); err != nil {
				t.Fatal(err)
			}
			return
		}
		t.Fatal("no such hook")
	}
	sockops := func(h hook) bool { return h.name == "sockops" }
	for name, tc := range map[string]struct {
		later func(*ebpf.CollectionSpec)
		leave func(t *testing.T, r *Redirector, w string)
		names string
		// pod means that it is one pod that cannot be served.
		pod bool
	}{
		"values have one field more": {later: largerValue, names: `"pods"`},
		"fields of the same size":    {later: otherFields, names: `"pods"`},
		"a hook more": {names: "links/later", leave: func(t *testing.T, r *Redirector, _ string) {
			someLink(t, r, filepath.Join(r.hookDir(), "later"), sockops)
		}},
		"a hook more in a pod": {names: "/later", leave: func(t *testing.T, r *Redirector, pod string) {
			someLink(t, r, filepath.Join(pod, "later"), sockops)
		}},
		"a directory more": {names: "sluice/later", leave: func(t *testing.T, r *Redirector, _ string) {
			if err := os.Mkdir(filepath.Join(r.dir, "later"), 0o700); err != nil {
				t.Fatal(err)
			}
		}},
		"another link for a pod": {names: "sk_lookup", pod: true, leave: func(t *testing.T, r *Redirector, pod string) {
			if err := os.Remove(filepath.Join(pod, pinLookup)); err != nil {
				t.Fatal(err)
			}
			someLink(t, r, filepath.Join(pod, pinLookup), sockops)
		}},
		"no link at all": {names: "links/connect4", leave: func(t *testing.T, r *Redirector, _ string) {
			path := filepath.Join(r.hookDir(), "connect4")
			if err := errors.Join(os.Remove(path), r.programs.SlConnect4.Pin(path)); err != nil {
				t.Fatal(err)
			}
		}},
	} {
		t.Run(name, func(t *testing.T) {
			o := newOptions(t)
			object := loadRedirect
			if tc.later != nil {
				object = build(t, tc.later)
			}
			r, err := newFrom(o, object)
			if err != nil {
				t.Fatal(err)
			}
			var w redirect.Workload
			if tc.leave != nil {
				w = workload(t, netnstest.NewNode(t).Pod(t, "pod"))
				mustAdd(t, r, w)
				tc.leave(t, r, r.podDir(w.ID))
			}
			if err := r.Close(); err != nil {
				t.Fatal(err)
			}
			before := pins(t, o)
			next, err := New(o)
			if tc.pod { // which keeps nobody else from being served
				if err != nil {
					t.Fatal(err)
				}
				list, listErr := next.List(t.Context())
				if listErr != nil || len(list) != 1 || list[0].Problem == nil {
					t.Errorf("List() = %v, %v; want one with a problem", list, listErr)
				}
				err = next.Add(t.Context(), w)
				if err := next.Close(); err != nil {
					t.Error(err)
				}
			}
			if !errors.Is(err, ErrIncompatible) || !strings.Contains(err.Error(), tc.names) {
				t.Errorf("got %v, want ErrIncompatible that names %s", err, tc.names)
			}
			if diff := cmp.Diff(before, pins(t, o)); diff != "" {
				t.Errorf("what is pinned has changed (-before +after):\n%s", diff)
			}
		})
	}
}

// pins lists what is pinned, with the kernel's numbers.
func pins(t *testing.T, o Options) []string {
	t.Helper()
	var all []string
	err := filepath.WalkDir(o.PinDir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		st, err := os.Lstat(path)
		if err == nil {
			all = append(all, strings.TrimPrefix(path, o.PinDir)+" "+st.ModTime().Format(time.RFC3339Nano))
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}
