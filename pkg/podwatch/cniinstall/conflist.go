package cniinstall

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"strings"
	"time"
)

// settle is for how long a configuration that cannot be parsed is taken for one
// that is just being written.
const settle = 2 * time.Second

// errNoConf: there is no network configuration yet.
var errNoConf = errors.New("the cluster's network is not installed yet")

// A waitError says when it is worth looking again.
type waitError struct {
	error
	after time.Duration
}

func (e waitError) Unwrap() error { return e.error }

// confDir is the directory of network configurations, and what is to be in it.
type confDir struct {
	dir  string
	want entry
	disk disk
	// allow is asked before a change; an error postpones it.
	allow func(file string) error
}

// primary returns the configuration that runtimes use: the first valid one.
// skipped are the names of those before it that are not valid.
func primary(confs []file, now time.Time) (p file, skipped []file, err error) {
	for _, f := range confs {
		if f.bad == nil {
			return f, skipped, nil
		}
		if as := (notSupported{}); errors.As(f.bad, &as) {
			return f, skipped, f.bad
		}
		if wait := fresh(f, now); wait > 0 {
			return f, skipped, waitError{fmt.Errorf("%w; it may be in the middle of being written", f.bad), wait}
		}
		skipped = append(skipped, f)
	}
	return file{}, skipped, errNoConf
}

// ensure makes the entry the last plugin of the primary configuration and takes
// it out of others that it was put in before. It returns the name of the
// primary one and whether anything had to be changed.
func (c confDir) ensure(now time.Time) (name string, skipped []file, changed bool, err error) {
	confs, err := readConfs(c.dir)
	if err != nil {
		return "", nil, false, err
	}
	p, skipped, err := primary(confs, now)
	if err == nil {
		p = c.newer(p, confs)
		err = checkUsable(p.list)
	}
	switch {
	case errors.Is(err, errNoConf):
		return "", skipped, false, fmt.Errorf("no CNI configuration in %s: %w", c.dir, err)
	case err != nil:
		return "", skipped, false, fmt.Errorf("CNI configuration %s: %w", filepath.Join(c.dir, p.name), err)
	}
	if isList(p.name) {
		name = p.name
		changed, err = c.ensureList(p, confs)
	} else {
		name, changed, err = c.convert(p, confs)
	}
	if err != nil {
		return name, skipped, changed, err
	}
	// The new place first: a moment with both is harmless, one without would
	// let pods start without redirection.
	for _, f := range confs {
		if f.name == name || f.name == p.name || !isList(f.name) || !hasManaged(f) {
			continue
		}
		if err := c.allow(f.name); err != nil {
			return name, skipped, changed, err
		}
		if err := c.takeOut(f, confs); err != nil {
			return name, skipped, changed, err
		}
		changed = true
	}
	return name, skipped, changed, nil
}

// newer returns the single configuration that a list was made of here, if that
// has been written again since, else the list: x.json sorts behind x.conflist.
func (c confDir) newer(p file, confs []file) file {
	if !isList(p.name) || !hasManaged(p) {
		return p
	}
	origin, ok := c.origin(p, confs)
	if !ok || isConf(origin) {
		return p
	}
	for _, f := range confs {
		if f.name == originalName(origin) && f.bad == nil {
			return f
		}
	}
	return p
}

// ensureList adds the entry to a list.
func (c confDir) ensureList(p file, confs []file) (bool, error) {
	data, err := withEntry(p.data, c.want)
	if err != nil {
		return false, fmt.Errorf("CNI configuration %s: %w", filepath.Join(c.dir, p.name), err)
	}
	// A conversion that was interrupted: the single configuration still counts.
	half, ok := "", false
	if hasManaged(p) {
		half, ok = c.origin(p, confs)
		ok = ok && isConf(half)
	}
	same := bytes.Equal(data, p.data)
	if same && !ok {
		return false, nil
	}
	if err := c.verify(p.name, data); err != nil {
		return false, err
	}
	if err := c.allow(p.name); err != nil {
		return false, err
	}
	if ok {
		err = c.disk.rename(c.dir, half, savedName(half))
	}
	if err == nil && !same {
		err = c.disk.replace(p, data)
	}
	return true, err
}

// verify makes sure that a runtime will accept what is about to be written.
func (c confDir) verify(name string, data []byte) error {
	list, err := load(name, data)
	if err == nil && list.Plugins[len(list.Plugins)-1].Network.Type != PluginType {
		err = fmt.Errorf("%s is not the last plugin", PluginType)
	}
	if err != nil {
		return fmt.Errorf("CNI configuration %s: with the entry of %s it would be invalid: %w", filepath.Join(c.dir, name), PluginType, err)
	}
	return nil
}

// convert turns a single configuration into a list with our entry. First the
// list is written: the single one sorts before it, or has the same network.
// Then the single one is renamed to what no runtime reads.
func (c confDir) convert(p file, confs []file) (string, bool, error) {
	name, old, err := c.listName(p, confs)
	if err != nil {
		return "", false, err
	}
	data, err := withEntry(listOf(p.data), c.want)
	if err == nil {
		err = c.verify(name, data)
	}
	if err != nil {
		return name, false, err
	}
	if err := c.allow(p.name); err != nil {
		return name, false, err
	}
	if old == nil {
		err = c.disk.put(filepath.Join(c.dir, name), data, p.info, func() error {
			if exists(c.dir, name) {
				return fmt.Errorf("write %s: %w", filepath.Join(c.dir, name), errChanged)
			}
			return nil
		})
	} else if !bytes.Equal(old.data, data) {
		err = c.disk.replace(*old, data)
	}
	if err != nil {
		return name, true, err
	}
	return name, true, c.disk.rename(c.dir, p.name, savedName(p.name))
}

// listName returns the name for the list that a single configuration becomes:
// one that sorts before every other configuration, and that is free or has a
// list that was made of the same file before (old).
func (c confDir) listName(p file, confs []file) (name string, old *file, err error) {
names:
	for _, name := range listNames(p.name) {
		old = nil
		for _, f := range confs {
			switch {
			case f.name == p.name || f.bad != nil && f.name < p.name:
			case f.name == name:
				if !c.madeHere(f, p, confs) {
					continue names
				}
				old = &f
			case f.name < name:
				continue names
			}
		}
		return name, old, nil
	}
	return "", nil, fmt.Errorf("CNI configuration %s: it must become a list to hold %s too, but other files stand where that would be (%s)",
		filepath.Join(c.dir, p.name), PluginType, strings.Join(listNames(p.name), ", "))
}

// madeHere says whether a list was made here of the single configuration p, as
// it is or as it was.
func (c confDir) madeHere(f, p file, confs []file) bool {
	if !hasManaged(f) {
		return false
	}
	origin, ok := c.origin(f, confs)
	return ok && originalName(origin) == p.name
}

// origin returns the name of the file that a list was made of here: a single
// configuration that is still there, or a saved one.
func (c confDir) origin(f file, confs []file) (string, bool) {
	stripped, err := withoutEntry(f.data)
	if err != nil {
		return "", false
	}
	for _, single := range confs {
		if !isList(single.name) && isListName(f.name, single.name) && madeFrom(stripped, single.data) {
			return single.name, true
		}
	}
	saved, err := c.saved()
	if err != nil {
		return "", false
	}
	for _, s := range saved {
		if isListName(f.name, originalName(s.name)) && madeFrom(stripped, s.data) {
			return s.name, true
		}
	}
	return "", false
}

// isListName says whether a list may have been made of a single configuration.
func isListName(list, single string) bool {
	names := listNames(single)
	return list == names[0] || list == names[1]
}

// saved reads the originals of what was converted.
func (c confDir) saved() ([]file, error) {
	names, err := list(c.dir, func(name string) bool { return strings.HasSuffix(name, savedSuffix) })
	if err != nil {
		return nil, err
	}
	var files []file
	for _, name := range names {
		f, err := readFile(c.dir, name)
		if err != nil {
			return nil, err
		}
		files = append(files, f)
	}
	return files, nil
}

func hasManaged(f file) bool { return hasEntry(f.data, func(s span) bool { return s.managed }) }

func hasOwn(f file) bool { return hasEntry(f.data, func(s span) bool { return s.own }) }

func hasEntry(data []byte, is func(span) bool) bool {
	spans, err := plugins(data)
	if err != nil {
		return false
	}
	for _, s := range spans {
		if is(s) {
			return true
		}
	}
	return false
}

// takeOut takes our entries out of a list. One that was made of a single
// configuration and not changed since gives way to that again.
func (c confDir) takeOut(f file, confs []file) error {
	origin, ok := c.origin(f, confs)
	if !ok {
		data, err := withoutEntry(f.data)
		if err != nil {
			return fmt.Errorf("CNI configuration %s: %w", f.path, err)
		}
		return c.disk.replace(f, data)
	}
	if single := originalName(origin); single != origin && !exists(c.dir, single) {
		if err := c.disk.rename(c.dir, origin, single); err != nil {
			return err
		}
	}
	return c.disk.remove(c.dir, f.name)
}

// clean takes our entries out of every configuration, also out of those that
// Cilium has put out of use and may bring back, and removes what was kept. What
// cannot be cleaned does not keep the rest from it.
func (c confDir) clean() error {
	names, err := list(c.dir, func(name string) bool { return isConf(name) || strings.HasSuffix(name, bakSuffix) })
	if err != nil {
		return err
	}
	var errs []error
	var files []file
	for _, name := range names {
		f, err := readFile(c.dir, name)
		if errors.Is(err, fs.ErrNotExist) || errors.As(err, new(linkError)) {
			continue // nothing that could have been changed from here
		}
		if err != nil {
			errs = append(errs, err)
			continue
		}
		files = append(files, f)
	}
	for _, f := range files {
		if hasOwn(f) {
			errs = append(errs, c.takeOut(f, files))
		}
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	saved, err := c.saved()
	for _, s := range saved {
		// Its list has been changed or removed by others since.
		err = errors.Join(err, c.disk.remove(c.dir, s.name))
	}
	return err
}
