package translate_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/sluicemesh/sluice/pkg/xds"
	"github.com/sluicemesh/sluice/pkg/xds/translate"
	"github.com/sluicemesh/sluice/tests/envoytest"
	"github.com/sluicemesh/sluice/tests/need"
	"github.com/sluicemesh/sluice/tests/netnstest"
)

// Ports of the one service that the traffic tests use; the pod serves each on
// its port plus 8000.
const (
	portHTTP    = 80
	portAuto    = 81
	portFirst   = 82 // auto, the server speaks first
	portTCP     = 83
	portRouted  = 84 // leads to v1, v2 by routes
	portV2      = 85
	portDead    = 86 // declared, nobody listens
	portLeaving = 87 // endpoints: portHTTP's and portDead's
	portClosing = 89 // closes every other connection instead of answering
	portHTTP2   = 88
)

// An env is a pod with an Envoy that is the sidecar of both the client and the
// server: what the test dials leaves through 15001 and comes back through 15006.
type env struct {
	pod    *netnstest.Pod
	remote *netnstest.Pod
	envoy  *envoytest.Envoy
	vips   []netip.Addr
}

func newEnv(t *testing.T, opts translate.Options) *env {
	t.Helper()
	need.Root(t)
	node := netnstest.NewNode(t)
	e := &env{
		pod: node.Pod(t, "pod"), remote: node.Remote(t, "remote"),
		vips: []netip.Addr{netip.MustParseAddr("10.96.0.10"), netip.MustParseAddr("fd00:96::10")},
	}
	e.redirect(t)

	tr, err := translate.New(opts)
	if err != nil {
		t.Fatal(err)
	}
	s := xds.Service{Namespace: "shop", Name: "web", VIPs: e.vips}
	p := xds.Pod{Namespace: "shop", Name: "web-1", Addrs: e.pod.Addrs()}
	for port, protocol := range map[uint16]xds.Protocol{
		portHTTP: xds.ProtocolHTTP, portAuto: xds.ProtocolAuto, portFirst: xds.ProtocolAuto, portTCP: xds.ProtocolTCP,
		portRouted: xds.ProtocolHTTP, portV2: xds.ProtocolHTTP, portDead: xds.ProtocolHTTP, portLeaving: xds.ProtocolHTTP,
		portHTTP2: xds.ProtocolHTTP2, portClosing: xds.ProtocolHTTP,
	} {
		sp := xds.ServicePort{Port: port, Protocol: protocol}
		for _, a := range e.pod.Addrs()[:1] {
			sp.Endpoints = append(sp.Endpoints, xds.Endpoint{Addr: netip.AddrPortFrom(a, port+8000)})
		}
		if port == portLeaving {
			sp.Endpoints = append(slices.Clone(sp.Endpoints[:0]),
				xds.Endpoint{Addr: netip.AddrPortFrom(e.pod.Addr4, portHTTP+8000)},
				xds.Endpoint{Addr: netip.AddrPortFrom(e.pod.Addr6, portHTTP+8000)},
				xds.Endpoint{Addr: netip.AddrPortFrom(e.pod.Addr4, portDead+8000)},
				xds.Endpoint{Addr: netip.AddrPortFrom(e.remote.Addr4, 1)}) // refused, without a sidecar
		}
		if port == portRouted {
			sp.Routes = trafficRoutes()
		}
		s.Ports = append(s.Ports, sp)
		p.Inbound = append(p.Inbound, xds.InboundPort{Port: port + 8000, Protocol: protocol})
	}
	var all []goldenResource
	add := func(rs []xds.Resource, err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		for _, r := range rs {
			all = append(all, toGolden(t, r))
		}
	}
	add(tr.Base(xds.OutboundPassthrough))
	add(tr.Service(s))
	add(tr.Pod(p))
	e.envoy = envoytest.Start(t, envoytest.Options{Netns: e.pod.Netns, Config: static(t, all, true), Concurrency: 2})
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	if err := e.envoy.WaitReady(ctx); err != nil {
		t.Fatal(err)
	}
	return e
}

// redirect leads to Envoy what a data plane would.
func (e *env) redirect(t *testing.T) {
	t.Helper()
	run := func(name string, args ...string) {
		t.Helper()
		if out, err := e.pod.Command(t, 0, need.Tool(t, name), args...).CombinedOutput(); err != nil {
			t.Fatalf("%s %v: %v\n%s", name, args, err, out)
		}
	}
	for i, tool := range []string{"iptables", "ip6tables"} {
		own, source := e.pod.Addr4, "127.0.0.6"
		other := e.remote.Addr4
		if i == 1 {
			own, source, other = e.pod.Addr6, "::6", e.remote.Addr6
		}
		for _, rule := range [][]string{
			{"-d", e.vips[i].String(), "-m", "owner", "!", "--uid-owner", "1337", "-j", "REDIRECT", "--to-ports", "15001"},
			{"-d", other.String(), "-m", "owner", "!", "--uid-owner", "1337", "-j", "REDIRECT", "--to-ports", "15001"},
			{"-d", own.String(), "!", "-s", source, "-m", "owner", "--uid-owner", "1337", "-j", "REDIRECT", "--to-ports", "15006"},
		} {
			run(tool, append([]string{"-w", "-t", "nat", "-A", "OUTPUT", "-p", "tcp"}, rule...)...)
		}
	}
	run("ip", "-6", "addr", "add", "::6/128", "dev", "lo", "nodad")
}

func trafficRoutes() []xds.HTTPRoute {
	to := func(port uint16, weight uint32) xds.HTTPBackend {
		return xds.HTTPBackend{Ref: xds.ServicePortRef{Namespace: "shop", Name: "web", Port: port}, Weight: weight}
	}
	exact := func(p string) []xds.HTTPMatch { return []xds.HTTPMatch{{Path: path(xds.MatchExact, p)}} }
	gone := to(9999, 1)
	gone.Invalid = true
	return []xds.HTTPRoute{{Namespace: "shop", Name: "r", Rules: []xds.HTTPRule{
		{Name: "v1", Matches: []xds.HTTPMatch{{Path: path(xds.MatchPrefix, "/app")}}, Backends: []xds.HTTPBackend{to(portHTTP, 1)}},
		{Name: "user", Backends: []xds.HTTPBackend{to(portV2, 1)}, Matches: []xds.HTTPMatch{{
			Path: path(xds.MatchPrefix, "/app"), Headers: []xds.NamedMatch{named("cookie", xds.MatchRegex, "(.*; )?user=jason(;.*)?")},
		}}},
		{Name: "split", Matches: exact("/split"), Backends: []xds.HTTPBackend{to(portHTTP, 90), to(portV2, 10)}},
		{Name: "gone", Matches: exact("/gone"), Backends: []xds.HTTPBackend{gone}},
		{Name: "half", Matches: exact("/half"), Backends: []xds.HTTPBackend{to(portHTTP, 1), gone}},
		{Name: "slow", Matches: exact("/slow"), RequestTimeout: 100 * time.Millisecond, Backends: []xds.HTTPBackend{to(portHTTP, 1)}},
		{
			Name: "headers", Matches: exact("/headers"), Backends: []xds.HTTPBackend{to(portHTTP, 1)},
			RequestHeaders:  xds.HeaderModifier{Set: []xds.Header{{Name: "x-a", Value: "100%"}, {Name: "Host", Value: "new.example"}}},
			ResponseHeaders: xds.HeaderModifier{Add: []xds.Header{{Name: "x-b", Value: "b"}}},
		},
	}}}
}

func (e *env) vip(family int, port uint16) string {
	return netip.AddrPortFrom(e.vips[family], port).String()
}

func (e *env) listen(t *testing.T, port uint16) net.Listener {
	t.Helper()
	l, err := e.pod.Listen(t.Context(), "tcp", fmt.Sprintf(":%d", port+8000))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	return l
}

// serve serves HTTP/1 and HTTP/2 with prior knowledge.
func (e *env) serve(t *testing.T, port uint16, h http.HandlerFunc) {
	t.Helper()
	var p http.Protocols
	p.SetHTTP1(true)
	p.SetUnencryptedHTTP2(true)
	// No server should allow less than 100 streams.
	srv := &http.Server{Handler: h, Protocols: &p, MaxHeaderBytes: 8 << 20, HTTP2: &http.HTTP2Config{MaxConcurrentStreams: 100}}
	l := e.listen(t, port)
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = srv.Serve(l) // ends with http.ErrServerClosed
	}()
	t.Cleanup(func() {
		_ = srv.Close()
		<-done
	})
}

// serveTCP handles each connection and closes it.
func (e *env) serveTCP(t *testing.T, port uint16, handle func(net.Conn)) {
	t.Helper()
	l := e.listen(t, port)
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer func() { _ = c.Close() }()
				handle(c)
			}()
		}
	}()
}

func (e *env) dial(t *testing.T, addr string) *net.TCPConn {
	t.Helper()
	c, err := e.pod.Dial(t.Context(), "tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	if err := c.SetDeadline(time.Now().Add(20 * time.Second)); err != nil {
		t.Fatal(err)
	}
	return c.(*net.TCPConn)
}

func (e *env) client(t *testing.T, http2 bool) *http.Client {
	t.Helper()
	var p http.Protocols
	p.SetHTTP1(!http2)
	p.SetUnencryptedHTTP2(http2)
	tr := &http.Transport{
		Protocols: &p,
		DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
			return e.pod.Dial(ctx, network, addr)
		},
		MaxResponseHeaderBytes: 16 << 20,
	}
	t.Cleanup(tr.CloseIdleConnections)
	return &http.Client{Transport: tr, Timeout: 20 * time.Second}
}

func (e *env) get(t *testing.T, c *http.Client, url string, header ...string) (int, string, http.Header) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	for i := 0; i+1 < len(header); i += 2 {
		req.Header.Set(header[i], header[i+1])
	}
	resp, err := c.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, string(body), resp.Header
}

func TestTraffic(t *testing.T) {
	e := newEnv(t, translate.Options{})
	e.serve(t, portHTTP, func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/chat":
			upgrade(w, r)
		case "/slow":
			<-r.Context().Done()
		case "/big":
			for i := range 300 {
				w.Header().Set(fmt.Sprintf("x-answer-%d", i), strings.Repeat("b", 1000))
			}
			_, _ = fmt.Fprintf(w, "%d headers", len(r.Header))
		case "/headers":
			_, _ = fmt.Fprintf(w, "%s %s", r.Host, r.Header.Get("x-a"))
		default:
			_, _ = fmt.Fprintf(w, "v1 %s", r.Proto)
		}
	})
	e.serve(t, portV2, func(w http.ResponseWriter, r *http.Request) { _, _ = io.WriteString(w, "v2") })
	e.serve(t, portAuto, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/chat" {
			upgrade(w, r)
			return
		}
		_, _ = io.WriteString(w, r.Proto)
	})
	var together barrier
	e.serve(t, portHTTP2, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/together" {
			together.wait(r.Context())
		}
		_, _ = io.WriteString(w, r.Proto)
	})
	e.serveTCP(t, portFirst, func(c net.Conn) {
		_, _ = io.WriteString(c, "220 welcome\r\n")
		_, _ = io.Copy(c, c)
	})
	e.serveTCP(t, portTCP, func(c net.Conn) { // answers only after the client's end
		b, err := io.ReadAll(c)
		if err == nil {
			_, _ = fmt.Fprintf(c, "%d bytes from %s", len(b), c.RemoteAddr().(*net.TCPAddr).IP)
		}
	})

	for family, name := range []string{"v4", "v6"} {
		t.Run(name, func(t *testing.T) { e.traffic(t, family) })
	}
	t.Run("many streams", func(t *testing.T) { // more than the server takes on one connection
		const streams = 1000
		together.want(streams)
		c := e.client(t, true)
		var wg sync.WaitGroup
		var served, refused atomic.Int64
		for range streams {
			wg.Go(func() {
				resp, err := c.Get("http://" + e.vip(0, portHTTP2) + "/together")
				if err != nil {
					t.Errorf("stream: %v", err)
					return
				}
				_ = resp.Body.Close()
				if resp.StatusCode == http.StatusOK {
					served.Add(1)
				} else {
					refused.Add(1)
					together.arrive() // or the others would wait for it
				}
			})
		}
		wg.Wait()
		if served.Load() != streams {
			t.Errorf("%d of %d streams at once were served, %d refused", served.Load(), streams, refused.Load())
		}
	})
	t.Run("routes", e.routes)
	t.Run("leaving endpoints", func(t *testing.T) {
		c := e.client(t, false)
		for i := range 200 {
			status, body, h := e.get(t, c, "http://"+e.vip(0, portLeaving)+"/")
			if status != http.StatusOK {
				t.Fatalf("request %d: %d %s", i, status, body)
			}
			if h.Get("x-sluice-repeatable") != "" {
				t.Fatal("x-sluice-repeatable reaches the client")
			}
		}
		// Both kinds of dead endpoint were met: with and without a sidecar.
		stats := e.envoy.Stats(t.Context(), `^cluster\.(out/shop/web/87\.upstream_rq_retry_success|out/shop/web/87\.upstream_cx_connect_fail|in/8086\.upstream_cx_connect_fail)$`)
		if len(stats) != 3 {
			t.Fatalf("statistics %v, want three", stats)
		}
		for k, v := range stats {
			if v == 0 {
				t.Errorf("%s is 0", k)
			}
		}
	})
	t.Run("closing", func(t *testing.T) {
		var seen atomic.Int64
		e.serveTCP(t, portClosing, func(c net.Conn) {
			r, err := http.ReadRequest(bufio.NewReader(c))
			if err != nil || seen.Add(1)%2 == 1 {
				return
			}
			_, _ = fmt.Fprintf(c, "HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s", len(r.Method), r.Method)
		})
		for method, want := range map[string]int{
			"GET": http.StatusOK, "PUT": http.StatusOK, "POST": http.StatusServiceUnavailable, "PATCH": http.StatusServiceUnavailable,
		} {
			seen.Store(0)
			r, err := http.NewRequestWithContext(t.Context(), method, "http://"+e.vip(0, portClosing)+"/", strings.NewReader("x"))
			if err != nil {
				t.Fatal(err)
			}
			resp, err := e.client(t, false).Do(r)
			if err != nil {
				t.Fatalf("%s: %v", method, err)
			}
			_ = resp.Body.Close()
			if resp.StatusCode != want || resp.Header.Get("x-sluice-repeatable") != "" {
				t.Errorf("%s: status %d, want %d; headers %v", method, resp.StatusCode, want, resp.Header)
			}
			if calls := seen.Load(); calls != map[int]int64{http.StatusOK: 2, http.StatusServiceUnavailable: 1}[want] {
				t.Errorf("%s: the application saw %d requests", method, calls)
			}
		}
	})
	t.Run("dead", func(t *testing.T) {
		status, _, h := e.get(t, e.client(t, false), "http://"+e.vip(0, portDead)+"/")
		if status != http.StatusServiceUnavailable || h.Get("x-sluice-repeatable") != "" {
			t.Errorf("status %d, headers %v", status, h)
		}
	})
	t.Run("refused", func(t *testing.T) { // what docs/xds.md says does not pass
		for request, want := range map[string]string{
			"BREW / HTTP/1.1\r\nHost: h\r\n\r\n":                                       "HTTP/1.1 400 ",
			"GET / HTTP/1.1\r\nHost: h\r\nConnection: Upgrade\r\nUpgrade: foo\r\n\r\n": "HTTP/1.1 403 ",
			"GET / HTTP/1.0\r\n\r\n":                                                   "HTTP/1.0 200 ",
		} {
			c := e.dial(t, e.vip(0, portHTTP))
			if _, err := io.WriteString(c, request); err != nil {
				t.Fatal(err)
			}
			line, err := bufio.NewReader(c).ReadString('\n')
			if !strings.HasPrefix(line, want) {
				t.Errorf("%q: answer %q, %v; want %q", request, line, err, want)
			}
		}
	})
	t.Run("own ports", func(t *testing.T) {
		for _, a := range e.pod.Addrs() {
			for _, port := range []uint16{xds.PortOutbound, xds.PortInbound} {
				b, err := io.ReadAll(e.dial(t, netip.AddrPortFrom(a, port).String()))
				if len(b) > 0 || errors.Is(err, context.DeadlineExceeded) {
					t.Errorf("%s:%d: read %q, %v; want the end", a, port, b, err)
				}
			}
			url := "http://" + netip.AddrPortFrom(a, xds.PortHealth).String()
			for path, want := range map[string]int{"/healthz/ready": 200, "/": 404} {
				if status, _, _ := e.get(t, e.client(t, false), url+path); status != want {
					t.Errorf("%s%s: status %d, want %d", url, path, status, want)
				}
			}
		}
	})
	t.Run("passthrough", func(t *testing.T) {
		for _, a := range e.remote.Addrs() {
			addr := netip.AddrPortFrom(a, 7000)
			e.remote.Serve(t, addr, "far")
			got, err := e.pod.Ask(t.Context(), addr)
			if err != nil || got.Name != "far" {
				t.Errorf("ask %s: %+v, %v", addr, got, err)
			}
		}
		if n := e.envoy.Stats(t.Context(), `^cluster\.passthrough\.upstream_cx_total$`)["cluster.passthrough.upstream_cx_total"]; n < 2 {
			t.Errorf("%d connections passed through Envoy, want 2", n)
		}
	})
}

// A barrier holds requests back until as many as wanted are there.
type barrier struct {
	left atomic.Int64
	full chan struct{}
}

func (b *barrier) want(n int64) {
	b.full = make(chan struct{})
	b.left.Store(n)
}

func (b *barrier) arrive() {
	if b.left.Add(-1) == 0 {
		close(b.full)
	}
}

func (b *barrier) wait(ctx context.Context) {
	b.arrive()
	select {
	case <-b.full:
	case <-ctx.Done():
	}
}

func (e *env) traffic(t *testing.T, family int) {
	t.Run("http", func(t *testing.T) {
		for _, tc := range []struct {
			port  uint16
			http2 bool
			want  string
		}{
			{portHTTP, false, "v1 HTTP/1.1"},
			{portHTTP, true, "v1 HTTP/2.0"},
			{portAuto, false, "HTTP/1.1"},
			{portAuto, true, "HTTP/2.0"},
			{portHTTP2, false, "HTTP/2.0"},
			{portHTTP2, true, "HTTP/2.0"},
		} {
			status, body, _ := e.get(t, e.client(t, tc.http2), "http://"+e.vip(family, tc.port)+"/")
			if status != http.StatusOK || body != tc.want {
				t.Errorf("port %d, http2 %t: %d %q, want %q", tc.port, tc.http2, status, body, tc.want)
			}
		}
	})
	t.Run("access log", func(t *testing.T) {
		e.get(t, e.client(t, false), "http://"+e.vip(family, portHTTP)+"/logged")
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		defer cancel()
		for _, parts := range [][]string{
			{`"direction":"outbound"`, `"destination":"` + e.vip(family, portHTTP) + `"`, `"route":"default"`, `"cluster":"out/shop/web/80"`, `"path":"/logged"`, `"status":200`},
			{`"direction":"inbound"`, `"upstream":"`, `"upstream_from":"127.0.0.6:`, `"cluster":"in/8080"`, `"path":"/logged"`, `"bytes_out":`},
		} {
			e.envoy.WaitAccessLog(ctx, func(l string) bool {
				return !slices.ContainsFunc(parts, func(p string) bool { return !strings.Contains(l, p) })
			})
		}
	})
	t.Run("big headers", func(t *testing.T) {
		for _, http2 := range []bool{false, true} {
			var header []string
			for i := range 300 {
				header = append(header, fmt.Sprintf("x-ask-%d", i), strings.Repeat("a", 1000))
			}
			status, body, h := e.get(t, e.client(t, http2), "http://"+e.vip(family, portHTTP)+"/big", header...)
			if status != http.StatusOK || len(h) < 300 {
				t.Errorf("http2 %t: status %d, %s, %d headers in the answer", http2, status, body, len(h))
			}
		}
	})
	t.Run("server first", func(t *testing.T) {
		start := time.Now()
		c := e.dial(t, e.vip(family, portFirst))
		r := bufio.NewReader(c)
		line, err := r.ReadString('\n')
		took := time.Since(start)
		if line != "220 welcome\r\n" || err != nil {
			t.Fatalf("read %q, %v", line, err)
		}
		// Both sidecars wait, one after the other.
		// Envoy's clock may be some milliseconds behind.
		if want := 2 * translate.DefaultProtocolDetectionTimeout; took < want*9/10 || took > want+5*time.Second {
			t.Errorf("the greeting took %s, want %s and a little", took, want)
		}
		t.Logf("the greeting took %s", took)
		if _, err := io.WriteString(c, "QUIT\n"); err != nil {
			t.Fatal(err)
		}
		if line, err := r.ReadString('\n'); line != "QUIT\n" || err != nil {
			t.Errorf("read %q, %v", line, err)
		}
	})
	t.Run("half close", func(t *testing.T) {
		start := time.Now()
		c := e.dial(t, e.vip(family, portTCP))
		if _, err := c.Write(make([]byte, 3<<20)); err != nil {
			t.Fatal(err)
		}
		if err := c.CloseWrite(); err != nil {
			t.Fatal(err)
		}
		b, err := io.ReadAll(c)
		if string(b) != "3145728 bytes from 127.0.0.6" || err != nil {
			t.Errorf("read %q, %v", b, err)
		}
		t.Logf("took %s", time.Since(start))
	})
	t.Run("websocket", func(t *testing.T) {
		for _, port := range []uint16{portHTTP, portAuto} {
			c := e.dial(t, e.vip(family, port))
			if _, err := io.WriteString(c, "GET /chat HTTP/1.1\r\nHost: h\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"); err != nil {
				t.Fatal(err)
			}
			r := bufio.NewReader(c)
			resp, err := http.ReadResponse(r, nil)
			if err != nil || resp.StatusCode != http.StatusSwitchingProtocols {
				t.Fatalf("port %d: %+v, %v", port, resp, err)
			}
			for _, want := range []string{"hello", "ping"} {
				b := make([]byte, len(want))
				if _, err := io.ReadFull(r, b); err != nil || string(b) != want {
					t.Fatalf("port %d: read %q, %v; want %q", port, b, err, want)
				}
				if _, err := io.WriteString(c, "ping"); err != nil {
					t.Fatal(err)
				}
			}
		}
	})
}

// upgrade speaks as much WebSocket as a proxy looks at: the upgrade, then bytes
// of any kind both ways.
func upgrade(w http.ResponseWriter, r *http.Request) {
	conn, rw, err := http.NewResponseController(w).Hijack()
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	defer func() { _ = conn.Close() }()
	_, _ = fmt.Fprintf(conn, "HTTP/1.1 101 Switching Protocols\r\nUpgrade: %s\r\nConnection: Upgrade\r\n\r\nhello", r.Header.Get("Upgrade"))
	_, _ = io.Copy(conn, rw)
}

func (e *env) routes(t *testing.T) {
	c := e.client(t, false)
	url := "http://" + e.vip(0, portRouted)
	for _, tc := range []struct {
		path, cookie string
		status       int
		body         string
	}{
		{"/app", "", 200, "v1 HTTP/1.1"},
		{"/app/", "", 200, "v1 HTTP/1.1"},
		{"/app/x?y=z", "", 200, "v1 HTTP/1.1"},
		{"/application", "", 404, ""},
		{"/", "", 404, ""},
		{"/app", "user=jason", 200, "v2"},
		{"/app", "a=b; user=jason; c=d", 200, "v2"},
		{"/app", "user=jasonx", 200, "v1 HTTP/1.1"},
		{"/app", "superuser=jason", 200, "v1 HTTP/1.1"},
		{"/gone", "", 500, ""},
		{"/slow", "", 504, "upstream request timeout"},
		{"/headers", "", 200, "new.example 100%"},
	} {
		status, body, h := e.get(t, c, url+tc.path, "cookie", tc.cookie)
		if status != tc.status || body != tc.body {
			t.Errorf("%s, cookie %q: %d %q, want %d %q", tc.path, tc.cookie, status, body, tc.status, tc.body)
		}
		if tc.path == "/headers" && h.Get("x-b") != "b" {
			t.Errorf("/headers: answer has %v", h)
		}
	}
	invalid := 0
	for range 200 {
		switch status, _, _ := e.get(t, c, url+"/half"); status {
		case http.StatusInternalServerError:
			invalid++
		case http.StatusOK:
		default:
			t.Fatalf("/half: status %d", status)
		}
	}
	if invalid < 60 || invalid > 140 {
		t.Errorf("half of the weight has no backend: %d of 200 requests were answered 500", invalid)
	}
	count := map[string]int{}
	for range 1000 {
		_, body, _ := e.get(t, c, url+"/split")
		count[body]++
	}
	if n := count["v2"]; n < 50 || n > 150 || n+count["v1 HTTP/1.1"] != 1000 {
		t.Errorf("split 90 to 10: %v", count)
	}
}

// TestNotReady holds the bootstrap to what it promises: without the agent's
// configuration Envoy is not ready and accepts nothing.
func TestNotReady(t *testing.T) {
	need.Root(t)
	ns := netnstest.New(t, "bare")
	e := envoytest.Start(t, envoytest.Options{Netns: ns.Netns, Config: xds.Bootstrap()})
	status, body, err := e.Get(t.Context(), "/ready")
	if err != nil || status != http.StatusServiceUnavailable {
		t.Errorf("/ready: %d %s, %v", status, body, err)
	}
	for _, port := range []uint16{xds.PortOutbound, xds.PortInbound, xds.PortHealth} {
		c, err := ns.Dial(t.Context(), "tcp", fmt.Sprintf("127.0.0.1:%d", port))
		if err == nil {
			_ = c.Close()
			t.Errorf("port %d accepts connections", port)
		}
	}
}

// TestIPv6TurnedOff: a pod may have IPv6 turned off on a node that has it.
func TestIPv6TurnedOff(t *testing.T) {
	need.Root(t)
	ns := netnstest.New(t, "four")
	ns.Sysctl(t, "net/ipv6/conf/all/disable_ipv6", "1")
	tr := newTranslator(t)
	base, err := tr.Base(xds.OutboundPassthrough)
	if err != nil {
		t.Fatal(err)
	}
	pod, err := tr.Pod(xds.Pod{Addrs: []netip.Addr{netip.MustParseAddr("10.244.1.5")}})
	if err != nil {
		t.Fatal(err)
	}
	var all []goldenResource
	for _, r := range append(base, pod...) {
		all = append(all, toGolden(t, r))
	}
	e := envoytest.Start(t, envoytest.Options{Netns: ns.Netns, Config: static(t, all, true)})
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	if err := e.WaitReady(ctx); err != nil {
		t.Fatal(err)
	}
	c, err := ns.Dial(ctx, "tcp", "127.0.0.1:15001")
	if err != nil {
		t.Fatal(err)
	}
	_ = c.Close()
}

// TestNoLoop: who dials a port of Envoy's own reaches a connection that ends, and
// Envoy does not dial itself for it.
func TestNoLoop(t *testing.T) {
	e := newEnv(t, translate.Options{})
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	const accepted = `^listener\.(outbound-15001|inbound-15006)\.downstream_cx_total$`
	sum := func() (n uint64) {
		for _, v := range e.envoy.Stats(ctx, accepted) {
			n += v
		}
		return n
	}
	before, dials := sum(), uint64(0)
	for _, from := range []*netnstest.Pod{e.pod, e.remote} {
		for _, addr := range e.pod.Addrs() {
			for _, port := range []uint16{xds.PortOutbound, xds.PortInbound} {
				c, err := from.Dial(ctx, "tcp", netip.AddrPortFrom(addr, port).String())
				if err != nil {
					t.Fatal(err)
				}
				dials++
				if err := c.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
					t.Fatal(err)
				}
				if got, err := io.ReadAll(c); len(got) > 0 || errors.Is(err, os.ErrDeadlineExceeded) {
					t.Errorf("from %s to %s:%d: read %q, %v; want the end", from.Name, addr, port, got, err)
				}
				_ = c.Close()
			}
		}
	}
	if got := sum() - before; got != dials {
		t.Errorf("Envoy accepted %d connections for %d that were dialled", got, dials)
	}
}

// TestTransparency compares what the application and the client see with what
// the other sent.
func TestTransparency(t *testing.T) {
	e := newEnv(t, translate.Options{})
	const answer = "HTTP/1.1 200 OK\r\nSerVer: mine\r\nX-Envoy-Mine: 1\r\nDate: Thu, 01 Jan 2026 00:00:00 GMT\r\nContent-Length: 2\r\n\r\nok"
	seen := make(chan string, 1)
	e.serveTCP(t, portHTTP, func(c net.Conn) {
		r := bufio.NewReader(c)
		var b strings.Builder
		for {
			line, err := r.ReadString('\n')
			b.WriteString(line)
			if err != nil || line == "\r\n" {
				break
			}
		}
		seen <- b.String()
		_, _ = io.WriteString(c, answer)
	})
	request := "GET /a//b/../%2F?q HTTP/1.1\r\nHost: Shop.Example:8080\r\nX-Forwarded-For: 1.2.3.4\r\nUser-Agent: test\r\nX-MiXed: Case\r\n" +
		"X-Forwarded-Client-Cert: mine\r\nX-Envoy-Decorator-Operation: o\r\n\r\n"
	c := e.dial(t, e.vip(0, portHTTP))
	if _, err := io.WriteString(c, request); err != nil {
		t.Fatal(err)
	}
	// The one header that Envoy cannot be kept from adding.
	want := lines(strings.Replace(request, "\r\n\r\n", "\r\nx-forwarded-proto: http\r\n\r\n", 1))
	if d := cmp.Diff(want, lines(<-seen)); d != "" {
		t.Errorf("the application sees another request (-want +seen):\n%s", d)
	}
	b := make([]byte, len(answer)+200)
	n, err := io.ReadAtLeast(c, b, len(answer)-2)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(lines(answer), lines(string(b[:n]))); d != "" {
		t.Errorf("the client sees another answer (-sent +seen):\n%s", d)
	}
}

func lines(s string) []string {
	l := strings.Split(s, "\r\n")
	slices.Sort(l)
	return l
}
