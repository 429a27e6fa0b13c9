package cniinstall

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"syscall"
	"time"

	"github.com/fsnotify/fsnotify"
)

// ErrDirGone: a directory was deleted while it is mounted here. Only a new
// mount, for a container a restart, shows the one that came in its place.
var ErrDirGone = errors.New("was deleted while it is mounted here: restart to see its successor")

// Options say what is installed where.
type Options struct {
	// ConfDir is the directory of network configurations, /etc/cni/net.d, and
	// BinDir that of plugins, /opt/cni/bin, as this process sees them. Neither is
	// made: the cluster's network does that.
	ConfDir, BinDir string
	// Plugin is the binary to install. Uninstall does not need it.
	Plugin string
	// Socket is the agent's, as the plugin will see it; empty for the plugin's
	// default.
	Socket string
	// ExcludeNamespaces are passed on to the plugin; nil for none.
	ExcludeNamespaces []string

	// Proc is the /proc of the node's own PID namespace. Uninstall looks there for
	// CRI-O; if empty it does not.
	Proc string

	// Log gets every change, and each problem once; nil discards.
	Log *slog.Logger
	// Poll is how often to look without having been told of a change; 10 s if 0.
	Poll time.Duration
	// Burst changes may follow each other at once, one more each Refill. Beyond
	// that pauses grow up to MaxBackoff. 5, 10 s and 30 s if 0.
	Burst              int
	Refill, MaxBackoff time.Duration
}

// A Status is what an Installer has done so far.
type Status struct {
	// Conf is the path of the configuration that has the entry, empty if there is
	// none; Plugin that of the installed binary, empty if it is not installed.
	Conf, Plugin string
	// Err says why not both are in place; nil if they are.
	Err error
	// Blind says why changes by others are noticed only each half second; nil if
	// they are noticed at once.
	Blind error
	// Fighting: another program undoes the installation so often that it is put
	// back with pauses.
	Fighting bool
	// Repairs counts how often something had to be put back or brought up to date
	// since it was installed first.
	Repairs uint64
}

// Installed says whether new pods pass the plugin.
func (s Status) Installed() bool { return s.Err == nil && s.Conf != "" && s.Plugin != "" }

const (
	// retry is when to look again after a problem, or while nothing is watched.
	retry = 500 * time.Millisecond
	// quiet is how long to wait for further events, and maxDelay at most.
	quiet    = 10 * time.Millisecond
	maxDelay = 50 * time.Millisecond
	// attempts are made at once when a file changes under our hands.
	attempts = 5
)

// An Installer installs the CNI plugin and keeps it installed.
type Installer struct {
	opts    Options
	log     *slog.Logger
	inotify func() (*fsnotify.Watcher, error)
	conf    confDir
	plugin  plugin
	limit   limiter

	// By Run's goroutine: what was logged last, and whether everything was in
	// place once.
	told, toldBlind, toldSkipped string
	complete                     bool

	mu     sync.Mutex
	status Status
}

// New checks the options and touches nothing.
func New(o Options) (*Installer, error) {
	return newInstaller(o, fsnotify.NewWatcher, func(string) {})
}

func newInstaller(o Options, inotify func() (*fsnotify.Watcher, error), before func(string)) (*Installer, error) {
	if err := o.check(); err != nil {
		return nil, err
	}
	if o.Plugin == "" {
		return nil, errors.New("CNI installer: no plugin given")
	}
	if o.Socket != "" && !filepath.IsAbs(o.Socket) {
		return nil, fmt.Errorf("CNI installer: socket %q is no absolute path", o.Socket)
	}
	if slices.Contains(o.ExcludeNamespaces, "") {
		return nil, errors.New("CNI installer: a namespace to exclude has no name")
	}
	o.Poll = cmp.Or(o.Poll, 10*time.Second)
	log := logger(o)
	d := newDisk(log, before)
	i := &Installer{
		opts: o, log: log, inotify: inotify,
		conf: confDir{
			dir: filepath.Clean(o.ConfDir), disk: d,
			want: entry{Type: PluginType, ManagedBy: manager, Socket: o.Socket, ExcludeNamespaces: o.ExcludeNamespaces},
		},
		plugin: plugin{source: o.Plugin, target: filepath.Join(o.BinDir, PluginType), disk: d},
		limit: limiter{
			burst: cmp.Or(o.Burst, 5), refill: cmp.Or(o.Refill, 10*time.Second), backoff: cmp.Or(o.MaxBackoff, 30*time.Second),
		},
	}
	i.conf.allow = i.allow
	i.status.Err = errors.New("CNI plugin: not looked yet")
	return i, nil
}

func (o Options) check() error {
	for name, dir := range map[string]string{"directory of CNI configurations": o.ConfDir, "directory of CNI plugins": o.BinDir} {
		if !filepath.IsAbs(dir) {
			return fmt.Errorf("CNI installer: %s: %q is no absolute path", name, dir)
		}
	}
	return nil
}

func logger(o Options) *slog.Logger {
	if o.Log == nil {
		return slog.New(slog.DiscardHandler)
	}
	return o.Log
}

func newDisk(log *slog.Logger, before func(string)) disk {
	return disk{before: before, warn: func(msg, path string, err error) {
		log.Warn("install CNI plugin", "path", path, "reason", msg, "err", err)
	}}
}

// Status returns what is installed now.
func (i *Installer) Status() Status {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.status
}

// Err says why the plugin is not installed, nil if it is.
func (i *Installer) Err() error { return i.Status().Err }

// Repairs counts how often something had to be put back or brought up to date.
func (i *Installer) Repairs() uint64 { return i.Status().Repairs }

// Run installs the plugin and keeps it installed until ctx ends; then it leaves
// everything in place and returns nil. The only other end is ErrDirGone. What
// cannot be done yet is tried again, and told by Status.
func (i *Installer) Run(ctx context.Context) error {
	w := newWatch(i.inotify)
	defer w.close()
	for _, dir := range []string{i.opts.ConfDir, i.opts.BinDir} {
		if err := removeTemporary(dir); err != nil && !errors.Is(err, fs.ErrNotExist) {
			i.log.Warn("install CNI plugin", "err", err)
		}
	}
	for ctx.Err() == nil {
		// Watched first and looked at then, so that nothing falls between.
		blind := errors.Join(w.renew(i.conf.dir), w.renew(filepath.Clean(i.opts.BinDir)))
		err := i.ensure()
		i.tell(err, blind)
		if errors.Is(err, ErrDirGone) {
			return err
		}
		i.wait(ctx, w, i.next(err, blind))
	}
	return nil
}

// next says when to look again if there is no event.
func (i *Installer) next(err, blind error) time.Duration {
	var wait waitError
	switch {
	case errors.As(err, &wait):
		return max(wait.after, time.Millisecond)
	case err != nil || blind != nil:
		return min(i.opts.Poll, retry)
	case i.limit.fighting(time.Now()):
		return min(i.opts.Poll, i.limit.calm()) // to say that it is over
	}
	return i.opts.Poll
}

// wait returns when something has changed and no more changes come, when it is
// time, or when ctx ends.
func (i *Installer) wait(ctx context.Context, w *watch, after time.Duration) {
	timer := time.NewTimer(after)
	defer timer.Stop()
	var since time.Time
	for {
		select {
		case <-ctx.Done():
			return
		case <-timer.C:
			return
		case err := <-w.errs:
			// An overflow, or another reason not to trust the events.
			i.log.Warn("watch directories of CNI", "err", err)
		case e := <-w.events:
			if !w.matters(e, i.conf.dir) {
				continue
			}
		}
		if since.IsZero() {
			since = time.Now()
		}
		timer.Reset(min(quiet, max(0, time.Until(since.Add(maxDelay)))))
	}
}

// ensure puts everything in place: the binary first, because a runtime that
// finds an entry without its binary starts no pods.
func (i *Installer) ensure() error {
	if err := checkDir("configurations", i.conf.dir); err != nil {
		i.setConf("")
		return err
	}
	err := checkDir("plugins", i.opts.BinDir)
	wrote := false
	if err == nil {
		wrote, err = i.plugin.ensure()
	}
	if err != nil {
		i.setPlugin("")
		return err
	}
	i.setPlugin(i.plugin.target)
	i.count(wrote, "plugin", i.plugin.target)

	var name string
	var skipped []file
	for range attempts {
		var changed bool
		name, skipped, changed, err = i.conf.ensure(time.Now())
		i.count(changed && err == nil, "conf", filepath.Join(i.conf.dir, name))
		if !errors.Is(err, errChanged) {
			break
		}
	}
	i.tellSkipped(skipped)
	if err != nil {
		i.setConf("")
		return err
	}
	i.setConf(filepath.Join(i.conf.dir, name))
	i.complete = true
	return nil
}

// checkDir says whether the directory can be used.
func checkDir(what, dir string) error {
	info, err := os.Stat(dir)
	if err != nil {
		return fmt.Errorf("directory of CNI %s: %w", what, err)
	}
	if st, ok := info.Sys().(*syscall.Stat_t); ok && st.Nlink == 0 {
		return fmt.Errorf("directory of CNI %s: %s %w", what, dir, ErrDirGone)
	}
	return nil
}

// allow is asked before a configuration is changed.
func (i *Installer) allow(file string) error {
	if !i.complete {
		return nil
	}
	wait := i.limit.take(time.Now())
	if wait == 0 {
		return nil
	}
	return waitError{fmt.Errorf("another program keeps taking %s out of %s: it is put back at most every %v (Cilium does so unless cni.exclusive is false)",
		PluginType, filepath.Join(i.conf.dir, file), i.limit.backoff), wait}
}

func (i *Installer) count(changed bool, what, path string) {
	if !changed {
		return
	}
	if !i.complete {
		i.log.Info("installed for CNI", what, path)
		return
	}
	i.mu.Lock()
	i.status.Repairs++
	i.mu.Unlock()
	// Others may make this happen often: no more than a trace.
	i.log.Debug("put back for CNI", what, path)
}

func (i *Installer) setConf(path string) {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.status.Conf = path
}

func (i *Installer) setPlugin(path string) {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.status.Plugin = path
}

// tell makes the state known, and logs what is new.
func (i *Installer) tell(err, blind error) {
	i.mu.Lock()
	i.status.Err, i.status.Blind = err, blind
	i.status.Fighting = i.limit.fighting(time.Now())
	s := i.status
	i.mu.Unlock()
	switch now := text(err); {
	case now == i.told:
	case err == nil && s.Fighting:
		// Not for long; what is wrong has been said.
	case err == nil:
		i.log.Info("CNI plugin is in place", "conf", s.Conf, "plugin", s.Plugin)
		i.told = now
	default:
		i.log.Warn("CNI plugin is not in place", "err", err)
		i.told = now
	}
	if now := text(blind); now != i.toldBlind {
		i.toldBlind = now
		if blind != nil {
			i.log.Warn("directories of CNI cannot be watched, looking each time", "interval", min(i.opts.Poll, retry), "err", blind)
		}
	}
}

// tellSkipped logs configurations that no runtime can read.
func (i *Installer) tellSkipped(skipped []file) {
	var errs []error
	for _, f := range skipped {
		errs = append(errs, fmt.Errorf("%s: %w", f.name, f.bad))
	}
	err := errors.Join(errs...)
	if now := text(err); now != i.toldSkipped {
		i.toldSkipped = now
		if err != nil {
			i.log.Warn("CNI configuration is not valid: containerd stops at it, CRI-O takes the next", "err", err)
		}
	}
}

func text(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}

// Uninstall takes the plugin's entry out of every configuration and then removes
// the binary, unless CRI-O runs here, which needs it to end its pods: without an
// agent it does nothing and succeeds. A configuration that was turned into a list becomes again what it
// was, byte by byte, unless somebody has changed it since. It is fine if nothing
// is installed. It must not run beside Run.
func Uninstall(ctx context.Context, o Options) error {
	return uninstall(ctx, o, func(string) {})
}

func uninstall(ctx context.Context, o Options, before func(string)) error {
	if err := o.check(); err != nil {
		return err
	}
	c := confDir{dir: filepath.Clean(o.ConfDir), disk: newDisk(logger(o), before)}
	if _, err := os.Stat(c.dir); err == nil {
		if err := c.uninstall(ctx); err != nil {
			// An entry without its binary would stop all pods: that stays too.
			return fmt.Errorf("uninstall CNI plugin: %w", err)
		}
	} else if !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("uninstall CNI plugin: %w", err)
	}
	err := removeTemporary(o.BinDir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err == nil && runsCRIO(o.Proc) {
		logger(o).Info("CNI plugin stays: CRI-O calls it for the end of pods that began with it", "plugin", filepath.Join(o.BinDir, PluginType))
		return nil
	}
	if err = errors.Join(err, c.disk.remove(o.BinDir, PluginType)); err != nil {
		return fmt.Errorf("uninstall CNI plugin: %w", err)
	}
	return nil
}

// runsCRIO says whether the node's container runtime is CRI-O: that remembers
// with each pod the configuration it was made with, and ends it with the same
// plugins. Without their binaries the pod could not be deleted any more.
func runsCRIO(proc string) bool {
	if proc == "" {
		return false
	}
	names, err := filepath.Glob(filepath.Join(proc, "[0-9]*", "comm"))
	if err != nil {
		return false // the pattern is right
	}
	for _, name := range names {
		if comm, err := os.ReadFile(name); err == nil && string(comm) == "crio\n" {
			return true
		}
	}
	return false
}

func (c confDir) uninstall(ctx context.Context) error {
	var err error
	for range attempts {
		if err = ctx.Err(); err != nil {
			return err
		}
		if err = c.clean(); !errors.Is(err, errChanged) {
			break
		}
	}
	return errors.Join(err, removeTemporary(c.dir))
}
