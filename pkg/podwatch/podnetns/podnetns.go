package podnetns

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"

	"golang.org/x/sys/unix"
)

var (
	// ErrNotFound: no process of the pod was found. It has ended, has not started,
	// or is on another node.
	ErrNotFound = errors.New("no process of the pod is running here")
	// ErrHostNetwork: all processes of the pod are in the node's own namespace.
	ErrHostNetwork = errors.New("the pod is in the network namespace of the node")
	// ErrNotItsAddrs: no namespace of the pod's processes has its addresses.
	ErrNotItsAddrs = errors.New("its network namespace does not have the pod's addresses")
)

// Options say where to look.
type Options struct {
	// Proc is the /proc of the node's own PID namespace; "/proc" if empty.
	Proc string
	// HostNetns is a path that opens the node's own network namespace; that of
	// process 1 of Proc if empty.
	HostNetns string
	// NetnsDirs are directories in which runtimes mount the namespaces of their
	// sandboxes; /run/netns if nil. They need not exist.
	NetnsDirs []string
	// InNetns runs f on a thread inside the network namespace at path and waits
	// for it. It must not be nil.
	InNetns func(path string, f func() error) error
}

// A Pod is one to be found.
type Pod struct {
	// UID is what the kubelet calls the pod: the UID of its metadata, for a static
	// pod the annotation kubernetes.io/config.hash of its mirror in the API.
	UID string
	// Addrs are the pod's addresses. All must be in the namespace; without any
	// nothing is found.
	Addrs []netip.Addr
}

// Found is a pod's network namespace.
type Found struct {
	// Path opens the namespace: that of a mount if there is one, else one through
	// the process PID. The package's documentation says for how long.
	Path string
	// Inode is that of the namespace, unique on the node while it lives.
	Inode uint64
	// SandboxID is the container ID of the oldest process in the namespace. That is
	// the sandbox's, which CNI knows, unless the runtime has sandboxes without a
	// process, as CRI-O has; empty if its cgroup does not tell.
	SandboxID string
	// Interfaces carry the pod's addresses, in the order of those.
	Interfaces []Interface
	// PID is the number of the oldest process, in Proc.
	PID int
}

// An Interface is one that has addresses of the pod.
type Interface struct {
	Name  string
	Addrs []netip.Addr
}

// A Result is what was found of one pod, or why nothing.
type Result struct {
	Found
	Err error
}

// Find finds the namespace of one pod. FindAll is faster for several.
func Find(o Options, pod Pod) (Found, error) {
	all, err := FindAll(o, []Pod{pod})
	if err != nil {
		return Found{}, err
	}
	r := all[pod.UID]
	return r.Found, r.Err
}

// FindAll finds the namespaces of pods, by UID, with one look at all processes.
// The error says why none can be found; those of one pod are in its Result.
func FindAll(o Options, pods []Pod) (map[string]Result, error) {
	return findAll(o, pods, interfaces)
}

func findAll(o Options, pods []Pod, interfaces func() ([]Interface, error)) (map[string]Result, error) {
	if o.InNetns == nil {
		return nil, errors.New("find network namespaces: no InNetns given")
	}
	if o.NetnsDirs == nil {
		o.NetnsDirs = []string{"/run/netns"}
	}
	s := search{
		proc: &procfs{path: cmp.Or(o.Proc, "/proc")}, inNetns: o.InNetns, interfaces: interfaces,
		wanted: map[string]bool{}, processes: map[string][]process{}, unread: map[string]error{},
	}
	var err error
	if s.host, err = statNetns(unix.AT_FDCWD, cmp.Or(o.HostNetns, s.proc.netnsPath(1))); err != nil {
		return nil, fmt.Errorf("find the node's own network namespace: %w%s", err, hint(err))
	}
	for _, p := range pods {
		s.wanted[p.UID] = true
	}
	if err := s.scan(); err != nil {
		return nil, err
	}
	s.mounts = mounts(o.NetnsDirs)
	results := make(map[string]Result, len(pods))
	for _, p := range pods {
		found, err := s.find(p)
		if err != nil {
			err = fmt.Errorf("find network namespace of pod %s: %w", p.UID, err)
		}
		results[p.UID] = Result{found, err}
	}
	return results, nil
}

// A search is one look at all processes.
type search struct {
	proc       *procfs
	host       namespace
	inNetns    func(path string, f func() error) error
	interfaces func() ([]Interface, error)
	wanted     map[string]bool // the pods' UIDs
	mounts     map[namespace]string

	// processes are those of each pod, unread is why one could not be read.
	processes map[string][]process
	unread    map[string]error
}

// scan sorts the processes that there are by pods.
func (s *search) scan() error {
	pids, err := s.proc.pids()
	if err != nil {
		return err
	}
	for _, pid := range pids {
		where, ok, err := s.proc.place(pid)
		if err != nil {
			return fmt.Errorf("find pods of processes: %w", err)
		}
		if !ok || !s.wanted[where.pod] {
			continue
		}
		proc, ok, err := s.proc.process(pid)
		switch {
		case err != nil:
			s.unread[where.pod] = fmt.Errorf("process %d: %w%s", pid, err, hint(err))
		case ok && s.wanted[proc.pod]:
			s.processes[proc.pod] = append(s.processes[proc.pod], proc)
		}
	}
	for _, list := range s.processes {
		slices.SortFunc(list, func(a, b process) int {
			return cmp.Or(cmp.Compare(a.start, b.start), cmp.Compare(a.pid, b.pid))
		})
	}
	return nil
}

// find looks into the namespaces of a pod's processes, that of the oldest first:
// containers may make namespaces of their own.
func (s *search) find(p Pod) (Found, error) {
	list := s.processes[p.UID]
	switch {
	case len(p.Addrs) == 0:
		return Found{}, fmt.Errorf("it has no address to know it by: %w", ErrNotItsAddrs)
	case len(list) == 0 && s.unread[p.UID] != nil:
		return Found{}, s.unread[p.UID]
	case len(list) == 0:
		return Found{}, ErrNotFound
	}
	var errs []error
	elsewhere := false
	tried := map[namespace]bool{}
	for _, proc := range list {
		if proc.netns == s.host {
			continue
		}
		elsewhere = true
		if tried[proc.netns] {
			continue
		}
		found, ok, err := s.look(proc, p.Addrs)
		switch {
		case err != nil:
			// Kept for when no other namespace is right.
			errs = append(errs, err)
			tried[proc.netns] = true
		case ok:
			return found, nil
		}
		// Else it has ended since; another may be in the same namespace.
	}
	if err := s.unread[p.UID]; err != nil {
		errs = append(errs, err)
	}
	switch {
	case len(errs) > 0:
		return Found{}, errors.Join(errs...)
	case elsewhere:
		return Found{}, ErrNotFound
	}
	return Found{}, ErrHostNetwork
}

// look says whether the namespace of a process has the addresses. It is false
// if the process has ended.
func (s *search) look(proc process, addrs []netip.Addr) (Found, bool, error) {
	fd, ok, err := s.proc.openNetns(proc)
	if err != nil || !ok {
		if err != nil {
			err = fmt.Errorf("process %d: %w%s", proc.pid, err, hint(err))
		}
		return Found{}, false, err
	}
	defer func() { _ = unix.Close(fd) }()
	var all []Interface
	// By the open file, so that it is this namespace and no other.
	err = s.inNetns("/proc/self/fd/"+strconv.Itoa(fd), func() (err error) {
		all, err = s.interfaces()
		return err
	})
	if err != nil {
		return Found{}, false, fmt.Errorf("process %d: %w", proc.pid, err)
	}
	carry, err := carriers(all, addrs)
	if err != nil {
		return Found{}, false, fmt.Errorf("process %d: %w", proc.pid, err)
	}
	return Found{
		Path:  cmp.Or(s.mounts[proc.netns], s.proc.netnsPath(proc.pid)),
		Inode: proc.netns.ino, SandboxID: proc.container, Interfaces: carry, PID: proc.pid,
	}, true, nil
}

// carriers returns the interfaces that have the addresses, and only those
// addresses of them.
func carriers(all []Interface, addrs []netip.Addr) ([]Interface, error) {
	var list []Interface
	for _, addr := range addrs {
		addr = addr.Unmap()
		i := slices.IndexFunc(all, func(i Interface) bool { return slices.Contains(i.Addrs, addr) })
		if i < 0 {
			return nil, fmt.Errorf("%s: %w", addr, ErrNotItsAddrs)
		}
		at := slices.IndexFunc(list, func(i2 Interface) bool { return i2.Name == all[i].Name })
		if at < 0 {
			at = len(list)
			list = append(list, Interface{Name: all[i].Name})
		}
		list[at].Addrs = append(list[at].Addrs, addr)
	}
	return list, nil
}

// interfaces lists those of the thread's network namespace, without loopback:
// pods do not get their address there.
func interfaces() ([]Interface, error) {
	links, err := net.Interfaces()
	if err != nil {
		return nil, fmt.Errorf("list interfaces: %w", err)
	}
	var list []Interface
	for _, link := range links {
		if link.Flags&net.FlagLoopback != 0 {
			continue
		}
		addrs, err := link.Addrs()
		if err != nil {
			return nil, fmt.Errorf("list addresses of %s: %w", link.Name, err)
		}
		i := Interface{Name: link.Name}
		for _, a := range addrs {
			if prefix, err := netip.ParsePrefix(a.String()); err == nil {
				i.Addrs = append(i.Addrs, prefix.Addr().Unmap())
			}
		}
		list = append(list, i)
	}
	return list, nil
}

// mounts returns what is mounted in directories, by namespace. A file that is no
// mount (any more) has another device and is never looked up.
func mounts(dirs []string) map[namespace]string {
	paths := map[namespace]string{}
	for _, dir := range dirs {
		entries, err := os.ReadDir(dir)
		if err != nil {
			continue // not there, or not for us: paths through processes do
		}
		for _, e := range entries {
			path := filepath.Join(dir, e.Name())
			if ns, err := statNetns(unix.AT_FDCWD, path); err == nil && paths[ns] == "" {
				paths[ns] = path
			}
		}
	}
	return paths
}

// hint says what to do about what may not be read.
func hint(err error) string {
	if errors.Is(err, fs.ErrPermission) {
		return " (the agent needs CAP_SYS_PTRACE)"
	}
	return ""
}
