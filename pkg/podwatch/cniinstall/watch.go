package cniinstall

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"syscall"

	"github.com/fsnotify/fsnotify"
)

// A watch tells of events in directories, which may go and come.
type watch struct {
	inotify *fsnotify.Watcher // nil if there is none, err says why
	err     error
	events  chan fsnotify.Event
	errs    chan error
	// watched is the directory that is being watched, by path.
	watched map[string]os.FileInfo
}

func newWatch(inotify func() (*fsnotify.Watcher, error)) *watch {
	w := &watch{watched: map[string]os.FileInfo{}}
	watcher, err := inotify()
	if err != nil {
		w.err = inotifyError(err)
		return w
	}
	w.inotify, w.events, w.errs = watcher, watcher.Events, watcher.Errors
	return w
}

func (w *watch) close() {
	if w.inotify != nil {
		_ = w.inotify.Close()
	}
}

// renew watches the directory that is at the path now. The error says why that
// cannot be done; one that is not there is no error.
func (w *watch) renew(dir string) error {
	info, err := os.Stat(dir)
	if err != nil {
		delete(w.watched, dir)
		return nil
	}
	if w.inotify == nil {
		return w.err
	}
	if last := w.watched[dir]; last != nil && os.SameFile(last, info) {
		return nil
	}
	_ = w.inotify.Remove(dir) // usually gone already, with the old directory
	delete(w.watched, dir)
	if err := w.inotify.Add(dir); err != nil {
		return fmt.Errorf("watch %s: %w", dir, inotifyError(err))
	}
	w.watched[dir] = info
	return nil
}

// matters says whether to look because of an event.
func (w *watch) matters(e fsnotify.Event, confDir string) bool {
	if _, ok := w.watched[e.Name]; ok {
		// The directory itself: removed, renamed, or its mode changed.
		if e.Has(fsnotify.Remove) || e.Has(fsnotify.Rename) {
			delete(w.watched, e.Name)
		}
		return true
	}
	if filepath.Dir(e.Name) == confDir {
		return isConf(e.Name)
	}
	return filepath.Base(e.Name) == PluginType
}

// inotifyError names the limit that was hit.
func inotifyError(err error) error {
	switch {
	case errors.Is(err, syscall.EMFILE):
		return fmt.Errorf("limit fs.inotify.max_user_instances, or that of open files, is reached: %w", err)
	case errors.Is(err, syscall.ENOSPC):
		return fmt.Errorf("limit fs.inotify.max_user_watches is reached: %w", err)
	}
	return err
}
