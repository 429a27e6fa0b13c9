package paircheck

import (
	"bytes"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"math/rand/v2"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// A check tries one thing on a fresh connection, on which w writes and r reads.
// Every one of them passes on a TCP connection that nobody interferes with.
type check struct {
	name string
	run  func(s *state, w, r *end) error
	// proxy marks what Envoy relies on: it reads without waiting until there is
	// nothing more, and asks for nothing special.
	proxy bool
}

// A state is what checks share.
type state struct {
	rand *rand.Rand
	// data is what is sent: more than two buffers and a budget hold.
	data []byte
	// room is how much the kernel takes of a writer whose reader has stopped,
	// without acceleration; slack is how much more it may take with it.
	room, slack int
}

// part returns n random bytes that no other part of data equals.
func (s *state) part(n int) []byte {
	at := s.rand.IntN(len(s.data) - n)
	return s.data[at : at+n]
}

// checks are in the order in which they are run: those that most depends on
// first, those that wait long if they fail last.
func checks() []check {
	return []check{
		{"stream", checkStream, true},
		{"behind", checkBehind, true},
		{"memory", checkMemory, true},
		{"again", checkAgain, true},
		{"half_close", checkHalfClose, true},
		{"reset", checkReset, true},
		{"peer_gone", checkPeerGone, true},
		{"edges", checkEdges, true},
		{"sendfile", checkSendfile, true},
		{"peek", checkPeek, true},
		{"unread", checkUnread, false},
		{"wait_all", checkWaitAll, false},
		{"low_water", checkLowWater, false},
		{"tls", checkTLS, false},
		{"zerocopy", checkZerocopy, false},
		{"fionread", checkFIONREAD, false},
		{"fionread_behind", checkFIONREADBehind, false},
		{"splice", checkSplice, false},
		{"splice_behind", checkSpliceBehind, false},
	}
}

// both runs what writes and what reads at the same time.
func both(write, read func() error) error {
	wrote := make(chan error, 1)
	go func() { wrote <- write() }()
	err := read()
	return errors.Join(err, <-wrote)
}

// pour writes total bytes of the state's data in random pieces, then ends the
// stream, and returns their checksum.
func (s *state) pour(w *end, seed uint64, total, piece int) error {
	random := rand.New(rand.NewPCG(seed, 1))
	for at := 0; at < total; {
		n := min(1+random.IntN(piece), total-at)
		if err := w.write(s.data[at : at+n]); err != nil {
			return fmt.Errorf("after %d bytes: %w", at, err)
		}
		at += n
	}
	return w.shutdown()
}

// drain reads to the end of the stream in random pieces and compares what came
// with the state's data.
func (s *state) drain(r *end, seed uint64, total, piece int) error {
	random := rand.New(rand.NewPCG(seed, 2))
	buf := make([]byte, piece)
	for at := 0; ; {
		n, err := r.recv(buf[:1+random.IntN(piece)], 0)
		if err != nil {
			return fmt.Errorf("after %d bytes: %w", at, err)
		}
		if n == 0 {
			if at != total {
				return fmt.Errorf("stream ends after %d of %d bytes", at, total)
			}
			return nil
		}
		if at+n > total || !bytes.Equal(buf[:n], s.data[at:at+n]) {
			return fmt.Errorf("wrong data after %d bytes: checksum %08x of %d bytes", at, crc32.ChecksumIEEE(buf[:n]), n)
		}
		at += n
	}
}

// checkStream sends both ways at once, small and large pieces.
func checkStream(s *state, w, r *end) error {
	seed := s.rand.Uint64()
	total := len(s.data) / 4
	return both(
		func() error {
			return both(
				func() error { return s.pour(w, seed, total, 64<<10) },
				func() error { return s.drain(w, seed, total, 128<<10) })
		},
		func() error {
			return both(
				func() error { return s.pour(r, seed+1, total, 200) },
				func() error { return s.drain(r, seed+1, total, 3000) })
		})
}

// checkBehind has the reader stop until the writer can write no more.
func checkBehind(s *state, w, r *end) error {
	taken, err := w.stuff(s.data)
	if err != nil {
		return err
	}
	seed, total := s.rand.Uint64(), len(s.data)
	if taken == total {
		return fmt.Errorf("nothing held the writer back: %d bytes were taken", taken)
	}
	return both(
		func() error {
			return errors.Join(w.write(s.data[taken:]), w.shutdown())
		},
		func() error { return s.drain(r, seed, total, 64<<10) })
}

// checkAgain has the reader stop and catch up several times, with a little more
// from the writer while it does and after it has.
func checkAgain(s *state, w, r *end) error {
	for round := range 4 {
		taken, err := w.stuff(s.data)
		if err != nil {
			return err
		}
		rest := s.part(1 + s.rand.IntN(200_000))
		err = both(
			func() error { return w.write(rest) },
			func() error { return errors.Join(expect(r, s.data[:taken], false), expect(r, rest, false)) })
		if err != nil {
			return fmt.Errorf("round %d: %w", round, err)
		}
		if err := errors.Join(w.write(rest), expect(r, rest, false)); err != nil {
			return fmt.Errorf("round %d, caught up: %w", round, err)
		}
	}
	return nil
}

// checkMemory measures what is held while nobody reads.
func checkMemory(s *state, w, _ *end) error {
	taken, err := w.stuff(s.data)
	if err != nil {
		return err
	}
	if s.room > 0 && taken > s.room+s.slack {
		return fmt.Errorf("%d bytes were taken of a writer whose reader had stopped; without acceleration it was %d, and %d more are allowed", taken, s.room, s.slack)
	}
	return nil
}

// checkHalfClose ends one direction, after which the other still works.
func checkHalfClose(s *state, w, r *end) error {
	request, answer := s.part(100_000), s.part(300_000)
	err := both(
		func() error { return errors.Join(w.write(request), w.shutdown()) },
		func() error { return expect(r, request, true) })
	if err != nil {
		return fmt.Errorf("before: %w", err)
	}
	err = both(
		func() error { return errors.Join(r.write(answer), r.shutdown()) },
		func() error { return expect(w, answer, true) })
	if err != nil {
		return fmt.Errorf("after: %w", err)
	}
	return nil
}

// expect reads exactly want, with the end of the stream after it if end is set.
func expect(e *end, want []byte, atEnd bool) error {
	got := make([]byte, len(want))
	if err := e.read(got); err != nil {
		return err
	}
	if !bytes.Equal(got, want) {
		return errors.New("wrong data")
	}
	if !atEnd {
		return nil
	}
	if n, err := e.recv(got[:1], 0); err != nil || n != 0 {
		return fmt.Errorf("want the end of the stream, have %d bytes, %w", n, orNone(err))
	}
	return nil
}

// checkReset resets a connection: the reader gets what was sent before, then
// the error.
func checkReset(s *state, w, r *end) error {
	sent := s.part(10_000)
	if err := errors.Join(w.write(sent), w.reset()); err != nil {
		return err
	}
	if err := expect(r, sent, false); err != nil {
		return fmt.Errorf("what was sent before the reset: %w", err)
	}
	if _, err := r.recv(make([]byte, 1), 0); !errors.Is(err, unix.ECONNRESET) {
		return fmt.Errorf("receive after the reset: want ECONNRESET, have %w", orNone(err))
	}
	return nil
}

// checkPeerGone closes the reader while data waits for it: the writer must learn
// of it, whether it writes or reads.
func checkPeerGone(s *state, w, r *end) error {
	if _, err := w.stuff(s.data); err != nil {
		return err
	}
	if err := r.close(); err != nil {
		return err
	}
	if _, err := w.recv(make([]byte, 1), 0); !errors.Is(err, unix.ECONNRESET) {
		return fmt.Errorf("receive: want ECONNRESET, have %w", orNone(err))
	}
	if err := w.write(s.part(1000)); !errors.Is(err, unix.EPIPE) {
		return fmt.Errorf("write: want EPIPE, have %w", orNone(err))
	}
	return nil
}

// checkUnread closes the reader with a little data unread: the writer must be
// told by a reset that it was lost.
func checkUnread(s *state, w, r *end) error {
	sent := s.part(10_000)
	if err := w.write(sent); err != nil {
		return err
	}
	if err := expect(r, sent[:1000], false); err != nil {
		return err
	}
	if err := r.close(); err != nil {
		return err
	}
	if _, err := w.recv(make([]byte, 1), 0); !errors.Is(err, unix.ECONNRESET) {
		return fmt.Errorf("receive: want ECONNRESET, have %w", orNone(err))
	}
	return nil
}

// errNone stands for the error that was expected and did not come.
var errNone = errors.New("no error")

func orNone(err error) error {
	if err == nil {
		return errNone
	}
	return err
}

// checkTLS has the kernel encrypt (kTLS): what is read must be TLS records. A
// kernel without it refuses, which is right.
func checkTLS(s *state, w, r *end) error {
	const tcpULP, solTLS, tlsTX = 31, 282, 1
	if err := unix.SetsockoptString(w.fd, unix.IPPROTO_TCP, tcpULP, "tls"); err != nil {
		return nil
	}
	// struct tls12_crypto_info_aes_gcm_128: version, cipher, then iv, key, salt, sequence.
	info := make([]byte, 40)
	info[0], info[1], info[2] = 0x03, 0x03, 51
	if err := unix.SetsockoptString(w.fd, solTLS, tlsTX, string(info)); errors.Is(err, unix.ENOENT) {
		return nil // it has no such cipher
	} else if err != nil {
		return fmt.Errorf("set key: %w", err)
	}
	if err := w.write(s.part(1000)); err != nil {
		return err
	}
	head := make([]byte, 3)
	if err := r.read(head); err != nil {
		return err
	}
	if !bytes.Equal(head, []byte{0x17, 0x03, 0x03}) {
		return fmt.Errorf("what was to be encrypted arrives as % x", head)
	}
	return nil
}

// checkZerocopy sends with MSG_ZEROCOPY: the kernel must say when it is done
// with the buffer.
func checkZerocopy(s *state, w, r *end) error {
	if err := unix.SetsockoptInt(w.fd, unix.SOL_SOCKET, unix.SO_ZEROCOPY, 1); err != nil {
		return nil // refused: then nobody waits for it
	}
	sent := s.part(50_000)
	n, err := unix.SendmsgN(w.fd, sent, nil, nil, unix.MSG_ZEROCOPY)
	if err != nil {
		return fmt.Errorf("write: %w", err)
	}
	if err := expect(r, sent[:n], false); err != nil {
		return err
	}
	if done, err := w.waitFor(unix.POLLERR, time.Second); err != nil || !done {
		return fmt.Errorf("no completion of MSG_ZEROCOPY: %w", orNone(err))
	}
	return nil
}

// checkPeek looks at data without taking it.
func checkPeek(s *state, w, r *end) error {
	sent := s.part(50_000)
	if err := w.write(sent); err != nil {
		return err
	}
	got := make([]byte, len(sent))
	for at := 0; at < len(sent); {
		n, err := r.recv(got[:1+s.rand.IntN(9000)], unix.MSG_PEEK)
		if err != nil {
			return err
		}
		if n == 0 || !bytes.Equal(got[:n], sent[at:at+n]) {
			return fmt.Errorf("peek shows wrong data after %d bytes", at)
		}
		take := 1 + s.rand.IntN(n)
		if err := expect(r, sent[at:at+take], false); err != nil {
			return fmt.Errorf("after a peek at %d: %w", at, err)
		}
		at += take
	}
	return nil
}

// checkEdges reads on the edges of an epoll, each time until the socket is
// empty, as Envoy does.
func checkEdges(s *state, w, r *end) error {
	return edges(s, w, r, false, 0)
}

// checkFIONREAD is a reader that believes FIONREAD, as nginx does: if a read
// filled its buffer, FIONREAD says how much is left, and with 0 it waits for the
// next edge.
func checkFIONREAD(s *state, w, r *end) error {
	sent := s.part(30_000)
	for at := 0; at < len(sent); {
		n := min(1+s.rand.IntN(9000), len(sent)-at)
		if err := w.write(sent[at : at+n]); err != nil {
			return err
		}
		for in := 0; in < n; {
			if _, err := r.wait(unix.POLLIN); err != nil {
				return err
			}
			var err error
			if in, err = r.inq(); err != nil {
				return err
			}
			if in > n {
				return fmt.Errorf("FIONREAD says %d of %d bytes", in, n)
			}
			if in == 0 {
				return fmt.Errorf("FIONREAD says 0 while poll says that there is data")
			}
		}
		if err := expect(r, sent[at:at+n], false); err != nil {
			return err
		}
		if in, err := r.inq(); err != nil || in != 0 {
			return fmt.Errorf("FIONREAD of an empty socket: %d, %w", in, orNone(err))
		}
		at += n
	}
	return edges(s, w, r, true, 0)
}

// checkFIONREADBehind is the same after the reader had stopped.
func checkFIONREADBehind(s *state, w, r *end) error {
	taken, err := w.stuff(s.data)
	if err != nil {
		return err
	}
	return edges(s, w, r, true, taken)
}

// edges writes the state's data from byte from on and reads all of it with an
// edge-triggered epoll.
func edges(s *state, w, r *end, fionread bool, from int) error {
	poll, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return fmt.Errorf("open epoll: %w", err)
	}
	defer func() { _ = unix.Close(poll) }()
	ev := &unix.EpollEvent{Events: unix.EPOLLIN | unix.EPOLLRDHUP | unix.EPOLLET&0xffffffff, Fd: int32(r.fd)}
	if err := unix.EpollCtl(poll, unix.EPOLL_CTL_ADD, r.fd, ev); err != nil {
		return fmt.Errorf("add to epoll: %w", err)
	}
	return both(
		func() error { return errors.Join(w.write(s.data[from:]), w.shutdown()) },
		func() error {
			buf := make([]byte, 16<<10)
			events := make([]unix.EpollEvent, 1)
			for at := 0; ; {
				left := time.Until(r.deadline)
				if left <= 0 {
					in, _ := r.inq()
					return fmt.Errorf("no event after %d of %d bytes (FIONREAD says %d): %w", at, len(s.data), in, errSlow)
				}
				n, err := unix.EpollWait(poll, events, int(left.Milliseconds())+1)
				if errors.Is(err, unix.EINTR) || err == nil && n == 0 {
					continue
				}
				if err != nil {
					return fmt.Errorf("wait for epoll: %w", err)
				}
				closing := events[0].Events&unix.EPOLLRDHUP != 0
				for {
					n, _, err := unix.Recvfrom(r.fd, buf, 0)
					if errors.Is(err, unix.EAGAIN) {
						break
					}
					if err != nil {
						return fmt.Errorf("receive: %w", err)
					}
					if n == 0 {
						if at != len(s.data) {
							return fmt.Errorf("stream ends after %d of %d bytes", at, len(s.data))
						}
						return nil
					}
					if at+n > len(s.data) || !bytes.Equal(buf[:n], s.data[at:at+n]) {
						return fmt.Errorf("wrong data after %d bytes", at)
					}
					at += n
					if fionread && n == len(buf) && !closing {
						if in, err := r.inq(); err != nil {
							return err
						} else if in == 0 {
							break
						}
					}
				}
			}
		})
}

// checkWaitAll reads with MSG_WAITALL what is sent in pieces.
func checkWaitAll(s *state, w, r *end) error {
	sent := s.part(60_000)
	if err := unix.SetNonblock(r.fd, false); err != nil {
		return fmt.Errorf("make blocking: %w", err)
	}
	tv := unix.NsecToTimeval(int64(time.Until(r.deadline)))
	if err := unix.SetsockoptTimeval(r.fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &tv); err != nil {
		return fmt.Errorf("set SO_RCVTIMEO: %w", err)
	}
	return both(
		func() error {
			for at := 0; at < len(sent); at += 20_000 {
				if err := w.write(sent[at : at+20_000]); err != nil {
					return err
				}
				// Give the reader the time to return early.
				_, _ = w.waitFor(unix.POLLIN, 5*time.Millisecond)
			}
			return nil
		},
		func() error {
			got := make([]byte, len(sent))
			n, _, err := unix.Recvfrom(r.fd, got, unix.MSG_WAITALL)
			if err != nil {
				return fmt.Errorf("receive: %w", err)
			}
			if n != len(sent) {
				err := r.read(got[n:])
				return errors.Join(fmt.Errorf("MSG_WAITALL returns %d of %d bytes", n, len(sent)), err)
			}
			if !bytes.Equal(got, sent) {
				return errors.New("wrong data")
			}
			return nil
		})
}

// waitFor waits for events no longer than d.
func (e *end) waitFor(events int16, d time.Duration) (bool, error) {
	p := []unix.PollFd{{Fd: int32(e.fd), Events: events}}
	n, err := unix.Poll(p, int(d.Milliseconds()))
	return n > 0, err
}

// checkLowWater asks to be woken by no less than SO_RCVLOWAT bytes.
func checkLowWater(s *state, w, r *end) error {
	sent := s.part(10_000)
	if err := unix.SetsockoptInt(r.fd, unix.SOL_SOCKET, unix.SO_RCVLOWAT, len(sent)); err != nil {
		return fmt.Errorf("set SO_RCVLOWAT: %w", err)
	}
	if err := w.write(sent[:4000]); err != nil {
		return err
	}
	if early, err := r.waitFor(unix.POLLIN, 20*time.Millisecond); err != nil || early {
		return fmt.Errorf("SO_RCVLOWAT %d: readable with 4000 bytes, %w", len(sent), orNone(err))
	}
	if err := w.write(sent[4000:]); err != nil {
		return err
	}
	if _, err := r.wait(unix.POLLIN); err != nil {
		return err
	}
	return expect(r, sent, false)
}

// checkSplice moves what arrives into a pipe.
func checkSplice(s *state, w, r *end) error { return splice(s, w, r, 0) }

// checkSpliceBehind is the same after the reader had stopped.
func checkSpliceBehind(s *state, w, r *end) error {
	taken, err := w.stuff(s.data)
	if err != nil {
		return err
	}
	return splice(s, w, r, taken)
}

func splice(s *state, w, r *end, from int) error {
	in, out, err := os.Pipe()
	if err != nil {
		return fmt.Errorf("open pipe: %w", err)
	}
	defer func() { _ = in.Close() }()
	defer func() { _ = out.Close() }()
	return both(
		func() error { return errors.Join(w.write(s.data[from:]), w.shutdown()) },
		func() error {
			buf := make([]byte, 64<<10)
			for at := 0; ; {
				n, err := unix.Splice(r.fd, nil, int(out.Fd()), nil, len(buf), unix.SPLICE_F_NONBLOCK)
				switch {
				case errors.Is(err, unix.EAGAIN):
					if _, err := r.wait(unix.POLLIN); err != nil {
						return fmt.Errorf("after %d bytes: %w", at, err)
					}
					continue
				case errors.Is(err, unix.EINTR):
					continue
				case err != nil:
					return fmt.Errorf("splice after %d bytes: %w", at, err)
				case n == 0:
					if at != len(s.data) {
						return fmt.Errorf("stream ends after %d of %d bytes", at, len(s.data))
					}
					return nil
				}
				if _, err := io.ReadFull(in, buf[:n]); err != nil {
					return fmt.Errorf("read pipe: %w", err)
				}
				if at+int(n) > len(s.data) || !bytes.Equal(buf[:n], s.data[at:at+int(n)]) {
					return fmt.Errorf("wrong data after %d bytes", at)
				}
				at += int(n)
			}
		})
}

// checkSendfile sends a file.
func checkSendfile(s *state, w, r *end) error {
	fd, err := unix.MemfdCreate("sluice-paircheck", unix.MFD_CLOEXEC)
	if err != nil {
		return fmt.Errorf("make file: %w", err)
	}
	f := os.NewFile(uintptr(fd), "memfd")
	defer func() { _ = f.Close() }()
	if _, err := f.WriteAt(s.data, 0); err != nil {
		return fmt.Errorf("fill file: %w", err)
	}
	total := len(s.data)
	return both(
		func() error {
			for off := int64(0); off < int64(total); {
				_, err := unix.Sendfile(w.fd, fd, &off, total-int(off))
				if errors.Is(err, unix.EAGAIN) {
					if _, err := w.wait(unix.POLLOUT); err != nil {
						return err
					}
				} else if err != nil && !errors.Is(err, unix.EINTR) {
					return fmt.Errorf("sendfile: %w", err)
				}
			}
			return w.shutdown()
		},
		func() error { return s.drain(r, 7, total, 100_000) })
}
