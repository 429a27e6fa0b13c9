package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
)

// A kernelObject is an eBPF program, map or link that the demo's agent pinned.
type kernelObject struct {
	kind string
	id   uint32
}

func (o kernelObject) String() string { return fmt.Sprintf("%s %d", o.kind, o.id) }

// pinned returns what is pinned below dir; nothing if there is no such directory.
func pinned(dir string) ([]kernelObject, error) {
	seen := map[kernelObject]bool{}
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		objects, err := openPin(path)
		for _, o := range objects {
			seen[o] = true
		}
		return err
	})
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("list pins: %w", err)
	}
	var out []kernelObject
	for o := range seen {
		out = append(out, o)
	}
	slices.SortFunc(out, func(a, b kernelObject) int { return int(a.id) - int(b.id) })
	return out, nil
}

// openPin says what is pinned at path, and for a link also its program.
func openPin(path string) ([]kernelObject, error) {
	if m, err := ebpf.LoadPinnedMap(path, &ebpf.LoadPinOptions{ReadOnly: true}); err == nil {
		defer func() { _ = m.Close() }()
		info, err := m.Info()
		if err != nil {
			return nil, err
		}
		id, _ := info.ID()
		return []kernelObject{{"map", uint32(id)}}, nil
	}
	if l, err := link.LoadPinnedLink(path, nil); err == nil {
		defer func() { _ = l.Close() }()
		info, err := l.Info()
		if err != nil {
			return nil, err
		}
		return []kernelObject{{"link", uint32(info.ID)}, {"program", uint32(info.Program)}}, nil
	}
	p, err := ebpf.LoadPinnedProgram(path, nil)
	if err != nil {
		return nil, fmt.Errorf("open pin %s: no map, link or program: %w", path, err)
	}
	defer func() { _ = p.Close() }()
	info, err := p.Info()
	if err != nil {
		return nil, err
	}
	id, _ := info.ID()
	return []kernelObject{{"program", uint32(id)}}, nil
}

// stillThere returns those of the objects that the kernel still has. It frees
// them some time after the last reference is gone, so this waits up to 5 s.
func stillThere(ctx context.Context, objects []kernelObject) []string {
	deadline := time.Now().Add(5 * time.Second)
	for {
		var alive []string
		for _, o := range objects {
			if o.exists() {
				alive = append(alive, o.String())
			}
		}
		if len(alive) == 0 || time.Now().After(deadline) || ctx.Err() != nil {
			return alive
		}
		time.Sleep(50 * time.Millisecond)
	}
}

func (o kernelObject) exists() bool {
	switch o.kind {
	case "map":
		m, err := ebpf.NewMapFromID(ebpf.MapID(o.id))
		if err != nil {
			return !errors.Is(err, os.ErrNotExist)
		}
		_ = m.Close()
	case "link":
		l, err := link.NewFromID(link.ID(o.id))
		if err != nil {
			return !errors.Is(err, os.ErrNotExist)
		}
		_ = l.Close()
	case "program":
		p, err := ebpf.NewProgramFromID(ebpf.ProgramID(o.id))
		if err != nil {
			return !errors.Is(err, os.ErrNotExist)
		}
		_ = p.Close()
	}
	return true
}
