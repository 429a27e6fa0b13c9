package cniinstall

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/containernetworking/cni/libcni"
)

const (
	// savedSuffix is added to the name of a single configuration that is kept.
	savedSuffix = ".sluice-saved"
	// bakSuffix is what Cilium adds to the names of others' configurations.
	bakSuffix = ".cilium_bak"

	tmpPattern = ".sluice-cni-*.tmp"

	// maxConf is the size in bytes beyond which a configuration is refused.
	maxConf = 2 << 20
)

// errChanged: a file is no longer what it was when it was read. Look again.
var errChanged = errors.New("changed by another program just now")

// A linkError is about a symbolic link that leads to nothing here; for the
// runtime, which sees other directories, it may.
type linkError struct{ error }

// A file is a file as it was read.
type file struct {
	name  string // in the directory
	path  string // where it is, behind symbolic links
	data  []byte
	info  os.FileInfo
	stamp stamp

	// list is the content, nil if that is no network configuration: bad says why.
	list *libcni.NetworkConfigList
	bad  error
}

// A stamp changes whenever a file does.
type stamp struct {
	size, mtime, ctime int64
	dev, ino           uint64
}

func stampOf(info os.FileInfo) stamp {
	s := stamp{size: info.Size(), mtime: info.ModTime().UnixNano()}
	if st, ok := info.Sys().(*syscall.Stat_t); ok {
		s.ctime, s.dev, s.ino = st.Ctim.Nano(), st.Dev, st.Ino
	}
	return s
}

// readFile reads a file of the directory. One that vanished is fs.ErrNotExist.
func readFile(dir, name string) (file, error) {
	path := filepath.Join(dir, name)
	f := file{name: name}
	resolved, err := filepath.EvalSymlinks(path)
	if err != nil {
		if link, linkErr := os.Readlink(path); linkErr == nil {
			return f, linkError{fmt.Errorf("read %s: it is a symbolic link to %s, which cannot be followed here: %s", path, link, text(errors.Unwrap(err)))}
		}
		return f, fmt.Errorf("read %s: %w", path, err)
	}
	f.path = resolved
	// A fifo must not block.
	h, err := os.OpenFile(resolved, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return f, fmt.Errorf("read %s: %w", path, err)
	}
	defer func() { _ = h.Close() }() // only read from
	if f.info, err = h.Stat(); err != nil {
		return f, fmt.Errorf("read %s: %w", path, err)
	}
	if !f.info.Mode().IsRegular() {
		return f, fmt.Errorf("read %s: is no regular file", path)
	}
	f.stamp = stampOf(f.info)
	if f.data, err = io.ReadAll(io.LimitReader(h, maxConf+1)); err != nil {
		return f, fmt.Errorf("read %s: %w", path, err)
	}
	if len(f.data) > maxConf {
		return f, fmt.Errorf("read %s: is larger than %d MiB", path, maxConf>>20)
	}
	return f, nil
}

// readConfs reads the configurations in the order in which runtimes look.
func readConfs(dir string) ([]file, error) {
	names, err := list(dir, isConf)
	if err != nil {
		return nil, err
	}
	var confs []file
	for _, name := range names {
		f, err := readFile(dir, name)
		if errors.Is(err, fs.ErrNotExist) {
			continue // removed since
		}
		if err != nil {
			// For the runtime it may be the primary one.
			return nil, err
		}
		f.list, f.bad = load(name, f.data)
		confs = append(confs, f)
	}
	return confs, nil
}

// list returns the names of those files in a directory that ok says, sorted.
func list(dir string, ok func(name string) bool) ([]string, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, fmt.Errorf("list %s: %w", dir, err)
	}
	var names []string
	for _, e := range entries {
		if !e.IsDir() && ok(e.Name()) {
			names = append(names, e.Name())
		}
	}
	slices.Sort(names)
	return names, nil
}

// removeTemporary removes what an installer that was killed left.
func removeTemporary(dir string) error {
	names, err := list(dir, func(name string) bool {
		ok, _ := filepath.Match(tmpPattern, name) // the pattern is right
		return ok
	})
	if err != nil {
		return err
	}
	for _, name := range names {
		if err := os.Remove(filepath.Join(dir, name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("remove left-over file: %w", err)
		}
	}
	return nil
}

// A disk changes directories, each step by one system call that is atomic.
type disk struct {
	// before is called before each step with its name; tests interrupt there.
	before func(step string)
	// warn tells of what could not be kept.
	warn func(msg string, path string, err error)
}

// replace puts data in the place of old, with its mode and owner, unless the
// file is no longer old.
func (d disk) replace(old file, data []byte) error {
	return d.put(old.path, data, old.info, func() error {
		now, err := os.Stat(old.path)
		if err != nil || stampOf(now) != old.stamp {
			return fmt.Errorf("write %s: %w", old.path, errChanged)
		}
		return nil
	})
}

// put writes data to path, with mode and owner of like. still is asked last
// whether to go on.
func (d disk) put(path string, data []byte, like os.FileInfo, still func() error) error {
	dir := filepath.Dir(path)
	d.before("make temporary file")
	tmp, err := os.CreateTemp(dir, tmpPattern)
	if err != nil {
		return fmt.Errorf("write %s: %w", path, writeHint(err))
	}
	d.before("write temporary file")
	_, err = tmp.Write(data)
	if st, ok := like.Sys().(*syscall.Stat_t); ok && err == nil {
		if own := tmp.Chown(int(st.Uid), int(st.Gid)); own != nil {
			d.warn("owner of a CNI configuration not kept (CAP_CHOWN)", path, own)
		}
	}
	if err == nil {
		err = tmp.Chmod(like.Mode().Perm())
	}
	if err == nil {
		err = tmp.Sync()
	}
	err = errors.Join(err, tmp.Close())
	if err == nil {
		err = still()
	}
	if err == nil {
		d.before("rename temporary file")
		err = os.Rename(tmp.Name(), path)
	}
	if err != nil {
		_ = os.Remove(tmp.Name())
		return fmt.Errorf("write %s: %w", path, err)
	}
	return d.syncDir(dir)
}

// rename gives a file of the directory another name.
func (d disk) rename(dir, from, to string) error {
	d.before("rename " + from)
	if err := os.Rename(filepath.Join(dir, from), filepath.Join(dir, to)); err != nil {
		return fmt.Errorf("rename configuration: %w", writeHint(err))
	}
	return d.syncDir(dir)
}

// remove removes a file of the directory; it is fine if it is not there.
func (d disk) remove(dir, name string) error {
	d.before("remove " + name)
	if err := os.Remove(filepath.Join(dir, name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return writeHint(err)
	}
	return d.syncDir(dir)
}

func (d disk) syncDir(dir string) error {
	d.before("sync directory")
	h, err := os.Open(dir)
	if err != nil {
		return fmt.Errorf("sync %s: %w", dir, err)
	}
	err = h.Sync()
	if errors.Is(err, syscall.EINVAL) {
		err = nil // a file system that does not need it
	}
	if err = errors.Join(err, h.Close()); err != nil {
		return fmt.Errorf("sync %s: %w", dir, err)
	}
	return nil
}

// writeHint says what to do about a directory that cannot be written to.
func writeHint(err error) error {
	switch {
	case errors.Is(err, fs.ErrPermission):
		return fmt.Errorf("%w (the agent needs write access: UID 0, and CAP_DAC_OVERRIDE where the directory is not root's)", err)
	case errors.Is(err, syscall.EROFS):
		return fmt.Errorf("%w (mount the directory writable into the agent's container)", err)
	}
	return err
}

// exists says whether there is anything of that name.
func exists(dir, name string) bool {
	_, err := os.Lstat(filepath.Join(dir, name))
	return err == nil
}

// fresh says how long to wait until a file has not been written to for a while.
func fresh(f file, now time.Time) time.Duration {
	age := now.Sub(f.info.ModTime())
	if age < 0 {
		return 0 // from a clock that was ahead
	}
	return max(0, settle-age)
}

// savedName and originalName lead from a configuration to its saved original
// and back.
func savedName(name string) string { return name + savedSuffix }

func originalName(saved string) string { return strings.TrimSuffix(saved, savedSuffix) }

// madeFrom says whether a list without our entry is what a single configuration
// was turned into.
func madeFrom(stripped, single []byte) bool {
	made := listOf(single)
	return made != nil && bytes.Equal(stripped, made)
}
