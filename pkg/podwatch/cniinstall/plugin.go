package cniinstall

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
)

const pluginMode = 0o755

// A plugin is the binary that is to be installed, and what is known of the one
// that is.
type plugin struct {
	source string
	target string
	disk   disk

	// sum is that of the installed binary when it had the stamp, and source's
	// when that had its stamp: neither is read again until it changes.
	sourceStamp, targetStamp stamp
	sourceSum, targetSum     [sha256.Size]byte
}

// ensure makes the installed binary that of the source and says whether it had
// to be written.
func (p *plugin) ensure() (bool, error) {
	if err := sum(p.source, &p.sourceStamp, &p.sourceSum); err != nil {
		return false, fmt.Errorf("read CNI plugin: %w", err)
	}
	err := sum(p.target, &p.targetStamp, &p.targetSum)
	switch {
	case err == nil && p.sourceSum == p.targetSum:
		return false, p.ensureMode()
	case err != nil && !errors.Is(err, fs.ErrNotExist):
		return false, fmt.Errorf("read installed CNI plugin: %w", err)
	}
	if err := p.copy(); err != nil {
		return false, fmt.Errorf("install CNI plugin: %w", err)
	}
	return true, nil
}

// ensureMode makes the installed binary executable again.
func (p *plugin) ensureMode() error {
	info, err := os.Stat(p.target)
	if err != nil || info.Mode().Perm() == pluginMode {
		return err
	}
	p.disk.before("chmod plugin")
	if err := os.Chmod(p.target, pluginMode); err != nil {
		return fmt.Errorf("install CNI plugin: %w", writeHint(err))
	}
	return nil
}

// copy writes the binary aside and renames it into place, so that a runtime
// starts either the old or the new one.
func (p *plugin) copy() error {
	data, err := os.ReadFile(p.source)
	if err != nil {
		return err
	}
	dir := filepath.Dir(p.target)
	p.disk.before("make temporary plugin")
	name, err := writeExecutable(dir, data)
	if err != nil {
		return writeHint(err)
	}
	p.disk.before("rename temporary plugin")
	if err := os.Rename(name, p.target); err != nil {
		_ = os.Remove(name)
		return writeHint(err)
	}
	return p.disk.syncDir(dir)
}

// writeExecutable writes a temporary file that can be executed.
func writeExecutable(dir string, data []byte) (name string, err error) {
	// A process that is started meanwhile would have the file open for writing
	// until its exec, and nobody could execute the plugin (ETXTBSY): none is
	// started until it is closed.
	syscall.ForkLock.RLock()
	tmp, err := os.CreateTemp(dir, tmpPattern)
	if err == nil {
		_, err = io.Copy(tmp, bytes.NewReader(data))
		err = errors.Join(err, tmp.Chmod(pluginMode), tmp.Close())
	}
	syscall.ForkLock.RUnlock()
	if tmp == nil {
		return "", err
	}
	if err == nil {
		err = syncFile(tmp.Name())
	}
	if err != nil {
		_ = os.Remove(tmp.Name())
	}
	return tmp.Name(), err
}

// syncFile writes a file to the disk without opening it for writing.
func syncFile(path string) error {
	h, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(h.Sync(), h.Close())
}

// sum updates a file's checksum if the file has changed since.
func sum(path string, last *stamp, to *[sha256.Size]byte) error {
	h, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		*last = stamp{}
		return err
	}
	defer func() { _ = h.Close() }() // only read from
	info, err := h.Stat()
	if err != nil {
		return err
	}
	if !info.Mode().IsRegular() {
		return fmt.Errorf("%s is no regular file", path)
	}
	if stampOf(info) == *last {
		return nil
	}
	*last = stamp{}
	hash := sha256.New()
	if _, err := io.Copy(hash, h); err != nil {
		return fmt.Errorf("read %s: %w", path, err)
	}
	hash.Sum(to[:0])
	*last = stampOf(info)
	return nil
}
