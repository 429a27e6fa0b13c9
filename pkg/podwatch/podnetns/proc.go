package podnetns

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"strconv"

	"golang.org/x/sys/unix"
)

// A namespace is known by the device and inode of its file.
type namespace struct{ dev, ino uint64 }

// A process is one that belongs to a pod.
type process struct {
	pid   int
	start uint64 // in clock ticks since boot
	place
	netns namespace
}

// A procfs is a mounted /proc.
type procfs struct {
	path string
	buf  []byte
}

// pids lists the processes that there are now.
func (p *procfs) pids() ([]int, error) {
	dir, err := os.Open(p.path)
	if err != nil {
		return nil, fmt.Errorf("list processes: %w", err)
	}
	defer func() { _ = dir.Close() }() // only read from
	names, err := dir.Readdirnames(-1)
	if err != nil {
		return nil, fmt.Errorf("list processes: %w", err)
	}
	pids := make([]int, 0, len(names))
	for _, name := range names {
		if pid, err := strconv.Atoi(name); err == nil {
			pids = append(pids, pid)
		}
	}
	return pids, nil
}

// place says which pod a process belongs to. It is a first look: by the time of
// a second one the number may be another process's.
func (p *procfs) place(pid int) (place, bool, error) {
	content, err := p.read(unix.AT_FDCWD, p.path+"/"+strconv.Itoa(pid)+"/cgroup")
	if err != nil {
		return place{}, false, ended(err)
	}
	where, ok := placeOf(content)
	return where, ok, nil
}

// process reads what is to be known of one process of a pod. It is false if
// there is no such process any more.
func (p *procfs) process(pid int) (process, bool, error) {
	proc := process{pid: pid}
	found := false
	err := p.within(pid, func(dir int) error {
		content, err := p.read(dir, "cgroup")
		if err != nil {
			return err
		}
		if proc.place, found = placeOf(content); !found {
			return nil
		}
		if proc.start, err = p.start(dir); err != nil {
			return err
		}
		proc.netns, err = statNetns(dir, "ns/net")
		return err
	})
	if err != nil {
		return process{}, false, ended(err)
	}
	return proc, found, nil
}

// within calls f with the directory of a process. A directory that is open stays
// that process's, also when its number is used again.
func (p *procfs) within(pid int, f func(dir int) error) error {
	path := p.path + "/" + strconv.Itoa(pid)
	dir, err := unix.Open(path, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return &os.PathError{Op: "open", Path: path, Err: err}
	}
	defer func() { _ = unix.Close(dir) }()
	return f(dir)
}

// openNetns opens the namespace of a process that was read before; it is false
// if that has ended or has gone elsewhere.
func (p *procfs) openNetns(proc process) (fd int, ok bool, err error) {
	fd = -1
	err = p.within(proc.pid, func(dir int) error {
		start, err := p.start(dir)
		if err != nil || start != proc.start {
			return err
		}
		fd, err = unix.Openat(dir, "ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			return &os.PathError{Op: "open", Path: p.netnsPath(proc.pid), Err: err}
		}
		if now, err := fstatNetns(fd); err != nil || now != proc.netns {
			_ = unix.Close(fd)
			fd = -1
			return err
		}
		return nil
	})
	return fd, fd >= 0, ended(err)
}

func (p *procfs) netnsPath(pid int) string { return p.path + "/" + strconv.Itoa(pid) + "/ns/net" }

// start reads when a process was started.
func (p *procfs) start(dir int) (uint64, error) {
	content, err := p.read(dir, "stat")
	if err != nil {
		return 0, err
	}
	return startTime(content)
}

// startTime returns the 22nd field of a /proc/PID/stat. The second is the name
// in parentheses, which may have spaces and parentheses itself.
func startTime(stat []byte) (uint64, error) {
	fields := bytes.Fields(stat[bytes.LastIndexByte(stat, ')')+1:])
	if len(fields) < 20 {
		return 0, fmt.Errorf("read /proc/PID/stat: %q has too few fields", stat)
	}
	start, err := strconv.ParseUint(string(fields[19]), 10, 64)
	if err != nil {
		return 0, fmt.Errorf("read /proc/PID/stat: start time: %w", err)
	}
	return start, nil
}

// read reads a small file. What it returns is good until the next read.
func (p *procfs) read(dir int, path string) ([]byte, error) {
	fd, err := unix.Openat(dir, path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: path, Err: err}
	}
	defer func() { _ = unix.Close(fd) }()
	if p.buf == nil {
		p.buf = make([]byte, 4096)
	}
	length := 0
	for {
		n, err := unix.Read(fd, p.buf[length:])
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case err != nil:
			return nil, &os.PathError{Op: "read", Path: path, Err: err}
		case n == 0:
			return p.buf[:length], nil
		}
		if length += n; length == len(p.buf) {
			p.buf = append(p.buf, make([]byte, len(p.buf))...)
		}
	}
}

// ended returns nil for the errors of a process that has ended.
func ended(err error) error {
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ESRCH) {
		return nil
	}
	return err
}

func statNetns(dir int, path string) (namespace, error) {
	var st unix.Stat_t
	if err := unix.Fstatat(dir, path, &st, 0); err != nil {
		return namespace{}, &os.PathError{Op: "stat", Path: path, Err: err}
	}
	return namespace{st.Dev, st.Ino}, nil
}

func fstatNetns(fd int) (namespace, error) {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return namespace{}, fmt.Errorf("stat network namespace: %w", err)
	}
	return namespace{st.Dev, st.Ino}, nil
}
