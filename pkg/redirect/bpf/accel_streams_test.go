package bpf

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"strconv"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluicemesh/sluice/pkg/redirect"
)

// TestHTTPOverPairs has HTTP/1.1 and HTTP/2, with TLS and without, above joined
// connections, and compares checksums of what random requests and answers carry.
func TestHTTPOverPairs(t *testing.T) {
	p := newProxies(t, accelerated(t))
	var http1, http2, clear2 http.Protocols
	http1.SetHTTP1(true)
	http2.SetHTTP2(true)
	clear2.SetUnencryptedHTTP2(true)
	for _, addr := range p.server.Addrs() {
		for _, tc := range []struct {
			name      string
			protocols *http.Protocols
			tls       bool
		}{
			{"HTTP1", &http1, false}, {"HTTP1 TLS", &http1, true}, {"HTTP2", &clear2, false}, {"HTTP2 TLS", &http2, true},
		} {
			t.Run(fmt.Sprintf("%s %s", tc.name, addr), func(t *testing.T) {
				before := p.event(t, "joined")
				p.exchange(t, addr, tc.protocols, tc.tls)
				if p.event(t, "joined") == before {
					t.Error("no pair was joined")
				}
				p.wantEmpty(t)
			})
		}
	}
}

// exchange has several clients make requests to a server at addr.
func (p *proxies) exchange(t *testing.T, addr netip.Addr, protocols *http.Protocols, secure bool) {
	t.Helper()
	const clients, requests = 3, 40 // each client has four requests at a time
	srv := httptest.NewUnstartedServer(http.HandlerFunc(answer))
	if err := srv.Listener.Close(); err != nil {
		t.Fatal(err)
	}
	srv.Listener, _ = p.listen(t, redirect.PlacePeer, addr)
	srv.Config.Protocols = protocols
	srv.Config.ErrorLog = log.New(t.Output(), "", 0)
	srv.EnableHTTP2 = protocols.HTTP2()
	scheme, config := "http", &tls.Config{ServerName: "example.com", RootCAs: x509.NewCertPool()}
	if secure {
		scheme = "https"
		srv.StartTLS()
		config.RootCAs.AddCert(srv.Certificate())
	} else {
		srv.Start()
	}
	defer srv.Close()
	url := fmt.Sprintf("%s://%s", scheme, netip.AddrPortFrom(addr, 8080))
	var all sync.WaitGroup
	for c := range clients {
		tr := &http.Transport{
			Protocols: protocols, TLSClientConfig: config,
			DialContext: func(ctx context.Context, _, to string) (net.Conn, error) { return p.client.Dial(ctx, "tcp", to) },
		}
		defer tr.CloseIdleConnections()
		for worker := range 4 {
			all.Go(func() {
				random := rand.New(rand.NewPCG(uint64(c), uint64(worker)))
				for i := range requests {
					if err := request(t.Context(), tr, url, random); err != nil {
						t.Errorf("client %d, worker %d, request %d: %v", c, worker, i, err)
						return
					}
				}
			})
		}
	}
	all.Wait()
}

// sumHeader carries a checksum, of the request in the answer and as a trailer
// that of the answer.
const sumHeader = "Sum"

// answer reads the request, and sends as much random data as it is asked for.
func answer(w http.ResponseWriter, r *http.Request) {
	sum := sha256.New()
	if _, err := io.Copy(sum, r.Body); err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	n, err := strconv.ParseInt(r.URL.Query().Get("n"), 10, 64)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	w.Header().Set(sumHeader, fmt.Sprintf("%x", sum.Sum(nil)))
	w.Header().Set("Trailer", "Answer-"+sumHeader)
	data := rand.NewChaCha8([32]byte(sum.Sum(nil)))
	sum.Reset()
	_, _ = io.CopyN(io.MultiWriter(w, sum), data, n) // the client sees that something is missing
	w.Header().Set("Answer-"+sumHeader, fmt.Sprintf("%x", sum.Sum(nil)))
}

func request(ctx context.Context, tr http.RoundTripper, url string, random *rand.Rand) error {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	body := make([]byte, random.IntN(1<<random.IntN(21)))
	for i := range body {
		body[i] = byte(random.Uint32())
	}
	n := random.IntN(1 << random.IntN(21))
	r, err := http.NewRequestWithContext(ctx, http.MethodPost, fmt.Sprintf("%s/?n=%d", url, n), bytes.NewReader(body))
	if err != nil {
		return err
	}
	resp, err := tr.RoundTrip(r)
	if err != nil {
		return err
	}
	defer func() { _ = resp.Body.Close() }()
	sum := sha256.New()
	got, err := io.Copy(sum, resp.Body)
	if err != nil || resp.StatusCode != http.StatusOK || got != int64(n) {
		return fmt.Errorf("%s, %d of %d bytes, %w", resp.Status, got, n, err)
	}
	if want := fmt.Sprintf("%x", sha256.Sum256(body)); resp.Header.Get(sumHeader) != want {
		return fmt.Errorf("the request of %d bytes came with checksum %s, want %s", len(body), resp.Header.Get(sumHeader), want)
	}
	if have := fmt.Sprintf("%x", sum.Sum(nil)); resp.Trailer.Get("Answer-"+sumHeader) != have {
		return fmt.Errorf("the answer of %d bytes came with checksum %s, want %s", n, have, resp.Trailer.Get("Answer-"+sumHeader))
	}
	return nil
}

// TestKilledProxy kills a process that holds one end of a joined connection: the
// other end must see that at once, whatever is on its way, and nothing be left.
func TestKilledProxy(t *testing.T) {
	p := newProxies(t, accelerated(t))
	for _, killed := range []string{"client", "server"} {
		for _, tc := range []struct {
			name string
			talk func(t *testing.T, survivor net.Conn, kill func())
		}{
			{"sends", killSender}, {"has stopped reading", killStopped}, {"idle", killIdle},
		} {
			for _, addr := range p.server.Addrs() {
				t.Run(fmt.Sprintf("%s %s %s", killed, tc.name, addr), func(t *testing.T) {
					before := p.event(t, "joined")
					survivor, kill := p.holder(t, killed, addr, tc.name == "sends")
					defer func() { _ = survivor.Close() }()
					if err := survivor.SetDeadline(time.Now().Add(20 * time.Second)); err != nil {
						t.Fatal(err)
					}
					tc.talk(t, survivor, kill)
					if err := survivor.Close(); err != nil {
						t.Fatal(err)
					}
					if n := p.event(t, "joined") - before; n != 1 {
						t.Errorf("%d pairs were joined", n)
					}
					p.wantEmpty(t)
				})
			}
		}
	}
}

// killedSeen is how soon a killed process must be noticed.
const killedSeen = time.Second

// wantGone wants a call that waits to have failed, or the stream to have ended,
// soon after a kill.
func wantGone(t *testing.T, what string, killed time.Time, err error) {
	t.Helper()
	if err == nil || !errors.Is(err, io.EOF) && !isReset(err) {
		t.Errorf("%s: %v", what, err)
	}
	if took := time.Since(killed); took > killedSeen {
		t.Errorf("%s: %v after %v", what, err, took)
	}
}

// killSender kills who sends all the time, with data on its way.
func killSender(t *testing.T, survivor net.Conn, kill func()) {
	t.Helper()
	buf, killed := make([]byte, 10_000), time.Time{}
	for at := int64(0); ; {
		n, err := survivor.Read(buf)
		if want := endless(at, int64(n)); !bytes.Equal(buf[:n], want) {
			t.Fatalf("wrong data after %d bytes", at)
		}
		at += int64(n)
		if err != nil {
			wantGone(t, fmt.Sprintf("read after %d bytes", at), killed, err)
			return
		}
		if killed.IsZero() && at > 3_000_000 {
			kill()
			killed = time.Now()
		}
	}
}

// killStopped kills who has stopped reading, while the survivor waits until it
// can write more.
func killStopped(t *testing.T, survivor net.Conn, kill func()) {
	t.Helper()
	progress, ended := make(chan int, 1000), make(chan error, 1)
	go func() {
		for at := int64(0); ; at += 10_000 {
			n, err := survivor.Write(endless(at, 10_000))
			if err != nil {
				ended <- err
				return
			}
			progress <- n
		}
	}()
	for full := false; !full; {
		select {
		case <-progress:
		case err := <-ended:
			t.Fatal(err)
		case <-time.After(100 * time.Millisecond):
			full = true
		}
	}
	kill()
	killed := time.Now()
	wantGone(t, "write", killed, <-ended)
	_, err := survivor.Read(make([]byte, 1))
	wantGone(t, "read", killed, err)
}

// killIdle kills who does nothing, while the survivor waits for data.
func killIdle(t *testing.T, survivor net.Conn, kill func()) {
	t.Helper()
	kill()
	killed := time.Now()
	_, err := survivor.Read(make([]byte, 1))
	wantGone(t, "read", killed, err)
}

// holder starts a process that holds one end of a connection and returns the
// other.
func (p *proxies) holder(t *testing.T, role string, addr netip.Addr, sends bool) (survivor net.Conn, kill func()) {
	t.Helper()
	pod, at := p.server, netip.AddrPortFrom(anyAddr(addr), redirect.InboundPort)
	if role == "client" {
		l, to := p.listen(t, redirect.PlacePeer, addr)
		defer func() { _ = l.Close() }()
		pod, at = p.client, to
		defer func() {
			var err error
			if survivor, err = l.Accept(); err != nil {
				t.Fatal(err)
			}
		}()
	}
	cmd := pod.Command(t, uint32(os.Geteuid()), "/proc/self/exe", holdArg, role, at.String(), strconv.FormatBool(sends))
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if line, err := bufio.NewReader(out).ReadString('\n'); err != nil || line != "ready\n" {
		t.Fatalf("process that holds an end says %q, %v", line, err)
	}
	if role == "server" {
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		defer cancel()
		if survivor, err = p.client.Dial(ctx, "tcp", netip.AddrPortFrom(addr, 8080).String()); err != nil {
			t.Fatal(err)
		}
	}
	return survivor, cmd.Kill
}

// holdArg makes the test program a process that holds an end.
const holdArg = "hold"

// hold connects, or accepts one connection, says so, and sends for ever or does
// nothing.
func hold(role, at, sends string) error {
	var c net.Conn
	var err error
	if role == "client" {
		if c, err = net.Dial("tcp", at); err != nil {
			return err
		}
		fmt.Println("ready")
	} else {
		var plain net.ListenConfig
		plain.SetMultipathTCP(false) // Envoy's are none either
		l, err := plain.Listen(context.Background(), "tcp", at)
		if err != nil {
			return err
		}
		fmt.Println("ready")
		if c, err = l.Accept(); err != nil {
			return err
		}
	}
	for at := int64(0); sends == "true"; at += 5000 {
		if _, err := c.Write(endless(at, 5000)); err != nil {
			return err
		}
	}
	return unix.Pause()
}

// endless is a part of a stream without end.
func endless(at, n int64) []byte {
	b := make([]byte, n)
	for i := range b {
		v := uint64(at+int64(i)) / 8 * 0x9e3779b97f4a7c15
		b[i] = byte(v >> (8 * (uint64(at+int64(i)) % 8)))
	}
	return b
}
