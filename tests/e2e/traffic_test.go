package e2e

import (
	"bufio"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"os"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/interop/grpc_testing"

	"github.com/sluicemesh/sluice/pkg/redirect/netns"
	"github.com/sluicemesh/sluice/tests/sluicetest"
)

// Addresses of the service "server", ports in the order of serverPorts.
const (
	vip4 = "10.96.7.1"
	vip6 = "fd00:96::71"
)

const serverPorts = `
	{name: http, port: 80, targetPort: 8080},
	{name: grpc, port: 81, targetPort: 8081},
	{name: tcp-echo, port: 82, targetPort: 8082},
	{name: plain, port: 83, targetPort: 8082},
	{name: greeting, port: 84, targetPort: 8084},
	{name: tcp-bulk, port: 85, targetPort: 8085},
	{name: auto-http, port: 86, targetPort: 8080}`

// newPair makes a client pod and a server pod, each with a sidecar, and the
// server's application: HTTP/1.1, HTTP/2 and WebSocket on 8080, gRPC on 8081,
// an echo on 8082, a server that speaks first on 8084, a checksummer on 8085.
func newPair(t *testing.T, backend string) (n *sluicetest.Node, client, server *sluicetest.Pod) {
	t.Helper()
	n = sluicetest.New(t, backend)
	n.Service(t, "server", vip4, vip6, serverPorts)
	server = n.Pod(t, "server", sluicetest.PodSpec{})
	client = n.Pod(t, "client", sluicetest.PodSpec{})
	serve(t, server)
	client.WaitService(t, "server", 80, 1)
	client.WaitService(t, "server", 86, 1)
	return n, client, server
}

// serve runs the server's application in the pod.
func serve(t *testing.T, p *sluicetest.Pod) {
	t.Helper()
	h := http.NewServeMux()
	h.HandleFunc("/ws", func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Upgrade") != "websocket" {
			http.Error(w, "no upgrade", http.StatusBadRequest)
			return
		}
		c, buf, err := w.(http.Hijacker).Hijack()
		if err != nil {
			return
		}
		defer func() { _ = c.Close() }()
		_, _ = io.WriteString(c, "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n")
		_, _ = io.Copy(c, buf)
	})
	h.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("X-Remote", r.RemoteAddr)
		_, _ = fmt.Fprintf(w, "%s %s %s", p.Name, r.Proto, r.Host)
	})
	httpServer := &http.Server{Handler: h, ReadHeaderTimeout: sluicetest.Deadline, Protocols: new(http.Protocols)}
	httpServer.Protocols.SetHTTP1(true)
	httpServer.Protocols.SetUnencryptedHTTP2(true)
	go func() { _ = httpServer.Serve(p.ListenTCP(t, 8080)) }()
	t.Cleanup(func() { _ = httpServer.Close() })

	grpcServer := grpc.NewServer()
	grpc_testing.RegisterTestServiceServer(grpcServer, &streamer{})
	go func() { _ = grpcServer.Serve(p.ListenTCP(t, 8081)) }()
	t.Cleanup(grpcServer.Stop)

	p.ServeTCP(t, 8082, func(c *net.TCPConn) {
		_, _ = io.Copy(c, c) // until the client closes its half
	})
	p.ServeTCP(t, 8084, func(c *net.TCPConn) {
		_, _ = io.WriteString(c, "220 hello\n")
		line, _ := bufio.NewReader(c).ReadString('\n')
		_, _ = io.WriteString(c, "250 "+line)
	})
	p.ServeTCP(t, 8085, func(c *net.TCPConn) { // the sum comes after the client's FIN: half close
		sum := sha256.New()
		size, _ := io.Copy(sum, c)
		_, _ = fmt.Fprintf(c, "%d %x\n", size, sum.Sum(nil))
	})
}

type streamer struct {
	grpc_testing.UnimplementedTestServiceServer
}

// FullDuplexCall answers each message with one of the size it asks for.
func (*streamer) FullDuplexCall(s grpc_testing.TestService_FullDuplexCallServer) error {
	for {
		req, err := s.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		size := req.GetResponseParameters()[0].GetSize()
		if err := s.Send(&grpc_testing.StreamingOutputCallResponse{Payload: &grpc_testing.Payload{Body: make([]byte, size)}}); err != nil {
			return err
		}
	}
}

// fetch makes one request and returns status and body.
func fetch(c *http.Client, url string, header ...string) (int, string, http.Header, error) {
	req, err := http.NewRequest(http.MethodGet, url, nil)
	if err != nil {
		return 0, "", nil, err
	}
	for i := 0; i+1 < len(header); i += 2 {
		req.Header.Set(header[i], header[i+1])
	}
	resp, err := c.Do(req)
	if err != nil {
		return 0, "", nil, err
	}
	defer func() { _ = resp.Body.Close() }()
	b, err := io.ReadAll(resp.Body)
	return resp.StatusCode, string(b), resp.Header, err
}

// through runs send and then wants both sidecars to have counted and logged
// what it sent to the port of the service "server", which is target at the
// application: the chain, http or tcp, tells what Envoy took it for.
func through(t *testing.T, client, server *sluicetest.Pod, port, target int, chain string, send func(*testing.T)) {
	t.Helper()
	counter := "upstream_cx_total"
	if chain == "http" {
		counter = "upstream_rq_total" // of connections Envoy has a pool
	}
	type witness struct {
		*sluicetest.Pod
		direction, destination, cluster string
	}
	logged := func(w witness) (n int) {
		for line := range strings.Lines(w.Envoy.AccessLog()) {
			var l struct{ Direction, Chain, Destination, Cluster string }
			if json.Unmarshal([]byte(line), &l) == nil && // a line may be half written
				l.Direction == w.direction && l.Chain == chain && l.Destination == w.destination && l.Cluster == w.cluster {
				n++
			}
		}
		return n
	}
	counted := func(w witness) uint64 {
		return w.Stat(t, "^cluster\\."+regexp.QuoteMeta(w.cluster)+`\.`+counter+"$")
	}
	witnesses := []witness{
		{client, "outbound", netip.AddrPortFrom(netip.MustParseAddr(vip4), uint16(port)).String(), fmt.Sprintf("out/e2e/server/%d", port)},
		{server, "inbound", netip.AddrPortFrom(server.Addr4, uint16(target)).String(), fmt.Sprintf("in/%d", target)},
	}
	var counts []uint64
	var lines []int
	for _, w := range witnesses {
		counts, lines = append(counts, counted(w)), append(lines, logged(w))
	}
	if !t.Run("send", send) { // which closes its connections at its end
		return
	}
	for i, w := range witnesses {
		if after := counted(w); after <= counts[i] {
			t.Errorf("%s of cluster %s stayed at %d in the Envoy of %s", counter, w.cluster, after, w.Name)
		}
		sluicetest.Eventually(t, func() bool { return logged(w) > lines[i] }, func() string {
			return fmt.Sprintf("the Envoy of %s has logged no %s connection to %s with chain %s:\n%s", w.Name, w.direction, w.destination, chain, w.Envoy.AccessLog())
		})
	}
}

// TestProtocols sends what applications send through both sidecars of a pair
// and looks at what came back, at both Envoys' statistics and access logs, and
// at the agent's counters.
func TestProtocols(t *testing.T) {
	sluicetest.EachBackend(t, func(t *testing.T, backend string) {
		n, client, server := newPair(t, backend)

		for _, vip := range []string{vip4, "[" + vip6 + "]"} {
			t.Run("HTTP1 "+vip, func(t *testing.T) {
				before := n.Connections(t, `pod="client"`, `direction="outbound"`, `verdict="redirected"`)
				code, body, header, err := fetch(client.HTTPClient(false), "http://"+vip+"/h1")
				if want := "server HTTP/1.1 " + vip; err != nil || code != 200 || body != want {
					t.Fatalf("answer %d %q, %v; want 200 %q", code, body, err, want)
				}
				// The application sees its own Envoy, which binds to 127.0.0.6 or ::6.
				if from := header.Get("X-Remote"); !strings.HasPrefix(from, "127.0.0.6:") && !strings.HasPrefix(from, "[::6]:") {
					t.Errorf("the application saw %s as its client, not its Envoy", from)
				}
				if after := n.Connections(t, `pod="client"`, `direction="outbound"`, `verdict="redirected"`); after != before+1 {
					t.Errorf("redirected outbound connections of the client went from %v to %v, want one more", before, after)
				}
				ctx, cancel := context.WithTimeout(t.Context(), sluicetest.Deadline)
				defer cancel()
				for _, p := range []*sluicetest.Pod{client, server} {
					p.Envoy.WaitAccessLog(ctx, func(line string) bool { return strings.Contains(line, "/h1") })
				}
			})
		}

		for _, tc := range []struct {
			name         string
			port, target int
			chain        string
			send         func(*testing.T)
		}{
			{"HTTP1", 80, 8080, "http", func(t *testing.T) { wantHTTP(t, client, 80, "HTTP/1.1") }},
			{"HTTP1, found out", 86, 8080, "http", func(t *testing.T) { wantHTTP(t, client, 86, "HTTP/1.1") }},
			{"HTTP2", 80, 8080, "http", func(t *testing.T) { wantHTTP(t, client, 80, "HTTP/2.0") }},
			{"HTTP2, found out", 86, 8080, "http", func(t *testing.T) { wantHTTP(t, client, 86, "HTTP/2.0") }},
			{"gRPC streaming", 81, 8081, "http", func(t *testing.T) { grpcStream(t, client) }},
			{"WebSocket", 80, 8080, "http", func(t *testing.T) { webSocket(t, client) }},
			{"opaque TCP", 82, 8082, "tcp", func(t *testing.T) {
				c := dialFrom(t, client, vip4+":82")
				mustEcho(t, c, bufio.NewReader(c))
			}},
			{"TCP on a port without a protocol", 83, 8082, "tcp", func(t *testing.T) {
				c := dialFrom(t, client, vip4+":83")
				mustEcho(t, c, bufio.NewReader(c))
			}},
			{"server speaks first", 84, 8084, "tcp", func(t *testing.T) { serverFirst(t, client) }},
			{"half close and 200 MB", 85, 8085, "tcp", func(t *testing.T) { halfClose(t, client, 200<<20) }},
		} {
			t.Run(tc.name, func(t *testing.T) { through(t, client, server, tc.port, tc.target, tc.chain, tc.send) })
		}

		t.Run("unknown destination passes through", func(t *testing.T) {
			plain := n.Pod(t, "plain", sluicetest.PodSpec{Plain: true})
			plain.ServeTCP(t, 7777, func(c *net.TCPConn) { _, _ = io.WriteString(c, "from "+c.RemoteAddr().String()+"\n") })
			before := client.Stat(t, `^cluster\.passthrough.*\.upstream_cx_total$`)
			c := dialFrom(t, client, netip.AddrPortFrom(plain.Addr4, 7777).String())
			line, err := bufio.NewReader(c).ReadString('\n')
			if !strings.HasPrefix(line, "from "+client.Addr4.String()+":") {
				t.Errorf("the server outside saw %q, %v; want the client's own address %s", line, err, client.Addr4)
			}
			if after := client.Stat(t, `^cluster\.passthrough.*\.upstream_cx_total$`); after != before+1 {
				t.Errorf("passthrough connections of the client's Envoy went from %d to %d, want one more", before, after)
			}
		})

		t.Run("client without a sidecar", func(t *testing.T) {
			plain := n.Pod(t, "plain2", sluicetest.PodSpec{Plain: true})
			before := n.Connections(t, `pod="server"`, `direction="inbound"`, `verdict="redirected"`)
			code, body, header, err := fetch(plain.HTTPClient(false), "http://"+netip.AddrPortFrom(server.Addr4, 8080).String()+"/")
			if err != nil || code != 200 || !strings.HasPrefix(header.Get("X-Remote"), "127.0.0.6:") {
				t.Errorf("answer %d %q from %s, %v; want it through the server's Envoy", code, body, header.Get("X-Remote"), err)
			}
			if after := n.Connections(t, `pod="server"`, `direction="inbound"`, `verdict="redirected"`); after != before+1 {
				t.Errorf("redirected inbound connections went from %v to %v, want one more", before, after)
			}
		})

		t.Run("port that is not declared", func(t *testing.T) {
			server.ServeTCP(t, 9999, func(c *net.TCPConn) { _, _ = io.WriteString(c, "from "+c.RemoteAddr().String()+"\n") })
			before := server.Stat(t, `^cluster\.in-passthrough\.upstream_cx_total$`)
			for _, addr := range []netip.Addr{server.Addr4, server.Addr6} {
				line, err := bufio.NewReader(dialFrom(t, client, netip.AddrPortFrom(addr, 9999).String())).ReadString('\n')
				if !strings.HasPrefix(line, "from 127.0.0.6:") && !strings.HasPrefix(line, "from [::6]:") {
					t.Errorf("%s: the application saw %q, %v; want its own Envoy", addr, line, err)
				}
			}
			if after := server.Stat(t, `^cluster\.in-passthrough\.upstream_cx_total$`); after != before+2 {
				t.Errorf("inbound passthrough connections went from %d to %d, want two more", before, after)
			}
		})

		t.Run("pod calls its own service", func(t *testing.T) {
			server.WaitService(t, "server", 80, 1)
			before := server.Stat(t, `^listener\..*15006\.downstream_cx_total$|^http\.in.*downstream_cx_total$`)
			code, body, header, err := fetch(server.HTTPClient(false), "http://"+vip4+"/self")
			if err != nil || code != 200 || !strings.HasPrefix(header.Get("X-Remote"), "127.0.0.6:") {
				t.Errorf("answer %d %q from %s, %v; want it through 15001 and 15006 of its own Envoy", code, body, header.Get("X-Remote"), err)
			}
			if after := server.Stat(t, `^listener\..*15006\.downstream_cx_total$|^http\.in.*downstream_cx_total$`); after <= before {
				t.Errorf("inbound connections of the server's Envoy stayed at %d", after)
			}
		})
	})
}

// wantHTTP makes a request of that version, for HTTP/2 in clear text and with
// prior knowledge, and wants it to arrive as the same.
func wantHTTP(t *testing.T, client *sluicetest.Pod, port int, proto string) {
	t.Helper()
	c := client.HTTPClient(true)
	transport := c.Transport.(*http.Transport)
	if proto == "HTTP/2.0" {
		transport.Protocols = new(http.Protocols)
		transport.Protocols.SetUnencryptedHTTP2(true)
	}
	defer transport.CloseIdleConnections()
	code, body, _, err := fetch(c, fmt.Sprintf("http://%s:%d/", vip4, port))
	if err != nil || code != 200 || !strings.HasPrefix(body, "server "+proto) {
		t.Errorf("answer %d %q, %v; want 200 over %s at the application", code, body, err, proto)
	}
}

func webSocket(t *testing.T, client *sluicetest.Pod) {
	t.Helper()
	c := dialFrom(t, client, vip4+":80")
	_, _ = io.WriteString(c, "GET /ws HTTP/1.1\r\nHost: server\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n")
	r := bufio.NewReader(c)
	resp, err := http.ReadResponse(r, nil)
	if err != nil || resp.StatusCode != http.StatusSwitchingProtocols {
		t.Fatalf("upgrade: %v, %v", resp, err)
	}
	for range 10 {
		mustEcho(t, c, r)
	}
}

// serverFirst connects to a port that says nothing of its protocol: Envoy waits
// for the client a stated short time, then lets the server speak.
func serverFirst(t *testing.T, client *sluicetest.Pod) {
	t.Helper()
	start := time.Now()
	c := dialFrom(t, client, vip4+":84")
	r := bufio.NewReader(c)
	if line, err := r.ReadString('\n'); line != "220 hello\n" {
		t.Fatalf("greeting %q, %v", line, err)
	}
	t.Logf("greeting after %v", time.Since(start).Round(time.Millisecond))
	_, _ = io.WriteString(c, "HELO me\n")
	if line, err := r.ReadString('\n'); line != "250 HELO me\n" {
		t.Errorf("answer %q, %v", line, err)
	}
}

// halfClose sends size bytes and FIN; only then does the server answer, with
// the sum of what it got.
func halfClose(t *testing.T, client *sluicetest.Pod, size int64) {
	t.Helper()
	c := dialFrom(t, client, vip4+":85")
	sum := sha256.New()
	if _, err := io.Copy(io.MultiWriter(c, sum), io.LimitReader(rand.NewChaCha8([32]byte{1}), size)); err != nil {
		t.Fatal(err)
	}
	if err := c.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	got, err := bufio.NewReader(c).ReadString('\n')
	if want := fmt.Sprintf("%d %x\n", size, sum.Sum(nil)); got != want {
		t.Errorf("after %d bytes and FIN the server says %q, %v; want %q", size, got, err, want)
	}
}

// TestManyConnections: no default limit of Envoy bites, and a client port that
// is used again for the same destination does not stall.
func TestManyConnections(t *testing.T) {
	sluicetest.EachBackend(t, func(t *testing.T, backend string) {
		_, client, server := newPair(t, backend)

		t.Run("1100 at once", func(t *testing.T) {
			const count = 1100 // Envoy's own limit is 1024
			var wg sync.WaitGroup
			open := make(chan struct{})
			var failed atomic.Int32
			var opened sync.WaitGroup
			opened.Add(count)
			for range count {
				wg.Go(func() {
					c, err := client.Dial(t.Context(), "tcp", vip4+":82")
					var line string
					if err == nil {
						defer func() { _ = c.Close() }()
						_ = c.SetDeadline(time.Now().Add(2 * sluicetest.Deadline))
						_, _ = io.WriteString(c, "one\n")
						line, err = bufio.NewReader(c).ReadString('\n')
					}
					opened.Done()
					<-open // every connection stays open until all have answered
					if err != nil || line != "one\n" {
						failed.Add(1)
						return
					}
					_, _ = io.WriteString(c, "two\n")
					if line, err := bufio.NewReader(c).ReadString('\n'); line != "two\n" {
						t.Logf("second answer %q, %v", line, err)
						failed.Add(1)
					}
				})
			}
			opened.Wait()
			active := client.Stat(t, `^cluster\.out/e2e/server/82\.upstream_cx_active$`)
			close(open)
			wg.Wait()
			if failed.Load() > 0 || active != count {
				t.Errorf("%d of %d connections failed; Envoy had %d open at once, want %d", failed.Load(), count, active, count)
			}
			if n := server.Stat(t, `overflow$`); n > 0 {
				t.Errorf("the server's Envoy counted %d overflows", n)
			}
		})

		t.Run("20000 short ones", func(t *testing.T) {
			const count, workers = 20_000, 8
			retransmits := func() int { return synRetransmits(t, client) + synRetransmits(t, server) }
			before := retransmits()
			var left, failed, slowest atomic.Int64
			left.Store(count)
			var wg sync.WaitGroup
			for range workers {
				wg.Go(func() {
					// Inside the pod once for all connections: entering takes longer than connecting.
					err := client.Do(func() error {
						for left.Add(-1) >= 0 {
							start := time.Now()
							if err := shortConnection(t.Context()); err != nil && failed.Add(1) < 5 {
								t.Logf("connection: %v", err)
							}
							took := int64(time.Since(start))
							for old := slowest.Load(); took > old && !slowest.CompareAndSwap(old, took); old = slowest.Load() {
							}
						}
						return nil
					})
					if err != nil {
						t.Error(err)
					}
				})
			}
			wg.Wait()
			resent := retransmits() - before
			t.Logf("%d connections, %d SYNs sent twice in both pods, slowest %v", count, resent, time.Duration(slowest.Load()).Round(time.Millisecond))
			if failed.Load() > 0 {
				t.Errorf("%d of %d connections failed", failed.Load(), count)
			}
			// With REDIRECT a reused client port may meet the TIME_WAIT of another
			// destination on 15001; eBPF keeps the 4-tuples apart.
			if backend == "ebpf" && resent > 0 {
				t.Errorf("%d SYNs were sent twice, want 0", resent)
			}
		})
	})
}

// shortConnection connects to the echo, gets one answer and closes first. The
// caller is inside the pod: a dial of one address does not leave its thread.
func shortConnection(ctx context.Context) error {
	c, err := new(net.Dialer).DialContext(ctx, "tcp", vip4+":82")
	if err != nil {
		return err
	}
	defer func() { _ = c.Close() }()
	_ = c.SetDeadline(time.Now().Add(sluicetest.Deadline))
	if _, err := io.WriteString(c, "x\n"); err != nil {
		return err
	}
	line, err := bufio.NewReader(c).ReadString('\n')
	if line != "x\n" {
		return fmt.Errorf("answer %q: %w", line, err)
	}
	return nil
}

// synRetransmits reads TCPSynRetrans of the pod's network namespace.
func synRetransmits(t *testing.T, p *sluicetest.Pod) int {
	t.Helper()
	var value int
	err := netns.Do(p.Netns, func() error {
		b, err := os.ReadFile("/proc/thread-self/net/netstat")
		if err != nil {
			return err
		}
		lines := strings.Split(string(b), "\n")
		for i := 0; i+1 < len(lines); i += 2 {
			names, values := strings.Fields(lines[i]), strings.Fields(lines[i+1])
			for j, name := range names {
				if name == "TCPSynRetrans" {
					value, err = strconv.Atoi(values[j])
					return err
				}
			}
		}
		return errors.New("no TCPSynRetrans in /proc/net/netstat")
	})
	if err != nil {
		t.Fatal(err)
	}
	return value
}

// grpcStream exchanges messages of many sizes over one bidirectional stream.
func grpcStream(t *testing.T, client *sluicetest.Pod) {
	t.Helper()
	conn, err := grpc.NewClient("passthrough:///"+vip4+":81", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, addr string) (net.Conn, error) { return client.Dial(ctx, "tcp", addr) }))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	ctx, cancel := context.WithTimeout(t.Context(), sluicetest.Deadline)
	defer cancel()
	stream, err := grpc_testing.NewTestServiceClient(conn).FullDuplexCall(ctx, grpc.WaitForReady(true))
	if err != nil {
		t.Fatal(err)
	}
	for i := range 200 {
		size := int32(i * 97)
		err := stream.Send(&grpc_testing.StreamingOutputCallRequest{
			ResponseParameters: []*grpc_testing.ResponseParameters{{Size: size}},
			Payload:            &grpc_testing.Payload{Body: make([]byte, 1000)},
		})
		if err != nil {
			t.Fatalf("send message %d: %v", i, err)
		}
		got, err := stream.Recv()
		if err != nil || len(got.GetPayload().GetBody()) != int(size) {
			t.Fatalf("message %d has %d bytes, %v; want %d", i, len(got.GetPayload().GetBody()), err, size)
		}
	}
	if err := stream.CloseSend(); err != nil {
		t.Fatal(err)
	}
	if _, err := stream.Recv(); !errors.Is(err, io.EOF) {
		t.Errorf("end of the stream: %v, want EOF with status OK", err)
	}
	if client.Stat(t, `^cluster\.out/e2e/server/81\.upstream_cx_http2_total$`) == 0 {
		t.Error("the client's Envoy has no HTTP/2 connection to the gRPC port")
	}
}

// dialFrom connects from inside the pod, with the sluicetest.Deadline of these tests.
func dialFrom(t *testing.T, p *sluicetest.Pod, addr string) *net.TCPConn {
	t.Helper()
	c, err := p.Dial(t.Context(), "tcp", addr)
	if err != nil {
		t.Fatalf("dial %s from pod %s: %v", addr, p.Name, err)
	}
	t.Cleanup(func() { _ = c.Close() })
	_ = c.SetDeadline(time.Now().Add(2 * sluicetest.Deadline))
	return c.(*net.TCPConn)
}

func mustEcho(t *testing.T, c net.Conn, r *bufio.Reader) {
	t.Helper()
	if _, err := io.WriteString(c, "ping\n"); err != nil {
		t.Fatal(err)
	}
	if line, err := r.ReadString('\n'); line != "ping\n" {
		t.Fatalf("echo %q, %v", line, err)
	}
}
