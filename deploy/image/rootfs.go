package main

import (
	"archive/tar"
	"bytes"
	"context"
	"debug/elf"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// machines is what programs of an architecture say of themselves.
var machines = map[string]elf.Machine{"amd64": elf.EM_X86_64, "arm64": elf.EM_AARCH64}

// A file is a file, directory or symlink of the image.
type file struct {
	mode os.FileMode // permissions, and ModeDir or ModeSymlink
	body []byte
	link string
}

// files is a set of files by path, without a leading slash.
type files map[string]file

func (f files) dir(name string, perm os.FileMode) { f[name] = file{mode: os.ModeDir | perm} }
func (f files) symlink(name, target string) {
	f[name] = file{mode: os.ModeSymlink | 0o777, link: target}
}

// size returns the bytes in all files.
func (f files) size() int64 {
	var n int64
	for _, e := range f {
		n += int64(len(e.body))
	}
	return n
}

// paths returns all paths, parents first.
func (f files) paths() []string {
	all := make([]string, 0, len(f))
	for name := range f {
		all = append(all, name)
	}
	slices.Sort(all)
	return all
}

// merged are the directories that Debian has below /usr, with links to there.
var merged = []string{"bin", "lib", "lib64", "sbin"}

// baseFiles returns what the image has of Debian: the packages without their
// documentation but for the licences, and what their installation would have
// added.
func baseFiles(ctx context.Context, debs []string) (files, error) {
	f := files{}
	for _, name := range []string{"dev", "etc", "host", "opt", "proc", "run", "sys", "usr", "usr/local", "usr/local/bin", "var", "var/lib", "var/lib/dpkg", "var/lib/dpkg/status.d"} {
		f.dir(name, 0o755)
	}
	f.dir("tmp", 0o777|os.ModeSticky)
	f.symlink("var/run", "../run")
	for _, name := range merged {
		f.symlink(name, "usr/"+name)
		f.dir("usr/"+name, 0o755)
	}
	for _, deb := range debs {
		if err := f.addPackage(ctx, deb); err != nil {
			return nil, fmt.Errorf("unpack %s: %w", filepath.Base(deb), err)
		}
	}
	f["etc/passwd"] = file{mode: 0o644, body: []byte("root:x:0:0:root:/:/usr/sbin/nologin\n")}
	f["etc/group"] = file{mode: 0o644, body: []byte("root:x:0:\n")}
	for _, family := range []string{"iptables", "ip6tables"} {
		for _, tool := range []string{"", "-restore", "-save"} {
			target := family + "-nft" + tool
			if _, ok := f["usr/sbin/"+target]; !ok {
				return nil, fmt.Errorf("find /usr/sbin/%s in the packages: not there", target)
			}
			if _, ok := f["usr/sbin/"+family+"-legacy"+tool]; !ok {
				return nil, fmt.Errorf("find /usr/sbin/%s-legacy%s in the packages: not there", family, tool)
			}
			f.symlink("usr/sbin/"+family+tool, target)
		}
	}
	return f, nil
}

// addPackage adds the files of a package, and its description where scanners
// look for it.
func (f files) addPackage(ctx context.Context, deb string) error {
	control, err := output(exec.CommandContext(ctx, "dpkg-deb", "--field", deb))
	if err != nil {
		return err
	}
	name, _, _ := strings.Cut(filepath.Base(deb), "_")
	f["var/lib/dpkg/status.d/"+name] = file{mode: 0o644, body: []byte(control)}
	cmd := exec.CommandContext(ctx, "dpkg-deb", "--fsys-tarfile", deb)
	var content, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &content, &stderr
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("run dpkg-deb: %w: %s", err, lastLine(stderr.Bytes()))
	}
	return f.addTar(tar.NewReader(&content), name == identifier)
}

// addTar adds a package's files; of the identifier no more than the release's
// name and the licence.
func (f files) addTar(t *tar.Reader, onlyName bool) error {
	for {
		h, err := t.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		name := underUsr(path.Clean(strings.TrimPrefix(h.Name, "./")))
		if name == "." || superfluous(name) {
			continue
		}
		if onlyName && !slices.Contains([]string{"etc/os-release", "usr/lib/os-release", "etc/debian_version"}, name) &&
			(!strings.HasPrefix(name, "usr/share/doc/") || h.Typeflag == tar.TypeDir) {
			continue
		}
		e := file{mode: h.FileInfo().Mode()}
		switch h.Typeflag {
		case tar.TypeDir:
			if _, ok := f[name]; ok {
				continue // a link of ours may stand for it
			}
		case tar.TypeSymlink:
			e.link = h.Linkname
		case tar.TypeReg:
			if e.body, err = io.ReadAll(t); err != nil {
				return err
			}
		default:
			return fmt.Errorf("file %s is of type %q, which is not provided for", name, h.Typeflag)
		}
		for parent := path.Dir(name); parent != "."; parent = path.Dir(parent) {
			if _, ok := f[parent]; !ok {
				f.dir(parent, 0o755)
			}
		}
		f[name] = e
	}
}

// underUsr leads a path past the links of merged.
func underUsr(name string) string {
	if first, _, _ := strings.Cut(name, "/"); slices.Contains(merged, first) {
		return "usr/" + name
	}
	return name
}

// superfluous says whether a program in a container can do without it.
func superfluous(name string) bool {
	if strings.HasPrefix(name, "usr/share/doc/") {
		return path.Base(name) != "copyright" && strings.Count(name, "/") > 3
	}
	// gconv: character sets that nothing here converts.
	if strings.Contains(name, "/gconv") {
		return true
	}
	for _, dir := range []string{"usr/share/man", "usr/share/lintian", "usr/share/bash-completion", "usr/share/locale", "usr/share/bug", "usr/share/gcc", "usr/share/gdb"} {
		if name == dir || strings.HasPrefix(name, dir+"/") {
			return true
		}
	}
	return false
}

// ownFiles returns Sluice's programs.
func ownFiles(arch, dir string, programs ...string) (files, error) {
	f := files{}
	for i := range dir {
		if dir[i] == '/' {
			f.dir(dir[:i], 0o755)
		}
	}
	for _, program := range programs {
		body, err := os.ReadFile(program)
		if err != nil {
			return nil, fmt.Errorf("read program: %w", err)
		}
		if err := checkProgram(body, arch); err != nil {
			return nil, fmt.Errorf("program %s: %w", program, err)
		}
		f[dir+filepath.Base(program)] = file{mode: 0o755, body: body}
	}
	return f, nil
}

// checkProgram makes sure that a program is of the image's architecture and
// needs no library.
func checkProgram(body []byte, arch string) error {
	e, err := elf.NewFile(bytes.NewReader(body))
	if err != nil {
		return err
	}
	if e.Machine != machines[arch] {
		return fmt.Errorf("is for %v, the image for %s", e.Machine, arch)
	}
	for _, p := range e.Progs {
		if p.Type == elf.PT_INTERP {
			return errors.New("is not static: build it with CGO_ENABLED=0")
		}
	}
	return nil
}

// tar returns the files as a layer.
func (f files) tar(when time.Time) ([]byte, error) {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, name := range f.paths() {
		e := f[name]
		h := &tar.Header{Name: name, Mode: int64(e.mode.Perm()), Size: int64(len(e.body)), ModTime: when, Format: tar.FormatPAX, Typeflag: tar.TypeReg}
		if e.mode&os.ModeSticky != 0 {
			h.Mode |= 0o1000
		}
		switch {
		case e.mode.IsDir():
			h.Typeflag, h.Name = tar.TypeDir, name+"/"
		case e.mode&os.ModeSymlink != 0:
			h.Typeflag, h.Linkname = tar.TypeSymlink, e.link
		}
		if err := w.WriteHeader(h); err != nil {
			return nil, fmt.Errorf("pack %s: %w", name, err)
		}
		if _, err := w.Write(e.body); err != nil {
			return nil, fmt.Errorf("pack %s: %w", name, err)
		}
	}
	if err := w.Close(); err != nil {
		return nil, err
	}
	return b.Bytes(), nil
}

// unpack writes the files below dir, which is made.
func (f files) unpack(dir string) error {
	for _, name := range f.paths() {
		e, to := f[name], filepath.Join(dir, name)
		var err error
		switch {
		case e.mode.IsDir():
			if err = os.MkdirAll(to, 0o755); err == nil {
				err = os.Chmod(to, e.mode.Perm()|e.mode&os.ModeSticky)
			}
		case e.mode&os.ModeSymlink != 0:
			err = os.Symlink(e.link, to)
		default:
			err = os.WriteFile(to, e.body, e.mode.Perm())
		}
		if err != nil {
			return fmt.Errorf("unpack: %w", err)
		}
	}
	return nil
}
