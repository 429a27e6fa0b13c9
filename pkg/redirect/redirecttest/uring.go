package redirecttest

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"runtime"
	"sync/atomic"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// What io_uring_setup(2) and io_uring_enter(2) take; x/sys has only the numbers
// of the calls. See linux/io_uring.h.
const (
	uringOpConnect    = 16
	uringEnterGetEv   = 1
	uringFeatSingle   = 1 // IORING_FEAT_SINGLE_MMAP, Linux 5.4
	uringOffSQRing    = 0
	uringOffSQEs      = 0x10000000
	uringSQESize      = 64
	uringFlagAsync    = 1 << 4 // IOSQE_ASYNC
	uringCQESizeShift = 4
)

type uringParams struct {
	sqEntries, cqEntries, flags, sqThreadCPU, sqThreadIdle, features, wqFD uint32
	_                                                                      [3]uint32
	sq                                                                     struct {
		head, tail, ringMask, ringEntries, flags, dropped, array, _ uint32
		_                                                           uint64
	}
	cq struct {
		head, tail, ringMask, ringEntries, overflow, cqes, flags, _ uint32
		_                                                           uint64
	}
}

// uringConnect connects fd with IORING_OP_CONNECT and waits for the result: the
// kernel does it on a thread of its own, which it makes for this process.
func uringConnect(fd int, to netip.AddrPort) error {
	var p uringParams
	ring, _, errno := unix.Syscall(unix.SYS_IO_URING_SETUP, 1, uintptr(unsafe.Pointer(&p)), 0)
	if errno != 0 {
		return fmt.Errorf("io_uring_setup: %w", errno)
	}
	defer func() { _ = unix.Close(int(ring)) }()
	if p.features&uringFeatSingle == 0 {
		return errors.New("io_uring without IORING_FEAT_SINGLE_MMAP")
	}
	size := max(p.sq.array+p.sqEntries*4, p.cq.cqes+p.cqEntries<<uringCQESizeShift)
	rings, err := unix.Mmap(int(ring), uringOffSQRing, int(size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_POPULATE)
	if err != nil {
		return fmt.Errorf("map rings: %w", err)
	}
	defer func() { _ = unix.Munmap(rings) }()
	sqes, err := unix.Mmap(int(ring), uringOffSQEs, int(p.sqEntries*uringSQESize), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_POPULATE)
	if err != nil {
		return fmt.Errorf("map submission queue: %w", err)
	}
	defer func() { _ = unix.Munmap(sqes) }()

	// The kernel reads the address after the call has begun.
	addr := rawSockaddr(to)
	var pin runtime.Pinner
	pin.Pin(&addr[0])
	defer pin.Unpin()
	sqes[0], sqes[1] = uringOpConnect, uringFlagAsync
	binary.NativeEndian.PutUint32(sqes[4:], uint32(fd))
	binary.NativeEndian.PutUint64(sqes[8:], uint64(len(addr)))
	binary.NativeEndian.PutUint64(sqes[16:], uint64(uintptr(unsafe.Pointer(&addr[0]))))
	word := func(off uint32) *uint32 { return (*uint32)(unsafe.Pointer(&rings[off])) }
	*word(p.sq.array) = 0
	atomic.StoreUint32(word(p.sq.tail), 1)
	for toSubmit := uintptr(1); ; {
		n, _, errno := unix.Syscall6(unix.SYS_IO_URING_ENTER, ring, toSubmit, 1, uringEnterGetEv, 0, 0)
		if errno != 0 && errno != unix.EINTR {
			return fmt.Errorf("io_uring_enter: %w", errno)
		}
		if errno == 0 {
			toSubmit -= n
		}
		if atomic.LoadUint32(word(p.cq.tail)) != atomic.LoadUint32(word(p.cq.head)) {
			break
		}
	}
	res := int32(binary.NativeEndian.Uint32(rings[p.cq.cqes+8:]))
	if res < 0 {
		return syscall.Errno(-res)
	}
	return nil
}

// rawSockaddr returns a struct sockaddr_in or sockaddr_in6.
func rawSockaddr(to netip.AddrPort) []byte {
	b := make([]byte, unix.SizeofSockaddrInet6)
	binary.NativeEndian.PutUint16(b, unix.AF_INET6)
	binary.BigEndian.PutUint16(b[2:], to.Port())
	if to.Addr().Is4() {
		binary.NativeEndian.PutUint16(b, unix.AF_INET)
		copy(b[4:], to.Addr().AsSlice())
		return b[:unix.SizeofSockaddrInet4]
	}
	copy(b[8:], to.Addr().AsSlice())
	return b
}
