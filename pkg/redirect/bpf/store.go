package bpf

import (
	"bytes"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/fnv"
	"io/fs"
	"net/netip"
	"path/filepath"
	"sync"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"
	"golang.org/x/sys/unix"

	"github.com/sluicemesh/sluice/pkg/redirect"
)

// A store is the pinned maps, seen as what they hold.
type store struct {
	redirectMaps

	mu sync.Mutex
	// policies are those that this process wrote: what is known need not be
	// looked for among the entries of all pods.
	policies map[uint64]table
	// cookies are where workloads were last found.
	cookies map[redirect.ID]uint64
	// addrs is held while it is looked whose an address is.
	addrs sync.Mutex
}

// errIncompatible says in what a pinned map differs from this build's.
func errIncompatible(path, why string) error {
	return fmt.Errorf("pinned map %q at %s: %s: %w", filepath.Base(path), path, why, ErrIncompatible)
}

// adopt makes spec take over the maps that are pinned in dir. It refuses those
// that this build would misread and keeps the sizes of the others.
func adopt(spec *ebpf.CollectionSpec, dir string) error {
	hashes, err := readLayouts(spec, dir)
	if err != nil {
		return err
	}
	for _, ms := range spec.Maps {
		if !shared(ms) {
			continue
		}
		ms.Pinning = ebpf.PinByName
		m, err := openMap(ms, dir, hashes)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return err
		}
		ms.MaxEntries = m.MaxEntries()
		_ = m.Close()
	}
	return nil
}

// readLayouts returns what the pinned map of layouts says; nothing if there is
// none that this build understands, which openMap then finds out.
func readLayouts(spec *ebpf.CollectionSpec, dir string) (map[redirectSlName]uint64, error) {
	hashes := make(map[redirectSlName]uint64)
	m, err := openMap(spec.Maps[redirectMapLayouts], dir, nil)
	if errors.Is(err, fs.ErrNotExist) {
		return hashes, nil
	}
	if err != nil {
		return nil, err
	}
	defer func() { _ = m.Close() }()
	var name redirectSlName
	var hash uint64
	it := m.Iterate()
	for it.Next(&name, &hash) {
		hashes[name] = hash
	}
	if err := it.Err(); err != nil {
		return nil, fmt.Errorf("read map %s: %w", redirectMapLayouts, err)
	}
	return hashes, nil
}

// openMap opens the map of spec ms that is pinned in dir, whatever its size,
// and refuses it if its layout, by sizes or by hash, is another.
func openMap(ms *ebpf.MapSpec, dir string, hashes map[redirectSlName]uint64) (*ebpf.Map, error) {
	path := filepath.Join(dir, ms.Name)
	m, err := ebpf.LoadPinnedMap(path, nil)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	if err != nil {
		return nil, errIncompatible(path, err.Error())
	}
	sized := ms.Copy()
	sized.MaxEntries = m.MaxEntries()
	if err := sized.Compatible(m); err != nil {
		_ = m.Close()
		return nil, errIncompatible(path, err.Error())
	}
	want, err := layout(ms)
	if err != nil {
		_ = m.Close()
		return nil, err
	}
	if got, ok := hashes[mapName(ms.Name)]; ok && got != want {
		_ = m.Close()
		return nil, errIncompatible(path, "the layout of its keys or values is another")
	}
	return m, nil
}

// shared reports whether a map is to be pinned: all but the object's constants.
func shared(ms *ebpf.MapSpec) bool { return ms.Name != ".rodata" }

// writeLayouts says which layout the maps have.
func (s *store) writeLayouts(spec *ebpf.CollectionSpec) error {
	for name, ms := range spec.Maps {
		if !shared(ms) {
			continue
		}
		hash, err := layout(ms)
		if err != nil {
			return err
		}
		if err := s.Layouts.Put(mapName(name), hash); err != nil {
			return fmt.Errorf("write layout of map %s: %w", name, err)
		}
	}
	return nil
}

// layout returns a hash over the types of a map's keys and values: names,
// offsets and sizes of all fields.
func layout(ms *ebpf.MapSpec) (uint64, error) {
	h := fnv.New64a()
	for _, t := range []btf.Type{ms.Key, ms.Value} {
		text, err := (&btf.GoFormatter{}).TypeDeclaration("t", t)
		if err != nil {
			return 0, fmt.Errorf("describe layout of map %s: %w", ms.Name, err)
		}
		_, _ = h.Write([]byte(text)) // never fails
	}
	return h.Sum64(), nil
}

func mapName(s string) (n redirectSlName) {
	copy(n.Byte[:], s)
	return n
}

// text returns what stands before the first zero of a C string.
func text(b []byte) string {
	s, _, _ := bytes.Cut(b, []byte{0})
	return string(s)
}

// put writes a C string and reports whether it and its zero had room.
func put(dst []byte, s string) bool {
	clear(dst)
	return copy(dst, s) == len(s) && len(s) < len(dst)
}

func (m *redirectSlMeta) id() redirect.ID {
	return redirect.ID{PodUID: text(m.Uid[:]), NetnsInode: m.NetnsInode}
}

// interfaces returns the names of the captured interfaces.
func (m *redirectSlMeta) interfaces() []string {
	var names []string
	for i := range m.Interfaces {
		if name := text(m.Interfaces[i][:]); name != "" {
			names = append(names, name)
		}
	}
	return names
}

// addrs returns the addresses of the pod.
func (p *redirectSlPod) addrs() []netip.Addr {
	var addrs []netip.Addr
	if p.Ip4Be != 0 {
		var b [4]byte
		binary.NativeEndian.PutUint32(b[:], p.Ip4Be)
		addrs = append(addrs, netip.AddrFrom4(b))
	}
	if a := netip.AddrFrom16(p.Ip6.Byte); !a.IsUnspecified() {
		addrs = append(addrs, a)
	}
	return addrs
}

// setAddr makes a the address of its family.
func (p *redirectSlPod) setAddr(a netip.Addr) {
	if a.Is4() {
		b := a.As4()
		p.Ip4Be = binary.NativeEndian.Uint32(b[:])
	} else {
		p.Ip6.Byte = a.As16()
	}
}

// each calls fn for every pod, installed whole or not.
func (s *store) each(fn func(cookie uint64, meta *redirectSlMeta) error) error {
	var cookie uint64
	meta := new(redirectSlMeta)
	for it := s.PodMeta.Iterate(); ; {
		if !it.Next(&cookie, meta) {
			if err := it.Err(); err != nil {
				return fmt.Errorf("read map %s: %w", redirectMapPodMeta, err)
			}
			return nil
		}
		if err := fn(cookie, meta); err != nil {
			return err
		}
	}
}

// find returns the cookie of a workload's namespace.
func (s *store) find(id redirect.ID) (cookie uint64, meta *redirectSlMeta, err error) {
	s.mu.Lock()
	cookie, known := s.cookies[id]
	s.mu.Unlock()
	if known {
		if meta, err = s.meta(cookie); err != nil || meta != nil && meta.id() == id {
			return cookie, meta, err
		}
	}
	err = s.each(func(c uint64, m *redirectSlMeta) error {
		if m.id() == id {
			found := *m // each goes on with the same one
			cookie, meta = c, &found
		}
		return nil
	})
	return cookie, meta, err
}

// meta returns what is to be found again of a pod, nil if nothing is.
func (s *store) meta(cookie uint64) (*redirectSlMeta, error) {
	m := new(redirectSlMeta)
	err := s.PodMeta.Lookup(cookie, m)
	if errors.Is(err, ebpf.ErrKeyNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read map %s: %w", redirectMapPodMeta, err)
	}
	return m, nil
}

func (s *store) addMeta(cookie uint64, meta *redirectSlMeta) error {
	if err := write(s.PodMeta, redirectMapPodMeta, cookie, meta, ebpf.UpdateAny); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.cookies == nil {
		s.cookies = make(map[redirect.ID]uint64)
	}
	s.cookies[meta.id()] = cookie
	return nil
}

func (s *store) deleteMeta(cookie uint64, id redirect.ID) error {
	s.mu.Lock()
	delete(s.cookies, id)
	s.mu.Unlock()
	return deleteKey(s.PodMeta, cookie)
}

// pod returns what the hooks know of a pod, nil if nothing.
func (s *store) pod(cookie uint64) (*redirectSlPod, error) {
	p := new(redirectSlPod)
	err := s.Pods.Lookup(cookie, p)
	if errors.Is(err, ebpf.ErrKeyNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read map %s: %w", redirectMapPods, err)
	}
	return p, nil
}

// writePolicy stores a table under a new id, which no pod uses yet.
func (s *store) writePolicy(t table) (id uint64, err error) {
	var b [8]byte
	if _, err := rand.Read(b[:]); err != nil {
		return 0, fmt.Errorf("choose policy id: %w", err)
	}
	id = binary.NativeEndian.Uint64(b[:])
	s.mu.Lock()
	if s.policies == nil {
		s.policies = make(map[uint64]table)
	}
	s.policies[id] = t
	s.mu.Unlock()
	defer func() {
		if err != nil {
			err = errors.Join(err, s.deletePolicy(id, t.entries()))
		}
	}()
	for direction, list := range t.ports() {
		for port, match := range list {
			k := redirectSlPortKey{Policy: id, Direction: direction, Port: port}
			if err := write(s.Ports, redirectMapPorts, &k, match, ebpf.UpdateAny); err != nil {
				return id, fmt.Errorf("store port %d of policy: %w", port, err)
			}
		}
	}
	for prefix, match := range t.cidrs {
		if err := write(s.Cidrs, redirectMapCidrs, cidrKey(id, prefix), match, ebpf.UpdateAny); err != nil {
			return id, fmt.Errorf("store prefix %s of policy: %w", prefix, err)
		}
	}
	return id, nil
}

func cidrKey(policy uint64, p netip.Prefix) *redirectSlCidrKey {
	const fixed = 96 // bits of family and policy, which always match whole
	k := &redirectSlCidrKey{Policy: policy, Family: unix.AF_INET6, Prefixlen: uint32(fixed + p.Bits())}
	k.Addr.Byte = p.Addr().As16() // IPv4 as ::ffff:a.b.c.d
	if p.Addr().Is4() {
		k.Family = unix.AF_INET
		k.Prefixlen += 96
	}
	return k
}

// deletePolicy removes the entries of a policy, of which there are at most n.
func (s *store) deletePolicy(id uint64, n int) error {
	s.mu.Lock()
	t, known := s.policies[id]
	delete(s.policies, id)
	s.mu.Unlock()
	switch {
	case n == 0:
		return nil
	case known:
		return s.deleteTable(id, t)
	}
	return s.deletePolicies(func(policy uint64) bool { return policy == id })
}

// deleteTable removes the entries that writePolicy has made of t.
func (s *store) deleteTable(id uint64, t table) error {
	var errs []error
	for direction, list := range t.ports() {
		for port := range list {
			errs = append(errs, deleteKey(s.Ports, &redirectSlPortKey{Policy: id, Direction: direction, Port: port}))
		}
	}
	for prefix := range t.cidrs {
		errs = append(errs, deleteKey(s.Cidrs, cidrKey(id, prefix)))
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("delete old policy: %w", err)
	}
	return nil
}

// deletePolicies removes the entries of all policies that match.
func (s *store) deletePolicies(match func(policy uint64) bool) error {
	var portKey redirectSlPortKey
	var cidrKey redirectSlCidrKey
	var m redirectSlMatch
	var ports []redirectSlPortKey
	var cidrs []redirectSlCidrKey
	it := s.Ports.Iterate()
	for it.Next(&portKey, &m) {
		if match(portKey.Policy) {
			ports = append(ports, portKey)
		}
	}
	errs := []error{it.Err()}
	it = s.Cidrs.Iterate()
	for it.Next(&cidrKey, &m) {
		if match(cidrKey.Policy) {
			cidrs = append(cidrs, cidrKey)
		}
	}
	errs = append(errs, it.Err())
	for i := range ports {
		errs = append(errs, deleteKey(s.Ports, &ports[i]))
	}
	for i := range cidrs {
		errs = append(errs, deleteKey(s.Cidrs, &cidrs[i]))
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("delete old policy: %w", err)
	}
	return nil
}

// The kernel takes memory for entries in the background, ahead of their writing and
// for each processor. Where it ran short, the next write finds none even if there is
// some again, and only asks for it.
const (
	noMemoryTries = 5
	noMemoryPause = time.Millisecond
)

// write writes an entry. The kernel says in two ways, both of them strange, that
// a map is full.
func write(m *ebpf.Map, name string, key, value any, flags ebpf.MapUpdateFlags) error {
	err := m.Update(key, value, flags)
	for try := 1; errors.Is(err, unix.ENOMEM) && try < noMemoryTries; try++ {
		time.Sleep(noMemoryPause)
		err = m.Update(key, value, flags)
	}
	switch {
	case err == nil:
		return nil
	case errors.Is(err, unix.E2BIG), errors.Is(err, unix.ENOSPC):
		return fmt.Errorf("write map %s: all %d entries are in use: %w", name, m.MaxEntries(), err)
	}
	return fmt.Errorf("write map %s: %w", name, err)
}

// deleteKey deletes an entry that may be gone already.
func deleteKey(m *ebpf.Map, key any) error {
	if err := m.Delete(key); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
		return fmt.Errorf("delete from %s: %w", m, err)
	}
	return nil
}

// purge removes what a process that was killed in the middle has left behind:
// policies that no pod uses.
func (s *store) purge() error {
	used := make(map[uint64]bool)
	var cookie uint64
	var pod redirectSlPod
	it := s.Pods.Iterate()
	for it.Next(&cookie, &pod) {
		used[pod.Policy] = true
	}
	if err := it.Err(); err != nil {
		return fmt.Errorf("read map %s: %w", redirectMapPods, err)
	}
	return s.deletePolicies(func(policy uint64) bool { return !used[policy] })
}

// addAddr makes an address lead to the pod with this cookie.
func (s *store) addAddr(cookie uint64, a netip.Addr) error {
	s.addrs.Lock()
	defer s.addrs.Unlock()
	return write(s.PodIps, redirectMapPodIps, &redirectSlAddr{Byte: a.As16()}, cookie, ebpf.UpdateAny)
}

// deleteAddr removes an address of the pod with this cookie, if it still has it.
func (s *store) deleteAddr(cookie uint64, key redirectSlAddr) error {
	s.addrs.Lock()
	defer s.addrs.Unlock()
	var owner uint64
	err := s.PodIps.Lookup(&key, &owner)
	if errors.Is(err, ebpf.ErrKeyNotExist) || err == nil && owner != cookie {
		return nil
	}
	if err != nil {
		return fmt.Errorf("read map %s: %w", redirectMapPodIps, err)
	}
	return deleteKey(s.PodIps, &key)
}

// deleteAddrs removes all addresses of the pod with this cookie.
func (s *store) deleteAddrs(cookie uint64) error {
	var addr redirectSlAddr
	var owner uint64
	var own []redirectSlAddr
	it := s.PodIps.Iterate()
	for it.Next(&addr, &owner) {
		if owner == cookie {
			own = append(own, addr)
		}
	}
	errs := []error{it.Err()}
	for i := range own {
		errs = append(errs, s.deleteAddr(cookie, own[i]))
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("delete addresses from map %s: %w", redirectMapPodIps, err)
	}
	return nil
}

// release ends the redirection of a pod and removes its entries, all but meta,
// by which it is found until everything else is gone too.
func (s *store) release(cookie uint64) error {
	pod, err := s.pod(cookie)
	if err != nil {
		return err
	}
	// After this line the pod's traffic is not redirected any more.
	errs := []error{deleteKey(s.Pods, cookie), deleteKey(s.AccelPods, cookie)}
	if pod != nil {
		errs = append(errs, s.deletePolicy(pod.Policy, int(pod.Entries)))
	}
	// Not those that pod names: an Add or Remove that ended early may have left
	// some without it.
	errs = append(errs, s.deleteAddrs(cookie))
	for _, family := range []uint32{unix.AF_INET, unix.AF_INET6} {
		errs = append(errs, deleteKey(s.Listeners, &redirectSlListenerKey{Netns: cookie, Family: family}))
	}
	return errors.Join(append(errs, deleteKey(s.ProxyCgroups, cookie), deleteKey(s.Stats, cookie))...)
}
