package faultpoint

import (
	"encoding/binary"
	"fmt"
	"strconv"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
)

// describe names a call; "" if it changes nothing.
func describe(n notification) (string, error) {
	switch n.nr {
	case unix.SYS_BPF:
		return "bpf " + bpfCommands[uint32(n.args[0])], nil
	case unix.SYS_MOUNT:
		return "mount", nil
	case unix.SYS_UMOUNT2:
		return "umount", nil
	case unix.SYS_MKDIRAT:
		return "mkdir", nil
	case unix.SYS_UNLINKAT:
		return "unlink", nil
	case unix.SYS_RENAMEAT, unix.SYS_RENAMEAT2:
		return "rename", nil
	case unix.SYS_OPENAT:
		return "create", nil
	case unix.SYS_SETSOCKOPT:
		return "replace table", nil
	case unix.SYS_SENDTO:
		return describeNetlink(n, n.args[1])
	case unix.SYS_SENDMSG:
		// struct msghdr: name, its length, then the vector of what is sent.
		const vector = 16
		iov, err := readWord(n.pid, n.args[1]+vector)
		if err != nil {
			return "", err
		}
		base, err := readWord(n.pid, iov)
		if err != nil {
			return "", err
		}
		return describeNetlink(n, base)
	}
	return fmt.Sprintf("call %d", n.nr), nil
}

// describeNetlink looks at the netlink message at an address; what is sent
// there may also be none.
func describeNetlink(n notification, at uint64) (string, error) {
	var header [unix.NLMSG_HDRLEN]byte
	if err := readMemory(n.pid, at, header[:]); err != nil {
		return "", err
	}
	kind, flags := binary.NativeEndian.Uint16(header[4:]), binary.NativeEndian.Uint16(header[6:])
	const (
		batchBegin = 16 // NFNL_MSG_BATCH_BEGIN
		get        = 2  // of four kinds of each object: new, delete, get, set
		lastRoute  = 0xff
	)
	switch {
	case kind == batchBegin && flags == unix.NLM_F_REQUEST:
		return "nftables transaction", nil
	case kind >= unix.RTM_NEWLINK && kind <= lastRoute && (kind-unix.RTM_NEWLINK)%4 != get && flags&unix.NLM_F_ACK != 0:
		return fmt.Sprintf("rtnetlink %d", kind), nil
	}
	return "", nil
}

func readWord(pid uint32, at uint64) (uint64, error) {
	var b [8]byte
	err := readMemory(pid, at, b[:])
	return binary.NativeEndian.Uint64(b[:]), err
}

// readMemory reads what another process has at an address.
func readMemory(pid uint32, at uint64, b []byte) error {
	local := []unix.Iovec{{Base: unsafe.SliceData(b)}}
	local[0].SetLen(len(b))
	if _, err := unix.ProcessVMReadv(int(pid), local, []unix.RemoteIovec{{Base: uintptr(at), Len: len(b)}}, 0); err != nil {
		return fmt.Errorf("read memory of process %d: %w", pid, err)
	}
	return nil
}

// statusField returns a number of /proc/PID/status; 0 if it is not there.
func statusField(status, field string) int {
	for line := range strings.Lines(status) {
		if rest, ok := strings.CutPrefix(line, field); ok {
			n, err := strconv.Atoi(strings.TrimSpace(rest))
			if err == nil {
				return n
			}
		}
	}
	return 0
}
