package main

import (
	"bufio"
	"cmp"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sluicemesh/sluice/pkg/redirect"
	"github.com/sluicemesh/sluice/pkg/redirect/bpf"
	"github.com/sluicemesh/sluice/pkg/redirect/netns"
)

// A proxyTarget is a sidecar of this node whose statistics are wanted.
type proxyTarget struct {
	Namespace, Pod string
	// Workload is the name of what the pod belongs to; empty if unknown.
	Workload string
	// Netns is a path that opens the pod's network namespace.
	Netns string
	// NetnsInode is compared before anything is asked, so that no pod's
	// statistics go under the name of another; 0 is not compared.
	NetnsInode uint64
}

// proxyLimits bound a scrape of all sidecars.
type proxyLimits struct {
	whole    time.Duration // for all sidecars and the answer
	each     time.Duration // for one sidecar
	parallel int           // sidecars asked at the same time
	body     int64         // bytes that one sidecar may send
	kept     int64         // bytes of samples in memory, of all sidecars together
}

func defaultProxyLimits() proxyLimits {
	return proxyLimits{whole: 8 * time.Second, each: 2 * time.Second, parallel: 8, body: 16 << 20, kept: 64 << 20}
}

// proxies serves /metrics/proxies: the statistics of all sidecars of this node,
// each sample labelled with its pod. A sidecar that is dead, hangs or talks
// nonsense is named in the answer and hides no other. One set of samples is in
// memory at a time: requests for the same share it, others wait.
type proxies struct {
	targets func() []proxyTarget
	limits  proxyLimits
	dial    func(context.Context, proxyTarget) (net.Conn, error)
	slot    chan struct{} // holds a token while there is a set of samples

	mu      sync.Mutex
	current map[proxyQuery]*proxyScrape // not finished yet
	round   int
	late    map[string]int // round in which the sidecar in a network namespace last took too long
}

// newProxies returns the handler of /metrics/proxies. targets returns the
// node's sidecars, in any order; it is called on any goroutine.
func newProxies(targets func() []proxyTarget) *proxies {
	return &proxies{
		targets: targets, limits: defaultProxyLimits(), dial: dialAdmin,
		slot: make(chan struct{}, 1), current: map[proxyQuery]*proxyScrape{}, late: map[string]int{},
	}
}

// dialAdmin connects to the admin port of a sidecar, which the data plane
// refuses to sockets without the agent's mark.
func dialAdmin(ctx context.Context, t proxyTarget) (conn net.Conn, err error) {
	if t.NetnsInode != 0 && netnsGone(t.Netns, t.NetnsInode) {
		return nil, fmt.Errorf("open network namespace %s: %w", t.Netns, redirect.ErrGone)
	}
	d := net.Dialer{Control: func(_, _ string, c syscall.RawConn) (err error) {
		if cerr := c.Control(func(fd uintptr) {
			err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_MARK, bpf.AgentMark)
		}); cerr != nil {
			return cerr
		}
		if err != nil {
			return fmt.Errorf("mark socket: %w", err)
		}
		return nil
	}}
	err = netns.Do(t.Netns, func() (err error) {
		// To one address: the socket is made on this thread.
		conn, err = d.DialContext(ctx, "tcp4", net.JoinHostPort("127.0.0.1", strconv.Itoa(int(redirect.AdminPort))))
		return err
	})
	return conn, err
}

// A proxyQuery says which statistics are wanted.
type proxyQuery struct {
	// limit is how long the one who asks waits. It is part of what is asked, so
	// that nobody's haste cuts the answer of others short.
	limit  time.Duration
	all    bool   // also what was never used, and every family
	filter string // regular expression on Envoy's own names of statistics
}

func parseProxyQuery(q url.Values) (proxyQuery, error) {
	p := proxyQuery{filter: q.Get("filter")}
	var err error
	if v := q.Get("all"); v != "" {
		if p.all, err = strconv.ParseBool(v); err != nil {
			return p, fmt.Errorf("parameter all: %q is not 0 or 1", v)
		}
	}
	if len(p.filter) > 1024 {
		return p, fmt.Errorf("parameter filter: %d bytes, at most 1024", len(p.filter))
	}
	if _, err := regexp.Compile(p.filter); err != nil {
		return p, fmt.Errorf("parameter filter: %w", err)
	}
	return p, nil
}

// ServeHTTP implements http.Handler.
func (p *proxies) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	query, err := parseProxyQuery(r.URL.Query())
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	limit := scrapeBudget(r.Header, p.limits.whole)
	ctx, cancel := context.WithTimeout(r.Context(), limit)
	defer cancel()
	query.limit = limit
	s, err := p.join(ctx, query)
	if err != nil {
		http.Error(w, fmt.Sprintf("ask sidecars: %v", err), http.StatusServiceUnavailable)
		return
	}
	defer p.leave(s)
	// Who reads slowly keeps others waiting. Not every writer has deadlines.
	_ = http.NewResponseController(w).SetWriteDeadline(time.Now().Add(p.limits.whole))
	w.Header().Set("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
	w.Header().Add("Vary", "Accept-Encoding")
	var out io.Writer = w
	if acceptsGzip(r.Header) {
		w.Header().Set("Content-Encoding", "gzip")
		z, _ := gzip.NewWriterLevel(w, gzip.BestSpeed) // the level is one that exists
		defer func() { _ = z.Close() }()
		out = z
	}
	buffered := bufio.NewWriterSize(out, 64<<10)
	writeProxies(buffered, s.results)
	_ = buffered.Flush() // an error means that nobody reads any more
}

// scrapeBudget is how long an answer may take: not longer than Prometheus
// waits, which it tells, less a part for the way.
func scrapeBudget(h http.Header, most time.Duration) time.Duration {
	seconds, err := strconv.ParseFloat(h.Get("X-Prometheus-Scrape-Timeout-Seconds"), 64)
	if err != nil || !(seconds > 0) || seconds > 3600 {
		return most
	}
	return min(most, time.Duration(seconds*0.8*float64(time.Second)))
}

// acceptsGzip understands "gzip", "*" and ";q=0".
func acceptsGzip(h http.Header) bool {
	for _, part := range strings.Split(strings.Join(h.Values("Accept-Encoding"), ","), ",") {
		coding, params, _ := strings.Cut(strings.TrimSpace(part), ";")
		if coding = strings.TrimSpace(coding); !strings.EqualFold(coding, "gzip") && coding != "*" {
			continue
		}
		q, found := strings.CutPrefix(strings.ReplaceAll(params, " ", ""), "q=")
		weight, err := strconv.ParseFloat(q, 64)
		return !found || err != nil || weight > 0
	}
	return false
}

// A proxyScrape is one round over all sidecars. results and err may be read
// once done is closed.
type proxyScrape struct {
	query   proxyQuery
	done    chan struct{}
	cancel  context.CancelFunc
	results []proxyResult
	err     error

	// Under the mutex of proxies.
	users int
	holds bool // the slot
}

// join returns the finished scrape for a query: the one that is under way, or
// a new one. leave must follow unless there is an error.
func (p *proxies) join(ctx context.Context, q proxyQuery) (*proxyScrape, error) {
	p.mu.Lock()
	s := p.current[q]
	if s == nil {
		// Others may need it longer than who asked first. What is left of the time is
		// for the answer.
		sctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), q.limit*9/10)
		s = &proxyScrape{query: q, done: make(chan struct{}), cancel: cancel}
		p.current[q] = s
		go p.run(sctx, s)
	}
	s.users++
	p.mu.Unlock()
	select {
	case <-s.done:
	case <-ctx.Done():
		p.leave(s)
		return nil, fmt.Errorf("wait for their statistics: %w", ctx.Err())
	}
	if s.err != nil {
		p.leave(s)
		return nil, s.err
	}
	return s, nil
}

// leave ends the use of a scrape; the last one to leave makes room for another.
func (p *proxies) leave(s *proxyScrape) {
	p.mu.Lock()
	defer p.mu.Unlock()
	s.users--
	if s.users > 0 {
		return
	}
	s.cancel()
	if p.current[s.query] == s {
		delete(p.current, s.query) // it will not be complete
	}
	p.free(s)
}

// free gives the slot back. The caller holds the mutex.
func (p *proxies) free(s *proxyScrape) {
	select {
	case <-s.done:
	default:
		return // run does it
	}
	if s.holds {
		s.holds = false
		<-p.slot
	}
}

func (p *proxies) run(ctx context.Context, s *proxyScrape) {
	defer s.cancel()
	select {
	case p.slot <- struct{}{}:
		s.holds = true // nobody looks before done
		s.results = p.scrape(ctx, s.query)
	case <-ctx.Done():
		s.err = errors.New("other requests are being answered; a slow reader may hold them up")
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.current[s.query] == s {
		delete(p.current, s.query)
	}
	close(s.done)
	if s.users == 0 {
		p.free(s)
	}
}

// A proxyResult is what one sidecar said.
type proxyResult struct {
	target proxyTarget
	took   time.Duration
	stats  proxyStats // empty on an error
	err    error
}

// scrape asks all sidecars. Those that took too long the last time come last,
// the latest of them at the end: many that hang must not use up the time of the
// others.
func (p *proxies) scrape(ctx context.Context, q proxyQuery) []proxyResult {
	targets := p.targets()
	results := make([]proxyResult, len(targets))
	order := make([]int, len(targets))
	for i, t := range targets {
		results[i] = proxyResult{target: t, err: errNotReached}
		order[i] = i
	}
	p.mu.Lock()
	slices.SortStableFunc(order, func(a, b int) int {
		return p.late[targets[a].Netns] - p.late[targets[b].Netns]
	})
	p.mu.Unlock()

	choice := chooseProxies(q)
	var kept atomic.Int64
	next := make(chan int)
	var workers sync.WaitGroup
	for range min(p.limits.parallel, len(targets)) {
		workers.Go(func() {
			for i := range next {
				p.ask(ctx, choice, &results[i], &kept)
			}
		})
	}
	for _, i := range order {
		select {
		case next <- i:
			continue
		case <-ctx.Done():
		}
		break
	}
	close(next)
	workers.Wait()

	p.mu.Lock()
	defer p.mu.Unlock()
	p.round++
	late := map[string]int{}
	for _, r := range results {
		switch before := p.late[r.target.Netns]; {
		case scrapeReason(r.err) == "timeout":
			late[r.target.Netns] = p.round
		case errors.Is(r.err, errNotReached) && before > 0:
			late[r.target.Netns] = before
		}
	}
	p.late = late
	return onePerPod(results)
}

// onePerPod sorts results by pod. While a pod's sandbox is made again there are
// two: the one that answers is the pod's.
func onePerPod(results []proxyResult) []proxyResult {
	slices.SortStableFunc(results, func(a, b proxyResult) int {
		return cmp.Or(
			strings.Compare(a.target.Namespace, b.target.Namespace), strings.Compare(a.target.Pod, b.target.Pod),
			btoi(a.err != nil)-btoi(b.err != nil), strings.Compare(a.target.Netns, b.target.Netns))
	})
	return slices.CompactFunc(results, func(a, b proxyResult) bool {
		return a.target.Namespace == b.target.Namespace && a.target.Pod == b.target.Pod
	})
}

func btoi(b bool) int {
	if b {
		return 1
	}
	return 0
}

// Why a sidecar's statistics are missing.
var (
	errNotReached  = errors.New("the time for all sidecars was over before it was its turn")
	errBodyTooBig  = errors.New("its statistics are too many")
	errAllTooBig   = errors.New("the statistics of all sidecars are too many")
	errBadText     = errors.New("not the text format of Prometheus")
	errBadResponse = errors.New("it did not answer 200")
)

// scrapeReason is the value of the label reason; empty for nil.
func scrapeReason(err error) string {
	var network net.Error
	switch {
	case err == nil:
		return ""
	case errors.Is(err, errNotReached):
		return "not_reached"
	case errors.Is(err, errBodyTooBig), errors.Is(err, errAllTooBig):
		return "too_big"
	case errors.Is(err, errBadText):
		return "format"
	case errors.Is(err, errBadResponse):
		return "status"
	case errors.Is(err, redirect.ErrGone):
		return "gone"
	case errors.Is(err, context.DeadlineExceeded), errors.As(err, &network) && network.Timeout():
		return "timeout"
	case errors.Is(err, syscall.ECONNREFUSED):
		return "refused"
	default:
		return "broken"
	}
}

// ask fills in the result of one sidecar. kept counts the bytes of all.
func (p *proxies) ask(ctx context.Context, choice proxyChoice, r *proxyResult, kept *atomic.Int64) {
	start := time.Now()
	ctx, cancel := context.WithTimeout(ctx, p.limits.each)
	defer cancel()
	r.stats, r.err = p.fetch(ctx, choice, r.target, kept)
	if more, ok := choice.membership(r.stats); r.err == nil && ok {
		var stats proxyStats
		stats, r.err = p.fetch(ctx, more, r.target, kept)
		r.stats.add(stats)
	}
	if r.err != nil {
		kept.Add(-r.stats.bytes)
		r.stats = proxyStats{}
	}
	r.took = time.Since(start)
}

func (p *proxies) fetch(ctx context.Context, choice proxyChoice, t proxyTarget, kept *atomic.Int64) (proxyStats, error) {
	transport := &http.Transport{
		DialContext:            func(ctx context.Context, _, _ string) (net.Conn, error) { return p.dial(ctx, t) },
		DisableKeepAlives:      true,
		DisableCompression:     true,
		MaxResponseHeaderBytes: 64 << 10,
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://envoy"+choice.path, nil)
	if err != nil {
		return proxyStats{}, err
	}
	resp, err := transport.RoundTrip(req) // a client would follow redirects
	if err != nil {
		return proxyStats{}, err
	}
	defer func() { _ = resp.Body.Close() }()
	if resp.StatusCode != http.StatusOK {
		return proxyStats{}, fmt.Errorf("%w: %d", errBadResponse, resp.StatusCode)
	}
	keep := func(n int) error {
		if kept.Add(int64(n)) > p.limits.kept {
			return errAllTooBig
		}
		return nil
	}
	// One byte more than may come tells that there was more.
	body := &io.LimitedReader{R: resp.Body, N: p.limits.body + 1}
	stats, err := parseProxyStats(body, choice, keep)
	if body.N <= 0 {
		err = fmt.Errorf("%w: more than %d bytes", errBodyTooBig, p.limits.body)
	}
	return stats, err
}
