package main

import (
	"bufio"
	"debug/elf"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// A tree is the file system that a machine starts with: path in the machine to
// what is there.
type tree map[string]node

// A node is a file of this machine, one with the given content, or a link.
type node struct {
	from    string
	content []byte
	link    string
	mode    fs.FileMode // of a file with content
}

// add puts a file of this machine at path.
func (t tree) add(path, from string) { t[path] = node{from: from} }

// addDir puts a directory of this machine with all that is in it at path.
func (t tree) addDir(path, from string) error {
	return filepath.WalkDir(from, func(p string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		rel, err := filepath.Rel(from, p)
		if err == nil {
			t.add(filepath.Join(path, rel), p)
		}
		return err
	})
}

// libraryDirs is where the dynamic linker of Debian looks.
func libraryDirs() []string {
	return []string{
		"/lib/x86_64-linux-gnu", "/usr/lib/x86_64-linux-gnu", "/lib64", "/usr/lib64", "/lib", "/usr/lib",
	}
}

// addProgram puts a program of this machine into /usr/bin, and what the dynamic
// linker loads for it where it is here.
func (t tree) addProgram(path string, names ...string) error {
	real, err := filepath.EvalSymlinks(path)
	if err != nil {
		return fmt.Errorf("find program: %w", err)
	}
	to := filepath.Join("/usr/bin", filepath.Base(real))
	t.add(to, real)
	for _, name := range names {
		if at := filepath.Join("/usr/bin", name); at != to {
			t[at] = node{link: to}
		}
	}
	return t.addLibraries(real)
}

// addLibraries puts what the dynamic linker loads for a file into the tree.
func (t tree) addLibraries(path string) error {
	f, err := elf.Open(path)
	if err != nil {
		return fmt.Errorf("read program %s: %w", path, err)
	}
	defer func() { _ = f.Close() }()
	var needs []string
	for _, p := range f.Progs {
		if p.Type != elf.PT_INTERP {
			continue
		}
		b, err := io.ReadAll(p.Open())
		if err != nil {
			return fmt.Errorf("read program %s: %w", path, err)
		}
		needs = append(needs, strings.TrimRight(string(b), "\x00"))
	}
	names, err := f.ImportedLibraries()
	if err != nil {
		return fmt.Errorf("read libraries of %s: %w", path, err)
	}
	for _, name := range names {
		i := slices.IndexFunc(libraryDirs(), func(dir string) bool {
			_, err := os.Stat(filepath.Join(dir, name))
			return err == nil
		})
		if i < 0 {
			return fmt.Errorf("find library %s of %s: it is in none of %v", name, path, libraryDirs())
		}
		needs = append(needs, filepath.Join(libraryDirs()[i], name))
	}
	for _, lib := range needs {
		if _, ok := t[lib]; ok {
			continue
		}
		t.add(lib, lib)
		if err := t.addLibraries(lib); err != nil {
			return err
		}
	}
	return nil
}

// write writes the tree as the kernel reads it: the format newc of cpio.
func (t tree) write(path string) (err error) {
	f, err := os.Create(path)
	if err != nil {
		return fmt.Errorf("make initramfs: %w", err)
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	w := &archive{w: bufio.NewWriterSize(f, 1<<20)}
	paths := make([]string, 0, len(t))
	dirs := map[string]bool{}
	for p := range t {
		paths = append(paths, p)
		for dir := filepath.Dir(p); dir != "/"; dir = filepath.Dir(dir) {
			dirs[dir] = true
		}
	}
	for dir := range dirs {
		paths = append(paths, dir)
	}
	slices.Sort(paths) // a directory before what is in it
	for _, p := range paths {
		if dirs[p] {
			w.entry(p, modeDir|0o755, 0, strings.NewReader(""))
			continue
		}
		if err := w.node(p, t[p]); err != nil {
			return err
		}
	}
	w.entry("/TRAILER!!!", 0, 0, strings.NewReader(""))
	return errors.Join(w.err, w.w.Flush())
}

// Types of files, as in stat(2).
const (
	modeDir  = 0o040000
	modeFile = 0o100000
	modeLink = 0o120000
)

// An archive writes entries of cpio.
type archive struct {
	w     *bufio.Writer
	inode int
	err   error
}

func (a *archive) node(path string, n node) error {
	switch {
	case n.link != "":
		a.entry(path, modeLink|0o777, int64(len(n.link)), strings.NewReader(n.link))
	case n.from == "":
		a.entry(path, modeFile|int(n.mode.Perm()), int64(len(n.content)), strings.NewReader(string(n.content)))
	default:
		f, err := os.Open(n.from)
		if err != nil {
			return fmt.Errorf("read what goes into the initramfs: %w", err)
		}
		defer func() { _ = f.Close() }()
		st, err := f.Stat()
		if err != nil {
			return fmt.Errorf("read what goes into the initramfs: %w", err)
		}
		a.entry(path, modeFile|int(st.Mode().Perm()), st.Size(), f)
	}
	return a.err
}

func (a *archive) entry(path string, mode int, size int64, content io.Reader) {
	if a.err != nil {
		return
	}
	a.inode++
	name := strings.TrimPrefix(path, "/")
	// magic, inode, mode, uid, gid, links, mtime, size, device, device of the
	// node, length of the name with its 0, checksum
	head := fmt.Sprintf("070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%s\x00",
		a.inode, mode, 0, 0, 1, 0, size, 0, 0, 0, 0, len(name)+1, 0, name)
	_, err := a.w.WriteString(head + padding(int64(len(head))))
	n := int64(0)
	if err == nil {
		n, err = io.Copy(a.w, content)
	}
	if err == nil && n != size {
		err = fmt.Errorf("it had %d bytes and now has %d", size, n)
	}
	if err == nil {
		_, err = a.w.WriteString(padding(size))
	}
	if err != nil {
		a.err = fmt.Errorf("write %s to the initramfs: %w", path, err)
	}
}

// padding fills up to a multiple of four.
func padding(n int64) string { return "\x00\x00\x00"[:(4-n%4)%4] }
