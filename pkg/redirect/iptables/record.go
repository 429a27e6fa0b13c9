package iptables

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/sluicemesh/sluice/pkg/redirect"
)

// format is the number of the rules' layout. A record of another one is mended
// by Add.
const format = 2

// A record says where a workload is installed and what was found there right
// after. It is what survives the process beside the rules themselves.
type record struct {
	Format int             `json:"format"`
	ID     redirect.ID     `json:"id"`
	Pod    string          `json:"pod"`
	Netns  string          `json:"netns"`
	Digest redirect.Digest `json:"digest"`
	// Interfaces are the pod's, which rules go by the names of; absent in records
	// of earlier builds.
	Interfaces []string `json:"interfaces,omitempty"`
	// Complete is false from before the first change until after the last.
	Complete bool `json:"complete"`
	// Draining is true after Remove, while connections that were redirected
	// still need the kernel's NAT.
	Draining bool `json:"draining,omitempty"`
	// Rules are those of the families that the pod has.
	Rules []installedRules `json:"rules,omitempty"`
	// ProxySource is true if ::6 on lo is this workload's to remove.
	ProxySource bool `json:"proxy_source,omitempty"`
}

type installedRules struct {
	V4      bool   `json:"v4"`
	Variant string `json:"variant"`
	Hash    uint64 `json:"hash"`
	// Addr is the pod's, Source where exempt connections of the node come from;
	// absent if none are.
	Addr   netip.Addr `json:"addr"`
	Source netip.Addr `json:"source"`
	// NoWayBack is true if the pod's answers to Source would not reach the node.
	NoWayBack bool `json:"no_way_back,omitempty"`
}

// variant returns what a family's rules were installed with, "" if there are none.
func (r record) variant(v4 bool) string {
	for _, i := range r.Rules {
		if i.V4 == v4 {
			return i.Variant
		}
	}
	return ""
}

// exempt returns the addresses at which the pod lets connections of the node pass.
func (r record) exempt() []netip.Addr {
	var addrs []netip.Addr
	for _, i := range r.Rules {
		if i.Source.IsValid() {
			addrs = append(addrs, i.Addr)
		}
	}
	return addrs
}

// records is the directory of records.
type records struct{ dir string }

const recordSuffix = ".json"

// unfinished are the names of records that are being written.
const unfinished = "new-*"

func (rs records) path(id redirect.ID) string {
	return filepath.Join(rs.dir, url.PathEscape(id.String())+recordSuffix)
}

// read returns the record of id; ok is false if there is none.
func (rs records) read(id redirect.ID) (r record, ok bool, err error) {
	b, err := os.ReadFile(rs.path(id))
	if errors.Is(err, os.ErrNotExist) {
		return record{}, false, nil
	}
	if err != nil {
		return record{}, false, fmt.Errorf("read record: %w", err)
	}
	if err := json.Unmarshal(b, &r); err != nil {
		return record{}, false, fmt.Errorf("parse record %s: %w", rs.path(id), err)
	}
	return r, true, nil
}

// write replaces the record in one step.
func (rs records) write(r record) error {
	b, err := json.Marshal(r)
	if err != nil {
		return fmt.Errorf("write record: %w", err)
	}
	f, err := os.CreateTemp(rs.dir, unfinished)
	if err != nil {
		return fmt.Errorf("write record: %w", err)
	}
	_, err = f.Write(b)
	err = errors.Join(err, f.Close())
	if err == nil {
		err = os.Rename(f.Name(), rs.path(r.ID))
	}
	if err != nil {
		return errors.Join(fmt.Errorf("write record: %w", err), os.Remove(f.Name()))
	}
	return nil
}

// sweep removes what a process that was killed has left unfinished.
func (rs records) sweep() error {
	left, err := filepath.Glob(filepath.Join(rs.dir, unfinished))
	if err != nil {
		return fmt.Errorf("list unfinished records: %w", err)
	}
	for _, path := range left {
		if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("remove unfinished record: %w", err)
		}
	}
	return nil
}

func (rs records) remove(id redirect.ID) error {
	if err := os.Remove(rs.path(id)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("remove record: %w", err)
	}
	return nil
}

// all returns the records sorted by ID. What cannot be read is left out and
// named in the error.
func (rs records) all() ([]record, error) {
	entries, err := os.ReadDir(rs.dir)
	if err != nil {
		return nil, fmt.Errorf("list records: %w", err)
	}
	var all []record
	var errs []error
	for _, e := range entries {
		name, ok := strings.CutSuffix(e.Name(), recordSuffix)
		if !ok {
			continue
		}
		b, err := os.ReadFile(filepath.Join(rs.dir, e.Name()))
		if errors.Is(err, os.ErrNotExist) {
			continue // removed since
		}
		var r record
		if err == nil {
			err = json.Unmarshal(b, &r)
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("read record %s: %w", name, err))
			continue
		}
		all = append(all, r)
	}
	slices.SortFunc(all, func(a, b record) int { return strings.Compare(a.ID.String(), b.ID.String()) })
	return all, errors.Join(errs...)
}
