package faultpoint

import (
	"encoding/binary"
	"fmt"
	"os"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Files of the process that is watched: it says on one which descriptor the
// kernel reports on, and waits on the other until somebody listens.
const (
	sayFD  = 3
	waitFD = 4
)

// Commands of bpf(2) that change what others see (enum bpf_cmd).
const (
	mapUpdateElem = 2
	mapDeleteElem = 3
	objPin        = 6
	progAttach    = 8
	progDetach    = 9
	linkCreate    = 28
	linkUpdate    = 29
	linkDetach    = 34
)

var bpfCommands = map[uint32]string{
	mapUpdateElem: "map update", mapDeleteElem: "map delete", objPin: "pin", progAttach: "attach",
	progDetach: "detach", linkCreate: "link create", linkUpdate: "link update", linkDetach: "link detach",
}

// replaceTable is IPT_SO_SET_REPLACE and IP6T_SO_SET_REPLACE.
const replaceTable = 64

// Arm makes this process and all that it starts report their calls to the
// process that has started it with Watch. It returns once that listens.
func Arm() error {
	say, wait := os.NewFile(sayFD, "say"), os.NewFile(waitFD, "wait")
	defer func() { _ = say.Close(); _ = wait.Close() }()
	filter := program()
	prog := unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
	const flags = unix.SECCOMP_FILTER_FLAG_NEW_LISTENER | unix.SECCOMP_FILTER_FLAG_TSYNC | unix.SECCOMP_FILTER_FLAG_TSYNC_ESRCH
	fd, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, flags, uintptr(unsafe.Pointer(&prog)))
	runtime.KeepAlive(filter)
	if errno != 0 {
		return fmt.Errorf("install seccomp filter: %w", errno)
	}
	var b [4]byte
	binary.NativeEndian.PutUint32(b[:], uint32(fd))
	if _, err := say.Write(b[:]); err != nil {
		return fmt.Errorf("say where calls are reported: %w", err)
	}
	if _, err := wait.Read(b[:1]); err != nil {
		return fmt.Errorf("wait for who watches: %w", err)
	}
	return unix.Close(int(fd)) // the other process has its own
}

// Offsets in struct seccomp_data.
const (
	dataNr   = 0
	dataArgs = 16
)

// arg is the offset of the lower half of an argument.
func arg(i int) uint32 {
	if binary.NativeEndian.Uint16([]byte{1, 0}) == 1 {
		return uint32(dataArgs + 8*i)
	}
	return uint32(dataArgs + 8*i + 4)
}

// program asks about the calls that may change something. What only their
// memory tells is for Watch to sort out.
func program() []unix.SockFilter {
	const (
		load  = unix.BPF_LD | unix.BPF_W | unix.BPF_ABS
		equal = unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K
		set   = unix.BPF_JMP | unix.BPF_JSET | unix.BPF_K
		ret   = unix.BPF_RET | unix.BPF_K
	)
	allow := unix.SockFilter{Code: ret, K: unix.SECCOMP_RET_ALLOW}
	ask := unix.SockFilter{Code: ret, K: unix.SECCOMP_RET_USER_NOTIF}
	p := []unix.SockFilter{{Code: load, K: dataNr}}
	for _, nr := range []uint32{
		unix.SYS_MOUNT, unix.SYS_UMOUNT2, unix.SYS_MKDIRAT, unix.SYS_UNLINKAT, unix.SYS_RENAMEAT, unix.SYS_RENAMEAT2,
		unix.SYS_SENDTO, unix.SYS_SENDMSG,
	} {
		p = append(p, unix.SockFilter{Code: equal, K: nr, Jf: 1}, ask)
	}
	// Each of these looks at one argument, and is the end for its call.
	some := func(nr uint32, argument int, code uint16, values ...uint32) {
		var body []unix.SockFilter
		for _, v := range values {
			body = append(body, unix.SockFilter{Code: code, K: v, Jf: 1}, ask)
		}
		body = append([]unix.SockFilter{{Code: load, K: arg(argument)}}, append(body, allow)...)
		p = append(append(p, unix.SockFilter{Code: equal, K: nr, Jf: uint8(len(body))}), body...)
	}
	some(unix.SYS_OPENAT, 2, set, unix.O_CREAT)
	some(unix.SYS_SETSOCKOPT, 2, equal, replaceTable)
	var commands []uint32
	for c := range bpfCommands {
		commands = append(commands, c)
	}
	some(unix.SYS_BPF, 0, equal, commands...)
	return append(p, allow)
}
