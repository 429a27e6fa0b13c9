package podwatch

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/fsnotify/fsnotify"
)

// FilesOptions configure a Files.
type FilesOptions struct {
	// Dir is the directory. Its subdirectories are not read.
	Dir   string
	Store *Store
	// Log gets each problem once when it comes and once when it goes; nil discards.
	Log *slog.Logger
	// Node is the name of this machine, the host name if empty. Pods that are
	// attached here, or that name no node, are on it.
	Node string
	// Report, if not nil, is called with all problems whenever they have
	// changed, by the goroutine of Run.
	Report func([]Problem)
	// Rescan is how often the directory is read again, in case that inotify
	// has missed something; 10 s if 0. Unchanged files are not opened.
	Rescan time.Duration
}

const (
	// filesQuiet and filesMaxDelay are for writers that are not done yet: how
	// long no event must come before files are read, and at most.
	filesQuiet    = 20 * time.Millisecond
	filesMaxDelay = 200 * time.Millisecond
	// blindRescan is how often to look while the directory cannot be watched.
	blindRescan = 500 * time.Millisecond
	// maxFile is the size in bytes beyond which a file is refused.
	maxFile = 64 << 20
)

// Files fills a Store from a directory of Kubernetes YAML.
type Files struct {
	dir      string
	rescan   time.Duration
	node     string
	store    *Store
	log      *slog.Logger
	report   func([]Problem)
	parser   *parser
	inotify  func() (*fsnotify.Watcher, error)
	reported []Problem // by Run's goroutine

	mu sync.Mutex
	// files has what was read last, by name.
	files map[string]*file
	// claims has, by key, the objects of all documents that have the key, the
	// one that counts first.
	claims map[Key][]claim
	// contested are the keys with several claims, bad the files with problems.
	contested map[Key]struct{}
	bad       map[string]struct{}
	// vips has the services of each cluster IP, shared those with several.
	vips   map[netip.Addr]map[Key]struct{}
	shared map[netip.Addr]struct{}
	// missing and blind are set while the directory is not there, or not watched.
	missing, blind *Problem
	addrs          map[nsName][]netip.Addr
	deriver        *deriver
}

// A file is a file as it was last read.
type file struct {
	stamp stamp
	docs  []document
	// keys are the keys that the file has claims for.
	keys []Key
	// covers has, for each document of an unknown kind, the objects that stay
	// because it may be the misspelt version of one of them.
	covers map[Key][]Key
}

// A claim is one object of one document.
type claim struct {
	file  string
	index int
	line  int
	decoded
	// adopted objects come from another file than the broken document that
	// they stand for; they count only if no document has them.
	adopted bool
}

// A stamp changes whenever a file does, as far as one can tell without reading.
type stamp struct {
	size, mtime, ctime int64
	dev, ino           uint64
}

// NewFiles returns a Files; Run does the work. The error says why the
// directory cannot be read.
func NewFiles(o FilesOptions) (*Files, error) { return newFiles(o, fsnotify.NewWatcher) }

func newFiles(o FilesOptions, inotify func() (*fsnotify.Watcher, error)) (*Files, error) {
	if o.Store == nil {
		return nil, errors.New("file source: no store given")
	}
	if _, err := os.ReadDir(o.Dir); err != nil {
		return nil, fmt.Errorf("read source directory: %w", err)
	}
	if o.Node == "" {
		name, err := os.Hostname()
		if err != nil {
			return nil, fmt.Errorf("name this node: %w", err)
		}
		o.Node = name
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	if o.Rescan == 0 {
		o.Rescan = 10 * time.Second
	}
	return &Files{
		dir: filepath.Clean(o.Dir), rescan: o.Rescan, node: o.Node,
		store: o.Store, log: o.Log, report: o.Report,
		parser: newParser(), inotify: inotify,
		files:     map[string]*file{},
		claims:    map[Key][]claim{},
		contested: map[Key]struct{}{},
		bad:       map[string]struct{}{},
		vips:      map[netip.Addr]map[Key]struct{}{},
		shared:    map[netip.Addr]struct{}{},
		addrs:     map[nsName][]netip.Addr{},
		deriver:   newDeriver(),
	}, nil
}

// Run reads the directory, marks the Store as synced, and follows changes
// until ctx ends, then returns nil. It may be called once.
func (f *Files) Run(ctx context.Context) error {
	w := &dirWatch{dir: f.dir, events: make(chan fsnotify.Event), errs: make(chan error)}
	inotify, err := f.inotify()
	if err != nil {
		w.err = inotifyError(err)
	} else {
		defer func() { _ = inotify.Close() }()
		w.inotify, w.events, w.errs = inotify, inotify.Events, inotify.Errors
	}
	// Watched first and read then, so that nothing falls between.
	f.scan(w)
	if f.missing != nil {
		return fmt.Errorf("read source directory: %s", f.missing.Message)
	}
	f.store.SetSynced()
	f.tellProblems()
	f.follow(ctx, w)
	return nil
}

// A todo is what events have asked to read.
type todo struct {
	names map[string]struct{}
	all   bool
	since time.Time // zero if nothing was asked
}

// follow collects events until it is quiet and reads what they name.
func (f *Files) follow(ctx context.Context, w *dirWatch) {
	next := todo{names: map[string]struct{}{}}
	timer := time.NewTimer(f.nextRescan())
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case e, ok := <-w.events:
			if !ok {
				return
			}
			if !next.add(e, w) {
				continue
			}
		case err, ok := <-w.errs:
			if !ok {
				return
			}
			// An overflow, or another reason not to trust the events.
			f.log.Warn("watching the source directory", "err", err)
			next.all = true
		case <-timer.C:
			if next.all || next.since.IsZero() {
				f.scan(w)
			}
			f.read(slices.Sorted(maps.Keys(next.names)), true)
			f.tellProblems()
			next = todo{names: map[string]struct{}{}}
			timer.Reset(f.nextRescan())
			continue
		}
		if next.since.IsZero() {
			next.since = time.Now()
		}
		timer.Reset(min(filesQuiet, max(0, time.Until(next.since.Add(filesMaxDelay)))))
	}
}

// add notes what an event is about and says whether that is of interest.
func (d *todo) add(e fsnotify.Event, w *dirWatch) bool {
	name := filepath.Base(e.Name)
	switch {
	case e.Name == w.dir:
		// The directory itself was removed or renamed, and the watch is gone.
		w.watched = nil
		d.all = true
	case name == "..data":
		// The way kubelet changes the files of a mounted ConfigMap at once:
		// they are symbolic links that lead through this one.
		d.all = true
	case isYAML(name):
		d.names[name] = struct{}{}
	default:
		return false // an editor's or a writer's temporary file
	}
	return true
}

// isYAML says whether a file of this name is read.
func isYAML(name string) bool {
	switch filepath.Ext(name) {
	case ".yaml", ".yml", ".json":
		return !strings.HasPrefix(name, ".")
	}
	return false
}

func (f *Files) nextRescan() time.Duration {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.missing != nil || f.blind != nil {
		return min(f.rescan, blindRescan)
	}
	return f.rescan
}

// A dirWatch is the inotify watch of the directory.
type dirWatch struct {
	dir     string
	inotify *fsnotify.Watcher // nil if there is none, err says why
	err     error
	events  chan fsnotify.Event
	errs    chan error
	// watched is the directory that is being watched.
	watched os.FileInfo
}

// renew makes the watch one of the directory that is there now.
func (w *dirWatch) renew(now os.FileInfo) error {
	if w.inotify == nil {
		return w.err
	}
	if w.watched != nil && os.SameFile(w.watched, now) {
		return nil
	}
	_ = w.inotify.Remove(w.dir) // usually gone already, with the old directory
	if err := w.inotify.Add(w.dir); err != nil {
		w.watched = nil
		return inotifyError(err)
	}
	w.watched = now
	return nil
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

// scan looks at every file of the directory and reads those that have changed.
func (f *Files) scan(w *dirWatch) {
	var watchErr error
	info, err := os.Stat(f.dir)
	if err == nil {
		watchErr = w.renew(info)
	}
	var entries []fs.DirEntry
	if err == nil {
		entries, err = os.ReadDir(f.dir)
	}
	f.mu.Lock()
	f.missing, f.blind = nil, nil
	if err != nil {
		f.missing = &Problem{File: f.dir, Message: err.Error() + "; the last state stays"}
		f.mu.Unlock()
		return
	}
	if watchErr != nil {
		f.blind = &Problem{File: f.dir, Message: fmt.Sprintf("cannot be watched, is read every %v: %v", min(f.rescan, blindRescan), watchErr)}
	}
	names := slices.Collect(maps.Keys(f.files))
	f.mu.Unlock()
	for _, e := range entries {
		if isYAML(e.Name()) {
			names = append(names, e.Name())
		}
	}
	slices.Sort(names)
	f.read(slices.Compact(names), false)
}

// read reads the named files, even those that look unchanged if force is set,
// and makes the result visible at once.
func (f *Files) read(names []string, force bool) {
	got := map[string]*file{}
	for _, name := range names {
		next, changed := f.readFile(name, f.files[name], force)
		if changed {
			got[name] = next
		}
	}
	if len(got) == 0 {
		return
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.commit(got)
}

// readFile returns what a file holds, nil if it is not there. last is what was
// read before; only the goroutine of Run changes files, so it needs no lock.
func (f *Files) readFile(name string, last *file, force bool) (*file, bool) {
	path := filepath.Join(f.dir, name)
	info, err := os.Stat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		if _, err := os.Stat(f.dir); err != nil {
			return last, false // the whole directory is gone: the last state stays
		}
		return nil, last != nil
	case err == nil && info.IsDir():
		return nil, last != nil
	case err != nil:
		return broken(name, stamp{}, err.Error()), true
	}
	now := stampOf(info)
	switch {
	case last != nil && last.stamp == now && !force:
		return last, false
	case !info.Mode().IsRegular():
		return broken(name, now, "is no regular file"), true
	case info.Size() > maxFile:
		return broken(name, now, fmt.Sprintf("is larger than %d MiB", maxFile>>20)), true
	case info.Size() == 0:
		// What a writer that has truncated the file and not yet written looks like.
		return broken(name, now, "is empty: its objects stay until it has content or is deleted"), true
	}
	data, err := readAll(path)
	if err != nil {
		// No stamp, so that the next scan tries again.
		return broken(name, stamp{}, err.Error()), true
	}
	return &file{stamp: now, docs: f.parser.parse(name, data)}, true
}

func readAll(path string) ([]byte, error) {
	file, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer func() { _ = file.Close() }() // only read from
	return io.ReadAll(io.LimitReader(file, maxFile))
}

// broken is a file of which nothing is known but the problem.
func broken(name string, at stamp, message string) *file {
	return &file{stamp: at, docs: []document{{line: 1, problems: []Problem{{File: name, Line: 1, Message: message}}}}}
}

func stampOf(info os.FileInfo) stamp {
	s := stamp{size: info.Size(), mtime: info.ModTime().UnixNano()}
	if st, ok := info.Sys().(*syscall.Stat_t); ok {
		s.ctime, s.dev, s.ino = st.Ctim.Nano(), st.Dev, st.Ino
	}
	return s
}

// commit replaces files by what was read (nil: deleted), works out which
// objects that changes, and updates the Store. It holds mu.
func (f *Files) commit(got map[string]*file) {
	// All claims are made before any is replaced, so that a broken document
	// that moved to another file finds its last good version.
	claims := map[string][]keyedClaim{}
	for name, next := range got {
		if next != nil {
			claims[name] = f.claim(name, next)
		}
	}
	touched := map[Key]struct{}{}
	for name, next := range got {
		f.drop(name, touched)
		if next == nil {
			continue
		}
		f.files[name] = next
		for _, c := range claims[name] {
			next.keys = append(next.keys, c.key)
			f.claims[c.key] = append(f.claims[c.key], c.claim)
			touched[c.key] = struct{}{}
		}
		if slices.ContainsFunc(next.docs, func(d document) bool { return len(d.problems) > 0 }) {
			f.bad[name] = struct{}{}
		}
	}
	for k := range touched {
		slices.SortFunc(f.claims[k], compareClaims)
		if len(f.claims[k]) > 1 {
			f.contested[k] = struct{}{}
		} else {
			delete(f.contested, k)
		}
	}
	f.update(slices.SortedFunc(maps.Keys(touched), compareKeys))
}

// drop forgets a file and its claims.
func (f *Files) drop(name string, touched map[Key]struct{}) {
	delete(f.bad, name)
	old := f.files[name]
	if old == nil {
		return
	}
	delete(f.files, name)
	for _, k := range old.keys {
		touched[k] = struct{}{}
		left := slices.DeleteFunc(f.claims[k], func(c claim) bool { return c.file == name })
		if f.claims[k] = left; len(left) == 0 {
			delete(f.claims, k)
		}
	}
}

type keyedClaim struct {
	key Key
	claim
}

// claim returns the claims of a file that was just read: the objects of its
// good documents, and for those that are broken the last good versions.
func (f *Files) claim(name string, next *file) []keyedClaim {
	var claims []keyedClaim
	has := map[Key]bool{}
	unknown := false
	for i, d := range next.docs {
		if d.object != nil {
			claims = append(claims, keyedClaim{d.object.Key(), claim{file: name, index: i, line: d.line, decoded: d.decoded}})
			has[d.object.Key()] = true
		}
		unknown = unknown || d.object == nil && d.key == Key{}
	}
	last := f.lastClaims(name)
	keep := func(k Key, i int, adopt bool) {
		c, ok := last[k]
		if others := f.claims[k]; !ok && adopt && len(others) > 0 {
			c, ok = others[0], true
			c.adopted = true
		}
		if ok && !has[k] {
			c.file, c.index = name, i
			claims = append(claims, keyedClaim{k, c})
			has[k] = true
		}
	}
	for i, d := range next.docs {
		switch {
		case d.unknownKind:
			for _, k := range f.cover(name, next, d.key, has) {
				keep(k, i, false)
			}
		case d.object == nil && d.key != Key{}:
			keep(d.key, i, true)
		}
	}
	if unknown {
		// A document that does not say what it is may be any that is missing.
		for k, c := range last {
			keep(k, c.index, false)
		}
	}
	return claims
}

// cover returns the objects that a document of an unknown kind may stand for:
// those of its name that the file has lost just when the document appeared.
func (f *Files) cover(name string, next *file, unknown Key, has map[Key]bool) []Key {
	var covered []Key
	before := f.files[name]
	if before != nil && slices.ContainsFunc(before.docs, func(d document) bool { return d.unknownKind && d.key == unknown }) {
		covered = before.covers[unknown]
	} else if before != nil && unknown != (Key{}) {
		for _, k := range before.keys {
			if !has[k] && k.Name == unknown.Name && (k.Namespace == unknown.Namespace || k.Namespace == "") {
				covered = append(covered, k)
			}
		}
	}
	if len(covered) > 0 {
		if next.covers == nil {
			next.covers = map[Key][]Key{}
		}
		next.covers[unknown] = covered
	}
	return covered
}

// lastClaims are the claims that a file has had so far, the first of each key.
func (f *Files) lastClaims(name string) map[Key]claim {
	last := map[Key]claim{}
	if old := f.files[name]; old != nil {
		for _, k := range old.keys {
			i := slices.IndexFunc(f.claims[k], func(c claim) bool { return c.file == name })
			if i >= 0 {
				last[k] = f.claims[k][i]
			}
		}
	}
	return last
}

// compareClaims puts the claim that counts first.
func compareClaims(a, b claim) int {
	if a.adopted != b.adopted {
		if a.adopted {
			return 1
		}
		return -1
	}
	return cmp.Or(strings.Compare(a.file, b.file), cmp.Compare(a.index, b.index))
}

// update brings the Store up to date for some keys. It holds mu, so that
// updates reach the Store in their order.
func (f *Files) update(keys []Key) {
	changes := make([]Change, 0, len(keys))
	for _, k := range keys {
		c := Change{Key: k}
		if claims := f.claims[k]; len(claims) > 0 {
			c.Object = f.localise(claims[0].decoded)
		}
		if k.Kind == KindService {
			f.noteVIPs(c)
		}
		changes = append(changes, c)
	}
	f.store.Update(f.deriver.apply(changes))
}

// noteVIPs keeps vips and shared up to date. It looks at the Store for what the
// service was before.
func (f *Files) noteVIPs(c Change) {
	touched := map[netip.Addr]struct{}{}
	if old, ok := Get[*Service](f.store, c.Key.Namespace, c.Key.Name); ok {
		for _, ip := range old.ClusterIPs {
			remove(f.vips, ip, c.Key)
			touched[ip] = struct{}{}
		}
	}
	if now, ok := c.Object.(*Service); ok {
		for _, ip := range now.ClusterIPs {
			insert(f.vips, ip, c.Key, struct{}{})
			touched[ip] = struct{}{}
		}
	}
	for ip := range touched {
		if delete(f.shared, ip); len(f.vips[ip]) > 1 {
			f.shared[ip] = struct{}{}
		}
	}
}

// localise adds to a pod what this machine knows of it.
func (f *Files) localise(d decoded) Object {
	written, ok := d.object.(*Pod)
	if !ok {
		return d.object
	}
	p := *written
	if addrs := f.addrs[nsName{p.Namespace, p.Name}]; len(addrs) > 0 {
		p.Node = f.node
		if len(p.Addrs) == 0 {
			p.Addrs = addrs
		}
	}
	if p.Node == "" {
		p.Node = f.node
	}
	if d.unjudged {
		p.Ready = len(p.Addrs) > 0 && !p.Finished
	}
	return &p
}

// SetPodAddrs tells the addresses that the CNI attachment of a pod of this
// machine has, nil when it is detached. They count if the pod's YAML has no
// status.podIPs. It may be called before Run and before the pod's YAML is
// there, and is safe for concurrent use.
func (f *Files) SetPodAddrs(namespace, name string, addrs []netip.Addr) {
	unmapped := make([]netip.Addr, len(addrs))
	for i, a := range addrs {
		unmapped[i] = a.Unmap()
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if len(addrs) == 0 {
		delete(f.addrs, nsName{namespace, name})
	} else {
		f.addrs[nsName{namespace, name}] = unmapped
	}
	f.update([]Key{{KindPod, namespace, name}})
}

// Problems returns what is wrong at the moment, sorted by file and line. It is
// safe for concurrent use.
func (f *Files) Problems() []Problem {
	f.mu.Lock()
	defer f.mu.Unlock()
	var problems []Problem
	for _, p := range []*Problem{f.missing, f.blind} {
		if p != nil {
			problems = append(problems, *p)
		}
	}
	for name := range f.bad {
		for _, d := range f.files[name].docs {
			problems = append(problems, d.problems...)
		}
	}
	for k := range f.contested {
		used := f.claims[k][0]
		for _, c := range f.claims[k][1:] {
			if !c.adopted {
				problems = append(problems, Problem{
					File: c.file, Line: c.line, Object: k.object(),
					Message: fmt.Sprintf("is also in %s:%d, which is used", used.file, used.line),
				})
			}
		}
	}
	for ip := range f.shared {
		keys := slices.SortedFunc(maps.Keys(f.vips[ip]), compareKeys)
		for _, k := range keys[1:] {
			c := f.claims[k][0]
			problems = append(problems, Problem{
				File: c.file, Line: c.line, Object: k.object(), Field: "spec.clusterIPs",
				Message: fmt.Sprintf("%v is also that of %s", ip, keys[0].object()),
			})
		}
	}
	slices.SortFunc(problems, compareProblems)
	return problems
}

// tellProblems logs and reports what has changed in the problems.
func (f *Files) tellProblems() {
	now := f.Problems()
	if slices.Equal(now, f.reported) {
		return
	}
	for _, p := range now {
		if !slices.Contains(f.reported, p) {
			f.log.Warn("problem in the source directory", "problem", p.String())
		}
	}
	for _, p := range f.reported {
		if !slices.Contains(now, p) {
			f.log.Info("problem in the source directory is gone", "problem", p.String())
		}
	}
	f.reported = now
	if f.report != nil {
		f.report(slices.Clone(now))
	}
}
